// SPDX-License-Identifier: Apache-2.0
// Every integer engine this processor can run against the defining sum, on buffers of exactly the
// stated size so that the address sanitizer sees every access outside. No torch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/common/floats.h"
#include "cpu/common/isa.h"
#include "cpu/integer/segments.h"
#include "cpu/repack/quads.h"
#include "cpu/repack/repack.h"
#include "threads.h"

namespace compressed_linear::cpu {
LinearFunction integer_amx_emulated, integer_avxvnni_evex;
}  // namespace compressed_linear::cpu

namespace cl = compressed_linear::cpu;
using cl::Scalar;

namespace {

using Bytes = std::vector<uint8_t>;

struct Case {
  std::string what;
  int64_t n, k, group;
  int bits;
  int64_t m;
  bool dynamic, symmetric;
  int64_t x_group;
  float maximum;
  Scalar x_type;
  bool zero, bias, reorder;
  bool extreme;  // codes and activations of the largest size and one sign
};

std::mt19937 generator(1);
int failures = 0;

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

int64_t below(int64_t bound) {
  return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound));
}

float put(Bytes& data, Scalar type, int64_t index, double value) {
  const float narrow = static_cast<float>(value);
  cl::store_scalars(data.data(), type, index, 1, &narrow);
  return cl::load_scalar(data.data(), type, index);
}

void check(bool good, const Case& c, const std::string& isa, const std::string& message) {
  if (good) return;
  ++failures;
  std::printf("FAIL %s on %s: %s\n", c.what.c_str(), isa.c_str(), message.c_str());
}

// x^ of one row as the rule says, straight from its text: std::nearbyint, one channel at a time.
std::vector<double> quantized(const cl::Activation& rule, const std::vector<float>& row) {
  std::vector<double> out(row.size());
  const size_t size = rule.group == 0 ? row.size() : static_cast<size_t>(rule.group);
  for (size_t begin = 0; begin < row.size(); begin += size) {
    const size_t end = std::min(begin + size, row.size());
    float low = 0, high = 0, scale = rule.scale, zero = rule.zero;
    for (size_t i = begin; i < end; ++i) {
      low = std::min(low, row[i]);
      high = std::max(high, row[i]);
    }
    if (rule.dynamic) {
      scale = rule.symmetric ? std::max(high, -low) / rule.maximum : (high - low) / 255.0f;
      if (scale == 0) scale = 1;
      zero =
          rule.symmetric ? 0 : std::clamp(std::nearbyint(-128.0f - low / scale), -128.0f, 127.0f);
    }
    for (size_t i = begin; i < end; ++i) {
      const float q = std::clamp(std::nearbyint(row[i] / scale) + zero, -128.0f, 127.0f);
      out[i] = (static_cast<double>(q) - zero) * scale;
    }
  }
  return out;
}

std::vector<const cl::Isa*> engines() {
  std::vector<const cl::Isa*> found = cl::supported_isas(cl::Kernels::integers);
#if defined(COMPRESSED_LINEAR_X86)
  static constexpr cl::Isa kOthers[] = {
      {"avxvnni-evex", "", 0, nullptr, cl::integer_avxvnni_evex, nullptr},
      {"amx-emulated", "", 0, nullptr, cl::integer_amx_emulated, nullptr}};
  if (found.front()->name == std::string("avx512vnni"))
    for (const cl::Isa& other : kOthers) found.push_back(&other);
#endif
  return found;
}

void run(const Case& c) {
  const cl::Geometry g = cl::make_quads_geometry(c.n, c.k, c.group, c.bits);
  const int64_t columns = c.reorder ? c.k + 3 : c.k;
  const int32_t middle = 1 << (c.bits - 1);
  Bytes rows(static_cast<size_t>(c.n * c.k));
  for (uint8_t& code : rows)
    code = static_cast<uint8_t>(c.extreme ? (1 << c.bits) - 1 : below(int64_t{1} << c.bits));
  Bytes packed(static_cast<size_t>(g.tiles * g.tile_bytes()));
  cl::Repack job = cl::from_rows(g, cl::PackedLayout::quads, rows.data(), c.n, 0, packed.data());
  cl::plan_fields(job);
  cl::repack_plain(job, 0, g.tiles);
  Bytes back(rows.size());
  cl::unpack_quads(g, packed.data(), 0, g.tiles, back.data());
  check(back == rows, c, "packer", "unpacking does not give back what was packed");

  const int64_t scales = g.tiles * g.groups * cl::kTile;
  std::vector<float> scale(static_cast<size_t>(scales)), zero(scale.size());
  for (float& value : scale) value = static_cast<float>(uniform(0.01, 0.1));
  for (float& value : zero) value = static_cast<float>(below(int64_t{1} << c.bits));
  const auto at_group = [&](int64_t row, int64_t channel) {
    return static_cast<size_t>((row / cl::kTile * g.groups + channel / c.group) * cl::kTile +
                               row % cl::kTile);
  };

  std::vector<int32_t> perm(static_cast<size_t>(c.k));
  for (int32_t& entry : perm) entry = static_cast<int32_t>(below(columns + 1)) - 1;
  Bytes x(static_cast<size_t>(c.m * columns * cl::size_of(c.x_type)));
  std::vector<float> xs(static_cast<size_t>(c.m * columns)), bias(static_cast<size_t>(c.n));
  for (int64_t m = 0; m < c.m; ++m) {
    const double size = std::ldexp(1.0, static_cast<int>(below(20)) - 10);
    for (int64_t i = 0; i < columns; ++i) {
      double value = m % 4 == 3 ? 0 : m % 4 == 2 ? uniform(-3, -1) : uniform(-1, 1);
      if (c.extreme) value = m % 2 == 0 ? 1 : -1;
      xs[static_cast<size_t>(m * columns + i)] = put(x, c.x_type, m * columns + i, value * size);
    }
  }
  for (float& value : bias) value = static_cast<float>(uniform(-1, 1));

  std::vector<float> out(static_cast<size_t>(c.m * c.n));
  cl::Problem p{};
  p.weight = cl::packed_weight(cl::PackedLayout::quads, g, packed.data());
  p.x.m = c.m;
  p.x.columns = columns;
  p.weight.scale = cl::tile_numbers(scale.data(), Scalar::float32, g);
  if (c.zero) p.weight.zero = cl::tile_numbers(zero.data(), Scalar::float32, g);
  p.y.bias_type = Scalar::float32;
  p.weight.middle = static_cast<float>(middle);
  p.weight.offset = c.zero ? -static_cast<float>(middle) : 0;
  p.x.perm = c.reorder ? perm.data() : nullptr;
  p.x.data = x.data();
  p.x.type = c.x_type;
  p.x.row_stride = columns;
  p.x.column_stride = 1;
  p.y.bias = c.bias ? bias.data() : nullptr;
  p.y.data = out.data();
  p.y.type = Scalar::float32;
  cl::Activation& rule = p.x.activation;
  rule.present = true;
  rule.dynamic = c.dynamic;
  rule.symmetric = c.symmetric;
  rule.bits = 8;
  rule.group = c.x_group;
  rule.maximum = c.maximum;
  rule.scale = 0.01f;
  rule.zero = c.symmetric ? 0.0f : -7.0f;
  const int64_t segments = cl::count_segments(g, c.x_group);
  std::vector<int32_t> sums(static_cast<size_t>(g.tiles * segments * cl::kTile));
  for (int64_t tile = 0; tile < g.tiles; ++tile)
    cl::sum_codes(g, c.x_group, packed.data(), tile, sums.data() + tile * segments * cl::kTile);
  p.weight.code_sums = c.symmetric ? nullptr : sums.data();

  // The defining sum.
  std::vector<double> expected(out.size()), allowed(out.size());
  for (int64_t m = 0; m < c.m; ++m) {
    std::vector<float> row(static_cast<size_t>(c.k));
    for (int64_t i = 0; i < c.k; ++i) {
      const int64_t from = c.reorder ? perm[static_cast<size_t>(i)] : i;
      row[static_cast<size_t>(i)] = from < 0 ? 0 : xs[static_cast<size_t>(m * columns + from)];
    }
    const std::vector<double> taken = quantized(p.x.activation, row);
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = c.bias ? bias[static_cast<size_t>(n)] : 0, size = std::abs(sum);
      for (int64_t i = 0; i < c.k; ++i) {
        const double s = scale[at_group(n, i)], value = taken[static_cast<size_t>(i)];
        const double code = rows[static_cast<size_t>(n * c.k + i)] - middle;
        const double offset = c.zero ? zero[at_group(n, i)] - middle : 0;
        sum += value * s * (code - offset);
        size += std::abs(value) * s * (std::abs(code) + std::abs(offset));
      }
      const auto at = static_cast<size_t>(m * c.n + n);
      expected[at] = sum;
      allowed[at] =
          4 * std::sqrt(static_cast<double>(c.k)) * 0x1p-24 * size + 0x1p-24 * std::abs(sum);
    }
  }

  std::vector<float> first;
  for (const cl::Isa* engine : engines()) {
    const std::string isa = engine->name;
    std::fill(out.begin(), out.end(), NAN);
    engine->integers(p, {&serial, 1});
    double worst = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      const double error = std::abs(out[i] - expected[i]);
      worst = std::max(worst, std::isnan(error) ? INFINITY : error == 0 ? 0 : error / allowed[i]);
    }
    check(worst <= 1, c, isa, "error is " + std::to_string(worst) + " times the allowed");
    if (first.empty()) first = out;
    check(std::memcmp(out.data(), first.data(), out.size() * 4) == 0, c, isa,
          "other bits than the first engine's");
    for (const int64_t threads : {3, 16}) {  // of the sixteen three come
      std::fill(out.begin(), out.end(), NAN);
      engine->integers(p, {&threaded, threads});
      check(std::memcmp(out.data(), first.data(), out.size() * 4) == 0, c, isa,
            "threads change the result");
    }
    std::vector<uint16_t> halves(out.size());
    cl::Problem narrow = p;
    narrow.y.data = halves.data();
    narrow.y.type = Scalar::bfloat16;
    engine->integers(narrow, {&serial, 1});
    bool rounded = true;
    for (size_t i = 0; i < halves.size(); ++i)
      rounded = rounded && halves[i] == cl::to_bf16(first[i]);
    check(rounded, c, isa, "bf16 is not the fp32 result rounded");
    // Two calls at once.
    std::vector<float> other(out.size(), NAN);
    cl::Problem second = p;
    second.y.data = other.data();
    std::thread caller([&] { engine->integers(second, {&threaded, 3}); });
    engine->integers(p, {&threaded, 3});
    caller.join();
    check(out == first && other == first, c, isa, "calls disturb each other");
    if (c.m > 1) {
      cl::Problem last = p;
      last.x.m = 1;
      last.x.data = x.data() + (c.m - 1) * columns * cl::size_of(c.x_type);
      engine->integers(last, {&serial, 1});
      check(std::memcmp(out.data(), first.data() + (c.m - 1) * c.n, static_cast<size_t>(c.n) * 4) ==
                0,
            c, isa, "a row on its own differs");
    }
  }
}

struct Shape {
  int64_t n, k, group, x_group;
};

// What else a case has follows from its number.
Case make_case(const Shape& shape, int bits, int64_t m, int number) {
  Case c{"",
         shape.n,
         shape.k,
         shape.group,
         bits,
         m,
         number % 5 != 0 || shape.x_group != 0,
         number % 3 != 0,
         shape.x_group,
         number % 2 == 0 ? 127.0f : 127.5f,
         number % 7 == 0   ? Scalar::float16
         : number % 7 == 1 ? Scalar::float32
                           : Scalar::bfloat16,
         number % 4 < 2,
         number % 2 == 1,
         number % 6 == 5,
         number % 11 == 10};
  c.what = "uint" + std::to_string(bits) + " n=" + std::to_string(shape.n) +
           " k=" + std::to_string(shape.k) + " group=" + std::to_string(shape.group) +
           " m=" + std::to_string(m) + (c.dynamic ? " dynamic" : " static") +
           (c.symmetric ? "" : " asymmetric") + " x group " + std::to_string(shape.x_group) +
           (c.zero ? " zero" : "") + (c.reorder ? " reorder" : "") + (c.extreme ? " extreme" : "");
  return c;
}

}  // namespace

// Runs each STEP-th case, all of them by default.
int main(int argc, char** argv) {
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  int count = 0, run_count = 0;
  const auto run_all = [&](const std::vector<Shape>& shapes, const std::vector<int>& widths,
                           const std::vector<int64_t>& rows) {
    for (const Shape& shape : shapes)
      for (const int bits : widths)
        for (const int64_t m : rows) {
          const int number = count++;
          if (number % step != 0) continue;
          run(make_case(shape, bits, m, number));
          ++run_count;
        }
  };
  // Whole strips and ragged ones, groups across blocks and of odd sizes, one group for all, more
  // channels than a chunk, activation groups inside, across and beside weight groups.
  run_all(
      {
          {70, 384, 128, 0},
          {33, 40, 20, 0},
          {16, 96, 8, 0},
          {20, 33, 1, 0},
          {17, 100, 100, 0},
          {64, 160, 32, 32},
          {130, 1100, 1100, 0},
          {48, 256, 64, 128},
          {35, 192, 192, 32},
          {64, 1088, 64, 0},
          {16, 60, 6, 12},
          {40, 120, 40, 32},
          {20, 130, 130, 32},
      },
      {1, 2, 3, 4, 5, 6, 7, 8}, {1, 3, 6, 13, 30});
  // Rows for several tile registers, segments across chunks, tile registers of 16 and of 8 quads,
  // one, two, four or more segments of a tile register in a group, tiles that do not fill a strip.
  run_all(
      {
          {80, 4224, 4224, 0},
          {33, 2080, 2080, 0},
          {100, 2240, 64, 0},
          {48, 2304, 32, 0},
          {20, 2176, 2176, 32},
          {36, 1000, 1000, 0},
          {64, 640, 64, 32},
          {52, 512, 128, 32},
      },
      {3, 4, 8}, {7, 16, 17, 40, 70});
  // The longest segment, at the ends of int32.
  for (const bool symmetric : {true, false}) {
    const Case longest{"longest segment", 16,    70000, 70000, 8,   1, true, symmetric, 0, 127,
                       Scalar::float32,   false, false, false, true};
    run(longest);
  }
  std::printf("%d integer cases on", run_count + 2);
  for (const cl::Isa* engine : engines()) std::printf(" %s", engine->name);
  std::printf(": %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
