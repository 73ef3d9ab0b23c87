// SPDX-License-Identifier: Apache-2.0
// Which row of isa.h multiplies a call. Rows of one kind of kernels read one packed layout, so each
// call takes the one that is fastest for its number of rows M; which that is follows from the rates
// of the processor, and the table is made in Python (backends/cpu/paths.py).
#pragma once

#include <cstdint>
#include <string>

#include "isa.h"

namespace compressed_linear::cpu {

// Calls that have a list of paths in common, by the names in kPathNames.
enum class PathClass : uint8_t {
  // Layout planes. Codes below 8 bits; bytes: 8 bits and floats of 8 bits; bf16; wide: what bf16
  // does not hold, weights of fp16 or fp32 or a table of fp32; int and int8: what takes_digits is
  // true
  // for, of narrow and of bytes. Then the dtype that holds the rows of x, after what
  // is done to them first.
  narrow_bfloat16,
  narrow_float16,
  narrow_float32,
  bytes_bfloat16,
  bytes_float16,
  bytes_float32,
  bf16_bfloat16,
  bf16_float16,
  bf16_float32,
  wide_bfloat16,
  wide_float16,
  wide_float32,
  int_bfloat16,
  int_float16,
  int_float32,
  int8_bfloat16,
  int8_float16,
  int8_float32,
  // Layout quads. Codes below 8 bits, or of 8; x with a scale for each token or for groups of it.
  narrow_token,
  narrow_group,
  bytes_token,
  bytes_group,
  classes
};

inline constexpr const char* kPathNames[] = {
    "floats/narrow/bfloat16", "floats/narrow/float16", "floats/narrow/float32",
    "floats/bytes/bfloat16",  "floats/bytes/float16",  "floats/bytes/float32",
    "floats/bf16/bfloat16",   "floats/bf16/float16",   "floats/bf16/float32",
    "floats/wide/bfloat16",   "floats/wide/float16",   "floats/wide/float32",
    "floats/int/bfloat16",    "floats/int/float16",    "floats/int/float32",
    "floats/int8/bfloat16",   "floats/int8/float16",   "floats/int8/float32",
    "integers/narrow/token",  "integers/narrow/group", "integers/bytes/token",
    "integers/bytes/group"};

PathClass path_class(const Problem& p);

// Whether the weights are bytes (byte_codes.h) that dot products multiply with digits of x
// (float/digits.h), in groups of whole blocks or of half a block.
bool takes_digits(const Problem& p);

// The row that multiplies `p`: the forced one, or that of its class and M.
const Isa& isa_of(const Problem& p);

// Replaces the table, for all calls that begin afterwards. Lines, one for each class that is not to
// use the best row: its name, then rows by name, each but the last followed by the largest M that
// takes it, in ascending order: "floats/narrow/bfloat16 avx512 8 amx". Throws
// std::invalid_argument, and changes nothing, for anything else and for a row that this processor
// cannot run.
void select_paths(const std::string& lines);

// The table in that form, all classes, with the rows that are forced.
std::string describe_paths();

}  // namespace compressed_linear::cpu
