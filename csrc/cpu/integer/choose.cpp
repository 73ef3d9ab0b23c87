// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstdlib>

#include "cpu/common/isa.h"
#include "engine.h"

namespace compressed_linear::cpu {
namespace {

const std::vector<Candidate<IntegerEngine>>& candidates() {
  static const std::vector<Candidate<IntegerEngine>> list = {
#ifdef COMPRESSED_LINEAR_X86
      {&kIntegerEngineAvx512Vnni, missing_features().avx512vnni},
      // Not first, although its rate is highest: it has never run on a processor that has it.
      {&kIntegerEngineAmx, missing_features().amxint8},
      // A processor with both runs byte dot products of 256 bits faster than 16-bit ones of 512.
      {&kIntegerEngineAvxVnni, missing_features().avxvnni},
      {&kIntegerEngineAvx512Bw, missing_features().avx512},
      {&kIntegerEngineAvx2, missing_features().avx2},
#endif
#ifdef COMPRESSED_LINEAR_ARM
      {&kIntegerEngineI8mm, missing_features().i8mm},
      {&kIntegerEngineDotprod, missing_features().dotprod},
      {&kIntegerEngineNeon, missing_features().neon},
#endif
      {&kIntegerEngineGeneric, ""},
  };
  return list;
}

const IntegerEngine& find(const std::string& isa) {
  return find_engine(candidates(), isa, "the integer kernels of '" + isa + "' are asked for");
}

// The engines that belong to a tier of the other kernels, best first. The processor must have the
// tier (engine() in float/choose.cpp says so where it has not), not all of these.
std::vector<std::string> of_tier(const std::string& tier) {
  if (tier == "generic") return {"generic"};
  if (tier == "avx2") return {"avxvnni", "avx2"};
  if (tier == "amx") return {"amx"};
  if (tier == "avx512") return {"avx512bw"};
  if (tier == "neon") return {"i8mm", "dotprod", "neon"};
  return {};
}

const IntegerEngine& default_engine() {
  const char* asked = std::getenv(kIsaVariable);
  const std::vector<std::string> runnable = supported_integer_isas();
  if (asked != nullptr && *asked != '\0')
    for (const std::string& name : of_tier(asked))
      for (const std::string& known : runnable)
        if (name == known) return find(name);
  return find(runnable.front());
}

std::atomic<const IntegerEngine*> current{nullptr};

}  // namespace

std::vector<std::string> supported_integer_isas() { return runnable_isas(candidates()); }

const IntegerEngine& integer_engine() {
  const IntegerEngine* chosen = current.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    chosen = &default_engine();
    current.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

void select_integer_engine(const std::string& isa) {
  current.store(&find(isa), std::memory_order_release);
}

}  // namespace compressed_linear::cpu
