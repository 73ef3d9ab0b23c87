// SPDX-License-Identifier: Apache-2.0
// The primitives of device.h as PTX for sm_80 and up. The tests compile them for each architecture
// and look for the instructions.
// Has run on hardware: nothing.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define CL_GLOBAL(...) __global__ __launch_bounds__(__VA_ARGS__)
#define CL_PARAMS const __grid_constant__
#define CL_DEVICE __device__ __forceinline__

namespace compressed_linear::cuda {

CL_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CL_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
CL_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
CL_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
CL_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
CL_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }

CL_DEVICE void sync_threads() { __syncthreads(); }
CL_DEVICE void sync_warp() { __syncwarp(); }
CL_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

CL_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

CL_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
CL_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// Values of up to 16 bytes as words, whatever their type.
template <class T>
union Bits {
  T value;
  uint32_t words[sizeof(T) < 4 ? 1 : sizeof(T) / 4];
  CL_DEVICE Bits() {}
};

template <class T>
CL_DEVICE T load_shared(uint32_t address) {
  Bits<T> bits;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.words[0]), "=r"(bits.words[1]), "=r"(bits.words[2]),
                   "=r"(bits.words[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(bits.words[0]), "=r"(bits.words[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits.words[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(bits.words[0]) : "r"(address) : "memory");
  } else {
    static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(bits.words[0]) : "r"(address) : "memory");
  }
  return bits.value;
}

template <class T>
CL_DEVICE void store_shared(uint32_t address, T value) {
  Bits<T> bits;
  bits.words[0] = 0;
  bits.value = value;
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(bits.words[0]),
                 "r"(bits.words[1]), "r"(bits.words[2]), "r"(bits.words[3])
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(bits.words[0]),
                 "r"(bits.words[1])
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(bits.words[0]) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "r"(bits.words[0]) : "memory");
  } else {
    static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(bits.words[0]) : "memory");
  }
}

template <class T>
CL_DEVICE T load_global(const T* from) {
  return *from;
}

template <class T>
CL_DEVICE void store_global(T* to, T value) {
  *to = value;
}

template <class T>
CL_DEVICE T load_constant(const T* from) {
  Bits<T> bits;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.words[0]), "=r"(bits.words[1]), "=r"(bits.words[2]),
                   "=r"(bits.words[3])
                 : "l"(from));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
                 : "=r"(bits.words[0]), "=r"(bits.words[1])
                 : "l"(from));
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(bits.words[0]) : "l"(from));
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=r"(bits.words[0]) : "l"(from));
  } else {
    static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");
    asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(bits.words[0]) : "l"(from));
  }
  return bits.value;
}

template <class T>
CL_DEVICE T load_coherent(const T* from) {
  Bits<T> bits;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.words[0]), "=r"(bits.words[1]), "=r"(bits.words[2]),
                   "=r"(bits.words[3])
                 : "l"(from)
                 : "memory");
  } else {
    static_assert(sizeof(T) == 4, "4 or 16 bytes");
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(bits.words[0]) : "l"(from) : "memory");
  }
  return bits.value;
}

template <int Bytes>
CL_DEVICE void copy_async(uint32_t shared, const void* global, bool valid) {
  const int size = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(size)
                 : "memory");
  } else {
    static_assert(Bytes == 4 || Bytes == 8, "4, 8 or 16 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global),
                 "n"(Bytes), "r"(size)
                 : "memory");
  }
}

CL_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Left>
CL_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

CL_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

CL_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <class T>
CL_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
CL_DEVICE void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
CL_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <int Table>
CL_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return out;
}

CL_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}

template <class T>
CL_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
CL_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

CL_DEVICE int atomic_add(int* to, int value) { return atomicAdd(to, value); }

CL_DEVICE int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

CL_DEVICE void store_release(int* to, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

CL_DEVICE void fence() { __threadfence(); }

template <class T>
CL_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);

template <>
CL_DEVICE uint32_t fma_pair<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

template <>
CL_DEVICE uint32_t fma_pair<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// fma is the only bf16 instruction of sm_80; with 1 or -0 as an operand it adds and multiplies.
template <class T>
CL_DEVICE uint32_t add_pair(uint32_t a, uint32_t b) {
  uint32_t out;
  if constexpr (std::is_same_v<T, Half>)
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  else
    out = fma_pair<BFloat16>(a, 0x3f803f80u, b);
  return out;
}

template <class T>
CL_DEVICE uint32_t subtract_pair(uint32_t a, uint32_t b) {
  uint32_t out;
  if constexpr (std::is_same_v<T, Half>)
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  else
    out = fma_pair<BFloat16>(b, 0xbf80bf80u, a);
  return out;
}

template <class T>
CL_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t out;
  if constexpr (std::is_same_v<T, Half>)
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  else
    out = fma_pair<BFloat16>(a, b, 0x80008000u);
  return out;
}

template <class T>
CL_DEVICE uint32_t narrow_pair(float low, float high) {
  uint32_t out;
  if constexpr (std::is_same_v<T, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

template <class T>
CL_DEVICE float widen(uint16_t value) {
  if constexpr (std::is_same_v<T, Half>) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
    return out;
  } else {
    return bits_to_float(static_cast<uint32_t>(value) << 16);
  }
}

}  // namespace compressed_linear::cuda

#include "small_floats.h"
