// SPDX-License-Identifier: Apache-2.0
// The op marlin_gemm for any machine that runs its kernels: the GPU (cuda/op_marlin_gemm.cpp), or
// in tests the emulator (cuda/emulator/op_marlin_gemm.cpp). Included by these two only.
#pragma once

#include "cuda/marlin/gather_problem.h"
#include "cuda/marlin/problem.h"
#include "ops/arguments.h"

namespace compressed_linear::marlin_op {

constexpr const char* kOp = "marlin_gemm";

using cuda::marlin::GatherParams;
using cuda::marlin::LaunchShape;
using cuda::marlin::Number;
using cuda::marlin::Params;
using Weights = cuda::marlin::Element;

inline Weights parse_weights(const std::string& name) {
  if (name == "uint4") return Weights::uint4;
  if (name == "uint8") return Weights::uint8;
  if (name == "e4m3") return Weights::e4m3;
  if (name == "e2m1") return Weights::e2m1;
  if (name == "codebook4") return Weights::codebook;
  fail(kOp, "element is '", name, "', expected uint4, uint8, e4m3, e2m1 or codebook4");
}

inline Number number_of(Scalar type) {
  switch (type) {
    case Scalar::float16:
      return Number::float16;
    case Scalar::bfloat16:
      return Number::bfloat16;
    case Scalar::e4m3:
      return Number::e4m3;
    case Scalar::e8m0:
      return Number::e8m0;
    default:
      return Number::float32;
  }
}

// On the device of `x`, contiguous, of that dtype, and aligned for copies of 16 bytes.
template <class Machine>
void check_operand(const char* what, const Tensor& tensor, ScalarType type, const Tensor& x) {
  Machine::check_device(what, tensor, x);
  if (!tensor.is_contiguous()) fail(kOp, what, " is not contiguous");
  check_type(kOp, what, tensor, type);
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0)
    fail(kOp, what, " does not begin at a multiple of 16 bytes");
}

struct Operands {
  Tensor x, weight, scale;
  std::optional<Tensor> zero, codebook, order, row_scale, bias;
  Tensor workspace;
};

// Checks the operands; all of Params but the output and the division of work.
template <class Machine>
Params read(const Operands& o, int64_t n, int64_t k, int64_t group_size, Weights weights,
            int64_t element_bias) {
  namespace layout = compressed_linear::marlin;
  const int bits = cuda::marlin::bits_of(weights);
  constexpr int64_t kLimit = int64_t{1} << 31;
  Machine::check_device("x", o.x, o.x);
  if (o.x.dim() != 2) fail(kOp, "x has shape ", shape_text(o.x), ", expected [m, k]");
  if (o.x.size(0) >= kLimit) fail(kOp, "x has ", o.x.size(0), " rows, expected fewer than 2^31");
  if (n < 1 || n >= kLimit || n % layout::kTileN != 0)
    fail(kOp, "n is ", n, ", expected a multiple of ", layout::kTileN, " below 2^31");
  if (k < 1 || k >= kLimit || k % layout::kStripK != 0)
    fail(kOp, "k is ", k, ", expected a multiple of ", layout::kStripK, " below 2^31");
  const bool fits = group_size == k || group_size == 16 || group_size == 32 ||
                    (group_size > 0 && group_size % cuda::marlin::kTileK == 0);
  if (!fits || k % group_size != 0)
    fail(kOp, "group_size is ", group_size, ", expected k = ", k,
         ", or a divisor of it that is 16, 32 or a multiple of 64");
  const int64_t groups = k / group_size;

  Params p{};
  p.m = static_cast<int>(o.x.size(0));
  p.n = static_cast<int>(n);
  p.k = static_cast<int>(k);
  p.group = static_cast<int>(group_size);
  check_operand<Machine>("weight", o.weight, ScalarType::Int, o.x);
  check_shape<2>(kOp, "weight", o.weight, {k / layout::kStripK, layout::strip_words(bits, n)});
  p.weight = static_cast<const uint32_t*>(o.weight.const_data_ptr());

  p.scale_type = number_of(scale_type(kOp, "scale", o.scale.scalar_type()));
  check_operand<Machine>("scale", o.scale, o.scale.scalar_type(), o.x);
  check_shape<2>(kOp, "scale", o.scale, {groups, n});
  p.scale = o.scale.const_data_ptr();

  const bool integer = cuda::marlin::is_integer(weights);
  if (integer && (element_bias < 0 || element_bias > int64_t{1} << bits))
    fail(kOp, "element_bias is ", element_bias, ", expected 0 to ", int64_t{1} << bits);
  p.code_bias = static_cast<int>(element_bias);
  if (o.zero.has_value()) {
    if (!integer || element_bias != 0)
      fail(kOp, "zero is given for weights that are not plain unsigned integers");
    check_operand<Machine>("zero", *o.zero, ScalarType::Int, o.x);
    check_shape<2>(kOp, "zero", *o.zero, {groups, n * bits / layout::kWordBits});
    p.zero = static_cast<const uint32_t*>(o.zero->const_data_ptr());
  }
  if ((weights == Weights::codebook) != o.codebook.has_value())
    fail(kOp, "codebook is ", o.codebook.has_value() ? "given" : "missing",
         ", expected one for codebook4 only");
  if (o.codebook.has_value()) {
    check_operand<Machine>("codebook", *o.codebook, ScalarType::Float, o.x);
    check_shape<1>(kOp, "codebook", *o.codebook, {16});
    p.codebook = static_cast<const float*>(o.codebook->const_data_ptr());
  }
  if (o.order.has_value()) {
    check_operand<Machine>("order", *o.order, ScalarType::Int, o.x);
    check_shape<1>(kOp, "order", *o.order, {k});
  } else if (o.x.size(1) != k) {
    fail(kOp, "x has shape ", shape_text(o.x), ", expected [m, ", k, "]");
  }
  if (o.row_scale.has_value()) {
    check_operand<Machine>("row_scale", *o.row_scale, ScalarType::Float, o.x);
    check_shape<1>(kOp, "row_scale", *o.row_scale, {n});
    p.row_scale = static_cast<const float*>(o.row_scale->const_data_ptr());
  }
  if (o.bias.has_value()) {
    p.bias_type = number_of(float_type(kOp, "bias", o.bias->scalar_type()));
    Machine::check_device("bias", *o.bias, o.x);
    if (!o.bias->is_contiguous()) fail(kOp, "bias is not contiguous");
    check_shape<1>(kOp, "bias", *o.bias, {n});
    p.bias = o.bias->const_data_ptr();
  }
  check_operand<Machine>("workspace", o.workspace, ScalarType::Int, o.x);
  check_shape<1>(kOp, "workspace", o.workspace, {cuda::marlin::kMaxBlocks});
  // Zero before and after each call, so the op's schema does not declare it as written.
  p.arrived = static_cast<int*>(o.workspace.mutable_data_ptr());
  return p;
}

// Machine: check_device(what, tensor, x), processors(x), gather(params, x), and
// gemm(bfloat16, weights, params, launch, x).
template <class Machine>
Tensor marlin_gemm(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> zero,
                   std::optional<Tensor> codebook, std::optional<Tensor> order,
                   std::optional<Tensor> row_scale, std::optional<Tensor> bias, Tensor workspace,
                   int64_t n, int64_t k, int64_t group_size, std::string element,
                   int64_t element_bias, ScalarType out_dtype) {
  const Operands o = {x, weight, scale, zero, codebook, order, row_scale, bias, workspace};
  const ScalarType x_type = x.scalar_type();
  if (x_type != ScalarType::Half && x_type != ScalarType::BFloat16)
    fail(kOp, "x is ", type_name(x_type), ", expected float16 or bfloat16");
  const Weights weights = parse_weights(element);
  const typename Machine::Guard guard(x);
  Params p = read<Machine>(o, n, k, group_size, weights, element_bias);
  p.out_type = number_of(float_type(kOp, "out_dtype", out_dtype));
  const std::array<int64_t, 2> shape = {x.size(0), n};
  Tensor out = torch::stable::new_empty(x, {shape.data(), 2}, out_dtype);
  if (p.m == 0) return out;
  p.out = out.mutable_data_ptr();

  std::optional<Tensor> gathered;
  p.x = x.const_data_ptr();
  p.x_stride = x.stride(0);
  const bool copies = reinterpret_cast<uintptr_t>(p.x) % 16 != 0 || x.stride(1) != 1 ||
                      (p.m > 1 && p.x_stride % 8 != 0);
  if (order.has_value() || copies) {
    const std::array<int64_t, 2> rows = {x.size(0), k};
    gathered = torch::stable::new_empty(x, {rows.data(), 2}, x_type);
    GatherParams g{};
    g.x = static_cast<const uint16_t*>(x.const_data_ptr());
    g.order = order.has_value() ? static_cast<const int*>(order->const_data_ptr()) : nullptr;
    g.out = static_cast<uint16_t*>(gathered->mutable_data_ptr());
    g.row_stride = x.stride(0);
    g.column_stride = x.stride(1);
    g.m = p.m;
    g.k = p.k;
    Machine::gather(g, x);
    p.x = g.out;
    p.x_stride = k;
  }

  const LaunchShape launch = cuda::marlin::launch_shape(p, weights, Machine::processors(x));
  std::optional<Tensor> partial;
  if (launch.partial_floats > 0) {
    const std::array<int64_t, 1> floats = {launch.partial_floats};
    partial = torch::stable::new_empty(x, {floats.data(), 1}, ScalarType::Float);
    p.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  Machine::gemm(x_type == ScalarType::BFloat16, weights, p, launch, x);
  return out;
}

}  // namespace compressed_linear::marlin_op
