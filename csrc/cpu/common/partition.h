// SPDX-License-Identifier: Apache-2.0
// How the work of a call is cut among threads: a pure function of its sizes and their number.
//
// Work is laid on a line: columns of tiles, in each panels of rows, in each cells of K. Every
// thread has a range of equal cost, which is contiguous in the packed weights too, and takes it
// unit by unit; what others have left over it takes when its own is done (schedule.h). Where a
// border falls inside a column and panel, K is cut there: what its parts add up to is kept apart,
// segment by segment, and added in order of K. So no border changes a result.
#pragma once

#include "layouts/planes.h"
#include "least.h"
#include "panels.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Packed weights worth a thread's while, counted again for every panel that reads them.
constexpr int64_t kLeastRangeBytes = 16 << 10;
constexpr int64_t kMostUnits = 16;     // of a thread's range
constexpr int64_t kUsualCutUnits = 4;  // where units are less than a column
constexpr int64_t kDecodingRows = 2;   // rows that take as long as decoding does

struct WorkShape {
  int64_t tiles, tile_bytes;
  int64_t column;            // tiles that every row meets one after another, whole strips
  int64_t panels, higher;    // of these the first
  int64_t high, low;         // what one of the higher panels costs, and one of the others
  int64_t cells = 1;         // of K in every column and panel; 1: K is not cut
  bool cuts_ragged = false;  // whether K of a last column of fewer tiles can be cut
};

// Cells [cell0, cell1) of tiles and panels of a column: all cells where there are several panels.
struct WorkPart {
  int64_t tile0, tile1, panel0, panel1, cell0, cell1;
  int64_t unit;  // that it is part of
};

// What rows of a panel cost, their decoding with them.
inline WorkShape work_of(const Geometry& g, const Panels& panels) {
  return {g.tiles,
          g.tile_bytes(),
          kStrip,
          panels.count,
          panels.longer,
          panels.base + 1 + kDecodingRows,
          panels.base + kDecodingRows};
}

class Partition {
 public:
  Partition(const WorkShape& shape, int64_t threads)
      : s_(shape),
        columns_((shape.tiles + shape.column - 1) / shape.column),
        panels_cost_(shape.higher * shape.high + (shape.panels - shape.higher) * shape.low),
        column_cost_(shape.column * shape.cells * panels_cost_) {
    const int64_t bytes = s_.tiles * s_.tile_bytes * s_.panels;
    ranges_ = greatest(least(threads, bytes / kLeastRangeBytes), 1);
    // Several columns, or where there are too few several parts of them, so that a thread that was
    // interrupted finds help.
    const int64_t columns = columns_ / ranges_, jobs = columns_ * s_.panels / ranges_;
    each_ = ranges_ == 1   ? 1
            : columns >= 2 ? least(columns, kMostUnits)
            : jobs >= 2    ? least(jobs, kMostUnits)
            : !is_cut()    ? 1
                           : greatest(least(bytes / ranges_ / kLeastRangeBytes, kUsualCutUnits), 1);
    whole_columns_ = columns >= 2;
    cut_units_ = jobs < 2;
    total_ = s_.tiles * s_.cells * panels_cost_;
    range_near_ = total_ / ranges_ / 64;
    unit_near_ = total_ / units() / 2;
  }

  int64_t ranges() const { return ranges_; }        // threads that have one
  int64_t units_of_range() const { return each_; }  // range i begins with unit i times that
  int64_t units() const { return ranges_ * each_; }
  int64_t cells() const { return s_.cells; }
  bool is_cut() const { return s_.cells > 1; }

  // The first cell of a unit, counted along the line; of units() the end of it.
  int64_t border(int64_t unit) const {
    if (unit == 0) return 0;
    if (unit == units()) return columns_ * s_.panels * s_.cells;
    const int64_t at = total_ * unit / units();
    const bool between = unit % each_ == 0;
    const int64_t near = between ? range_near_ : unit_near_;
    const int64_t column_near = !between && whole_columns_ ? column_cost_ : near;
    const int64_t column = least(at / column_cost_, columns_ - 1);
    const int64_t tiles = tiles_of(column), row_cost = tiles * s_.cells;
    int64_t rest = at - column * column_cost_;
    const int64_t column_end = row_cost * panels_cost_;
    if (rest <= column_near && rest <= column_end - rest) return column * s_.panels * s_.cells;
    if (column_end - rest <= column_near) return (column + 1) * s_.panels * s_.cells;
    const int64_t of_panels = rest / row_cost, of_higher = s_.higher * s_.high;
    const int64_t panel =
        of_panels < of_higher ? of_panels / s_.high : s_.higher + (of_panels - of_higher) / s_.low;
    rest -= row_cost * (least(panel, s_.higher) * (s_.high - s_.low) + panel * s_.low);
    const int64_t cell_cost = tiles * (panel < s_.higher ? s_.high : s_.low);
    const int64_t job_end = cell_cost * s_.cells;
    const bool cut = is_cut() && (between || cut_units_) && (tiles == s_.column || s_.cuts_ragged);
    const int64_t job_near = cut ? near : job_end;
    int64_t cell = (rest + cell_cost / 2) / cell_cost;
    if (rest <= job_near && rest <= job_end - rest) {
      cell = 0;
    } else if (job_end - rest <= job_near) {
      cell = s_.cells;
    }
    return (column * s_.panels + panel) * s_.cells + cell;
  }

  // Calls take(part) for the parts of a unit, in order; `most` panels at once.
  template <class Take>
  void for_each_part(int64_t unit, int64_t most, const Take& take) const {
    int64_t at = border(unit);
    const int64_t end = border(unit + 1);
    while (at < end) {
      const int64_t job = at / s_.cells, cell = at % s_.cells;
      const int64_t column = job / s_.panels, panel = job % s_.panels;
      const int64_t tile0 = column * s_.column, tile1 = tile0 + tiles_of(column);
      const int64_t whole = cell == 0 ? (end - at) / s_.cells : 0;
      if (whole > 0) {
        const int64_t panels = least(least(whole, most), s_.panels - panel);
        take(WorkPart{tile0, tile1, panel, panel + panels, 0, s_.cells, unit});
        at += panels * s_.cells;
      } else {
        const int64_t cells = least(end - at, s_.cells - cell);
        take(WorkPart{tile0, tile1, panel, panel + 1, cell, cell + cells, unit});
        at += cells;
      }
    }
  }

  bool is_whole(const WorkPart& part) const { return part.cell1 - part.cell0 == s_.cells; }

  // Places for what is kept of a column and panel whose K is cut: each border that can cut has one,
  // counted from 0. All that is kept goes to that of the first border inside.
  int64_t places() const { return (cut_units_ ? units() : ranges_) - 1; }
  int64_t place(const WorkPart& part) const {
    return place_of(part.cell0 == 0 ? part.unit + 1 : first_inside(part));
  }
  // The place of the border that a part begins with, if that cuts K.
  int64_t place_of(int64_t unit) const { return (cut_units_ ? unit : unit / each_) - 1; }

  // Calls take(place, cell) for the borders inside of the column and panel of a part.
  template <class Take>
  void for_each_cut(const WorkPart& part, const Take& take) const {
    const int64_t begin = begin_of(part), step = cut_units_ ? 1 : each_;
    for (int64_t unit = part.cell0 == 0 ? part.unit + 1 : first_inside(part);
         border(unit) < begin + s_.cells; unit += step)
      if (border(unit) < border(unit + 1)) take(place_of(unit), border(unit) - begin);
  }

 private:
  int64_t begin_of(const WorkPart& part) const {
    return (part.tile0 / s_.column * s_.panels + part.panel0) * s_.cells;
  }
  // Of part.unit or before, where it begins inside of a column and panel.
  int64_t first_inside(const WorkPart& part) const {
    const int64_t begin = begin_of(part), step = cut_units_ ? 1 : each_;
    int64_t unit = part.unit;
    while (border(unit - step) > begin) unit -= step;
    return unit;
  }
  int64_t tiles_of(int64_t column) const { return least(s_.tiles - column * s_.column, s_.column); }

  WorkShape s_;
  int64_t columns_, panels_cost_, column_cost_;
  int64_t ranges_, each_, total_;
  // How far off a column or a job may be to be taken for a border: between threads little.
  int64_t range_near_, unit_near_;
  bool whole_columns_;  // borders other than those between threads are those of columns
  bool cut_units_;      // they can cut K
};

constexpr int64_t kKeptBytesOfThread = 512 << 10;  // at most, of what parts of K add up to

// place_bytes: what is kept of a column and panel whose K is cut. K is not cut for one thread, and
// where that takes too much memory.
inline Partition partition_of(WorkShape shape, int64_t threads, int64_t place_bytes) {
  if (threads > 1 && shape.cells > 1) {
    const Partition cut(shape, threads);
    if (cut.places() * place_bytes <= threads * kKeptBytesOfThread) return cut;
  }
  shape.cells = 1;
  return Partition(shape, threads);
}

}  // namespace
}  // namespace compressed_linear::cpu
