// SPDX-License-Identifier: Apache-2.0
// AVX2 and FMA as decode_pairs.h and fma_core.h ask for them. A vector holds four output channels
// times the two input channels of a pair, (k, k+1) next to each other, because that is what
// unpacking bytes to words yields. Only for units built with AVX2.
#pragma once

#include <immintrin.h>

#include "cpu/common/floats.h"
#include "cpu/common/problem.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

struct Avx2Lanes {
  using Reg = __m256i;
  using Float = __m256;
  using Activation = __m256;
  // near: channels 0 0 1 1 4 4 5 5, far: 2 2 3 3 6 6 7 7. With Quads: 0 0 1 1 2 2 3 3 and
  // 4 4 5 5 6 6 7 7.
  struct Pair {
    Float near, far;
  };
  using Sums = Pair;
  // Eight of the 16 registers hold sums while few rows are multiplied, twelve otherwise.
  static constexpr int kLanes = 8, kFewSums = 4, kBlockRows = 3;

  // ---- integers

  static Reg load_row(const uint8_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const Reg*>(at));
  }
  static Reg set_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static Reg set_words(int value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
  static Reg bit_and(Reg a, Reg b) { return _mm256_and_si256(a, b); }
  static Reg bit_or(Reg a, Reg b) { return _mm256_or_si256(a, b); }
  template <int Bits>
  static Reg shift_words_right(Reg a) {
    return _mm256_srli_epi16(a, Bits);
  }
  template <int Bits>
  static Reg shift_words_left(Reg a) {
    return _mm256_slli_epi16(a, Bits);
  }

  // ---- tables of sixteen bytes

  static Reg load_table(const uint8_t* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
  }
  // Of Tables tables that follow each other.
  template <int Tables>
  static Reg look_up(const Reg* tables, Reg code) {
    if constexpr (Tables == 1) return _mm256_shuffle_epi8(tables[0], code);
    // Codes of other tables than this one get bit 7, for which the shuffle gives zero.
    Reg found = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int table = 0; table < Tables; ++table) {
      const Reg in_table =
          _mm256_adds_epu8(_mm256_xor_si256(code, set_bytes(16 * table)), set_bytes(0x70));
      found = bit_or(found, _mm256_shuffle_epi8(tables[table], in_table));
    }
    return found;
  }

  // ---- bytes of two pairs to fp32. Per channel they are ordered as by PlaneBytes.

  // Words of two bf16 pairs per channel, even half first, to fp32.
  static void widen(Reg low, Reg high, Pair& first, Pair& second) {
    const Reg near = _mm256_unpacklo_epi8(low, high), far = _mm256_unpackhi_epi8(low, high);
    const Reg upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    first.near = _mm256_castsi256_ps(_mm256_slli_epi32(near, 16));
    first.far = _mm256_castsi256_ps(_mm256_slli_epi32(far, 16));
    second.near = _mm256_castsi256_ps(bit_and(near, upper));
    second.far = _mm256_castsi256_ps(bit_and(far, upper));
  }
  // First the first pair of four channels, then their second: unpacking to words and then to lanes
  // so gives one pair a vector.
  static Reg order_to_join(Reg code) {
    return _mm256_shuffle_epi8(code, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
  }
  // The four bytes of each number, lowest first, of codes that were ordered so.
  static void join(const Reg (&bytes)[4], Pair& first, Pair& second) {
    first =
        lanes(_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpacklo_epi8(bytes[2], bytes[3]));
    second =
        lanes(_mm256_unpackhi_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[2], bytes[3]));
  }
  static Pair subtract(Pair a, Float b) {
    return {_mm256_sub_ps(a.near, b), _mm256_sub_ps(a.far, b)};
  }

  // ---- one pair of kLanes channels in the order of memory

  static Pair from_bytes(const uint8_t* at) { return {four_channels(at), four_channels(at + 8)}; }
  // Both are what fp16 makes of their bits, which keeps the subnormals: e5m2 is its upper byte,
  // e4m3 with one exponent bit more is 2^-8 of it.
  static Pair from_e5m2(const uint8_t* at) {
    const __m128i bytes = load_half_row(at), zero = _mm_setzero_si128();
    return {_mm256_cvtph_ps(_mm_unpacklo_epi8(zero, bytes)),
            _mm256_cvtph_ps(_mm_unpackhi_epi8(zero, bytes))};
  }
  static Pair from_e4m3(const uint8_t* at) {
    // The copy of the sign below the sign is cleared.
    const Reg halves =
        bit_and(_mm256_slli_epi16(_mm256_cvtepi8_epi16(load_half_row(at)), 7), set_words(0xbfff));
    const Float scale = set(256.0f);
    return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), scale),
            _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)), scale)};
  }
  static Pair from_bf16(const uint8_t* at) {
    const Reg zero = _mm256_setzero_si256(), words = load_row(at);
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words))};
  }
  // Of input channels that are not adjacent.
  static Pair from_fp16(const uint8_t* even, const uint8_t* odd) {
    return interleave(_mm256_cvtph_ps(load_half_row(even)), _mm256_cvtph_ps(load_half_row(odd)));
  }
  static Pair from_fp32(const uint8_t* even, const uint8_t* odd) {
    return interleave(load(reinterpret_cast<const float*>(even)),
                      load(reinterpret_cast<const float*>(odd)));
  }

  // ---- arithmetic

  // x of one pair of input channels.
  static Activation broadcast_pair(const void* x) {
    double words;
    std::memcpy(&words, x, sizeof(words));
    return _mm256_castpd_ps(_mm256_set1_pd(words));
  }
  static Sums no_sums() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Sums multiply_add(Pair weights, Activation x, Sums sums) {
    return {_mm256_fmadd_ps(weights.near, x, sums.near), _mm256_fmadd_ps(weights.far, x, sums.far)};
  }
  // Even and odd input channels together, and the output channels in order.
  template <bool Quads>
  static Float sum(Sums sums) {
    const Float both = _mm256_hadd_ps(sums.near, sums.far);
    if constexpr (!Quads) return both;
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(both), 0xD8));
  }
  // The order without Quads.
  template <bool Quads>
  static Pair ordered(Pair pair) {
    if constexpr (!Quads) return pair;
    return {_mm256_permute2f128_ps(pair.near, pair.far, 0x20),
            _mm256_permute2f128_ps(pair.near, pair.far, 0x31)};
  }
  static void store_pair(float* at, Pair pair) {
    store(at, pair.near);
    store(at + kLanes, pair.far);
  }
  static Pair load_pair(const float* at) { return {load(at), load(at + kLanes)}; }

  static Float set(float value) { return _mm256_set1_ps(value); }
  static Float load(const float* at) { return _mm256_loadu_ps(at); }
  static void store(float* at, Float value) { _mm256_storeu_ps(at, value); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float negate(Float a) { return _mm256_xor_ps(set(-0.0f), a); }

  // data[index .. index + kLanes - 1] in fp32.
  static Float load_scalars(const void* data, Scalar type, int64_t index) {
    const char* at = static_cast<const char*>(data) + index * size_of(type);
    if (type == Scalar::float32) return load(reinterpret_cast<const float*>(at));
    if (type == Scalar::e4m3 || type == Scalar::e8m0) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
      if (type == Scalar::e4m3) {  // see from_e4m3
        const __m128i halves = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7),
                                             _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
        return _mm256_mul_ps(_mm256_cvtph_ps(halves), set(256.0f));
      }
      const Reg code = _mm256_cvtepu8_epi32(bytes);
      const Reg least =
          bit_and(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()), _mm256_set1_epi32(0x00400000));
      return _mm256_castsi256_ps(bit_or(_mm256_slli_epi32(code, 23), least));
    }
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if (type == Scalar::float16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

 private:
  static __m128i load_half_row(const uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  }
  static Float four_channels(const uint8_t* at) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static Pair lanes(Reg low, Reg high) {
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high))};
  }
  static Pair interleave(Float even, Float odd) {
    return {_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd)};
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
