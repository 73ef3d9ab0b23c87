// SPDX-License-Identifier: Apache-2.0
// The mixed-input GEMM of the Marlin kind (Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive
// Parallel Inference on Large Language Models", 2024), written from that description for sm_80 and
// up: weights lie in the order of tensor-core fragments, come through a ring of stages by cp.async,
// and are decoded in registers between shared memory and mma.
//
// Unlike Marlin, weights are not scaled before they are multiplied: a group's sum is added up by
// itself in fp32, from codes less their zero points, which are exact in 16 bits, and scaled when
// the group ends. So w is never rounded, as the numerical contract asks.
//
// Parts of an output tile that several blocks have worked on are added up by whichever of them is
// last, in the order of k: no block ever waits for another, and the same call gives the same bits.
//
// It has run in the emulator only, never on hardware.
#pragma once

#include "cuda/device/device.h"
#include "decode.h"
#include "problem.h"

namespace compressed_linear::cuda::marlin {

// What one thread knows of the part of an output tile that its block works on.
struct Part {
  int m0, n0;      // first row and column of the tile
  int begin, end;  // k tiles
};

// Starts the copies of k tile `tile` into the stage at shared address `stage`.
template <class T, Element E, int ShapeIndex>
CL_DEVICE void fetch(const Params& p, const Part& part, int tile, uint32_t stage) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int kThreads = S.threads(), kBits = bits_of(E);
  const int t = thread_index();
  const int k0 = tile * kTileK;

  // x: rows of eight 16-byte parts, each part moved within its row so that eight rows of one part
  // lie in eight different banks.
  const uint16_t* x = static_cast<const uint16_t*>(p.x);
#pragma unroll
  for (int c = t; c < S.tile_m() * 8; c += kThreads) {
    const int row = c / 8, piece = c % 8;
    const bool valid = part.m0 + row < p.m && k0 + piece * 8 < p.k;
    const uint16_t* from =
        valid ? x + static_cast<int64_t>(part.m0 + row) * p.x_stride + k0 + piece * 8 : x;
    copy_async<16>(stage + static_cast<uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4)), from,
                   valid);
  }

  // Weights: four strips of warps_n tiles, as they lie. A lane of 8-bit codes reads two parts of 16
  // bytes, so neighbouring lanes would share banks; every other eight parts are exchanged in pairs.
  constexpr int kTilePieces = 2 * kBits * 4;  // 16-byte parts of a tile of 64 columns
  constexpr int kStripPieces = kTilePieces * S.warps_n;
  const uint32_t base = stage + static_cast<uint32_t>(S.tile_m() * kTileK * 2);
  const int64_t strip_words = compressed_linear::marlin::strip_words(kBits, p.n);
#pragma unroll
  for (int c = t; c < kSteps * kStripPieces; c += kThreads) {
    const int step = c / kStripPieces, piece = c % kStripPieces;
    const bool valid = k0 + step * kStepK < p.k &&
                       part.n0 + piece / kTilePieces * compressed_linear::marlin::kTileN < p.n;
    const uint32_t* from = p.weight;
    if (valid)
      from += static_cast<int64_t>(tile * kSteps + step) * strip_words +
              static_cast<int64_t>(part.n0) * kBits / 2 + piece * 4;
    const int place = kBits == 8 ? c ^ (c >> 3 & 1) : c;
    copy_async<16>(base + static_cast<uint32_t>(place << 4), from, valid);
  }

  const int per_group = p.group / kTileK;  // k tiles, 0 for small groups
  const int first_group = p.group < kTileK ? tile * p.scale_rows : k0 / p.group;
  // Scales are wanted where sums are scaled, zero points where codes begin to need them.
  const auto fetch_rows = [&](const char* data, uint32_t to, int row_bytes, int64_t n_bytes) {
    const int pieces = row_bytes / 16;
    for (int c = t; c < p.scale_rows * pieces; c += kThreads) {
      const int row = c / pieces, piece = c % pieces;
      const int64_t column = static_cast<int64_t>(part.n0) * row_bytes / S.tile_n() + piece * 16;
      const bool valid = first_group + row < p.groups && column < n_bytes;
      copy_async<16>(to + static_cast<uint32_t>(c << 4),
                     valid ? data + (first_group + row) * n_bytes + column : data, valid);
    }
  };
  if (per_group == 0 || tile + 1 == part.end || (tile + 1) % per_group == 0) {
    const int bytes = bytes_of(p.scale_type);
    fetch_rows(static_cast<const char*>(p.scale), stage + p.scale_offset, S.tile_n() * bytes,
               static_cast<int64_t>(p.n) * bytes);
  }
  if constexpr (is_integer(E)) {
    if (p.zero != nullptr && (per_group == 0 || tile == part.begin || tile % per_group == 0))
      fetch_rows(reinterpret_cast<const char*>(p.zero), stage + p.zero_offset,
                 S.tile_n() * kBits / 8, static_cast<int64_t>(p.n) * kBits / 8);
  }
}

// Eight neighbouring scales from shared memory. Those of one byte are stored 0 2 1 3 unless
// `plain`.
CL_DEVICE void load_eight(uint32_t address, Number type, bool plain, float* to) {
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

// A lane's scales: scale[i][j] of its column i, 2 * (lane % 4) + i of the eight of block j. In
// grouped columns they are 16 neighbours, each column's together; in channel columns twice eight
// neighbours, each of four blocks.
CL_DEVICE void load_scales(uint32_t address, const Params& p, int lane, float (&scale)[2][8]) {
  const bool channel = p.groups == 1;
  const int bytes = bytes_of(p.scale_type);
  const uint32_t at = address + static_cast<uint32_t>(lane % 4 * (channel ? 8 : 16) * bytes);
  float runs[2][8];
  load_eight(at, p.scale_type, channel, runs[0]);
  load_eight(at + static_cast<uint32_t>((channel ? 32 : 8) * bytes), p.scale_type, channel,
             runs[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) scale[i][j] = channel ? runs[j / 4][j % 4 * 2 + i] : runs[i][j];
}

CL_DEVICE float load_number(const void* data, Number type, int64_t index) {
  if (type == Number::float32) return load_constant(static_cast<const float*>(data) + index);
  const uint16_t half = load_constant(static_cast<const uint16_t*>(data) + index);
  return type == Number::float16 ? widen<Half>(half) : widen<BFloat16>(half);
}

// Four neighbouring results, scaled and with their bias, to global memory.
CL_DEVICE void store_results(const Params& p, int row, int column, Floats4 sum) {
  float values[4] = {sum.x, sum.y, sum.z, sum.w};
  for (int i = 0; i < 4; ++i) {
    if (p.row_scale != nullptr) values[i] *= load_constant(p.row_scale + column + i);
    if (p.bias != nullptr) values[i] += load_number(p.bias, p.bias_type, column + i);
  }
  const int64_t at = static_cast<int64_t>(row) * p.n + column;
  if (p.out_type == Number::float32) {
    store_global(reinterpret_cast<Floats4*>(static_cast<float*>(p.out) + at),
                 Floats4{values[0], values[1], values[2], values[3]});
    return;
  }
  Words2* to = reinterpret_cast<Words2*>(static_cast<uint16_t*>(p.out) + at);
  if (p.out_type == Number::float16)
    store_global(to, Words2{narrow_pair<Half>(values[0], values[1]),
                            narrow_pair<Half>(values[2], values[3])});
  else
    store_global(to, Words2{narrow_pair<BFloat16>(values[0], values[1]),
                            narrow_pair<BFloat16>(values[2], values[3])});
}

// Calls body(index, row, column) for each four neighbouring results of a tile that this thread
// stores.
template <int ShapeIndex, class Body>
CL_DEVICE void for_results(const Params& p, const Part& part, const Body& body) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int kFours = S.tile_n() / 4;
  for (int c = thread_index(); c < S.tile_m() * kFours; c += S.threads()) {
    const int row = c / kFours, column = c % kFours * 4;
    if (part.m0 + row < p.m && part.n0 + column < p.n) body(c, row, column);
  }
}

template <class T, Element E, int ShapeIndex>
CL_GLOBAL(kShapes[ShapeIndex].threads())
void gemm(CL_PARAMS Params p) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int kStages = stages_of(E), kBits = bits_of(E), kM = S.m_blocks;
  constexpr int kWarpSteps = kSteps / S.warps_k;
  const int t = thread_index(), lane = t & 31, warp = t >> 5;
  const int warp_n = warp % S.warps_n, warp_m = warp / S.warps_n % S.warps_m,
            warp_k = warp / S.warps_n / S.warps_m;
  const uint32_t shared = shared_base();

  Codebook book = {};
  if constexpr (E == Element::codebook) book = load_codebook<T>(p.codebook);

  const int64_t units = static_cast<int64_t>(p.m_tiles) * p.n_tiles * p.k_tiles;
  int64_t unit = static_cast<int64_t>(block_x()) * p.per_block;
  const int64_t unit_end = unit + p.per_block < units ? unit + p.per_block : units;

  while (unit < unit_end) {
    const int tile = static_cast<int>(unit / p.k_tiles);
    Part part;
    // Tiles of the same weights follow each other, so that these stay in the second-level cache.
    part.m0 = tile % p.m_tiles * S.tile_m();
    part.n0 = tile / p.m_tiles * S.tile_n();
    part.begin = static_cast<int>(unit % p.k_tiles);
    const int64_t left = unit_end - unit;
    part.end = p.k_tiles - part.begin < left ? p.k_tiles : part.begin + static_cast<int>(left);

    float sums[kM][8][4], group_sums[kM][8][4];
    for (int m = 0; m < kM; ++m)
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) sums[m][j][i] = group_sums[m][j][i] = 0;
    uint32_t zeros[8];
    for (int j = 0; j < 8; ++j)
      zeros[j] = zero_operand<T, E>(static_cast<uint32_t>(is_integer(E) ? p.code_bias : 0));

    for (int i = 0; i < kStages - 1; ++i) {
      if (part.begin + i < part.end)
        fetch<T, E, ShapeIndex>(p, part, part.begin + i,
                                shared + static_cast<uint32_t>(i) * p.stage_bytes);
      copy_async_commit();
    }

    const int per_group = p.group / kTileK, group_steps = p.group / kStepK;
    int slot = 0;
    for (int k_tile = part.begin; k_tile < part.end; ++k_tile) {
      copy_async_wait<kStages - 2>();
      sync_threads();
      {
        // Into the stage that all have left behind.
        const int ahead = k_tile + kStages - 1;
        const int free_slot = slot == 0 ? kStages - 1 : slot - 1;
        if (ahead < part.end)
          fetch<T, E, ShapeIndex>(p, part, ahead,
                                  shared + static_cast<uint32_t>(free_slot) * p.stage_bytes);
        copy_async_commit();
      }
      const uint32_t stage = shared + static_cast<uint32_t>(slot) * p.stage_bytes;
      slot = slot + 1 == kStages ? 0 : slot + 1;
      const bool small_groups = per_group == 0;
      const bool begins = small_groups || k_tile == part.begin || k_tile % per_group == 0;
      const bool ends = small_groups || k_tile + 1 == part.end || (k_tile + 1) % per_group == 0;

#pragma unroll
      for (int i = 0; i < kWarpSteps; ++i) {
        const int step = warp_k * kWarpSteps + i;
        const int scale_row = small_groups ? step / group_steps : 0;

        if constexpr (is_integer(E)) {
          const bool first = small_groups ? i == 0 || step % group_steps == 0 : begins && i == 0;
          if (p.zero != nullptr && first) {
            const uint32_t row =
                stage + p.zero_offset +
                static_cast<uint32_t>((scale_row * S.tile_n() + warp_n * 64) * kBits / 8);
            uint32_t words[2];
            if constexpr (kBits == 4) {
              words[0] = words[1] =
                  load_shared<uint32_t>(row + static_cast<uint32_t>(lane / 4 * 4));
            } else {
              const Words2 two = load_shared<Words2>(row + static_cast<uint32_t>(lane / 4 * 8));
              words[0] = two.x;
              words[1] = two.y;
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) zeros[j] = zero_operand<T, E>(zero_of<E>(words, j));
          }
        }

        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const int row = (warp_m * kM + m) * 16 + lane % 16, piece = step * 2 + lane / 16;
          load_matrix_x4(a[m],
                         stage + static_cast<uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4)));
        }

        const uint32_t tile_base =
            stage + static_cast<uint32_t>(S.tile_m() * kTileK * 2 +
                                          (step * S.warps_n + warp_n) * kBits * 128);
        uint32_t words[kBits];
        if constexpr (kBits == 4) {
          const Words4 four = load_shared<Words4>(tile_base + static_cast<uint32_t>(lane * 16));
          words[0] = four.x;
          words[1] = four.y;
          words[2] = four.z;
          words[3] = four.w;
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int piece = 2 * lane + half;
            const Words4 four = load_shared<Words4>(
                tile_base + static_cast<uint32_t>((piece ^ (piece >> 3 & 1)) << 4));
            words[4 * half] = four.x;
            words[4 * half + 1] = four.y;
            words[4 * half + 2] = four.z;
            words[4 * half + 3] = four.w;
          }
        }

#pragma unroll
        for (int j = 0; j < 4; ++j) {
          constexpr int kEach = kBits / 4;
          const uint32_t codes[2] = {words[j * kEach], words[j * kEach + kEach - 1]};
          uint32_t first[2], second[2];
          decode<T, E>(codes, zeros[2 * j], zeros[2 * j + 1], book, first, second);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            multiply_add<T>(group_sums[m][2 * j], a[m], first);
            multiply_add<T>(group_sums[m][2 * j + 1], a[m], second);
          }
        }

        const bool last = small_groups ? i == kWarpSteps - 1 || (step + 1) % group_steps == 0
                                       : ends && i == kWarpSteps - 1;
        if (last) {
          float scale[2][8];
          load_scales(stage + p.scale_offset +
                          static_cast<uint32_t>((scale_row * S.tile_n() + warp_n * 64) *
                                                bytes_of(p.scale_type)),
                      p, lane, scale);
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                sums[m][j][e] += scale[e % 2][j] * group_sums[m][j][e];
                group_sums[m][j][e] = 0;
              }
        }
      }
    }
    copy_async_wait<0>();
    sync_threads();

    // The tile of results in shared memory, the warps that share k one after the other.
    constexpr int kStride = S.tile_n() + kPadding;
#pragma unroll
    for (int w = 0; w < S.warps_k; ++w) {
      if (w == warp_k) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = (warp_m * kM + m) * 16 + half * 8 + lane / 4;
              const int column = warp_n * 64 + j * 8 + lane % 4 * 2;
              const uint32_t at = shared + static_cast<uint32_t>((row * kStride + column) * 4);
              Floats2 two = {sums[m][j][2 * half], sums[m][j][2 * half + 1]};
              if (w > 0) {
                const Floats2 before = load_shared<Floats2>(at);
                two.x = before.x + two.x;
                two.y = before.y + two.y;
              }
              store_shared(at, two);
            }
      }
      sync_threads();
    }
    const auto result = [&](int row, int column) {
      return load_shared<Floats4>(shared + static_cast<uint32_t>((row * kStride + column) * 4));
    };

    if (part.begin == 0 && part.end == p.k_tiles) {
      for_results<ShapeIndex>(p, part, [&](int, int row, int column) {
        store_results(p, part.m0 + row, part.n0 + column, result(row, column));
      });
    } else {
      // The blocks that share this tile. Each has at most two such parts: the end of a tile, first,
      // and the beginning of another, last.
      const int64_t tile_begin = static_cast<int64_t>(tile) * p.k_tiles;
      const int first = static_cast<int>(tile_begin / p.per_block);
      const int final = static_cast<int>((tile_begin + p.k_tiles - 1) / p.per_block);
      constexpr int64_t kTileFloats = static_cast<int64_t>(S.tile_m()) * S.tile_n();
      const auto place = [&](int block) {
        return p.partial + (2 * static_cast<int64_t>(block) + (block == first)) * kTileFloats;
      };
      float* const own = place(block_x());
      for_results<ShapeIndex>(p, part, [&](int c, int row, int column) {
        store_global(reinterpret_cast<Floats4*>(own) + c, result(row, column));
      });
      fence();
      sync_threads();
      // Behind the tile of results.
      const uint32_t flag = shared + static_cast<uint32_t>(S.tile_m() * kStride * 4);
      if (t == 0) {
        const int before = atomic_add(p.arrived + first, 1);
        store_shared(flag, before);
        if (before == final - first) store_global(p.arrived + first, 0);  // for the next call
      }
      sync_threads();
      if (load_shared<int>(flag) == final - first) {
        fence();
        for_results<ShapeIndex>(p, part, [&](int c, int row, int column) {
          Floats4 sum = load_coherent(reinterpret_cast<const Floats4*>(place(first)) + c);
          for (int block = first + 1; block <= final; ++block) {
            const Floats4 more = load_coherent(reinterpret_cast<const Floats4*>(place(block)) + c);
            sum.x += more.x;
            sum.y += more.y;
            sum.z += more.z;
            sum.w += more.w;
          }
          store_results(p, part.m0 + row, part.n0 + column, sum);
        });
      }
    }
    // The next part's copies overwrite the results.
    sync_threads();
    unit += part.end - part.begin;
  }
}

}  // namespace compressed_linear::cuda::marlin
