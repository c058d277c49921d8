/* accumulate over CKV_AFFINE_ROW with VNNI, for the level "avx512".
 *
 * sum_r p_r row_r = sum_r (p_r scale_r) code_r + sum_r p_r min_r, for every group of channels. The second sum is one
 * number for a group. For the first the folded weights p_r scale_r of a tile of rows are held in 16-bit fixed point,
 * relative to the largest of their tile and group, as two signed bytes; the sums of bytes times codes are exact
 * integers. The error is that of rounding each weight once (ckv.h). A weight of 0 stays 0.
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

enum {
  TILE = 128,   /* rows; i32 sums hold 65793 */
  STEPS = TILE / 4,
  QUERIES = 4,  /* query rows a strip holds accumulators for */
  CHUNK = 8,    /* query rows that share a transposed tile */
  STRIP = 32,   /* channels of a strip, all of one group */
  DISTANCE = 1, /* how many tiles ahead memory is asked for */
  STRIPS = 4,   /* strips that are transposed at a time */
};

/* Parts of the scratch memory of a call. */
typedef struct {
  uint32_t groups, strips;
  float middle;     /* of the codes, see v_middle */
  float *sums;      /* [query row][strip][2][16]: see `spread` */
  float *min_sums;  /* [query row][group][16] */
  float *scales;    /* [group][TILE] of the tile at hand */
  float *mins;      /* the same */
  float *factors;   /* [CHUNK][group] */
  int32_t *digits;  /* [CHUNK / QUERIES][group][16 rows][pair of query rows][4 rows][query row][plane] */
  uint8_t *codes;   /* [strip][STEPS][64 or 128] */
  /* Memory to ask for, and how far to go with every step of work. Evenly, because asked for at once it would wait for
   * room in the queue of misses, and the work behind it too. */
  const char *next;
  size_t next_step;
} memory;

enum { SET_DIGITS = 2 * QUERIES * 4, GROUP_DIGITS = TILE / 16 * SET_DIGITS };

/* ---- weights --------------------------------------------------------------------------------------------------- */

/* Metadata of n rows, `groups` a row, as f32 by group, zero up to a multiple of 16 rows. */
CKV_INLINE void load_meta(const void *from, const uint32_t type, uint32_t groups, uint32_t n, float *to) {
  const uint32_t padded = (n + 15) & ~15u;
  if (groups == 4) {
    const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(2));
    for (uint32_t i = 0; i < n; i += 16) {
      vf x[4];
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) { /* rows i + 4k ..< +4 */
        uint32_t begin = (i + 4 * k) * 4, have = n * 4 > begin ? ckv_min_u32(16, n * 4 - begin) : 0;
        x[k] = have == 16 ? vf_load_as(ckv_offset(from, type, begin), type)
               : have     ? vf_load_as_n(ckv_offset(from, type, begin), type, have)
                          : vf_zero();
      }
      vf a = _mm512_permutex2var_ps(x[0], even, x[1]), b = _mm512_permutex2var_ps(x[2], even, x[3]);
      vf c = _mm512_permutex2var_ps(x[0], odd, x[1]), d = _mm512_permutex2var_ps(x[2], odd, x[3]);
      vf_store(to + i, _mm512_shuffle_f32x4(a, b, 0x44));
      vf_store(to + TILE + i, _mm512_shuffle_f32x4(a, b, 0xee));
      vf_store(to + 2 * TILE + i, _mm512_shuffle_f32x4(c, d, 0x44));
      vf_store(to + 3 * TILE + i, _mm512_shuffle_f32x4(c, d, 0xee));
    }
    return;
  }
  if (groups == 1) {
    for (uint32_t i = 0; i < n; i += 16)
      vf_store(to + i, vf_load_as_n(ckv_offset(from, type, i), type, ckv_min_u32(16, n - i)));
    return;
  }
  if (groups == 2) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (uint32_t i = 0; i < n; i += 16) {
      const uint32_t have = 2 * ckv_min_u32(16, n - i), low = ckv_min_u32(16, have);
      vf a = vf_load_as_n(ckv_offset(from, type, 2 * i), type, low), b = vf_zero();
      if (have > low) b = vf_load_as_n(ckv_offset(from, type, 2 * i + 16), type, have - low);
      vf_store(to + i, _mm512_permutex2var_ps(a, even, b));
      vf_store(to + TILE + i, _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
    }
    return;
  }
  for (uint32_t g = 0; g < groups; g++)
    for (uint32_t i = n / 16 * 16; i < padded; i += 16) vf_store(to + g * TILE + i, vf_zero());
  for (uint32_t i = 0; i < n * groups; i += 16) {
    float some[16];
    uint32_t have = ckv_min_u32(16, n * groups - i);
    vf_store(some, vf_load_as_n(ckv_offset(from, type, i), type, have));
    for (uint32_t k = 0, r = i / groups, g = i % groups; k < have; k++) {
      to[g * TILE + r] = some[k];
      if (++g == groups) g = 0, r++;
    }
  }
}

/* Sixteen weights of a query row, zero past the end. */
CKV_INLINE vf load_weights(const float *p, uint32_t have) { return have < 16 ? vf_load_n(p, have) : vf_load(p); }

/* The largest |p * scale| of each query row for `count` groups from g on. Adds p * (min + middle * scale) to
 * min_sums. */
CKV_INLINE void weigh(memory *at, const uint32_t count, uint32_t g, uint32_t n, const float *restrict p,
                      const uint32_t nq, size_t ld, float *restrict min_sums, float largest[2][4]) {
  const uint32_t groups = at->groups;
  const size_t next_step = at->next_step;
  const char *next = at->next;
  const float *restrict scales = at->scales + g * TILE, *restrict mins = at->mins + g * TILE;
  const vf middle = vf_set1(at->middle);
  vf high[2][QUERIES], sum[2][QUERIES];
  CKV_UNROLL
  for (uint32_t t = 0; t < count * QUERIES; t++) high[t / QUERIES][t % QUERIES] = vf_zero();
  CKV_UNROLL
  for (uint32_t t = 0; t < count * nq; t++)
    sum[t / nq][t % nq] = vf_load(min_sums + (t % nq * groups + g + t / nq) * 16);
  for (uint32_t i = 0; i < n; i += 16) {
    vf weight[QUERIES];
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) weight[j] = load_weights(p + j * ld + i, n - i);
    CKV_UNROLL
    for (uint32_t k = 0; k < count; k++, next += next_step) {
      const vf s = vf_load(scales + k * TILE + i), mn = vf_fma(s, middle, vf_load(mins + k * TILE + i));
      __builtin_prefetch(next);
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) {
        sum[k][j] = vf_fma(weight[j], mn, sum[k][j]);
        high[k][j] = _mm512_range_ps(weight[j] * s, high[k][j], 0x0b); /* the larger magnitude */
      }
    }
  }
  CKV_UNROLL
  for (uint32_t t = 0; t < count * nq; t++)
    vf_store(min_sums + (t % nq * groups + g + t / nq) * 16, sum[t / nq][t % nq]);
  CKV_UNROLL
  for (uint32_t k = 0; k < count; k++) vf_max4(high[k][0], high[k][1], high[k][2], high[k][3], largest[k]);
  at->next = next;
}

/* Folds the weights of nq query rows over a tile of n rows: digits and factors, and what min_sums gets. */
CKV_INLINE void fold(memory *at, uint32_t n, const float *restrict p, const uint32_t nq, size_t ld,
                     float *restrict min_sums, int32_t *restrict digits, float *restrict factors) {
  const uint32_t groups = at->groups;
  const size_t next_step = at->next_step;
  for (uint32_t first = 0; first < groups; first += 4) {
    const uint32_t count = ckv_min_u32(4, groups - first);
    float largest[4][4] = {{0}}, up[4][4], factor[4][4];
    for (uint32_t k = 0; k < count; k += 2) {
      if (count - k == 1) weigh(at, 1, first + k, n, p, nq, ld, min_sums, largest + k);
      else weigh(at, 2, first + k, n, p, nq, ld, min_sums, largest + k);
    }
    const char *next = at->next;
    for (uint32_t k = 0; k < count; k++) { /* lanes are query rows */
      __m128 x = _mm_loadu_ps(largest[k]), vanishes = _mm_cmplt_ps(x, _mm_set1_ps(1e-30f));
      _mm_storeu_ps(up[k], _mm_andnot_ps(vanishes, _mm_div_ps(_mm_set1_ps(v_full_range), x)));
      _mm_storeu_ps(factor[k], _mm_andnot_ps(vanishes, _mm_mul_ps(x, _mm_set1_ps(1 / v_full_range))));
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) factors[j * groups + first + k] = factor[k][j];
    }
    for (uint32_t k = 0; k < count; k++) {
      int32_t *restrict to = digits + (size_t)(first + k) * GROUP_DIGITS;
      const float *restrict scales = at->scales + (first + k) * TILE;
      vf inverse[QUERIES];
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) inverse[j] = vf_set1(up[k][j]);
      __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (uint32_t i = 0; i < n; i += 16, to += SET_DIGITS, next += next_step) {
        const vf s = vf_load(scales + i);
        __builtin_prefetch(next);
        CKV_UNROLL
        for (uint32_t j = 0; j < nq; j += 2) {
          vf a = v_fixed(load_weights(p + j * ld + i, n - i) * s, inverse[j]), b = a;
          if (j + 1 < nq) b = v_fixed(load_weights(p + (j + 1) * ld + i, n - i) * s, inverse[j + 1]);
          __m512i both = v_digits(a, b);
          sum[j / 2] = v_add_digits(sum[j / 2], both);
          _mm512_storeu_si512(to + 8 * j, both);
        }
      }
      float totals[QUERIES];
      v_digit_totals(sum[0], totals);
      if (nq > 2) v_digit_totals(sum[1], totals + 2);
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++)
        min_sums[(j * groups + first + k) * 16] -= factor[k][j] * (at->middle * totals[j]);
    }
    at->next = next;
  }
}

/* ---- codes ----------------------------------------------------------------------------------------------------- */

CKV_INLINE void transpose4(const __m512i r[4], __m512i to[4]) {
  __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  to[0] = _mm512_unpacklo_epi16(a, c);
  to[1] = _mm512_unpackhi_epi16(a, c);
  to[2] = _mm512_unpacklo_epi16(b, d);
  to[3] = _mm512_unpackhi_epi16(b, d);
}

CKV_INLINE void transpose4_half(const __m256i r[4], __m256i to[4]) {
  __m256i a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
  __m256i c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
  to[0] = _mm256_unpacklo_epi16(a, c);
  to[1] = _mm256_unpackhi_epi16(a, c);
  to[2] = _mm256_unpacklo_epi16(b, d);
  to[3] = _mm256_unpackhi_epi16(b, d);
}

CKV_INLINE void transpose4_quarter(const __m128i r[4], __m128i to[4]) {
  __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpackhi_epi8(r[0], r[1]);
  __m128i c = _mm_unpacklo_epi8(r[2], r[3]), d = _mm_unpackhi_epi8(r[2], r[3]);
  to[0] = _mm_unpacklo_epi16(a, c);
  to[1] = _mm_unpackhi_epi16(a, c);
  to[2] = _mm_unpacklo_epi16(b, d);
  to[3] = _mm_unpackhi_epi16(b, d);
}

/* The codes of n rows from `first` on, channels of strips [s, s + STRIPS), to at->codes. 4 and 8 bits: dword i of a
 * vector is byte i of its 16 in the row. 2 and 3 bits: nibbles; dword i < 8 is byte i of the 8 of the low plane,
 * codes 0 and 2 of it, and dword i + 8 codes 1 and 3. `whole`: rows have all the bytes asked for. */
CKV_INLINE void transpose_codes(const ckv_run *run, const uint32_t bits, const bool whole, uint32_t first, uint32_t n,
                                uint32_t s, memory *at) {
  const uint32_t low_bits = bits == 3 ? 2 : bits, words = ckv_row_words(run->dim, bits);
  const uint32_t low_bytes = ckv_plane_words(run->dim, low_bits) * 4, begin = s * STRIP / 8 * low_bits;
  const uint32_t high_begin = low_bytes + s * STRIP / 8;
  const uint32_t step = (bits == 8 ? 128 : 64), stride = STEPS * step;
  const uint32_t have = whole ? 0 : low_bytes - begin, high_have = whole ? 0 : words * 4 - high_begin;
  const char *rows = (const char *)run->data + (size_t)first * words * 4, *row[4];
  const __mmask64 m0 = have >= 64 ? ~0ull : (1ull << have) - 1;
  const __mmask64 m1 = have >= 128 ? ~0ull : have > 64 ? (1ull << (have - 64)) - 1 : 0;
  const __mmask16 m_high = high_have >= 16 ? 0xffff : (__mmask16)((1u << high_have) - 1);
  const size_t row_bytes = (size_t)words * 4;
  const size_t next_step = at->next_step, meta_bytes = at->groups * ckv_size_of(run->dtype);
  const char *next = at->next, *scale = (const char *)run->scale + (first + DISTANCE * TILE) * meta_bytes;
  const char *min = (const char *)run->min + (first + DISTANCE * TILE) * meta_bytes;
  uint8_t *restrict to = at->codes;
  for (uint32_t i = 0; i < n; i += 4, rows += 4 * row_bytes, to += step, next += 2 * next_step) {
    __builtin_prefetch(next);
    __builtin_prefetch(next + next_step);
    if (s == 0) {
      __builtin_prefetch(scale + i * meta_bytes);
      __builtin_prefetch(min + i * meta_bytes);
    }
    row[0] = rows;
    if (i + 4 <= n) {
      row[1] = rows + row_bytes;
      row[2] = rows + 2 * row_bytes;
      row[3] = rows + 3 * row_bytes;
    } else { /* past the end weights are zero */
      for (uint32_t k = 1; k < 4; k++) row[k] = i + k < n ? row[k - 1] + row_bytes : row[k - 1];
    }
    if (bits >= 4) {
      const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      CKV_UNROLL
      for (uint32_t v = 0; v < bits / 4; v++) {
        __m512i x[4], y[4];
        CKV_UNROLL
        for (uint32_t k = 0; k < 4; k++) {
          const char *from = row[k] + begin + 64 * v;
          x[k] = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(v ? m1 : m0, from);
          x[k] = _mm512_permutexvar_epi32(lanes, x[k]);
        }
        transpose4(x, y);
        CKV_UNROLL
        for (uint32_t k = 0; k < 4; k++)
          _mm512_store_si512(bits == 4 ? to + k * stride : to + (2 * v + k / 2) * stride + k % 2 * 64, y[k]);
      }
      continue;
    }
    const __m256i lanes = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    __m256i x[4], y[4];
    CKV_UNROLL
    for (uint32_t k = 0; k < 4; k++) {
      const char *from = row[k] + begin;
      x[k] = whole ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi8((__mmask32)m0, from);
      x[k] = _mm256_permutevar8x32_epi32(x[k], lanes);
    }
    transpose4_half(x, y);
    __m128i u[4], h[4];
    if (bits == 3) {
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) {
        const char *from = row[k] + high_begin;
        u[k] = whole ? _mm_loadu_si128((const __m128i *)from) : _mm_maskz_loadu_epi8(m_high, from);
      }
      transpose4_quarter(u, h);
    }
    CKV_UNROLL
    for (uint32_t k = 0; k < 4; k++) {
      const __m512i pairs = _mm512_set1_epi8(0x33);
      __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(y[k]), _mm256_srli_epi16(y[k], 2), 1);
      if (bits == 2) {
        codes = _mm512_and_si512(codes, pairs);
      } else {
        /* Dword i is a nibble of dword i / 2 of the high plane; its bits go to bits 2 and 6, the first and third of
         * them or the second and fourth. */
        const __m512i dwords = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
        const __m512i nibble = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 0, 4));
        const __m128i first_third = _mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68);
        const __m128i second_fourth = _mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68);
        const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_broadcastsi128_si256(first_third)),
                                                 _mm256_broadcastsi128_si256(second_fourth), 1);
        __m512i index = _mm512_srlv_epi32(_mm512_permutexvar_epi32(dwords, _mm512_castsi128_si512(h[k])), nibble);
        index = _mm512_and_si512(index, _mm512_set1_epi8(0x0f));
        codes = _mm512_ternarylogic_epi32(codes, pairs, _mm512_shuffle_epi8(table, index), 0xea); /* (a & b) | c */
      }
      _mm512_store_si512(to + k * stride, codes);
    }
  }
  at->next = next;
}

/* ---- products -------------------------------------------------------------------------------------------------- */

/* Adds the products of a strip over a tile. `halves`: vectors of a step, 2 for 8 bits, otherwise 1 with two nibbles a
 * byte. */
CKV_INLINE void strip_sums(const uint8_t *codes, const uint32_t halves, uint32_t n, const int32_t *digits,
                           const float *factors, const uint32_t nq, uint32_t groups, float *sums, size_t sum_stride,
                           memory *at) {
  __m512i sum[QUERIES][2][2]; /* [plane][half] */
  CKV_UNROLL
  for (uint32_t t = 0; t < nq * 4; t++) sum[t / 4][t / 2 % 2][t % 2] = _mm512_setzero_si512();
  const size_t next_step = at->next_step;
  const char *next = at->next;
  for (uint32_t i = 0; i < n; i += 16, digits += SET_DIGITS) {
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
      for (uint32_t t = 0; t < 2 * nq; t++) {
        __m512i y = _mm512_set1_epi32(digits[t / 4 * 16 + 4 * k + t % 4]);
        sum[t / 2][t % 2][0] = _mm512_dpbusd_epi32(sum[t / 2][t % 2][0], x[0], y);
        sum[t / 2][t % 2][1] = _mm512_dpbusd_epi32(sum[t / 2][t % 2][1], x[1], y);
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
      vf all = vf_fma(_mm512_cvtepi32_ps(sum[j][1][h]), vf_set1(256), _mm512_cvtepi32_ps(sum[j][0][h]));
      vf_store(to, vf_fma(all, h && halves == 1 ? factor * vf_set1(0x1p-4f) : factor, vf_load(to)));
    }
  }
}

/* acc[c] += the sums of the channels of a query row, and their groups' mins. */
CKV_INLINE void spread(const ckv_run *run, const memory *at, const float *sums, const float *min_sums, float *acc) {
  /* Where channels 0 ..< 16 and 16 ..< 32 of a strip are; 16 and more are the second half. */
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i first = lane, second = _mm512_add_epi32(lane, _mm512_set1_epi32(16));
  if (run->bits == 4) { /* dword i, half h: channel 2i + h */
    first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  } else if (run->bits < 4) { /* channel 4 (i % 8) + i / 8 + 2h */
    first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
  }
  for (uint32_t s = 0; s < at->strips; s++) {
    const uint32_t c = s * STRIP, n = ckv_min_u32(STRIP, run->dim - c);
    const vf mn = vf_set1(vf_sum(vf_load(min_sums + c / run->group * 16)));
    vf a = vf_load(sums + c), b = vf_load(sums + c + 16);
    vf low = _mm512_permutex2var_ps(a, first, b) + mn, high = _mm512_permutex2var_ps(a, second, b) + mn;
    const uint32_t low_n = ckv_min_u32(16, n), high_n = n - low_n;
    vf_store_n(acc + c, vf_load_n(acc + c, low_n) + low, low_n);
    if (high_n) vf_store_n(acc + c + 16, vf_load_n(acc + c + 16, high_n) + high, high_n);
  }
}

/* ---- all of it ------------------------------------------------------------------------------------------------- */

static void load_tile_meta(const ckv_run *run, uint32_t first, uint32_t n, const memory *at) {
  const void *scale = ckv_offset(run->scale, run->dtype, (size_t)first * at->groups);
  const void *min = ckv_offset(run->min, run->dtype, (size_t)first * at->groups);
  if (run->dtype == CKV_F16) {
    load_meta(scale, CKV_F16, at->groups, n, at->scales);
    load_meta(min, CKV_F16, at->groups, n, at->mins);
  } else {
    load_meta(scale, run->dtype, at->groups, n, at->scales);
    load_meta(min, run->dtype, at->groups, n, at->mins);
  }
}

static void transpose_tile(const ckv_run *run, uint32_t first, uint32_t n, uint32_t s, memory *at) {
  const bool whole = (s + STRIPS) * STRIP <= run->dim;
#define CKV_FOR(bits)                                                                                                \
  (whole ? transpose_codes(run, bits, true, first, n, s, at) : transpose_codes(run, bits, false, first, n, s, at))
  run->bits == 2 ? CKV_FOR(2) : run->bits == 3 ? CKV_FOR(3) : run->bits == 4 ? CKV_FOR(4) : CKV_FOR(8);
#undef CKV_FOR
}

/* Everything of nq query rows over a tile but the transposition. */
CKV_INLINE void fold_tile(memory *at, uint32_t n, const float *p, uint32_t j, const uint32_t nq, size_t ld) {
  fold(at, n, p + j * ld, nq, ld, at->min_sums + (size_t)j * at->groups * 16,
       at->digits + (size_t)(j / QUERIES) * at->groups * GROUP_DIGITS, at->factors + j * at->groups);
}

CKV_INLINE void multiply_tile(const ckv_run *run, memory *at, uint32_t n, uint32_t s, uint32_t j,
                              const uint32_t nq) {
  const size_t sum_stride = (size_t)at->strips * STRIP;
  const uint32_t halves = run->bits == 8 ? 2 : 1;
  const int32_t *digits = at->digits + (size_t)(j / QUERIES) * at->groups * GROUP_DIGITS;
  for (uint32_t k = 0; k < STRIPS && s + k < at->strips; k++) {
    const uint32_t g = (s + k) * STRIP / run->group;
    const uint8_t *codes = at->codes + (size_t)k * STEPS * 64 * halves;
    float *sums = at->sums + j * sum_stride + (s + k) * STRIP;
    const int32_t *d = digits + (size_t)g * GROUP_DIGITS;
    const float *factors = at->factors + j * at->groups + g;
    if (halves == 2) strip_sums(codes, 2, n, d, factors, nq, at->groups, sums, sum_stride, at);
    else strip_sums(codes, 1, n, d, factors, nq, at->groups, sums, sum_stride, at);
  }
}

static void accumulate_chunk(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                             float *acc, size_t acc_stride, memory *at) {
  const size_t sum_stride = (size_t)at->strips * STRIP, min_stride = (size_t)at->groups * 16;
  memset(at->sums, 0, m * sum_stride * sizeof(float));
  memset(at->min_sums, 0, m * min_stride * sizeof(float));
  for (uint32_t i = 0; i < count; i += TILE) {
    const uint32_t n = ckv_min_u32(TILE, count - i);
    const size_t row_bytes = (size_t)ckv_row_words(run->dim, run->bits) * 4, blocks = (at->strips + 3) / 4;
    at->next = (const char *)run->data + (first + i + DISTANCE * TILE) * row_bytes;
    at->next_step = TILE * row_bytes / ((m + 3) / 4 * (16 * at->groups + 32 * at->strips) + 64 * blocks);
    load_tile_meta(run, first + i, n, at);
    for (uint32_t j = 0; j < m; j += QUERIES) {
      switch (ckv_min_u32(QUERIES, m - j)) {
        case 1: fold_tile(at, n, p + i, j, 1, ld); break;
        case 2: fold_tile(at, n, p + i, j, 2, ld); break;
        case 3: fold_tile(at, n, p + i, j, 3, ld); break;
        default: fold_tile(at, n, p + i, j, 4, ld); break;
      }
    }
    for (uint32_t s = 0; s < at->strips; s += STRIPS) {
      transpose_tile(run, first + i, n, s, at);
      for (uint32_t j = 0; j < m; j += QUERIES) {
        switch (ckv_min_u32(QUERIES, m - j)) {
          case 1: multiply_tile(run, at, n, s, j, 1); break;
          case 2: multiply_tile(run, at, n, s, j, 2); break;
          case 3: multiply_tile(run, at, n, s, j, 3); break;
          default: multiply_tile(run, at, n, s, j, 4); break;
        }
      }
    }
  }
  for (uint32_t j = 0; j < m; j++)
    spread(run, at, at->sums + j * sum_stride, at->min_sums + j * min_stride, acc + j * acc_stride);
}

static float *take(float **free, size_t floats) {
  float *p = *free;
  *free += (floats + 15) & ~(size_t)15;
  return p;
}

size_t ckv_sums_scratch_floats(uint32_t dim) {
  size_t strips = ((size_t)dim + STRIP - 1) / STRIP;
  return strips * (CHUNK * (STRIP + 16 + 1) + 2 * TILE + CHUNK / QUERIES * GROUP_DIGITS) + 16 +
         STRIPS * STEPS * 32 + 16;
}

void ckv_accumulate_vnni(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                         float *acc, size_t acc_stride, float *scratch) {
  if (ckv_blocks_accumulate(run, first, count, p, m, ld, acc, acc_stride, scratch)) return;
  if (run->kind != CKV_AFFINE_ROW || run->group % STRIP) {
    ckv_avx512.accumulate(run, first, count, p, m, ld, acc, acc_stride, scratch);
    return;
  }
  if (count == 0 || m == 0) return;
  float *next = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  memory at = {.groups = (run->dim + run->group - 1) / run->group, .strips = (run->dim + STRIP - 1) / STRIP,
               .middle = v_middle(run->bits)};
  at.codes = (uint8_t *)take(&next, STRIPS * STEPS * 32);
  at.digits = (int32_t *)take(&next, (size_t)CHUNK / QUERIES * at.groups * GROUP_DIGITS);
  at.scales = take(&next, (size_t)at.groups * TILE);
  at.mins = take(&next, (size_t)at.groups * TILE);
  at.sums = take(&next, (size_t)CHUNK * at.strips * STRIP);
  at.min_sums = take(&next, (size_t)CHUNK * at.groups * 16);
  at.factors = take(&next, (size_t)CHUNK * at.groups);
  for (uint32_t j = 0; j < m; j += CHUNK)
    accumulate_chunk(run, first, count, p + j * ld, ckv_min_u32(CHUNK, m - j), ld, acc + j * acc_stride, acc_stride,
                     &at);
}

#pragma clang attribute pop
#endif
