// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "least.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// `rows` rows cut as evenly as possible into panels of at most `limit`.
struct Panels {
  int64_t count, base, longer;
  Panels(int64_t rows, int64_t limit)
      : count((rows + limit - 1) / limit),
        base(count > 0 ? rows / count : 0),
        longer(count > 0 ? rows % count : 0) {}
  int64_t begin(int64_t panel) const { return panel * base + least(panel, longer); }
  int64_t rows(int64_t panel) const { return base + (panel < longer ? 1 : 0); }
};

}  // namespace
}  // namespace compressed_linear::cpu
