// SPDX-License-Identifier: Apache-2.0
// NEON: the vectors that every 64-bit Arm processor has.
#include "fma_core.h"
#include "lanes_neon.h"

namespace compressed_linear::cpu {

const Engine kEngineNeon = {"neon", &run_linear<FmaCore<NeonLanes>>, &repack_plain};

}  // namespace compressed_linear::cpu
