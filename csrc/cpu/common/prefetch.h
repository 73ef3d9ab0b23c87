// SPDX-License-Identifier: Apache-2.0
// Prefetching by share: a core has some twenty miss buffers, and all lines of a block asked for at
// once wait for each other and for the loads behind them. Asked for a few at each step of the work
// they arrive at the rate of memory: one row of 8-bit weights takes 0.70 ms instead of 1.33 (AVX2,
// N = K = 4096, Zen 4).
#pragma once

#include <cstdint>

#include "layouts/planes.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

constexpr int64_t kPrefetchBytes = 8192;  // ahead of what is worked on; measured on Zen 4

// The lines of share `Share` of `Shares`, of `Lines` that begin kPrefetchBytes behind `at`.
template <int Share, int Shares, int Lines>
inline void prefetch_share(const uint8_t* at) {
#pragma GCC unroll 16
  for (int line = Share * Lines / Shares; line < (Share + 1) * Lines / Shares; ++line)
  // Not the builtin: the compiler would gather all of an unrolled block in front of the work.
#if defined(__aarch64__)
    asm volatile("prfm pldl1keep, %0" : : "Q"(at[kPrefetchBytes + line * kRowBytes]) : "memory");
#else
    asm volatile("prefetcht0 %0" : : "m"(at[kPrefetchBytes + line * kRowBytes]) : "memory");
#endif
}

// The same for lines that begin at `at`, into the second-level cache.
template <int Share, int Shares, int Lines>
inline void prefetch_share_far(const uint8_t* at) {
#pragma GCC unroll 16
  for (int line = Share * Lines / Shares; line < (Share + 1) * Lines / Shares; ++line) {
#if defined(__aarch64__)
    asm volatile("prfm pldl2keep, %0" : : "Q"(at[line * kRowBytes]) : "memory");
#else
    asm volatile("prefetcht1 %0" : : "m"(at[line * kRowBytes]) : "memory");
#endif
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
