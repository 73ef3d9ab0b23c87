// SPDX-License-Identifier: Apache-2.0
// NEON without byte dot products.
#include "neon.h"

namespace compressed_linear::cpu {
namespace {

struct WideningDot {
  static int32x4_t dot(int32x4_t sum, int8x16_t a, int8x16_t b) {
    // A product fits into 16 bits, the sum of two may not.
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
};

}  // namespace

void integer_neon(const Problem& p, const Parallel& parallel) {
  run_integer_linear<VectorEngine<SignedCore<WideningDot>>>(p, parallel);
}

}  // namespace compressed_linear::cpu
