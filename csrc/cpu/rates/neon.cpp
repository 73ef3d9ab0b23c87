// SPDX-License-Identifier: Apache-2.0
#include <arm_neon.h>

#include "spin.h"

namespace compressed_linear::cpu {

RateLoops rates_neon;

const std::vector<RateLoop>& rates_neon() {
  static const std::vector<RateLoop> loops = {
      {"fma128", kChains,
       [](int64_t rounds) {
         spin(rounds, vdupq_n_f32(0.0f), vdupq_n_f32(0.5f), vdupq_n_f32(1.0f),
              [](float32x4_t sum, float32x4_t a, float32x4_t b) { return vfmaq_f32(sum, a, b); });
       }},
      {"madd128", kChains,
       [](int64_t rounds) {
         spin(rounds, vdupq_n_s32(0), vdupq_n_s8(1), vdupq_n_s8(2),
              [](int32x4_t sum, int8x16_t a, int8x16_t b) {
                // Else it would be computed once, before the loop.
                opaque(a);
                return vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
              });
       }},
      {"lookup128", kChains,
       [](int64_t rounds) {
         spin(rounds, vdupq_n_u8(0), vdupq_n_u8(1), vdupq_n_u8(2),
              [](uint8x16_t sum, uint8x16_t a, uint8x16_t) { return vqtbl1q_u8(a, sum); });
       }},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
