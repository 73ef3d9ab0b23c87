// SPDX-License-Identifier: Apache-2.0
// What a core does on the side while its tile registers multiply: it fetches the weights that come
// next, or decodes them. A share of it goes with every product of two tiles.
#pragma once

#include "call.h"
#include "decode.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

class Ahead {
 public:
  explicit Ahead(BlockDecoder decode) : decode_(decode) {}

  // Fetches `bytes` from `from` on, over so many products.
  void fetch(const uint8_t* from, int64_t bytes, int64_t products) {
    left_ = 0;
    fetch_ = from;
    lines_ = (bytes / kRowBytes + products - 1) / products;
  }
  // For the loops that fetch themselves: lines for each product, where they begin, and have ended.
  int64_t lines() const { return lines_; }
  const uint8_t* lines_from() const { return fetch_; }
  void fetched(const uint8_t* end) { fetch_ = end; }
  void fetch_share(int64_t products) {
    for (int64_t i = products * lines_; i > 0; --i, fetch_ += kRowBytes)
      __builtin_prefetch(fetch_, 0, 2);
  }

  // Decodes `blocks` blocks of `tiles` tiles to blocks of 8 bits, and fetches codes behind them.
  void decode(const uint8_t* packed, uint8_t* bytes, int bits, uint32_t middles, int64_t tiles,
              int64_t blocks, int64_t products) {
    from_ = packed;
    to_ = bytes;
    bits_ = bits;
    middles_ = middles;
    stride_ = tiles * kRowBytes;
    offset_ = credit_ = lines_ = 0;
    items_ = left_ = tiles * blocks;
    products_ = products;
  }

  // The share of so many products of what is decoded.
  void decode_share(int64_t products) {
    credit_ += products * items_;
    for (; credit_ >= products_ && left_ > 0; credit_ -= products_) item();
  }

  // All that is left.
  void finish() {
    while (left_ > 0) item();
  }

 private:
  void item() {
    --left_;
    const uint8_t* next = from_ + offset_ * bits_ + kNearBytes;
    for (int line = 0; line < bits_; ++line) __builtin_prefetch(next + line * kRowBytes, 0, 2);
    decode_(from_ + offset_, to_ + offset_, stride_, middles_);
    offset_ += kRowBytes;
    if (offset_ < stride_) return;
    offset_ = 0;
    from_ += bits_ * stride_;
    to_ += kQuads * stride_;
  }

  const BlockDecoder decode_;
  const uint8_t* from_ = nullptr;
  uint8_t* to_ = nullptr;
  int64_t stride_ = 0, offset_ = 0;  // of rows; of the tile in a row
  int bits_ = 0;
  uint32_t middles_ = 0;
  int64_t lines_ = 0;
  const uint8_t* fetch_ = nullptr;
  int64_t items_ = 0, left_ = 0, products_ = 1, credit_ = 0;
};

}  // namespace
}  // namespace compressed_linear::cpu
