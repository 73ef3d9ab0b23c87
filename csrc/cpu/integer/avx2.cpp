// SPDX-License-Identifier: Apache-2.0
// AVX2 without byte dot products.
#include "avx2.h"
#include "madd.h"

namespace compressed_linear::cpu {

const IntegerEngine kIntegerEngineAvx2 = {"avx2", &run_integer_linear<MaddCore<Avx2Core>>};

}  // namespace compressed_linear::cpu
