// SPDX-License-Identifier: Apache-2.0
// What both drivers of strips share: how x is measured where all of it has one scale.
#pragma once

#include "cpu/common/arena.h"
#include "cpu/common/rows.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kStripLanes = kStrip * kTile;

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
