// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "int8_engine.h"

namespace compressed_linear::cpu {
namespace {

constexpr const char* kVariable = "VLLM_COMPRESSED_LINEAR_CPU_ISA";

struct Candidate {
  const IntegerEngine* engine;
  std::string missing;  // what the processor lacks, empty when it can run
};

#ifdef COMPRESSED_LINEAR_X86
void require(std::string& missing, bool present, const char* feature) {
  if (present) return;
  if (!missing.empty()) missing += ", ";
  missing += feature;
}

// GCC 12 does not know the feature's name, so: leaf 7, subleaf 1, EAX bit 4.
bool has_avx_vnni() {
  unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
  unsigned highest = 0, unused_b, unused_c, unused_d;
  __asm__("cpuid" : "=a"(highest), "=b"(unused_b), "=c"(unused_c), "=d"(unused_d) : "a"(0), "c"(0));
  if (highest < 7) return false;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax >> 4 & 1u) != 0;
}
#endif

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list = [] {
    std::vector<Candidate> found;
#ifdef COMPRESSED_LINEAR_X86
    __builtin_cpu_init();
    std::string avx2;
    require(avx2, __builtin_cpu_supports("avx2"), "avx2");
    require(avx2, __builtin_cpu_supports("fma"), "fma");
    require(avx2, __builtin_cpu_supports("f16c"), "f16c");
    std::string avxvnni = avx2, avx512bw = avx2;
    require(avxvnni, avx2.empty() && has_avx_vnni(), "avxvnni");
    require(avx512bw, __builtin_cpu_supports("avx512f"), "avx512f");
    require(avx512bw, __builtin_cpu_supports("avx512bw"), "avx512bw");
    require(avx512bw, __builtin_cpu_supports("avx512vl"), "avx512vl");
    require(avx512bw, __builtin_cpu_supports("avx512dq"), "avx512dq");
    std::string avx512vnni = avx512bw;
    require(avx512vnni, __builtin_cpu_supports("avx512vnni"), "avx512vnni");
    found.push_back({&kIntegerEngineAvx512Vnni, avx512vnni});
    // A processor with both runs byte dot products of 256 bits faster than 16-bit products of 512.
    found.push_back({&kIntegerEngineAvxVnni, avxvnni});
    found.push_back({&kIntegerEngineAvx512Bw, avx512bw});
    found.push_back({&kIntegerEngineAvx2, avx2});
#endif
    found.push_back({&kIntegerEngineGeneric, ""});
    return found;
  }();
  return list;
}

const IntegerEngine& find(const std::string& isa) {
  std::string runnable;
  for (const std::string& name : supported_integer_isas())
    runnable += (runnable.empty() ? "" : ", ") + name;
  for (const Candidate& candidate : candidates()) {
    if (isa != candidate.engine->isa) continue;
    if (candidate.missing.empty()) return *candidate.engine;
    throw std::invalid_argument("the integer kernels of '" + isa + "' are asked for, but this " +
                                "processor lacks " + candidate.missing +
                                "; it can run: " + runnable);
  }
  throw std::invalid_argument(
      "the integer kernels of '" + isa +
      "' are asked for, which this build does not know; it can run: " + runnable);
}

// The engines that belong to a tier of the other kernels, best first. The processor must have the
// tier (engine() in dispatch.cpp says so where it has not), not all of these.
std::vector<std::string> of_tier(const std::string& tier) {
  if (tier == "generic") return {"generic"};
  if (tier == "avx2") return {"avxvnni", "avx2"};
  if (tier == "avx512") return {"avx512bw"};
  return {};
}

const IntegerEngine& default_engine() {
  const char* asked = std::getenv(kVariable);
  const std::vector<std::string> runnable = supported_integer_isas();
  if (asked != nullptr && *asked != '\0')
    for (const std::string& name : of_tier(asked))
      for (const std::string& known : runnable)
        if (name == known) return find(name);
  return find(runnable.front());
}

std::atomic<const IntegerEngine*> current{nullptr};

}  // namespace

std::vector<std::string> supported_integer_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.missing.empty()) names.emplace_back(candidate.engine->isa);
  return names;
}

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
