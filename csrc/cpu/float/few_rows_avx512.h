// SPDX-License-Identifier: Apache-2.0
// How the AVX-512 engines end a segment of a strip that they multiply with few rows: the zero
// points, then the scales.
#pragma once

#include "decode_avx512.h"
#include "driver.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Adds segment `s`, whose sums are acc[row][tile], to totals[row][channel], or keeps the sums where
// the caller wants them unscaled. All tiles at once: a branch for each would force the sums out of
// their registers.
template <int Rows, int Tiles>
[[gnu::always_inline]] inline void finish_segment(const FewRowsArgs& a, int64_t s,
                                                  __m512 (&acc)[Rows][Tiles],
                                                  float (*totals)[Tiles * kTile]) {
  const int64_t group = a.segments[s].group;
  if (a.row_sums != nullptr) {
    __m512 offset[Tiles];
    load_negated_offsets(a.p, a.tile, group, offset);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512 row_sum = _mm512_set1_ps(a.row_sums[s * Rows + r]);
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t) acc[r][t] = _mm512_fmadd_ps(row_sum, offset[t], acc[r][t]);
    }
  }
  if (a.sums != nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t)
        _mm512_store_ps(a.sums + (s * Rows + r) * kStripLanes + t * kTile, acc[r][t]);
    return;
  }
  __m512 scale[Tiles];
  load_scales(a.p, a.tile, group, scale);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < Tiles; ++t) {
      float* total = &totals[r][t * kTile];
      _mm512_store_ps(total, _mm512_fmadd_ps(scale[t], acc[r][t], _mm512_load_ps(total)));
    }
}

}  // namespace
}  // namespace compressed_linear::cpu
