// SPDX-License-Identifier: Apache-2.0
// Parameters of the mixed-input GEMM, and the division of its work into tiles and blocks. Plain
// data, for nvcc and for g++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layouts/marlin.h"

namespace compressed_linear::cuda::marlin {

// Element types of weights. Integers may have zero points; `codebook` has 16 entries of any value.
enum class Element : int { uint4, uint8, e4m3, e2m1, codebook };
COMPRESSED_LINEAR_LAYOUT int bits_of(Element element) {
  return element == Element::uint8 || element == Element::e4m3 ? 8 : 4;
}
COMPRESSED_LINEAR_LAYOUT bool is_integer(Element element) {
  return element == Element::uint4 || element == Element::uint8;
}

enum class Number : int { float16, bfloat16, float32, e4m3, e8m0 };
COMPRESSED_LINEAR_LAYOUT int bytes_of(Number number) {
  return number == Number::float32                                 ? 4
         : number == Number::float16 || number == Number::bfloat16 ? 2
                                                                   : 1;
}

constexpr int kStepK = 16;  // of one mma
constexpr int kTileK = 64;  // of one stage of the pipeline
constexpr int kSteps = kTileK / kStepK;
constexpr int kPadding = 8;  // floats between rows of a tile of results in shared memory

// y[m, n] = row_scale[n] * sum_k x[m, k] * w[n, k] + bias[n]
// w[n, k] = scale[k / group, n] * (decode(code) - zero[k / group, n])
//
// Layouts as in layouts/marlin.h: weight int32 [k / 16, n * bits / 2]; scale [groups, n] of any
// of the `Number`s, in channel columns if there is one group, else in grouped ones (those of one
// byte in byte columns); zero int32 [groups, n * bits / 32] or null, in which case `code_bias`
// takes its place. x [m, k] rows of 16-bit floats, 16-byte aligned; row_scale float [n] and bias
// [n] in order of channels, either may be null.
struct Params {
  const void* x;
  const uint32_t* weight;
  const void* scale;
  const uint32_t* zero;
  const float* codebook;
  const float* row_scale;
  const void* bias;
  void* out;
  float* partial;  // [2 * blocks, tile m, tile n]: sums of parts of a tile
  int* arrived;    // [blocks], zero before and after: parts of a tile that are done
  int64_t x_stride;
  int m, n, k, group, code_bias;
  Number scale_type, bias_type, out_type;
  // How the work is cut; see launch_shape.
  int m_tiles, n_tiles, k_tiles, per_block, blocks;
  int groups;
  int scale_rows;  // that a stage holds
  uint32_t scale_offset, zero_offset, stage_bytes;
};

// The shape of a block's work: warps m x n x k, each with `m_blocks` times 16 rows by 64 columns.
struct Shape {
  int m_blocks, warps_m, warps_n, warps_k;
  COMPRESSED_LINEAR_HOST_DEVICE constexpr int tile_m() const { return 16 * m_blocks * warps_m; }
  COMPRESSED_LINEAR_HOST_DEVICE constexpr int tile_n() const {
    return compressed_linear::marlin::kTileN * warps_n;
  }
  COMPRESSED_LINEAR_HOST_DEVICE constexpr int threads() const {
    return 32 * warps_m * warps_n * warps_k;
  }
};

// Few tokens: one row of mma tiles, so the warps share K. Many: no weight is decoded more than
// twice in a block. Two sets of sums (of the group, of the part) take so many registers that a
// multiprocessor holds one block. The memory's latency is hidden by the copies in flight, 24 KiB or
// more of weights.
constexpr Shape kShapes[] = {{1, 1, 4, 2}, {2, 1, 4, 2}, {2, 2, 4, 1}};
constexpr int kShapeCount = 3;
COMPRESSED_LINEAR_LAYOUT int shape_for(int64_t m) { return m <= 16 ? 0 : m <= 32 ? 1 : 2; }

COMPRESSED_LINEAR_LAYOUT int stages_of(Element element) { return bits_of(element) == 4 ? 4 : 3; }

constexpr int64_t kMaxBlocks = 1024;  // entries of `arrived`

// How the kernel is launched, and how many floats `partial` must have.
struct LaunchShape {
  int shape;  // number in kShapes
  int threads, blocks;
  int64_t shared_bytes, partial_floats;
};

// Divides the work of `p`, in which the problem is set, among `processors` multiprocessors, and
// sets its fields from `m_tiles` on. All k tiles of all output tiles are one sequence, of which
// each block has an equal piece, so a block may begin and end inside of an output tile (Osama et
// al., "Stream-K", 2023).
inline LaunchShape launch_shape(Params& p, Element element, int processors) {
  LaunchShape launch{};
  launch.shape = shape_for(p.m);
  const Shape shape = kShapes[launch.shape];
  const int tile_m = shape.tile_m(), tile_n = shape.tile_n();
  p.m_tiles = (p.m + tile_m - 1) / tile_m;
  p.n_tiles = (p.n + tile_n - 1) / tile_n;
  p.k_tiles = (p.k + kTileK - 1) / kTileK;
  const int64_t tiles = static_cast<int64_t>(p.m_tiles) * p.n_tiles, units = tiles * p.k_tiles;
  const int64_t most = std::min<int64_t>(processors, kMaxBlocks);
  int64_t per_block;
  if (tiles >= 4 * most) {
    // Many tiles: whole ones, since adding up parts costs more than idle multiprocessors.
    per_block = (tiles + most - 1) / most * p.k_tiles;
  } else {
    // A part of fewer than four k tiles only fills and empties its pipeline.
    per_block = std::max<int64_t>((units + most - 1) / most, std::min(4, p.k_tiles));
  }
  p.per_block = static_cast<int>(per_block);
  p.blocks = static_cast<int>((units + per_block - 1) / per_block);
  // Whole channels: one group, which may end with a k tile that is not full.
  p.groups = p.k / p.group;
  if (p.groups == 1) p.group = p.k_tiles * kTileK;
  p.scale_rows = p.group < kTileK ? kTileK / p.group : 1;

  const uint32_t x_bytes = static_cast<uint32_t>(tile_m * kTileK * 2);
  const uint32_t weight_bytes = static_cast<uint32_t>(kTileK * tile_n * bits_of(element) / 8);
  p.scale_offset = x_bytes + weight_bytes;
  p.zero_offset =
      p.scale_offset + static_cast<uint32_t>(p.scale_rows * tile_n * bytes_of(p.scale_type));
  p.stage_bytes = p.zero_offset;
  if (p.zero != nullptr)
    p.stage_bytes += static_cast<uint32_t>(p.scale_rows * tile_n * bits_of(element) / 8);

  launch.threads = shape.threads();
  launch.blocks = p.blocks;
  const int64_t results = static_cast<int64_t>(tile_m) * (tile_n + kPadding) * 4 + 16;
  launch.shared_bytes =
      std::max<int64_t>(static_cast<int64_t>(p.stage_bytes) * stages_of(element), results);
  launch.partial_floats = per_block % p.k_tiles == 0 ? 0 : int64_t{2} * p.blocks * tile_m * tile_n;
  return launch;
}

}  // namespace compressed_linear::cuda::marlin
