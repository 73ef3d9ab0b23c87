// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include <cuda_runtime.h>

#include "gather.h"
#include "kernels.h"

namespace compressed_linear::cuda::marlin {
namespace {

const char* text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int processors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count;
}

const char* launch_gather(const GatherParams& params, void* stream) {
  const int64_t blocks = gather_blocks(params.m, params.k);
  gather<<<static_cast<unsigned>(blocks), kGatherThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      params);
  return text(cudaGetLastError());
}

const char* launch_gemm(bool bfloat16, Element element, const Params& params,
                        const LaunchShape& launch, void* stream) {
  const Kernel kernel = bfloat16 ? kernel_for<BFloat16>(element, launch.shape)
                                 : kernel_for<Half>(element, launch.shape);
  // More than 48 KiB of shared memory need this attribute of the kernel. Setting it enqueues
  // nothing on a stream, so it is allowed during graph capture.
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(launch.shared_bytes));
  if (error != cudaSuccess) return text(error);
  kernel<<<static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.threads),
           static_cast<size_t>(launch.shared_bytes), static_cast<cudaStream_t>(stream)>>>(params);
  return text(cudaGetLastError());
}

}  // namespace compressed_linear::cuda::marlin
