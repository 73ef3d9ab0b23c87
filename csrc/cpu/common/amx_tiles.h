// SPDX-License-Identifier: Apache-2.0
// The tile instructions of AMX that the engines use, behind one interface with two implementations:
// the processor's, and plain C++ that gives the same bits and ends the program where the processor
// would raise an exception. Semantics: Intel 64 and IA-32 Architectures Software Developer's
// Manual, volume 2, LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS, TDPBSUD and TDPBSSD.
//
//   configure(config), release()
//   zero<T>(), load<T>(from, stride), store<T>(to, stride)     stride: bytes from row to row
//   dot_bf16<C, A, B>()    C[m][n] += sum over pairs (k, k+1) of A[m][k..] B[k..][n]
//   dot_bytes<C, A, B>()   the same over quads of bytes, signed in A and unsigned in B, to int32
//   dot_signed_bytes<C, A, B>()   signed in both
//
// A tile is up to 16 rows of up to 64 bytes. B holds a row for each pair or quad of K, as decoded
// blocks of the packed layouts do. TileGrid has their shapes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "floats.h"
#include "least.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int kTileRows = 16, kTileRowBytes = 64, kTileCount = 8;

// As LDTILECFG reads it.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t row_count, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(row_count);
    row_bytes[tile] = static_cast<uint16_t>(row_count > 0 ? bytes : 0);
  }
};
static_assert(sizeof(TileConfig) == 64, "what LDTILECFG reads");

#if defined(__AMX_TILE__)
// GCC 12's intrinsics take the number of a tile as text, so a template cannot give it.
struct HardwareTiles {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  static void release() { asm volatile("tilerelease"); }
  template <int T>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  static void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  static void dot_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  static void dot_signed_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
#endif

class EmulatedTiles {
 public:
  static void configure(const TileConfig& config) {
    State& s = state();
    s = State{};
    require(config.palette == 1 && config.start_row == 0, "a palette that is not 1");
    for (int t = 0; t < 16; ++t) {
      require(config.rows[t] <= kTileRows && config.row_bytes[t] <= kTileRowBytes &&
                  (config.rows[t] == 0) == (config.row_bytes[t] == 0) &&
                  (t < kTileCount || config.rows[t] == 0),
              "a tile of a wrong shape");
    }
    s.config = config;
    s.configured = true;
  }
  static void release() {
    require(state().configured, "a release without tiles");
    state() = State{};
  }
  template <int T>
  static void zero() {
    std::memset(tile<T>(), 0, sizeof(Tile));
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    zero<T>();
    for (int r = 0; r < state().config.rows[T]; ++r)
      std::memcpy(tile<T>()[r], static_cast<const uint8_t*>(from) + r * stride,
                  state().config.row_bytes[T]);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    for (int r = 0; r < state().config.rows[T]; ++r)
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile<T>()[r],
                  state().config.row_bytes[T]);
  }
  // Even and odd products are added up apart, from zero and by fused additions in order of K, then
  // both to each other, and that to C. Denormals count as zero and become zero, results round to
  // the nearest even number.
  template <int C, int A, int B>
  static void dot_bf16() {
    dot<C, A, B, float>([](float sum, const uint8_t* a, const uint8_t* b, int count) {
      float even = 0.0f, odd = 0.0f;
      for (int k = 0; k < count; ++k) {
        even = flush(std::fma(number(a + 4 * k), number(b + kTileRowBytes * k), even));
        odd = flush(std::fma(number(a + 4 * k + 2), number(b + kTileRowBytes * k + 2), odd));
      }
      return flush(flush(sum) + flush(even + odd));
    });
  }
  // Modulo 2^32.
  template <int C, int A, int B>
  static void dot_bytes() {
    dot_quads<C, A, B, uint8_t>();
  }
  template <int C, int A, int B>
  static void dot_signed_bytes() {
    dot_quads<C, A, B, int8_t>();
  }

 private:
  using Tile = uint8_t[kTileRows][kTileRowBytes];
  struct State {
    bool configured;
    TileConfig config;
    Tile tiles[kTileCount];
  };
  static State& state() {
    thread_local State state{};
    return state;
  }
  static void require(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "AMX: %s\n", what);
    std::abort();
  }
  template <int T>
  static Tile& tile() {
    static_assert(T < kTileCount, "there are eight tiles");
    require(state().configured && state().config.rows[T] > 0, "a tile that is not configured");
    return state().tiles[T];
  }
  template <int C, int A, int B, class Weight>
  static void dot_quads() {
    dot<C, A, B, uint32_t>([](uint32_t sum, const uint8_t* a, const uint8_t* b, int count) {
      for (int k = 0; k < count; ++k)
        for (int i = 0; i < 4; ++i)
          sum += static_cast<uint32_t>(
              static_cast<int8_t>(a[4 * k + i]) *
              static_cast<int32_t>(static_cast<Weight>(b[kTileRowBytes * k + i])));
      return sum;
    });
  }
  // element(c, row of a, column of b, words of K): the new c
  template <int C, int A, int B, class Number, class Element>
  static void dot(const Element& element) {
    static_assert(C != A && C != B && A != B, "three different tiles");
    const TileConfig& s = state().config;
    Tile &c = tile<C>(), &a = tile<A>(), &b = tile<B>();
    require(s.rows[C] == s.rows[A] && s.row_bytes[A] == 4 * s.rows[B] &&
                s.row_bytes[C] == s.row_bytes[B] && s.row_bytes[C] % 4 == 0,
            "tiles whose shapes do not fit");
    for (int m = 0; m < s.rows[C]; ++m)
      for (int at = 0; at < s.row_bytes[C]; at += 4) {
        Number sum;
        std::memcpy(&sum, c[m] + at, sizeof(sum));
        sum = element(sum, a[m], b[0] + at, s.rows[B]);
        std::memcpy(c[m] + at, &sum, sizeof(sum));
      }
  }
  static float flush(float value) {
    const uint32_t bits = bits_of(value);
    return (bits & 0x7f800000u) == 0 ? float_of(bits & 0x80000000u) : value;
  }
  static float number(const uint8_t* at) { return flush(from_bf16(half_at(at, 0))); }
};

// The shapes of the eight tile registers for up to 32 rows of x, while an engine works: 0 and 1
// sums of the first sixteen rows, 2 and 3 of the others, 4 and 5 x of both, 6 and 7 weights. For up
// to sixteen rows all four hold sums of these, and 5 weights.
template <class Tiles>
class TileGrid {
 public:
  static constexpr int kRows = 2 * kTileRows;

  TileGrid() = default;
  TileGrid(const TileGrid&) = delete;
  TileGrid& operator=(const TileGrid&) = delete;
  ~TileGrid() {
    if (rows_ > 0) Tiles::release();
  }

  // For that many rows of x, of which a tile takes x_bytes.
  void configure(int64_t rows, int64_t x_bytes) {
    if (rows == rows_) return;
    const int64_t low = least(rows, kTileRows), high = rows - low;
    TileConfig config;
    for (const int tile : {0, 1}) config.set(tile, low, kTileRowBytes);
    for (const int tile : {2, 3}) config.set(tile, high > 0 ? high : low, kTileRowBytes);
    config.set(4, low, x_bytes);
    for (const int tile : {5, 6, 7}) config.set(tile, x_bytes / 4, kTileRowBytes);
    if (high > 0) config.set(5, high, x_bytes);
    Tiles::configure(config);
    rows_ = rows;
  }

 private:
  int64_t rows_ = 0;  // that tiles are configured for
};

}  // namespace
}  // namespace compressed_linear::cpu
