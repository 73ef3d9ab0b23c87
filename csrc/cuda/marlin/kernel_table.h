// SPDX-License-Identifier: Apache-2.0
// Definition of kernel_for, for the units that instantiate it.
#pragma once

#include "kernel.h"
#include "kernels.h"

namespace compressed_linear::cuda::marlin {

template <class T, Element E>
Kernel of_shape(int shape) {
  static_assert(kShapeCount == 3, "one line for each shape");
  return shape == 0 ? gemm<T, E, 0> : shape == 1 ? gemm<T, E, 1> : gemm<T, E, 2>;
}

template <class T>
Kernel kernel_for(Element element, int shape) {
  switch (element) {
    case Element::uint4:
      return of_shape<T, Element::uint4>(shape);
    case Element::uint8:
      return of_shape<T, Element::uint8>(shape);
    case Element::e4m3:
      return of_shape<T, Element::e4m3>(shape);
    case Element::e2m1:
      return of_shape<T, Element::e2m1>(shape);
    default:
      return of_shape<T, Element::codebook>(shape);
  }
}

}  // namespace compressed_linear::cuda::marlin
