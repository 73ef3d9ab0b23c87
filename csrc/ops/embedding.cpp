// SPDX-License-Identifier: Apache-2.0
#include "counters.h"
#include "cpu/float/lookup.h"
#include "ops.h"
#include "packed.h"
#include "problem.h"

namespace compressed_linear {

Tensor embedding(Tensor ids, Tensor problem, std::vector<Tensor> tensors, int64_t channels,
                 ScalarType out_dtype) {
  constexpr const char* op = "embedding";
  const ProblemNumbers numbers = read_problem(op, problem);
  const Operands operands(op, numbers, tensors);
  const Geometry& g = numbers.geometry;
  if (numbers.layout != PackedLayout::planes)
    fail(op, "problem has layout ", layout_name(numbers.layout), ", expected planes");
  if (channels != numbers.columns)
    fail(op, "channels is ", channels, ", expected ", numbers.columns, " as in problem");
  cpu::Lookup l{};
  l.weight = weight_of(op, numbers, operands);
  l.weight.middle = static_cast<float>(numbers.element_bias);
  l.perm = perm_data(op, operands[Operand::perm], g.k);
  l.channels = channels;

  check_plain(op, "ids", ids);
  check_type(op, "ids", ids, ScalarType::Long);
  if (ids.dim() != 1) fail(op, "ids has shape ", shape_text(ids), ", expected [m]");
  l.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t m = ids.size(0);
  for (int64_t i = 0; i < m; ++i)
    if (l.ids[i] < 0 || l.ids[i] >= g.n)
      fail(op, "ids holds ", l.ids[i], " at ", i, ", expected 0 to ", g.n - 1);

  l.out_type = float_type(op, "out_dtype", out_dtype);
  const std::array<int64_t, 2> shape = {m, channels};
  Tensor out = new_tensor(shape, out_dtype);
  l.out = out.mutable_data_ptr();
  const auto body = [&](int64_t begin, int64_t end) { cpu::look_up(l, begin, end); };
  // Starting threads takes as long as looking up this many rows.
  constexpr int64_t kRowsPerThread = 8;
  torch::stable::parallel_for(0, m, kRowsPerThread, body);
  counter("embedding/" + element_name(g.element)) += 1;
  return out;
}

}  // namespace compressed_linear
