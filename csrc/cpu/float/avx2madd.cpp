// SPDX-License-Identifier: Apache-2.0
// AVX2 with products of bytes in pairs of 16 bits: weights below 8 bits and e2m1 times digits of x
// (digits.h). All else goes to the engine that multiplies floats.
#include "digits_avx2.h"

namespace compressed_linear::cpu {

LinearFunction float_avx2;

namespace {

struct MaddDots {
  static constexpr int kLargestByte = 31;  // e2m1 has 24

  // Pairs of products with digits, of which none is beyond -128, are summed in 16 bits.
  template <int Most>
  static constexpr int kRun = 32767 / (2 * 128 * Most) < kQuads ? 32767 / (2 * 128 * Most) : kQuads;

  static __m256i first(__m256i codes, __m256i digit, __m256i) {
    return _mm256_maddubs_epi16(codes, digit);
  }
  static __m256i next(__m256i sum, __m256i codes, __m256i digit) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, digit));
  }
  static __m256i add(__m256i sum, __m256i partial) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(partial, _mm256_set1_epi16(1)));
  }
};

static_assert(MaddDots::kRun<15> == 8 && MaddDots::kRun<31> == 4 && MaddDots::kRun<127> == 1);

}  // namespace

void float_avx2madd(const Problem& p, const Parallel& parallel) {
  Avx2Digits<MaddDots>::takes(p) ? run_digits<Avx2Digits<MaddDots>>(p, parallel)
                                 : float_avx2(p, parallel);
}

}  // namespace compressed_linear::cpu
