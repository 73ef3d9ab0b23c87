// SPDX-License-Identifier: Apache-2.0
// How fast one thread multiplies tiles of AMX that it loads from the L1 cache; csrc/cpu/rates
// measures instructions from registers. Built for the machine at hand and called by
// benchmarks/limits.py; empty where the processor has no tiles.
#include <cstdint>
#include <cstring>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
constexpr int kTile = 16 * 64;
constexpr int64_t kProducts = 4, kBf16Operations = 2 * 16 * 16 * 32;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) row_bytes[i] = 64, rows[i] = 16;
  }
};

bool allowed() {
  static const bool given = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return given;
}

// Two by two tiles of sums, as kernels have them: four products for every four operands that are
// loaded, out of 16 KiB.
template <class Multiply>
void multiply_tiles(int64_t rounds, Multiply multiply) {
  alignas(64) char operands[16 * kTile];
  std::memset(operands, 0, sizeof operands);
  const TileConfig config;
  // GCC's intrinsic says that it reads 8 bytes, so the rest might not be stored.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < rounds; ++i) {
    const char* from = operands + (i & 3) * 4 * kTile;
    _tile_loadd(4, from, 64);
    _tile_loadd(5, from + kTile, 64);
    _tile_loadd(6, from + 2 * kTile, 64);
    _tile_loadd(7, from + 3 * kTile, 64);
    multiply();
  }
  _tile_release();
}

}  // namespace

extern "C" {

// Multiplies bf16 tiles, or int8; the number of operations that were done, 0 where the system does
// not allow them.
int64_t tiles_bf16(int64_t rounds) {
  if (!allowed()) return 0;
  multiply_tiles(rounds, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
  return rounds * kProducts * kBf16Operations;
}

int64_t tiles_int8(int64_t rounds) {
  if (!allowed()) return 0;
  multiply_tiles(rounds, [] {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  });
  return rounds * kProducts * 2 * kBf16Operations;
}

}  // extern "C"

#else

extern "C" {

int64_t tiles_bf16(int64_t) { return 0; }
int64_t tiles_int8(int64_t) { return 0; }

}  // extern "C"

#endif
