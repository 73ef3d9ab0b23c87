// SPDX-License-Identifier: Apache-2.0
// The two things every engine does to a call before multiplying: cutting K into segments, and
// bringing rows of x into the order of the packed weights.
//
// Batch invariance rests on this file: segments depend on the geometry only, and a row is gathered,
// converted and summed without regard to the other rows.
#pragma once

#include <cstring>

#include "activation.h"
#include "floats.h"
#include "least.h"
#include "problem.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Input channels [begin, end) of one group inside one chunk. Partial sums are formed per segment
// and scaled once.
struct Segment {
  int32_t begin, end;  // relative to the start of the chunk, both even
  int32_t group;
};

inline int64_t chunk_count(const Geometry& g) { return (g.padded_k + kChunk - 1) / kChunk; }

// An upper bound of the number of segments.
inline int64_t segment_bound(const Geometry& g) { return g.groups + chunk_count(g); }

// Fills segments in order of K and first[c] = index of chunk c's first one (chunk_count + 1
// entries); returns their number. The padding behind the last group is in no segment.
inline int64_t make_segments(const Geometry& g, Segment* segments, int32_t* first) {
  int64_t count = 0, chunk = 0;
  const int64_t used = g.used_k();
  for (int64_t start = 0; start < used; start += kChunk, ++chunk) {
    first[chunk] = static_cast<int32_t>(count);
    const int64_t stop = least(start + kChunk, used);
    for (int64_t at = start; at < stop;) {
      const int64_t group = at / g.padded_group;
      const int64_t group_end = (group + 1) * g.padded_group;
      const int64_t end = least(group_end, stop);
      segments[count++] = {static_cast<int32_t>(at - start), static_cast<int32_t>(end - start),
                           static_cast<int32_t>(group)};
      at = end;
    }
  }
  for (; chunk <= chunk_count(g); ++chunk) first[chunk] = static_cast<int32_t>(count);
  return count;
}

// Whether a row of x lies in memory as the packed weights want it, but for padding at its end.
inline bool in_order(const Problem& p) {
  return p.weight.geometry.identity() && p.x.perm == nullptr && p.x.column_stride == 1;
}

// Row m of x in fp32 and in the order of the packed weights: row[padded_k]. A perm that names other
// columns than there are, though it is checked when it is prepared, reads none of them.
inline void widen_row(const Problem& p, int64_t m, float* row) {
  const Geometry& g = p.weight.geometry;
  const int64_t base = m * p.x.row_stride;
  if (in_order(p)) {
    load_scalars(p.x.data, p.x.type, base, g.k, row);
    std::memset(row + g.k, 0, static_cast<size_t>(g.padded_k - g.k) * sizeof(float));
    return;
  }
  std::memset(row, 0, static_cast<size_t>(g.padded_k) * sizeof(float));
  int64_t channel = 0;
  for (int64_t group = 0; group < g.groups; ++group) {
    float* to = row + group * g.padded_group;
    for (int64_t i = 0; i < g.group; ++i, ++channel) {
      const int64_t from = p.x.perm != nullptr ? p.x.perm[channel] : channel;
      if (static_cast<uint64_t>(from) < static_cast<uint64_t>(p.x.columns))
        to[i] = load_scalar(p.x.data, p.x.type, base + from * p.x.column_stride);
    }
  }
}

// True where x is more than gathered.
inline bool transforms_input(const Problem& p) {
  return p.x.prescale != nullptr || p.x.activation.present;
}

// The type that holds every number of the rows that prepare_row gives.
inline Scalar prepared_type(const Problem& p) {
  if (p.x.activation.present) return quantized_type(p.x.activation);
  return p.x.prescale != nullptr ? Scalar::float32 : p.x.type;
}

// Calls change(values) with row[padded_k], or where groups are padded with its channels [k] one
// after another in scratch[k].
template <class Change>
void change_row(const Geometry& g, float* row, float* scratch, const Change& change) {
  if (g.identity()) return change(row);
  for (int64_t group = 0; group < g.groups; ++group)
    std::memcpy(scratch + group * g.group, row + group * g.padded_group,
                static_cast<size_t>(g.group) * sizeof(float));
  change(scratch);
  for (int64_t group = 0; group < g.groups; ++group)
    std::memcpy(row + group * g.padded_group, scratch + group * g.group,
                static_cast<size_t>(g.group) * sizeof(float));
}

// Row m of x before it is quantized: row[padded_k]. scratch[k] is used where x is transformed.
inline void gather_row(const Problem& p, int64_t m, float* row, float* scratch) {
  const Geometry& g = p.weight.geometry;
  widen_row(p, m, row);
  if (p.x.prescale == nullptr) return;
  change_row(g, row, scratch, [&](float* values) {
    for (int64_t i = 0; i < g.k; ++i) values[i] *= p.x.prescale[i];
  });
}

// Row m of x as it is multiplied: row[padded_k]. scratch[k] is used where x is transformed.
inline void prepare_row(const Problem& p, int64_t m, float* row, float* scratch) {
  const Geometry& g = p.weight.geometry;
  gather_row(p, m, row, scratch);
  if (!p.x.activation.present) return;
  change_row(g, row, scratch, [&](float* values) {
    const float factor = quantize_in_place(p.x.activation, values, g.k);
    if (p.x.factor != nullptr) p.x.factor[m] = factor;
  });
}

// Finds what all rows of x share, where they share a dynamic scale. row[padded_k], scratch[k].
inline void measure_tensor(Problem& p, float* row, float* scratch) {
  Activation& a = p.x.activation;
  if (!a.present || !a.dynamic || !a.whole_tensor) return;
  float low = 0.0f, high = 0.0f;
  for (int64_t m = 0; m < p.x.m; ++m) {
    gather_row(p, m, row, scratch);
    const Range range = range_of(row, p.weight.geometry.padded_k);
    if (std::isnan(range.low)) {
      low = high = range.low;
      break;
    }
    low = range.low < low ? range.low : low;
    high = range.high > high ? range.high : high;
  }
  a.lowest = low;
  a.highest = a.symmetric && -low > high ? -low : high;
}

// Sum of row over a segment: sixteen interleaved partial sums, then pairwise.
inline float segment_sum(const float* row, int64_t count) {
  float lane[kTile] = {};
  int64_t i = 0;
  for (; i + kTile <= count; i += kTile)
    for (int64_t j = 0; j < kTile; ++j) lane[j] += row[i + j];
  for (int64_t j = 0; i + j < count; ++j) lane[j] += row[i + j];
  for (int64_t half = kTile / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// True when a zero-point term remains after decoding about the middle of the code range.
inline bool has_offset(const Problem& p) {
  return p.weight.zero.data != nullptr || p.weight.offset != 0.0f;
}

// The sixteen scales of a tile and group, and the offsets subtracted from decoded weights.
inline void load_scale(const Problem& p, int64_t tile, int64_t group, float* scale) {
  if (p.weight.scale.data == nullptr) {
    for (int64_t i = 0; i < kTile; ++i) scale[i] = 1.0f;
  } else {
    load_scalars(p.weight.scale.data, p.weight.scale.type, p.weight.scale.at(tile, group), kTile,
                 scale);
  }
}

inline void load_negated_offset(const Problem& p, int64_t tile, int64_t group, float* offset) {
  if (p.weight.zero.data == nullptr) {
    for (int64_t i = 0; i < kTile; ++i) offset[i] = -p.weight.offset;
    return;
  }
  load_scalars(p.weight.zero.data, p.weight.zero.type, p.weight.zero.at(tile, group), kTile,
               offset);
  for (int64_t i = 0; i < kTile; ++i) offset[i] = -(offset[i] + p.weight.offset);
}

// Writes channels [first, first + count) of row m, scaled and with the bias. totals is clobbered.
inline void store_row(const Problem& p, int64_t m, int64_t first, int64_t count, float* totals) {
  count = least(count, p.weight.geometry.n - first);
  if (p.x.factor != nullptr)
    for (int64_t i = 0; i < count; ++i) totals[i] *= p.x.factor[m];
  if (p.weight.row_scale != nullptr)
    for (int64_t i = 0; i < count; ++i) totals[i] *= p.weight.row_scale[first + i];
  if (p.y.bias != nullptr) {
    float bias[kTile];
    for (int64_t i = 0; i < count; i += kTile) {
      const int64_t width = least(count - i, kTile);
      load_scalars(p.y.bias, p.y.bias_type, first + i, width, bias);
      for (int64_t j = 0; j < width; ++j) totals[i + j] += bias[j];
    }
  }
  store_scalars(p.y.data, p.y.type, m * p.weight.geometry.n + first, count, totals);
}

}  // namespace
}  // namespace compressed_linear::cpu
