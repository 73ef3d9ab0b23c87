// SPDX-License-Identifier: Apache-2.0
// The AMX engine on tiles in plain C++.
#include "cpu/float/amx.h"

namespace compressed_linear::cpu {

void float_amx_emulated(const Problem& p, const Parallel& parallel) {
  linear_in_tiles<EmulatedTiles>(p, parallel);
}

}  // namespace compressed_linear::cpu
