// SPDX-License-Identifier: Apache-2.0
// The multiplication of a block of rows and tiles whose sums are in vector registers, for one chunk
// of decoded weights. driver.h says what a Core supplies.
#pragma once

#include "cpu/common/rows.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

struct MicroArgs {
  const uint8_t* weights;  // tile t, step i of a block: weights + t * tile_stride + i * kStepBytes
  int64_t tile_stride;
  int64_t block_stride;  // from a block of a tile to its next one
  const uint32_t* x;     // [step][part][row][word]
  const Segment* segments;
  int64_t segment_count;
  const float* scale;           // [segment][tile][16]
  const float* negated_offset;  // same shape, or null
  const float* row_sums;        // [segment][row]
  float* totals;                // [row][tile][16]
};

template <class Core, int Rows, int Tiles, int Parts>
void micro_kernel(const MicroArgs& a) {
  const float* scale = a.scale;
  for (int64_t s = 0; s < a.segment_count; ++s, scale += Tiles * kTile) {
    const Segment segment = a.segments[s];
    // Unrolled here and below, or the accumulators would go through memory.
    typename Core::Acc acc[Rows][Tiles];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t) acc[r][t] = Core::zero();
    constexpr int64_t kBlockSteps = kBlock / Core::kStep;
    const int64_t first = segment.begin / Core::kStep;
    const int64_t last = (segment.end + Core::kStep - 1) / Core::kStep;
    constexpr int kStepWords = Parts * Rows * Core::kWords;
    const uint8_t* block = a.weights + first / kBlockSteps * a.block_stride;
    const uint32_t* x = a.x + first * kStepWords;
    for (int64_t i = first; i < last; block += a.block_stride) {
      const int64_t end = least(last, (i / kBlockSteps + 1) * kBlockSteps);
      const uint8_t* w = block + i % kBlockSteps * Core::kStepBytes;
      for (; i < end; ++i, w += Core::kStepBytes, x += kStepWords) {
        typename Core::Weights weights[Tiles];
        for (int t = 0; t < Tiles; ++t) weights[t] = Core::load(w + t * a.tile_stride);
#pragma GCC unroll 4
        for (int q = 0; q < Parts; ++q)
#pragma GCC unroll 16
          for (int r = 0; r < Rows; ++r) {
            const typename Core::Activation activation =
                Core::broadcast(x + (q * Rows + r) * Core::kWords);
#pragma GCC unroll 8
            for (int t = 0; t < Tiles; ++t)
              acc[r][t] = Core::mac(acc[r][t], weights[t], activation);
          }
      }
    }
    typename Core::Sum sums[Rows][Tiles];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t) sums[r][t] = Core::sum(acc[r][t]);
    if (a.negated_offset != nullptr) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < Tiles; ++t)
          sums[r][t] = Core::add_offset(sums[r][t], a.row_sums[s * Rows + r],
                                        a.negated_offset + (s * Tiles + t) * kTile);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t)
        Core::scale_into(a.totals + (r * Tiles + t) * kTile, sums[r][t], scale + t * kTile);
  }
}

using MicroKernel = void (*)(const MicroArgs&);

template <class Core, int Rows, int Tiles>
MicroKernel micro_kernel_for(int64_t parts) {
  if constexpr (Core::kMaxParts > 1) {
    if (parts == 2) return &micro_kernel<Core, Rows, Tiles, 2>;
  }
  return &micro_kernel<Core, Rows, Tiles, 1>;
}

template <class Core, int Rows, int Tiles = Core::kTiles>
MicroKernel micro_kernel_for(int64_t tiles, int64_t parts) {
  if constexpr (Tiles > 1) {
    if (tiles < Tiles) return micro_kernel_for<Core, Rows, Tiles - 1>(tiles, parts);
  }
  return micro_kernel_for<Core, Rows, Tiles>(parts);
}

template <class Core, int Rows = Core::kRows>
MicroKernel micro_kernel_for(int64_t rows, int64_t tiles, int64_t parts) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return micro_kernel_for<Core, Rows - 1>(rows, tiles, parts);
  }
  return micro_kernel_for<Core, Rows>(tiles, parts);
}

// Blocks of a core whose sums are in vector registers.
template <class Core>
struct RegisterCore {
  struct Blocks {
    void operator()(const MicroArgs& a, int64_t rows, int64_t tiles, int64_t parts) const {
      micro_kernel_for<Core>(rows, tiles, parts)(a);
    }
  };
  static bool is_plain(Element) { return false; }
  static constexpr bool kHasFewRows = true, kHasUnit = false;
};

}  // namespace
}  // namespace compressed_linear::cpu
