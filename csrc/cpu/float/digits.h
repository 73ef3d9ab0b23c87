// SPDX-License-Identifier: Apache-2.0
// Rows of x as integers, for engines that multiply integer weights by dot products of bytes.
//
// A segment of x (rows.h) is rounded to v * 2^-n, where the power of two makes the largest |v| just
// fit, and each v is three signed digits: v = 2^16 d2 + 2^8 d1 + d0. The sums of digits times codes
// are exact, so that of a segment
//
//   sum x (code - middle) = 2^(8-n) (float(S21) + 2^-8 float(S0)),  with
//   S21 = sum (2^8 d2 + d1)(code - middle),  S0 = sum d0 (code - middle)
//
// has three roundings, whatever the order of additions. What is lost is what rounding to v loses:
// at most kDigitsStep / 2 of the segment's largest |x| for each x. Numbers of 16 bits lose nothing
// unless they are 2^-15 (bf16) or 2^-12 (fp16) of it or less; and bf16 has d0 = 0 down to 2^-7, so
// that many channels need no third product.
#pragma once

#include "cpu/common/byte_codes.h"
#include "cpu/common/rows.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int kDigits = 3;
constexpr int64_t kQuad = 4, kQuads = kBlock / kQuad;
constexpr int32_t kLargestDigits = 127 * 65536 + 127 * 256 + 127;
constexpr int64_t kDigitBytes = kDigits * kBlock;  // of a block of a row

static_assert(255 * 32768 * kChunk < (int64_t{1} << 31), "int32 holds S21 of a segment");

// x = v * 2^-shift; NaN: x has an infinity or a NaN.
struct DigitScale {
  int shift;
  bool nan;
};

// For the largest magnitude of a segment.
inline DigitScale digit_scale(float largest) {
  const uint32_t bits = bits_of(largest);
  if (bits >= 0x7f800000u) return {0, true};
  // 2^22 <= |v| < 2^23, denormals apart; and not more than three digits hold.
  const auto exponent = static_cast<int>(bits >> 23), mantissa = static_cast<int>(bits & 0x7fffffu);
  if (exponent == 0) return {149 - (mantissa > kLargestDigits), false};
  return {22 + 127 - exponent - ((mantissa | 0x800000) > 2 * kLargestDigits), false};
}

// 2^(8 - shift - exponent), of which S21 counts where bytes are steps of 2^-exponent.
inline float digit_unit(DigitScale scale, int exponent) {
  if (scale.nan) return float_of(0x7fc00000u);
  const int power = 8 - scale.shift - exponent;
  return power < -126 ? std::ldexp(1.0f, power)
                      : float_of(static_cast<uint32_t>(power + 127) << 23);
}

// What digits of a segment add up to.
struct DigitSums {
  int32_t upper, lowest;  // of 2^8 d2 + d1, and of d0
};

// Channels [begin, end) of x as digits, whole halves of blocks: of each block three times the bytes
// of its quads, those of d2, of d1 and of d0, `stride` bytes from block to block. Where `swap` is
// true a quad has channels 0, 2, 1, 3, the order of the bytes of bit planes. third[block] is set
// where any d0 is not 0.
inline DigitSums split_digits(const float* x, int64_t begin, int64_t end, DigitScale scale,
                              bool swap, int8_t* out, int64_t stride, uint8_t* third) {
  DigitSums sums{0, 0};
  for (int64_t k = begin; k < end; ++k) {
    const int32_t value =
        scale.nan ? 0 : static_cast<int32_t>(std::nearbyint(std::ldexp(x[k], scale.shift)));
    const auto d0 = static_cast<int8_t>(value);
    const int32_t upper = (value - d0) >> 8;
    const auto d1 = static_cast<int8_t>(upper);
    const int64_t inside = k % kQuad;
    const int64_t to = swap && (inside == 1 || inside == 2) ? k - inside + 3 - inside : k;
    int8_t* at = out + k / kBlock * stride + to % kBlock;
    at[0] = static_cast<int8_t>((upper - d1) >> 8);
    at[kBlock] = d1;
    at[2 * kBlock] = d0;
    third[k / kBlock] |= d0 != 0;
    sums.upper += upper;
    sums.lowest += d0;
  }
  return sums;
}

}  // namespace
}  // namespace compressed_linear::cpu
