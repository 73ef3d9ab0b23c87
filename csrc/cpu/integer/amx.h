// SPDX-License-Identifier: Apache-2.0
// AMX for integer activations. The rows of the packed layout, once decoded to bytes, are just what
// a tile register of weights takes: a row for each quad, [channel][k]. Up to 16 quads of up to 32
// rows of x meet two tiles of channels at once. The integers are those of every other engine, so
// what tiles do not suit goes to AVX-512. Tiles is one of amx_tiles.h. Included by units compiled
// for AVX-512 F and BW only.
#pragma once

#include "avx512.h"
#include "cpu/common/amx_tiles.h"
#include "cpu/common/isa.h"

namespace compressed_linear::cpu {

LinearFunction integer_avx512vnni;

namespace {  // see layouts/planes.h

static_assert(kRowBytes == kTileRowBytes && kTile * 4 == kTileRowBytes,
              "a row of the layout is a row of a tile register");

// Quads that a tile register takes at once, so that every segment is a number of whole ones; 0
// where segments are too ragged. Beyond the last segment x is 0.
inline int64_t tile_quads(const Problem& p) {
  const Geometry& g = p.weight.geometry;
  int64_t ends = g.padded_k;  // the lowest bit tells by what power of two all are divisible
  for_each_segment(g, p.x.activation.group, [&](const IntegerSegment& s) { ends |= s.begin; });
  return ends % (kTileRows * kQuad) == 0 ? kTileRows : ends % kBlock == 0 ? kQuads : 0;
}

// Multiplies blocks of rows and tiles while a unit of work lasts.
template <class Tiles>
class IntegerTileBlocks {
  using Grid = TileGrid<Tiles, TileProduct::bytes>;

 public:
  static constexpr int kRows = Grid::kRows;
  static constexpr int64_t kPanelsPerUnit = 8;
  static constexpr bool kDecodes = false;
  static constexpr int64_t tiles(int64_t) { return kStrip; }

  explicit IntegerTileBlocks(const Problem& p) : quads_(tile_quads(p)) {}

  // x: [quads / quads_][row][quads_]
  void place_row(const int8_t* q, int64_t padded_k, int64_t r, int64_t rows, int32_t* x) const {
    const int64_t bytes = quads_ * kQuad;
    for (x += r * quads_; padded_k > 0; padded_k -= bytes, q += bytes, x += rows * quads_)
      std::memcpy(x, q, static_cast<size_t>(bytes));
  }

  void operator()(const KernelArgs& a, int, bool, int64_t rows, int64_t tiles) {
    grid_.configure(rows, quads_ * kQuad);
    for (int64_t i = 0; i < a.piece_count; ++i) {
      const Piece& piece = a.pieces[i];
      if (piece.first) begin_segment(a, piece.segment, rows, tiles);
      grid_.for_each_pair(
          tiles, [&](auto corner, int64_t t) { multiply(corner, a, piece, rows, t, tiles); });
      if (piece.last) end_segment(a, piece.segment, rows, tiles);
    }
  }

 private:
  using Core = Avx512Core;

  static void begin_segment(const KernelArgs& a, int64_t s, int64_t rows, int64_t tiles) {
    const int32_t* zero_x = a.zero_x + a.segments[s].x_group * rows;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < tiles; ++t) {
        Core::Reg sum = Core::set(a.start[s * rows + r]);
        if (a.code_sums != nullptr) {
          const Core::Reg codes = Core::load(a.code_sums + (t * a.segment_count + s) * kTile);
          sum = Core::subtract(sum, Core::multiply(Core::set(zero_x[r]), codes));
        }
        Core::store(a.partial + (r * tiles + t) * kTile, sum);
      }
  }

  // Adds the products of a piece to what a.partial holds.
  template <class Corner>
  void multiply(Corner corner, const KernelArgs& a, const Piece& piece, int64_t rows, int64_t t,
                int64_t tiles) const {
    int32_t* sums = a.partial + t * kTile;
    corner.load(sums, tiles * kTileRowBytes);
    const uint8_t* weights =
        a.weights + (piece.begin - a.chunk_begin) / kQuad * a.row_stride + t * kRowBytes;
    const int32_t* x = a.x + piece.begin / kQuad * rows;
    for (int64_t k = piece.begin; k < piece.end; k += quads_ * kQuad) {
      corner.load_weights(weights, kRowBytes, a.row_stride);
      corner.add_products(x, quads_ * kQuad);
      weights += quads_ * a.row_stride;
      x += quads_ * rows;
    }
    corner.store(sums, tiles * kTileRowBytes);
  }

  static void end_segment(const KernelArgs& a, int64_t s, int64_t rows, int64_t tiles) {
    const IntegerSegment& segment = a.segments[s];
    for (int64_t t = 0; t < tiles; ++t) {
      float scales[kTile], negated_offsets[kTile];
      if (segment.last) {
        load_scale(*a.problem, a.tile + t, segment.group, scales);
        load_negated_offset(*a.problem, a.tile + t, segment.group, negated_offsets);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (r * tiles + t) * kTile;
        const Core::Float by =
            Core::set(a.scale_x == nullptr ? 1.0f : a.scale_x[segment.x_group * rows + r]);
        Core::Float sum = Core::convert(Core::load(a.partial + at));
        sum = segment.first ? Core::multiply(by, sum)
                            : Core::fma(by, sum, Core::load(a.grouped + at));
        if (!segment.last) {
          Core::store(a.grouped + at, sum);
          continue;
        }
        if (a.group_sums != nullptr)
          sum = Core::fma(Core::set(a.group_sums[segment.group * rows + r]),
                          Core::load(negated_offsets), sum);
        float* total = a.totals + at;
        Core::store(total, Core::fma(Core::load(scales), sum, Core::load(total)));
      }
    }
  }

  int64_t quads_;
  Grid grid_;
};

// Rows that registers hold at once read the weights once there too, and decode them on the way.
template <class Tiles>
void integer_linear_in_tiles(const Problem& p, const Parallel& parallel) {
  if (p.x.m <= Avx512Core::kRows || tile_quads(p) == 0) {
    integer_avx512vnni(p, parallel);
  } else {
    run_integer_linear<Avx512Core, IntegerTileBlocks<Tiles>>(p, parallel);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
