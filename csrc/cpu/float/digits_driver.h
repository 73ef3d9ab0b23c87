// SPDX-License-Identifier: Apache-2.0
// The call of an engine that multiplies digits of x (digits.h). A Core supplies
//
//   kRows                                   rows of x that its kernels take at once, at most
//   largest(x, count)                       what largest_magnitude gives
//   split(x, count, scale, swap, out, stride)   what split_digits gives
//   kernel(bits, rows, tiles)               for a whole strip, or for 1 of its tiles
//
// A unit of work is a strip, which every panel of rows reads, or where there are fewer strips than
// threads a part of its segments: then what they add up to is kept, and added in order when all is
// there. Segments are exact sums but for three roundings, and added in order of K: neither rows nor
// threads change a result.
#pragma once

#include "cpu/common/panels.h"
#include "digits.h"
#include "strips.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kDigitRowBytes = 16 << 20;  // of x prepared at once

struct DigitArgs {
  const Problem& p;
  const Segment* segments;
  int64_t segment_count;
  int64_t channel;         // stored one where the first segment begins
  const int8_t* x;         // [block][row][digit][32] from there on
  const float* units;      // [segment][row] digit_unit
  const DigitSums* start;  // [segment][row] -middle times the sums of digits
  const float* row_sums;   // [segment][row] sum of x, or null without offset
  int64_t row, tile;       // first of each
  float* sums;             // [segment][row][kStripLanes] to leave sums in, or null to add them up
  float* totals;           // [row][kStripLanes]
};

using DigitKernel = void (*)(const DigitArgs&);

template <class Core>
struct DigitCall {
  const Problem& p;
  const Geometry& g;
  const Segment* segments;
  const int32_t* chunk_first;
  int64_t segment_count;
  bool offset;
  int64_t row0;  // first row of x in the panels
  Panels panels;
  int64_t k_parts;
  // Of panel i, at begin(i) times what a row takes.
  int8_t* x;
  float* units;
  DigitSums* start;
  float* row_sums;
  float* sums;  // [strip][panel: segment, row][kStripLanes], null if K is not cut

  int64_t strips() const { return strip_count(g); }
  int64_t strip_tiles(int64_t strip) const { return least(g.tiles - strip * kStrip, kStrip); }
  int64_t row_bytes() const { return g.padded_k * kDigits; }

  void prepare(int64_t panel_begin, int64_t panel_end) const {
    float* row = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(g.padded_k + g.k) * sizeof(float)));
    const auto middle = static_cast<int32_t>(p.weight.middle);
    const bool swap = g.element.bits < 8;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t rows = panels.rows(panel), begin = panels.begin(panel);
      for (int64_t r = 0; r < rows; ++r) {
        prepare_row(p, row0 + begin + r, row, row + g.padded_k);
        int8_t* digits = x + begin * row_bytes() + r * kDigitBytes;
        for (int64_t c = 0; c < chunk_count(g); ++c)
          for (int64_t s = chunk_first[c]; s < chunk_first[c + 1]; ++s) {
            const int64_t channel = c * kChunk + segments[s].begin;
            const int64_t count = segments[s].end - segments[s].begin;
            const DigitScale scale = digit_scale(Core::largest(row + channel, count));
            const DigitSums found =
                Core::split(row + channel, count, scale, swap,
                            digits + channel / kBlock * rows * kDigitBytes, rows * kDigitBytes);
            const int64_t at = begin * segment_count + s * rows + r;
            units[at] = digit_unit(scale);
            start[at] = {-middle * found.upper, -middle * found.lowest};
            if (offset)
              row_sums[at] = units[at] * __builtin_fmaf(static_cast<float>(found.lowest), 0x1p-8f,
                                                        static_cast<float>(found.upper));
          }
      }
    }
  }

  float* sums_of(int64_t strip, int64_t panel) const {
    return sums +
           (strip * panels.begin(panels.count) + panels.begin(panel)) * segment_count * kStripLanes;
  }

  // Units count the parts of K of each strip.
  void multiply(int64_t unit_begin, int64_t unit_end) const {
    float* totals = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(Core::kRows * kStripLanes) * sizeof(float)));
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      const int64_t strip = unit / k_parts, part = unit % k_parts;
      const int64_t chunk = chunk_count(g) * part / k_parts;
      const int64_t first = chunk_first[chunk];
      const int64_t count = chunk_first[chunk_count(g) * (part + 1) / k_parts] - first;
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t begin = panels.begin(panel), rows = panels.rows(panel);
        const int64_t at = begin * segment_count + first * rows;
        DigitArgs args{p,
                       segments + first,
                       count,
                       chunk * kChunk,
                       x + begin * row_bytes() + chunk * (kChunk / kBlock) * rows * kDigitBytes,
                       units + at,
                       start + at,
                       offset ? row_sums + at : nullptr,
                       row0 + begin,
                       strip * kStrip,
                       sums ? sums_of(strip, panel) + first * rows * kStripLanes : nullptr,
                       totals};
        const int64_t tiles = strip_tiles(strip), step = tiles == kStrip ? kStrip : 1;
        const DigitKernel kernel = Core::kernel(g.element.bits, rows, step);
        std::memset(totals, 0, static_cast<size_t>(rows * kStripLanes) * sizeof(float));
        for (int64_t tile = 0; tile < tiles; tile += step) {
          args.tile = strip * kStrip + tile;
          args.totals = totals + tile * kTile;
          if (sums != nullptr)
            args.sums = sums_of(strip, panel) + first * rows * kStripLanes + tile * kTile;
          kernel(args);
        }
        if (sums == nullptr) store(strip, panel, totals);
      }
    }
  }

  // Adds what the parts of K of strips left, segment by segment.
  void add_parts(int64_t strip_begin, int64_t strip_end) const {
    float* totals = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(Core::kRows * kStripLanes) * sizeof(float)));
    for (int64_t strip = strip_begin; strip < strip_end; ++strip)
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t rows = panels.rows(panel);
        const float* from = sums_of(strip, panel);
        std::memset(totals, 0, static_cast<size_t>(rows * kStripLanes) * sizeof(float));
        for (int64_t s = 0; s < segment_count; ++s)
          for (int64_t tile = 0; tile < strip_tiles(strip); ++tile) {
            float scale[kTile];
            load_scale(p, strip * kStrip + tile, segments[s].group, scale);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t i = 0; i < kTile; ++i) {
                float& total = totals[r * kStripLanes + tile * kTile + i];
                const float sum = from[(s * rows + r) * kStripLanes + tile * kTile + i];
                total = __builtin_fmaf(scale[i], sum, total);
              }
          }
        store(strip, panel, totals);
      }
  }

  void store(int64_t strip, int64_t panel, float* totals) const {
    for (int64_t r = 0; r < panels.rows(panel); ++r)
      store_row(p, row0 + panels.begin(panel) + r, strip * kStrip * kTile,
                strip_tiles(strip) * kTile, totals + r * kStripLanes);
  }
};

template <class Core>
void run_digits(const Problem& given, const Parallel& parallel) {
  Problem p = given;
  const Geometry& g = p.weight.geometry;
  if (p.x.m == 0 || g.n == 0) return;
  const bool offset = has_offset(p);
  const int64_t bound = segment_bound(g);
  const int64_t row_bytes = g.padded_k * kDigits + bound * 16;
  int64_t rows_at_once = kDigitRowBytes / row_bytes;
  if (rows_at_once < Core::kRows) rows_at_once = Core::kRows;
  rows_at_once = least(rows_at_once, p.x.m);
  const int64_t k_parts = count_k_parts(g, rows_at_once, bound, parallel.threads);

  float *factor = nullptr, *sums = nullptr, *units = nullptr, *row_sums = nullptr;
  DigitSums* start = nullptr;
  int8_t* x = nullptr;
  Segment* segments = nullptr;
  int32_t* chunk_first = nullptr;
  carve_from(call_arena(), [&](Carver& carver) {
    factor = carver.take<float>(p.x.activation.present ? p.x.m : 0);
    if (k_parts > 1)
      sums = carver.take<float>(round_up(g.tiles, kStrip) * kTile * rows_at_once * bound);
    x = carver.take<int8_t>(rows_at_once * g.padded_k * kDigits);
    units = carver.take<float>(rows_at_once * bound);
    start = carver.take<DigitSums>(rows_at_once * bound);
    row_sums = carver.take<float>(offset ? rows_at_once * bound : 0);
    segments = carver.take<Segment>(bound);
    chunk_first = carver.take<int32_t>(chunk_count(g) + 1);
  });
  measure_input(p, factor);
  const int64_t segment_count = make_segments(g, segments, chunk_first);

  using Context = const DigitCall<Core>;
  for (int64_t row0 = 0; row0 < p.x.m; row0 += rows_at_once) {
    const int64_t rows = least(p.x.m - row0, rows_at_once);
    DigitCall<Core> call{
        p,       g, segments, chunk_first, segment_count, offset, row0, Panels(rows, Core::kRows),
        k_parts, x, units,    start,       row_sums,      sums};
    if (rows < 16) {
      call.prepare(0, call.panels.count);
    } else {
      parallel.run(
          call.panels.count,
          [](void* context, int64_t begin, int64_t end) {
            static_cast<Context*>(context)->prepare(begin, end);
          },
          &call);
    }
    parallel.run(
        call.strips() * k_parts,
        [](void* context, int64_t begin, int64_t end) {
          static_cast<Context*>(context)->multiply(begin, end);
        },
        &call);
    if (k_parts > 1)
      parallel.run(
          call.strips(),
          [](void* context, int64_t begin, int64_t end) {
            static_cast<Context*>(context)->add_parts(begin, end);
          },
          &call);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
