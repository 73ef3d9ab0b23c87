// SPDX-License-Identifier: Apache-2.0
// AVX-512 with dot products of bytes: integer weights and e2m1 times digits of x (digits.h). All
// else goes to an engine that multiplies floats.
#include <immintrin.h>

#include <utility>

#include "cpu/common/isa.h"
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

// Codes of the quads of a block of one tile, unsigned bytes, one after another, from quad First on.
//
// Whether blocks without a third digit are multiplied by two. Not where one row waits for memory
// anyway, which the branch disturbs: N = K = 4096, Zen 4, 4 bits 0.25 ms without and 0.35 with it,
// 8 bits 0.53 and 0.54; but 2 bits 0.24 and 0.18, 3 bits 0.29 and 0.26, MXFP4 0.28 and 0.27.
template <int Bits>
struct QuadCodes {
  using Plane = Planes<Bits>;
  static constexpr int kBits = Bits;
  static constexpr bool kTellsThird = Bits != 4;
  __m512i four, two, one;

  explicit QuadCodes(const uint8_t*) {}

  template <int Quad, int First>
  [[gnu::always_inline]] __m512i next(const uint8_t* block) {
    if constexpr (Plane::four && quad_bit(4, Quad) == 0)
      four = fetch_row<Bits>(block + Plane::four_at + kRowBytes * quad_row(4, Quad));
    if constexpr (Plane::two && quad_bit(2, Quad) == 0)
      two = fetch_row<Bits>(block + Plane::two_at + kRowBytes * quad_row(2, Quad));
    if constexpr (Plane::one && Quad == First) one = fetch_row<Bits>(block + Plane::one_at);
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
  static constexpr int kBits = 8;
  static constexpr bool kTellsThird = false;

  explicit QuadCodes(const uint8_t*) {}

  template <int Quad, int First>
  [[gnu::always_inline]] __m512i next(const uint8_t* block) {
    alignas(64) static constexpr uint16_t kJoined[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = fetch_row<8>(block + kRowBytes * Quad);
    return _mm512_xor_si512(_mm512_permutexvar_epi16(_mm512_load_si512(kJoined), pairs),
                            _mm512_set1_epi8(-128));
  }
};

// The bytes of a table instead. VBMI's permutation looks at six bits, so those above a code need
// not be cleared. In words of assembly since not all processors with VNNI have it, and this unit is
// compiled for them all.
template <bool Vbmi>
struct TableCodes {
  static constexpr int kBits = kByteTableBits;
  static constexpr bool kTellsThird = true;
  __m512i four, table;

  explicit TableCodes(const uint8_t* of_code) : table(_mm512_load_si512(of_code)) {}

  template <int Quad, int First>
  [[gnu::always_inline]] __m512i next(const uint8_t* block) {
    if constexpr (quad_bit(4, Quad) == 0)
      four = fetch_row<4>(block + kRowBytes * quad_row(4, Quad));
    const __m512i code = place<quad_bit(4, Quad), 0>(four);
    if constexpr (!Vbmi) return _mm512_shuffle_epi8(table, keep<4>(code));
    __m512i bytes;
    asm("vpermb %2, %1, %0" : "=v"(bytes) : "v"(code), "v"(table));
    return bytes;
  }
};

// Whole: segments are whole blocks, and not halves of them.
template <class Codes, int Rows, int Tiles, bool Whole>
struct DigitsKernel {
  using Sums = __m512i[Rows][kDigits];  // of a tile
  // Blocks without a third digit are the same in each strip, so that the branch is soon foreseen.
  static constexpr bool kTellsThird = Codes::kTellsThird && Rows == 1 && Tiles == kStrip;

  template <int Quad, int First, int Digits>
  [[gnu::always_inline]] static void quad(Codes& codes, const uint8_t* block, const int8_t* x,
                                          Sums& acc) {
    const __m512i code = codes.template next<Quad, First>(block);
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
      for (int d = 0; d < Digits; ++d)
        dot(acc[r][d], code, x + r * kDigitBytes + d * kBlock + Quad * kQuad);
  }

  template <int First, int Digits, int... Quad>
  [[gnu::always_inline]] static void quads(const DigitArgs& a, const uint8_t* block,
                                           const int8_t* x, Sums& acc,
                                           std::integer_sequence<int, Quad...>) {
    Codes codes(a.of_code);
    (quad<First + Quad, First, Digits>(codes, block, x, acc), ...);
  }

  // A block of each tile, with so many digits of x.
  template <int Digits>
  [[gnu::always_inline]] static void block(const DigitArgs& a, const uint8_t* blocks,
                                           const int8_t* x, Sums* acc) {
    asm("" : "+r"(blocks), "+r"(x));  // or the compiler would keep sums of these and constants
#pragma GCC unroll 4
    for (int t = 0; t < Tiles; ++t)
      quads<0, Digits>(a, blocks + t * kRowBytes * Codes::kBits, x, acc[t],
                       std::make_integer_sequence<int, kQuads>());
  }

  [[gnu::always_inline]] static void begin(const DigitArgs& a, int64_t s, Sums& acc) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      const DigitSums& start = a.start[s * Rows + r];
      acc[r][0] = _mm512_setzero_si512();
      acc[r][1] = _mm512_set1_epi32(start.upper);
      acc[r][2] = _mm512_set1_epi32(start.lowest);
    }
  }

  [[gnu::always_inline]] static void end(const DigitArgs& a, int64_t s, const Sums* acc) {
    const int64_t group = a.segments[s].group;
    __m512 sums[Rows][Tiles];
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      const __m512 unit = _mm512_set1_ps(a.units[s * Rows + r]);
#pragma GCC unroll 4
      for (int t = 0; t < Tiles; ++t) {
        const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(acc[t][r][0], 8), acc[t][r][1]);
        const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t][r][2]),
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

  // Both halves of the block of a tile before the next tile, as they lie in memory.
  template <int Digits>
  [[gnu::always_inline]] static void halves(const DigitArgs& a, const uint8_t* blocks,
                                            const int8_t* x, Sums* first, Sums* second) {
    constexpr auto kHalf = std::make_integer_sequence<int, kQuads / 2>();
    asm("" : "+r"(blocks), "+r"(x));
#pragma GCC unroll 4
    for (int t = 0; t < Tiles; ++t) {
      quads<0, Digits>(a, blocks + t * kRowBytes * Codes::kBits, x, first[t], kHalf);
      quads<kQuads / 2, Digits>(a, blocks + t * kRowBytes * Codes::kBits, x, second[t], kHalf);
    }
  }

  static void run(const DigitArgs& a) {
    const Weight& w = a.p.weight;
    const uint8_t* blocks = block_of(w, a.tile, a.channel);
    const int64_t stride =
        Tiles == kStrip ? kStrip * kRowBytes * Codes::kBits : w.geometry.block_stride(a.tile);
    const int8_t* x = a.x;
    const uint8_t* third = a.third;
    const auto next = [&] {
      blocks += stride;
      x += Rows * kDigitBytes;
      ++third;
    };
    Sums acc[Tiles], second[Whole ? 1 : Tiles];
    for (int64_t s = 0; s < a.segment_count; ++s) {
#pragma GCC unroll 4
      for (int t = 0; t < Tiles; ++t) begin(a, s, acc[t]);
      if constexpr (Whole) {
        for (int64_t k = a.segments[s].begin; k < a.segments[s].end; k += kBlock, next()) {
          if (kTellsThird && *third == 0) {
            block<kDigits - 1>(a, blocks, x, acc);
          } else {
            block<kDigits>(a, blocks, x, acc);
          }
        }
        end(a, s, acc);
      } else {
        // x of a half that is in no segment was left unset, and adds to sums that are not used.
        const bool both = s + 1 < a.segment_count;
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t) begin(a, s + both, second[t]);
        if (kTellsThird && *third == 0) {
          halves<kDigits - 1>(a, blocks, x, acc, second);
        } else {
          halves<kDigits>(a, blocks, x, acc, second);
        }
        next();
        end(a, s, acc);
        if (both) end(a, ++s, second);
      }
    }
  }
};

template <class Codes, bool Whole>
DigitKernel kernel_of(int64_t rows, int64_t tiles) {
  if (tiles == 1)
    return rows == 1 ? &DigitsKernel<Codes, 1, 1, Whole>::run
                     : &DigitsKernel<Codes, 2, 1, Whole>::run;
  if (rows == 1) return &DigitsKernel<Codes, 1, kStrip, Whole>::run;
  if constexpr (Whole) return &DigitsKernel<Codes, 2, kStrip, true>::run;
  return nullptr;
}

template <class Codes>
DigitKernel kernel_of(bool whole, int64_t rows, int64_t tiles) {
  return whole ? kernel_of<Codes, true>(rows, tiles) : kernel_of<Codes, false>(rows, tiles);
}

template <bool Vbmi>
struct Avx512VnniDigits {
  static constexpr int64_t kRows = 2;

  // The sums of both halves of a block, of two rows and four tiles, would not fit the registers.
  static int64_t tiles(DigitCode code, int64_t rows) {
    return code.whole || rows == 1 ? kStrip : 1;
  }

  static float largest(const float* x, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += kTile)
      most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + i))));
    return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(most)));
  }

  static DigitSums split(const float* x, int64_t begin, int64_t end, DigitScale scale, bool swap,
                         int8_t* out, int64_t stride, uint8_t* third) {
    if (scale.nan) return split_digits(x, begin, end, scale, swap, out, stride, third);
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
    for (int64_t k = begin; k < end; k += kTile) {
      const __m512i value =
          _mm512_cvt_roundps_epi32(_mm512_scalef_ps(_mm512_loadu_ps(x + k), shift),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m512i lowest = signed_byte(value);
      const __m512i upper = _mm512_srai_epi32(_mm512_sub_epi32(value, lowest), 8);
      int8_t* at = out + k / kBlock * stride + k % kBlock;
      put(at, _mm512_srai_epi32(_mm512_sub_epi32(upper, signed_byte(upper)), 8));
      put(at + kBlock, upper);
      put(at + 2 * kBlock, lowest);
      third[k / kBlock] |= _mm512_test_epi32_mask(lowest, lowest) != 0;
      uppers = _mm512_add_epi32(uppers, upper);
      lowests = _mm512_add_epi32(lowests, lowest);
    }
    return {_mm512_reduce_add_epi32(uppers), _mm512_reduce_add_epi32(lowests)};
  }

  static DigitKernel kernel(DigitCode code, int64_t rows, int64_t tiles) {
    if (code.table) return kernel_of<TableCodes<Vbmi>>(code.whole, rows, tiles);
    switch (code.bits) {
      case 1:
        return kernel_of<QuadCodes<1>>(code.whole, rows, tiles);
      case 2:
        return kernel_of<QuadCodes<2>>(code.whole, rows, tiles);
      case 3:
        return kernel_of<QuadCodes<3>>(code.whole, rows, tiles);
      case 4:
        return kernel_of<QuadCodes<4>>(code.whole, rows, tiles);
      case 5:
        return kernel_of<QuadCodes<5>>(code.whole, rows, tiles);
      case 6:
        return kernel_of<QuadCodes<6>>(code.whole, rows, tiles);
      case 7:
        return kernel_of<QuadCodes<7>>(code.whole, rows, tiles);
      default:
        return kernel_of<QuadCodes<8>>(code.whole, rows, tiles);
    }
  }
};

}  // namespace

void float_avx512vnni(const Problem& p, const Parallel& parallel) {
  if (!takes_digits(p)) {
    float_avx512(p, parallel);
  } else if (has_byte_permutations()) {
    run_digits<Avx512VnniDigits<true>>(p, parallel);
  } else {
    run_digits<Avx512VnniDigits<false>>(p, parallel);
  }
}

}  // namespace compressed_linear::cpu
