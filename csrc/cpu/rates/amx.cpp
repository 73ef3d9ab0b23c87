// SPDX-License-Identifier: Apache-2.0
#include "cpu/common/amx_tiles.h"
#include "rates.h"

namespace compressed_linear::cpu {

RateLoops rates_amx;

namespace {

// Four full products of tiles of zeros, which take as long as any.
constexpr int64_t kProducts = 4;

template <bool Bytes, int C, int A, int B>
void product() {
  if constexpr (Bytes)
    HardwareTiles::dot_bytes<C, A, B>();
  else
    HardwareTiles::dot_bf16<C, A, B>();
}

template <bool Bytes>
void spin_tiles(int64_t rounds) {
  TileConfig config;
  for (int tile = 0; tile < kTileCount; ++tile) config.set(tile, kTileRows, kTileRowBytes);
  HardwareTiles::configure(config);  // it zeroes them
  for (; rounds > 0; --rounds) {
    product<Bytes, 0, 4, 6>();
    product<Bytes, 1, 4, 7>();
    product<Bytes, 2, 5, 6>();
    product<Bytes, 3, 5, 7>();
  }
  HardwareTiles::release();
}

}  // namespace

const std::vector<RateLoop>& rates_amx() {
  static const std::vector<RateLoop> loops = {
      {"tile_bf16", kProducts, spin_tiles<false>},
      {"tile_int8", kProducts, spin_tiles<true>},
  };
  return loops;
}

}  // namespace compressed_linear::cpu
