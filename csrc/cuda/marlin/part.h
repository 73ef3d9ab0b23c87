// SPDX-License-Identifier: Apache-2.0
// Division of the GEMM's work: the part of an output tile that a block computes at a time, the
// position of a warp in it, and where the groups of scales begin and end.
#pragma once

#include "cuda/device/device.h"
#include "problem.h"

namespace compressed_linear::cuda::marlin {

// Some k tiles of one output tile.
struct Part {
  int tile;        // number of the output tile
  int m0, n0;      // its first row and column
  int begin, end;  // k tiles
};

// The part that begins with k tile `unit` of all k tiles of all output tiles, and ends with the
// output tile or at `unit_end`. Tiles of the same weights are consecutive, so that these stay in
// the L2 cache.
template <int ShapeIndex>
CL_DEVICE Part part_at(const Params& p, int64_t unit, int64_t unit_end) {
  constexpr Shape S = kShapes[ShapeIndex];
  const int tile = static_cast<int>(unit / p.k_tiles);
  Part part;
  part.tile = tile;
  part.m0 = tile % p.m_tiles * S.tile_m();
  part.n0 = tile / p.m_tiles * S.tile_n();
  part.begin = static_cast<int>(unit % p.k_tiles);
  const int64_t left = unit_end - unit;
  part.end = p.k_tiles - part.begin < left ? p.k_tiles : part.begin + static_cast<int>(left);
  return part;
}

// A lane, and its warp's position in the shape n x m x k of the block.
struct WarpPosition {
  int lane, n, m, k;
};

template <int ShapeIndex>
CL_DEVICE WarpPosition warp_position(int thread) {
  constexpr Shape S = kShapes[ShapeIndex];
  const int lane = thread & 31, warp = thread >> 5;
  return {lane, warp % S.warps_n, warp / S.warps_n % S.warps_m, warp / S.warps_n / S.warps_m};
}

// K tiles in a group of scales; 0 for small groups, of which a k tile has `scale_rows`.
CL_DEVICE int tiles_per_group(const Params& p) { return p.group / kTileK; }

// The groups in one k tile, as one warp sees them.
struct TileGroups {
  bool small;   // several groups in the k tile
  bool begins;  // a group, or the part, begins with the first step
  bool ends;    // a group, or the part, ends with the last step
  int steps;    // of mma, in a group

  // Whether the warp's step number `i`, which is step `step` of the k tile, needs other zero points
  // than the one before.
  CL_DEVICE bool first(int i, int step) const {
    return small ? i == 0 || step % steps == 0 : begins && i == 0;
  }
  // Whether it is the warp's last step, of `count`, in a group.
  CL_DEVICE bool last(int i, int step, int count) const {
    return small ? i == count - 1 || (step + 1) % steps == 0 : ends && i == count - 1;
  }
  // Row of the stage's scales and zero points.
  CL_DEVICE int row(int step) const { return small ? step / steps : 0; }
};

}  // namespace compressed_linear::cuda::marlin
