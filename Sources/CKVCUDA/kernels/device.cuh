// What every kernel file begins with: element types, codes of every format, reductions, maps.
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
#define KV_DEVICE_MEMBER __device__ __forceinline__
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

// The differences of two pairs of f16 numbers.
KV_DEVICE uint32_t kv_sub_halves(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// c += a b, 16 x 16 times 16 x 8: f16 or bf16 in, f32 out; a warp together.
template <bool bfloat>
KV_DEVICE void kv_mma(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if (bfloat)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

enum { KV_F32 = 0, KV_F16 = 1, KV_BF16 = 2 };
enum {
  KV_DENSE = 0,
  KV_AFFINE_CHANNEL = 1,
  KV_AFFINE_ROW = 2,
  KV_SCALED_ROW = 3,
  KV_SCALED_BLOCK = 4,
  KV_SCALED_FIXED = 5,
  KV_GGML = 6,
  KV_CODES_ROW = 7
};

// Elements begin..end of a row, one in every KV_THREADS, for each thread of a block.
#define KV_EACH(i, count) for (uint32_t i = threadIdx.x; i < (count); i += KV_THREADS)
// Elements of a grid.
#define KV_GRID(i, count) \
  for (uint64_t i = (uint64_t)blockIdx.x * KV_THREADS + threadIdx.x; i < (count); i += (uint64_t)gridDim.x * KV_THREADS)

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

// The same within what f16 holds: a decoded code can exceed the value it was made from by half a step, and a turned one by
// a rounding; near the end of the range that would be infinity.
KV_DEVICE void kv_store_within(void *base, uint32_t type, uint64_t index, float x) {
  if (type == KV_F16) x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
  kv_store(base, type, index, x);
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

// Code c of a row of packed codes.
KV_DEVICE uint32_t kv_row_code(const uint32_t *words, uint32_t dim, uint32_t c, uint32_t bits) {
  return bits == 3 ? kv_code(words, c, 2, 1) | kv_code(words + kv_plane_words(dim, 2), c, 1, 1) << 2
                   : kv_code(words, c, bits, 1);
}

#include "blocks.cuh"

// Element (r, c) of the run behind a slice, in the arithmetic that defines the format.
KV_DEVICE float kv_element(const kv_slice &s, uint32_t r, uint32_t c) {
  if (s.kind == KV_DENSE) return kv_load((const void *)s.data, s.dtype, (uint64_t)r * s.dim + c);
  if (s.kind == KV_GGML) return kv_block_element(s, r, c);
  if (s.kind >= KV_SCALED_ROW && s.kind <= KV_SCALED_FIXED) return kv_scaled_element(s, r, c);
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
    code = kv_row_code(words, s.dim, c, s.bits);
    if (s.kind == KV_CODES_ROW) return (float)code;
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

// Element c of row r of a list of slices.
KV_DEVICE float kv_source(const kv_slice *slices, uint32_t count, uint32_t r, uint32_t c) {
  const kv_slice &s = kv_slice_of(slices, count, r);
  return kv_element(s, s.first + r - s.start, c);
}

KV_DEVICE float kv_warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

KV_DEVICE float kv_warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over a block, for every thread of it. `room` is shared: KV_THREADS / 32 floats.
KV_DEVICE float kv_block_sum(float x, float *room) {
  x = kv_warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (uint32_t w = 0; w < KV_THREADS / 32; w++) x += room[w];
  return x;
}

// ---- maps: a block works on one row in shared memory ----------------------------------------------------------------

// The orthonormal Walsh-Hadamard transform of every `block` channels: butterflies over 1, 2, 4 ..., then one product, the
// same bits as every other backend.
KV_DEVICE void kv_hadamard(float *row, uint32_t dim, uint32_t block) {
  if (block < 2) return;
  for (uint32_t h = 1; h < block; h *= 2) {
    __syncthreads();
    KV_EACH(i, dim / 2) {
      const uint32_t j = i / h * 2 * h + i % h;
      const float a = row[j], b = row[j + h];
      row[j] = kv_add(a, b);
      row[j + h] = kv_add(a, -b);
    }
  }
  float scale = 1;
  uint32_t left = block;
  for (; left >= 4; left /= 4) scale *= 0.5f;
  if (left == 2) scale *= 0.70710678118654752f;
  __syncthreads();
  KV_EACH(c, dim) row[c] = kv_mul(row[c], scale);
}

// P H S x. `moved` is shared memory for another row.
KV_DEVICE void kv_rotate(const kv_map &map, float *row, float *moved) {
  const float *sign = (const float *)map.sign;
  const uint32_t *order = (const uint32_t *)map.order;
  if (sign) KV_EACH(c, map.dim) row[c] = kv_mul(row[c], sign[c]);
  kv_hadamard(row, map.dim, map.block);
  __syncthreads();
  if (!order) return;
  KV_EACH(c, map.dim) moved[c] = row[order[c]];
  __syncthreads();
  KV_EACH(c, map.dim) row[c] = moved[c];
  __syncthreads();
}

// S H P' y.
KV_DEVICE void kv_rotate_back(const kv_map &map, float *row, float *moved) {
  const float *sign = (const float *)map.sign;
  const uint32_t *order = (const uint32_t *)map.order;
  if (order) {
    KV_EACH(c, map.dim) moved[order[c]] = row[c];
    __syncthreads();
    KV_EACH(c, map.dim) row[c] = moved[c];
  }
  kv_hadamard(row, map.dim, map.block);
  __syncthreads();
  if (sign) KV_EACH(c, map.dim) row[c] = kv_mul(row[c], sign[c]);
  __syncthreads();
}

// Turns the pair `p` of a row from one position to another, as the engine turned it.
KV_DEVICE void kv_turn_pair(const kv_rotary &rotary, float *row, uint32_t p, int64_t from, int64_t to) {
  const float frequency = ((const float *)rotary.frequencies)[p];
  const double after = rotary.rounded ? (double)kv_mul((float)to, frequency) : (double)to * (double)frequency;
  const double before = rotary.rounded ? (double)kv_mul((float)from, frequency) : (double)from * (double)frequency;
  const float c = (float)cos(after - before), s = (float)sin(after - before);
  const uint32_t first = rotary.interleaved ? 2 * p : p, second = rotary.interleaved ? first + 1 : first + rotary.pairs;
  const float x = row[first], y = row[second];
  row[first] = kv_add(kv_mul(x, c), -kv_mul(y, s));
  row[second] = kv_add(kv_mul(y, c), kv_mul(x, s));
}
