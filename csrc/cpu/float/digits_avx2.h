// SPDX-License-Identifier: Apache-2.0
// Digits of x (digits.h) in registers of 256 bits, two for each tile. Included by units compiled
// for AVX2 and FMA only. Dots supplies the dot product of bytes:
//
//   kRun<Most>     quads that are summed before they are added up, for bytes of at most Most
//   first, next    the products of a run's first quad, and those of another added
//   add            adds a run to sums of 32 bits
//   kLargestByte   it takes: 255, or less and then no codes of 8 bits
//
// Sums of digits are exact, and what follows is added in the order of digits_driver.h, so the
// results have the bits of every other engine of digits.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "cpu/common/paths.h"
#include "digits_driver.h"
#include "lanes_avx2.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int kHalves = 2, kHalfLanes = 8;
constexpr int64_t kAheadOfRows = 2048;

inline __m256i load_bytes(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

using Word = int32_t __attribute__((may_alias));

// The four bytes at `x` in all lanes. In words of assembly since the compiler would keep those of a
// whole block for the next tile, far more than there are registers.
[[gnu::always_inline]] inline __m256i broadcast(const int8_t* x) {
  __m256i words;
  asm volatile("vpbroadcastd %1, %0" : "=x"(words) : "m"(*reinterpret_cast<const Word*>(x)));
  return words;
}

template <int From, int To>
inline __m256i place_bytes(__m256i row) {
  if constexpr (From > To) return _mm256_srli_epi16(row, From - To);
  if constexpr (From < To) return _mm256_slli_epi16(row, To - From);
  return row;
}

template <int Bits>
inline __m256i keep_bytes(__m256i row) {
  return _mm256_and_si256(row, _mm256_set1_epi8((1 << Bits) - 1));
}

// The low `Bits` bits of each byte from `low`, the others from `high`.
template <int Bits>
inline __m256i join_bytes(__m256i low, __m256i high) {
  return _mm256_or_si256(keep_bytes<Bits>(low),
                         _mm256_andnot_si256(_mm256_set1_epi8((1 << Bits) - 1), high));
}

// Codes of quads of half the channels of a tile, unsigned bytes. `block` is where these begin.
template <int Bits>
struct HalfCodes {
  using Plane = Planes<Bits>;
  static constexpr int kBits = Bits, kMost = (1 << Bits) - 1;

  explicit HalfCodes(const uint8_t*) {}

  template <int Width, int Quad>
  static __m256i row(const uint8_t* plane) {
    return load_bytes(plane + kRowBytes * quad_row(Width, Quad));
  }

  template <int Quad>
  __m256i get(const uint8_t* block) const {
    if constexpr (Bits == 1)
      return keep_bytes<1>(place_bytes<quad_bit(1, Quad), 0>(row<1, Quad>(block)));
    if constexpr (Bits == 2)
      return keep_bytes<2>(place_bytes<quad_bit(2, Quad), 0>(row<2, Quad>(block)));
    if constexpr (Bits == 3)
      return keep_bytes<3>(
          join_bytes<2>(place_bytes<quad_bit(2, Quad), 0>(row<2, Quad>(block)),
                        place_bytes<quad_bit(1, Quad), 2>(row<1, Quad>(block + Plane::one_at))));
    const __m256i low = place_bytes<quad_bit(4, Quad), 0>(row<4, Quad>(block));
    if constexpr (Bits == 4) return keep_bytes<4>(low);
    if constexpr (Bits == 5)
      return keep_bytes<5>(join_bytes<4>(
          low, place_bytes<quad_bit(1, Quad), 4>(row<1, Quad>(block + Plane::one_at))));
    const __m256i lower =
        join_bytes<4>(low, place_bytes<quad_bit(2, Quad), 4>(row<2, Quad>(block + Plane::two_at)));
    if constexpr (Bits == 6) return keep_bytes<6>(lower);
    return keep_bytes<7>(join_bytes<6>(
        lower, place_bytes<quad_bit(1, Quad), 6>(row<1, Quad>(block + Plane::one_at))));
  }
};

// Signed bytes of two pairs of eight channels: [channel][k, k+1], then those of k+2 and k+3.
template <>
struct HalfCodes<8> {
  static constexpr int kBits = 8, kMost = 255;

  explicit HalfCodes(const uint8_t*) {}

  template <int Quad>
  __m256i get(const uint8_t* block) const {
    const uint8_t* at = block + kRowBytes * Quad;
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + kRowBytes / 2));
    const __m256i quads =
        _mm256_setr_m128i(_mm_unpacklo_epi16(first, second), _mm_unpackhi_epi16(first, second));
    return _mm256_xor_si256(quads, _mm256_set1_epi8(-128));
  }
};

// The bytes of a table instead, none of them above Most.
template <int Most>
struct HalfTableCodes {
  static constexpr int kBits = kByteTableBits, kMost = Most;
  __m256i table;

  explicit HalfTableCodes(const uint8_t* of_code) : table(load_bytes(of_code)) {}

  template <int Quad>
  __m256i get(const uint8_t* block) const {
    return _mm256_shuffle_epi8(table, HalfCodes<4>(nullptr).get<Quad>(block));
  }
};

template <class Dots, class Codes, int Tiles, bool Whole>
struct Avx2DigitsKernel {
  // Of a segment: exact sums of each digit.
  using Sums = __m256i[Tiles][kHalves][kDigits];
  static constexpr int kStride = Codes::kBits == 8 ? kRowBytes / 4 : kRowBytes / 2;

  template <int Digits, int First, int... Quad>
  [[gnu::always_inline]] static void run_of_quads(const uint8_t* block, const int8_t* x,
                                                  const Codes& codes,
                                                  __m256i (&acc)[kHalves][kDigits],
                                                  std::integer_sequence<int, Quad...>) {
    __m256i partial[kHalves][Digits];
    const auto quad = [&](auto number) {
      constexpr int kIndex = decltype(number)::value, kAt = First + kIndex;
      __m256i digit[Digits];
#pragma GCC unroll 3
      for (int d = 0; d < Digits; ++d) digit[d] = broadcast(x + d * kBlock + kAt * kQuad);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        const __m256i code = codes.template get<kAt>(block + h * kStride);
#pragma GCC unroll 3
        for (int d = 0; d < Digits; ++d)
          if constexpr (kIndex == 0) {
            partial[h][d] = Dots::first(code, digit[d], acc[h][d]);
          } else {
            // The compiler would add a run in pairs, which takes more registers.
            __m256i sum = Dots::next(partial[h][d], code, digit[d]);
            asm("" : "+x"(sum));
            partial[h][d] = sum;
          }
      }
    };
    (quad(std::integral_constant<int, Quad>()), ...);
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h)
#pragma GCC unroll 3
      for (int d = 0; d < Digits; ++d) acc[h][d] = Dots::add(acc[h][d], partial[h][d]);
  }

  // Quads [First, Last) of a block of one tile.
  template <int Digits, int First, int Last>
  [[gnu::always_inline]] static void quads(const uint8_t* block, const int8_t* x,
                                           const Codes& codes, __m256i (&acc)[kHalves][kDigits]) {
    constexpr int kRun = Dots::template kRun<Codes::kMost>;
    constexpr int kCount = kRun < Last - First ? kRun : Last - First;
    run_of_quads<Digits, First>(block, x, codes, acc, std::make_integer_sequence<int, kCount>());
    if constexpr (First + kCount < Last) quads<Digits, First + kCount, Last>(block, x, codes, acc);
  }

  template <int Digits, int First, int Last>
  [[gnu::always_inline]] static void tiles(const DigitArgs& a, const uint8_t* blocks,
                                           const int8_t* x, Sums& acc) {
    const Codes codes(a.of_code);
#pragma GCC unroll 1
    for (int t = 0; t < Tiles; ++t) {
      asm("" : "+r"(x));  // or each quad's address would take a register
      const uint8_t* block = blocks + t * kRowBytes * Codes::kBits;
#pragma GCC unroll 8
      for (int row = 0; row < Codes::kBits; ++row)
        _mm_prefetch(reinterpret_cast<const char*>(block + kAheadOfRows + row * kRowBytes),
                     _MM_HINT_T0);
      quads<Digits, First, Last>(block, x, codes, acc[t]);
    }
  }

  template <int First, int Last>
  [[gnu::always_inline]] static void tiles(const DigitArgs& a, bool third, const uint8_t* blocks,
                                           const int8_t* x, Sums& acc) {
    third ? tiles<kDigits, First, Last>(a, blocks, x, acc)
          : tiles<kDigits - 1, First, Last>(a, blocks, x, acc);
  }

  static void begin(const DigitArgs& a, int64_t s, Sums& acc) {
    for (auto& tile : acc)
      for (auto& half : tile) {
        half[0] = _mm256_setzero_si256();
        half[1] = _mm256_set1_epi32(a.start[s].upper);
        half[2] = _mm256_set1_epi32(a.start[s].lowest);
      }
  }

  // Numbers of half a tile and a group, or `otherwise` where there are none.
  static __m256 numbers(const TileNumbers& of, int64_t tile, int64_t group, int half,
                        float otherwise) {
    return of.data == nullptr
               ? _mm256_set1_ps(otherwise)
               : Avx2Lanes::load_scalars(of.data, of.type, of.at(tile, group) + half * kHalfLanes);
  }

  static __m256 negated_offset(const Weight& w, int64_t tile, int64_t group, int half) {
    const __m256 zero = numbers(w.zero, tile, group, half, 0.0f);
    return _mm256_xor_ps(_mm256_set1_ps(-0.0f), _mm256_add_ps(zero, _mm256_set1_ps(w.offset)));
  }

  static void end(const DigitArgs& a, int64_t s, const Sums& acc) {
    const int64_t group = a.segments[s].group;
    const Weight& w = a.p.weight;
    const __m256 unit = _mm256_set1_ps(a.units[s]);
    for (int t = 0; t < Tiles; ++t) {
      for (int h = 0; h < kHalves; ++h) {
        const __m256i(&part)[kDigits] = acc[t][h];
        const __m256i upper = _mm256_add_epi32(_mm256_slli_epi32(part[0], 8), part[1]);
        __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[2]), _mm256_set1_ps(0x1p-8f),
                                     _mm256_cvtepi32_ps(upper));
        sum = _mm256_mul_ps(sum, unit);
        if (a.row_sums != nullptr)
          sum = _mm256_fmadd_ps(_mm256_set1_ps(a.row_sums[s]),
                                negated_offset(w, a.tile + t, group, h), sum);
        const int64_t at = t * kTile + h * kHalfLanes;
        if (a.sums != nullptr) {
          _mm256_storeu_ps(a.sums + s * kStripLanes + at, sum);
        } else {
          _mm256_storeu_ps(a.totals + at,
                           _mm256_fmadd_ps(numbers(w.scale, a.tile + t, group, h, 1.0f), sum,
                                           _mm256_loadu_ps(a.totals + at)));
        }
      }
    }
  }

  static void run(const DigitArgs& a) {
    const Weight& w = a.p.weight;
    const uint8_t* blocks = block_of(w, a.tile, a.channel);
    const int64_t stride = w.geometry.block_stride(a.tile);
    const int8_t* x = a.x;
    const uint8_t* third = a.third;
    Sums acc;
    for (int64_t s = 0; s < a.segment_count; ++s) {
      begin(a, s, acc);
      if constexpr (Whole) {
        for (int64_t k = a.segments[s].begin; k < a.segments[s].end; k += kBlock) {
          tiles<0, kQuads>(a, *third++ != 0, blocks, x, acc);
          blocks += stride;
          x += kDigitBytes;
        }
      } else if (a.segments[s].begin % kBlock == 0) {
        tiles<0, kQuads / 2>(a, *third != 0, blocks, x, acc);
      } else {
        tiles<kQuads / 2, kQuads>(a, *third++ != 0, blocks, x, acc);
        blocks += stride;
        x += kDigitBytes;
      }
      end(a, s, acc);
    }
  }
};

// Each power of two, without those that floats do not have.
inline __m256 times_power(__m256 values, int exponent) {
  const auto power = [](int of) {
    return _mm256_set1_ps(float_of(static_cast<uint32_t>(of + 127) << 23));
  };
  const int half = exponent / 2;
  return _mm256_mul_ps(_mm256_mul_ps(values, power(half)), power(exponent - half));
}

template <class Dots>
struct Avx2Digits {
  static constexpr int64_t kRows = 1;

  static bool takes(const Problem& p) {
    ByteCodes codes;
    return takes_digits(p) && read_byte_codes(p.weight, codes) &&
           (codes.table
                ? *std::max_element(codes.of_code, std::end(codes.of_code)) <= Dots::kLargestByte
                : p.weight.geometry.element.bits < 8 || Dots::kLargestByte == 255);
  }

  static int64_t tiles(DigitCode, int64_t) { return kStrip; }

  static float largest(const float* x, int64_t count) {
    __m256i most = _mm256_setzero_si256();
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t i = 0; i < count; i += kHalfLanes)
      most = _mm256_max_epi32(most, _mm256_and_si256(magnitude, load_bytes(x + i)));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return float_of(static_cast<uint32_t>(_mm_cvtsi128_si32(four)));
  }

  static DigitSums split(const float* x, int64_t begin, int64_t end, DigitScale scale, bool swap,
                         int8_t* out, int64_t stride, uint8_t* third) {
    if (scale.nan) return split_digits(x, begin, end, scale, swap, out, stride, third);
    // The lowest byte of each word, in the order of a quad.
    const char one = swap ? 8 : 4, two = swap ? 4 : 8;
    const __m256i order =
        _mm256_setr_epi8(0, one, two, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, one,
                         two, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const auto put = [order](int8_t* at, __m256i digits) {
      const __m256i quads = _mm256_shuffle_epi8(digits, order);
      const __m128i both =
          _mm_unpacklo_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(at), both);
    };
    const auto signed_byte = [](__m256i value) {
      return _mm256_srai_epi32(_mm256_slli_epi32(value, 24), 24);
    };
    __m256i uppers = _mm256_setzero_si256(), lowests = uppers;
    for (int64_t k = begin; k < end; k += kHalfLanes) {
      const __m256i value = _mm256_cvtps_epi32(times_power(_mm256_loadu_ps(x + k), scale.shift));
      const __m256i lowest = signed_byte(value);
      const __m256i upper = _mm256_srai_epi32(_mm256_sub_epi32(value, lowest), 8);
      int8_t* at = out + k / kBlock * stride + k % kBlock;
      put(at, _mm256_srai_epi32(_mm256_sub_epi32(upper, signed_byte(upper)), 8));
      put(at + kBlock, upper);
      put(at + 2 * kBlock, lowest);
      third[k / kBlock] |= _mm256_testz_si256(lowest, lowest) == 0;
      uppers = _mm256_add_epi32(uppers, upper);
      lowests = _mm256_add_epi32(lowests, lowest);
    }
    const __m256i pairs = _mm256_hadd_epi32(uppers, lowests);
    const __m128i sums =
        _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const __m128i both = _mm_hadd_epi32(sums, sums);
    return {_mm_cvtsi128_si32(both), _mm_extract_epi32(both, 1)};
  }

  static DigitKernel kernel(DigitCode code, int64_t, int64_t tiles) {
    if (code.table) return kernel_of<HalfTableCodes<Dots::kLargestByte>>(code.whole, tiles);
    switch (code.bits) {
      case 1:
        return kernel_of<HalfCodes<1>>(code.whole, tiles);
      case 2:
        return kernel_of<HalfCodes<2>>(code.whole, tiles);
      case 3:
        return kernel_of<HalfCodes<3>>(code.whole, tiles);
      case 4:
        return kernel_of<HalfCodes<4>>(code.whole, tiles);
      case 5:
        return kernel_of<HalfCodes<5>>(code.whole, tiles);
      case 6:
        return kernel_of<HalfCodes<6>>(code.whole, tiles);
      case 7:
        return kernel_of<HalfCodes<7>>(code.whole, tiles);
      default:
        if constexpr (Dots::kLargestByte == 255) return kernel_of<HalfCodes<8>>(code.whole, tiles);
        return nullptr;
    }
  }

 private:
  template <class Codes>
  static DigitKernel kernel_of(bool whole, int64_t tiles) {
    if (tiles == 1)
      return whole ? &Avx2DigitsKernel<Dots, Codes, 1, true>::run
                   : &Avx2DigitsKernel<Dots, Codes, 1, false>::run;
    return whole ? &Avx2DigitsKernel<Dots, Codes, kStrip, true>::run
                 : &Avx2DigitsKernel<Dots, Codes, kStrip, false>::run;
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
