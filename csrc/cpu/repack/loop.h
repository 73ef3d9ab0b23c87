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
#include "repack.h"

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
  static constexpr int64_t kLanes = V::kLanes, kParts = kTile / kLanes;

  const Repack& job;
  const Geometry& g;
  const CodeSource& s;
  uint32_t* quads;  // [kChunk / 4][kTile]; in k_major [kUnitStrips * kStrip][kRowChunk / 4][kTile]
  uint32_t* columns;  // [words][kTile]
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

  template <int Width>
  static void put_plane(const uint32_t* block_quads, int below, uint8_t* plane) {
    constexpr int kQuads = 8 / Width, kFold = 16 - Width;
    const Reg mask = V::set1(((1u << Width) - 1) * 0x00010001u), low = V::set1(0xffff);
    for (int row = 0; row < Width; ++row)
      for (int64_t part = 0; part < kParts; ++part) {
        Reg even = V::set1(0), odd = even;
        for (int i = 0; i < kQuads; ++i) {
          const Reg quad = V::shift_right(
              V::load(block_quads + (row * kQuads + i) * kTile + part * kLanes), V::count(below));
          even = V::or_(even, V::shift_left(V::and_(quad, mask), V::count(2 * Width * i)));
          odd = V::or_(odd, V::shift_left(V::and_(V::shift_right(quad, V::count(8)), mask),
                                          V::count(2 * Width * i)));
        }
        even = V::and_(V::or_(even, V::shift_right(even, V::count(kFold))), low);
        odd = V::shift_left(V::or_(odd, V::shift_right(odd, V::count(kFold))), V::count(16));
        V::store(plane + row * kRowBytes + part * kLanes * 4, V::or_(even, odd));
      }
  }

  // Rows of 16-bit values from the low and then the high halves of rows of words.
  static void put_halves(const uint32_t* words, int64_t rows, uint32_t flip, uint8_t* out) {
    const Reg flips = V::set1(flip);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t part = 0; part < kParts; ++part) {
        const Reg word = V::xor_(V::load(words + row * kTile + part * kLanes), flips);
        uint8_t* to = out + row * kRowBytes + part * kLanes * 2;
        V::store_low_halves(to, word);
        V::store_low_halves(to + kRowBytes / 2, V::shift_right(word, V::count(16)));
      }
  }

  template <int Bits>
  void put_block(const uint32_t* block_quads, uint8_t* block) const {
    if constexpr (Bits == 8) {
      put_halves(block_quads, 8, zero_code(g.element) * 0x01010101u, block);
    } else {
      using P = Planes<Bits>;
      if constexpr (P::four) put_plane<4>(block_quads, 0, block + P::four_at);
      if constexpr (P::two) put_plane<2>(block_quads, P::four ? 4 : 0, block + P::two_at);
      if constexpr (P::one) put_plane<1>(block_quads, Bits - 1, block + P::one_at);
    }
  }

  // One plane of a block in the layout of quads.
  template <int Bits, int Width>
  static void put_quad_plane(const uint32_t* block_quads, int below, uint8_t* block,
                             int64_t stride) {
    const Reg mask = V::set1(((1u << Width) - 1) * 0x01010101u);
    for (int row = 0; row < Width; ++row)
      for (int64_t part = 0; part < kParts; ++part) {
        Reg lane = V::set1(0);
        for (int quad = row; quad < kQuads; quad += Width) {
          const Reg codes =
              V::shift_right(V::load(block_quads + quad * kTile + part * kLanes), V::count(below));
          lane =
              V::or_(lane, V::shift_left(V::and_(codes, mask), V::count(plane_bit(Width, quad))));
        }
        V::store(block + plane_position(Bits, Width, row) * stride + part * kLanes * 4, lane);
      }
  }

  template <int Bits>
  static void put_quad_block(const uint32_t* block_quads, uint8_t* block, int64_t stride) {
    if constexpr (Bits == 8) {
      for (int64_t quad = 0; quad < kQuads; ++quad)
        for (int64_t part = 0; part < kParts; ++part)
          V::store(block + quad * stride + part * kLanes * 4,
                   V::load(block_quads + quad * kTile + part * kLanes));
    } else {
      using P = Planes<Bits>;
      if constexpr (P::four) put_quad_plane<Bits, 4>(block_quads, 0, block, stride);
      if constexpr (P::two) put_quad_plane<Bits, 2>(block_quads, P::four ? 4 : 0, block, stride);
      if constexpr (P::one) put_quad_plane<Bits, 1>(block_quads, Bits - 1, block, stride);
    }
  }

  template <int Bits>
  void put_chunk(const uint32_t* tile_quads, int64_t tile, int64_t begin, int64_t end) const {
    const bool quad_rows = job.layout == PackedLayout::quads;
    uint8_t* block = job.packed + (quad_rows ? quads_at(g, tile, begin) : g.block_at(tile, begin));
    for (int64_t p = begin; p < end; p += kBlock, block += g.block_stride(tile)) {
      const uint32_t* block_quads = tile_quads + (p - begin) / kQuad * kTile;
      if (quad_rows) {
        put_quad_block<Bits>(block_quads, block, row_stride(g, tile));
      } else {
        put_block<Bits>(block_quads, block);
      }
    }
  }

  // Of ab in the low two bytes, b goes to the upper half.
  template <int Bits>
  static Reg spread(Reg quad) {
    constexpr uint32_t kOnes = (1u << Bits) - 1;
    return V::or_(V::and_(quad, V::set1(kOnes)),
                  V::shift_left(V::and_(quad, V::set1(kOnes << 8)), V::count(8)));
  }

  // A chunk in Marlin's order: lane 4 * (channel % 8) + pair has codes 2 * pair and the next of
  // both halves of a strip's 16 input channels.
  template <int Bits>
  void put_marlin(const uint32_t* tile_quads, int64_t tile, int64_t begin, int64_t end) const {
    constexpr int64_t kLaneWords = marlin::lane_words(Bits);
    for (int64_t p = begin; p < std::min(end, g.k); p += marlin::kStripK) {
      const uint32_t* strip = tile_quads + (p - begin) / 4 * kTile;
      alignas(64) uint32_t pairs[4][kTile];
      for (int64_t pair = 0; pair < 4; ++pair)
        for (int64_t part = 0; part < kParts; ++part) {
          const uint32_t* from = strip + pair / 2 * kTile + part * kLanes;
          const auto shift = V::count(static_cast<int>(pair % 2 * 16));
          const Reg lower = spread<Bits>(V::shift_right(V::load(from), shift));
          const Reg upper = spread<Bits>(V::shift_right(V::load(from + 2 * kTile), shift));
          V::store(pairs[pair] + part * kLanes,
                   V::or_(lower, V::shift_left(upper, V::count(Bits))));
        }
      uint32_t* out = reinterpret_cast<uint32_t*>(job.packed) +
                      marlin::code_field(Bits, g.n, p, tile * kTile).word;
      for (int64_t column = 0; column < 8; ++column)
        for (int64_t pair = 0; pair < 4; ++pair, out += kLaneWords) {
          const uint32_t low = pairs[pair][column], high = pairs[pair][column + 8];
          if constexpr (Bits == 4) {
            *out = low | high << 8;
          } else {
            out[0] = low;
            out[1] = high;
          }
        }
    }
  }

  // Writes positions [begin, end) of a tile.
  void finish(uint32_t* tile_quads, int64_t tile, int64_t begin, int64_t end) const {
    for (int64_t lane = channels(tile); lane < kTile; ++lane) {
      const bool blank = first_channel(tile) + lane < s.rows + s.blank;
      const uint32_t four = (blank ? s.blank_code : zero_code(g.element)) * 0x01010101u;
      for (int64_t quad = 0; quad < (end - begin) / 4; ++quad)
        tile_quads[quad * kTile + lane] = four;
    }
    if (job.layout == PackedLayout::marlin)
      return g.element.bits == 4 ? put_marlin<4>(tile_quads, tile, begin, end)
                                 : put_marlin<8>(tile_quads, tile, begin, end);
    switch (g.element.bits) {
      case 1:
        return put_chunk<1>(tile_quads, tile, begin, end);
      case 2:
        return put_chunk<2>(tile_quads, tile, begin, end);
      case 3:
        return put_chunk<3>(tile_quads, tile, begin, end);
      case 4:
        return put_chunk<4>(tile_quads, tile, begin, end);
      case 5:
        return put_chunk<5>(tile_quads, tile, begin, end);
      case 6:
        return put_chunk<6>(tile_quads, tile, begin, end);
      case 7:
        return put_chunk<7>(tile_quads, tile, begin, end);
      default:
        return put_chunk<8>(tile_quads, tile, begin, end);
    }
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
        if (!find_strip(first_channel(tile_begin) + strip * kStrip * kTile, plane,
                        lanes + (plane * strips + strip) * kStripParts, windows[plane][strip])) {
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
          put_halves(from, block_words, 0, block);
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
