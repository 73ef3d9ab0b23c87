// SPDX-License-Identifier: Apache-2.0
// NEON (the asimd of ARMv8-A, nothing newer) as decode_pairs.h and fma_core.h ask for it. A
// vector holds four output channels of one input channel, because transposing bytes to words yields
// that, and multiplications take x from a lane.
#pragma once

#include <arm_neon.h>

#include "cpu/common/floats.h"
#include "cpu/common/problem.h"

namespace compressed_linear::cpu {
namespace {  // see layouts/planes.h

struct NeonLanes {
  using Reg = uint8x16_t;
  using Float = float32x4_t;
  using Activation = float32x2_t;
  struct Pair {
    Float even, odd;  // input channels
  };
  using Sums = Float;
  // Eight sums keep two units busy at a latency of four cycles; 20 of the 32 registers hold sums
  // while many rows are multiplied.
  static constexpr int kLanes = 4, kFewSums = 8, kBlockRows = 5;

  // ---- integers

  static Reg load_row(const uint8_t* at) { return vld1q_u8(at); }
  static Reg set_bytes(int value) { return vdupq_n_u8(static_cast<uint8_t>(value)); }
  static Reg set_words(int value) {
    return vreinterpretq_u8_u16(vdupq_n_u16(static_cast<uint16_t>(value)));
  }
  static Reg bit_and(Reg a, Reg b) { return vandq_u8(a, b); }
  static Reg bit_or(Reg a, Reg b) { return vorrq_u8(a, b); }
  template <int Bits>
  static Reg shift_words_right(Reg a) {
    return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(a), Bits));
  }
  template <int Bits>
  static Reg shift_words_left(Reg a) {
    return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(a), Bits));
  }

  // ---- tables of sixteen bytes

  static Reg load_table(const uint8_t* sixteen) { return vld1q_u8(sixteen); }
  // Of Tables tables that follow each other. An index beyond the tables of an instruction gives
  // zero, or leaves what was found before.
  template <int Tables>
  static Reg look_up(const Reg* tables, Reg code) {
    if constexpr (Tables == 1) {
      return vqtbl1q_u8(tables[0], code);
    } else if constexpr (Tables == 2) {
      return vqtbl2q_u8({{tables[0], tables[1]}}, code);
    } else {
      const Reg found = vqtbl4q_u8({{tables[0], tables[1], tables[2], tables[3]}}, code);
      if constexpr (Tables == 4) return found;
      return vqtbx4q_u8(found, {{tables[4], tables[5], tables[6], tables[7]}},
                        vsubq_u8(code, vdupq_n_u8(64)));
    }
  }

  // ---- bytes of two pairs to fp32. Per channel they are ordered as by PlaneBytes.

  // The lower and upper bytes of bf16 numbers.
  static void widen(Reg low, Reg high, Pair& first, Pair& second) {
    first = from_bf16_words(vtrn1q_u8(low, high));
    second = from_bf16_words(vtrn2q_u8(low, high));
  }
  static Reg order_to_join(Reg code) { return code; }
  // The four bytes of each number, lowest first.
  static void join(const Reg (&bytes)[4], Pair& first, Pair& second) {
    first = lanes(vtrn1q_u8(bytes[0], bytes[1]), vtrn1q_u8(bytes[2], bytes[3]));
    second = lanes(vtrn2q_u8(bytes[0], bytes[1]), vtrn2q_u8(bytes[2], bytes[3]));
  }
  static Pair subtract(Pair a, Float b) { return {vsubq_f32(a.even, b), vsubq_f32(a.odd, b)}; }

  // ---- one pair of kLanes channels in the order of memory

  static Pair from_bytes(const uint8_t* at) {
    const int32x4_t words = vreinterpretq_s32_s16(vmovl_s8(vld1_s8(signed_at(at))));
    const int32x4_t upper = vdupq_n_s32(static_cast<int32_t>(0xffff0000u));
    return {vcvtq_n_f32_s32(vshlq_n_s32(words, 16), 16),
            vcvtq_n_f32_s32(vandq_s32(words, upper), 16)};
  }
  // Both are what fp16 makes of their bits, which keeps the subnormals: e5m2 is its upper byte,
  // e4m3 with one exponent bit more is 2^-8 of it.
  static Pair from_e5m2(const uint8_t* at) { return from_halves(vshll_n_u8(vld1_u8(at), 8)); }
  static Pair from_e4m3(const uint8_t* at) {
    const Pair pair = from_halves(e4m3_halves(vld1_s8(signed_at(at))));
    return {vmulq_n_f32(pair.even, 256.0f), vmulq_n_f32(pair.odd, 256.0f)};
  }
  static Pair from_bf16(const uint8_t* at) { return from_bf16_words(vld1q_u8(at)); }
  // Of input channels that are not adjacent.
  static Pair from_fp16(const uint8_t* even, const uint8_t* odd) {
    return {vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(even))),
            vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(odd)))};
  }
  static Pair from_fp32(const uint8_t* even, const uint8_t* odd) {
    return {vreinterpretq_f32_u8(vld1q_u8(even)), vreinterpretq_f32_u8(vld1q_u8(odd))};
  }

  // ---- arithmetic

  // x of one pair of input channels.
  static Activation broadcast_pair(const void* x) {
    return vreinterpret_f32_u8(vld1_u8(static_cast<const uint8_t*>(x)));
  }
  static Sums no_sums() { return vdupq_n_f32(0.0f); }
  static Sums multiply_add(Pair weights, Activation x, Sums sums) {
    return vfmaq_lane_f32(vfmaq_lane_f32(sums, weights.even, x, 0), weights.odd, x, 1);
  }
  template <bool Quads>
  static Float sum(Sums sums) {
    return sums;
  }
  template <bool Quads>
  static Pair ordered(Pair pair) {
    return pair;
  }
  static void store_pair(float* at, Pair pair) {
    store(at, pair.even);
    store(at + kLanes, pair.odd);
  }
  static Pair load_pair(const float* at) { return {load(at), load(at + kLanes)}; }

  static Float set(float value) { return vdupq_n_f32(value); }
  static Float load(const float* at) { return vld1q_f32(at); }
  static void store(float* at, Float value) { vst1q_f32(at, value); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float negate(Float a) { return vnegq_f32(a); }

  // data[index .. index + kLanes - 1] in fp32.
  static Float load_scalars(const void* data, Scalar type, int64_t index) {
    const uint8_t* at = static_cast<const uint8_t*>(data) + index * size_of(type);
    if (type == Scalar::float32) return vreinterpretq_f32_u8(vld1q_u8(at));
    if (type == Scalar::float16) return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
    if (type == Scalar::bfloat16)
      return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(at)), 16));
    uint32_t word;
    std::memcpy(&word, at, sizeof(word));
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
    if (type == Scalar::e4m3) {
      const uint16x8_t halves = e4m3_halves(vreinterpret_s8_u8(bytes));
      return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))), 256.0f);
    }
    const uint32x4_t code = vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
    const uint32x4_t least = vandq_u32(vceqzq_u32(code), vdupq_n_u32(0x00400000));
    return vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32(code, 23), least));
  }

 private:
  static const int8_t* signed_at(const uint8_t* at) { return reinterpret_cast<const int8_t*>(at); }
  // Words of even and odd input channels in turn.
  static Pair from_bf16_words(Reg words) {
    const uint32x4_t pairs = vreinterpretq_u32_u8(words);
    return {vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)),
            vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)))};
  }
  static Pair from_halves(uint16x8_t halves) {
    const float16x8_t apart = vreinterpretq_f16_u16(vcombine_u16(
        vget_low_u16(vuzp1q_u16(halves, halves)), vget_low_u16(vuzp2q_u16(halves, halves))));
    return {vcvt_f32_f16(vget_low_f16(apart)), vcvt_high_f32_f16(apart)};
  }
  // The copy of the sign below the sign is cleared.
  static uint16x8_t e4m3_halves(int8x8_t bytes) {
    const uint16x8_t moved = vreinterpretq_u16_s16(vshlq_n_s16(vmovl_s8(bytes), 7));
    return vandq_u16(moved, vdupq_n_u16(0xbfff));
  }
  static Pair lanes(Reg low, Reg high) {
    const uint16x8_t lower = vreinterpretq_u16_u8(low), upper = vreinterpretq_u16_u8(high);
    return {vreinterpretq_f32_u16(vtrn1q_u16(lower, upper)),
            vreinterpretq_f32_u16(vtrn2q_u16(lower, upper))};
  }
};

}  // namespace
}  // namespace compressed_linear::cpu
