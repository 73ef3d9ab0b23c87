// SPDX-License-Identifier: Apache-2.0
// AMX for integer activations, on a processor that has it.
#include "amx.h"

namespace compressed_linear::cpu {

const IntegerEngine kIntegerEngineAmx = {"amx", &integer_linear_in_tiles<HardwareTiles>};

}  // namespace compressed_linear::cpu
