/* logits over scaled integers and ggml's blocks with VNNI, for the level "avx512", up to CKV_MANY_QUERIES query
 * rows.
 *
 * Codes are made unsigned bytes (a zero point is taken off the sums), queries and weights 16-bit fixed point of two
 * signed digits each, so sums of products are exact integers; what is lost is one rounding of each query element to
 * 1/32639 of the largest of its row, and of each weight to 1/32639 of (the largest weight of 128 rows) times (the
 * largest scale of its block in them).
 *
 * Keys: 16 rows of a block of 32 channels are transposed so that a lane is a row and a vector holds four channels of
 * every row. A sum of a lane is the sum of a row, and the scales of 16 rows are one vector. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

#include "avx512_fixed.h"

#include "avx512_blocks.h"

/* Queries as digits: [16 channels][pair of query rows][quad][query row of the pair][low, high]. */
typedef struct {
  int32_t *digits;
  int32_t *offsets; /* [block][query row]: -zero times the sum of the query */
  float *sums;      /* [block][query row]: sum of the query over factor, for minima */
  float *scales;    /* [block][row], and minima behind them */
  float factor[QUERIES];
} b_queries;

CKV_INLINE void prepare(const ckv_run *run, const b_form f, const float *q, const uint32_t nq, size_t q_stride,
                        float scale, b_queries *to) {
  const uint32_t dim = run->dim;
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  float up[QUERIES] = {0};
  for (uint32_t j = 0; j < nq; j++) {
    vf high = vf_zero();
    for (uint32_t c = 0; c < dim; c += 16) high = vf_max(vf_abs(vf_load(q + j * q_stride + c)), high);
    float largest = vf_highest(high);
    bool vanishes = largest < 1e-30f; /* below what its inverse could scale */
    up[j] = vanishes ? 0 : v_full_range / largest;
    to->factor[j] = vanishes ? 0 : scale * (largest * (1 / v_full_range));
  }
  for (uint32_t b = 0; b < dim / BLOCK; b++) {
    vf fixed[2][QUERIES];
    for (uint32_t j = 0; j < QUERIES; j++) {
      vf first = vf_zero(), second = vf_zero();
      if (j < nq) {
        const float *from = q + j * q_stride + b * BLOCK;
        first = vf_load(from);
        second = vf_load(from + 16);
        if (f.pairs) {
          vf x = _mm512_permutex2var_ps(first, even, second);
          second = _mm512_permutex2var_ps(first, odd, second);
          first = x;
        }
      }
      fixed[0][j] = v_fixed(first, vf_set1(up[j]));
      fixed[1][j] = v_fixed(second, vf_set1(up[j]));
      __m512i bias = _mm512_castps_si512(vf_set1(12582912.0f + 128.0f));
      __m512i sum = _mm512_add_epi32(_mm512_sub_epi32(_mm512_castps_si512(fixed[0][j]), bias),
                                     _mm512_sub_epi32(_mm512_castps_si512(fixed[1][j]), bias));
      int32_t total = _mm512_reduce_add_epi32(sum);
      to->offsets[b * QUERIES + j] = -(int32_t)f.zero * total;
      to->sums[b * QUERIES + j] = (float)total;
    }
    for (uint32_t h = 0; h < 2; h++)
      for (uint32_t pair = 0; pair < 2; pair++)
        _mm512_storeu_si512(to->digits + ((b * 2 + h) * 2 + pair) * 16,
                            v_digits(fixed[h][2 * pair], fixed[h][2 * pair + 1]));
  }
}

/* Quads of channels of a block in 16 rows: the codes at `at` in each of them. */
CKV_INLINE void load_quads(const b_form f, const uint8_t *const p[ROWS], size_t at, __m512i x[8]) {
  const size_t codes = at + f.codes;
  if (f.form == BYTES) {
    __m512i a[8], b[8];
    CKV_UNROLL
    for (uint32_t i = 0; i < 4; i++) {
      a[i] = load2(p[i] + codes, p[4 + i] + codes);
      a[4 + i] = load2(p[8 + i] + codes, p[12 + i] + codes);
    }
    CKV_UNROLL
    for (uint32_t i = 0; i < 8; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    CKV_UNROLL
    for (uint32_t i = 0; i < 8; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    CKV_UNROLL
    for (uint32_t i = 0; i < 4; i++) {
      x[i] = _mm512_xor_si512(_mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), sign);
      x[4 + i] = _mm512_xor_si512(_mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd), sign);
    }
    return;
  }
  __m512i a[4], b[4];
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i++) a[i] = load4(p[i] + codes, p[4 + i] + codes, p[8 + i] + codes, p[12 + i] + codes);
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  a[0] = _mm512_unpacklo_epi64(b[0], b[2]);
  a[1] = _mm512_unpackhi_epi64(b[0], b[2]);
  a[2] = _mm512_unpacklo_epi64(b[1], b[3]);
  a[3] = _mm512_unpackhi_epi64(b[1], b[3]);
  const __m512i nibble = _mm512_set1_epi8(15);
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i++) {
    x[i] = _mm512_and_si512(a[i], nibble);
    x[4 + i] = _mm512_and_si512(_mm512_srli_epi16(a[i], 4), nibble);
    if (f.form == TABLE) {
      x[i] = table_bytes(x[i]);
      x[4 + i] = table_bytes(x[4 + i]);
    }
  }
  if (f.form == FIVES) {
    uint32_t bits[ROWS];
    CKV_UNROLL
    for (uint32_t r = 0; r < ROWS; r++) memcpy(bits + r, p[r] + at + f.fifths, 4);
    __m512i high = _mm512_loadu_si512(bits);
    CKV_UNROLL
    for (uint32_t k = 0; k < 8; k++) {
      const char byte = (char)(k / 2), shift = (char)(k % 2 * 4);
      __m512i spread = _mm512_shuffle_epi8(
          high, _mm512_broadcast_i32x4(_mm_setr_epi8(byte, byte, byte, byte, (char)(byte + 4), (char)(byte + 4),
                                                     (char)(byte + 4), (char)(byte + 4), (char)(byte + 8),
                                                     (char)(byte + 8), (char)(byte + 8), (char)(byte + 8),
                                                     (char)(byte + 12), (char)(byte + 12), (char)(byte + 12),
                                                     (char)(byte + 12))));
      __mmask64 set = _mm512_test_epi8_mask(spread, _mm512_set1_epi32((int)(0x08040201u << shift)));
      x[k] = _mm512_or_si512(x[k], _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(16)));
    }
  }
}

/* The scales (and minima) of 16 rows, block by block. */
CKV_INLINE void load_scales(const ckv_run *run, const b_form f, const uint8_t *const p[ROWS], uint32_t first, uint32_t n,
                            uint32_t blocks, b_queries *q) {
  if (f.halves) {
    uint16_t *to = (uint16_t *)q->scales;
    for (uint32_t b = 0; b < blocks; b++) {
      CKV_UNROLL
      for (uint32_t r = 0; r < ROWS; r++) {
        const uint8_t *at = p[r] + (size_t)b * f.bytes;
        memcpy(to + b * 32 + r, at, 2);
        if (f.has_min) memcpy(to + b * 32 + 16 + r, at + 2, 2);
      }
    }
    return;
  }
  for (uint32_t b = 0; b < (is_uniform(run) ? 1 : blocks); b++) scales_of(run, first, n, b, q->scales + b * 16);
}

CKV_INLINE void key_rows(const ckv_run *run, const b_form f, uint32_t first, uint32_t n, const uint32_t nq,
                         b_queries *q, float *out, size_t ld) {
  const uint32_t blocks = run->dim / BLOCK;
  const size_t row_bytes = (size_t)blocks * f.bytes;
  const uint8_t *p[ROWS];
  CKV_UNROLL
  for (uint32_t r = 0; r < ROWS; r++) /* past the end the last row again */
    p[r] = (const uint8_t *)run->data + (first + ckv_min_u32(r, n - 1)) * row_bytes;
  for (size_t at = 0; at < row_bytes * ROWS; at += 64) __builtin_prefetch(p[0] + at + AHEAD);
  load_scales(run, f, p, first, n, blocks, q);
  const bool uniform = !f.halves && is_uniform(run);
  vf sum[QUERIES];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) sum[j] = vf_zero();
  for (uint32_t b = 0; b < blocks; b++) {
    __m512i x[8], low[QUERIES], high[QUERIES];
    load_quads(f, p, (size_t)b * f.bytes, x);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      low[j] = _mm512_set1_epi32(q->offsets[b * QUERIES + j]);
      high[j] = _mm512_setzero_si512();
    }
    const int32_t *digits = q->digits + b * 64;
    CKV_UNROLL
    for (uint32_t k = 0; k < 8; k++) {
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) {
        const int32_t *y = digits + (k / 4 * 2 + j / 2) * 16 + k % 4 * 4 + j % 2 * 2;
        low[j] = _mm512_dpbusd_epi32(low[j], x[k], _mm512_set1_epi32(y[0]));
        high[j] = _mm512_dpbusd_epi32(high[j], x[k], _mm512_set1_epi32(y[1]));
      }
    }
    vf s, mn = vf_zero();
    if (f.halves) {
      const uint16_t *at = (const uint16_t *)q->scales + b * 32;
      s = vf_load_f16(at);
      if (f.has_min) mn = vf_fma(vf_set1((float)f.zero), s, vf_load_f16(at + 16));
    } else {
      s = vf_load(q->scales + (uniform ? 0 : b * 16));
    }
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf x16 = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[j], 8), low[j]));
      sum[j] = vf_fma(x16, s, sum[j]);
      if (f.has_min) sum[j] = vf_fma(vf_set1(q->sums[b * QUERIES + j]), mn, sum[j]);
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    vf y = sum[j] * vf_set1(q->factor[j]);
    if (n == ROWS) vf_store(out + j * ld, y);
    else vf_store_n(out + j * ld, y, n);
  }
}

CKV_INLINE void key_logits(const ckv_run *run, const b_form f, uint32_t first, uint32_t count, const float *q,
                           const uint32_t nq, size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  const uint32_t dim = run->dim, blocks = dim / BLOCK;
  b_queries queries = {.digits = (int32_t *)scratch};
  queries.offsets = queries.digits + 2 * dim;
  queries.sums = (float *)(queries.offsets + blocks * QUERIES);
  queries.scales = queries.sums + blocks * QUERIES;
  prepare(run, f, q, nq, q_stride, scale, &queries);
  for (uint32_t i = 0; i < count; i += ROWS)
    key_rows(run, f, first + i, ckv_min_u32(ROWS, count - i), nq, &queries, out + i, ld);
}

#define B_LOGITS(name, kind, code)                                                                                   \
  static __attribute__((noinline)) void logits_##name(const ckv_run *run, uint32_t first, uint32_t count,            \
                                                      const float *q, uint32_t m, size_t q_stride, float scale,      \
                                                      float *out, size_t ld, float *scratch) {                       \
    const b_form f = form_of(kind, code);                                                                            \
    for (uint32_t j = 0; j < m; j += QUERIES) {                                                                      \
      const float *y = q + j * q_stride;                                                                             \
      float *to = out + j * ld;                                                                                      \
      switch (ckv_min_u32(QUERIES, m - j)) {                                                                         \
        case 1: key_logits(run, f, first, count, y, 1, q_stride, scale, to, ld, scratch); break;                     \
        case 2: key_logits(run, f, first, count, y, 2, q_stride, scale, to, ld, scratch); break;                     \
        case 3: key_logits(run, f, first, count, y, 3, q_stride, scale, to, ld, scratch); break;                     \
        default: key_logits(run, f, first, count, y, 4, q_stride, scale, to, ld, scratch); break;                    \
      }                                                                                                              \
    }                                                                                                                \
  }
B_LOGITS(int8, CKV_SCALED_ROW, CKV_INT8)
B_LOGITS(int4, CKV_SCALED_ROW, CKV_INT4)
B_LOGITS(q8_0, CKV_GGML, CKV_Q8_0)
B_LOGITS(q5_0, CKV_GGML, CKV_Q5_0)
B_LOGITS(q5_1, CKV_GGML, CKV_Q5_1)
B_LOGITS(q4_0, CKV_GGML, CKV_Q4_0)
B_LOGITS(q4_1, CKV_GGML, CKV_Q4_1)
B_LOGITS(iq4_nl, CKV_GGML, CKV_IQ4_NL)

bool ckv_blocks_logits(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m,
                       size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  if (!fits(run, m)) return false;
  if (count == 0 || m == 0) return true;
#define B_CALL(name) logits_##name(run, first, count, q, m, q_stride, scale, out, ld, scratch)
  B_FOR_FORM(run, B_CALL);
#undef B_CALL
  return true;
}

#pragma clang attribute pop
#endif
