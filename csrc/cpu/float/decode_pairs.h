// SPDX-License-Identifier: Apache-2.0
// From packed blocks to fp32 in vector registers, exactly, for engines that multiply in fp32.
//
// A Lanes supplies registers and their arithmetic: lanes_avx2.h, lanes_neon.h. It takes kLanes of
// the channels of a tile at once, a part of the tile, and one pair of input channels (k, k+1); in
// which lanes their weights lie is its own matter. A decoder gives the two pairs of a quad at once.
#pragma once

#include <type_traits>

#include "cpu/common/floats.h"
#include "cpu/common/problem.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// ---- codes of one to seven bits as bytes of a lane: even k of the first pair, even k of the
// second, odd k of the first, odd k of the second

template <class Lanes, int Bits>
struct PlaneBytes {
  using Reg = typename Lanes::Reg;
  using Plane = Planes<Bits>;

  // Bits [At, At + Width) of the codes of a quad, from the plane of that width.
  template <int Width, int At, int Quad>
  static Reg field(const uint8_t* plane) {
    constexpr int kFrom = quad_bit(Width, Quad);
    Reg row = Lanes::load_row(plane + kRowBytes * quad_row(Width, Quad));
    if constexpr (kFrom > At) row = Lanes::template shift_words_right<kFrom - At>(row);
    if constexpr (kFrom < At) row = Lanes::template shift_words_left<At - kFrom>(row);
    return Lanes::bit_and(row, Lanes::set_bytes(((1 << Width) - 1) << At));
  }

  template <int Quad>
  static Reg bytes(const uint8_t* block) {
    Reg code{};
    if constexpr (Plane::four) code = field<4, 0, Quad>(block + Plane::four_at);
    if constexpr (Plane::two) {
      const Reg two = field<2, Plane::four ? 4 : 0, Quad>(block + Plane::two_at);
      code = Plane::four ? Lanes::bit_or(code, two) : two;
    }
    if constexpr (Plane::one) {
      const Reg one = field<1, Bits - 1, Quad>(block + Plane::one_at);
      code = Bits > 1 ? Lanes::bit_or(code, one) : one;
    }
    return code;
  }
};

// ---- decoders: Code(problem), group<G>(block, part, first, second)
//
// kBits: of an element; kQuads: four channels of a pair lie in each half of a vector, where that
// makes a difference; kHalfBlocks: works on sixteen input channels too; kSequential: plain weights,
// which are read in the order in which they lie in memory, since that is what processors fetch
// ahead by themselves.

// A table of 2^Bits entries for byte `Byte` of the entries, in tables of sixteen.
template <class Lanes, int Bits>
struct ByteTable {
  using Reg = typename Lanes::Reg;
  static constexpr int kTables = Bits > 4 ? 1 << (Bits - 4) : 1;
  Reg tables[kTables];

  // entry(code): an integer
  template <class Entry>
  ByteTable(int byte, const Entry& entry) {
    for (int table = 0; table < kTables; ++table) {
      uint8_t values[16];
      for (int i = 0; i < 16; ++i)
        values[i] = static_cast<uint8_t>(entry((16 * table + i) % (1 << Bits)) >> (8 * byte));
      tables[table] = Lanes::load_table(values);
    }
  }

  Reg operator[](Reg code) const { return Lanes::template look_up<kTables>(tables, code); }
};

template <class Lanes, int Bits>
struct PlaneCodes {
  static constexpr int kBits = Bits;
  static constexpr bool kQuads = false, kHalfBlocks = Bits == 4, kSequential = false;
  template <int Group>
  static typename Lanes::Reg bytes(const uint8_t* block, int part) {
    return PlaneBytes<Lanes, Bits>::template bytes<Group>(block + part * Lanes::kLanes * 4);
  }
};

// Tables of bf16 values, and integers of up to four bits.
template <class Lanes, int Bits>
class TableCodes : public PlaneCodes<Lanes, Bits> {
 public:
  using Pair = typename Lanes::Pair;
  explicit TableCodes(const Problem& p) : low_(0, value(p)), high_(1, value(p)) {}

  template <int Group>
  void group(const uint8_t* block, int part, Pair& first, Pair& second) const {
    const auto code = PlaneCodes<Lanes, Bits>::template bytes<Group>(block, part);
    Lanes::widen(low_[code], high_[code], first, second);
  }

 private:
  static auto value(const Problem& p) {
    return [&p](int code) {
      return p.weight.table != nullptr ? p.weight.table[code]
                                       : to_bf16(static_cast<float>(code) - p.weight.middle);
    };
  }
  ByteTable<Lanes, Bits> low_, high_;
};

// Tables of values that bf16 cannot hold.
template <class Lanes, int Bits>
class WideCodes : public PlaneCodes<Lanes, Bits> {
 public:
  using Pair = typename Lanes::Pair;
  explicit WideCodes(const Problem& p)
      : bytes_{{0, bits(p)}, {1, bits(p)}, {2, bits(p)}, {3, bits(p)}} {}

  template <int Group>
  void group(const uint8_t* block, int part, Pair& first, Pair& second) const {
    const auto code =
        Lanes::order_to_join(PlaneCodes<Lanes, Bits>::template bytes<Group>(block, part));
    Lanes::join({bytes_[0][code], bytes_[1][code], bytes_[2][code], bytes_[3][code]}, first,
                second);
  }

 private:
  static auto bits(const Problem& p) {
    return [&p](int code) { return bits_of(p.weight.wide_table[code]); };
  }
  ByteTable<Lanes, Bits> bytes_[4];
};

// Integers of five to seven bits: below 0x43 in the upper byte, a code of up to seven bits is the
// bf16 number 128 + code.
template <class Lanes, int Bits>
class OffsetCodes : public PlaneCodes<Lanes, Bits> {
 public:
  using Pair = typename Lanes::Pair;
  explicit OffsetCodes(const Problem& p) : middle_(Lanes::set(128.0f + p.weight.middle)) {}

  template <int Group>
  void group(const uint8_t* block, int part, Pair& first, Pair& second) const {
    const auto code = PlaneCodes<Lanes, Bits>::template bytes<Group>(block, part);
    Lanes::widen(code, Lanes::set_bytes(0x43), first, second);
    first = Lanes::subtract(first, middle_);
    second = Lanes::subtract(second, middle_);
  }

 private:
  typename Lanes::Float middle_;
};

// The elements below are stored pair after pair.
struct InOrder {
  static constexpr bool kQuads = false, kHalfBlocks = false, kSequential = true;
  explicit InOrder(const Problem&) {}
};

// Codes of eight bits: integers, or floats of the kind.
template <class Lanes, Kind kind>
struct ByteCodes : InOrder {
  using InOrder::InOrder;
  static constexpr int kBits = 8;
  static constexpr bool kQuads = true, kSequential = false;

  static typename Lanes::Pair pair(const uint8_t* at) {
    if constexpr (kind == Kind::e4m3) return Lanes::from_e4m3(at);
    if constexpr (kind == Kind::e5m2) return Lanes::from_e5m2(at);
    return Lanes::from_bytes(at);
  }
  template <int Group>
  void group(const uint8_t* block, int part, typename Lanes::Pair& first,
             typename Lanes::Pair& second) const {
    const uint8_t* at = block + 4 * Group * kTile + 2 * part * Lanes::kLanes;
    first = pair(at);
    second = pair(at + 2 * kTile);
  }
};

template <class Lanes>
struct BFloat16Codes : InOrder {
  using InOrder::InOrder;
  static constexpr int kBits = 16;

  template <int Group>
  void group(const uint8_t* block, int part, typename Lanes::Pair& first,
             typename Lanes::Pair& second) const {
    const uint8_t* at = block + 2 * Group * kRowBytes + 4 * part * Lanes::kLanes;
    first = Lanes::from_bf16(at);
    second = Lanes::from_bf16(at + kRowBytes);
  }
};

template <class Lanes>
struct Float16Codes : InOrder {
  using InOrder::InOrder;
  static constexpr int kBits = 16;

  template <int Group>
  void group(const uint8_t* block, int part, typename Lanes::Pair& first,
             typename Lanes::Pair& second) const {
    constexpr int64_t kNext = 2 * kTile;
    const uint8_t* at = block + 4 * Group * kNext + 2 * part * Lanes::kLanes;
    first = Lanes::from_fp16(at, at + kNext);
    second = Lanes::from_fp16(at + 2 * kNext, at + 3 * kNext);
  }
};

template <class Lanes>
struct Float32Codes : InOrder {
  using InOrder::InOrder;
  static constexpr int kBits = 32;

  template <int Group>
  void group(const uint8_t* block, int part, typename Lanes::Pair& first,
             typename Lanes::Pair& second) const {
    constexpr int64_t kNext = 4 * kTile;
    const uint8_t* at = block + 4 * Group * kNext + 4 * part * Lanes::kLanes;
    first = Lanes::from_fp32(at, at + kNext);
    second = Lanes::from_fp32(at + 2 * kNext, at + 3 * kNext);
  }
};

template <class Code>
struct Type {
  using type = Code;
};

template <class Lanes, int Bits>
using Integers = std::conditional_t<(Bits > 4), OffsetCodes<Lanes, Bits>, TableCodes<Lanes, Bits>>;

// Calls function(Type<Code>{}) with the decoder of codes of Bits to 7 bits.
template <class Lanes, int Bits = 1, class Function>
inline auto with_codes(const Problem& p, const Function& function) {
  if constexpr (Bits < 7) {
    if (p.weight.geometry.element.bits > Bits) return with_codes<Lanes, Bits + 1>(p, function);
  }
  if (p.weight.wide_table != nullptr) return function(Type<WideCodes<Lanes, Bits>>{});
  if (p.weight.table != nullptr) return function(Type<TableCodes<Lanes, Bits>>{});
  return function(Type<Integers<Lanes, Bits>>{});
}

// Calls function(Type<Code>{}) with the decoder of a problem.
template <class Lanes, class Function>
inline auto with_decoder(const Problem& p, const Function& function) {
  switch (p.weight.geometry.element.kind) {
    case Kind::bfloat16:
      return function(Type<BFloat16Codes<Lanes>>{});
    case Kind::float16:
      return function(Type<Float16Codes<Lanes>>{});
    case Kind::float32:
      return function(Type<Float32Codes<Lanes>>{});
    case Kind::e4m3:
      return function(Type<ByteCodes<Lanes, Kind::e4m3>>{});
    case Kind::e5m2:
      return function(Type<ByteCodes<Lanes, Kind::e5m2>>{});
    default:
      if (p.weight.geometry.element.bits == 8)
        return function(Type<ByteCodes<Lanes, Kind::integer>>{});
      return with_codes<Lanes>(p, function);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
