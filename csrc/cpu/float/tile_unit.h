// SPDX-License-Identifier: Apache-2.0
// A unit of work of the AMX engine: panels of rows times strips of channels. A tile product takes
// sixteen cycles or more and needs no vector unit, so all else is done in its shadow, a share
// behind each step of K:
//
//   decoding   the next chunk's codes become bf16 pairs, in the order of memory and in the place of
//              those that no panel needs any more: a chunk of a strip, decoded, is a third of the
//              first-level cache, and two would drive x and the totals out of it
//   scaling    the sums of the block before are multiplied by their scales and added to the totals,
//              while those of this block still grow
//
// A block is the sums of up to 32 rows and two tiles of channels, or of up to 16 rows and four,
// over one segment. Tiles is one of common/amx_tiles.h. Included by units compiled for AVX-512 with
// BF16.
#pragma once

#include "cpu/common/arena.h"
#include "cpu/common/panels.h"
#include "cpu/common/rows.h"
#include "tile_steps.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kTileWords = kBlock / 2;        // of a row of x in a block
constexpr int64_t kUsualSteps = kChunk / kBlock;  // of a segment
constexpr int64_t kMostTileParts = 3;             // of x
constexpr int64_t kInputBytes = 512 << 10;        // of x that strips take in turn

// Multiplies panels by strips of a call, see driver.h.
template <class Tiles>
class TileUnit {
 public:
  static constexpr int64_t kRows = TileGrid<Tiles>::kRows;

  explicit TileUnit(const Problem& p)
      : p_(p), decoder_(p), direct_(p.weight.geometry.groups == 1 && !has_offset(p)) {}
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

  template <class Call>
  void multiply(const Call& call, int64_t panel0, int64_t panel1, int64_t tile0, int64_t tile1) {
    const Geometry& g = call.g;
    const int64_t row0 = call.panels.begin(panel0), rows = call.panels.begin(panel1) - row0;
    const int64_t chunks = chunk_count(g), tiles = tile1 - tile0;
    int64_t most_segments = 0;
    for (int64_t c = 0; c < chunks; ++c)
      most_segments = greatest(most_segments, call.chunk_first[c + 1] - call.chunk_first[c]);
    const int64_t numbers = most_segments * kStrip * kTile;
    float *scale[2], *negated_offset[2], *totals = nullptr;
    carve_from(worker_arena(), [&](Carver& carver) {
      slab_ = carver.take<uint8_t>(decoder_.plain() ? 0 : kUsualSteps * kStrip * kTileBytes);
      totals = carver.take<float>(rows * tiles * kTile);
      for (int i = 0; i < 2; ++i) {
        scale[i] = carver.take<float>(numbers);
        negated_offset[i] = carver.take<float>(call.offset ? numbers : 0);
      }
    });
    std::memset(totals, 0, static_cast<size_t>(rows * tiles * kTile) * sizeof(float));

    const int64_t row_bytes = call.parts * kChunk * 2;
    const TileWalk walk{tile0, tile1, chunks, greatest(kInputBytes / (rows * row_bytes), 1)};
    TileStage next = walk.begin();
    if (!decoder_.plain()) {
      begin_decoding(next);
      decoder_.finish();
    }
    for (int turn = 0; next.chunk < chunks; turn = 1 - turn) {
      TileStage stage = next;
      stage.scale = scale[turn];
      stage.negated_offset = call.offset ? negated_offset[turn] : nullptr;
      load_numbers(call, stage);
      walk.advance(next);
      if (next.chunk < chunks && !decoder_.plain()) begin_decoding(next);
      // What is decoded while the next stage is multiplied, or multiplied then.
      TileStage fetched = next;
      if (!decoder_.plain() && next.chunk < chunks) walk.advance(fetched);
      if (fetched.chunk < chunks)
        fetcher_.begin(block_of(p_.weight, fetched.tile, fetched.chunk * kChunk),
                       steps_of(g, fetched.chunk) * g.block_stride(fetched.tile),
                       steps_of(g, stage.chunk) * (panel1 - panel0) * blocks_in_row(stage, rows));
      float* strip = totals + (stage.tile - tile0) * kTile * rows;
      for (int64_t panel = panel0; panel < panel1; ++panel)
        multiply_panel(call, stage, panel, panel + 1 == panel1,
                       strip + (call.panels.begin(panel) - row0) * stage.tiles * kTile);
      decoder_.finish();
    }
    finish_pending();
    for (int64_t tile = tile0; tile < tile1; tile += kStrip) {
      const int64_t width = least(tile1 - tile, kStrip) * kTile;
      float* strip = totals + (tile - tile0) * kTile * rows;
      if (direct_) scale_totals(tile, width, rows, strip);
      for (int64_t r = 0; r < rows; ++r)
        store_row(p_, call.row0 + row0 + r, tile * kTile, width, strip + r * width);
    }
  }

 private:
  // What becomes of a block's sums.
  enum class Ends { scale, offset, direct };

  // What a block is made of, over one segment.
  struct Block {
    const uint32_t* x;       // [block][part][row][word]
    const uint8_t* weights;  // [block] weight_stride apart: [tile]
    int64_t steps, rows, parts, weight_stride;
    int64_t done;   // of the steps, that no other segment and no other panel needs
    float* totals;  // [row] total_stride apart
    int64_t total_stride;
  };

  // Blocks side by side, see multiply_panel.
  static int64_t blocks_in_row(const TileStage& stage, int64_t rows) {
    return rows > kTileRows ? (stage.tiles + 1) / 2
                            : stage.tiles / 4 + stage.tiles % 4 / 2 + stage.tiles % 2;
  }

  static int64_t steps_of(const Geometry& g, int64_t chunk) {
    return least(g.padded_k - chunk * kChunk, kChunk) / kBlock;
  }

  void begin_decoding(const TileStage& stage) {
    const Geometry& g = p_.weight.geometry;
    decoder_.begin(block_of(p_.weight, stage.tile, stage.chunk * kChunk),
                   g.block_stride(stage.tile), slab_, stage.tiles, steps_of(g, stage.chunk));
  }

  // Scales of the groups to come.
  void fetch_scales(int64_t tile, int64_t group) const {
    const TileNumbers& scale = p_.weight.scale;
    if (scale.data == nullptr) return;
    const char* at =
        static_cast<const char*>(scale.data) + scale.at(tile, group) * size_of(scale.type);
    _mm_prefetch(at + 4 * kRowBytes, _MM_HINT_T0);
  }

  template <class Call>
  void load_numbers(const Call& call, const TileStage& stage) const {
    const int64_t first = call.chunk_first[stage.chunk];
    const int64_t count = call.chunk_first[stage.chunk + 1] - first;
    for (int64_t s = 0; s < count; ++s)
      for (int64_t t = 0; t < stage.tiles; ++t) {
        const int64_t group = call.segments[first + s].group, at = (s * stage.tiles + t) * kTile;
        __m512 one[1];
        fetch_scales(stage.tile + t, group);
        load_scales(p_, stage.tile + t, group, one);
        _mm512_store_ps(stage.scale + at, one[0]);
        if (!call.offset) continue;
        load_negated_offsets(p_, stage.tile + t, group, one);
        _mm512_store_ps(stage.negated_offset + at, one[0]);
      }
  }

  template <class Call>
  void multiply_panel(const Call& call, const TileStage& stage, int64_t panel, bool last,
                      float* totals) {
    const int64_t begin = call.panels.begin(panel), rows = call.panels.rows(panel);
    const int64_t first = call.chunk_first[stage.chunk];
    const int64_t count = call.chunk_first[stage.chunk + 1] - first;
    const uint32_t* chunk_x = call.x + begin * call.row_words +
                              stage.chunk * (kChunk / kBlock) * call.parts * rows * kTileWords;
    const uint8_t* weights = slab_;
    int64_t weight_stride = kStrip * kTileBytes;
    if (decoder_.plain()) {
      weights = block_of(p_.weight, stage.tile, stage.chunk * kChunk);
      weight_stride = p_.weight.geometry.block_stride(stage.tile);
    }
    grid_.configure(rows, kTileRowBytes);
    for (int64_t s = 0; s < count; ++s) {
      const Segment segment = call.segments[first + s];
      const int64_t low = segment.begin / kBlock, high = (segment.end + kBlock - 1) / kBlock;
      Block block{chunk_x + low * call.parts * rows * kTileWords,
                  weights + low * weight_stride,
                  high - low,
                  rows,
                  call.parts,
                  weight_stride,
                  0,
                  totals,
                  stage.tiles * kTile};
      if (segment.begin % kBlock != 0 || segment.end % kBlock != 0)
        block.x = only(segment, block.x, low, high, call.parts * rows);
      PendingSums sums;
      sums.sums = sums_;
      sums.row_sums =
          call.offset ? call.row_sums + begin * call.segment_count + (first + s) * rows : nullptr;
      sums.rows = rows;
      sums.total_stride = block.total_stride;
      const auto run = [&](int64_t t, auto row_tiles, auto columns) {
        if (last && t + columns == stage.tiles) block.done = segment.end / kBlock - low;
        multiply_block_of<row_tiles, columns>(block, call.offset);
        block.weights += columns * kTileBytes;
        block.totals += columns * kTile;
        if (direct_) return;
        const int64_t at = (s * stage.tiles + t) * kTile;
        sums.totals = totals + t * kTile;
        sums.scale = stage.scale + at;
        sums.negated_offset = call.offset ? stage.negated_offset + at : nullptr;
        sums.columns = columns;
        pending_ = sums;
      };
      int64_t t = 0;
      if (rows > kTileRows) {
        for (; t + 2 <= stage.tiles; t += 2) run(t, kTwo, kTwo);
        if (t < stage.tiles) run(t, kTwo, kOne);
      } else {
        for (; t + 4 <= stage.tiles; t += 4) run(t, kOne, kFour);
        for (; t + 2 <= stage.tiles; t += 2) run(t, kOne, kTwo);
        if (t < stage.tiles) run(t, kOne, kOne);
      }
    }
  }

  template <int RowTiles, int Columns>
  void multiply_block_of(const Block& block, bool offset) {
    if (pending_.columns != Columns) finish_pending();
    const bool usual =
        block.steps == kUsualSteps && block.parts == 1 && pending_.rows == RowTiles * kTileRows;
    if (direct_) {
      block.steps == kUsualSteps&& block.parts == 1
          ? multiply_block<RowTiles, Columns, Ends::direct, true>(block)
          : multiply_block<RowTiles, Columns, Ends::direct, false>(block);
    } else if (offset) {
      usual ? multiply_block<RowTiles, Columns, Ends::offset, true>(block)
            : multiply_block<RowTiles, Columns, Ends::offset, false>(block);
    } else {
      usual ? multiply_block<RowTiles, Columns, Ends::scale, true>(block)
            : multiply_block<RowTiles, Columns, Ends::scale, false>(block);
    }
  }

  // x of the blocks that a segment touches, with zeros in place of other segments. lines: of a
  // block
  const uint32_t* only(Segment segment, const uint32_t* x, int64_t first, int64_t last,
                       int64_t lines) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t word = 0; word < kTileWords; ++word) {
        const int64_t channel = i * kBlock + 2 * word;
        const bool inside = channel >= segment.begin && channel < segment.end;
        for (int64_t line = 0; line < lines; ++line) {
          const int64_t at = ((i - first) * lines + line) * kTileWords + word;
          cut_[at] = inside ? x[at] : 0;
        }
      }
    return cut_;
  }

  // Registers: 0 to 3 sums [row tile][column], 4 x, 5 x or weights, 6 and 7 weights. Scales the
  // pending sums and leaves its own in their place. Usual: whole chunks of bf16 and full tiles of
  // rows.
  template <int RowTiles, int Columns, Ends kEnds, bool Usual>
  void multiply_block(const Block& block) {
    const int64_t steps = Usual ? kUsualSteps : block.steps, parts = Usual ? 1 : block.parts;
    const int64_t weight_stride = block.weight_stride;
    const int64_t part_words = block.rows * kTileWords, done = block.done;
    // What was stored a moment ago must leave the store buffer before it can be read.
    const int64_t settled = Usual ? kUsualSteps / 2 : steps / 2;
    const int64_t share = (pending_.rows + steps - settled - 1) / (steps - settled);
    Scaling<Columns, kEnds == Ends::offset> scaling(pending_);
    if constexpr (kEnds == Ends::direct) {
      for_sums<RowTiles, Columns>([&block](auto c, auto row, auto column) {
        Tiles::template load<c>(total_of(block, row, column), block.total_stride * 4);
      });
    } else {
      for_sums<RowTiles, Columns>([](auto c, auto, auto) { Tiles::template zero<c>(); });
    }
    const uint32_t* x = block.x;
    const uint8_t* weights = block.weights;
#pragma GCC unroll 4
    for (int64_t i = 0; i < steps; ++i, weights += weight_stride) {
      if constexpr (RowTiles > 1) {
        Tiles::template load<6>(weights, kTileRowBytes);
        if constexpr (Columns > 1) Tiles::template load<7>(weights + kTileBytes, kTileRowBytes);
      }
      for (int64_t part = 0; part < parts; ++part, x += part_words) {
        Tiles::template load<4>(x, kTileRowBytes);
        if constexpr (RowTiles == 1) {
          for_sums<1, Columns>([weights](auto c, auto, auto column) {
            constexpr int kWeights = 5 + column % 3;
            Tiles::template load<kWeights>(weights + column * kTileBytes, kTileRowBytes);
            Tiles::template dot_bf16<c, 4, kWeights>();
          });
        } else {
          Tiles::template load<5>(x + kTileRows * kTileWords, kTileRowBytes);
          Tiles::template dot_bf16<0, 4, 6>();
          if constexpr (Columns > 1) Tiles::template dot_bf16<1, 4, 7>();
          Tiles::template dot_bf16<2, 5, 6>();
          if constexpr (Columns > 1) Tiles::template dot_bf16<3, 5, 7>();
        }
      }
      fetcher_.step();
      if constexpr (kEnds != Ends::direct) {
        if (i >= settled) {
          if constexpr (Usual) {
            scaling.template some<RowTiles * kTileRows * 2 / kUsualSteps>();
          } else {
            scaling.step(share);
          }
        }
      }
      if (i < done && !decoder_.plain()) decoder_.step();
    }
    if constexpr (kEnds == Ends::direct) {
      for_sums<RowTiles, Columns>([&block](auto c, auto row, auto column) {
        Tiles::template store<c>(total_of(block, row, column), block.total_stride * 4);
      });
    } else {
      if constexpr (!Usual) scaling.finish();
      for_sums<RowTiles, Columns>([this](auto c, auto row, auto column) {
        Tiles::template store<c>(sums_ + (row * kTileRows * Columns + column) * kTile,
                                 Columns * kTileRowBytes);
      });
    }
  }

  static float* total_of(const Block& block, int64_t row_tile, int64_t column) {
    return block.totals + row_tile * kTileRows * block.total_stride + column * kTile;
  }

  // The scales of a whole row of K, once for all of it.
  void scale_totals(int64_t tile, int64_t width, int64_t rows, float* totals) const {
    if (p_.weight.scale.data == nullptr) return;
    for (int64_t at = 0; at < width; at += kTile) {
      __m512 scale[1];
      load_scales(p_, tile + at / kTile, 0, scale);
      for (int64_t r = 0; r < rows; ++r) {
        float* total = totals + r * width + at;
        _mm512_store_ps(total, _mm512_mul_ps(scale[0], _mm512_load_ps(total)));
      }
    }
  }

  void finish_pending() {
    const auto finish = [this](auto columns) {
      if (pending_.negated_offset != nullptr) {
        Scaling<columns, true>(pending_).finish();
      } else {
        Scaling<columns, false>(pending_).finish();
      }
    };
    switch (pending_.columns) {
      case 1:
        finish(kOne);
        break;
      case 2:
        finish(kTwo);
        break;
      case 4:
        finish(kFour);
        break;
      default:
        break;
    }
    pending_.rows = 0;
  }

  // action(register, row tile, column) for the registers of a block's sums, all constants.
  template <int RowTiles, int Columns, int At = 0, class Action>
  [[gnu::always_inline]] static void for_sums(const Action& action) {
    constexpr int kRow = At / Columns, kColumn = At % Columns;
    action(std::integral_constant<int, 2 * kRow + kColumn>(), std::integral_constant<int, kRow>(),
           std::integral_constant<int, kColumn>());
    if constexpr (At + 1 < RowTiles * Columns) for_sums<RowTiles, Columns, At + 1>(action);
  }

  static constexpr std::integral_constant<int, 1> kOne{};
  static constexpr std::integral_constant<int, 2> kTwo{};
  static constexpr std::integral_constant<int, 4> kFour{};

  const Problem& p_;
  BlockDecoder decoder_;
  Fetcher fetcher_;
  PendingSums pending_;
  const bool direct_;  // one scale for all of K, and no offset: the totals are the sums
  TileGrid<Tiles> grid_;
  uint8_t* slab_ = nullptr;
  alignas(64) float sums_[4 * kTileRows * kTile];
  alignas(64) uint32_t cut_[kChunk / 2 * kMostTileParts * kRows];
};

}  // namespace
}  // namespace compressed_linear::cpu
