// SPDX-License-Identifier: Apache-2.0
// Quads (loop.h) of a tile into a packed layout, with the registers V.
#pragma once

#include <algorithm>

#include "repack.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

template <class V>
struct PackedWriter {
  using Reg = typename V::Reg;
  static constexpr int64_t kLanes = V::kLanes, kParts = kTile / kLanes;

  const Repack& job;
  const Geometry& g;

  template <int Width>
  static void put_plane(const uint32_t* block_quads, int below, uint8_t* plane) {
    constexpr int kPerRow = 8 / Width;
    constexpr uint32_t kOnes = (1u << Width) - 1;
    const Reg outer = V::set1(kOnes * 0x01000001u), second = V::set1(kOnes << 8),
              third = V::set1(kOnes << 16);
    for (int row = 0; row < Width; ++row)
      for (int64_t part = 0; part < kParts; ++part) {
        Reg lane = V::set1(0);
        for (int i = 0; i < kPerRow; ++i) {
          const Reg quad = V::shift_right(
              V::load(block_quads + (row * kPerRow + i) * kTile + part * kLanes), V::count(below));
          const Reg swapped = V::or_(V::shift_left(V::and_(quad, second), V::count(8)),
                                     V::shift_right(V::and_(quad, third), V::count(8)));
          lane = V::or_(lane,
                        V::shift_left(V::or_(V::and_(quad, outer), swapped), V::count(Width * i)));
        }
        V::store(plane + row * kRowBytes + part * kLanes * 4, lane);
      }
  }

  // Rows of 16-bit values from the low and then the high halves of rows of words.
  static void put_halves(const uint32_t* words, int64_t rows, uint32_t flip, uint8_t* out) {
    const Reg flips = V::set1(flip);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t part = 0; part < kParts; ++part) {
        const Reg word = V::xor_(V::load(words + row * kTile + part * kLanes), flips);
        uint8_t* to = out + row * kRowBytes + part * kLanes * 2;
        V::store_low_halves(to, word);
        V::store_low_halves(to + kRowBytes / 2, V::shift_right(word, V::count(16)));
      }
  }

  template <int Bits>
  void put_block(const uint32_t* block_quads, uint8_t* block) const {
    if constexpr (Bits == 8) {
      put_halves(block_quads, 8, zero_code(g.element) * 0x01010101u, block);
    } else {
      using P = Planes<Bits>;
      if constexpr (P::four) put_plane<4>(block_quads, 0, block + P::four_at);
      if constexpr (P::two) put_plane<2>(block_quads, P::four ? 4 : 0, block + P::two_at);
      if constexpr (P::one) put_plane<1>(block_quads, Bits - 1, block + P::one_at);
    }
  }

  // One plane of a block in the layout of quads.
  template <int Bits, int Width>
  static void put_quad_plane(const uint32_t* block_quads, int below, uint8_t* block,
                             int64_t stride) {
    const Reg mask = V::set1(((1u << Width) - 1) * 0x01010101u);
    for (int row = 0; row < Width; ++row)
      for (int64_t part = 0; part < kParts; ++part) {
        Reg lane = V::set1(0);
        for (int quad = row; quad < kQuads; quad += Width) {
          const Reg codes =
              V::shift_right(V::load(block_quads + quad * kTile + part * kLanes), V::count(below));
          lane =
              V::or_(lane, V::shift_left(V::and_(codes, mask), V::count(plane_bit(Width, quad))));
        }
        V::store(block + plane_position(Bits, Width, row) * stride + part * kLanes * 4, lane);
      }
  }

  template <int Bits>
  static void put_quad_block(const uint32_t* block_quads, uint8_t* block, int64_t stride) {
    if constexpr (Bits == 8) {
      for (int64_t quad = 0; quad < kQuads; ++quad)
        for (int64_t part = 0; part < kParts; ++part)
          V::store(block + quad * stride + part * kLanes * 4,
                   V::load(block_quads + quad * kTile + part * kLanes));
    } else {
      using P = Planes<Bits>;
      if constexpr (P::four) put_quad_plane<Bits, 4>(block_quads, 0, block, stride);
      if constexpr (P::two) put_quad_plane<Bits, 2>(block_quads, P::four ? 4 : 0, block, stride);
      if constexpr (P::one) put_quad_plane<Bits, 1>(block_quads, Bits - 1, block, stride);
    }
  }

  template <int Bits>
  void put_chunk(const uint32_t* tile_quads, int64_t tile, int64_t begin, int64_t end) const {
    const bool quad_rows = job.layout == PackedLayout::quads;
    uint8_t* block = job.packed + (quad_rows ? quads_at(g, tile, begin) : g.block_at(tile, begin));
    for (int64_t p = begin; p < end; p += kBlock, block += g.block_stride(tile)) {
      const uint32_t* block_quads = tile_quads + (p - begin) / kQuad * kTile;
      if (quad_rows) {
        put_quad_block<Bits>(block_quads, block, row_stride(g, tile));
      } else {
        put_block<Bits>(block_quads, block);
      }
    }
  }

  // Of ab in the low two bytes, b goes to the upper half.
  template <int Bits>
  static Reg spread(Reg quad) {
    constexpr uint32_t kOnes = (1u << Bits) - 1;
    return V::or_(V::and_(quad, V::set1(kOnes)),
                  V::shift_left(V::and_(quad, V::set1(kOnes << 8)), V::count(8)));
  }

  // A chunk in Marlin's order: lane 4 * (channel % 8) + pair has codes 2 * pair and the next of
  // both halves of a strip's 16 input channels.
  template <int Bits>
  void put_marlin(const uint32_t* tile_quads, int64_t tile, int64_t begin, int64_t end) const {
    constexpr int64_t kLaneWords = marlin::lane_words(Bits);
    for (int64_t p = begin; p < std::min(end, g.k); p += marlin::kStripK) {
      const uint32_t* strip = tile_quads + (p - begin) / 4 * kTile;
      alignas(64) uint32_t pairs[4][kTile];
      for (int64_t pair = 0; pair < 4; ++pair)
        for (int64_t part = 0; part < kParts; ++part) {
          const uint32_t* from = strip + pair / 2 * kTile + part * kLanes;
          const auto shift = V::count(static_cast<int>(pair % 2 * 16));
          const Reg lower = spread<Bits>(V::shift_right(V::load(from), shift));
          const Reg upper = spread<Bits>(V::shift_right(V::load(from + 2 * kTile), shift));
          V::store(pairs[pair] + part * kLanes,
                   V::or_(lower, V::shift_left(upper, V::count(Bits))));
        }
      uint32_t* out = reinterpret_cast<uint32_t*>(job.packed) +
                      marlin::code_field(Bits, g.n, p, tile * kTile).word;
      for (int64_t column = 0; column < 8; ++column)
        for (int64_t pair = 0; pair < 4; ++pair, out += kLaneWords) {
          const uint32_t low = pairs[pair][column], high = pairs[pair][column + 8];
          if constexpr (Bits == 4) {
            *out = low | high << 8;
          } else {
            out[0] = low;
            out[1] = high;
          }
        }
    }
  }

  // Positions [begin, end), whole blocks, of a tile.
  void put(const uint32_t* tile_quads, int64_t tile, int64_t begin, int64_t end) const {
    if (job.layout == PackedLayout::marlin)
      return g.element.bits == 4 ? put_marlin<4>(tile_quads, tile, begin, end)
                                 : put_marlin<8>(tile_quads, tile, begin, end);
    switch (g.element.bits) {
      case 1:
        return put_chunk<1>(tile_quads, tile, begin, end);
      case 2:
        return put_chunk<2>(tile_quads, tile, begin, end);
      case 3:
        return put_chunk<3>(tile_quads, tile, begin, end);
      case 4:
        return put_chunk<4>(tile_quads, tile, begin, end);
      case 5:
        return put_chunk<5>(tile_quads, tile, begin, end);
      case 6:
        return put_chunk<6>(tile_quads, tile, begin, end);
      case 7:
        return put_chunk<7>(tile_quads, tile, begin, end);
      default:
        return put_chunk<8>(tile_quads, tile, begin, end);
    }
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
