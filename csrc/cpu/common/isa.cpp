// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(COMPRESSED_LINEAR_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef COMPRESSED_LINEAR_ARM
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace compressed_linear::cpu {

// Each is defined in the file of its name: float/avx2.cpp has float_avx2, repack/avx2.cpp
// repack_avx2.
#if defined(COMPRESSED_LINEAR_X86)
LinearFunction float_amx, float_avx512bf16, float_avx512vnni, float_avx512, float_avxvnni,
    float_avx2, float_avx2madd;
LinearFunction integer_avx512vnni, integer_amx, integer_avxvnni, integer_avx512, integer_avx2;
RepackFunction repack_avx512, repack_avx2;
#elif defined(COMPRESSED_LINEAR_ARM)
LinearFunction float_neon, integer_i8mm, integer_dotprod, integer_neon;
#endif
LinearFunction float_generic, integer_generic;
RepackFunction repack_plain;

namespace {

// What a processor may lack, in the order in which it is told.
enum Feature : uint32_t {
#if defined(COMPRESSED_LINEAR_X86)
  kAvx2,
  kFma,
  kF16c,
  kAvxVnni,
  kAvx512F,
  kAvx512Bw,
  kAvx512Vl,
  kAvx512Dq,
  kAvx512Bf16,
  kAvx512Vnni,
  kAmxBf16,
  kAmxInt8,
  kAmxTile,
  kTilePermission,
#elif defined(COMPRESSED_LINEAR_ARM)
  kAsimd,
  kAsimdDp,
  kI8mm,
#endif
  kFeatures
};

constexpr const char* kFeatureNames[kFeatures + 1] = {
#if defined(COMPRESSED_LINEAR_X86)
    "avx2",       "fma",
    "f16c",       "avxvnni",
    "avx512f",    "avx512bw",
    "avx512vl",   "avx512dq",
    "avx512bf16", "avx512vnni",
    "amx-bf16",   "amx-int8",
    "amx-tile",   "the permission to use tiles",
#elif defined(COMPRESSED_LINEAR_ARM)
    "asimd", "asimddp", "i8mm",
#endif
    nullptr};

template <class... Features>
constexpr uint32_t bits_of(Features... features) {
  return (uint32_t{0} | ... | (uint32_t{1} << features));
}

// Best first, as measured on AMD cores: the order in which rows are taken where no paths were
// chosen by the rates of the processor (paths.h).
#if defined(COMPRESSED_LINEAR_X86)
constexpr uint32_t kNeedsAvx2 = bits_of(kAvx2, kFma, kF16c);
constexpr uint32_t kNeedsAvx512 = kNeedsAvx2 | bits_of(kAvx512F, kAvx512Bw, kAvx512Vl, kAvx512Dq);
constexpr uint32_t kNeedsTiles = bits_of(kAmxBf16, kAmxInt8, kAmxTile, kTilePermission);
#endif
constexpr Isa kIsas[] = {
#if defined(COMPRESSED_LINEAR_X86)
    {"avx512bf16", "avx512bf16", kNeedsAvx512 | bits_of(kAvx512Bf16), float_avx512bf16, nullptr,
     repack_avx512},
    {"avx512vnni", "avx512bf16", kNeedsAvx512 | bits_of(kAvx512Vnni), float_avx512vnni,
     integer_avx512vnni, repack_avx512},
    {"amx", "amx", kNeedsAvx512 | bits_of(kAvx512Bf16, kAvx512Vnni) | kNeedsTiles, float_amx,
     integer_amx, repack_avx512},
    // Byte dot products of 256 bits are faster than 16-bit ones of 512.
    {"avxvnni", "avx2", kNeedsAvx2 | bits_of(kAvxVnni), float_avxvnni, integer_avxvnni,
     repack_avx2},
    {"avx512", "avx512", kNeedsAvx512, float_avx512, integer_avx512, repack_avx512},
    {"avx2", "avx2", kNeedsAvx2, float_avx2, integer_avx2, repack_avx2},
    {"avx2madd", "avx2", kNeedsAvx2, float_avx2madd, nullptr, repack_avx2},
#elif defined(COMPRESSED_LINEAR_ARM)
    {"i8mm", "neon", bits_of(kAsimd, kI8mm), nullptr, integer_i8mm, nullptr},
    {"dotprod", "neon", bits_of(kAsimd, kAsimdDp), nullptr, integer_dotprod, nullptr},
    {"neon", "neon", bits_of(kAsimd), float_neon, integer_neon, repack_plain},
#endif
    {"generic", "generic", 0, float_generic, integer_generic, repack_plain},
};
static_assert(std::size(kIsas) <= kMostIsas);

#if defined(COMPRESSED_LINEAR_X86)

struct Cpuid {
  unsigned eax, ebx, ecx, edx;
};

// Features that GCC 12 does not know by name. All zero if the leaf is missing.
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

uint32_t detect() {
  __builtin_cpu_init();
  uint32_t found = 0;
  const auto add = [&found](Feature feature, bool present) {
    if (present) found |= bits_of(feature);
  };
  add(kAvx2, __builtin_cpu_supports("avx2"));
  add(kFma, __builtin_cpu_supports("fma"));
  add(kF16c, __builtin_cpu_supports("f16c"));
  // Where the system does not save 256-bit registers, cpuid still tells of it.
  add(kAvxVnni, __builtin_cpu_supports("avx2") && bit(cpuid(7, 1).eax, 4));
  add(kAvx512F, __builtin_cpu_supports("avx512f"));
  add(kAvx512Bw, __builtin_cpu_supports("avx512bw"));
  add(kAvx512Vl, __builtin_cpu_supports("avx512vl"));
  add(kAvx512Dq, __builtin_cpu_supports("avx512dq"));
  add(kAvx512Bf16, __builtin_cpu_supports("avx512bf16"));
  add(kAvx512Vnni, __builtin_cpu_supports("avx512vnni"));
  const unsigned leaf = cpuid(7, 0).edx;
  add(kAmxBf16, bit(leaf, 22));
  add(kAmxInt8, bit(leaf, 25));
  add(kAmxTile, bit(leaf, 24));
  add(kTilePermission, bit(leaf, 24) && may_use_tiles());
  return found;
}

#elif defined(COMPRESSED_LINEAR_ARM)

uint32_t detect() {
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return ((first & HWCAP_ASIMD) != 0 ? bits_of(kAsimd) : 0) |
         ((first & HWCAP_ASIMDDP) != 0 ? bits_of(kAsimdDp) : 0) |
         ((second & HWCAP2_I8MM) != 0 ? bits_of(kI8mm) : 0);
}

#else

uint32_t detect() { return 0; }

#endif

uint32_t lacking(const Isa& row) {
  static const uint32_t found = detect();
  return row.needs & ~found;
}

std::string named(uint32_t features) {
  std::string text;
  for (uint32_t i = 0; i < kFeatures; ++i)
    if (features >> i & 1u) text += (text.empty() ? "" : ", ") + std::string(kFeatureNames[i]);
  return text;
}

// What the environment asks for; null where it does not.
const Isa* asked_isa(Kernels kernels) {
  const char* asked = std::getenv(kIsaVariable);
  if (asked == nullptr || *asked == '\0') return nullptr;
  const std::vector<const Isa*> rows = supported_isas(kernels);
  if (kernels == Kernels::floats)  // some rows of a tier are made for few tokens
    for (const Isa* row : rows)
      if (std::string(asked) == row->name) return row;
  for (const Isa* row : rows)
    if (std::string(asked) == row->tier) return row;
  if (kernels == Kernels::integers) return rows.front();
  return &find_isa(kernels, asked,
                   std::string(kIsaVariable) + " asks for the CPU instruction set '" + asked + "'");
}

std::atomic<bool> byte_permutations_hidden{false};

// Two variables, so that an error about floats leaves integers alone.
std::atomic<const Isa*>& forced(Kernels kernels) {
  if (kernels == Kernels::floats) {
    static std::atomic<const Isa*> row{asked_isa(Kernels::floats)};
    return row;
  }
  static std::atomic<const Isa*> row{asked_isa(Kernels::integers)};
  return row;
}

}  // namespace

std::vector<const Isa*> supported_isas(Kernels kernels) {
  std::vector<const Isa*> rows;
  for (const Isa& row : kIsas)
    if (row.linear(kernels) != nullptr && lacking(row) == 0) rows.push_back(&row);
  return rows;
}

const Isa& find_isa(Kernels kernels, const std::string& name, const std::string& asked) {
  std::string runnable;
  for (const Isa* row : supported_isas(kernels))
    runnable += (runnable.empty() ? "" : ", ") + std::string(row->name);
  for (const Isa& row : kIsas) {
    if (name != row.name || row.linear(kernels) == nullptr) continue;
    if (lacking(row) == 0) return row;
    throw std::invalid_argument(asked + ", but this processor lacks " + named(lacking(row)) +
                                "; it can run: " + runnable);
  }
  throw std::invalid_argument(asked + ", which this build does not know; it can run: " + runnable);
}

const Isa* forced_isa(Kernels kernels) { return forced(kernels).load(std::memory_order_acquire); }

const Isa& isa(Kernels kernels) {
  static const Isa* const best[] = {supported_isas(Kernels::floats).front(),
                                    supported_isas(Kernels::integers).front()};
  const Isa* row = forced_isa(kernels);
  return row != nullptr ? *row : *best[static_cast<int>(kernels)];
}

void select_isa(Kernels kernels, const std::string& name) {
  const bool integers = kernels == Kernels::integers;
  const std::string asked = integers ? "the integer kernels of '" + name + "' are asked for"
                                     : "select_isa asks for the CPU instruction set '" + name + "'";
  forced(kernels).store(name.empty() ? asked_isa(kernels) : &find_isa(kernels, name, asked),
                        std::memory_order_release);
}

bool has_byte_permutations() {
#if defined(COMPRESSED_LINEAR_X86)
  static const bool found = __builtin_cpu_supports("avx512vbmi");
  return found && !byte_permutations_hidden.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

void hide_byte_permutations(bool hidden) { byte_permutations_hidden.store(hidden); }

size_t index_of(const Isa& row) { return static_cast<size_t>(&row - kIsas); }

}  // namespace compressed_linear::cpu
