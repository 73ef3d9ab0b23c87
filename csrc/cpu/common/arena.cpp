// SPDX-License-Identifier: Apache-2.0
#include "arena.h"

#include <cstdlib>
#include <new>

namespace compressed_linear::cpu {

Arena::~Arena() { std::free(data_); }

void* Arena::reserve(size_t bytes) {
  if (bytes > size_) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    std::free(data_);
    size_ = 0;
    data_ = std::aligned_alloc(64, rounded);
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = rounded;
  }
  return data_;
}

Arena& call_arena() {
  thread_local Arena arena;
  return arena;
}

Arena& kept_arena() {
  thread_local Arena arena;
  return arena;
}

Arena& worker_arena() {
  thread_local Arena arena;
  return arena;
}

}  // namespace compressed_linear::cpu
