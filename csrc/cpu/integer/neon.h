// SPDX-License-Identifier: Apache-2.0
// What the NEON engines for integer activations have in common: everything but the dot product.
// Included by units for 64-bit Arm only.
#pragma once

#include <arm_neon.h>

#include "driver.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

struct NeonIntegerCore {
  using Reg = int32x4_t;
  using Float = float32x4_t;
  // At most 24 of the 32 registers hold sums.
  static constexpr int kLanes = 4, kVectors = 4, kRows = 6;
  static constexpr int tiles(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

  static Reg load(const uint8_t* at) { return vreinterpretq_s32_u8(vld1q_u8(at)); }
  static Reg load(const int32_t* at) { return vld1q_s32(at); }
  static Float load(const float* at) { return vld1q_f32(at); }
  static Float load_bf16(const uint16_t* at) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(at), 16));
  }
  static void store(uint8_t* at, Reg value) { vst1q_u8(at, vreinterpretq_u8_s32(value)); }
  static void store(int32_t* at, Reg value) { vst1q_s32(at, value); }
  static void store(float* at, Float value) { vst1q_f32(at, value); }
  static Reg set(int32_t value) { return vdupq_n_s32(value); }
  static Float set(float value) { return vdupq_n_f32(value); }
  static Reg subtract(Reg a, Reg b) { return vsubq_s32(a, b); }
  static Reg multiply(Reg a, Reg b) { return vmulq_s32(a, b); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float convert(Reg value) { return vcvtq_f32_s32(value); }

  static void quantize(const float* x, int64_t count, QuantizedGroup by, int8_t* q) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      const int16x4_t low = vqmovn_s32(code(load(x + i), by));
      const int16x4_t high = vqmovn_s32(code(load(x + i + kLanes), by));
      vst1_s8(q + i, vqmovn_s16(vcombine_s16(low, high)));
    }
    quantize_values(x + i, count - i, by, q + i);
  }

  static float largest(const float* x, int64_t count) { return largest_magnitude(x, count); }
  static int32_t sum(const int8_t* q, int64_t count) { return sum_bytes(q, count); }

  // Shifts so that bit From of each byte lands on bit To.
  template <int From, int To>
  static Reg place(Reg row) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(row);
    if constexpr (From > To) return vreinterpretq_s32_u8(vshrq_n_u8(bytes, From - To));
    if constexpr (From < To) return vreinterpretq_s32_u8(vshlq_n_u8(bytes, To - From));
    return row;
  }
  // The low Bits bits of each byte from `low`, the others from `high`.
  template <int Bits>
  static Reg join(Reg low, Reg high) {
    return vbslq_s32(vreinterpretq_u32_u8(vdupq_n_u8((1 << Bits) - 1)), low, high);
  }
  template <int Mask>
  static Reg keep(Reg row) {
    return vandq_s32(row, vreinterpretq_s32_u8(vdupq_n_u8(Mask)));
  }

 private:
  // Not yet clamped to a byte.
  static Reg code(Float x, QuantizedGroup by) {
    const Float value = vdivq_f32(x, set(by.scale));
    const Float held = vmaxq_f32(vminq_f32(value, set(1024.0f)), set(-1024.0f));
    return vaddq_s32(vcvtnq_s32_f32(held), set(by.zero));
  }
};

// With a dot product that takes signed bytes only: Dot::dot(sum, codes, x). Codes of eight bits
// lose 128, and get it back as 128 times the sum of x.
template <class Dot>
struct SignedCore : NeonIntegerCore {
  static constexpr bool kTellNarrow = true;
  struct Compensated {
    int8x16_t x;
    Reg lost;
  };
  template <bool Narrow>
  static auto broadcast(const int32_t* word) {
    const int8x16_t x = vreinterpretq_s8_s32(set(*word));
    if constexpr (Narrow) {
      return x;
    } else {
      return Compensated{x, vshlq_n_s32(Dot::dot(set(0), vdupq_n_s8(64), x), 1)};
    }
  }
  template <bool Narrow, class Activation>
  static Reg dot(Reg sum, Reg codes, const Activation& activation) {
    const int8x16_t bytes = vreinterpretq_s8_s32(codes);
    if constexpr (Narrow) {
      return Dot::dot(sum, bytes, activation);
    } else {
      return Dot::dot(vaddq_s32(sum, activation.lost), veorq_s8(bytes, vdupq_n_s8(-128)),
                      activation.x);
    }
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
