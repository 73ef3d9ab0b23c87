// SPDX-License-Identifier: Apache-2.0
// Registration of every op, on LibTorch's stable ABI. Arguments are tensors and constants of the
// descriptor. Fake kernels are in vllm/compressed_linear/native.py.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include "counters.h"
#include "cpu/engine.h"

namespace compressed_linear {
namespace {

std::string isa() { return cpu::engine().isa; }

std::string supported_isas() {
  std::string names;
  for (const std::string& name : cpu::supported_isas()) names += (names.empty() ? "" : " ") + name;
  return names;
}

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
      "int n, "
      "int group_size, str element) -> ()");
  m.def("unpack_rows(Tensor packed, int n, int k, int group_size, str element) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? scale, Tensor? zero, Tensor? bias, Tensor? perm, "
      "Tensor? table, int n, int k, int group_size, str element, int element_bias, "
      "ScalarType out_dtype, Tensor? row_scale=None) -> Tensor");
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
}

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CompositeExplicitAutograd, m) {
  m.impl("packed_tile_bytes", TORCH_BOX(&packed_tile_bytes));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("supported_isas", TORCH_BOX(&supported_isas));
  m.impl("select_isa", TORCH_BOX(&select_isa));
  m.impl("layout_id", TORCH_BOX(&layout_id));
  m.impl("op_calls", TORCH_BOX(&op_calls));
  m.impl("op_call_lines", TORCH_BOX(&op_call_lines));
  m.impl("reset_op_calls", TORCH_BOX(&reset_op_calls));
}

}  // namespace compressed_linear
