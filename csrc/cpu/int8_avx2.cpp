// SPDX-License-Identifier: Apache-2.0
// AVX2 without byte dot products. Two products of a byte with a code of at most seven bits fit into
// 16 bits; codes of eight bits are multiplied as 16-bit numbers.
#include "int8_avx2.h"

namespace compressed_linear::cpu {
namespace {

static_assert(2 * 127 * 128 < 32768, "pairs of products of narrow codes do not saturate");

struct Avx2MaddCore : Avx2Core {
  static constexpr bool kTellNarrow = true;
  struct Words {
    Reg even, odd;  // input channels 0 and 2, 1 and 3
  };
  template <bool Narrow>
  static auto broadcast(const int32_t* word) {
    const Reg bytes = _mm256_set1_epi32(*word);
    if constexpr (Narrow) {
      return bytes;
    } else {
      return Words{_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
    }
  }
  template <bool Narrow, class Activation>
  static Reg dot(Reg sum, Reg codes, const Activation& activation) {
    if constexpr (Narrow) {
      return _mm256_add_epi32(
          sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, activation), _mm256_set1_epi16(1)));
    } else {
      const Reg even = _mm256_and_si256(codes, _mm256_set1_epi16(0xff));
      const Reg odd = _mm256_srli_epi16(codes, 8);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, activation.even));
      return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, activation.odd));
    }
  }
};

}  // namespace

const IntegerEngine kIntegerEngineAvx2 = {"avx2", &run_integer_linear<Avx2MaddCore>};

}  // namespace compressed_linear::cpu
