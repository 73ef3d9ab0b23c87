// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "spin.h"

namespace compressed_linear::cpu {

RateLoops rates_avx512vnni;

const std::vector<RateLoop>& rates_avx512vnni() {
  static const std::vector<RateLoop> loops = {
      {"dot8_512", kChains,
       [](int64_t rounds) {
         spin(rounds, _mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_set1_epi8(2),
              [](__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); });
       }},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
