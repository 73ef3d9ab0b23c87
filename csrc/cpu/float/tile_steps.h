// SPDX-License-Identifier: Apache-2.0
// The order of the AMX engine's work, and what it does in the shadow of tile products, see
// tile_unit.h: decoding codes, fetching memory, and scaling sums.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/common/amx_tiles.h"
#include "decode_avx512bf16.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;  // of a decoded block

static_assert(kBlock / 2 == kTileRows && kTile * 4 == kTileRowBytes && kRowBytes == kTileRowBytes,
              "a block of bf16 pairs is a tile register");

// A strip's part of a chunk.
struct TileStage {
  int64_t tile, tiles, chunk;
  int64_t block_begin, block_end;  // chunks
  float* scale;                    // [segment][tile][16]
  float* negated_offset;           // the same, or null
};

// The order of stages: K in blocks, so that x of all panels stays in the second-level cache; in a
// block all strips; of a strip the block's chunks, in the order of memory.
struct TileWalk {
  int64_t tile0, tile1, chunks, block_chunks;

  TileStage begin() const {
    TileStage stage{};
    stage.block_end = least(block_chunks, chunks);
    enter(stage, tile0);
    return stage;
  }
  // Behind the last stage, `chunk` is the number of chunks.
  void advance(TileStage& stage) const {
    if (++stage.chunk < stage.block_end) return;
    if (stage.tile + stage.tiles < tile1) return enter(stage, stage.tile + stage.tiles);
    stage.block_begin = stage.block_end;
    stage.block_end = least(stage.block_end + block_chunks, chunks);
    enter(stage, tile0);
  }

 private:
  void enter(TileStage& stage, int64_t tile) const {
    stage.tile = tile;
    stage.tiles = least(tile1 - tile, kStrip);
    stage.chunk = stage.block_begin;
  }
};

// Decodes the next stage's blocks into the places of those that are done with, step by step of K.
class BlockDecoder {
 public:
  explicit BlockDecoder(const Problem& p) : table_(p), decode_(function(p)) {}

  // Whether blocks are multiplied as they lie in memory.
  bool plain() const { return decode_ == nullptr; }

  // from: the first step's blocks, `stride` bytes from step to step. slab: [step][kStrip]
  void begin(const uint8_t* from, int64_t stride, uint8_t* slab, int64_t blocks, int64_t steps) {
    from_ = from;
    stride_ = stride;
    to_ = slab;
    blocks_ = blocks;
    left_ = steps;
  }
  // One step more.
  [[gnu::always_inline]] void step() {
    if (left_ == 0) return;
    --left_;
    decode_(from_, blocks_, table_, to_);
    from_ += stride_;
    to_ += kStrip * kTileBytes;
  }
  void finish() {
    while (left_ > 0) step();
  }

 private:
  using Function = void (*)(const uint8_t*, int64_t, const Table&, uint8_t*);

  // `count` blocks that follow each other.
  template <class Code>
  static void decode_blocks(const uint8_t* from, int64_t count, const Table& table, uint8_t* to) {
    for (; count > 0; --count, from += kRowBytes * Code::kBits, to += kTileBytes)
      decode_block<Code>(from, table, to, std::make_integer_sequence<int, kPairs>());
  }

  static Function function(const Problem& p) {
    if (p.weight.geometry.element.kind == Kind::bfloat16) return nullptr;
    return with_decoder(p.weight.geometry.element,
                        [](auto code) -> Function { return &decode_blocks<decltype(code)>; });
  }

  const Table table_;
  const Function decode_;
  const uint8_t* from_ = nullptr;
  uint8_t* to_ = nullptr;
  int64_t stride_ = 0, blocks_ = 0, left_ = 0;
};

// Fetches memory into the first-level cache, a share at each step.
class Fetcher {
 public:
  // In `steps` steps.
  void begin(const uint8_t* at, int64_t bytes, int64_t steps) {
    at_ = at;
    end_ = at + bytes;
    share_ = (bytes + steps * kRowBytes - 1) / (steps * kRowBytes) * kRowBytes;
  }
  [[gnu::always_inline]] void step() {
    const uint8_t* at = at_;
    const uint8_t* stop = end_ - at < share_ ? end_ : at + share_;
    for (; at < stop; at += kRowBytes) _mm_prefetch(at, _MM_HINT_T0);
    at_ = at;
  }

 private:
  const uint8_t *at_ = nullptr, *end_ = nullptr;
  int64_t share_ = 0;
};

// What remains to be done with the sums of a block.
struct PendingSums {
  const float* sums;            // [row][columns][16]
  float* totals;                // [row] total_stride apart: [columns][16]
  const float* scale;           // [columns][16]
  const float* negated_offset;  // the same, or null
  const float* row_sums;        // [row]
  int64_t rows = 0, total_stride;
  int columns = 0;
};

// Scales sums and adds them to the totals, some rows at a time.
template <int Columns, bool Offset>
class Scaling {
 public:
  [[gnu::always_inline]] explicit Scaling(const PendingSums& p)
      : sums_(p.sums),
        totals_(p.totals),
        row_sums_(p.row_sums),
        stride_(p.total_stride),
        rows_(p.rows) {
    if (rows_ == 0) return;
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) {
      scale_[c] = _mm512_loadu_ps(p.scale + c * kTile);
      if (Offset) offset_[c] = _mm512_loadu_ps(p.negated_offset + c * kTile);
    }
  }
  [[gnu::always_inline]] void step(int64_t count) {
    for (count = least(count, rows_), rows_ -= count; count > 0; --count) row();
  }
  // The same where that many rows are known to be left.
  template <int Count>
  [[gnu::always_inline]] void some() {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) row();
  }
  [[gnu::always_inline]] void finish() { step(rows_); }

 private:
  [[gnu::always_inline]] void row() {
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) {
      __m512 sum = _mm512_load_ps(sums_ + c * kTile);
      if (Offset) sum = _mm512_fmadd_ps(_mm512_set1_ps(*row_sums_), offset_[c], sum);
      float* total = totals_ + c * kTile;
      _mm512_store_ps(total, _mm512_fmadd_ps(scale_[c], sum, _mm512_load_ps(total)));
    }
    sums_ += Columns * kTile;
    totals_ += stride_;
    if (Offset) ++row_sums_;
  }

  const float* sums_;
  float* totals_;
  const float* row_sums_;
  int64_t stride_, rows_;
  __m512 scale_[Columns], offset_[Columns];
};

}  // namespace
}  // namespace compressed_linear::cpu
