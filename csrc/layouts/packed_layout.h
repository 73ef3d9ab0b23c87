// SPDX-License-Identifier: Apache-2.0
// The packed layouts there are.
#pragma once

#include <cstdint>

namespace compressed_linear::cpu {

enum class PackedLayout : uint8_t {
  planes,  // of planes.h
  quads,   // of quads.h, integers only; the geometry is make_quads_geometry's
  marlin,  // of marlin.h, codes of 4 and 8 bits; n is whole strips, k a multiple of kStripK
};

}  // namespace compressed_linear::cpu
