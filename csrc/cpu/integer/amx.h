// SPDX-License-Identifier: Apache-2.0
// AMX for integer activations. The rows of the packed layout, once decoded to bytes, are just what
// a tile register of weights takes: a row for each quad, [channel][k]. The integers are those of
// every other engine, so what tiles do not suit goes to AVX-512. Tiles is one of amx_tiles.h.
// Included by units compiled for AVX-512 F and BW only.
#pragma once

#include "avx512.h"
#include "cpu/common/isa.h"
#include "tile_engine.h"

namespace compressed_linear::cpu {

LinearFunction integer_avx512vnni;

namespace {  // see layouts/planes.h

// Rows up to which AVX-512 is faster: it decodes narrow codes on the way, tiles want them stored.
constexpr int64_t kRegisterRows = Avx512Core::kRows, kNarrowRows = 4 * kRegisterRows;

template <class Tiles>
void integer_linear_in_tiles(const Problem& p, const Parallel& parallel) {
  const Geometry& g = p.weight.geometry;
  // With fewer strips than threads few rows are better cut along K.
  const bool few_strips = (g.tiles + kStrip - 1) / kStrip < parallel.threads;
  const int64_t few = g.element.bits < 8 ? kNarrowRows : kRegisterRows;
  if (p.x.m <= (few_strips ? TilePanels::kRows : few) || tile_quads(p) == 0) {
    integer_avx512vnni(p, parallel);
  } else {
    run_integer_linear<TileEngine<Avx512Core, Tiles>>(p, parallel);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
