// SPDX-License-Identifier: Apache-2.0
// The AMX engine for integer activations on tiles in plain C++.
#include "cpu/integer/amx.h"

namespace compressed_linear::cpu {

const IntegerEngine kIntegerEngineAmxEmulated = {"amx-emulated",
                                                 &integer_linear_in_tiles<EmulatedTiles>};

}  // namespace compressed_linear::cpu
