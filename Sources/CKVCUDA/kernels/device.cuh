// What every kernel file begins with: element types, codes, reductions.
#pragma once
#ifdef KV_EMULATED
#include "../include/ckv_cuda_abi.h"
#else
#include "ckv_cuda_abi.h"
#endif

#ifndef KV_EMULATED
#define KV_KERNEL extern "C" __global__ void __launch_bounds__(KV_THREADS)
#define KV_SHARED __shared__
#define KV_DEVICE __device__ __forceinline__
#define KV_INFINITY __int_as_float(0x7f800000)

KV_DEVICE float kv_half(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

KV_DEVICE uint16_t kv_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// One rounding per operation, as the encoders of every backend promise.
KV_DEVICE float kv_mul(float a, float b) { return __fmul_rn(a, b); }
KV_DEVICE float kv_add(float a, float b) { return __fadd_rn(a, b); }
KV_DEVICE float kv_div(float a, float b) { return __fdiv_rn(a, b); }
KV_DEVICE float kv_round(float x) { return rintf(x); }
KV_DEVICE uint32_t kv_bits(float x) { return __float_as_uint(x); }
KV_DEVICE float kv_float(uint32_t bits) { return __uint_as_float(bits); }
#endif

enum { KV_F32 = 0, KV_F16 = 1, KV_BF16 = 2 };
enum { KV_DENSE = 0, KV_AFFINE_CHANNEL = 1, KV_AFFINE_ROW = 2 };

KV_DEVICE float kv_load(const void *base, uint32_t type, uint64_t index) {
  if (type == KV_F32) return ((const float *)base)[index];
  uint16_t bits = ((const uint16_t *)base)[index];
  return type == KV_F16 ? kv_half(bits) : kv_float((uint32_t)bits << 16);
}

KV_DEVICE uint16_t kv_to_bfloat(float x) {
  uint32_t bits = kv_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

KV_DEVICE void kv_store(void *base, uint32_t type, uint64_t index, float x) {
  if (type == KV_F32)
    ((float *)base)[index] = x;
  else
    ((uint16_t *)base)[index] = type == KV_F16 ? kv_to_half(x) : kv_to_bfloat(x);
}

KV_DEVICE bool kv_finite(float x) { return (kv_bits(x) & 0x7f800000u) != 0x7f800000u; }

KV_DEVICE uint32_t kv_plane_words(uint32_t n, uint32_t bits) { return (n * bits + 31) / 32; }
KV_DEVICE uint32_t kv_row_words(uint32_t dim, uint32_t bits) {
  return bits == 3 ? kv_plane_words(dim, 2) + kv_plane_words(dim, 1) : kv_plane_words(dim, bits);
}
KV_DEVICE uint32_t kv_group_words(uint32_t group, uint32_t bits) { return group * bits / 32; }

KV_DEVICE uint32_t kv_code(const uint32_t *words, uint32_t index, uint32_t bits, uint64_t stride) {
  uint32_t per = 32 / bits;
  return words[index / per * stride] >> (index % per * bits) & ((1u << bits) - 1);
}

// Element (r, c) of the run behind a slice, in the arithmetic that defines the format.
KV_DEVICE float kv_element(const kv_slice &s, uint32_t r, uint32_t c) {
  if (s.kind == KV_DENSE) return kv_load((const void *)s.data, s.dtype, (uint64_t)r * s.dim + c);
  const uint32_t *words = (const uint32_t *)s.data;
  uint32_t code;
  uint64_t meta;
  if (s.kind == KV_AFFINE_CHANNEL) {
    uint32_t g = r / s.group, i = r % s.group;
    words += (uint64_t)g * kv_group_words(s.group, s.bits) * s.dim + c;
    code = s.bits == 3 ? kv_code(words, i, 2, s.dim) | kv_code(words + (uint64_t)(s.group / 16) * s.dim, i, 1, s.dim) << 2
                       : kv_code(words, i, s.bits, s.dim);
    meta = (uint64_t)g * s.dim + c;
  } else {
    words += (uint64_t)r * kv_row_words(s.dim, s.bits);
    code = s.bits == 3 ? kv_code(words, c, 2, 1) | kv_code(words + kv_plane_words(s.dim, 2), c, 1, 1) << 2
                       : kv_code(words, c, s.bits, 1);
    meta = (uint64_t)r * ((s.dim + s.group - 1) / s.group) + c / s.group;
  }
  float product = kv_mul((float)code, kv_load((const void *)s.scale, s.dtype, meta));
  return kv_add(product, kv_load((const void *)s.min, s.dtype, meta));
}

// The slice of a list that holds row `row`.
KV_DEVICE const kv_slice &kv_slice_of(const kv_slice *slices, uint32_t count, uint32_t row) {
  uint32_t low = 0, high = count - 1;
  while (low < high) {
    uint32_t middle = (low + high + 1) / 2;
    if (slices[middle].start <= row) low = middle; else high = middle - 1;
  }
  return slices[low];
}

KV_DEVICE float kv_warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

KV_DEVICE float kv_warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
