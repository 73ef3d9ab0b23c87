// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"
#include "counters.h"
#include "ops.h"

namespace compressed_linear {
namespace {

// The counter of one path of `linear`, found by name the first time a thread asks for it.
std::atomic<int64_t>& linear_counter(const cpu::Engine& engine, Element element,
                                     const std::string& element_name) {
  struct Known {
    const cpu::Engine* engine = nullptr;
    std::atomic<int64_t>* counter = nullptr;
  };
  thread_local std::array<Known, 54> known;  // by kind, and bits of integers
  Known& entry = known[static_cast<size_t>(element.kind) * 9 +
                       static_cast<size_t>(element.kind == Kind::integer ? element.bits : 0)];
  if (entry.engine != &engine)
    entry = {&engine, &counter("linear/" + std::string(engine.isa) + "/" + element_name)};
  return *entry.counter;
}

// Reads what ActivationSpec.kind of vllm/compressed_linear/spec/descriptor.py writes.
cpu::Activation parse_activation(const char* op, const std::string& kind, int64_t group,
                                 double maximum) {
  struct Named {
    const char* name;
    int bits, exponent, mantissa;
    float largest;
  };
  constexpr Named kFloats[] = {{"e4m3", 8, 4, 3, 448.0f},
                               {"e5m2", 8, 5, 2, 57344.0f},
                               {"e3m2", 6, 3, 2, 28.0f},
                               {"e2m3", 6, 2, 3, 7.5f},
                               {"e2m1", 4, 2, 1, 6.0f}};
  cpu::Activation a{};
  a.present = true;
  a.maximum = static_cast<float>(maximum);
  if (!(a.maximum > 0)) fail(op, "activation_maximum is ", maximum, ", expected more than 0");
  std::string rest = kind;
  const auto take = [&rest](const std::string& word) {
    const bool found = rest.compare(0, word.size(), word) == 0;
    if (found) rest.erase(0, word.size());
    return found;
  };
  for (const Named& named : kFloats)
    if (take(named.name)) {
      a.bits = named.bits;
      a.exponent = named.exponent;
      a.mantissa = named.mantissa;
      a.largest = named.largest;
    }
  if (a.bits == 0 && take("int") && !rest.empty() && rest[0] >= '2' && rest[0] <= '8') {
    a.bits = rest[0] - '0';
    a.largest = static_cast<float>((1 << (a.bits - 1)) - 1);
    rest.erase(0, 1);
  }
  a.dynamic = take(" dynamic");
  const bool known = a.bits != 0 && (a.dynamic || take(" static"));
  a.whole_tensor = take(" per tensor");
  const bool grouped = !a.whole_tensor && take(" per group");
  const bool placed = a.whole_tensor || grouped || take(" per token");
  a.scale_type = take(" with e8m0 scales")   ? Scalar::e8m0
                 : take(" with e4m3 scales") ? Scalar::e4m3
                                             : Scalar::float32;
  a.symmetric = !take(", asymmetric");
  if (!known || !placed || !rest.empty()) fail(op, "activation is '", kind, "', which is unknown");
  if (grouped ? group < 1 : group != -1)
    fail(op, "activation_group is ", group, " for '", kind, "'");
  a.group = grouped ? group : 0;
  return a;
}

}  // namespace

Tensor linear(Tensor x, Tensor packed, std::optional<Tensor> scale, std::optional<Tensor> zero,
              std::optional<Tensor> bias, std::optional<Tensor> perm, std::optional<Tensor> table,
              int64_t n, int64_t k, int64_t group_size, std::string element_name,
              int64_t element_bias, ScalarType out_dtype, std::optional<Tensor> row_scale,
              std::optional<Tensor> prescale, std::optional<std::string> activation,
              int64_t activation_group, double activation_maximum,
              std::optional<Tensor> input_scale, std::optional<Tensor> input_zero) {
  constexpr const char* op = "linear";
  const Element element = parse_element(op, element_name);
  cpu::Problem p{};
  p.geometry = geometry_of(op, n, k, group_size, element);
  read_operands(op, p, x, packed, scale, zero, row_scale, bias, perm, prescale);
  const TableData values = table_data(op, table, element, element_name);
  p.table = values.narrow;
  p.wide_table = values.wide;
  check_element_bias(op, element, element_bias);
  if (element.kind == Kind::integer) {
    // Without zero points the bias goes into the decoded values, which saves the group sums; with
    // them, decoding about the middle keeps what is added and taken away small.
    const bool centred = p.zero != nullptr || element.bits == 8;
    p.middle = static_cast<float>(centred ? int64_t{1} << (element.bits - 1) : element_bias);
    p.offset = table.has_value() ? 0.0f : static_cast<float>(element_bias) - p.middle;
  }

  if (activation.has_value()) {
    p.activation = parse_activation(op, *activation, activation_group, activation_maximum);
    cpu::Activation& a = p.activation;
    if (!a.dynamic || a.scale_type == Scalar::e4m3) {
      const float* number = number_data(op, "input_scale", input_scale, 1);
      if (number == nullptr) fail(op, "input_scale is needed for this activation");
      a.scale = *number;
    }
    if (!a.dynamic && !a.symmetric) {
      const int32_t* number = input_zero_data(op, input_zero);
      if (number == nullptr) fail(op, "input_zero is needed for this activation");
      a.zero = static_cast<float>(*number);
    }
  }

  Tensor out = make_output(op, p, x, out_dtype);
  const cpu::Engine& engine = cpu::engine();
  engine.linear(p, {&run_parallel, static_cast<int64_t>(torch::stable::get_num_threads())});
  linear_counter(engine, element, element_name) += 1;
  return out;
}

}  // namespace compressed_linear
