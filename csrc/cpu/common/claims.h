// SPDX-License-Identifier: Apache-2.0
// Which thread works on which unit: each takes its own range front to back, then what others of its
// NUMA node have left, from the back. Of another node it takes only ranges of which no thread has
// begun, since then none may come.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace compressed_linear::cpu {

// An array of atomics that grows.
template <class T>
class Atomics {
 public:
  // All set to `value`.
  void fill(int64_t count, T value) {
    if (count > size_) {
      data_.reset(new std::atomic<T>[static_cast<size_t>(count)]);
      size_ = count;
    }
    for (int64_t i = 0; i < count; ++i) data_[i].store(value, std::memory_order_relaxed);
  }
  std::atomic<T>& operator[](int64_t i) { return data_[i]; }

 private:
  std::unique_ptr<std::atomic<T>[]> data_;
  int64_t size_ = 0;
};

class Claims {
 public:
  // `units` in ranges of equal numbers. node_of: of each thread, or null where all have the same.
  void begin(int64_t ranges, int64_t units, const uint8_t* node_of);
  // Thread `number` is there.
  void join(int64_t number);
  // Its next unit, or -1.
  int64_t next(int64_t number);

 private:
  int64_t ranges_ = 0;
  const uint8_t* node_of_ = nullptr;
  Atomics<uint64_t> left_;  // of each range the first unit, and in the high half the end
  Atomics<bool> joined_;    // some thread of each node
};

}  // namespace compressed_linear::cpu
