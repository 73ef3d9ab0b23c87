// SPDX-License-Identifier: Apache-2.0
// The numbers of a prepared layer, parsed and checked once, by make_problem, and handed to every
// call as a small tensor: by value, since graphs that hold constants are cached.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "arguments.h"

namespace compressed_linear {

// Of the tensor: another one wherever the meaning of its numbers changes.
inline constexpr int64_t kProblemVersion = 1;

// Tensors of a layer, in the order in which a call is given those that it has.
enum class Operand : uint8_t {
  packed,
  scale,
  zero,
  row_scale,
  table,
  code_sums,
  perm,
  prescale,
  input_scale,
  input_zero,
};
inline constexpr std::array<const char*, 10> kOperandNames = {
    "packed",    "scale", "zero",     "row_scale",   "table",
    "code_sums", "perm",  "prescale", "input_scale", "input_zero"};

// What of a call does not depend on its tensors.
struct ProblemNumbers {
  cpu::PackedLayout layout;
  Geometry geometry;
  int64_t columns;       // of x, and channels of a looked-up row
  int64_t element_bias;  // what codes count from
  cpu::Activation activation;
  uint32_t operands;  // bit i: the layer has Operand i
};

// The tensors of a call by their names, null where the layer has none.
class Operands {
 public:
  // Fails unless there are as many as `numbers` says.
  Operands(const char* op, const ProblemNumbers& numbers, const std::vector<Tensor>& tensors);
  const Tensor* operator[](Operand operand) const { return at_[static_cast<size_t>(operand)]; }

 private:
  std::array<const Tensor*, kOperandNames.size()> at_ = {};
};

// Reads a tensor that make_problem made. Fails on any other, and on one of another version, so the
// numbers can be trusted. The sizes of the tensors they are used with are not among what it checks.
ProblemNumbers read_problem(const char* op, const Tensor& problem);

// The weight that the tensors hold, which are checked; `middle`, `offset` and `code_sums` are left
// out.
cpu::Weight weight_of(const char* op, const ProblemNumbers& numbers, const Operands& operands);

}  // namespace compressed_linear
