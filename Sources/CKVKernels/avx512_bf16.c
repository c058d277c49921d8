/* logits and accumulate of many query rows over f16 and bf16 rows with products of bf16, for the level "avx512".
 *
 * vdpbf16ps multiplies two pairs of bf16 a lane and adds both products to an f32 sum: twice the work of an f32
 * multiply-add. For it queries, weights and elements of rows are rounded to bf16 once (rows of bf16 are so already);
 * products and sums are f32. ckv.h says what that costs; nothing else in the library rounds like that, so a caller asks
 * for it by name (ckv_bf16_products).
 *
 * Both operations are one: pairs of a tile, [step][lanes], times pairs of the rows of `a`, [row][step]. For logits a step
 * is two channels and lanes are rows; for accumulate a step is two rows and lanes are channels. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

#include "query_groups.h"

enum {
  LANES = 32,       /* of a panel: two vectors */
  QUERIES = V_TILE_QUERIES, /* rows of `a` a panel meets at a time */
  TILE = 64,        /* rows whose values are taken at a time */
  PAIRS = TILE / 2,
};

CKV_INLINE uint32_t *aligned(float *scratch) { return (uint32_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63); }

/* x[0 ..< 16] in the low half, y in the high half: 32 bf16 in order. */
CKV_INLINE __m512i to_bf16(vf x, vf y) { return (__m512i)_mm512_cvtne2ps_pbh(y, x); }

/* 32 f32 as 16 pairs; those from n on are 0. */
CKV_INLINE __m512i load_pairs(const float *x, uint32_t n) {
  if (n >= 32) return to_bf16(vf_load(x), vf_load(x + 16));
  return n > 16 ? to_bf16(vf_load(x), vf_load_n(x + 16, n - 16)) : to_bf16(vf_load_n(x, n), vf_zero());
}

/* The same of stored elements. */
CKV_INLINE __m512i load_stored(const char *x, const uint32_t type, uint32_t n) {
  if (type == CKV_BF16)
    return n >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), x);
  if (n >= 32) return to_bf16(vf_load_f16(x), vf_load_f16(x + 32));
  return n > 16 ? to_bf16(vf_load_f16(x), vf_load_f16_n(x + 32, n - 16)) : to_bf16(vf_load_f16_n(x, n), vf_zero());
}

/* sum[j] += the products of `steps` pairs with row j of a. */
CKV_INLINE void add_panel(const uint32_t *restrict tile, uint32_t steps, const uint32_t *restrict a, size_t a_stride,
                          const uint32_t nq, ckv_coming *ahead, vf sum[QUERIES][2]) {
  const char *next = ahead->next;
  const size_t next_step = ahead->step;
  ahead->next += steps * next_step;
  for (uint32_t s = 0; s < steps; s++, tile += LANES, next += next_step) {
    __builtin_prefetch(next);
    const __m512bh x = (__m512bh)_mm512_load_si512(tile), y = (__m512bh)_mm512_load_si512(tile + 16);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[j * a_stride + s]);
      sum[j][0] = _mm512_dpbf16_ps(sum[j][0], x, both);
      sum[j][1] = _mm512_dpbf16_ps(sum[j][1], y, both);
    }
  }
}

/* ---- logits ----------------------------------------------------------------------------------------------------- */

CKV_INLINE void logits_panel(const uint32_t *tile, uint32_t steps, const uint32_t *a, const uint32_t nq, uint32_t m,
                             float scale, uint32_t n, ckv_coming *ahead, float *out, size_t ld) {
  vf sum[QUERIES][2];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) sum[j][0] = sum[j][1] = vf_zero();
  add_panel(tile, steps, a, steps, nq, ahead, sum);
  const vf by = vf_set1(scale);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    float *to = out + j * ld;
    if (j >= m) {
      /* a row that fills up the block */
    } else if (n == LANES) {
      vf_store(to, sum[j][0] * by);
      vf_store(to + 16, sum[j][1] * by);
    } else {
      vf_store_n(to, sum[j][0] * by, ckv_min_u32(n, 16));
      if (n > 16) vf_store_n(to + 16, sum[j][1] * by, n - 16);
    }
  }
}

CKV_INLINE void logits_of(const ckv_run *run, const uint32_t type, uint32_t first, uint32_t count, const float *q,
                          uint32_t m, size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  const uint32_t dim = run->dim, steps = (dim + 31) / 32 * 16, padded = (m + 3) & ~3u;
  uint32_t *rows = aligned(scratch), *tile = rows + LANES * steps, *a = tile + LANES * steps;
  for (uint32_t j = 0; j < padded; j++)
    for (uint32_t c = 0; c < dim; c += 32)
      _mm512_store_si512(a + (size_t)j * steps + c / 2,
                         j < m ? load_pairs(q + j * q_stride + c, dim - c) : _mm512_setzero_si512());
  const size_t row_bytes = (size_t)run->row_stride * 2;
  const size_t groups = v_query_groups(padded);
  const char *from = (const char *)run->data + first * row_bytes;
  for (uint32_t i = 0; i < count; i += LANES, from += LANES * row_bytes) {
    const uint32_t n = ckv_min_u32(LANES, count - i);
    for (uint32_t r = 0; r < n; r++) {
      const char *row = from + r * row_bytes;
      uint32_t *to = rows + r * steps, c = 0;
      for (; c + 32 <= dim; c += 32) _mm512_store_si512(to + c / 2, load_stored(row + 2 * c, type, 32));
      if (c < dim) _mm512_store_si512(to + c / 2, load_stored(row + 2 * c, type, dim - c));
    }
    for (uint32_t r = 0; r < n; r += 16)
      for (uint32_t s = 0; s < steps; s += 16)
        vf_transpose((const float *)rows + r * steps + s, steps, (float *)tile + s * LANES + r, LANES);
    const size_t behind = ckv_min_u32(LANES, run->rows - (first + i + n)) * row_bytes;
    ckv_coming ahead = ckv_coming_bytes(from + LANES * row_bytes, behind, steps * groups);
    for (uint32_t j = 0, nq; j < padded; j += nq) {
      nq = v_queries_at_a_time(padded - j);
      const uint32_t *queries = a + (size_t)j * steps;
      float *to = out + j * ld + i;
      if (nq == 12) logits_panel(tile, steps, queries, 12, m - j, scale, n, &ahead, to, ld);
      else if (nq == 8) logits_panel(tile, steps, queries, 8, m - j, scale, n, &ahead, to, ld);
      else logits_panel(tile, steps, queries, 4, m - j, scale, n, &ahead, to, ld);
    }
  }
}

void ckv_logits_bf16(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                     float scale, float *out, size_t ld, float *scratch) {
  if (run->kind != CKV_DENSE || run->dtype == CKV_F32 || m < CKV_MANY_QUERIES)
    ckv_logits_vnni(run, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (run->dtype == CKV_F16)
    logits_of(run, CKV_F16, first, count, q, m, q_stride, scale, out, ld, scratch);
  else logits_of(run, CKV_BF16, first, count, q, m, q_stride, scale, out, ld, scratch);
}

/* ---- values ----------------------------------------------------------------------------------------------------- */

CKV_INLINE vf load_lanes(const float *x, uint32_t n) { return n >= 16 ? vf_load(x) : vf_load_n(x, n); }
CKV_INLINE void store_lanes(float *to, vf x, uint32_t n) {
  if (n >= 16) vf_store(to, x);
  else vf_store_n(to, x, n);
}

CKV_INLINE void values_panel(const uint32_t *tile, uint32_t steps, const uint32_t *a, const uint32_t nq, uint32_t m,
                             uint32_t n, ckv_coming *ahead, float *acc, size_t stride) {
  const uint32_t low = ckv_min_u32(n, 16), high = n - low;
  vf sum[QUERIES][2];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    sum[j][0] = j < m ? load_lanes(acc + j * stride, low) : vf_zero();
    sum[j][1] = j < m ? load_lanes(acc + j * stride + 16, high) : vf_zero();
  }
  add_panel(tile, steps, a, PAIRS, nq, ahead, sum);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    if (j < m) {
      store_lanes(acc + j * stride, sum[j][0], low);
      store_lanes(acc + j * stride + 16, sum[j][1], high);
    }
  }
}

/* Channels c ..< c + 16 of two rows as pairs. */
CKV_INLINE __m512i load_two(const char *x, const char *y, const uint32_t type, const uint32_t n) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  if (type == CKV_F16) {
    vf a = n >= 16 ? vf_load_f16(x) : vf_load_f16_n(x, n), b = vf_zero();
    if (y) b = n >= 16 ? vf_load_f16(y) : vf_load_f16_n(y, n);
    return _mm512_permutexvar_epi16(order, to_bf16(a, b));
  }
  const __mmask16 mask = n >= 16 ? 0xffff : v_first(n);
  __m256i a = _mm256_maskz_loadu_epi16(mask, x), b = _mm256_setzero_si256();
  if (y) b = _mm256_maskz_loadu_epi16(mask, y);
  return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

/* One step of every panel; y null: the row is the last. */
CKV_INLINE void pair_rows(const char *x, const char *y, const uint32_t type, uint32_t dim, uint32_t *to) {
  uint32_t c = 0;
  for (; c + 32 <= dim; c += 32, to += PAIRS * LANES)
    CKV_UNROLL
    for (uint32_t k = 0; k < 32; k += 16)
      _mm512_store_si512(to + k, load_two(x + 2 * (c + k), y ? y + 2 * (c + k) : NULL, type, 16));
  if (c == dim) return;
  const uint32_t low = ckv_min_u32(dim - c, 16), high = dim - c - low;
  _mm512_store_si512(to, load_two(x + 2 * c, y ? y + 2 * c : NULL, type, low));
  c += 16;
  _mm512_store_si512(to + 16, high ? load_two(x + 2 * c, y ? y + 2 * c : NULL, type, high) : vi_zero());
}

CKV_INLINE void accumulate_of(const ckv_run *run, const uint32_t type, uint32_t first, uint32_t count, const float *p,
                              uint32_t m, size_t ld, float *acc, size_t stride, float *scratch) {
  const uint32_t dim = run->dim, padded = (m + 3) & ~3u;
  uint32_t *tile = aligned(scratch), *a = tile + (size_t)(dim + 31) / 32 * LANES * PAIRS;
  const size_t row_bytes = (size_t)run->row_stride * 2;
  const size_t groups = v_query_groups(padded);
  const char *from = (const char *)run->data + first * row_bytes;
  for (uint32_t i = 0; i < count; i += TILE, from += TILE * row_bytes) {
    const uint32_t n = ckv_min_u32(TILE, count - i), steps = (n + 1) / 2;
    for (uint32_t j = 0; j < padded; j++)
      for (uint32_t r = 0; r < n; r += 32)
        _mm512_store_si512(a + j * PAIRS + r / 2, j < m ? load_pairs(p + j * ld + i + r, n - r) : vi_zero());
    for (uint32_t s = 0; s < steps; s++) {
      const char *x = from + 2 * s * row_bytes;
      if (2 * s + 1 < n) pair_rows(x, x + row_bytes, type, dim, tile + s * LANES);
      else pair_rows(x, NULL, type, dim, tile + s * LANES);
    }
    const size_t behind = ckv_min_u32(TILE, run->rows - (first + i + n)) * row_bytes;
    ckv_coming ahead = ckv_coming_bytes(from + TILE * row_bytes, behind, steps * groups * ((dim + 31) / 32));
    for (uint32_t c = 0; c < dim; c += 32) {
      const uint32_t *panel = tile + (size_t)c * PAIRS, lanes = ckv_min_u32(32, dim - c);
      for (uint32_t j = 0, nq; j < padded; j += nq) {
        nq = v_queries_at_a_time(padded - j);
        const uint32_t *weights = a + j * PAIRS;
        float *to = acc + j * stride + c;
        if (nq == 12) values_panel(panel, steps, weights, 12, m - j, lanes, &ahead, to, stride);
        else if (nq == 8) values_panel(panel, steps, weights, 8, m - j, lanes, &ahead, to, stride);
        else values_panel(panel, steps, weights, 4, m - j, lanes, &ahead, to, stride);
      }
    }
  }
}

void ckv_accumulate_bf16(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                         float *acc, size_t acc_stride, float *scratch) {
  if (run->kind != CKV_DENSE || run->dtype == CKV_F32 || m < CKV_MANY_QUERIES)
    ckv_accumulate_vnni(run, first, count, p, m, ld, acc, acc_stride, scratch);
  else if (run->dtype == CKV_F16)
    accumulate_of(run, CKV_F16, first, count, p, m, ld, acc, acc_stride, scratch);
  else accumulate_of(run, CKV_BF16, first, count, p, m, ld, acc, acc_stride, scratch);
}

/* A tile and the rows it is made of, and the pairs of queries or weights; a line more to be aligned. */
size_t ckv_bf16_scratch_floats(uint32_t dim, uint32_t m) {
  const size_t steps = ((size_t)dim + 31) / 32 * 16, padded = ((size_t)m + 3) & ~(size_t)3;
  const size_t logits = 2 * LANES * steps + padded * steps, values = 2 * steps * PAIRS + padded * PAIRS;
  return 16 + (logits > values ? logits : values);
}

#pragma clang attribute pop
#endif
