/* accumulate over affine rows, scaled integers and ggml's blocks with VNNI, for the level "avx512".
 *
 * sum_r p_r row_r = sum_r (p_r scale_r) code_r + sum_r p_r min_r, for every group of channels. The second sum is one
 * number for a group; without minima codes count from a zero point. For the first the folded weights p_r scale_r of a
 * tile of rows are held in fixed point, relative to the largest of their tile and group, as two signed bytes or, with
 * products of eight bits, one; the sums of bytes times codes are exact integers. The error is that of rounding each
 * weight once (ckv.h). A weight of 0 stays 0.
 *
 * Rows are taken four at a time: their code bytes are transposed so that a lane holds the same byte of four rows, and
 * vpdpbusd multiplies it by the same four bytes of weights. That, and bringing codes of 2 and 3 bits to nibbles, is
 * done once for all query rows, into a tile that stays in the first-level cache. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

#include "avx512_fixed.h"

#include "avx512_blocks.h"

enum {
  TILE = 128,   /* rows; i32 sums hold 65793 */
  STEPS = TILE / 4,
  CHUNK = 16,   /* columns that share a transposed tile */
  STRIP = BLOCK, /* channels of a strip, all of one group */
  DISTANCE = 1, /* how many tiles ahead memory is asked for */
  STRIPS = 4,   /* strips that are transposed at a time */
};

/* Parts of the scratch memory of a call. */
typedef struct {
  uint32_t groups, strips;
  uint32_t group;   /* channels of a group */
  size_t row_bytes; /* of codes */
  float middle;     /* of the codes, see ckv_middle */
  float *sums;      /* [query row][strip][2][16]: see `spread` */
  float *min_sums;  /* [query row][group][16] */
  float *scales;    /* [group][TILE] of the tile at hand */
  float *mins;      /* the same */
  float *factors;   /* [query row][group] */
  int32_t *digits;  /* [CHUNK / COLUMNS][group][16 rows][four columns][4 rows][column] */
  uint8_t *codes;   /* [strip][STEPS][64 or 128] */
  /* Memory to ask for, and how far to go with every step of work. Evenly, because asked for at once it would wait for
   * room in the queue of misses, and the work behind it too. */
  const char *next;
  size_t next_step;
} memory;

enum { SET_DIGITS = COLUMNS * 4, GROUP_DIGITS = TILE / 16 * SET_DIGITS };

/* ---- weights --------------------------------------------------------------------------------------------------- */

/* Sixteen weights of a query row, zero past the end. */
CKV_INLINE vf load_weights(const float *p, uint32_t have) { return have < 16 ? vf_load_n(p, have) : vf_load(p); }

/* The largest |p * scale| of each query row for `count` groups from g on. Adds p * (min + middle * scale) to
 * min_sums, which is 0 without minima. */
CKV_INLINE void weigh(memory *at, const bool has_min, const uint32_t count, uint32_t g, uint32_t n,
                      const float *restrict p, const uint32_t nq, size_t ld, float *restrict min_sums,
                      float largest[2][COLUMNS]) {
  const uint32_t groups = at->groups;
  const size_t next_step = at->next_step;
  const char *next = at->next;
  const float *restrict scales = at->scales + g * TILE, *restrict mins = at->mins + g * TILE;
  const vf middle = vf_set1(at->middle);
  vf high[2][COLUMNS], sum[2][COLUMNS];
  CKV_UNROLL
  for (uint32_t t = 0; t < count * COLUMNS; t++) high[t / COLUMNS][t % COLUMNS] = vf_zero();
  if (has_min)
    CKV_UNROLL
    for (uint32_t t = 0; t < count * nq; t++)
      sum[t / nq][t % nq] = vf_load(min_sums + (t % nq * groups + g + t / nq) * 16);
  for (uint32_t i = 0; i < n; i += 16) {
    vf weight[COLUMNS];
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) weight[j] = load_weights(p + j * ld + i, n - i);
    CKV_UNROLL
    for (uint32_t k = 0; k < count; k++, next += next_step) {
      const vf s = vf_load(scales + k * TILE + i);
      const vf mn = has_min ? vf_fma(s, middle, vf_load(mins + k * TILE + i)) : vf_zero();
      __builtin_prefetch(next);
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) {
        if (has_min) sum[k][j] = vf_fma(weight[j], mn, sum[k][j]);
        high[k][j] = _mm512_range_ps(weight[j] * s, high[k][j], 0x0b); /* the larger magnitude */
      }
    }
  }
  if (has_min)
    CKV_UNROLL
    for (uint32_t t = 0; t < count * nq; t++)
      vf_store(min_sums + (t % nq * groups + g + t / nq) * 16, sum[t / nq][t % nq]);
  CKV_UNROLL
  for (uint32_t k = 0; k < count; k++)
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j += 4)
      vf_max4(high[k][j], high[k][j + 1], high[k][j + 2], high[k][j + 3], largest[k] + j);
  at->next = next;
}

/* Folds the weights of nq query rows over a tile of n rows: digits and factors, and what min_sums gets. */
CKV_INLINE void fold(memory *at, const bool has_min, const uint32_t digits, uint32_t n, const float *restrict p,
                     const uint32_t nq, size_t ld, float *restrict min_sums, int32_t *restrict columns,
                     float *restrict factors) {
  const uint32_t groups = at->groups;
  const size_t next_step = at->next_step;
  for (uint32_t first = 0; first < groups; first += 4) {
    const uint32_t count = ckv_min_u32(4, groups - first);
    float largest[4][COLUMNS] = {{0}}, up[4][COLUMNS], factor[4][COLUMNS];
    for (uint32_t k = 0; k < count; k += 2) {
      if (count - k == 1) weigh(at, has_min, 1, first + k, n, p, nq, ld, min_sums, largest + k);
      else weigh(at, has_min, 2, first + k, n, p, nq, ld, min_sums, largest + k);
    }
    const char *next = at->next;
    for (uint32_t k = 0; k < count; k++) { /* lanes are query rows */
      v_fixed_scales(largest[k], nq, digits, up[k], factor[k]);
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) factors[j * groups + first + k] = factor[k][j];
    }
    for (uint32_t k = 0; k < count; k++) {
      int32_t *restrict to = columns + (size_t)(first + k) * GROUP_DIGITS;
      const float *restrict scales = at->scales + (first + k) * TILE;
      vf inverse[COLUMNS];
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) inverse[j] = vf_set1(up[k][j]);
      __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (uint32_t i = 0; i < n; i += 16, to += SET_DIGITS, next += next_step) {
        const vf s = vf_load(scales + i);
        __builtin_prefetch(next);
        vf x[COLUMNS];
        CKV_UNROLL
        for (uint32_t j = 0; j < nq; j++) x[j] = load_weights(p + j * ld + i, n - i) * s;
        v_columns(x, inverse, nq, digits, to, sum);
      }
      float totals[COLUMNS];
      v_column_totals(sum, nq, digits, totals);
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++)
        min_sums[(j * groups + first + k) * 16] -= factor[k][j] * (at->middle * totals[j]);
    }
    at->next = next;
  }
}

#include "avx512_tile_codes.h"

/* ---- products -------------------------------------------------------------------------------------------------- */

/* Adds the products of a strip over a tile. `halves`: vectors of a step, 2 for 8 bits, otherwise 1 with two nibbles a
 * byte. */
CKV_INLINE void strip_sums(const uint8_t *codes, const uint32_t halves, const uint32_t digits, uint32_t n,
                           const int32_t *columns, const float *factors, const uint32_t nq, uint32_t groups,
                           float *sums, size_t sum_stride, memory *at) {
  const uint32_t count = nq * digits;
  __m512i sum[2][COLUMNS]; /* [half][column] */
  CKV_UNROLL
  for (uint32_t t = 0; t < 2 * count; t++) sum[t % 2][t / 2] = _mm512_setzero_si512();
  const size_t next_step = at->next_step;
  const char *next = at->next;
  for (uint32_t i = 0; i < n; i += 16, columns += SET_DIGITS) {
    CKV_UNROLL
    for (uint32_t k = 0; k < 4; k++, codes += 64 * halves, next += next_step) {
      __builtin_prefetch(next);
      __m512i x[2] = {_mm512_load_si512(codes), _mm512_setzero_si512()};
      if (halves == 2) {
        x[1] = _mm512_load_si512(codes + 64);
      } else {
        x[1] = _mm512_and_si512(x[0], _mm512_set1_epi8((char)0xf0));
        x[0] = _mm512_and_si512(x[0], _mm512_set1_epi8(0x0f));
      }
      CKV_UNROLL
      for (uint32_t t = 0; t < count; t++) {
        __m512i y = _mm512_set1_epi32(columns[t / 4 * 16 + 4 * k + t % 4]);
        sum[0][t] = _mm512_dpbusd_epi32(sum[0][t], x[0], y);
        sum[1][t] = _mm512_dpbusd_epi32(sum[1][t], x[1], y);
      }
    }
  }
  at->next = next;
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    const vf factor = vf_set1(factors[j * groups]);
    CKV_UNROLL
    for (uint32_t h = 0; h < 2; h++) {
      float *to = sums + j * sum_stride + 16 * h;
      const vf by = h && halves == 1 ? factor * vf_set1(0x1p-4f) : factor;
      vf_store(to, vf_fma(v_joined(&sum[h][j * digits], digits), by, vf_load(to)));
    }
  }
}

/* acc[c] += the sums of the channels of a query row, and their groups' mins. */
CKV_INLINE void spread(const ckv_run *run, const b_form f, const memory *at, const float *sums, const float *min_sums,
                       float *acc) {
  /* Where channels 0 ..< 16 and 16 ..< 32 of a strip are; 16 and more are the second half. */
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i first = lane, second = _mm512_add_epi32(lane, _mm512_set1_epi32(16));
  if (f.pairs) { /* dword i, half h: channel 2i + h */
    first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  } else if (f.form == QUARTERS || f.form == THIRDS) { /* channel 4 (i % 8) + i / 8 + 2h */
    first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
  }
  for (uint32_t s = 0; s < at->strips; s++) {
    const uint32_t c = s * STRIP, n = ckv_min_u32(STRIP, run->dim - c);
    const vf mn = vf_set1(vf_sum(vf_load(min_sums + c / at->group * 16)));
    vf a = vf_load(sums + c), b = vf_load(sums + c + 16);
    vf low = _mm512_permutex2var_ps(a, first, b) + mn, high = _mm512_permutex2var_ps(a, second, b) + mn;
    const uint32_t low_n = ckv_min_u32(16, n), high_n = n - low_n;
    vf_store_n(acc + c, vf_load_n(acc + c, low_n) + low, low_n);
    if (high_n) vf_store_n(acc + c + 16, vf_load_n(acc + c + 16, high_n) + high, high_n);
  }
}

/* ---- all of it ------------------------------------------------------------------------------------------------- */

/* `gaps`: between the codes of blocks, which only some forms have, and some always. */
CKV_INLINE void transpose_form(const ckv_run *run, const uint32_t form, const b_form *f, const bool gaps,
                               uint32_t first, uint32_t n, uint32_t s, memory *at) {
  if ((s + STRIPS) * STRIP <= run->dim) transpose_codes(run, form, f, gaps, true, first, n, s, at);
  else transpose_codes(run, form, f, gaps, false, first, n, s, at);
}

#define B_TRANSPOSE(name, form)                                                                                      \
  static __attribute__((noinline)) void transpose_##name(const ckv_run *run, const b_form *f, uint32_t first,        \
                                                         uint32_t n, uint32_t s, memory *at) {                       \
    const bool may = form != QUARTERS && form != THIRDS, must = form == FIVES || form == TABLE;                      \
    if (must || (may && f->halves)) transpose_form(run, form, f, may, first, n, s, at);                              \
    else if (!must) transpose_form(run, form, f, false, first, n, s, at);                                            \
  }
B_FORMS(B_TRANSPOSE)

/* CALL(nq) with the number of query rows as a constant: 1 to 4, or 8 of one digit. */
#define CKV_FOR_ROWS(nq, digits, CALL)         \
  do {                                         \
    switch (nq) {                              \
      case 1: CALL(1); break;                  \
      case 2: CALL(2); break;                  \
      case 3: CALL(3); break;                  \
      case 4: CALL(4); break;                  \
      default: CALL(COLUMNS / digits); break;  \
    }                                          \
  } while (0)

/* Everything of nq query rows over a tile but the transposition. Row j is the first of its columns, or the fifth of eight
 * of one digit. */
CKV_INLINE void fold_rows(memory *at, const bool has_min, const uint32_t digits, uint32_t n, const float *p, uint32_t j,
                          uint32_t nq, size_t ld) {
  float *mins = at->min_sums + (size_t)j * at->groups * 16, *factors = at->factors + j * at->groups;
  int32_t *columns = at->digits + (size_t)(j * digits / COLUMNS) * at->groups * GROUP_DIGITS;
  columns += j * digits % COLUMNS / 4 * 16;
#define CALL(rows) fold(at, has_min, digits, n, p + j * ld, rows, ld, mins, columns, factors)
  CKV_FOR_ROWS(nq, digits, CALL);
#undef CALL
}

CKV_INLINE void multiply_rows(const bool wide, const uint32_t digits, memory *at, uint32_t n, uint32_t s, uint32_t j,
                              uint32_t nq) {
  const size_t sum_stride = (size_t)at->strips * STRIP;
  const uint32_t halves = wide ? 2 : 1;
  const int32_t *columns = at->digits + (size_t)(j * digits / COLUMNS) * at->groups * GROUP_DIGITS;
  columns += j * digits % COLUMNS / 4 * 16;
  for (uint32_t k = 0; k < STRIPS && s + k < at->strips; k++) {
    const uint32_t g = (s + k) * STRIP / at->group;
    const uint8_t *codes = at->codes + (size_t)k * STEPS * 64 * halves;
    float *sums = at->sums + j * sum_stride + (s + k) * STRIP;
    const int32_t *d = columns + (size_t)g * GROUP_DIGITS;
    const float *factors = at->factors + j * at->groups + g;
#define CALL(rows) strip_sums(codes, halves, digits, n, d, factors, rows, at->groups, sums, sum_stride, at)
    CKV_FOR_ROWS(nq, digits, CALL);
#undef CALL
  }
}

/* Query rows from j on that go together. */
CKV_INLINE uint32_t rows_from(uint32_t j, uint32_t m, const uint32_t digits) {
  return digits == 1 && m - j >= 8 ? 8 : ckv_min_u32(4, m - j);
}

CKV_INLINE void accumulate_chunk(const ckv_run *run, const b_form f, const uint32_t digits, uint32_t first,
                                 uint32_t count, const float *p, uint32_t m, size_t ld, float *acc, size_t acc_stride,
                                 memory *at) {
  const size_t sum_stride = (size_t)at->strips * STRIP, min_stride = (size_t)at->groups * 16;
  memset(at->sums, 0, m * sum_stride * sizeof(float));
  memset(at->min_sums, 0, m * min_stride * sizeof(float));
  for (uint32_t i = 0; i < count; i += TILE) {
    const uint32_t n = ckv_min_u32(TILE, count - i), row = first + i;
    const size_t blocks = (at->strips + 3) / 4;
    at->next = (const char *)run->data + (row + DISTANCE * TILE) * at->row_bytes;
    const size_t passes = (m * digits + COLUMNS - 1) / COLUMNS;
    at->next_step = TILE * at->row_bytes / (passes * (16 * at->groups + 32 * at->strips) + 64 * blocks);
    load_metadata(run, f, row, n, TILE, at->scales, at->mins);
    for (uint32_t j = 0, nq; j < m; j += nq) {
      nq = rows_from(j, m, digits);
      if (f.has_min) fold_rows(at, true, digits, n, p + i, j, nq, ld);
      else fold_rows(at, false, digits, n, p + i, j, nq, ld);
    }
    for (uint32_t s = 0; s < at->strips; s += STRIPS) {
#define B_CALL(name) transpose_##name(run, &f, row, n, s, at)
      B_FOR_FORM(f, B_CALL);
#undef B_CALL
      for (uint32_t j = 0, nq; j < m; j += nq) {
        nq = rows_from(j, m, digits);
        if (is_wide(f.form)) multiply_rows(true, digits, at, n, s, j, nq);
        else multiply_rows(false, digits, at, n, s, j, nq);
      }
    }
  }
  for (uint32_t j = 0; j < m; j++)
    spread(run, f, at, at->sums + j * sum_stride, at->min_sums + j * min_stride, acc + j * acc_stride);
}

static float *take(float **free, size_t floats) {
  float *p = *free;
  *free += (floats + 15) & ~(size_t)15;
  return p;
}

size_t ckv_sums_scratch_floats(uint32_t dim) {
  size_t strips = ((size_t)dim + STRIP - 1) / STRIP;
  return strips * (CHUNK * (STRIP + 16 + 1) + 2 * TILE + CHUNK / COLUMNS * GROUP_DIGITS) + 16 +
         STRIPS * STEPS * 32 + 16;
}

/* Affine rows may end with a part of a group. */
static bool sums_fit(const ckv_run *run) {
  return run->kind == CKV_AFFINE_ROW ? run->group % STRIP == 0 || run->group >= run->dim : fits(run);
}

CKV_INLINE void accumulate_digits(const ckv_run *run, const uint32_t digits, uint32_t first, uint32_t count,
                                  const float *p, uint32_t m, size_t ld, float *acc, size_t acc_stride,
                                  float *scratch) {
  if (!sums_fit(run)) {
    ckv_avx512.accumulate(run, first, count, p, m, ld, acc, acc_stride, scratch);
    return;
  }
  if (count == 0 || m == 0) return;
  const b_form f = form_of(run);
  float *next = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  const uint32_t groups = ckv_max_u32(groups_of(run), 1), chunk = CHUNK / digits;
  memory at = {.groups = groups, .strips = (run->dim + STRIP - 1) / STRIP, .row_bytes = row_bytes_of(run),
               .group = groups == 1 ? run->dim : run->kind == CKV_GGML ? STRIP : run->group,
               .middle = (float)f.zero};
  at.codes = (uint8_t *)take(&next, STRIPS * STEPS * 32);
  at.digits = (int32_t *)take(&next, (size_t)CHUNK / COLUMNS * at.groups * GROUP_DIGITS);
  at.scales = take(&next, (size_t)at.groups * TILE);
  at.mins = take(&next, (size_t)at.groups * TILE);
  at.sums = take(&next, (size_t)chunk * at.strips * STRIP);
  at.min_sums = take(&next, (size_t)chunk * at.groups * 16);
  at.factors = take(&next, (size_t)chunk * at.groups);
  for (uint32_t j = 0; j < m; j += chunk)
    accumulate_chunk(run, f, digits, first, count, p + j * ld, ckv_min_u32(chunk, m - j), ld, acc + j * acc_stride,
                     acc_stride, &at);
}

void ckv_accumulate_vnni(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                         float *acc, size_t acc_stride, float *scratch) {
  accumulate_digits(run, 2, first, count, p, m, ld, acc, acc_stride, scratch);
}

void ckv_accumulate_vnni_digit(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m,
                               size_t ld, float *acc, size_t acc_stride, float *scratch) {
  accumulate_digits(run, 1, first, count, p, m, ld, acc, acc_stride, scratch);
}

#pragma clang attribute pop
#endif
