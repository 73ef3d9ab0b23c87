// SPDX-License-Identifier: Apache-2.0
// Codes to bf16 pairs for the dot products. An element type is a struct with
//
//   kBits                  of a code; a block of a tile is kBits rows of 64 bytes
//   kHalves                whether half a block may be asked for alone
//   kSequential            see FewRows
//   kTwoPairs              whether it has pairs<P>, which decodes two for less than twice one
//   pair<P>(block, table)  the bf16 pairs (k = 2P, 2P + 1) of the sixteen channels of a block
//
// pair<P> reads the rows of its half of the block only, so that the compiler keeps them in
// registers for the pairs that share them.
#pragma once

#include <immintrin.h>

#include <utility>

#include "cpu/common/isa.h"
#include "decode_avx512.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Integers of up to seven bits and codes of a table.
template <int Bits>
struct Integer {
  static constexpr int kBits = Bits;
  static constexpr bool kHalves = true, kSequential = false, kTwoPairs = false;
  template <int P>
  static __m512i pair(const uint8_t* block, const Table& table) {
    return look_up<Bits>(codes<Bits, P>(block), table);
  }
};

template <>
struct Integer<8> {
  static constexpr int kBits = 8;
  static constexpr bool kHalves = true, kSequential = false, kTwoPairs = false;
  template <int P>
  static __m512i pair(const uint8_t* block, const Table&) {
    const auto* bytes = reinterpret_cast<const __m128i*>(block + 2 * kTile * P);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
};

// 8-bit floats where the processor has VBMI: both bytes of the bf16 value of the magnitude, which
// has seven bits, from a table each, for two pairs at once. In words of assembly since this is
// compiled for processors without VBMI too.
template <int Mantissa>
struct Float8Bytes {
  static constexpr int kBits = 8;
  static constexpr bool kHalves = false, kSequential = false, kTwoPairs = true;

  static __m512i look_up(__m512i code, const __m512i* table) {
    asm("vpermi2b %2, %1, %0" : "+v"(code) : "v"(table[0]), "v"(table[1]));
    return code;
  }
  // Pairs P and P + 1, of which P is even.
  template <int P>
  static void pairs(const uint8_t* block, const Table& table, __m512i& first, __m512i& second) {
    // Four channels of the one pair, and then of the other, in each 128 bits.
    const __m512i code = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
                                                  load_row(block + kRowBytes * (P / 2)));
    const __m512i low = look_up(code, table.rows + 2);
    const __m512i high =
        _mm512_ternarylogic_epi32(look_up(code, table.rows), code, _mm512_set1_epi8(-128), 0xF8);
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }
  template <int P>
  static __m512i pair(const uint8_t* block, const Table& table) {
    __m512i both[2];
    pairs<P - P % 2>(block, table, both[0], both[1]);
    return both[P % 2];
  }
};

// The upper bytes of its values in rows 0 and 1, the lower ones in rows 2 and 3.
template <int Mantissa>
inline Table float8_bytes() {
  struct Values {
    alignas(64) uint8_t bytes[256];
    Values() {
      for (int i = 0; i < 128; ++i) {
        const auto code = static_cast<uint8_t>(i);
        const uint16_t value = to_bf16(Mantissa == 3 ? from_e4m3(code) : from_e5m2(code));
        bytes[i] = static_cast<uint8_t>(value >> 8);
        bytes[128 + i] = static_cast<uint8_t>(value);
      }
    }
  };
  static const Values values;
  return Table(values.bytes);
}

struct BFloat16 {
  static constexpr int kBits = 16;
  static constexpr bool kHalves = false, kSequential = true, kTwoPairs = false;
  template <int P>
  static __m512i pair(const uint8_t* block, const Table&) {
    return load_row(block + kRowBytes * P);
  }
};

// Calls action(Code{}) with the type that decodes `element`, which must not be fp16 or fp32.
template <class Action>
inline auto with_decoder(Element element, const Action& action) {
  switch (element.kind) {
    case Kind::bfloat16:
      return action(BFloat16{});
    case Kind::e4m3:
      return action(Float8<3>{});
    case Kind::e5m2:
      return action(Float8<2>{});
    default:
      break;
  }
  switch (element.bits) {
    case 1:
      return action(Integer<1>{});
    case 2:
      return action(Integer<2>{});
    case 3:
      return action(Integer<3>{});
    case 4:
      return action(Integer<4>{});
    case 5:
      return action(Integer<5>{});
    case 6:
      return action(Integer<6>{});
    case 7:
      return action(Integer<7>{});
    default:
      return action(Integer<8>{});
  }
}

template <class Code, int... P>
inline void decode_block(const uint8_t* block, const Table& table, uint8_t* out,
                         std::integer_sequence<int, P...>) {
  (_mm512_store_si512(out + kRowBytes * P, Code::template pair<P>(block, table)), ...);
}

template <class Code>
void decode_chunk(const Table& given, const uint8_t* packed, int64_t stride, int64_t width,
                  uint8_t* out) {
  const Table table = given;
  for (int64_t k = 0; k < width; k += kBlock) {
    for (int64_t line = 0; line < Code::kBits; ++line)  // the next chunk of this tile
      _mm_prefetch(packed + kChunk / kBlock * stride + line * kRowBytes, _MM_HINT_T0);
    decode_block<Code>(packed, table, out, std::make_integer_sequence<int, kPairs>());
    packed += stride;
    out += kRowBytes * kPairs;
  }
}

// Stored channels [k0, k0 + width) of a tile: out[pair][channel][k, k + 1].
inline void decode_tile(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* out) {
  const Geometry& g = p.weight.geometry;
  const uint8_t* packed = block_of(p.weight, tile, k0);
  const int64_t stride = g.block_stride(tile);
  const Kind kind = g.element.kind;
  if (kind == Kind::e4m3 && has_byte_permutations())
    return decode_chunk<Float8Bytes<3>>(float8_bytes<3>(), packed, stride, width, out);
  if (kind == Kind::e5m2 && has_byte_permutations())
    return decode_chunk<Float8Bytes<2>>(float8_bytes<2>(), packed, stride, width, out);
  with_decoder(g.element, [&](auto code) {
    decode_chunk<decltype(code)>(Table(p), packed, stride, width, out);
  });
}

}  // namespace
}  // namespace compressed_linear::cpu
