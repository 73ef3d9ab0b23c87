// SPDX-License-Identifier: Apache-2.0
// What the engines of 256 bits for integer activations have in common: everything but the dot
// product. Included by units compiled for AVX2 and FMA only.
#pragma once

#include <immintrin.h>

#include "driver.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

struct Avx2Core {
  using Reg = __m256i;
  using Float = __m256;
  // Eight of the 16 registers hold sums.
  static constexpr int kLanes = 8, kVectors = 2, kRows = 4;
  static constexpr int tiles(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

  static Reg load(const uint8_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const Reg*>(at));
  }
  static Reg load(const int32_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const Reg*>(at));
  }
  static Float load(const float* at) { return _mm256_loadu_ps(at); }
  static Float load_bf16(const uint16_t* at) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store(uint8_t* at, Reg value) {
    _mm256_storeu_si256(reinterpret_cast<Reg*>(at), value);
  }
  static void store(int32_t* at, Reg value) {
    _mm256_storeu_si256(reinterpret_cast<Reg*>(at), value);
  }
  static void store(float* at, Float value) { _mm256_storeu_ps(at, value); }
  static Reg set(int32_t value) { return _mm256_set1_epi32(value); }
  static Float set(float value) { return _mm256_set1_ps(value); }
  static Reg subtract(Reg a, Reg b) { return _mm256_sub_epi32(a, b); }
  static Reg multiply(Reg a, Reg b) { return _mm256_mullo_epi32(a, b); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float convert(Reg value) { return _mm256_cvtepi32_ps(value); }

  // For MaddCore: bytes and codes of 16-bit lanes, widened with and without sign; products.
  static Reg low_bytes(Reg a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
  static Reg high_bytes(Reg a) { return _mm256_srai_epi16(a, 8); }
  static Reg low_codes(Reg a) { return _mm256_and_si256(a, _mm256_set1_epi16(0xff)); }
  static Reg high_codes(Reg a) { return _mm256_srli_epi16(a, 8); }
  static Reg multiply_bytes(Reg codes, Reg bytes) { return _mm256_maddubs_epi16(codes, bytes); }
  static Reg multiply_words(Reg a, Reg b) { return _mm256_madd_epi16(a, b); }
  static Reg add_pairs(Reg a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
  static Reg add(Reg a, Reg b) { return _mm256_add_epi32(a, b); }

  static void quantize(const float* x, int64_t count, QuantizedGroup by, int8_t* q) {
    const Float scale = set(by.scale), most = set(1024.0f), least = set(-1024.0f);
    const Reg zero = set(by.zero);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Float value =
          _mm256_max_ps(_mm256_min_ps(_mm256_div_ps(load(x + i), scale), most), least);
      const Float even = _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const Reg code = _mm256_add_epi32(_mm256_cvttps_epi32(even), zero);
      const __m128i words =
          _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packs_epi16(words, words));
    }
    quantize_values(x + i, count - i, by, q + i);
  }

  static float largest(const float* x, int64_t count) { return largest_magnitude(x, count); }
  static int32_t sum(const int8_t* q, int64_t count) { return sum_bytes(q, count); }

  // Shifts so that bit From of each byte lands on bit To; bits that cross bytes are junk.
  template <int From, int To>
  static Reg place(Reg row) {
    if constexpr (From > To) return _mm256_srli_epi16(row, From - To);
    if constexpr (From < To) return _mm256_slli_epi16(row, To - From);
    return row;
  }
  // The low Bits bits of each byte from `low`, the others from `high`.
  template <int Bits>
  static Reg join(Reg low, Reg high) {
    const Reg mask = _mm256_set1_epi8((1 << Bits) - 1);
    return _mm256_or_si256(_mm256_and_si256(mask, low), _mm256_andnot_si256(mask, high));
  }
  template <int Mask>
  static Reg keep(Reg row) {
    return _mm256_and_si256(row, _mm256_set1_epi8(Mask));
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
