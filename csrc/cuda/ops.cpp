// SPDX-License-Identifier: Apache-2.0
// Registration of the CUDA kernels of ops that csrc/ops/ops.cpp defines. In a library of its own,
// since the other one must load without CUDA.
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace compressed_linear::cuda {

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CUDA, m) {
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("repack_codes", TORCH_BOX(&repack_codes));
  m.impl("marlin_scales", TORCH_BOX(&marlin_scales));
  m.impl("marlin_zeros", TORCH_BOX(&marlin_zeros));
  m.impl("marlin_gemm", TORCH_BOX(&marlin_gemm));
}

}  // namespace compressed_linear::cuda
