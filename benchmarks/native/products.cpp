// SPDX-License-Identifier: Apache-2.0
// How fast one thread can multiply: the loops that kernels live on, without their loads, and tiles
// with them. Built for the machine at hand and called by benchmarks/limits.py. Each loop keeps more
// chains of sums than latency times throughput of any processor asks for.
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// x, y and one more operand fit beside them: 16 vector registers with AVX2, else 32.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kChains = 12;
#else
constexpr int kChains = 16;
#endif

#if defined(__AVX512F__)
#define VECTOR_REGISTER "v"
#elif defined(__x86_64__)
#define VECTOR_REGISTER "x"
#else
#define VECTOR_REGISTER "w"
#endif

// `rounds` times kChains instructions that read x and y and add to a sum of their own. The compiler
// is told that each sum was changed, so it leaves out none and keeps all in registers.
template <class Sum, class Operand, class Step, size_t... Chain>
void repeat(int64_t rounds, Sum zero, Operand x, Operand y, Step step,
            std::index_sequence<Chain...>) {
  Sum sums[] = {((void)Chain, zero)...};
  const auto one = [&](Sum& sum) {
    sum = step(sum, x, y);
    asm volatile("" : "+" VECTOR_REGISTER(sum));
  };
  for (int64_t i = 0; i < rounds; ++i) (one(sums[Chain]), ...);
}

template <class Sum, class Operand, class Step>
void repeat(int64_t rounds, Sum zero, Operand x, Operand y, Step step) {
  repeat(rounds, zero, x, y, step, std::make_index_sequence<kChains>());
}

using Loop = void (*)(int64_t rounds);

struct Product {
  const char* name;
  const char* arithmetic;  // "fp32", "bf16" or "int8", and "tiles" behind it where memory is read
  int64_t operations;      // multiplications and additions of a round
  Loop loop;
};

#if defined(__AVX512F__)

void fp32(int64_t rounds) {
  repeat(rounds, _mm512_setzero_ps(), _mm512_set1_ps(1), _mm512_set1_ps(0.5),
         [](__m512 s, __m512 x, __m512 y) { return _mm512_fmadd_ps(x, y, s); });
}
constexpr int64_t kFp32 = 2 * 16;

#elif defined(__AVX2__) && defined(__FMA__)

void fp32(int64_t rounds) {
  repeat(rounds, _mm256_setzero_ps(), _mm256_set1_ps(1), _mm256_set1_ps(0.5),
         [](__m256 s, __m256 x, __m256 y) { return _mm256_fmadd_ps(x, y, s); });
}
constexpr int64_t kFp32 = 2 * 8;

#elif defined(__aarch64__)

void fp32(int64_t rounds) {
  repeat(rounds, vdupq_n_f32(0), vdupq_n_f32(1), vdupq_n_f32(0.5),
         [](float32x4_t s, float32x4_t x, float32x4_t y) { return vfmaq_f32(s, x, y); });
}
constexpr int64_t kFp32 = 2 * 4;

#endif

#if defined(__AVX512BF16__)
#define PRODUCT_BF16 "vdpbf16ps, 512 bits"

void bf16(int64_t rounds) {
  const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  repeat(rounds, _mm512_setzero_ps(), x, x,
         [](__m512 s, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(s, a, b); });
}
constexpr int64_t kBf16 = 2 * 32;

#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define PRODUCT_BF16 "bfmmla"

void bf16(int64_t rounds) {
  const bfloat16x8_t x = vreinterpretq_bf16_u16(vdupq_n_u16(0x3f80));
  repeat(rounds, vdupq_n_f32(0), x, x, [](float32x4_t s, bfloat16x8_t a, bfloat16x8_t b) {
    return vbfmmlaq_f32(s, a, b);
  });
}
constexpr int64_t kBf16 = 2 * 16;

#endif

#if defined(__AVX512VNNI__)
#define PRODUCT_INT8 "vpdpbusd, 512 bits"

void int8(int64_t rounds) {
  repeat(rounds, _mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_set1_epi8(3),
         [](__m512i s, __m512i x, __m512i y) { return _mm512_dpbusd_epi32(s, x, y); });
}
constexpr int64_t kInt8 = 2 * 64;

#elif defined(__AVXVNNI__)
#define PRODUCT_INT8 "vpdpbusd, 256 bits"

void int8(int64_t rounds) {
  repeat(rounds, _mm256_setzero_si256(), _mm256_set1_epi8(1), _mm256_set1_epi8(3),
         [](__m256i s, __m256i x, __m256i y) { return _mm256_dpbusd_avx_epi32(s, x, y); });
}
constexpr int64_t kInt8 = 2 * 32;

#elif defined(__AVX2__)
#define PRODUCT_INT8 "vpmaddubsw, vpmaddwd, vpaddd"

void int8(int64_t rounds) {
  repeat(rounds, _mm256_setzero_si256(), _mm256_set1_epi8(1), _mm256_set1_epi8(3),
         [](__m256i s, __m256i x, __m256i y) {
           __m256i pairs = _mm256_maddubs_epi16(x, y);
           asm volatile("" : "+x"(pairs));  // or one product would do for all chains
           return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
         });
}
constexpr int64_t kInt8 = 2 * 32;

#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define PRODUCT_INT8 "smmla"

void int8(int64_t rounds) {
  repeat(rounds, vdupq_n_s32(0), vdupq_n_s8(1), vdupq_n_s8(3),
         [](int32x4_t s, int8x16_t x, int8x16_t y) { return vmmlaq_s32(s, x, y); });
}
constexpr int64_t kInt8 = 2 * 32;

#elif defined(__ARM_FEATURE_DOTPROD)
#define PRODUCT_INT8 "sdot"

void int8(int64_t rounds) {
  repeat(rounds, vdupq_n_s32(0), vdupq_n_s8(1), vdupq_n_s8(3),
         [](int32x4_t s, int8x16_t x, int8x16_t y) { return vdotq_s32(s, x, y); });
}
constexpr int64_t kInt8 = 2 * 16;

#endif

#if defined(__AMX_TILE__)

constexpr int64_t kPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
constexpr int kTile = 16 * 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) row_bytes[i] = 64, rows[i] = 16;
  }
};

bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, kPermission, kTileData) == 0;
  return allowed;
}

// Two by two tiles of sums, as kernels have them; with Load the four operands come from memory for
// every four products, out of 16 KiB.
template <bool Load, class Multiply>
void tiles(int64_t rounds, Multiply multiply) {
  alignas(64) static thread_local char operands[16 * kTile];
  std::memset(operands, 0, sizeof operands);
  const TileConfig config;
  // GCC's intrinsic says that it reads 8 bytes, so the rest might not be stored.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < rounds; ++i) {
    if (Load || i == 0) {
      const char* from = operands + (i & 3) * 4 * kTile;
      _tile_loadd(4, from, 64);
      _tile_loadd(5, from + kTile, 64);
      _tile_loadd(6, from + 2 * kTile, 64);
      _tile_loadd(7, from + 3 * kTile, 64);
    }
    multiply();
  }
  _tile_release();
}

template <bool Load>
void tiles_bf16(int64_t rounds) {
  tiles<Load>(rounds, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
}

template <bool Load>
void tiles_int8(int64_t rounds) {
  tiles<Load>(rounds, [] {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  });
}

constexpr int64_t kTilesBf16 = 4 * 2 * 16 * 16 * 32, kTilesInt8 = 2 * kTilesBf16;

#endif

const Product kProducts[] = {
#if defined(__AVX2__) || defined(__aarch64__)
    {"FMA", "fp32", kChains * kFp32, fp32},
#endif
#if defined(PRODUCT_BF16)
    {PRODUCT_BF16, "bf16", kChains * kBf16, bf16},
#endif
#if defined(PRODUCT_INT8)
    {PRODUCT_INT8, "int8", kChains * kInt8, int8},
#endif
#if defined(__AMX_BF16__)
    {"AMX tiles, from registers", "bf16", kTilesBf16, tiles_bf16<false>},
    {"AMX tiles, from L1", "bf16", kTilesBf16, tiles_bf16<true>},
#endif
#if defined(__AMX_INT8__)
    {"AMX tiles, from registers", "int8", kTilesInt8, tiles_int8<false>},
    {"AMX tiles, from L1", "int8", kTilesInt8, tiles_int8<true>},
#endif
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

extern "C" {

// Name and arithmetic of product `index`; null behind the last one.
const char* product_name(int64_t index) { return kProducts[index].name; }
const char* product_arithmetic(int64_t index) { return kProducts[index].arithmetic; }

// Multiplies; the number of operations that were done, 0 where the system does not allow them.
int64_t product_run(int64_t index, int64_t rounds) {
#if defined(__AMX_TILE__)
  if (std::strstr(kProducts[index].name, "AMX") != nullptr && !tiles_allowed()) return 0;
#endif
  kProducts[index].loop(rounds);
  return rounds * kProducts[index].operations;
}

}  // extern "C"
