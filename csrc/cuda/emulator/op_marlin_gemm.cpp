// SPDX-License-Identifier: Apache-2.0
// marlin_gemm on the CPU, for tests: the kernels' source in the emulator, with all its checks. In a
// library of its own that only tests build and load.
#include "cuda/op_marlin_gemm.h"

#include <torch/csrc/stable/library.h>

#include "cuda/marlin/gather.h"
#include "cuda/marlin/kernels.h"

namespace compressed_linear::cuda::emulator {
namespace {

using marlin::Element;
using marlin::GatherParams;
using marlin::LaunchShape;
using marlin::Params;

// A buffer of the size that the op has checked the tensor to have; none where `data` is null.
void add(Options& o, const char* name, const void* data, int64_t bytes, bool writable = false) {
  if (data != nullptr) o.buffers.push_back({data, static_cast<size_t>(bytes), name, writable});
}

void run(const Options& options, const std::function<void()>& kernel) {
  const Report report = launch(options, kernel);
  if (report.problem_count > 0)
    fail(marlin_op::kOp, report.problem_count,
         " problems in the emulator, the first: ", report.problems.at(0));
}

int64_t extent(const GatherParams& p, int64_t columns) {
  return 2 * ((p.m - 1) * p.row_stride + (columns - 1) * p.column_stride + 1);
}

struct Emulated {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static void check_device(const char* what, const Tensor& tensor, const Tensor&) {
    if (!tensor.is_cpu()) fail(marlin_op::kOp, what, " is not on the CPU");
  }

  // Few, so that blocks share output tiles in small problems, too.
  static int processors(const Tensor&) { return 3; }

  static void gather(const GatherParams& p, const Tensor& x) {
    Options o;
    o.grid_x = static_cast<int>(marlin::gather_blocks(p.m, p.k));
    o.threads = marlin::kGatherThreads;
    add(o, "x", p.x, extent(p, x.size(1)));
    add(o, "order", p.order, int64_t{4} * p.k);
    add(o, "gathered x", p.out, int64_t{2} * p.m * p.k, true);
    run(o, [&p] { marlin::gather(p); });
  }

  static void gemm(bool bfloat16, Element element, const Params& p, const LaunchShape& launch,
                   const Tensor&) {
    const int64_t bits = marlin::bits_of(element);
    Options o;
    o.grid_x = launch.blocks;
    o.threads = launch.threads;
    o.shared_bytes = static_cast<size_t>(launch.shared_bytes);
    add(o, "x", p.x, 2 * ((p.m - 1) * p.x_stride + p.k));
    add(o, "weight", p.weight, int64_t{p.k} * p.n * bits / 8);
    add(o, "scale", p.scale, int64_t{p.groups} * p.n * marlin::bytes_of(p.scale_type));
    add(o, "zero", p.zero, int64_t{p.groups} * p.n * bits / 8);
    add(o, "codebook", p.codebook, 64);
    add(o, "row_scale", p.row_scale, int64_t{4} * p.n);
    add(o, "bias", p.bias, int64_t{p.n} * marlin::bytes_of(p.bias_type));
    add(o, "out", p.out, int64_t{p.m} * p.n * marlin::bytes_of(p.out_type), true);
    add(o, "partial", p.partial, 4 * launch.partial_floats, true);
    add(o, "arrived", p.arrived, 4 * marlin::kMaxBlocks, true);
    const marlin::Kernel kernel = bfloat16 ? marlin::kernel_for<BFloat16>(element, launch.shape)
                                           : marlin::kernel_for<Half>(element, launch.shape);
    run(o, [&] { kernel(p); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CPU, m) {
  m.impl("marlin_gemm", TORCH_BOX(&marlin_op::marlin_gemm<Emulated>));
}

}  // namespace compressed_linear::cuda::emulator
