// SPDX-License-Identifier: Apache-2.0
#include <atomic>

#include "marlin.h"
#include "ops.h"

namespace compressed_linear {

Tensor marlin_scales(Tensor scale, std::string columns) {
  constexpr const char* op = "marlin_scales";
  const MarlinColumns order = parse_columns(op, columns);
  const cpu::MarlinValues from = values_of(op, "scale", scale);
  check_scale(op, scale, order);
  const std::array<int64_t, 2> shape = {from.groups, from.n};
  Tensor out = torch::stable::new_empty(scale, {shape.data(), 2});
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  parallel_tiles(0, from.n / marlin::kTileN, [&](int64_t begin, int64_t end) {
    cpu::marlin_scales(from, order, begin, end, to);
  });
  return out;
}

Tensor marlin_zeros(Tensor zero, int64_t bits) {
  constexpr const char* op = "marlin_zeros";
  const cpu::MarlinValues from = values_of(op, "zero", zero);
  check_zero(op, zero, bits);
  const std::array<int64_t, 2> shape = {from.groups, from.n * bits / marlin::kWordBits};
  Tensor out = torch::stable::new_empty(zero, {shape.data(), 2}, ScalarType::Int);
  uint32_t* to = static_cast<uint32_t*>(out.mutable_data_ptr());
  std::atomic<bool> good{true};
  parallel_tiles(0, from.n / marlin::kTileN, [&](int64_t begin, int64_t end) {
    if (!cpu::marlin_zeros(from, static_cast<int>(bits), begin, end, to)) good = false;
  });
  if (!good) fail(op, "zero holds zero points of more than ", bits, " bits");
  return out;
}

}  // namespace compressed_linear
