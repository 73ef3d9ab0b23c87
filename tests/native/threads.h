// SPDX-License-Identifier: Apache-2.0
// What drivers of the kernels give them as threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

inline void serial(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count > 0) body(context, 0, count);
}

inline void threaded(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  const int64_t step = (count + 2) / 3;
  for (int64_t begin = 0; begin < count; begin += step)
    threads.emplace_back(body, context, begin, std::min(begin + step, count));
  for (std::thread& thread : threads) thread.join();
}
