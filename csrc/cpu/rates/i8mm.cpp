// SPDX-License-Identifier: Apache-2.0
#include <arm_neon.h>

#include "spin.h"

namespace compressed_linear::cpu {

RateLoops rates_i8mm;

const std::vector<RateLoop>& rates_i8mm() {
  static const std::vector<RateLoop> loops = {
      {"mmla128", kChains,
       [](int64_t rounds) {
         spin(rounds, vdupq_n_s32(0), vdupq_n_s8(1), vdupq_n_s8(2),
              [](int32x4_t sum, int8x16_t a, int8x16_t b) { return vmmlaq_s32(sum, a, b); });
       }},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
