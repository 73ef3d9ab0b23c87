// SPDX-License-Identifier: Apache-2.0
// The primitives of device.h in plain C++, for kernels in the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/common/floats.h"
#include "emulator.h"

#define CL_GLOBAL(...) inline
#define CL_PARAMS const
// Inlined, so that each use has its own return address, which identifies the access's site.
#define CL_DEVICE inline __attribute__((always_inline))

namespace compressed_linear::cuda {

CL_DEVICE int thread_index() { return emulator::position().thread; }
CL_DEVICE int thread_count() { return emulator::position().threads; }
CL_DEVICE int block_x() { return emulator::position().block_x; }
CL_DEVICE int block_y() { return emulator::position().block_y; }
CL_DEVICE int grid_x() { return emulator::position().grid_x; }
CL_DEVICE int grid_y() { return emulator::position().grid_y; }

CL_DEVICE void sync_threads() { emulator::sync_block(0, thread_count()); }
CL_DEVICE void sync_warp() { emulator::sync_warp(); }
CL_DEVICE void sync_named(int id, int threads) { emulator::sync_block(id, threads); }

// Not 0, so that an address without the base is out of bounds.
CL_DEVICE uint32_t shared_base() { return 1024; }

CL_DEVICE float bits_to_float(uint32_t bits) { return cpu::float_of(bits); }
CL_DEVICE uint32_t float_to_bits(float value) { return cpu::bits_of(value); }

template <class T>
CL_DEVICE T load_shared(uint32_t address) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "1, 2, 4, 8 or 16 bytes");
  T value;
  emulator::read_shared(address, &value, sizeof(T));
  return value;
}

template <class T>
CL_DEVICE void store_shared(uint32_t address, T value) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "1, 2, 4, 8 or 16 bytes");
  emulator::write_shared(address, &value, sizeof(T));
}

template <class T>
CL_DEVICE T load_global(const T* from) {
  T value;
  emulator::read_global(from, &value, sizeof(T), false);
  return value;
}

template <class T>
CL_DEVICE void store_global(T* to, T value) {
  emulator::write_global(to, &value, sizeof(T));
}

template <class T>
CL_DEVICE T load_constant(const T* from) {
  T value;
  emulator::read_global(from, &value, sizeof(T), true);
  return value;
}

template <class T>
CL_DEVICE T load_coherent(const T* from) {
  return load_global(from);
}

template <int Bytes>
CL_DEVICE void copy_async(uint32_t shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "4, 8 or 16 bytes");
  emulator::copy_async(shared, global, Bytes, valid);
}

CL_DEVICE void copy_async_commit() { emulator::copy_async_commit(); }

template <int Left>
CL_DEVICE void copy_async_wait() {
  emulator::copy_async_wait(Left);
}

CL_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  emulator::load_matrix(r, address, false);
}

CL_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  emulator::load_matrix(r, address, true);
}

template <class T>
CL_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply_add(c, a, b, std::is_same_v<T, BFloat16>);
}

// Bit i of `Table` is the result where a, b and c hold the bits of i, a's the highest.
template <int Table>
CL_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int i = 0; i < 8; ++i)
    if (Table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}

CL_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (select & 7))) & 0xffu;
    if (select & 8) byte = byte & 0x80u ? 0xffu : 0u;  // the sign of the byte
    out |= byte << (8 * i);
  }
  return out;
}

template <class T>
CL_DEVICE T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4, "4 bytes");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulator::shuffle(bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
CL_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, (thread_index() & 31) ^ mask);
}

CL_DEVICE int atomic_add(int* to, int value) { return emulator::atomic_add(to, value); }
CL_DEVICE int load_acquire(const int* from) { return emulator::load_acquire(from); }
CL_DEVICE void store_release(int* to, int value) { emulator::write_global(to, &value, 4); }
// Fibers share one thread, so writes are ordered already.
CL_DEVICE void fence() {}

template <class T>
CL_DEVICE float widen(uint16_t value) {
  if constexpr (std::is_same_v<T, Half>) return cpu::from_fp16(value);
  return cpu::from_bf16(value);
}

template <class T>
CL_DEVICE uint16_t narrow(float value) {
  if constexpr (std::is_same_v<T, Half>) return cpu::to_fp16(value);
  return cpu::to_bf16(value);
}

template <class T>
CL_DEVICE uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low) | static_cast<uint32_t>(narrow<T>(high)) << 16;
}

// fma with a single rounding: products of two 16-bit floats are exact in double, and the sum is
// rounded to odd, so that the later rounding to fp32 (to odd) and to 16 bits equals one rounding
// (Boldo and Melquiond, "Emulation of a FMA and Correctly Rounded Sums", 2008).
CL_DEVICE double sum_to_odd(double a, double b) {
  const double sum = a + b, above = sum - a;
  const double error = (a - (sum - above)) + (b - above);
  uint64_t bits;
  std::memcpy(&bits, &sum, 8);
  if (error == 0 || bits & 1 || !std::isfinite(sum)) return sum;
  bits += (error > 0) == (sum > 0) ? 1 : -1;
  double odd;
  std::memcpy(&odd, &bits, 8);
  return odd;
}

CL_DEVICE float float_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || !std::isfinite(nearest)) return nearest;
  uint32_t bits = cpu::bits_of(nearest);
  if (bits & 1) return nearest;
  const bool larger = std::fabs(static_cast<double>(nearest)) < std::fabs(value);
  return cpu::float_of(larger ? bits + 1 : bits - 1);
}

template <class T>
CL_DEVICE uint16_t fma_half(uint16_t a, uint16_t b, uint16_t c) {
  const double product = static_cast<double>(widen<T>(a)) * static_cast<double>(widen<T>(b));
  return narrow<T>(float_to_odd(sum_to_odd(product, static_cast<double>(widen<T>(c)))));
}

template <class T>
CL_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [](uint32_t word, int i) { return static_cast<uint16_t>(word >> (16 * i)); };
  return fma_half<T>(half(a, 0), half(b, 0), half(c, 0)) |
         static_cast<uint32_t>(fma_half<T>(half(a, 1), half(b, 1), half(c, 1))) << 16;
}

template <class T>
CL_DEVICE uint32_t add_pair(uint32_t a, uint32_t b) {
  return fma_pair<T>(a, std::is_same_v<T, Half> ? 0x3c003c00u : 0x3f803f80u, b);
}

template <class T>
CL_DEVICE uint32_t subtract_pair(uint32_t a, uint32_t b) {
  return fma_pair<T>(b, std::is_same_v<T, Half> ? 0xbc00bc00u : 0xbf80bf80u, a);
}

template <class T>
CL_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  return fma_pair<T>(a, b, 0x80008000u);
}

}  // namespace compressed_linear::cuda

#include "cuda/device/small_floats.h"
