// SPDX-License-Identifier: Apache-2.0
// Those ops of csrc/ops/ops.h that have kernels for CUDA devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace compressed_linear::cuda {

using torch::stable::Tensor;

void pack_rows(std::string layout, Tensor packed, Tensor rows, int64_t row_start, int64_t n,
               int64_t group_size, std::string element);
void repack_codes(std::string layout, Tensor packed, Tensor stored, std::string order, Tensor k_at,
                  std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                  int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                  int64_t row_start, int64_t n, int64_t group_size, std::string element);
Tensor marlin_scales(Tensor scale, std::string columns);
Tensor marlin_zeros(Tensor zero, int64_t bits);
Tensor marlin_gemm(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> zero,
                   std::optional<Tensor> codebook, std::optional<Tensor> order,
                   std::optional<Tensor> row_scale, std::optional<Tensor> bias, Tensor workspace,
                   int64_t n, int64_t k, int64_t group_size, std::string element,
                   int64_t element_bias, torch::headeronly::ScalarType out_dtype);

}  // namespace compressed_linear::cuda
