// SPDX-License-Identifier: Apache-2.0
// AVX2 with the byte dot products of AVX-VNNI. The native tests build this unit with the same dot
// product in AVX-512's encoding too: processors that have one often lack the other.
#include "avx2.h"

namespace compressed_linear::cpu {
namespace {

struct AvxVnniCore : Avx2Core {
  static constexpr bool kTellNarrow = false;
  template <bool Narrow>
  static Reg broadcast(const int32_t* word) {
    return _mm256_set1_epi32(*word);
  }
  template <bool Narrow>
  static Reg dot(Reg sum, Reg codes, Reg activation) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, activation);
#else
    return _mm256_dpbusd_epi32(sum, codes, activation);
#endif
  }
};

}  // namespace

#if defined(__AVXVNNI__)
void integer_avxvnni(const Problem& p, const Parallel& parallel) {
#else
void integer_avxvnni_evex(const Problem& p, const Parallel& parallel) {
#endif
  run_integer_linear<VectorEngine<AvxVnniCore>>(p, parallel);
}

}  // namespace compressed_linear::cpu
