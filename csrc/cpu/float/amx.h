// SPDX-License-Identifier: Apache-2.0
// AMX with bf16: weights are decoded to bf16 pairs as for AVX-512, one block of a tile being just
// what a tile register takes, and multiplied with up to 32 rows of x at once. Every M goes this
// way, also one row: the tile instruction adds products in another order than vdpbf16ps, and a row
// must have the same bits in any company. Tiles is one of amx_tiles.h. Included by units compiled
// for AVX-512 with BF16 only.
#pragma once

#include "bf16_parts.h"
#include "cpu/common/amx_tiles.h"
#include "cpu/common/isa.h"
#include "decode_avx512bf16.h"
#include "driver.h"

namespace compressed_linear::cpu {

LinearFunction float_avx512;

namespace {  // see layouts/planes.h

constexpr int64_t kBlockWords = kBlock / 2;  // of x, bf16 pairs

static_assert(kBlockWords == kTileRows && kTile * 4 == kTileRowBytes && kRowBytes == kTileRowBytes,
              "a block of bf16 pairs is a tile register");

// Multiplies blocks of rows and tiles while a unit of work lasts.
template <class Tiles>
class TileBlocks {
  using Grid = TileGrid<Tiles, TileProduct::bf16>;

 public:
  static constexpr int kRows = Grid::kRows, kStepBytes = kTileRows * kTileRowBytes;
  static constexpr int kMaxParts = 3;

  void operator()(const MicroArgs& a, int64_t rows, int64_t tiles, int64_t parts) {
    grid_.configure(rows, kTileRowBytes);
    for (int64_t s = 0; s < a.segment_count; ++s) {
      const Segment segment = a.segments[s];
      const int64_t first = segment.begin / kBlock, last = (segment.end + kBlock - 1) / kBlock;
      const uint32_t* x = a.x + first * parts * rows * kBlockWords;
      if (segment.begin % kBlock != 0 || segment.end % kBlock != 0)
        x = only(segment, x, first, last, parts * rows);
      const Work work{a, s, x, a.weights + first * kStepBytes, last - first, rows, tiles, parts};
      grid_.for_each_pair(tiles, [&](auto corner, int64_t t) { multiply(corner, work, t); });
    }
  }

 private:
  struct Work {
    const MicroArgs& a;
    int64_t segment;
    const uint32_t* x;  // [block][part][row][word]
    const uint8_t* weights;
    int64_t blocks, rows, tiles, parts;
  };

  // x of the blocks that a segment touches, with zeros where other segments lie. lines: of a block
  const uint32_t* only(Segment segment, const uint32_t* x, int64_t first, int64_t last,
                       int64_t lines) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t word = 0; word < kBlockWords; ++word) {
        const int64_t channel = i * kBlock + 2 * word;
        const bool inside = channel >= segment.begin && channel < segment.end;
        for (int64_t line = 0; line < lines; ++line) {
          const int64_t at = ((i - first) * lines + line) * kBlockWords + word;
          cut_[at] = inside ? x[at] : 0;
        }
      }
    return cut_;
  }

  template <class Corner>
  void multiply(Corner corner, const Work& work, int64_t t) {
    corner.zero();
    const uint8_t* weights = work.weights + t * work.a.tile_stride;
    const uint32_t* x = work.x;
    for (int64_t i = 0; i < work.blocks; ++i, weights += kStepBytes) {
      corner.load_weights(weights, work.a.tile_stride, kTileRowBytes);
      for (int64_t q = 0; q < work.parts; ++q, x += work.rows * kBlockWords)
        corner.add_products(x, kTileRowBytes);
    }
    constexpr int64_t kStride = 2 * kTile;
    corner.store(sums_, kStride * 4);
    const MicroArgs& a = work.a;
    const int64_t s = work.segment;
    for (int64_t column = 0; column < Corner::kColumns; ++column) {
      const int64_t at = (s * work.tiles + t + column) * kTile;
      const __m512 scale = _mm512_loadu_ps(a.scale + at);
      for (int64_t r = 0; r < work.rows; ++r) {
        __m512 sum = _mm512_loadu_ps(sums_ + r * kStride + column * kTile);
        if (a.negated_offset != nullptr)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(a.row_sums[s * work.rows + r]),
                                _mm512_loadu_ps(a.negated_offset + at), sum);
        float* total = a.totals + (r * work.tiles + t + column) * kTile;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(scale, sum, _mm512_loadu_ps(total)));
      }
    }
  }

  Grid grid_;
  alignas(64) float sums_[kRows * 2 * kTile];
  alignas(64) uint32_t cut_[kChunk / 2 * kMaxParts * kRows];
};

template <class Tiles>
struct TileCore {
  using Blocks = TileBlocks<Tiles>;
  static constexpr int kStep = kBlock, kStepBytes = Blocks::kStepBytes, kWords = kBlockWords;
  static constexpr int kMaxParts = Blocks::kMaxParts, kRows = Blocks::kRows, kTiles = kStrip;
  static constexpr bool kHasFewRows = false;

  static int64_t parts(Scalar type) {
    return type == Scalar::float32 ? 3 : type == Scalar::float16 ? 2 : 1;
  }
  static void split(const Problem& p, const float* row, int64_t parts, uint32_t* out,
                    int64_t stride) {
    for (int64_t k = 0; k < p.weight.geometry.padded_k; k += kBlock, out += parts * stride)
      for (int64_t word = 0; word < kBlockWords; ++word) {
        float even = row[k + 2 * word], odd = row[k + 2 * word + 1];
        for (int64_t q = 0; q < parts; ++q) out[q * stride + word] = take_pair(even, odd);
      }
  }
  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* out) {
    decode_tile(p, tile, k0, width, out);
  }
  static bool copy_row(const Problem& p, int64_t m, uint32_t* words, int64_t rows) {
    const Geometry& g = p.weight.geometry;
    if (p.x.type != Scalar::bfloat16 || !in_order(p)) return false;
    const char* row = static_cast<const char*>(p.x.data) + 2 * m * p.x.row_stride;
    for (int64_t k = 0; k < g.padded_k; k += kBlock, words += rows * kBlockWords) {
      const int64_t left = g.k - k, count = left < 0 ? 0 : least(left, kBlock);
      std::memset(words, 0, kTileRowBytes);
      std::memcpy(words, row + 2 * k, static_cast<size_t>(2 * count));
    }
    return true;
  }
};

// Weights of fp16 and fp32, and tables of values that bf16 cannot hold, are multiplied in fp32.
template <class Tiles>
void linear_in_tiles(const Problem& p, const Parallel& parallel) {
  const Kind kind = p.weight.geometry.element.kind;
  if (kind == Kind::float16 || kind == Kind::float32 || p.weight.wide_table != nullptr) {
    float_avx512(p, parallel);
  } else {
    run_linear<TileCore<Tiles>>(p, parallel);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
