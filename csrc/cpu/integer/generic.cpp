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
  const Problem& p;
  int64_t x_group_count;
  int64_t row0, rows;
  const int8_t* q;           // [rows][padded_k]
  const QuantizedGroup* by;  // [rows][x groups]

  void multiply(int64_t tile) const {
    const Geometry& g = p.weight.geometry;
    uint8_t* codes = nullptr;
    float *totals = nullptr, *grouped = nullptr, *group_sums = nullptr;  // the last for each row
    carve_from(worker_arena(), [&](Carver& carver) {
      codes = carver.take<uint8_t>(g.padded_k * kTile);
      totals = carver.take<float>(rows * kTile);
      grouped = carver.take<float>(rows * kTile);
      group_sums = carver.take<float>(rows);
    });
    for (int64_t k = 0; k < g.padded_k; k += kBlock)
      unpack_quads_block(g, p.weight.packed, tile, k, codes + k * kTile);
    std::memset(totals, 0, static_cast<size_t>(rows * kTile) * sizeof(float));
    std::memset(grouped, 0, static_cast<size_t>(rows * kTile) * sizeof(float));
    std::memset(group_sums, 0, static_cast<size_t>(rows) * sizeof(float));
    const bool per_row = p.x.activation.group == 0;
    for_each_segment(g, p.x.activation.group, [&](const IntegerSegment& segment) {
      float scale[kTile], negated_offset[kTile];
      load_scale(p, tile, segment.group, scale);
      load_negated_offset(p, tile, segment.group, negated_offset);
      for (int64_t r = 0; r < rows; ++r) {
        const QuantizedGroup& group = by[r * x_group_count + segment.x_group];
        const float scale_x = per_row ? 1.0f : group.scale;
        const int32_t middle = static_cast<int32_t>(p.weight.middle);
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
          if (has_offset(p)) value = std::fma(group_sums[r], negated_offset[i], value);
          float& total = totals[r * kTile + i];
          total = std::fma(scale[i], value, total);
        }
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      if (per_row)
        for (int64_t i = 0; i < kTile; ++i) totals[r * kTile + i] *= by[r].scale;
      store_row(p, row0 + r, tile * kTile, kTile, totals + r * kTile);
    }
  }
};

}  // namespace

void integer_generic(const Problem& p, const Parallel& parallel) {
  const Geometry& g = p.weight.geometry;
  if (p.x.m == 0 || g.n == 0) return;
  constexpr int64_t kRowsAtOnce = 64;
  const int64_t rows_at_once = least(p.x.m, kRowsAtOnce);
  const int64_t x_group_count = x_groups(g, p.x.activation.group);
  float* row = nullptr;
  QuantizedGroup* by = nullptr;
  int8_t* q = nullptr;
  carve_from(call_arena(), [&](Carver& carver) {
    row = carver.take<float>(2 * g.padded_k);
    by = carver.take<QuantizedGroup>(rows_at_once * x_group_count);
    q = carver.take<int8_t>(rows_at_once * g.padded_k);
  });
  for (int64_t row0 = 0; row0 < p.x.m; row0 += rows_at_once) {
    const int64_t rows = least(p.x.m - row0, rows_at_once);
    for (int64_t r = 0; r < rows; ++r)
      quantize_to_bytes<PlainCore>(p, row0 + r, row, row + g.padded_k, q + r * g.padded_k,
                                   by + r * x_group_count);
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

}  // namespace compressed_linear::cpu
