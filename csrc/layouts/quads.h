// SPDX-License-Identifier: Apache-2.0
// The packed layout of weights that meet 8-bit integer activations. Tiles, blocks and strips are
// those of layouts/planes.h, but row by row: row 0 of a block of each tile of the strip, row 1 of
// each, ... so that kernels, which take a row of every tile at once, read memory front to back. A
// row of 64 bytes is
//
//   quad   4 consecutive input channels of the 16 output channels: [channel][k]
//
// as byte dot products want them, and codes stay unsigned. A block has 8 quads. 8-bit codes are 8
// such rows. Narrower ones are cut into bit planes of 4, 2 and 1 bits (3 = 2+1, ...), the lowest
// bits in the widest plane; a plane of w bits is w rows, and byte by byte
//   1 bit    bit j of the only row is quad j
//   2 bits   row j holds quads j, j+2, j+4, j+6, lowest first
//   4 bits   row j holds quad j in bits 0-3 and quad j+4 in bits 4-7
// Rows lie in the order in which a kernel that takes quads in quad_order touches them first: the
// row of the 1-bit plane; row 0 of the 2-bit plane, row 0 of the 4-bit plane; row 1 of each; and so
// on. Out of that order the processor's own prefetching fails (7 bits ran at a third of the
// bandwidth).
//
// The input channels are padded so that no quad straddles two groups. A padded channel holds the
// middle code.
#pragma once

#include "planes.h"

namespace compressed_linear::cpu {

inline constexpr const char* kQuadsLayoutId = "tile16-block32-strip4-rows-quads-rows124-v1";
inline constexpr int64_t kQuad = 4;
inline constexpr int64_t kQuads = kBlock / kQuad;

static_assert(kTile * kQuad == kRowBytes, "a row is one quad of every channel of a tile");

namespace {  // see layouts/planes.h

constexpr Geometry make_quads_geometry(int64_t n, int64_t k, int64_t group, int bits) {
  Geometry g = make_geometry(n, k, group, {Kind::integer, bits});
  if (g.groups > 1) g.padded_group = round_up(group, kQuad);
  g.padded_k = round_up(g.groups * g.padded_group, kBlock);
  return g;
}

static_assert(make_quads_geometry(17, 18, 6, 4).padded_k == 32, "three groups of eight");

// Tiles of the strip that `tile` belongs to.
[[gnu::always_inline]] constexpr int64_t strip_tiles(const Geometry& g, int64_t tile) {
  const int64_t left = g.tiles - tile / kStrip * kStrip;
  return left < kStrip ? left : kStrip;
}

// Bytes from a row of a block of a tile to the block's next row.
[[gnu::always_inline]] constexpr int64_t row_stride(const Geometry& g, int64_t tile) {
  return strip_tiles(g, tile) * kRowBytes;
}

// Where row 0 of the block that holds stored channel `k` of a tile begins.
[[gnu::always_inline]] constexpr int64_t quads_at(const Geometry& g, int64_t tile, int64_t k) {
  return tile / kStrip * kStrip * g.tile_bytes() + k / kBlock * g.block_stride(tile) +
         tile % kStrip * kRowBytes;
}

static_assert(quads_at(make_quads_geometry(96, 64, 32, 4), 5, 32) == 2048 + 512 + 64, "");

// Index of row `row` of the plane of `width` bits among the rows of a block.
constexpr int64_t plane_position(int bits, int width, int64_t row) {
  if (width == 8 || width == 1) return row;
  const int64_t one = bits & 1, two = bits >> 1 & 1, four = bits >> 2 & 1;
  if (row >= 2) return one + 2 * two + row;
  return one + row * (two + four) + (width == 4 ? two : 0);
}

static_assert(plane_position(7, 2, 1) == 3 && plane_position(7, 4, 1) == 4 &&
                  plane_position(7, 4, 3) == 6 && plane_position(6, 4, 0) == 1 &&
                  plane_position(5, 4, 3) == 4 && plane_position(3, 2, 1) == 2 &&
                  plane_position(4, 4, 2) == 2,
              "rows follow each other without gaps");

// The i-th quad that a kernel takes: those that share a row of the widest plane after each other.
constexpr int quad_order(int bits, int i) {
  if (bits == 8 || bits == 1) return i;
  return bits >= 4 ? i % 2 * 4 + i / 2 : i % 4 * 2 + i / 4;
}

// Row and lowest bit of quad `quad` in a plane of `width` bits.
constexpr int64_t plane_row(int width, int64_t quad) { return quad % width; }
constexpr int plane_bit(int width, int64_t quad) { return static_cast<int>(quad / width) * width; }

}  // namespace
}  // namespace compressed_linear::cpu
