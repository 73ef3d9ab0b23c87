// SPDX-License-Identifier: Apache-2.0
#include "choice.h"

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

// GCC 12 does not know the feature's name, so: leaf 7, subleaf 1, EAX bit 4.
bool has_avx_vnni() {
  unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
  unsigned highest = 0, unused_b, unused_c, unused_d;
  __asm__("cpuid" : "=a"(highest), "=b"(unused_b), "=c"(unused_c), "=d"(unused_d) : "a"(0), "c"(0));
  if (highest < 7) return false;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax >> 4 & 1u) != 0;
}

MissingFeatures detect() {
  __builtin_cpu_init();
  MissingFeatures missing;
  require(missing.avx2, __builtin_cpu_supports("avx2"), "avx2");
  require(missing.avx2, __builtin_cpu_supports("fma"), "fma");
  require(missing.avx2, __builtin_cpu_supports("f16c"), "f16c");
  missing.avxvnni = missing.avx512 = missing.avx2;
  require(missing.avxvnni, missing.avx2.empty() && has_avx_vnni(), "avxvnni");
  require(missing.avx512, __builtin_cpu_supports("avx512f"), "avx512f");
  require(missing.avx512, __builtin_cpu_supports("avx512bw"), "avx512bw");
  require(missing.avx512, __builtin_cpu_supports("avx512vl"), "avx512vl");
  require(missing.avx512, __builtin_cpu_supports("avx512dq"), "avx512dq");
  missing.avx512bf16 = missing.avx512vnni = missing.avx512;
  require(missing.avx512bf16, __builtin_cpu_supports("avx512bf16"), "avx512bf16");
  require(missing.avx512vnni, __builtin_cpu_supports("avx512vnni"), "avx512vnni");
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
