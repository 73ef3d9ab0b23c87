// SPDX-License-Identifier: Apache-2.0
// The blocked multiplication that the vector engines share. A Core supplies the registers. It is a
// RegisterCore of itself and all of the following, or has Blocks (an object that multiplies blocks
// while a unit of work lasts) and no few rows, and needs nothing of what only these use:
//
//   Acc                    fp32 partial sums of a tile, possibly several for a channel
//   Weights, Activation    one step of a tile, and x of one step and row, broadcast
//   kStep, kStepBytes      input channels per step, and bytes of one decoded step of a tile
//   kWords                 32-bit words of x in a step: 1 (fp32, or a bf16 pair), 2 (fp32 pair) or
//                          those of a block
//   kRows, kTiles          the register block: rows of x by tiles
//   kMaxParts              most parts of x: fp16 activations are two exact bf16 parts
//   zero, load, broadcast, mac
//   sum, add_offset, scale_into        one fp32 sum per channel of a tile, and what is done to it
//   parts(type), split(problem, row, ...)   how a row of x becomes words
//   is_plain(element)                  whether packed weights are steps already, block by block
//   decode(...)                        else: weights of one chunk and tile into steps of kStepBytes
//   copy_row(problem, m, ...)          the same for a row of x that needs no conversion, or false
//   load_sum(sums)                     one fp32 sum per channel of a tile, back from memory
//   are_few(problem, rows)             whether so many rows take the path for few, which decodes in
//                                      registers and works on whole strips:
//   FewRows, kFewPanelRows             its kernels, and most rows of their panels
//   kCutStrips                         whether they take strips of fewer tiles too
//
// Rows of x are interleaved in panels of at most kRows; strips and panels are multiplied in the
// order of common/partition.h. Per output the order of additions is: steps of a segment in order
// into one accumulator, then segments in order. None of the blocking changes it, and neither does
// cutting K among threads: then the sums of segments are kept, and added when all are there.
#pragma once

#include <cstring>

#include "cpu/common/panels.h"
#include "cpu/common/rows.h"
#include "cpu/common/schedule.h"
#include "micro_kernel.h"
#include "strips.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kRowsAtOnce = 288;            // share one decoding of a chunk
constexpr int64_t kMostColumnTiles = 16;        // sums of these stay in the second-level cache
constexpr int64_t kActivationBytes = 16 << 20;  // rows of x prepared at once

// Work of the path for few rows: one panel, one strip, some of its segments.
struct FewRowsArgs {
  const Problem& p;
  const Segment* segments;
  int64_t segment_count;
  int64_t channel;        // stored one where the first segment's chunk begins
  const uint32_t* x;      // [step][part][row][word] from there on
  const float* row_sums;  // [segment][row], null without offset
  int64_t row, tile;      // first of each
  int64_t tiles;
  float* sums;  // [segment][row][kStripLanes] to leave sums in, or null to finish the rows
};

template <class Core>
struct Call {
  const Problem& p;
  const Geometry& g;
  const Segment* segments;
  const int32_t* chunk_first;
  int64_t segment_count;
  int64_t parts, row_words;  // words of x per row
  bool offset;
  int64_t row0;  // first row of x in the panels
  Panels panels;
  uint32_t* x;       // panel i at x + begin(i) * row_words
  float* row_sums;   // panel i at row_sums + begin(i) * segment_count: [segment][row]
  bool few;          // rows, see Core
  Kept<float> kept;  // [segment][row of the panel][kStripLanes] at each place

  void prepare(int64_t panel_begin, int64_t panel_end) const {
    float* row = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(g.padded_k + g.k) * sizeof(float)));
    const bool plain = !offset && !transforms_input(p);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t rows = panels.rows(panel), begin = panels.begin(panel);
      for (int64_t r = 0; r < rows; ++r) {
        uint32_t* words = x + begin * row_words + r * Core::kWords;
        if (plain && Core::copy_row(p, row0 + begin + r, words, rows)) continue;
        prepare_row(p, row0 + begin + r, row, row + g.padded_k);
        Core::split(p, row, parts, words, rows * Core::kWords);
        if (!offset) continue;
        float* sums = row_sums + begin * segment_count + r;
        for (int64_t c = 0; c < chunk_count(g); ++c)
          for (int64_t s = chunk_first[c]; s < chunk_first[c + 1]; ++s)
            sums[s * rows] = segment_sum(row + c * kChunk + segments[s].begin,
                                         segments[s].end - segments[s].begin);
      }
    }
  }

  void multiply(Worker& worker) const {
    if constexpr (Core::kHasFewRows)
      if (few) return multiply_few_rows(worker);
    kept.multiply(
        worker, kRowsAtOnce / Core::kRows,
        [this](const WorkPart& part, float*) {
          multiply(part.panel0, part.panel1, part.tile0, part.tile1);
        },
        [](const WorkPart&, const float*) {});
  }

  void multiply_few_rows(Worker& worker) const {
    const typename Core::FewRows kernels(p);
    kept.multiply(
        worker, panels.count,
        [&](const WorkPart& part, float* sums) {
          const int64_t tiles = part.tile1 - part.tile0;
          if (!Core::kCutStrips && tiles < kStrip)
            return multiply(part.panel0, part.panel1, part.tile0, part.tile1);
          const int64_t chunk = sums == nullptr ? 0 : part.cell0;
          const int64_t first = chunk_first[chunk];
          const int64_t count = chunk_first[sums == nullptr ? chunk_count(g) : part.cell1] - first;
          for (int64_t panel = part.panel0; panel < part.panel1; ++panel) {
            const int64_t begin = panels.begin(panel), height = panels.rows(panel);
            const uint32_t* words = x + begin * row_words;
            kernels.run({p, segments + first, count, chunk * kChunk,
                         words + chunk * (kChunk / Core::kStep) * parts * height * Core::kWords,
                         offset ? row_sums + begin * segment_count + first * height : nullptr,
                         row0 + begin, part.tile0, tiles,
                         sums == nullptr ? nullptr : sums + first * height * kStripLanes},
                        height, parts);
          }
        },
        [this](const WorkPart& part, const float* sums) { add_parts(part, sums); });
  }

  // Adds what the parts of K left of a strip and panel, in order.
  void add_parts(const WorkPart& part, const float* sums) const {
    const int64_t tile = part.tile0, tiles = part.tile1 - tile;
    const int64_t panel = part.panel0, height = panels.rows(panel);
    float* totals = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(height * kStripLanes) * sizeof(float)));
    std::memset(totals, 0, static_cast<size_t>(height * kStripLanes) * sizeof(float));
    for (int64_t s = 0; s < segment_count; ++s)
      for (int64_t t = 0; t < tiles; ++t) {
        float scale[kTile];
        load_scale(p, tile + t, segments[s].group, scale);
        for (int64_t r = 0; r < height; ++r)
          Core::scale_into(totals + r * kStripLanes + t * kTile,
                           Core::load_sum(sums + (s * height + r) * kStripLanes + t * kTile),
                           scale);
      }
    for (int64_t r = 0; r < height; ++r)
      store_row(p, row0 + panels.begin(panel) + r, tile * kTile, tiles * kTile,
                totals + r * kStripLanes);
  }

  void multiply(int64_t panel0, int64_t panel1, int64_t tile0, int64_t tile1) const {
    if constexpr (Core::kHasUnit) {
      typename Core::Unit(p).multiply(*this, panel0, panel1, tile0, tile1);
    } else {
      multiply_in_blocks(panel0, panel1, tile0, tile1);
    }
  }

  void multiply_in_blocks(int64_t panel0, int64_t panel1, int64_t tile0, int64_t tile1) const {
    const int64_t row_begin = panels.begin(panel0), rows = panels.begin(panel1) - row_begin;

    constexpr int64_t kSlabBytes = kChunk / Core::kStep * Core::kStepBytes * Core::kTiles;
    const int64_t scale_floats = kChunk * Core::kTiles * kTile;
    const int64_t total_floats = rows * (tile1 - tile0) * kTile;
    uint8_t* slab = nullptr;
    float *scale = nullptr, *negated_offset = nullptr, *totals = nullptr;
    carve_from(worker_arena(), [&](Carver& carver) {
      slab = carver.take<uint8_t>(kSlabBytes);
      scale = carver.take<float>(scale_floats);
      negated_offset = carver.take<float>(scale_floats);
      totals = carver.take<float>(total_floats);
    });
    std::memset(totals, 0, static_cast<size_t>(total_floats) * sizeof(float));

    const bool plain = Core::is_plain(g.element);
    typename Core::Blocks blocks;
    for (int64_t c = 0; c < chunk_count(g); ++c) {
      const int64_t k0 = c * kChunk;
      const int64_t width = least(g.padded_k - k0, kChunk);
      const int64_t first = chunk_first[c], count = chunk_first[c + 1] - first;
      for (int64_t tile = tile0; tile < tile1; tile += Core::kTiles) {
        const int64_t tiles = least(tile1 - tile, Core::kTiles);
        MicroArgs args;
        if (plain) {
          args.weights = block_of(p.weight, tile, k0);
          args.tile_stride = g.block_bytes();
          args.block_stride = g.block_stride(tile);
        } else {
          args.weights = slab;
          args.tile_stride = kSlabBytes / Core::kTiles;
          args.block_stride = kBlock / Core::kStep * Core::kStepBytes;
          for (int64_t t = 0; t < tiles; ++t)
            Core::decode(p, tile + t, k0, width, slab + t * args.tile_stride);
        }
        for (int64_t s = 0; s < count; ++s)
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t group = segments[first + s].group;
            load_scale(p, tile + t, group, scale + (s * tiles + t) * kTile);
            if (offset)
              load_negated_offset(p, tile + t, group, negated_offset + (s * tiles + t) * kTile);
          }
        args.segments = segments + first;
        args.segment_count = count;
        args.scale = scale;
        args.negated_offset = offset ? negated_offset : nullptr;
        float* block = totals + (tile - tile0) * kTile * rows;
        const uint8_t* next = tile + Core::kTiles < tile1
                                  ? block_of(p.weight, tile + Core::kTiles, k0)
                                  : block_of(p.weight, tile0, k0 + kChunk);
        const int64_t lines = plain ? width / kBlock * args.block_stride / kRowBytes : 0;
        for (int64_t panel = panel0; panel < panel1; ++panel) {
          // Next to the products, a share of the lines with each panel.
          for (int64_t line = lines * (panel - panel0) / (panel1 - panel0);
               line < lines * (panel - panel0 + 1) / (panel1 - panel0); ++line)
            __builtin_prefetch(next + line * kRowBytes);
          const int64_t begin = panels.begin(panel), height = panels.rows(panel);
          args.x = x + begin * row_words + k0 / Core::kStep * parts * height * Core::kWords;
          args.row_sums = row_sums + begin * segment_count + first * height;
          args.totals = block + (begin - row_begin) * tiles * kTile;
          blocks(args, height, tiles, parts);
        }
      }
    }
    for (int64_t tile = tile0; tile < tile1; tile += Core::kTiles) {
      const int64_t tiles = least(tile1 - tile, Core::kTiles);
      float* block = totals + (tile - tile0) * kTile * rows;
      for (int64_t r = 0; r < rows; ++r)
        store_row(p, row0 + row_begin + r, tile * kTile, tiles * kTile, block + r * tiles * kTile);
    }
  }
};

// Most rows of a panel of the path for few rows; 0 where it does not take `rows`.
template <class Core>
int64_t few_panel_rows(const Problem& p, int64_t rows) {
  if constexpr (Core::kHasFewRows)
    if (Core::are_few(p, rows)) return Core::kFewPanelRows;
  return 0;
}

// Tiles of channels that rows of x meet one after another: many, but several for each thread.
inline int64_t column_tiles(const Geometry& g, const Panels& panels, int64_t threads) {
  int64_t tiles = kMostColumnTiles;
  while (threads > 1 && tiles > kStrip && g.tiles * panels.count < 16 * tiles * threads) tiles /= 2;
  return tiles;
}

template <class Core>
void run_linear(const Problem& given, const Parallel& parallel) {
  Problem p = given;
  const Geometry& g = p.weight.geometry;
  if (p.x.m == 0 || g.n == 0) return;
  const int64_t parts = Core::parts(prepared_type(p));
  const int64_t row_words = g.padded_k / Core::kStep * parts * Core::kWords;
  const bool offset = has_offset(p);
  const int64_t bound = segment_bound(g);
  const int64_t row_bytes = (row_words + (offset ? bound : 0)) * 4;
  int64_t rows_at_once = kActivationBytes / row_bytes;
  if (rows_at_once < Core::kRows) rows_at_once = Core::kRows;
  rows_at_once = least(rows_at_once, p.x.m);

  float *factor = nullptr, *row_sums = nullptr;
  uint32_t* x = nullptr;
  Segment* segments = nullptr;
  int32_t* chunk_first = nullptr;
  carve_from(call_arena(), [&](Carver& carver) {
    factor = carver.take<float>(p.x.activation.present ? p.x.m : 0);
    x = carver.take<uint32_t>(rows_at_once * row_words);
    row_sums = carver.take<float>(offset ? rows_at_once * bound : 0);
    segments = carver.take<Segment>(bound);
    chunk_first = carver.take<int32_t>(chunk_count(g) + 1);
  });
  measure_input(p, factor);
  const int64_t segment_count = make_segments(g, segments, chunk_first);

  for (int64_t row0 = 0; row0 < p.x.m; row0 += rows_at_once) {
    const int64_t rows = least(p.x.m - row0, rows_at_once);
    const int64_t few_rows = few_panel_rows<Core>(p, rows);
    const bool few = few_rows > 0;
    const Panels panels(rows, few ? few_rows : Core::kRows);
    WorkShape shape = work_of(g, panels);
    if constexpr (Core::kHasFewRows) {
      if (few) {
        shape.cells = chunk_count(g);
        shape.cuts_ragged = Core::kCutStrips;
      }
    }
    if (!few) shape.column = column_tiles(g, panels, parallel.threads);
    const Kept<float> kept(shape, segment_count * panels.rows(0) * kStripLanes, parallel.threads);
    run_call(parallel, panels.count,
             Call<Core>{p, g, segments, chunk_first, segment_count, parts, row_words, offset, row0,
                        panels, x, row_sums, few, kept});
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
