// SPDX-License-Identifier: Apache-2.0
// The blocked multiplication that the vector engines for integer activations share. A Core supplies
// the registers:
//
//   Reg, Float                 kLanes 32-bit integers or floats; kVectors of them make a row of a
//                              tile
//   kRows, tiles(rows)         the register block: rows of x by tiles, which divide a strip
//   Activation<Narrow>, broadcast<Narrow>, dot<Narrow>
//                              four bytes of x for every lane, and the dot product of four unsigned
//                              codes with them; Narrow: the codes have at most seven bits
//   kTellNarrow                whether that makes a difference
//   quantize                   what quantize_values does
//   and the arithmetic of whole registers
//
// Blocks, as VectorBlocks below, multiply blocks of outputs, with a Core's registers or otherwise.
//
// The work: rows of x are quantized into panels of at most kRows interleaved rows. A unit is a run
// of panels times one strip of four tiles. It walks K in chunks; weights of a chunk are read by
// panel after panel, either as they are packed or, for many panels, decoded to bytes once. What a
// chunk's end cuts goes on as integers, so that neither chunks nor panels change a result: per
// output the integers of a segment are exact; times the scales of x they are added over a weight
// group, and times the scales of the weights over the groups, in order of K (rows.h).
//
// For few rows and fewer strips than threads a unit is one chunk of a strip instead. Each of its
// pieces then leaves its integers in a place of its own, and when all are there they are added and
// go on as above, so that this changes no result either.
//
// While a chunk is worked on, the next one is fetched into the cache, a share for every panel:
// otherwise its first panel waits for memory and the others leave memory idle.
#pragma once

#include <utility>

#include "cpu/common/arena.h"
#include "cpu/common/panels.h"
#include "cpu/common/prefetch.h"
#include "rows.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kIntegerActivationBytes = 16 << 20;  // quantized rows held at once
constexpr int64_t kIntegerChunk = 2048;  // input channels of a strip that panels read in turn
// How far ahead a panel that is alone fetches codes of 8 bits. On huge pages processors do that by
// themselves, and best so for narrower codes; on small pages this takes 0.70 ms instead of 0.94
// (N = K = 4096, Zen 4).
constexpr int64_t kNextBlock = kQuads * kStrip * kRowBytes;
// Panels beyond which narrow codes are decoded to bytes first.
constexpr int64_t kDirectPanels = 3;
constexpr int64_t kLeastIntegerPartBytes = 16 << 10;  // weights of a strip worth a thread's while
constexpr int64_t kKeptBytes = 4 << 20;               // integers of pieces kept at once

// The part of a segment inside one chunk.
struct Piece {
  int32_t begin, end;  // stored channels
  int32_t segment;
  bool first, last;  // of the segment's pieces
};

struct KernelArgs {
  const uint8_t* weights;  // block of the chunk's first channel, first tile
  int64_t row_stride, block_stride, chunk_begin;
  const int32_t* x;  // [quad][row], all of K
  const Piece* pieces;
  int64_t piece_count;
  const IntegerSegment* segments;
  int64_t segment_count;
  const Problem* problem;           // whose scales and zero points are read
  int64_t tile;                     // the first one
  int64_t scale_first, zero_first;  // where its numbers of group 0 are
  const int32_t* code_sums;         // [tile][segment][16] from the first tile on, or null
  const int32_t* start;             // [segment][row] -middle * sum(q - zero_x)
  const float* group_sums;          // [group][row] what the offset is multiplied with, or null
  const int32_t* zero_x;            // [x group][row]
  const float* scale_x;             // [x group][row], or null to leave it to the end
  int32_t* partial;                 // [row][tile][16] of an unfinished segment
  float* grouped;                   // [row][tile][16] of an unfinished weight group
  float* totals;                    // [row][tile][16]
  // What to fetch: a block's lines at `fetch` while block fetch_first is worked on, and on from
  // there with every fetch_every-th block, up to fetch_end.
  const uint8_t *fetch, *fetch_end;
  int64_t fetch_first, fetch_every;
};

// Codes of quad J of a block, one byte each. block: the tile's part of the first row; stride: from
// row to row.
template <class Core, int Bits, int J>
[[gnu::always_inline]] inline typename Core::Reg decode_quad(const uint8_t* block, int64_t stride) {
  using Reg = typename Core::Reg;
  if constexpr (Bits == 8) {
    return Core::load(block + J * stride);
  } else {
    using Plane = Planes<Bits>;
    constexpr int kMask = (1 << Bits) - 1;
    Reg code{};
    if constexpr (Plane::four) {
      code = Core::template place<plane_bit(4, J), 0>(
          Core::load(block + plane_position(Bits, 4, plane_row(4, J)) * stride));
    }
    if constexpr (Plane::two) {
      const Reg row = Core::load(block + plane_position(Bits, 2, plane_row(2, J)) * stride);
      if constexpr (Plane::four) {
        code = Core::template join<4>(code, Core::template place<plane_bit(2, J), 4>(row));
      } else {
        code = Core::template place<plane_bit(2, J), 0>(row);
      }
    }
    if constexpr (Plane::one) {
      constexpr int kAt = Bits - 1;
      const Reg row = Core::load(block);
      if constexpr (kAt == 0) {
        code = Core::template place<plane_bit(1, J), 0>(row);
      } else {
        code = Core::template join<kAt>(code, Core::template place<plane_bit(1, J), kAt>(row));
      }
    }
    return Core::template keep<kMask>(code);
  }
}

template <class Core, int Bits, bool Narrow, int Rows, int Tiles>
struct Kernel {
  static constexpr int kVectors = Core::kVectors;
  using Reg = typename Core::Reg;
  using Float = typename Core::Float;
  using Sums = Reg[Rows][Tiles * kVectors];

  template <int J>
  [[gnu::always_inline]] static void step(const uint8_t* block, int64_t stride, const int32_t* x,
                                          Sums& acc) {
    Reg weights[Tiles * kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < Tiles * kVectors; ++v)
      weights[v] = decode_quad<Core, Bits, J>(block + v * Core::kLanes * kQuad, stride);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const auto activation = Core::template broadcast<Narrow>(x + r);
#pragma GCC unroll 8
      for (int v = 0; v < Tiles * kVectors; ++v)
        acc[r][v] = Core::template dot<Narrow>(acc[r][v], weights[v], activation);
    }
  }

  // One quad that is not known when compiling: where segments end inside a block.
  [[gnu::always_inline]] static void odd_step(const KernelArgs& a, const uint8_t* block,
                                              int64_t quad, const int32_t* x, Sums& acc) {
    if constexpr (Bits == 8) step<0>(block + quad * a.row_stride, 0, x, acc);
  }

  template <bool Fetch, int I>
  [[gnu::always_inline]] static void block_step(const uint8_t* block, int64_t stride,
                                                const int32_t* x, Sums& acc, const uint8_t* fetch) {
    if constexpr (Fetch) prefetch_share_far<I, kQuads, Bits * kStrip>(fetch);
    step<quad_order(Bits, I)>(block, stride, x + quad_order(Bits, I) * Rows, acc);
  }

  template <bool Fetch, int... I>
  [[gnu::always_inline]] static void whole_block(const uint8_t* block, int64_t stride,
                                                 const int32_t* x, Sums& acc, const uint8_t* fetch,
                                                 std::integer_sequence<int, I...>) {
    (block_step<Fetch, I>(block, stride, x, acc, fetch), ...);
  }

  [[gnu::always_inline]] static void begin_segment(const KernelArgs& a, int64_t s, Sums& acc) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Reg start = Core::set(a.start[s * Rows + r]);
#pragma GCC unroll 8
      for (int v = 0; v < Tiles * kVectors; ++v) acc[r][v] = start;
    }
    if (a.code_sums == nullptr) return;
    const int32_t* zero_x = a.zero_x + a.segments[s].x_group * Rows;
#pragma GCC unroll 8
    for (int v = 0; v < Tiles * kVectors; ++v) {
      const Reg sums = Core::load(a.code_sums + (v / kVectors * a.segment_count + s) * kTile +
                                  v % kVectors * Core::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
        acc[r][v] = Core::subtract(acc[r][v], Core::multiply(Core::set(zero_x[r]), sums));
    }
  }

  [[gnu::always_inline]] static void end_segment(const KernelArgs& a, int64_t s, Sums& acc) {
    const IntegerSegment& segment = a.segments[s];
    Float sums[Rows][Tiles * kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < Tiles * kVectors; ++v) sums[r][v] = Core::convert(acc[r][v]);
    if (a.scale_x != nullptr || !segment.first) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Float by =
            Core::set(a.scale_x == nullptr ? 1.0f : a.scale_x[segment.x_group * Rows + r]);
        if (segment.first) {
#pragma GCC unroll 8
          for (int v = 0; v < Tiles * kVectors; ++v) sums[r][v] = Core::multiply(by, sums[r][v]);
        } else {
#pragma GCC unroll 8
          for (int v = 0; v < Tiles * kVectors; ++v)
            sums[r][v] = Core::fma(by, sums[r][v], Core::load(a.grouped + lane(r, v)));
        }
      }
    }
    if (!segment.last) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Tiles * kVectors; ++v) Core::store(a.grouped + lane(r, v), sums[r][v]);
      return;
    }
    if (a.group_sums != nullptr) {
#pragma GCC unroll 8
      for (int v = 0; v < Tiles * kVectors; ++v) {
        const Float offset = negated_offsets(a, segment.group, v);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sums[r][v] =
              Core::fma(Core::set(a.group_sums[segment.group * Rows + r]), offset, sums[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < Tiles * kVectors; ++v) {
      const Float scale = scales(a, segment.group, v);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        float* total = a.totals + lane(r, v);
        Core::store(total, Core::fma(scale, sums[r][v], Core::load(total)));
      }
    }
  }

  // Where the sums of a row and vector begin in partial, grouped and totals.
  static constexpr int64_t lane(int r, int v) { return (r * Tiles * kVectors + v) * Core::kLanes; }

  // The numbers of a group that vector `v` of a row of sums meets.
  [[gnu::always_inline]] static Float numbers(const TileNumbers& n, int64_t first, int64_t group,
                                              int v) {
    const int64_t at =
        first + group * n.group_stride + v / kVectors * n.tile_stride + v % kVectors * Core::kLanes;
    if (n.type == Scalar::float32) return Core::load(static_cast<const float*>(n.data) + at);
    if (n.type == Scalar::bfloat16)
      return Core::load_bf16(static_cast<const uint16_t*>(n.data) + at);
    alignas(64) float wide[Core::kLanes];
    load_scalars(n.data, n.type, at, Core::kLanes, wide);
    return Core::load(wide);
  }

  [[gnu::always_inline]] static Float scales(const KernelArgs& a, int64_t group, int v) {
    const TileNumbers& scale = a.problem->weight.scale;
    return scale.data == nullptr ? Core::set(1.0f) : numbers(scale, a.scale_first, group, v);
  }

  // What load_negated_offset of rows.h gives.
  [[gnu::always_inline]] static Float negated_offsets(const KernelArgs& a, int64_t group, int v) {
    const Weight& w = a.problem->weight;
    Float offset = Core::set(w.offset);
    if (w.zero.data != nullptr) offset = Core::add(numbers(w.zero, a.zero_first, group, v), offset);
    return Core::multiply(offset, Core::set(-1.0f));
  }

  static void run(const KernelArgs& a) {
    const uint8_t* fetch = a.fetch;
    int64_t until_fetch = a.fetch_first;
    for (int64_t i = 0; i < a.piece_count; ++i) {
      const Piece piece = a.pieces[i];
      Sums acc;
      if (piece.first) {
        begin_segment(a, piece.segment, acc);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < Tiles * kVectors; ++v) acc[r][v] = Core::load(a.partial + lane(r, v));
      }
      const int64_t from = piece.begin - a.chunk_begin;
      const uint8_t* block = a.weights + from / kBlock * a.block_stride;
      const int32_t* x = a.x + piece.begin / kQuad * Rows;
      int64_t left = (piece.end - piece.begin) / kQuad;
      if (const int64_t inside = from % kBlock / kQuad; inside != 0) {
        for (int64_t quad = inside; quad < kQuads && left > 0; ++quad, --left, x += Rows)
          odd_step(a, block, quad, x, acc);
        block += a.block_stride;
      }
      // Known when compiling where a kernel takes whole strips.
      const int64_t stride = Tiles == kStrip ? kStrip * kRowBytes : a.row_stride;
      for (; left >= kQuads; left -= kQuads, block += a.block_stride, x += kQuads * Rows) {
        constexpr auto quads = std::make_integer_sequence<int, kQuads>();
        if (until_fetch-- == 0 && fetch < a.fetch_end) {
          whole_block<true>(block, stride, x, acc, fetch, quads);
          fetch += a.fetch_every * Bits * kStrip * kRowBytes;
          until_fetch = a.fetch_every - 1;
        } else {
          whole_block<false>(block, stride, x, acc, nullptr, quads);
        }
      }
      for (int64_t quad = 0; quad < left; ++quad, x += Rows) odd_step(a, block, quad, x, acc);
      if (piece.last) {
        end_segment(a, piece.segment, acc);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < Tiles * kVectors; ++v) Core::store(a.partial + lane(r, v), acc[r][v]);
      }
    }
  }
};

using KernelFunction = void (*)(const KernelArgs&);

template <class Core, int Bits, bool Narrow, int Rows, int Tiles = Core::tiles(Rows)>
KernelFunction kernel_for(int64_t tiles) {
  // Only a strip that is cut short has fewer tiles, and its codes are decoded first.
  if constexpr (Tiles > 1 && Bits == 8) {
    if (tiles < Tiles) return kernel_for<Core, Bits, Narrow, Rows, Tiles - 1>(tiles);
  }
  return &Kernel<Core, Bits, Narrow, Rows, Tiles>::run;
}

template <class Core, int Bits, bool Narrow, int Rows = Core::kRows>
KernelFunction kernel_for(int64_t rows, int64_t tiles) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return kernel_for<Core, Bits, Narrow, Rows - 1>(rows, tiles);
  }
  return kernel_for<Core, Bits, Narrow, Rows>(tiles);
}

// bits: how codes lie in memory; narrow: whether they are below 128.
template <class Core>
KernelFunction kernel_for(int bits, bool narrow, int64_t rows, int64_t tiles) {
  switch (bits) {
    case 1:
      return kernel_for<Core, 1, true>(rows, tiles);
    case 2:
      return kernel_for<Core, 2, true>(rows, tiles);
    case 3:
      return kernel_for<Core, 3, true>(rows, tiles);
    case 4:
      return kernel_for<Core, 4, true>(rows, tiles);
    case 5:
      return kernel_for<Core, 5, true>(rows, tiles);
    case 6:
      return kernel_for<Core, 6, true>(rows, tiles);
    case 7:
      return kernel_for<Core, 7, true>(rows, tiles);
    default:
      if constexpr (Core::kTellNarrow) {
        if (narrow) return kernel_for<Core, 8, true>(rows, tiles);
      }
      return kernel_for<Core, 8, false>(rows, tiles);
  }
}

template <class Core, int Bits, int... J>
[[gnu::always_inline]] inline void decode_tile_block(const uint8_t* block, uint8_t* bytes,
                                                     int64_t stride,
                                                     std::integer_sequence<int, J...>) {
  for (int64_t part = 0; part < kRowBytes; part += Core::kLanes * kQuad)
    (Core::store(bytes + J * stride + part, decode_quad<Core, Bits, J>(block + part, stride)), ...);
}

// Decodes `blocks` blocks of a strip of `tiles` tiles to blocks of 8 bits.
template <class Core, int Bits>
void decode_strip(const uint8_t* packed, int64_t tiles, int64_t blocks, uint8_t* bytes) {
  const int64_t stride = tiles * kRowBytes;
  for (int64_t i = 0; i < blocks; ++i, packed += Bits * stride, bytes += kQuads * stride)
    for (int64_t tile = 0; tile < tiles; ++tile)
      decode_tile_block<Core, Bits>(packed + tile * kRowBytes, bytes + tile * kRowBytes, stride,
                                    std::make_integer_sequence<int, kQuads>());
}

template <class Core>
void decode_strip(int bits, const uint8_t* packed, int64_t tiles, int64_t blocks, uint8_t* bytes) {
  switch (bits) {
    case 1:
      return decode_strip<Core, 1>(packed, tiles, blocks, bytes);
    case 2:
      return decode_strip<Core, 2>(packed, tiles, blocks, bytes);
    case 3:
      return decode_strip<Core, 3>(packed, tiles, blocks, bytes);
    case 4:
      return decode_strip<Core, 4>(packed, tiles, blocks, bytes);
    case 5:
      return decode_strip<Core, 5>(packed, tiles, blocks, bytes);
    case 6:
      return decode_strip<Core, 6>(packed, tiles, blocks, bytes);
    default:
      return decode_strip<Core, 7>(packed, tiles, blocks, bytes);
  }
}

// Multiplies blocks of rows and tiles with the kernels above, while a unit of work lasts.
template <class Core>
struct VectorBlocks {
  static constexpr int kRows = Core::kRows;  // of a panel
  static constexpr int64_t kPanelsPerUnit = 48;
  static constexpr bool kDecodes = true;  // takes narrow codes as they are packed
  static constexpr int64_t tiles(int64_t rows) { return Core::tiles(static_cast<int>(rows)); }

  explicit VectorBlocks(const Problem&) {}

  // Puts q[padded_k] where row r of a panel of `rows` rows belongs in KernelArgs::x.
  void place_row(const int8_t* q, int64_t padded_k, int64_t r, int64_t rows, int32_t* x) const {
    for (int64_t i = 0; i < padded_k / kQuad; ++i)
      std::memcpy(x + i * rows + r, q + i * kQuad, kQuad);
  }
  // bits and narrow as for kernel_for
  void operator()(const KernelArgs& a, int bits, bool narrow, int64_t rows, int64_t tiles) const {
    kernel_for<Core>(bits, narrow, rows, tiles)(a);
  }
};

template <class Core, class Blocks>
struct IntegerCall {
  const Problem& p;
  const Geometry& g;
  const IntegerSegment* segments;
  int64_t segment_count;
  const Piece* pieces;
  const int32_t* chunk_pieces;  // index of each chunk's first piece, chunk_count + 1 entries
  int64_t chunk, chunks;
  int64_t x_group_count;
  bool direct;    // blocks decode packed codes themselves
  bool offset;    // a zero-point term remains beside the middle
  bool per_row;   // one activation scale for all of a row
  int64_t row0;   // first row of x in the panels
  Panels panels;  // of rows
  // Of panel i, at begin(i) times what a row takes, [...][row of the panel]:
  int32_t* x;         // [quad], or as the blocks place it
  int32_t* start;     // [segment]
  float* group_sums;  // [group], without offset unused
  int32_t* zero_x;    // [x group]
  float* scale_x;     // [x group]
  int64_t panels_per_unit;
  int32_t* kept;  // sums of pieces where K is cut among threads, else null: see kept_of

  int64_t strips() const { return (g.tiles + kStrip - 1) / kStrip; }
  int64_t strip_tiles(int64_t tile0) const { return least(g.tiles - tile0, kStrip); }
  // Codes of a strip of so many tiles are decoded to bytes before they are multiplied.
  bool decodes(int64_t tiles) const { return g.element.bits < 8 && (!direct || tiles < kStrip); }
  int64_t panel_units() const { return (panels.count + panels_per_unit - 1) / panels_per_unit; }

  void prepare(int64_t panel_begin, int64_t panel_end) const {
    float* row = nullptr;
    QuantizedGroup* by = nullptr;
    int8_t* q = nullptr;
    carve_from(worker_arena(), [&](Carver& carver) {
      row = carver.take<float>(2 * g.padded_k);
      by = carver.take<QuantizedGroup>(x_group_count);
      q = carver.take<int8_t>(g.padded_k);
    });
    const auto middle = static_cast<int32_t>(p.weight.middle);
    const Blocks blocks(p);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t rows = panels.rows(panel), begin = panels.begin(panel);
      for (int64_t r = 0; r < rows; ++r) {
        quantize_to_bytes(p, row0 + begin + r, row, row + g.padded_k, q, by, Core::quantize);
        blocks.place_row(q, g.padded_k, r, rows, x + begin * (g.padded_k / kQuad));
        for (int64_t i = 0; i < x_group_count; ++i) {
          zero_x[begin * x_group_count + i * rows + r] = by[i].zero;
          scale_x[begin * x_group_count + i * rows + r] = by[i].scale;
        }
        float group_sum = 0;
        for (int64_t s = 0; s < segment_count; ++s) {
          const IntegerSegment& segment = segments[s];
          const int64_t length = segment.end - segment.begin;
          const int32_t sum = sum_bytes(q + segment.begin, length) -
                              static_cast<int32_t>(length) * by[segment.x_group].zero;
          // Modulo 2^32, as all these integers; only the sum of a segment need be in range.
          start[begin * segment_count + s * rows + r] =
              static_cast<int32_t>(0u - static_cast<uint32_t>(middle) * static_cast<uint32_t>(sum));
          if (!offset) continue;
          group_sum = add_segment(segment, per_row ? 1.0f : by[segment.x_group].scale,
                                  static_cast<float>(sum), group_sum);
          group_sums[begin * g.groups + segment.group * rows + r] = group_sum;
        }
      }
    }
  }

  void multiply_unit(int64_t unit) const {
    const int64_t panel0 = unit % panel_units() * panels_per_unit;
    const int64_t panel1 = least(panel0 + panels_per_unit, panels.count);
    multiply(panel0, panel1, unit / panel_units() * kStrip);
  }

  // Panels [panel0, panel1) times the strip that begins with tile0.
  void multiply(int64_t panel0, int64_t panel1, int64_t tile0) const {
    const int64_t tiles = strip_tiles(tile0);
    const int64_t row_begin = panels.begin(panel0), rows = panels.begin(panel1) - row_begin;
    const int bits = g.element.bits;
    const bool decode = decodes(tiles);
    const int64_t slab_bytes = decode ? round_up(chunk, kBlock) * kStrip * kTile : 0;
    const int64_t total_floats = rows * tiles * kTile;
    uint8_t* slab = nullptr;
    float *totals = nullptr, *grouped = nullptr;
    int32_t* partial = nullptr;
    carve_from(worker_arena(), [&](Carver& carver) {
      slab = carver.take<uint8_t>(slab_bytes);
      totals = carver.take<float>(total_floats);
      grouped = carver.take<float>(total_floats);
      partial = carver.take<int32_t>(total_floats);
    });
    std::memset(totals, 0, static_cast<size_t>(total_floats) * sizeof(float));

    prefetch_scales(tile0 + kStrip);
    Blocks blocks(p);
    KernelArgs args = first_args();
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t k0 = c * chunk, width = chunk_width(c);
      args.pieces = pieces + chunk_pieces[c];
      args.piece_count = chunk_pieces[c + 1] - chunk_pieces[c];
      if (args.piece_count == 0) continue;
      args.chunk_begin = k0;
      const uint8_t* packed = quads_of(p.weight, tile0, k0);
      if (decode) decode_strip<Core>(bits, packed, tiles, width / kBlock, slab);
      const uint8_t* weights = decode ? slab : packed;
      const int stored_bits = decode ? 8 : bits;
      args.row_stride = tiles * kRowBytes;
      args.block_stride = stored_bits * args.row_stride;
      const int64_t packed_bytes = width / kBlock * bits * args.row_stride;
      const bool alone = panel1 - panel0 == 1;
      const int64_t ahead = !alone ? packed_bytes : bits == 8 ? kNextBlock : 0;
      args.fetch_end = ahead == 0 ? nullptr : packed + ahead + packed_bytes;
      args.fetch_every = panel1 - panel0;
      for (int64_t panel = panel0; panel < panel1; ++panel) {
        const int64_t begin = panels.begin(panel), height = panels.rows(panel);
        set_panel(args, panel);
        const int64_t step = Blocks::tiles(height);
        for (int64_t t = 0; t < tiles; t += step) {
          const int64_t wide = least(tiles - t, step);
          // Blocks of [row][tile] sums, one for each kernel.
          const int64_t at = ((begin - row_begin) * tiles + t * height) * kTile;
          set_tile(args, weights, tile0, t);
          args.fetch_first = t == 0 ? panel - panel0 : -1;
          args.fetch = packed + ahead + (panel - panel0) * stored_bits * kStrip * kRowBytes;
          args.partial = partial + at;
          args.grouped = grouped + at;
          args.totals = totals + at;
          blocks(args, stored_bits, bits < 8, height, wide);
        }
      }
    }
    for (int64_t panel = panel0; panel < panel1; ++panel)
      store(panel, row_begin, tile0, tiles, totals);
  }

  KernelArgs first_args() const {
    KernelArgs args{};
    args.segments = segments;
    args.segment_count = segment_count;
    args.problem = &p;
    return args;
  }

  void set_panel(KernelArgs& args, int64_t panel) const {
    const int64_t begin = panels.begin(panel);
    args.x = x + begin * (g.padded_k / kQuad);
    args.start = start + begin * segment_count;
    args.group_sums = offset ? group_sums + begin * g.groups : nullptr;
    args.zero_x = zero_x + begin * x_group_count;
    args.scale_x = per_row ? nullptr : scale_x + begin * x_group_count;
  }

  // t: tile of the strip, whose weights begin at `weights`
  void set_tile(KernelArgs& args, const uint8_t* weights, int64_t tile0, int64_t t) const {
    args.weights = weights + t * kRowBytes;
    args.tile = tile0 + t;
    args.scale_first = p.weight.scale.at(tile0 + t, 0);
    args.zero_first = p.weight.zero.at(tile0 + t, 0);
    args.code_sums = p.weight.code_sums == nullptr
                         ? nullptr
                         : p.weight.code_sums + (tile0 + t) * segment_count * kTile;
  }

  int64_t chunk_width(int64_t c) const { return least(g.padded_k - c * chunk, chunk); }

  // Sums of a piece, blocks of [row][tile][16] as in partial; there is one panel.
  int32_t* kept_of(int64_t tile0, int64_t piece) const {
    return kept + (tile0 / kStrip * chunk_pieces[chunks] + piece) * kept_lanes();
  }
  int64_t kept_lanes() const { return panels.rows(0) * kStrip * kTile; }

  // Units count the chunks of each strip.
  void multiply_chunk(int64_t unit) const {
    const int64_t tile0 = unit / chunks * kStrip, tiles = strip_tiles(tile0), c = unit % chunks;
    const int64_t height = panels.rows(0), step = Blocks::tiles(height);
    const int bits = g.element.bits;
    const uint8_t* weights = quads_of(p.weight, tile0, c * chunk);
    const bool decode = decodes(tiles);
    if (decode) {
      uint8_t* slab = static_cast<uint8_t*>(
          worker_arena().reserve(static_cast<size_t>(round_up(chunk, kBlock) * kStrip * kTile)));
      decode_strip<Core>(bits, weights, tiles, chunk_width(c) / kBlock, slab);
      weights = slab;
    }
    const int stored_bits = decode ? 8 : bits;
    Blocks blocks(p);
    KernelArgs args = first_args();
    args.row_stride = tiles * kRowBytes;
    args.block_stride = stored_bits * args.row_stride;
    args.chunk_begin = c * chunk;
    args.piece_count = 1;
    args.fetch_first = -1;
    set_panel(args, 0);
    for (int64_t i = chunk_pieces[c]; i < chunk_pieces[c + 1]; ++i) {
      Piece piece = pieces[i];
      piece.last = false;
      args.pieces = &piece;
      int32_t* sums = kept_of(tile0, i);
      if (!piece.first) std::memset(sums, 0, static_cast<size_t>(kept_lanes()) * sizeof(int32_t));
      for (int64_t t = 0; t < tiles; t += step) {
        set_tile(args, weights, tile0, t);
        args.partial = sums + t * height * kTile;
        blocks(args, stored_bits, bits < 8, height, least(tiles - t, step));
      }
    }
  }

  // Adds what the chunks of a strip left, and finishes its segments in order.
  void finish_strip(int64_t strip) const {
    const int64_t tile0 = strip * kStrip, tiles = strip_tiles(tile0);
    const int64_t height = panels.rows(0), step = Blocks::tiles(height);
    float* totals = static_cast<float*>(
        worker_arena().reserve(static_cast<size_t>(2 * kept_lanes()) * sizeof(float)));
    std::memset(totals, 0, static_cast<size_t>(kept_lanes()) * sizeof(float));
    const int stored_bits = decodes(tiles) ? 8 : g.element.bits;
    Blocks blocks(p);
    KernelArgs args = first_args();
    args.piece_count = 1;
    args.fetch_first = -1;
    set_panel(args, 0);
    int32_t* sums = nullptr;
    for (int64_t i = 0; i < chunk_pieces[chunks]; ++i) {
      const Piece& piece = pieces[i];
      const int32_t* part = kept_of(tile0, i);
      if (piece.first) {
        sums = kept_of(tile0, i);
      } else {
        for (int64_t lane = 0; lane < height * tiles * kTile; ++lane)
          sums[lane] = static_cast<int32_t>(static_cast<uint32_t>(sums[lane]) +
                                            static_cast<uint32_t>(part[lane]));
      }
      if (!piece.last) continue;
      // Without channels of its own: all that is left of the segment is its end.
      const Piece end = {piece.end, piece.end, piece.segment, false, true};
      args.pieces = &end;
      args.chunk_begin = piece.end;
      for (int64_t t = 0; t < tiles; t += step) {
        set_tile(args, p.weight.packed, tile0, t);
        args.partial = sums + t * height * kTile;
        args.totals = totals + t * height * kTile;
        args.grouped = totals + kept_lanes() + t * height * kTile;
        blocks(args, stored_bits, g.element.bits < 8, height, least(tiles - t, step));
      }
    }
    store(0, 0, tile0, tiles, totals);
  }

  // Scales of the next strip, while this one is read: their few lines would be waited for.
  void prefetch_scales(int64_t tile0) const {
    if (tile0 >= g.tiles) return;
    const int64_t lanes = strip_tiles(tile0) * g.groups * kTile;
    const auto fetch = [&](const TileNumbers& numbers) {
      if (numbers.data == nullptr) return;
      const int64_t size = size_of(numbers.type);
      const char* from = static_cast<const char*>(numbers.data) + numbers.at(tile0, 0) * size;
      for (int64_t at = 0; at < lanes * size; at += kRowBytes) __builtin_prefetch(from + at, 0, 2);
    };
    fetch(p.weight.scale);
    fetch(p.weight.zero);
  }

  void store(int64_t panel, int64_t row_begin, int64_t tile0, int64_t tiles, float* totals) const {
    const int64_t begin = panels.begin(panel), height = panels.rows(panel);
    const int64_t step = Blocks::tiles(height);
    for (int64_t t = 0; t < tiles; t += step) {
      const int64_t wide = (least(tiles - t, step)) * kTile;
      float* sums = totals + ((begin - row_begin) * tiles + t * height) * kTile;
      for (int64_t r = 0; r < height; ++r, sums += wide) {
        if (per_row) {
          const float by = scale_x[begin * x_group_count + r];
          for (int64_t i = 0; i < wide; ++i) sums[i] *= by;
        }
        store_row(p, row0 + begin + r, (tile0 + t) * kTile, wide, sums);
      }
    }
  }
};

// Channels per chunk: whole weight groups where that is possible, or all of K. once: weights are
// read a single time, as they are packed.
inline int64_t chunk_of(const Geometry& g, bool once) {
  if (once) return g.padded_k;
  if (g.padded_group % kBlock != 0 || g.padded_group > kIntegerChunk) return kIntegerChunk;
  return kIntegerChunk / g.padded_group * g.padded_group;
}

// Parts of K of every strip: more than one where there are fewer strips than threads. With as many,
// a second round of threads costs more than the evener parts gain.
inline int64_t integer_k_parts(const Geometry& g, int64_t rows, int64_t segments, int64_t threads) {
  const int64_t strips = (g.tiles + kStrip - 1) / kStrip;
  if (strips == 0 || strips >= threads) return 1;
  int64_t parts = (2 * threads + strips - 1) / strips;
  const int64_t most = kStrip * g.tile_bytes() / kLeastIntegerPartBytes;
  parts = least(least(parts, most), g.padded_k / kBlock);
  if (strips * rows * (segments + parts) * kStrip * kTile * 4 > kKeptBytes) return 1;
  return parts > 1 ? parts : 1;
}

// Fills pieces and chunk_pieces; returns whether every piece is whole blocks.
inline bool make_pieces(const IntegerSegment* segments, int64_t segment_count, int64_t chunk,
                        int64_t chunks, Piece* pieces, int32_t* chunk_pieces) {
  bool whole = true;
  int32_t count = 0;
  int64_t s = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    chunk_pieces[c] = count;
    const int64_t begin = c * chunk, end = begin + chunk;
    for (; s < segment_count && segments[s].begin < end; ++s) {
      const IntegerSegment& segment = segments[s];
      const int64_t from = segment.begin < begin ? begin : segment.begin;
      const int64_t to = least(segment.end, end);
      pieces[count++] = {static_cast<int32_t>(from), static_cast<int32_t>(to),
                         static_cast<int32_t>(s), from == segment.begin, to == segment.end};
      whole = whole && from % kBlock == 0 && to % kBlock == 0;
      if (segment.end > end) break;
    }
  }
  chunk_pieces[chunks] = count;
  return whole;
}

template <class Core, class Blocks = VectorBlocks<Core>>
void run_integer_linear(const Problem& p, const Parallel& parallel) {
  const Geometry& g = p.weight.geometry;
  if (p.x.m == 0 || g.n == 0) return;
  const int64_t activation_group = p.x.activation.group;
  const int64_t segment_count = count_segments(g, activation_group);
  const int64_t x_group_count = x_groups(g, activation_group);
  const int64_t row_bytes = g.padded_k + 4 * (segment_count + g.groups + 2 * x_group_count);
  int64_t rows_at_once = kIntegerActivationBytes / row_bytes;
  if (rows_at_once < Blocks::kRows) rows_at_once = Blocks::kRows;
  rows_at_once = least(rows_at_once, p.x.m);

  for (int64_t row0 = 0; row0 < p.x.m; row0 += rows_at_once) {
    const int64_t rows = least(p.x.m - row0, rows_at_once);
    const Panels panels(rows, Blocks::kRows);
    const bool as_packed = Blocks::kDecodes || g.element.bits == 8;
    const int64_t parts = Blocks::kDecodes && panels.count == 1
                              ? integer_k_parts(g, rows, segment_count, parallel.threads)
                              : 1;
    const int64_t chunk = parts > 1 ? round_up((g.padded_k + parts - 1) / parts, kBlock)
                                    : chunk_of(g, panels.count == 1 && as_packed);
    const int64_t chunks = (g.padded_k + chunk - 1) / chunk;

    IntegerSegment* segments = nullptr;
    Piece* pieces = nullptr;
    int32_t *chunk_pieces = nullptr, *x = nullptr, *start = nullptr, *zero_x = nullptr;
    int32_t* kept = nullptr;
    float *group_sums = nullptr, *scale_x = nullptr;
    carve_from(call_arena(), [&](Carver& carver) {
      segments = carver.take<IntegerSegment>(segment_count);
      pieces = carver.take<Piece>(segment_count + chunks);
      chunk_pieces = carver.take<int32_t>(chunks + 1);
      x = carver.take<int32_t>(rows * (g.padded_k / kQuad));
      start = carver.take<int32_t>(rows * segment_count);
      group_sums = carver.take<float>(has_offset(p) ? rows * g.groups : 0);
      zero_x = carver.take<int32_t>(rows * x_group_count);
      scale_x = carver.take<float>(rows * x_group_count);
      if (parts > 1)
        kept = carver.take<int32_t>(round_up(g.tiles, kStrip) * kTile * rows *
                                    (segment_count + chunks));
    });
    int64_t filled = 0;
    for_each_segment(g, activation_group,
                     [&](const IntegerSegment& segment) { segments[filled++] = segment; });
    const bool whole = make_pieces(segments, segment_count, chunk, chunks, pieces, chunk_pieces);

    IntegerCall<Core, Blocks> call{p,
                                   g,
                                   segments,
                                   segment_count,
                                   pieces,
                                   chunk_pieces,
                                   chunk,
                                   chunks,
                                   x_group_count,
                                   Blocks::kDecodes && whole && panels.count <= kDirectPanels,
                                   has_offset(p),
                                   activation_group == 0,
                                   row0,
                                   panels,
                                   x,
                                   start,
                                   group_sums,
                                   zero_x,
                                   scale_x,
                                   Blocks::kPanelsPerUnit,
                                   kept};
    while (call.panels_per_unit > 8 && call.panel_units() * call.strips() < 4 * parallel.threads)
      call.panels_per_unit /= 2;

    using Context = const IntegerCall<Core, Blocks>;
    const auto prepare = [](void* context, int64_t begin, int64_t end) {
      static_cast<Context*>(context)->prepare(begin, end);
    };
    const auto multiply = [](void* context, int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit)
        static_cast<Context*>(context)->multiply_unit(unit);
    };
    if (panels.count == 1) {
      prepare(&call, 0, 1);
    } else {
      parallel.run(panels.count, prepare, &call);
    }
    if (kept == nullptr) {
      parallel.run(call.panel_units() * call.strips(), multiply, &call);
      continue;
    }
    parallel.run(
        call.strips() * chunks,
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t unit = begin; unit < end; ++unit)
            static_cast<Context*>(context)->multiply_chunk(unit);
        },
        &call);
    parallel.run(
        call.strips(),
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t strip = begin; strip < end; ++strip)
            static_cast<Context*>(context)->finish_strip(strip);
        },
        &call);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
