// SPDX-License-Identifier: Apache-2.0
// NEON: the vectors that every 64-bit Arm processor has.
#include "fma_core.h"
#include "lanes_neon.h"

namespace compressed_linear::cpu {

void float_neon(const Problem& p, const Parallel& parallel) {
  run_linear<FmaCore<NeonLanes>>(p, parallel);
}

}  // namespace compressed_linear::cpu
