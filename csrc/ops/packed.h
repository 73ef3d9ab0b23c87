// SPDX-License-Identifier: Apache-2.0
// Names, sizes and dtypes of packed weights, by layout. Included by the files of csrc/ops
// and csrc/cuda only.
#pragma once

#include "layouts/quads.h"
#include "marlin.h"

namespace compressed_linear {

using cpu::PackedLayout;

inline PackedLayout parse_layout(const char* op, const std::string& name) {
  if (name == "planes") return PackedLayout::planes;
  if (name == "quads") return PackedLayout::quads;
  if (name == "marlin") return PackedLayout::marlin;
  fail(op, "layout is '", name, "', expected planes, quads or marlin");
}

inline const char* layout_name(PackedLayout layout) {
  return layout == PackedLayout::planes  ? "planes"
         : layout == PackedLayout::quads ? "quads"
                                         : "marlin";
}

// Fails for elements and sizes that the layout cannot hold.
inline Geometry geometry_in(const char* op, PackedLayout layout, int64_t n, int64_t k,
                            int64_t group_size, const std::string& name) {
  const Element element = parse_element(op, name);
  if (layout == PackedLayout::marlin) {
    const Geometry g = marlin_geometry(op, n, k, element, name);
    if (group_size != k)
      fail(op, "group_size is ", group_size, ", expected k = ", k,
           ": Marlin's order has no groups");
    return g;
  }
  const Geometry g = geometry_of(op, n, k, group_size, element);
  if (layout == PackedLayout::planes) return g;
  if (element.kind != Kind::integer) fail(op, "element is '", name, "', expected uint1 to uint8");
  return cpu::make_quads_geometry(n, k, group_size, element.bits);
}

inline std::array<int64_t, 2> packed_shape_in(PackedLayout layout, const Geometry& g) {
  if (layout == PackedLayout::marlin) return marlin_shape(g);
  return {g.tiles, g.tile_bytes()};
}

inline void check_packed(const char* op, PackedLayout layout, const Tensor& packed,
                         const Geometry& g) {
  check_plain(op, "packed", packed);
  check_type(op, "packed", packed,
             layout == PackedLayout::marlin ? ScalarType::Int : ScalarType::Byte);
  check_shape<2>(op, "packed", packed, packed_shape_in(layout, g));
}

}  // namespace compressed_linear
