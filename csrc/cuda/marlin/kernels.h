// SPDX-License-Identifier: Apache-2.0
// Choice among the instances of the GEMM. One translation unit for each type of activations defines
// `kernel_for`, by kernel_table.h.
#pragma once

#include "cuda/device/device.h"
#include "problem.h"

namespace compressed_linear::cuda::marlin {

using Kernel = void (*)(Params);

// For x of type T, weights of `element` and the shape number `shape` of kShapes.
template <class T>
Kernel kernel_for(Element element, int shape);

}  // namespace compressed_linear::cuda::marlin
