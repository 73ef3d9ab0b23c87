// SPDX-License-Identifier: Apache-2.0
// Between rows of codes (or floats) and the packed layout of layout.h. Plain C++, every processor.
#pragma once

#include "engine.h"

namespace compressed_linear::cpu {

// Writes tiles [tile_begin, tile_end) of `packed`. rows: uint8 codes [*, k] or floats [*, k] of
// the element's type, row-major; row 0 is channel row_begin. Channels of the last tile beyond n
// become zeros. Codes must be below 2^bits.
void pack_tiles(const Geometry& geometry, const void* rows, int64_t row_begin, int64_t row_end,
                int64_t tile_begin, int64_t tile_end, uint8_t* packed);

// Asks for huge pages for memory that is about to be written for the first time. Reading weights
// once per token misses the TLB on every small page.
void advise_huge_pages(void* data, int64_t bytes);

// The inverse: rows of tiles [tile_begin, tile_end), channels beyond n left out.
void unpack_tiles(const Geometry& geometry, const uint8_t* packed, int64_t tile_begin,
                  int64_t tile_end, void* rows);

}  // namespace compressed_linear::cpu
