// SPDX-License-Identifier: Apache-2.0
// The plain twin of the integer engines: the same equation, the same segments and the same order of
// additions, one tile at a time. Every engine gives its bits.
#include <cmath>

#include "cpu/common/arena.h"
#include "cpu/repack/quads.h"
#include "rows.h"

namespace compressed_linear::cpu {
namespace {

struct Call {
  const IntegerProblem& p;
  int64_t x_group_count;
  int64_t row0, rows;
  const int8_t* q;           // [rows][padded_k]
  const QuantizedGroup* by;  // [rows][x groups]

  void multiply(int64_t tile) const {
    const Problem& linear = p.linear;
    const Geometry& g = linear.geometry;
    uint8_t* codes = static_cast<uint8_t*>(
        worker_arena().reserve(static_cast<size_t>(g.padded_k + 3 * rows * 4) * kTile));
    float* totals = reinterpret_cast<float*>(codes + g.padded_k * kTile);
    float* grouped = totals + rows * kTile;
    float* group_sums = grouped + rows * kTile;  // one for each row
    for (int64_t k = 0; k < g.padded_k; k += kBlock)
      unpack_quads_block(g, linear.packed, tile, k, codes + k * kTile);
    std::memset(codes + g.padded_k * kTile, 0, static_cast<size_t>(3 * rows * kTile) * 4);
    const bool per_row = p.activation.group == 0;
    for_each_segment(g, p.activation.group, [&](const IntegerSegment& segment) {
      float scale[kTile], negated_offset[kTile];
      load_scale(linear, tile, segment.group, scale);
      load_negated_offset(linear, tile, segment.group, negated_offset);
      for (int64_t r = 0; r < rows; ++r) {
        const QuantizedGroup& group = by[r * x_group_count + segment.x_group];
        const float scale_x = per_row ? 1.0f : group.scale;
        const int32_t middle = static_cast<int32_t>(linear.middle);
        int32_t acc[kTile] = {}, sum = 0;
        for (int64_t k = segment.begin; k < segment.end; ++k) {
          const int32_t value = q[r * g.padded_k + k] - group.zero;
          sum += value;
          for (int64_t i = 0; i < kTile; ++i) acc[i] += value * (codes[k * kTile + i] - middle);
        }
        group_sums[r] = add_segment(segment, scale_x, static_cast<float>(sum), group_sums[r]);
        for (int64_t i = 0; i < kTile; ++i) {
          float& value = grouped[r * kTile + i];
          value = add_segment(segment, scale_x, static_cast<float>(acc[i]), value);
          if (!segment.last) continue;
          if (has_offset(linear)) value = std::fma(group_sums[r], negated_offset[i], value);
          float& total = totals[r * kTile + i];
          total = std::fma(scale[i], value, total);
        }
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      if (per_row)
        for (int64_t i = 0; i < kTile; ++i) totals[r * kTile + i] *= by[r].scale;
      store_row(linear, row0 + r, tile * kTile, kTile, totals + r * kTile);
    }
  }
};

void linear(const IntegerProblem& p, const Parallel& parallel) {
  const Geometry& g = p.linear.geometry;
  if (p.linear.m == 0 || g.n == 0) return;
  constexpr int64_t kRowsAtOnce = 64;
  const int64_t rows_at_once = p.linear.m < kRowsAtOnce ? p.linear.m : kRowsAtOnce;
  const int64_t x_group_count = x_groups(g, p.activation.group);
  const int64_t by_bytes =
      rows_at_once * x_group_count * static_cast<int64_t>(sizeof(QuantizedGroup));
  const int64_t row_bytes = 2 * g.padded_k * 4;
  uint8_t* memory = static_cast<uint8_t*>(
      call_arena().reserve(static_cast<size_t>(row_bytes + by_bytes + rows_at_once * g.padded_k)));
  float* row = reinterpret_cast<float*>(memory);
  QuantizedGroup* by = reinterpret_cast<QuantizedGroup*>(memory + row_bytes);
  int8_t* q = reinterpret_cast<int8_t*>(memory + row_bytes + by_bytes);
  for (int64_t row0 = 0; row0 < p.linear.m; row0 += rows_at_once) {
    const int64_t left = p.linear.m - row0;
    const int64_t rows = left < rows_at_once ? left : rows_at_once;
    for (int64_t r = 0; r < rows; ++r)
      quantize_row(p, row0 + r, row, row + g.padded_k, q + r * g.padded_k, by + r * x_group_count,
                   quantize_values);
    const Call call{p, x_group_count, row0, rows, q, by};
    parallel.run(
        g.tiles,
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t tile = begin; tile < end; ++tile)
            static_cast<const Call*>(context)->multiply(tile);
        },
        const_cast<Call*>(&call));
  }
}

}  // namespace

const IntegerEngine kIntegerEngineGeneric = {"generic", &linear};

}  // namespace compressed_linear::cpu
