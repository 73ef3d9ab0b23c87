// SPDX-License-Identifier: Apache-2.0
// The plain twin of the vector engines: the same equation and the same cutting of K, one row and
// one tile at a time. It runs where nothing better does and is what the others are tested against.
#include <initializer_list>

#include "cpu/common/arena.h"
#include "cpu/common/rows.h"

namespace compressed_linear::cpu {
namespace {

// weights[32][16] of one block. Loops over channels are innermost for the vectoriser.
void decode_integers(const Problem& p, const uint8_t* block, float* weights) {
  const int bits = p.weight.geometry.element.bits;
  uint32_t codes[kBlock * kTile] = {};
  if (bits == 8) {
    for (int64_t i = 0; i < kBlock * kTile; ++i) {
      const int64_t pair = i / (2 * kTile), channel = i / 2 % kTile;
      codes[(2 * pair + i % 2) * kTile + channel] = block[i] ^ 0x80u;
    }
  } else {
    int shift = 0;
    for (const int width : {4, 2, 1}) {
      if ((bits & width) == 0) continue;
      for (int k = 0; k < kBlock; ++k) {
        uint32_t lanes[kTile];
        std::memcpy(lanes, block + quad_row(width, k / 4) * kRowBytes, sizeof(lanes));
        const int at = code_bit(width, k);
        for (int64_t i = 0; i < kTile; ++i)
          codes[k * kTile + i] |= ((lanes[i] >> at) & ((1u << width) - 1)) << shift;
      }
      block += width * kRowBytes;
      shift += width;
    }
  }
  if (p.weight.wide_table != nullptr) {
    for (int64_t i = 0; i < kBlock * kTile; ++i) weights[i] = p.weight.wide_table[codes[i]];
  } else if (p.weight.table != nullptr) {
    for (int64_t i = 0; i < kBlock * kTile; ++i) weights[i] = from_bf16(p.weight.table[codes[i]]);
  } else {
    for (int64_t i = 0; i < kBlock * kTile; ++i)
      weights[i] = static_cast<float>(static_cast<int32_t>(codes[i])) - p.weight.middle;
  }
}

// weights[width][16] of one chunk of one tile.
void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, float* weights) {
  const Geometry& g = p.weight.geometry;
  for (int64_t k = 0; k < width; k += kBlock, weights += kBlock * kTile) {
    const uint8_t* block = block_of(p.weight, tile, k0 + k);
    switch (g.element.kind) {
      case Kind::integer:
        decode_integers(p, block, weights);
        break;
      case Kind::bfloat16:
        for (int64_t i = 0; i < kBlock; ++i)
          for (int64_t channel = 0; channel < kTile; ++channel)
            weights[i * kTile + channel] =
                load_scalar(block, Scalar::bfloat16, (i / 2 * kTile + channel) * 2 + i % 2);
        break;
      case Kind::e4m3:
      case Kind::e5m2:
        for (int64_t i = 0; i < kBlock; ++i)
          for (int64_t channel = 0; channel < kTile; ++channel) {
            const uint8_t code = block[(i / 2 * kTile + channel) * 2 + i % 2];
            weights[i * kTile + channel] =
                g.element.kind == Kind::e4m3 ? from_e4m3(code) : from_e5m2(code);
          }
        break;
      case Kind::float16:
        load_scalars(block, Scalar::float16, 0, kBlock * kTile, weights);
        break;
      case Kind::float32:
        load_scalars(block, Scalar::float32, 0, kBlock * kTile, weights);
        break;
    }
  }
}

struct Call {
  const Problem& p;
  const Segment* segments;
  const int32_t* chunk_first;
  const float* x;  // [rows][padded_k]
  int64_t row0, rows;

  void multiply(int64_t tile) const {
    const Geometry& g = p.weight.geometry;
    float *weights = nullptr, *totals = nullptr;
    carve_from(worker_arena(), [&](Carver& carver) {
      weights = carver.take<float>(kChunk * kTile);
      totals = carver.take<float>(rows * kTile);
    });
    std::memset(totals, 0, static_cast<size_t>(rows * kTile) * sizeof(float));
    for (int64_t c = 0; c < chunk_count(g); ++c) {
      const int64_t k0 = c * kChunk;
      decode(p, tile, k0, least(g.padded_k - k0, kChunk), weights);
      for (int64_t s = chunk_first[c]; s < chunk_first[c + 1]; ++s) {
        const Segment segment = segments[s];
        float scale[kTile], negated_offset[kTile];
        load_scale(p, tile, segment.group, scale);
        load_negated_offset(p, tile, segment.group, negated_offset);
        for (int64_t r = 0; r < rows; ++r) {
          const float* x_row = x + r * g.padded_k + k0;
          float acc[kTile] = {};
          for (int64_t k = segment.begin; k < segment.end; ++k)
            for (int64_t i = 0; i < kTile; ++i) acc[i] += x_row[k] * weights[k * kTile + i];
          const float sum = has_offset(p)
                                ? segment_sum(x_row + segment.begin, segment.end - segment.begin)
                                : 0.0f;
          for (int64_t i = 0; i < kTile; ++i) {
            const float shifted = has_offset(p) ? acc[i] + sum * negated_offset[i] : acc[i];
            totals[r * kTile + i] += scale[i] * shifted;
          }
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      store_row(p, row0 + r, tile * kTile, kTile, totals + r * kTile);
  }
};

}  // namespace

void float_generic(const Problem& given, const Parallel& parallel) {
  Problem p = given;
  const Geometry& g = p.weight.geometry;
  constexpr int64_t kRowsAtOnce = 64;
  const int64_t rows_at_once = least(p.x.m, kRowsAtOnce);
  float *x = nullptr, *scratch = nullptr, *factor = nullptr;
  Segment* segments = nullptr;
  int32_t* chunk_first = nullptr;
  carve_from(call_arena(), [&](Carver& carver) {
    x = carver.take<float>(rows_at_once * g.padded_k);
    scratch = carver.take<float>(g.k);
    segments = carver.take<Segment>(segment_bound(g));
    chunk_first = carver.take<int32_t>(chunk_count(g) + 1);
    factor = carver.take<float>(p.x.activation.present ? p.x.m : 0);
  });
  make_segments(g, segments, chunk_first);
  if (p.x.activation.present) {
    p.x.factor = factor;
    measure_tensor(p, x, scratch);
  }
  for (int64_t row0 = 0; row0 < p.x.m; row0 += rows_at_once) {
    const int64_t rows = least(p.x.m - row0, rows_at_once);
    for (int64_t r = 0; r < rows; ++r) prepare_row(p, row0 + r, x + r * g.padded_k, scratch);
    const Call call{p, segments, chunk_first, x, row0, rows};
    parallel.run(
        g.tiles,
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t tile = begin; tile < end; ++tile)
            static_cast<const Call*>(context)->multiply(tile);
        },
        const_cast<Call*>(&call));
  }
}

}  // namespace compressed_linear::cpu
