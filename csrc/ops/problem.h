// SPDX-License-Identifier: Apache-2.0
// The numbers of a prepared layer, parsed and checked once, by make_problem, and handed to every
// call as a small tensor: by value, since graphs that hold constants are cached.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace compressed_linear {

// Of the tensor: another one wherever the meaning of its numbers changes.
inline constexpr int64_t kProblemVersion = 1;

// What of a call does not depend on its tensors.
struct ProblemNumbers {
  cpu::PackedLayout layout;
  Geometry geometry;
  int64_t columns;       // of x, and channels of a looked-up row
  int64_t element_bias;  // what codes count from
  cpu::Activation activation;
};

// Reads a tensor that make_problem made. Fails on any other, and on one of another version, so the
// numbers can be trusted. The sizes of the tensors they are used with are not among what it checks.
ProblemNumbers read_problem(const char* op, const Tensor& problem);

// The weight that the tensors hold, which are checked; `middle`, `offset` and `code_sums` are left
// out. scale and zero: [tiles, groups, 16].
cpu::Weight weight_of(const char* op, const ProblemNumbers& numbers, const Tensor& packed,
                      const std::optional<Tensor>& scale, const std::optional<Tensor>& zero,
                      const std::optional<Tensor>& row_scale, const std::optional<Tensor>& table);

}  // namespace compressed_linear
