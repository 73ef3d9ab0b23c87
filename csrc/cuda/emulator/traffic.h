// SPDX-License-Identifier: Apache-2.0
// Memory transactions of a warp: wavefronts of shared memory (bank conflicts), sectors of global
// memory.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator.h"

namespace compressed_linear::cuda::emulator {

constexpr int kWarp = 32;

enum class Kind {
  shared_load,
  shared_store,
  matrix_load,
  shared_copy,
  global_load,
  global_store,
  global_copy
};

// One access of one lane.
struct Access {
  const void* site;  // in the code
  Kind kind;
  uint64_t address;  // in shared memory, or buffer number and offset
  int bytes;
};

// Adds the accesses of the 32 lanes since they last met to the counts of `report`. Those of one
// site form accesses of the warp: the first of each lane, the second, and so on.
void count_accesses(const std::vector<Access>* const (&lanes)[kWarp], Report& report);

}  // namespace compressed_linear::cuda::emulator
