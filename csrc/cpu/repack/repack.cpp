// SPDX-License-Identifier: Apache-2.0
#include "repack.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/common/arena.h"
#include "quads.h"

namespace compressed_linear::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lanes are read and written whole");

// Four codes of a quad with those of its second and third channel exchanged.
uint32_t swapped_quad(const uint8_t* codes) {
  uint32_t quad;
  std::memcpy(&quad, codes, sizeof(quad));
  return (quad & 0xff0000ffu) | (quad & 0xff00u) << 8 | (quad >> 8 & 0xff00u);
}

void put_codes(const uint8_t* codes, int bits, uint8_t* block, int64_t channel) {
  if (bits == 8) {
    for (int64_t pair = 0; pair < kPairs; ++pair)
      for (int64_t i = 0; i < 2; ++i)
        block[(pair * kTile + channel) * 2 + i] = codes[2 * pair + i] ^ 0x80u;
    return;
  }
  int below = 0;
  for (const int width : {4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
    for (int row = 0, quad = 0; row < width; ++row) {
      uint32_t lane = 0;
      for (; quad < 8 && quad_row(width, quad) == row; ++quad)
        lane |= (swapped_quad(codes + 4 * quad) >> below & mask) << quad_bit(width, quad);
      std::memcpy(block + row * kRowBytes + channel * 4, &lane, sizeof(lane));
    }
    block += width * kRowBytes;
    below += width;
  }
}

// Index of float (k, channel) of a block.
int64_t float_index(Kind kind, int64_t k, int64_t channel) {
  const bool paired = kind != Kind::float16 && kind != Kind::float32;
  return paired ? (k / 2 * kTile + channel) * 2 + k % 2 : k * kTile + channel;
}

uint32_t* marlin_word(uint8_t* packed, int64_t word) {
  return reinterpret_cast<uint32_t*>(packed) + word;
}

// Lines [kTile][padded_k] of codes of a tile, in Marlin's order. A word holds codes of one tile and
// of one strip of input channels.
void put_marlin(const Repack& job, int64_t tile, const uint8_t* lines) {
  const Geometry& g = job.geometry;
  const auto each = [&](const auto& body) {
    for (int64_t k = 0; k < g.k; ++k)
      for (int64_t channel = 0; channel < kTile; ++channel) {
        const auto at = marlin::code_field(g.element.bits, g.n, k, tile * kTile + channel);
        body(marlin_word(job.packed, at.word),
             uint32_t{lines[channel * g.padded_k + k]} << at.shift);
      }
  };
  each([](uint32_t* word, uint32_t) { *word = 0; });
  each([](uint32_t* word, uint32_t code) { *word |= code; });
}

// The code of one weight.
uint32_t code_at(const uint8_t* block, int bits, int64_t channel, int64_t k) {
  if (bits == 8) return block[(k / 2 * kTile + channel) * 2 + k % 2] ^ 0x80u;
  uint32_t code = 0;
  int shift = 0;
  for (const int width : {4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const int at = static_cast<int>(k);
    uint32_t lane;
    std::memcpy(&lane, block + quad_row(width, at / 4) * kRowBytes + channel * 4, 4);
    lane >>= code_bit(width, at);
    code |= (lane & ((1u << width) - 1)) << shift;
    block += width * kRowBytes;
    shift += width;
  }
  return code;
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(data),
                  to = from + static_cast<uintptr_t>(bytes);
  const uintptr_t begin = (from + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = to / kHugePage * kHugePage;
  // A kernel without huge pages refuses, and nothing is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void touch_pages(uint8_t* memory, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kPageBytes)
    static_cast<volatile uint8_t*>(memory)[at] = 0;
}

Repack from_rows(const Geometry& geometry, PackedLayout layout, const void* rows, int64_t count,
                 int64_t row_begin, uint8_t* packed) {
  Repack job{};
  job.geometry = geometry;
  job.layout = layout;
  job.source.order = CodeOrder::n_major;
  job.source.data = static_cast<const uint8_t*>(rows);
  job.source.row_bytes = geometry.k * row_element_bytes(geometry.element);
  job.source.bytes = count * job.source.row_bytes;
  job.source.planes = 1;
  job.source.widths[0] = 8;
  job.source.rows = count;
  job.row_begin = row_begin;
  job.packed = packed;
  return job;
}

void plan_fields(Repack& job) {
  const Geometry& g = job.geometry;
  const CodeSource& s = job.source;
  const int64_t field_bytes =
      round_up(s.planes * g.padded_k * static_cast<int64_t>(sizeof(Field)), 64);
  const int64_t run_bytes = round_up(field_bytes / 4, 64);
  const int64_t chunks = (g.padded_k + kChunk - 1) / kChunk;
  uint8_t* memory = static_cast<uint8_t*>(call_arena().reserve(static_cast<size_t>(
      field_bytes + run_bytes + chunks * static_cast<int64_t>(sizeof(Window)))));
  Field* fields = reinterpret_cast<Field*>(memory);
  Field* runs = reinterpret_cast<Field*>(memory + field_bytes);
  Window* windows = reinterpret_cast<Window*>(memory + field_bytes + run_bytes);

  const int32_t word_bits = s.order == CodeOrder::k_words ? s.container_bits : 32;
  int below = 0;
  for (int plane = 0; plane < s.planes; ++plane) {
    const int width = s.widths[plane];
    Field* out = fields + plane * g.padded_k;
    for (int64_t p = 0; p < g.padded_k; ++p)
      out[p] = {-1, (zero_code(g.element) >> below) & ((1 << width) - 1)};
    for (int64_t channel = 0; channel < g.k; ++channel) {
      const int32_t at = s.k_at == nullptr               ? static_cast<int32_t>(channel * width)
                         : s.order == CodeOrder::k_major ? s.k_at[channel]
                                                         : s.k_at[plane * g.k + channel];
      out[g.position(channel)] = at < 0 ? Field{-1, 0}
                                 : s.order == CodeOrder::k_major
                                     ? Field{at, 0}
                                     : Field{at / word_bits, at % word_bits};
    }
    below += width;
    if (s.order == CodeOrder::k_major) continue;
    for (int64_t p = 0; p < g.padded_k; p += 4) {
      const auto bit = [&](int64_t i) {
        return int64_t{out[p + i].word} * word_bits + out[p + i].shift;
      };
      bool run = out[p].word >= 0;
      for (int64_t i = 1; i < 4; ++i)
        run = run && out[p + i].word >= 0 && bit(i) == bit(0) + i * width;
      // All four are in two words.
      run = run && out[p].shift + 4 * width <= 2 * word_bits;
      runs[(plane * g.padded_k + p) / 4] = run ? out[p] : Field{-1, 0};
    }
  }

  // Consecutive chunks share a window while their words are few enough to stay in the first cache;
  // with a permutation even one chunk's are not, and all words are wanted at once.
  constexpr int64_t kWindowWords = 256;
  int64_t count = 0;
  job.scattered = false;
  for (int64_t begin = 0; begin < g.padded_k; begin += kChunk) {
    Window chunk = {begin, std::min(begin + kChunk, g.padded_k), INT64_MAX, 0};
    for (int plane = 0; plane < s.planes; ++plane)
      for (int64_t p = chunk.begin; p < chunk.end; ++p) {
        const Field& f = fields[plane * g.padded_k + p];
        if (f.word < 0) continue;
        const int64_t last = f.word + (f.shift + s.widths[plane] > word_bits);
        chunk.word_begin = std::min<int64_t>(chunk.word_begin, f.word);
        chunk.word_end = std::max(chunk.word_end, last + 1);
      }
    chunk.word_begin = std::min(chunk.word_begin, chunk.word_end);
    job.scattered = job.scattered || chunk.word_end - chunk.word_begin > kWindowWords;
    if (count > 0) {
      Window& open = windows[count - 1];
      const int64_t word_begin = std::min(open.word_begin, chunk.word_begin);
      const int64_t word_end = std::max(open.word_end, chunk.word_end);
      if (job.scattered || word_end - word_begin <= kWindowWords) {
        open = {open.begin, chunk.end, word_begin, word_end};
        continue;
      }
    }
    windows[count++] = chunk;
  }
  if (job.scattered) {
    for (int64_t i = 1; i < count; ++i) {
      windows[0].word_begin = std::min(windows[0].word_begin, windows[i].word_begin);
      windows[0].word_end = std::max(windows[0].word_end, windows[i].word_end);
    }
    windows[0].end = g.padded_k;
    count = 1;
  }
  job.fields = fields;
  job.runs = runs;
  job.windows = windows;
  job.window_count = count;
}

namespace {

// `width` bits of a little-endian stream of bytes.
uint32_t read_bits(const uint8_t* stream, uint64_t bit, unsigned width) {
  uint32_t value = stream[bit / 8];
  if (bit % 8 + width > 8) value |= uint32_t{stream[bit / 8 + 1]} << 8;
  return value >> (bit % 8);
}

// Container `row` of the stream that runs down column `n`.
uint64_t read_container(const CodeSource& s, int64_t row, int64_t n) {
  uint32_t container = 0;
  std::memcpy(&container, s.data + row * s.row_bytes + n * s.container_bits / 8,
              static_cast<size_t>(s.container_bits / 8));
  return container;
}

// Adds one plane, read by `stored(field)`, to the codes of all positions.
template <class Stored>
void add_plane(const Repack& job, int plane, int below, uint8_t* line, const Stored& stored) {
  const int64_t count = job.geometry.padded_k;
  const uint32_t mask = (1u << job.source.widths[plane]) - 1;
  const uint32_t flip = uint32_t{job.source.flip} >> below & mask;
  const Field* fields = job.fields + plane * count;
  for (int64_t p = 0; p < count; ++p) {
    const uint32_t value = fields[p].word < 0 ? static_cast<uint32_t>(fields[p].shift)
                                              : (stored(fields[p]) & mask) ^ flip;
    line[p] = static_cast<uint8_t>(line[p] | value << below);
  }
}

// Codes of output channel `n` of the source, in the order of the stored positions.
void read_line(const Repack& job, int64_t n, uint8_t* line) {
  const CodeSource& s = job.source;
  std::memset(line, 0, static_cast<size_t>(job.geometry.padded_k));
  for (int plane = 0, below = 0; plane < s.planes; below += s.widths[plane++]) {
    const unsigned width = static_cast<unsigned>(s.widths[plane]);
    if (s.order == CodeOrder::n_major) {
      const uint8_t* row = s.data + (s.n_first + n) * s.row_bytes;
      add_plane(job, plane, below, line, [=](Field f) {
        return read_bits(row, static_cast<uint64_t>(f.word) * 32 + static_cast<uint64_t>(f.shift),
                         width);
      });
    } else if (s.order == CodeOrder::k_major) {
      const auto bit = static_cast<uint64_t>(s.n_at[plane * s.rows + n]);
      add_plane(job, plane, below, line,
                [&, bit](Field f) { return read_bits(s.data + f.word * s.row_bytes, bit, width); });
    } else {
      add_plane(job, plane, below, line, [&](Field f) {
        uint64_t wide = read_container(s, f.word, s.n_first + n);
        if (f.shift + static_cast<int>(width) > s.container_bits)
          wide |= read_container(s, f.word + 1, s.n_first + n) << s.container_bits;
        return static_cast<uint32_t>(wide >> f.shift);
      });
    }
  }
}

}  // namespace

bool repack_plain(const Repack& job, int64_t strip_begin, int64_t strip_end) {
  const Geometry& g = job.geometry;
  const CodeSource& s = job.source;
  const int64_t unit = row_element_bytes(g.element), line_bytes = g.padded_k * unit;
  std::vector<uint8_t> lines(static_cast<size_t>(kTile * line_bytes));
  bool good = true;
  const int64_t tile_end = std::min(strip_end * kStrip, job.tile_end());
  for (int64_t tile = std::max(strip_begin * kStrip, job.tile_begin()); tile < tile_end; ++tile) {
    std::fill(lines.begin(), lines.end(), zero_code(g.element));
    for (int64_t channel = 0; channel < kTile; ++channel) {
      const int64_t n = tile * kTile + channel - job.row_begin;
      uint8_t* line = lines.data() + channel * line_bytes;
      if (n >= s.rows + s.blank) break;
      if (n >= s.rows) {
        std::memset(line, s.blank_code, static_cast<size_t>(line_bytes));
      } else if (is_coded(g.element)) {
        read_line(job, n, line);
        uint8_t wrong = 0;
        for (int64_t p = 0; p < g.padded_k; ++p) wrong |= is_wrong(g.element, line[p]);
        good = good && wrong == 0;
      } else {
        const uint8_t* from = s.data + (s.n_first + n) * s.row_bytes;
        for (int64_t group = 0; group < g.groups; ++group)
          std::memcpy(line + group * g.padded_group * unit, from + group * g.group * unit,
                      static_cast<size_t>(g.group * unit));
      }
    }
    if (job.layout == PackedLayout::marlin) {
      put_marlin(job, tile, lines.data());
      continue;
    }
    const bool quads = job.layout == PackedLayout::quads;
    uint8_t* block = job.packed + (quads ? quads_at(g, tile, 0) : g.block_at(tile, 0));
    for (int64_t k = 0; k < g.padded_k; k += kBlock, block += g.block_stride(tile))
      for (int64_t channel = 0; channel < kTile; ++channel) {
        const uint8_t* values = lines.data() + channel * line_bytes + k * unit;
        if (quads) {
          put_quads(values, g.element.bits, block, row_stride(g, tile), channel);
        } else if (g.element.kind == Kind::integer) {
          put_codes(values, g.element.bits, block, channel);
        } else {
          for (int64_t i = 0; i < kBlock; ++i)
            std::memcpy(block + float_index(g.element.kind, i, channel) * unit, values + i * unit,
                        static_cast<size_t>(unit));
        }
      }
  }
  return good;
}

void unpack_tiles(const Geometry& g, const uint8_t* packed, int64_t tile_begin, int64_t tile_end,
                  void* rows) {
  const int64_t unit = row_element_bytes(g.element);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile)
    for (int64_t row = tile * kTile; row < std::min((tile + 1) * kTile, g.n); ++row) {
      uint8_t* to = static_cast<uint8_t*>(rows) + row * g.k * unit;
      for (int64_t channel = 0; channel < g.k; ++channel) {
        const int64_t at = g.position(channel);
        const uint8_t* block = packed + g.block_at(tile, at);
        if (g.element.kind == Kind::integer) {
          to[channel] =
              static_cast<uint8_t>(code_at(block, g.element.bits, row % kTile, at % kBlock));
        } else {
          std::memcpy(to + channel * unit,
                      block + float_index(g.element.kind, at % kBlock, row % kTile) * unit,
                      static_cast<size_t>(unit));
        }
      }
    }
}

void unpack_marlin(const Geometry& g, const uint8_t* packed, int64_t tile_begin, int64_t tile_end,
                   uint8_t* rows) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(packed);
  const uint32_t mask = (1u << g.element.bits) - 1;
  for (int64_t n = tile_begin * kTile; n < tile_end * kTile; ++n)
    for (int64_t k = 0; k < g.k; ++k) {
      const auto at = marlin::code_field(g.element.bits, g.n, k, n);
      rows[n * g.k + k] = static_cast<uint8_t>(words[at.word] >> at.shift & mask);
    }
}

}  // namespace compressed_linear::cpu
