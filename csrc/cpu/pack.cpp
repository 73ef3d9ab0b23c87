// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

namespace compressed_linear::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lanes are read and written whole");

// Moves four fields of Width bits that lie 16 bits apart next to each other.
template <int Width>
uint32_t compress(uint64_t fields) {
  constexpr uint64_t kTwo = (uint64_t{1} << (2 * Width)) - 1;
  fields = (fields | fields >> (16 - Width)) & (kTwo * 0x100000001u);
  return static_cast<uint32_t>((fields | fields >> (32 - 2 * Width)) &
                               ((uint64_t{1} << (4 * Width)) - 1));
}

// Bits [shift, shift + Width) of each of eight codes: those of even channels to the low half of the
// result, those of odd ones to the high half, lowest channel first.
template <int Width>
uint32_t gather_plane(const uint8_t* codes, int shift) {
  constexpr uint64_t kMask = ((uint64_t{1} << Width) - 1) * 0x0001000100010001u;
  uint64_t word;
  std::memcpy(&word, codes, 8);
  word >>= shift;
  return compress<Width>(word & kMask) | compress<Width>((word >> 8) & kMask) << 16;
}

template <int Width>
void put_plane(const uint8_t* codes, int shift, uint8_t* plane, int64_t channel) {
  constexpr int kEights = 4 / Width;  // groups of eight input channels per row of the plane
  for (int64_t row = 0; row < Width; ++row) {
    uint32_t lane = 0;
    for (int i = 0; i < kEights; ++i)
      lane |= gather_plane<Width>(codes + 8 * (row * kEights + i), shift) << (4 * Width * i);
    std::memcpy(plane + row * kRowBytes + channel * 4, &lane, 4);
  }
}

void put_codes(const uint8_t* codes, int bits, uint8_t* block, int64_t channel) {
  if (bits == 8) {
    for (int64_t pair = 0; pair < kPairs; ++pair)
      for (int64_t i = 0; i < 2; ++i)
        block[(pair * kTile + channel) * 2 + i] = codes[2 * pair + i] ^ 0x80u;
    return;
  }
  int shift = 0;
  if (bits & 4) {
    put_plane<4>(codes, shift, block, channel);
    block += 4 * kRowBytes;
    shift += 4;
  }
  if (bits & 2) {
    put_plane<2>(codes, shift, block, channel);
    block += 2 * kRowBytes;
    shift += 2;
  }
  if (bits & 1) put_plane<1>(codes, shift, block, channel);
}

// Where float (k, channel) of a block lies.
int64_t float_index(Kind kind, int64_t k, int64_t channel) {
  const bool paired = kind != Kind::float16 && kind != Kind::float32;
  return paired ? (k / 2 * kTile + channel) * 2 + k % 2 : k * kTile + channel;
}

int64_t row_element_bytes(Element element) {
  return element.kind == Kind::integer ? 1 : element.bits / 8;
}

// The code of one weight.
uint32_t code_at(const uint8_t* block, int bits, int64_t channel, int64_t k) {
  if (bits == 8) return block[(k / 2 * kTile + channel) * 2 + k % 2] ^ 0x80u;
  uint32_t code = 0;
  int shift = 0;
  for (const int width : {4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const int64_t per_half = 16 / width, pair = k / 2;
    uint32_t lane;
    std::memcpy(&lane, block + pair / per_half * kRowBytes + channel * 4, 4);
    lane >>= 16 * (k % 2) + width * (pair % per_half);
    code |= (lane & ((1u << width) - 1)) << shift;
    block += width * kRowBytes;
    shift += width;
  }
  return code;
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(data),
                  to = from + static_cast<uintptr_t>(bytes);
  const uintptr_t begin = (from + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = to / kHugePage * kHugePage;
  // A kernel without huge pages refuses, and nothing is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void pack_tiles(const Geometry& g, const void* rows, int64_t row_begin, int64_t row_end,
                int64_t tile_begin, int64_t tile_end, uint8_t* packed) {
  const int64_t unit = row_element_bytes(g.element);
  const bool integer = g.element.kind == Kind::integer;
  const uint8_t zero = integer ? static_cast<uint8_t>(1u << (g.element.bits - 1)) : 0;
  const int64_t line_bytes = g.padded_k * unit;
  std::vector<uint8_t> lines(static_cast<size_t>(kTile * line_bytes));
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    std::fill(lines.begin(), lines.end(), zero);
    for (int64_t channel = 0; channel < kTile; ++channel) {
      const int64_t row = tile * kTile + channel;
      if (row < row_begin || row >= row_end) continue;
      const uint8_t* from = static_cast<const uint8_t*>(rows) + (row - row_begin) * g.k * unit;
      uint8_t* to = lines.data() + channel * line_bytes;
      for (int64_t group = 0; group < g.groups; ++group)
        std::memcpy(to + group * g.padded_group * unit, from + group * g.group * unit,
                    static_cast<size_t>(g.group * unit));
    }
    uint8_t* block = packed + g.block_at(tile, 0);
    for (int64_t k = 0; k < g.padded_k; k += kBlock, block += g.block_stride(tile))
      for (int64_t channel = 0; channel < kTile; ++channel) {
        const uint8_t* values = lines.data() + channel * line_bytes + k * unit;
        if (integer) {
          put_codes(values, g.element.bits, block, channel);
        } else {
          for (int64_t i = 0; i < kBlock; ++i)
            std::memcpy(block + float_index(g.element.kind, i, channel) * unit, values + i * unit,
                        static_cast<size_t>(unit));
        }
      }
  }
}

void unpack_tiles(const Geometry& g, const uint8_t* packed, int64_t tile_begin, int64_t tile_end,
                  void* rows) {
  const int64_t unit = row_element_bytes(g.element);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile)
    for (int64_t row = tile * kTile; row < std::min((tile + 1) * kTile, g.n); ++row) {
      uint8_t* to = static_cast<uint8_t*>(rows) + row * g.k * unit;
      for (int64_t channel = 0; channel < g.k; ++channel) {
        const int64_t at = g.position(channel);
        const uint8_t* block = packed + g.block_at(tile, at);
        if (g.element.kind == Kind::integer) {
          to[channel] =
              static_cast<uint8_t>(code_at(block, g.element.bits, row % kTile, at % kBlock));
        } else {
          std::memcpy(to + channel * unit,
                      block + float_index(g.element.kind, at % kBlock, row % kTile) * unit,
                      static_cast<size_t>(unit));
        }
      }
    }
}

}  // namespace compressed_linear::cpu
