// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "arguments.h"
#include "counters.h"
#include "cpu/float/lookup.h"
#include "ops.h"

namespace compressed_linear {

Tensor embedding(Tensor ids, Tensor packed, std::optional<Tensor> scale, std::optional<Tensor> zero,
                 std::optional<Tensor> perm, std::optional<Tensor> table, int64_t n, int64_t k,
                 int64_t group_size, std::string element_name, int64_t element_bias,
                 int64_t channels, ScalarType out_dtype, std::optional<Tensor> row_scale) {
  constexpr const char* op = "embedding";
  const Element element = parse_element(op, element_name);
  cpu::Lookup l{};
  l.geometry = geometry_of(op, n, k, group_size, element);
  check_packed(op, packed, l.geometry);
  l.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  l.scale = tiled_data(op, "scale", scale, l.geometry);
  if (scale.has_value()) l.scale_type = scale_type(op, "scale", scale->scalar_type());
  l.zero = tiled_data(op, "zero", zero, l.geometry);
  if (zero.has_value()) l.zero_type = float_type(op, "zero", zero->scalar_type());
  l.row_scale = number_data(op, "row_scale", row_scale, n);
  const TableData values = table_data(op, table, element, element_name);
  l.table = values.narrow;
  l.wide_table = values.wide;
  check_element_bias(op, element, element_bias);
  l.bias = static_cast<float>(element_bias);
  if (channels < 1 || channels > std::numeric_limits<int32_t>::max())
    fail(op, "channels is ", channels, ", expected 1 to 2147483647, what perm can name");
  l.perm = perm_data(op, perm, k, channels);
  if (l.perm == nullptr && channels != k)
    fail(op, "channels is ", channels, " without perm, expected k = ", k);
  l.channels = channels;

  check_plain(op, "ids", ids);
  check_type(op, "ids", ids, ScalarType::Long);
  if (ids.dim() != 1) fail(op, "ids has shape ", shape_text(ids), ", expected [m]");
  l.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t m = ids.size(0);
  for (int64_t i = 0; i < m; ++i)
    if (l.ids[i] < 0 || l.ids[i] >= n)
      fail(op, "ids holds ", l.ids[i], " at ", i, ", expected 0 to ", n - 1);

  l.out_type = float_type(op, "out_dtype", out_dtype);
  const std::array<int64_t, 2> shape = {m, channels};
  Tensor out = torch::stable::new_empty(packed, {shape.data(), 2}, out_dtype);
  l.out = out.mutable_data_ptr();
  const auto body = [&](int64_t begin, int64_t end) { cpu::look_up(l, begin, end); };
  // Starting threads takes as long as looking up this many rows.
  constexpr int64_t kRowsPerThread = 8;
  torch::stable::parallel_for(0, m, kRowsPerThread, body);
  counter("embedding/" + element_name) += 1;
  return out;
}

}  // namespace compressed_linear
