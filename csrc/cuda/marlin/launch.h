// SPDX-License-Identifier: Apache-2.0
// How the op launches the GEMM and the gather. Plain C++, without CUDA's headers.
#pragma once

#include "gather_problem.h"
#include "problem.h"

namespace compressed_linear::cuda::marlin {

// Multiprocessors of the current device; 0 if CUDA does not say.
int processors();

// Each returns null, or what CUDA says went wrong. `stream`: a cudaStream_t of the current device.
const char* launch_gather(const GatherParams& params, void* stream);
const char* launch_gemm(bool bfloat16, Element element, const Params& params, const Plan& plan,
                        void* stream);

}  // namespace compressed_linear::cuda::marlin
