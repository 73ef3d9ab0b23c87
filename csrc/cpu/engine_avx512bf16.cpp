// SPDX-License-Identifier: Apache-2.0
// AVX-512 with bf16 dot products: codes become bf16 by an in-register table, activations of 16 and
// 32 bits become one, two or three bf16 words whose sum is exact. vdpbf16ps treats denormal inputs
// and results as zero. Weights of fp16 and fp32 are multiplied in fp32.
#include <immintrin.h>

#include <utility>

#include "driver.h"

namespace compressed_linear::cpu {
namespace {

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
    const __m256i bytes =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 2 * kTile * P));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high =
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
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

template <int Bits>
void decode_chunk(const Problem& p, const uint8_t* packed, int64_t width, uint8_t* out) {
  const Table table(p);
  for (int64_t k = 0; k < width; k += kBlock) {
    for (int64_t line = 0; line < Bits; ++line)  // the next chunk of this tile
      _mm_prefetch(packed + kChunk / kBlock * kRowBytes * Bits + line * kRowBytes, _MM_HINT_T0);
    decode_block<Integer<Bits>>(packed, table, out, std::make_integer_sequence<int, kPairs>());
    packed += kRowBytes * Bits;
    out += kRowBytes * kPairs;
  }
}

// ---- one row: decode in registers, touch every weight once --------------------------------------

constexpr int64_t kPrefetchBytes = 2048;

template <class Code, int Tiles, int Parts, int P>
inline void row_step(const uint8_t* const* blocks, const Table& table, const uint32_t* x,
                     __m512* acc) {
  __m512i weights[Tiles];
  for (int t = 0; t < Tiles; ++t) weights[t] = Code::template pair<P>(blocks[t], table);
  for (int q = 0; q < Parts; ++q) {
    const __m512bh activation = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[P * Parts + q]));
    for (int t = 0; t < Tiles; ++t)
      acc[t] = _mm512_dpbf16_ps(acc[t], (__m512bh)weights[t], activation);
  }
}

template <class Code, int Tiles, int Parts, int... P>
inline void row_block(const uint8_t* const* blocks, const Table& table, const uint32_t* x,
                      __m512* acc, std::integer_sequence<int, P...>) {
  (row_step<Code, Tiles, Parts, P>(blocks, table, x, acc), ...);
}

struct RowArgs {
  const Problem& p;
  const Segment* segments;
  const int32_t* chunk_first;
  const uint32_t* x;
  const float* row_sums;  // null without offset
  int64_t row;
  int64_t tile;
};

template <class Code, int Bits, int Tiles, int Parts>
void row_kernel(const RowArgs& a) {
  const Problem& p = a.p;
  const Geometry& g = p.geometry;
  const Table table(p);
  constexpr int64_t kBlockBytes = kRowBytes * Bits;
  const uint8_t* blocks[Tiles];
  for (int t = 0; t < Tiles; ++t) blocks[t] = p.packed + (a.tile + t) * g.tile_bytes();
  __m512 totals[Tiles];
  for (int t = 0; t < Tiles; ++t) totals[t] = _mm512_setzero_ps();
  const uint32_t* x = a.x;
  alignas(64) float lanes[kTile];
  const int64_t count = a.chunk_first[chunk_count(g)];
  for (int64_t s = 0; s < count; ++s) {
    __m512 acc[Tiles];
    for (int t = 0; t < Tiles; ++t) acc[t] = _mm512_setzero_ps();
    for (int64_t k = a.segments[s].begin; k < a.segments[s].end; k += kBlock) {
      for (int t = 0; t < Tiles; ++t)
        for (int line = 0; line < Bits; ++line)
          _mm_prefetch(blocks[t] + kPrefetchBytes + line * kRowBytes, _MM_HINT_T0);
      row_block<Code, Tiles, Parts>(blocks, table, x, acc,
                                    std::make_integer_sequence<int, kPairs>());
      for (int t = 0; t < Tiles; ++t) blocks[t] += kBlockBytes;
      x += kPairs * Parts;
    }
    const int64_t group = a.segments[s].group;
    for (int t = 0; t < Tiles; ++t) {
      if (a.row_sums != nullptr) {
        load_negated_offset(p, a.tile + t, group, lanes);
        acc[t] = _mm512_fmadd_ps(_mm512_set1_ps(a.row_sums[s]), _mm512_load_ps(lanes), acc[t]);
      }
      load_scale(p, a.tile + t, group, lanes);
      totals[t] = _mm512_fmadd_ps(_mm512_load_ps(lanes), acc[t], totals[t]);
    }
  }
  alignas(64) float out[Tiles * kTile];
  for (int t = 0; t < Tiles; ++t) _mm512_store_ps(out + t * kTile, totals[t]);
  store_row(p, a.row, a.tile * kTile, Tiles * kTile, out);
}

using RowKernel = void (*)(const RowArgs&);

constexpr int kRowTiles = 8;

template <class Code, int Bits>
RowKernel row_kernel_for(int64_t parts) {
  if (parts == 3) return &row_kernel<Code, Bits, kRowTiles, 3>;
  if (parts == 2) return &row_kernel<Code, Bits, kRowTiles, 2>;
  return &row_kernel<Code, Bits, kRowTiles, 1>;
}

RowKernel row_kernel_for(Element element, int64_t parts) {
  if (element.kind == Kind::bfloat16) return row_kernel_for<BFloat16, 16>(parts);
  switch (element.bits) {
    case 1:
      return row_kernel_for<Integer<1>, 1>(parts);
    case 2:
      return row_kernel_for<Integer<2>, 2>(parts);
    case 3:
      return row_kernel_for<Integer<3>, 3>(parts);
    case 4:
      return row_kernel_for<Integer<4>, 4>(parts);
    case 5:
      return row_kernel_for<Integer<5>, 5>(parts);
    case 6:
      return row_kernel_for<Integer<6>, 6>(parts);
    case 7:
      return row_kernel_for<Integer<7>, 7>(parts);
    default:
      return row_kernel_for<Integer<8>, 8>(parts);
  }
}

// ---- cores for driver.h -------------------------------------------------------------------------

struct Lanes {
  using Acc = __m512;
  static constexpr int kRows = 6, kTiles = 4;
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
  static constexpr int kStep = 2, kMaxParts = 3, kRowTiles = compressed_linear::cpu::kRowTiles;
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

  static bool needs_decode(const Problem& p) { return p.geometry.element.kind != Kind::bfloat16; }
  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* out) {
    const Geometry& g = p.geometry;
    const uint8_t* packed = p.packed + tile * g.tile_bytes() + k0 / kBlock * g.block_bytes();
    switch (g.element.bits) {
      case 1:
        return decode_chunk<1>(p, packed, width, out);
      case 2:
        return decode_chunk<2>(p, packed, width, out);
      case 3:
        return decode_chunk<3>(p, packed, width, out);
      case 4:
        return decode_chunk<4>(p, packed, width, out);
      case 5:
        return decode_chunk<5>(p, packed, width, out);
      case 6:
        return decode_chunk<6>(p, packed, width, out);
      case 7:
        return decode_chunk<7>(p, packed, width, out);
      default:
        return decode_chunk<8>(p, packed, width, out);
    }
  }

  static bool has_row_kernel(const Call<DotCore>& call) {
    return call.g.padded_group % kBlock == 0;
  }
  static void row_kernel(const Call<DotCore>& call, int64_t begin, int64_t end) {
    const Geometry& g = call.g;
    RowArgs args{call.p,
                 call.segments,
                 call.chunk_first,
                 call.x,
                 call.offset ? call.row_sums : nullptr,
                 call.row0,
                 0};
    const RowKernel kernel = row_kernel_for(g.element, call.parts);
    for (int64_t unit = begin; unit < end; ++unit) {
      args.tile = unit * kRowTiles;
      if (args.tile + kRowTiles <= g.tiles) {
        kernel(args);
      } else {
        call.multiply(0, 1, args.tile, g.tiles);
      }
    }
  }
};

// Weights of fp16 and fp32.
struct FmaCore : Lanes {
  using Weights = __m512;
  using Activation = __m512;
  static constexpr int kStep = 1, kMaxParts = 1, kRowTiles = 1;
  static Weights load(const uint8_t* at) { return _mm512_loadu_ps(at); }
  static Activation broadcast(const uint32_t* word) { return _mm512_set1_ps(float_of(*word)); }
  static Acc mac(Acc acc, Weights weights, Activation activation) {
    return _mm512_fmadd_ps(weights, activation, acc);
  }
  static int64_t parts(Scalar) { return 1; }
  static void split(const float* row, int64_t padded_k, int64_t, uint32_t* out, int64_t stride) {
    for (int64_t i = 0; i < padded_k; ++i) out[i * stride] = bits_of(row[i]);
  }
  static bool needs_decode(const Problem& p) { return p.geometry.element.kind != Kind::float32; }
  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* out) {
    const Geometry& g = p.geometry;
    const uint8_t* packed = p.packed + tile * g.tile_bytes() + k0 / kBlock * g.block_bytes();
    for (int64_t i = 0; i < width; ++i)
      _mm512_store_ps(reinterpret_cast<float*>(out) + i * kTile,
                      _mm512_cvtph_ps(_mm256_loadu_si256(
                          reinterpret_cast<const __m256i*>(packed + i * kTile * 2))));
  }
  static bool has_row_kernel(const Call<FmaCore>&) { return false; }
  static void row_kernel(const Call<FmaCore>&, int64_t, int64_t) {}
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
