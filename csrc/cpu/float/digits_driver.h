// SPDX-License-Identifier: Apache-2.0
// The call of an engine that multiplies digits of x (digits.h). A Core supplies
//
//   kRows                                   rows of x that its kernels take at once, at most
//   largest(x, count)                       what largest_magnitude gives
//   split(x, begin, end, scale, swap, out, stride, third)   what split_digits gives
//   tiles(code, rows)                       of a whole strip that a kernel takes: kStrip or 1
//   kernel(code, rows, tiles)               a kernel for so many tiles
//
// Strips and panels are multiplied in the order of common/partition.h. Where K is cut among
// threads, what segments add up to is kept, and added in order when all is there. Segments are
// exact sums but for three roundings, and added in order of K: neither rows nor threads change a
// result.
#pragma once

#include "cpu/common/panels.h"
#include "cpu/common/schedule.h"
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
  const uint8_t* third;    // [block] whether any row has a third digit other than 0
  const float* units;      // [segment][row] digit_unit
  const DigitSums* start;  // [segment][row] -middle times the sums of digits
  const float* row_sums;   // [segment][row] sum of x, or null without offset
  const uint8_t* of_code;  // of ByteCodes
  int64_t row, tile;       // first of each
  float* sums;             // [segment][row][kStripLanes] to leave sums in, or null to add them up
  float* totals;           // [row][kStripLanes]
};

using DigitKernel = void (*)(const DigitArgs&);

// What a kernel is made for, apart from rows and tiles.
struct DigitCode {
  int bits;
  bool table;  // bytes of codes are looked up
  bool whole;  // segments are whole blocks, and not halves of them
};

template <class Core>
struct DigitCall {
  const Problem& p;
  const Geometry& g;
  const Segment* segments;
  const int32_t* chunk_first;
  int64_t segment_count;
  const ByteCodes& codes;
  bool offset;
  int64_t row0;  // first row of x in the panels
  Panels panels;
  Kept<float> kept;  // [segment][row of the panel][kStripLanes] at each place
  // Of panel i, at begin(i) times what a row takes.
  int8_t* x;
  uint8_t* third;
  float* units;
  DigitSums* start;
  float* row_sums;

  int64_t row_bytes() const { return g.padded_k * kDigits; }
  bool whole() const { return g.groups == 1 || g.padded_group % kBlock == 0; }
  int64_t blocks() const { return g.padded_k / kBlock; }

  void prepare(int64_t panel_begin, int64_t panel_end) const {
    float* row = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(g.padded_k + g.k) * sizeof(float)));
    const bool swap = g.element.bits < 8;
    // A step of x is that of S21 but for what the bytes of the weights are steps of.
    const float steps_of_x = std::ldexp(1.0f, codes.exponent);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t rows = panels.rows(panel), begin = panels.begin(panel);
      uint8_t* flags = third + begin * blocks();
      std::memset(flags, 0, static_cast<size_t>(blocks()));
      for (int64_t r = 0; r < rows; ++r) {
        prepare_row(p, row0 + begin + r, row, row + g.padded_k);
        int8_t* digits = x + begin * row_bytes() + r * kDigitBytes;
        for (int64_t c = 0; c < chunk_count(g); ++c)
          for (int64_t s = chunk_first[c]; s < chunk_first[c + 1]; ++s) {
            const int64_t channel = c * kChunk + segments[s].begin;
            const int64_t count = segments[s].end - segments[s].begin;
            const DigitScale scale = digit_scale(Core::largest(row + channel, count));
            const DigitSums found = Core::split(row, channel, channel + count, scale, swap, digits,
                                                rows * kDigitBytes, flags);
            const int64_t at = begin * segment_count + s * rows + r;
            units[at] = digit_unit(scale, codes.exponent);
            start[at] = {-codes.middle * found.upper, -codes.middle * found.lowest};
            if (offset)
              row_sums[at] = units[at] * steps_of_x *
                             __builtin_fmaf(static_cast<float>(found.lowest), 0x1p-8f,
                                            static_cast<float>(found.upper));
          }
      }
    }
  }

  void multiply(Worker& worker) const {
    float* totals = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(Core::kRows * kStripLanes) * sizeof(float)));
    kept.multiply(
        worker, panels.count,
        [&](const WorkPart& part, float* sums) {
          for (int64_t panel = part.panel0; panel < part.panel1; ++panel)
            multiply(part, panel, sums, totals);
        },
        [&](const WorkPart& part, const float* sums) { add_parts(part, sums, totals); });
  }

  // sums: where those of segments are kept, or null where the part is all of K
  void multiply(const WorkPart& part, int64_t panel, float* sums, float* totals) const {
    const int64_t chunk = sums == nullptr ? 0 : part.cell0;
    const int64_t first = chunk_first[chunk];
    const int64_t count = chunk_first[sums == nullptr ? chunk_count(g) : part.cell1] - first;
    const int64_t begin = panels.begin(panel), rows = panels.rows(panel);
    const int64_t at = begin * segment_count + first * rows;
    DigitArgs args{p,
                   segments + first,
                   count,
                   chunk * kChunk,
                   x + begin * row_bytes() + chunk * (kChunk / kBlock) * rows * kDigitBytes,
                   third + begin * blocks() + chunk * (kChunk / kBlock),
                   units + at,
                   start + at,
                   offset ? row_sums + at : nullptr,
                   codes.of_code,
                   row0 + begin,
                   part.tile0,
                   nullptr,
                   totals};
    const DigitCode code{g.element.bits, codes.table, whole()};
    const int64_t tiles = part.tile1 - part.tile0;
    const int64_t width = tiles == kStrip ? Core::tiles(code, rows) : 1;
    const DigitKernel kernel = Core::kernel(code, rows, width);
    std::memset(totals, 0, static_cast<size_t>(rows * kStripLanes) * sizeof(float));
    for (int64_t tile = 0; tile < tiles; tile += width) {
      args.tile = part.tile0 + tile;
      args.totals = totals + tile * kTile;
      if (sums != nullptr) args.sums = sums + first * rows * kStripLanes + tile * kTile;
      kernel(args);
    }
    if (sums == nullptr) store(part, panel, totals);
  }

  // Adds what the parts of K left of a strip and panel, segment by segment.
  void add_parts(const WorkPart& part, const float* sums, float* totals) const {
    const int64_t panel = part.panel0, tiles = part.tile1 - part.tile0;
    const int64_t rows = panels.rows(panel);
    std::memset(totals, 0, static_cast<size_t>(rows * kStripLanes) * sizeof(float));
    for (int64_t s = 0; s < segment_count; ++s)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        float scale[kTile];
        load_scale(p, part.tile0 + tile, segments[s].group, scale);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < kTile; ++i) {
            float& total = totals[r * kStripLanes + tile * kTile + i];
            const float sum = sums[(s * rows + r) * kStripLanes + tile * kTile + i];
            total = __builtin_fmaf(scale[i], sum, total);
          }
      }
    store(part, panel, totals);
  }

  void store(const WorkPart& part, int64_t panel, float* totals) const {
    for (int64_t r = 0; r < panels.rows(panel); ++r)
      store_row(p, row0 + panels.begin(panel) + r, part.tile0 * kTile,
                (part.tile1 - part.tile0) * kTile, totals + r * kStripLanes);
  }
};

template <class Core>
void run_digits(const Problem& given, const Parallel& parallel) {
  Problem p = given;
  const Geometry& g = p.weight.geometry;
  if (p.x.m == 0 || g.n == 0) return;
  const bool offset = has_offset(p);
  ByteCodes codes;
  read_byte_codes(p.weight, codes);
  const int64_t bound = segment_bound(g);
  const int64_t row_bytes = g.padded_k * (kDigits + 1) + bound * 16;
  int64_t rows_at_once = kDigitRowBytes / row_bytes;
  if (rows_at_once < Core::kRows) rows_at_once = Core::kRows;
  rows_at_once = least(rows_at_once, p.x.m);

  float *factor = nullptr, *units = nullptr, *row_sums = nullptr;
  DigitSums* start = nullptr;
  int8_t* x = nullptr;
  uint8_t* third = nullptr;
  Segment* segments = nullptr;
  int32_t* chunk_first = nullptr;
  carve_from(call_arena(), [&](Carver& carver) {
    factor = carver.take<float>(p.x.activation.present ? p.x.m : 0);
    x = carver.take<int8_t>(rows_at_once * g.padded_k * kDigits);
    third = carver.take<uint8_t>(rows_at_once * (g.padded_k / kBlock));
    units = carver.take<float>(rows_at_once * bound);
    start = carver.take<DigitSums>(rows_at_once * bound);
    row_sums = carver.take<float>(offset ? rows_at_once * bound : 0);
    segments = carver.take<Segment>(bound);
    chunk_first = carver.take<int32_t>(chunk_count(g) + 1);
  });
  measure_input(p, factor);
  const int64_t segment_count = make_segments(g, segments, chunk_first);

  for (int64_t row0 = 0; row0 < p.x.m; row0 += rows_at_once) {
    const int64_t rows = least(p.x.m - row0, rows_at_once);
    const Panels panels(rows, Core::kRows);
    WorkShape shape = work_of(g, panels);
    shape.cells = chunk_count(g);
    shape.cuts_ragged = true;
    const Kept<float> kept(shape, segment_count * panels.rows(0) * kStripLanes, parallel.threads);
    run_call(parallel, panels.count,
             DigitCall<Core>{p, g, segments, chunk_first, segment_count, codes, offset, row0,
                             panels, kept, x, third, units, start, row_sums});
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
