// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace compressed_linear::cuda::emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

// Stacks are kept for the next launch.
class Stacks {
 public:
  ~Stacks() {
    for (char* stack : free_) munmap(stack, kStackBytes);
  }
  char* take() {
    if (free_.empty()) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      // Guard page: a stack that is too small ends the process instead of writing elsewhere.
      mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
      return static_cast<char*>(stack);
    }
    char* const stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(char* stack) {
#if defined(__SANITIZE_ADDRESS__)
    // Its frames were left without being unwound.
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    __asan_unpoison_memory_region(stack + guard, kStackBytes - guard);
#endif
    free_.push_back(stack);
  }

 private:
  std::vector<char*> free_;
};

thread_local Stacks stacks;
thread_local Fiber* entered = nullptr;  // makecontext passes no pointers

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body), stack_(stacks.take()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::enter, 0);
}

Fiber::~Fiber() { stacks.give(stack_); }

void Fiber::enter() {
  Fiber& me = *entered;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &me.outside_stack_, &me.outside_size_);
#endif
  me.body_();
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, outside_stack_, outside_size_);
#endif
  if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &outside_stack_, &outside_size_);
#endif
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&outside_fake_stack_, stack_, kStackBytes);
#endif
  if (_setjmp(outside_) == 0) {
    if (begun_) _longjmp(inside_, 1);
    begun_ = true;
    entered = this;
    setcontext(&context_);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(outside_fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace compressed_linear::cuda::emulator
