// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>

#include "counters.h"
#include "cpu/int8_pack.h"
#include "cpu/repack.h"
#include "op_arguments.h"
#include "ops.h"

namespace compressed_linear {
namespace {

using cpu::CodeOrder;
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

CodeOrder parse_order(const char* op, const std::string& name) {
  if (name == "n_major") return CodeOrder::n_major;
  if (name == "k_words") return CodeOrder::k_words;
  if (name == "k_major") return CodeOrder::k_major;
  fail(op, "order is '", name, "', expected n_major, k_words or k_major");
}

void set_stored(cpu::CodeSource& source, const Tensor& stored) {
  const int64_t unit = stored.element_size();
  source.data = static_cast<const uint8_t*>(stored.const_data_ptr());
  source.bytes = stored.numel() * unit;
  source.row_bytes = stored.size(1) * unit;
  source.container_bits = static_cast<int>(8 * unit);
}

void check_stored(const char* op, const Tensor& stored) {
  check_plain(op, "stored", stored);
  switch (stored.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      break;
    default:
      fail(op, "stored is ", type_name(stored.scalar_type()),
           ", expected uint8, int8, int16, int32 or int64");
  }
  if (stored.dim() != 2) fail(op, "stored has shape ", shape_text(stored), ", expected two axes");
}

// Largest entry; fails on one below `least`.
int64_t check_positions(const char* op, const char* what, const Tensor& positions, int64_t least) {
  check_plain(op, what, positions);
  check_type(op, what, positions, ScalarType::Int);
  const int32_t* at = static_cast<const int32_t*>(positions.const_data_ptr());
  int64_t most = -1;
  for (int64_t i = 0; i < positions.numel(); ++i) {
    if (at[i] < least) fail(op, what, " holds ", at[i], ", expected ", least, " or more");
    most = std::max<int64_t>(most, at[i]);
  }
  return most;
}

// Every field that k_at and n_at name lies inside of `stored`.
void set_positions(const char* op, cpu::CodeSource& source, const Tensor& stored,
                   const Tensor& k_at, const std::optional<Tensor>& n_at) {
  const bool k_major = source.order == CodeOrder::k_major;
  if (k_at.dim() != (k_major ? 1 : 2) || (!k_major && k_at.size(0) != source.planes))
    fail(op, "k_at has shape ", shape_text(k_at), ", expected ",
         k_major ? "[k]" : "[one per width, k]");
  if (n_at.has_value() != k_major)
    fail(op, "n_at is ", k_major ? "missing" : "given", ", but order is ",
         k_major ? "k_major" : "not k_major");
  const int64_t last_k = check_positions(op, "k_at", k_at, INT32_MIN);
  source.k_at = static_cast<const int32_t*>(k_at.const_data_ptr());
  int64_t bits = source.row_bytes * 8;
  if (k_major) {
    check_shape<2>(op, "n_at", *n_at, {source.planes, source.rows});
    check_positions(op, "n_at", *n_at, 0);
    source.n_at = static_cast<const int32_t*>(n_at->const_data_ptr());
    if (last_k >= stored.size(0))
      fail(op, "k_at runs to row ", last_k, ", but stored has shape ", shape_text(stored));
  } else {
    const int64_t first_axis = source.order == CodeOrder::n_major ? 0 : 1;
    if (source.n_first + source.rows > stored.size(first_axis))
      fail(op, "output channels run to ", source.n_first + source.rows, ", but stored has shape ",
           shape_text(stored));
    if (first_axis == 1) {
      if (source.container_bits > 32)
        fail(op, "stored is int64, expected at most 32 bits for order k_words");
      bits = stored.size(0) * source.container_bits;
    }
  }
  const int32_t* at = k_major ? source.n_at : source.k_at;
  const int64_t count = k_major ? source.rows : k_at.size(1);
  for (int plane = 0; plane < source.planes; ++plane) {
    for (int64_t i = plane * count; i < (plane + 1) * count; ++i)
      if (at[i] >= 0 && at[i] + source.widths[plane] > bits)
        fail(op, k_major ? "n_at" : "k_at", " holds bit ", at[i], ", but stored has ", bits,
             " bits along that axis");
  }
}

// Checks where the rows go and packs them. `what` they come from is named where codes are wrong,
// which is only known when they have been packed.
void repack(const char* op, const char* what, cpu::Repack& job, int64_t packed_bytes) {
  const Geometry& g = job.geometry;
  check_row_range(op, job.row_begin, job.row_end(), g.n);
  if (job.row_end() == job.row_begin) return;
  if (job.row_begin == 0) cpu::advise_huge_pages(job.packed, packed_bytes);
  if (cpu::is_coded(g.element)) cpu::plan_fields(job);
  // Floats in groups that need filling up: nothing that a checkpoint has.
  const bool plain = !cpu::is_coded(g.element) && !g.identity();
  const cpu::RepackFunction function = plain ? &cpu::repack_plain : cpu::engine().repack;
  std::atomic<bool> good{true};
  parallel_tiles(job.tile_begin() / cpu::kStrip, (job.tile_end() + cpu::kStrip - 1) / cpu::kStrip,
                 [&](int64_t begin, int64_t end) {
                   if (!function(job, begin, end)) good = false;
                 });
  if (good) return;
  if (g.element.kind == Kind::integer)
    fail(op, what, " holds codes of more than ", g.element.bits, " bits");
  fail(op, what, " holds codes of infinity or NaN, expected finite numbers");
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
  cpu::CodeSource& source = job.source;
  source.order = parse_order(op, order);
  check_stored(op, stored);
  set_stored(source, stored);

  int64_t bits = 0;
  for (const int64_t width : widths) {
    if (width < 1 || width > 8) fail(op, "widths holds ", width, ", expected 1 to 8");
    bits += width;
    if (source.planes == cpu::kMaxPlanes) break;
    source.widths[source.planes++] = static_cast<int>(width);
  }
  if (bits != element.bits)
    fail(op, "widths add up to ", bits, " bits, expected ", element.bits, " for ", element_name);
  if (flip < 0 || flip >> bits != 0) fail(op, "flip is ", flip, ", expected ", bits, " bits");
  source.flip = static_cast<uint8_t>(flip);
  if (rows < 0 || blank < 0 || n_first < 0)
    fail(op, "rows, blank and n_first are ", rows, ", ", blank, " and ", n_first,
         ", expected 0 or more");
  source.rows = rows;
  source.blank = blank;
  if (blank_code < 0 || blank_code > 255 ||
      cpu::is_wrong(element, static_cast<uint8_t>(blank_code)))
    fail(op, "blank_code is ", blank_code, ", expected a code of ", element_name);
  source.blank_code = static_cast<uint8_t>(blank_code);
  source.n_first = n_first;
  set_positions(op, source, stored, k_at, n_at);
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
