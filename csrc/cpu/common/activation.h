// SPDX-License-Identifier: Apache-2.0
// Quantization of a row of x and back, to the bit as vllm/compressed_linear/spec/activation.py
// defines it: fp32, IEEE division, ties to even. Where a whole row shares a scale it is left out of
// the row and given back, so that the row stays exact in bf16.
#pragma once

#include <cmath>

#include "floats.h"
#include "least.h"
#include "problem.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

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

// Largest |x|, NaN if one is. Compared as integers, among which NaN is above infinity; such loops
// become vectors.
inline float largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(values[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return float_of(largest);
}

// min(x, 0) and max(x, 0) over all x; both NaN if one is.
struct Range {
  float low, high;
};

inline Range range_of(const float* values, int64_t count) {
  // An integer that orders as the number does, with NaN at both ends, and back.
  const auto flip = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  int32_t lowest = 0, highest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = flip(static_cast<int32_t>(bits_of(values[i])));
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  const float low = float_of(static_cast<uint32_t>(flip(lowest)));
  const float high = float_of(static_cast<uint32_t>(flip(highest)));
  return {std::isnan(high) ? high : low, std::isnan(low) ? low : high};
}

// Scale and zero point that bring a range to integers from -half to half - 1.
struct Affine {
  float scale, zero;
};

inline Affine affine_of(Range range, float half) {
  float scale = (range.high - range.low) / (2 * half - 1);
  if (scale == 0) scale = 1.0f;
  const float zero = std::nearbyint(-half - range.low / scale);
  return {scale, zero < -half ? -half : zero > half - 1 ? half - 1 : zero};
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
inline float quantize_in_place(const Activation& a, float* values, int64_t k) {
  const Rounding round(a);
  if (!a.symmetric) {
    const auto half = static_cast<float>(1 << (a.bits - 1));
    float factor = 1.0f;
    const int64_t group = a.group > 0 ? a.group : k;
    for (int64_t begin = 0; begin < k; begin += group) {
      const int64_t count = least(k - begin, group);
      float* part = values + begin;
      Affine by = {a.scale, a.zero};
      if (a.dynamic)
        by = affine_of(a.whole_tensor ? Range{a.lowest, a.highest} : range_of(part, count), half);
      const float inside = a.group > 0 ? by.scale : 1.0f;
      for (int64_t i = 0; i < count; ++i) {
        float q = std::nearbyint(part[i] / by.scale) + by.zero;
        q = q < -half ? -half : q > half - 1 ? half - 1 : q;
        part[i] = (q - by.zero) * inside;
      }
      if (a.group <= 0) factor = by.scale;
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
    const int64_t count = least(k - begin, a.group);
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

// The type that holds every number that quantize_in_place leaves.
inline Scalar quantized_type(const Activation& a) {
  return a.group > 0 && a.scale_type == Scalar::float32 ? Scalar::float32 : Scalar::bfloat16;
}

}  // namespace
}  // namespace compressed_linear::cpu
