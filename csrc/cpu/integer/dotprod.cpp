// SPDX-License-Identifier: Apache-2.0
// NEON with dot products of signed bytes (+dotprod, ARMv8.2-A).
#include "neon.h"

namespace compressed_linear::cpu {
namespace {

struct SignedDot {
  static int32x4_t dot(int32x4_t sum, int8x16_t a, int8x16_t b) { return vdotq_s32(sum, a, b); }
};

}  // namespace

void integer_dotprod(const Problem& p, const Parallel& parallel) {
  run_integer_linear<VectorEngine<SignedCore<SignedDot>>>(p, parallel);
}

}  // namespace compressed_linear::cpu
