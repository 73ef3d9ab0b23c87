// SPDX-License-Identifier: Apache-2.0
// AVX-512 without byte dot products. Two products of a byte with a code of at most seven bits fit
// into 16 bits; codes of eight bits are multiplied as 16-bit numbers.
#include "int8_avx512.h"

namespace compressed_linear::cpu {
namespace {

static_assert(2 * 127 * 128 < 32768, "pairs of products of narrow codes do not saturate");

struct Avx512BwCore : Avx512Core {
  static constexpr bool kTellNarrow = true;
  struct Words {
    Reg even, odd;  // input channels 0 and 2, 1 and 3
  };
  template <bool Narrow>
  static auto broadcast(const int32_t* word) {
    const Reg bytes = _mm512_set1_epi32(*word);
    if constexpr (Narrow) {
      return bytes;
    } else {
      return Words{_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)};
    }
  }
  template <bool Narrow, class Activation>
  static Reg dot(Reg sum, Reg codes, const Activation& activation) {
    if constexpr (Narrow) {
      return _mm512_add_epi32(
          sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, activation), _mm512_set1_epi16(1)));
    } else {
      const Reg even = _mm512_and_si512(codes, _mm512_set1_epi16(0xff));
      const Reg odd = _mm512_srli_epi16(codes, 8);
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, activation.even));
      return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, activation.odd));
    }
  }
};

}  // namespace

const IntegerEngine kIntegerEngineAvx512Bw = {"avx512bw", &run_integer_linear<Avx512BwCore>};

}  // namespace compressed_linear::cpu
