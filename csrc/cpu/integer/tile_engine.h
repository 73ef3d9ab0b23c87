// SPDX-License-Identifier: Apache-2.0
// The multiplication in tile registers. Rows of x form panels of up to two tiles,
// [step][row][quads] with a step of 16 quads, or of 8 where segments need it. A unit is a run of
// panels times a strip of weights. It walks K in chunks: while panel after panel meets one, the
// next is fetched from memory or, where codes are narrow, decoded.
#pragma once

#include "call.h"
#include "cpu/common/schedule.h"
#include "tile_unit.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

template <class Core, class Tiles>
class TileEngine {
 public:
  using Call = IntegerCall<TilePanels>;
  static constexpr int64_t kLeastRows = TilePanels::kRows;
  static TilePanels panels(int64_t rows) { return TilePanels(rows); }
  static int64_t padded(int64_t rows) { return round_up(rows, kTileRows); }
  static Cut cut(const Problem& p, const TilePanels& panels) {
    const Geometry& g = p.weight.geometry;
    if (g.element.bits < 8) return {g, chunk_of(g, kDecodedChunk)};
    return {g, panels.count == 1 ? g.padded_k : chunk_of(g, kTileChunk)};
  }

  TileEngine(const Call& call, int64_t threads)
      : kept(work_of(call), 0, threads),
        c_(call),
        quads_(tile_quads(call.p)),
        centred_(can_centre(call.p.weight)) {}

  void run(const Parallel& parallel) { run_call(parallel, c_.panels.count, *this); }

  void prepare(int64_t panel_begin, int64_t panel_end) const {
    const int64_t bytes = quads_ * kQuad, padded_k = c_.g.padded_k;
    c_.template prepare<Core>(
        panel_begin, panel_end, centred_,
        [bytes, padded_k](const int8_t* q, int64_t r, int64_t rows, int32_t* x) {
          const int64_t stride = round_up(rows, kTileRows) * bytes;
          auto* to = reinterpret_cast<int8_t*>(x) + r * bytes;
          for (int64_t k = 0; k < padded_k; k += bytes, to += stride)
            for (int64_t i = 0; i < bytes; i += kQuads * kQuad)
              std::memcpy(to + i, q + k + i, kQuads * kQuad);
        });
  }

  void multiply(Worker& worker) const {
    centred_ ? multiply<true>(worker) : multiply<false>(worker);
  }

  const Kept<int32_t> kept;

 private:
  // Channels of a chunk: what is fetched ahead stays in the second-level cache, what is decoded
  // ahead in the first.
  static constexpr int64_t kTileChunk = 2048, kDecodedChunk = 128;
  static constexpr int64_t kPanelBytes = 1 << 20, kMostPanels = 8;

  static WorkShape work_of(const Call& call) {
    const TilePanels& panels = call.panels;
    const int64_t last = panels.row_tiles(panels.count - 1);
    return {call.g.tiles,
            call.g.tile_bytes(),
            kStrip,
            panels.count,
            panels.count - 1,
            TilePanels::kRows + kDecodingRows,
            last * kTileRows + kDecodingRows};
  }

  template <bool kCentred>
  void multiply(Worker& worker) const {
    // Rows of x that stay in the second-level cache.
    const int64_t panels =
        least(greatest(least(kPanelBytes / (TilePanels::kRows * c_.g.padded_k), kMostPanels), 2),
              c_.panels.count);
    TileUnit<Core, Tiles, kCentred> unit(c_, quads_, panels);
    // One behind, since what comes next is decoded meanwhile.
    UnitOfWork held = {0, 0, 0};
    kept.multiply(
        worker, panels,
        [&](const WorkPart& part, int32_t*) {
          if (held.panel1 > 0) unit.multiply(held, part.tile0);
          held = {part.panel0, part.panel1, part.tile0};
        },
        [](const WorkPart&, const int32_t*) {});
    if (held.panel1 > 0) unit.multiply(held, c_.g.tiles);
  }

  // Whether codes fit signed bytes without the middle.
  static bool can_centre(const Weight& w) {
    return w.geometry.element.bits < 8 && w.middle >= 0 && w.middle <= 128;
  }

  const Call c_;
  const int64_t quads_;  // of a step
  const bool centred_;   // decoded codes lose the middle
};

}  // namespace
}  // namespace compressed_linear::cpu
