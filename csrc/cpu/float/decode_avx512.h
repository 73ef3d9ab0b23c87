// SPDX-License-Identifier: Apache-2.0
// Codes to bf16 pairs in AVX-512 registers (F, BW, VL), and scales to fp32: what the engines with
// and without bf16 dot products have in common.
#pragma once

#include <immintrin.h>

#include "cpu/common/floats.h"
#include "cpu/common/problem.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// The bf16 value of every code, repeated up to 128 entries, so that bits above a code of at most
// five bits need no masking: vpermw looks at five. For e4m3 and e5m2, the subnormals.
struct Table {
  __m512i rows[4];

  explicit Table(const uint8_t* bytes) {
    for (int i = 0; i < 4; ++i) rows[i] = _mm512_load_si512(bytes + 64 * i);
  }

  explicit Table(const Problem& p) {
    const Element element = p.weight.geometry.element;
    alignas(64) uint16_t values[128];
    const int64_t last = (int64_t{1} << element.bits) - 1;
    for (int64_t i = 0; i < 128; ++i)
      values[i] = element.kind == Kind::e4m3   ? to_bf16(from_e4m3(static_cast<uint8_t>(i & 7)))
                  : element.kind == Kind::e5m2 ? to_bf16(from_e5m2(static_cast<uint8_t>(i & 3)))
                  : p.weight.table != nullptr
                      ? p.weight.table[i & last]
                      : to_bf16(static_cast<float>(i & last) - p.weight.middle);
    for (int i = 0; i < 4; ++i) rows[i] = _mm512_load_si512(values + 32 * i);
  }
};

inline __m512i load_row(const uint8_t* at) { return _mm512_loadu_si512(at); }

// Shifts so that bit From of each 16-bit half lands on bit To.
template <int From, int To>
inline __m512i place(__m512i row) {
  if constexpr (From > To) return _mm512_srli_epi16(row, From - To);
  if constexpr (From < To) return _mm512_slli_epi16(row, To - From);
  return row;
}

// The low `Bits` bits of each half from `low`, the others from `high`.
template <int Bits>
inline __m512i join(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16((1 << Bits) - 1), low, high, 0xCA);
}

// Codes of pair P at the bottom of both halves of each lane; bits above are undefined.
template <int Bits, int P>
inline __m512i codes(const uint8_t* block) {
  using Plane = Planes<Bits>;
  constexpr int kWide = Plane::four ? 4 : Plane::two ? 2 : 0;
  __m512i code = _mm512_setzero_si512();
  if constexpr (Plane::four) {
    code =
        place<pair_bit(4, P), 0>(load_row(block + Plane::four_at + kRowBytes * quad_row(4, P / 2)));
  }
  if constexpr (Plane::two) {
    const __m512i row = load_row(block + Plane::two_at + kRowBytes * quad_row(2, P / 2));
    if constexpr (Plane::four) {
      code = join<4>(code, place<pair_bit(2, P), 4>(row));
    } else {
      code = place<pair_bit(2, P), 0>(row);
    }
  }
  if constexpr (Plane::one) {
    constexpr int kAt = Plane::four && Plane::two ? 6 : kWide;
    const __m512i row = load_row(block + Plane::one_at);
    if constexpr (kAt == 0) {
      code = place<pair_bit(1, P), 0>(row);
    } else {
      code = join<kAt>(code, place<pair_bit(1, P), kAt>(row));
    }
  }
  return code;
}

template <int Bits>
inline __m512i look_up(__m512i code, const Table& table) {
  if constexpr (Bits <= 5) return _mm512_permutexvar_epi16(code, table.rows[0]);
  const __m512i low = _mm512_permutex2var_epi16(table.rows[0], code, table.rows[1]);
  if constexpr (Bits == 6) return low;
  const __m512i high = _mm512_permutex2var_epi16(table.rows[2], code, table.rows[3]);
  return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), low, high);
}

// 8-bit floats: the exponent is moved and its bias exchanged; what has no exponent (and would be
// a denormal, which vdpbf16ps takes for zero) comes from the table.
template <int Mantissa>
struct Float8 {
  static constexpr int kBits = 8;
  static constexpr bool kHalves = false, kSequential = false, kTwoPairs = false;
  static constexpr int kShift = 7 - Mantissa;
  static constexpr int kBias = 127 - ((1 << (6 - Mantissa)) - 1);
  static constexpr int kExponent = 0x7f & ~((1 << Mantissa) - 1);
  template <int P>
  static __m512i pair(const uint8_t* block, const Table& table) {
    const __m512i code = _mm512_cvtepi8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 2 * kTile * P)));
    const __m512i moved = _mm512_slli_epi16(code, kShift);
    const __m512i normal = _mm512_add_epi16(
        _mm512_and_si512(moved, _mm512_set1_epi16(0x7f << kShift)), _mm512_set1_epi16(kBias << 7));
    const __m512i magnitude = _mm512_mask_permutexvar_epi16(
        normal, _mm512_testn_epi16_mask(code, _mm512_set1_epi16(kExponent)), code, table.rows[0]);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(static_cast<int16_t>(0x8000)), code,
                                     magnitude, 0xCA);
  }
};

// Sixteen values of a type in fp32.
template <Scalar Type>
inline __m512 load_sixteen(const char* at) {
  if constexpr (Type == Scalar::bfloat16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  } else if constexpr (Type == Scalar::float16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  } else if constexpr (Type == Scalar::e4m3) {
    // As fp16 with eight less in its exponent, which keeps the subnormals; the copy of the sign
    // below the sign is cleared.
    const __m256i code =
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(code, 7),
                                          _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  } else if constexpr (Type == Scalar::e8m0) {
    const __m512i code =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    // 2^-127, of code 0, is denormal.
    return _mm512_castsi512_ps(
        _mm512_max_epi32(_mm512_slli_epi32(code, 23), _mm512_set1_epi32(0x00400000)));
  } else {
    return _mm512_loadu_ps(at);
  }
}

template <Scalar Type, int Tiles>
[[gnu::always_inline]] inline void load_tiles_of(const TileNumbers& numbers, int64_t tile,
                                                 int64_t group, __m512 (&out)[Tiles]) {
  constexpr int64_t kSize = size_of(Type), kShareBytes = Tiles * kTile * kSize;
  const int64_t stride = numbers.tile_stride * kSize;
  const char* first = static_cast<const char*>(numbers.data) + numbers.at(tile, 0) * kSize;
  const char* at = first + group * numbers.group_stride * kSize;
  // A strip's values are short runs, one for each tile, which end before the processor's own
  // prefetching has found them. So the next strip's are fetched meanwhile, a share in each group,
  // and from its beginning on: in the order of memory they cost half of what they do as needed.
  const char* share = first + Tiles * stride + group * kShareBytes;
  for (int64_t byte = 0; byte < kShareBytes; byte += kRowBytes)
    _mm_prefetch(share + byte, _MM_HINT_T0);
#pragma GCC unroll 8
  for (int t = 0; t < Tiles; ++t) out[t] = load_sixteen<Type>(at + t * stride);
}

// Numbers of one group, of tiles of a strip that follow each other. The type is asked for once for
// all of them: between the sums of the tiles every branch costs.
template <int Tiles>
[[gnu::always_inline]] inline void load_tiles(const TileNumbers& numbers, int64_t tile,
                                              int64_t group, __m512 (&out)[Tiles]) {
  switch (numbers.type) {
    case Scalar::bfloat16:
      return load_tiles_of<Scalar::bfloat16>(numbers, tile, group, out);
    case Scalar::float16:
      return load_tiles_of<Scalar::float16>(numbers, tile, group, out);
    case Scalar::e4m3:
      return load_tiles_of<Scalar::e4m3>(numbers, tile, group, out);
    case Scalar::e8m0:
      return load_tiles_of<Scalar::e8m0>(numbers, tile, group, out);
    default:
      return load_tiles_of<Scalar::float32>(numbers, tile, group, out);
  }
}

// The scales of the sixteen channels of each tile from `tile` on, for a group.
template <int Tiles>
[[gnu::always_inline]] inline void load_scales(const Problem& p, int64_t tile, int64_t group,
                                               __m512 (&out)[Tiles]) {
  if (p.weight.scale.data != nullptr) return load_tiles(p.weight.scale, tile, group, out);
  for (__m512& one : out) one = _mm512_set1_ps(1.0f);
}

// What load_negated_offset of rows.h gives, for each tile from `tile` on.
template <int Tiles>
[[gnu::always_inline]] inline void load_negated_offsets(const Problem& p, int64_t tile,
                                                        int64_t group, __m512 (&out)[Tiles]) {
  const __m512 offset = _mm512_set1_ps(p.weight.offset), sign = _mm512_set1_ps(-0.0f);
  if (p.weight.zero.data == nullptr) {
    for (__m512& one : out) one = _mm512_xor_ps(sign, offset);
    return;
  }
  load_tiles(p.weight.zero, tile, group, out);
  for (__m512& one : out) one = _mm512_xor_ps(sign, _mm512_add_ps(one, offset));
}

}  // namespace
}  // namespace compressed_linear::cpu
