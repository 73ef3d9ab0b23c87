// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstdlib>

#include "cpu/common/isa.h"
#include "engine.h"

namespace compressed_linear::cpu {
namespace {

const std::vector<Candidate<Engine>>& candidates() {
  static const std::vector<Candidate<Engine>> list = {
#ifdef COMPRESSED_LINEAR_X86
      {&kEngineAvx512Bf16, missing_features().avx512bf16},
      // Not first, although its rate is highest: it has never run on a processor that has it.
      {&kEngineAmx, missing_features().amx},
      {&kEngineAvx512, missing_features().avx512},
      {&kEngineAvx2, missing_features().avx2},
#endif
#ifdef COMPRESSED_LINEAR_ARM
      {&kEngineNeon, missing_features().neon},
#endif
      {&kEngineGeneric, ""},
  };
  return list;
}

const Engine& find(const std::string& isa, const std::string& asked_by) {
  return find_engine(candidates(), isa,
                     asked_by + " asks for the CPU instruction set '" + isa + "'");
}

std::atomic<const Engine*> current{nullptr};

}  // namespace

std::vector<std::string> supported_isas() { return runnable_isas(candidates()); }

const Engine& engine() {
  const Engine* chosen = current.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    const char* asked = std::getenv(kIsaVariable);
    chosen =
        &find(asked != nullptr && *asked != '\0' ? asked : supported_isas().front(), kIsaVariable);
    current.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

void select_engine(const std::string& isa) {
  current.store(&find(isa, "select_isa"), std::memory_order_release);
}

}  // namespace compressed_linear::cpu
