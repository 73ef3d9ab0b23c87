// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA: weights and activations are widened to fp32, which is exact, and multiplied there.
// A channel has two sums, of even and of odd input channels, added at the end of each segment.
#include <immintrin.h>

#include <utility>

#include "decode_avx2.h"
#include "driver.h"
#include "prefetch.h"

namespace compressed_linear::cpu {
namespace {

constexpr int kGroups = static_cast<int>(kPairs) / 2;  // of two pairs, in a block
constexpr int64_t kHalf = kTile / 2;

// ---- eight channels ---------------------------------------------------------------------------

// Of half a tile; half: counted in the whole matrix.
inline int64_t scale_index(const Problem& p, int64_t half, int64_t group) {
  return (half / 2 * p.geometry.groups + group) * kTile + half % 2 * kHalf;
}

inline __m256 scales(const Problem& p, int64_t half, int64_t group) {
  if (p.scale == nullptr) return _mm256_set1_ps(1.0f);
  return load_eight(p.scale, p.scale_type, scale_index(p, half, group));
}

inline __m256 negated_offsets(const Problem& p, int64_t half, int64_t group) {
  __m256 offset = _mm256_set1_ps(p.offset);
  if (p.zero != nullptr)
    offset = _mm256_add_ps(load_eight(p.zero, p.zero_type, scale_index(p, half, group)), offset);
  return _mm256_xor_ps(_mm256_set1_ps(-0.0f), offset);
}

inline PairLanes no_sums() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

inline PairLanes multiply_add(PairLanes weights, __m256 x, PairLanes sum) {
  return {_mm256_fmadd_ps(weights.near, x, sum.near), _mm256_fmadd_ps(weights.far, x, sum.far)};
}

// Even and odd input channels together, and eight output channels in order.
template <bool Quads>
inline __m256 even_and_odd(PairLanes sum) {
  const __m256 both = _mm256_hadd_ps(sum.near, sum.far);
  if constexpr (!Quads) return both;
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(both), 0xD8));
}

// x of one pair of input channels, from two words.
inline __m256 broadcast_pair(const void* x) {
  double words;
  std::memcpy(&words, x, sizeof(words));
  return _mm256_castpd_ps(_mm256_set1_pd(words));
}

inline void scale_into_total(float* total, __m256 sum, __m256 scale) {
  _mm256_storeu_ps(total, _mm256_fmadd_ps(scale, sum, _mm256_loadu_ps(total)));
}

// ---- few rows: decode in registers, touch every weight once -----------------------------------

constexpr int kFewRows = 4;
// Half tiles at once, so that no more than eight registers hold sums.
template <class Code>
constexpr int halves_at_once(int rows) {
  return rows > 2 ? 1 : rows == 2 || Code::kSequential ? 2 : 4;
}

// x and sums: [row] of this group, [half][row]
template <int Group, class Code, int Rows, int Halves>
inline void few_rows_group(const Code& code, const uint8_t* blocks, int half, const float* x,
                           PairLanes (*sums)[Rows]) {
  if (!Code::kSequential && (Halves > 1 || half == 0))
    prefetch_share<Group, kGroups, (Halves + 1) / 2 * Code::kBits>(blocks);
#pragma GCC unroll 4
  for (int h = 0; h < Halves; ++h) {
    PairLanes first, second;
    const int at = Halves == 1 ? half : h % 2;
    code.template group<Group>(blocks + h / 2 * kRowBytes * Code::kBits, at, first, second);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const float* pair = x + 2 * r;
      sums[h][r] = multiply_add(first, broadcast_pair(pair), sums[h][r]);
      sums[h][r] = multiply_add(second, broadcast_pair(pair + 2 * Rows), sums[h][r]);
    }
  }
}

// Groups First, First + 1, ... of one block of half tiles that follow each other. sums: [half][row]
template <int First, class Code, int Rows, int Halves, int... Group>
inline void few_rows_block(const Code& code, const uint8_t* blocks, int half, const float* x,
                           PairLanes* memory, std::integer_sequence<int, Group...>) {
  PairLanes sums[Halves][Rows];
#pragma GCC unroll 4
  for (int h = 0; h < Halves; ++h)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[h][r] = memory[h * Rows + r];
  (few_rows_group<First + Group, Code, Rows, Halves>(code, blocks, half, x + Group * 4 * Rows,
                                                     sums),
   ...);
#pragma GCC unroll 4
  for (int h = 0; h < Halves; ++h)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) memory[h * Rows + r] = sums[h][r];
}

// Channels [k, k + 32), or those sixteen of them that belong to the segment, of all half tiles of
// the strip.
template <class Code, int Rows, int Halves>
void few_rows_strip(const Code& code, const uint8_t* blocks, int64_t halves, int64_t k,
                    int64_t width, const float* x, PairLanes* sums) {
  constexpr int64_t kBlockBytes = kRowBytes * Code::kBits;
  for (int64_t half = 0; half < halves; half += Halves) {
    const uint8_t* block = blocks + half / 2 * kBlockBytes;
    const int odd = static_cast<int>(half % 2);
    PairLanes* to = sums + half * Rows;
    if (width == kBlock) {
      few_rows_block<0, Code, Rows, Halves>(code, block, odd, x, to,
                                            std::make_integer_sequence<int, kGroups>());
    } else if constexpr (Code::kHalfBlocks) {
      constexpr std::make_integer_sequence<int, kGroups / 2> kSome;
      if (k % kBlock == 0) {
        few_rows_block<0, Code, Rows, Halves>(code, block, odd, x, to, kSome);
      } else {
        few_rows_block<kGroups / 2, Code, Rows, Halves>(code, block, odd, x, to, kSome);
      }
    }
  }
}

template <class Code, int Rows>
void few_rows_kernel(const FewRowsArgs& a) {
  constexpr int kHalves = halves_at_once<Code>(Rows);
  const Geometry& g = a.p.geometry;
  const Code code(a.p);
  const int64_t stride = g.block_stride(a.tile), halves = 2 * a.tiles;
  const uint8_t* blocks = a.p.packed + g.block_at(a.tile, a.channel);
  const float* x = reinterpret_cast<const float*>(a.x);  // [slot][row][2]
  PairLanes sums[2 * kStrip * Rows];
  alignas(32) float totals[Rows][kStrip * kTile] = {};
  for (int64_t s = 0; s < a.segment_count; ++s) {
    for (PairLanes& sum : sums) sum = no_sums();
    for (int64_t k = a.segments[s].begin; k < a.segments[s].end;) {
      const int64_t left = a.segments[s].end - k,
                    width = left < kBlock - k % kBlock ? left : kBlock - k % kBlock;
      const auto strip = kHalves == 4 && a.tiles % 2 != 0 ? &few_rows_strip < Code, Rows,
                 kHalves == 4 ? 2 : kHalves >             : &few_rows_strip<Code, Rows, kHalves>;
      strip(code, blocks, halves, k, width, x, sums);
      k += width;
      if (k % kBlock == 0) blocks += stride;
      x += width * Rows;
    }
    for (int64_t half = 0; half < halves; ++half) {
      const int64_t group = a.segments[s].group, at = 2 * a.tile + half;
      const __m256 scale = scales(a.p, at, group);
      __m256 offset = _mm256_setzero_ps();
      if (a.row_sums != nullptr) offset = negated_offsets(a.p, at, group);
      for (int r = 0; r < Rows; ++r) {
        __m256 sum = even_and_odd<Code::kQuads>(sums[half * Rows + r]);
        if (a.row_sums != nullptr)
          sum = _mm256_fmadd_ps(_mm256_set1_ps(a.row_sums[s * Rows + r]), offset, sum);
        if (a.sums != nullptr) {
          _mm256_store_ps(a.sums + (s * Rows + r) * kStripLanes + half * kHalf, sum);
        } else {
          scale_into_total(totals[r] + half * kHalf, sum, scale);
        }
      }
    }
  }
  if (a.sums != nullptr) return;
  for (int r = 0; r < Rows; ++r)
    store_row(a.p, a.row + r, a.tile * kTile, a.tiles * kTile, totals[r]);
}

using FewRowsKernel = void (*)(const FewRowsArgs&);

FewRowsKernel few_rows_kernel_for(const Problem& p, int64_t rows) {
  return with_decoder(p, [rows](auto decoder) -> FewRowsKernel {
    using Code = typename decltype(decoder)::type;
    if (rows == 1) return &few_rows_kernel<Code, 1>;
    if (rows == 2) return &few_rows_kernel<Code, 2>;
    if (rows == 3) return &few_rows_kernel<Code, 3>;
    return &few_rows_kernel<Code, 4>;
  });
}
static_assert(kFewRows == 4, "few_rows_kernel_for knows that many");

// ---- the core for driver.h --------------------------------------------------------------------

// Whether no segment cuts what a decoder gives out of order, so that pairs may be taken in its
// order. Depends on the geometry only: every path adds in the same order.
inline bool in_slots(const Problem& p) {
  return with_decoder(p, [&p](auto decoder) {
    constexpr int64_t kUnit = decltype(decoder)::type::kHalfBlocks ? kBlock / 2 : kBlock;
    return p.geometry.padded_group % kUnit == 0;
  });
}

inline void store_pair(uint8_t* out, PairLanes low, PairLanes high) {
  float* lanes = reinterpret_cast<float*>(out);
  _mm256_store_ps(lanes, low.near);
  _mm256_store_ps(lanes + 8, low.far);
  _mm256_store_ps(lanes + 16, high.near);
  _mm256_store_ps(lanes + 24, high.far);
}

template <class Code>
inline PairLanes ordered(PairLanes lanes) {
  if constexpr (!Code::kQuads) return lanes;
  return {_mm256_permute2f128_ps(lanes.near, lanes.far, 0x20),
          _mm256_permute2f128_ps(lanes.near, lanes.far, 0x31)};
}

template <class Code, int Group>
inline void decode_group(const Code& code, const uint8_t* block, bool slots, uint8_t* out) {
  constexpr int64_t kPairBytes = 2 * kTile * sizeof(float);
  constexpr int kFirst = Code::pair_of_slot(2 * Group), kSecond = Code::pair_of_slot(2 * Group + 1);
  PairLanes first[2], second[2];
  for (int half = 0; half < 2; ++half)
    code.template group<Group>(block, half, first[half], second[half]);
  store_pair(out + (slots ? 2 * Group : kFirst) * kPairBytes, ordered<Code>(first[0]),
             ordered<Code>(first[1]));
  store_pair(out + (slots ? 2 * Group + 1 : kSecond) * kPairBytes, ordered<Code>(second[0]),
             ordered<Code>(second[1]));
}

template <class Code, int... Group>
inline void decode_block(const Code& code, const uint8_t* block, bool slots, uint8_t* out,
                         std::integer_sequence<int, Group...>) {
  (decode_group<Code, Group>(code, block, slots, out), ...);
}

struct Sums {
  PairLanes low, high;  // channels 0 to 7 and 8 to 15
};
struct Channels {
  __m256 low, high;
};

struct FmaCore {
  using Acc = Sums;
  using Sum = Channels;
  using Weights = Sums;
  using Activation = __m256;
  static constexpr int kStep = 2, kStepBytes = 2 * kTile * sizeof(float), kWords = 2;
  static constexpr int kMaxParts = 1, kRows = 3, kTiles = 1;

  static Acc zero() { return {no_sums(), no_sums()}; }
  static Weights load(const uint8_t* at) {
    const float* lanes = reinterpret_cast<const float*>(at);
    return {{_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8)},
            {_mm256_load_ps(lanes + 16), _mm256_load_ps(lanes + 24)}};
  }
  static Activation broadcast(const uint32_t* words) { return broadcast_pair(words); }
  static Acc mac(Acc acc, Weights weights, Activation x) {
    return {multiply_add(weights.low, x, acc.low), multiply_add(weights.high, x, acc.high)};
  }
  static Sum sum(Acc acc) { return {even_and_odd<false>(acc.low), even_and_odd<false>(acc.high)}; }
  static Sum load_sum(const float* sums) {
    return {_mm256_load_ps(sums), _mm256_load_ps(sums + kHalf)};
  }
  static Sum add_offset(Sum sum, float row_sum, const float* negated_offset) {
    const __m256 x = _mm256_set1_ps(row_sum);
    return {_mm256_fmadd_ps(x, _mm256_loadu_ps(negated_offset), sum.low),
            _mm256_fmadd_ps(x, _mm256_loadu_ps(negated_offset + kHalf), sum.high)};
  }
  static void scale_into(float* total, Sum sum, const float* scale) {
    scale_into_total(total, sum.low, _mm256_loadu_ps(scale));
    scale_into_total(total + kHalf, sum.high, _mm256_loadu_ps(scale + kHalf));
  }

  static int64_t parts(Scalar) { return 1; }
  static void split(const Problem& p, const float* row, int64_t, uint32_t* out, int64_t stride) {
    int pairs[kPairs];
    const bool slots = in_slots(p);
    with_decoder(p, [&](auto decoder) {
      for (int i = 0; i < kPairs; ++i)
        pairs[i] = slots ? decltype(decoder)::type::pair_of_slot(i) : i;
    });
    for (int64_t k = 0; k < p.geometry.padded_k; k += kBlock)
      for (int i = 0; i < kPairs; ++i, out += stride)
        std::memcpy(out, row + k + 2 * pairs[i], 2 * sizeof(float));
  }
  static void decode(const Problem& p, int64_t tile, int64_t k0, int64_t width, uint8_t* slab) {
    const uint8_t* block = p.packed + p.geometry.block_at(tile, k0);
    const int64_t stride = p.geometry.block_stride(tile);
    const bool slots = in_slots(p);
    with_decoder(p, [&](auto decoder) {
      using Code = typename decltype(decoder)::type;
      const Code code(p);
      for (int64_t k = 0; k < width; k += kBlock) {
        for (int64_t line = 0; line < Code::kBits; ++line)  // the next chunk of this tile
          _mm_prefetch(
              reinterpret_cast<const char*>(block + kChunk / kBlock * stride + line * kRowBytes),
              _MM_HINT_T0);
        decode_block(code, block, slots, slab, std::make_integer_sequence<int, kGroups>());
        block += stride;
        slab += kPairs * kStepBytes;
      }
    });
  }
  static bool copy_row(const Problem&, int64_t, uint32_t*, int64_t) { return false; }

  static bool are_few(const Problem& p, int64_t rows) {
    return rows <= kFewPanels * kFewRows && in_slots(p);
  }
  static int64_t panel_rows(const Problem& p, int64_t rows) {
    return are_few(p, rows) ? kFewRows : kRows;
  }
  static bool takes_few_rows(const Call<FmaCore>& call) {
    return are_few(call.p, call.panels.begin(call.panels.count));
  }
  struct FewRows {
    explicit FewRows(const Problem&) {}
    void run(const FewRowsArgs& a, int64_t rows, int64_t) const {
      few_rows_kernel_for(a.p, rows)(a);
    }
  };
  static constexpr bool kCutStrips = true;

 private:
  // Up to this many panels decode anew for each; beyond, decoding once for all rows is cheaper.
  static constexpr int64_t kFewPanels = 2;
};

void linear(const Problem& p, const Parallel& parallel) { run_linear<FmaCore>(p, parallel); }

}  // namespace

const Engine kEngineAvx2 = {"avx2", &linear, &repack_avx2};

}  // namespace compressed_linear::cpu
