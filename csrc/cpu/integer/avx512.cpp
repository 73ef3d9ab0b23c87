// SPDX-License-Identifier: Apache-2.0
// AVX-512 without byte dot products.
#include "avx512.h"
#include "madd.h"

namespace compressed_linear::cpu {

void integer_avx512(const Problem& p, const Parallel& parallel) {
  run_integer_linear<VectorEngine<MaddCore<Avx512Core>>>(p, parallel);
}

}  // namespace compressed_linear::cpu
