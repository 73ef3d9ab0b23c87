// SPDX-License-Identifier: Apache-2.0
// AMX with bf16, on a processor that has it.
#include "amx.h"

namespace compressed_linear::cpu {

void float_amx(const Problem& p, const Parallel& parallel) {
  linear_in_tiles<HardwareTiles>(p, parallel);
}

}  // namespace compressed_linear::cpu
