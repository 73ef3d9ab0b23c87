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

  static void quantize(const float* x, int64_t count, QuantizedGroup by, int8_t* q) {
    const Float scale = set(by.scale), most = set(1024.0f), least = set(-1024.0f);
    const Reg zero = set(by.zero);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Float value =
          _mm512_max_ps(_mm512_min_ps(_mm512_div_ps(load(x + i), scale), most), least);
      const Reg code =
          _mm512_cvt_roundps_epi32(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i),
                       _mm512_cvtsepi32_epi8(_mm512_add_epi32(code, zero)));
    }
    quantize_values(x + i, count - i, by, q + i);
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
