// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "spin.h"

namespace compressed_linear::cpu {

RateLoops rates_avx2;

const std::vector<RateLoop>& rates_avx2() {
  static const std::vector<RateLoop> loops = {
      {"fma256", kChains,
       [](int64_t rounds) {
         spin(rounds, _mm256_setzero_ps(), _mm256_set1_ps(0.5f), _mm256_set1_ps(1.0f),
              [](__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); });
       }},
      {"madd256", kChains,
       [](int64_t rounds) {
         spin(rounds, _mm256_setzero_si256(), _mm256_set1_epi8(1), _mm256_set1_epi16(1),
              [](__m256i sum, __m256i a, __m256i b) {
                // Else it would be computed once, before the loop.
                opaque(a);
                const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), b);
                return _mm256_add_epi32(sum, pairs);
              });
       }},
      {"lookup256", kChains,
       [](int64_t rounds) {
         spin(rounds, _mm256_setzero_si256(), _mm256_set1_epi8(1), _mm256_set1_epi8(2),
              [](__m256i sum, __m256i a, __m256i) { return _mm256_shuffle_epi8(a, sum); });
       }},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
