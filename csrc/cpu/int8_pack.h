// SPDX-License-Identifier: Apache-2.0
// Between rows of codes and the layout of int8_layout.h. Plain C++, every processor.
#pragma once

#include "int8_layout.h"

namespace compressed_linear::cpu {

// Writes tiles [tile_begin, tile_end) of `packed`. rows: uint8 codes [*, k], row-major, below
// 2^bits; row 0 is channel row_begin. Channels of the last tile beyond n become middle codes.
void pack_quads(const Geometry& geometry, const uint8_t* rows, int64_t row_begin, int64_t row_end,
                int64_t tile_begin, int64_t tile_end, uint8_t* packed);

// The inverse: rows of tiles [tile_begin, tile_end), channels beyond n left out.
void unpack_quads(const Geometry& geometry, const uint8_t* packed, int64_t tile_begin,
                  int64_t tile_end, uint8_t* rows);

// codes[kBlock][kTile] of the block of `tile` that holds stored channel `k`.
void unpack_quads_block(const Geometry& geometry, const uint8_t* packed, int64_t tile, int64_t k,
                        uint8_t* codes);

}  // namespace compressed_linear::cpu
