// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// std::min and std::max, but internal to the unit: where it is not inlined the linker keeps one
// copy of std::min, which may be one that was compiled for an instruction set this processor lacks.
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace compressed_linear::cpu
