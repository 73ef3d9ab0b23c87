// SPDX-License-Identifier: Apache-2.0
// AVX2 without byte dot products.
#include "avx2.h"
#include "madd.h"

namespace compressed_linear::cpu {

void integer_avx2(const Problem& p, const Parallel& parallel) {
  run_integer_linear<VectorEngine<MaddCore<Avx2Core>>>(p, parallel);
}

}  // namespace compressed_linear::cpu
