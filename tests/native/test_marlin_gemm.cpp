// SPDX-License-Identifier: Apache-2.0
// The source of the Marlin GEMM in the emulator, with all its checks, against the defining sum
// within the numerical contract; and limits on bank conflicts and memory transactions.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/marlin/gather.h"
#include "cuda/marlin/kernels.h"

using namespace compressed_linear::cuda;
using namespace compressed_linear::cuda::marlin;
namespace layout = compressed_linear::marlin;
namespace cpu = compressed_linear::cpu;

namespace {

using Bytes = std::vector<uint8_t>;

struct Case {
  const char* what;
  Element element;
  bool bfloat16;
  int m, n, k, group;  // group -1: whole channels
  Number scale;
  bool zero = false;
  bool extras = false;  // row_scale and bias
  int processors = 4;
  Number out = Number::float32;
  int resident = 1;
  unsigned order = 0;
};

std::mt19937 generator(1);
int failures = 0;

void check(bool good, const Case& c, const std::string& message) {
  if (good) return;
  ++failures;
  std::printf("FAIL %s: m %d n %d k %d group %d: %s\n", c.what, c.m, c.n, c.k, c.group,
              message.c_str());
}

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

int below(int bound) { return static_cast<int>(generator() % static_cast<unsigned>(bound)); }

// Stores `value` rounded to the type; returns what was stored.
float put(Bytes& data, Number type, int64_t index, double value) {
  const float narrow = static_cast<float>(value);
  uint8_t* const at = data.data() + index * bytes_of(type);
  if (type == Number::float32) {
    std::memcpy(at, &narrow, 4);
    return narrow;
  }
  if (type == Number::e8m0) {
    *at = static_cast<uint8_t>(127 + std::ilogb(narrow));
    return cpu::from_e8m0(*at);
  }
  if (type == Number::e4m3) {
    *at = static_cast<uint8_t>(0x20 + below(0x30));
    return cpu::from_e4m3(*at);
  }
  const uint16_t half = type == Number::float16 ? cpu::to_fp16(narrow) : cpu::to_bf16(narrow);
  std::memcpy(at, &half, 2);
  return type == Number::float16 ? cpu::from_fp16(half) : cpu::from_bf16(half);
}

float get(const Bytes& data, Number type, int64_t index) {
  const uint8_t* const at = data.data() + index * bytes_of(type);
  float wide;
  uint16_t half;
  if (type == Number::float32) {
    std::memcpy(&wide, at, 4);
    return wide;
  }
  std::memcpy(&half, at, 2);
  return type == Number::float16 ? cpu::from_fp16(half) : cpu::from_bf16(half);
}

double value_of(Element element, int code, const std::vector<float>& codebook) {
  switch (element) {
    case Element::e4m3:
      return cpu::from_e4m3(static_cast<uint8_t>(code));
    case Element::e2m1: {
      const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
      return code & 8 ? -values[code & 7] : values[code & 7];
    }
    case Element::codebook:
      return codebook[static_cast<size_t>(code)];
    default:
      return code;
  }
}

template <class T>
emulator::Buffer buffer(const char* name, const std::vector<T>& data, bool writable = false) {
  return {data.data(), data.size() * sizeof(T), name, writable};
}

emulator::Report run(const Case& c) {
  const int bits = bits_of(c.element), codes = 1 << bits;
  const int group = c.group < 0 ? c.k : c.group, groups = c.k / group;
  const Number x_type = c.bfloat16 ? Number::bfloat16 : Number::float16;
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };

  // The stride of x's rows is larger than their length.
  const int x_stride = c.k + 16;
  Bytes x(size(int64_t{2} * c.m * x_stride), 0xff);
  std::vector<float> wide_x(size(int64_t{c.m} * c.k));
  for (int m = 0; m < c.m; ++m)
    for (int k = 0; k < c.k; ++k)
      wide_x[size(int64_t{m} * c.k + k)] =
          put(x, x_type, int64_t{m} * x_stride + k, uniform(-2, 2) * (k % 17 == 0 ? 8 : 1));

  std::vector<float> codebook(16);
  for (float& entry : codebook)
    entry = cpu::from_bf16(cpu::to_bf16(static_cast<float>(uniform(-1, 1))));
  std::vector<uint32_t> weight(size(int64_t{c.k} * c.n * bits / 32));
  std::vector<uint32_t> zero(size(int64_t{groups} * c.n * bits / 32));
  Bytes scale(size(int64_t{groups} * c.n * bytes_of(c.scale)));
  std::vector<float> wide_scale(size(int64_t{groups} * c.n));
  std::vector<int> zeros(size(int64_t{groups} * c.n));
  const int code_bias = is_integer(c.element) && !c.zero ? codes / 2 : 0;
  for (int g = 0; g < groups; ++g)
    for (int n = 0; n < c.n; ++n) {
      const int64_t at = int64_t{g} * c.n + n;
      const int64_t grouped = layout::grouped_column(n);
      const int64_t column = groups == 1              ? layout::channel_column(n)
                             : bytes_of(c.scale) == 1 ? layout::byte_column(grouped)
                                                      : grouped;
      wide_scale[size(at)] = put(scale, c.scale, int64_t{g} * c.n + column,
                                 (n % 3 == 0 ? -1 : 1) * std::ldexp(uniform(1, 2), -below(6)) *
                                     (c.scale == Number::e8m0 && n % 3 == 0 ? -1 : 1));
      zeros[size(at)] = c.zero ? below(codes) : code_bias;
      if (!c.zero) continue;
      const layout::Field field = layout::zero_field(bits, c.n, g, n);
      zero[size(field.word)] |= static_cast<uint32_t>(zeros[size(at)]) << field.shift;
    }
  std::vector<double> w(size(int64_t{c.n} * c.k)), magnitude(w.size());
  for (int n = 0; n < c.n; ++n)
    for (int k = 0; k < c.k; ++k) {
      int code = below(codes);
      if (c.element == Element::e4m3 && (code & 0x7f) == 0x7f) code ^= 1;
      const layout::Field field = layout::code_field(bits, c.n, k, n);
      weight[size(field.word)] |= static_cast<uint32_t>(code) << field.shift;
      const int64_t at = int64_t{k / group} * c.n + n;
      const double centred =
          value_of(c.element, code, codebook) - (is_integer(c.element) ? zeros[size(at)] : 0);
      w[size(int64_t{n} * c.k + k)] = centred * wide_scale[size(at)];
      magnitude[size(int64_t{n} * c.k + k)] = std::fabs(w[size(int64_t{n} * c.k + k)]);
    }
  std::vector<float> row_scale(size(c.n));
  Bytes bias(size(int64_t{c.n} * bytes_of(x_type)));
  for (int n = 0; n < c.n; ++n) {
    row_scale[size(n)] = static_cast<float>(uniform(-1, 1));
    put(bias, x_type, n, uniform(-20, 20));
  }

  Params p{};
  p.x = x.data();
  p.weight = weight.data();
  p.scale = scale.data();
  p.zero = c.zero ? zero.data() : nullptr;
  p.codebook = codebook.data();
  p.row_scale = c.extras ? row_scale.data() : nullptr;
  p.bias = c.extras ? bias.data() : nullptr;
  p.x_stride = x_stride;
  p.m = c.m;
  p.n = c.n;
  p.k = c.k;
  p.group = group;
  p.code_bias = code_bias;
  p.scale_type = c.scale;
  p.bias_type = x_type;
  p.out_type = c.out;
  const LaunchShape launch = launch_shape(p, c.element, c.processors);
  Bytes out(size(int64_t{c.m} * c.n * bytes_of(c.out)), 0xff);
  std::vector<float> partial(size(launch.partial_floats), std::numeric_limits<float>::quiet_NaN());
  std::vector<int> arrived(size(kMaxBlocks));
  p.out = out.data();
  p.partial = partial.data();
  p.arrived = arrived.data();

  emulator::Options o;
  o.grid_x = launch.blocks;
  o.threads = launch.threads;
  o.shared_bytes = size(launch.shared_bytes);
  o.resident = c.resident;
  o.order = c.order;
  o.buffers = {buffer("x", x),
               buffer("weight", weight),
               buffer("scale", scale),
               buffer("zero", zero),
               buffer("codebook", codebook),
               buffer("row_scale", row_scale),
               buffer("bias", bias),
               buffer("out", out, true),
               buffer("partial", partial, true),
               buffer("arrived", arrived, true)};
  const Kernel kernel = c.bfloat16 ? kernel_for<BFloat16>(c.element, launch.shape)
                                   : kernel_for<Half>(c.element, launch.shape);
  const emulator::Report report = emulator::launch(o, [&] { kernel(p); });
  check(report.problem_count == 0, c,
        std::to_string(report.problem_count) +
            " problems, the first: " + (report.problems.empty() ? "" : report.problems[0]));
  check(std::all_of(arrived.begin(), arrived.end(), [](int n) { return n == 0; }), c,
        "counters are left behind");

  double worst = 0;
  int worst_at = 0;
  for (int m = 0; m < c.m; ++m)
    for (int n = 0; n < c.n; ++n) {
      double exact = 0, total = 0;
      for (int k = 0; k < c.k; ++k) {
        exact += wide_x[size(int64_t{m} * c.k + k)] * w[size(int64_t{n} * c.k + k)];
        total +=
            std::fabs(wide_x[size(int64_t{m} * c.k + k)]) * magnitude[size(int64_t{n} * c.k + k)];
      }
      if (c.extras) {
        exact = exact * row_scale[size(n)] + get(bias, x_type, n);
        total *= std::fabs(row_scale[size(n)]);
      }
      const int digits = c.out == Number::float32 ? 24 : c.out == Number::float16 ? 11 : 8;
      const double allowed =
          4 * std::sqrt(c.k) * 0x1p-24 * total + std::fabs(exact) * std::ldexp(1.0, -digits) + 1e-7;
      const double error = std::fabs(get(out, c.out, int64_t{m} * c.n + n) - exact) / allowed;
      if (!(error <= worst)) {
        worst = error;
        worst_at = m * c.n + n;
      }
    }
  check(worst <= 1, c,
        "off by " + std::to_string(worst) + " times what is allowed, at row " +
            std::to_string(worst_at / c.n) + " column " + std::to_string(worst_at % c.n));

  // No access to weights has bank conflicts, except to fp32 scales.
  const bool wide_scales = c.scale == Number::float32;
  check(report.matrix_loads.ratio() == 1, c, "bank conflicts of load_matrix");
  check(report.shared_copies.ratio() == 1, c, "bank conflicts of copies");
  check(report.shared_loads.ratio() < (wide_scales ? 2 : 1.001), c,
        "bank conflicts of loads: " + std::to_string(report.shared_loads.ratio()));
  check(report.shared_stores.ratio() < 1.05, c,
        "bank conflicts of stores: " + std::to_string(report.shared_stores.ratio()));
  check(report.global_copies.ratio() == 1, c,
        "sectors of copies: " + std::to_string(report.global_copies.ratio()));
  check(report.global_stores.ratio() < 1.05, c,
        "sectors of stores: " + std::to_string(report.global_stores.ratio()));
  return report;
}

// x[:, order] of odd strides, with channels of zeros.
void test_gather() {
  for (const bool ordered : {true, false}) {
    const int m = 5, k = 272, columns = 300, row_stride = 640, column_stride = 2;
    std::vector<uint16_t> x(size_t{m} * row_stride), out(size_t{m} * k, 0xffff);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i);
    std::vector<int> order(k);
    for (int& from : order) from = below(columns + 1) - 1;
    GatherParams p = {
        x.data(), ordered ? order.data() : nullptr, out.data(), row_stride, column_stride, m, k};
    emulator::Options o;
    o.grid_x = 1;
    o.threads = kGatherThreads;
    o.buffers = {buffer("x", x), buffer("order", order), buffer("out", out, true)};
    const emulator::Report report = emulator::launch(o, [&] { gather(p); });
    bool good = report.problem_count == 0 && report.global_stores.ratio() == 1;
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < k; ++j) {
        const int from = ordered ? order[static_cast<size_t>(j)] : j;
        const uint16_t expected =
            from < 0 ? uint16_t{0} : x[static_cast<size_t>(i * row_stride + from * column_stride)];
        good = good && out[static_cast<size_t>(i * k + j)] == expected;
      }
    if (!good) {
      ++failures;
      std::printf("FAIL gather: %s\n",
                  report.problems.empty() ? "another result" : report.problems[0].c_str());
    }
  }
}

// Of every division of work: the shared memory that a block of 8.6, 8.9 and 12.0 may have at most
// (CUDA C++ Programming Guide, "Compute Capabilities"), and no work left over.
void test_launch_shapes() {
  constexpr int64_t kShared = 99 << 10;
  constexpr Element elements[] = {Element::uint4, Element::uint8, Element::e4m3, Element::e2m1,
                                  Element::codebook};
  const uint32_t some_zero = 0;
  for (const Element element : elements)
    for (const int m : {1, 16, 17, 32, 33, 4096})
      for (const int n : {64, 6144, 28672})
        for (const int group : {16, 32, 64, 128, 4096})
          for (const Number scale : {Number::e8m0, Number::bfloat16, Number::float32})
            for (const bool zero : {false, is_integer(element)}) {
              Case c = {"launch shape", element, true, m, n, 4096, group, scale, zero};
              for (c.processors = 1; c.processors <= 170; c.processors += 13) {
                Params p{};
                p.m = m;
                p.n = n;
                p.k = c.k;
                p.group = group;
                p.scale_type = scale;
                p.zero = zero ? &some_zero : nullptr;
                const LaunchShape launch = launch_shape(p, element, c.processors);
                check(launch.shared_bytes <= kShared, c,
                      std::to_string(launch.shared_bytes) + " bytes of shared memory");
                const int64_t units = int64_t{p.m_tiles} * p.n_tiles * p.k_tiles;
                check(launch.blocks <= std::min<int64_t>(c.processors, kMaxBlocks), c,
                      "more blocks than processors");
                check(int64_t{launch.blocks} * p.per_block >= units &&
                          int64_t{launch.blocks - 1} * p.per_block < units,
                      c, "work that no block does, or a block without work");
              }
            }
}

}  // namespace

int main(int argc, char** argv) {
  const size_t step = argc > 1 ? static_cast<size_t>(std::atoi(argv[1])) : 1;
  constexpr Number fp16 = Number::float16, bf16 = Number::bfloat16, fp32 = Number::float32;
  const std::vector<Case> cases = {
      // Every M up to a tile, and what lies beside one, of every shape; few processors, so that
      // output tiles are cut.
      {"uint4b8", Element::uint4, false, 1, 256, 256, 128, fp16},
      {"uint4b8", Element::uint4, true, 16, 256, 256, 128, bf16},
      {"uint4b8", Element::uint4, true, 3, 320, 448, 64, bf16, false, true},
      {"uint4b8", Element::uint4, false, 17, 128, 256, 64, fp16},
      {"uint4b8", Element::uint4, true, 33, 256, 192, 64, bf16, false, true},
      {"uint4b8", Element::uint4, false, 64, 320, 128, 32, fp16},
      {"uint4b8", Element::uint4, true, 65, 64, 128, 16, fp32},
      {"whole channels", Element::uint4, false, 2, 64, 336, -1, fp32},
      {"whole channels", Element::uint4, true, 40, 128, 48, -1, bf16, true},
      {"one part", Element::uint4, true, 5, 128, 256, 32, bf16, false, false, 1},
      // Zero points.
      {"uint4", Element::uint4, false, 1, 256, 256, 128, fp16, true},
      {"uint4", Element::uint4, true, 16, 128, 128, 16, bf16, true, true},
      {"uint4", Element::uint4, true, 20, 192, 320, 32, fp16, true},
      {"uint4", Element::uint4, false, 34, 128, 256, 128, fp16, true},
      {"uint8", Element::uint8, false, 1, 256, 256, 128, fp16, true},
      {"uint8", Element::uint8, true, 7, 128, 320, 32, bf16, true, true},
      {"uint8", Element::uint8, true, 40, 64, 128, -1, bf16, true},
      {"uint8b128", Element::uint8, false, 16, 320, 128, 16, fp16},
      {"uint8b128", Element::uint8, true, 18, 128, 256, 64, bf16},
      {"uint8b128", Element::uint8, false, 33, 128, 208, -1, fp32, false, true},
      // Small floats and codebooks.
      {"e4m3", Element::e4m3, false, 1, 128, 256, -1, fp32},
      {"e4m3", Element::e4m3, true, 17, 256, 128, 128, bf16},
      {"e4m3", Element::e4m3, true, 50, 64, 128, 64, fp32, false, true},
      {"nvfp4", Element::e2m1, false, 1, 256, 256, 16, Number::e4m3, false, true},
      {"nvfp4", Element::e2m1, true, 35, 128, 128, 16, Number::e4m3, false, true},
      {"mxfp4", Element::e2m1, true, 16, 128, 192, 32, Number::e8m0},
      {"mxfp4", Element::e2m1, false, 24, 64, 128, 32, Number::e8m0},
      {"one group of e8m0", Element::e2m1, false, 3, 128, 128, -1, Number::e8m0},
      {"codebook", Element::codebook, false, 9, 128, 256, 64, fp16},
      {"codebook", Element::codebook, true, 31, 64, 128, 32, fp32},
      {"codebook", Element::codebook, true, 48, 128, 64, -1, bf16},
      // Results of 16 bits; blocks in turns and threads in another order.
      {"results in bf16", Element::uint4, true, 4, 128, 128, 128, bf16, false, true, 4, bf16},
      {"results in fp16", Element::uint4, false, 33, 128, 128, 64, fp16, false, true, 4, fp16},
      {"many parts", Element::uint4, true, 1, 64, 1040, 16, bf16, false, false, 8, fp32, 4, 1},
      {"many parts", Element::uint8, false, 36, 128, 640, 128, fp16, true, false, 3, fp32, 3, 2},
  };
  test_gather();
  test_launch_shapes();
  for (size_t i = 0; i < cases.size(); i += step) run(cases[i]);
  std::printf("marlin gemm: %zu cases, %d failures\n", cases.size(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
