// SPDX-License-Identifier: Apache-2.0
// Parameters and launches of the repack kernels. Plain C++, without CUDA's headers.
#pragma once

#include <cstdint>

#include "cpu/repack/marlin_scales.h"

namespace compressed_linear::cuda {

// As cpu::CodeOrder.
enum class CodeOrder : int { n_major, k_words, k_major };

// Codes of one field each, in a stream of little-endian bytes; see cpu::CodeSource.
struct RepackSource {
  const uint8_t* data;
  int64_t bytes;      // from `data` on
  int64_t row_bytes;  // from a stored row to the next
  CodeOrder order;
  int container_bits;  // of k_words: 8, 16 or 32
  int width;           // bits of a field: those of the code, or 8
  uint32_t flip;       // xored into a code
  int rows, blank;     // output channels that are stored; after them, those of `blank_code`
  uint32_t blank_code;
  int n_first;  // stored row or column of the first output channel
  // Both aligned to 16 bytes.
  const int32_t* k_at;  // [k] first bit of each input channel; stored row in k_major. Negative:
                        // code 0
  const int32_t* n_at;  // k_major: [rows] first bit of each output channel
};

struct RepackParams {
  RepackSource source;
  uint32_t* packed;  // [k / 16, n * 16 / codes per word]
  int* wrong;        // set above 0 if a code has more than `bits` bits or is NaN
  int n, k;
  int row_begin;                               // output channel of the source's first row
  uint32_t wrong_mask, wrong_add, wrong_bits;  // cpu::WrongCodes
};

// Scales or zero points [N, G] of a checkpoint, in any strides (in elements).
struct ScaleParams {
  const void* data;
  int64_t n_stride, group_stride;
  int n, groups;
  void* out;  // [G, N], or words [G, N * bits / 32] of zero points
  cpu::MarlinColumns columns;
  int* wrong;  // zero points: set above 0 if one has more bits than the codes
};

// Each returns null, or CUDA's text of the error. `bits`: of a code, 4 or 8; `stream`: a
// cudaStream_t of the current device.
const char* launch_repack_codes(int bits, const RepackParams& params, void* stream);
const char* launch_repack_scales(int element_bytes, const ScaleParams& params, void* stream);
const char* launch_repack_zeros(int bits, const ScaleParams& params, void* stream);

}  // namespace compressed_linear::cuda
