// SPDX-License-Identifier: Apache-2.0
// The repack loop with AVX-512 F.
#include <immintrin.h>

#include "loop.h"

namespace compressed_linear::cpu {
namespace {

struct Avx512 {
  using Reg = __m512i;
  static constexpr int64_t kLanes = 16;
  static Reg load(const void* from) { return _mm512_loadu_si512(from); }
  static void store(void* to, Reg value) { _mm512_storeu_si512(to, value); }
  static Reg set1(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
  static Reg or_(Reg a, Reg b) { return _mm512_or_si512(a, b); }
  static Reg and_(Reg a, Reg b) { return _mm512_and_si512(a, b); }
  static Reg xor_(Reg a, Reg b) { return _mm512_xor_si512(a, b); }
  static Reg add(Reg a, Reg b) { return _mm512_add_epi32(a, b); }
  // Of a shift, the same in all lanes.
  static __m128i count(int bits) { return _mm_cvtsi32_si128(bits); }
  static Reg shift_right(Reg a, __m128i count) { return _mm512_srl_epi32(a, count); }
  static Reg shift_left(Reg a, __m128i count) { return _mm512_sll_epi32(a, count); }
  static Reg shift_right_each(Reg a, Reg counts) { return _mm512_srlv_epi32(a, counts); }
  static Reg shift_left_each(Reg a, Reg counts) { return _mm512_sllv_epi32(a, counts); }
  // Lane i becomes lane index[i] of `a`.
  static Reg pick(Reg a, Reg index) { return _mm512_permutexvar_epi32(index, a); }
  static void store_low_halves(void* to, Reg a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(a));
  }
};

}  // namespace

bool repack_avx512(const Repack& job, int64_t strip_begin, int64_t strip_end) {
  return repack_with<Avx512>(job, strip_begin, strip_end);
}

}  // namespace compressed_linear::cpu
