// SPDX-License-Identifier: Apache-2.0
#include "claims.h"

#include "problem.h"

namespace compressed_linear::cpu {

namespace {

constexpr uint64_t range(int64_t first, int64_t end) {
  return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(first);
}
constexpr uint32_t first_of(uint64_t range) { return static_cast<uint32_t>(range); }
constexpr uint32_t end_of(uint64_t range) { return static_cast<uint32_t>(range >> 32); }

template <bool kFront>
int64_t take(std::atomic<uint64_t>& left) {
  uint64_t now = left.load(std::memory_order_relaxed);
  while (first_of(now) < end_of(now)) {
    const int64_t unit = kFront ? first_of(now) : end_of(now) - 1;
    const uint64_t then = kFront ? range(unit + 1, end_of(now)) : range(first_of(now), unit);
    if (left.compare_exchange_weak(now, then, std::memory_order_relaxed)) return unit;
  }
  return -1;
}

}  // namespace

void Claims::begin(int64_t ranges, int64_t units, const uint8_t* node_of) {
  ranges_ = ranges;
  node_of_ = node_of;
  left_.fill(ranges, 0);
  for (int64_t i = 0; i < ranges; ++i)
    left_[i].store(range(units * i / ranges, units * (i + 1) / ranges), std::memory_order_relaxed);
  if (node_of_ != nullptr) joined_.fill(kMostNodes, false);
}

void Claims::join(int64_t number) {
  if (node_of_ != nullptr) joined_[node_of_[number]].store(true, std::memory_order_relaxed);
}

int64_t Claims::next(int64_t number) {
  if (number < ranges_)
    if (const int64_t unit = take<true>(left_[number]); unit >= 0) return unit;
  for (int64_t i = 1; i <= ranges_; ++i) {
    const int64_t other = (number + i) % ranges_;
    if (node_of_ != nullptr && node_of_[other] != node_of_[number]) continue;
    if (const int64_t unit = take<false>(left_[other]); unit >= 0) return unit;
  }
  if (node_of_ == nullptr) return -1;
  for (int64_t other = 0; other < ranges_; ++other) {
    if (joined_[node_of_[other]].load(std::memory_order_relaxed)) continue;
    if (const int64_t unit = take<false>(left_[other]); unit >= 0) return unit;
  }
  return -1;
}

}  // namespace compressed_linear::cpu
