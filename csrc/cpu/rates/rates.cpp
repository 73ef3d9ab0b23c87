// SPDX-License-Identifier: Apache-2.0
#include "rates.h"

#include <algorithm>
#include <chrono>

#include "cpu/common/isa.h"

namespace compressed_linear::cpu {

#if defined(COMPRESSED_LINEAR_X86)
RateLoops rates_avx2, rates_avxvnni, rates_avx512, rates_avx512vnni, rates_avx512bf16, rates_amx;
#elif defined(COMPRESSED_LINEAR_ARM)
RateLoops rates_neon, rates_dotprod, rates_i8mm;
#endif

namespace {

struct Measured {
  const char* isa;
  RateLoops* loops;
};

constexpr Measured kMeasured[] = {
#if defined(COMPRESSED_LINEAR_X86)
    {"avx2", rates_avx2},
    {"avxvnni", rates_avxvnni},
    {"avx512", rates_avx512},
    {"avx512vnni", rates_avx512vnni},
    {"avx512bf16", rates_avx512bf16},
    {"amx", rates_amx},
#elif defined(COMPRESSED_LINEAR_ARM)
    {"neon", rates_neon},
    {"dotprod", rates_dotprod},
    {"i8mm", rates_i8mm},
#endif
    {"", nullptr},
};

bool runs(const std::string& isa) {
  for (const Kernels kernels : {Kernels::floats, Kernels::integers})
    for (const Isa* row : supported_isas(kernels))
      if (isa == row->name) return true;
  return false;
}

constexpr int kBursts = 10;
constexpr double kBurst = 100e-6, kClockBurst = 40e-6;  // seconds
constexpr int64_t kAdditions = 16;

// Additions that wait for one another, of two registers: a processor may fold constants into one.
void add_in_turn(int64_t rounds) {
#if defined(__x86_64__) || defined(__aarch64__)
  uint64_t sum = 0, one = 1;
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kAdditions; ++i) {
#if defined(__x86_64__)
      asm volatile("add %1, %0" : "+r"(sum) : "r"(one) : "cc");
#else
      asm volatile("add %0, %0, %1" : "+r"(sum) : "r"(one));
#endif
    }
  }
#else
  volatile uint64_t sum = 0;
  for (rounds *= kAdditions; rounds > 0; --rounds) sum = sum + 1;
#endif
}

double seconds_of(void (*run)(int64_t), int64_t rounds) {
  const auto begin = std::chrono::steady_clock::now();
  run(rounds);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Rounds that take about `seconds`. Also wakes up units that sleep until they are used.
int64_t rounds_of(void (*run)(int64_t), double seconds) {
  int64_t rounds = 64;
  while (rounds < int64_t{1} << 24 && seconds_of(run, rounds) < seconds / 2) rounds *= 2;
  return rounds;
}

}  // namespace

MeasuredRates measure_rates() {
  MeasuredRates found{};
  const int64_t additions = rounds_of(add_in_turn, kClockBurst);
  const double cycles = static_cast<double>(additions * kAdditions);
  for (const Measured& measured : kMeasured) {
    if (measured.loops == nullptr || !runs(measured.isa)) continue;
    for (const RateLoop& loop : measured.loops()) {
      const int64_t rounds = rounds_of(loop.run, kBurst);
      // The best of both: whatever interrupts a burst only makes it longer.
      double taken = seconds_of(loop.run, rounds), clock = seconds_of(add_in_turn, additions);
      for (int i = 1; i < kBursts; ++i) {
        taken = std::min(taken, seconds_of(loop.run, rounds));
        clock = std::min(clock, seconds_of(add_in_turn, additions));
      }
      const double instructions = static_cast<double>(rounds * loop.instructions);
      found.rates.push_back({loop.name, instructions * (clock / cycles) / taken});
      found.clock = std::max(found.clock, cycles / clock);
    }
  }
  return found;
}

}  // namespace compressed_linear::cpu
