// SPDX-License-Identifier: Apache-2.0
#include "segments.h"

#include "cpu/repack/quads.h"
#include "rows.h"

namespace compressed_linear::cpu {

std::string why_not_grouped(const Geometry& g, int64_t activation_group) {
  if (activation_group == 0 || activation_group >= g.k) return "";
  const std::string what = "activations in groups of " + std::to_string(activation_group);
  if (activation_group % kQuad != 0) return what + ", expected a multiple of 4";
  if (!g.identity() && activation_group % g.group != 0)
    return what + " beside weights in groups of " + std::to_string(g.group) +
           ", expected a multiple of these or weights in groups of a multiple of 4";
  return "";
}

int64_t count_segments(const Geometry& g, int64_t activation_group) {
  int64_t count = 0;
  for_each_segment(g, activation_group, [&](const IntegerSegment&) { ++count; });
  return count;
}

void sum_codes(const Geometry& g, int64_t activation_group, const uint8_t* packed, int64_t tile,
               int32_t* sums) {
  for_each_segment(g, activation_group, [&](const IntegerSegment& segment) {
    for (int64_t i = 0; i < kTile; ++i) sums[i] = 0;
    for (int64_t k = segment.begin; k < segment.end; k += kQuad) {
      uint32_t codes[kTile];
      unpack_quad(g, packed, tile, k, codes);
      for (int64_t i = 0; i < kTile; ++i) {
        const uint32_t pairs = (codes[i] & 0x00ff00ffu) + (codes[i] >> 8 & 0x00ff00ffu);
        sums[i] += static_cast<int32_t>((pairs & 0xffffu) + (pairs >> 16));
      }
    }
    sums += kTile;
  });
}

}  // namespace compressed_linear::cpu
