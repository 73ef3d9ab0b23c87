// SPDX-License-Identifier: Apache-2.0
// The primitives of CUDA kernels as the emulator computes them, against plain arithmetic.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "emulator_checks.h"

namespace {

void arithmetic() {
  std::mt19937 random(3);
  for (int i = 0; i < 2000; ++i) {
    const uint32_t a = random(), b = random(), c = random();
    check(lop3<0xea>(a, b, c) == ((a & b) | c), "lop3 (a & b) | c");
    check(lop3<0x96>(a, b, c) == (a ^ b ^ c), "lop3 a ^ b ^ c");
    check(lop3<0xca>(a, b, c) == ((a & b) | (~a & c)), "lop3 a ? b : c");
    check(prmt(a, b, 0x5140) ==
              ((a & 0xff) | (b & 0xff) << 8 | (a >> 8 & 0xff) << 16 | (b >> 8 & 0xff) << 24),
          "prmt");
    check(prmt(a, b, 0x7632) == (a >> 16 | (b >> 16) << 16), "prmt of upper halves");
    check((prmt(a, b, 0xb) & 0xffu) == (a >> 31 ? 0xffu : 0u), "prmt of a sign");
  }
  // Against a wider computation: 16-bit products are exact in double, and so are most sums.
  for (int i = 0; i < 5000; ++i) {
    const auto half = [&] { return static_cast<uint16_t>(random() & 0xbfff); };  // finite
    const uint16_t a = half(), b = half(), c = half();
    const double exact_half = static_cast<double>(widen<Half>(a)) * widen<Half>(b) + widen<Half>(c);
    const double exact_bf =
        static_cast<double>(widen<BFloat16>(a)) * widen<BFloat16>(b) + widen<BFloat16>(c);
    const float got_half = widen<Half>(static_cast<uint16_t>(fma_pair<Half>(a, b, c)));
    const float got_bf = widen<BFloat16>(static_cast<uint16_t>(fma_pair<BFloat16>(a, b, c)));
    const auto near = [](double exact, float got, int bits, double least, double largest) {
      if (std::fabs(exact) >= largest) return std::isinf(got) || std::fabs(got) >= largest * 0.99;
      const double unit = std::ldexp(1.0, std::ilogb(std::max(std::fabs(exact), least)) - bits + 1);
      return std::fabs(got - exact) <= unit * 0.5000001;
    };
    check(near(exact_half, got_half, 11, 0x1p-14, 65504), "fma of fp16");
    check(near(exact_bf, got_bf, 8, 0x1p-126, 3.3e38), "fma of bf16");
  }
  // Ties go to even, also where rounding to fp32 first would move the number onto a tie.
  check(fma_pair<Half>(0x3c01, 0x3c01, 0x0001) == 0x3c02, "fma of fp16 rounds once");
  check(subtract_pair<Half>(0x64076400, 0x64086408) == 0xbc00c800, "1024 + q - (1024 + z)");
  check(multiply_pair<BFloat16>(0x7e807e80, 0x00400001) == 0x3f003c00, "bf16 denormals count");
  for (int code = 0; code < 256; ++code) {
    const float got = widen_e4m3(static_cast<uint8_t>(code)),
                expected = compressed_linear::cpu::from_e4m3(static_cast<uint8_t>(code));
    check(got == expected || (std::isnan(got) && std::isnan(expected)), "e4m3");
    const float power = widen_e8m0(static_cast<uint8_t>(code));
    check(code == 255 ? std::isnan(power) : power == std::ldexp(1.0f, code - 127), "e8m0");
  }
}

template <class T>
void products() {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  uint16_t a[16][16], b[16][8];
  for (auto& row : a)
    for (uint16_t& value : row) value = narrow<T>(normal(random));
  for (auto& row : b)
    for (uint16_t& value : row) value = narrow<T>(normal(random));
  float c[16][8];
  Options o;
  o.shared_bytes = 1024;
  const Report report = emulator::launch(o, [&] {
    // A by load_matrix, B by its transpose: as kernels bring them.
    for (int i = lane(); i < 256; i += 32)
      store_shared(shared_base() + static_cast<uint32_t>(2 * i), a[i / 16][i % 16]);
    for (int i = lane(); i < 128; i += 32)
      store_shared(shared_base() + 512 + static_cast<uint32_t>(2 * i), b[i / 8][i % 8]);
    sync_threads();
    uint32_t fa[4], fb[4];
    load_matrix_x4(fa,
                   shared_base() + static_cast<uint32_t>(32 * (lane() % 16) + 16 * (lane() / 16)));
    load_matrix_x4_transposed(fb, shared_base() + 512 + static_cast<uint32_t>(16 * (lane() % 16)));
    const uint32_t b2[2] = {fb[0], fb[1]};
    float sums[4] = {1, 1, 1, 1};
    multiply_add<T>(sums, fa, b2);
    for (int i = 0; i < 4; ++i) c[lane() / 4 + i / 2 * 8][lane() % 4 * 2 + i % 2] = sums[i];
    check(shuffle_xor(lane(), 5) == (lane() ^ 5) && shuffle(lane(), 9) == 9, "shuffle");
  });
  expect_clean("mma", report);
  check(report.matrix_products == 1, "mma is counted");
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double exact = 1;
      for (int k = 0; k < 16; ++k)
        exact += static_cast<double>(widen<T>(a[m][k])) * widen<T>(b[k][n]);
      check(std::fabs(c[m][n] - exact) < 1e-5, "mma gives another result");
    }
}

}  // namespace

int main() {
  arithmetic();
  products<Half>();
  products<BFloat16>();
  std::printf("primitives: %d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
