// SPDX-License-Identifier: Apache-2.0
// What the two AVX-512 engines for integer activations have in common: everything but the dot
// product. Included by units compiled for AVX-512 F and BW only.
#pragma once

#include <immintrin.h>

#include "driver.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

struct Avx512Core {
  using Reg = __m512i;
  using Float = __m512;
  // 24 of the 32 registers hold sums.
  static constexpr int kLanes = 16, kVectors = 1, kRows = 6;
  static constexpr int tiles(int) { return kStrip; }

  static Reg load(const uint8_t* at) { return _mm512_loadu_si512(at); }
  static Reg load(const int32_t* at) { return _mm512_loadu_si512(at); }
  static Float load(const float* at) { return _mm512_loadu_ps(at); }
  static Float load_bf16(const uint16_t* at) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store(uint8_t* at, Reg value) { _mm512_storeu_si512(at, value); }
  static void store(int32_t* at, Reg value) { _mm512_storeu_si512(at, value); }
  static void store(float* at, Float value) { _mm512_storeu_ps(at, value); }
  static Reg set(int32_t value) { return _mm512_set1_epi32(value); }
  static Float set(float value) { return _mm512_set1_ps(value); }
  static Reg subtract(Reg a, Reg b) { return _mm512_sub_epi32(a, b); }
  static Reg subtract_bytes(Reg a, Reg b) { return _mm512_sub_epi8(a, b); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mullo_epi32(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float convert(Reg value) { return _mm512_cvtepi32_ps(value); }

  // For MaddCore: bytes and codes of 16-bit lanes, widened with and without sign; products.
  static Reg low_bytes(Reg a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
  static Reg high_bytes(Reg a) { return _mm512_srai_epi16(a, 8); }
  static Reg low_codes(Reg a) { return _mm512_and_si512(a, _mm512_set1_epi16(0xff)); }
  static Reg high_codes(Reg a) { return _mm512_srli_epi16(a, 8); }
  static Reg multiply_bytes(Reg codes, Reg bytes) { return _mm512_maddubs_epi16(codes, bytes); }
  static Reg multiply_words(Reg a, Reg b) { return _mm512_madd_epi16(a, b); }
  static Reg add_pairs(Reg a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
  static Reg add(Reg a, Reg b) { return _mm512_add_epi32(a, b); }

  // A product with the reciprocal differs from the quotient by less than kNear below 1024, so that
  // both round to the same integer unless they are that near to the middle of two.
  static void quantize(const float* x, int64_t count, QuantizedGroup by, int8_t* q) {
    constexpr float kNear = 0x1p-10f;
    const Float scale = set(by.scale), most = set(1024.0f), least = set(-1024.0f);
    const Float reciprocal = set(1.0f / by.scale), half = set(0.5f), near = set(kNear);
    const bool usual = by.scale > 0x1p-100f && by.scale < 0x1p100f;
    const Reg zero = set(by.zero);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Float values = load(x + i);
      Float value = _mm512_max_ps(_mm512_min_ps(multiply(values, reciprocal), most), least);
      const Float away =
          _mm512_sub_ps(_mm512_abs_ps(_mm512_sub_ps(value, _mm512_roundscale_ps(value, 0))), half);
      // Infinities and NaN are not far either.
      const bool far = _mm512_cmp_ps_mask(_mm512_abs_ps(away), near, _CMP_GT_OQ) == 0xffff;
      if (!far || !usual)
        value = _mm512_max_ps(_mm512_min_ps(_mm512_div_ps(values, scale), most), least);
      const Reg code =
          _mm512_cvt_roundps_epi32(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i),
                       _mm512_cvtsepi32_epi8(_mm512_add_epi32(code, zero)));
    }
    quantize_values(x + i, count - i, by, q + i);
  }
  static float largest(const float* x, int64_t count) {
    Reg most = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(load(x + i))));
    const auto rest = static_cast<int32_t>(bits_of(largest_magnitude(x + i, count - i)));
    const int32_t found = _mm512_reduce_max_epi32(most);
    return float_of(static_cast<uint32_t>(found > rest ? found : rest));
  }
  static int32_t sum(const int8_t* q, int64_t count) {
    Reg sums = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + kRowBytes <= count; i += kRowBytes) {
      const Reg codes = _mm512_xor_si512(_mm512_loadu_si512(q + i), _mm512_set1_epi8(-128));
      sums = _mm512_add_epi64(sums, _mm512_sad_epu8(codes, _mm512_setzero_si512()));
    }
    int64_t total = _mm512_reduce_add_epi64(sums) - 128 * i;
    if (i + 32 <= count) {
      const __m256i codes = _mm256_xor_si256(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i)), _mm256_set1_epi8(-128));
      const __m256i four = _mm256_sad_epu8(codes, _mm256_setzero_si256());
      const __m128i two =
          _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
      total += _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1) - 128 * 32;
      i += 32;
    }
    return static_cast<int32_t>(total) + sum_bytes(q + i, count - i);
  }
  // As to_bf16 rounds.
  static void store_bf16(void* at, Float value) {
    const Reg bits = _mm512_castps_si512(value), high = _mm512_srli_epi32(bits, 16);
    const Reg odd = _mm512_and_si512(high, set(1));
    const Reg rounded = _mm512_srli_epi32(add(bits, add(odd, set(0x7fff))), 16);
    const Reg result = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q),
                                            high, set(0x40));
    _mm256_storeu_si256(static_cast<__m256i*>(at), _mm512_cvtepi32_epi16(result));
  }

  // Shifts so that bit From of each byte lands on bit To; bits that cross bytes are junk.
  template <int From, int To>
  static Reg place(Reg row) {
    if constexpr (From > To) return _mm512_srli_epi16(row, From - To);
    if constexpr (From < To) return _mm512_slli_epi16(row, To - From);
    return row;
  }
  // The low Bits bits of each byte from `low`, the others from `high`.
  template <int Bits>
  static Reg join(Reg low, Reg high) {
    // The mask comes last, so that it is not what the result overwrites.
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8((1 << Bits) - 1), 0xE4);
  }
  template <int Mask>
  static Reg keep(Reg row) {
    return _mm512_and_si512(row, _mm512_set1_epi8(Mask));
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
