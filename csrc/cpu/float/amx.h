// SPDX-License-Identifier: Apache-2.0
// AMX with bf16: what tile_unit.h multiplies, and how it wants x. Tiles is one of
// common/amx_tiles.h. Included by units compiled for AVX-512 with BF16 only.
#pragma once

#include "bf16_parts.h"
#include "cpu/common/amx_tiles.h"
#include "cpu/common/isa.h"
#include "driver.h"
#include "tile_unit.h"

namespace compressed_linear::cpu {

LinearFunction float_avx512;

namespace {  // see layouts/planes.h

template <class Tiles>
struct TileCore {
  using Unit = TileUnit<Tiles>;
  static constexpr int kStep = kBlock, kWords = kTileWords;
  static constexpr int kRows = Unit::kRows, kTiles = kStrip;
  static constexpr bool kHasFewRows = false, kHasUnit = true;

  static int64_t parts(Scalar type) {
    return type == Scalar::float32 ? 3 : type == Scalar::float16 ? 2 : 1;
  }
  static void split(const Problem& p, const float* row, int64_t parts, uint32_t* out,
                    int64_t stride) {
    for (int64_t k = 0; k < p.weight.geometry.padded_k; k += kBlock, out += parts * stride)
      for (int64_t word = 0; word < kTileWords; ++word) {
        float even = row[k + 2 * word], odd = row[k + 2 * word + 1];
        for (int64_t q = 0; q < parts; ++q) out[q * stride + word] = take_pair(even, odd);
      }
  }
  static bool copy_row(const Problem& p, int64_t m, uint32_t* words, int64_t rows) {
    const Geometry& g = p.weight.geometry;
    if (p.x.type != Scalar::bfloat16 || !in_order(p)) return false;
    const char* row = static_cast<const char*>(p.x.data) + 2 * m * p.x.row_stride;
    for (int64_t k = 0; k < g.padded_k; k += kBlock, words += rows * kTileWords) {
      const int64_t left = g.k - k;
      const __mmask32 there =
          left >= kBlock ? ~__mmask32{0} : (__mmask32{1} << (left < 0 ? 0 : left)) - 1;
      _mm512_storeu_si512(words, _mm512_maskz_loadu_epi16(there, row + 2 * k));
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
