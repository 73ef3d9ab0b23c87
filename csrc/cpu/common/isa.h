// SPDX-License-Identifier: Apache-2.0
// The one table of instruction sets, and which of them is in use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "problem.h"

namespace compressed_linear::cpu {

struct Repack;  // repack/repack.h

using LinearFunction = void(const Problem&, const Parallel&);
// Writes the tiles of strips [strip_begin, strip_end) that the source covers. Channels beyond n and
// positions that no input channel has get the code of zero. Returns false where it met wrong codes.
using RepackFunction = bool(const Repack&, int64_t strip_begin, int64_t strip_end);

// The kinds of kernels, each with a choice of its own.
enum class Kernels : uint8_t {
  floats,    // multiply layouts/planes.h with x in its own dtype
  integers,  // multiply layouts/quads.h with x quantized to bytes
};

struct Isa {
  const char* name;
  const char* tier;          // the row whose name asks for this one too
  uint32_t needs;            // bits of features, see isa.cpp
  LinearFunction* floats;    // null where it adds nothing to those of another row
  LinearFunction* integers;  // the same
  RepackFunction* repack;    // used with `floats`

  LinearFunction* linear(Kernels kernels) const {
    return kernels == Kernels::floats ? floats : integers;
  }
};

inline constexpr const char* kIsaVariable = "VLLM_COMPRESSED_LINEAR_CPU_ISA";

// Rows that have such kernels and that this processor can run, best first.
std::vector<const Isa*> supported_isas(Kernels kernels);

// The row of that name. Throws std::invalid_argument, with `asked` first, if it has no such kernels
// or the processor cannot run it.
const Isa& find_isa(Kernels kernels, const std::string& name, const std::string& asked);

// The row of every call, where VLLM_COMPRESSED_LINEAR_CPU_ISA names a tier or select_isa a row;
// null where each call has a path, see paths.h. Throws std::invalid_argument if there is no such
// tier or the processor cannot run it; only for floats, since integers may not have that tier.
const Isa* forced_isa(Kernels kernels);

// The forced row, or else the best: it repacks, and multiplies what no path was chosen for.
const Isa& isa(Kernels kernels);

// Forces a row, for tests; an empty name leaves it to the environment again. Throws
// std::invalid_argument if the processor cannot run it.
void select_isa(Kernels kernels, const std::string& name);

// Whether the processor permutes bytes of registers (VBMI), which some rows use where it is there.
// Tests hide it.
bool has_byte_permutations();
void hide_byte_permutations(bool hidden);

// Number of a row of the table.
inline constexpr size_t kMostIsas = 8;
size_t index_of(const Isa& row);

}  // namespace compressed_linear::cpu
