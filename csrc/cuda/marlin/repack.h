// SPDX-License-Identifier: Apache-2.0
// Kernels that repack weights into Marlin's order on the GPU, with the same bits as
// cpu/repack/repack.h and cpu/repack/marlin_scales.h. For nvcc and, in the tests, for g++ and the
// emulator.
// Has run on hardware: nothing; the kernels have run in the emulator only.
#pragma once

#include <cstdint>

#include "cuda/device/device.h"
#include "layouts/marlin.h"
#include "repack_launch.h"

namespace compressed_linear::cuda {

constexpr int kRepackThreads = 256;
// Input channels of a block: whole sectors of a stored row of 4-bit codes.
constexpr int kRepackK = 64;
// Codes in shared memory: [output channel][input channel], a byte each. The stride of rows is an
// odd number of words, which avoids bank conflicts along rows and along columns.
constexpr int kRepackRow = kRepackK + 4;
constexpr int kRepackShared = marlin::kTileN * kRepackRow;

// Words of a tile of 64 output channels in a strip.
template <int Bits>
constexpr int kTileWords = marlin::kLanes * marlin::lane_words(Bits);

// Bytes `at` to `at` + 3 of the source, little-endian. `data` + `at` is aligned to four bytes;
// bytes outside of the source are 0.
CL_DEVICE uint32_t repack_word(const RepackSource& s, int64_t at) {
  if (at >= 0 && at + 4 <= s.bytes)
    return load_constant(reinterpret_cast<const uint32_t*>(s.data + at));
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i)
    if (at + i >= 0 && at + i < s.bytes)
      word |= static_cast<uint32_t>(load_constant(s.data + at + i)) << (8 * i);
  return word;
}

// First bit of a field, counted from `data`; `at` and `across` are from k_at and n_at.
CL_DEVICE int64_t repack_bit(const RepackSource& s, int at, int across, int n) {
  if (s.order == CodeOrder::n_major) return (s.n_first + n) * s.row_bytes * 8 + at;
  if (s.order == CodeOrder::k_major) return at * s.row_bytes * 8 + across;
  return at / s.container_bits * s.row_bytes * 8 +
         static_cast<int64_t>(s.n_first + n) * s.container_bits + at % s.container_bits;
}

// Reads fields in sequence; consecutive fields in one word cost one load.
struct FieldReader {
  const RepackSource& s;
  int64_t held = -8;
  uint32_t word = 0;

  // A field that does not begin at a multiple of its width may straddle two words.
  CL_DEVICE uint32_t field(int64_t bit) {
    const int64_t byte = bit / 8;
    const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(s.data) & 3);
    const int64_t aligned = ((byte + skew) & ~int64_t{3}) - skew;
    if (aligned != held) {
      word = repack_word(s, aligned);
      held = aligned;
    }
    const int shift = static_cast<int>(bit - aligned * 8);
    uint32_t value = word >> shift;
    if (shift + s.width > 32) {
      word = repack_word(s, aligned + 4);
      held = aligned + 4;
      value |= word << (32 - shift);
    }
    return value & ((1u << s.width) - 1);
  }
};

// Four numbers that begin at a multiple of four.
CL_DEVICE void load_four(const int32_t* from, int (&four)[4]) {
  const Words4 words = load_constant(reinterpret_cast<const Words4*>(from));
  const uint32_t each[4] = {words.x, words.y, words.z, words.w};
  for (int i = 0; i < 4; ++i) four[i] = static_cast<int>(each[i]);
}

// Repacks one tile of 64 output channels by kRepackK input channels, or fewer at the end. Grid:
// block_x() counts steps of kRepackK, block_y() tiles.
template <int Bits>
CL_GLOBAL(kRepackThreads)
void repack_codes(CL_PARAMS RepackParams p) {
  const int k_begin = block_x() * kRepackK;
  const int k_count = p.k - k_begin < kRepackK ? p.k - k_begin : kRepackK;
  const int tile_n = block_y() * marlin::kTileN;
  const uint32_t codes = shared_base();
  uint32_t bad = 0;

  // Four codes for each thread and round. Neighbouring threads read neighbouring addresses: along
  // the stored stream, or the columns of k_words.
  constexpr int kQuads = marlin::kTileN * kRepackK / 4;
  for (int quad = thread_index(); quad < kQuads; quad += kRepackThreads) {
    FieldReader reader{p.source};
    const bool across = p.source.order == CodeOrder::k_major;
    constexpr int kAlong = kRepackK / 4, kAcross = marlin::kTileN / 4;
    int n = quad / kAlong, k = quad % kAlong * 4;
    if (p.source.order == CodeOrder::k_words) {
      n = quad % marlin::kTileN;
      k = quad / marlin::kTileN * 4;
    } else if (across) {
      n = quad % kAcross * 4;
      k = quad / kAcross;
    }
    // The four have k or n in common. K is a multiple of four, `rows` need not be.
    const int channel = tile_n + n - p.row_begin;
    int at[4] = {-1, -1, -1, -1}, bits[4] = {};
    if (k < k_count) {
      if (across) {
        at[0] = load_constant(p.source.k_at + k_begin + k);
        for (int i = 1; i < 4; ++i) at[i] = at[0];
        if (channel >= 0 && channel + 4 <= p.source.rows) {
          load_four(p.source.n_at + channel, bits);
        } else {
          for (int i = 0; i < 4; ++i)
            if (channel >= 0 && channel + i < p.source.rows)
              bits[i] = load_constant(p.source.n_at + channel + i);
        }
      } else {
        load_four(p.source.k_at + k_begin + k, at);
      }
    }
    uint32_t four = 0;
    for (int i = 0; i < 4; ++i) {
      const int row = channel + (across ? i : 0);
      uint32_t code = 0;
      if (row >= p.source.rows) {
        code = row < p.source.rows + p.source.blank ? p.source.blank_code : 0;
      } else if (row >= 0 && at[i] >= 0) {
        code = reader.field(repack_bit(p.source, at[i], bits[i], row)) ^ p.source.flip;
      }
      bad |= ((code & p.wrong_mask) + p.wrong_add) & p.wrong_bits;
      four |= code << (8 * i);
      if (across)
        store_shared(codes + static_cast<uint32_t>((n + i) * kRepackRow + k),
                     static_cast<uint8_t>(code));
    }
    if (!across) store_shared(codes + static_cast<uint32_t>(n * kRepackRow + k), four);
  }
  if (bad != 0) atomic_add(p.wrong, 1);
  sync_threads();

  // A word for each thread and round, in the order of memory.
  const int words = k_count / marlin::kStripK * kTileWords<Bits>;
  for (int at = thread_index(); at < words; at += kRepackThreads) {
    const int strip = at / kTileWords<Bits>, in_tile = at % kTileWords<Bits>;
    const int lane = in_tile / marlin::lane_words(Bits), index = in_tile % marlin::lane_words(Bits);
    const int first_n = lane / 4 + (Bits == 4 ? index * 16 : index * 8);
    const int first_k = strip * marlin::kStripK + lane % 4 * 2;
    // Words of tiles of 16 channels that belong to other sources are not written.
    const int channel = tile_n + first_n / 16 * 16 - p.row_begin;
    if (channel < 0 || channel >= p.source.rows + p.source.blank) continue;
    uint32_t word = 0;
    for (int block = 0; block < (Bits == 4 ? 2 : 1); ++block)
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = load_shared<uint16_t>(
            codes + static_cast<uint32_t>((first_n + block * 8) * kRepackRow + first_k + half * 8));
        const uint32_t spread = (pair & 0xffu) | (pair & 0xff00u) << 8;
        word |= spread << (block * 8 + half * Bits);
      }
    const int64_t out =
        static_cast<int64_t>(k_begin / marlin::kStripK + strip) * marlin::strip_words(Bits, p.n) +
        static_cast<int64_t>(block_y()) * kTileWords<Bits> + in_tile;
    store_global(p.packed + out, word);
  }
}

// Groups of a block, which has a tile of 64 output channels.
constexpr int kScaleGroups = 32;
constexpr int kScaleThreads = 256;
// Each value has four bytes in shared memory; rows have an odd number of values.
constexpr int kScaleRow = kScaleGroups + 1;
constexpr int kScaleShared = marlin::kTileN * kScaleRow * 4;

// Copies the block's values to shared memory, [output channel][group].
template <class Value>
CL_DEVICE void gather_scales(const ScaleParams& p, int tile_n, int first_group, int count) {
  const uint32_t values = shared_base();
  // Neighbouring threads read neighbouring addresses.
  const bool along_n = p.n_stride == 1;
  for (int at = thread_index(); at < marlin::kTileN * kScaleGroups; at += kScaleThreads) {
    const int n = along_n ? at % marlin::kTileN : at / kScaleGroups;
    const int group = along_n ? at / marlin::kTileN : at % kScaleGroups;
    if (group >= count) continue;
    const Value* from = static_cast<const Value*>(p.data);
    const Value value =
        load_constant(from + (tile_n + n) * p.n_stride + (first_group + group) * p.group_stride);
    store_shared(values + static_cast<uint32_t>((n * kScaleRow + group) * 4),
                 static_cast<uint32_t>(value));
  }
  sync_threads();
}

CL_DEVICE uint32_t gathered(int n, int group) {
  return load_shared<uint32_t>(shared_base() + static_cast<uint32_t>((n * kScaleRow + group) * 4));
}

// Grid: block_x() counts steps of kScaleGroups groups, block_y() tiles.
template <class Value>
CL_GLOBAL(kScaleThreads)
void repack_scales(CL_PARAMS ScaleParams p) {
  const int tile_n = block_y() * marlin::kTileN, first = block_x() * kScaleGroups;
  const int count = p.groups - first < kScaleGroups ? p.groups - first : kScaleGroups;
  gather_scales<Value>(p, tile_n, first, count);
  for (int at = thread_index(); at < count * marlin::kTileN; at += kScaleThreads) {
    const int group = at / marlin::kTileN, column = at % marlin::kTileN;
    const int n = static_cast<int>(cpu::marlin_channel(p.columns, column));
    store_global(
        static_cast<Value*>(p.out) + static_cast<int64_t>(first + group) * p.n + tile_n + column,
        static_cast<Value>(gathered(n, group)));
  }
}

template <int Bits>
CL_GLOBAL(kScaleThreads)
void repack_zeros(CL_PARAMS ScaleParams p) {
  constexpr int kPerWord = marlin::codes_per_word(Bits), kWords = marlin::kTileN / kPerWord;
  const int tile_n = block_y() * marlin::kTileN, first = block_x() * kScaleGroups;
  const int count = p.groups - first < kScaleGroups ? p.groups - first : kScaleGroups;
  gather_scales<uint8_t>(p, tile_n, first, count);
  for (int at = thread_index(); at < count * kWords; at += kScaleThreads) {
    const int group = at / kWords, index = at % kWords;
    uint32_t word = 0, all = 0;
    for (int slot = 0; slot < kPerWord; ++slot) {
      const uint32_t zero =
          gathered(static_cast<int>(marlin::zero_channel(Bits, index, slot)), group);
      all |= zero;
      word |= zero << (slot * Bits);
    }
    if (all >> Bits != 0) atomic_add(p.wrong, 1);
    store_global(static_cast<uint32_t*>(p.out) +
                     static_cast<int64_t>(first + group) * (p.n / kPerWord) + tile_n / kPerWord +
                     index,
                 word);
  }
}

}  // namespace compressed_linear::cuda
