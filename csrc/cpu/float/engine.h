// SPDX-License-Identifier: Apache-2.0
// What an engine computes, free of torch so that it can be driven by a plain program.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/repack/repack.h"
#include "layouts/planes.h"

namespace compressed_linear::cpu {

// How x is quantised, see activation.h. exponent is 0 for integers of `bits` bits.
struct Activation {
  bool present, dynamic, symmetric, whole_tensor;
  int bits, exponent, mantissa;
  int64_t group;  // input channels that share a scale, 0: all of a row
  Scalar scale_type;
  float largest, maximum;
  float scale, zero;      // static ones, or NVFP4's common factor
  float lowest, highest;  // of all of x, where its rows share a dynamic scale
};

inline constexpr Activation kScaleE4m3 = {
    true, false, true, false, 8, 4, 3, 0, Scalar::float32, 448.0f, 448.0f, 1.0f, 0.0f, 0.0f, 0.0f};

// y[m,n] = row_scale[n] sum_k x^[m,k] w[n,k] + bias[n]
// w[n,k] = scale[n,g] (value - offset - zero[n,g]), where value is (wide_)table[code], code -
// middle (8-bit codes: middle is 128), or the float itself.
struct Problem {
  Geometry geometry;
  int64_t m;
  const uint8_t* packed;  // tiles * tile_bytes, see layouts/planes.h
  const void* scale;      // [tiles][groups][16] or null
  Scalar scale_type;
  const void* zero;  // [tiles][groups][16] or null
  Scalar zero_type;
  const float* row_scale;  // [n] or null
  float offset;            // added to `zero`
  float middle;
  const uint16_t* table;    // bf16 [2^bits] or null
  const float* wide_table;  // fp32 [2^bits] or null, for values that bf16 cannot hold
  const int32_t* perm;      // [k] or null; x^[:, i] = perm[i] < 0 ? 0 : x[:, perm[i]]
  const void* x;            // [m, *]
  Scalar x_type;
  int64_t x_row_stride, x_column_stride;  // in elements
  const float* prescale;                  // [k] or null
  Activation activation;
  float* input_factor;  // [m] or null: of each row, left out when it was quantised
  const void* bias;     // [n] or null
  Scalar bias_type;
  void* out;  // [m, n] contiguous
  Scalar out_type;
};

// Runs body(context, begin, end) over [0, count), possibly in several threads.
struct Parallel {
  void (*run)(int64_t count, void (*body)(void*, int64_t, int64_t), void* context);
  int64_t threads;
};

struct Engine {
  const char* isa;
  void (*linear)(const Problem&, const Parallel&);
  RepackFunction repack;
};

// One per translation unit; the last is plain C++ and always there.
#ifdef COMPRESSED_LINEAR_X86
extern const Engine kEngineAmx;
extern const Engine kEngineAmxEmulated;  // in the native tests only
extern const Engine kEngineAvx512Bf16;
extern const Engine kEngineAvx512;
extern const Engine kEngineAvx2;
#endif
#ifdef COMPRESSED_LINEAR_ARM
extern const Engine kEngineNeon;
#endif
extern const Engine kEngineGeneric;

// Names of the engines this processor can run, best first.
std::vector<std::string> supported_isas();
// The engine in use: the best, or the one VLLM_COMPRESSED_LINEAR_CPU_ISA names.
const Engine& engine();
// Replaces the engine in use; throws std::invalid_argument if the processor cannot run it.
void select_engine(const std::string& isa);

}  // namespace compressed_linear::cpu
