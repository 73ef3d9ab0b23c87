// SPDX-License-Identifier: Apache-2.0
// A unit of work of TileEngine. Products become sums of segments in tile registers, are stored, and
// are scaled from there by the vector unit, two jobs behind, while the tiles multiply the next:
// register renaming and a window of hundreds of instructions overlap the two.
//
// A job has four tiles of sums: of one segment for two by two or one by four tiles of rows and
// channels, or, where segments are a single step, of four segments for one tile. The latter halves
// what the vector unit reads and writes: values of a group and totals stay in registers over four
// segments.
#pragma once

#include "ahead.h"
#include "tile_totals.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Quads that a tile register takes at once, so that every segment is a number of whole ones; 0
// where segments are too ragged. Beyond the last segment x is 0.
inline int64_t tile_quads(const Problem& p) {
  const Geometry& g = p.weight.geometry;
  int64_t ends = g.padded_k;  // the lowest bit tells by what power of two all are divisible
  for_each_segment(g, p.x.activation.group, [&](const IntegerSegment& s) { ends |= s.begin; });
  return ends % (kTileRows * kQuad) == 0 ? kTileRows : ends % kBlock == 0 ? kQuads : 0;
}

// kCentred: decoded codes have lost the middle, and are signed.
template <class Core, class Tiles, bool kCentred>
class TileUnit {
 public:
  using Call = IntegerCall<TilePanels>;

  TileUnit(const Call& call, int64_t quads, int64_t panels)
      : c_(call),
        step_(quads * kQuad),
        ahead_(block_decoder<Core, kCentred>(call.g.element.bits)),
        totals_(call, !kCentred || call.p.weight.code_sums != nullptr) {
    const int64_t slab_bytes = decodes() ? c_.cut.chunk * kStrip * kTile : 0;
    const int64_t numbers = panels * 2 * kStrip * kTileNumbers;
    carve_from(worker_arena(), [&](Carver& carver) {
      for (uint8_t*& slab : slabs_) slab = carver.take<uint8_t>(slab_bytes);
      sums_ = carver.take<int32_t>(kJobs * 4 * kTileNumbers);
      carried_ = carver.take<int32_t>(numbers);
      totals_.carve(carver, numbers, c_.cut.chunk / step_ + 1);
    });
    grid_.configure(TilePanels::kRows, step_);
  }

  // next: first tile of the strip that comes after this one, or the number of tiles
  void multiply(const UnitOfWork& unit, int64_t next) {
    unit_ = unit;
    tiles_ = c_.strip_tiles(unit.tile0);
    const int64_t row_tiles =
        2 * (unit.panel1 - 1 - unit.panel0) + c_.panels.row_tiles(unit.panel1 - 1);
    totals_.begin_unit(unit, row_tiles);
    c_.prefetch_scales(unit.tile0 + kStrip);
    for (int64_t c = 0; c < c_.cut.chunks && has_pieces(c); ++c) {
      begin_chunk(c, next, row_tiles);
      for (int64_t panel = unit.panel0; panel < unit.panel1; ++panel) multiply_panel(c, panel);
      while (pending_ > 0) finish();
      ahead_.finish();
    }
    for (int64_t panel = unit.panel0; panel < unit.panel1; ++panel) totals_.store(panel);
  }

 private:
  // That wait to be finished: what was just stored is not loaded at once.
  static constexpr int kJobs = 2;
  bool decodes() const { return c_.g.element.bits < 8; }
  int64_t row_stride() const { return tiles_ * kRowBytes; }
  // Behind the last segment there are none.
  bool has_pieces(int64_t c) const { return c_.chunk_pieces[c] != c_.chunk_pieces[c + 1]; }

  // function(row tile, column), constants all
  template <int kRowTiles, int kColumns, class Function>
  static void each(const Function& function) {
    const auto column = [&](auto j) {
      function(std::integral_constant<int, 0>(), j);
      if constexpr (kRowTiles > 1) function(std::integral_constant<int, 1>(), j);
    };
    column(std::integral_constant<int, 0>());
    if constexpr (kColumns > 1) column(std::integral_constant<int, 1>());
    if constexpr (kColumns > 2) column(std::integral_constant<int, 2>());
    if constexpr (kColumns > 3) column(std::integral_constant<int, 3>());
  }

  template <int C, int A, int B>
  static void dot() {
    if constexpr (kCentred) {
      Tiles::template dot_signed_bytes<C, A, B>();
    } else {
      Tiles::template dot_bytes<C, A, B>();
    }
  }

  // Weights of chunk c, and what comes after them while row_tiles tiles of rows meet them.
  void begin_chunk(int64_t c, int64_t next_tile0, int64_t row_tiles) {
    totals_.begin_chunk(c);
    const int64_t width = c_.chunk_width(c), products = row_tiles * tiles_ * (width / step_);
    chunk_begin_ = c * c_.cut.chunk;
    if (!decodes()) {
      weights_ = quads_of(c_.p.weight, unit_.tile0, chunk_begin_);
      const int64_t bytes = width / kQuad * row_stride();
      const bool alone = unit_.panel1 - unit_.panel0 == 1;
      ahead_.fetch(weights_ + (alone ? kNearBytes : bytes), bytes, products);
      return;
    }
    if (!decoded_) {  // nothing came before this
      decode(unit_.tile0, chunk_begin_, 1);
      ahead_.finish();
      decoded_ = true;
    }
    slab_ = 1 - slab_;
    weights_ = slabs_[slab_];
    const bool more = c + 1 < c_.cut.chunks && has_pieces(c + 1);
    decode(more ? unit_.tile0 : next_tile0, more ? chunk_begin_ + c_.cut.chunk : 0, products);
  }

  // Begins to decode the chunk that begins with channel k, if there is such a strip.
  void decode(int64_t tile0, int64_t k, int64_t products) {
    const bool is_there = tile0 < c_.g.tiles;
    const int64_t channels = is_there ? least(c_.g.padded_k - k, c_.cut.chunk) : 0;
    const auto middle = static_cast<uint32_t>(static_cast<int32_t>(c_.p.weight.middle));
    ahead_.decode(is_there ? quads_of(c_.p.weight, tile0, k) : nullptr, slabs_[1 - slab_],
                  c_.g.element.bits, middle * 0x01010101u, is_there ? c_.strip_tiles(tile0) : 0,
                  channels / kBlock, products);
  }

  void multiply_panel(int64_t c, int64_t panel) {
    const Piece* end = c_.pieces + c_.chunk_pieces[c + 1];
    for (const Piece* piece = c_.pieces + c_.chunk_pieces[c]; piece < end;) {
      const auto single = [&](int64_t i) {
        return piece + i < end && piece[i].first && piece[i].last &&
               piece[i].end - piece[i].begin == step_;
      };
      if (!single(0) || !single(1)) {
        multiply_segment(panel, *piece++);
      } else if (single(2) && single(3)) {
        multiply_steps<4>(panel, piece);
        piece += 4;
      } else {
        multiply_steps<2>(panel, piece);
        piece += 2;
      }
    }
  }

  void multiply_segment(int64_t panel, const Piece& piece) {
    if (c_.panels.row_tiles(panel) > 1) {
      int64_t t = 0;
      for (; t + 2 <= tiles_; t += 2) multiply_grid<2, 2>(panel, t, piece);
      if (t < tiles_) multiply_grid<2, 1>(panel, t, piece);
    } else if (tiles_ == kStrip) {
      multiply_grid<1, kStrip>(panel, 0, piece);
    } else {
      for (int64_t t = 0; t < tiles_; ++t) multiply_grid<1, 1>(panel, t, piece);
    }
  }

  const char* x_of(int64_t panel, int64_t k, int64_t stride) const {
    return reinterpret_cast<const char*>(c_.x + c_.panels.begin(panel) * (c_.g.padded_k / kQuad)) +
           k / step_ * stride;
  }
  const uint8_t* weights_of(int64_t k, int64_t column) const {
    return weights_ + (k - chunk_begin_) / kQuad * row_stride() + column * kRowBytes;
  }

  // step: bytes from row to row of x; stride: of the weights
  template <int kRowTiles, int kColumns>
  [[gnu::always_inline]] static void multiply_step(const char* x, int64_t step,
                                                   const uint8_t* weights, int64_t stride) {
    Tiles::template load<6>(weights, stride);
    Tiles::template load<4>(x, step);
    dot<0, 4, 6>();
    if constexpr (kRowTiles > 1) {
      Tiles::template load<5>(x + kTileRows * step, step);
      dot<kColumns, 5, 6>();
    }
    if constexpr (kColumns > 1) {
      Tiles::template load<7>(weights + kRowBytes, stride);
      dot<1, 4, 7>();
      if constexpr (kRowTiles > 1) dot<kColumns + 1, 5, 7>();
    }
    if constexpr (kColumns > 2) {
      static_assert(kRowTiles == 1 && kColumns == 4, "four tiles of sums");
      Tiles::template load<6>(weights + 2 * kRowBytes, stride);
      dot<2, 4, 6>();
      Tiles::template load<7>(weights + 3 * kRowBytes, stride);
      dot<3, 4, 7>();
    }
  }

  template <int kRowTiles, int kColumns>
  void multiply_grid(int64_t panel, int64_t column, const Piece& piece) {
    const int64_t x_stride = kRowTiles * kTileRows * step_, stride = row_stride();
    const char* x = x_of(panel, piece.begin, x_stride);
    const uint8_t* weights = weights_of(piece.begin, column);
    const auto carried = [&](auto i, auto j) {
      return carried_ + totals_.tile_at(panel, i, column + j);
    };
    each<kRowTiles, kColumns>([&](auto i, auto j) {
      constexpr int kSum = i * kColumns + j;
      if (piece.first) {
        Tiles::template zero<kSum>();
      } else {
        Tiles::template load<kSum>(carried(i, j), kTileRowBytes);
      }
    });
    ahead_.decode_share((piece.end - piece.begin) / step_ * kRowTiles * kColumns);
    // Nothing is stored while tiles are loaded: rows of a tile lie at many places of a page, and a
    // load waits for stores that seem to be to the same place.
    const int64_t step = step_, lines = ahead_.lines() * kRowTiles * kColumns;
    const uint8_t* fetch = ahead_.lines_from();
    for (int64_t left = piece.end - piece.begin; left > 0; left -= step) {
      multiply_step<kRowTiles, kColumns>(x, step, weights, stride);
      x += x_stride;
      weights += step / kQuad * stride;
      for (int64_t line = 0; line < lines; ++line, fetch += kRowBytes)
        __builtin_prefetch(fetch, 0, 2);
    }
    ahead_.fetched(fetch);
    int32_t* sums = nullptr;
    if (piece.last) sums = begin_job({panel, 0, column, kRowTiles, kColumns, 1, piece.segment});
    each<kRowTiles, kColumns>([&](auto i, auto j) {
      constexpr int kSum = i * kColumns + j;
      Tiles::template store<kSum>(piece.last ? sums + kSum * kTileNumbers : carried(i, j),
                                  kTileRowBytes);
    });
  }

  // Segments of one step each.
  template <int kSegments>
  void multiply_steps(int64_t panel, const Piece* pieces) {
    const int64_t stride = row_stride();
    for (int64_t i = 0; i < c_.panels.row_tiles(panel); ++i) {
      const int64_t x_stride = c_.panels.row_tiles(panel) * kTileRows * step_;
      const char* x = x_of(panel, pieces->begin, x_stride) + i * kTileRows * step_;
      for (int64_t column = 0; column < tiles_; ++column) {
        const uint8_t* weights = weights_of(pieces->begin, column);
        ahead_.decode_share(kSegments);
        ahead_.fetch_share(kSegments);
        each<1, kSegments>([&](auto, auto s) {
          constexpr int kX = 4 + s % 2, kWeights = 6 + s % 2;
          Tiles::template zero<s>();
          Tiles::template load<kX>(x + s * x_stride, step_);
          Tiles::template load<kWeights>(weights + s * (step_ / kQuad) * stride, stride);
          dot<s, kX, kWeights>();
        });
        int32_t* sums = begin_job({panel, i, column, 1, 1, kSegments, pieces->segment});
        each<1, kSegments>([&](auto, auto s) {
          Tiles::template store<s>(sums + s * kTileNumbers, kTileRowBytes);
        });
      }
    }
  }

  // Finishes an earlier job, and returns where this one puts its sums.
  int32_t* begin_job(const TileJob& job) {
    if (pending_ == kJobs) finish();
    const int at = (oldest_ + pending_++) % kJobs;
    jobs_[at] = job;
    return sums_of(at);
  }

  void finish() {
    totals_.add(jobs_[oldest_], sums_of(oldest_));
    oldest_ = (oldest_ + 1) % kJobs;
    --pending_;
  }

  int32_t* sums_of(int job) const { return sums_ + job * 4 * kTileNumbers; }

  const Call& c_;
  const int64_t step_;  // channels of a step
  Ahead ahead_;
  TileTotals<Core> totals_;
  TileGrid<Tiles> grid_;
  UnitOfWork unit_{};
  int64_t tiles_ = 0;                 // of the strip
  const uint8_t* weights_ = nullptr;  // of the chunk
  int64_t chunk_begin_ = 0;
  uint8_t* slabs_[2];
  int slab_ = 0;
  bool decoded_ = false;
  TileJob jobs_[kJobs]{};
  int oldest_ = 0, pending_ = 0;
  int32_t* sums_ = nullptr;     // of each job [tile][16][16]
  int32_t* carried_ = nullptr;  // [row tile][tile][16][16] of unfinished segments
};

}  // namespace
}  // namespace compressed_linear::cpu
