// SPDX-License-Identifier: Apache-2.0
// Numbers as sums of bf16 numbers, which are exact: an fp16 number is two, an fp32 number three.
#pragma once

#include "cpu/common/floats.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// The leading eight significant bits; what is left is exact. Infinities and NaN leave nothing.
inline uint32_t take_part(float& value) {
  uint32_t bits = bits_of(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits |= 0x400000u;
  value = finite ? value - float_of(bits & 0xffff0000u) : 0.0f;
  return bits >> 16;
}

// One bf16 pair, `even` in the low half.
inline uint32_t take_pair(float& even, float& odd) {
  const uint32_t low = take_part(even);
  return low | (take_part(odd) << 16);
}

}  // namespace
}  // namespace compressed_linear::cpu
