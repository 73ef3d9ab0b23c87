// SPDX-License-Identifier: Apache-2.0
// What a call multiplies: one struct for each operand. Free of torch, so that a plain program can
// drive the kernels.
//
//   y[m,n] = row_scale[n] sum_k x^[m,k] w[n,k] + bias[n]
//   w[n,k] = scale[n,g] (value - offset - zero[n,g])
//
// value is (wide_)table[code], code - middle (8-bit codes of layouts/planes.h: middle is 128), or
// the float itself.
#pragma once

#include <cstdint>

#include "layouts/packed_layout.h"
#include "layouts/planes.h"

namespace compressed_linear::cpu {

// How x is quantized, see activation.h. exponent is 0 for integers of `bits` bits. What multiplies
// layouts/quads.h reads integers of 8 bits only, with one scale for a row or for `group` channels;
// see quantize_group of integer/rows.h.
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

struct Input {
  const void* data;  // [m, columns]
  Scalar type;
  int64_t m, columns;
  int64_t row_stride, column_stride;  // in elements
  const int32_t* perm;                // [k] or null: x^[:, i] = x[:, perm[i]], 0 if perm[i] < 0
  const float* prescale;              // [k] or null
  Activation activation;
  float* factor;  // [m] or null: of each row, left out when it was quantized
};

// Scales or zero points: sixteen numbers, one for each channel of a tile, for each group. The
// strides are in numbers. They are tensors [tiles][groups][16], or inline with the codes.
struct TileNumbers {
  const void* data;  // null: none
  Scalar type;
  int64_t strip_stride, tile_stride, group_stride;  // from a strip, tile of a strip, group to next

  [[gnu::always_inline]] constexpr int64_t at(int64_t tile, int64_t group) const {
    return (tile >> 2) * strip_stride + (tile & 3) * tile_stride + group * group_stride;
  }
};

static_assert(kStrip == 4, "TileNumbers::at divides by shifts, which takes fewer instructions");

struct Weight {
  PackedLayout layout;
  Geometry geometry;
  const uint8_t* packed;
  int64_t strip_bytes;  // from a strip to the next
  TileNumbers scale, zero;
  const float* row_scale;   // [n] or null
  float offset;             // added to `zero`
  float middle;             // an integer
  const uint16_t* table;    // bf16 [2^bits] or null
  const float* wide_table;  // fp32 [2^bits] or null, for values that bf16 cannot hold
  const int32_t*
      code_sums;  // [tiles][segments][16], see integer/segments.h; null without zeros of x
};

struct Output {
  void* data;  // [m, n] contiguous
  Scalar type;
  const void* bias;  // [n] or null
  Scalar bias_type;
};

struct Problem {
  Input x;
  Weight weight;
  Output y;
};

inline constexpr int64_t kMostNodes = 256;

// Runs body(context, begin, end) over [0, count), possibly in several threads.
struct Parallel {
  void (*run)(int64_t count, void (*body)(void*, int64_t, int64_t), void* context);
  int64_t threads;
  const uint8_t* node_of = nullptr;  // NUMA node of each thread, null: of all the same
};

namespace {  // see layouts/planes.h

// Numbers in a tensor [tiles][groups][16] of their own.
constexpr TileNumbers tile_numbers(const void* data, Scalar type, const Geometry& g) {
  return {data, type, kStrip * g.groups * kTile, g.groups * kTile, kTile};
}

// Codes alone, without scales and all else.
constexpr Weight packed_weight(PackedLayout layout, const Geometry& g, const uint8_t* packed) {
  Weight weight{};
  weight.layout = layout;
  weight.geometry = g;
  weight.packed = packed;
  weight.strip_bytes = kStrip * g.tile_bytes();
  return weight;
}

// The block of a tile of layouts/planes.h that holds stored channel `k`.
[[gnu::always_inline]] inline const uint8_t* block_of(const Weight& w, int64_t tile, int64_t k) {
  const Geometry& g = w.geometry;
  return w.packed + tile / kStrip * w.strip_bytes + k / kBlock * g.block_stride(tile) +
         tile % kStrip * g.block_bytes();
}

}  // namespace
}  // namespace compressed_linear::cpu
