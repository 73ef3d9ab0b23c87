// SPDX-License-Identifier: Apache-2.0
// What the engines for integer activations share around their kernels: K cut into pieces, rows of x
// quantized into panels, and the results stored.
//
// K is walked in chunks, and a piece is what of a segment lies in one. What a chunk's end cuts goes
// on as integers, so that neither chunks nor panels change a result: per output the integers of a
// segment are exact; times the scales of x they are added over a weight group, and times the scales
// of the weights over the groups, in order of K (rows.h).
#pragma once

#include "cpu/common/arena.h"
#include "rows.h"
#include "segments.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kIntegerActivationBytes = 16 << 20;  // quantized rows held at once
// How far ahead of its work an engine fetches that reads weights once. With the processor's own
// prefetching only, 4-bit codes took 0.77 ms on an Intel core, with this 0.55, where reading alone
// takes 0.47 (N = K = 4096, M = 1).
constexpr int64_t kNearBytes = 4096;

// The part of a segment inside one chunk.
struct Piece {
  int32_t begin, end;  // stored channels
  int32_t segment;
  bool first, last;  // of the segment's pieces
};

// How K is cut.
struct Cut {
  int64_t chunk, chunks;  // channels of a chunk

  Cut(const Geometry& g, int64_t chunk_channels)
      : chunk(chunk_channels), chunks((g.padded_k + chunk_channels - 1) / chunk_channels) {}
};

// PanelsOf: count, begin(panel) and rows(panel) of the panels that rows are cut into.
template <class PanelsOf>
struct IntegerCall {
  const Problem& p;
  const Geometry& g;
  Cut cut;
  PanelsOf panels;
  int64_t row0;  // first row of x in the panels
  int64_t segment_count, x_group_count;
  bool offset;   // a zero-point term remains after the middle
  bool per_row;  // one activation scale for all of a row
  const IntegerSegment* segments;
  const Piece* pieces;
  const int32_t* chunk_pieces;  // index of each chunk's first piece, chunks + 1 entries
  bool whole;                   // every piece is whole blocks
  // Of panel i, at begin(i) times what a row takes, [...][row of the panel]:
  int32_t* x;         // [quad], or as place_row of the engine has it
  int32_t* start;     // [segment] what is added to the products
  float* group_sums;  // [group], without offset unused
  int32_t* zero_x;    // [x group]
  float* scale_x;     // [x group]

  int64_t strip_tiles(int64_t tile0) const { return least(g.tiles - tile0, kStrip); }
  int64_t chunk_width(int64_t c) const { return least(g.padded_k - c * cut.chunk, cut.chunk); }

  // Quantizes the rows of panels [panel_begin, panel_end). place_row(q[padded_k], r, rows, x) puts
  // the bytes of row r where they belong in x of the panel. middle: what products have not taken
  // from the codes, if centred nothing.
  template <class Core, class PlaceRow>
  void prepare(int64_t panel_begin, int64_t panel_end, bool centred,
               const PlaceRow& place_row) const {
    float* row = nullptr;
    QuantizedGroup* by = nullptr;
    int8_t* q = nullptr;
    carve_from(worker_arena(), [&](Carver& carver) {
      row = carver.take<float>(2 * g.padded_k);
      by = carver.take<QuantizedGroup>(x_group_count);
      q = carver.take<int8_t>(g.padded_k);
    });
    const auto middle = static_cast<int32_t>(p.weight.middle);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t rows = panels.rows(panel), begin = panels.begin(panel);
      for (int64_t r = 0; r < rows; ++r) {
        quantize_to_bytes<Core>(p, row0 + begin + r, row, row + g.padded_k, q, by);
        place_row(q, r, rows, x + begin * (g.padded_k / kQuad));
        for (int64_t i = 0; i < x_group_count; ++i) {
          zero_x[begin * x_group_count + i * rows + r] = by[i].zero;
          scale_x[begin * x_group_count + i * rows + r] = by[i].scale;
        }
        float group_sum = 0;
        for (int64_t s = 0; s < segment_count; ++s) {
          const IntegerSegment& segment = segments[s];
          const auto length = static_cast<int32_t>(segment.end - segment.begin);
          const int32_t bytes = Core::sum(q + segment.begin, length);
          const int32_t zeros = length * by[segment.x_group].zero;
          // Modulo 2^32, as all these integers; only the sum of a segment need be in range.
          const auto wrap = [](int32_t value) { return static_cast<uint32_t>(value); };
          start[begin * segment_count + s * rows + r] =
              static_cast<int32_t>(wrap(middle) * (wrap(zeros) - (centred ? 0u : wrap(bytes))));
          if (!offset) continue;
          group_sum = add_segment(segment, per_row ? 1.0f : by[segment.x_group].scale,
                                  static_cast<float>(bytes - zeros), group_sum);
          group_sums[begin * g.groups + segment.group * rows + r] = group_sum;
        }
      }
    }
  }

  // Fetches the scales of the next strip, while this one is read: their few lines would be waited
  // for.
  void prefetch_scales(int64_t tile0) const {
    if (tile0 >= g.tiles) return;
    const int64_t lanes = strip_tiles(tile0) * g.groups * kTile;
    const auto fetch = [&](const TileNumbers& numbers) {
      if (numbers.data == nullptr) return;
      const int64_t size = size_of(numbers.type);
      const char* from = static_cast<const char*>(numbers.data) + numbers.at(tile0, 0) * size;
      for (int64_t at = 0; at < lanes * size; at += kRowBytes) __builtin_prefetch(from + at, 0, 2);
    };
    fetch(p.weight.scale);
    fetch(p.weight.zero);
  }

  // Stores `wide` channels of a row of a panel from tile `tile` on. sums is clobbered.
  void store(int64_t panel, int64_t r, int64_t tile, int64_t wide, float* sums) const {
    const int64_t begin = panels.begin(panel);
    if (per_row) {
      const float by = scale_x[begin * x_group_count + r];
      for (int64_t i = 0; i < wide; ++i) sums[i] *= by;
    }
    store_row(p, row0 + begin + r, tile * kTile, wide, sums);
  }
};

// Channels per chunk, `most` at most: whole weight groups where that is possible.
inline int64_t chunk_of(const Geometry& g, int64_t most) {
  if (g.padded_group % kBlock != 0 || g.padded_group > most) return most;
  return most / g.padded_group * g.padded_group;
}

// Fills pieces and chunk_pieces; returns whether every piece is whole blocks.
inline bool make_pieces(const IntegerSegment* segments, int64_t segment_count, const Cut& cut,
                        Piece* pieces, int32_t* chunk_pieces) {
  bool whole = true;
  int32_t count = 0;
  int64_t s = 0;
  for (int64_t c = 0; c < cut.chunks; ++c) {
    chunk_pieces[c] = count;
    const int64_t begin = c * cut.chunk, end = begin + cut.chunk;
    for (; s < segment_count && segments[s].begin < end; ++s) {
      const IntegerSegment& segment = segments[s];
      const int64_t from = segment.begin < begin ? begin : segment.begin;
      const int64_t to = least(segment.end, end);
      pieces[count++] = {static_cast<int32_t>(from), static_cast<int32_t>(to),
                         static_cast<int32_t>(s), from == segment.begin, to == segment.end};
      whole = whole && from % kBlock == 0 && to % kBlock == 0;
      if (segment.end > end) break;
    }
  }
  chunk_pieces[cut.chunks] = count;
  return whole;
}

// Runs the engine's call, as many rows at once as kIntegerActivationBytes allow. An Engine has
//
//   PanelsOf, panels(rows)       for IntegerCall
//   padded(rows)                 rows that x has room for
//   kLeastRows                   rows at once, at least
//   cut(p, panels)
//   Engine(call, threads), run(parallel)
template <class Engine>
void run_integer_linear(const Problem& p, const Parallel& parallel) {
  const Geometry& g = p.weight.geometry;
  if (p.x.m == 0 || g.n == 0) return;
  const int64_t activation_group = p.x.activation.group;
  const int64_t segment_count = count_segments(g, activation_group);
  const int64_t x_group_count = x_groups(g, activation_group);
  const int64_t row_bytes = g.padded_k + 4 * (segment_count + g.groups + 2 * x_group_count);
  int64_t rows_at_once = kIntegerActivationBytes / row_bytes;
  if (rows_at_once < Engine::kLeastRows) rows_at_once = Engine::kLeastRows;
  rows_at_once = least(rows_at_once, p.x.m);

  for (int64_t row0 = 0; row0 < p.x.m; row0 += rows_at_once) {
    const int64_t rows = least(p.x.m - row0, rows_at_once);
    const auto panels = Engine::panels(rows);
    const Cut cut = Engine::cut(p, panels);
    IntegerSegment* segments = nullptr;
    Piece* pieces = nullptr;
    int32_t *chunk_pieces = nullptr, *x = nullptr, *start = nullptr, *zero_x = nullptr;
    float *group_sums = nullptr, *scale_x = nullptr;
    carve_from(call_arena(), [&](Carver& carver) {
      segments = carver.take<IntegerSegment>(segment_count);
      pieces = carver.take<Piece>(segment_count + cut.chunks);
      chunk_pieces = carver.take<int32_t>(cut.chunks + 1);
      x = carver.take<int32_t>(Engine::padded(rows) * (g.padded_k / kQuad));
      start = carver.take<int32_t>(rows * segment_count);
      group_sums = carver.take<float>(has_offset(p) ? rows * g.groups : 0);
      zero_x = carver.take<int32_t>(rows * x_group_count);
      scale_x = carver.take<float>(rows * x_group_count);
    });
    int64_t filled = 0;
    for_each_segment(g, activation_group,
                     [&](const IntegerSegment& segment) { segments[filled++] = segment; });
    const bool whole = make_pieces(segments, segment_count, cut, pieces, chunk_pieces);
    Engine({p, g, cut, panels, row0, segment_count, x_group_count, has_offset(p),
            activation_group == 0, segments, pieces, chunk_pieces, whole, x, start, group_sums,
            zero_x, scale_x},
           parallel.threads)
        .run(parallel);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
