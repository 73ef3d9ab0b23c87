// SPDX-License-Identifier: Apache-2.0
// From the sums of warps to y: added up in shared memory over the warps that share K, and in global
// memory over the blocks that share an output tile; then scaled, given their bias, and stored.
#pragma once

#include "cuda/device/device.h"
#include "part.h"
#include "problem.h"

namespace compressed_linear::cuda::marlin {

// Floats from a row of the tile of results in shared memory to the next.
template <int ShapeIndex>
constexpr int kResultStride = kShapes[ShapeIndex].tile_n() + kPadding;

template <int ShapeIndex>
CL_DEVICE uint32_t result_address(int row, int column) {
  return shared_base() + static_cast<uint32_t>((row * kResultStride<ShapeIndex> + column) * 4);
}

template <int ShapeIndex>
CL_DEVICE Floats4 load_result(int row, int column) {
  return load_shared<Floats4>(result_address<ShapeIndex>(row, column));
}

CL_DEVICE float load_number(const void* data, Number type, int64_t index) {
  if (type == Number::float32) return load_constant(static_cast<const float*>(data) + index);
  const uint16_t half = load_constant(static_cast<const uint16_t*>(data) + index);
  return type == Number::float16 ? widen<Half>(half) : widen<BFloat16>(half);
}

// Four neighbouring results, scaled and with their bias, to global memory.
CL_DEVICE void store_results(const Params& p, int row, int column, Floats4 sum) {
  float values[4] = {sum.x, sum.y, sum.z, sum.w};
  for (int i = 0; i < 4; ++i) {
    if (p.row_scale != nullptr) values[i] *= load_constant(p.row_scale + column + i);
    if (p.bias != nullptr) values[i] += load_number(p.bias, p.bias_type, column + i);
  }
  const int64_t at = static_cast<int64_t>(row) * p.n + column;
  if (p.out_type == Number::float32) {
    store_global(reinterpret_cast<Floats4*>(static_cast<float*>(p.out) + at),
                 Floats4{values[0], values[1], values[2], values[3]});
    return;
  }
  Words2* to = reinterpret_cast<Words2*>(static_cast<uint16_t*>(p.out) + at);
  if (p.out_type == Number::float16)
    store_global(to, Words2{narrow_pair<Half>(values[0], values[1]),
                            narrow_pair<Half>(values[2], values[3])});
  else
    store_global(to, Words2{narrow_pair<BFloat16>(values[0], values[1]),
                            narrow_pair<BFloat16>(values[2], values[3])});
}

// Calls body(index, row, column) for each four neighbouring results of a tile that this thread
// stores.
template <int ShapeIndex, class Body>
CL_DEVICE void for_results(const Params& p, const Part& part, const Body& body) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int kFours = S.tile_n() / 4;
  for (int c = thread_index(); c < S.tile_m() * kFours; c += S.threads()) {
    const int row = c / kFours, column = c % kFours * 4;
    if (part.m0 + row < p.m && part.n0 + column < p.n) body(c, row, column);
  }
}

// The tile of results in shared memory: sums of the warps that share K, added up one warp after the
// other.
template <int ShapeIndex>
CL_DEVICE void reduce_warps(const WarpPosition& at,
                            const float (&sums)[kShapes[ShapeIndex].m_blocks][8][4]) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int kM = S.m_blocks;
#pragma unroll
  for (int w = 0; w < S.warps_k; ++w) {
    if (w == at.k) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = (at.m * kM + m) * 16 + half * 8 + at.lane / 4;
            const int column = at.n * 64 + j * 8 + at.lane % 4 * 2;
            const uint32_t to = result_address<ShapeIndex>(row, column);
            Floats2 two = {sums[m][j][2 * half], sums[m][j][2 * half + 1]};
            if (w > 0) {
              const Floats2 before = load_shared<Floats2>(to);
              two.x = before.x + two.x;
              two.y = before.y + two.y;
            }
            store_shared(to, two);
          }
    }
    sync_threads();
  }
}

// A whole output tile, from shared memory to y.
template <int ShapeIndex>
CL_DEVICE void store_tile(const Params& p, const Part& part) {
  for_results<ShapeIndex>(p, part, [&](int, int row, int column) {
    store_results(p, part.m0 + row, part.n0 + column, load_result<ShapeIndex>(row, column));
  });
}

// A part of an output tile that several blocks share: from shared memory to `partial`. The last
// block to arrive adds up all parts in the order of k and stores them. No block waits for another.
// Each block has at most two such parts: first the end of a tile, last the beginning of another.
template <int ShapeIndex>
CL_DEVICE void reduce_blocks(const Params& p, const Part& part) {
  constexpr Shape S = kShapes[ShapeIndex];
  constexpr int64_t kTileFloats = static_cast<int64_t>(S.tile_m()) * S.tile_n();
  const int64_t tile_begin = static_cast<int64_t>(part.tile) * p.k_tiles;
  const int first = static_cast<int>(tile_begin / p.per_block);
  const int final = static_cast<int>((tile_begin + p.k_tiles - 1) / p.per_block);
  const auto place = [&](int block) {
    return p.partial + (2 * static_cast<int64_t>(block) + (block == first)) * kTileFloats;
  };
  float* const own = place(block_x());
  for_results<ShapeIndex>(p, part, [&](int c, int row, int column) {
    store_global(reinterpret_cast<Floats4*>(own) + c, load_result<ShapeIndex>(row, column));
  });
  fence();
  sync_threads();
  // Behind the tile of results.
  const uint32_t flag = result_address<ShapeIndex>(S.tile_m(), 0);
  if (thread_index() == 0) {
    const int before = atomic_add(p.arrived + first, 1);
    store_shared(flag, before);
    if (before == final - first) store_global(p.arrived + first, 0);  // for the next call
  }
  sync_threads();
  if (load_shared<int>(flag) != final - first) return;
  fence();
  for_results<ShapeIndex>(p, part, [&](int c, int row, int column) {
    Floats4 sum = load_coherent(reinterpret_cast<const Floats4*>(place(first)) + c);
    for (int block = first + 1; block <= final; ++block) {
      const Floats4 more = load_coherent(reinterpret_cast<const Floats4*>(place(block)) + c);
      sum.x += more.x;
      sum.y += more.y;
      sum.z += more.z;
      sum.w += more.w;
    }
    store_results(p, part.m0 + row, part.n0 + column, sum);
  });
}

}  // namespace compressed_linear::cuda::marlin
