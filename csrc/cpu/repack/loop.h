// SPDX-License-Identifier: Apache-2.0
// The vectorised repack loop. V supplies a register of V::kLanes 32-bit lanes, one per output
// channel; kTile / kLanes of them are a tile.
//
// Codes pass through quads: row q of 64 bytes holds, for each of the 16 channels, the codes of
// positions 4q to 4q + 3 as bytes. Sources whose streams are those of output channels are first
// seen as columns: a row of 16 words, one per channel, for every word of the stream. k_words has
// them in memory; of n_major rows they are transposed. One load so brings the fields of 16 codes.
#pragma once

#include <emmintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/common/arena.h"
#include "lanes.h"
#include "repack.h"
#include "writer.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Positions of k_major that are read of all tiles of a unit before they are written: their quads
// stay in the first cache.
inline constexpr int64_t kRowChunk = 64;
// Strips that take a chunk each before the next chunk: longer pieces of the rows of sources that
// have channels side by side.
inline constexpr int64_t kUnitStrips = 4;
// Words of a row of floats that are transposed at once: whole blocks.
inline constexpr int64_t kFloatWords = 256;

template <class V>
struct RepackLoop {
  static_assert(kRowChunk % kBlock == 0 && kUnitStrips * kStrip * kRowChunk >= kChunk, "");
  using Reg = typename V::Reg;
  using Lanes = typename LaneFinder<V>::Lanes;
  using StripWindow = typename LaneFinder<V>::StripWindow;
  static constexpr int64_t kLanes = V::kLanes, kParts = kTile / kLanes;

  const Repack& job;
  const Geometry& g;
  const CodeSource& s;
  uint32_t* quads;  // [kChunk / 4][kTile]; in k_major [kUnitStrips * kStrip][kRowChunk / 4][kTile]
  uint32_t* columns;  // [words][kTile]
  const PackedWriter<V> writer = {job, g};
  const LaneFinder<V> finder = {s};
  bool good = true;

  // Output channels of the tile that are stored.
  int64_t channels(int64_t tile) const {
    return std::clamp<int64_t>(s.rows - first_channel(tile), 0, kTile);
  }
  // The tile's first output channel, counted from the source's.
  int64_t first_channel(int64_t tile) const { return tile * kTile - job.row_begin; }

  // columns[w - word_begin] = word w of the streams of the tile's 16 channels.
  void transpose_rows(int64_t tile, int64_t word_begin, int64_t word_end) const {
    const int64_t row_words = s.row_bytes / 4, count = channels(tile);
    for (int64_t w = word_begin; w < word_end; w += 16)
      for (int64_t block = 0; block < kTile; block += 4) {
        const uint8_t* rows[4];
        for (int64_t r = 0; r < 4; ++r)
          rows[r] = s.data + (s.n_first + first_channel(tile) + std::min(block + r, count - 1)) *
                                 s.row_bytes;
        const int64_t stop = std::min(w + 16, word_end);
        for (int64_t at = w; at < stop; at += 4) {
          __m128i four[4];
          for (int64_t r = 0; r < 4; ++r) {
            if (at + 4 <= row_words) {
              four[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + at * 4));
            } else {
              alignas(16) uint8_t rest[16] = {};
              std::memcpy(rest, rows[r] + at * 4, static_cast<size_t>(s.row_bytes - at * 4));
              four[r] = _mm_load_si128(reinterpret_cast<const __m128i*>(rest));
            }
          }
          const __m128i low01 = _mm_unpacklo_epi32(four[0], four[1]);
          const __m128i low23 = _mm_unpacklo_epi32(four[2], four[3]);
          const __m128i high01 = _mm_unpackhi_epi32(four[0], four[1]);
          const __m128i high23 = _mm_unpackhi_epi32(four[2], four[3]);
          __m128i* to = reinterpret_cast<__m128i*>(columns + (at - word_begin) * kTile + block);
          _mm_store_si128(to, _mm_unpacklo_epi64(low01, low23));
          _mm_store_si128(to + 4, _mm_unpackhi_epi64(low01, low23));
          _mm_store_si128(to + 8, _mm_unpacklo_epi64(high01, high23));
          _mm_store_si128(to + 12, _mm_unpackhi_epi64(high01, high23));
        }
      }
  }

  // The same of containers that lie in columns already, but are not 16 words of 32 bits.
  template <class Container>
  void widen_columns(int64_t tile, int64_t word_begin, int64_t word_end) const {
    const int64_t count = channels(tile);
    const uint8_t* from =
        s.data + (s.n_first + first_channel(tile)) * static_cast<int64_t>(sizeof(Container));
    for (int64_t w = word_begin; w < word_end; ++w) {
      Container row[kTile] = {};
      std::memcpy(row, from + w * s.row_bytes, static_cast<size_t>(count) * sizeof(Container));
      for (int64_t lane = 0; lane < kTile; ++lane)
        columns[(w - word_begin) * kTile + lane] = row[lane];
    }
  }

  // Quads of positions [begin, end), a chunk or less, from columns that begin with word `first`.
  void read_columns(const uint8_t* words, int64_t first, int64_t word_bytes, int64_t begin,
                    int64_t end) {
    int below = 0;
    for (int plane = 0; plane < s.planes; ++plane) {
      for (int64_t part = 0; part < kParts; ++part)
        read_plane(words + part * kLanes * 4, first, word_bytes, plane, below, begin, end,
                   quads + part * kLanes);
      below += s.widths[plane];
    }
  }

  // One plane of kLanes channels.
  void read_plane(const uint8_t* words, int64_t first, int64_t word_bytes, int plane, int below,
                  int64_t begin, int64_t end, uint32_t* out) {
    const int word_bits = s.order == CodeOrder::k_words ? s.container_bits : 32;
    const int width = s.widths[plane];
    const uint32_t ones = (1u << width) - 1, flip_bits = uint32_t{s.flip} >> below & ones;
    const Reg mask = V::set1(ones), flip = V::set1(flip_bits);
    const Reg flips = V::set1(flip_bits * 0x01010101u);
    const uint32_t pair = (1u << (2 * width)) - 1;
    const Reg two = V::set1(pair), two_up = V::set1(pair << 16);
    const Reg four = V::set1(ones * 0x00010001u), four_up = V::set1(ones * 0x01000100u);
    const auto to_half = V::count(16 - 2 * width), to_byte = V::count(8 - width);
    const auto up = V::count(below);
    const Field* fields = job.fields + plane * g.padded_k;
    const Field* runs = job.runs + plane * g.padded_k / 4;
    const Wrong wrong(g.element);
    Reg found = V::set1(0);
    for (int64_t p = begin; p < end; p += 4, out += kTile) {
      Reg quad;
      const Field run = runs[p / 4];
      if (run.word >= 0) {
        const uint8_t* at = words + (run.word - first) * word_bytes;
        quad = V::shift_right(V::load(at), V::count(run.shift));
        if (run.shift + 4 * width > word_bits)
          quad = V::or_(quad,
                        V::shift_left(V::load(at + word_bytes), V::count(word_bits - run.shift)));
        if (width < 8) {
          // Of abcd in the low bits, ab and cd go to the two halves, then each to its byte.
          quad = V::or_(V::and_(quad, two), V::and_(V::shift_left(quad, to_half), two_up));
          quad = V::or_(V::and_(quad, four), V::and_(V::shift_left(quad, to_byte), four_up));
        }
        quad = V::xor_(quad, flips);
      } else {
        quad = V::set1(0);
        for (int i = 0; i < 4; ++i) {
          const Field f = fields[p + i];
          Reg value;
          if (f.word < 0) {
            value = V::set1(static_cast<uint32_t>(f.shift));
          } else {
            const uint8_t* at = words + (f.word - first) * word_bytes;
            value = V::shift_right(V::load(at), V::count(f.shift));
            if (f.shift + width > word_bits)
              value = V::or_(
                  value, V::shift_left(V::load(at + word_bytes), V::count(word_bits - f.shift)));
            value = V::xor_(V::and_(value, mask), flip);
          }
          quad = V::or_(quad, V::shift_left(value, V::count(8 * i)));
        }
      }
      if (plane > 0) quad = V::or_(V::load(out), V::shift_left(quad, up));
      V::store(out, quad);
      found = V::or_(found, wrong.among(quad));
    }
    note(found);
  }

  // Bits of wrong codes among four to a lane.
  struct Wrong {
    Reg mask, add, bits;
    explicit Wrong(Element element) {
      const WrongCodes wrong = wrong_codes(element);
      mask = V::set1(wrong.mask * 0x01010101u);
      add = V::set1(wrong.add * 0x01010101u);
      bits = V::set1(wrong.bits * 0x01010101u);
    }
    Reg among(Reg quad) const { return V::and_(V::add(V::and_(quad, mask), add), bits); }
  };

  void note(Reg wrong) {
    alignas(64) uint32_t lanes[kLanes];
    V::store(lanes, wrong);
    for (const uint32_t lane : lanes) good = good && lane == 0;
  }

  // One plane of the quads of positions [begin, end) of strips: lanes [strips][kStrip * kParts].
  void read_rows(const Lanes* lanes, const StripWindow* windows, int64_t strips, int plane,
                 int below, int64_t begin, int64_t end) {
    constexpr int64_t kStripParts = kStrip * kParts;
    const uint32_t ones = (1u << s.widths[plane]) - 1;
    const Reg mask = V::set1(ones), flip = V::set1(uint32_t{s.flip} >> below & ones);
    const Wrong wrong(g.element);
    Reg met = V::set1(0);
    for (int64_t p = begin; p < end; p += 4) {
      const Field* fields = job.fields + plane * g.padded_k + p;
      int64_t rows[4];
      bool stored = true;
      for (int i = 0; i < 4; ++i) {
        stored = stored && fields[i].word >= 0;
        rows[i] = std::max(fields[i].word, 0) * s.row_bytes;
        // The rows of the next pass: a page apart or more, no hardware foresees them.
        if (p + kRowChunk < g.padded_k) {
          const int64_t next = std::max(fields[i + kRowChunk].word, 0) * s.row_bytes;
          for (int64_t strip = 0; strip < strips; strip += kStrip / 2)
            _mm_prefetch(reinterpret_cast<const char*>(s.data + next) +
                             std::max<int64_t>(windows[strip].byte, 0),
                         _MM_HINT_T0);
        }
      }
      for (int64_t strip = 0; strip < strips; ++strip) {
        const StripWindow& window = windows[strip];
        Reg words[4];
        for (int64_t part = 0; part < kStripParts; ++part) {
          const Lanes& lane = lanes[strip * kStripParts + part];
          if (part == 0 || window.byte < 0) {
            const int64_t byte = window.byte < 0 ? window.bytes[part] : window.byte;
            for (int i = 0; i < 4; ++i) words[i] = load_window(rows[i] + byte);
          }
          uint32_t* out = quads + (strip * kStrip + part / kParts) * kRowChunk / 4 * kTile +
                          (p - begin) / 4 * kTile + part % kParts * kLanes;
          Reg quad = V::set1(0);
          for (int i = 0; i < 4; ++i) {
            Reg value = V::shift_right_each(V::pick(words[i], lane.index), lane.shift);
            if (window.straddle)
              value = V::or_(value, V::shift_left_each(V::pick(words[i], lane.next), lane.up));
            value = V::xor_(V::and_(value, mask), flip);
            if (!stored && fields[i].word < 0)
              value = V::set1(static_cast<uint32_t>(fields[i].shift));
            quad = V::or_(quad, V::shift_left(value, V::count(8 * i)));
          }
          if (plane > 0) quad = V::or_(V::load(out), V::shift_left(quad, V::count(below)));
          V::store(out, quad);
          met = V::or_(met, wrong.among(quad));
        }
      }
    }
    note(met);
  }

  Reg load_window(int64_t byte) const {
    constexpr int64_t kBytes = kLanes * 4;
    if (byte + kBytes <= s.bytes) return V::load(s.data + byte);
    alignas(64) uint8_t rest[kBytes] = {};
    if (byte < s.bytes) std::memcpy(rest, s.data + byte, static_cast<size_t>(s.bytes - byte));
    return V::load(rest);
  }

  // Writes positions [begin, end) of a tile.
  void finish(uint32_t* tile_quads, int64_t tile, int64_t begin, int64_t end) const {
    for (int64_t lane = channels(tile); lane < kTile; ++lane) {
      const bool blank = first_channel(tile) + lane < s.rows + s.blank;
      const uint32_t four = (blank ? s.blank_code : zero_code(g.element)) * 0x01010101u;
      for (int64_t quad = 0; quad < (end - begin) / 4; ++quad)
        tile_quads[quad * kTile + lane] = four;
    }
    writer.put(tile_quads, tile, begin, end);
  }

  // Whether the tile's columns can be read where they are. Not if channels are out of order: each
  // word is wanted several times then, and rows a power of two apart evict each other.
  bool in_place(int64_t tile) const {
    return s.order == CodeOrder::k_words && s.container_bits == 32 && !job.scattered &&
           channels(tile) == kTile;
  }

  void gather_columns(int64_t tile, int64_t word_begin, int64_t word_end) const {
    if (s.order == CodeOrder::n_major) return transpose_rows(tile, word_begin, word_end);
    if (s.container_bits == 8) return widen_columns<uint8_t>(tile, word_begin, word_end);
    if (s.container_bits == 16) return widen_columns<uint16_t>(tile, word_begin, word_end);
    widen_columns<uint32_t>(tile, word_begin, word_end);
  }

  void codes_of_tile(int64_t tile) {
    for (int64_t i = 0; i < job.window_count; ++i) {
      const Window& window = job.windows[i];
      const bool stored = channels(tile) > 0;
      if (stored) gather_columns(tile, window.word_begin, window.word_end);
      for (int64_t begin = window.begin; begin < window.end; begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, window.end);
        if (stored)
          read_columns(reinterpret_cast<const uint8_t*>(columns), window.word_begin, kRowBytes,
                       begin, end);
        finish(quads, tile, begin, end);
      }
    }
  }

  // Tiles whose codes lie side by side in memory, chunk by chunk, so that long pieces of a stored
  // row are read at once.
  void codes_of_columns(int64_t tile_begin, int64_t tile_end) {
    for (int64_t begin = 0; begin < g.padded_k; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, g.padded_k);
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        if (!in_place(tile)) continue;
        read_columns(s.data + (s.n_first + first_channel(tile)) * 4, 0, s.row_bytes, begin, end);
        finish(quads, tile, begin, end);
      }
    }
    for (int64_t tile = tile_begin; tile < tile_end; ++tile)
      if (!in_place(tile)) codes_of_tile(tile);
  }

  void codes_of_rows(int64_t tile_begin, int64_t tile_end) {
    constexpr int64_t kStripParts = kStrip * kParts;
    const int64_t strips = (tile_end - tile_begin + kStrip - 1) / kStrip;
    Lanes* lanes = reinterpret_cast<Lanes*>(columns);  // [planes][strips][kStripParts]
    StripWindow windows[kMaxPlanes][kUnitStrips];
    const bool stored = first_channel(tile_begin) < s.rows;
    for (int plane = 0; plane < (stored ? s.planes : 0); ++plane)
      for (int64_t strip = 0; strip < strips; ++strip)
        if (!finder.find_strip(first_channel(tile_begin) + strip * kStrip * kTile, plane,
                               lanes + (plane * strips + strip) * kStripParts,
                               windows[plane][strip])) {
          // No known checkpoint lays codes that far apart.
          good = repack_plain(job, tile_begin / kStrip, (tile_end + kStrip - 1) / kStrip) && good;
          return;
        }
    for (int64_t begin = 0; begin < g.padded_k; begin += kRowChunk) {
      const int64_t end = std::min(begin + kRowChunk, g.padded_k);
      for (int plane = 0, below = 0; plane < (stored ? s.planes : 0); below += s.widths[plane++])
        read_rows(lanes + plane * strips * kStripParts, windows[plane], strips, plane, below, begin,
                  end);
      for (int64_t tile = tile_begin; tile < tile_end; ++tile)
        finish(quads + (tile - tile_begin) * kRowChunk / 4 * kTile, tile, begin, end);
    }
  }

  void floats_of_tile(int64_t tile) const {
    const int64_t unit = row_element_bytes(g.element), block_words = kBlock * unit / 4;
    const int64_t words = (s.row_bytes + 3) / 4, all = g.padded_k * unit / 4;
    for (int64_t begin = 0; begin < all; begin += kFloatWords) {
      const int64_t end = std::min(begin + kFloatWords, all);
      const int64_t stored = channels(tile) > 0 ? std::clamp(words, begin, end) : begin;
      transpose_rows(tile, begin, stored);
      std::fill(columns + (stored - begin) * kTile, columns + (end - begin) * kTile, 0);
      for (int64_t lane = channels(tile); lane < kTile; ++lane)
        for (int64_t w = 0; w < stored - begin; ++w) columns[w * kTile + lane] = 0;
      for (int64_t w = begin; w < end; w += block_words) {
        const uint32_t* from = columns + (w - begin) * kTile;
        uint8_t* block = job.packed + g.block_at(tile, w * 4 / unit);
        if (g.element.kind == Kind::float16) {
          writer.put_halves(from, block_words, 0, block);
        } else {
          std::memcpy(block, from, static_cast<size_t>(block_words * kRowBytes));
        }
      }
    }
  }

  void run(int64_t tile_begin, int64_t tile_end) {
    if (!is_coded(g.element) || s.order == CodeOrder::n_major) {
      for (int64_t tile = tile_begin; tile < tile_end; ++tile)
        is_coded(g.element) ? codes_of_tile(tile) : floats_of_tile(tile);
      return;
    }
    for (int64_t tile = tile_begin; tile < tile_end; tile += kUnitStrips * kStrip) {
      const int64_t stop = std::min(tile + kUnitStrips * kStrip, tile_end);
      s.order == CodeOrder::k_words ? codes_of_columns(tile, stop) : codes_of_rows(tile, stop);
    }
  }

  // Words of scratch for `columns`.
  static int64_t column_words(const Repack& job) {
    if (!is_coded(job.geometry.element)) return kFloatWords * kTile;
    int64_t words = 0;
    for (int64_t i = 0; i < job.window_count; ++i)
      words = std::max(words, job.windows[i].word_end - job.windows[i].word_begin);
    const int64_t lanes =
        kUnitStrips * kStrip * kParts * job.source.planes * static_cast<int64_t>(sizeof(Lanes)) / 4;
    return std::max((words + 4) * kTile, lanes);  // four words are transposed at a time
  }
};

template <class V>
bool repack_with(const Repack& job, int64_t strip_begin, int64_t strip_end) {
  const int64_t quad_words = kUnitStrips * kStrip * kRowChunk / 4 * kTile;
  uint32_t* memory = static_cast<uint32_t*>(worker_arena().reserve(
      static_cast<size_t>(quad_words + RepackLoop<V>::column_words(job)) * 4));
  RepackLoop<V> loop{job, job.geometry, job.source, memory, memory + quad_words};
  loop.run(std::max(strip_begin * kStrip, job.tile_begin()),
           std::min(strip_end * kStrip, job.tile_end()));
  return loop.good;
}

}  // namespace
}  // namespace compressed_linear::cpu
