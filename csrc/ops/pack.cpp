// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "counters.h"
#include "cpu/common/isa.h"
#include "cpu/common/partition.h"
#include "cpu/integer/segments.h"
#include "cpu/repack/quads.h"
#include "ops.h"
#include "packed.h"
#include "repack.h"

namespace compressed_linear {

std::vector<int64_t> packed_shape(std::string layout, int64_t n, int64_t k, int64_t group_size,
                                  std::string element) {
  constexpr const char* op = "packed_shape";
  const PackedLayout packed = parse_layout(op, layout);
  const auto shape = packed_shape_in(packed, geometry_in(op, packed, n, k, group_size, element));
  return {shape.begin(), shape.end()};
}

void place(Tensor packed) {
  constexpr const char* op = "place";
  check_plain(op, "packed", packed);
  if (packed.dim() < 1) fail(op, "packed has shape [], expected [tiles, ...]");
  const int64_t tiles = packed.size(0);
  if (packed.numel() == 0) return;
  const int64_t bytes = packed.numel() * packed.element_size();
  uint8_t* memory = static_cast<uint8_t*>(packed.mutable_data_ptr());
  cpu::advise_huge_pages(memory, bytes);
  // Each thread those of its range of a call with one row, see cpu/common/partition.h.
  const int64_t strip_bytes = bytes / tiles * cpu::kStrip;
  const int64_t threads = torch::stable::get_num_threads();
  cpu::WorkShape shape{tiles, bytes / tiles, cpu::kStrip, 1, 0, 1, 1};
  shape.cells = threads > 1 ? std::max<int64_t>(strip_bytes / cpu::kPageBytes, 1) : 1;
  shape.cuts_ragged = true;
  const cpu::Partition partition(shape, threads);
  const auto begin_of = [&](int64_t range) {
    const int64_t cell = partition.border(range * partition.units_of_range());
    return std::min(
        cell / shape.cells * strip_bytes + cell % shape.cells * (strip_bytes / shape.cells), bytes);
  };
  parallel_tiles(0, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < std::min(end, partition.ranges()); ++i)
      cpu::touch_pages(memory, begin_of(i), begin_of(i + 1));
  });
}

void pack_rows(std::string layout, Tensor packed, Tensor rows, int64_t row_start, int64_t n,
               int64_t group_size, std::string element) {
  constexpr const char* op = "pack_rows";
  const PackedLayout to = parse_layout(op, layout);
  check_plain(op, "rows", rows);
  check_type(op, "rows", rows, row_type(parse_element(op, element)));
  if (rows.dim() != 2) fail(op, "rows has shape ", shape_text(rows), ", expected [rows, k]");
  const Geometry g = geometry_in(op, to, n, rows.size(1), group_size, element);
  check_packed(op, to, packed, g);
  cpu::Repack job = cpu::from_rows(g, to, rows.const_data_ptr(), rows.size(0), row_start,
                                   static_cast<uint8_t*>(packed.mutable_data_ptr()));
  repack(op, "rows", job, packed.numel() * packed.element_size());
  counter("pack_rows/" + layout + "/" + element) += 1;
}

void repack_codes(std::string layout, Tensor packed, Tensor stored, std::string order, Tensor k_at,
                  std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                  int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                  int64_t row_start, int64_t n, int64_t group_size, std::string element) {
  constexpr const char* op = "repack_codes";
  cpu::Repack job{};
  job.layout = parse_layout(op, layout);
  if (k_at.dim() < 1) fail(op, "k_at has shape [], expected [k] or [one per width, k]");
  job.geometry = geometry_in(op, job.layout, n, k_at.size(k_at.dim() - 1), group_size, element);
  if (!cpu::is_coded(job.geometry.element)) fail(op, "element is '", element, "', expected codes");
  check_plain(op, "stored", stored);
  read_code_source(op, job.source, stored, order, k_at, n_at, widths, flip, n_first, rows, blank,
                   blank_code, job.geometry.element, element);
  check_packed(op, job.layout, packed, job.geometry);
  job.row_begin = row_start;
  job.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  repack(op, "stored", job, packed.numel() * packed.element_size());
  counter("repack_codes/" + layout + "/" + cpu::isa(cpu::Kernels::floats).name + "/" + element) +=
      1;
}

Tensor unpack_rows(std::string layout, Tensor packed, int64_t n, int64_t k, int64_t group_size,
                   std::string element) {
  constexpr const char* op = "unpack_rows";
  const PackedLayout from = parse_layout(op, layout);
  const Geometry g = geometry_in(op, from, n, k, group_size, element);
  check_packed(op, from, packed, g);
  const std::array<int64_t, 2> shape = {n, k};
  Tensor rows = new_tensor(shape, row_type(g.element));
  const uint8_t* bytes = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* to = rows.mutable_data_ptr();
  uint8_t* codes = static_cast<uint8_t*>(to);
  parallel_tiles(0, g.tiles, [&](int64_t begin, int64_t end) {
    if (from == PackedLayout::planes) cpu::unpack_tiles(g, bytes, begin, end, to);
    if (from == PackedLayout::quads) cpu::unpack_quads(g, bytes, begin, end, codes);
    if (from == PackedLayout::marlin) cpu::unpack_marlin(g, bytes, begin, end, codes);
  });
  counter("unpack_rows/" + layout + "/" + element) += 1;
  return rows;
}

Tensor code_sums(Tensor packed, int64_t n, int64_t k, int64_t group_size, std::string element,
                 int64_t activation_group) {
  constexpr const char* op = "code_sums";
  const Geometry g = geometry_in(op, PackedLayout::quads, n, k, group_size, element);
  check_packed(op, PackedLayout::quads, packed, g);
  if (activation_group < 0)
    fail(op, "activation_group is ", activation_group, ", expected 0 or a positive number");
  const std::string why = cpu::why_not_grouped(g, activation_group);
  if (!why.empty()) fail(op, why);
  const int64_t segments = cpu::count_segments(g, activation_group);
  const std::array<int64_t, 3> shape = {g.tiles, segments, cpu::kTile};
  Tensor sums = new_tensor(shape, ScalarType::Int);
  const uint8_t* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  int32_t* to = static_cast<int32_t*>(sums.mutable_data_ptr());
  parallel_tiles(0, g.tiles, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      cpu::sum_codes(g, activation_group, from, tile, to + tile * segments * cpu::kTile);
  });
  counter("code_sums/" + element) += 1;
  return sums;
}

}  // namespace compressed_linear
