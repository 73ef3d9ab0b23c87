// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "counters.h"
#include "cpu/pack.h"
#include "op_arguments.h"
#include "ops.h"

namespace compressed_linear {

int64_t packed_tile_bytes(int64_t k, int64_t group_size, std::string element) {
  constexpr const char* op = "packed_tile_bytes";
  return geometry_of(op, 0, k, group_size, parse_element(op, element)).tile_bytes();
}

void pack_rows(Tensor packed, Tensor rows, int64_t row_start, int64_t n, int64_t group_size,
               std::string element_name) {
  constexpr const char* op = "pack_rows";
  const Element element = parse_element(op, element_name);
  check_plain(op, "rows", rows);
  check_type(op, "rows", rows, row_type(element));
  if (rows.dim() != 2) fail(op, "rows has shape ", shape_text(rows), ", expected [rows, k]");
  const Geometry g = geometry_of(op, n, rows.size(1), group_size, element);
  check_packed(op, packed, g);
  const int64_t row_end = row_start + rows.size(0);
  if (row_start < 0 || row_start % cpu::kTile != 0)
    fail(op, "row_start is ", row_start, ", expected a multiple of ", cpu::kTile);
  if (row_end > n || (row_end % cpu::kTile != 0 && row_end != n))
    fail(op, "rows end at ", row_end, ", expected a multiple of ", cpu::kTile, " or n = ", n);
  if (element.kind == Kind::integer && element.bits < 8) {
    const uint8_t* codes = static_cast<const uint8_t*>(rows.const_data_ptr());
    uint8_t seen = 0;
    for (int64_t i = 0; i < rows.numel(); ++i) seen |= codes[i];
    if (seen >> element.bits) fail(op, "rows holds codes of more than ", element.bits, " bits");
  }
  if (element.kind == Kind::e4m3 || element.kind == Kind::e5m2) {
    // The kernels know no infinities and no NaN among weights.
    const uint8_t* codes = static_cast<const uint8_t*>(rows.const_data_ptr());
    const uint8_t first = element.kind == Kind::e4m3 ? 0x7f : 0x7c;
    uint8_t largest = 0;
    for (int64_t i = 0; i < rows.numel(); ++i)
      largest = std::max<uint8_t>(largest, codes[i] & 0x7fu);
    if (largest >= first)
      fail(op, "rows holds codes of infinity or NaN, expected finite ", element_name, " numbers");
  }
  const void* from = rows.const_data_ptr();
  uint8_t* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  if (row_start == 0) cpu::advise_huge_pages(to, packed.numel());
  const int64_t tile_begin = row_start / cpu::kTile;
  const int64_t tile_end = (row_end + cpu::kTile - 1) / cpu::kTile;
  parallel_tiles(tile_begin, tile_end, [&](int64_t begin, int64_t end) {
    cpu::pack_tiles(g, from, row_start, row_end, begin, end, to);
  });
  counter("pack_rows/" + element_name) += 1;
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

}  // namespace compressed_linear
