// SPDX-License-Identifier: Apache-2.0
// AVX-512 with bf16 dot products: codes become bf16 by an in-register table, activations of 16 bits
// become one or two bf16 words whose sum is exact. vdpbf16ps treats denormal inputs and results as
// zero. Weights of fp16 and fp32, and fp32 activations, for which it would take three words, are
// multiplied in fp32.
#include <immintrin.h>

#include <utility>

#include "bf16_parts.h"
#include "cpu/common/isa.h"
#include "cpu/common/prefetch.h"
#include "decode_avx512bf16.h"
#include "driver.h"
#include "few_rows_avx512.h"

namespace compressed_linear::cpu {

LinearFunction float_avx512;

namespace {

// 24 of the 32 registers hold sums.
constexpr int kRegisterRows = 6, kRegisterTiles = 4;
static_assert(kRegisterTiles == kStrip, "the blocks of a register block follow each other");

// ---- few rows: decode in registers, touch every weight once -----------------------------------

// Up to this many panels decode anew for each; beyond, decoding into memory once for all rows is
// cheaper. Measured at N = K = 4096 on Zen 4.
constexpr int64_t few_panels(Element element) {
  switch (element.kind) {
    case Kind::bfloat16:
      return 8;
    case Kind::e4m3:
    case Kind::e5m2:
      return 3;
    default:
      break;
  }
  constexpr int64_t kByBits[] = {0, 43, 43, 6, 43, 6, 6, 3, 6};
  return kByBits[element.bits];
}

template <class Code, int Rows, int Parts>
struct FewRowsKernel {
  static constexpr int kTiles = kRegisterTiles;
  static constexpr int64_t kBlockBytes = kRowBytes * Code::kBits;
  // Plain weights are read in the order in which they lie in memory, which is what processors
  // fetch ahead by themselves; codes are decoded for all tiles at once, so that the sums of one
  // tile do not wait for each other.
  static constexpr bool kSequential = Code::kSequential;
  // The lines of a block of bytes are too many to ask for at once; of narrower codes they are few
  // enough, and come sooner. Measured: 8 bits take 0.68 ms spread and 0.76 ms at once, 4 bits 0.30
  // and 0.29 (N = K = 4096, Zen 4).
  static constexpr bool kSpread = !kSequential && Code::kBits == 8;

  __m512 acc[Rows][kTiles];

  template <int P>
  [[gnu::always_inline]] void add(__m512i weights, const uint32_t* x, int tile) {
    for (int q = 0; q < Parts; ++q)
      for (int r = 0; r < Rows; ++r)
        acc[r][tile] = _mm512_dpbf16_ps(
            acc[r][tile], (__m512bh)weights,
            (__m512bh)_mm512_set1_epi32(static_cast<int>(x[(P * Parts + q) * Rows + r])));
  }

  template <int P>
  [[gnu::always_inline]] void pair(const uint8_t* blocks, const Table& table, const uint32_t* x) {
    if constexpr (kSpread)
      prefetch_share<P, static_cast<int>(kPairs), kTiles * Code::kBits>(blocks);
    __m512i weights[kTiles];
    if constexpr (!Code::kTwoPairs) {
      for (int t = 0; t < kTiles; ++t)
        weights[t] = Code::template pair<P>(blocks + t * kBlockBytes, table);
      multiply<P>(weights, x);
    } else if constexpr (P % 2 == 0) {
      __m512i next[kTiles];
      for (int t = 0; t < kTiles; ++t)
        Code::template pairs<P>(blocks + t * kBlockBytes, table, weights[t], next[t]);
      multiply<P>(weights, x);
      multiply<P + 1>(next, x);
    }
  }

  template <int P>
  [[gnu::always_inline]] void multiply(const __m512i (&weights)[kTiles], const uint32_t* x) {
    for (int q = 0; q < Parts; ++q)
      for (int r = 0; r < Rows; ++r) {
        const auto activation =
            (__m512bh)_mm512_set1_epi32(static_cast<int>(x[(P * Parts + q) * Rows + r]));
        for (int t = 0; t < kTiles; ++t)
          acc[r][t] = _mm512_dpbf16_ps(acc[r][t], (__m512bh)weights[t], activation);
      }
  }

  // Pairs First + P of a block of each tile.
  template <int First, int... P>
  [[gnu::always_inline]] void pairs(const uint8_t* blocks, const Table& table, const uint32_t* x,
                                    std::integer_sequence<int, P...>) {
    if constexpr (kSequential) {
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) {
        (add<First + P>(Code::template pair<First + P>(blocks + t * kBlockBytes, table), x, t),
         ...);
        asm volatile("" ::: "memory");  // keeps the compiler from mixing the tiles again
      }
    } else {
      (pair<First + P>(blocks, table, x), ...);
    }
  }

  static void run(const FewRowsArgs& a, const Table& given) {
    const Problem& p = a.p;
    const Table table = given;
    constexpr int64_t kStripBytes = kTiles * kBlockBytes;
    constexpr int kHalfPairs = static_cast<int>(kPairs) / 2;
    const uint8_t* blocks = block_of(p.weight, a.tile, a.channel);
    const uint32_t* x = a.x;
    alignas(64) float totals[Rows][kTiles * kTile] = {};
    for (int64_t s = 0; s < a.segment_count; ++s) {
      FewRowsKernel sums;
      for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < kTiles; ++t) sums.acc[r][t] = _mm512_setzero_ps();
      for (int64_t k = a.segments[s].begin; k < a.segments[s].end;) {
        // Into the second-level cache: all of a block at once is too much for the first.
        if constexpr (!kSequential && !kSpread)
          if (k % kBlock == 0)
            for (int64_t at = 0; at < kStripBytes; at += kRowBytes)
              _mm_prefetch(blocks + kPrefetchBytes + at, _MM_HINT_T1);
        if constexpr (Code::kHalves) {
          if (k % kBlock == 0) {
            sums.template pairs<0>(blocks, table, x, std::make_integer_sequence<int, kHalfPairs>());
            k += kBlock / 2;
            if (k >= a.segments[s].end) break;
          }
          sums.template pairs<kHalfPairs>(blocks, table, x,
                                          std::make_integer_sequence<int, kHalfPairs>());
          k += kBlock / 2;
        } else {
          sums.template pairs<0>(blocks, table, x, std::make_integer_sequence<int, kPairs>());
          k += kBlock;
        }
        blocks += kStripBytes;
        x += kPairs * Parts * Rows;
      }
      finish_segment(a, s, sums.acc, totals);
    }
    if (a.sums != nullptr) return;
    for (int r = 0; r < Rows; ++r)
      store_row(p, a.row + r, a.tile * kTile, kTiles * kTile, totals[r]);
  }
};

using FewRowsFunction = void (*)(const FewRowsArgs&, const Table&);

template <class Code, int Rows = kRegisterRows>
FewRowsFunction few_rows_kernel_for(int64_t rows, int64_t parts) {
  if constexpr (Rows > 1)
    if (rows < Rows) return few_rows_kernel_for<Code, Rows - 1>(rows, parts);
  return parts == 2 ? &FewRowsKernel<Code, Rows, 2>::run : &FewRowsKernel<Code, Rows, 1>::run;
}

// ---- the core for driver.h --------------------------------------------------------------------

// Weights that are exact in bf16.
struct DotCore : RegisterCore<DotCore> {
  using Acc = __m512;
  using Sum = __m512;
  using Weights = __m512bh;
  using Activation = __m512bh;
  static constexpr int kStep = 2, kStepBytes = kRowBytes, kWords = 1, kMaxParts = 2;
  static constexpr int kRows = kRegisterRows, kTiles = kRegisterTiles;
  static Acc zero() { return _mm512_setzero_ps(); }
  static Sum sum(Acc acc) { return acc; }
  static Sum load_sum(const float* sums) { return _mm512_load_ps(sums); }
  static Acc add_offset(Acc acc, float row_sum, const float* negated_offset) {
    return _mm512_fmadd_ps(_mm512_set1_ps(row_sum), _mm512_loadu_ps(negated_offset), acc);
  }
  static void scale_into(float* total, Acc acc, const float* scale) {
    _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(scale), acc, _mm512_loadu_ps(total)));
  }
  static Weights load(const uint8_t* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static Activation broadcast(const uint32_t* word) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(*word));
  }
  static Acc mac(Acc acc, Weights weights, Activation activation) {
    return _mm512_dpbf16_ps(acc, weights, activation);
  }

  static int64_t parts(Scalar type) { return type == Scalar::float16 ? 2 : 1; }
  static void split(const Problem& p, const float* row, int64_t parts, uint32_t* out,
                    int64_t stride) {
    const int64_t padded_k = p.weight.geometry.padded_k;
    if (parts == 1) {
      for (int64_t i = 0; i < padded_k / 2; ++i)
        out[i * stride] = (bits_of(row[2 * i]) >> 16) | (bits_of(row[2 * i + 1]) & 0xffff0000u);
      return;
    }
    for (int64_t i = 0; i < padded_k / 2; ++i) {
      float even = row[2 * i], odd = row[2 * i + 1];
      for (int64_t q = 0; q < parts; ++q) out[(i * parts + q) * stride] = take_pair(even, odd);
    }
  }

  static bool is_plain(Element element) { return element.kind == Kind::bfloat16; }
  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* out) {
    decode_tile(p, tile, k0, width, out);
  }

  static bool copy_row(const Problem& p, int64_t m, uint32_t* words, int64_t stride) {
    const Geometry& g = p.weight.geometry;
    if (p.x.type != Scalar::bfloat16 || !in_order(p) || g.k % 2 != 0) return false;
    const char* row = static_cast<const char*>(p.x.data) + 2 * m * p.x.row_stride;
    if (stride == 1) {
      std::memcpy(words, row, static_cast<size_t>(2 * g.k));
    } else {
      for (int64_t i = 0; i < g.k / 2; ++i) std::memcpy(words + i * stride, row + 4 * i, 4);
    }
    for (int64_t i = g.k / 2; i < g.padded_k / 2; ++i) words[i * stride] = 0;
    return true;
  }

  // Segments must be whole blocks or halves.
  static bool are_few(const Problem& p, int64_t rows) {
    const Geometry& g = p.weight.geometry;
    const bool few = rows <= few_panels(g.element) * kRows;
    const int64_t unit = with_decoder(
        g.element, [](auto code) { return decltype(code)::kHalves ? kBlock / 2 : kBlock; });
    return few && (g.groups == 1 || g.padded_group % unit == 0);
  }
  struct FewRows {
    const Table table;
    explicit FewRows(const Problem& p) : table(p) {}
    void run(const FewRowsArgs& a, int64_t rows, int64_t parts) const {
      // The sums of more rows leave no registers for the tables.
      const Kind kind = a.p.weight.geometry.element.kind;
      if (kind == Kind::e4m3 && rows <= 2 && has_byte_permutations())
        return few_rows_kernel_for<Float8Bytes<3>, 2>(rows, parts)(a, float8_bytes<3>());
      if (kind == Kind::e5m2 && rows <= 2 && has_byte_permutations())
        return few_rows_kernel_for<Float8Bytes<2>, 2>(rows, parts)(a, float8_bytes<2>());
      with_decoder(a.p.weight.geometry.element, [&](auto code) {
        return few_rows_kernel_for<decltype(code)>(rows, parts);
      })(a, table);
    }
  };
  static constexpr int64_t kFewPanelRows = kRows;
  static constexpr bool kCutStrips = false;
};

}  // namespace

// What bf16 cannot hold (weights, tables and activations of fp32, weights of fp16) is multiplied in
// fp32.
void float_avx512bf16(const Problem& p, const Parallel& parallel) {
  const Kind kind = p.weight.geometry.element.kind;
  if (kind == Kind::float16 || kind == Kind::float32 || p.weight.wide_table != nullptr ||
      prepared_type(p) == Scalar::float32) {
    float_avx512(p, parallel);
  } else {
    run_linear<DotCore>(p, parallel);
  }
}

}  // namespace compressed_linear::cpu
