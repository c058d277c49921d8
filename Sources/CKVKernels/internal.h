/* What all levels share: scalar conversions, layout arithmetic, bit packing, and the tables of the levels.
 * Nothing here needs libm: at baseline x86-64 rintf and friends are library calls. */
#ifndef CKV_INTERNAL_H
#define CKV_INTERNAL_H

#include "include/ckv.h"

#include <math.h>
#include <string.h>

/* Every fused multiply-add in this library is written as one. Anything else rounds after each operation, so that
 * encode and decode give the same bits at every level. */
#pragma STDC FP_CONTRACT OFF

#define CKV_INLINE static inline __attribute__((always_inline))

/* For loops over the registers of a block: without it some stay loops, and their arrays in memory. */
#define CKV_UNROLL _Pragma("clang loop unroll(full)")

/* Adding and subtracting this rounds 0 <= x < 2^22 to the nearest integer, ties to even. */
#define CKV_ROUND_MAGIC 12582912.0f

/* From how many query rows on the vector levels convert rows to a tile of f32 first. */
#define CKV_MANY_QUERIES 12u

/* iq4_nl's values: fixed by the format. */
#define CKV_IQ4_VALUES {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}

/* Rows the levels decode at a time when they work from an f32 tile. ckv_scratch_floats counts on it. */
#define CKV_TILE_ROWS 32u

/* Rows of FP8 whose scales are at hand at a time; the same. */
#define CKV_FP8_ROWS 256u

/* ---- scalar conversions ------------------------------------------------------------------------------------- */

CKV_INLINE uint32_t ckv_bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

CKV_INLINE float ckv_float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

CKV_INLINE float ckv_from_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t quiet = rest & 0x3ffu ? 0x400000u : 0;
  if (rest >= 0x7c00u) return ckv_float_of(sign | 0x7f800000u | quiet | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return ckv_float_of(sign | ((rest << 13) + (112u << 23)));
  float magnitude = (float)rest * 0x1p-24f; /* zero and subnormals: exact */
  return ckv_float_of(sign | ckv_bits_of(magnitude));
}

CKV_INLINE uint16_t ckv_to_f16(float x) {
  uint32_t u = ckv_bits_of(x), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (rest >> 13 & 0x3ffu));
  if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
  if (rest >= 0x38800000u) {
    rest += 0xfffu + (rest >> 13 & 1u); /* a carry out of the mantissa raises the exponent, as it should */
    return (uint16_t)(sign | (rest - (112u << 23)) >> 13);
  }
  /* Subnormal results: adding 0.5 aligns the value so that the addition does the rounding. */
  float aligned = ckv_float_of(rest) + 0.5f;
  return (uint16_t)(sign | (ckv_bits_of(aligned) - 0x3f000000u));
}

CKV_INLINE float ckv_from_bf16(uint16_t h) { return ckv_float_of((uint32_t)h << 16); }

CKV_INLINE uint16_t ckv_to_bf16(float x) {
  uint32_t u = ckv_bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* Element types that no run has: the codes of FP8, as kernels read them. */
enum { CKV_BYTES_E4M3 = 16, CKV_BYTES_E5M2 = 17 };

CKV_INLINE size_t ckv_size_of(uint32_t type) { return type == CKV_F32 ? 4 : type < CKV_BYTES_E4M3 ? 2 : 1; }

CKV_INLINE float ckv_load_scalar(const void *p, uint32_t type, size_t i) {
  if (type == CKV_F32) {
    float x;
    memcpy(&x, (const char *)p + i * 4, 4);
    return x;
  }
  uint16_t h;
  memcpy(&h, (const char *)p + i * 2, 2);
  return type == CKV_F16 ? ckv_from_f16(h) : ckv_from_bf16(h);
}

CKV_INLINE void ckv_store_scalar(void *p, uint32_t type, size_t i, float x) {
  if (type == CKV_F32) {
    memcpy((char *)p + i * 4, &x, 4);
    return;
  }
  uint16_t h = type == CKV_F16 ? ckv_to_f16(x) : ckv_to_bf16(x);
  memcpy((char *)p + i * 2, &h, 2);
}

/* ---- layout -------------------------------------------------------------------------------------------------- */

CKV_INLINE uint32_t ckv_min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }
CKV_INLINE uint32_t ckv_max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* Words of one row of codes without a second plane. */
CKV_INLINE uint32_t ckv_plane_words(uint32_t n, uint32_t bits) { return (uint32_t)(((uint64_t)n * bits + 31) / 32); }

CKV_INLINE float ckv_levels(uint32_t bits) { return (float)((1u << bits) - 1); }

/* One word of a plane of CKV_AFFINE_CHANNEL codes: the word row that holds row `r` of a group. */
CKV_INLINE const uint32_t *ckv_group_codes(const ckv_run *run, uint32_t g) {
  return (const uint32_t *)run->data + (size_t)g * ckv_group_words(run->group, run->bits) * run->dim;
}

CKV_INLINE const void *ckv_offset(const void *p, uint32_t type, size_t elements) {
  return (const char *)p + elements * ckv_size_of(type);
}

/* ---- asking for memory ------------------------------------------------------------------------------------------ */

/* Memory to ask for while other work is done, a little with every step of it: all at once would have to wait for room in
 * the queue of misses, and the work behind it too. */
typedef struct {
  const char *next;
  size_t step;
} ckv_coming;

/* `bytes` from `from` on, in `steps` steps. */
CKV_INLINE ckv_coming ckv_coming_bytes(const char *from, size_t bytes, size_t steps) {
  size_t step = (bytes + steps - 1) / steps;
  return (ckv_coming){from, step < 64 ? step : 64};
}

/* ---- packing rows of codes ------------------------------------------------------------------------------------ */

/* Eight codes, one a byte, to eight times `bits` bits. */
CKV_INLINE uint32_t ckv_squeeze(uint64_t x, uint32_t bits) {
  x = (x | x >> (8 - bits)) & (bits == 4 ? 0x00ff00ff00ff00ffu : bits == 2 ? 0x000f000f000f000fu : 0x0003000300030003u);
  x = (x | x >> (16 - 2 * bits)) &
      (bits == 4 ? 0x0000ffff0000ffffu : bits == 2 ? 0x000000ff000000ffu : 0x0000000f0000000fu);
  return (uint32_t)(x | x >> (32 - 4 * bits));
}

/* Codes, one a byte, `n` of them zero-padded to a multiple of 32, to words of `bits` = 1, 2, 4 or 8 bits. */
CKV_INLINE void ckv_pack_plane(const uint8_t *codes, uint32_t n, uint32_t bits, uint32_t *words) {
  uint32_t count = ckv_plane_words(n, bits), per = 32 / bits;
  if (bits == 8) {
    memcpy(words, codes, (size_t)count * 4);
    return;
  }
  for (uint32_t w = 0; w < count; w++) {
    uint32_t word = 0;
    for (uint32_t i = 0; i < per; i += 8) {
      uint64_t eight;
      memcpy(&eight, codes + (size_t)w * per + i, 8);
      uint32_t squeezed = ckv_squeeze(eight, bits);
      word |= (bits == 4 ? squeezed : squeezed & ((1u << 8 * bits) - 1)) << (i * bits);
    }
    words[w] = word;
  }
}

/* A row of codes in the layout of CKV_AFFINE_ROW. `codes` is zero-padded to a multiple of 32; for bits = 3 it is
 * overwritten. */
CKV_INLINE void ckv_pack_row(uint8_t *codes, uint32_t n, uint32_t bits, uint32_t *words) {
  if (bits == 2) ckv_pack_plane(codes, n, 2, words);
  if (bits == 4) ckv_pack_plane(codes, n, 4, words);
  if (bits == 8) ckv_pack_plane(codes, n, 8, words);
  if (bits != 3) return;
  uint8_t high[4096 + 64];
  uint32_t padded = (n + 31) & ~31u;
  for (uint32_t c = 0; c < padded; c++) {
    high[c] = codes[c] >> 2;
    codes[c] &= 3;
  }
  ckv_pack_plane(codes, n, 2, words);
  ckv_pack_plane(high, n, 1, words + ckv_plane_words(n, 2));
}

/* ---- queries and weights as integers ------------------------------------------------------------------------------ */

/* The largest magnitude in fixed point: of two signed digits of base 256, less what a carry needs; of one. */
#define CKV_FULL_RANGE 32639.0f
#define CKV_BYTE_RANGE 127.0f

/* Below this no inverse could scale a number to fixed point. */
#define CKV_VANISHES 1e-30f

/* What scales numbers up to `largest` to fixed point, and the way back; 0 where they vanish, NaN back from infinity. */
CKV_INLINE float ckv_fixed_up(float largest, float range) { return largest < CKV_VANISHES ? 0 : range / largest; }
CKV_INLINE float ckv_fixed_down(float largest, float range) {
  return largest < CKV_VANISHES ? 0 : largest * (1 / range) + (largest - largest);
}

/* The middle of the codes. Rounding errors of queries and weights meet code - middle, half as large as codes: the
 * rest, middle times the sum of what was rounded, is added exactly. */
CKV_INLINE float ckv_middle(uint32_t bits) { return (float)(1u << (bits - 1)); }

/* ---- rotation --------------------------------------------------------------------------------------------------- */

/* 2^(-k/2) for a block of 2^k, rounded once, without libm. */
CKV_INLINE float ckv_hadamard_scale(uint32_t block) {
  float scale = 1;
  for (; block >= 4; block /= 4) scale *= 0.5f;
  return block == 2 ? scale * 0.70710678118654752f : scale;
}

CKV_INLINE void ckv_hadamard_block(float *x, uint32_t block) {
  for (uint32_t h = 1; h < block; h *= 2) {
    for (uint32_t i = 0; i < block; i += 2 * h) {
      for (uint32_t j = i; j < i + h; j++) {
        float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
  }
  float scale = ckv_hadamard_scale(block);
  for (uint32_t i = 0; i < block; i++) x[i] *= scale;
}

CKV_INLINE void ckv_turn_rows(float *rows, size_t stride, uint32_t count, uint32_t pairs, const size_t step,
                              size_t partner, const float *cosines, const float *sines, const uint32_t *offsets) {
#pragma STDC FP_CONTRACT OFF
  for (uint32_t i = 0; i < count; i++) {
    float *restrict x = rows + i * stride, *restrict y = x + partner;
    const float *restrict c = cosines + (size_t)offsets[i] * pairs, *restrict s = sines + (size_t)offsets[i] * pairs;
    for (uint32_t p = 0; p < pairs; p++) {
      float a = x[p * step], b = y[p * step];
      x[p * step] = a * c[p] - b * s[p];
      y[p * step] = b * c[p] + a * s[p];
    }
  }
}

/* ---- levels --------------------------------------------------------------------------------------------------- */

extern const ckv_kernels ckv_portable;
#if defined(__x86_64__)
extern const ckv_kernels ckv_avx2;
extern const ckv_kernels ckv_avx512;      /* F, BW, VL, DQ */
extern const ckv_kernels ckv_avx512_vnni; /* the same with VNNI; the same name, chosen by the CPU */
/* Its logits and accumulate: rows of codes by integer products. */
void ckv_logits_vnni(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                     float scale, float *out, size_t ld, float *scratch);
void ckv_accumulate_vnni(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                         float *acc, size_t acc_stride, float *scratch);
/* The same with queries and weights of one digit. */
void ckv_logits_vnni_digit(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m,
                           size_t q_stride, float scale, float *out, size_t ld, float *scratch);
void ckv_accumulate_vnni_digit(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m,
                               size_t ld, float *acc, size_t acc_stride, float *scratch);
size_t ckv_sums_scratch_floats(uint32_t dim);
size_t ckv_avx2_scratch_floats(uint32_t dim);
bool ckv_joined_avx512(const ckv_run *run, const ckv_map *map, uint32_t first, uint32_t count,
                       const ckv_joined_head *heads, uint32_t n_heads, uint32_t dim, uint32_t m, size_t q_stride,
                       float scale, size_t ld, const ckv_turns *turns, uint32_t offset, float *scratch);
/* Logits of rows of codes, of queries of one or two digits; false: not for this run. */
bool ckv_blocks_logits(const ckv_run *run, uint32_t digits, uint32_t first, uint32_t count, const float *q, uint32_t m,
                       size_t q_stride, float scale, float *out, size_t ld, float *scratch);
extern const ckv_kernels ckv_avx512_bf16; /* VNNI, and products of bf16: see ckv_bf16_products */
void ckv_logits_bf16(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                     float scale, float *out, size_t ld, float *scratch);
void ckv_accumulate_bf16(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                         float *acc, size_t acc_stride, float *scratch);
size_t ckv_bf16_scratch_floats(uint32_t dim, uint32_t m);
bool ckv_attend_avx512(const ckv_run *keys, uint32_t first_key, const ckv_run *values, uint32_t first_value,
                       uint32_t count, const float *q, uint32_t m, size_t q_stride, float scale, float *maxima,
                       float *sums, float *acc, size_t acc_stride, float *scratch);
size_t ckv_attend_scratch_floats(uint32_t dim, uint32_t m);
#elif defined(__aarch64__)
extern const ckv_kernels ckv_neon;
extern const ckv_kernels ckv_neon_dot; /* the same with dot products of bytes; the same name, chosen by the CPU */
void ckv_logits_dot(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                    float scale, float *out, size_t ld, float *scratch);
size_t ckv_dot_scratch_floats(uint32_t dim);
#endif

#endif
