// SPDX-License-Identifier: Apache-2.0
// The body of a RateLoop: as many independent chains as hide the latency of any instruction here.
// Included by the units of one instruction set each.
#pragma once

#include <cstdint>

#include "rates.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

// Two instructions a cycle with a latency of six; with two operands they fit sixteen registers.
constexpr int kChains = 12;

// The compiler may neither know what is in a register nor leave it out.
template <class Vector>
[[gnu::always_inline]] inline void opaque(Vector& value) {
#if defined(COMPRESSED_LINEAR_ARM)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+x"(value));
#endif
}

// sum = step(sum, a, b) on each chain, `rounds` times.
template <class Sum, class Operand, class Step>
[[gnu::always_inline]] inline void spin(int64_t rounds, Sum zero, Operand a, Operand b, Step step) {
  // Variables, since GCC keeps an array in memory.
  Sum s0 = zero, s1 = zero, s2 = zero, s3 = zero, s4 = zero, s5 = zero;
  Sum s6 = zero, s7 = zero, s8 = zero, s9 = zero, s10 = zero, s11 = zero;
  opaque(a);
  opaque(b);
  const auto turn = [&](Sum& sum) __attribute__((always_inline)) {
    sum = step(sum, a, b);
    opaque(sum);
  };
  for (; rounds > 0; --rounds) {
    turn(s0), turn(s1), turn(s2), turn(s3), turn(s4), turn(s5);
    turn(s6), turn(s7), turn(s8), turn(s9), turn(s10), turn(s11);
  }
}

}  // namespace
}  // namespace compressed_linear::cpu
