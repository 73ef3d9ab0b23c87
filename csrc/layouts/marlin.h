// SPDX-License-Identifier: Apache-2.0
// Marlin's tile order: the position of each code, scale, zero point and bias of a weight [N, K], in
// which a warp reads its tensor-core fragments from consecutive words. For nvcc and for g++,
// without torch. The same order as that of vLLM's Marlin kernels for 16-bit activations: compared
// with vLLM's packers in tests/backends/marlin/test_packing.py.
//
// | strip | 16 input channels of all output channels: one row of the int32 weight [K/16, N*16/pack]
// | tile  | 64 output channels of a strip: 32 lanes of 4 * bits / 4 consecutive words each. A row
// |       | is N / 64 tiles
// | lane  | holds, of each 16 channels n of its tile, the eight codes that thread `lane` of a warp
// |       | has of the operand B [16, 16] of two mma.m16n8k16: column n % 8 = lane / 4, rows
// |       | k % 8 = 2 * (lane % 4) and the next, in both halves of k and both halves of n
//
// In a word, `(word >> shift) & mask` moves the codes of channels k and k + 1 to the same bits of
// both 16-bit halves, where they are decoded as a pair. The order depends on the number of bits
// only, not on the element type (integers, e2m1, e4m3, indices into a codebook).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define COMPRESSED_LINEAR_HOST_DEVICE __host__ __device__
#else
#define COMPRESSED_LINEAR_HOST_DEVICE
#endif

// Inlined everywhere: units with their own instruction-set flags include this, too.
#define COMPRESSED_LINEAR_LAYOUT COMPRESSED_LINEAR_HOST_DEVICE static constexpr

namespace compressed_linear::marlin {

constexpr int kStripK = 16;
constexpr int kTileN = 64;
constexpr int kLanes = 32;
constexpr int kWordBits = 32;

// A field of `bits` bits: word `word` of a row-major int32 tensor, from bit `shift` on.
struct Field {
  int64_t word;
  int shift;
};

// A position in [N, K].
struct Place {
  int64_t k, n;
};

// Codes in a word of the weight.
COMPRESSED_LINEAR_LAYOUT int codes_per_word(int bits) { return kWordBits / bits; }

// Words in a row of the weight, which is a strip of 16 input channels.
COMPRESSED_LINEAR_LAYOUT int64_t strip_words(int bits, int64_t n_count) {
  return n_count * kStripK / codes_per_word(bits);
}

// Words of a lane in a tile: 4 for 4 bits, 8 for 8 bits.
COMPRESSED_LINEAR_LAYOUT int lane_words(int bits) {
  return kStripK * kTileN / kLanes / codes_per_word(bits);
}

// Order of the codes, or zero points, in a word: the even ones of its run, then the odd ones.
COMPRESSED_LINEAR_LAYOUT int slot_of_element(int bits, int element) {
  const int half = codes_per_word(bits) / 2;
  return element % 2 * half + element / 2;
}

COMPRESSED_LINEAR_LAYOUT int element_of_slot(int bits, int slot) {
  const int half = codes_per_word(bits) / 2;
  return slot % half * 2 + slot / half;
}

// Position of code (k, n) in the weight, int32 [K / 16, N * 16 / codes_per_word]. bits: 4 or 8.
COMPRESSED_LINEAR_LAYOUT Field code_field(int bits, int64_t n_count, int64_t k, int64_t n) {
  const int row = static_cast<int>(k % kStripK), column = static_cast<int>(n % kTileN);
  const int lane = column % 8 * 4 + row % 8 / 2;
  // The eight codes of a lane's 16 channels n, in the order of B's registers.
  const int element = column / 8 % 2 * 4 + row / 8 * 2 + row % 2;
  const int index = column / 16 * 8 + element;  // among the 32 codes of the lane
  const int per_word = codes_per_word(bits);
  return {k / kStripK * strip_words(bits, n_count) +
              (n / kTileN * kLanes + lane) * lane_words(bits) + index / per_word,
          slot_of_element(bits, index % per_word) * bits};
}

// The inverse: (k, n) of the code in slot `slot` (from bit slot * bits on) of word `word`.
COMPRESSED_LINEAR_LAYOUT Place code_place(int bits, int64_t n_count, int64_t word, int slot) {
  const int64_t strip = word / strip_words(bits, n_count);
  const int64_t in_strip = word % strip_words(bits, n_count);
  const int64_t tile_words = int64_t{kLanes} * lane_words(bits);
  const int in_tile = static_cast<int>(in_strip % tile_words);
  const int lane = in_tile / lane_words(bits);
  const int index = in_tile % lane_words(bits) * codes_per_word(bits) + element_of_slot(bits, slot);
  const int element = index % 8;
  return {strip * kStripK + element / 2 % 2 * 8 + lane % 4 * 2 + element % 2,
          in_strip / tile_words * kTileN + index / 8 * 16 + element / 4 * 8 + lane / 4};
}

// Column of scales [G, N] (and zero points) of groups, which apply to the operand B: within 64
// output channels n % 8 is the slow index, so that a lane reads its eight scales at once.
COMPRESSED_LINEAR_LAYOUT int64_t grouped_column(int64_t n) {
  return n / kTileN * kTileN + n % 8 * 8 + n % kTileN / 8;
}

COMPRESSED_LINEAR_LAYOUT int64_t channel_of_grouped_column(int64_t column) {
  return column / kTileN * kTileN + column % 8 * 8 + column % kTileN / 8;
}

// Column of scales of whole channels (G = 1) and of the bias, which apply to the result. A lane's
// fragment of it has columns 2 * (lane % 4) and the next of each 8: within 32 output channels those
// of a lane are consecutive.
COMPRESSED_LINEAR_LAYOUT int64_t channel_column(int64_t n) {
  return n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2;
}

COMPRESSED_LINEAR_LAYOUT int64_t channel_of_channel_column(int64_t column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// Scales of 8 bits (e4m3, e8m0) are widened by the same instructions as codes of 8 bits, so each
// four grouped columns are stored 0 2 1 3. Its own inverse.
COMPRESSED_LINEAR_LAYOUT int64_t byte_column(int64_t grouped) {
  return grouped / 4 * 4 + slot_of_element(8, static_cast<int>(grouped % 4));
}

// Position of zero point (g, n), int32 [G, N / codes_per_word]: grouped columns, in words that are
// ordered as those of the weight. Also for G = 1.
COMPRESSED_LINEAR_LAYOUT Field zero_field(int bits, int64_t n_count, int64_t g, int64_t n) {
  const int64_t column = grouped_column(n);
  const int per_word = codes_per_word(bits);
  return {g * (n_count / per_word) + column / per_word,
          slot_of_element(bits, static_cast<int>(column % per_word)) * bits};
}

// The output channel of the zero point in slot `slot` of a row's word `word`.
COMPRESSED_LINEAR_LAYOUT int64_t zero_channel(int bits, int64_t word, int slot) {
  return channel_of_grouped_column(word * codes_per_word(bits) + element_of_slot(bits, slot));
}

namespace checks {

// Positions are unique, and the inverse finds each code. Two strips of two tiles suffice, since the
// others repeat them.
COMPRESSED_LINEAR_LAYOUT bool is_inverse(int bits) {
  for (int k = 0; k < 2 * kStripK; k += 5)
    for (int n = 0; n < 2 * kTileN; ++n) {
      const Field at = code_field(bits, 2 * kTileN, k, n);
      const Place back = code_place(bits, 2 * kTileN, at.word, at.shift / bits);
      if (back.k != k || back.n != n) return false;
      const Field zero = zero_field(bits, 2 * kTileN, 0, n);
      if (zero_channel(bits, zero.word, zero.shift / bits) != n) return false;
      if (channel_of_grouped_column(grouped_column(n)) != n) return false;
      if (channel_of_channel_column(channel_column(n)) != n) return false;
      if (byte_column(byte_column(n)) != n) return false;
    }
  return true;
}
static_assert(is_inverse(4) && is_inverse(8), "");

// A pair (k, k + 1) is 16 bits apart in one word.
static_assert(code_field(4, 64, 1, 0).shift - code_field(4, 64, 0, 0).shift == 16 &&
                  code_field(8, 64, 7, 9).shift - code_field(8, 64, 6, 9).shift == 16,
              "");
static_assert(lane_words(4) == 4 && lane_words(8) == 8 && strip_words(4, 64) == 128, "");

}  // namespace checks
}  // namespace compressed_linear::marlin
