// SPDX-License-Identifier: Apache-2.0
// What every op checks of its arguments, each failure with the op's name, what was found and what
// was expected, and the ways to run a loop over the thread pool. Included by the files of csrc/ops
// and csrc/cuda only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/common/problem.h"

namespace compressed_linear {

using cpu::Element;
using cpu::Geometry;
using cpu::Kind;
using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "compressed_linear::" << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Element parse_element(const char* op, const std::string& name) {
  if (name == "bf16") return {Kind::bfloat16, 16};
  if (name == "fp16") return {Kind::float16, 16};
  if (name == "fp32") return {Kind::float32, 32};
  if (name == "e4m3") return {Kind::e4m3, 8};
  if (name == "e5m2") return {Kind::e5m2, 8};
  if (name.size() == 5 && name.compare(0, 4, "uint") == 0 && name[4] >= '1' && name[4] <= '8')
    return {Kind::integer, name[4] - '0'};
  fail(op, "element is '", name, "', expected uint1 to uint8, e4m3, e5m2, bf16, fp16 or fp32");
}

inline std::string element_name(Element element) {
  switch (element.kind) {
    case Kind::bfloat16:
      return "bf16";
    case Kind::float16:
      return "fp16";
    case Kind::float32:
      return "fp32";
    case Kind::e4m3:
      return "e4m3";
    case Kind::e5m2:
      return "e5m2";
    default:
      return "uint" + std::to_string(element.bits);
  }
}

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "another dtype";
  }
}

inline Scalar float_type(const char* op, const char* what, ScalarType type) {
  if (type == ScalarType::Float) return Scalar::float32;
  if (type == ScalarType::Half) return Scalar::float16;
  if (type == ScalarType::BFloat16) return Scalar::bfloat16;
  fail(op, what, " is ", type_name(type), ", expected bfloat16, float16 or float32");
}

// Scales may also be small: float8_e4m3fn (NVFP4), and uint8 exponents of two (MX).
inline Scalar scale_type(const char* op, const char* what, ScalarType type) {
  if (type == ScalarType::Float8_e4m3fn) return Scalar::e4m3;
  if (type == ScalarType::Byte) return Scalar::e8m0;
  if (type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16)
    return float_type(op, what, type);
  fail(op, what, " is ", type_name(type),
       ", expected bfloat16, float16, float32, float8_e4m3fn or uint8 (e8m0)");
}

inline ScalarType row_type(Element element) {
  switch (element.kind) {
    case Kind::bfloat16:
      return ScalarType::BFloat16;
    case Kind::float16:
      return ScalarType::Half;
    case Kind::float32:
      return ScalarType::Float;
    default:
      return ScalarType::Byte;
  }
}

// What torch's C functions call those dtypes that ops make tensors of.
inline int32_t shim_type(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    default:
      throw std::invalid_argument(std::string("no new tensors are of ") + type_name(type));
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

template <size_t Rank>
inline void check_shape(const char* op, const char* what, const Tensor& tensor,
                        const std::array<int64_t, Rank>& shape) {
  bool equal = tensor.dim() == static_cast<int64_t>(Rank);
  for (size_t i = 0; i < Rank && equal; ++i)
    equal = tensor.size(static_cast<int64_t>(i)) == shape[i];
  if (equal) return;
  std::ostringstream expected;
  for (size_t i = 0; i < Rank; ++i) expected << (i ? ", " : "") << shape[i];
  fail(op, what, " has shape ", shape_text(tensor), ", expected [", expected.str(), "]");
}

inline void check_plain(const char* op, const char* what, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, what, " is not on the CPU");
  if (!tensor.is_contiguous()) fail(op, what, " is not contiguous");
}

inline void check_type(const char* op, const char* what, const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() != type)
    fail(op, what, " is ", type_name(tensor.scalar_type()), ", expected ", type_name(type));
}

inline Geometry geometry_of(const char* op, int64_t n, int64_t k, int64_t group_size,
                            Element element) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // keeps every product below inside 64 bits
  if (n < 0 || n >= kLimit) fail(op, "n is ", n, ", expected 0 to 2^31 - 1");
  if (k < 1 || k >= kLimit) fail(op, "k is ", k, ", expected 1 to 2^31 - 1");
  if (group_size < 1 || k % group_size != 0)
    fail(op, "group_size is ", group_size, ", expected a divisor of k = ", k);
  return cpu::make_geometry(n, k, group_size, element);
}

inline void check_perm(const char* op, const int32_t* perm, int64_t k, int64_t columns) {
  int32_t lowest = 0, highest = -1;
  for (int64_t i = 0; i < k; ++i) {
    lowest = perm[i] < lowest ? perm[i] : lowest;
    highest = perm[i] > highest ? perm[i] : highest;
  }
  if (lowest < -1 || highest >= columns)
    fail(op, "perm runs from ", lowest, " to ", highest, ", expected -1 to ", columns - 1);
}

// One number for each channel (or one number): the data of float32 [length], or null.
inline const float* number_data(const char* op, const char* what, const Tensor* numbers,
                                int64_t length) {
  if (numbers == nullptr) return nullptr;
  check_plain(op, what, *numbers);
  check_type(op, what, *numbers, ScalarType::Float);
  check_shape<1>(op, what, *numbers, {length});
  return static_cast<const float*>(numbers->const_data_ptr());
}

// The one static zero point of x: the data of int32 [1], or null.
inline const int32_t* input_zero_data(const char* op, const Tensor* input_zero) {
  if (input_zero == nullptr) return nullptr;
  check_plain(op, "input_zero", *input_zero);
  check_type(op, "input_zero", *input_zero, ScalarType::Int);
  check_shape<1>(op, "input_zero", *input_zero, {1});
  return static_cast<const int32_t*>(input_zero->const_data_ptr());
}

// The order of input channels: the data of int32 [k], or null.
inline const int32_t* perm_data(const char* op, const Tensor* perm, int64_t k) {
  if (perm == nullptr) return nullptr;
  check_plain(op, "perm", *perm);
  check_type(op, "perm", *perm, ScalarType::Int);
  check_shape<1>(op, "perm", *perm, {k});
  return static_cast<const int32_t*>(perm->const_data_ptr());
}

inline void check_element_bias(const char* op, Element element, int64_t element_bias) {
  const int64_t largest = int64_t{1} << element.bits;
  if (element.kind == Kind::integer && (element_bias < 0 || element_bias > largest))
    fail(op, "element_bias is ", element_bias, ", expected 0 to ", largest);
}

// For cpu::Parallel: runs body(context, begin, end) over [0, count) in torch's thread pool.
inline void run_parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(
      0, count, 1, [body, context](int64_t begin, int64_t end) { body(context, begin, end); });
}

template <class Body>
void parallel_tiles(int64_t begin, int64_t end, const Body& body) {
  torch::stable::parallel_for(begin, end, 1, body);
}

// Output channels [begin, end) of n, as they are packed: whole tiles, but for the last of all.
inline void check_row_range(const char* op, int64_t begin, int64_t end, int64_t n) {
  if (begin < 0 || begin % cpu::kTile != 0)
    fail(op, "row_start is ", begin, ", expected a multiple of ", cpu::kTile);
  if (end > n || (end % cpu::kTile != 0 && end != n))
    fail(op, "rows end at ", end, ", expected a multiple of ", cpu::kTile, " or n = ", n);
}

// A new contiguous tensor on the CPU. Not through the dispatcher, which takes longer than all else
// that a call does beside its arithmetic.
template <size_t Rank>
Tensor new_tensor(const std::array<int64_t, Rank>& shape, ScalarType type) {
  std::array<int64_t, Rank> strides;
  int64_t stride = 1;
  for (size_t i = Rank; i-- > 0; stride *= shape[i] > 0 ? shape[i] : 1) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(Rank), shape.data(),
                                                         strides.data(), shim_type(type),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace compressed_linear
