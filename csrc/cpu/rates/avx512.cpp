// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "spin.h"

namespace compressed_linear::cpu {

RateLoops rates_avx512;

const std::vector<RateLoop>& rates_avx512() {
  static const std::vector<RateLoop> loops = {
      {"fma512", kChains,
       [](int64_t rounds) {
         spin(rounds, _mm512_setzero_ps(), _mm512_set1_ps(0.5f), _mm512_set1_ps(1.0f),
              [](__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); });
       }},
      {"madd512", kChains,
       [](int64_t rounds) {
         spin(rounds, _mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_set1_epi16(1),
              [](__m512i sum, __m512i a, __m512i b) {
                // Else it would be computed once, before the loop.
                opaque(a);
                const __m512i pairs = _mm512_madd_epi16(_mm512_maddubs_epi16(a, a), b);
                return _mm512_add_epi32(sum, pairs);
              });
       }},
      {"lookup512", kChains,
       [](int64_t rounds) {
         spin(rounds, _mm512_setzero_si512(), _mm512_set1_epi16(1), _mm512_set1_epi16(2),
              [](__m512i sum, __m512i a, __m512i) { return _mm512_permutexvar_epi16(sum, a); });
       }},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
