// SPDX-License-Identifier: Apache-2.0
#include "marlin_scales.h"

#include <cstring>

namespace compressed_linear::cpu {
namespace {

const uint8_t* value_at(const MarlinValues& v, int64_t n, int64_t group) {
  return v.data + (n * v.n_stride + group * v.group_stride) * v.element_bytes;
}

template <class Value>
void move_scales(const MarlinValues& from, MarlinColumns columns, int64_t tile_begin,
                 int64_t tile_end, Value* out) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    int64_t channels[marlin::kTileN];
    for (int64_t i = 0; i < marlin::kTileN; ++i)
      channels[i] = marlin_channel(columns, tile * marlin::kTileN + i);
    for (int64_t group = 0; group < from.groups; ++group) {
      Value* row = out + group * from.n + tile * marlin::kTileN;
      for (int64_t i = 0; i < marlin::kTileN; ++i)
        std::memcpy(row + i, value_at(from, channels[i], group), sizeof(Value));
    }
  }
}

}  // namespace

void marlin_scales(const MarlinValues& from, MarlinColumns columns, int64_t tile_begin,
                   int64_t tile_end, uint8_t* out) {
  if (from.element_bytes == 1) return move_scales(from, columns, tile_begin, tile_end, out);
  if (from.element_bytes == 2)
    return move_scales(from, columns, tile_begin, tile_end, reinterpret_cast<uint16_t*>(out));
  move_scales(from, columns, tile_begin, tile_end, reinterpret_cast<uint32_t*>(out));
}

bool marlin_zeros(const MarlinValues& from, int bits, int64_t tile_begin, int64_t tile_end,
                  uint32_t* out) {
  const int per_word = marlin::codes_per_word(bits);
  const int64_t tile_words = marlin::kTileN / per_word, row_words = from.n / per_word;
  uint32_t all = 0;
  for (int64_t group = 0; group < from.groups; ++group)
    for (int64_t word = tile_begin * tile_words; word < tile_end * tile_words; ++word) {
      uint32_t packed = 0;
      for (int slot = 0; slot < per_word; ++slot) {
        const uint32_t zero = *value_at(from, marlin::zero_channel(bits, word, slot), group);
        all |= zero;
        packed |= zero << (slot * bits);
      }
      out[group * row_words + word] = packed;
    }
  return all >> bits == 0;
}

}  // namespace compressed_linear::cpu
