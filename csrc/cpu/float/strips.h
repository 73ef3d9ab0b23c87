// SPDX-License-Identifier: Apache-2.0
// What both drivers of strips share: how K is cut among threads where there are fewer strips than
// these, and how x is measured where all of it has one scale.
#pragma once

#include "cpu/common/arena.h"
#include "cpu/common/rows.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kStripLanes = kStrip * kTile;
constexpr int64_t kLeastPartBytes = 16 << 10;  // packed weights of a strip worth a thread's while
constexpr int64_t kSumBytes = 4 << 20;         // sums of segments kept at once

inline int64_t strip_count(const Geometry& g) { return (g.tiles + kStrip - 1) / kStrip; }

// Parts of K for each strip: several where there are too few strips for the threads; one thread has
// all the strips to itself.
inline int64_t count_k_parts(const Geometry& g, int64_t rows, int64_t segments, int64_t threads) {
  const int64_t strips = strip_count(g);
  if (threads == 1 || strips == 0 || strips >= 2 * threads ||
      strips * rows * segments * kStripLanes * 4 > kSumBytes)
    return 1;
  int64_t parts = (4 * threads + strips - 1) / strips;
  const int64_t worthwhile = kStrip * g.tile_bytes() / kLeastPartBytes;
  parts = least(least(parts, worthwhile), chunk_count(g));
  return parts > 1 ? parts : 1;
}

// Measures x for the activation of `p`, if it has one; factor[m] is where rows keep theirs.
inline void measure_input(Problem& p, float* factor) {
  if (!p.x.activation.present) return;
  const Geometry& g = p.weight.geometry;
  p.x.factor = factor;
  float* row = static_cast<float*>(
      worker_arena().reserve(static_cast<size_t>(g.padded_k + g.k) * sizeof(float)));
  measure_tensor(p, row, row + g.padded_k);
}

}  // namespace
}  // namespace compressed_linear::cpu
