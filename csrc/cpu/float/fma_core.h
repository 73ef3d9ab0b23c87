// SPDX-License-Identifier: Apache-2.0
// The engine of instruction sets that multiply in fp32: weights and activations are widened, which
// is exact. Where a Lanes (decode_pairs.h) adds up even and odd input channels apart, these sums
// come together at the end of each segment.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/common/prefetch.h"
#include "decode_pairs.h"
#include "driver.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int kGroups = static_cast<int>(kPairs) / 2;  // of two pairs, in a block

// Parts of a tile, kLanes channels each.
template <class Lanes>
constexpr int kParts = static_cast<int>(kTile) / Lanes::kLanes;

// ---- a part of the tiles of a strip -----------------------------------------------------------

// first: where the numbers of the strip's first tile begin for a group
template <class Lanes>
inline typename Lanes::Float load_part(const TileNumbers& numbers, int64_t first, int64_t part) {
  const int64_t at =
      first + part / kParts<Lanes> * numbers.tile_stride + part % kParts<Lanes> * Lanes::kLanes;
  return Lanes::load_scalars(numbers.data, numbers.type, at);
}

template <class Lanes>
inline void scale_into_total(float* total, typename Lanes::Float sum, typename Lanes::Float scale) {
  Lanes::store(total, Lanes::fma(scale, sum, Lanes::load(total)));
}

// ---- few rows: decode in registers, touch every weight once -----------------------------------

constexpr int kFewRows = 4;

// Parts whose sums are in registers at once: of one tile where memory is read in order, else as
// many as there is room for.
template <class Lanes, class Code>
constexpr int parts_at_once(int rows) {
  int parts = Code::kSequential ? kParts<Lanes> : Lanes::kFewSums;
  while (parts > 1 && parts * rows > Lanes::kFewSums) parts /= 2;
  return parts;
}

// x and sums: [row] of this group, [part][row]. part: of its tile, 0 for whole tiles.
template <int Group, class Lanes, class Code, int Rows, int Parts>
inline void few_rows_group(const Code& code, const uint8_t* blocks, int part, const float* x,
                           typename Lanes::Sums (*sums)[Rows]) {
  constexpr int kAll = kParts<Lanes>;
  if (!Code::kSequential && (Parts >= kAll || part == 0))
    prefetch_share<Group, kGroups, (Parts + kAll - 1) / kAll * Code::kBits>(blocks);
#pragma GCC unroll 8
  for (int i = 0; i < Parts; ++i) {
    typename Lanes::Pair first, second;
    const int at = Parts < kAll ? part + i : i % kAll;
    const int tile = Parts < kAll ? 0 : i / kAll;
    code.template group<Group>(blocks + tile * kRowBytes * Code::kBits, at, first, second);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const float* pair = x + 2 * r;
      sums[i][r] = Lanes::multiply_add(first, Lanes::broadcast_pair(pair), sums[i][r]);
      sums[i][r] = Lanes::multiply_add(second, Lanes::broadcast_pair(pair + 2 * Rows), sums[i][r]);
    }
  }
}

// Groups First, First + 1, ... of one block of parts that follow each other. sums: [part][row]
template <int First, class Lanes, class Code, int Rows, int Parts, int... Group>
inline void few_rows_block(const Code& code, const uint8_t* blocks, int part, const float* x,
                           typename Lanes::Sums* memory, std::integer_sequence<int, Group...>) {
  typename Lanes::Sums sums[Parts][Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Parts; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[i][r] = memory[i * Rows + r];
  (few_rows_group<First + Group, Lanes, Code, Rows, Parts>(code, blocks, part, x + Group * 4 * Rows,
                                                           sums),
   ...);
#pragma GCC unroll 8
  for (int i = 0; i < Parts; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) memory[i * Rows + r] = sums[i][r];
}

// Channels [k, k + 32), or those sixteen of them that belong to the segment, of all parts of the
// strip.
template <class Lanes, class Code, int Rows, int Parts>
void few_rows_strip(const Code& code, const uint8_t* blocks, int64_t parts, int64_t k,
                    int64_t width, const float* x, typename Lanes::Sums* sums) {
  for (int64_t at = 0; at < parts; at += Parts) {
    const uint8_t* block = blocks + at / kParts<Lanes> * kRowBytes * Code::kBits;
    const int part = static_cast<int>(at % kParts<Lanes>);
    typename Lanes::Sums* to = sums + at * Rows;
    if (width == kBlock) {
      few_rows_block<0, Lanes, Code, Rows, Parts>(code, block, part, x, to,
                                                  std::make_integer_sequence<int, kGroups>());
    } else if constexpr (Code::kHalfBlocks) {
      constexpr std::make_integer_sequence<int, kGroups / 2> kSome;
      if (k % kBlock == 0) {
        few_rows_block<0, Lanes, Code, Rows, Parts>(code, block, part, x, to, kSome);
      } else {
        few_rows_block<kGroups / 2, Lanes, Code, Rows, Parts>(code, block, part, x, to, kSome);
      }
    }
  }
}

template <class Lanes, class Code>
using StripKernel = void (*)(const Code&, const uint8_t*, int64_t, int64_t, int64_t, const float*,
                             typename Lanes::Sums*);

// Of as many parts at once as divide a strip of `tiles`.
template <class Lanes, class Code, int Rows, int Parts = parts_at_once<Lanes, Code>(Rows)>
StripKernel<Lanes, Code> few_rows_strip_for(int64_t tiles) {
  if constexpr (Parts > kParts<Lanes>) {
    if (tiles % (Parts / kParts<Lanes>) != 0)
      return few_rows_strip_for<Lanes, Code, Rows, Parts / 2>(tiles);
  }
  return &few_rows_strip<Lanes, Code, Rows, Parts>;
}

template <class Lanes, class Code, int Rows>
void few_rows_kernel(const FewRowsArgs& a) {
  const Geometry& g = a.p.weight.geometry;
  const Code code(a.p);
  // Copies: what is behind a reference is read again after every store of a vector.
  const TileNumbers scales = a.p.weight.scale, zeros = a.p.weight.zero;
  const int64_t stride = g.block_stride(a.tile), parts = kParts<Lanes> * a.tiles;
  const uint8_t* blocks = block_of(a.p.weight, a.tile, a.channel);
  const float* x = reinterpret_cast<const float*>(a.x);  // [pair][row][2]
  const StripKernel<Lanes, Code> strip = few_rows_strip_for<Lanes, Code, Rows>(a.tiles);
  typename Lanes::Sums sums[kParts<Lanes> * kStrip * Rows];
  alignas(32) float totals[Rows][kStrip * kTile] = {};
  for (int64_t s = 0; s < a.segment_count; ++s) {
    for (typename Lanes::Sums& sum : sums) sum = Lanes::no_sums();
    for (int64_t k = a.segments[s].begin; k < a.segments[s].end;) {
      const int64_t left = a.segments[s].end - k, width = least(left, kBlock - k % kBlock);
      strip(code, blocks, parts, k, width, x, sums);
      k += width;
      if (k % kBlock == 0) blocks += stride;
      x += width * Rows;
    }
    const int64_t scale_first = scales.at(a.tile, a.segments[s].group);
    const int64_t zero_first = zeros.at(a.tile, a.segments[s].group);
    for (int64_t part = 0; part < parts; ++part) {
      auto scale = Lanes::set(1.0f), offset = Lanes::set(0.0f);
      if (scales.data != nullptr) scale = load_part<Lanes>(scales, scale_first, part);
      if (a.row_sums != nullptr) {
        offset = Lanes::set(a.p.weight.offset);
        if (zeros.data != nullptr)
          offset = Lanes::add(load_part<Lanes>(zeros, zero_first, part), offset);
        offset = Lanes::negate(offset);
      }
      for (int r = 0; r < Rows; ++r) {
        auto sum = Lanes::template sum<Code::kQuads>(sums[part * Rows + r]);
        if (a.row_sums != nullptr)
          sum = Lanes::fma(Lanes::set(a.row_sums[s * Rows + r]), offset, sum);
        const int64_t lane = part * Lanes::kLanes;
        if (a.sums != nullptr) {
          Lanes::store(a.sums + (s * Rows + r) * kStripLanes + lane, sum);
        } else {
          scale_into_total<Lanes>(totals[r] + lane, sum, scale);
        }
      }
    }
  }
  if (a.sums != nullptr) return;
  for (int r = 0; r < Rows; ++r)
    store_row(a.p, a.row + r, a.tile * kTile, a.tiles * kTile, totals[r]);
}

using FewRowsKernel = void (*)(const FewRowsArgs&);

template <class Lanes>
FewRowsKernel few_rows_kernel_for(const Problem& p, int64_t rows) {
  return with_decoder<Lanes>(p, [rows](auto decoder) -> FewRowsKernel {
    using Code = typename decltype(decoder)::type;
    if (rows == 1) return &few_rows_kernel<Lanes, Code, 1>;
    if (rows == 2) return &few_rows_kernel<Lanes, Code, 2>;
    if (rows == 3) return &few_rows_kernel<Lanes, Code, 3>;
    return &few_rows_kernel<Lanes, Code, 4>;
  });
}
static_assert(kFewRows == 4, "few_rows_kernel_for knows that many");

// ---- the core for driver.h --------------------------------------------------------------------

// Whether no segment cuts what a decoder gives at once.
template <class Lanes>
inline bool in_blocks(const Problem& p) {
  return with_decoder<Lanes>(p, [&p](auto decoder) {
    constexpr int64_t kUnit = decltype(decoder)::type::kHalfBlocks ? kBlock / 2 : kBlock;
    return p.weight.geometry.padded_group % kUnit == 0;
  });
}

template <class Lanes, int Group, class Code>
inline void decode_group(const Code& code, const uint8_t* block, float* out) {
  constexpr int64_t kPairFloats = 2 * kTile;
  float* first_out = out + 2 * Group * kPairFloats;
  float* second_out = first_out + kPairFloats;
#pragma GCC unroll 4
  for (int part = 0; part < kParts<Lanes>; ++part) {
    typename Lanes::Pair first, second;
    code.template group<Group>(block, part, first, second);
    const int64_t at = 2 * part * Lanes::kLanes;
    Lanes::store_pair(first_out + at, Lanes::template ordered<Code::kQuads>(first));
    Lanes::store_pair(second_out + at, Lanes::template ordered<Code::kQuads>(second));
  }
}

template <class Lanes, class Code, int... Group>
inline void decode_block(const Code& code, const uint8_t* block, float* out,
                         std::integer_sequence<int, Group...>) {
  (decode_group<Lanes, Group>(code, block, out), ...);
}

// Count values that are never in an array, which the compiler would keep in memory.
template <class T, int Count>
struct Row {
  T head;
  Row<T, Count - 1> tail;
};
template <class T>
struct Row<T, 1> {
  T head;
};

template <int At, class T, int Count>
inline const T& get(const Row<T, Count>& row) {
  if constexpr (At == 0) {
    return row.head;
  } else {
    return get<At - 1>(row.tail);
  }
}

// value(std::integral_constant<int, i>{}) for each i from At on.
template <class T, int Count, int At = 0, class Value>
inline Row<T, Count> make_row(const Value& value) {
  constexpr std::integral_constant<int, At> kAt;
  if constexpr (Count == 1) {
    return {value(kAt)};
  } else {
    return {value(kAt), make_row<T, Count - 1, At + 1>(value)};
  }
}

template <class Lanes>
struct FmaCore : RegisterCore<FmaCore<Lanes>> {
  static constexpr int kAll = kParts<Lanes>, kLanes = Lanes::kLanes;
  using Acc = Row<typename Lanes::Sums, kAll>;
  struct Vector {  // as a template argument a vector type would lose its alignment
    typename Lanes::Float value;
  };
  using Sum = Row<Vector, kAll>;
  using Weights = Row<typename Lanes::Pair, kAll>;
  using Activation = typename Lanes::Activation;
  static constexpr int kStep = 2, kStepBytes = 2 * kTile * sizeof(float), kWords = 2;
  static constexpr int kMaxParts = 1, kRows = Lanes::kBlockRows, kTiles = 1;

  static Acc zero() {
    return make_row<typename Lanes::Sums, kAll>([](auto) { return Lanes::no_sums(); });
  }
  static Weights load(const uint8_t* at) {
    const float* lanes = reinterpret_cast<const float*>(at);
    return make_row<typename Lanes::Pair, kAll>(
        [&](auto i) { return Lanes::load_pair(lanes + 2 * i * kLanes); });
  }
  static Activation broadcast(const uint32_t* words) { return Lanes::broadcast_pair(words); }
  static Acc mac(const Acc& acc, const Weights& weights, Activation x) {
    return make_row<typename Lanes::Sums, kAll>(
        [&](auto i) { return Lanes::multiply_add(get<i>(weights), x, get<i>(acc)); });
  }
  static Sum sum(const Acc& acc) {
    return make_row<Vector, kAll>(
        [&](auto i) { return Vector{Lanes::template sum<false>(get<i>(acc))}; });
  }
  static Sum load_sum(const float* sums) {
    return make_row<Vector, kAll>([&](auto i) { return Vector{Lanes::load(sums + i * kLanes)}; });
  }
  static Sum add_offset(const Sum& sum, float row_sum, const float* negated_offset) {
    return make_row<Vector, kAll>([&](auto i) {
      return Vector{Lanes::fma(Lanes::set(row_sum), Lanes::load(negated_offset + i * kLanes),
                               get<i>(sum).value)};
    });
  }
  template <int At = 0>
  static void scale_into(float* total, const Sum& sum, const float* scale) {
    constexpr int kLane = At * kLanes;
    scale_into_total<Lanes>(total + kLane, get<At>(sum).value, Lanes::load(scale + kLane));
    if constexpr (At + 1 < kAll) scale_into<At + 1>(total, sum, scale);
  }

  static int64_t parts(Scalar) { return 1; }
  static void split(const Problem& p, const float* row, int64_t, uint32_t* out, int64_t stride) {
    for (int64_t k = 0; k < p.weight.geometry.padded_k; k += 2, out += stride)
      std::memcpy(out, row + k, 2 * sizeof(float));
  }
  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* slab) {
    const uint8_t* block = block_of(p.weight, tile, k0);
    const int64_t stride = p.weight.geometry.block_stride(tile);
    with_decoder<Lanes>(p, [&](auto decoder) {
      using Code = typename decltype(decoder)::type;
      const Code code(p);
      for (int64_t k = 0; k < width; k += kBlock) {
        for (int64_t line = 0; line < Code::kBits; ++line)  // the next chunk of this tile
          __builtin_prefetch(block + kChunk / kBlock * stride + line * kRowBytes);
        decode_block<Lanes>(code, block, reinterpret_cast<float*>(slab),
                            std::make_integer_sequence<int, kGroups>());
        block += stride;
        slab += kPairs * kStepBytes;
      }
    });
  }
  static bool copy_row(const Problem&, int64_t, uint32_t*, int64_t) { return false; }

  static bool are_few(const Problem& p, int64_t rows) {
    return rows <= kFewPanels * kFewRows && in_blocks<Lanes>(p);
  }
  struct FewRows {
    explicit FewRows(const Problem&) {}
    void run(const FewRowsArgs& a, int64_t rows, int64_t) const {
      few_rows_kernel_for<Lanes>(a.p, rows)(a);
    }
  };
  static constexpr int64_t kFewPanelRows = kFewRows;
  static constexpr bool kCutStrips = true;

 private:
  // Up to this many panels decode anew for each; beyond, decoding once for all rows is cheaper.
  static constexpr int64_t kFewPanels = 2;
};

}  // namespace
}  // namespace compressed_linear::cpu
