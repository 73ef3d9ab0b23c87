// SPDX-License-Identifier: Apache-2.0
// How fast one thread can read memory: several front-to-back streams with software prefetch. Built
// and called by benchmarks/limits.py; which number of streams and which distance are best differs
// from machine to machine, so the caller tries them.
#include <sys/mman.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLine = 64;

using Word = uint64_t __attribute__((vector_size(kLine), aligned(kLine)));

template <int Streams, bool Prefetch>
Word read(const char* data, int64_t bytes, int64_t ahead) {
  const int64_t length = bytes / Streams / (2 * kLine) * (2 * kLine);
  Word sums[2 * Streams] = {};
  for (int64_t at = 0; at < length; at += 2 * kLine) {
    for (int s = 0; s < Streams; ++s) {
      const char* from = data + s * length + at;
      if constexpr (Prefetch) {
        __builtin_prefetch(from + ahead);
        __builtin_prefetch(from + ahead + kLine);
      }
      sums[2 * s] += *reinterpret_cast<const Word*>(from);
      sums[2 * s + 1] += *reinterpret_cast<const Word*>(from + kLine);
    }
  }
  for (int i = 1; i < 2 * Streams; ++i) sums[0] += sums[i];
  return sums[0];
}

template <int Streams>
Word read(const char* data, int64_t bytes, int64_t ahead) {
  return ahead > 0 ? read<Streams, true>(data, bytes, ahead) : read<Streams, false>(data, bytes, 0);
}

}  // namespace

extern "C" {

// `bytes` of memory on huge pages where the system gives them, all of it touched; null if there is
// none. Never freed: it lives as long as the measurement.
void* reader_allocate(int64_t bytes) {
  constexpr int64_t kHuge = 2 << 20;
  void* got = mmap(nullptr, static_cast<size_t>(bytes + kHuge), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return nullptr;
  const auto address = (reinterpret_cast<uintptr_t>(got) + kHuge - 1) / kHuge * kHuge;
  void* const aligned = reinterpret_cast<void*>(address);
  madvise(aligned, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  std::memset(aligned, 1, static_cast<size_t>(bytes));
  return aligned;
}

// Reads all of it; the sum is returned so that no read can be left out. -1 for a number of streams
// that is not built.
int64_t reader_read(const void* data, int64_t bytes, int64_t streams, int64_t ahead) {
  const char* from = static_cast<const char*>(data);
  Word sum;
  switch (streams) {
    case 1:
      sum = read<1>(from, bytes, ahead);
      break;
    case 2:
      sum = read<2>(from, bytes, ahead);
      break;
    case 4:
      sum = read<4>(from, bytes, ahead);
      break;
    case 8:
      sum = read<8>(from, bytes, ahead);
      break;
    default:
      return -1;
  }
  int64_t total = 0;
  for (int i = 0; i < 8; ++i) total += static_cast<int64_t>(sum[i]);
  return total;
}

}  // extern "C"
