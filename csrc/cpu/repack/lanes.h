// SPDX-License-Identifier: Apache-2.0
// Where the codes of a strip lie in a stored row of k_major, whose channels are side by side: found
// once for all rows. Registers V as in loop.h.
#pragma once

#include <algorithm>

#include "repack.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

template <class V>
struct LaneFinder {
  using Reg = typename V::Reg;
  static constexpr int64_t kLanes = V::kLanes, kParts = kTile / kLanes;

  const CodeSource& s;

  // Where the codes of kLanes output channels lie in a stored row of k_major: words of a window of
  // kLanes words, and the bits in them. `next` is where a code ends that begins in `index`.
  struct Lanes {
    Reg index, next, shift, up;
  };
  // What the lanes of a strip have in common for one plane.
  struct StripWindow {
    int64_t byte;  // where the window begins, if one holds the whole strip, else -1
    int64_t bytes[kStrip * kParts];  // each part's own
    bool straddle;
  };

  // False if the codes of kLanes channels do not lie within one window. Channels that are not
  // stored take another's place.
  bool find_lanes(int64_t channel, int plane, int64_t byte, Lanes& found, bool& straddle) const {
    alignas(64) uint32_t index[kLanes], next[kLanes], shift[kLanes], up[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t from = static_cast<uint32_t>(bit_of(channel + lane, plane) - byte * 8);
      index[lane] = from / 32;
      next[lane] = (from + static_cast<uint32_t>(s.widths[plane]) - 1) / 32;
      shift[lane] = from % 32;
      up[lane] = 32 - shift[lane];  // a shift by 32 gives 0
      if (next[lane] >= kLanes) return false;
      straddle = straddle || next[lane] != index[lane];
    }
    found = {V::load(index), V::load(next), V::load(shift), V::load(up)};
    return true;
  }

  int64_t bit_of(int64_t channel, int plane) const {
    return s.n_at[plane * s.rows + std::min(channel, s.rows - 1)];
  }

  int64_t first_byte(int64_t channel, int64_t count, int plane) const {
    int64_t bit = INT64_MAX;
    for (int64_t i = 0; i < count; ++i) bit = std::min(bit, bit_of(channel + i, plane));
    return bit / 8;
  }

  bool find_strip(int64_t channel, int plane, Lanes* lanes, StripWindow& window) const {
    constexpr int64_t kStripParts = kStrip * kParts;
    window.byte = first_byte(channel, kStrip * kTile, plane);
    window.straddle = false;
    bool shared = true;
    for (int64_t part = 0; shared && part < kStripParts; ++part)
      shared =
          find_lanes(channel + part * kLanes, plane, window.byte, lanes[part], window.straddle);
    if (shared) return true;
    window.byte = -1;
    for (int64_t part = 0; part < kStripParts; ++part) {
      const int64_t first = channel + part * kLanes;
      window.bytes[part] = first_byte(first, kLanes, plane);
      if (!find_lanes(first, plane, window.bytes[part], lanes[part], window.straddle)) return false;
    }
    return true;
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
