// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "spin.h"

namespace compressed_linear::cpu {

RateLoops rates_avxvnni;

const std::vector<RateLoop>& rates_avxvnni() {
  static const std::vector<RateLoop> loops = {
      {"dot8_256", kChains,
       [](int64_t rounds) {
         spin(rounds, _mm256_setzero_si256(), _mm256_set1_epi8(1), _mm256_set1_epi8(2),
              [](__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(sum, a, b); });
       }},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
