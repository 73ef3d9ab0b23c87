// SPDX-License-Identifier: Apache-2.0
// The mixed-input GEMM of the Marlin kind (Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive
// Parallel Inference on Large Language Models", 2024), written from that description for sm_80 and
// up: weights in the order of tensor-core fragments come through a ring of stages by cp.async, and
// are decoded in registers between shared memory and mma.
//
// Unlike Marlin, weights are not scaled before they are multiplied: the sum of a group is
// accumulated by itself in fp32, from codes less their zero points, which are exact in 16 bits, and
// scaled when the group ends. So w is never rounded, as the numerical contract requires.
//
// The same call gives the same bits: parts of an output tile that several blocks have computed are
// added up in the order of k (results.h).
//
// Has run on hardware: nothing; the kernel has run in the emulator only.
#pragma once

#include "cuda/device/device.h"
#include "decode.h"
#include "part.h"
#include "problem.h"
#include "results.h"
#include "stage.h"

namespace compressed_linear::cuda::marlin {

// One step: decodes the lane's codes, and adds their products with x to the sums of the group.
template <class T, Element E, int M>
CL_DEVICE void multiply_step(const uint32_t (&a)[M][4], const uint32_t (&words)[bits_of(E)],
                             const uint32_t (&zeros)[8], const Codebook& book,
                             float (&group_sums)[M][8][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    constexpr int kEach = bits_of(E) / 4;
    const uint32_t codes[2] = {words[j * kEach], words[j * kEach + kEach - 1]};
    uint32_t first[2], second[2];
    decode<T, E>(codes, zeros[2 * j], zeros[2 * j + 1], book, first, second);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      multiply_add<T>(group_sums[m][2 * j], a[m], first);
      multiply_add<T>(group_sums[m][2 * j + 1], a[m], second);
    }
  }
}

// Scales the sums of a group, adds them to those of the part, and clears them.
template <int M>
CL_DEVICE void finish_group(const float (&scale)[2][8], float (&group_sums)[M][8][4],
                            float (&sums)[M][8][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[m][j][e] += scale[e % 2][j] * group_sums[m][j][e];
        group_sums[m][j][e] = 0;
      }
}

// The warp's steps of one k tile, which is in `stage`. `zeros` are those of the current group.
template <class T, Element E, int ShapeIndex>
CL_DEVICE void multiply_tile(const Params& p, uint32_t stage, const TileGroups& groups,
                             const WarpPosition& at, const Codebook& book, uint32_t (&zeros)[8],
                             float (&group_sums)[kShapes[ShapeIndex].m_blocks][8][4],
                             float (&sums)[kShapes[ShapeIndex].m_blocks][8][4]) {
  constexpr int kWarpSteps = kSteps / kShapes[ShapeIndex].warps_k;
#pragma unroll
  for (int i = 0; i < kWarpSteps; ++i) {
    const int step = at.k * kWarpSteps + i;
    const int row = groups.row(step);
    if constexpr (is_integer(E)) {
      const bool first = groups.first(i, step);
      if (p.zero != nullptr && first) load_zeros<T, E, ShapeIndex>(p, stage, at, row, zeros);
    }
    uint32_t a[kShapes[ShapeIndex].m_blocks][4];
    load_x<ShapeIndex>(stage, at, step, a);
    uint32_t words[bits_of(E)];
    load_codes<E, ShapeIndex>(stage, at, step, words);
    multiply_step<T, E>(a, words, zeros, book, group_sums);
    if (groups.last(i, step, kWarpSteps)) {
      float scale[2][8];
      load_scales<ShapeIndex>(p, stage, at, row, scale);
      finish_group(scale, group_sums, sums);
    }
  }
}

template <class T, Element E, int ShapeIndex>
CL_GLOBAL(kShapes[ShapeIndex].threads())
void gemm(CL_PARAMS Params p) {
  constexpr int kStages = stages_of(E), kM = kShapes[ShapeIndex].m_blocks;
  const WarpPosition at = warp_position<ShapeIndex>(thread_index());
  const uint32_t shared = shared_base();
  const auto stage_at = [&](int slot) {
    return shared + static_cast<uint32_t>(slot) * p.stage_bytes;
  };
  Codebook book = {};
  if constexpr (E == Element::codebook) book = load_codebook<T>(p.codebook);

  const int64_t units = static_cast<int64_t>(p.m_tiles) * p.n_tiles * p.k_tiles;
  int64_t unit = static_cast<int64_t>(block_x()) * p.per_block;
  const int64_t unit_end = unit + p.per_block < units ? unit + p.per_block : units;
  while (unit < unit_end) {
    const Part part = part_at<ShapeIndex>(p, unit, unit_end);
    float sums[kM][8][4], group_sums[kM][8][4];
    for (int m = 0; m < kM; ++m)
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) sums[m][j][i] = group_sums[m][j][i] = 0;
    uint32_t zeros[8];
    for (int j = 0; j < 8; ++j)
      zeros[j] = zero_operand<T, E>(static_cast<uint32_t>(is_integer(E) ? p.code_bias : 0));

    // The k tiles pass through a ring of stages: while one is multiplied, the next are on their
    // way.
    for (int i = 0; i < kStages - 1; ++i) {
      if (part.begin + i < part.end) fetch<E, ShapeIndex>(p, part, part.begin + i, stage_at(i));
      copy_async_commit();
    }
    const int per_group = tiles_per_group(p), group_steps = p.group / kStepK;
    int slot = 0;
    for (int k_tile = part.begin; k_tile < part.end; ++k_tile) {
      copy_async_wait<kStages - 2>();
      sync_threads();
      // Into the stage that all warps have finished reading.
      const int ahead = k_tile + kStages - 1;
      const int free_slot = slot == 0 ? kStages - 1 : slot - 1;
      if (ahead < part.end) fetch<E, ShapeIndex>(p, part, ahead, stage_at(free_slot));
      copy_async_commit();

      const uint32_t stage = stage_at(slot);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      const bool small = per_group == 0;
      const bool begins = small || k_tile == part.begin || k_tile % per_group == 0;
      const bool ends = small || k_tile + 1 == part.end || (k_tile + 1) % per_group == 0;
      multiply_tile<T, E, ShapeIndex>(p, stage, {small, begins, ends, group_steps}, at, book, zeros,
                                      group_sums, sums);
    }
    copy_async_wait<0>();
    sync_threads();

    reduce_warps<ShapeIndex>(at, sums);
    if (part.begin == 0 && part.end == p.k_tiles)
      store_tile<ShapeIndex>(p, part);
    else
      reduce_blocks<ShapeIndex>(p, part);
    // The next part's copies overwrite the results.
    sync_threads();
    unit += part.end - part.begin;
  }
}

}  // namespace compressed_linear::cuda::marlin
