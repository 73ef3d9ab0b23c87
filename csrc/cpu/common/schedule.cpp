// SPDX-License-Identifier: Apache-2.0
#include "schedule.h"

#include <algorithm>
#include <thread>

#include "claims.h"

#if defined(COMPRESSED_LINEAR_X86)
#include <immintrin.h>
#endif

namespace compressed_linear::cpu {

namespace {

void pause() {
#if defined(COMPRESSED_LINEAR_X86)
  _mm_pause();
#elif defined(COMPRESSED_LINEAR_ARM)
  asm volatile("yield");
#endif
}

}  // namespace

class Schedule {
 public:
  void begin(const Parallel& parallel, const RegionWork& work) {
    work_ = work;
    step_ = std::max<int64_t>(work.panels / (8 * parallel.threads), 1);
    panel_.store(0, std::memory_order_relaxed);
    prepared_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    cells_done_.fill(work.places, 0);
    claims_.begin(work.ranges, work.units, parallel.node_of);
  }

  void run(int64_t number) {
    try {
      claims_.join(number);
      prepare();
      if (!wait_for_panels()) return;
      Worker worker(*this, number);
      work_.multiply(work_.context, worker);
    } catch (...) {
      failed_.store(true, std::memory_order_relaxed);
      throw;
    }
  }

  int64_t next(int64_t number) {
    return failed_.load(std::memory_order_relaxed) ? -1 : claims_.next(number);
  }

  // What one thread left is seen by the one that is last.
  bool finish(int64_t place, int64_t cells, int64_t all) {
    return cells_done_[place].fetch_add(cells, std::memory_order_acq_rel) + cells == all;
  }

 private:
  void prepare() {
    int64_t done = 0;
    for (;;) {
      const int64_t begin = panel_.fetch_add(step_, std::memory_order_relaxed);
      if (begin >= work_.panels) break;
      const int64_t end = std::min(begin + step_, work_.panels);
      work_.prepare(work_.context, begin, end);
      done += end - begin;
    }
    if (done > 0) prepared_.fetch_add(done, std::memory_order_release);
  }

  // False where a thread failed. Every panel is in the hands of a thread that works on it.
  bool wait_for_panels() const {
    constexpr int kSpins = 2000;
    for (int spins = 0; prepared_.load(std::memory_order_acquire) < work_.panels; ++spins) {
      if (failed_.load(std::memory_order_relaxed)) return false;
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    return true;
  }

  RegionWork work_{};
  int64_t step_ = 1;
  std::atomic<int64_t> panel_{0}, prepared_{0};
  std::atomic<bool> failed_{false};
  Claims claims_;
  Atomics<int64_t> cells_done_;  // of each place
};

int64_t Worker::next() { return schedule_.next(number_); }

bool Worker::finish(int64_t place, int64_t cells, int64_t all) {
  return schedule_.finish(place, cells, all);
}

void run_region(const Parallel& parallel, const RegionWork& work) {
  thread_local Schedule schedule;
  schedule.begin(parallel, work);
  if (work.ranges == 1) return schedule.run(0);
  parallel.run(
      parallel.threads,
      [](void* context, int64_t begin, int64_t) { static_cast<Schedule*>(context)->run(begin); },
      &schedule);
}

}  // namespace compressed_linear::cpu
