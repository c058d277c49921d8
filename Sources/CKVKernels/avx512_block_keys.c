/* logits over affine rows, scaled integers and ggml's blocks with VNNI, for the level "avx512".
 *
 * Codes are made unsigned bytes (a zero point is taken off the sums) and queries fixed point of two signed digits each,
 * or one, so sums of products are exact integers; what is lost is one rounding of each query element to 1/32639, or
 * 1/127, of the largest of its row.
 *
 * 16 rows of a block of 32 channels are transposed so that a lane is a row and a vector holds four channels (a quad) of
 * every row. A sum of a lane is the sum of a row, and the scales of 16 rows are one vector. Two such sets of rows go
 * together, for every digit that is loaded to be used twice: loads are what runs out first. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

#include "avx512_fixed.h"

#include "avx512_blocks.h"

enum { SET = 16, ROWS = 2 * SET };

/* What is known of the queries, and of the rows at hand. */
typedef struct {
  int32_t *digits;  /* [16 positions][four columns][quad][column] */
  int32_t *offsets; /* [block][query row]: -zero times the sum of the query */
  float *sums;      /* [block][query row]: sum of the query over factor, for minima */
  float factor[COLUMNS], total[COLUMNS]; /* 0 for query rows that are not there */
  float *scales, *mins; /* [group][row] */
  uint32_t group;       /* blocks of a group */
  float *partials;      /* [query row][row] */
  uint8_t *rest;        /* room for rows that do not fill a tile */
} b_work;

/* The channels of a block as the positions where their codes come out: vectors of 16. */
CKV_INLINE void in_order(const b_form f, vf *first, vf *second) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  if (f.pairs) {
    vf x = _mm512_permutex2var_ps(*first, even, *second);
    *second = _mm512_permutex2var_ps(*first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), *second);
    *first = x;
  }
  if (f.form == QUARTERS || f.form == THIRDS) {
    const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    *first = _mm512_permutexvar_ps(fours, *first);
    *second = _mm512_permutexvar_ps(fours, *second);
  }
}

/* For `padded` query rows, of which nq are there. */
CKV_INLINE void prepare(const ckv_run *run, const b_form f, const uint32_t digits, const float *q, uint32_t nq,
                        const uint32_t padded, size_t q_stride, float scale, b_work *to) {
  const uint32_t dim = run->dim;
  vf up[COLUMNS];
  for (uint32_t j = 0; j < padded; j++) {
    vf high = vf_zero();
    for (uint32_t c = 0; j < nq && c < dim; c += 16) high = vf_max(vf_abs(vf_load(q + j * q_stride + c)), high);
    const float largest = vf_highest(high);
    up[j] = vf_set1(ckv_fixed_up(largest, v_range(digits)));
    to->factor[j] = scale * ckv_fixed_down(largest, v_range(digits));
    to->total[j] = 0;
  }
  for (uint32_t b = 0; b < dim / BLOCK; b++) {
    vf x[2][COLUMNS];
    for (uint32_t j = 0; j < padded; j++) {
      x[0][j] = x[1][j] = vf_zero();
      if (j >= nq) continue;
      const float *from = q + j * q_stride + b * BLOCK;
      x[0][j] = vf_load(from);
      x[1][j] = vf_load(from + 16);
      in_order(f, &x[0][j], &x[1][j]);
    }
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (uint32_t h = 0; h < 2; h++) v_columns(x[h], up, padded, digits, to->digits + (b * 2 + h) * 4 * COLUMNS, sum);
    float totals[COLUMNS];
    v_column_totals(sum, padded, digits, totals);
    for (uint32_t j = 0; j < padded; j++) {
      to->offsets[b * COLUMNS + j] = -(int32_t)f.zero * (int32_t)totals[j];
      to->sums[b * COLUMNS + j] = totals[j];
      to->total[j] += totals[j];
    }
  }
}

/* The bytes of a block in a set of rows, transposed: lane r of x[i] is dword i of row r. */
typedef struct {
  __m512i x[4], high;
} b_codes;

/* What positions [16 h, 16 h + 16) of a block need that was not loaded for those before; `thirds`: the third bits. */
CKV_INLINE void load_codes(const uint32_t form, const b_form *f, const uint8_t *p, size_t step, const uint8_t *thirds,
                           const uint32_t h, b_codes *c) {
  if (form == BYTES) {
    transpose16(p + f->codes + 16 * h, step, c->x);
    return;
  }
  if (h) return;
  if (form == QUARTERS || form == THIRDS) transpose8(p, step, c->x);
  else transpose16(p + f->codes, step, c->x);
  if (form == FIVES) c->high = gather4(p + f->fifths, step);
  if (form == THIRDS) c->high = gather4(thirds, step);
}

/* x and `bit` in the bytes of every lane for which the lane's dword of `high` has a bit set: byte i looks at byte i of
 * `bytes` for which of the dword's, and of `bits` for which bit of that. */
CKV_INLINE __m512i with_high_bits(__m512i x, __m512i high, const uint32_t bytes, uint32_t bits, char bit) {
  const __m512i where = _mm512_add_epi8(_mm512_set1_epi32((int)bytes),
                                        _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
  __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(high, where), _mm512_set1_epi32((int)bits));
  return _mm512_mask_add_epi8(x, set, x, _mm512_set1_epi8(bit));
}

/* Positions 16 h + 4 k ..< + 4 of a block, as unsigned bytes. */
CKV_INLINE __m512i quad(const uint32_t form, __m512i sign, const b_codes *c, const uint32_t h, const uint32_t k) {
  if (form == BYTES) return _mm512_xor_si512(c->x[k], sign);
  if (form == QUARTERS || form == THIRDS) {
    __m512i x = k ? _mm512_srli_epi16(c->x[h], 2 * k) : c->x[h];
    x = _mm512_and_si512(x, _mm512_set1_epi8(3));
    if (form == QUARTERS) return x;
    return with_high_bits(x, c->high, 0x01010000u + 0x02020202u * h, 0x10011001u << k, 4);
  }
  __m512i x = _mm512_and_si512(h ? _mm512_srli_epi16(c->x[k], 4) : c->x[k], _mm512_set1_epi8(15));
  if (form == TABLE) return table_bytes(x);
  if (form == FIVES)
    return with_high_bits(x, c->high, 0x01010101u * (2 * h + k / 2), 0x08040201u << (k % 2 * 4), 16);
  return x;
}

/* Rows from p on, n of them of interest. */
CKV_INLINE void key_rows(const uint32_t form, const uint32_t digits, const b_form *f, uint32_t blocks,
                         const bool uniform, const uint8_t *p, size_t step, uint32_t n, const uint32_t nq,
                         const b_work *w, uint32_t rows, float *out, size_t ld) {
  const size_t ahead = step * ROWS / blocks;
  const __m512i sign = _mm512_set1_epi8(f->is_signed ? (char)0x80 : 0);
  const bool has_min = f->has_min;
  const vf zero = vf_set1((float)f->zero);
  /* Sums over blocks are in memory where registers are few. */
  const bool few = nq * digits <= 4 && form != FIVES;
  float *restrict partials = w->partials;
  vf held[2][COLUMNS];
  __m512i sum[2][COLUMNS];
  CKV_UNROLL
  for (uint32_t t = 0; t < 2 * nq; t++) {
    if (few) held[t % 2][t / 2] = vf_zero();
    else vf_store(partials + t * SET, vf_zero());
  }
  CKV_UNROLL
  for (uint32_t t = 0; t < 2 * nq * digits; t++) sum[t % 2][t / 2] = _mm512_setzero_si512();
  for (uint32_t b = 0, g = 0, in_group = 0; b < blocks; b++) {
    const uint8_t *codes = p + (size_t)b * f->bytes, *thirds = p + blocks * 8 + b * 4;
    const uint8_t *next = p + b * ahead + AHEAD;
    for (size_t i = 0; i < ahead; i += 64) __builtin_prefetch(next + i);
    if (!uniform)
      CKV_UNROLL
      for (uint32_t t = 0; t < 2 * nq * digits; t++)
        sum[t % 2][t / 2] = t / 2 % digits == 0 ? _mm512_set1_epi32(w->offsets[b * COLUMNS + t / 2 / digits])
                                                : _mm512_setzero_si512();
    b_codes c[2];
    const int32_t *columns = w->digits + b * 8 * COLUMNS;
    CKV_UNROLL
    for (uint32_t h = 0; h < 2; h++) {
      load_codes(form, f, codes, step, thirds, h, &c[0]);
      load_codes(form, f, codes + SET * step, step, thirds + SET * step, h, &c[1]);
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) {
        __m512i x[2] = {quad(form, sign, &c[0], h, k), quad(form, sign, &c[1], h, k)};
        CKV_UNROLL
        for (uint32_t t = 0; t < nq * digits; t++) {
          const __m512i y = _mm512_set1_epi32(columns[(h * 2 + t / 4) * 16 + k * 4 + t % 4]);
          CKV_UNROLL
          for (uint32_t set = 0; set < 2; set++) sum[set][t] = _mm512_dpbusd_epi32(sum[set][t], x[set], y);
        }
      }
    }
    if (uniform) continue;
    if (in_group == w->group) g++, in_group = 0;
    in_group++;
    CKV_UNROLL
    for (uint32_t set = 0; set < 2; set++) {
      const uint32_t at = g * ROWS + set * SET;
      const vf s = vf_load(w->scales + at), mn = has_min ? vf_fma(zero, s, vf_load(w->mins + at)) : zero;
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) {
        __m512i all = sum[set][j * digits];
        if (digits == 2) all = _mm512_add_epi32(_mm512_slli_epi32(sum[set][j * digits + 1], 8), all);
        vf x = _mm512_cvtepi32_ps(all);
        float *partial = partials + (2 * j + set) * SET;
        x = vf_fma(x, s, few ? held[set][j] : vf_load(partial));
        if (has_min) x = vf_fma(vf_set1(w->sums[b * COLUMNS + j]), mn, x);
        if (few) held[set][j] = x;
        else vf_store(partial, x);
      }
    }
  }
  CKV_UNROLL
  for (uint32_t set = 0; set < 2; set++) {
    const uint32_t at = set * SET;
    const vf s = vf_load(w->scales + at), mn = has_min ? vf_fma(zero, s, vf_load(w->mins + at)) : zero;
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf y = few ? held[set][j] : vf_load(partials + (2 * j + set) * SET);
      if (uniform) {
        const vf total = vf_set1(w->total[j]);
        y = vf_fma(-zero, total, v_joined(&sum[set][j * digits], digits)) * s;
        if (has_min) y = vf_fma(total, mn, y);
      }
      y = y * vf_set1(w->factor[j]);
      float *to = out + j * ld + set * SET;
      if (j >= rows) continue;
      if (n >= (set + 1) * SET) vf_store(to, y);
      else if (n > set * SET) vf_store_n(to, y, n - set * SET);
    }
  }
}

#define B_KEYS_OF(name, form, digits)                                                                                \
  static __attribute__((noinline)) void keys_##name##_##digits(const b_form *f, uint32_t blocks, bool uniform,       \
                                                               const uint8_t *p, size_t step, uint32_t n,            \
                                                               uint32_t nq, const b_work *w, float *out, size_t ld) { \
    if (nq == 1) key_rows(form, digits, f, blocks, uniform, p, step, n, 1, w, 1, out, ld);                           \
    else if (nq == 2) key_rows(form, digits, f, blocks, uniform, p, step, n, 2, w, 2, out, ld);                      \
    else if (digits == 2 || nq <= 4) key_rows(form, digits, f, blocks, uniform, p, step, n, 4, w, nq, out, ld);      \
    else key_rows(form, digits, f, blocks, uniform, p, step, n, COLUMNS / digits, w, nq, out, ld);                   \
  }
#define B_KEYS(name, form) B_KEYS_OF(name, form, 1) B_KEYS_OF(name, form, 2)
B_FORMS(B_KEYS)

/* For up to eight columns. */
static void key_logits(const ckv_run *run, const b_form f, uint32_t digits, uint32_t first, uint32_t count,
                       const float *q, uint32_t nq, size_t q_stride, float scale, float *out, size_t ld,
                       float *scratch) {
  const uint32_t dim = run->dim, blocks = dim / BLOCK;
  const bool uniform = is_uniform(run);
  const size_t step = row_bytes_of(run);
  const uint8_t *p = (const uint8_t *)run->data + first * step;
  b_work w = {.digits = (int32_t *)scratch};
  w.offsets = w.digits + 2 * dim;
  w.sums = (float *)(w.offsets + blocks * COLUMNS);
  w.scales = w.sums + blocks * COLUMNS;
  w.mins = w.scales + blocks * ROWS;
  w.partials = w.mins + blocks * ROWS;
  w.rest = (uint8_t *)(w.partials + COLUMNS * ROWS);
  w.group = uniform ? blocks : f.halves ? 1 : run->group / BLOCK;
  if (digits == 2) prepare(run, f, 2, q, nq, 4, q_stride, scale, &w);
  else prepare(run, f, 1, q, nq, 8, q_stride, scale, &w);
  for (uint32_t i = 0; i < count; i += ROWS, p += ROWS * step) {
    const uint32_t n = ckv_min_u32(ROWS, count - i);
    if (n < ROWS) { /* there may be no memory behind the last row */
      memset(w.rest, 0, ROWS * step);
      memcpy(w.rest, p, n * step);
      p = w.rest;
    }
    load_metadata(run, f, first + i, n, ROWS, w.scales, w.mins);
#define B_CALL(name)                                                                              \
  if (digits == 2) keys_##name##_2(&f, blocks, uniform, p, step, n, nq, &w, out + i, ld);         \
  else keys_##name##_1(&f, blocks, uniform, p, step, n, nq, &w, out + i, ld)
    B_FOR_FORM(f, B_CALL);
#undef B_CALL
  }
}

bool ckv_blocks_logits(const ckv_run *run, uint32_t digits, uint32_t first, uint32_t count, const float *q, uint32_t m,
                       size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  if (!fits(run)) return false;
  if (count == 0 || m == 0) return true;
  const b_form f = form_of(run);
  const uint32_t together = v_rows_together(digits), part = m <= together ? count : 256;
  for (uint32_t i = 0, n; i < count; i += n) {
    n = ckv_min_u32(part, count - i);
    for (uint32_t j = 0; j < m; j += together)
      key_logits(run, f, digits, first + i, n, q + j * q_stride, ckv_min_u32(together, m - j), q_stride, scale,
                 out + j * ld + i, ld, scratch);
  }
  return true;
}

#pragma clang attribute pop
#endif
