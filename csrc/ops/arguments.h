// SPDX-License-Identifier: Apache-2.0
// What every op checks of its arguments, each failure with the op's name, what was found and what
// was expected, and the ways to run a loop over the thread pool. Included by the op_*.cpp files
// only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/float/engine.h"
#include "layouts/quads.h"

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
  std::ostringstream expected;
  for (size_t i = 0; i < Rank; ++i) {
    expected << (i ? ", " : "") << shape[i];
    equal = equal && tensor.size(static_cast<int64_t>(i)) == shape[i];
  }
  if (!equal)
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

// Bits of an element of the layout for integer activations, which takes integers only.
inline int code_bits(const char* op, const std::string& element_name) {
  const Element element = parse_element(op, element_name);
  if (element.kind != Kind::integer)
    fail(op, "element is '", element_name, "', expected uint1 to uint8");
  return element.bits;
}

inline Geometry quads_of(const char* op, int64_t n, int64_t k, int64_t group_size, int bits) {
  geometry_of(op, n, k, group_size, {Kind::integer, bits});  // checks the sizes
  return cpu::make_quads_geometry(n, k, group_size, bits);
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

inline void check_packed(const char* op, const Tensor& packed, const Geometry& g) {
  check_plain(op, "packed", packed);
  check_type(op, "packed", packed, ScalarType::Byte);
  check_shape<2>(op, "packed", packed, {g.tiles, g.tile_bytes()});
}

// Scales or zero points of a packed weight: the data of [tiles, groups, 16], or null.
inline const void* tiled_data(const char* op, const char* what, const std::optional<Tensor>& tensor,
                              const Geometry& g) {
  if (!tensor.has_value()) return nullptr;
  check_plain(op, what, *tensor);
  check_shape<3>(op, what, *tensor, {g.tiles, g.groups, cpu::kTile});
  return tensor->const_data_ptr();
}

// One number for each channel (or one number): the data of float32 [length], or null.
inline const float* number_data(const char* op, const char* what,
                                const std::optional<Tensor>& numbers, int64_t length) {
  if (!numbers.has_value()) return nullptr;
  check_plain(op, what, *numbers);
  check_type(op, what, *numbers, ScalarType::Float);
  check_shape<1>(op, what, *numbers, {length});
  return static_cast<const float*>(numbers->const_data_ptr());
}

// The one static zero point of x: the data of int32 [1], or null.
inline const int32_t* input_zero_data(const char* op, const std::optional<Tensor>& input_zero) {
  if (!input_zero.has_value()) return nullptr;
  check_plain(op, "input_zero", *input_zero);
  check_type(op, "input_zero", *input_zero, ScalarType::Int);
  check_shape<1>(op, "input_zero", *input_zero, {1});
  return static_cast<const int32_t*>(input_zero->const_data_ptr());
}

// The values of small codes: the data of [2^bits], bfloat16 or float32; both null without a table.
struct TableData {
  const uint16_t* narrow = nullptr;
  const float* wide = nullptr;
};

inline TableData table_data(const char* op, const std::optional<Tensor>& table, Element element,
                            const std::string& element_name) {
  if (!table.has_value()) return {};
  if (element.kind != Kind::integer || element.bits == 8)
    fail(op, "table is given for ", element_name, ", expected uint1 to uint7");
  check_plain(op, "table", *table);
  check_shape<1>(op, "table", *table, {int64_t{1} << element.bits});
  if (table->scalar_type() == ScalarType::Float)
    return {nullptr, static_cast<const float*>(table->const_data_ptr())};
  check_type(op, "table", *table, ScalarType::BFloat16);
  return {static_cast<const uint16_t*>(table->const_data_ptr()), nullptr};
}

// The order of input channels: the data of int32 [k], each from -1 to columns - 1, or null.
inline const int32_t* perm_data(const char* op, const std::optional<Tensor>& perm, int64_t k,
                                int64_t columns) {
  if (!perm.has_value()) return nullptr;
  check_plain(op, "perm", *perm);
  check_type(op, "perm", *perm, ScalarType::Int);
  check_shape<1>(op, "perm", *perm, {k});
  const int32_t* data = static_cast<const int32_t*>(perm->const_data_ptr());
  check_perm(op, data, k, columns);
  return data;
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

// What every product with a packed weight is given, into the fields of `p`, whose geometry is set.
inline void read_operands(const char* op, cpu::Problem& p, const Tensor& x, const Tensor& packed,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& zero,
                          const std::optional<Tensor>& row_scale, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& perm,
                          const std::optional<Tensor>& prescale) {
  const Geometry& g = p.geometry;
  check_packed(op, packed, g);
  p.packed = static_cast<const uint8_t*>(packed.const_data_ptr());

  if (!x.is_cpu()) fail(op, "x is not on the CPU");
  if (x.dim() != 2) fail(op, "x has shape ", shape_text(x), ", expected [m, k]");
  p.m = x.size(0);
  p.x = x.const_data_ptr();
  p.x_type = float_type(op, "x", x.scalar_type());
  p.x_row_stride = x.stride(0);
  p.x_column_stride = x.stride(1);
  p.perm = perm_data(op, perm, g.k, x.size(1));
  if (p.perm == nullptr && x.size(1) != g.k)
    fail(op, "x has shape ", shape_text(x), ", expected [m, ", g.k, "]");

  p.scale = tiled_data(op, "scale", scale, g);
  if (scale.has_value()) p.scale_type = scale_type(op, "scale", scale->scalar_type());
  p.zero = tiled_data(op, "zero", zero, g);
  if (zero.has_value()) p.zero_type = float_type(op, "zero", zero->scalar_type());
  p.row_scale = number_data(op, "row_scale", row_scale, g.n);
  p.prescale = number_data(op, "prescale", prescale, g.k);
  if (bias.has_value()) {
    check_plain(op, "bias", *bias);
    check_shape<1>(op, "bias", *bias, {g.n});
    p.bias = bias->const_data_ptr();
    p.bias_type = float_type(op, "bias", bias->scalar_type());
  }
}

// A new tensor [m, n] for the result, which `p` is told of.
inline Tensor make_output(const char* op, cpu::Problem& p, const Tensor& x, ScalarType out_dtype) {
  p.out_type = float_type(op, "out_dtype", out_dtype);
  const std::array<int64_t, 2> shape = {p.m, p.geometry.n};
  Tensor out = torch::stable::new_empty(x, {shape.data(), 2}, out_dtype);
  p.out = out.mutable_data_ptr();
  return out;
}

}  // namespace compressed_linear
