// SPDX-License-Identifier: Apache-2.0
#include "quads.h"

#include <algorithm>
#include <cstring>

namespace compressed_linear::cpu {

void put_quads(const uint8_t* codes, int bits, uint8_t* block, int64_t stride, int64_t channel) {
  block += channel * kQuad;
  int shift = 0;
  for (const int width : {8, 4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
    for (int row = 0; row < width; ++row) {
      uint32_t lane = 0;
      for (int quad = row; quad < kQuads; quad += width) {
        uint32_t four;
        std::memcpy(&four, codes + quad * kQuad, kQuad);
        lane |= ((four >> shift) & mask) << plane_bit(width, quad);
      }
      std::memcpy(block + plane_position(bits, width, row) * stride, &lane, kQuad);
    }
    shift += width;
  }
}

void unpack_quad(const Geometry& g, const uint8_t* packed, int64_t tile, int64_t k,
                 uint32_t* codes) {
  const uint8_t* block = packed + quads_at(g, tile, k);
  const int64_t stride = row_stride(g, tile), quad = k % kBlock / kQuad;
  const int bits = g.element.bits;
  for (int64_t channel = 0; channel < kTile; ++channel) codes[channel] = 0;
  int shift = 0;
  for (const int width : {8, 4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
    const int bit = plane_bit(width, quad);
    uint32_t row[kTile];
    std::memcpy(row, block + plane_position(bits, width, plane_row(width, quad)) * stride,
                kRowBytes);
    for (int64_t channel = 0; channel < kTile; ++channel)
      codes[channel] |= ((row[channel] >> bit) & mask) << shift;
    shift += width;
  }
}

void unpack_quads_block(const Geometry& g, const uint8_t* packed, int64_t tile, int64_t k,
                        uint8_t* codes) {
  const int64_t begin = k / kBlock * kBlock;
  for (int64_t at = 0; at < kBlock; at += kQuad) {
    uint32_t four[kTile];
    unpack_quad(g, packed, tile, begin + at, four);
    for (int64_t i = 0; i < kQuad; ++i)
      for (int64_t channel = 0; channel < kTile; ++channel)
        codes[(at + i) * kTile + channel] = static_cast<uint8_t>(four[channel] >> (8 * i));
  }
}

void unpack_quads(const Geometry& g, const uint8_t* packed, int64_t tile_begin, int64_t tile_end,
                  uint8_t* rows) {
  uint8_t codes[kBlock * kTile];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t count = std::min(kTile, g.n - tile * kTile);
    for (int64_t k = 0; k < g.padded_k; k += kBlock) {
      unpack_quads_block(g, packed, tile, k, codes);
      for (int64_t i = 0; i < kBlock && k + i < g.used_k(); ++i) {
        const int64_t within = (k + i) % g.padded_group;
        if (within >= g.group) continue;
        const int64_t channel = (k + i) / g.padded_group * g.group + within;
        for (int64_t row = 0; row < count; ++row)
          rows[(tile * kTile + row) * g.k + channel] = codes[i * kTile + row];
      }
    }
  }
}

}  // namespace compressed_linear::cpu
