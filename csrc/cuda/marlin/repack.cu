// SPDX-License-Identifier: Apache-2.0
#include "repack.h"

#include <cuda_runtime.h>

namespace compressed_linear::cuda {
namespace {

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Params>
const char* launch(void (*kernel)(Params), int64_t columns, int64_t per_block, int threads,
                   int shared_bytes, const Params& params, void* stream) {
  if (columns == 0 || params.n == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>((columns + per_block - 1) / per_block),
                  static_cast<unsigned>(params.n / marlin::kTileN));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return launch_error();
}

}  // namespace

const char* launch_repack_codes(int bits, const RepackParams& params, void* stream) {
  return launch(bits == 4 ? repack_codes<4> : repack_codes<8>, params.k, kRepackK, kRepackThreads,
                kRepackShared, params, stream);
}

const char* launch_repack_scales(int element_bytes, const ScaleParams& params, void* stream) {
  return launch(element_bytes == 1   ? repack_scales<uint8_t>
                : element_bytes == 2 ? repack_scales<uint16_t>
                                     : repack_scales<uint32_t>,
                params.groups, kScaleGroups, kScaleThreads, kScaleShared, params, stream);
}

const char* launch_repack_zeros(int bits, const ScaleParams& params, void* stream) {
  return launch(bits == 4 ? repack_zeros<4> : repack_zeros<8>, params.groups, kScaleGroups,
                kScaleThreads, kScaleShared, params, stream);
}

}  // namespace compressed_linear::cuda
