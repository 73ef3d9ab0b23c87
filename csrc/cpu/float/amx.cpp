// SPDX-License-Identifier: Apache-2.0
// AMX with bf16, on a processor that has it.
#include "amx.h"

namespace compressed_linear::cpu {

const Engine kEngineAmx = {"amx", &linear_in_tiles<HardwareTiles>, &repack_avx512};

}  // namespace compressed_linear::cpu
