// SPDX-License-Identifier: Apache-2.0
#include <arm_neon.h>

#include "spin.h"

namespace compressed_linear::cpu {

RateLoops rates_dotprod;

const std::vector<RateLoop>& rates_dotprod() {
  static const std::vector<RateLoop> loops = {
      {"dot8_128", kChains,
       [](int64_t rounds) {
         spin(rounds, vdupq_n_s32(0), vdupq_n_s8(1), vdupq_n_s8(2),
              [](int32x4_t sum, int8x16_t a, int8x16_t b) { return vdotq_s32(sum, a, b); });
       }},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
