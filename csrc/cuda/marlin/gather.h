// SPDX-License-Identifier: Apache-2.0
// Gathers x[:, order], for activation order; also copies x of any strides to rows that the GEMM can
// read 16 bytes at a time.
#pragma once

#include "cuda/device/device.h"
#include "gather_problem.h"

namespace compressed_linear::cuda::marlin {

CL_GLOBAL(kGatherThreads)
void gather(CL_PARAMS GatherParams p) {
  const int pieces = p.k / 8;
  const int64_t count = static_cast<int64_t>(p.m) * pieces;
  const int64_t stride = static_cast<int64_t>(grid_x()) * kGatherThreads;
  for (int64_t i = static_cast<int64_t>(block_x()) * kGatherThreads + thread_index(); i < count;
       i += stride) {
    const int64_t row = i / pieces;
    const int k0 = static_cast<int>(i % pieces) * 8;
    const uint16_t* x = p.x + row * p.row_stride;
    int from[8];
    for (int j = 0; j < 8; ++j) from[j] = k0 + j;
    if (p.order != nullptr) {
      for (int half = 0; half < 2; ++half) {
        const Words4 four = load_constant(reinterpret_cast<const Words4*>(p.order + k0) + half);
        from[4 * half] = static_cast<int>(four.x);
        from[4 * half + 1] = static_cast<int>(four.y);
        from[4 * half + 2] = static_cast<int>(four.z);
        from[4 * half + 3] = static_cast<int>(four.w);
      }
    }
    uint32_t values[8];
    for (int j = 0; j < 8; ++j)
      values[j] = from[j] < 0 ? 0 : load_constant(x + from[j] * p.column_stride);
    store_global(reinterpret_cast<Words4*>(p.out + row * p.k + k0),
                 Words4{values[0] | values[1] << 16, values[2] | values[3] << 16,
                        values[4] | values[5] << 16, values[6] | values[7] << 16});
  }
}

}  // namespace compressed_linear::cuda::marlin
