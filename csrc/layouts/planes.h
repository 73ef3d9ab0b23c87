// SPDX-License-Identifier: Apache-2.0
// The packed weight layout, shared by every instruction set and by the packer.
//
// | tile  | 16 output channels
// | block | 32 input channels of one tile: 64 * bits bytes, whatever the element
// | strip | 4 tiles (fewer at the end) whose blocks alternate: block 0 of each, block 1 of each
// |       | and so on. A kernel that works on four tiles at once reads memory front to back
// | chunk | 128 input channels: the unit that is decoded at once; no partial sum crosses its end
//
// Inside a block of integers the code is cut into bit planes of 4, 2 and 1 bits (3 = 2+1, 5 = 4+1,
// 6 = 4+2, 7 = 4+2+1), widest plane first. A plane of w bits is w rows of 64 bytes: one 32-bit lane
// per output channel, in which the bytes belong to input channels k, k+2, k+1, k+3 of a quad. A row
// has the bits of 8 / w quads that follow each other, lowest first. One shift so brings the codes
//   of a pair (k, k+1) to the bottom of both halves, where vpermw turns them into the bf16 pair
//   that vdpbf16ps wants, of a quad to the bottom of all bytes, as byte dot products want them,
// and the same one in every plane.
//
// | 8 bits     | one row of 32 signed bytes (code - 128) per pair: [pair][channel][k, k+1]
// | e4m3, e5m2 | the codes themselves, [pair][channel][k, k+1]
// | bfloat16   | [pair][channel][k, k+1]
// | float16/32 | [k][channel]
//
// The input channels are padded so that no pair straddles two groups (an odd group gets one more
// channel) and the whole is a multiple of a block. A padded channel holds the code of zero.
#pragma once

#include <cstdint>

namespace compressed_linear::cpu {

inline constexpr const char* kLayoutId = "tile16-block32-strip4-planes421-v2";
inline constexpr int64_t kTile = 16;
inline constexpr int64_t kBlock = 32;
inline constexpr int64_t kStrip = 4;
inline constexpr int64_t kChunk = 128;
inline constexpr int64_t kRowBytes = 64;
inline constexpr int64_t kPairs = kBlock / 2;

static_assert(kTile * sizeof(uint32_t) == kRowBytes, "one 32-bit lane per channel of a tile");
static_assert(kChunk % kBlock == 0, "a chunk is whole blocks");
static_assert(kBlock * kTile * 4 / 8 == 4 * kRowBytes, "a 4-bit plane of a block is four rows");

enum class Kind : uint8_t { integer, bfloat16, float16, float32, e4m3, e5m2 };
enum class Scalar : uint8_t { float32, float16, bfloat16, e4m3, e8m0 };

struct Element {
  Kind kind;
  int bits;
};

struct Geometry {
  int64_t n, k, group, groups;            // as the caller sees them; group divides k
  int64_t padded_group, padded_k, tiles;  // as stored
  Element element;

  [[gnu::always_inline]] constexpr int64_t block_bytes() const { return kRowBytes * element.bits; }
  [[gnu::always_inline]] constexpr int64_t tile_bytes() const {
    return padded_k / kBlock * block_bytes();
  }
  // Bytes from a block of a tile to the tile's next one.
  [[gnu::always_inline]] constexpr int64_t block_stride(int64_t tile) const {
    const int64_t left = tiles - tile / kStrip * kStrip;
    return (left < kStrip ? left : kStrip) * block_bytes();
  }
  // Where the block that holds stored channel `k` of a tile begins.
  [[gnu::always_inline]] constexpr int64_t block_at(int64_t tile, int64_t k) const {
    return tile / kStrip * kStrip * tile_bytes() + k / kBlock * block_stride(tile) +
           tile % kStrip * block_bytes();
  }
  [[gnu::always_inline]] constexpr int64_t used_k() const { return groups * padded_group; }
  // Where input channel `channel` is stored.
  [[gnu::always_inline]] constexpr int64_t position(int64_t channel) const {
    return channel / group * padded_group + channel % group;
  }
  [[gnu::always_inline]] constexpr bool identity() const {
    return groups == 1 || padded_group == group;
  }
};

// Headers included by units with their own instruction-set flags define functions with internal
// linkage only (or always inline): of a shared one the linker could keep the AVX-512 copy.
namespace {

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int64_t size_of(Scalar type) {
  return type == Scalar::float32 ? 4 : type == Scalar::e4m3 || type == Scalar::e8m0 ? 1 : 2;
}

// Where a plane of `width` bits has quad `quad` of a block: its row, and the lowest bit in each
// byte.
constexpr int quad_row(int width, int quad) { return quad * width / 8; }
constexpr int quad_bit(int width, int quad) { return quad * width % 8; }
// Where it has pair `pair`: the lowest bit in each 16-bit half.
constexpr int pair_bit(int width, int pair) { return quad_bit(width, pair / 2) + pair % 2 * 8; }
// Where it has the code of channel `k` of the block: the lowest bit in the lane.
constexpr int code_bit(int width, int k) { return pair_bit(width, k / 2) + k % 2 * 16; }

static_assert(quad_row(4, 5) == 2 && quad_bit(4, 5) == 4 && quad_row(1, 7) == 0 &&
                  quad_bit(2, 7) == 6 && code_bit(4, 7) == 28,
              "");

// Offsets in bytes of the planes inside a block.
template <int Bits>
struct Planes {
  static_assert(Bits >= 1 && Bits <= 7, "8 bits are bytes, not planes");
  static constexpr bool four = (Bits & 4) != 0, two = (Bits & 2) != 0, one = (Bits & 1) != 0;
  static constexpr int64_t four_at = 0;
  static constexpr int64_t two_at = four ? 4 * kRowBytes : 0;
  static constexpr int64_t one_at = two_at + (two ? 2 * kRowBytes : 0);
};
static_assert(Planes<3>::one_at == 128 && Planes<5>::one_at == 256 && Planes<6>::two_at == 256 &&
                  Planes<7>::one_at == 384,
              "the planes of a block follow each other without gaps");

constexpr Geometry make_geometry(int64_t n, int64_t k, int64_t group, Element element) {
  const int64_t groups = k / group;
  const int64_t padded_group = groups == 1 ? round_up(k, kBlock) : round_up(group, 2);
  return {n,
          k,
          group,
          groups,
          padded_group,
          round_up(groups * padded_group, kBlock),
          round_up(n, kTile) / kTile,
          element};
}

static_assert(make_geometry(17, 96, 32, {Kind::integer, 4}).tile_bytes() == 3 * 256, "");
static_assert(make_geometry(96, 64, 32, {Kind::integer, 4}).block_at(5, 32) == 2048 + 512 + 256,
              "");
static_assert(make_geometry(17, 6, 1, {Kind::integer, 4}).padded_k == 32, "");

}  // namespace
}  // namespace compressed_linear::cpu
