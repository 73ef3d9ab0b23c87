// SPDX-License-Identifier: Apache-2.0
// Choosing among engines by what the processor can run, for whatever kind of engine has an `isa`.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace compressed_linear::cpu {

inline constexpr const char* kIsaVariable = "VLLM_COMPRESSED_LINEAR_CPU_ISA";

// For each tier of instruction sets what this processor lacks of it; empty where it has all.
struct MissingFeatures {
#ifdef COMPRESSED_LINEAR_X86
  std::string avx2, avxvnni, avx512, avx512bf16, avx512vnni, amx, amxint8;
#endif
#ifdef COMPRESSED_LINEAR_ARM
  std::string neon, dotprod, i8mm;
#endif
};

const MissingFeatures& missing_features();

template <class Engine>
struct Candidate {
  const Engine* engine;
  std::string missing;  // what the processor lacks, empty when it can run
};

// Names of the candidates that can run, in their order.
template <class Engine>
std::vector<std::string> runnable_isas(const std::vector<Candidate<Engine>>& candidates) {
  std::vector<std::string> names;
  for (const Candidate<Engine>& candidate : candidates)
    if (candidate.missing.empty()) names.emplace_back(candidate.engine->isa);
  return names;
}

// The candidate called `isa`. Throws std::invalid_argument, which begins with `asked`, when there
// is none or the processor cannot run it.
template <class Engine>
const Engine& find_engine(const std::vector<Candidate<Engine>>& candidates, const std::string& isa,
                          const std::string& asked) {
  std::string runnable;
  for (const std::string& name : runnable_isas(candidates))
    runnable += (runnable.empty() ? "" : ", ") + name;
  for (const Candidate<Engine>& candidate : candidates) {
    if (isa != candidate.engine->isa) continue;
    if (candidate.missing.empty()) return *candidate.engine;
    throw std::invalid_argument(asked + ", but this processor lacks " + candidate.missing +
                                "; it can run: " + runnable);
  }
  throw std::invalid_argument(asked + ", which this build does not know; it can run: " + runnable);
}

}  // namespace compressed_linear::cpu
