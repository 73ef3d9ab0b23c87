// SPDX-License-Identifier: Apache-2.0
// Registration of every op, on LibTorch's stable ABI, with what each computes. Arguments are
// tensors and constants of the descriptor. The shapes of the results, for the compiler, are in
// vllm/compressed_linear/machine/native.py.
//
// Letters: m tokens, n output channels, k input channels, groups = k / group_size; channel k is of
// group k // group_size. A tile is 16 output channels. Elements: uint1 to uint8, e4m3, e5m2, bf16,
// fp16, fp32; indices into a table are integers. Layouts of packed weights, by the name of the
// header in csrc/layouts that explains them:
//
//   planes   every element                  uint8 [tiles, bytes of a tile]
//   quads    uint1 to uint8                 uint8 [tiles, bytes of a tile]
//   marlin   uint4, uint8, e4m3, e5m2       int32 [k / 16, n * bits / 2], for n a multiple of 64
//            and k of 16; group_size is k. Packed on the CPU or on a GPU, multiplied on a GPU
//
// Each op fails with std::invalid_argument, a ValueError in Python, that names it and what was
// found and expected.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include "counters.h"

namespace compressed_linear {
namespace {

std::string op_call_lines() { return describe_calls(); }

void reset_op_calls() { reset_calls(); }

}  // namespace

STABLE_TORCH_LIBRARY(compressed_linear, m) {
  // ---- packing ----------------------------------------------------------------------------------

  // Shape of the packed tensor.
  m.def("packed_shape(str layout, int n, int k, int group_size, str element) -> int[]");

  // Asks for huge pages for a new tensor [tiles, ...], and first-touches its pages from the threads
  // that `linear` reads them with. Its content is undefined.
  m.def("place(Tensor(a!) packed) -> ()");

  // Writes codes uint8 [rows, k], or floats of the element's dtype, as output channels from
  // row_start, a multiple of 16, on. They end at a multiple of 16 or at n.
  m.def(
      "pack_rows(str layout, Tensor(a!) packed, Tensor rows, int row_start, int n, int group_size, "
      "str element) -> ()");

  // The same from codes, not floats, as a checkpoint has them: `stored`, integers of two axes in
  // which codes are streams of bits, lowest first.
  //   order   n_major [n, containers along k], k_words [containers along k, n] (containers of up to
  //           32 bits), k_major [k, containers along n]
  //   widths  bits of the fields that make a code, lowest first; `flip` is xored in
  //   k_at    int32 [fields, k]: bit at which channel k's field begins; in k_major [k]: its row.
  //           Negative: a channel of code 0
  //   n_at    k_major only: int32 [fields, rows], the bit of each output channel
  // The first output channel is n_first along n; `rows` of them are stored, and `blank` more are
  // all blank_code. They become output channels from row_start on. k_at and n_at are on the CPU;
  // on a GPU there is one field to a code.
  m.def(
      "repack_codes(str layout, Tensor(a!) packed, Tensor stored, str order, Tensor k_at, "
      "Tensor? n_at, int[] widths, int flip, int n_first, int rows, int blank, int blank_code, "
      "int row_start, int n, int group_size, str element) -> ()");

  // The inverse of pack_rows: [n, k]. On the CPU.
  m.def(
      "unpack_rows(str layout, Tensor packed, int n, int k, int group_size, str element) -> "
      "Tensor");

  // Of layout quads: int32 [tiles, segments, 16], sums of codes over what is added up as integers,
  // which x with zero points needs. activation_group: input channels that share a scale of x, 0:
  // all.
  m.def(
      "code_sums(Tensor packed, int n, int k, int group_size, str element, int activation_group) "
      "-> Tensor");

  // Scales [n, groups] of up to 32 bits, any strides, to [groups, n] in Marlin's order of output
  // channels. columns: grouped; channel where groups = 1, and for a bias [n, 1]; byte for groups
  // with scales of one byte. Zero points uint8 [n, groups] to int32 [groups, n * bits / 32].
  m.def("marlin_scales(Tensor scale, str columns) -> Tensor");
  m.def("marlin_zeros(Tensor zero, int bits) -> Tensor");

  // ---- products on the CPU ----------------------------------------------------------------------

  // What `linear` and `embedding` of one layer share, parsed and checked: int64 numbers, to be kept
  // with the layer's tensors and given to each call.
  //   element_bias  what codes count from
  //   operands      names of the tensors that each call is given, separated by blanks: packed and,
  //                 of those that `linear` explains, what the layer has
  //   perm, columns  order of the input channels and width of x, see `linear`; perm is only checked
  //   activation    how x is quantized (spec/activation.py): element, `dynamic` or static scales,
  //                 granularity token, tensor or group, channels of a group or -1, `symmetric`,
  //                 scale_dtype float32, e8m0 or e4m3, `maximum` of a dynamic scale
  // Layout quads needs an activation int8, dynamic by token or group or static by tensor.
  m.def(
      "make_problem(str layout, int n, int k, int group_size, str element, int element_bias, "
      "str operands, Tensor? perm=None, int? columns=None, str? activation=None, bool "
      "dynamic=True, "
      "str granularity=\"token\", int activation_group=-1, bool symmetric=True, "
      "str scale_dtype=\"float32\", float maximum=1.0) -> Tensor");

  // y [m, n] = row_scale * (x^ w^T) + bias, where
  //   x^     = quantize(x[:, perm] * prescale), a negative entry of perm being a channel of zeros
  //   w[n,k] = scale[n,g] * (code - element_bias - zero[n,g]), or scale * (table[code] - zero)
  // x: [m, columns] bfloat16, float16 or float32, any strides. problem: from make_problem. bias:
  // [n]. tensors, in this order and without those that problem does not name (one list, since each
  // argument costs a tenth of a microsecond even where it is None):
  //   packed                   of the layout of problem
  //   scale, zero              [tiles, groups, 16] of the dtypes of x; scale also float8_e4m3fn, or
  //                            uint8 exponents of two (e8m0)
  //   row_scale                float32 [n]
  //   table                    [2^bits], bfloat16 or float32
  //   code_sums                of layout quads, for x that is not symmetric
  //   perm                     int32 [k]
  //   prescale                 float32 [k]
  //   input_scale, input_zero  float32 [1], of static x and NVFP4, and int32 [1]
  //
  // A row's bits depend on neither the other rows nor the number of threads. In layout planes, sums
  // are fp32; the AVX-512 path takes denormals of activations and partial products as zero. In
  // layout quads products are added up as integers, exactly, and scaled in fp32 once for each run
  // of channels with one scale of x and of w; every instruction set gives the same bits.
  m.def(
      "linear(Tensor x, Tensor problem, Tensor[] tensors, Tensor? bias, int n, "
      "ScalarType out_dtype) -> Tensor");

  // Rows of row_scale * w by their numbers `ids` int64 [m], in fp32 and rounded once: [m,
  // channels]. Column c is the weight of channel c of x: with perm the sum over the k with perm[k]
  // = c. channels: `columns` of problem, whose layout is planes.
  m.def(
      "embedding(Tensor ids, Tensor problem, Tensor[] tensors, int channels, "
      "ScalarType out_dtype) -> Tensor");

  // ---- products on a GPU ------------------------------------------------------------------------

  // y [m, n] = row_scale * (x[:, order] w^T) + bias with w[n,k] = scale[n,g] * (code - element_bias
  // - zero[n,g]), or scale * value for the elements e4m3, e2m1 and codebook4.
  // x: [m, k] float16 or bfloat16, any strides. weight: layout marlin. scale and zero: in Marlin's
  // order, scale in channel columns if groups = 1, in byte columns if it is of one byte, else in
  // grouped ones; zero needs an element_bias of 0. group_size: k, 16, 32 or a multiple of 64.
  // codebook: float32 [16], rounded to the dtype of x. order: int32 [k], -1 for a channel of zeros.
  // row_scale: float32 [n]. bias: [n]. workspace: int32 [1024], zero before and after each call;
  // calls that run at the same time need one each. Groups are added up in fp32 and then scaled. The
  // same call gives the same bits, but how k is cut depends on m and on the GPU, so a row's bits do
  // depend on the other rows.
  m.def(
      "marlin_gemm(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? codebook, "
      "Tensor? order, Tensor? row_scale, Tensor? bias, Tensor workspace, int n, int k, "
      "int group_size, str element, int element_bias, ScalarType out_dtype) -> Tensor");

  // ---- instruction sets -------------------------------------------------------------------------

  // kernels: floats (layout planes) or integers (layout quads). The instruction set that repacks
  // and that runs where no path was selected, those that this processor can run, best first and
  // separated by blanks, and, for tests, one for every call; an empty name ends that.
  m.def("isa(str kernels) -> str");
  m.def("supported_isas(str kernels) -> str");
  m.def("select_isa(str kernels, str name) -> ()");

  // Which instruction set multiplies how many tokens m, for each class of calls (csrc/cpu/common/
  // paths.h): lines such as "floats/narrow/bfloat16 avx512 8 amx", of this process. Bits of a row
  // then depend on m where floats of one class have several.
  m.def("select_paths(str paths) -> ()");
  m.def("paths() -> str");

  // Lines of a name and a number: cycles a second of this core ("clock"), and instructions a cycle
  // of each kind that kernels live on, see csrc/cpu/rates/rates.h. Takes up to 50 ms.
  m.def("measure_rates() -> str");

  // Name and version of a packed layout and of problem tensors: part of the key of anything that
  // stores prepared layers.
  m.def("layout_id(str layout) -> str");

  // "name count" lines of the calls since the start or the last reset, for example
  // linear/planes/avx512bf16/uint4.
  m.def("op_call_lines() -> str");
  m.def("reset_op_calls() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CPU, m) {
  m.impl("place", TORCH_BOX(&place));
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("repack_codes", TORCH_BOX(&repack_codes));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
  m.impl("code_sums", TORCH_BOX(&code_sums));
  m.impl("marlin_scales", TORCH_BOX(&marlin_scales));
  m.impl("marlin_zeros", TORCH_BOX(&marlin_zeros));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("embedding", TORCH_BOX(&embedding));
}

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CompositeExplicitAutograd, m) {
  m.impl("packed_shape", TORCH_BOX(&packed_shape));
  m.impl("make_problem", TORCH_BOX(&make_problem));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("supported_isas", TORCH_BOX(&supported_isas));
  m.impl("select_isa", TORCH_BOX(&select_isa));
  m.impl("select_paths", TORCH_BOX(&select_paths));
  m.impl("paths", TORCH_BOX(&paths));
  m.impl("measure_rates", TORCH_BOX(&measure_rates));
  m.impl("layout_id", TORCH_BOX(&layout_id));
  m.impl("op_call_lines", TORCH_BOX(&op_call_lines));
  m.impl("reset_op_calls", TORCH_BOX(&reset_op_calls));
}

}  // namespace compressed_linear
