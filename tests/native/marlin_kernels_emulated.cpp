// SPDX-License-Identifier: Apache-2.0
// The instances of the CUDA kernels, for the emulator.
#include "cuda/marlin/kernel_table.h"

namespace compressed_linear::cuda::marlin {
template Kernel kernel_for<Half>(Element, int);
template Kernel kernel_for<BFloat16>(Element, int);
}  // namespace compressed_linear::cuda::marlin
