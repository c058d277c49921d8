/* logits over CKV_AFFINE_CHANNEL with VNNI, for the level "avx512".
 *
 * dot(q, row) = sum_c (q_c scale_c) code_c + sum_c q_c min_c. The second sum is one number for a group. For the first
 * the folded query q_c scale_c is held in 24-bit fixed point, relative to its largest element, as three signed bytes;
 * the sums of bytes times codes are exact integers. So the error is that of rounding the folded query once, half of
 * 2^-23 of its largest element for every unit of code, about what f32 sums of the same products have.
 *
 * A block is 32 rows. The words of 16 channels are transposed byte-wise within 128 bits, which puts four channels of
 * one row next to each other, four rows to 128 bits; vpdpbusd adds up the four channels. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_coding.h"

/* The folded query as bytes lies in 64-byte vectors: for 16 channels, three of them a query row. */
enum { BLOCK = 32, QUERIES = 4, PLANES = 3 };

/* The largest magnitude of three signed digits of base 256, with room for rounding. */
static const float full_range = 8355000.0f;

/* The query rows of a block folded with the scale and min of one group. */
typedef struct {
  float *products; /* [16 channels][query row][16] */
  int8_t *planes;  /* [16 channels][query row][plane][64] */
  vf inverse[QUERIES];
  float factor[QUERIES], bias[QUERIES];
} folded;

CKV_INLINE void max4(const vf x[4], float out[4]) {
  vf ab = vf_max(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  vf cd = vf_max(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  vf low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  vf high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  vf all = vf_max(low, high);
  __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* First half of folding: the products and what follows from the largest. Apart from the second half because that
 * waits for reductions and a division, which other work can hide. */
CKV_INLINE void fold_products(const ckv_run *run, uint32_t type, uint32_t g, const float *q, const uint32_t nq,
                              size_t q_stride, float scale, folded *f) {
  const uint32_t dim = run->dim;
  vf bias[QUERIES], high[QUERIES];
  CKV_UNROLL
  for (uint32_t j = 0; j < QUERIES; j++) bias[j] = high[j] = vf_zero();
  for (uint32_t c = 0; c < dim; c += 16) {
    uint32_t n = ckv_min_u32(16, dim - c);
    vf s = vf_load_as_n(ckv_offset(run->scale, type, (size_t)g * dim + c), type, n);
    vf mn = vf_load_as_n(ckv_offset(run->min, type, (size_t)g * dim + c), type, n);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf y = vf_load_n(q + j * q_stride + c, n), product = y * s;
      vf_store(f->products + c * QUERIES + 16 * j, product);
      bias[j] = vf_fma(y, mn, bias[j]);
      high[j] = vf_max(vf_abs(product), high[j]);
    }
  }
  float largest[4], sum[4];
  max4(high, largest);
  vf_sum4(bias[0], bias[1], bias[2], bias[3], sum);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    bool vanishes = largest[j] < 1e-30f; /* below what its inverse could scale */
    f->inverse[j] = vf_set1(vanishes ? 0 : full_range / largest[j]);
    f->factor[j] = vanishes ? 0 : scale * (largest[j] * (1 / full_range));
    f->bias[j] = scale * sum[j];
  }
}

/* Second half: the products in fixed point, as planes of bytes. */
CKV_INLINE void fold_planes(const folded *f, uint32_t dim, const uint32_t nq) {
  const __m512i digit = _mm512_set1_epi32(0x808080);
  const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12));
  for (uint32_t c = 0; c < dim; c += 16) {
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      __m512i v = _mm512_cvtps_epi32(vf_load(f->products + c * QUERIES + 16 * j) * f->inverse[j]);
      v = _mm512_xor_si512(_mm512_add_epi32(v, digit), digit); /* signed digits */
      int8_t *to = f->planes + ((size_t)(c / 16) * QUERIES + j) * PLANES * 64;
      CKV_UNROLL
      for (int t = 0; t < PLANES; t++)
        _mm512_storeu_si512(to + 64 * t, _mm512_shuffle_epi8(v, _mm512_add_epi8(spread, _mm512_set1_epi8((char)t))));
    }
  }
}

/* Two vectors of codes, bytes: 4 rows x 4 channels in each 128 bits, of step `step` = 0 ..< 4 of a block of 32 rows.
 * `words` is the block's first word row, `top` that of its high plane, both at the first of n <= 16 channels. */
CKV_INLINE void load_codes(const uint32_t *words, const uint32_t *top, uint32_t dim, uint32_t n, const uint32_t bits,
                           const uint32_t step, __m512i *a, __m512i *b) {
  const __m512i transpose =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  if (bits == 8) {
    *a = _mm512_shuffle_epi8(vi_load_n(words + (size_t)(2 * step) * dim, n), transpose);
    *b = _mm512_shuffle_epi8(vi_load_n(words + (size_t)(2 * step + 1) * dim, n), transpose);
    return;
  }
  if (bits == 4) {
    __m512i x = _mm512_shuffle_epi8(vi_load_n(words + (size_t)step * dim, n), transpose), low = _mm512_set1_epi8(15);
    *a = _mm512_and_si512(x, low);
    *b = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
    return;
  }
  const uint32_t half = step / 2, shift = step % 2 * 4;
  __m512i x = _mm512_shuffle_epi8(vi_load_n(words + (size_t)half * dim, n), transpose), low = _mm512_set1_epi8(3);
  *a = _mm512_and_si512(_mm512_srli_epi16(x, shift), low);
  *b = _mm512_and_si512(_mm512_srli_epi16(x, shift + 2), low);
  if (bits == 2) return;
  /* Byte d of the low word is rows 16*half + 4d ..< +4: a nibble of byte 2*half + d/2 of the high word. */
  const __m512i high_bytes = _mm512_add_epi8(
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 1, 5, 9, 13, 1, 5, 9, 13)),
      _mm512_set1_epi8((char)(2 * half)));
  const __m512i nibble = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 0, 4)), third = _mm512_set1_epi8(4);
  __m512i h = _mm512_srlv_epi32(_mm512_shuffle_epi8(vi_load_n(top, n), high_bytes), nibble);
  __m512i ha = step % 2 ? h : _mm512_slli_epi32(h, 2), hb = step % 2 ? _mm512_srli_epi32(h, 1) : _mm512_slli_epi32(h, 1);
  *a = _mm512_or_si512(*a, _mm512_and_si512(ha, third));
  *b = _mm512_or_si512(*b, _mm512_and_si512(hb, third));
}

/* The sum of three planes of dot products. */
CKV_INLINE vf join(const __m512i *sum) {
  vf high = vf_fma(_mm512_cvtepi32_ps(sum[2]), vf_set1(65536), _mm512_cvtepi32_ps(sum[0]));
  return vf_fma(_mm512_cvtepi32_ps(sum[1]), vf_set1(256), high);
}

/* The four 128-bit lanes of each of four vectors added up: lane k of the result belongs to vector k. */
CKV_INLINE vf add_lanes(vf x0, vf x1, vf x2, vf x3) {
  vf u = _mm512_shuffle_f32x4(x0, x1, 0x44) + _mm512_shuffle_f32x4(x0, x1, 0xee);
  vf v = _mm512_shuffle_f32x4(x2, x3, 0x44) + _mm512_shuffle_f32x4(x2, x3, 0xee);
  return _mm512_shuffle_f32x4(u, v, 0x88) + _mm512_shuffle_f32x4(u, v, 0xdd);
}

/* One step: eight rows. sums[j][step] = rows of a, rows of b. */
CKV_INLINE void block_step(const uint32_t *words, const uint32_t *top, uint32_t dim, const uint32_t bits,
                           const uint32_t step, const int8_t *planes, const uint32_t nq, float sums[QUERIES][4][8]) {
  __m512i sum[QUERIES][2][PLANES];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (int t = 0; t < PLANES; t++) sum[j][0][t] = sum[j][1][t] = _mm512_setzero_si512();
  for (uint32_t c = 0; c < dim; c += 16) {
    __m512i a, b;
    load_codes(words + c, top + c, dim, ckv_min_u32(16, dim - c), bits, step, &a, &b);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      const int8_t *from = planes + ((size_t)(c / 16) * QUERIES + j) * PLANES * 64;
      CKV_UNROLL
      for (int t = 0; t < PLANES; t++) {
        __m512i y = _mm512_loadu_si512(from + 64 * t);
        sum[j][0][t] = _mm512_dpbusd_epi32(sum[j][0][t], a, y);
        sum[j][1][t] = _mm512_dpbusd_epi32(sum[j][1][t], b, y);
      }
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j += 2) {
    bool two = j + 1 < nq;
    vf x2 = two ? join(sum[j + 1][0]) : vf_zero(), x3 = two ? join(sum[j + 1][1]) : vf_zero();
    vf y = add_lanes(join(sum[j][0]), join(sum[j][1]), x2, x3);
    /* Here and now: put off until all steps are done, this would need the sums of all of them in registers. */
    __asm__ volatile("" : "+v"(y));
    _mm256_storeu_ps(sums[j][step], _mm512_castps512_ps256(y));
    if (two) _mm256_storeu_ps(sums[j + 1][step], _mm512_extractf32x8_ps(y, 1));
  }
}

/* Where row i of a block lies in sums[j]. */
static const int32_t order8[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
static const int32_t order4[32] = {0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
                                   16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31};
static const int32_t order2[32] = {0,  4,  8,  12, 1,  5,  9,  13, 2,  6,  10, 14, 3,  7,  11, 15,
                                   16, 20, 24, 28, 17, 21, 25, 29, 18, 22, 26, 30, 19, 23, 27, 31};

/* Rows [begin, end) of block `block` of group g to out, whose first element is row `begin`. */
CKV_INLINE void block_logits(const ckv_run *run, const uint32_t bits, uint32_t g, uint32_t block, uint32_t begin,
                             uint32_t end, const folded *f, const uint32_t nq, float *out, size_t ld) {
  const uint32_t *words = ckv_group_codes(run, g), *top = words, dim = run->dim;
  if (bits == 3) {
    top += (size_t)(run->group / 16 + block) * dim;
    words += (size_t)(2 * block) * dim;
  } else {
    words += (size_t)block * bits * dim;
  }
  float sums[QUERIES][4][8];
  block_step(words, top, dim, bits, 0, f->planes, nq, sums);
  block_step(words, top, dim, bits, 1, f->planes, nq, sums);
  block_step(words, top, dim, bits, 2, f->planes, nq, sums);
  block_step(words, top, dim, bits, 3, f->planes, nq, sums);
  const int32_t *order = bits == 8 ? order8 : bits == 4 ? order4 : order2;
  __m512i first = _mm512_loadu_si512(order), second = _mm512_loadu_si512(order + 16);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    vf x = vf_load(sums[j][0]), y = vf_load(sums[j][2]), factor = vf_set1(f->factor[j]), bias = vf_set1(f->bias[j]);
    vf low = vf_fma(_mm512_permutex2var_ps(x, first, y), factor, bias);
    vf high = vf_fma(_mm512_permutex2var_ps(x, second, y), factor, bias);
    if (end - begin == BLOCK) {
      vf_store(out + j * ld, low);
      vf_store(out + j * ld + 16, high);
    } else {
      float all[BLOCK];
      vf_store(all, low);
      vf_store(all + 16, high);
      memcpy(out + j * ld, all + begin, (end - begin) * sizeof(float));
    }
  }
}

/* Rows [first, first + count) for nq query rows. While the blocks of one group run, the next is half folded. */
CKV_INLINE void channel_logits(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t count, const float *q,
                               const uint32_t nq, size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  const uint32_t padded = (run->dim + 15) & ~15u, end = first + count;
  folded f[2];
  f[0].products = scratch;
  f[1].products = scratch + (size_t)padded * QUERIES;
  f[0].planes = f[1].planes = (int8_t *)(scratch + (size_t)2 * padded * QUERIES);
  uint32_t g = first / run->group, turn = 0;
  fold_products(run, run->dtype, g, q, nq, q_stride, scale, &f[0]);
  for (uint32_t row = first; row < end; g++, turn ^= 1) {
    uint32_t stop = ckv_min_u32(end, (g + 1) * run->group);
    fold_planes(&f[turn], run->dim, nq);
    if (stop < end) fold_products(run, run->dtype, g + 1, q, nq, q_stride, scale, &f[turn ^ 1]);
    while (row < stop) {
      uint32_t in_group = row - g * run->group, block = in_group / BLOCK, begin = in_group % BLOCK;
      uint32_t n = ckv_min_u32(stop - row, BLOCK - begin);
      block_logits(run, bits, g, block, begin, begin + n, &f[turn], nq, out + (row - first), ld);
      row += n;
    }
  }
}

/* All m query rows, four, two and one at a time, over parts of the rows that stay in the cache meanwhile. */
CKV_INLINE void channel_logits_all(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t count,
                                   const float *q, uint32_t m, size_t q_stride, float scale, float *out, size_t ld,
                                   float *scratch) {
  const uint32_t part = m <= QUERIES ? count : 256;
  for (uint32_t i = 0, n; i < count; i += n) {
    n = ckv_min_u32(part, count - i);
    for (uint32_t j = 0, nq; j < m; j += nq) {
      const float *y = q + j * q_stride;
      float *to = out + j * ld + i;
      nq = m - j >= 4 ? 4 : m - j >= 2 ? 2 : 1;
      if (nq == 4) channel_logits(run, bits, first + i, n, y, 4, q_stride, scale, to, ld, scratch);
      else if (nq == 2) channel_logits(run, bits, first + i, n, y, 2, q_stride, scale, to, ld, scratch);
      else channel_logits(run, bits, first + i, n, y, 1, q_stride, scale, to, ld, scratch);
    }
  }
}

void ckv_logits_vnni(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                     float scale, float *out, size_t ld, float *scratch) {
  if (run->kind != CKV_AFFINE_CHANNEL || m >= CKV_MANY_QUERIES)
    ckv_avx512.logits(run, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (count == 0 || m == 0) return;
  else if (run->bits == 2) channel_logits_all(run, 2, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (run->bits == 3) channel_logits_all(run, 3, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (run->bits == 4) channel_logits_all(run, 4, first, count, q, m, q_stride, scale, out, ld, scratch);
  else channel_logits_all(run, 8, first, count, q, m, q_stride, scale, out, ld, scratch);
}

#pragma clang attribute pop
#endif
