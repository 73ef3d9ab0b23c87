// SPDX-License-Identifier: Apache-2.0
// Registration of every op, on LibTorch's stable ABI. Arguments are tensors and constants of the
// descriptor. Fake kernels are in vllm/compressed_linear/machine/native.py.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include "counters.h"
#include "cpu/float/engine.h"
#include "cpu/integer/engine.h"

namespace compressed_linear {
namespace {

std::string isa() { return cpu::engine().isa; }

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
  return text;
}

std::string supported_isas() { return joined(cpu::supported_isas()); }

std::string isa_int8() { return cpu::integer_engine().isa; }

std::string supported_isas_int8() { return joined(cpu::supported_integer_isas()); }

void select_isa_int8(std::string name) { cpu::select_integer_engine(name); }

std::string layout_id_int8() { return cpu::kQuadsLayoutId; }

void select_isa(std::string name) { cpu::select_engine(name); }

std::string layout_id() { return cpu::kLayoutId; }

int64_t op_calls(std::string name) { return count_calls(name); }

std::string op_call_lines() { return describe_calls(); }

void reset_op_calls() { reset_calls(); }

}  // namespace

STABLE_TORCH_LIBRARY(compressed_linear, m) {
  m.def("packed_tile_bytes(int k, int group_size, str element) -> int");
  m.def(
      "pack_rows(Tensor(a!) packed, Tensor rows, int row_start, int n, int group_size, "
      "str element) -> ()");
  m.def("place(Tensor(a!) packed) -> ()");
  m.def(
      "repack_codes(Tensor(a!) packed, Tensor stored, str order, Tensor k_at, Tensor? n_at, "
      "int[] widths, int flip, int n_first, int rows, int blank, int blank_code, int row_start, "
      "int n, int group_size, str element) -> ()");
  m.def("unpack_rows(Tensor packed, int n, int k, int group_size, str element) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? scale, Tensor? zero, Tensor? bias, Tensor? perm, "
      "Tensor? table, int n, int k, int group_size, str element, int element_bias, "
      "ScalarType out_dtype, Tensor? row_scale=None, Tensor? prescale=None, str? activation=None, "
      "int activation_group=-1, float activation_maximum=0.0, Tensor? input_scale=None, "
      "Tensor? input_zero=None) -> Tensor");
  m.def(
      "embedding(Tensor ids, Tensor packed, Tensor? scale, Tensor? zero, Tensor? perm, "
      "Tensor? table, int n, int k, int group_size, str element, int element_bias, int channels, "
      "ScalarType out_dtype, Tensor? row_scale=None) -> Tensor");
  m.def("packed_tile_bytes_int8(int k, int group_size, str element) -> int");
  m.def(
      "pack_rows_int8(Tensor(a!) packed, Tensor rows, int row_start, int n, int group_size, "
      "str element) -> ()");
  m.def(
      "repack_codes_int8(Tensor(a!) packed, Tensor stored, str order, Tensor k_at, Tensor? n_at, "
      "int[] widths, int flip, int n_first, int rows, int blank, int blank_code, int row_start, "
      "int n, int group_size, str element) -> ()");
  m.def("unpack_rows_int8(Tensor packed, int n, int k, int group_size, str element) -> Tensor");
  m.def(
      "code_sums_int8(Tensor packed, int n, int k, int group_size, str element, "
      "int activation_group) -> Tensor");
  m.def(
      "linear_int8(Tensor x, Tensor packed, Tensor? scale, Tensor? zero, Tensor? row_scale, "
      "Tensor? bias, Tensor? perm, Tensor? prescale, Tensor? input_scale, Tensor? input_zero, "
      "Tensor? code_sums, "
      "int n, int k, int group_size, str element, int element_bias, bool symmetric, "
      "int activation_group, float maximum, ScalarType out_dtype) -> Tensor");
  m.def(
      "marlin_pack_rows(Tensor(a!) packed, Tensor rows, int row_start, int n, str element) -> ()");
  m.def(
      "marlin_repack_codes(Tensor(a!) packed, Tensor stored, str order, Tensor k_at, "
      "Tensor? n_at, int[] widths, int flip, int n_first, int rows, int blank, int blank_code, "
      "int row_start, int n, str element) -> ()");
  m.def("marlin_unpack_rows(Tensor packed, int n, int k, str element) -> Tensor");
  m.def("marlin_scales(Tensor scale, str columns) -> Tensor");
  m.def("marlin_zeros(Tensor zero, int bits) -> Tensor");
  m.def(
      "marlin_gemm(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? codebook, "
      "Tensor? order, Tensor? row_scale, Tensor? bias, Tensor workspace, int n, int k, "
      "int group_size, str element, int element_bias, ScalarType out_dtype) -> Tensor");
  m.def("isa_int8() -> str");
  m.def("supported_isas_int8() -> str");
  m.def("select_isa_int8(str name) -> ()");
  m.def("layout_id_int8() -> str");
  m.def("isa() -> str");
  m.def("supported_isas() -> str");
  m.def("select_isa(str name) -> ()");
  m.def("layout_id() -> str");
  m.def("op_calls(str name) -> int");
  m.def("op_call_lines() -> str");
  m.def("reset_op_calls() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CPU, m) {
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("place", TORCH_BOX(&place));
  m.impl("repack_codes", TORCH_BOX(&repack_codes));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("pack_rows_int8", TORCH_BOX(&pack_rows_int8));
  m.impl("repack_codes_int8", TORCH_BOX(&repack_codes_int8));
  m.impl("unpack_rows_int8", TORCH_BOX(&unpack_rows_int8));
  m.impl("code_sums_int8", TORCH_BOX(&code_sums_int8));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("marlin_pack_rows", TORCH_BOX(&marlin_pack_rows));
  m.impl("marlin_repack_codes", TORCH_BOX(&marlin_repack_codes));
  m.impl("marlin_unpack_rows", TORCH_BOX(&marlin_unpack_rows));
  m.impl("marlin_scales", TORCH_BOX(&marlin_scales));
  m.impl("marlin_zeros", TORCH_BOX(&marlin_zeros));
}

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CompositeExplicitAutograd, m) {
  m.impl("packed_tile_bytes", TORCH_BOX(&packed_tile_bytes));
  m.impl("packed_tile_bytes_int8", TORCH_BOX(&packed_tile_bytes_int8));
  m.impl("isa_int8", TORCH_BOX(&isa_int8));
  m.impl("supported_isas_int8", TORCH_BOX(&supported_isas_int8));
  m.impl("select_isa_int8", TORCH_BOX(&select_isa_int8));
  m.impl("layout_id_int8", TORCH_BOX(&layout_id_int8));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("supported_isas", TORCH_BOX(&supported_isas));
  m.impl("select_isa", TORCH_BOX(&select_isa));
  m.impl("layout_id", TORCH_BOX(&layout_id));
  m.impl("op_calls", TORCH_BOX(&op_calls));
  m.impl("op_call_lines", TORCH_BOX(&op_call_lines));
  m.impl("reset_op_calls", TORCH_BOX(&reset_op_calls));
}

}  // namespace compressed_linear
