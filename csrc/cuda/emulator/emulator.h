// SPDX-License-Identifier: Apache-2.0
// Runs the source of a CUDA kernel on the CPU. Each thread of a block is a fiber. Warp instructions
// wait for their 32 lanes, barriers for their threads. The data of cp.async arrive when they are
// waited for, and not earlier. Blocks run one after the other, or several at a time in turns.
// Has run on hardware: nothing of what the emulator runs.
//
// Errors that it finds, each reported as a sentence in `Report::problems`:
//
// | race                 | two threads access one byte of shared memory, one of them writes, and no
// |                      | barrier is between. Happened-before with vector clocks: sync_warp orders
// |                      | the lanes of a warp, mma does not
// | uninitialized read   | of shared memory that nothing has written
// | missing wait         | an access to shared memory while cp.async into it is in flight
// | out of bounds        | an access outside of shared memory or of the buffers given
// | misaligned access    | an address that is not a multiple of the access's size
// | write to read-only   | a store to a buffer that is not `writable`
// | inconsistent read    | load_constant of a buffer that the kernel writes
// | divergence           | a barrier or warp instruction that some of its threads never reach
// | deadlock             | blocks that wait for each other forever
//
// It counts what decides about speed: wavefronts of shared memory (bank conflicts) and 32-byte
// sectors of global memory, each with the minimum for the same bytes.
//
// It does not detect races in global memory between blocks, and it does not measure time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace compressed_linear::cuda::emulator {

// Global memory that the kernel may access. Its first byte counts as aligned to 256.
struct Buffer {
  const void* data;
  size_t bytes;
  std::string name;
  bool writable = false;
};

struct Options {
  int grid_x = 1, grid_y = 1, threads = 32;
  size_t shared_bytes = 0;
  std::vector<Buffer> buffers;
  int resident = 1;    // blocks that run at a time, in turns
  unsigned order = 0;  // seed of the order in which threads run; 0: by number
  bool races = true;   // detect races; takes a third of the time
};

// Accesses of warps, and their transactions: wavefronts of shared memory, sectors of global memory.
// `least`: the minimum for the same bytes.
struct Traffic {
  int64_t accesses = 0, transactions = 0, least = 0;
  double ratio() const {
    return least == 0 ? 1.0 : static_cast<double>(transactions) / static_cast<double>(least);
  }
};

struct Report {
  Traffic shared_loads, shared_stores, matrix_loads, shared_copies;  // cp.async's shared side
  Traffic global_loads, global_stores, global_copies;
  int64_t matrix_products = 0, barriers = 0;
  int64_t problem_count = 0;
  std::vector<std::string> problems;  // the first 20
};

// Runs `kernel` once for each thread. Stops after an invalid access, after mismatched warp
// instructions and at a deadlock. Throws std::invalid_argument for impossible options.
Report launch(const Options& options, const std::function<void()>& kernel);

// For the primitives, inside of a kernel only.
struct Position {
  int thread, threads, block_x, block_y, grid_x, grid_y;
};
const Position& position();
void read_shared(uint32_t address, void* to, int bytes);
void write_shared(uint32_t address, const void* from, int bytes);
void read_global(const void* from, void* to, int bytes, bool constant);
void write_global(void* to, const void* from, int bytes);
void copy_async(uint32_t shared, const void* global, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int left);
void sync_block(int id, int threads);
void sync_warp();
void load_matrix(uint32_t (&r)[4], uint32_t address, bool transposed);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);
uint32_t shuffle(uint32_t value, int lane);
int atomic_add(int* to, int value);
int load_acquire(const int* from);

}  // namespace compressed_linear::cuda::emulator
