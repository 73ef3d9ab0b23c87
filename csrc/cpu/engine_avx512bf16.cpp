// SPDX-License-Identifier: Apache-2.0
// AVX-512 with bf16 dot products: codes become bf16 by an in-register table, activations of 16 and
// 32 bits become one, two or three bf16 words whose sum is exact. vdpbf16ps treats denormal inputs
// and results as zero. Weights of fp16 and fp32 are multiplied in fp32.
#include <immintrin.h>

#include <utility>

#include "driver.h"

namespace compressed_linear::cpu {
namespace {

// 24 of the 32 registers hold sums.
constexpr int kRegisterRows = 6, kRegisterTiles = 4;
static_assert(kRegisterTiles == kStrip, "the blocks of a register block follow each other");

// ---- decoding: one block of one tile to its sixteen bf16 pairs
// -----------------------------------

// The bf16 value of every code, repeated up to 128 entries, so that bits above a code of at most
// five bits need no masking: vpermw looks at five.
struct Table {
  __m512i rows[4];

  explicit Table(const Problem& p) {
    const int bits = p.geometry.element.bits;
    const int64_t size = int64_t{1} << bits;
    alignas(64) uint16_t values[128];
    for (int64_t i = 0; i < 128; ++i)
      values[i] =
          p.table != nullptr ? p.table[i % size] : to_bf16(static_cast<float>(i % size) - p.middle);
    for (int i = 0; i < 4; ++i) rows[i] = _mm512_load_si512(values + 32 * i);
  }
};

inline __m512i load_row(const uint8_t* at) { return _mm512_loadu_si512(at); }

// Shifts so that bit From of each 16-bit half lands on bit To.
template <int From, int To>
inline __m512i place(__m512i row) {
  if constexpr (From > To) return _mm512_srli_epi16(row, From - To);
  if constexpr (From < To) return _mm512_slli_epi16(row, To - From);
  return row;
}

// The low `Bits` bits of each half from `low`, the others from `high`.
template <int Bits>
inline __m512i join(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16((1 << Bits) - 1), low, high, 0xCA);
}

// Codes of pair P at the bottom of both halves of each lane; bits above are undefined.
template <int Bits, int P>
inline __m512i codes(const uint8_t* block) {
  using Plane = Planes<Bits>;
  constexpr int kWide = Plane::four ? 4 : Plane::two ? 2 : 0;
  __m512i code = _mm512_setzero_si512();
  if constexpr (Plane::four) {
    code = place<4 * (P % 4), 0>(load_row(block + Plane::four_at + kRowBytes * (P / 4)));
  }
  if constexpr (Plane::two) {
    const __m512i row = load_row(block + Plane::two_at + kRowBytes * (P / 8));
    if constexpr (Plane::four) {
      code = join<4>(code, place<2 * (P % 8), 4>(row));
    } else {
      code = place<2 * (P % 8), 0>(row);
    }
  }
  if constexpr (Plane::one) {
    constexpr int kAt = Plane::four && Plane::two ? 6 : kWide;
    const __m512i row = load_row(block + Plane::one_at);
    if constexpr (kAt == 0) {
      code = place<P, 0>(row);
    } else {
      code = join<kAt>(code, place<P, kAt>(row));
    }
  }
  return code;
}

template <int Bits>
inline __m512i look_up(__m512i code, const Table& table) {
  if constexpr (Bits <= 5) return _mm512_permutexvar_epi16(code, table.rows[0]);
  const __m512i low = _mm512_permutex2var_epi16(table.rows[0], code, table.rows[1]);
  if constexpr (Bits == 6) return low;
  const __m512i high = _mm512_permutex2var_epi16(table.rows[2], code, table.rows[3]);
  return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), low, high);
}

template <int Bits>
struct Integer {
  template <int P>
  static __m512i pair(const uint8_t* block, const Table& table) {
    return look_up<Bits>(codes<Bits, P>(block), table);
  }
};

template <>
struct Integer<8> {
  template <int P>
  static __m512i pair(const uint8_t* block, const Table&) {
    const auto* bytes = reinterpret_cast<const __m128i*>(block + 2 * kTile * P);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
};

struct BFloat16 {
  template <int P>
  static __m512i pair(const uint8_t* block, const Table&) {
    return load_row(block + kRowBytes * P);
  }
};

template <class Code, int... P>
inline void decode_block(const uint8_t* block, const Table& table, uint8_t* out,
                         std::integer_sequence<int, P...>) {
  (_mm512_store_si512(out + kRowBytes * P, Code::template pair<P>(block, table)), ...);
}

template <class Code, int Bits>
void decode_chunk(const Problem& p, const uint8_t* packed, int64_t stride, int64_t width,
                  uint8_t* out) {
  const Table table(p);
  for (int64_t k = 0; k < width; k += kBlock) {
    for (int64_t line = 0; line < Bits; ++line)  // the next chunk of this tile
      _mm_prefetch(packed + kChunk / kBlock * stride + line * kRowBytes, _MM_HINT_T0);
    decode_block<Code>(packed, table, out, std::make_integer_sequence<int, kPairs>());
    packed += stride;
    out += kRowBytes * kPairs;
  }
}

// ---- few rows: decode in registers, touch every weight once -----------------------------------

constexpr int64_t kPrefetchBytes = 8192;  // ahead in the strip; measured
// Up to this many panels decode anew for each; beyond, decoding once for all rows is cheaper.
constexpr int64_t few_panels(Element element) {
  return element.bits == 7 ? 1 : element.bits == 8 ? 2 : 3;
}

struct FewRowsArgs {
  const Problem& p;
  const Segment* segments;
  int64_t segment_count;
  const uint32_t* x;      // [step][part][row]
  const float* row_sums;  // [segment][row], null without offset
  int64_t row, tile;      // first of each
};

template <class Code, int Bits, int Rows, int Tiles, int Parts, int P>
inline void few_rows_step(const uint8_t* blocks, const Table& table, const uint32_t* x,
                          __m512 (*acc)[Tiles]) {
  __m512i weights[Tiles];
  for (int t = 0; t < Tiles; ++t)
    weights[t] = Code::template pair<P>(blocks + t * kRowBytes * Bits, table);
  for (int q = 0; q < Parts; ++q)
    for (int r = 0; r < Rows; ++r) {
      const __m512bh activation =
          (__m512bh)_mm512_set1_epi32(static_cast<int>(x[(P * Parts + q) * Rows + r]));
      for (int t = 0; t < Tiles; ++t)
        acc[r][t] = _mm512_dpbf16_ps(acc[r][t], (__m512bh)weights[t], activation);
    }
}

template <class Code, int Bits, int Rows, int Tiles, int Parts, int... P>
inline void few_rows_block(const uint8_t* blocks, const Table& table, const uint32_t* x,
                           __m512 (*acc)[Tiles], std::integer_sequence<int, P...>) {
  (few_rows_step<Code, Bits, Rows, Tiles, Parts, P>(blocks, table, x, acc), ...);
}

template <class Code, int Bits, int Rows, int Tiles, int Parts>
void few_rows_kernel(const FewRowsArgs& a) {
  const Problem& p = a.p;
  const Table table(p);
  constexpr int64_t kStripBlockBytes = Tiles * kRowBytes * Bits;
  const uint8_t* blocks = p.packed + p.geometry.block_at(a.tile, 0);
  const uint32_t* x = a.x;
  alignas(64) float totals[Rows][Tiles * kTile] = {};
  alignas(64) float lanes[kTile];
  for (int64_t s = 0; s < a.segment_count; ++s) {
    __m512 acc[Rows][Tiles];
    for (int r = 0; r < Rows; ++r)
      for (int t = 0; t < Tiles; ++t) acc[r][t] = _mm512_setzero_ps();
    for (int64_t k = a.segments[s].begin; k < a.segments[s].end; k += kBlock) {
      for (int64_t at = 0; at < kStripBlockBytes; at += kRowBytes)
        _mm_prefetch(blocks + kPrefetchBytes + at, _MM_HINT_T0);
      few_rows_block<Code, Bits, Rows, Tiles, Parts>(blocks, table, x, acc,
                                                     std::make_integer_sequence<int, kPairs>());
      blocks += kStripBlockBytes;
      x += kPairs * Parts * Rows;
    }
    const int64_t group = a.segments[s].group;
#pragma GCC unroll 8
    for (int t = 0; t < Tiles; ++t) {
      if (a.row_sums != nullptr) {
        load_negated_offset(p, a.tile + t, group, lanes);
        const __m512 offset = _mm512_load_ps(lanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          acc[r][t] = _mm512_fmadd_ps(_mm512_set1_ps(a.row_sums[s * Rows + r]), offset, acc[r][t]);
      }
      load_scale(p, a.tile + t, group, lanes);
      const __m512 scale = _mm512_load_ps(lanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        float* total = &totals[r][t * kTile];
        _mm512_store_ps(total, _mm512_fmadd_ps(scale, acc[r][t], _mm512_load_ps(total)));
      }
    }
  }
  for (int r = 0; r < Rows; ++r) store_row(p, a.row + r, a.tile * kTile, Tiles * kTile, totals[r]);
}

using FewRowsKernel = void (*)(const FewRowsArgs&);

template <class Code, int Bits, int64_t Rows = kRegisterRows>
FewRowsKernel few_rows_kernel_for(int64_t rows, int64_t parts) {
  if constexpr (Rows == 1) {
    if (parts == 3) return &few_rows_kernel<Code, Bits, 1, kRegisterTiles, 3>;
    if (parts == 2) return &few_rows_kernel<Code, Bits, 1, kRegisterTiles, 2>;
  } else if (rows < Rows) {
    return few_rows_kernel_for<Code, Bits, Rows - 1>(rows, parts);
  }
  return &few_rows_kernel<Code, Bits, Rows, kRegisterTiles, 1>;
}

FewRowsKernel few_rows_kernel_for(Element element, int64_t rows, int64_t parts) {
  if (element.kind == Kind::bfloat16) return few_rows_kernel_for<BFloat16, 16>(rows, parts);
  switch (element.bits) {
    case 1:
      return few_rows_kernel_for<Integer<1>, 1>(rows, parts);
    case 2:
      return few_rows_kernel_for<Integer<2>, 2>(rows, parts);
    case 3:
      return few_rows_kernel_for<Integer<3>, 3>(rows, parts);
    case 4:
      return few_rows_kernel_for<Integer<4>, 4>(rows, parts);
    case 5:
      return few_rows_kernel_for<Integer<5>, 5>(rows, parts);
    case 6:
      return few_rows_kernel_for<Integer<6>, 6>(rows, parts);
    case 7:
      return few_rows_kernel_for<Integer<7>, 7>(rows, parts);
    default:
      return few_rows_kernel_for<Integer<8>, 8>(rows, parts);
  }
}

// ---- cores for driver.h -------------------------------------------------------------------------

struct Lanes {
  using Acc = __m512;
  static constexpr int kRows = kRegisterRows, kTiles = kRegisterTiles;
  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc add_offset(Acc acc, float row_sum, const float* negated_offset) {
    return _mm512_fmadd_ps(_mm512_set1_ps(row_sum), _mm512_loadu_ps(negated_offset), acc);
  }
  static void scale_into(float* total, Acc acc, const float* scale) {
    _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(scale), acc, _mm512_loadu_ps(total)));
  }
};

// Weights that are exact in bf16.
struct DotCore : Lanes {
  using Weights = __m512bh;
  using Activation = __m512bh;
  static constexpr int kStep = 2, kMaxParts = 3;
  static Weights load(const uint8_t* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static Activation broadcast(const uint32_t* word) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(*word));
  }
  static Acc mac(Acc acc, Weights weights, Activation activation) {
    return _mm512_dpbf16_ps(acc, weights, activation);
  }

  static int64_t parts(Scalar type) {
    return type == Scalar::float32 ? 3 : type == Scalar::float16 ? 2 : 1;
  }
  // The leading eight significant bits; what is left is exact. Infinities and NaN leave nothing.
  static uint32_t take_part(float& value) {
    uint32_t bits = bits_of(value);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    if ((bits & 0x7fffffffu) > 0x7f800000u) bits |= 0x400000u;
    value = finite ? value - float_of(bits & 0xffff0000u) : 0.0f;
    return bits >> 16;
  }
  static void split(const float* row, int64_t padded_k, int64_t parts, uint32_t* out,
                    int64_t stride) {
    if (parts == 1) {
      for (int64_t i = 0; i < padded_k / 2; ++i)
        out[i * stride] = (bits_of(row[2 * i]) >> 16) | (bits_of(row[2 * i + 1]) & 0xffff0000u);
      return;
    }
    for (int64_t i = 0; i < padded_k / 2; ++i) {
      float even = row[2 * i], odd = row[2 * i + 1];
      for (int64_t q = 0; q < parts; ++q) {
        const uint32_t low = take_part(even);
        out[(i * parts + q) * stride] = low | (take_part(odd) << 16);
      }
    }
  }

  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* out) {
    const Geometry& g = p.geometry;
    const uint8_t* packed = p.packed + g.block_at(tile, k0);
    const int64_t stride = g.block_stride(tile);
    switch (g.element.bits) {
      case 1:
        return decode_chunk<Integer<1>, 1>(p, packed, stride, width, out);
      case 2:
        return decode_chunk<Integer<2>, 2>(p, packed, stride, width, out);
      case 3:
        return decode_chunk<Integer<3>, 3>(p, packed, stride, width, out);
      case 4:
        return decode_chunk<Integer<4>, 4>(p, packed, stride, width, out);
      case 5:
        return decode_chunk<Integer<5>, 5>(p, packed, stride, width, out);
      case 6:
        return decode_chunk<Integer<6>, 6>(p, packed, stride, width, out);
      case 7:
        return decode_chunk<Integer<7>, 7>(p, packed, stride, width, out);
      case 8:
        return decode_chunk<Integer<8>, 8>(p, packed, stride, width, out);
      default:
        return decode_chunk<BFloat16, 16>(p, packed, stride, width, out);
    }
  }

  static bool copy_row(const Problem& p, int64_t m, uint32_t* words, int64_t stride) {
    const Geometry& g = p.geometry;
    if (p.x_type != Scalar::bfloat16 || !in_order(p) || g.k % 2 != 0) return false;
    const char* row = static_cast<const char*>(p.x) + 2 * m * p.x_row_stride;
    for (int64_t i = 0; i < g.k / 2; ++i) std::memcpy(words + i * stride, row + 4 * i, 4);
    for (int64_t i = g.k / 2; i < g.padded_k / 2; ++i) words[i * stride] = 0;
    return true;
  }

  // Segments must be whole blocks; several rows of several parts would need too many registers.
  static int64_t few_rows_tiles(const Call<DotCore>& call) {
    const int64_t rows = call.panels.rows(0);
    const bool few =
        call.panels.count <= few_panels(call.g.element) && (rows == 1 || call.parts == 1);
    return few && call.g.padded_group % kBlock == 0 ? kRegisterTiles : 0;
  }
  static void few_rows(const Call<DotCore>& call, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit * kRegisterTiles;
      if (tile + kRegisterTiles > call.g.tiles) {
        call.multiply(0, call.panels.count, tile, call.g.tiles);
        continue;
      }
      for (int64_t panel = 0; panel < call.panels.count; ++panel) {
        const int64_t row = call.panels.begin(panel), rows = call.panels.rows(panel);
        few_rows_kernel_for(call.g.element, rows, call.parts)(
            {call.p, call.segments, call.segment_count, call.x + row * call.row_words,
             call.offset ? call.row_sums + row * call.segment_count : nullptr, call.row0 + row,
             tile});
      }
    }
  }
};

// Weights of fp16 and fp32.
struct FmaCore : Lanes {
  using Weights = __m512;
  using Activation = __m512;
  static constexpr int kStep = 1, kMaxParts = 1;
  static Weights load(const uint8_t* at) { return _mm512_loadu_ps(at); }
  static Activation broadcast(const uint32_t* word) { return _mm512_set1_ps(float_of(*word)); }
  static Acc mac(Acc acc, Weights weights, Activation activation) {
    return _mm512_fmadd_ps(weights, activation, acc);
  }
  static int64_t parts(Scalar) { return 1; }
  static void split(const float* row, int64_t padded_k, int64_t, uint32_t* out, int64_t stride) {
    for (int64_t i = 0; i < padded_k; ++i) out[i * stride] = bits_of(row[i]);
  }
  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* out) {
    const Geometry& g = p.geometry;
    float* lanes = reinterpret_cast<float*>(out);
    const Scalar type = g.element.kind == Kind::float32 ? Scalar::float32 : Scalar::float16;
    for (int64_t k = 0; k < width; k += kBlock, lanes += kBlock * kTile)
      load_scalars(p.packed + g.block_at(tile, k0 + k), type, 0, kBlock * kTile, lanes);
  }
  static bool copy_row(const Problem&, int64_t, uint32_t*, int64_t) { return false; }
  static int64_t few_rows_tiles(const Call<FmaCore>&) { return 0; }
  static void few_rows(const Call<FmaCore>&, int64_t, int64_t) {}
};

void linear(const Problem& p, const Parallel& parallel) {
  const Kind kind = p.geometry.element.kind;
  if (kind == Kind::float16 || kind == Kind::float32) {
    run_linear<FmaCore>(p, parallel);
  } else {
    run_linear<DotCore>(p, parallel);
  }
}

}  // namespace

const Engine kEngineAvx512Bf16 = {"avx512bf16", &linear};

}  // namespace compressed_linear::cpu
