// SPDX-License-Identifier: Apache-2.0
// The emulated GPU: blocks, their threads and barriers, and the scheduler that runs the threads in
// turns. The primitives are in memory.cpp and warp.cpp.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "global_memory.h"
#include "shared_memory.h"
#include "traffic.h"

namespace compressed_linear::cuda::emulator {

// Ends the kernel; thrown in a fiber and caught where the fiber began.
struct Stop {};

// A copy of cp.async.
struct Copy {
  uint32_t shared;
  const void* global;
  int bytes;
  bool valid;
};

enum class State { ready, warp, barrier, spinning, done };

struct Block;

struct Thread {
  explicit Thread(void (*body)()) : fiber(body) {}

  Fiber fiber;
  Block* block = nullptr;
  Position at{};
  State state = State::done;
  const char* waits = "";                // what it waits in
  std::vector<Access> log;               // since its warp last met
  std::vector<Copy> open;                // since the last commit
  std::deque<std::vector<Copy>> groups;  // committed and not waited for
  // Operands of the warp instruction that it waits in.
  uint32_t in[6];
  float* sums;
  uint32_t* out;
  int lane_from;
};

struct Barrier {
  int expected = 0;
  std::vector<int> threads;
};

struct Block {
  std::vector<Thread*> threads;
  std::unique_ptr<SharedMemory> shared;
  std::map<int, Barrier> barriers;
  std::vector<int> arrived;  // lanes of each warp that wait in a warp instruction
  std::vector<int> order;
  int alive = 0;
};

// One launch.
class Machine {
 public:
  Machine(const Options& options, const std::function<void()>& kernel);

  Report run();

  Thread& self() { return *current_; }
  Report& report() { return report_; }

  void problem(const std::string& text);
  // Reports a problem after which the kernel cannot go on.
  [[noreturn]] void stop(const std::string& text);
  std::string where() const;

  // Suspends this thread until it is ready again.
  void wait(State state, const char* what);
  // Waits for all lanes; the last of them calls `combine` on the 32 threads. Warp instructions are
  // told apart by the address of `what`.
  template <class Combine>
  void meet(const char* what, const Combine& combine) {
    Thread** const lanes = arrive(what);
    if (lanes == nullptr) return;
    combine(lanes);
    release(lanes);
  }
  void sync_block(int id, int threads);

  // The number of GlobalMemory::locate; stops where there is none.
  uint64_t locate(const void* data, int bytes, bool write, bool constant, const char* what);
  void log(const void* site, Kind kind, uint64_t address, int bytes) {
    self().log.push_back({site, kind, address, bytes});
  }
  // Something has happened that other threads may wait for.
  void progress() { ++progress_; }

 private:
  static void run_threads();
  void start(int block_number);
  void finish(Thread& thread);
  // This thread's arrival at a warp instruction. The last lane gets the warp; the others wait, and
  // get null.
  Thread** arrive(const char* what);
  void release(Thread** lanes);
  void flush_warp(Block& block, int warp);
  void explain_deadlock();

  const Options& options_;
  const std::function<void()>& kernel_;
  Report report_;
  GlobalMemory global_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> free_threads_;
  std::vector<std::unique_ptr<Block>> blocks_;
  Thread* current_ = nullptr;
  int64_t progress_ = 0;
  bool stopped_ = false;
};

// The machine that runs on this thread of the CPU.
extern thread_local Machine* machine;

}  // namespace compressed_linear::cuda::emulator
