// SPDX-License-Identifier: Apache-2.0
// marlin_gemm on a GPU. It does not synchronize with the GPU and allocates through torch only, so
// it can be captured in a graph.
// Has run on hardware: nothing.
#include "op_marlin_gemm.h"
#include "cuda/marlin/launch.h"
#include "op_cuda.h"
#include "ops.h"

namespace compressed_linear::cuda {
namespace {

struct Gpu {
  struct Guard {
    explicit Guard(const Tensor& x) : guard(x.is_cuda() ? x.get_device_index() : 0) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  static void check_device(const char* what, const Tensor& tensor, const Tensor& x) {
    check_cuda(marlin_op::kOp, what, tensor, &x);
  }

  static int processors(const Tensor&) {
    const int count = marlin::processors();
    if (count < 1) fail(marlin_op::kOp, "CUDA fails to report the number of multiprocessors");
    return count;
  }

  static void gather(const marlin::GatherParams& params, const Tensor& x) {
    check_launch(marlin_op::kOp, marlin::launch_gather(params, current_stream(x)));
  }

  static void gemm(bool bfloat16, marlin::Element weights, const marlin::Params& params,
                   const marlin::LaunchShape& launch, const Tensor& x) {
    check_launch(marlin_op::kOp,
                 marlin::launch_gemm(bfloat16, weights, params, launch, current_stream(x)));
  }
};

}  // namespace

Tensor marlin_gemm(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> zero,
                   std::optional<Tensor> codebook, std::optional<Tensor> order,
                   std::optional<Tensor> row_scale, std::optional<Tensor> bias, Tensor workspace,
                   int64_t n, int64_t k, int64_t group_size, std::string element,
                   int64_t element_bias, ScalarType out_dtype) {
  return marlin_op::marlin_gemm<Gpu>(x, weight, scale, zero, codebook, order, row_scale, bias,
                                     workspace, n, k, group_size, element, element_bias, out_dtype);
}

}  // namespace compressed_linear::cuda
