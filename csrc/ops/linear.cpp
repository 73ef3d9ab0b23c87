// SPDX-License-Identifier: Apache-2.0
#include "counters.h"
#include "cpu/common/nodes.h"
#include "cpu/common/paths.h"
#include "cpu/integer/segments.h"
#include "ops.h"
#include "packed.h"
#include "problem.h"

namespace compressed_linear {
namespace {

using cpu::Kernels;

// The counter of one path, found by name the first time a thread asks for it.
std::atomic<int64_t>& linear_counter(const cpu::Isa& isa, PackedLayout layout, Element element) {
  // By layout, by kind, by bits of integers, and by row.
  constexpr size_t kKinds = 6, kBits = 9;
  thread_local std::array<std::atomic<int64_t>*, 2 * kKinds * kBits * cpu::kMostIsas> known{};
  const size_t bits = static_cast<size_t>(element.kind == Kind::integer ? element.bits : 0);
  const size_t kind = static_cast<size_t>(layout) * kKinds + static_cast<size_t>(element.kind);
  std::atomic<int64_t>*& entry = known[(kind * kBits + bits) * cpu::kMostIsas + index_of(isa)];
  if (entry == nullptr)
    entry = &counter(std::string("linear/") + layout_name(layout) + "/" + isa.name + "/" +
                     element_name(element));
  return *entry;
}

cpu::Input input_of(const char* op, const ProblemNumbers& numbers, const Operands& operands,
                    const Tensor& x) {
  if (!x.is_cpu()) fail(op, "x is not on the CPU");
  if (x.dim() != 2 || x.size(1) != numbers.columns)
    fail(op, "x has shape ", shape_text(x), ", expected [m, ", numbers.columns, "]");
  cpu::Input input{};
  input.data = x.const_data_ptr();
  input.type = float_type(op, "x", x.scalar_type());
  input.m = x.size(0);
  input.columns = numbers.columns;
  input.row_stride = x.stride(0);
  input.column_stride = x.stride(1);
  input.perm = perm_data(op, operands[Operand::perm], numbers.geometry.k);
  input.prescale = number_data(op, "prescale", operands[Operand::prescale], numbers.geometry.k);
  input.activation = numbers.activation;
  return input;
}

// The scale and zero point of x that are not computed from it.
void read_static(const char* op, cpu::Activation& a, PackedLayout layout,
                 const Operands& operands) {
  const float* scale = number_data(op, "input_scale", operands[Operand::input_scale], 1);
  const bool scaled = a.present && (!a.dynamic || a.scale_type == Scalar::e4m3);
  if ((scale != nullptr) != scaled)
    fail(op, "input_scale is ", scaled ? "missing" : "given", ", expected for static scales only");
  if (scaled) a.scale = *scale;
  const int32_t* zero = input_zero_data(op, operands[Operand::input_zero]);
  const bool shifted = a.present && !a.dynamic && !a.symmetric;
  if ((zero != nullptr) != shifted)
    fail(op, "input_zero is ", shifted ? "missing" : "given",
         ", expected where static scales are not symmetric");
  if (!shifted) return;
  if (layout == PackedLayout::quads && (*zero < -128 || *zero > 127))
    fail(op, "input_zero is ", *zero, ", expected -128 to 127");
  a.zero = static_cast<float>(*zero);
}

}  // namespace

Tensor linear(Tensor x, Tensor problem, std::vector<Tensor> tensors, std::optional<Tensor> bias,
              int64_t n, ScalarType out_dtype) {
  constexpr const char* op = "linear";
  const ProblemNumbers numbers = read_problem(op, problem);
  const Operands operands(op, numbers, tensors);
  const Geometry& g = numbers.geometry;
  const PackedLayout layout = numbers.layout;
  if (n != g.n) fail(op, "n is ", n, ", expected ", g.n, " as in problem");
  cpu::Problem p{};
  p.x = input_of(op, numbers, operands, x);
  read_static(op, p.x.activation, layout, operands);
  p.weight = weight_of(op, numbers, operands);
  cpu::Weight& w = p.weight;
  if (g.element.kind == Kind::integer) {
    // Beside zero points, codes count from the middle: what is added and taken away stays small.
    // Without, the bias goes into the decoded values, which saves the sums over groups.
    const bool bytes = layout == PackedLayout::planes && g.element.bits == 8;
    const bool centred = w.zero.data != nullptr || bytes;
    w.middle =
        static_cast<float>(centred ? int64_t{1} << (g.element.bits - 1) : numbers.element_bias);
    w.offset = operands[Operand::table] != nullptr
                   ? 0.0f
                   : static_cast<float>(numbers.element_bias) - w.middle;
  }
  if (layout == PackedLayout::quads) {
    const Tensor* code_sums = operands[Operand::code_sums];
    if ((code_sums != nullptr) == numbers.activation.symmetric)
      fail(op, "code_sums are ", code_sums != nullptr ? "given" : "missing",
           ", expected for x with zero points and only there");
    if (code_sums != nullptr) {
      check_plain(op, "code_sums", *code_sums);
      check_type(op, "code_sums", *code_sums, ScalarType::Int);
      check_shape<3>(op, "code_sums", *code_sums,
                     {g.tiles, cpu::count_segments(g, p.x.activation.group), cpu::kTile});
      w.code_sums = static_cast<const int32_t*>(code_sums->const_data_ptr());
    }
  }
  if (bias.has_value()) {
    check_plain(op, "bias", *bias);
    check_shape<1>(op, "bias", *bias, {g.n});
    p.y.bias = bias->const_data_ptr();
    p.y.bias_type = float_type(op, "bias", bias->scalar_type());
  }
  p.y.type = float_type(op, "out_dtype", out_dtype);
  const std::array<int64_t, 2> shape = {p.x.m, g.n};
  Tensor out = new_tensor(shape, out_dtype);
  p.y.data = out.mutable_data_ptr();

  const cpu::Isa& isa = cpu::isa_of(p);
  cpu::Parallel parallel{&run_parallel, static_cast<int64_t>(torch::stable::get_num_threads())};
  parallel.node_of = cpu::nodes_of_threads(parallel);
  isa.linear(layout == PackedLayout::quads ? Kernels::integers : Kernels::floats)(p, parallel);
  linear_counter(isa, layout, g.element).fetch_add(1, std::memory_order_relaxed);
  return out;
}

}  // namespace compressed_linear
