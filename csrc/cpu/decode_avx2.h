// SPDX-License-Identifier: Apache-2.0
// From packed blocks to fp32 in AVX2 registers, exactly. Only for units built with AVX2.
//
// A vector holds four output channels times the two input channels of a pair, (k, k+1) next to each
// other, because that is what unpacking bytes to words yields. A decoder gives two pairs of input
// channels at once; which two, follows from where one shift brings codes to the bottom of all four
// bytes of a lane: `pair_of_slot`.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "engine.h"
#include "floats.h"

namespace compressed_linear::cpu {
namespace {  // see layout.h

// One pair of input channels of half a tile. Lanes of `near`: channels 0 0 1 1 4 4 5 5; of `far`:
// 2 2 3 3 6 6 7 7. With Code::kQuads: 0 0 1 1 2 2 3 3 and 4 4 5 5 6 6 7 7.
struct PairLanes {
  __m256 near, far;
};

inline __m256i load_row(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// Words of two bf16 pairs per channel, even half first, to fp32.
inline void widen_words(__m256i near, __m256i far, PairLanes& first, PairLanes& second) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  first.near = _mm256_castsi256_ps(_mm256_slli_epi32(near, 16));
  first.far = _mm256_castsi256_ps(_mm256_slli_epi32(far, 16));
  second.near = _mm256_castsi256_ps(_mm256_and_si256(near, high));
  second.far = _mm256_castsi256_ps(_mm256_and_si256(far, high));
}

// ---- codes of one to seven bits as bytes of a lane: even k of the first pair, even k of the
// second, odd k of the first, odd k of the second

template <int Bits>
struct PlaneBytes {
  using Plane = Planes<Bits>;
  static constexpr int kWidest = Plane::four ? 4 : Plane::two ? 2 : 1;
  static constexpr int kApart = 8 / kWidest;  // pairs between those of two neighbouring bytes
  static constexpr int first_pair(int group) {
    return group / kApart * 2 * kApart + group % kApart;
  }

  // Bits [At, At + Width) of the codes, from the plane of that width. Its field of the second pair
  // is not where the byte of the second pair is; a multiplication moves both.
  template <int Width, int At, int Pair>
  static __m256i narrower(const uint8_t* plane) {
    constexpr int kMask = (1 << Width) - 1, kField = Width * kApart;
    __m256i row = load_row(plane + kRowBytes * (Pair / (16 / Width)));
    if constexpr (constexpr int shift = Width * (Pair % (16 / Width)); shift > 0)
      row = _mm256_srli_epi16(row, shift);
    row = _mm256_and_si256(row, _mm256_set1_epi16(kMask | kMask << kField));
    row = _mm256_mullo_epi16(row, _mm256_set1_epi16(1 << At | 1 << (At + 8 - kField)));
    return _mm256_and_si256(row, _mm256_set1_epi8(kMask << At));
  }

  template <int Group>
  static __m256i bytes(const uint8_t* block) {
    constexpr int kPair = first_pair(Group), kPerRow = 16 / kWidest;
    __m256i code = load_row(block + kRowBytes * (kPair / kPerRow));
    if constexpr (constexpr int shift = kWidest * (kPair % kPerRow); shift > 0)
      code = _mm256_srli_epi16(code, shift);
    code = _mm256_and_si256(code, _mm256_set1_epi8((1 << kWidest) - 1));
    if constexpr (Plane::two && kWidest > 2)
      code = _mm256_or_si256(code, narrower<2, 4, kPair>(block + Plane::two_at));
    if constexpr (Plane::one && kWidest > 1)
      code = _mm256_or_si256(code, narrower<1, Bits - 1, kPair>(block + Plane::one_at));
    return code;
  }
};

// ---- decoders: Code(problem), group<G>(block, half, first, second)
//
// kBits: of an element; kQuads: see PairLanes; kHalfBlocks: works on sixteen input channels too;
// kSequential: plain weights, which are read in the order in which they lie in memory, since that
// is what processors fetch ahead by themselves.

// A table of 2^Bits entries for byte `Byte` of the entries, in tables of sixteen.
template <int Bits>
struct ByteTable {
  static constexpr int kTables = Bits > 4 ? 1 << (Bits - 4) : 1;
  __m256i tables[kTables];

  // entry(code): an integer
  template <class Entry>
  ByteTable(int byte, const Entry& entry) {
    for (int table = 0; table < kTables; ++table) {
      alignas(16) uint8_t values[16];
      for (int i = 0; i < 16; ++i)
        values[i] = static_cast<uint8_t>(entry((16 * table + i) % (1 << Bits)) >> (8 * byte));
      tables[table] =
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i*>(values)));
    }
  }

  __m256i operator[](__m256i code) const {
    if constexpr (kTables == 1) return _mm256_shuffle_epi8(tables[0], code);
    // Codes of other tables than this one get bit 7, for which the shuffle gives zero.
    __m256i found = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int table = 0; table < kTables; ++table) {
      const __m256i in_table =
          _mm256_adds_epu8(_mm256_xor_si256(code, _mm256_set1_epi8(static_cast<char>(16 * table))),
                           _mm256_set1_epi8(0x70));
      found = _mm256_or_si256(found, _mm256_shuffle_epi8(tables[table], in_table));
    }
    return found;
  }
};

template <int Bits>
struct PlaneCodes {
  static constexpr int kBits = Bits;
  static constexpr bool kQuads = false, kHalfBlocks = Bits == 4, kSequential = false;
  static constexpr int pair_of_slot(int slot) {
    return PlaneBytes<Bits>::first_pair(slot / 2) + slot % 2 * PlaneBytes<Bits>::kApart;
  }
  template <int Group>
  static __m256i bytes(const uint8_t* block, int half) {
    return PlaneBytes<Bits>::template bytes<Group>(block + half * kRowBytes / 2);
  }
};

// Tables of bf16 values, and integers of up to four bits.
template <int Bits>
class TableCodes : public PlaneCodes<Bits> {
 public:
  explicit TableCodes(const Problem& p) : low_(0, value(p)), high_(1, value(p)) {}

  template <int Group>
  void group(const uint8_t* block, int half, PairLanes& first, PairLanes& second) const {
    const __m256i code = PlaneCodes<Bits>::template bytes<Group>(block, half);
    const __m256i low = low_[code], high = high_[code];
    widen_words(_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high), first, second);
  }

 private:
  static auto value(const Problem& p) {
    return [&p](int code) {
      return p.table != nullptr ? p.table[code] : to_bf16(static_cast<float>(code) - p.middle);
    };
  }
  ByteTable<Bits> low_, high_;
};

// Tables of values that bf16 cannot hold.
template <int Bits>
class WideCodes : public PlaneCodes<Bits> {
 public:
  explicit WideCodes(const Problem& p)
      : bytes_{{0, bits(p)}, {1, bits(p)}, {2, bits(p)}, {3, bits(p)}} {}

  template <int Group>
  void group(const uint8_t* block, int half, PairLanes& first, PairLanes& second) const {
    // First the first pair of four channels, then their second: unpacking to words and then to
    // lanes so gives one pair a vector.
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i code =
        _mm256_shuffle_epi8(PlaneCodes<Bits>::template bytes<Group>(block, half), order);
    const __m256i byte0 = bytes_[0][code], byte1 = bytes_[1][code];
    const __m256i byte2 = bytes_[2][code], byte3 = bytes_[3][code];
    first = lanes(_mm256_unpacklo_epi8(byte0, byte1), _mm256_unpacklo_epi8(byte2, byte3));
    second = lanes(_mm256_unpackhi_epi8(byte0, byte1), _mm256_unpackhi_epi8(byte2, byte3));
  }

 private:
  static auto bits(const Problem& p) {
    return [&p](int code) { return bits_of(p.wide_table[code]); };
  }
  static PairLanes lanes(__m256i low, __m256i high) {
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high))};
  }
  ByteTable<Bits> bytes_[4];
};

// Integers of five to seven bits: below 0x43 in the upper byte, a code of up to seven bits is the
// bf16 number 128 + code.
template <int Bits>
class OffsetCodes : public PlaneCodes<Bits> {
 public:
  explicit OffsetCodes(const Problem& p) : middle_(_mm256_set1_ps(128.0f + p.middle)) {}

  template <int Group>
  void group(const uint8_t* block, int half, PairLanes& first, PairLanes& second) const {
    const __m256i code = PlaneCodes<Bits>::template bytes<Group>(block, half);
    const __m256i high = _mm256_set1_epi8(0x43);
    widen_words(_mm256_unpacklo_epi8(code, high), _mm256_unpackhi_epi8(code, high), first, second);
    for (__m256* lanes : {&first.near, &first.far, &second.near, &second.far})
      *lanes = _mm256_sub_ps(*lanes, middle_);
  }

 private:
  __m256 middle_;
};

// The elements below are stored pair after pair.
struct InOrder {
  static constexpr bool kQuads = false, kHalfBlocks = false, kSequential = true;
  static constexpr int pair_of_slot(int slot) { return slot; }
};

struct ByteCodes : InOrder {
  static constexpr int kBits = 8;
  static constexpr bool kQuads = true, kSequential = false;
  explicit ByteCodes(const Problem&) {}

  static __m256 four_channels(const uint8_t* at) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  template <int Group>
  void group(const uint8_t* block, int half, PairLanes& first, PairLanes& second) const {
    const uint8_t* at = block + 2 * Group * kRowBytes / 2 + half * 16;
    first = {four_channels(at), four_channels(at + 8)};
    second = {four_channels(at + 32), four_channels(at + 40)};
  }
};

// Both are what fp16 makes of their bits, which keeps the subnormals: e5m2 is its upper byte, e4m3
// with one exponent bit more is 2^-8 of it.
template <Kind kind>
struct Float8Codes : InOrder {
  static constexpr int kBits = 8;
  static constexpr bool kQuads = true, kSequential = false;
  explicit Float8Codes(const Problem&) {}

  static PairLanes eight_channels(const uint8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if constexpr (kind == Kind::e5m2) {
      const __m128i zero = _mm_setzero_si128();
      return {_mm256_cvtph_ps(_mm_unpacklo_epi8(zero, bytes)),
              _mm256_cvtph_ps(_mm_unpackhi_epi8(zero, bytes))};
    }
    // The copy of the sign below the sign is cleared.
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                                            _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    const __m256 scale = _mm256_set1_ps(256.0f);
    return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), scale),
            _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)), scale)};
  }
  template <int Group>
  void group(const uint8_t* block, int half, PairLanes& first, PairLanes& second) const {
    const uint8_t* at = block + Group * kRowBytes + half * 16;
    first = eight_channels(at);
    second = eight_channels(at + kRowBytes / 2);
  }
};

struct BFloat16Codes : InOrder {
  static constexpr int kBits = 16;
  explicit BFloat16Codes(const Problem&) {}

  static PairLanes pair(const uint8_t* at) {
    const __m256i zero = _mm256_setzero_si256(), words = load_row(at);
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words))};
  }
  template <int Group>
  void group(const uint8_t* block, int half, PairLanes& first, PairLanes& second) const {
    const uint8_t* at = block + 2 * Group * kRowBytes + half * kRowBytes / 2;
    first = pair(at);
    second = pair(at + kRowBytes);
  }
};

struct Float16Codes : InOrder {
  static constexpr int kBits = 16;
  explicit Float16Codes(const Problem&) {}

  static __m256 channels(const uint8_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static PairLanes pair(const uint8_t* at) {
    const __m256 even = channels(at), odd = channels(at + 2 * kTile);
    return {_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd)};
  }
  template <int Group>
  void group(const uint8_t* block, int half, PairLanes& first, PairLanes& second) const {
    const uint8_t* at = block + Group * 8 * kTile + half * kTile;
    first = pair(at);
    second = pair(at + 4 * kTile);
  }
};

struct Float32Codes : InOrder {
  static constexpr int kBits = 32;
  explicit Float32Codes(const Problem&) {}

  static PairLanes pair(const uint8_t* at) {
    const auto* lanes = reinterpret_cast<const float*>(at);
    const __m256 even = _mm256_loadu_ps(lanes), odd = _mm256_loadu_ps(lanes + kTile);
    return {_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd)};
  }
  template <int Group>
  void group(const uint8_t* block, int half, PairLanes& first, PairLanes& second) const {
    const uint8_t* at = block + Group * 16 * kTile + half * 2 * kTile;
    first = pair(at);
    second = pair(at + 8 * kTile);
  }
};

template <class Code>
struct Type {
  using type = Code;
};

template <int Bits>
using Integers = std::conditional_t<(Bits > 4), OffsetCodes<Bits>, TableCodes<Bits>>;

// Calls function(Type<Code>{}) with the decoder of codes of Bits to 7 bits.
template <int Bits = 1, class Function>
inline auto with_codes(const Problem& p, const Function& function) {
  if constexpr (Bits < 7) {
    if (p.geometry.element.bits > Bits) return with_codes<Bits + 1>(p, function);
  }
  if (p.wide_table != nullptr) return function(Type<WideCodes<Bits>>{});
  if (p.table != nullptr) return function(Type<TableCodes<Bits>>{});
  return function(Type<Integers<Bits>>{});
}

// Calls function(Type<Code>{}) with the decoder of a problem.
template <class Function>
inline auto with_decoder(const Problem& p, const Function& function) {
  switch (p.geometry.element.kind) {
    case Kind::bfloat16:
      return function(Type<BFloat16Codes>{});
    case Kind::float16:
      return function(Type<Float16Codes>{});
    case Kind::float32:
      return function(Type<Float32Codes>{});
    case Kind::e4m3:
      return function(Type<Float8Codes<Kind::e4m3>>{});
    case Kind::e5m2:
      return function(Type<Float8Codes<Kind::e5m2>>{});
    default:
      return p.geometry.element.bits == 8 ? function(Type<ByteCodes>{}) : with_codes(p, function);
  }
}

// data[index .. index + 7] in fp32.
inline __m256 load_eight(const void* data, Scalar type, int64_t index) {
  const char* at = static_cast<const char*>(data) + index * size_of(type);
  if (type == Scalar::float32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  if (type == Scalar::e4m3 || type == Scalar::e8m0) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    if (type == Scalar::e4m3) {  // see Float8Codes
      const __m128i halves = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7),
                                           _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
      return _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0f));
    }
    const __m256i code = _mm256_cvtepu8_epi32(bytes);
    const __m256i least = _mm256_and_si256(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()),
                                           _mm256_set1_epi32(0x00400000));
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(code, 23), least));
  }
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  if (type == Scalar::float16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

}  // namespace
}  // namespace compressed_linear::cpu
