// SPDX-License-Identifier: Apache-2.0
// AMX for integer activations, on a processor that has it.
#include "amx.h"

namespace compressed_linear::cpu {

void integer_amx(const Problem& p, const Parallel& parallel) {
  integer_linear_in_tiles<HardwareTiles>(p, parallel);
}

}  // namespace compressed_linear::cpu
