// SPDX-License-Identifier: Apache-2.0
// Scratch memory that lives as long as its thread, so that a call allocates only when it is the
// largest so far.
#pragma once

#include <cstddef>

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

// Of the calling thread: one for what a whole call shares, one for what a worker needs (the
// calling thread is also a worker).
Arena& call_arena();
Arena& worker_arena();

}  // namespace compressed_linear::cpu
