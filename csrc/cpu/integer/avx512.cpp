// SPDX-License-Identifier: Apache-2.0
// AVX-512 without byte dot products.
#include "avx512.h"
#include "madd.h"

namespace compressed_linear::cpu {

const IntegerEngine kIntegerEngineAvx512Bw = {"avx512bw",
                                              &run_integer_linear<MaddCore<Avx512Core>>};

}  // namespace compressed_linear::cpu
