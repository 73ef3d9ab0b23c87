// SPDX-License-Identifier: Apache-2.0
// What the vector unit does for TileUnit: it scales the sums of segments that tile registers left,
// adds them over groups, and stores the results.
#pragma once

#include "call.h"
#include "cpu/common/amx_tiles.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

static_assert(kRowBytes == kTileRowBytes && kTile * 4 == kTileRowBytes,
              "a row of the layout is a row of a tile register");

constexpr int64_t kTileNumbers = kTileRows * kTile;  // sums that a tile register holds

// Rows cut into panels of two tiles of rows.
struct TilePanels {
  static constexpr int64_t kRows = 2 * kTileRows;
  int64_t all, count;
  explicit TilePanels(int64_t rows) : all(rows), count((rows + kRows - 1) / kRows) {}
  int64_t begin(int64_t panel) const { return panel * kRows; }
  int64_t rows(int64_t panel) const { return least(all - begin(panel), kRows); }
  int64_t row_tiles(int64_t panel) const { return rows(panel) > kTileRows ? 2 : 1; }
};

// Panels [panel0, panel1) times the strip that begins with tile0.
struct UnitOfWork {
  int64_t panel0, panel1, tile0;
};

// Four tiles of sums, each [row][channel] of int32, by row tile, column and segment.
struct TileJob {
  int64_t panel, row_tile, column;  // of the first tile, the row tile within its panel
  int rows, columns, segments;      // tiles in each direction
  int64_t segment;                  // the first one
};

template <class Core>
class TileTotals {
 public:
  using Call = IntegerCall<TilePanels>;

  // groups: at most, of a chunk. affine: something is added to the products.
  TileTotals(const Call& call, bool affine) : c_(call), affine_(affine) {}
  void carve(Carver& carver, int64_t numbers, int64_t groups) {
    totals_ = carver.take<float>(numbers);
    grouped_ = carver.take<float>(numbers);
    scales_ = carver.take<float>(groups * kStrip * kTile);
    offsets_ = carver.take<float>(c_.offset ? groups * kStrip * kTile : 0);
  }

  void begin_unit(const UnitOfWork& unit, int64_t row_tiles) {
    unit_ = unit;
    tiles_ = c_.strip_tiles(unit.tile0);
    std::memset(totals_, 0, static_cast<size_t>(row_tiles * tiles_ * kTileNumbers) * sizeof(float));
  }

  // Reads the scales of the groups that end in chunk c.
  void begin_chunk(int64_t c) {
    const Piece* first = c_.pieces + c_.chunk_pieces[c];
    const Piece* last = c_.pieces + c_.chunk_pieces[c + 1] - 1;
    const IntegerSegment& segment = c_.segments[last->segment];
    group0_ = c_.segments[first->segment].group;
    const int64_t end = segment.group + (segment.last && last->last ? 1 : 0);
    for (int64_t group = group0_; group < end; ++group)
      for (int64_t t = 0; t < tiles_; ++t) {
        const int64_t at = number_at(group, t);
        load_scale(c_.p, unit_.tile0 + t, group, scales_ + at);
        if (c_.offset) load_negated_offset(c_.p, unit_.tile0 + t, group, offsets_ + at);
      }
  }

  // Where the numbers of a tile begin, [row tile][column][row][channel].
  int64_t tile_at(int64_t panel, int64_t row_tile, int64_t column) const {
    return ((2 * (panel - unit_.panel0) + row_tile) * tiles_ + column) * kTileNumbers;
  }

  void add(const TileJob& job, const int32_t* sums) {
    if (c_.per_row) {
      affine_ ? add<false, true>(job, sums) : add<false, false>(job, sums);
    } else {
      affine_ ? add<true, true>(job, sums) : add<true, false>(job, sums);
    }
  }

  void store(int64_t panel) const {
    const Problem& p = c_.p;
    const int64_t first = unit_.tile0 * kTile, begin = c_.panels.begin(panel);
    const bool plain = p.x.factor == nullptr && p.weight.row_scale == nullptr &&
                       p.y.bias == nullptr && p.y.type == Scalar::bfloat16 &&
                       first + tiles_ * kTile <= c_.g.n;
    alignas(64) float row[kStrip * kTile];
    for (int64_t r = 0; r < c_.panels.rows(panel); ++r) {
      const float* from = totals_ + tile_at(panel, r / kTileRows, 0) + r % kTileRows * kTile;
      if (plain) {
        uint16_t* to = static_cast<uint16_t*>(p.y.data) + (c_.row0 + begin + r) * c_.g.n + first;
        const auto by = Core::set(c_.per_row ? c_.scale_x[begin * c_.x_group_count + r] : 1.0f);
        for (int64_t t = 0; t < tiles_; ++t)
          Core::store_bf16(to + t * kTile, Core::multiply(Core::load(from + t * kTileNumbers), by));
        continue;
      }
      for (int64_t t = 0; t < tiles_; ++t)
        Core::store(row + t * kTile, Core::load(from + t * kTileNumbers));
      c_.store(panel, r, unit_.tile0, tiles_ * kTile, row);
    }
  }

 private:
  // Where the scales of a group and tile begin.
  int64_t number_at(int64_t group, int64_t column) const {
    return ((group - group0_) * kStrip + column) * kTile;
  }

  // kGrouped: x has scales within a row. kAffine: something is added to the products.
  template <bool kGrouped, bool kAffine>
  void add(const TileJob& job, const int32_t* sums) {
    for (int i = 0; i < job.rows; ++i)
      for (int j = 0; j < job.columns; ++j, sums += kTileNumbers) {
        if (job.segments == 4) {
          add_tile<4, kGrouped, kAffine>(job, i, j, sums);
        } else if (job.segments == 2) {
          add_tile<2, kGrouped, kAffine>(job, i, j, sums);
        } else {
          add_tile<1, kGrouped, kAffine>(job, i, j, sums);
        }
      }
  }

  template <int kSegments, bool kGrouped, bool kAffine>
  void add_tile(const TileJob& job, int i, int j, const int32_t* sums) {
    const IntegerSegment *first = c_.segments + job.segment, *last = first + kSegments - 1;
    if (!first->first || !last->last || first->group != last->group) {
      add_rows<kSegments, kGrouped, kAffine, false>(job, i, j, sums);
    } else {
      add_rows<kSegments, kGrouped, kAffine, true>(job, i, j, sums);
    }
  }

  // kWhole: the segments are those of one weight group.
  template <int kSegments, bool kGrouped, bool kAffine, bool kWhole>
  void add_rows(const TileJob& job, int i, int j, const int32_t* sums) {
    using Float = typename Core::Float;
    const int64_t row_tile = job.row_tile + i, column = job.column + j;
    const int64_t rows = c_.panels.rows(job.panel), row0 = row_tile * kTileRows;
    const int64_t begin = c_.panels.begin(job.panel), at = tile_at(job.panel, row_tile, column);
    const IntegerSegment* segments = c_.segments + job.segment;
    const int32_t* start = c_.start + begin * c_.segment_count + job.segment * rows + row0;
    const int32_t* code_sums = c_.p.weight.code_sums;
    if (code_sums != nullptr)
      code_sums += ((unit_.tile0 + column) * c_.segment_count + job.segment) * kTile;
    const float *by[kSegments], *group_sum[kSegments];
    const int32_t* zero_x[kSegments];
    bool firsts[kSegments], lasts[kSegments];
    int64_t numbers[kSegments];
    for (int s = 0; s < kSegments; ++s) {
      const IntegerSegment& segment = segments[s];
      firsts[s] = kWhole ? s == 0 : segment.first;
      lasts[s] = kWhole ? s == kSegments - 1 : segment.last;
      numbers[s] = number_at(segment.group, column);
      group_sum[s] = c_.group_sums + begin * c_.g.groups + segment.group * rows + row0;
      const int64_t x_at = begin * c_.x_group_count + segment.x_group * rows + row0;
      by[s] = c_.scale_x + x_at;
      zero_x[s] = c_.zero_x + x_at;
    }
    const bool with_offset = c_.offset;
    const int64_t height = least(rows - row0, kTileRows);
    float *totals = totals_ + at, *grouped = grouped_ + at;
    const float *scales = scales_, *offsets = offsets_;
    for (int64_t r = 0; r < height; ++r) {
      Float total = Core::load(totals + r * kTile), value = total;
      if (!firsts[0]) value = Core::load(grouped + r * kTile);
#pragma GCC unroll 4
      for (int s = 0; s < kSegments; ++s) {
        typename Core::Reg sum = Core::load(sums + s * kTileNumbers + r * kTile);
        if constexpr (kAffine) {
          sum = Core::add(sum, Core::set(start[s * rows + r]));
          if (code_sums != nullptr)
            sum = Core::subtract(
                sum, Core::multiply(Core::set(zero_x[s][r]), Core::load(code_sums + s * kTile)));
        }
        const Float product = Core::convert(sum);
        if constexpr (kGrouped) {
          const Float scale_x = Core::set(by[s][r]);
          value = firsts[s] ? Core::multiply(scale_x, product) : Core::fma(scale_x, product, value);
        } else {
          value = firsts[s] ? product : Core::add(product, value);
        }
        if (!lasts[s]) continue;
        if (with_offset)
          value = Core::fma(Core::set(group_sum[s][r]), Core::load(offsets + numbers[s]), value);
        total = Core::fma(Core::load(scales + numbers[s]), value, total);
      }
      Core::store(totals + r * kTile, total);
      if (!lasts[kSegments - 1]) Core::store(grouped + r * kTile, value);
    }
  }

  const Call& c_;
  const bool affine_;
  UnitOfWork unit_{};
  int64_t tiles_ = 0, group0_ = 0;
  float *totals_ = nullptr, *grouped_ = nullptr;  // [row tile][tile][16][16]; of unfinished groups
  float *scales_ = nullptr, *offsets_ = nullptr;  // [group of the chunk][kStrip][16]
};

}  // namespace
}  // namespace compressed_linear::cpu
