// SPDX-License-Identifier: Apache-2.0
// A stage of the pipeline in shared memory: one k tile of x, weights, scales and zero points. Here
// it is filled by cp.async, and read as the operands of mma.
//
// | from             | holds
// | 0                | x [tile m][kTileK], 16 bits; see x_place
// | tile m * 128     | codes [step][warp n], each the words of a strip's tile; see code_place
// | p.scale_offset   | scales [scale_rows][tile n]
// | p.zero_offset    | zero points [scale_rows][tile n], where there are any
#pragma once

#include "cuda/device/device.h"
#include "decode.h"
#include "part.h"
#include "problem.h"

namespace compressed_linear::cuda::marlin {

// Offset of 16 bytes of x, where a row has eight such pieces. They are permuted within their row,
// so that one piece of eight rows is in eight different groups of banks.
CL_DEVICE uint32_t x_place(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4));
}

// Offset of 16 bytes of codes. A lane of 8-bit codes reads two pieces, so neighbouring lanes would
// share banks: every other eight pieces are exchanged in pairs.
template <int Bits>
CL_DEVICE uint32_t code_place(int piece) {
  return static_cast<uint32_t>((Bits == 8 ? piece ^ (piece >> 3 & 1) : piece) << 4);
}

template <int ShapeIndex>
CL_DEVICE void fetch_x(const Params& p, const Part& part, int k0, uint32_t stage) {
  constexpr Shape S = kShapes[ShapeIndex];
  const uint16_t* x = static_cast<const uint16_t*>(p.x);
#pragma unroll
  for (int c = thread_index(); c < S.tile_m() * 8; c += S.threads()) {
    const int row = c / 8, piece = c % 8;
    const bool valid = part.m0 + row < p.m && k0 + piece * 8 < p.k;
    const uint16_t* from =
        valid ? x + static_cast<int64_t>(part.m0 + row) * p.x_stride + k0 + piece * 8 : x;
    copy_async<16>(stage + x_place(row, piece), from, valid);
  }
}

// Four strips of warps_n tiles.
template <Element E, int ShapeIndex>
CL_DEVICE void fetch_codes(const Params& p, const Part& part, int tile, uint32_t stage) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int kBits = bits_of(E);
  constexpr int kTilePieces = 2 * kBits * 4;  // 16-byte pieces of a tile of 64 columns
  constexpr int kStripPieces = kTilePieces * S.warps_n;
  const uint32_t base = stage + static_cast<uint32_t>(S.tile_m() * kTileK * 2);
  const int64_t strip_words = compressed_linear::marlin::strip_words(kBits, p.n);
#pragma unroll
  for (int c = thread_index(); c < kSteps * kStripPieces; c += S.threads()) {
    const int step = c / kStripPieces, piece = c % kStripPieces;
    const bool valid = tile * kTileK + step * kStepK < p.k &&
                       part.n0 + piece / kTilePieces * compressed_linear::marlin::kTileN < p.n;
    const uint32_t* from = p.weight;
    if (valid)
      from += static_cast<int64_t>(tile * kSteps + step) * strip_words +
              static_cast<int64_t>(part.n0) * kBits / 2 + piece * 4;
    copy_async<16>(base + code_place<kBits>(c), from, valid);
  }
}

// Scales or zero points: `scale_rows` rows from `first_group` on of an array with rows of
// `n_bytes`, `row_bytes` of each.
template <int ShapeIndex>
CL_DEVICE void fetch_rows(const Params& p, const Part& part, int first_group, const char* data,
                          uint32_t to, int row_bytes, int64_t n_bytes) {
  constexpr Shape S = kShapes[ShapeIndex];
  const int pieces = row_bytes / 16;
  for (int c = thread_index(); c < p.scale_rows * pieces; c += S.threads()) {
    const int row = c / pieces, piece = c % pieces;
    const int64_t column = static_cast<int64_t>(part.n0) * row_bytes / S.tile_n() + piece * 16;
    const bool valid = first_group + row < p.groups && column < n_bytes;
    copy_async<16>(to + static_cast<uint32_t>(c << 4),
                   valid ? data + (first_group + row) * n_bytes + column : data, valid);
  }
}

// Starts the copies of k tile `tile` into the stage at shared address `stage`. Scales come with the
// k tile that ends a group, where sums are scaled; zero points with the one that begins it. The two
// conditions are those of `begins` and `ends` in gemm; a function for them would cost instructions.
template <Element E, int ShapeIndex>
CL_DEVICE void fetch(const Params& p, const Part& part, int tile, uint32_t stage) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int kBits = bits_of(E);
  fetch_x<ShapeIndex>(p, part, tile * kTileK, stage);
  fetch_codes<E, ShapeIndex>(p, part, tile, stage);
  const int per_group = tiles_per_group(p);
  const int first_group = p.group < kTileK ? tile * p.scale_rows : tile * kTileK / p.group;
  if (per_group == 0 || tile + 1 == part.end || (tile + 1) % per_group == 0) {
    const int bytes = bytes_of(p.scale_type);
    fetch_rows<ShapeIndex>(p, part, first_group, static_cast<const char*>(p.scale),
                           stage + p.scale_offset, S.tile_n() * bytes,
                           static_cast<int64_t>(p.n) * bytes);
  }
  if constexpr (is_integer(E)) {
    if (p.zero != nullptr && (per_group == 0 || tile == part.begin || tile % per_group == 0))
      fetch_rows<ShapeIndex>(p, part, first_group, reinterpret_cast<const char*>(p.zero),
                             stage + p.zero_offset, S.tile_n() * kBits / 8,
                             static_cast<int64_t>(p.n) * kBits / 8);
  }
}

// Operands A of one step: for each of the warp's blocks of 16 rows.
template <int ShapeIndex>
CL_DEVICE void load_x(uint32_t stage, const WarpPosition& at, int step,
                      uint32_t (&a)[kShapes[ShapeIndex].m_blocks][4]) {
  constexpr int kM = kShapes[ShapeIndex].m_blocks;
#pragma unroll
  for (int m = 0; m < kM; ++m)
    load_matrix_x4(a[m],
                   stage + x_place((at.m * kM + m) * 16 + at.lane % 16, step * 2 + at.lane / 16));
}

// The lane's words of codes of one step: 16 input channels by the warp's 64 output channels.
template <Element E, int ShapeIndex>
CL_DEVICE void load_codes(uint32_t stage, const WarpPosition& at, int step,
                          uint32_t (&words)[bits_of(E)]) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int kBits = bits_of(E), kPieces = kBits / 4;
  const uint32_t base = stage + static_cast<uint32_t>(S.tile_m() * kTileK * 2 +
                                                      (step * S.warps_n + at.n) * kBits * 128);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const Words4 four = load_shared<Words4>(base + code_place<kBits>(kPieces * at.lane + i));
    words[4 * i] = four.x;
    words[4 * i + 1] = four.y;
    words[4 * i + 2] = four.z;
    words[4 * i + 3] = four.w;
  }
}

// The lane's zero points, one for each of the warp's eight column blocks, as operands of `decode`.
template <class T, Element E, int ShapeIndex>
CL_DEVICE void load_zeros(const Params& p, uint32_t stage, const WarpPosition& at, int row,
                          uint32_t (&zeros)[8]) {
  constexpr int kBits = bits_of(E), kTileN = kShapes[ShapeIndex].tile_n();
  const uint32_t base =
      stage + p.zero_offset + static_cast<uint32_t>((row * kTileN + at.n * 64) * kBits / 8);
  uint32_t words[2];
  if constexpr (kBits == 4) {
    words[0] = words[1] = load_shared<uint32_t>(base + static_cast<uint32_t>(at.lane / 4 * 4));
  } else {
    const Words2 two = load_shared<Words2>(base + static_cast<uint32_t>(at.lane / 4 * 8));
    words[0] = two.x;
    words[1] = two.y;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) zeros[j] = zero_operand<T, E>(zero_of<E>(words, j));
}

// Eight neighbouring scales in fp32. Those of one byte are stored in the order 0 2 1 3 unless
// `plain`.
CL_DEVICE void load_eight_scales(uint32_t address, Number type, bool plain, float* to) {
  if (type == Number::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Floats4 four = load_shared<Floats4>(address + 16 * i);
      to[4 * i] = four.x;
      to[4 * i + 1] = four.y;
      to[4 * i + 2] = four.z;
      to[4 * i + 3] = four.w;
    }
  } else if (bytes_of(type) == 2) {
    const Words4 words = load_shared<Words4>(address);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint16_t half = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
      to[i] = type == Number::float16 ? widen<Half>(half) : widen<BFloat16>(half);
    }
  } else {
    const Words2 words = load_shared<Words2>(address);
    const uint32_t fours[2] = {plain ? words.x : prmt(words.x, 0, 0x3120),
                               plain ? words.y : prmt(words.y, 0, 0x3120)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint8_t code = static_cast<uint8_t>(fours[i / 4] >> (i % 4 * 8));
      to[i] = type == Number::e4m3 ? widen_e4m3(code) : widen_e8m0(code);
    }
  }
}

// The lane's scales: scale[i][j] of its column i, which is 2 * (lane % 4) + i of the eight of
// column block j. In grouped columns they are 16 neighbours, first those of column 0; in channel
// columns twice eight neighbours, each of four column blocks.
template <int ShapeIndex>
CL_DEVICE void load_scales(const Params& p, uint32_t stage, const WarpPosition& at, int row,
                           float (&scale)[2][8]) {
  const uint32_t base = stage + p.scale_offset +
                        static_cast<uint32_t>((row * kShapes[ShapeIndex].tile_n() + at.n * 64) *
                                              bytes_of(p.scale_type));
  const bool channel = p.groups == 1;
  const int bytes = bytes_of(p.scale_type);
  const uint32_t from = base + static_cast<uint32_t>(at.lane % 4 * (channel ? 8 : 16) * bytes);
  float runs[2][8];
  load_eight_scales(from, p.scale_type, channel, runs[0]);
  load_eight_scales(from + static_cast<uint32_t>((channel ? 32 : 8) * bytes), p.scale_type, channel,
                    runs[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) scale[i][j] = channel ? runs[j / 4][j % 4 * 2 + i] : runs[i][j];
}

}  // namespace compressed_linear::cuda::marlin
