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
//   decode(...)                        weights of one chunk and tile into steps of kStepBytes
//   copy_row(problem, m, ...)          the same for a row of x that needs no conversion, or false
//   load_sum(sums)                     one fp32 sum per channel of a tile, back from memory
//   are_few(problem, rows)             whether so many rows take the path for few, which decodes in
//                                      registers and works on whole strips:
//   FewRows, kFewPanelRows             its kernels, and most rows of their panels
//   kCutStrips                         whether they take strips of fewer tiles too
//
// Rows of x are interleaved in panels of at most kRows; a unit of work is a run of panels times a
// run of tiles. Per output the order of additions is: steps of a segment in order into one
// accumulator, then segments in order. None of the blocking changes it, and neither does cutting K
// among threads: then the sums of segments are kept, and added when all are there.
#pragma once

#include <cstring>

#include "cpu/common/arena.h"
#include "cpu/common/panels.h"
#include "cpu/common/rows.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kRowsPerUnit = 288;           // share one decoding of a chunk
constexpr int64_t kTilesPerUnit = 16;           // sums of a unit stay in the second-level cache
constexpr int64_t kActivationBytes = 16 << 20;  // rows of x prepared at once
constexpr int64_t kStripLanes = kStrip * kTile;
constexpr int64_t kLeastPartBytes = 16 << 10;  // packed weights of a strip worth a thread's while
constexpr int64_t kSumBytes = 4 << 20;         // sums of segments kept at once

struct MicroArgs {
  const uint8_t* weights;  // tile t, step i: weights + t * tile_stride + i * kStepBytes
  int64_t tile_stride;
  const uint32_t* x;  // [step][part][row][word]
  const Segment* segments;
  int64_t segment_count;
  const float* scale;           // [segment][tile][16]
  const float* negated_offset;  // same shape, or null
  const float* row_sums;        // [segment][row]
  float* totals;                // [row][tile][16]
};

template <class Core, int Rows, int Tiles, int Parts>
void micro_kernel(const MicroArgs& a) {
  const float* scale = a.scale;
  for (int64_t s = 0; s < a.segment_count; ++s, scale += Tiles * kTile) {
    const Segment segment = a.segments[s];
    // Unrolled here and below, or the accumulators would go through memory.
    typename Core::Acc acc[Rows][Tiles];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t) acc[r][t] = Core::zero();
    const int64_t first = segment.begin / Core::kStep;
    const int64_t last = (segment.end + Core::kStep - 1) / Core::kStep;
    constexpr int kStepWords = Parts * Rows * Core::kWords;
    const uint8_t* w = a.weights + first * Core::kStepBytes;
    const uint32_t* x = a.x + first * kStepWords;
    for (int64_t i = first; i < last; ++i, w += Core::kStepBytes, x += kStepWords) {
      typename Core::Weights weights[Tiles];
      for (int t = 0; t < Tiles; ++t) weights[t] = Core::load(w + t * a.tile_stride);
#pragma GCC unroll 4
      for (int q = 0; q < Parts; ++q)
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const typename Core::Activation activation =
              Core::broadcast(x + (q * Rows + r) * Core::kWords);
#pragma GCC unroll 8
          for (int t = 0; t < Tiles; ++t) acc[r][t] = Core::mac(acc[r][t], weights[t], activation);
        }
    }
    typename Core::Sum sums[Rows][Tiles];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t) sums[r][t] = Core::sum(acc[r][t]);
    if (a.negated_offset != nullptr) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < Tiles; ++t)
          sums[r][t] = Core::add_offset(sums[r][t], a.row_sums[s * Rows + r],
                                        a.negated_offset + (s * Tiles + t) * kTile);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t)
        Core::scale_into(a.totals + (r * Tiles + t) * kTile, sums[r][t], scale + t * kTile);
  }
}

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

using MicroKernel = void (*)(const MicroArgs&);

template <class Core, int Rows, int Tiles>
MicroKernel micro_kernel_for(int64_t parts) {
  if constexpr (Core::kMaxParts > 1) {
    if (parts == 2) return &micro_kernel<Core, Rows, Tiles, 2>;
  }
  return &micro_kernel<Core, Rows, Tiles, 1>;
}

template <class Core, int Rows, int Tiles = Core::kTiles>
MicroKernel micro_kernel_for(int64_t tiles, int64_t parts) {
  if constexpr (Tiles > 1) {
    if (tiles < Tiles) return micro_kernel_for<Core, Rows, Tiles - 1>(tiles, parts);
  }
  return micro_kernel_for<Core, Rows, Tiles>(parts);
}

template <class Core, int Rows = Core::kRows>
MicroKernel micro_kernel_for(int64_t rows, int64_t tiles, int64_t parts) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return micro_kernel_for<Core, Rows - 1>(rows, tiles, parts);
  }
  return micro_kernel_for<Core, Rows>(tiles, parts);
}

// Blocks and kHasFewRows of a core whose sums are in vector registers.
template <class Core>
struct RegisterCore {
  struct Blocks {
    void operator()(const MicroArgs& a, int64_t rows, int64_t tiles, int64_t parts) const {
      micro_kernel_for<Core>(rows, tiles, parts)(a);
    }
  };
  static constexpr bool kHasFewRows = true;
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
  uint32_t* x;      // panel i at x + begin(i) * row_words
  float* row_sums;  // panel i at row_sums + begin(i) * segment_count: [segment][row]
  int64_t panels_per_unit, tiles_per_unit;
  int64_t k_parts;  // of every strip, for few rows
  float* sums;      // of a strip and panel: see sums_of; null if K is not cut

  int64_t panel_units() const { return (panels.count + panels_per_unit - 1) / panels_per_unit; }
  int64_t tile_units() const { return (g.tiles + tiles_per_unit - 1) / tiles_per_unit; }

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

  void multiply_unit(int64_t unit) const {
    const int64_t panel0 = unit % panel_units() * panels_per_unit;
    const int64_t panel1 =
        panel0 + panels_per_unit < panels.count ? panel0 + panels_per_unit : panels.count;
    const int64_t tile0 = unit / panel_units() * tiles_per_unit;
    const int64_t tile1 = tile0 + tiles_per_unit < g.tiles ? tile0 + tiles_per_unit : g.tiles;
    multiply(panel0, panel1, tile0, tile1);
  }

  int64_t strips() const { return (g.tiles + kStrip - 1) / kStrip; }
  int64_t strip_tiles(int64_t strip) const {
    const int64_t left = g.tiles - strip * kStrip;
    return left < kStrip ? left : kStrip;
  }
  bool takes(int64_t strip) const { return Core::kCutStrips || strip_tiles(strip) == kStrip; }

  // [segment][row of the panel][kStripLanes]
  float* sums_of(int64_t strip, int64_t panel) const {
    const int64_t rows_before = strip * panels.begin(panels.count) + panels.begin(panel);
    return sums + rows_before * segment_count * kStripLanes;
  }

  // Units count the parts of K of each strip.
  void multiply_few_rows(int64_t unit_begin, int64_t unit_end) const {
    const typename Core::FewRows kernels(p);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      const int64_t strip = unit / k_parts, part = unit % k_parts, tile = strip * kStrip;
      if (!takes(strip)) {
        if (part == 0) multiply(0, panels.count, tile, g.tiles);
        continue;
      }
      const int64_t chunk = chunk_count(g) * part / k_parts;
      const int64_t first = chunk_first[chunk];
      const int64_t count = chunk_first[chunk_count(g) * (part + 1) / k_parts] - first;
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t begin = panels.begin(panel), height = panels.rows(panel);
        const uint32_t* words = x + begin * row_words;
        kernels.run({p, segments + first, count, chunk * kChunk,
                     words + chunk * (kChunk / Core::kStep) * parts * height * Core::kWords,
                     offset ? row_sums + begin * segment_count + first * height : nullptr,
                     row0 + begin, tile, strip_tiles(strip),
                     sums ? sums_of(strip, panel) + first * height * kStripLanes : nullptr},
                    height, parts);
      }
    }
  }

  // Adds the sums of segments that parts of K left, in order.
  void add_parts(int64_t strip) const {
    if (!takes(strip)) return;
    const int64_t tile = strip * kStrip, tiles = strip_tiles(strip);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t height = panels.rows(panel);
      const float* from = sums_of(strip, panel);
      float* totals = static_cast<float*>(
          worker_arena().reserve(static_cast<size_t>(height * kStripLanes) * sizeof(float)));
      std::memset(totals, 0, static_cast<size_t>(height * kStripLanes) * sizeof(float));
      for (int64_t s = 0; s < segment_count; ++s)
        for (int64_t t = 0; t < tiles; ++t) {
          float scale[kTile];
          load_scale(p, tile + t, segments[s].group, scale);
          for (int64_t r = 0; r < height; ++r)
            Core::scale_into(totals + r * kStripLanes + t * kTile,
                             Core::load_sum(from + (s * height + r) * kStripLanes + t * kTile),
                             scale);
        }
      for (int64_t r = 0; r < height; ++r)
        store_row(p, row0 + panels.begin(panel) + r, tile * kTile, tiles * kTile,
                  totals + r * kStripLanes);
    }
  }

  void multiply(int64_t panel0, int64_t panel1, int64_t tile0, int64_t tile1) const {
    const int64_t row_begin = panels.begin(panel0), rows = panels.begin(panel1) - row_begin;

    constexpr int64_t kSlabBytes = kChunk / Core::kStep * Core::kStepBytes * Core::kTiles;
    const int64_t scale_floats = kChunk * Core::kTiles * kTile;
    const int64_t total_floats = rows * (tile1 - tile0) * kTile;
    uint8_t* slab = static_cast<uint8_t*>(worker_arena().reserve(
        static_cast<size_t>(kSlabBytes + (2 * scale_floats + total_floats) * 4)));
    float* scale = reinterpret_cast<float*>(slab + kSlabBytes);
    float* negated_offset = scale + scale_floats;
    float* totals = negated_offset + scale_floats;
    std::memset(totals, 0, static_cast<size_t>(total_floats) * sizeof(float));

    typename Core::Blocks blocks;
    for (int64_t c = 0; c < chunk_count(g); ++c) {
      const int64_t k0 = c * kChunk;
      const int64_t width = g.padded_k - k0 < kChunk ? g.padded_k - k0 : kChunk;
      const int64_t first = chunk_first[c], count = chunk_first[c + 1] - first;
      for (int64_t tile = tile0; tile < tile1; tile += Core::kTiles) {
        const int64_t tiles = tile1 - tile < Core::kTiles ? tile1 - tile : Core::kTiles;
        MicroArgs args;
        args.weights = slab;
        args.tile_stride = kSlabBytes / Core::kTiles;
        for (int64_t t = 0; t < tiles; ++t)
          Core::decode(p, tile + t, k0, width, slab + t * args.tile_stride);
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
        for (int64_t panel = panel0; panel < panel1; ++panel) {
          const int64_t begin = panels.begin(panel), height = panels.rows(panel);
          args.x = x + begin * row_words + k0 / Core::kStep * parts * height * Core::kWords;
          args.row_sums = row_sums + begin * segment_count + first * height;
          args.totals = block + (begin - row_begin) * tiles * kTile;
          blocks(args, height, tiles, parts);
        }
      }
    }
    for (int64_t tile = tile0; tile < tile1; tile += Core::kTiles) {
      const int64_t tiles = tile1 - tile < Core::kTiles ? tile1 - tile : Core::kTiles;
      float* block = totals + (tile - tile0) * kTile * rows;
      for (int64_t r = 0; r < rows; ++r)
        store_row(p, row0 + row_begin + r, tile * kTile, tiles * kTile, block + r * tiles * kTile);
    }
  }
};

// Parts of K for each strip: several where there are too few strips for the threads.
inline int64_t count_k_parts(const Geometry& g, int64_t rows, int64_t segments, int64_t threads) {
  const int64_t strips = (g.tiles + kStrip - 1) / kStrip;
  if (strips == 0 || strips >= 2 * threads ||
      strips * rows * segments * kStripLanes * 4 > kSumBytes)
    return 1;
  int64_t parts = (4 * threads + strips - 1) / strips;
  const int64_t worthwhile = kStrip * g.tile_bytes() / kLeastPartBytes;
  if (parts > worthwhile) parts = worthwhile;
  if (parts > chunk_count(g)) parts = chunk_count(g);
  return parts > 1 ? parts : 1;
}

template <class Core>
void run_few_rows(Call<Core>& call, const Parallel& parallel) {
  using Context = const Call<Core>;
  parallel.run(
      call.strips() * call.k_parts,
      [](void* context, int64_t begin, int64_t end) {
        static_cast<Context*>(context)->multiply_few_rows(begin, end);
      },
      &call);
  if (call.sums == nullptr) return;
  parallel.run(
      call.strips(),
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t strip = begin; strip < end; ++strip)
          static_cast<Context*>(context)->add_parts(strip);
      },
      &call);
}

// Most rows of a panel of the path for few rows; 0 where it does not take `rows`.
template <class Core>
int64_t few_panel_rows(const Problem& p, int64_t rows) {
  if constexpr (Core::kHasFewRows)
    if (Core::are_few(p, rows)) return Core::kFewPanelRows;
  return 0;
}

template <class Core>
void run_linear(const Problem& given, const Parallel& parallel) {
  Problem p = given;
  const Geometry& g = p.geometry;
  if (p.m == 0 || g.n == 0) return;
  const int64_t parts = Core::parts(prepared_type(p));
  const int64_t row_words = g.padded_k / Core::kStep * parts * Core::kWords;
  const bool offset = has_offset(p);
  const int64_t bound = segment_bound(g);
  const int64_t row_bytes = (row_words + (offset ? bound : 0)) * 4;
  int64_t rows_at_once = kActivationBytes / row_bytes;
  if (rows_at_once < Core::kRows) rows_at_once = Core::kRows;
  if (rows_at_once > p.m) rows_at_once = p.m;

  const int64_t x_bytes = round_up(rows_at_once * row_words * 4, 64);
  const int64_t sum_bytes = round_up(offset ? rows_at_once * bound * 4 : 0, 64);
  const int64_t segment_bytes = round_up(bound * static_cast<int64_t>(sizeof(Segment)), 64);
  const int64_t factor_bytes = p.activation.present ? round_up(p.m * 4, 64) : 0;
  // One thread has all the strips to itself.
  const int64_t k_parts = Core::kHasFewRows && parallel.threads > 1
                              ? count_k_parts(g, rows_at_once, bound, parallel.threads)
                              : 1;
  const int64_t kept_bytes =
      k_parts > 1 ? round_up(g.tiles, kStrip) * kTile * rows_at_once * bound * 4 : 0;
  uint8_t* memory = static_cast<uint8_t*>(call_arena().reserve(static_cast<size_t>(
      factor_bytes + kept_bytes + x_bytes + sum_bytes + segment_bytes + (chunk_count(g) + 1) * 4)));
  if (p.activation.present) {
    p.input_factor = reinterpret_cast<float*>(memory);
    memory += factor_bytes;
    float* row = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(g.padded_k + g.k) * sizeof(float)));
    measure_tensor(p, row, row + g.padded_k);
  }
  float* sums = k_parts > 1 ? reinterpret_cast<float*>(memory) : nullptr;
  memory += kept_bytes;
  Segment* segments = reinterpret_cast<Segment*>(memory + x_bytes + sum_bytes);
  int32_t* chunk_first = reinterpret_cast<int32_t*>(memory + x_bytes + sum_bytes + segment_bytes);
  const int64_t segment_count = make_segments(g, segments, chunk_first);

  for (int64_t row0 = 0; row0 < p.m; row0 += rows_at_once) {
    const int64_t rows = p.m - row0 < rows_at_once ? p.m - row0 : rows_at_once;
    const int64_t few_rows = few_panel_rows<Core>(p, rows);
    Call<Core> call{p,
                    g,
                    segments,
                    chunk_first,
                    segment_count,
                    parts,
                    row_words,
                    offset,
                    row0,
                    Panels(rows, few_rows > 0 ? few_rows : Core::kRows),
                    reinterpret_cast<uint32_t*>(memory),
                    reinterpret_cast<float*>(memory + x_bytes),
                    kRowsPerUnit / Core::kRows,
                    kTilesPerUnit,
                    k_parts,
                    sums};
    // Small units when there are few, so that every thread gets its share.
    if (rows <= 2 * Core::kRows) call.tiles_per_unit = Core::kTiles;
    while (call.tiles_per_unit > Core::kTiles &&
           call.panel_units() * call.tile_units() < 4 * parallel.threads)
      call.tiles_per_unit -= Core::kTiles;
    while (call.panels_per_unit > 8 &&
           call.panel_units() * call.tile_units() < 4 * parallel.threads)
      call.panels_per_unit /= 2;

    using Context = const Call<Core>;
    const auto prepare = [](void* context, int64_t begin, int64_t end) {
      static_cast<Context*>(context)->prepare(begin, end);
    };
    if (rows < 16) {
      prepare(&call, 0, call.panels.count);
    } else {
      parallel.run(call.panels.count, prepare, &call);
    }
    if constexpr (Core::kHasFewRows) {
      if (few_rows > 0) {
        run_few_rows(call, parallel);
        continue;
      }
    }
    parallel.run(
        call.panel_units() * call.tile_units(),
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t unit = begin; unit < end; ++unit)
            static_cast<Context*>(context)->multiply_unit(unit);
        },
        &call);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
