// SPDX-License-Identifier: Apache-2.0
// The layout of layouts/quads.h in plain C++: one channel of a block, and back to rows of codes.
// What packs whole weights is in repack.h.
#pragma once

#include "layouts/quads.h"

namespace compressed_linear::cpu {

// Writes one channel of a block: codes[kBlock] to its 4 bytes of every row. stride: from row to
// row.
void put_quads(const uint8_t* codes, int bits, uint8_t* block, int64_t stride, int64_t channel);

// Rows uint8 [n, k] of tiles [tile_begin, tile_end), channels beyond n left out.
void unpack_quads(const Geometry& geometry, const uint8_t* packed, int64_t tile_begin,
                  int64_t tile_end, uint8_t* rows);

// codes[kTile]: those of stored channels k to k + 3, a multiple of 4, as bytes of a word, lowest
// first.
void unpack_quad(const Geometry& geometry, const uint8_t* packed, int64_t tile, int64_t k,
                 uint32_t* codes);

// codes[kBlock][kTile] of the block of `tile` that holds stored channel `k`.
void unpack_quads_block(const Geometry& geometry, const uint8_t* packed, int64_t tile, int64_t k,
                        uint8_t* codes);

}  // namespace compressed_linear::cpu
