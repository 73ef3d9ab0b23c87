// SPDX-License-Identifier: Apache-2.0
// The AMX engine on tiles in plain C++.
#include "cpu/float/amx.h"

namespace compressed_linear::cpu {

const Engine kEngineAmxEmulated = {"amx-emulated", &linear_in_tiles<EmulatedTiles>, &repack_avx512};

}  // namespace compressed_linear::cpu
