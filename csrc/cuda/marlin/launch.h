// SPDX-License-Identifier: Apache-2.0
// Launches of the GEMM and the gather. Plain C++, without CUDA's headers.
#pragma once

#include "gather_problem.h"
#include "problem.h"

namespace compressed_linear::cuda::marlin {

// Number of multiprocessors of the current device; 0 where CUDA fails to report it.
int processors();

// Each returns null, or CUDA's text of the error. `stream`: a cudaStream_t of the current device.
const char* launch_gather(const GatherParams& params, void* stream);
const char* launch_gemm(bool bfloat16, Element element, const Params& params,
                        const LaunchShape& launch, void* stream);

}  // namespace compressed_linear::cuda::marlin
