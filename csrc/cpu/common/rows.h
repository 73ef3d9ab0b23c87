// SPDX-License-Identifier: Apache-2.0
// The two things every engine does to a call before multiplying: cutting K into segments, and
// bringing rows of x into the order of the packed weights.
//
// Batch invariance rests on this file: segments depend on the geometry only, and a row is gathered,
// converted and summed without regard to the other rows.
#pragma once

#include <cstring>

#include "activation.h"
#include "cpu/float/engine.h"
#include "floats.h"

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
    const int64_t stop = start + kChunk < used ? start + kChunk : used;
    for (int64_t at = start; at < stop;) {
      const int64_t group = at / g.padded_group;
      const int64_t group_end = (group + 1) * g.padded_group;
      const int64_t end = group_end < stop ? group_end : stop;
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
  return p.geometry.identity() && p.perm == nullptr && p.x_column_stride == 1;
}

// Row m of x in fp32 and in the order of the packed weights: row[padded_k].
inline void widen_row(const Problem& p, int64_t m, float* row) {
  const Geometry& g = p.geometry;
  const int64_t base = m * p.x_row_stride;
  if (in_order(p)) {
    load_scalars(p.x, p.x_type, base, g.k, row);
    std::memset(row + g.k, 0, static_cast<size_t>(g.padded_k - g.k) * sizeof(float));
    return;
  }
  std::memset(row, 0, static_cast<size_t>(g.padded_k) * sizeof(float));
  int64_t channel = 0;
  for (int64_t group = 0; group < g.groups; ++group) {
    float* to = row + group * g.padded_group;
    for (int64_t i = 0; i < g.group; ++i, ++channel) {
      const int64_t from = p.perm != nullptr ? p.perm[channel] : channel;
      if (from >= 0) to[i] = load_scalar(p.x, p.x_type, base + from * p.x_column_stride);
    }
  }
}

// True where x is more than gathered.
inline bool transforms_input(const Problem& p) {
  return p.prescale != nullptr || p.activation.present;
}

// The type that holds every number of the rows that prepare_row gives.
inline Scalar prepared_type(const Problem& p) {
  if (p.activation.present) return quantised_type(p.activation);
  return p.prescale != nullptr ? Scalar::float32 : p.x_type;
}

// Row m of x as it is multiplied: row[padded_k]. scratch[k] is used where x is transformed.
inline void prepare_row(const Problem& p, int64_t m, float* row, float* scratch) {
  const Geometry& g = p.geometry;
  widen_row(p, m, row);
  if (!transforms_input(p)) return;
  float* values = g.identity() ? row : scratch;
  if (values != row)
    for (int64_t group = 0; group < g.groups; ++group)
      std::memcpy(values + group * g.group, row + group * g.padded_group,
                  static_cast<size_t>(g.group) * sizeof(float));
  if (p.prescale != nullptr)
    for (int64_t i = 0; i < g.k; ++i) values[i] *= p.prescale[i];
  if (p.activation.present) {
    const float factor = quantise_row(p.activation, values, g.k);
    if (p.input_factor != nullptr) p.input_factor[m] = factor;
  }
  if (values != row)
    for (int64_t group = 0; group < g.groups; ++group)
      std::memcpy(row + group * g.padded_group, values + group * g.group,
                  static_cast<size_t>(g.group) * sizeof(float));
}

// Finds what all rows of x share, where they share a dynamic scale. row[padded_k], scratch[k].
inline void measure_tensor(Problem& p, float* row, float* scratch) {
  Activation& a = p.activation;
  if (!a.present || !a.dynamic || !a.whole_tensor) return;
  Problem plain = p;
  plain.activation.present = false;
  float low = 0.0f, high = 0.0f;
  for (int64_t m = 0; m < p.m; ++m) {
    prepare_row(plain, m, row, scratch);
    const Range range = range_of(row, p.geometry.padded_k);
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
inline bool has_offset(const Problem& p) { return p.zero != nullptr || p.offset != 0.0f; }

// The sixteen scales of a tile and group, and the offsets subtracted from decoded weights.
inline void load_scale(const Problem& p, int64_t tile, int64_t group, float* scale) {
  if (p.scale == nullptr) {
    for (int64_t i = 0; i < kTile; ++i) scale[i] = 1.0f;
  } else {
    load_scalars(p.scale, p.scale_type, (tile * p.geometry.groups + group) * kTile, kTile, scale);
  }
}

inline void load_negated_offset(const Problem& p, int64_t tile, int64_t group, float* offset) {
  if (p.zero == nullptr) {
    for (int64_t i = 0; i < kTile; ++i) offset[i] = -p.offset;
    return;
  }
  load_scalars(p.zero, p.zero_type, (tile * p.geometry.groups + group) * kTile, kTile, offset);
  for (int64_t i = 0; i < kTile; ++i) offset[i] = -(offset[i] + p.offset);
}

// Writes channels [first, first + count) of row m, scaled and with the bias. totals is clobbered.
inline void store_row(const Problem& p, int64_t m, int64_t first, int64_t count, float* totals) {
  if (first + count > p.geometry.n) count = p.geometry.n - first;
  if (p.input_factor != nullptr)
    for (int64_t i = 0; i < count; ++i) totals[i] *= p.input_factor[m];
  if (p.row_scale != nullptr)
    for (int64_t i = 0; i < count; ++i) totals[i] *= p.row_scale[first + i];
  if (p.bias != nullptr) {
    float bias[kTile];
    for (int64_t i = 0; i < count; i += kTile) {
      const int64_t width = count - i < kTile ? count - i : kTile;
      load_scalars(p.bias, p.bias_type, first + i, width, bias);
      for (int64_t j = 0; j < width; ++j) totals[i + j] += bias[j];
    }
  }
  store_scalars(p.out, p.out_type, m * p.geometry.n + first, count, totals);
}

}  // namespace
}  // namespace compressed_linear::cpu
