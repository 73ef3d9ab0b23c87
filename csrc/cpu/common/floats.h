// SPDX-License-Identifier: Apache-2.0
// Conversions between fp32, fp16 and bf16: exact widening, round-to-nearest-even narrowing. They
// keep denormals, infinities and NaN (made quiet). And the values of the 8-bit floats of OCP's FP8
// and MX specifications, all exact in fp32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "layouts/planes.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_bf16(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

inline float from_fp16(uint16_t value) {
#if defined(__F16C__)
  return _cvtsh_ss(value);
#else
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  const float denormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(denormal));
#endif
}

inline uint16_t to_fp16(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u)
    return static_cast<uint16_t>(sign | 0x7c00u);  // rounds beyond 65504
  if (magnitude < 0x38800000u) {  // denormal: adding 0.5 aligns the ulp to 2^-24 and rounds to even
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
#endif
}

inline float from_e4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24, magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return float_of(sign | 0x7fc00000u);
  if (magnitude < 8) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-9f));
  return float_of(sign | ((magnitude << 20) + (120u << 23)));
}

inline float from_e5m2(uint8_t code) { return from_fp16(static_cast<uint16_t>(code << 8)); }

// 2^(code - 127); 255 is NaN.
inline float from_e8m0(uint8_t code) {
  if (code == 0) return 0x1p-127f;
  return float_of(code == 255 ? 0x7fc00000u : static_cast<uint32_t>(code) << 23);
}

inline uint16_t half_at(const void* data, int64_t index) {
  uint16_t value;
  std::memcpy(&value, static_cast<const char*>(data) + 2 * index, 2);
  return value;
}

inline float load_scalar(const void* data, Scalar type, int64_t index) {
  if (type == Scalar::bfloat16) return from_bf16(half_at(data, index));
  if (type == Scalar::float16) return from_fp16(half_at(data, index));
  if (type == Scalar::e4m3) return from_e4m3(static_cast<const uint8_t*>(data)[index]);
  if (type == Scalar::e8m0) return from_e8m0(static_cast<const uint8_t*>(data)[index]);
  float value;
  std::memcpy(&value, static_cast<const char*>(data) + 4 * index, 4);
  return value;
}

// out[i] = data[index + i].
inline void load_scalars(const void* data, Scalar type, int64_t index, int64_t count, float* out) {
  const char* from = static_cast<const char*>(data) + index * size_of(type);
  if (type == Scalar::float32) {
    std::memcpy(out, from, static_cast<size_t>(count) * 4);
  } else if (type == Scalar::bfloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(half_at(from, i));
  } else if (type != Scalar::float16) {
    for (int64_t i = 0; i < count; ++i) out[i] = load_scalar(from, type, i);
  } else {
#if defined(__F16C__)
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(
          out + i,
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
    if (i < count) {
      const size_t left = static_cast<size_t>(count - i);
      alignas(16) uint16_t halves[8] = {};
      alignas(32) float wide[8];
      std::memcpy(halves, from + 2 * i, 2 * left);
      _mm256_store_ps(wide,
                      _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(halves))));
      std::memcpy(out + i, wide, 4 * left);
    }
#else
    for (int64_t i = 0; i < count; ++i) out[i] = from_fp16(half_at(from, i));
#endif
  }
}

#if defined(__AVX2__)
// What to_bf16 gives for each of eight.
inline void store_eight_bf16(void* to, __m256 values) {
  const __m256i bits = _mm256_castps_si256(values), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan));
  // Four halves of each 128 bits, then the two fours together.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#endif

inline void store_scalars(void* data, Scalar type, int64_t index, int64_t count, const float* in) {
  char* to = static_cast<char*>(data) + index * size_of(type);
  if (type == Scalar::float32) {
    std::memcpy(to, in, static_cast<size_t>(count) * 4);
    return;
  }
  int64_t i = 0;
#if defined(__AVX2__)
  // Left to the compiler this becomes vectors in some units only.
  if (type == Scalar::bfloat16)
    for (; i + 8 <= count; i += 8) store_eight_bf16(to + 2 * i, _mm256_loadu_ps(in + i));
#if defined(__F16C__)
  if (type == Scalar::float16)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#endif
  for (; i < count; ++i) {
    const uint16_t half = type == Scalar::bfloat16 ? to_bf16(in[i]) : to_fp16(in[i]);
    std::memcpy(to + 2 * i, &half, 2);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
