// SPDX-License-Identifier: Apache-2.0
// Registration and argument checks of every op, on LibTorch's stable ABI. Arguments are tensors and
// constants of the descriptor. Fake kernels are in vllm/compressed_linear/native.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "counters.h"
#include "cpu/engine.h"
#include "cpu/pack.h"

namespace compressed_linear {
namespace {

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

// ---- what the arguments mean --------------------------------------------------------------------

Element parse_element(const char* op, const std::string& name) {
  if (name == "bf16") return {Kind::bfloat16, 16};
  if (name == "fp16") return {Kind::float16, 16};
  if (name == "fp32") return {Kind::float32, 32};
  if (name.size() == 5 && name.compare(0, 4, "uint") == 0 && name[4] >= '1' && name[4] <= '8')
    return {Kind::integer, name[4] - '0'};
  fail(op, "element is '", name, "', expected uint1 to uint8, bf16, fp16 or fp32");
}

const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
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
    default:
      return "another dtype";
  }
}

Scalar float_type(const char* op, const char* what, ScalarType type) {
  if (type == ScalarType::Float) return Scalar::float32;
  if (type == ScalarType::Half) return Scalar::float16;
  if (type == ScalarType::BFloat16) return Scalar::bfloat16;
  fail(op, what, " is ", type_name(type), ", expected bfloat16, float16 or float32");
}

ScalarType row_type(Element element) {
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

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

template <size_t Rank>
void check_shape(const char* op, const char* what, const Tensor& tensor,
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

void check_plain(const char* op, const char* what, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, what, " is not on the CPU");
  if (!tensor.is_contiguous()) fail(op, what, " is not contiguous");
}

void check_type(const char* op, const char* what, const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() != type)
    fail(op, what, " is ", type_name(tensor.scalar_type()), ", expected ", type_name(type));
}

Geometry geometry_of(const char* op, int64_t n, int64_t k, int64_t group_size, Element element) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // keeps every product below inside 64 bits
  if (n < 0 || n >= kLimit) fail(op, "n is ", n, ", expected 0 to 2^31 - 1");
  if (k < 1 || k >= kLimit) fail(op, "k is ", k, ", expected 1 to 2^31 - 1");
  if (group_size < 1 || k % group_size != 0)
    fail(op, "group_size is ", group_size, ", expected a divisor of k = ", k);
  return cpu::make_geometry(n, k, group_size, element);
}

void check_packed(const char* op, const Tensor& packed, const Geometry& g) {
  check_plain(op, "packed", packed);
  check_type(op, "packed", packed, ScalarType::Byte);
  check_shape<2>(op, "packed", packed, {g.tiles, g.tile_bytes()});
}

// ---- threads ------------------------------------------------------------------------------------

void run_parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(
      0, count, 1, [body, context](int64_t begin, int64_t end) { body(context, begin, end); });
}

template <class Body>
void parallel_tiles(int64_t begin, int64_t end, const Body& body) {
  torch::stable::parallel_for(begin, end, 1, body);
}

// ---- counting -----------------------------------------------------------------------------------

// The counter of one path of `linear`, found by name the first time a thread asks for it.
std::atomic<int64_t>& linear_counter(const cpu::Engine& engine, Element element,
                                     const std::string& element_name) {
  struct Known {
    const cpu::Engine* engine = nullptr;
    std::atomic<int64_t>* counter = nullptr;
  };
  thread_local std::array<Known, 36> known;  // by kind, and bits of integers
  Known& entry = known[static_cast<size_t>(element.kind) * 9 +
                       static_cast<size_t>(element.kind == Kind::integer ? element.bits : 0)];
  if (entry.engine != &engine)
    entry = {&engine, &counter("linear/" + std::string(engine.isa) + "/" + element_name)};
  return *entry.counter;
}

// ---- ops ----------------------------------------------------------------------------------------

int64_t packed_tile_bytes(int64_t k, int64_t group_size, std::string element) {
  constexpr const char* op = "packed_tile_bytes";
  return geometry_of(op, 0, k, group_size, parse_element(op, element)).tile_bytes();
}

void pack_rows(Tensor packed, Tensor rows, int64_t row_start, int64_t n, int64_t group_size,
               std::string element_name) {
  constexpr const char* op = "pack_rows";
  const Element element = parse_element(op, element_name);
  check_plain(op, "rows", rows);
  check_type(op, "rows", rows, row_type(element));
  if (rows.dim() != 2) fail(op, "rows has shape ", shape_text(rows), ", expected [rows, k]");
  const Geometry g = geometry_of(op, n, rows.size(1), group_size, element);
  check_packed(op, packed, g);
  const int64_t row_end = row_start + rows.size(0);
  if (row_start < 0 || row_start % cpu::kTile != 0)
    fail(op, "row_start is ", row_start, ", expected a multiple of ", cpu::kTile);
  if (row_end > n || (row_end % cpu::kTile != 0 && row_end != n))
    fail(op, "rows end at ", row_end, ", expected a multiple of ", cpu::kTile, " or n = ", n);
  if (element.kind == Kind::integer && element.bits < 8) {
    const uint8_t* codes = static_cast<const uint8_t*>(rows.const_data_ptr());
    uint8_t seen = 0;
    for (int64_t i = 0; i < rows.numel(); ++i) seen |= codes[i];
    if (seen >> element.bits) fail(op, "rows holds codes of more than ", element.bits, " bits");
  }
  const void* from = rows.const_data_ptr();
  uint8_t* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  if (row_start == 0) cpu::advise_huge_pages(to, packed.numel());
  const int64_t tile_begin = row_start / cpu::kTile;
  const int64_t tile_end = (row_end + cpu::kTile - 1) / cpu::kTile;
  parallel_tiles(tile_begin, tile_end, [&](int64_t begin, int64_t end) {
    cpu::pack_tiles(g, from, row_start, row_end, begin, end, to);
  });
  counter("pack_rows/" + element_name) += 1;
}

Tensor unpack_rows(Tensor packed, int64_t n, int64_t k, int64_t group_size,
                   std::string element_name) {
  constexpr const char* op = "unpack_rows";
  const Element element = parse_element(op, element_name);
  const Geometry g = geometry_of(op, n, k, group_size, element);
  check_packed(op, packed, g);
  const std::array<int64_t, 2> shape = {n, k};
  Tensor rows = torch::stable::new_empty(packed, {shape.data(), 2}, row_type(element));
  const uint8_t* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* to = rows.mutable_data_ptr();
  parallel_tiles(0, g.tiles,
                 [&](int64_t begin, int64_t end) { cpu::unpack_tiles(g, from, begin, end, to); });
  counter("unpack_rows/" + element_name) += 1;
  return rows;
}

void check_perm(const char* op, const int32_t* perm, int64_t k, int64_t columns) {
  int32_t lowest = 0, highest = -1;
  for (int64_t i = 0; i < k; ++i) {
    lowest = perm[i] < lowest ? perm[i] : lowest;
    highest = perm[i] > highest ? perm[i] : highest;
  }
  if (lowest < -1 || highest >= columns)
    fail(op, "perm runs from ", lowest, " to ", highest, ", expected -1 to ", columns - 1);
}

Tensor linear(Tensor x, Tensor packed, std::optional<Tensor> scale, std::optional<Tensor> zero,
              std::optional<Tensor> bias, std::optional<Tensor> perm, std::optional<Tensor> table,
              int64_t n, int64_t k, int64_t group_size, std::string element_name,
              int64_t element_bias, ScalarType out_dtype) {
  constexpr const char* op = "linear";
  const Element element = parse_element(op, element_name);
  cpu::Problem p{};
  p.geometry = geometry_of(op, n, k, group_size, element);
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
  if (perm.has_value()) {
    check_plain(op, "perm", *perm);
    check_type(op, "perm", *perm, ScalarType::Int);
    check_shape<1>(op, "perm", *perm, {k});
    p.perm = static_cast<const int32_t*>(perm->const_data_ptr());
    check_perm(op, p.perm, k, x.size(1));
  } else if (x.size(1) != k) {
    fail(op, "x has shape ", shape_text(x), ", expected [m, ", k, "]");
  }

  const std::array<int64_t, 3> tiled = {g.tiles, g.groups, cpu::kTile};
  if (scale.has_value()) {
    check_plain(op, "scale", *scale);
    check_shape<3>(op, "scale", *scale, tiled);
    p.scale = scale->const_data_ptr();
    p.scale_type = float_type(op, "scale", scale->scalar_type());
  }
  if (zero.has_value()) {
    check_plain(op, "zero", *zero);
    check_shape<3>(op, "zero", *zero, tiled);
    p.zero = zero->const_data_ptr();
    p.zero_type = float_type(op, "zero", zero->scalar_type());
  }
  if (bias.has_value()) {
    check_plain(op, "bias", *bias);
    check_shape<1>(op, "bias", *bias, {n});
    p.bias = bias->const_data_ptr();
    p.bias_type = float_type(op, "bias", bias->scalar_type());
  }
  const bool coded = element.kind == Kind::integer;
  if (table.has_value()) {
    if (!coded || element.bits == 8)
      fail(op, "table is given for ", element_name, ", expected uint1 to uint7");
    check_plain(op, "table", *table);
    check_type(op, "table", *table, ScalarType::BFloat16);
    check_shape<1>(op, "table", *table, {int64_t{1} << element.bits});
    p.table = static_cast<const uint16_t*>(table->const_data_ptr());
  }
  if (coded) {
    const int64_t largest = int64_t{1} << element.bits;
    if (element_bias < 0 || element_bias > largest)
      fail(op, "element_bias is ", element_bias, ", expected 0 to ", largest);
    // Without zero points the bias goes into the decoded values, which saves the group sums; with
    // them, decoding about the middle keeps what is added and taken away small.
    const bool centred = p.zero != nullptr || element.bits == 8;
    p.middle = static_cast<float>(centred ? largest / 2 : element_bias);
    p.offset = p.table != nullptr ? 0.0f : static_cast<float>(element_bias) - p.middle;
  }

  p.out_type = float_type(op, "out_dtype", out_dtype);
  const std::array<int64_t, 2> shape = {p.m, n};
  Tensor out = torch::stable::new_empty(x, {shape.data(), 2}, out_dtype);
  p.out = out.mutable_data_ptr();

  const cpu::Engine& engine = cpu::engine();
  engine.linear(p, {&run_parallel, static_cast<int64_t>(torch::stable::get_num_threads())});
  linear_counter(engine, element, element_name) += 1;
  return out;
}

std::string isa() { return cpu::engine().isa; }

std::string supported_isas() {
  std::string names;
  for (const std::string& name : cpu::supported_isas()) names += (names.empty() ? "" : " ") + name;
  return names;
}

void select_isa(std::string name) { cpu::select_engine(name); }

std::string layout_id() { return cpu::kLayoutId; }

int64_t op_calls(std::string name) { return count_calls(name); }

std::string op_call_lines() { return describe_calls(); }

void reset_op_calls() { reset_calls(); }

}  // namespace

STABLE_TORCH_LIBRARY(compressed_linear, m) {
  m.def("packed_tile_bytes(int k, int group_size, str element) -> int");
  m.def(
      "pack_rows(Tensor(a!) packed, Tensor rows, int row_start, int n, int group_size, "
      "str element) -> ()");
  m.def("unpack_rows(Tensor packed, int n, int k, int group_size, str element) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? scale, Tensor? zero, Tensor? bias, Tensor? perm, "
      "Tensor? table, int n, int k, int group_size, str element, int element_bias, "
      "ScalarType out_dtype) -> Tensor");
  m.def("isa() -> str");
  m.def("supported_isas() -> str");
  m.def("select_isa(str name) -> ()");
  m.def("layout_id() -> str");
  m.def("op_calls(str name) -> int");
  m.def("op_call_lines() -> str");
  m.def("reset_op_calls() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CPU, m) {
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
  m.impl("linear", TORCH_BOX(&linear));
}

STABLE_TORCH_LIBRARY_IMPL(compressed_linear, CompositeExplicitAutograd, m) {
  m.impl("packed_tile_bytes", TORCH_BOX(&packed_tile_bytes));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("supported_isas", TORCH_BOX(&supported_isas));
  m.impl("select_isa", TORCH_BOX(&select_isa));
  m.impl("layout_id", TORCH_BOX(&layout_id));
  m.impl("op_calls", TORCH_BOX(&op_calls));
  m.impl("op_call_lines", TORCH_BOX(&op_call_lines));
  m.impl("reset_op_calls", TORCH_BOX(&reset_op_calls));
}

}  // namespace compressed_linear
