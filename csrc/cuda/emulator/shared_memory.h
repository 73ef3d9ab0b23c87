// SPDX-License-Identifier: Apache-2.0
// The shared memory of one emulated block, with race detection: its bytes, and the threads and
// times of the last accesses of each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace compressed_linear::cuda::emulator {

// Addresses begin at shared_base() of primitives.h.
//
// Race detection by happened-before with vector clocks: a thread's clock holds the time of each
// other thread at the last barrier that both took part in. An access by thread t at t's time c
// happened before one by thread u if t's time in u's clock is c or later (Flanagan and Freund,
// "FastTrack", 2009).
class SharedMemory {
 public:
  SharedMemory(size_t bytes, int threads, bool races);

  // False where the access is out of bounds or misaligned; `fatal` then describes it.
  bool read(int thread, uint32_t address, void* to, int bytes);
  bool write(int thread, uint32_t address, const void* from, int bytes);
  bool begin_copy(int thread, uint32_t address, int bytes);
  // The data of a copy arrive; null: zeros.
  void end_copy(int thread, uint32_t address, const void* from, int bytes);
  // A barrier of these threads.
  void synchronize(const std::vector<int>& threads);

  const std::string& fatal() const { return fatal_; }
  const std::vector<std::string>& problems() const { return problems_; }
  int64_t problem_count() const { return problem_count_; }

 private:
  struct Moment {
    int thread = -1;
    uint32_t time = 0;
  };
  struct Reader {
    Moment moment;
    uint8_t bytes;
  };
  struct Word {
    Moment writers[4];
    std::vector<Reader> readers;
    uint8_t written = 0;  // mask of initialized bytes
    uint8_t in_flight = 0;
  };

  bool inside(int thread, uint32_t address, int bytes, const char* what);
  bool before(const Moment& moment, int thread) const;
  void check_write(int thread, uint32_t offset, int bytes, const char* what);
  void mark_written(int thread, uint32_t offset, int bytes);
  void problem(const std::string& text);

  std::vector<uint8_t> data_;
  std::vector<Word> words_;
  std::vector<std::shared_ptr<const std::vector<uint32_t>>> known_;  // of each thread
  std::vector<uint32_t> time_;
  bool races_;
  std::string fatal_;
  std::vector<std::string> problems_;
  int64_t problem_count_ = 0;
};

}  // namespace compressed_linear::cuda::emulator
