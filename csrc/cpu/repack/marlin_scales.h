// SPDX-License-Identifier: Apache-2.0
// Scales and zero points in Marlin's order (layouts/marlin.h). Codes go through repack.h, with
// PackedLayout::marlin. Free of torch.
#pragma once

#include <cstdint>

#include "layouts/marlin.h"

namespace compressed_linear::cpu {

// Orders of the output channels in a row of scales.
enum class MarlinColumns : uint8_t {
  grouped,  // of groups of input channels
  channel,  // of whole channels; also of a bias
  byte,     // of groups, in one byte each
};

// The output channel of `column` of a row. Also called by the CUDA kernels.
COMPRESSED_LINEAR_LAYOUT int64_t marlin_channel(MarlinColumns columns, int64_t column) {
  if (columns == MarlinColumns::channel) return marlin::channel_of_channel_column(column);
  if (columns == MarlinColumns::byte) column = marlin::byte_column(column);
  return marlin::channel_of_grouped_column(column);
}

// Values [N, G] of a checkpoint, in whatever strides (in elements).
struct MarlinValues {
  const uint8_t* data;
  int64_t element_bytes;  // 1, 2 or 4
  int64_t n, groups;
  int64_t n_stride, group_stride;
};

// Of output channels [64 * tile_begin, 64 * tile_end): scales into `out` [G, N].
void marlin_scales(const MarlinValues& from, MarlinColumns columns, int64_t tile_begin,
                   int64_t tile_end, uint8_t* out);

// The same of zero points of one byte into words [G, N * bits / 32]. Returns false where one has
// more than `bits` bits.
bool marlin_zeros(const MarlinValues& from, int bits, int64_t tile_begin, int64_t tile_end,
                  uint32_t* out);

}  // namespace compressed_linear::cpu
