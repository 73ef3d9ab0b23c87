// SPDX-License-Identifier: Apache-2.0
// The ops, each with its argument checks in a file of this folder. What they compute is said in
// ops.cpp, where they are registered.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace compressed_linear {

using torch::stable::Tensor;

// problem.cpp
Tensor make_problem(std::string layout, int64_t n, int64_t k, int64_t group_size,
                    std::string element, int64_t element_bias, std::string operands,
                    std::optional<Tensor> perm, std::optional<int64_t> columns,
                    std::optional<std::string> activation, bool dynamic, std::string granularity,
                    int64_t activation_group, bool symmetric, std::string scale_dtype,
                    double maximum);

// linear.cpp
Tensor linear(Tensor x, Tensor problem, std::vector<Tensor> tensors, std::optional<Tensor> bias,
              int64_t n, torch::headeronly::ScalarType out_dtype);

// embedding.cpp
Tensor embedding(Tensor ids, Tensor problem, std::vector<Tensor> tensors, int64_t channels,
                 torch::headeronly::ScalarType out_dtype);

// pack.cpp
std::vector<int64_t> packed_shape(std::string layout, int64_t n, int64_t k, int64_t group_size,
                                  std::string element);
void place(Tensor packed);
void pack_rows(std::string layout, Tensor packed, Tensor rows, int64_t row_start, int64_t n,
               int64_t group_size, std::string element);
void repack_codes(std::string layout, Tensor packed, Tensor stored, std::string order, Tensor k_at,
                  std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                  int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                  int64_t row_start, int64_t n, int64_t group_size, std::string element);
Tensor unpack_rows(std::string layout, Tensor packed, int64_t n, int64_t k, int64_t group_size,
                   std::string element);
Tensor code_sums(Tensor packed, int64_t n, int64_t k, int64_t group_size, std::string element,
                 int64_t activation_group);

// marlin_scales.cpp
Tensor marlin_scales(Tensor scale, std::string columns);
Tensor marlin_zeros(Tensor zero, int64_t bits);

// isa.cpp
std::string isa(std::string kernels);
std::string supported_isas(std::string kernels);
void select_isa(std::string kernels, std::string name);
void select_paths(std::string paths);
std::string paths();
std::string measure_rates();
std::string layout_id(std::string layout);

}  // namespace compressed_linear
