// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA.
#include "fma_core.h"
#include "lanes_avx2.h"

namespace compressed_linear::cpu {

void float_avx2(const Problem& p, const Parallel& parallel) {
  run_linear<FmaCore<Avx2Lanes>>(p, parallel);
}

}  // namespace compressed_linear::cpu
