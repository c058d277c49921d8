/* logits and accumulate of many query rows over f16 and bf16 rows with products of bf16, for the level "avx512". Rows of
 * codes go on to the integer kernels, with one digit (avx512_fixed.h).
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

#include "avx512_bf16.h"

enum {
  TILE = 64,        /* rows whose values are taken at a time */
  PAIRS = TILE / 2,
};

/* ---- logits ----------------------------------------------------------------------------------------------------- */

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
    load_rows(from, row_bytes, type, dim, n, steps, rows);
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
    ckv_logits_vnni_digit(run, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (run->dtype == CKV_F16)
    logits_of(run, CKV_F16, first, count, q, m, q_stride, scale, out, ld, scratch);
  else logits_of(run, CKV_BF16, first, count, q, m, q_stride, scale, out, ld, scratch);
}

/* ---- values ----------------------------------------------------------------------------------------------------- */

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
      if (2 * s + 1 < n) pair_rows(x, x + row_bytes, type, dim, PAIRS * LANES, tile + s * LANES);
      else pair_rows(x, NULL, type, dim, PAIRS * LANES, tile + s * LANES);
    }
    const size_t behind = ckv_min_u32(TILE, run->rows - (first + i + n)) * row_bytes;
    ckv_coming ahead = ckv_coming_bytes(from + TILE * row_bytes, behind, steps * groups * ((dim + 31) / 32));
    for (uint32_t c = 0; c < dim; c += 32) {
      const uint32_t *panel = tile + (size_t)c * PAIRS, lanes = ckv_min_u32(32, dim - c);
      for (uint32_t j = 0, nq; j < padded; j += nq) {
        nq = v_queries_at_a_time(padded - j);
        const uint32_t *weights = a + j * PAIRS;
        float *to = acc + j * stride + c;
        if (nq == 12) values_panel(panel, steps, weights, PAIRS, 1, 12, m - j, lanes, &ahead, to, stride);
        else if (nq == 8) values_panel(panel, steps, weights, PAIRS, 1, 8, m - j, lanes, &ahead, to, stride);
        else values_panel(panel, steps, weights, PAIRS, 1, 4, m - j, lanes, &ahead, to, stride);
      }
    }
  }
}

void ckv_accumulate_bf16(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                         float *acc, size_t acc_stride, float *scratch) {
  if (run->kind != CKV_DENSE || run->dtype == CKV_F32 || m < CKV_MANY_QUERIES)
    ckv_accumulate_vnni_digit(run, first, count, p, m, ld, acc, acc_stride, scratch);
  else if (run->dtype == CKV_F16)
    accumulate_of(run, CKV_F16, first, count, p, m, ld, acc, acc_stride, scratch);
  else accumulate_of(run, CKV_BF16, first, count, p, m, ld, acc, acc_stride, scratch);
}

/* A tile and the rows it is made of, and the pairs of queries or weights; a line more to be aligned. */
size_t ckv_bf16_scratch_floats(uint32_t dim, uint32_t m) {
  const size_t steps = ((size_t)dim + 31) / 32 * 16, padded = ((size_t)m + 3) & ~(size_t)3;
  const size_t logits = 2 * LANES * steps + padded * steps, values = 2 * steps * PAIRS + padded * PAIRS;
  const size_t both = ckv_attend_scratch_floats(dim, m), most = logits > values ? logits : values;
  return 16 + (both > most ? both : most);
}

#pragma clang attribute pop
#endif
