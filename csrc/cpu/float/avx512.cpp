// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, BW, VL, DQ) without bf16 dot products: weights and activations are widened to fp32,
// which is exact, and multiplied there.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "cpu/common/prefetch.h"
#include "decode_avx512.h"
#include "driver.h"
#include "few_rows_avx512.h"

namespace compressed_linear::cpu {
namespace {

// ---- decoders: Code(problem), pair<P>(block) --------------------------------------------------
//
// kBits: of an element; kSequential: plain weights, which are read in the order in which they lie
// in memory, since that is what processors fetch ahead by themselves.

// Pair P of the input channels of a block, sixteen output channels each.
struct Pair {
  __m512 even, odd;
};

// From bf16 pairs, even in the low halves.
inline Pair widen_words(__m512i words) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, high))};
}

template <int Bits>
struct TableCodes {
  static constexpr int kBits = Bits;
  static constexpr bool kSequential = false;
  Table table;
  explicit TableCodes(const Problem& p) : table(p) {}
  template <int P>
  Pair pair(const uint8_t* block) const {
    return widen_words(look_up<Bits>(codes<Bits, P>(block), table));
  }
};

// Tables of values that bf16 cannot hold.
template <int Bits>
struct WideCodes {
  static constexpr int kBits = Bits;
  static constexpr bool kSequential = false;
  __m512 low, high;
  const float* table;
  explicit WideCodes(const Problem& p) : table(p.weight.wide_table) {
    alignas(64) float values[32];
    for (int i = 0; i < 32; ++i) values[i] = table[i & ((1 << Bits) - 1)];
    low = _mm512_load_ps(values);
    high = _mm512_load_ps(values + 16);
  }
  // Bits above the code are undefined; permutations look at four or five only.
  __m512 values(__m512i code) const {
    if constexpr (Bits <= 4) return _mm512_permutexvar_ps(code, low);
    if constexpr (Bits == 5) return _mm512_permutex2var_ps(low, code, high);
    const __m512i index = _mm512_and_si512(code, _mm512_set1_epi32((1 << Bits) - 1));
    return _mm512_i32gather_ps(index, table, 4);
  }
  template <int P>
  Pair pair(const uint8_t* block) const {
    const __m512i code = codes<Bits, P>(block);
    return {values(code), values(_mm512_srli_epi32(code, 16))};
  }
};

// Integers of six and seven bits: below 0x43 in the upper byte, a code of up to seven bits is the
// bf16 number 128 + code.
template <int Bits>
struct OffsetCodes {
  static constexpr int kBits = Bits;
  static constexpr bool kSequential = false;
  __m512 middle;
  explicit OffsetCodes(const Problem& p) : middle(_mm512_set1_ps(128.0f + p.weight.middle)) {}
  template <int P>
  Pair pair(const uint8_t* block) const {
    // (codes & mask) | 0x4300
    const __m512i code = codes<Bits, P>(block), mask = _mm512_set1_epi16((1 << Bits) - 1);
    const __m512i words = _mm512_ternarylogic_epi32(code, mask, _mm512_set1_epi16(0x4300), 0xEA);
    const Pair pair = widen_words(words);
    return {_mm512_sub_ps(pair.even, middle), _mm512_sub_ps(pair.odd, middle)};
  }
};

// A byte b = code - 128 becomes the mantissa of 2^23 + code, or from the upper byte of its word
// that of 2^15 + code: each bit of the row chooses between two constants, which flips the sign bit
// and sets the exponent at once.
struct ByteCodes {
  static constexpr int kBits = 8;
  static constexpr bool kSequential = false;
  explicit ByteCodes(const Problem&) {}
  static __m512 choose(__m512i words, int ones, int zeros, float origin) {
    const __m512i chosen =
        _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(ones), _mm512_set1_epi32(zeros), 0xCA);
    return _mm512_sub_ps(_mm512_castsi512_ps(chosen), _mm512_set1_ps(origin + 128.0f));
  }
  template <int P>
  Pair pair(const uint8_t* block) const {
    const auto* bytes = reinterpret_cast<const __m256i*>(block + 2 * kTile * P);
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes));
    return {choose(words, 0x4b00007f, 0x4b000080, 0x1p23f),
            choose(words, 0x47007f00, 0x47008000, 0x1p15f)};
  }
};

template <int Mantissa>
struct Float8Codes {
  static constexpr int kBits = 8;
  static constexpr bool kSequential = false;
  Table table;
  explicit Float8Codes(const Problem& p) : table(p) {}
  template <int P>
  Pair pair(const uint8_t* block) const {
    return widen_words(Float8<Mantissa>::template pair<P>(block, table));
  }
};

struct BFloat16Codes {
  static constexpr int kBits = 16;
  static constexpr bool kSequential = true;
  explicit BFloat16Codes(const Problem&) {}
  template <int P>
  Pair pair(const uint8_t* block) const {
    return widen_words(load_row(block + kRowBytes * P));
  }
};

struct Float16Codes {
  static constexpr int kBits = 16;
  static constexpr bool kSequential = true;
  explicit Float16Codes(const Problem&) {}
  template <int P>
  Pair pair(const uint8_t* block) const {
    const auto* rows = reinterpret_cast<const __m256i*>(block + 4 * kTile * P);
    return {_mm512_cvtph_ps(_mm256_loadu_si256(rows)),
            _mm512_cvtph_ps(_mm256_loadu_si256(rows + 1))};
  }
};

struct Float32Codes {
  static constexpr int kBits = 32;
  static constexpr bool kSequential = true;
  explicit Float32Codes(const Problem&) {}
  template <int P>
  Pair pair(const uint8_t* block) const {
    const auto* rows = reinterpret_cast<const float*>(block) + 2 * kTile * P;
    return {_mm512_loadu_ps(rows), _mm512_loadu_ps(rows + kTile)};
  }
};

template <class Code>
struct Type {
  using type = Code;
};

template <int Bits>
using Integers = std::conditional_t<(Bits > 5), OffsetCodes<Bits>, TableCodes<Bits>>;

// Calls function(Type<Code>{}) with the decoder of codes of Bits to 7 bits.
template <int Bits = 1, class Function>
inline auto with_codes(const Problem& p, const Function& function) {
  if constexpr (Bits < 7) {
    if (p.weight.geometry.element.bits > Bits) return with_codes<Bits + 1>(p, function);
  }
  if (p.weight.wide_table != nullptr) return function(Type<WideCodes<Bits>>{});
  if (p.weight.table != nullptr) return function(Type<TableCodes<Bits>>{});
  return function(Type<Integers<Bits>>{});
}

// Calls function(Type<Code>{}) with the decoder of a problem.
template <class Function>
inline auto with_decoder(const Problem& p, const Function& function) {
  switch (p.weight.geometry.element.kind) {
    case Kind::bfloat16:
      return function(Type<BFloat16Codes>{});
    case Kind::float16:
      return function(Type<Float16Codes>{});
    case Kind::float32:
      return function(Type<Float32Codes>{});
    case Kind::e4m3:
      return function(Type<Float8Codes<3>>{});
    case Kind::e5m2:
      return function(Type<Float8Codes<2>>{});
    default:
      return p.weight.geometry.element.bits == 8 ? function(Type<ByteCodes>{})
                                                 : with_codes(p, function);
  }
}

// ---- few rows: decode in registers, touch every weight once -----------------------------------

constexpr int kFewRows = 6;
// Up to this many panels decode anew for each; beyond, decoding into memory once for all rows is
// cheaper. Measured at N = K = 4096 on Zen 4.
constexpr int64_t few_panels(Element element) {
  const bool slow = element.kind == Kind::e4m3 || element.kind == Kind::e5m2 || element.bits == 6 ||
                    element.bits == 7;
  return slow ? 2 : 5;
}
constexpr int kFewTiles = 4;
static_assert(kFewTiles == kStrip, "the blocks of the tiles follow each other");
constexpr int kAllPairs = static_cast<int>(kPairs);

template <int P, class Code, int Rows>
inline void few_rows_tile(const Code& code, const uint8_t* block, int t, const float* x,
                          __m512 (*acc)[kFewTiles]) {
  const Pair weights = code.template pair<P>(block);
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    acc[r][t] = _mm512_fmadd_ps(weights.even, _mm512_set1_ps(x[r]), acc[r][t]);
    acc[r][t] = _mm512_fmadd_ps(weights.odd, _mm512_set1_ps(x[Rows + r]), acc[r][t]);
  }
}

template <int P, class Code, int Rows>
inline void few_rows_pair(const Code& code, const uint8_t* blocks, const float* x,
                          __m512 (*acc)[kFewTiles]) {
  prefetch_share<P, kAllPairs, kFewTiles * Code::kBits>(blocks);
#pragma GCC unroll 4
  for (int t = 0; t < kFewTiles; ++t)
    few_rows_tile<P, Code, Rows>(code, blocks + t * kRowBytes * Code::kBits, t, x, acc);
}

// Pairs First, First + 1, ... of a block of each tile.
template <int First, class Code, int Rows, int... P>
inline void few_rows_block(const Code& code, const uint8_t* blocks, const float* x,
                           __m512 (*acc)[kFewTiles], std::integer_sequence<int, P...>) {
  if constexpr (Code::kSequential) {
#pragma GCC unroll 4
    for (int t = 0; t < kFewTiles; ++t) {
      (few_rows_tile<First + P, Code, Rows>(code, blocks + t * kRowBytes * Code::kBits, t,
                                            x + 2 * P * Rows, acc),
       ...);
      asm volatile("" : : : "memory");  // keeps the compiler from mixing the tiles again
    }
  } else {
    (few_rows_pair<First + P, Code, Rows>(code, blocks, x + 2 * P * Rows, acc), ...);
  }
}

// Sixteen input channels, for groups of so many, exist for four bits only (NVFP4).
template <class Code>
constexpr int64_t kUnit = Code::kBits == 4 ? kBlock / 2 : kBlock;

template <class Code, int Rows>
void few_rows_kernel(const FewRowsArgs& a) {
  const Problem& p = a.p;
  const Code code(p);
  constexpr int64_t kStripBlockBytes = kFewTiles * kRowBytes * Code::kBits;
  const uint8_t* blocks = block_of(p.weight, a.tile, a.channel);
  const float* x = reinterpret_cast<const float*>(a.x);  // [k][row]
  alignas(64) float totals[Rows][kFewTiles * kTile] = {};
  for (int64_t s = 0; s < a.segment_count; ++s) {
    __m512 acc[Rows][kFewTiles];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < kFewTiles; ++t) acc[r][t] = _mm512_setzero_ps();
    int64_t k = a.segments[s].begin;
    const int64_t end = a.segments[s].end;
    if constexpr (kUnit<Code> < kBlock) {
      constexpr std::make_integer_sequence<int, kAllPairs / 2> kHalf;
      if (k % kBlock != 0) {
        few_rows_block<kAllPairs / 2, Code, Rows>(code, blocks, x, acc, kHalf);
        k += kUnit<Code>, x += kUnit<Code> * Rows, blocks += kStripBlockBytes;
      }
      for (; k + kBlock <= end; k += kBlock, x += kBlock * Rows, blocks += kStripBlockBytes)
        few_rows_block<0, Code, Rows>(code, blocks, x, acc,
                                      std::make_integer_sequence<int, kAllPairs>());
      if (k < end) {
        few_rows_block<0, Code, Rows>(code, blocks, x, acc, kHalf);
        x += kUnit<Code> * Rows;
      }
    } else {
      for (; k < end; k += kBlock, x += kBlock * Rows, blocks += kStripBlockBytes)
        few_rows_block<0, Code, Rows>(code, blocks, x, acc,
                                      std::make_integer_sequence<int, kAllPairs>());
    }
    finish_segment(a, s, acc, totals);
  }
  if (a.sums != nullptr) return;
  for (int r = 0; r < Rows; ++r)
    store_row(p, a.row + r, a.tile * kTile, kFewTiles * kTile, totals[r]);
}

using FewRowsKernel = void (*)(const FewRowsArgs&);

template <class Code, int Rows = kFewRows>
FewRowsKernel few_rows_kernel_for(int64_t rows) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return few_rows_kernel_for<Code, Rows - 1>(rows);
  }
  return &few_rows_kernel<Code, Rows>;
}

// ---- the core for driver.h --------------------------------------------------------------------

template <class Code, int... P>
inline void decode_block(const Code& code, const uint8_t* block, float* out,
                         std::integer_sequence<int, P...>) {
  const auto store = [out](int p, Pair pair) {
    _mm512_store_ps(out + 2 * kTile * p, pair.even);
    _mm512_store_ps(out + 2 * kTile * p + kTile, pair.odd);
  };
  (store(P, code.template pair<P>(block)), ...);
}

struct FmaCore : RegisterCore<FmaCore> {
  using Acc = __m512;
  using Sum = __m512;
  using Weights = __m512;
  using Activation = __m512;
  static constexpr int kStep = 1, kStepBytes = kRowBytes, kWords = 1, kMaxParts = 1;
  static constexpr int kRows = 12, kTiles = 2;  // 24 of the 32 registers hold sums

  static Acc zero() { return _mm512_setzero_ps(); }
  static Weights load(const uint8_t* at) { return _mm512_load_ps(at); }
  static Activation broadcast(const uint32_t* word) { return _mm512_set1_ps(float_of(*word)); }
  static Acc mac(Acc acc, Weights weights, Activation x) {
    return _mm512_fmadd_ps(weights, x, acc);
  }
  static Sum sum(Acc acc) { return acc; }
  static Sum load_sum(const float* sums) { return _mm512_load_ps(sums); }
  static Sum add_offset(Sum sum, float row_sum, const float* negated_offset) {
    return _mm512_fmadd_ps(_mm512_set1_ps(row_sum), _mm512_loadu_ps(negated_offset), sum);
  }
  static void scale_into(float* total, Sum sum, const float* scale) {
    _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(scale), sum, _mm512_loadu_ps(total)));
  }

  static int64_t parts(Scalar) { return 1; }
  static void split(const Problem& p, const float* row, int64_t, uint32_t* out, int64_t stride) {
    for (int64_t i = 0; i < p.weight.geometry.padded_k; ++i) out[i * stride] = bits_of(row[i]);
  }
  static bool copy_row(const Problem&, int64_t, uint32_t*, int64_t) { return false; }

  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* slab) {
    const uint8_t* block = block_of(p.weight, tile, k0);
    const int64_t stride = p.weight.geometry.block_stride(tile);
    with_decoder(p, [&](auto decoder) {
      using Code = typename decltype(decoder)::type;
      const Code code(p);
      float* out = reinterpret_cast<float*>(slab);
      for (int64_t k = 0; k < width; k += kBlock, out += kBlock * kTile, block += stride) {
        for (int64_t line = 0; line < Code::kBits; ++line)  // the next chunk of this tile
          _mm_prefetch(block + kChunk / kBlock * stride + line * kRowBytes, _MM_HINT_T0);
        decode_block(code, block, out, std::make_integer_sequence<int, kAllPairs>());
      }
    });
  }

  static bool are_few(const Problem& p, int64_t rows) {
    return rows <= few_panels(p.weight.geometry.element) * kFewRows &&
           with_decoder(p, [&p](auto decoder) {
             return p.weight.geometry.padded_group % kUnit<typename decltype(decoder)::type> == 0;
           });
  }
  struct FewRows {
    explicit FewRows(const Problem&) {}
    void run(const FewRowsArgs& a, int64_t rows, int64_t) const {
      with_decoder(a.p, [rows](auto decoder) {
        return few_rows_kernel_for<typename decltype(decoder)::type>(rows);
      })(a);
    }
  };
  static constexpr int64_t kFewPanelRows = kFewRows;
  static constexpr bool kCutStrips = false;
};

}  // namespace

void float_avx512(const Problem& p, const Parallel& parallel) { run_linear<FmaCore>(p, parallel); }

}  // namespace compressed_linear::cpu
