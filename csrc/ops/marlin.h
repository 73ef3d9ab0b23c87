// SPDX-License-Identifier: Apache-2.0
// What the ops of Marlin's layout check, on whichever device. Included by the files of csrc/ops
// and csrc/cuda only.
#pragma once

#include "arguments.h"
#include "cpu/repack/marlin_scales.h"
#include "cpu/repack/repack.h"

namespace compressed_linear {

using cpu::MarlinColumns;

inline void check_n(const char* op, int64_t n) {
  if (n % marlin::kTileN != 0) fail(op, "n is ", n, ", expected a multiple of ", marlin::kTileN);
}

// Of a weight that Marlin's order can hold.
inline Geometry marlin_geometry(const char* op, int64_t n, int64_t k, Element element,
                                const std::string& name) {
  if (!cpu::is_coded(element) || (element.bits != 4 && element.bits != 8))
    fail(op, "element is '", name, "', expected uint4, uint8, e4m3 or e5m2");
  const Geometry g = geometry_of(op, n, k, k, element);
  check_n(op, n);
  if (k % marlin::kStripK != 0) fail(op, "k is ", k, ", expected a multiple of ", marlin::kStripK);
  return g;
}

inline std::array<int64_t, 2> marlin_shape(const Geometry& g) {
  return {g.k / marlin::kStripK, marlin::strip_words(g.element.bits, g.n)};
}

// Shape and dtype of the codes in Marlin's order.
inline void check_marlin(const char* op, const Tensor& packed, const Geometry& g) {
  check_type(op, "packed", packed, ScalarType::Int);
  check_shape<2>(op, "packed", packed, marlin_shape(g));
}

inline MarlinColumns parse_columns(const char* op, const std::string& name) {
  if (name == "grouped") return MarlinColumns::grouped;
  if (name == "channel") return MarlinColumns::channel;
  if (name == "byte") return MarlinColumns::byte;
  fail(op, "columns is '", name, "', expected grouped, channel or byte");
}

// Values [N, G] in any strides.
inline cpu::MarlinValues values_of(const char* op, const char* what, const Tensor& values) {
  if (values.dim() != 2)
    fail(op, what, " has shape ", shape_text(values), ", expected [n, groups]");
  check_n(op, values.size(0));
  return {static_cast<const uint8_t*>(values.const_data_ptr()),
          static_cast<int64_t>(values.element_size()),
          values.size(0),
          values.size(1),
          values.stride(0),
          values.stride(1)};
}

// What scales have to be for `columns`.
inline void check_scale(const char* op, const Tensor& scale, MarlinColumns columns) {
  const size_t bytes = scale.element_size();
  if (bytes > 4)
    fail(op, "scale is ", type_name(scale.scalar_type()), ", expected a dtype of up to 32 bits");
  if (columns == MarlinColumns::byte && bytes != 1)
    fail(op, "scale is ", type_name(scale.scalar_type()), ", expected one byte for columns byte");
}

inline void check_zero(const char* op, const Tensor& zero, int64_t bits) {
  if (bits != 4 && bits != 8) fail(op, "bits is ", bits, ", expected 4 or 8");
  check_type(op, "zero", zero, ScalarType::Byte);
}

}  // namespace compressed_linear
