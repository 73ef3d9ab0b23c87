// SPDX-License-Identifier: Apache-2.0
// Parameters of the gather kernel. Plain data, for nvcc and for g++.
#pragma once

#include <cstdint>

namespace compressed_linear::cuda::marlin {

// out[i, j] = x[i, order[j]], 0 where order[j] is -1; without an order x[i, j]. 16-bit elements; k
// a multiple of 8; out has rows of k.
struct GatherParams {
  const uint16_t* x;
  const int* order;
  uint16_t* out;
  int64_t row_stride, column_stride;
  int m, k;
};

constexpr int kGatherThreads = 256;

constexpr int64_t gather_blocks(int64_t m, int64_t k) {
  const int64_t pieces = m * (k / 8), most = 1 << 16;
  const int64_t blocks = (pieces + kGatherThreads - 1) / kGatherThreads;
  return blocks < most ? blocks : most;
}

}  // namespace compressed_linear::cuda::marlin
