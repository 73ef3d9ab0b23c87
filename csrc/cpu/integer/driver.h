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
// The work: rows of x are quantized into panels of at most kRows interleaved rows, and panels times
// strips of four tiles multiplied in the order of common/partition.h. Panels of a strip walk K in
// chunks; weights of a chunk are read by panel after panel, either as they are packed or, for many
// panels, decoded to bytes once.
//
// Where K is cut among threads, the integers of each segment are kept, and when all are there they
// go on as above. A segment that is cut itself is kept in pieces, which are added as integers. So
// this changes no result.
//
// While a chunk is worked on, the next one is fetched into the cache, a share for every panel:
// otherwise its first panel waits for memory and the others leave memory idle.
#pragma once

#include "cpu/common/panels.h"
#include "cpu/common/schedule.h"
#include "kernel.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kIntegerChunk = 2048;  // input channels of a strip that panels read in turn
// Panels beyond which narrow codes are decoded to bytes first.
constexpr int64_t kDirectPanels = 3;
// How far ahead a panel that is alone fetches codes of so many bits. On Zen 4 what is tiles'
// distance (kNearBytes) made one row of 4 or 8 bits a quarter slower.
constexpr int64_t ahead_bytes(int bits) { return bits == 8 ? 2048 : bits > 2 ? 1024 : 8192; }
constexpr int64_t kIntegerCell = kBlock;    // channels that K may be cut into among threads
constexpr int64_t kMostIntegerPanels = 48;  // that read a chunk in turn

template <class Core>
class VectorEngine {
 public:
  using Call = IntegerCall<Panels>;
  static constexpr int64_t kLeastRows = Core::kRows;
  static Panels panels(int64_t rows) { return {rows, Core::kRows}; }
  static int64_t padded(int64_t rows) { return rows; }
  static Cut cut(const Problem& p, const Panels& panels) {
    const Geometry& g = p.weight.geometry;
    return {g, panels.count > 1 ? chunk_of(g, kIntegerChunk) : g.padded_k};
  }

  VectorEngine(const Call& call, int64_t threads)
      : kept(work_of(call, threads), (call.segment_count + 1) * lanes(call.panels.rows(0)),
             threads),
        c_(call),
        direct_(call.whole && call.panels.count <= kDirectPanels) {}

  void run(const Parallel& parallel) { run_call(parallel, c_.panels.count, *this); }

  void prepare(int64_t panel_begin, int64_t panel_end) const {
    const int64_t quads = c_.g.padded_k / kQuad;
    c_.template prepare<Core>(panel_begin, panel_end, false,
                              [quads](const int8_t* q, int64_t r, int64_t rows, int32_t* x) {
                                for (int64_t i = 0; i < quads; ++i)
                                  std::memcpy(x + i * rows + r, q + i * kQuad, kQuad);
                              });
  }

  void multiply(Worker& worker) const {
    kept.multiply(
        worker, kMostIntegerPanels,
        [this](const WorkPart& part, int32_t* sums) {
          if (sums != nullptr) return multiply_part(part, sums);
          multiply(part.panel0, part.panel1, part.tile0);
        },
        [this](const WorkPart& part, int32_t* sums) { finish_strip(part, sums); });
  }

  // At each place [segment], and one more for the piece of a segment that is cut by the border of
  // that place: blocks of [row][tile][16] as in KernelArgs::partial.
  const Kept<int32_t> kept;

 private:
  // K is cut where whole strips leave more than a third of the threads idle: with groups of 32,
  // what segments leave and its end take up to a third of the time.
  static WorkShape work_of(const Call& call, int64_t threads) {
    WorkShape shape = cpu::work_of(call.g, call.panels);
    const int64_t jobs = (shape.tiles + kStrip - 1) / kStrip * shape.panels;
    const int64_t rounds = (jobs + threads - 1) / threads;
    if (2 * rounds * threads <= 3 * jobs) return shape;
    shape.cells = (call.g.padded_k + kIntegerCell - 1) / kIntegerCell;
    shape.cuts_ragged = true;
    return shape;
  }
  static int64_t lanes(int64_t rows) { return rows * kStrip * kTile; }

  // Codes of a strip of so many tiles are decoded to bytes before they are multiplied.
  bool decodes(int64_t tiles) const {
    return c_.g.element.bits < 8 && (!direct_ || tiles < kStrip);
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

  // The cells of a part, which has one panel. Leaves sums of segments, see kept.
  void multiply_part(const WorkPart& part, int32_t* sums) const {
    const int64_t begin = part.cell0 * kIntegerCell;
    const int64_t end = least(part.cell1 * kIntegerCell, c_.g.padded_k);
    const int64_t tiles = part.tile1 - part.tile0, height = c_.panels.rows(part.panel0);
    const int64_t step = Core::tiles(static_cast<int>(height));
    const int bits = c_.g.element.bits;
    const uint8_t* packed = quads_of(c_.p.weight, part.tile0, begin);
    const uint8_t* weights = packed;
    const bool decode = decodes(tiles);
    if (decode) {
      uint8_t* slab = static_cast<uint8_t*>(worker_arena().reserve(
          static_cast<size_t>(round_up(end - begin, kBlock) * kStrip * kTile)));
      decode_strip<Core>(bits, packed, tiles, (end - begin) / kBlock, slab);
      weights = slab;
    }
    const int stored_bits = decode ? 8 : bits;
    KernelArgs args = first_args();
    args.row_stride = tiles * kRowBytes;
    args.block_stride = stored_bits * args.row_stride;
    args.chunk_begin = begin;
    args.piece_count = 1;
    args.fetch_every = 1;
    set_panel(args, part.panel0);
    int32_t* head = part.cell0 == 0 ? nullptr
                                    : kept.at(kept.partition().place_of(part.unit)) +
                                          c_.segment_count * lanes(c_.panels.rows(0));
    for (int64_t s = segment_at(begin); s < c_.segment_count && c_.segments[s].begin < end; ++s) {
      const IntegerSegment& segment = c_.segments[s];
      const int64_t from = greatest(segment.begin, begin), to = least(segment.end, end);
      const Piece piece = {static_cast<int32_t>(from), static_cast<int32_t>(to),
                           static_cast<int32_t>(s), from == segment.begin, false};
      int32_t* to_sums = piece.first ? sums + s * lanes(height) : head;
      if (!piece.first)
        std::memset(to_sums, 0, static_cast<size_t>(lanes(height)) * sizeof(int32_t));
      args.pieces = &piece;
      args.fetch = packed + (from - begin) / kBlock * bits * args.row_stride + ahead_bytes(bits);
      args.fetch_end = args.fetch + (to - from) / kBlock * bits * args.row_stride;
      for (int64_t t = 0; t < tiles; t += step) {
        set_tile(args, weights, part.tile0, t);
        args.fetch_first = t == 0 && !decode ? 0 : -1;
        args.partial = to_sums + t * height * kTile;
        kernel_for<Core>(stored_bits, bits < 8, height, least(tiles - t, step))(args);
      }
    }
  }

  // The segment that stored channel `k` is in, or that comes after it.
  int64_t segment_at(int64_t k) const {
    int64_t first = 0, end = c_.segment_count;
    while (first < end) {
      const int64_t middle = (first + end) / 2;
      if (c_.segments[middle].end <= k) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first;
  }

  // Adds the pieces of segments of a strip and panel, and finishes its segments in order.
  void finish_strip(const WorkPart& part, int32_t* kept_sums) const {
    const int64_t tiles = part.tile1 - part.tile0, panel = part.panel0;
    const int64_t height = c_.panels.rows(panel), step = Core::tiles(static_cast<int>(height));
    kept.partition().for_each_cut(part, [&](int64_t place, int64_t cell) {
      const int64_t k = cell * kIntegerCell, s = segment_at(k);
      if (s == c_.segment_count || c_.segments[s].begin >= k) return;
      const int32_t* head = kept.at(place) + c_.segment_count * lanes(c_.panels.rows(0));
      int32_t* sums = kept_sums + s * lanes(height);
      for (int64_t lane = 0; lane < height * tiles * kTile; ++lane)
        sums[lane] = static_cast<int32_t>(static_cast<uint32_t>(sums[lane]) +
                                          static_cast<uint32_t>(head[lane]));
    });
    float* totals = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(2 * lanes(height)) * sizeof(float)));
    std::memset(totals, 0, static_cast<size_t>(lanes(height)) * sizeof(float));
    const int stored_bits = decodes(tiles) ? 8 : c_.g.element.bits;
    KernelArgs args = first_args();
    args.piece_count = 1;
    args.fetch_first = -1;
    set_panel(args, panel);
    for (int64_t s = 0; s < c_.segment_count; ++s) {
      // Without channels of its own: all that is left of the segment is its end.
      const int32_t at = c_.segments[s].end;
      const Piece end = {at, at, static_cast<int32_t>(s), false, true};
      args.pieces = &end;
      args.chunk_begin = at;
      for (int64_t t = 0; t < tiles; t += step) {
        set_tile(args, c_.p.weight.packed, part.tile0, t);
        args.partial = kept_sums + s * lanes(height) + t * height * kTile;
        args.totals = totals + t * height * kTile;
        args.grouped = totals + lanes(height) + t * height * kTile;
        kernel_for<Core>(stored_bits, c_.g.element.bits < 8, height, least(tiles - t, step))(args);
      }
    }
    store(panel, c_.panels.begin(panel), part.tile0, tiles, totals);
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
};

}  // namespace
}  // namespace compressed_linear::cpu
