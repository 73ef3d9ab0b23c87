// SPDX-License-Identifier: Apache-2.0
// AVX2 with the byte dot products of AVX-VNNI: integers and e2m1 times digits of x (digits.h). All
// else goes to the engine that multiplies floats. The native tests build this unit with the same
// dot product in AVX-512's encoding too: processors that have one often lack the other.
#include "digits_avx2.h"

namespace compressed_linear::cpu {

LinearFunction float_avx2;

namespace {

struct VnniDots {
  static constexpr int kLargestByte = 255;
  template <int Most>
  static constexpr int kRun = kQuads;

  static __m256i first(__m256i codes, __m256i digit, __m256i sum) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, digit);
#else
    return _mm256_dpbusd_epi32(sum, codes, digit);
#endif
  }
  static __m256i next(__m256i sum, __m256i codes, __m256i digit) {
    return first(codes, digit, sum);
  }
  static __m256i add(__m256i, __m256i partial) { return partial; }
};

}  // namespace

#if defined(__AVXVNNI__)
void float_avxvnni(const Problem& p, const Parallel& parallel) {
#else
void float_avxvnni_evex(const Problem& p, const Parallel& parallel) {
#endif
  Avx2Digits<VnniDots>::takes(p) ? run_digits<Avx2Digits<VnniDots>>(p, parallel)
                                 : float_avx2(p, parallel);
}

}  // namespace compressed_linear::cpu
