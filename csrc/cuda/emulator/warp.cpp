// SPDX-License-Identifier: Apache-2.0
// Primitives that a whole warp executes together: ldmatrix, mma, shuffles and __syncwarp.
#include <algorithm>
#include <vector>

#include "cpu/common/floats.h"
#include "machine.h"

namespace compressed_linear::cuda::emulator {
namespace {

// Names of warp instructions are compared by address.
const char kMatrixLoad[] = "load_matrix", kProduct[] = "multiply_add", kShuffle[] = "shuffle",
           kSyncWarp[] = "sync_warp";

float widen(uint32_t bits, bool bfloat16) {
  const uint16_t half = static_cast<uint16_t>(bits);
  return bfloat16 ? cpu::from_bf16(half) : cpu::from_fp16(half);
}

// mma.m16n8k16, with fragments as PTX defines them (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
// of lane l, with r = l / 4 and c = l % 4 * 2,
// a: rows r and r + 8, columns c, c + 1 and 8 more; b: rows c, c + 1 and 8 more, column r.
void multiply_warp(Thread** lanes, bool bfloat16) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t* in = lanes[lane]->in;
    const int r = lane / 4, c = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[r + i % 2 * 8][c + i / 2 * 8 + half] = widen(in[i] >> (16 * half), bfloat16);
      for (int i = 0; i < 2; ++i)
        b[c + i * 8 + half][r] = widen(in[4 + i] >> (16 * half), bfloat16);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = lanes[lane]->sums[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->sums[i] = sum;
    }
}

}  // namespace

void sync_warp() {
  machine->meet(kSyncWarp, [](Thread** lanes) {
    std::vector<int> members;
    for (int lane = 0; lane < kWarp; ++lane) members.push_back(lanes[lane]->at.thread);
    lanes[0]->block->shared->synchronize(members);
  });
}

__attribute__((noinline)) void load_matrix(uint32_t (&r)[4], uint32_t address, bool transposed) {
  Machine& m = *machine;
  Thread& me = m.self();
  m.log(__builtin_return_address(0), Kind::matrix_load, address, 16);
  me.in[0] = address;
  me.out = r;
  m.meet(kMatrixLoad, [&m, transposed](Thread** lanes) {
    uint16_t rows[kWarp][8];
    SharedMemory& shared = *lanes[0]->block->shared;
    for (int lane = 0; lane < kWarp; ++lane)
      if (!shared.read(lanes[lane]->at.thread, lanes[lane]->in[0], rows[lane], 16))
        m.stop(shared.fatal());
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const auto at = [&](int row, int column) -> uint32_t {
          return transposed ? rows[8 * i + column][row] : rows[8 * i + row][column];
        };
        const int row = lane / 4, column = lane % 4 * 2;
        lanes[lane]->out[i] = at(row, column) | at(row, column + 1) << 16;
      }
  });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  Machine& m = *machine;
  Thread& me = m.self();
  std::copy(a, a + 4, me.in);
  std::copy(b, b + 2, me.in + 4);
  me.sums = c;
  m.meet(kProduct, [&m, bfloat16](Thread** lanes) {
    multiply_warp(lanes, bfloat16);
    ++m.report().matrix_products;
  });
}

uint32_t shuffle(uint32_t value, int lane) {
  Machine& m = *machine;
  Thread& me = m.self();
  uint32_t out = 0;
  me.in[0] = value;
  me.out = &out;
  me.lane_from = lane & (kWarp - 1);
  m.meet(kShuffle, [](Thread** lanes) {
    for (int i = 0; i < kWarp; ++i) *lanes[i]->out = lanes[lanes[i]->lane_from]->in[0];
  });
  return out;
}

}  // namespace compressed_linear::cuda::emulator
