// SPDX-License-Identifier: Apache-2.0
// AVX-512 with dot products of bytes: integer weights times digits of x (digits.h). All else goes
// to an engine that multiplies floats.
#include <immintrin.h>

#include <utility>

#include "cpu/common/paths.h"
#include "decode_avx512.h"
#include "digits_driver.h"

namespace compressed_linear::cpu {

LinearFunction float_avx512;

namespace {

// How far ahead of its work each line is fetched, and into the second-level cache where 0 is not
// given. A call after another layer's then begins sooner: one row of 4 bits takes 0.32 ms instead
// of 0.38 with 1 KiB alone, of 8 bits 0.60 instead of 0.67 and 0.77 with both (N = K = 4096, Zen
// 4).
template <int Bits>
constexpr int64_t kAheadBytes = Bits >= 6 ? 4096 : 2048;
template <int Bits>
constexpr int64_t kFarBytes = Bits >= 6 ? 0 : 12288;

using Word = int32_t __attribute__((may_alias));

// sum + codes * the four bytes at `x`, in all lanes. In words of assembly since the compiler would
// keep what it broadcasts in registers, of which there are too few.
[[gnu::always_inline]] inline void dot(__m512i& sum, __m512i codes, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*(const Word*)x));
}

// A row of a block, held in a register for all quads that are taken from it.
template <int Bits>
[[gnu::always_inline]] inline __m512i fetch_row(const uint8_t* at) {
  asm volatile("prefetcht0 %0" : : "m"(at[kAheadBytes<Bits>]));
  if constexpr (kFarBytes<Bits> > 0) asm volatile("prefetcht1 %0" : : "m"(at[kFarBytes<Bits>]));
  __m512i row = load_row(at);
  asm("" : "+v"(row));
  return row;
}

template <int Bits>
inline __m512i keep(__m512i row) {
  return _mm512_and_si512(row, _mm512_set1_epi8((1 << Bits) - 1));
}

// The low `Bits` bits of each byte from `low`, the others from `high`.
template <int Bits>
inline __m512i join_bytes(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8((1 << Bits) - 1), 0xE4);
}

// Codes of the quads of a block of one tile, unsigned bytes, one after another.
template <int Bits>
struct QuadCodes {
  using Plane = Planes<Bits>;
  __m512i four, two, one;

  template <int Quad>
  [[gnu::always_inline]] __m512i next(const uint8_t* block) {
    if constexpr (Plane::four && quad_bit(4, Quad) == 0)
      four = fetch_row<Bits>(block + Plane::four_at + kRowBytes * quad_row(4, Quad));
    if constexpr (Plane::two && quad_bit(2, Quad) == 0)
      two = fetch_row<Bits>(block + Plane::two_at + kRowBytes * quad_row(2, Quad));
    if constexpr (Plane::one && quad_bit(1, Quad) == 0)
      one = fetch_row<Bits>(block + Plane::one_at);
    if constexpr (Bits == 1) return keep<1>(place<quad_bit(1, Quad), 0>(one));
    if constexpr (Bits == 2) return keep<2>(place<quad_bit(2, Quad), 0>(two));
    if constexpr (Bits == 3)
      return keep<3>(
          join_bytes<2>(place<quad_bit(2, Quad), 0>(two), place<quad_bit(1, Quad), 2>(one)));
    const __m512i low = place<quad_bit(4, Quad), 0>(four);
    if constexpr (Bits == 4) return keep<4>(low);
    if constexpr (Bits == 5) return keep<5>(join_bytes<4>(low, place<quad_bit(1, Quad), 4>(one)));
    const __m512i lower = join_bytes<4>(low, place<quad_bit(2, Quad), 4>(two));
    if constexpr (Bits == 6) return keep<6>(lower);
    return keep<7>(join_bytes<6>(lower, place<quad_bit(1, Quad), 6>(one)));
  }
};

// Signed bytes of two pairs, which come together.
template <>
struct QuadCodes<8> {
  template <int Quad>
  [[gnu::always_inline]] __m512i next(const uint8_t* block) {
    alignas(64) static constexpr uint16_t kJoined[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = fetch_row<8>(block + kRowBytes * Quad);
    return _mm512_xor_si512(_mm512_permutexvar_epi16(_mm512_load_si512(kJoined), pairs),
                            _mm512_set1_epi8(-128));
  }
};

template <int Bits, int Rows, int Tiles>
struct DigitsKernel {
  using Sums = __m512i[Rows][Tiles][kDigits];

  template <int Quad>
  [[gnu::always_inline]] static void quad(QuadCodes<Bits>& codes, const uint8_t* block,
                                          const int8_t* x, int t, Sums& acc) {
    const __m512i code = codes.template next<Quad>(block);
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d)
        dot(acc[r][t][d], code, x + r * kDigitBytes + d * kBlock + Quad * kQuad);
  }

  template <int... Quad>
  [[gnu::always_inline]] static void tile(const uint8_t* block, const int8_t* x, int t, Sums& acc,
                                          std::integer_sequence<int, Quad...>) {
    QuadCodes<Bits> codes;
    (quad<Quad>(codes, block, x, t, acc), ...);
  }

  static void run(const DigitArgs& a) {
    const Problem& p = a.p;
    const uint8_t* blocks = block_of(p.weight, a.tile, a.channel);
    const int64_t stride =
        Tiles == kStrip ? kStrip * kRowBytes * Bits : p.weight.geometry.block_stride(a.tile);
    const int8_t* x = a.x;
    for (int64_t s = 0; s < a.segment_count; ++s) {
      Sums acc;
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t) {
          const DigitSums& start = a.start[s * Rows + r];
          acc[r][t][0] = _mm512_setzero_si512();
          acc[r][t][1] = _mm512_set1_epi32(start.upper);
          acc[r][t][2] = _mm512_set1_epi32(start.lowest);
        }
      for (int64_t k = a.segments[s].begin; k < a.segments[s].end; k += kBlock) {
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t)
          tile(blocks + t * kRowBytes * Bits, x, t, acc,
               std::make_integer_sequence<int, static_cast<int>(kQuads)>());
        blocks += stride;
        x += Rows * kDigitBytes;
      }
      finish(a, s, acc);
    }
  }

  [[gnu::always_inline]] static void finish(const DigitArgs& a, int64_t s, Sums& acc) {
    const int64_t group = a.segments[s].group;
    __m512 sums[Rows][Tiles];
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      const __m512 unit = _mm512_set1_ps(a.units[s * Rows + r]);
#pragma GCC unroll 4
      for (int t = 0; t < Tiles; ++t) {
        const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(acc[r][t][0], 8), acc[r][t][1]);
        const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][t][2]),
                                           _mm512_set1_ps(0x1p-8f), _mm512_cvtepi32_ps(upper));
        sums[r][t] = _mm512_mul_ps(sum, unit);
      }
    }
    if (a.row_sums != nullptr) {
      __m512 offset[Tiles];
      load_negated_offsets(a.p, a.tile, group, offset);
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t)
          sums[r][t] =
              _mm512_fmadd_ps(_mm512_set1_ps(a.row_sums[s * Rows + r]), offset[t], sums[r][t]);
    }
    if (a.sums != nullptr) {
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t)
          _mm512_storeu_ps(a.sums + (s * Rows + r) * kStripLanes + t * kTile, sums[r][t]);
      return;
    }
    __m512 scale[Tiles];
    load_scales(a.p, a.tile, group, scale);
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < Tiles; ++t) {
        float* total = a.totals + r * kStripLanes + t * kTile;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(scale[t], sums[r][t], _mm512_loadu_ps(total)));
      }
  }
};

template <int Bits>
DigitKernel kernel_of(int64_t rows, int64_t tiles) {
  if (tiles == 1)
    return rows == 1 ? &DigitsKernel<Bits, 1, 1>::run : &DigitsKernel<Bits, 2, 1>::run;
  return rows == 1 ? &DigitsKernel<Bits, 1, kStrip>::run : &DigitsKernel<Bits, 2, kStrip>::run;
}

struct Avx512VnniDigits {
  static constexpr int64_t kRows = 2;

  static float largest(const float* x, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += kTile)
      most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + i))));
    return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(most)));
  }

  static DigitSums split(const float* x, int64_t count, DigitScale scale, bool swap, int8_t* out,
                         int64_t stride) {
    if (scale.nan) return split_digits(x, count, scale, swap, out, stride);
    const __m512 shift = _mm512_set1_ps(static_cast<float>(scale.shift));
    const __m128i swapped = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m128i order =
        swap ? swapped : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto put = [order](int8_t* at, __m512i digits) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                       _mm_shuffle_epi8(_mm512_cvtepi32_epi8(digits), order));
    };
    const auto signed_byte = [](__m512i value) {
      return _mm512_srai_epi32(_mm512_slli_epi32(value, 24), 24);
    };
    __m512i uppers = _mm512_setzero_si512(), lowests = uppers;
    for (int64_t k = 0; k < count; k += kTile) {
      const __m512i value =
          _mm512_cvt_roundps_epi32(_mm512_scalef_ps(_mm512_loadu_ps(x + k), shift),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m512i lowest = signed_byte(value);
      const __m512i upper = _mm512_srai_epi32(_mm512_sub_epi32(value, lowest), 8);
      int8_t* at = out + k / kBlock * stride + k % kBlock;
      put(at, _mm512_srai_epi32(_mm512_sub_epi32(upper, signed_byte(upper)), 8));
      put(at + kBlock, upper);
      put(at + 2 * kBlock, lowest);
      uppers = _mm512_add_epi32(uppers, upper);
      lowests = _mm512_add_epi32(lowests, lowest);
    }
    return {_mm512_reduce_add_epi32(uppers), _mm512_reduce_add_epi32(lowests)};
  }

  static DigitKernel kernel(int bits, int64_t rows, int64_t tiles) {
    switch (bits) {
      case 1:
        return kernel_of<1>(rows, tiles);
      case 2:
        return kernel_of<2>(rows, tiles);
      case 3:
        return kernel_of<3>(rows, tiles);
      case 4:
        return kernel_of<4>(rows, tiles);
      case 5:
        return kernel_of<5>(rows, tiles);
      case 6:
        return kernel_of<6>(rows, tiles);
      case 7:
        return kernel_of<7>(rows, tiles);
      default:
        return kernel_of<8>(rows, tiles);
    }
  }
};

}  // namespace

void float_avx512vnni(const Problem& p, const Parallel& parallel) {
  if (takes_digits(p)) {
    run_digits<Avx512VnniDigits>(p, parallel);
  } else {
    float_avx512(p, parallel);
  }
}

}  // namespace compressed_linear::cpu
