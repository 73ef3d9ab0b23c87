// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA: weights and activations are widened to fp32, which is exact, and multiplied there.
#include <immintrin.h>

#include "driver.h"

namespace compressed_linear::cpu {
namespace {

// Codes of one pair for eight channels: even input channel in the low half of each lane.
template <int Bits>
inline __m256i codes(const uint8_t* block, int pair) {
  using Plane = Planes<Bits>;
  const auto row = [block](int64_t at, int shift, int mask) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + at));
    return _mm256_and_si256(_mm256_srli_epi32(lanes, shift), _mm256_set1_epi32(mask * 0x10001));
  };
  __m256i code = _mm256_setzero_si256();
  if constexpr (Plane::four)
    code = row(Plane::four_at + kRowBytes * (pair / 4), 4 * (pair % 4), 15);
  if constexpr (Plane::two) {
    const __m256i two = row(Plane::two_at + kRowBytes * (pair / 8), 2 * (pair % 8), 3);
    code = Plane::four ? _mm256_or_si256(code, _mm256_slli_epi32(two, 4)) : two;
  }
  if constexpr (Plane::one) {
    constexpr int kAt = (Plane::four ? 4 : 0) + (Plane::two ? 2 : 0);
    code = _mm256_or_si256(code, _mm256_slli_epi32(row(Plane::one_at, pair, 1), kAt));
  }
  return code;
}

inline void store(float* out, __m256i even, __m256i odd) {
  _mm256_storeu_ps(out, _mm256_cvtepi32_ps(even));
  _mm256_storeu_ps(out + kTile, _mm256_cvtepi32_ps(odd));
}

template <int Bits>
void decode_block(const uint8_t* block, const float* table, __m256i middle, float* out) {
  const __m256i low_half = _mm256_set1_epi32(0xffff);
  for (int pair = 0; pair < kPairs; ++pair, out += 2 * kTile)
    for (int half = 0; half < 2; ++half) {
      const __m256i code = codes<Bits>(block + half * kRowBytes / 2, pair);
      const __m256i even = _mm256_and_si256(code, low_half), odd = _mm256_srli_epi32(code, 16);
      float* to = out + half * kTile / 2;
      if (table != nullptr) {
        _mm256_storeu_ps(to, _mm256_i32gather_ps(table, even, 4));
        _mm256_storeu_ps(to + kTile, _mm256_i32gather_ps(table, odd, 4));
      } else {
        store(to, _mm256_sub_epi32(even, middle), _mm256_sub_epi32(odd, middle));
      }
    }
}

void decode_bytes(const uint8_t* block, float* out) {
  for (int pair = 0; pair < kPairs; ++pair, out += 2 * kTile)
    for (int half = 0; half < 2; ++half) {
      const __m128i bytes = _mm_loadu_si128(
          reinterpret_cast<const __m128i*>(block + 2 * kTile * pair + half * kTile));
      const __m128i even = _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8);
      const __m128i odd = _mm_srai_epi16(bytes, 8);
      store(out + half * kTile / 2, _mm256_cvtepi16_epi32(even), _mm256_cvtepi16_epi32(odd));
    }
}

// Both are what fp16 makes of their bits, e4m3 with another bias: fp16 keeps all subnormals.
void decode_float8(const uint8_t* block, Kind kind, float* out) {
  const __m256 scale = _mm256_set1_ps(kind == Kind::e4m3 ? 256.0f : 1.0f);
  for (int pair = 0; pair < kPairs; ++pair, out += 2 * kTile)
    for (int half = 0; half < 2; ++half) {
      const __m128i bytes = _mm_loadu_si128(
          reinterpret_cast<const __m128i*>(block + 2 * kTile * pair + half * kTile));
      const auto widen = [&](__m128i high_bytes, float* to) {
        __m128i bits = high_bytes;
        if (kind == Kind::e4m3)
          bits = _mm_or_si128(_mm_and_si128(bits, _mm_set1_epi16(static_cast<int16_t>(0x8000))),
                              _mm_srli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x7f00)), 1));
        _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtph_ps(bits), scale));
      };
      widen(_mm_slli_epi16(bytes, 8), out + half * kTile / 2);
      widen(_mm_and_si128(bytes, _mm_set1_epi16(static_cast<int16_t>(0xff00))),
            out + kTile + half * kTile / 2);
    }
}

void decode_bf16(const uint8_t* block, float* out) {
  for (int pair = 0; pair < kPairs; ++pair, out += 2 * kTile)
    for (int half = 0; half < 2; ++half) {
      const __m256i lanes = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(block + kRowBytes * pair + half * kRowBytes / 2));
      float* to = out + half * kTile / 2;
      _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 16)));
      _mm256_storeu_ps(to + kTile, _mm256_castsi256_ps(_mm256_and_si256(
                                       lanes, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))));
    }
}

void decode_integers_or_bf16(int bits, const uint8_t* block, const float* table, __m256i middle,
                             float* out) {
  switch (bits) {
    case 1:
      return decode_block<1>(block, table, middle, out);
    case 2:
      return decode_block<2>(block, table, middle, out);
    case 3:
      return decode_block<3>(block, table, middle, out);
    case 4:
      return decode_block<4>(block, table, middle, out);
    case 5:
      return decode_block<5>(block, table, middle, out);
    case 6:
      return decode_block<6>(block, table, middle, out);
    case 7:
      return decode_block<7>(block, table, middle, out);
    case 8:
      return decode_bytes(block, out);
    default:
      return decode_bf16(block, out);
  }
}

struct FmaCore {
  struct Acc {
    __m256 low, high;
  };
  using Weights = Acc;
  using Activation = __m256;
  static constexpr int kStep = 1, kMaxParts = 1, kRows = 6, kTiles = 1;

  static Acc zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Weights load(const uint8_t* at) {
    const float* lanes = reinterpret_cast<const float*>(at);
    return {_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)};
  }
  static Activation broadcast(const uint32_t* word) { return _mm256_set1_ps(float_of(*word)); }
  static Acc mac(Acc acc, Weights weights, Activation activation) {
    return {_mm256_fmadd_ps(weights.low, activation, acc.low),
            _mm256_fmadd_ps(weights.high, activation, acc.high)};
  }
  static Acc add_offset(Acc acc, float row_sum, const float* negated_offset) {
    const __m256 sum = _mm256_set1_ps(row_sum);
    return {_mm256_fmadd_ps(sum, _mm256_loadu_ps(negated_offset), acc.low),
            _mm256_fmadd_ps(sum, _mm256_loadu_ps(negated_offset + 8), acc.high)};
  }
  static void scale_into(float* total, Acc acc, const float* scale) {
    _mm256_storeu_ps(total,
                     _mm256_fmadd_ps(_mm256_loadu_ps(scale), acc.low, _mm256_loadu_ps(total)));
    _mm256_storeu_ps(total + 8, _mm256_fmadd_ps(_mm256_loadu_ps(scale + 8), acc.high,
                                                _mm256_loadu_ps(total + 8)));
  }

  static int64_t parts(Scalar) { return 1; }
  static void split(const float* row, int64_t padded_k, int64_t, uint32_t* out, int64_t stride) {
    for (int64_t i = 0; i < padded_k; ++i) out[i * stride] = bits_of(row[i]);
  }
  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* slab) {
    const Geometry& g = p.geometry;
    float values[128];
    const float* table = nullptr;
    if (p.wide_table != nullptr) table = p.wide_table;
    if (p.table != nullptr) {
      for (int64_t i = 0; i < int64_t{1} << g.element.bits; ++i) values[i] = from_bf16(p.table[i]);
      table = values;
    }
    const __m256i middle = _mm256_set1_epi32(static_cast<int>(p.middle));
    float* out = reinterpret_cast<float*>(slab);
    for (int64_t k = 0; k < width; k += kBlock, out += kBlock * kTile) {
      const uint8_t* block = p.packed + g.block_at(tile, k0 + k);
      if (g.element.kind == Kind::e4m3 || g.element.kind == Kind::e5m2) {
        decode_float8(block, g.element.kind, out);
      } else if (g.element.kind == Kind::float32) {
        load_scalars(block, Scalar::float32, 0, kBlock * kTile, out);
      } else if (g.element.kind == Kind::float16) {
        load_scalars(block, Scalar::float16, 0, kBlock * kTile, out);
      } else {
        decode_integers_or_bf16(g.element.bits, block, table, middle, out);
      }
    }
  }
  static bool copy_row(const Problem&, int64_t, uint32_t*, int64_t) { return false; }
  static int64_t few_rows_tiles(const Call<FmaCore>&) { return 0; }
  static void few_rows(const Call<FmaCore>&, int64_t, int64_t) {}
};

void linear(const Problem& p, const Parallel& parallel) { run_linear<FmaCore>(p, parallel); }

}  // namespace

const Engine kEngineAvx2 = {"avx2", &linear, &repack_avx2};

}  // namespace compressed_linear::cpu
