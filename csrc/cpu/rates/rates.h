// SPDX-License-Identifier: Apache-2.0
// How many instructions a cycle a core executes of those that the kernels live on. A processor says
// which instructions it has; only a clock says which are fast. No torch, no memory: registers only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace compressed_linear::cpu {

// A loop of independent instructions. `run` takes a number of rounds, each of `instructions`.
struct RateLoop {
  const char* name;  // as in vllm/compressed_linear/machine/profiles.py
  int64_t instructions;
  void (*run)(int64_t rounds);
};

// Of one instruction set, in the file of its name.
using RateLoops = const std::vector<RateLoop>&();

struct MeasuredRate {
  std::string name;
  double per_cycle;
};

struct MeasuredRates {
  double clock;  // cycles a second
  std::vector<MeasuredRate> rates;
};

// Measures every instruction set that this processor can run, on the calling thread, in at most 50
// ms. A cycle is what a dependent addition takes at the same moment, so neither the frequency nor
// what a virtual machine's host does in between counts.
MeasuredRates measure_rates();

}  // namespace compressed_linear::cpu
