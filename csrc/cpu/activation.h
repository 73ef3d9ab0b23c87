// SPDX-License-Identifier: Apache-2.0
// Quantisation of a row of x and back, to the bit as vllm/compressed_linear/activation.py defines
// it: fp32, IEEE division, ties to even. Where a whole row shares a scale it is left out of the row
// and given back, so that the row stays exact in bf16.
#pragma once

#include <cmath>

#include "engine.h"
#include "floats.h"

namespace compressed_linear::cpu {
namespace {  // see layout.h

inline float power_of_two(int exponent) {
  exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
  return exponent == -127 ? 0x1p-127f : float_of(static_cast<uint32_t>(exponent + 127) << 23);
}

// floor(log2(value)) of a positive finite value; -1 for zero, as frexp has it.
inline int exponent_of(float value) {
  const uint32_t bits = bits_of(value) & 0x7fffffffu;
  if (bits == 0) return -1;
  if (bits >> 23) return static_cast<int>(bits >> 23) - 127;
  return std::ilogb(float_of(bits));
}

// The nearest value of a type of Exponent and Mantissa bits whose largest is `largest`.
struct Rounding {
  int lowest, mantissa;  // exponent of the subnormals; 0 and 0 for integers
  float low, high;

  explicit Rounding(const Activation& a)
      : lowest(a.exponent > 0 ? 2 - (1 << (a.exponent - 1)) : 0),
        mantissa(a.mantissa),
        low(a.exponent > 0 ? -a.largest : -a.largest - 1),
        high(a.largest) {}

  float operator()(float value) const {
    // NaN passes both comparisons.
    const float raised = value < low ? low : value;
    const float held = raised > high ? high : raised;
    if (mantissa == 0 && lowest == 0) return std::nearbyint(held);
    int exponent = static_cast<int>((bits_of(held) >> 23) & 0xffu) - 127;
    if (exponent < lowest) exponent = lowest;
    // Both are powers of two in the normal range of fp32.
    const float up = float_of(static_cast<uint32_t>(127 + mantissa - exponent) << 23);
    const float down = float_of(static_cast<uint32_t>(127 - mantissa + exponent) << 23);
    return std::nearbyint(held * up) * down;
  }
};

inline float largest_magnitude(const float* values, int64_t count) {
  float lane[kTile] = {};
  bool ordered = true;
  int64_t i = 0;
  for (; i + kTile <= count; i += kTile)
    for (int64_t j = 0; j < kTile; ++j) {
      const float size = std::fabs(values[i + j]);
      ordered &= size == size;
      lane[j] = size > lane[j] ? size : lane[j];
    }
  for (; i < count; ++i) {
    const float size = std::fabs(values[i]);
    ordered &= size == size;
    lane[0] = size > lane[0] ? size : lane[0];
  }
  for (int64_t j = 1; j < kTile; ++j) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
  return ordered ? lane[0] : float_of(0x7fc00000u);
}

// What `largest` makes of a dynamic symmetric scale, before any common factor.
inline float dynamic_scale(const Activation& a, float largest) {
  const float scale = largest / a.maximum;
  if (!std::isfinite(scale)) return scale;
  if (a.scale_type == Scalar::e8m0) return power_of_two(exponent_of(scale));
  return scale;
}

// values[k], in the order of the weights, becomes q, or q times what differs within the row.
// Returns the factor that is left out.
inline float quantise_row(const Activation& a, float* values, int64_t k) {
  const Rounding round(a);
  if (!a.symmetric) {
    const auto half = static_cast<float>(1 << (a.bits - 1));
    float factor = 1.0f;
    const int64_t group = a.group > 0 ? a.group : k;
    for (int64_t begin = 0; begin < k; begin += group) {
      const int64_t count = k - begin < group ? k - begin : group;
      float* part = values + begin;
      float scale = a.scale, zero = a.zero;
      if (a.dynamic) {
        float low = a.lowest, high = a.highest;
        if (!a.whole_tensor) {
          low = high = 0.0f;
          for (int64_t i = 0; i < count; ++i) {
            low = part[i] < low ? part[i] : low;
            high = part[i] > high ? part[i] : high;
            if (std::isnan(part[i])) low = high = part[i];
          }
        }
        scale = (high - low) / (2 * half - 1);
        if (scale == 0) scale = 1.0f;
        zero = std::nearbyint(-half - low / scale);
        zero = zero < -half ? -half : zero > half - 1 ? half - 1 : zero;
      }
      const float inside = a.group > 0 ? scale : 1.0f;
      for (int64_t i = 0; i < count; ++i) {
        float q = std::nearbyint(part[i] / scale) + zero;
        q = q < -half ? -half : q > half - 1 ? half - 1 : q;
        part[i] = (q - zero) * inside;
      }
      if (a.group <= 0) factor = scale;
    }
    return factor;
  }
  if (a.group <= 0) {
    float scale = a.scale;
    if (a.dynamic) {
      const float largest = a.whole_tensor ? a.highest : largest_magnitude(values, k);
      scale = dynamic_scale(a, largest);
    }
    const float divisor = scale == 0 ? 1.0f : scale;
    for (int64_t i = 0; i < k; ++i) values[i] = round(values[i] / divisor);
    return scale;
  }
  const bool second = a.scale_type == Scalar::e4m3;
  for (int64_t begin = 0; begin < k; begin += a.group) {
    const int64_t count = k - begin < a.group ? k - begin : a.group;
    float* part = values + begin;
    float scale = dynamic_scale(a, largest_magnitude(part, count)), inside = scale;
    if (second) {
      inside = Rounding(kScaleE4m3)(scale / a.scale);
      scale = inside * a.scale;
    }
    const float divisor = scale == 0 ? 1.0f : scale;
    for (int64_t i = 0; i < count; ++i) part[i] = round(part[i] / divisor) * inside;
  }
  return second ? a.scale : 1.0f;
}

// The type that holds every number that quantise_row leaves.
inline Scalar quantised_type(const Activation& a) {
  return a.group > 0 && a.scale_type == Scalar::float32 ? Scalar::float32 : Scalar::bfloat16;
}

}  // namespace
}  // namespace compressed_linear::cpu
