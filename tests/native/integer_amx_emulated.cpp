// SPDX-License-Identifier: Apache-2.0
// The AMX engine for integer activations on tiles in plain C++.
#include "cpu/integer/amx.h"

namespace compressed_linear::cpu {

void integer_amx_emulated(const Problem& p, const Parallel& parallel) {
  integer_linear_in_tiles<EmulatedTiles>(p, parallel);
}

}  // namespace compressed_linear::cpu
