// SPDX-License-Identifier: Apache-2.0
// Exact conversion of codes to pairs of 16-bit floats, in registers: integers less their zero
// points, small floats, entries of a codebook (rounded to 16 bits once). A word of 4-bit codes, or
// two words of 8-bit codes, are the operands B of two mma.m16n8k16.
//
// Integers: the code's bits become the lowest mantissa bits of a float of known exponent (Kim et
// al., "Who Says Elephants Can't Run", 2022). Small floats: sign, exponent and mantissa are moved
// to their position in the wider type.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/device.h"
#include "problem.h"

namespace compressed_linear::cuda::marlin {

constexpr int kAndOr = 0xea;  // (a & b) | c
constexpr int kPairMask = 0x000f000f;

// The codebook as 16 low bytes and 16 high bytes.
struct Codebook {
  uint32_t low[4], high[4];
};

template <class T>
CL_DEVICE Codebook load_codebook(const float* values) {
  Codebook book;
  for (int i = 0; i < 4; ++i) {
    const uint32_t first =
        narrow_pair<T>(load_constant(values + 4 * i), load_constant(values + 4 * i + 1));
    const uint32_t second =
        narrow_pair<T>(load_constant(values + 4 * i + 2), load_constant(values + 4 * i + 3));
    book.low[i] = prmt(first, second, 0x6420);
    book.high[i] = prmt(first, second, 0x7531);
  }
  return book;
}

// Table lookup, 16 entries of a byte: entries of the codes in the low four nibbles of `codes`. One
// byte permutation for each half of the table, a third to choose the half.
CL_DEVICE uint32_t look_up(const uint32_t (&table)[4], uint32_t codes) {
  const uint32_t in_half = codes & 0x7777u, half = (codes >> 1 & 0x4444u) | 0x3210u;
  return prmt(prmt(table[0], table[1], in_half), prmt(table[2], table[3], in_half), half);
}

// A zero point as operand of `decode`: the float that a code of that value becomes, as a pair in T;
// for 8-bit integers in bf16, one in fp32.
template <class T, Element E>
CL_DEVICE uint32_t zero_operand(uint32_t zero) {
  if constexpr (E == Element::uint8 && std::is_same_v<T, BFloat16>)
    return 0x4b000000u | zero;  // 2^23 + zero
  else if constexpr (std::is_same_v<T, BFloat16>)
    return (0x4300u | zero) * 0x10001u;  // 128 + zero
  else
    return (0x6400u | zero) * 0x10001u;  // 1024 + zero
}

// The zero point of column block `j` (of eight columns) among a lane's words of zero points.
template <Element E>
CL_DEVICE uint32_t zero_of(const uint32_t (&words)[2], int j) {
  constexpr int kBits = bits_of(E), kPerWord = compressed_linear::marlin::codes_per_word(kBits);
  const int slot = j % kPerWord % 2 * (kPerWord / 2) + j % kPerWord / 2;
  return words[j / kPerWord] >> (slot * kBits) & ((1u << kBits) - 1);
}

// words: one for 4 bits, two for 8. first, second: operands B of two blocks of eight columns.
// zero_*: their zero points, for integers.
template <class T, Element E>
CL_DEVICE void decode(const uint32_t (&words)[2], uint32_t zero_first, uint32_t zero_second,
                      const Codebook& book, uint32_t (&first)[2], uint32_t (&second)[2]) {
  constexpr bool kHalf = std::is_same_v<T, Half>;
  if constexpr (E == Element::uint4) {
    constexpr uint32_t kMagic = kHalf ? 0x64006400u : 0x43004300u;
    const uint32_t w = words[0];
    first[0] = subtract_pair<T>(lop3<kAndOr>(w, kPairMask, kMagic), zero_first);
    first[1] = subtract_pair<T>(lop3<kAndOr>(w >> 4, kPairMask, kMagic), zero_first);
    second[0] = subtract_pair<T>(lop3<kAndOr>(w >> 8, kPairMask, kMagic), zero_second);
    second[1] = subtract_pair<T>(lop3<kAndOr>(w >> 12, kPairMask, kMagic), zero_second);
  } else if constexpr (E == Element::uint8 && kHalf) {
    constexpr uint32_t kMagic = 0x64646464u;
    first[0] = subtract_pair<T>(prmt(words[0], kMagic, 0x4240), zero_first);
    first[1] = subtract_pair<T>(prmt(words[0], kMagic, 0x4341), zero_first);
    second[0] = subtract_pair<T>(prmt(words[1], kMagic, 0x4240), zero_second);
    second[1] = subtract_pair<T>(prmt(words[1], kMagic, 0x4341), zero_second);
  } else if constexpr (E == Element::uint8) {
    // bf16 has 8 bits of significand: enough for the difference of two codes, too few for a code
    // with 2^8 added.
    const auto pair = [](uint32_t word, uint32_t low, uint32_t high, float zero) {
      const float a = bits_to_float(prmt(word, 0x4b000000u, 0x7440u | low)) - zero;
      const float b = bits_to_float(prmt(word, 0x4b000000u, 0x7440u | high)) - zero;
      return prmt(float_to_bits(a), float_to_bits(b), 0x7632);
    };
    const float zero0 = bits_to_float(zero_first), zero1 = bits_to_float(zero_second);
    first[0] = pair(words[0], 0, 2, zero0);
    first[1] = pair(words[0], 1, 3, zero0);
    second[0] = pair(words[1], 0, 2, zero1);
    second[1] = pair(words[1], 1, 3, zero1);
  } else if constexpr (E == Element::e4m3) {
    // Exponent and mantissa to their position in the wider type, whose bias is larger by 8 or 120.
    const auto pair = [](uint32_t bytes) {
      constexpr int kShift = kHalf ? 1 : 4;
      const uint32_t moved = lop3<kAndOr>(bytes, 0x80008000u, (bytes & 0x7f007f00u) >> kShift);
      return multiply_pair<T>(moved, kHalf ? 0x5c005c00u : 0x7b807b80u);
    };
    first[0] = pair(prmt(words[0], 0, 0x2404));
    first[1] = pair(prmt(words[0], 0, 0x3414));
    second[0] = pair(prmt(words[1], 0, 0x2404));
    second[1] = pair(prmt(words[1], 0, 0x3414));
  } else if constexpr (E == Element::e2m1) {
    const auto pair = [](uint32_t codes) {  // in the low nibbles of both halves
      constexpr int kShift = kHalf ? 9 : 6;
      const uint32_t moved =
          lop3<kAndOr>(codes << 12, 0x80008000u, (codes & 0x00070007u) << kShift);
      return multiply_pair<T>(moved, kHalf ? 0x74007400u : 0x7e807e80u);  // 2^14, 2^126
    };
    first[0] = pair(words[0]);
    first[1] = pair(words[0] >> 4);
    second[0] = pair(words[0] >> 8);
    second[1] = pair(words[0] >> 12);
  } else {
    // Slots 0 to 3 are the low halves of the pairs, slots 4 to 7 the high ones.
    const uint32_t low0 = look_up(book.low, words[0]), high0 = look_up(book.high, words[0]);
    const uint32_t low1 = look_up(book.low, words[0] >> 16),
                   high1 = look_up(book.high, words[0] >> 16);
    const auto pair = [&](uint32_t i) {  // byte i of all four
      const uint32_t selector = i | (4 + i) << 4;
      return prmt(prmt(low0, high0, selector), prmt(low1, high1, selector), 0x5410);
    };
    first[0] = pair(0);
    first[1] = pair(1);
    second[0] = pair(2);
    second[1] = pair(3);
  }
}

}  // namespace compressed_linear::cuda::marlin
