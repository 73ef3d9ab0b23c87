// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#if defined(COMPRESSED_LINEAR_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef COMPRESSED_LINEAR_ARM
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace compressed_linear::cpu {
namespace {

[[maybe_unused]] void require(std::string& missing, bool present, const char* feature) {
  if (present) return;
  if (!missing.empty()) missing += ", ";
  missing += feature;
}

#if defined(COMPRESSED_LINEAR_X86)

struct Cpuid {
  unsigned eax, ebx, ecx, edx;
};

// Features that GCC 12 does not know by name. All zero where there is no such leaf.
Cpuid cpuid(unsigned leaf, unsigned subleaf) {
  const auto ask = [](unsigned eax, unsigned ecx) {
    Cpuid r;
    __asm__("cpuid" : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx) : "a"(eax), "c"(ecx));
    return r;
  };
  return ask(0, 0).eax < leaf ? Cpuid{} : ask(leaf, subleaf);
}

bool bit(unsigned word, int at) { return (word >> at & 1u) != 0; }

// Whether the kernel saves tiles when it changes threads, and lets this process use them. It must
// be asked: a thread's memory for signals may be too small for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of the state
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

MissingFeatures detect() {
  __builtin_cpu_init();
  MissingFeatures missing;
  require(missing.avx2, __builtin_cpu_supports("avx2"), "avx2");
  require(missing.avx2, __builtin_cpu_supports("fma"), "fma");
  require(missing.avx2, __builtin_cpu_supports("f16c"), "f16c");
  missing.avxvnni = missing.avx512 = missing.avx2;
  require(missing.avxvnni, missing.avx2.empty() && bit(cpuid(7, 1).eax, 4), "avxvnni");
  require(missing.avx512, __builtin_cpu_supports("avx512f"), "avx512f");
  require(missing.avx512, __builtin_cpu_supports("avx512bw"), "avx512bw");
  require(missing.avx512, __builtin_cpu_supports("avx512vl"), "avx512vl");
  require(missing.avx512, __builtin_cpu_supports("avx512dq"), "avx512dq");
  missing.avx512bf16 = missing.avx512vnni = missing.avx512;
  require(missing.avx512bf16, __builtin_cpu_supports("avx512bf16"), "avx512bf16");
  require(missing.avx512vnni, __builtin_cpu_supports("avx512vnni"), "avx512vnni");
  missing.amx = missing.avx512bf16;
  missing.amxint8 = missing.avx512vnni;
  const unsigned leaf = cpuid(7, 0).edx;
  require(missing.amx, bit(leaf, 22), "amx-bf16");
  require(missing.amxint8, bit(leaf, 25), "amx-int8");
  for (std::string* tiles : {&missing.amx, &missing.amxint8}) {
    require(*tiles, bit(leaf, 24), "amx-tile");
    if (tiles->empty()) require(*tiles, may_use_tiles(), "the permission to use tiles");
  }
  return missing;
}

#elif defined(COMPRESSED_LINEAR_ARM)

MissingFeatures detect() {
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  MissingFeatures missing;
  require(missing.neon, (first & HWCAP_ASIMD) != 0, "asimd");
  missing.dotprod = missing.neon;
  require(missing.dotprod, (first & HWCAP_ASIMDDP) != 0, "asimddp");
  missing.i8mm = missing.neon;
  require(missing.i8mm, (second & HWCAP2_I8MM) != 0, "i8mm");
  return missing;
}

#else

MissingFeatures detect() { return {}; }

#endif

}  // namespace

const MissingFeatures& missing_features() {
  static const MissingFeatures missing = detect();
  return missing;
}

}  // namespace compressed_linear::cpu
