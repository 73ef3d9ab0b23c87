// SPDX-License-Identifier: Apache-2.0
// AVX-512 with byte dot products.
#include "avx512.h"

namespace compressed_linear::cpu {
namespace {

struct Avx512VnniCore : Avx512Core {
  static constexpr bool kTellNarrow = false;
  template <bool Narrow>
  static Reg broadcast(const int32_t* word) {
    return _mm512_set1_epi32(*word);
  }
  template <bool Narrow>
  static Reg dot(Reg sum, Reg codes, Reg activation) {
    return _mm512_dpbusd_epi32(sum, codes, activation);
  }
};

}  // namespace

void integer_avx512vnni(const Problem& p, const Parallel& parallel) {
  run_integer_linear<VectorEngine<Avx512VnniCore>>(p, parallel);
}

}  // namespace compressed_linear::cpu
