// SPDX-License-Identifier: Apache-2.0
// The repack loop with AVX2.
#include <immintrin.h>

#include "loop.h"

namespace compressed_linear::cpu {
namespace {

struct Avx2 {
  using Reg = __m256i;
  static constexpr int64_t kLanes = 8;
  static Reg load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static void store(void* to, Reg value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
  static Reg set1(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
  static Reg or_(Reg a, Reg b) { return _mm256_or_si256(a, b); }
  static Reg and_(Reg a, Reg b) { return _mm256_and_si256(a, b); }
  static Reg xor_(Reg a, Reg b) { return _mm256_xor_si256(a, b); }
  static Reg add(Reg a, Reg b) { return _mm256_add_epi32(a, b); }
  // Of a shift, the same in all lanes.
  static __m128i count(int bits) { return _mm_cvtsi32_si128(bits); }
  static Reg shift_right(Reg a, __m128i count) { return _mm256_srl_epi32(a, count); }
  static Reg shift_left(Reg a, __m128i count) { return _mm256_sll_epi32(a, count); }
  static Reg shift_right_each(Reg a, Reg counts) { return _mm256_srlv_epi32(a, counts); }
  static Reg shift_left_each(Reg a, Reg counts) { return _mm256_sllv_epi32(a, counts); }
  // Lane i becomes lane index[i] of `a`.
  static Reg pick(Reg a, Reg index) { return _mm256_permutevar8x32_epi32(a, index); }
  static void store_low_halves(void* to, Reg a) {
    const __m256i low = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_packus_epi32(low, low);  // 0123 0123 4567 4567
    const __m256i joined = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(joined));
  }
};

}  // namespace

bool repack_avx2(const Repack& job, int64_t strip_begin, int64_t strip_end) {
  return repack_with<Avx2>(job, strip_begin, strip_end);
}

}  // namespace compressed_linear::cpu
