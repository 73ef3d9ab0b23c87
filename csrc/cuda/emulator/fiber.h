// SPDX-License-Identifier: Apache-2.0
// A function with a stack of its own that runs in turns with the code that resumes it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace compressed_linear::cuda::emulator {

class Fiber {
 public:
  // `body` begins with the first resume(), and must not return. Its frames are never unwound.
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the body until it calls suspend().
  void resume();
  // Called by the body only.
  void suspend();

 private:
  static void enter();

  void (*body_)();
  char* stack_;
  ucontext_t context_;  // where the body begins; later switches are jumps, without system calls
  jmp_buf inside_, outside_;
  bool begun_ = false;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_size_ = 0;
  void* outside_fake_stack_ = nullptr;
#endif
};

}  // namespace compressed_linear::cuda::emulator
