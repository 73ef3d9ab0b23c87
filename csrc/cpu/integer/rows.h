// SPDX-License-Identifier: Apache-2.0
// Cutting K into segments and quantizing rows of x, the same for every engine and bit for bit.
#pragma once

#include "cpu/common/rows.h"
#include "layouts/quads.h"
#include "segments.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Stored channels [begin, end) of one weight group and one activation group. Their products are
// added up as integers, exactly, and scaled once.
struct IntegerSegment {
  int32_t begin, end;  // multiples of a quad
  int32_t group, x_group;
  bool first, last;  // of the segments of the weight group
};

// The order of additions, the same in every engine. Over the segments of a weight group, in order
// of K, with the scale of x (1 where that waits for the end of the row):
//   group_value = add_segment(..., float(sum (q - zero_x)(code - middle)), group_value)
//   group_sum   = add_segment(..., float(sum (q - zero_x)), group_sum)
// and over the groups, where zero points or an offset take part from the second line on:
//   total = fma(scale, fma(group_sum, -(zero + offset), group_value), total)
inline float add_segment(const IntegerSegment& segment, float scale_x, float value, float before) {
  return segment.first ? scale_x * value : __builtin_fmaf(scale_x, value, before);
}

// Keeps |sum of (q - zero)(code - middle)| <= 255 * 255 * length below 2^31, and the sum of
// (q - zero) exact in fp32.
constexpr int64_t kSegmentLimit = 32768;
static_assert(255 * 255 * kSegmentLimit < (int64_t{1} << 31) && 255 * kSegmentLimit < (1 << 24),
              "int32 and fp32 hold the sums of a segment");

// Row 0 of the block of a tile that holds stored channel `k`.
[[gnu::always_inline]] inline const uint8_t* quads_of(const Weight& w, int64_t tile, int64_t k) {
  return w.packed + tile / kStrip * w.strip_bytes + k / kBlock * w.geometry.block_stride(tile) +
         tile % kStrip * kRowBytes;
}

inline int64_t x_groups(const Geometry& g, int64_t activation_group) {
  return activation_group == 0 ? 1 : (g.k + activation_group - 1) / activation_group;
}

// Where activation group `x_group` ends in the stored channels.
inline int64_t x_group_end(const Geometry& g, int64_t activation_group, int64_t x_group) {
  const int64_t channel = (x_group + 1) * activation_group;
  return activation_group == 0 || channel >= g.k ? g.used_k() : g.position(channel);
}

// Calls add(segment) in order of K. Segments follow each other without gaps up to used_k.
template <class Add>
void for_each_segment(const Geometry& g, int64_t activation_group, const Add& add) {
  int64_t x_group = 0;
  for (int64_t at = 0; at < g.used_k();) {
    const int64_t group = at / g.padded_group;
    int64_t end = (group + 1) * g.padded_group;
    const int64_t x_end = x_group_end(g, activation_group, x_group);
    if (x_end < end) end = x_end;
    if (at + kSegmentLimit < end) end = at + kSegmentLimit;
    add(IntegerSegment{static_cast<int32_t>(at), static_cast<int32_t>(end),
                       static_cast<int32_t>(group), static_cast<int32_t>(x_group),
                       at == group * g.padded_group, end == (group + 1) * g.padded_group});
    at = end;
    if (at == x_end) ++x_group;
  }
}

// Adding and subtracting it rounds half to even what is below 2^22.
constexpr float kRounder = 12582912.0f;

struct QuantizedGroup {
  float scale;
  int32_t zero;
};

// The scale is NaN where the result must be.
template <class Core>
QuantizedGroup quantize_group(const Activation& rule, const float* row, int64_t count) {
  const float largest = Core::largest(row, count);
  const QuantizedGroup bad = {float_of(0x7fc00000u), 0};
  if (std::isnan(largest)) return bad;
  if (!rule.dynamic) return {rule.scale, static_cast<int32_t>(rule.zero)};
  if (std::isinf(largest)) return bad;
  if (rule.symmetric) {
    const float scale = largest / rule.maximum;
    return {scale == 0.0f ? 1.0f : scale, 0};
  }
  const Affine by = affine_of(range_of(row, count), 128.0f);
  if (!std::isfinite(by.scale)) return bad;
  return {by.scale, static_cast<int32_t>(by.zero)};
}

// q[i] for x[i], with the given scale and zero.
inline void quantize_values(const float* x, int64_t count, QuantizedGroup by, int8_t* q) {
  for (int64_t i = 0; i < count; ++i) {
    float value = x[i] / by.scale;
    value = value < -1024.0f ? -1024.0f : value;  // clamped for good below
    value = value > 1024.0f ? 1024.0f : value;
    int32_t code = static_cast<int32_t>(bits_of(value + kRounder) - bits_of(kRounder)) + by.zero;
    code = code < -128 ? -128 : code;
    code = code > 127 ? 127 : code;
    q[i] = static_cast<int8_t>(code);
  }
}

// What rows are quantized with, in plain C++.
struct PlainCore {
  static float largest(const float* x, int64_t count) { return largest_magnitude(x, count); }
  static void quantize(const float* x, int64_t count, QuantizedGroup by, int8_t* q) {
    quantize_values(x, count, by, q);
  }
};

// Row m of x as bytes in the order of the packed weights, q[padded_k], with the groups' scales and
// zeros at by[0], by[stride], ... Channels that are padding or gathered from nowhere hold the zero.
// row[padded_k] and scratch[k] are scratch. Core: PlainCore, or what gives the same.
template <class Core>
void quantize_to_bytes(const Problem& p, int64_t m, float* row, float* scratch, int8_t* q,
                       QuantizedGroup* by) {
  const Geometry& g = p.weight.geometry;
  gather_row(p, m, row, scratch);
  const Activation& rule = p.x.activation;
  const int64_t count = x_groups(g, rule.group);
  int64_t begin = 0;
  for (int64_t x_group = 0; x_group < count; ++x_group) {
    const int64_t end = x_group_end(g, rule.group, x_group);
    by[x_group] = quantize_group<Core>(rule, row + begin, end - begin);
    Core::quantize(row + begin, end - begin, by[x_group], q + begin);
    begin = end;
  }
  std::memset(q + begin, 0, static_cast<size_t>(g.padded_k - begin));
}

// Sum of the bytes of a segment.
inline int32_t sum_bytes(const int8_t* q, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += q[i];
  return sum;
}

}  // namespace
}  // namespace compressed_linear::cpu
