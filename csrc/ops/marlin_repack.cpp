// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>

#include "counters.h"
#include "marlin.h"
#include "ops.h"
#include "repack.h"

namespace compressed_linear {
namespace {

void run(const char* op, const char* what, cpu::Repack& job, Tensor& packed) {
  job.layout = cpu::PackedLayout::marlin;
  check_plain(op, "packed", packed);
  check_marlin(op, packed, job.geometry);
  job.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  repack(op, what, job, packed.numel() * packed.element_size());
}

}  // namespace

void marlin_pack_rows(Tensor packed, Tensor rows, int64_t row_start, int64_t n,
                      std::string element_name) {
  constexpr const char* op = "marlin_pack_rows";
  const Element element = parse_element(op, element_name);
  check_plain(op, "rows", rows);
  check_type(op, "rows", rows, ScalarType::Byte);
  if (rows.dim() != 2) fail(op, "rows has shape ", shape_text(rows), ", expected [rows, k]");
  const Geometry g = marlin_geometry(op, n, rows.size(1), element, element_name);
  cpu::Repack job = cpu::from_rows(g, cpu::PackedLayout::marlin, rows.const_data_ptr(),
                                   rows.size(0), row_start, nullptr);
  run(op, "rows", job, packed);
  counter(std::string("marlin_pack_rows/") + cpu::engine().isa + "/" + element_name) += 1;
}

void marlin_repack_codes(Tensor packed, Tensor stored, std::string order, Tensor k_at,
                         std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                         int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                         int64_t row_start, int64_t n, std::string element_name) {
  constexpr const char* op = "marlin_repack_codes";
  const Element element = parse_element(op, element_name);
  if (k_at.dim() < 1) fail(op, "k_at has shape [], expected [k] or [one per width, k]");
  cpu::Repack job{};
  job.geometry = marlin_geometry(op, n, k_at.size(k_at.dim() - 1), element, element_name);
  check_plain(op, "stored", stored);
  read_code_source(op, job.source, stored, order, k_at, n_at, widths, flip, n_first, rows, blank,
                   blank_code, element, element_name);
  job.row_begin = row_start;
  run(op, "stored", job, packed);
  counter(std::string("marlin_repack_codes/") + cpu::engine().isa + "/" + element_name) += 1;
}

Tensor marlin_unpack_rows(Tensor packed, int64_t n, int64_t k, std::string element_name) {
  constexpr const char* op = "marlin_unpack_rows";
  const Geometry g = marlin_geometry(op, n, k, parse_element(op, element_name), element_name);
  check_plain(op, "packed", packed);
  check_marlin(op, packed, g);
  const std::array<int64_t, 2> shape = {n, k};
  Tensor rows = torch::stable::new_empty(packed, {shape.data(), 2}, ScalarType::Byte);
  const uint8_t* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(rows.mutable_data_ptr());
  parallel_tiles(0, g.tiles,
                 [&](int64_t begin, int64_t end) { cpu::unpack_marlin(g, from, begin, end, to); });
  counter("marlin_unpack_rows/" + element_name) += 1;
  return rows;
}

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
