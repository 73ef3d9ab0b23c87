// SPDX-License-Identifier: Apache-2.0
// Scratch memory that lives as long as its thread, so that a call allocates only when it is the
// largest so far.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layouts/planes.h"

namespace compressed_linear::cpu {

class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  // At least `bytes`, aligned to 64, valid until the next call on the same arena. Throws
  // std::bad_alloc.
  void* reserve(size_t bytes);

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Of the calling thread: one for what a whole call shares, one for what parts of K leave in it, one
// for what a worker needs (the calling thread is also a worker).
Arena& call_arena();
Arena& kept_arena();
Arena& worker_arena();

namespace {  // see layouts/planes.h

// Hands out parts of one block of memory, each aligned to a cache line; without memory it only
// counts.
struct Carver {
  uint8_t* memory;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* part = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

// Calls carve(carver) twice: to count, and with memory of the arena.
template <class Carve>
void carve_from(Arena& arena, const Carve& carve) {
  Carver counter{nullptr};
  carve(counter);
  Carver carver{static_cast<uint8_t*>(arena.reserve(static_cast<size_t>(counter.used)))};
  carve(carver);
}

}  // namespace
}  // namespace compressed_linear::cpu
