// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA.
#include "fma_core.h"
#include "lanes_avx2.h"

namespace compressed_linear::cpu {

const Engine kEngineAvx2 = {"avx2", &run_linear<FmaCore<Avx2Lanes>>, &repack_avx2};

}  // namespace compressed_linear::cpu
