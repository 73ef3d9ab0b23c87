// SPDX-License-Identifier: Apache-2.0
// From a matrix of codes, or of floats, as a checkpoint or the standard layout holds it, to a
// packed layout: that of layouts/planes.h, of layouts/quads.h or of layouts/marlin.h. One loop per
// instruction set (Engine::repack); the plain one is the others' twin. Free of torch.
#pragma once

#include <cstdint>

#include "layouts/marlin.h"
#include "layouts/packed_layout.h"
#include "layouts/quads.h"

namespace compressed_linear::cpu {

inline constexpr int kMaxPlanes = 8;

// Layout of codes. Bits are counted from the lowest of a little-endian stream of bytes.
enum class CodeOrder : uint8_t {
  n_major,  // [N][bit stream along K]
  k_words,  // [containers along K][N]: the stream of an output channel runs down a column
  k_major,  // [K][bit stream along N]
};

// A code is the sum of its planes' fields, lowest plane first, with `flip` xored in. Floats are
// n_major rows of consecutive values; they have no planes.
struct CodeSource {
  CodeOrder order;
  const uint8_t* data;
  int64_t bytes;       // from `data` on
  int64_t row_bytes;   // from a stored row to the next
  int container_bits;  // of k_words: 8, 16 or 32
  int planes;
  int widths[kMaxPlanes];
  uint8_t flip;
  int64_t rows;   // output channels that are stored
  int64_t blank;  // output channels after them, all of code `blank_code`
  uint8_t blank_code;
  int64_t n_first;      // stored row (n_major) or column (k_words) of the first output channel
  const int32_t* k_at;  // [planes][k] first bit of each input channel; [k] stored row in k_major.
                        // Negative: code 0. Null: one field after another from bit 0 on
  const int32_t* n_at;  // k_major: [planes][rows] first bit of each output channel
};

// Where the code of a stored input channel comes from: bits from `shift` on of the stream's word
// `word` (32 bits, or a container of k_words), or stored row `word`; where word < 0 it is `shift`.
struct Field {
  int32_t word, shift;
};

// Positions [begin, end), whole chunks, whose fields are in words [word_begin, word_end).
struct Window {
  int64_t begin, end, word_begin, word_end;
};

static_assert(kTile * kStrip == marlin::kTileN && kBlock % marlin::kStripK == 0,
              "a strip of ours is a row of Marlin's tiles");

struct Repack {
  Geometry geometry;
  PackedLayout layout;
  CodeSource source;
  int64_t row_begin;  // the output channel that the source begins with, a multiple of kTile
  uint8_t* packed;
  const Field* fields;    // [planes][padded_k]
  const Field* runs;      // [planes][padded_k / 4]: the first of four fields that follow each other
                          // in the stream; word < 0 where four positions are not like that
  const Window* windows;  // cover all positions
  int64_t window_count;
  bool scattered;  // channels are far out of order; there is one window then

  int64_t row_end() const { return row_begin + source.rows + source.blank; }
  int64_t tile_begin() const { return row_begin / kTile; }
  int64_t tile_end() const { return (row_end() + kTile - 1) / kTile; }
};

// What codes of one byte are wrong: (code & mask) + add has one of the `bits`. Integers of less
// than 8 bits must not exceed them, and the kernels know no infinities and no NaN among weights.
struct WrongCodes {
  uint8_t mask, add, bits;
};

constexpr WrongCodes wrong_codes(Element element) {
  if (element.kind == Kind::e4m3) return {0x7f, 0x01, 0x80};
  if (element.kind == Kind::e5m2) return {0x7f, 0x04, 0x80};
  return {0xff, 0, static_cast<uint8_t>(0xff << element.bits)};
}

constexpr bool is_wrong(Element element, uint8_t code) {
  const WrongCodes wrong = wrong_codes(element);
  return (((code & wrong.mask) + wrong.add) & wrong.bits) != 0;
}
static_assert(is_wrong({Kind::e4m3, 8}, 0xff) && !is_wrong({Kind::e4m3, 8}, 0xfe) &&
                  is_wrong({Kind::e5m2, 8}, 0x7c) && !is_wrong({Kind::e5m2, 8}, 0xfb) &&
                  is_wrong({Kind::integer, 4}, 16) && !is_wrong({Kind::integer, 8}, 255),
              "");

// A job from `count` rows [k] of bytes or floats, the first of them output channel `row_begin`.
Repack from_rows(const Geometry& geometry, PackedLayout layout, const void* rows, int64_t count,
                 int64_t row_begin, uint8_t* packed);

// Of elements that are codes: makes fields and windows in call_arena(), where they stay valid until
// its next use.
void plan_fields(Repack& job);

// The twin of every instruction set's loop (isa.h).
bool repack_plain(const Repack& job, int64_t strip_begin, int64_t strip_end);

// The inverse for layouts/planes.h: rows of tiles [tile_begin, tile_end) as codes or floats [n, k].
// That for layouts/quads.h is in quads.h.
void unpack_tiles(const Geometry& geometry, const uint8_t* packed, int64_t tile_begin,
                  int64_t tile_end, void* rows);

// The same for Marlin's order; codes only.
void unpack_marlin(const Geometry& geometry, const uint8_t* packed, int64_t tile_begin,
                   int64_t tile_end, uint8_t* rows);

// Asks for huge pages for memory that is about to be written for the first time. Reading weights
// once per token misses the TLB on every small page.
void advise_huge_pages(void* data, int64_t bytes);

inline constexpr int64_t kPageBytes = 4096;

// First touch of the pages of bytes [begin, end), so that they are in this thread's NUMA node.
void touch_pages(uint8_t* memory, int64_t begin, int64_t end);

// Whether weights are codes of up to 8 bits, and not floats.
constexpr bool is_coded(Element element) {
  return element.kind == Kind::integer || element.kind == Kind::e4m3 || element.kind == Kind::e5m2;
}

// The code that unused places hold.
constexpr uint8_t zero_code(Element element) {
  return element.kind == Kind::integer ? static_cast<uint8_t>(1u << (element.bits - 1)) : 0;
}

// Bytes of a weight in a row of floats or of codes.
constexpr int64_t row_element_bytes(Element element) {
  return is_coded(element) ? 1 : element.bits / 8;
}

}  // namespace compressed_linear::cpu
