// SPDX-License-Identifier: Apache-2.0
#include "problem.h"

#include <cmath>
#include <cstring>

#include "cpu/integer/segments.h"
#include "ops.h"
#include "packed.h"

namespace compressed_linear {
namespace {

// Places in the tensor.
enum Place : int64_t {
  kMagic,
  kLayout,
  kKind,
  kBits,
  kN,
  kK,
  kGroup,
  kColumns,
  kElementBias,
  kActivationFlags,
  kActivationBits,
  kExponent,
  kMantissa,
  kActivationGroup,
  kScaleType,
  kLargest,
  kMaximum,
  kOperands,
  kChecksum,
  kLength
};

constexpr int64_t kMagicNumber = (int64_t{0x434c50} << 32) + kProblemVersion;  // "CLP"

constexpr int64_t kPresent = 1, kDynamic = 2, kSymmetric = 4, kWholeTensor = 8;

// FNV-1a over whole numbers.
int64_t checksum(const int64_t* numbers) {
  uint64_t sum = 0xcbf29ce484222325u;
  for (int64_t i = 0; i < kChecksum; ++i)
    sum = (sum ^ static_cast<uint64_t>(numbers[i])) * 0x100000001b3u;
  return static_cast<int64_t>(sum);
}

int64_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of_bits(int64_t bits) {
  const auto narrow = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &narrow, sizeof(value));
  return value;
}

void write_numbers(const ProblemNumbers& p, int64_t* to) {
  const cpu::Activation& a = p.activation;
  to[kMagic] = kMagicNumber;
  to[kLayout] = static_cast<int64_t>(p.layout);
  to[kKind] = static_cast<int64_t>(p.geometry.element.kind);
  to[kBits] = p.geometry.element.bits;
  to[kN] = p.geometry.n;
  to[kK] = p.geometry.k;
  to[kGroup] = p.geometry.group;
  to[kColumns] = p.columns;
  to[kElementBias] = p.element_bias;
  to[kActivationFlags] = a.present * kPresent + a.dynamic * kDynamic + a.symmetric * kSymmetric +
                         a.whole_tensor * kWholeTensor;
  to[kActivationBits] = a.bits;
  to[kExponent] = a.exponent;
  to[kMantissa] = a.mantissa;
  to[kActivationGroup] = a.group;
  to[kScaleType] = static_cast<int64_t>(a.scale_type);
  to[kLargest] = bits_of_float(a.largest);
  to[kMaximum] = bits_of_float(a.maximum);
  to[kOperands] = p.operands;
  to[kChecksum] = checksum(to);
}

// Element type of a quantized activation: int2 to int8 or a float.
void read_activation_element(const char* op, const std::string& name, cpu::Activation& a) {
  struct Named {
    const char* name;
    int bits, exponent, mantissa;
    float largest;
  };
  constexpr Named kFloats[] = {{"e4m3", 8, 4, 3, 448.0f},
                               {"e5m2", 8, 5, 2, 57344.0f},
                               {"e3m2", 6, 3, 2, 28.0f},
                               {"e2m3", 6, 2, 3, 7.5f},
                               {"e2m1", 4, 2, 1, 6.0f}};
  for (const Named& named : kFloats)
    if (name == named.name) {
      a.bits = named.bits;
      a.exponent = named.exponent;
      a.mantissa = named.mantissa;
      a.largest = named.largest;
      return;
    }
  if (name.size() != 4 || name.compare(0, 3, "int") != 0 || name[3] < '2' || name[3] > '8')
    fail(op, "activation is '", name, "', expected int2 to int8, e4m3, e5m2, e3m2, e2m3 or e2m1");
  a.bits = name[3] - '0';
  a.largest = static_cast<float>((1 << (a.bits - 1)) - 1);
}

Scalar activation_scale_type(const char* op, const std::string& name) {
  if (name == "float32") return Scalar::float32;
  if (name == "e8m0") return Scalar::e8m0;
  if (name == "e4m3") return Scalar::e4m3;
  fail(op, "scale_dtype is '", name, "', expected float32, e8m0 or e4m3");
}

bool has(uint32_t operands, Operand operand) {
  return (operands >> static_cast<int>(operand) & 1u) != 0;
}

// Names separated by blanks, in any order.
uint32_t read_operands(const char* op, const std::string& names) {
  uint32_t operands = 0;
  std::istringstream rest(names);
  for (std::string name; rest >> name;) {
    size_t i = 0;
    while (i < kOperandNames.size() && name != kOperandNames[i]) ++i;
    if (i == kOperandNames.size()) fail(op, "operands holds '", name, "', which is unknown");
    operands |= 1u << i;
  }
  if (!has(operands, Operand::packed)) fail(op, "operands are '", names, "', expected packed");
  return operands;
}

// What the kernels of layouts/quads.h can do to x.
void check_integer_activation(const char* op, const Geometry& g, cpu::Activation& a) {
  if (!a.present || a.bits != 8 || a.exponent != 0 || a.whole_tensor != !a.dynamic ||
      (!a.dynamic && a.group != 0) || a.scale_type != Scalar::float32)
    fail(op, "expected an activation int8 for layout quads, dynamic per token or group or static ",
         "per tensor, with float32 scales");
  const std::string why = cpu::why_not_grouped(g, a.group);
  if (!why.empty()) fail(op, why);
  if (a.group >= g.k) a.group = 0;
}

}  // namespace

ProblemNumbers read_problem(const char* op, const Tensor& problem) {
  check_plain(op, "problem", problem);
  check_type(op, "problem", problem, ScalarType::Long);
  check_shape<1>(op, "problem", problem, {kLength});
  const int64_t* from = static_cast<const int64_t*>(problem.const_data_ptr());
  if (from[kMagic] != kMagicNumber || from[kChecksum] != checksum(from))
    fail(op, "problem does not come from make_problem of this version; prepare the layer again");
  ProblemNumbers p{};
  p.layout = static_cast<cpu::PackedLayout>(from[kLayout]);
  const Element element = {static_cast<Kind>(from[kKind]), static_cast<int>(from[kBits])};
  p.geometry = p.layout == cpu::PackedLayout::quads
                   ? cpu::make_quads_geometry(from[kN], from[kK], from[kGroup], element.bits)
                   : cpu::make_geometry(from[kN], from[kK], from[kGroup], element);
  p.columns = from[kColumns];
  p.element_bias = from[kElementBias];
  cpu::Activation& a = p.activation;
  const int64_t flags = from[kActivationFlags];
  a.present = (flags & kPresent) != 0;
  a.dynamic = (flags & kDynamic) != 0;
  a.symmetric = (flags & kSymmetric) != 0;
  a.whole_tensor = (flags & kWholeTensor) != 0;
  a.bits = static_cast<int>(from[kActivationBits]);
  a.exponent = static_cast<int>(from[kExponent]);
  a.mantissa = static_cast<int>(from[kMantissa]);
  a.group = from[kActivationGroup];
  a.scale_type = static_cast<Scalar>(from[kScaleType]);
  a.largest = float_of_bits(from[kLargest]);
  a.maximum = float_of_bits(from[kMaximum]);
  p.operands = static_cast<uint32_t>(from[kOperands]);
  return p;
}

Operands::Operands(const char* op, const ProblemNumbers& numbers,
                   const std::vector<Tensor>& tensors) {
  size_t count = 0;
  for (size_t i = 0; i < at_.size(); ++i) {
    if ((numbers.operands >> i & 1u) == 0) continue;
    if (count < tensors.size()) at_[i] = &tensors[count];
    ++count;
  }
  if (count != tensors.size())
    fail(op, "there are ", tensors.size(), " tensors, expected ", count, " as in problem");
}

cpu::Weight weight_of(const char* op, const ProblemNumbers& numbers, const Operands& operands) {
  const Geometry& g = numbers.geometry;
  const Tensor& packed = *operands[Operand::packed];
  check_packed(op, numbers.layout, packed, g);
  cpu::Weight w =
      cpu::packed_weight(numbers.layout, g, static_cast<const uint8_t*>(packed.const_data_ptr()));
  const auto numbers_of = [&](const char* what, const Tensor& tensor, Scalar type) {
    check_plain(op, what, tensor);
    check_shape<3>(op, what, tensor, {g.tiles, g.groups, cpu::kTile});
    return cpu::tile_numbers(tensor.const_data_ptr(), type, g);
  };
  if (const Tensor* scale = operands[Operand::scale])
    w.scale = numbers_of("scale", *scale, scale_type(op, "scale", scale->scalar_type()));
  if (const Tensor* zero = operands[Operand::zero])
    w.zero = numbers_of("zero", *zero, float_type(op, "zero", zero->scalar_type()));
  w.row_scale = number_data(op, "row_scale", operands[Operand::row_scale], g.n);
  const Tensor* table = operands[Operand::table];
  if (table == nullptr) return w;
  if (g.element.kind != Kind::integer || g.element.bits == 8 ||
      numbers.layout != PackedLayout::planes)
    fail(op, "table is given for ", element_name(g.element), " in layout ",
         layout_name(numbers.layout), ", expected uint1 to uint7 in planes");
  check_plain(op, "table", *table);
  check_shape<1>(op, "table", *table, {int64_t{1} << g.element.bits});
  if (table->scalar_type() == ScalarType::Float) {
    w.wide_table = static_cast<const float*>(table->const_data_ptr());
  } else {
    check_type(op, "table", *table, ScalarType::BFloat16);
    w.table = static_cast<const uint16_t*>(table->const_data_ptr());
  }
  return w;
}

Tensor make_problem(std::string layout, int64_t n, int64_t k, int64_t group_size,
                    std::string element, int64_t element_bias, std::string operands,
                    std::optional<Tensor> perm, std::optional<int64_t> columns,
                    std::optional<std::string> activation, bool dynamic, std::string granularity,
                    int64_t activation_group, bool symmetric, std::string scale_dtype,
                    double maximum) {
  constexpr const char* op = "make_problem";
  ProblemNumbers p{};
  p.layout = parse_layout(op, layout);
  if (p.layout == cpu::PackedLayout::marlin)
    fail(op, "layout is 'marlin', expected planes or quads, which CPU kernels multiply");
  p.geometry = geometry_in(op, p.layout, n, k, group_size, element);
  const Geometry& g = p.geometry;
  check_element_bias(op, g.element, element_bias);
  p.element_bias = element_bias;
  p.operands = read_operands(op, operands);
  if (has(p.operands, Operand::perm) != perm.has_value())
    fail(op, "perm is ", perm.has_value() ? "given" : "missing", ", but operands are '", operands,
         "'");
  p.columns = columns.value_or(k);
  if (p.columns < 1 || p.columns >= int64_t{1} << 31)
    fail(op, "columns is ", p.columns, ", expected 1 to 2^31 - 1, what perm can name");
  if (perm.has_value()) {
    check_perm(op, perm_data(op, &*perm, k), k, p.columns);
  } else if (p.columns != k) {
    fail(op, "columns is ", p.columns, " without perm, expected k = ", k);
  }
  cpu::Activation& a = p.activation;
  if (activation.has_value()) {
    a.present = true;
    a.dynamic = dynamic;
    a.symmetric = symmetric;
    read_activation_element(op, *activation, a);
    if (granularity != "token" && granularity != "tensor" && granularity != "group")
      fail(op, "granularity is '", granularity, "', expected token, tensor or group");
    a.whole_tensor = granularity == "tensor";
    const bool grouped = granularity == "group";
    if (grouped ? activation_group < 1 : activation_group != -1)
      fail(op, "activation_group is ", activation_group, " for granularity ", granularity);
    a.group = grouped ? activation_group : 0;
    a.scale_type = activation_scale_type(op, scale_dtype);
    a.maximum = static_cast<float>(maximum);
    if (!(a.maximum > 0) || !std::isfinite(a.maximum))
      fail(op, "maximum is ", maximum, ", expected a positive number");
  }
  if (p.layout == cpu::PackedLayout::quads) check_integer_activation(op, g, a);

  const std::array<int64_t, 1> shape = {kLength};
  Tensor out = new_tensor(shape, ScalarType::Long);
  write_numbers(p, static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace compressed_linear
