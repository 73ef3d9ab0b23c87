// SPDX-License-Identifier: Apache-2.0
#include "lookup.h"

#include <algorithm>
#include <cstring>

#include "cpu/common/arena.h"
#include "cpu/common/floats.h"

namespace compressed_linear::cpu {
namespace {

uint32_t word_at(const uint8_t* block, int64_t row, int64_t channel) {
  uint32_t word;
  std::memcpy(&word, block + row * kRowBytes + channel * 4, 4);
  return word;
}

// Adds the plane of Width bits at `plane` to the 32 codes of one output channel, `shift` bits up.
template <int Width>
void add_plane(const uint8_t* plane, int64_t channel, int shift, uint8_t* codes) {
  constexpr int kPerRow = static_cast<int>(kBlock) / Width;
  constexpr uint32_t kMask = (1u << Width) - 1;
  for (int row = 0; row < Width; ++row, codes += kPerRow) {
    const uint32_t word = word_at(plane, row, channel);
    for (int k = 0; k < kPerRow; ++k)
      codes[k] |= static_cast<uint8_t>((word >> code_bit(Width, k) & kMask) << shift);
  }
}

// The 32 bytes of one output channel of a block of 8-bit codes.
void read_bytes(const uint8_t* block, int64_t channel, uint8_t* codes) {
  for (int64_t pair = 0; pair < kPairs; ++pair)
    std::memcpy(codes + 2 * pair, block + (pair * kTile + channel) * 2, 2);
}

// values[32] of one output channel of a block of integers.
void read_integers(const Lookup& l, const uint8_t* block, int64_t channel, float* values) {
  const int bits = l.weight.geometry.element.bits;
  uint8_t codes[kBlock] = {};
  if (bits == 8) {
    read_bytes(block, channel, codes);
    for (uint8_t& code : codes) code ^= 0x80u;
  } else {
    int shift = 0;
    if (bits & 4) {
      add_plane<4>(block, channel, shift, codes);
      block += 4 * kRowBytes;
      shift += 4;
    }
    if (bits & 2) {
      add_plane<2>(block, channel, shift, codes);
      block += 2 * kRowBytes;
      shift += 2;
    }
    if (bits & 1) add_plane<1>(block, channel, shift, codes);
  }
  if (l.weight.wide_table != nullptr) {
    for (int64_t k = 0; k < kBlock; ++k) values[k] = l.weight.wide_table[codes[k]];
  } else if (l.weight.table != nullptr) {
    for (int64_t k = 0; k < kBlock; ++k) values[k] = from_bf16(l.weight.table[codes[k]]);
  } else {
    for (int64_t k = 0; k < kBlock; ++k) values[k] = static_cast<float>(codes[k]) - l.weight.middle;
  }
}

// values[32] of one output channel of a block.
void read_block(const Lookup& l, const uint8_t* block, int64_t channel, float* values) {
  switch (l.weight.geometry.element.kind) {
    case Kind::integer:
      read_integers(l, block, channel, values);
      break;
    case Kind::bfloat16:
      for (int64_t pair = 0; pair < kPairs; ++pair) {
        const uint32_t word = word_at(block, pair, channel);
        values[2 * pair] = from_bf16(static_cast<uint16_t>(word));
        values[2 * pair + 1] = from_bf16(static_cast<uint16_t>(word >> 16));
      }
      break;
    case Kind::e4m3:
    case Kind::e5m2: {
      uint8_t codes[kBlock];
      read_bytes(block, channel, codes);
      for (int64_t k = 0; k < kBlock; ++k)
        values[k] = l.weight.geometry.element.kind == Kind::e4m3 ? from_e4m3(codes[k])
                                                                 : from_e5m2(codes[k]);
      break;
    }
    case Kind::float16:
    case Kind::float32: {
      const Scalar type =
          l.weight.geometry.element.kind == Kind::float16 ? Scalar::float16 : Scalar::float32;
      for (int64_t k = 0; k < kBlock; ++k)
        values[k] = load_scalar(block, type, k * kTile + channel);
      break;
    }
  }
}

// Turns the values of a row, in the order of the packed weight, into weights.
void scale_row(const Lookup& l, int64_t row, float* values) {
  const Geometry& g = l.weight.geometry;
  const TileNumbers &scale = l.weight.scale, &zero = l.weight.zero;
  const int64_t tile = row / kTile, channel = row % kTile;
  for (int64_t group = 0; group < g.groups; ++group) {
    float* weights = values + group * g.padded_group;
    if (zero.data != nullptr) {
      const float offset = load_scalar(zero.data, zero.type, zero.at(tile, group) + channel);
      for (int64_t i = 0; i < g.group; ++i) weights[i] -= offset;
    }
    if (scale.data != nullptr) {
      const float factor = load_scalar(scale.data, scale.type, scale.at(tile, group) + channel);
      for (int64_t i = 0; i < g.group; ++i) weights[i] *= factor;
    }
    if (l.weight.row_scale != nullptr)
      for (int64_t i = 0; i < g.group; ++i) weights[i] *= l.weight.row_scale[row];
  }
}

// Brings the weights of a row into the order of the input channels: row[channels].
void reorder_row(const Lookup& l, const float* weights, float* row) {
  const Geometry& g = l.weight.geometry;
  if (l.perm == nullptr) {
    for (int64_t group = 0; group < g.groups; ++group)
      std::copy_n(weights + group * g.padded_group, g.group, row + group * g.group);
    return;
  }
  std::fill_n(row, l.channels, 0.0f);
  for (int64_t k = 0; k < g.k; ++k)
    if (l.perm[k] >= 0 && l.perm[k] < l.channels) row[l.perm[k]] += weights[g.position(k)];
}

}  // namespace

void look_up(const Lookup& l, int64_t begin, int64_t end) {
  const Geometry& g = l.weight.geometry;
  float *weights = nullptr, *row = nullptr;
  carve_from(worker_arena(), [&](Carver& carver) {
    weights = carver.take<float>(g.padded_k);
    row = carver.take<float>(l.channels);
  });
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = l.ids[i], tile = id / kTile;
    const uint8_t* block = block_of(l.weight, tile, 0);
    const int64_t stride = g.block_stride(tile);
    for (int64_t k = 0; k < g.padded_k; k += kBlock, block += stride)
      read_block(l, block, id % kTile, weights + k);
    scale_row(l, id, weights);
    const bool as_it_is = l.perm == nullptr && g.identity();
    if (!as_it_is) reorder_row(l, weights, row);
    store_scalars(l.out, l.out_type, i * l.channels, l.channels, as_it_is ? weights : row);
  }
}

}  // namespace compressed_linear::cpu
