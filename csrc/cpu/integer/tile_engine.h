// SPDX-License-Identifier: Apache-2.0
// The multiplication in tile registers. Rows of x form panels of up to two tiles,
// [step][row][quads] with a step of 16 quads, or of 8 where segments need it. A unit is a run of
// panels times a strip of weights. It walks K in chunks: while panel after panel meets one, the
// next is fetched from memory or, where codes are narrow, decoded.
#pragma once

#include "call.h"
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
  static Cut cut(const Problem& p, const TilePanels& panels, int64_t, int64_t) {
    const Geometry& g = p.weight.geometry;
    if (g.element.bits < 8) return {g, chunk_of(g, kDecodedChunk)};
    return {g, panels.count == 1 ? g.padded_k : chunk_of(g, kTileChunk)};
  }

  explicit TileEngine(const Call& call)
      : c_(call), quads_(tile_quads(call.p)), centred_(can_centre(call.p.weight)) {
    // Rows of x that stay in the second-level cache.
    const int64_t most = kPanelBytes / (TilePanels::kRows * c_.g.padded_k);
    panels_per_unit_ = most < 2 ? 2 : least(most, kMostPanels);
  }

  void run(const Parallel& parallel) {
    if (c_.panels.count == 1) {
      prepare(0, 1);
    } else {
      split<&TileEngine::prepare>(parallel, c_.panels.count);
    }
    split<&TileEngine::multiply>(parallel, panel_units() * c_.strips());
  }

 private:
  // Channels of a chunk: what is fetched ahead stays in the second-level cache, what is decoded
  // ahead in the first.
  static constexpr int64_t kTileChunk = 2048, kDecodedChunk = 128;
  static constexpr int64_t kPanelBytes = 1 << 20, kMostPanels = 8;

  template <void (TileEngine::*kWork)(int64_t, int64_t) const>
  void split(const Parallel& parallel, int64_t count) {
    parallel.run(
        count,
        [](void* engine, int64_t begin, int64_t end) {
          (static_cast<const TileEngine*>(engine)->*kWork)(begin, end);
        },
        this);
  }

  int64_t panel_units() const {
    return (c_.panels.count + panels_per_unit_ - 1) / panels_per_unit_;
  }

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

  void multiply(int64_t begin, int64_t end) const {
    centred_ ? multiply<true>(begin, end) : multiply<false>(begin, end);
  }
  template <bool kCentred>
  void multiply(int64_t begin, int64_t end) const {
    TileUnit<Core, Tiles, kCentred> unit(c_, quads_, least(panels_per_unit_, c_.panels.count));
    const auto of = [&](int64_t i) {
      const int64_t panel = i % panel_units() * panels_per_unit_;
      return UnitOfWork{panel, least(panel + panels_per_unit_, c_.panels.count),
                        i / panel_units() * kStrip};
    };
    for (int64_t i = begin; i < end; ++i)
      unit.multiply(of(i), i + 1 < end ? of(i + 1).tile0 : c_.g.tiles);
  }

  // Whether codes fit signed bytes without the middle.
  static bool can_centre(const Weight& w) {
    return w.geometry.element.bits < 8 && w.middle >= 0 && w.middle <= 128;
  }

  const Call c_;
  const int64_t quads_;  // of a step
  const bool centred_;   // decoded codes lose the middle
  int64_t panels_per_unit_;
};

}  // namespace
}  // namespace compressed_linear::cpu
