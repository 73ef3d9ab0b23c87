// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "engine.h"

namespace compressed_linear::cpu {
namespace {

constexpr const char* kVariable = "VLLM_COMPRESSED_LINEAR_CPU_ISA";

struct Candidate {
  const Engine* engine;
  std::string missing;  // what the processor lacks, empty when it can run
};

#ifdef COMPRESSED_LINEAR_X86
void require(std::string& missing, bool present, const char* feature) {
  if (present) return;
  if (!missing.empty()) missing += ", ";
  missing += feature;
}
#endif

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list = [] {
    std::vector<Candidate> found;
#ifdef COMPRESSED_LINEAR_X86
    __builtin_cpu_init();
    std::string avx2, avx512, avx512bf16;
    require(avx2, __builtin_cpu_supports("avx2"), "avx2");
    require(avx2, __builtin_cpu_supports("fma"), "fma");
    require(avx2, __builtin_cpu_supports("f16c"), "f16c");
    avx512 = avx2;
    require(avx512, __builtin_cpu_supports("avx512f"), "avx512f");
    require(avx512, __builtin_cpu_supports("avx512bw"), "avx512bw");
    require(avx512, __builtin_cpu_supports("avx512vl"), "avx512vl");
    require(avx512, __builtin_cpu_supports("avx512dq"), "avx512dq");
    avx512bf16 = avx512;
    require(avx512bf16, __builtin_cpu_supports("avx512bf16"), "avx512bf16");
    found.push_back({&kEngineAvx512Bf16, avx512bf16});
    found.push_back({&kEngineAvx512, avx512});
    found.push_back({&kEngineAvx2, avx2});
#endif
    found.push_back({&kEngineGeneric, ""});
    return found;
  }();
  return list;
}

const Engine& find(const std::string& isa, const std::string& asked_by) {
  std::string runnable;
  for (const std::string& name : supported_isas())
    runnable += (runnable.empty() ? "" : ", ") + name;
  for (const Candidate& candidate : candidates()) {
    if (isa != candidate.engine->isa) continue;
    if (candidate.missing.empty()) return *candidate.engine;
    throw std::invalid_argument(asked_by + " asks for the CPU instruction set '" + isa +
                                "', but this processor lacks " + candidate.missing +
                                "; it can run: " + runnable);
  }
  throw std::invalid_argument(asked_by + " asks for the CPU instruction set '" + isa +
                              "', which this build does not know; it can run: " + runnable);
}

std::atomic<const Engine*> current{nullptr};

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.missing.empty()) names.emplace_back(candidate.engine->isa);
  return names;
}

const Engine& engine() {
  const Engine* chosen = current.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    const char* asked = std::getenv(kVariable);
    chosen =
        &find(asked != nullptr && *asked != '\0' ? asked : supported_isas().front(), kVariable);
    current.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

void select_engine(const std::string& isa) {
  current.store(&find(isa, "select_isa"), std::memory_order_release);
}

}  // namespace compressed_linear::cpu
