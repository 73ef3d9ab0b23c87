// SPDX-License-Identifier: Apache-2.0
// Every CUDA and PTX primitive that kernels use, with two implementations: PTX under nvcc
// (device/instructions.h), and plain C++ of the same meaning under g++ (emulator/primitives.h), run
// by the emulator.
// Has run on hardware: nothing of this folder.
//
// Kernels access shared and global memory through these functions only, so that the emulator sees
// every access. A kernel that both compilers accept:
//
// | struct Params {...};                                  | plain data, passed by value
// | CL_GLOBAL(256) void kernel(CL_PARAMS Params p) {...}  | at most 256 threads a block, in x
//
// is launched with `kernel<<<grid, threads, bytes, stream>>>(params)` under nvcc and with
// `emulator::launch(options, [&] { kernel(params); })` under g++.
//
// Shared memory is dynamic. Its addresses are 32-bit numbers, `shared_base() + offset`, as in PTX.
//
// | int thread_index()                             | of this block, from 0 on
// | int thread_count()                             | of this block
// | int block_x(), block_y()                       | of this block in the grid
// | int grid_x(), grid_y()                         | blocks in the grid
// |                                                |
// | void sync_threads()                            | barrier of all threads of the block
// | void sync_named(int id, int threads)           | barrier `id` (1 to 15) of `threads` threads
// | void sync_warp()                               | barrier of the 32 lanes of a warp
// |                                                |
// | uint32_t shared_base()                         | address of the first byte of shared memory
// | T load_shared<T>(uint32_t)                     | T of 1, 2, 4, 8 or 16 bytes, aligned
// | void store_shared(uint32_t, T)                 | the same
// | T load_global(const T*)                        | the same
// | void store_global(T*, T)                       | the same
// | T load_constant(const T*)                      | ld.global.nc: memory the kernel only reads
// | T load_coherent(const T*)                      | ld.global.cg, past L1: T of 4 or 16 bytes
// |                                                |
// | void copy_async<Bytes>(to, from, bool valid)   | cp.async of 4, 8 or 16; zeros if not `valid`
// | void copy_async_commit()                       | ends a group of copies
// | void copy_async_wait<N>()                      | until at most N groups are in flight
// |                                                |
// | void load_matrix_x4(r[4], uint32_t)            | ldmatrix: four 8x8 matrices of 16 bits
// | void load_matrix_x4_transposed(r[4], uint32_t) | ldmatrix.trans
// | void multiply_add<T>(c[4], a[4], b[2])         | mma.m16n8k16; T = Half or BFloat16
// |                                                |
// | uint32_t lop3<Table>(a, b, c)                  | any bitwise function of three words
// | uint32_t prmt(a, b, selector)                  | byte permutation
// | T shuffle(T, int lane)                         | the value of that lane; T of 4 bytes
// | T shuffle_xor(T, int mask)                     | the value of lane ^ mask; T of 4 bytes
// |                                                |
// | int atomic_add(int*, int)                      | relaxed, device scope; the old value
// | int load_acquire(const int*)                   | device scope
// | void store_release(int*, int)                  | device scope
// | void fence()                                   | __threadfence()
//
// Arithmetic on pairs of 16-bit floats in a word, low half first, for T = Half or BFloat16:
//
// | uint32_t add_pair<T>(a, b)                     | a + b
// | uint32_t subtract_pair<T>(a, b)                | a - b
// | uint32_t multiply_pair<T>(a, b)                | a * b
// | uint32_t fma_pair<T>(a, b, c)                  | a * b + c, rounded once
// | uint32_t narrow_pair<T>(float low, float high) | fp32 to a pair, ties to even
// | float widen<T>(uint16_t)                       | one 16-bit float to fp32
// | float widen_e4m3(uint8_t)                      | E4M3 to fp32
// | float widen_e8m0(uint8_t)                      | E8M0 to fp32
// | float bits_to_float(uint32_t)                  | the same bits
// | uint32_t float_to_bits(float)                  | the same bits
//
// mma on the host: products are exact, and fp32 sums go k = 0, 1, ... 15, each rounded to nearest.
// Tensor cores add several products at once, truncated to a few bits more than fp32 has, in an
// undocumented order; their results differ in the last bits, and only there.
#pragma once

#include <cstdint>

namespace compressed_linear::cuda {

struct Half {};
struct BFloat16 {};

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};
struct alignas(8) Floats2 {
  float x, y;
};

}  // namespace compressed_linear::cuda

#if defined(__CUDACC__)
#include "instructions.h"
#else
#include "cuda/emulator/primitives.h"
#endif
