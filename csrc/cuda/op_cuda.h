// SPDX-License-Identifier: Apache-2.0
// Argument checks for ops on a GPU, in addition to ops/arguments.h, and their stream. Included by
// the cuda/op_*.cpp files only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/arguments.h"

namespace compressed_linear {

// On the GPU of `first`, or on any where that is null.
inline void check_cuda(const char* op, const char* what, const Tensor& tensor,
                       const Tensor* first = nullptr) {
  if (!tensor.is_cuda()) fail(op, what, " is not on a CUDA device");
  if (first != nullptr && tensor.get_device_index() != first->get_device_index())
    fail(op, what, " is on CUDA device ", tensor.get_device_index(), ", expected ",
         first->get_device_index());
}

inline void check_plain_cuda(const char* op, const char* what, const Tensor& tensor,
                             const Tensor* first = nullptr) {
  check_cuda(op, what, tensor, first);
  if (!tensor.is_contiguous()) fail(op, what, " is not contiguous");
}

// The current stream of a tensor's GPU, a cudaStream_t.
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// error: result of a launch function.
inline void check_launch(const char* op, const char* error) {
  if (error != nullptr) fail(op, "the kernel cannot be launched: ", error);
}

}  // namespace compressed_linear
