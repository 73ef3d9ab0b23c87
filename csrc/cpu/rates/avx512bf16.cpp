// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "spin.h"

namespace compressed_linear::cpu {

RateLoops rates_avx512bf16;

const std::vector<RateLoop>& rates_avx512bf16() {
  static const std::vector<RateLoop> loops = {
      {"dotbf16_512", kChains,
       [](int64_t rounds) {
         // Pairs of ones.
         const __m512i ones = _mm512_set1_epi32(0x3f803f80);
         spin(rounds, _mm512_setzero_ps(), ones, ones, [](__m512 sum, __m512i a, __m512i b) {
           return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
         });
       }},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
