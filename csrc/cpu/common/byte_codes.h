// SPDX-License-Identifier: Apache-2.0
// Weights as bytes, for dot products of bytes: integers as they are, and tables whose values are
// few steps of a power of two apart, as those of e2m1 are.
#pragma once

#include <cmath>

#include "floats.h"
#include "problem.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int kByteTableBits = 4;  // of the codes of tables, which one shuffle of bytes looks up

// A weight is (byte - middle) 2^-exponent before its offset and scale; byte is the code, or
// of_code[code] where `table` is true.
struct ByteCodes {
  bool table;
  int32_t middle;
  int exponent;
  alignas(64) uint8_t of_code[64];  // repeated, so that bits above a code may be anything
};

// False if the values are no such bytes.
inline bool read_byte_table(const uint16_t* values, ByteCodes& codes) {
  constexpr int kCount = 1 << kByteTableBits;
  for (int exponent = 0; exponent < 8; ++exponent) {
    float step[kCount], least = 0, most = 0;
    bool whole = true;
    for (int i = 0; i < kCount; ++i) {
      step[i] = from_bf16(values[i]) * static_cast<float>(1 << exponent);
      whole = whole && std::fabs(step[i]) < 256.0f && step[i] == std::nearbyint(step[i]);
      least = step[i] < least ? step[i] : least;
      most = step[i] > most ? step[i] : most;
    }
    if (!whole) continue;
    if (most - least > 255.0f) return false;
    codes.table = true;
    codes.middle = static_cast<int32_t>(-least);
    codes.exponent = exponent;
    for (int i = 0; i < 64; ++i)
      codes.of_code[i] = static_cast<uint8_t>(static_cast<int32_t>(step[i % kCount] - least));
    return true;
  }
  return false;
}

// The same for weights of a call.
inline bool read_byte_codes(const Weight& w, ByteCodes& codes) {
  const Element element = w.geometry.element;
  if (element.kind != Kind::integer || w.layout != PackedLayout::planes || w.wide_table != nullptr)
    return false;
  if (w.table != nullptr) return element.bits == kByteTableBits && read_byte_table(w.table, codes);
  codes.table = false;
  codes.middle = static_cast<int32_t>(w.middle);
  codes.exponent = 0;
  return true;
}

}  // namespace
}  // namespace compressed_linear::cpu
