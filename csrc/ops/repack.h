// SPDX-License-Identifier: Apache-2.0
// What the ops that repack codes share: how they are told where a checkpoint's codes lie, and the
// loop over the thread pool. Included by the files of csrc/ops and
// csrc/cuda only.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "arguments.h"
#include "cpu/common/isa.h"
#include "cpu/repack/repack.h"

namespace compressed_linear {

using cpu::CodeOrder;

inline CodeOrder parse_order(const char* op, const std::string& name) {
  if (name == "n_major") return CodeOrder::n_major;
  if (name == "k_words") return CodeOrder::k_words;
  if (name == "k_major") return CodeOrder::k_major;
  fail(op, "order is '", name, "', expected n_major, k_words or k_major");
}

inline void set_stored(cpu::CodeSource& source, const Tensor& stored) {
  const int64_t unit = stored.element_size();
  source.data = static_cast<const uint8_t*>(stored.const_data_ptr());
  source.bytes = stored.numel() * unit;
  source.row_bytes = stored.size(1) * unit;
  source.container_bits = static_cast<int>(8 * unit);
}

inline void check_stored(const char* op, const Tensor& stored) {
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
inline int64_t check_positions(const char* op, const char* what, const Tensor& positions,
                               int64_t least) {
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

// Every field that k_at and n_at name is inside of `stored`.
inline void set_positions(const char* op, cpu::CodeSource& source, const Tensor& stored,
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

// The arguments of `repack_codes` that ops.cpp explains, into `source`. On whichever device
// `stored` is, the others are on the CPU.
inline void read_code_source(const char* op, cpu::CodeSource& source, const Tensor& stored,
                             const std::string& order, const Tensor& k_at,
                             const std::optional<Tensor>& n_at, const std::vector<int64_t>& widths,
                             int64_t flip, int64_t n_first, int64_t rows, int64_t blank,
                             int64_t blank_code, Element element, const std::string& element_name) {
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
  // Their sums, and with them every test of a range below, stay far from overflow.
  constexpr int64_t kMost = int64_t{1} << 48;
  if (rows < 0 || blank < 0 || n_first < 0 || rows > kMost || blank > kMost || n_first > kMost)
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
}

// Checks where the rows go and packs them. `what` they come from is named where codes are wrong,
// which is only known when they have been packed.
inline void repack(const char* op, const char* what, cpu::Repack& job, int64_t packed_bytes) {
  const Geometry& g = job.geometry;
  check_row_range(op, job.row_begin, job.row_end(), g.n);
  if (job.row_end() == job.row_begin) return;
  if (job.row_begin == 0) cpu::advise_huge_pages(job.packed, packed_bytes);
  if (cpu::is_coded(g.element)) cpu::plan_fields(job);
  // Floats in groups that need filling up: nothing that a checkpoint has.
  const bool plain = !cpu::is_coded(g.element) && !g.identity();
  cpu::RepackFunction* const function =
      plain ? &cpu::repack_plain : cpu::isa(cpu::Kernels::floats).repack;
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

}  // namespace compressed_linear
