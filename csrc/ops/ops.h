// SPDX-License-Identifier: Apache-2.0
// The ops, each with its argument checks in the op_*.cpp file of its name. What they compute is
// said in vllm/compressed_linear/machine/native.py, where their fake kernels are; they are registered in
// ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace compressed_linear {

using torch::stable::Tensor;

int64_t packed_tile_bytes(int64_t k, int64_t group_size, std::string element);
void pack_rows(Tensor packed, Tensor rows, int64_t row_start, int64_t n, int64_t group_size,
               std::string element);
void place(Tensor packed);
void repack_codes(Tensor packed, Tensor stored, std::string order, Tensor k_at,
                  std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                  int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                  int64_t row_start, int64_t n, int64_t group_size, std::string element);
Tensor unpack_rows(Tensor packed, int64_t n, int64_t k, int64_t group_size, std::string element);
Tensor linear(Tensor x, Tensor packed, std::optional<Tensor> scale, std::optional<Tensor> zero,
              std::optional<Tensor> bias, std::optional<Tensor> perm, std::optional<Tensor> table,
              int64_t n, int64_t k, int64_t group_size, std::string element, int64_t element_bias,
              torch::headeronly::ScalarType out_dtype, std::optional<Tensor> row_scale,
              std::optional<Tensor> prescale, std::optional<std::string> activation,
              int64_t activation_group, double activation_maximum,
              std::optional<Tensor> input_scale, std::optional<Tensor> input_zero);
Tensor embedding(Tensor ids, Tensor packed, std::optional<Tensor> scale, std::optional<Tensor> zero,
                 std::optional<Tensor> perm, std::optional<Tensor> table, int64_t n, int64_t k,
                 int64_t group_size, std::string element, int64_t element_bias, int64_t channels,
                 torch::headeronly::ScalarType out_dtype, std::optional<Tensor> row_scale);

int64_t packed_tile_bytes_int8(int64_t k, int64_t group_size, std::string element);
void pack_rows_int8(Tensor packed, Tensor rows, int64_t row_start, int64_t n, int64_t group_size,
                    std::string element);
void repack_codes_int8(Tensor packed, Tensor stored, std::string order, Tensor k_at,
                       std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                       int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                       int64_t row_start, int64_t n, int64_t group_size, std::string element);
Tensor unpack_rows_int8(Tensor packed, int64_t n, int64_t k, int64_t group_size,
                        std::string element);
Tensor code_sums_int8(Tensor packed, int64_t n, int64_t k, int64_t group_size, std::string element,
                      int64_t activation_group);
Tensor linear_int8(Tensor x, Tensor packed, std::optional<Tensor> scale, std::optional<Tensor> zero,
                   std::optional<Tensor> row_scale, std::optional<Tensor> bias,
                   std::optional<Tensor> perm, std::optional<Tensor> prescale,
                   std::optional<Tensor> input_scale, std::optional<Tensor> input_zero,
                   std::optional<Tensor> code_sums, int64_t n, int64_t k, int64_t group_size,
                   std::string element, int64_t element_bias, bool symmetric,
                   int64_t activation_group, double maximum,
                   torch::headeronly::ScalarType out_dtype);

void marlin_pack_rows(Tensor packed, Tensor rows, int64_t row_start, int64_t n,
                      std::string element);
void marlin_repack_codes(Tensor packed, Tensor stored, std::string order, Tensor k_at,
                         std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                         int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                         int64_t row_start, int64_t n, std::string element);
Tensor marlin_unpack_rows(Tensor packed, int64_t n, int64_t k, std::string element);
Tensor marlin_scales(Tensor scale, std::string columns);
Tensor marlin_zeros(Tensor zero, int64_t bits);

}  // namespace compressed_linear
