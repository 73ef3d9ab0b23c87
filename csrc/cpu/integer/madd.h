// SPDX-License-Identifier: Apache-2.0
// The dot product of bytes where the processor has none. Two products of a byte with a code of at
// most seven bits fit into 16 bits; codes of eight bits are multiplied as 16-bit numbers.
#pragma once

#include "driver.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

static_assert(2 * 127 * 128 < 32768, "pairs of products of narrow codes do not saturate");

// Lanes: the registers of Avx2Core or Avx512Core.
template <class Lanes>
struct MaddCore : Lanes {
  using Reg = typename Lanes::Reg;
  static constexpr bool kTellNarrow = true;
  struct Words {
    Reg even, odd;  // input channels 0 and 2, 1 and 3
  };
  template <bool Narrow>
  static auto broadcast(const int32_t* word) {
    const Reg bytes = Lanes::set(*word);
    if constexpr (Narrow) {
      return bytes;
    } else {
      return Words{Lanes::low_bytes(bytes), Lanes::high_bytes(bytes)};
    }
  }
  template <bool Narrow, class Activation>
  static Reg dot(Reg sum, Reg codes, const Activation& activation) {
    if constexpr (Narrow) {
      return Lanes::add(sum, Lanes::add_pairs(Lanes::multiply_bytes(codes, activation)));
    } else {
      sum = Lanes::add(sum, Lanes::multiply_words(Lanes::low_codes(codes), activation.even));
      return Lanes::add(sum, Lanes::multiply_words(Lanes::high_codes(codes), activation.odd));
    }
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
