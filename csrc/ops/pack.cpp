// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "counters.h"
#include "cpu/repack/quads.h"
#include "ops.h"
#include "repack.h"

namespace compressed_linear {
namespace {

using cpu::PackedLayout;

Element element_in(const char* op, PackedLayout layout, const std::string& name) {
  if (layout == PackedLayout::quads) return {Kind::integer, code_bits(op, name)};
  return parse_element(op, name);
}

Geometry geometry_in(const char* op, PackedLayout layout, int64_t n, int64_t k, int64_t group_size,
                     Element element) {
  if (layout == PackedLayout::quads) return quads_of(op, n, k, group_size, element.bits);
  return geometry_of(op, n, k, group_size, element);
}

void pack_rows_in(const char* op, PackedLayout layout, Tensor& packed, const Tensor& rows,
                  int64_t row_start, int64_t n, int64_t group_size,
                  const std::string& element_name) {
  const Element element = element_in(op, layout, element_name);
  check_plain(op, "rows", rows);
  check_type(op, "rows", rows, row_type(element));
  if (rows.dim() != 2) fail(op, "rows has shape ", shape_text(rows), ", expected [rows, k]");
  const Geometry g = geometry_in(op, layout, n, rows.size(1), group_size, element);
  check_packed(op, packed, g);
  cpu::Repack job = cpu::from_rows(g, layout, rows.const_data_ptr(), rows.size(0), row_start,
                                   static_cast<uint8_t*>(packed.mutable_data_ptr()));
  repack(op, "rows", job, packed.numel());
  counter(std::string(op) + "/" + element_name) += 1;
}

void repack_codes_in(const char* op, PackedLayout layout, Tensor& packed, const Tensor& stored,
                     const std::string& order, const Tensor& k_at,
                     const std::optional<Tensor>& n_at, const std::vector<int64_t>& widths,
                     int64_t flip, int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                     int64_t row_start, int64_t n, int64_t group_size,
                     const std::string& element_name) {
  const Element element = element_in(op, layout, element_name);
  if (!cpu::is_coded(element)) fail(op, "element is '", element_name, "', expected codes");
  cpu::Repack job{};
  check_plain(op, "stored", stored);
  read_code_source(op, job.source, stored, order, k_at, n_at, widths, flip, n_first, rows, blank,
                   blank_code, element, element_name);
  job.geometry = geometry_in(op, layout, n, k_at.size(k_at.dim() - 1), group_size, element);
  job.layout = layout;
  check_packed(op, packed, job.geometry);
  job.row_begin = row_start;
  job.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  repack(op, "stored", job, packed.numel());
  counter(std::string(op) + "/" + cpu::engine().isa + "/" + element_name) += 1;
}

}  // namespace

int64_t packed_tile_bytes(int64_t k, int64_t group_size, std::string element) {
  constexpr const char* op = "packed_tile_bytes";
  return geometry_of(op, 0, k, group_size, parse_element(op, element)).tile_bytes();
}

int64_t packed_tile_bytes_int8(int64_t k, int64_t group_size, std::string element) {
  constexpr const char* op = "packed_tile_bytes_int8";
  return quads_of(op, 0, k, group_size, code_bits(op, element)).tile_bytes();
}

void place(Tensor packed) {
  constexpr const char* op = "place";
  check_plain(op, "packed", packed);
  if (packed.dim() < 1) fail(op, "packed has shape [], expected [tiles, ...]");
  const int64_t tiles = packed.size(0);
  if (packed.numel() == 0) return;
  const int64_t bytes = packed.numel() * packed.element_size();
  const int64_t strip_bytes = bytes / tiles * cpu::kStrip;
  uint8_t* memory = static_cast<uint8_t*>(packed.mutable_data_ptr());
  cpu::advise_huge_pages(memory, bytes);
  parallel_tiles(0, (tiles + cpu::kStrip - 1) / cpu::kStrip, [&](int64_t begin, int64_t end) {
    cpu::touch_pages(memory, begin * strip_bytes, std::min(end * strip_bytes, bytes));
  });
}

void pack_rows(Tensor packed, Tensor rows, int64_t row_start, int64_t n, int64_t group_size,
               std::string element) {
  pack_rows_in("pack_rows", PackedLayout::planes, packed, rows, row_start, n, group_size, element);
}

void repack_codes(Tensor packed, Tensor stored, std::string order, Tensor k_at,
                  std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                  int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                  int64_t row_start, int64_t n, int64_t group_size, std::string element) {
  repack_codes_in("repack_codes", PackedLayout::planes, packed, stored, order, k_at, n_at, widths,
                  flip, n_first, rows, blank, blank_code, row_start, n, group_size, element);
}

void pack_rows_int8(Tensor packed, Tensor rows, int64_t row_start, int64_t n, int64_t group_size,
                    std::string element) {
  pack_rows_in("pack_rows_int8", PackedLayout::quads, packed, rows, row_start, n, group_size,
               element);
}

void repack_codes_int8(Tensor packed, Tensor stored, std::string order, Tensor k_at,
                       std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                       int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                       int64_t row_start, int64_t n, int64_t group_size, std::string element) {
  repack_codes_in("repack_codes_int8", PackedLayout::quads, packed, stored, order, k_at, n_at,
                  widths, flip, n_first, rows, blank, blank_code, row_start, n, group_size,
                  element);
}

Tensor unpack_rows(Tensor packed, int64_t n, int64_t k, int64_t group_size,
                   std::string element_name) {
  constexpr const char* op = "unpack_rows";
  const Element element = parse_element(op, element_name);
  const Geometry g = geometry_of(op, n, k, group_size, element);
  check_packed(op, packed, g);
  const std::array<int64_t, 2> shape = {n, k};
  Tensor rows = torch::stable::new_empty(packed, {shape.data(), 2}, row_type(element));
  const uint8_t* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* to = rows.mutable_data_ptr();
  parallel_tiles(0, g.tiles,
                 [&](int64_t begin, int64_t end) { cpu::unpack_tiles(g, from, begin, end, to); });
  counter("unpack_rows/" + element_name) += 1;
  return rows;
}

Tensor unpack_rows_int8(Tensor packed, int64_t n, int64_t k, int64_t group_size,
                        std::string element) {
  constexpr const char* op = "unpack_rows_int8";
  const Geometry g = quads_of(op, n, k, group_size, code_bits(op, element));
  check_packed(op, packed, g);
  const std::array<int64_t, 2> shape = {n, k};
  Tensor rows = torch::stable::new_empty(packed, {shape.data(), 2}, ScalarType::Byte);
  const uint8_t* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(rows.mutable_data_ptr());
  parallel_tiles(0, g.tiles,
                 [&](int64_t begin, int64_t end) { cpu::unpack_quads(g, from, begin, end, to); });
  counter("unpack_rows_int8/" + element) += 1;
  return rows;
}

}  // namespace compressed_linear
