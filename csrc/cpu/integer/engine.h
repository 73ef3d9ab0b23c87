// SPDX-License-Identifier: Apache-2.0
// What an engine for 8-bit integer activations computes, free of torch like engine.h.
#pragma once

#include "cpu/float/engine.h"
#include "layouts/quads.h"

namespace compressed_linear::cpu {

// How a row of x, after its gather, becomes signed bytes q with x ~ scale (q - zero). All in fp32,
// rounding half to even, q and zero clamped to [-128, 127]:
//   dynamic, symmetric    scale = max|x| / maximum, zero = 0
//   dynamic, asymmetric   scale = (hi - lo) / 255, zero = round(-128 - lo / scale), where
//                         lo = min(x, 0), hi = max(x, 0)
//   static                scale and zero as given
// and q = round(x / scale) + zero. A scale of 0 counts as 1. NaN, and infinities that make a
// dynamic scale infinite, make the whole result row NaN.
struct ActivationRule {
  bool dynamic, symmetric;
  int64_t group;  // input channels that share scale and zero, the last group may be short; 0: all
  float maximum;
  float scale;
  int32_t zero;
};

// y[m,n] = sum_k scale_x (q[m,k] - zero_x) scale[n,g] (code[n,k] - middle - offset - zero[n,g])
//          + bias[n]
struct IntegerProblem {
  // x, perm, packed (layouts/quads.h), scale, zero, offset, bias and out as said in engine.h; the
  // geometry is make_quads_geometry's, middle is an integer, there is no table.
  Problem linear;
  ActivationRule activation;
  const int32_t* code_sums;  // [tiles][segments][16], see sum_codes; null if zero_x is always 0
};

struct IntegerEngine {
  const char* isa;
  void (*linear)(const IntegerProblem&, const Parallel&);
};

// One per translation unit; the last is plain C++ and always there.
#ifdef COMPRESSED_LINEAR_X86
extern const IntegerEngine kIntegerEngineAvx512Vnni;
extern const IntegerEngine kIntegerEngineAmx;
extern const IntegerEngine kIntegerEngineAmxEmulated;  // in the native tests only
extern const IntegerEngine kIntegerEngineAvx512Bw;
extern const IntegerEngine kIntegerEngineAvxVnni;
extern const IntegerEngine kIntegerEngineAvxVnniEvex;  // in the native tests only
extern const IntegerEngine kIntegerEngineAvx2;
#endif
#ifdef COMPRESSED_LINEAR_ARM
extern const IntegerEngine kIntegerEngineI8mm;
extern const IntegerEngine kIntegerEngineDotprod;
extern const IntegerEngine kIntegerEngineNeon;
#endif
extern const IntegerEngine kIntegerEngineGeneric;

// Names of the integer engines this processor can run, best first.
std::vector<std::string> supported_integer_isas();
// The engine in use: the best, or the best of the tier that VLLM_COMPRESSED_LINEAR_CPU_ISA names.
const IntegerEngine& integer_engine();
// Replaces the engine in use; throws std::invalid_argument if the processor cannot run it.
void select_integer_engine(const std::string& isa);

// Why x cannot be quantised in groups of `activation_group` beside the weight groups of `geometry`,
// or an empty text.
std::string why_not_grouped(const Geometry& geometry, int64_t activation_group);

// Segments that K is cut into.
int64_t count_segments(const Geometry& geometry, int64_t activation_group);

// sums[segment][16] = sum of the stored codes of each channel of `tile` over each segment.
void sum_codes(const Geometry& geometry, int64_t activation_group, const uint8_t* packed,
               int64_t tile, int32_t* sums);

}  // namespace compressed_linear::cpu
