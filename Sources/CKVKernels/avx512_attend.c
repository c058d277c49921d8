/* attend for the level "avx512" with products of bf16: logits, softmax and values of many query rows in one go.
 *
 * Query rows are the lanes of logits and weights. So keys need not be turned, nothing is compared or added up across
 * lanes, weights come out in the pairs that the product with values wants, and logits never leave the nearest cache.
 * Against the three operations apart, 32 query rows and 32768 f16 rows of 8 heads: 12.4 ms instead of 13.1, of which the
 * products alone are 8.4. */
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
  ROWS = 64, /* taken at a time */
  PAIRS = ROWS / 2,
  HALF = LANES / 2, /* query rows of a vector */
};

/* 2^x for x <= 0, off by 3e-6 of it, a thousandth of what rounding it to bf16 may change. */
CKV_INLINE vf exp_two(vf x) {
  x = vf_at_least(x, vf_set1(-200));
  const vf n = vf_round(x), r = x - n;
  vf y = vf_set1(9.58284943e-3f);
  y = vf_fma(y, r, vf_set1(5.59064246e-2f));
  y = vf_fma(y, r, vf_set1(2.40240987e-1f));
  y = vf_fma(y, r, vf_set1(6.93124193e-1f));
  return vf_times_power(vf_fma(y, r, vf_set1(1)), n);
}

/* The pairs of a tile of keys, with rows of zeros up to a multiple of four. */
static __attribute__((noinline)) void load_keys(const ckv_run *run, uint32_t first, uint32_t n, uint32_t steps,
                                                uint32_t *to) {
  const size_t row_bytes = (size_t)run->row_stride * 2;
  const char *from = (const char *)run->data + first * row_bytes;
  if (run->dtype == CKV_F16) load_rows(from, row_bytes, CKV_F16, run->dim, n, steps, to);
  else load_rows(from, row_bytes, CKV_BF16, run->dim, n, steps, to);
  memset(to + (size_t)n * steps, 0, (size_t)((4 - n % 4) % 4) * steps * sizeof(uint32_t));
}

CKV_INLINE void load_pairs_of_rows(const char *from, size_t row_bytes, const uint32_t type, uint32_t dim, uint32_t n,
                                   uint32_t *to) {
  for (uint32_t r = 0; r < n; r += 2, from += 2 * row_bytes, to += LANES)
    pair_rows(from, r + 1 < n ? from + row_bytes : NULL, type, dim, PAIRS * LANES, to);
}

/* The panels of a tile of values. */
static __attribute__((noinline)) void load_values(const ckv_run *run, uint32_t first, uint32_t n, uint32_t *to) {
  const size_t row_bytes = (size_t)run->row_stride * 2;
  const char *from = (const char *)run->data + first * row_bytes;
  if (run->dtype == CKV_F16) load_pairs_of_rows(from, row_bytes, CKV_F16, run->dim, n, to);
  else load_pairs_of_rows(from, row_bytes, CKV_BF16, run->dim, n, to);
}

/* Sums of values relative to another maximum. */
static void shrink_rows(float *acc, size_t stride, uint32_t dim, const float *by, uint32_t rows) {
  for (; rows; rows &= rows - 1) {
    const uint32_t j = (uint32_t)__builtin_ctz(rows);
    const vf factor = vf_set1(by[j]);
    float *row = acc + j * stride;
    uint32_t c = 0;
    for (; c + VN <= dim; c += VN) vf_store(row + c, factor * vf_load(row + c));
    if (c < dim) vf_store_n(row + c, factor * vf_load_n(row + c, dim - c), dim - c);
  }
}

/* The state of HALF query rows, `there` of which are. */
typedef struct {
  float *max, *sum, *acc;
  size_t acc_stride;
  uint32_t dim, there;
} members;

/* n logits of each, LANES apart, to pairs of weights relative to the largest so far. */
static void weigh(const float *logits, uint32_t n, members q, uint32_t *weights) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const vf to_two = vf_set1(1.44269504088896341f), before = vf_load(q.max);
  vf high = before, other = before, total = vf_load(q.sum), odd = vf_zero();
  for (uint32_t r = 0; r + 1 < n; r += 2) {
    high = vf_max(vf_load(logits + r * LANES), high);
    other = vf_max(vf_load(logits + (r + 1) * LANES), other);
  }
  if (n % 2) high = vf_max(vf_load(logits + (n - 1) * LANES), high);
  high = vf_max(other, high);
  const __mmask16 grown = _mm512_cmp_ps_mask(high, before, _CMP_GT_OQ);
  if (grown) {
    float by[HALF];
    const vf shrink = exp_two((before - high) * to_two);
    total = _mm512_mask_mul_ps(total, grown, total, shrink);
    vf_store(q.max, high);
    vf_store(by, shrink);
    shrink_rows(q.acc, q.acc_stride, q.dim, by, grown & v_first(q.there));
  }
  /* As long as nothing is above minus infinity, all weights are 0. */
  const __mmask16 any = _mm512_cmp_ps_mask(high, vf_set1(-INFINITY), _CMP_NEQ_UQ);
  const vf shift = _mm512_maskz_mov_ps(any, high);
  for (uint32_t r = 0; r < n; r += 2, weights += LANES) {
    const vf x = exp_two((vf_load(logits + r * LANES) - shift) * to_two);
    vf y = vf_zero();
    if (r + 1 < n) y = exp_two((vf_load(logits + (r + 1) * LANES) - shift) * to_two);
    total = total + x;
    odd = odd + y;
    _mm512_store_si512(weights, _mm512_permutexvar_epi16(order, to_bf16(x, y)));
  }
  vf_store(q.sum, total + odd);
}

/* Pairs of query rows, [group of LANES][step][lane]; `rows` is room for HALF of them. */
static void turn_queries(const float *q, uint32_t m, size_t stride, uint32_t dim, uint32_t steps, uint32_t *rows,
                         uint32_t *to) {
  for (uint32_t j = 0; j < (m + LANES - 1) / LANES * LANES; j += HALF) {
    for (uint32_t k = 0; k < HALF; k++)
      for (uint32_t c = 0; c < dim; c += 32)
        _mm512_store_si512(rows + (size_t)k * steps + c / 2,
                           j + k < m ? load_pairs(q + (j + k) * stride + c, dim - c) : vi_zero());
    float *turned = (float *)to + (size_t)(j / LANES) * LANES * steps + j % LANES;
    for (uint32_t s = 0; s < steps; s += 16)
      vf_transpose((const float *)rows + s, steps, turned + (size_t)s * LANES, LANES);
  }
}

/* Logits of `padded` rows for LANES query rows, [row][lane]. */
CKV_INLINE void form_logits(const uint32_t *queries, uint32_t steps, const uint32_t *rows, uint32_t padded, float scale,
                            ckv_coming *ahead, float *out) {
  for (uint32_t r = 0, n; r < padded; r += n) {
    n = v_queries_at_a_time(padded - r);
    const uint32_t *a = rows + (size_t)r * steps;
    float *to = out + r * LANES;
    if (n == 12) logits_panel(queries, steps, a, 12, 12, scale, LANES, ahead, to, LANES);
    else if (n == 8) logits_panel(queries, steps, a, 8, 8, scale, LANES, ahead, to, LANES);
    else logits_panel(queries, steps, a, 4, 4, scale, LANES, ahead, to, LANES);
  }
}

/* acc += the weights of `there` query rows times a panel of n channels. */
CKV_INLINE void add_values(const uint32_t *panel, uint32_t pairs, const uint32_t *weights, uint32_t there, uint32_t n,
                           ckv_coming *ahead, float *acc, size_t stride) {
  for (uint32_t j = 0, nq; j < there; j += nq) {
    nq = v_queries_at_a_time((there - j + 3) & ~3u);
    const uint32_t *a = weights + j;
    float *to = acc + j * stride;
    if (nq == 12) values_panel(panel, pairs, a, 1, LANES, 12, there - j, n, ahead, to, stride);
    else if (nq == 8) values_panel(panel, pairs, a, 1, LANES, 8, there - j, n, ahead, to, stride);
    else values_panel(panel, pairs, a, 1, LANES, 4, there - j, n, ahead, to, stride);
  }
}

/* The rows of a run behind `end`, as many as n, in steps of work. */
static ckv_coming rows_behind(const ckv_run *run, uint32_t end, uint32_t n, size_t steps) {
  const size_t row_bytes = (size_t)run->row_stride * 2;
  return ckv_coming_bytes((const char *)run->data + end * row_bytes, ckv_min_u32(n, run->rows - end) * row_bytes, steps);
}

static bool is_narrow(const ckv_run *run) { return run->kind == CKV_DENSE && run->dtype != CKV_F32; }

bool ckv_attend_avx512(const ckv_run *keys, uint32_t first_key, const ckv_run *values, uint32_t first_value,
                       uint32_t count, const float *q, uint32_t m, size_t q_stride, float scale, float *maxima,
                       float *sums, float *acc, size_t acc_stride, float *scratch) {
  const uint32_t groups = (m + LANES - 1) / LANES, lanes = groups * LANES;
  /* Idle lanes would cost more than is won. */
  if (!is_narrow(keys) || !is_narrow(values) || lanes - m > m / 4) return false;
  if (count == 0) return true;
  const uint32_t dim = keys->dim, steps = (dim + 31) / 32 * 16, panels = (values->dim + 31) / 32;
  uint32_t *turned = aligned(scratch), *rows = turned + (size_t)lanes * steps, *tile = rows + (size_t)ROWS * steps;
  uint32_t *weights = tile + (size_t)panels * LANES * PAIRS;
  float *logits = (float *)(weights + (size_t)lanes * PAIRS), *max = logits + LANES * ROWS, *sum = max + lanes;
  turn_queries(q, m, q_stride, dim, steps, rows, turned);
  for (uint32_t j = 0; j < lanes; j++) {
    max[j] = j < m ? maxima[j] : 0;
    sum[j] = j < m ? sums[j] : 0;
  }
  for (uint32_t i = 0; i < count; i += ROWS) {
    const uint32_t n = ckv_min_u32(ROWS, count - i), padded = (n + 3) & ~3u, pairs = (n + 1) / 2;
    load_keys(keys, first_key + i, n, steps, rows);
    ckv_coming ahead = rows_behind(keys, first_key + i + n, ROWS, (size_t)steps * groups * v_query_groups(padded));
    for (uint32_t j = 0; j < lanes; j += LANES) {
      form_logits(turned + (size_t)j * steps, steps, rows, padded, scale, &ahead, logits);
      for (uint32_t k = j; k < j + LANES; k += HALF) {
        const members half = {max + k, sum + k, acc + k * acc_stride, acc_stride, values->dim,
                              k < m ? ckv_min_u32(HALF, m - k) : 0};
        weigh(logits + k - j, n, half, weights + (size_t)j * PAIRS + (k - j));
      }
    }
    load_values(values, first_value + i, n, tile);
    const size_t turns = v_query_groups((m + 3) & ~3u);
    ahead = rows_behind(values, first_value + i + n, ROWS, (size_t)pairs * panels * turns);
    for (uint32_t c = 0; c < values->dim; c += 32)
      for (uint32_t j = 0; j < lanes; j += LANES)
        add_values(tile + (size_t)c * PAIRS, pairs, weights + (size_t)j * PAIRS, ckv_min_u32(LANES, m - j),
                   ckv_min_u32(32, values->dim - c), &ahead, acc + j * acc_stride + c, acc_stride);
  }
  memcpy(maxima, max, m * sizeof(float));
  memcpy(sums, sum, m * sizeof(float));
  return true;
}

/* As many floats as ckv_attend_avx512 needs where neither keys nor values have more than `dim` channels. */
size_t ckv_attend_scratch_floats(uint32_t dim, uint32_t m) {
  const size_t steps = ((size_t)dim + 31) / 32 * 16, lanes = ((size_t)m + LANES - 1) / LANES * LANES;
  return lanes * steps + 2 * ROWS * steps + lanes * PAIRS + LANES * ROWS + 2 * lanes;
}

#pragma clang attribute pop
#endif
