// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "arguments.h"
#include "counters.h"
#include "cpu/integer/engine.h"
#include "ops.h"

namespace compressed_linear {
namespace {

void check_activation_group(const char* op, const Geometry& g, int64_t activation_group) {
  if (activation_group < 0)
    fail(op, "activation_group is ", activation_group, ", expected 0 or a positive number");
  const std::string why = cpu::why_not_grouped(g, activation_group);
  if (!why.empty()) fail(op, why);
}

// The counter of one path, found by name the first time a thread asks for it.
std::atomic<int64_t>& path_counter(const cpu::IntegerEngine& engine, int bits) {
  struct Known {
    const cpu::IntegerEngine* engine = nullptr;
    std::atomic<int64_t>* counter = nullptr;
  };
  thread_local std::array<Known, 9> known;
  Known& entry = known[static_cast<size_t>(bits)];
  if (entry.engine != &engine)
    entry = {&engine,
             &counter("linear_int8/" + std::string(engine.isa) + "/uint" + std::to_string(bits))};
  return *entry.counter;
}

}  // namespace

Tensor code_sums_int8(Tensor packed, int64_t n, int64_t k, int64_t group_size, std::string element,
                      int64_t activation_group) {
  constexpr const char* op = "code_sums_int8";
  const Geometry g = quads_of(op, n, k, group_size, code_bits(op, element));
  check_packed(op, packed, g);
  check_activation_group(op, g, activation_group);
  const int64_t segments = cpu::count_segments(g, activation_group);
  const std::array<int64_t, 3> shape = {g.tiles, segments, cpu::kTile};
  Tensor sums = torch::stable::new_empty(packed, {shape.data(), 3}, ScalarType::Int);
  const uint8_t* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  int32_t* to = static_cast<int32_t*>(sums.mutable_data_ptr());
  parallel_tiles(0, g.tiles, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      cpu::sum_codes(g, activation_group, from, tile, to + tile * segments * cpu::kTile);
  });
  counter("code_sums_int8/" + element) += 1;
  return sums;
}

Tensor linear_int8(Tensor x, Tensor packed, std::optional<Tensor> scale, std::optional<Tensor> zero,
                   std::optional<Tensor> row_scale, std::optional<Tensor> bias,
                   std::optional<Tensor> perm, std::optional<Tensor> prescale,
                   std::optional<Tensor> input_scale, std::optional<Tensor> input_zero,
                   std::optional<Tensor> code_sums, int64_t n, int64_t k, int64_t group_size,
                   std::string element, int64_t element_bias, bool symmetric,
                   int64_t activation_group, double maximum, ScalarType out_dtype) {
  constexpr const char* op = "linear_int8";
  const int bits = code_bits(op, element);
  cpu::IntegerProblem problem{};
  cpu::Problem& p = problem.linear;
  p.geometry = quads_of(op, n, k, group_size, bits);
  const Geometry& g = p.geometry;
  read_operands(op, p, x, packed, scale, zero, row_scale, bias, perm, prescale);
  check_element_bias(op, g.element, element_bias);
  // Beside zero points, codes count from the middle: what is added and taken away stays small.
  p.middle = static_cast<float>(zero.has_value() ? int64_t{1} << (bits - 1) : element_bias);
  p.offset = static_cast<float>(element_bias) - p.middle;

  cpu::ActivationRule& rule = problem.activation;
  check_activation_group(op, g, activation_group);
  rule.group = activation_group >= k ? 0 : activation_group;
  rule.symmetric = symmetric;
  rule.dynamic = !input_scale.has_value();
  if (!(maximum > 0) || !std::isfinite(maximum))
    fail(op, "maximum is ", maximum, ", expected a positive number");
  rule.maximum = static_cast<float>(maximum);
  if (const float* number = number_data(op, "input_scale", input_scale, 1)) rule.scale = *number;
  if (input_zero.has_value() != (input_scale.has_value() && !symmetric))
    fail(op, "input_zero is ", input_zero.has_value() ? "given" : "missing",
         ", expected one where static scales are not symmetric");
  if (const int32_t* number = input_zero_data(op, input_zero)) {
    rule.zero = *number;
    if (rule.zero < -128 || rule.zero > 127)
      fail(op, "input_zero is ", rule.zero, ", expected -128 to 127");
  }
  if (code_sums.has_value() == symmetric)
    fail(op, "code_sums are ", symmetric ? "given" : "missing",
         ", expected for x with zero points and only there");
  if (code_sums.has_value()) {
    check_plain(op, "code_sums", *code_sums);
    check_type(op, "code_sums", *code_sums, ScalarType::Int);
    check_shape<3>(op, "code_sums", *code_sums,
                   {g.tiles, cpu::count_segments(g, rule.group), cpu::kTile});
    problem.code_sums = static_cast<const int32_t*>(code_sums->const_data_ptr());
  }

  Tensor out = make_output(op, p, x, out_dtype);
  const cpu::IntegerEngine& engine = cpu::integer_engine();
  engine.linear(problem, {&run_parallel, static_cast<int64_t>(torch::stable::get_num_threads())});
  path_counter(engine, bits) += 1;
  return out;
}

}  // namespace compressed_linear
