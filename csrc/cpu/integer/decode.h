// SPDX-License-Identifier: Apache-2.0
// Codes of layouts/quads.h as bytes. Core: the registers, see driver.h.
#pragma once

#include <utility>

#include "layouts/quads.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Codes of quad J of a block, one byte each. block: the tile's part of the first row; stride: from
// row to row.
template <class Core, int Bits, int J>
[[gnu::always_inline]] inline typename Core::Reg decode_quad(const uint8_t* block, int64_t stride) {
  using Reg = typename Core::Reg;
  if constexpr (Bits == 8) {
    return Core::load(block + J * stride);
  } else {
    using Plane = Planes<Bits>;
    constexpr int kMask = (1 << Bits) - 1;
    Reg code{};
    if constexpr (Plane::four) {
      code = Core::template place<plane_bit(4, J), 0>(
          Core::load(block + plane_position(Bits, 4, plane_row(4, J)) * stride));
    }
    if constexpr (Plane::two) {
      const Reg row = Core::load(block + plane_position(Bits, 2, plane_row(2, J)) * stride);
      if constexpr (Plane::four) {
        code = Core::template join<4>(code, Core::template place<plane_bit(2, J), 4>(row));
      } else {
        code = Core::template place<plane_bit(2, J), 0>(row);
      }
    }
    if constexpr (Plane::one) {
      constexpr int kAt = Bits - 1;
      const Reg row = Core::load(block);
      if constexpr (kAt == 0) {
        code = Core::template place<plane_bit(1, J), 0>(row);
      } else {
        code = Core::template join<kAt>(code, Core::template place<plane_bit(1, J), kAt>(row));
      }
    }
    return Core::template keep<kMask>(code);
  }
}

// Decodes a block of one tile: `bytes` gets a row for each quad, row after row `stride` bytes apart
// in both. middles: four bytes that are taken from the codes.
using BlockDecoder = void (*)(const uint8_t* block, uint8_t* bytes, int64_t stride,
                              uint32_t middles);

template <class Core, int Bits, bool kCentred, int... J>
[[gnu::always_inline]] inline void decode_block(const uint8_t* block, uint8_t* bytes,
                                                int64_t stride, uint32_t middles,
                                                std::integer_sequence<int, J...>) {
  const auto decode = [&](const uint8_t* from, uint8_t* to, auto quad) {
    typename Core::Reg codes = decode_quad<Core, Bits, quad>(from, stride);
    if constexpr (kCentred)
      codes = Core::subtract_bytes(codes, Core::set(static_cast<int32_t>(middles)));
    Core::store(to + quad * stride, codes);
  };
  for (int64_t part = 0; part < kRowBytes; part += Core::kLanes * kQuad)
    (decode(block + part, bytes + part, std::integral_constant<int, J>()), ...);
}

template <class Core, int Bits, bool kCentred>
void decode_block(const uint8_t* block, uint8_t* bytes, int64_t stride, uint32_t middles) {
  decode_block<Core, Bits, kCentred>(block, bytes, stride, middles,
                                     std::make_integer_sequence<int, kQuads>());
}

template <class Core, bool kCentred>
BlockDecoder block_decoder(int bits) {
  switch (bits) {
    case 1:
      return decode_block<Core, 1, kCentred>;
    case 2:
      return decode_block<Core, 2, kCentred>;
    case 3:
      return decode_block<Core, 3, kCentred>;
    case 4:
      return decode_block<Core, 4, kCentred>;
    case 5:
      return decode_block<Core, 5, kCentred>;
    case 6:
      return decode_block<Core, 6, kCentred>;
    default:
      return decode_block<Core, 7, kCentred>;
  }
}

// Decodes `blocks` blocks of a strip of `tiles` tiles to blocks of 8 bits.
template <class Core>
void decode_strip(int bits, const uint8_t* packed, int64_t tiles, int64_t blocks, uint8_t* bytes) {
  const BlockDecoder decode = block_decoder<Core, false>(bits);
  const int64_t stride = tiles * kRowBytes;
  for (int64_t i = 0; i < blocks; ++i, packed += bits * stride, bytes += kQuads * stride)
    for (int64_t tile = 0; tile < tiles; ++tile)
      decode(packed + tile * kRowBytes, bytes + tile * kRowBytes, stride, 0);
}

}  // namespace
}  // namespace compressed_linear::cpu
