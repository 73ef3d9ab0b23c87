// SPDX-License-Identifier: Apache-2.0
// The kernels of the vector engines: a panel of rows of x times tiles of a strip, for the pieces of
// a chunk. Core: the registers, see driver.h.
#pragma once

#include "call.h"
#include "cpu/common/prefetch.h"
#include "decode.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

struct KernelArgs {
  const uint8_t* weights;  // block of the chunk's first channel, first tile
  int64_t row_stride, block_stride, chunk_begin;
  const int32_t* x;  // [quad][row], all of K
  const Piece* pieces;
  int64_t piece_count;
  const IntegerSegment* segments;
  int64_t segment_count;
  const Problem* problem;           // whose scales and zero points are read
  int64_t tile;                     // the first one
  int64_t scale_first, zero_first;  // where its numbers of group 0 are
  const int32_t* code_sums;         // [tile][segment][16] from the first tile on, or null
  const int32_t* start;             // [segment][row] -middle * sum(q - zero_x)
  const float* group_sums;          // [group][row] what the offset is multiplied with, or null
  const int32_t* zero_x;            // [x group][row]
  const float* scale_x;             // [x group][row], or null to leave it to the end
  int32_t* partial;                 // [row][tile][16] of an unfinished segment
  float* grouped;                   // [row][tile][16] of an unfinished weight group
  float* totals;                    // [row][tile][16]
  // What to fetch: a block's lines at `fetch` while block fetch_first is worked on, and on from
  // there with every fetch_every-th block, up to fetch_end.
  const uint8_t *fetch, *fetch_end;
  int64_t fetch_first, fetch_every;
};

template <class Core, int Bits, bool Narrow, int Rows, int Tiles>
struct Kernel {
  static constexpr int kVectors = Core::kVectors;
  using Reg = typename Core::Reg;
  using Float = typename Core::Float;
  using Sums = Reg[Rows][Tiles * kVectors];

  template <int J>
  [[gnu::always_inline]] static void step(const uint8_t* block, int64_t stride, const int32_t* x,
                                          Sums& acc) {
    Reg weights[Tiles * kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < Tiles * kVectors; ++v)
      weights[v] = decode_quad<Core, Bits, J>(block + v * Core::kLanes * kQuad, stride);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const auto activation = Core::template broadcast<Narrow>(x + r);
#pragma GCC unroll 8
      for (int v = 0; v < Tiles * kVectors; ++v)
        acc[r][v] = Core::template dot<Narrow>(acc[r][v], weights[v], activation);
    }
  }

  // One quad that is not known when compiling: where segments end inside a block.
  [[gnu::always_inline]] static void odd_step(const KernelArgs& a, const uint8_t* block,
                                              int64_t quad, const int32_t* x, Sums& acc) {
    if constexpr (Bits == 8) step<0>(block + quad * a.row_stride, 0, x, acc);
  }

  template <bool Fetch, int I>
  [[gnu::always_inline]] static void block_step(const uint8_t* block, int64_t stride,
                                                const int32_t* x, Sums& acc, const uint8_t* fetch) {
    if constexpr (Fetch) prefetch_share_far<I, kQuads, Bits * kStrip>(fetch);
    step<quad_order(Bits, I)>(block, stride, x + quad_order(Bits, I) * Rows, acc);
  }

  template <bool Fetch, int... I>
  [[gnu::always_inline]] static void whole_block(const uint8_t* block, int64_t stride,
                                                 const int32_t* x, Sums& acc, const uint8_t* fetch,
                                                 std::integer_sequence<int, I...>) {
    (block_step<Fetch, I>(block, stride, x, acc, fetch), ...);
  }

  [[gnu::always_inline]] static void begin_segment(const KernelArgs& a, int64_t s, Sums& acc) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Reg start = Core::set(a.start[s * Rows + r]);
#pragma GCC unroll 8
      for (int v = 0; v < Tiles * kVectors; ++v) acc[r][v] = start;
    }
    if (a.code_sums == nullptr) return;
    const int32_t* zero_x = a.zero_x + a.segments[s].x_group * Rows;
#pragma GCC unroll 8
    for (int v = 0; v < Tiles * kVectors; ++v) {
      const Reg sums = Core::load(a.code_sums + (v / kVectors * a.segment_count + s) * kTile +
                                  v % kVectors * Core::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
        acc[r][v] = Core::subtract(acc[r][v], Core::multiply(Core::set(zero_x[r]), sums));
    }
  }

  [[gnu::always_inline]] static void end_segment(const KernelArgs& a, int64_t s, Sums& acc) {
    const IntegerSegment& segment = a.segments[s];
    Float sums[Rows][Tiles * kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < Tiles * kVectors; ++v) sums[r][v] = Core::convert(acc[r][v]);
    if (a.scale_x != nullptr || !segment.first) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Float by =
            Core::set(a.scale_x == nullptr ? 1.0f : a.scale_x[segment.x_group * Rows + r]);
        if (segment.first) {
#pragma GCC unroll 8
          for (int v = 0; v < Tiles * kVectors; ++v) sums[r][v] = Core::multiply(by, sums[r][v]);
        } else {
#pragma GCC unroll 8
          for (int v = 0; v < Tiles * kVectors; ++v)
            sums[r][v] = Core::fma(by, sums[r][v], Core::load(a.grouped + lane(r, v)));
        }
      }
    }
    if (!segment.last) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Tiles * kVectors; ++v) Core::store(a.grouped + lane(r, v), sums[r][v]);
      return;
    }
    if (a.group_sums != nullptr) {
#pragma GCC unroll 8
      for (int v = 0; v < Tiles * kVectors; ++v) {
        const Float offset = negated_offsets(a, segment.group, v);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sums[r][v] =
              Core::fma(Core::set(a.group_sums[segment.group * Rows + r]), offset, sums[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < Tiles * kVectors; ++v) {
      const Float scale = scales(a, segment.group, v);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        float* total = a.totals + lane(r, v);
        Core::store(total, Core::fma(scale, sums[r][v], Core::load(total)));
      }
    }
  }

  // Where the sums of a row and vector begin in partial, grouped and totals.
  static constexpr int64_t lane(int r, int v) { return (r * Tiles * kVectors + v) * Core::kLanes; }

  // The numbers of a group that vector `v` of a row of sums meets.
  [[gnu::always_inline]] static Float numbers(const TileNumbers& n, int64_t first, int64_t group,
                                              int v) {
    const int64_t at =
        first + group * n.group_stride + v / kVectors * n.tile_stride + v % kVectors * Core::kLanes;
    if (n.type == Scalar::float32) return Core::load(static_cast<const float*>(n.data) + at);
    if (n.type == Scalar::bfloat16)
      return Core::load_bf16(static_cast<const uint16_t*>(n.data) + at);
    alignas(64) float wide[Core::kLanes];
    load_scalars(n.data, n.type, at, Core::kLanes, wide);
    return Core::load(wide);
  }

  [[gnu::always_inline]] static Float scales(const KernelArgs& a, int64_t group, int v) {
    const TileNumbers& scale = a.problem->weight.scale;
    return scale.data == nullptr ? Core::set(1.0f) : numbers(scale, a.scale_first, group, v);
  }

  // What load_negated_offset of rows.h gives.
  [[gnu::always_inline]] static Float negated_offsets(const KernelArgs& a, int64_t group, int v) {
    const Weight& w = a.problem->weight;
    Float offset = Core::set(w.offset);
    if (w.zero.data != nullptr) offset = Core::add(numbers(w.zero, a.zero_first, group, v), offset);
    return Core::multiply(offset, Core::set(-1.0f));
  }

  static void run(const KernelArgs& a) {
    const uint8_t* fetch = a.fetch;
    int64_t until_fetch = a.fetch_first;
    for (int64_t i = 0; i < a.piece_count; ++i) {
      const Piece piece = a.pieces[i];
      Sums acc;
      if (piece.first) {
        begin_segment(a, piece.segment, acc);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < Tiles * kVectors; ++v) acc[r][v] = Core::load(a.partial + lane(r, v));
      }
      const int64_t from = piece.begin - a.chunk_begin;
      const uint8_t* block = a.weights + from / kBlock * a.block_stride;
      const int32_t* x = a.x + piece.begin / kQuad * Rows;
      int64_t left = (piece.end - piece.begin) / kQuad;
      if (const int64_t inside = from % kBlock / kQuad; inside != 0) {
        for (int64_t quad = inside; quad < kQuads && left > 0; ++quad, --left, x += Rows)
          odd_step(a, block, quad, x, acc);
        block += a.block_stride;
      }
      // Known when compiling where a kernel takes whole strips.
      const int64_t stride = Tiles == kStrip ? kStrip * kRowBytes : a.row_stride;
      for (; left >= kQuads; left -= kQuads, block += a.block_stride, x += kQuads * Rows) {
        constexpr auto quads = std::make_integer_sequence<int, kQuads>();
        if (until_fetch-- == 0 && fetch < a.fetch_end) {
          whole_block<true>(block, stride, x, acc, fetch, quads);
          fetch += a.fetch_every * Bits * kStrip * kRowBytes;
          until_fetch = a.fetch_every - 1;
        } else {
          whole_block<false>(block, stride, x, acc, nullptr, quads);
        }
      }
      for (int64_t quad = 0; quad < left; ++quad, x += Rows) odd_step(a, block, quad, x, acc);
      if (piece.last) {
        end_segment(a, piece.segment, acc);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < Tiles * kVectors; ++v) Core::store(a.partial + lane(r, v), acc[r][v]);
      }
    }
  }
};

using KernelFunction = void (*)(const KernelArgs&);

template <class Core, int Bits, bool Narrow, int Rows, int Tiles = Core::tiles(Rows)>
KernelFunction kernel_for(int64_t tiles) {
  // Only a strip that is cut short has fewer tiles, and its codes are decoded first.
  if constexpr (Tiles > 1 && Bits == 8) {
    if (tiles < Tiles) return kernel_for<Core, Bits, Narrow, Rows, Tiles - 1>(tiles);
  }
  return &Kernel<Core, Bits, Narrow, Rows, Tiles>::run;
}

template <class Core, int Bits, bool Narrow, int Rows = Core::kRows>
KernelFunction kernel_for(int64_t rows, int64_t tiles) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return kernel_for<Core, Bits, Narrow, Rows - 1>(rows, tiles);
  }
  return kernel_for<Core, Bits, Narrow, Rows>(tiles);
}

// bits: of a code in memory; narrow: whether they are below 128.
template <class Core>
KernelFunction kernel_for(int bits, bool narrow, int64_t rows, int64_t tiles) {
  switch (bits) {
    case 1:
      return kernel_for<Core, 1, true>(rows, tiles);
    case 2:
      return kernel_for<Core, 2, true>(rows, tiles);
    case 3:
      return kernel_for<Core, 3, true>(rows, tiles);
    case 4:
      return kernel_for<Core, 4, true>(rows, tiles);
    case 5:
      return kernel_for<Core, 5, true>(rows, tiles);
    case 6:
      return kernel_for<Core, 6, true>(rows, tiles);
    case 7:
      return kernel_for<Core, 7, true>(rows, tiles);
    default:
      if constexpr (Core::kTellNarrow) {
        if (narrow) return kernel_for<Core, 8, true>(rows, tiles);
      }
      return kernel_for<Core, 8, false>(rows, tiles);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
