// SPDX-License-Identifier: Apache-2.0
// Every CUDA and PTX primitive that kernels use, in one place with two implementations: under nvcc
// instructions (device/instructions.h), under g++ plain C++ with the same meaning, run by the
// emulator (emulator/primitives.h). Kernels touch shared and global memory through these functions
// only, so that the emulator sees every access. To write a kernel that both understand:
//
//   struct Params {...};                                   // plain data, passed by value
//   CL_GLOBAL(256) void kernel(CL_PARAMS Params p) {...}   // <= 256 threads a block,
//   one-dimensional
//
// and launch it with `kernel<<<grid, threads, bytes, stream>>>(params)` under nvcc and
// `emulator::launch(options, [&] { kernel(params); })` under g++.
//
// Shared memory is dynamic and addressed by 32-bit numbers, `shared_base() + offset`, as PTX does.
//
//   int thread_index(), thread_count(), block_x(), block_y(), grid_x(), grid_y();
//   void sync_threads();                  all threads of the block
//   void sync_named(int id, int threads); barrier `id` (1 to 15) of `threads` threads of the block
//   void sync_warp();                     all 32 lanes
//
//   T load_shared<T>(uint32_t), void store_shared(uint32_t, T)           T of 1, 2, 4, 8 or 16
//   bytes, T load_global(const T*), void store_global(T*, T)                    aligned to its size
//   T load_constant(const T*)             global memory that the kernel does not write; evicted
//   first void copy_async<Bytes>(uint32_t shared, const void* global, bool valid)   4, 8 or 16
//   bytes; zeros void copy_async_commit(), copy_async_wait<N>()                            if not
//   `valid` void load_matrix_x4(uint32_t (&r)[4], uint32_t row_address)          ldmatrix of 8x8
//   16-bit void load_matrix_x4_transposed(...)                                  matrices void
//   multiply_add<Half or BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
//                                         mma.m16n8k16
//   uint32_t lop3<Table>(a, b, c), prmt(a, b, selector)
//   T shuffle_xor(T, int mask), shuffle(T, int lane)                     T of 4 bytes
//   int atomic_add(int*, int)             relaxed, device scope; returns the old value
//   int load_acquire(const int*), void store_release(int*, int), void fence()
//
// and arithmetic on pairs of 16-bit floats in a word, low half first, for T = Half or BFloat16:
//
//   add_pair<T>, subtract_pair<T>, multiply_pair<T>(a, b), fma_pair<T>(a, b, c)
//   uint32_t narrow_pair<T>(float low, float high), float widen<T>(uint16_t)
//   float widen_e4m3(uint8_t), widen_e8m0(uint8_t), float bits_to_float(uint32_t), ...
//
// mma on the host: products are exact, and fp32 sums go k = 0, 1, ... 15, each rounded to nearest.
// Tensor cores add several products at once, truncated to a few bits more than fp32 has, in an
// order that is not documented; their results differ in the last bits, and only there.
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
