// SPDX-License-Identifier: Apache-2.0
// Every engine this processor can run against the defining sum in double precision, on buffers of
// exactly the stated size so that the address sanitizer sees every access outside. No torch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/common/floats.h"
#include "cpu/common/isa.h"
#include "cpu/common/paths.h"
#include "cpu/float/lookup.h"
#include "cpu/repack/repack.h"
#include "threads.h"

namespace compressed_linear::cpu {
LinearFunction float_amx_emulated, float_avxvnni_evex;
}  // namespace compressed_linear::cpu

namespace cl = compressed_linear::cpu;
using cl::Kind;
using cl::Scalar;

namespace {

using Bytes = std::vector<uint8_t>;

struct Shape {
  int64_t n, k, group;
};

std::mt19937 generator(1);

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

int64_t below(int64_t bound) {
  return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound));
}

// A float of `type` near `value` into data[index]; returns what it became.
double put(Bytes& data, Scalar type, int64_t index, double value) {
  const float narrow = static_cast<float>(value);
  cl::store_scalars(data.data(), type, index, 1, &narrow);
  return cl::load_scalar(data.data(), type, index);
}

Bytes floats(Scalar type, int64_t count) {
  return Bytes(static_cast<size_t>(count * cl::size_of(type)));
}

struct Case {
  std::string what;
  Shape shape;
  cl::Element element;
  Scalar x_type, scale_type;
  bool zero, bias, reorder, table, row_scale;
  int64_t m;
};

int failures = 0;

void check(bool good, const Case& c, const char* isa, const std::string& message) {
  if (good) return;
  ++failures;
  std::printf("FAIL %s on %s: %s\n", c.what.c_str(), isa, message.c_str());
}

std::vector<const cl::Isa*> engines() {
  std::vector<const cl::Isa*> found = cl::supported_isas(cl::Kernels::floats);
#if defined(COMPRESSED_LINEAR_X86)
  static constexpr cl::Isa kEmulated = {"amx-emulated",         "",      0,
                                        cl::float_amx_emulated, nullptr, nullptr};
  if (found.front()->name == std::string("avx512bf16")) found.push_back(&kEmulated);
  static constexpr cl::Isa kEvex = {"avxvnni-evex",         "",      0,
                                    cl::float_avxvnni_evex, nullptr, nullptr};
  for (const cl::Isa* isa : found)
    if (isa->name == std::string("avx512vnni")) {
      found.push_back(&kEvex);
      break;
    }
#endif
  return found;
}

// Whether it multiplies digits of x where they are taken; avx2madd only below 8 bits.
bool multiplies_digits(const cl::Isa& isa, const cl::Problem& p) {
  const std::string name = isa.name;
  if (name == "avx2madd") return p.weight.geometry.element.bits < 8;
  return name == "avx512vnni" || name == "avxvnni" || name == "avxvnni-evex";
}

void run(const Case& c) {
  const cl::Geometry g = cl::make_geometry(c.shape.n, c.shape.k, c.shape.group, c.element);
  const bool coded = c.element.kind == Kind::integer;
  const bool small = c.element.kind == Kind::e4m3 || c.element.kind == Kind::e5m2;
  const bool scaled = coded || small;
  const int64_t n = g.n, k = g.k, columns = c.reorder ? k + 3 : k;

  // Weights: what is packed, and what it means.
  std::vector<double> value(static_cast<size_t>(n * k));
  Bytes rows(static_cast<size_t>(n * k * (scaled ? 1 : c.element.bits / 8)));
  std::vector<uint16_t> table(coded ? size_t{1} << c.element.bits : 1);
  for (uint16_t& entry : table) entry = cl::to_bf16(static_cast<float>(uniform(-2, 2)));
  // e2m1, whose values are bytes.
  if (c.element.bits == 4 && c.m != 2)
    for (size_t i = 0; i < table.size(); ++i) {
      constexpr float kE2m1[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
      table[i] = cl::to_bf16(i < 8 ? kE2m1[i] : -kE2m1[i - 8]);
    }
  // Values that need all of fp32, tried where there is a row scale too.
  std::vector<float> wide_table(table.size());
  for (float& entry : wide_table) entry = static_cast<float>(uniform(-2, 2));
  const Scalar dense = c.element.kind == Kind::bfloat16  ? Scalar::bfloat16
                       : c.element.kind == Kind::float16 ? Scalar::float16
                                                         : Scalar::float32;
  const double middle = coded ? static_cast<double>(1 << (c.element.bits - 1)) : 0;
  for (int64_t i = 0; i < n * k; ++i) {
    const auto at = static_cast<size_t>(i);
    if (coded) {
      rows[at] = static_cast<uint8_t>(below(int64_t{1} << c.element.bits));
      value[at] = !c.table      ? rows[at] - middle
                  : c.row_scale ? wide_table[rows[at]]
                                : cl::from_bf16(table[rows[at]]);
    } else if (small) {
      // Every finite code: magnitudes below 0x7c for e5m2, below 0x7f for e4m3.
      const bool e4m3 = c.element.kind == Kind::e4m3;
      rows[at] = static_cast<uint8_t>(below(e4m3 ? 0x7f : 0x7c) | (below(2) << 7));
      value[at] = e4m3 ? cl::from_e4m3(rows[at]) : cl::from_e5m2(rows[at]);
    } else {
      value[at] = put(rows, dense, i, uniform(-1, 1));
    }
  }
  Bytes packed(static_cast<size_t>(g.tiles * g.tile_bytes()));
  cl::Repack job = cl::from_rows(g, cl::PackedLayout::planes, rows.data(), n, 0, packed.data());
  if (cl::is_coded(c.element)) cl::plan_fields(job);
  cl::repack_plain(job, 0, (g.tiles + cl::kStrip - 1) / cl::kStrip);
  Bytes back(rows.size());
  cl::unpack_tiles(g, packed.data(), 0, g.tiles, back.data());
  check(back == rows, c, "packer", "unpacking does not give back what was packed");

  const int64_t scales = g.tiles * g.groups * cl::kTile;
  const Scalar zero_type = cl::size_of(c.scale_type) == 1 ? Scalar::float32 : c.scale_type;
  Bytes scale = floats(c.scale_type, scales), zero = floats(zero_type, scales);
  std::vector<float> row_scale(static_cast<size_t>(n));
  for (float& entry : row_scale) entry = static_cast<float>(uniform(-4, 4));
  std::vector<double> weight(value.size()), magnitude(value.size());
  std::vector<double> s(static_cast<size_t>(scales)), z(static_cast<size_t>(scales));
  for (int64_t i = 0; i < scales; ++i) {
    const auto at = static_cast<size_t>(i);
    if (cl::size_of(c.scale_type) == 1) {
      // All finite e4m3 codes; exponents from 2^-127, which is subnormal, to 2^-17, now and then.
      const bool e4m3 = c.scale_type == Scalar::e4m3;
      scale[at] = static_cast<uint8_t>(e4m3 ? below(0x7f) | (below(2) << 7)
                                            : (below(8) != 0 ? 100 : 0) + below(10));
      s[at] = cl::load_scalar(scale.data(), c.scale_type, i);
    } else {
      s[at] = put(scale, c.scale_type, i, uniform(0.01, 0.1));
    }
    z[at] = put(zero, zero_type, i, coded ? uniform(0, middle * 2) : uniform(-1, 1));
  }
  for (int64_t row = 0; row < n; ++row)
    for (int64_t channel = 0; channel < k; ++channel) {
      const auto at = static_cast<size_t>(row * k + channel);
      const auto group = static_cast<size_t>(
          (row / cl::kTile * g.groups + channel / g.group) * cl::kTile + row % cl::kTile);
      const double offset = c.zero ? z[group] : 0;
      const double second = c.row_scale ? row_scale[static_cast<size_t>(row)] : 1;
      const double factor = second * (scaled ? s[group] : 1);
      weight[at] = (value[at] - offset) * factor;
      magnitude[at] = (std::abs(value[at]) + std::abs(offset)) * std::abs(factor);
    }

  std::vector<int32_t> perm(static_cast<size_t>(k));
  for (int32_t& entry : perm) entry = static_cast<int32_t>(below(columns + 1)) - 1;
  Bytes x = floats(c.x_type, c.m * columns), bias = floats(c.x_type, n);
  std::vector<double> xs(static_cast<size_t>(c.m * columns)), biases(static_cast<size_t>(n));
  for (int64_t i = 0; i < c.m * columns; ++i)
    xs[static_cast<size_t>(i)] = put(x, c.x_type, i, uniform(-1, 1));
  for (int64_t i = 0; i < n; ++i)
    biases[static_cast<size_t>(i)] = put(bias, c.x_type, i, uniform(-1, 1));

  std::vector<float> out(static_cast<size_t>(c.m * n));
  cl::Problem p{};
  p.weight = cl::packed_weight(cl::PackedLayout::planes, g, packed.data());
  p.x.m = c.m;
  p.x.columns = columns;
  if (scaled) p.weight.scale = cl::tile_numbers(scale.data(), c.scale_type, g);
  if (c.zero) p.weight.zero = cl::tile_numbers(zero.data(), zero_type, g);
  p.weight.row_scale = c.row_scale ? row_scale.data() : nullptr;
  p.weight.middle = static_cast<float>(middle);
  p.weight.table = c.table && !c.row_scale ? table.data() : nullptr;
  p.weight.wide_table = c.table && c.row_scale ? wide_table.data() : nullptr;
  p.x.perm = c.reorder ? perm.data() : nullptr;
  p.x.data = x.data();
  p.x.type = p.y.bias_type = c.x_type;
  p.x.row_stride = columns;
  p.x.column_stride = 1;
  p.y.bias = c.bias ? bias.data() : nullptr;
  p.y.data = out.data();
  p.y.type = Scalar::float32;

  std::vector<int64_t> ids(static_cast<size_t>(n));
  std::iota(ids.begin(), ids.end(), 0);
  std::vector<float> looked_up(static_cast<size_t>(n * columns));
  cl::look_up({p.weight, p.x.perm, ids.data(), columns, looked_up.data(), Scalar::float32}, 0, n);
  double furthest = 0;
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> sum(static_cast<size_t>(columns)), size(static_cast<size_t>(columns));
    for (int64_t channel = 0; channel < k; ++channel) {
      const int64_t to = c.reorder ? perm[static_cast<size_t>(channel)] : channel;
      if (to < 0) continue;
      sum[static_cast<size_t>(to)] += weight[static_cast<size_t>(row * k + channel)];
      size[static_cast<size_t>(to)] += magnitude[static_cast<size_t>(row * k + channel)];
    }
    for (int64_t i = 0; i < columns; ++i) {
      const double error =
          std::abs(looked_up[static_cast<size_t>(row * columns + i)] - sum[static_cast<size_t>(i)]);
      const double allowed =
          4 * std::sqrt(static_cast<double>(k)) * 0x1p-24 * size[static_cast<size_t>(i)] + 1e-30;
      furthest = std::max(furthest, std::isnan(error) ? INFINITY : error / allowed);
    }
  }
  check(furthest <= 1, c, "lookup", "error is " + std::to_string(furthest) + " times the allowed");

  std::vector<float> of_digits;  // all that multiply digits of x give the same bits
  for (const cl::Isa* engine : engines()) {
    const std::string isa = engine->name;
    std::fill(out.begin(), out.end(), NAN);
    engine->floats(p, {&serial, 1});
    double worst = 0;
    for (int64_t m = 0; m < c.m; ++m)
      for (int64_t row = 0; row < n; ++row) {
        double sum = c.bias ? biases[static_cast<size_t>(row)] : 0, size = std::abs(sum);
        for (int64_t channel = 0; channel < k; ++channel) {
          const int64_t from = c.reorder ? perm[static_cast<size_t>(channel)] : channel;
          if (from < 0) continue;
          const double value_x = xs[static_cast<size_t>(m * columns + from)];
          sum += value_x * weight[static_cast<size_t>(row * k + channel)];
          size += std::abs(value_x) * magnitude[static_cast<size_t>(row * k + channel)];
        }
        const double allowed =
            4 * std::sqrt(static_cast<double>(k)) * 0x1p-24 * size + 0x1p-24 * std::abs(sum);
        const double error = std::abs(out[static_cast<size_t>(m * n + row)] - sum);
        worst = std::max(worst, std::isnan(error) ? INFINITY : error / allowed);
      }
    check(worst <= 1, c, isa.c_str(), "error is " + std::to_string(worst) + " times the allowed");

    // The same bits without VBMI, from several threads, and for a row on its own.
    const std::vector<float> whole = out;
    if (cl::takes_digits(p) && multiplies_digits(*engine, p)) {
      if (of_digits.empty()) of_digits = whole;
      check(std::memcmp(of_digits.data(), whole.data(), whole.size() * 4) == 0, c, isa.c_str(),
            "other engines have other sums of digits");
    }
    cl::hide_byte_permutations(true);
    std::fill(out.begin(), out.end(), NAN);
    engine->floats(p, {&serial, 1});
    cl::hide_byte_permutations(false);
    check(std::memcmp(out.data(), whole.data(), out.size() * 4) == 0, c, isa.c_str(),
          "permutations of bytes change the result");
    for (const int64_t threads : {3, 16}) {  // of the sixteen three come
      std::fill(out.begin(), out.end(), NAN);
      engine->floats(p, {&threaded, threads});
      check(std::memcmp(out.data(), whole.data(), out.size() * 4) == 0, c, isa.c_str(),
            "threads change the result");
    }
    // Two calls at once.
    std::vector<float> other(out.size(), NAN);
    cl::Problem second = p;
    second.y.data = other.data();
    std::thread caller([&] { engine->floats(second, {&threaded, 3}); });
    engine->floats(p, {&threaded, 3});
    caller.join();
    check(out == whole && other == whole, c, isa.c_str(), "calls disturb each other");
    if (c.m > 1) {
      cl::Problem last = p;
      last.x.m = 1;
      last.x.data = x.data() + (c.m - 1) * columns * cl::size_of(c.x_type);
      engine->floats(last, {&serial, 1});
      check(std::memcmp(out.data(), whole.data() + (c.m - 1) * n, static_cast<size_t>(n) * 4) == 0,
            c, isa.c_str(), "a row on its own differs");
    }
  }
}

void check_floats() {
  const Case c{"float conversions", {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto half = static_cast<uint16_t>(i);
    const float fp16 = cl::from_fp16(half), bf16 = cl::from_bf16(half);
    const bool good = (std::isnan(fp16) ? std::isnan(cl::from_fp16(cl::to_fp16(fp16)))
                                        : cl::to_fp16(fp16) == half) &&
                      (std::isnan(bf16) ? std::isnan(cl::from_bf16(cl::to_bf16(bf16)))
                                        : cl::to_bf16(bf16) == half);
    check(good, c, "plain", "there and back changes " + std::to_string(i));
  }
  check(cl::to_fp16(65520.0f) == 0x7c00, c, "plain", "65520 should round to infinity");
  check(cl::to_fp16(65519.0f) == 0x7bff, c, "plain", "65519 should round to 65504");
  check(cl::to_fp16(0x1p-25f) == 0 && cl::to_fp16(0x1.8p-24f) == 2, c, "plain",
        "ties of denormals should go to even");
  check(cl::to_bf16(0x1.01p0f) == 0x3f80 && cl::to_bf16(0x1.03p0f) == 0x3f82, c, "plain",
        "ties should go to even");
}

}  // namespace

// Runs each STEP-th case, all of them by default.
int main(int argc, char** argv) {
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  check_floats();
  const Shape shapes[] = {{70, 384, 128}, {33, 40, 20},  {16, 96, 8},  {20, 33, 1},
                          {17, 100, 100}, {48, 160, 32}, {70, 176, 16}};
  const cl::Element dense[] = {{Kind::bfloat16, 16},
                               {Kind::float16, 16},
                               {Kind::float32, 32},
                               {Kind::e4m3, 8},
                               {Kind::e5m2, 8}};
  const Scalar types[] = {Scalar::bfloat16, Scalar::float16, Scalar::float32};
  const Scalar scale_types[] = {Scalar::bfloat16, Scalar::float16, Scalar::float32, Scalar::e4m3,
                                Scalar::e8m0};
  int count = 0, run_count = 0;
  for (const Shape& shape : shapes)
    for (int variant = 0; variant < 13; ++variant) {
      const bool coded = variant < 8;
      const cl::Element element =
          coded ? cl::Element{Kind::integer, variant + 1} : dense[variant - 8];
      for (const Scalar x_type : types)
        for (const int64_t m : {1, 2, 4, 9, 50}) {
          const bool zero = coded && count % 3 != 0, reorder = count % 4 == 1;
          const bool table = coded && variant < 7 && count % 5 == 0;
          Case c{"",   shape,          element, x_type, scale_types[count % 5],
                 zero, count % 2 == 0, reorder, table,  count / 2 % 3 == 0,
                 m};
          c.what = (coded                        ? "uint"
                    : element.kind == Kind::e5m2 ? "e5m2-"
                                                 : "float") +
                   std::to_string(element.bits) + " n=" + std::to_string(shape.n) +
                   " k=" + std::to_string(shape.k) + " group=" + std::to_string(shape.group) +
                   " m=" + std::to_string(m) + " x=" + std::to_string(static_cast<int>(x_type)) +
                   (zero ? " zero" : "") + (reorder ? " reorder" : "") + (table ? " table" : "") +
                   (c.row_scale ? " row_scale" : "") +
                   " scale=" + std::to_string(static_cast<int>(c.scale_type));
          if (count++ % step != 0) continue;
          run(c);
          ++run_count;
        }
    }
  // So narrow and deep that K is cut among threads.
  for (const int64_t group : {32, 16})
    for (const int bits : {2, 4, 8})
      for (const int64_t m : {1, 3, 9}) {
        const bool table = bits == 4 && m != 3;
        Case c{"",
               {100, 1648 / group * group, group},
               {Kind::integer, bits},
               types[m % 3],
               table ? scale_types[4 - group / 32] : Scalar::bfloat16,
               m % 2 == 1,
               true,
               bits == 4,
               table,
               bits == 2,
               m};
        c.what = "deep uint" + std::to_string(bits) + " group=" + std::to_string(group) +
                 " m=" + std::to_string(m);
        run(c);
        ++run_count;
      }
  // So many rows that the AMX engine cuts K into blocks, and a last strip of three tiles.
  for (const int bits : {4, 16}) {
    Case c{"",
           {110, 1056, 96},
           {bits == 16 ? Kind::bfloat16 : Kind::integer, bits},
           Scalar::bfloat16,
           Scalar::bfloat16,
           bits == 4,
           true,
           false,
           false,
           false,
           291};
    c.what = "tall, " + std::to_string(bits) + " bits";
    run(c);
    ++run_count;
  }
  std::printf("%d cases on", run_count);
  for (const cl::Isa* engine : engines()) std::printf(" %s", engine->name);
  std::printf(": %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
