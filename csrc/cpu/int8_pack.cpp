// SPDX-License-Identifier: Apache-2.0
#include "int8_pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace compressed_linear::cpu {
namespace {

// One channel of a block: 32 codes to its 4 bytes of every row.
void put_channel(const uint8_t* codes, int bits, uint8_t* block, int64_t stride, int64_t channel) {
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

}  // namespace

void pack_quads(const Geometry& g, const uint8_t* rows, int64_t row_begin, int64_t row_end,
                int64_t tile_begin, int64_t tile_end, uint8_t* packed) {
  const auto middle = static_cast<uint8_t>(1u << (g.element.bits - 1));
  std::vector<uint8_t> lines(static_cast<size_t>(kTile * g.padded_k));
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    std::fill(lines.begin(), lines.end(), middle);
    for (int64_t channel = 0; channel < kTile; ++channel) {
      const int64_t row = tile * kTile + channel;
      if (row < row_begin || row >= row_end) continue;
      const uint8_t* from = rows + (row - row_begin) * g.k;
      uint8_t* to = lines.data() + channel * g.padded_k;
      for (int64_t group = 0; group < g.groups; ++group)
        std::memcpy(to + group * g.padded_group, from + group * g.group,
                    static_cast<size_t>(g.group));
    }
    uint8_t* block = packed + quads_at(g, tile, 0);
    for (int64_t k = 0; k < g.padded_k; k += kBlock, block += g.block_stride(tile))
      for (int64_t channel = 0; channel < kTile; ++channel)
        put_channel(lines.data() + channel * g.padded_k + k, g.element.bits, block,
                    row_stride(g, tile), channel);
  }
}

void unpack_quads_block(const Geometry& g, const uint8_t* packed, int64_t tile, int64_t k,
                        uint8_t* codes) {
  const uint8_t* block = packed + quads_at(g, tile, k);
  const int64_t stride = row_stride(g, tile);
  const int bits = g.element.bits;
  std::memset(codes, 0, static_cast<size_t>(kBlock * kTile));
  int shift = 0;
  for (const int width : {8, 4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const auto mask = static_cast<uint8_t>((1u << width) - 1);
    for (int64_t quad = 0; quad < kQuads; ++quad) {
      const uint8_t* row = block + plane_position(bits, width, plane_row(width, quad)) * stride;
      const int bit = plane_bit(width, quad);
      for (int64_t i = 0; i < kQuad; ++i)
        for (int64_t channel = 0; channel < kTile; ++channel) {
          const auto code = static_cast<uint8_t>((row[channel * kQuad + i] >> bit) & mask);
          codes[(quad * kQuad + i) * kTile + channel] |= static_cast<uint8_t>(code << shift);
        }
    }
    shift += width;
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
