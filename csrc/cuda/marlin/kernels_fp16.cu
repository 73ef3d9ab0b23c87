// SPDX-License-Identifier: Apache-2.0
#include "kernel_table.h"

namespace compressed_linear::cuda::marlin {
template Kernel kernel_for<Half>(Element, int);
}
