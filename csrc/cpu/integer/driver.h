// SPDX-License-Identifier: Apache-2.0
// The blocked multiplication that the vector engines for integer activations share. A Core supplies
// the registers:
//
//   Reg, Float                 kLanes 32-bit integers or floats; kVectors of them make a row of a
//                              tile
//   kRows, tiles(rows)         the register block: rows of x by tiles, which divide a strip
//   Activation<Narrow>, broadcast<Narrow>, dot<Narrow>
//                              four bytes of x for every lane, and the dot product of four unsigned
//                              codes with them; Narrow: the codes have at most seven bits
//   kTellNarrow                whether that makes a difference
//   quantize                   what quantize_values does
//   and the arithmetic of whole registers
//
// The work: rows of x are quantized into panels of at most kRows interleaved rows. A unit is a run
// of panels times one strip of four tiles. It walks K in chunks; weights of a chunk are read by
// panel after panel, either as they are packed or, for many panels, decoded to bytes once.
//
// For few rows and fewer strips than threads a unit is one chunk of a strip instead. Each of its
// pieces then leaves its integers in a place of its own, and when all are there they are added and
// go on as above, so that this changes no result either.
//
// While a chunk is worked on, the next one is fetched into the cache, a share for every panel:
// otherwise its first panel waits for memory and the others leave memory idle.
#pragma once

#include "cpu/common/panels.h"
#include "kernel.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kIntegerChunk = 2048;  // input channels of a strip that panels read in turn
// Panels beyond which narrow codes are decoded to bytes first.
constexpr int64_t kDirectPanels = 3;
// How far ahead a panel that is alone fetches codes of so many bits. On Zen 4 what is tiles'
// distance (kNearBytes) made one row of 4 or 8 bits a quarter slower.
constexpr int64_t ahead_bytes(int bits) { return bits == 8 ? 2048 : bits > 2 ? 1024 : 8192; }
constexpr int64_t kLeastIntegerPartBytes = 16 << 10;  // weights of a strip worth a thread's while
constexpr int64_t kKeptBytes = 4 << 20;               // integers of pieces kept at once

// Parts of K of every strip: more than one where there are fewer strips than threads. With as many,
// a second round of threads costs more than the evener parts gain.
inline int64_t integer_k_parts(const Geometry& g, int64_t rows, int64_t segments, int64_t threads) {
  const int64_t strips = (g.tiles + kStrip - 1) / kStrip;
  if (strips == 0 || strips >= threads) return 1;
  int64_t parts = (2 * threads + strips - 1) / strips;
  const int64_t most = kStrip * g.tile_bytes() / kLeastIntegerPartBytes;
  parts = least(least(parts, most), g.padded_k / kBlock);
  if (strips * rows * (segments + parts) * kStrip * kTile * 4 > kKeptBytes) return 1;
  return parts > 1 ? parts : 1;
}

template <class Core>
class VectorEngine {
 public:
  using Call = IntegerCall<Panels>;
  static constexpr int64_t kLeastRows = Core::kRows;
  static Panels panels(int64_t rows) { return {rows, Core::kRows}; }
  static int64_t padded(int64_t rows) { return rows; }
  static Cut cut(const Problem& p, const Panels& panels, int64_t segments, int64_t threads) {
    const Geometry& g = p.weight.geometry;
    if (panels.count > 1) return {g, chunk_of(g, kIntegerChunk)};
    const int64_t parts = integer_k_parts(g, panels.rows(0), segments, threads);
    if (parts == 1) return {g, g.padded_k};
    return {g, round_up((g.padded_k + parts - 1) / parts, kBlock), true};
  }

  explicit VectorEngine(const Call& call)
      : c_(call), direct_(call.whole && call.panels.count <= kDirectPanels) {}

  void run(const Parallel& parallel) {
    while (panels_per_unit_ > 8 && panel_units() * c_.strips() < 4 * parallel.threads)
      panels_per_unit_ /= 2;
    if (c_.panels.count == 1) {
      prepare(0, 1);
    } else {
      split<&VectorEngine::prepare>(parallel, c_.panels.count);
    }
    if (!c_.cut.kept) {
      split<&VectorEngine::multiply_units>(parallel, panel_units() * c_.strips());
    } else {
      split<&VectorEngine::multiply_chunks>(parallel, c_.strips() * c_.cut.chunks);
      split<&VectorEngine::finish_strips>(parallel, c_.strips());
    }
  }

 private:
  template <void (VectorEngine::*kWork)(int64_t, int64_t) const>
  void split(const Parallel& parallel, int64_t count) {
    parallel.run(
        count,
        [](void* engine, int64_t begin, int64_t end) {
          (static_cast<const VectorEngine*>(engine)->*kWork)(begin, end);
        },
        this);
  }

  // Codes of a strip of so many tiles are decoded to bytes before they are multiplied.
  bool decodes(int64_t tiles) const {
    return c_.g.element.bits < 8 && (!direct_ || tiles < kStrip);
  }
  int64_t panel_units() const {
    return (c_.panels.count + panels_per_unit_ - 1) / panels_per_unit_;
  }

  void prepare(int64_t panel_begin, int64_t panel_end) const {
    const int64_t quads = c_.g.padded_k / kQuad;
    c_.template prepare<Core>(panel_begin, panel_end, false,
                              [quads](const int8_t* q, int64_t r, int64_t rows, int32_t* x) {
                                for (int64_t i = 0; i < quads; ++i)
                                  std::memcpy(x + i * rows + r, q + i * kQuad, kQuad);
                              });
  }

  void multiply_units(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t panel0 = unit % panel_units() * panels_per_unit_;
      const int64_t panel1 = least(panel0 + panels_per_unit_, c_.panels.count);
      multiply(panel0, panel1, unit / panel_units() * kStrip);
    }
  }

  // Panels [panel0, panel1) times the strip that begins with tile0.
  void multiply(int64_t panel0, int64_t panel1, int64_t tile0) const {
    const int64_t tiles = c_.strip_tiles(tile0);
    const int64_t row_begin = c_.panels.begin(panel0);
    const int64_t rows = c_.panels.begin(panel1) - row_begin;
    const int bits = c_.g.element.bits;
    const bool decode = decodes(tiles);
    const int64_t slab_bytes = decode ? round_up(c_.cut.chunk, kBlock) * kStrip * kTile : 0;
    const int64_t total_floats = rows * tiles * kTile;
    uint8_t* slab = nullptr;
    float *totals = nullptr, *grouped = nullptr;
    int32_t* partial = nullptr;
    carve_from(worker_arena(), [&](Carver& carver) {
      slab = carver.take<uint8_t>(slab_bytes);
      totals = carver.take<float>(total_floats);
      grouped = carver.take<float>(total_floats);
      partial = carver.take<int32_t>(total_floats);
    });
    std::memset(totals, 0, static_cast<size_t>(total_floats) * sizeof(float));

    c_.prefetch_scales(tile0 + kStrip);
    KernelArgs args = first_args();
    for (int64_t c = 0; c < c_.cut.chunks; ++c) {
      const int64_t k0 = c * c_.cut.chunk, width = c_.chunk_width(c);
      args.pieces = c_.pieces + c_.chunk_pieces[c];
      args.piece_count = c_.chunk_pieces[c + 1] - c_.chunk_pieces[c];
      if (args.piece_count == 0) continue;
      args.chunk_begin = k0;
      const uint8_t* packed = quads_of(c_.p.weight, tile0, k0);
      if (decode) decode_strip<Core>(bits, packed, tiles, width / kBlock, slab);
      const uint8_t* weights = decode ? slab : packed;
      const int stored_bits = decode ? 8 : bits;
      args.row_stride = tiles * kRowBytes;
      args.block_stride = stored_bits * args.row_stride;
      const int64_t packed_bytes = width / kBlock * bits * args.row_stride;
      const int64_t ahead = panel1 - panel0 == 1 ? ahead_bytes(bits) : packed_bytes;
      args.fetch_end = packed + ahead + packed_bytes;
      args.fetch_every = panel1 - panel0;
      for (int64_t panel = panel0; panel < panel1; ++panel) {
        const int64_t begin = c_.panels.begin(panel), height = c_.panels.rows(panel);
        set_panel(args, panel);
        const int64_t step = Core::tiles(static_cast<int>(height));
        for (int64_t t = 0; t < tiles; t += step) {
          const int64_t wide = least(tiles - t, step);
          // Blocks of [row][tile] sums, one for each kernel.
          const int64_t at = ((begin - row_begin) * tiles + t * height) * kTile;
          set_tile(args, weights, tile0, t);
          args.fetch_first = t == 0 ? panel - panel0 : -1;
          args.fetch = packed + ahead + (panel - panel0) * stored_bits * kStrip * kRowBytes;
          args.partial = partial + at;
          args.grouped = grouped + at;
          args.totals = totals + at;
          kernel_for<Core>(stored_bits, bits < 8, height, wide)(args);
        }
      }
    }
    for (int64_t panel = panel0; panel < panel1; ++panel)
      store(panel, row_begin, tile0, tiles, totals);
  }

  KernelArgs first_args() const {
    KernelArgs args{};
    args.segments = c_.segments;
    args.segment_count = c_.segment_count;
    args.problem = &c_.p;
    return args;
  }

  void set_panel(KernelArgs& args, int64_t panel) const {
    const int64_t begin = c_.panels.begin(panel);
    args.x = c_.x + begin * (c_.g.padded_k / kQuad);
    args.start = c_.start + begin * c_.segment_count;
    args.group_sums = c_.offset ? c_.group_sums + begin * c_.g.groups : nullptr;
    args.zero_x = c_.zero_x + begin * c_.x_group_count;
    args.scale_x = c_.per_row ? nullptr : c_.scale_x + begin * c_.x_group_count;
  }

  // t: tile of the strip, whose weights begin at `weights`
  void set_tile(KernelArgs& args, const uint8_t* weights, int64_t tile0, int64_t t) const {
    const Weight& w = c_.p.weight;
    args.weights = weights + t * kRowBytes;
    args.tile = tile0 + t;
    args.scale_first = w.scale.at(tile0 + t, 0);
    args.zero_first = w.zero.at(tile0 + t, 0);
    args.code_sums =
        w.code_sums == nullptr ? nullptr : w.code_sums + (tile0 + t) * c_.segment_count * kTile;
  }

  // Sums of a piece, blocks of [row][tile][16] as in partial; there is one panel.
  int32_t* kept_of(int64_t tile0, int64_t piece) const {
    return c_.kept + (tile0 / kStrip * c_.chunk_pieces[c_.cut.chunks] + piece) * kept_lanes();
  }
  int64_t kept_lanes() const { return c_.panels.rows(0) * kStrip * kTile; }

  // Units count the chunks of each strip.
  void multiply_chunks(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit)
      multiply_chunk(unit / c_.cut.chunks * kStrip, unit % c_.cut.chunks);
  }

  void multiply_chunk(int64_t tile0, int64_t c) const {
    const int64_t tiles = c_.strip_tiles(tile0), chunk = c_.cut.chunk;
    const int64_t height = c_.panels.rows(0), step = Core::tiles(static_cast<int>(height));
    const int bits = c_.g.element.bits;
    const uint8_t* weights = quads_of(c_.p.weight, tile0, c * chunk);
    const bool decode = decodes(tiles);
    if (decode) {
      uint8_t* slab = static_cast<uint8_t*>(
          worker_arena().reserve(static_cast<size_t>(round_up(chunk, kBlock) * kStrip * kTile)));
      decode_strip<Core>(bits, weights, tiles, c_.chunk_width(c) / kBlock, slab);
      weights = slab;
    }
    const int stored_bits = decode ? 8 : bits;
    KernelArgs args = first_args();
    args.row_stride = tiles * kRowBytes;
    args.block_stride = stored_bits * args.row_stride;
    args.chunk_begin = c * chunk;
    args.piece_count = 1;
    args.fetch_first = -1;
    set_panel(args, 0);
    for (int64_t i = c_.chunk_pieces[c]; i < c_.chunk_pieces[c + 1]; ++i) {
      Piece piece = c_.pieces[i];
      piece.last = false;
      args.pieces = &piece;
      int32_t* sums = kept_of(tile0, i);
      if (!piece.first) std::memset(sums, 0, static_cast<size_t>(kept_lanes()) * sizeof(int32_t));
      for (int64_t t = 0; t < tiles; t += step) {
        set_tile(args, weights, tile0, t);
        args.partial = sums + t * height * kTile;
        kernel_for<Core>(stored_bits, bits < 8, height, least(tiles - t, step))(args);
      }
    }
  }

  void finish_strips(int64_t begin, int64_t end) const {
    for (int64_t strip = begin; strip < end; ++strip) finish_strip(strip * kStrip);
  }

  // Adds what the chunks of a strip left, and finishes its segments in order.
  void finish_strip(int64_t tile0) const {
    const int64_t tiles = c_.strip_tiles(tile0);
    const int64_t height = c_.panels.rows(0), step = Core::tiles(static_cast<int>(height));
    float* totals = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(2 * kept_lanes()) * sizeof(float)));
    std::memset(totals, 0, static_cast<size_t>(kept_lanes()) * sizeof(float));
    const int stored_bits = decodes(tiles) ? 8 : c_.g.element.bits;
    KernelArgs args = first_args();
    args.piece_count = 1;
    args.fetch_first = -1;
    set_panel(args, 0);
    int32_t* sums = nullptr;
    for (int64_t i = 0; i < c_.chunk_pieces[c_.cut.chunks]; ++i) {
      const Piece& piece = c_.pieces[i];
      const int32_t* part = kept_of(tile0, i);
      if (piece.first) {
        sums = kept_of(tile0, i);
      } else {
        for (int64_t lane = 0; lane < height * tiles * kTile; ++lane)
          sums[lane] = static_cast<int32_t>(static_cast<uint32_t>(sums[lane]) +
                                            static_cast<uint32_t>(part[lane]));
      }
      if (!piece.last) continue;
      // Without channels of its own: all that is left of the segment is its end.
      const Piece end = {piece.end, piece.end, piece.segment, false, true};
      args.pieces = &end;
      args.chunk_begin = piece.end;
      for (int64_t t = 0; t < tiles; t += step) {
        set_tile(args, c_.p.weight.packed, tile0, t);
        args.partial = sums + t * height * kTile;
        args.totals = totals + t * height * kTile;
        args.grouped = totals + kept_lanes() + t * height * kTile;
        kernel_for<Core>(stored_bits, c_.g.element.bits < 8, height, least(tiles - t, step))(args);
      }
    }
    store(0, 0, tile0, tiles, totals);
  }

  void store(int64_t panel, int64_t row_begin, int64_t tile0, int64_t tiles, float* totals) const {
    const int64_t begin = c_.panels.begin(panel), height = c_.panels.rows(panel);
    const int64_t step = Core::tiles(static_cast<int>(height));
    for (int64_t t = 0; t < tiles; t += step) {
      const int64_t wide = least(tiles - t, step) * kTile;
      float* sums = totals + ((begin - row_begin) * tiles + t * height) * kTile;
      for (int64_t r = 0; r < height; ++r, sums += wide) c_.store(panel, r, tile0 + t, wide, sums);
    }
  }

  const Call c_;
  const bool direct_;  // kernels decode packed codes themselves
  int64_t panels_per_unit_ = 48;
};

}  // namespace
}  // namespace compressed_linear::cpu
