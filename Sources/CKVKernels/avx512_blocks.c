/* logits and accumulate over scaled integers and ggml's blocks with VNNI, for the level "avx512", up to
 * CKV_MANY_QUERIES query rows.
 *
 * Codes are made unsigned bytes (a zero point is taken off the sums), queries and weights 16-bit fixed point of two
 * signed digits each, so sums of products are exact integers; what is lost is one rounding of each query element to
 * 1/32639 of the largest of its row, and of each weight to 1/32639 of (the largest weight of 128 rows) times (the
 * largest scale of its block in them).
 *
 * Keys: 16 rows of a block of 32 channels are transposed so that a lane is a row and a vector holds four channels of
 * every row. A sum of a lane is the sum of a row, and the scales of 16 rows are one vector.
 *
 * Values: four rows are interleaved so that a lane is a channel and holds it in all four rows. 128 bits of a vector
 * belong to one block, four blocks (a strip of 128 channels) to a vector, and the digits of weights, which differ from
 * block to block, are written out in that order. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

#include "avx512_fixed.h"

enum { ROWS = 16, QUERIES = 4, BLOCK = 32, TILE = 128, STRIP = 4, AHEAD = 8192 };

/* How the codes of a block are stored. */
enum { BYTES, NIBBLES, FIVES, TABLE };

typedef struct {
  uint32_t form;
  uint32_t codes;  /* bytes of a block before its codes */
  uint32_t fifths; /* before the fifth bits */
  uint32_t bytes;  /* of a block */
  uint32_t zero;   /* the unsigned code of 0, or with minima a middle one: codes are small, and so is what rounding costs */
  bool halves;     /* f16 scales inside the blocks */
  bool has_min;
  bool pairs;      /* a byte holds neighbouring channels, not i and i + 16 */
} b_form;

CKV_INLINE b_form form_of(const uint32_t kind, const uint32_t code) {
  if (kind != CKV_GGML)
    return code == CKV_INT8 ? (b_form){.form = BYTES, .bytes = 32, .zero = 128}
                            : (b_form){.form = NIBBLES, .bytes = 16, .zero = 8, .pairs = true};
  b_form f = {.form = NIBBLES, .codes = 2, .bytes = 18, .zero = 8, .halves = true};
  if (code == CKV_Q8_0) f.form = BYTES, f.bytes = 34, f.zero = 128;
  if (code == CKV_IQ4_NL) f.form = TABLE, f.zero = 128;
  if (code == CKV_Q4_1 || code == CKV_Q5_1) f.has_min = true, f.codes = 4, f.bytes = 20;
  if (code == CKV_Q5_0) f.form = FIVES, f.fifths = 2, f.codes = 6, f.bytes = 22, f.zero = 16;
  if (code == CKV_Q5_1) f.form = FIVES, f.fifths = 4, f.codes = 8, f.bytes = 24, f.zero = 16;
  return f;
}

/* Whether the kernels below take a run. Scales must not change inside a block. */
static bool fits(const ckv_run *run, uint32_t m) {
  if (run->kind < CKV_SCALED_ROW || run->kind > CKV_GGML || run->dim % BLOCK || m >= CKV_MANY_QUERIES) return false;
  if (run->kind == CKV_GGML) return true;
  if (run->code != CKV_INT8 && run->code != CKV_INT4) return false;
  return run->kind != CKV_SCALED_ROW || run->group % BLOCK == 0 || run->group >= run->dim;
}

/* One scale for all blocks of a row. */
CKV_INLINE bool is_uniform(const ckv_run *run) {
  return run->kind == CKV_SCALED_FIXED || run->kind == CKV_SCALED_BLOCK ||
         (run->kind == CKV_SCALED_ROW && run->group >= run->dim);
}

/* The scales of n rows for one block, zeros up to a multiple of 16. */
CKV_INLINE void scales_of(const ckv_run *run, uint32_t first, uint32_t n, uint32_t block, float *to) {
  const uint32_t type = run->dtype, padded = (n + 15) & ~15u;
  if (run->kind == CKV_SCALED_FIXED) {
    for (uint32_t r = 0; r < padded; r++) to[r] = r < n ? run->factor : 0;
    return;
  }
  if (run->kind == CKV_SCALED_BLOCK) {
    for (uint32_t r = 0, k; r < n; r += k) {
      const uint32_t row = first + r;
      k = ckv_min_u32(n - r, run->group - row % run->group);
      const float s = ckv_load_scalar(run->scale, type, row / run->group);
      for (uint32_t i = 0; i < k; i++) to[r + i] = s;
    }
    for (uint32_t r = n; r < padded; r++) to[r] = 0;
    return;
  }
  const uint32_t groups = (run->dim + run->group - 1) / run->group;
  const char *at = ckv_offset(run->scale, type, (size_t)first * groups + block * BLOCK / run->group);
  if (groups == 1) {
    for (uint32_t r = 0; r < padded; r += 16)
      vf_store(to + r, vf_load_as_n(ckv_offset(at, type, r), type, n - r < 16 ? n - r : 16));
    return;
  }
  const size_t step = groups * ckv_size_of(type);
  if (groups == 4 && type != CKV_F32) { /* every fourth of 64 halves */
    const __m512i four = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 60, 56, 52, 48, 44, 40, 36,
                                          32, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i index = _mm512_add_epi16(four, _mm512_set1_epi16((short)(block * BLOCK / run->group)));
    const char *row = ckv_offset(run->scale, type, (size_t)first * 4);
    for (uint32_t r = 0; r < padded; r += 16, row += 128) {
      const uint32_t have = ckv_min_u32(16, n - r) * 4;
      const __mmask64 mask = have == 64 ? ~0ull : (1ull << have) - 1;
      __m512i low = _mm512_maskz_loadu_epi16((__mmask32)mask, row);
      __m512i high = _mm512_maskz_loadu_epi16((__mmask32)(mask >> 32), row + 64);
      __m256i h = _mm512_castsi512_si256(_mm512_permutex2var_epi16(low, index, high));
      vf_store(to + r, type == CKV_F16 ? _mm512_cvtph_ps(h) : v_widen_bf16(h));
    }
    return;
  }
  for (uint32_t r = 0; r < n; r++) to[r] = ckv_load_scalar(at + r * step, type, 0);
  for (uint32_t r = n; r < padded; r++) to[r] = 0;
}

CKV_INLINE __m512i table_bytes(__m512i nibbles) {
  const __m128i values = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153, (char)166,
                                       (char)181, (char)197, (char)217, (char)241);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), nibbles);
}

CKV_INLINE __m128i load128(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }

/* Sixteen bytes of four places. */
CKV_INLINE __m512i load4(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d) {
  __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(load128(a)), load128(b), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(x, load128(c), 2), load128(d), 3);
}

CKV_INLINE __m512i load2(const uint8_t *a, const uint8_t *b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)a)),
                            _mm256_loadu_si256((const __m256i *)b), 1);
}

/* ---- keys -------------------------------------------------------------------------------------------------------- */

/* Queries as digits: [16 channels][pair of query rows][quad][query row of the pair][low, high]. */
typedef struct {
  int32_t *digits;
  int32_t *offsets; /* [block][query row]: -zero times the sum of the query */
  float *sums;      /* [block][query row]: sum of the query over factor, for minima */
  float *scales;    /* [block][row], and minima behind them */
  float factor[QUERIES];
} b_queries;

/* Where position i of a block's codes is in the block. */
CKV_INLINE uint32_t channel_of(const b_form f, uint32_t i) { return f.pairs ? i % 16 * 2 + i / 16 : i; }

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
  if (run->kind != CKV_GGML) run->code == CKV_INT8 ? B_CALL(int8) : B_CALL(int4);
  else if (run->code == CKV_Q8_0) B_CALL(q8_0);
  else if (run->code == CKV_Q5_0) B_CALL(q5_0);
  else if (run->code == CKV_Q5_1) B_CALL(q5_1);
  else if (run->code == CKV_Q4_0) B_CALL(q4_0);
  else if (run->code == CKV_Q4_1) B_CALL(q4_1);
  else B_CALL(iq4_nl);
#undef B_CALL
  return true;
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

/* A tile of one strip. */
typedef struct {
  float *scales;   /* [block][row], divided by the largest of the block */
  float *mins;     /* [block][row] */
  uint8_t *codes;  /* [four rows][vector of 8][64]: vector h * 4 + k has positions 16 h + 4 k ..< + 4 of each block */
  int32_t *digits; /* [four rows][query row][low, high][16]: 128 bits a block */
  float top[STRIP];
} b_tile;

/* The codes of a strip in one row, half h of every block, as unsigned bytes. */
CKV_INLINE __m512i strip_half(const b_form f, const uint8_t *const at[STRIP], const uint32_t h) {
  const size_t codes = f.codes;
  if (f.form == BYTES) {
    const size_t half = codes + 16 * h;
    return _mm512_xor_si512(load4(at[0] + half, at[1] + half, at[2] + half, at[3] + half),
                            _mm512_set1_epi8((char)0x80));
  }
  __m512i x = load4(at[0] + codes, at[1] + codes, at[2] + codes, at[3] + codes);
  if (h) x = _mm512_srli_epi16(x, 4);
  x = _mm512_and_si512(x, _mm512_set1_epi8(15));
  if (f.form == TABLE) return table_bytes(x);
  if (f.form == FIVES) {
    uint32_t bits[4];
    CKV_UNROLL
    for (uint32_t i = 0; i < 4; i++) memcpy(bits + i, at[i] + f.fifths, 4);
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512i high = _mm512_permutexvar_epi32(lane, _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)bits)));
    const char a = (char)(2 * h), b = (char)(2 * h + 1);
    high = _mm512_shuffle_epi8(high,
                               _mm512_broadcast_i32x4(_mm_setr_epi8(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b)));
    __mmask64 set = _mm512_test_epi8_mask(high, _mm512_set1_epi64((long long)0x8040201008040201ull));
    return _mm512_or_si512(x, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(16)));
  }
  return x;
}

CKV_INLINE void interleave(const __m512i x[4], uint8_t *to) {
  __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
  __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, c));
  _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(a, c));
  _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(b, d));
  _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(b, d));
}

/* Codes, scales and minima of n rows of the blocks from b on; rows and blocks that are missing weigh nothing. */
CKV_INLINE void load_tile(const ckv_run *run, const b_form f, uint32_t first, uint32_t n, uint32_t b, b_tile *t) {
  const uint32_t blocks = run->dim / BLOCK, have = ckv_min_u32(STRIP, blocks - b);
  const size_t row_bytes = (size_t)blocks * f.bytes;
  const uint8_t *base = (const uint8_t *)run->data + first * row_bytes + (size_t)b * f.bytes;
  size_t block_at[STRIP];
  CKV_UNROLL
  for (uint32_t i = 0; i < STRIP; i++) block_at[i] = (size_t)ckv_min_u32(i, have - 1) * f.bytes;
  const bool nibbles = f.form == NIBBLES || f.form == TABLE;
  for (uint32_t g = 0; g * 4 < n; g++) {
    __m512i x[4];
    uint8_t *to = t->codes + (size_t)g * 512;
    for (uint32_t h = 0; h < 2; h++) {
      CKV_UNROLL
      for (uint32_t r = 0; r < 4; r++) {
        const uint8_t *row = base + ckv_min_u32(4 * g + r, n - 1) * row_bytes;
        if (h == 0) __builtin_prefetch(row + AHEAD);
        if (h == 0) __builtin_prefetch(row + AHEAD + 64);
        const uint8_t *const at[STRIP] = {row + block_at[0], row + block_at[1], row + block_at[2], row + block_at[3]};
        if (nibbles && h == 0)
          x[r] = load4(at[0] + f.codes, at[1] + f.codes, at[2] + f.codes, at[3] + f.codes);
        else if (!nibbles)
          x[r] = strip_half(f, at, h);
      }
      if (!nibbles) {
        interleave(x, to + h * 256);
        continue;
      }
      /* Both nibbles of a byte stay together until rows are interleaved. */
      interleave(x, to);
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) {
        __m512i y = _mm512_loadu_si512(to + 64 * k), low = _mm512_and_si512(y, _mm512_set1_epi8(15));
        __m512i high = _mm512_and_si512(_mm512_srli_epi16(y, 4), _mm512_set1_epi8(15));
        _mm512_storeu_si512(to + 64 * k, f.form == TABLE ? table_bytes(low) : low);
        _mm512_storeu_si512(to + 256 + 64 * k, f.form == TABLE ? table_bytes(high) : high);
      }
      break;
    }
  }
  const uint32_t padded = (n + 15) & ~15u;
  for (uint32_t i = 0; i < STRIP; i++) {
    float *s = t->scales + i * TILE, *mn = t->mins + i * TILE;
    if (f.halves) {
      uint16_t halves[2][TILE];
      for (uint32_t r = 0; r < n; r++) {
        memcpy(&halves[0][r], base + r * row_bytes + block_at[i], 2);
        if (f.has_min) memcpy(&halves[1][r], base + r * row_bytes + block_at[i] + 2, 2);
      }
      for (uint32_t r = 0; r < padded; r += 16) {
        const uint32_t k = ckv_min_u32(16, n - r);
        vf_store(s + r, vf_load_f16_n(halves[0] + r, k));
        if (f.has_min)
          vf_store(mn + r, vf_fma(vf_set1((float)f.zero), vf_load(s + r), vf_load_f16_n(halves[1] + r, k)));
      }
    } else if (i == 0 || !is_uniform(run)) {
      scales_of(run, first, n, b + ckv_min_u32(i, have - 1), s);
    } else {
      memcpy(s, t->scales, padded * sizeof(float));
      t->top[i] = t->top[0];
      continue;
    }
    vf top = vf_zero();
    for (uint32_t r = 0; r < padded; r += 16) top = vf_max(vf_abs(vf_load(s + r)), top);
    t->top[i] = vf_highest(top);
    const vf down = vf_set1(i < have && t->top[i] > 1e-37f ? 1 / t->top[i] : 0);
    for (uint32_t r = 0; r < padded; r += 16) vf_store(s + r, vf_load(s + r) * down);
  }
}

/* The digits of the weights of the tile, and the sums of weights times minima: mins[block][query row]. */
CKV_INLINE void weigh(const b_form f, uint32_t n, const float *p, const uint32_t nq, size_t ld, const float *up,
                      const b_tile *t, float mins[STRIP][QUERIES]) {
  vf sum[STRIP][QUERIES];
  if (f.has_min)
    CKV_UNROLL
    for (uint32_t i = 0; i < STRIP * QUERIES; i++) sum[i / QUERIES][i % QUERIES] = vf_zero();
  const __m512i base = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 16, 16, 16, 16, 18, 18, 18, 18);
  for (uint32_t r = 0; r < n; r += 16) {
    const uint32_t k = ckv_min_u32(16, n - r);
    vf s[STRIP];
    CKV_UNROLL
    for (uint32_t i = 0; i < STRIP; i++) s[i] = vf_load(t->scales + i * TILE + r);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf weight = vf_load_n(p + j * ld + r, k), scaled = weight * vf_set1(up[j]);
      if (f.has_min)
        CKV_UNROLL
        for (uint32_t i = 0; i < STRIP; i++) sum[i][j] = vf_fma(weight, vf_load(t->mins + i * TILE + r), sum[i][j]);
      __m512i a = v_digits(v_fixed(s[0], scaled), v_fixed(s[1], scaled));
      __m512i b = v_digits(v_fixed(s[2], scaled), v_fixed(s[3], scaled));
      int32_t *to = t->digits + (size_t)(r / 4 * QUERIES + j) * 32;
      CKV_UNROLL
      for (uint32_t g = 0; g < 4; g++)
        CKV_UNROLL
        for (uint32_t plane = 0; plane < 2; plane++)
          _mm512_storeu_si512(
              to + g * QUERIES * 32 + plane * 16,
              _mm512_permutex2var_epi32(a, _mm512_add_epi32(base, _mm512_set1_epi32((int)(4 * g + plane))), b));
    }
  }
  if (f.has_min)
    for (uint32_t i = 0; i < STRIP; i++)
      for (uint32_t j = 0; j < nq; j++) mins[i][j] = vf_sum(sum[i][j]);
}

/* Two vectors of channels, and with `ones` the sums of the weights alone. */
CKV_INLINE void multiply(const b_tile *t, uint32_t groups, const uint32_t vector, const uint32_t vectors,
                         const uint32_t nq, __m512i sum[2][QUERIES]) {
  __m512i low[2][QUERIES], high[2][QUERIES];
  CKV_UNROLL
  for (uint32_t i = 0; i < vectors * nq; i++)
    low[i / nq][i % nq] = high[i / nq][i % nq] = _mm512_setzero_si512();
  const uint8_t *codes = t->codes + 64 * vector;
  const int32_t *digits = t->digits;
  for (uint32_t g = 0; g < groups; g++, codes += 512, digits += QUERIES * 32) {
    __m512i x[2];
    CKV_UNROLL
    for (uint32_t k = 0; k < vectors; k++)
      x[k] = vectors == 1 ? _mm512_set1_epi8(1) : _mm512_loadu_si512(codes + 64 * k);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      __m512i a = _mm512_loadu_si512(digits + j * 32), b = _mm512_loadu_si512(digits + j * 32 + 16);
      CKV_UNROLL
      for (uint32_t k = 0; k < vectors; k++) {
        low[k][j] = _mm512_dpbusd_epi32(low[k][j], x[k], a);
        high[k][j] = _mm512_dpbusd_epi32(high[k][j], x[k], b);
      }
    }
  }
  CKV_UNROLL
  for (uint32_t i = 0; i < vectors * nq; i++)
    sum[i / nq][i % nq] = _mm512_add_epi32(_mm512_slli_epi32(high[i / nq][i % nq], 8), low[i / nq][i % nq]);
}

CKV_INLINE void value_tile(const ckv_run *run, const b_form f, uint32_t first, uint32_t n, const float *p,
                           const uint32_t nq, size_t ld, float *acc, size_t acc_stride, b_tile *t) {
  float up[QUERIES], down[QUERIES], mins[STRIP][QUERIES];
  for (uint32_t j = 0; j < nq; j++) {
    vf top = vf_zero();
    for (uint32_t r = 0; r < n; r += 16) top = vf_max(vf_abs(vf_load_n(p + j * ld + r, ckv_min_u32(16, n - r))), top);
    float most = vf_highest(top);
    up[j] = most > 1e-33f ? v_full_range / most : 0;
    down[j] = most > 1e-33f ? most * (1 / v_full_range) : 0;
  }
  const uint32_t blocks = run->dim / BLOCK, groups = (n + 3) / 4;
  for (uint32_t b = 0; b < blocks; b += STRIP) {
    const uint32_t have = ckv_min_u32(STRIP, blocks - b);
    load_tile(run, f, first, n, b, t);
    weigh(f, n, p, nq, ld, up, t, mins);
    __m512i zero[2][QUERIES], sum[2][QUERIES];
    if (f.zero) {
      multiply(t, groups, 0, 1, nq, zero);
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) zero[0][j] = _mm512_mullo_epi32(zero[0][j], _mm512_set1_epi32((int)f.zero));
    }
    const vf top = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                         _mm512_castps128_ps512(_mm_loadu_ps(t->top)));
    for (uint32_t vector = 0; vector < 8; vector += 2) {
      multiply(t, groups, vector, 2, nq, sum);
      for (uint32_t k = 0; k < 2; k++) {
        const uint32_t position = (vector + k) * 4; /* of the first channel in every block */
        CKV_UNROLL
        for (uint32_t j = 0; j < nq; j++) {
          __m512i whole = f.zero ? _mm512_sub_epi32(sum[k][j], zero[0][j]) : sum[k][j];
          vf x = _mm512_cvtepi32_ps(whole) * (top * vf_set1(down[j]));
          float lanes[16];
          vf_store(lanes, x);
          for (uint32_t i = 0; i < have; i++) {
            float *to = acc + j * acc_stride + (b + i) * BLOCK;
            const __m128 min4 = _mm_set1_ps(f.has_min ? mins[i][j] : 0);
            __m128 four = _mm_add_ps(_mm_loadu_ps(lanes + 4 * i), min4);
            if (f.pairs) {
              _mm_storeu_ps(lanes + 4 * i, four);
              for (uint32_t c = 0; c < 4; c++) to[channel_of(f, position + c)] += lanes[4 * i + c];
            } else {
              _mm_storeu_ps(to + position, _mm_add_ps(_mm_loadu_ps(to + position), four));
            }
          }
        }
      }
    }
  }
}

#define B_VALUES(name, kind, code)                                                                                   \
  static __attribute__((noinline)) void values_##name(const ckv_run *run, uint32_t first, uint32_t n, const float *p, \
                                                      uint32_t nq, size_t ld, float *acc, size_t acc_stride,         \
                                                      b_tile *t) {                                                   \
    const b_form f = form_of(kind, code);                                                                            \
    switch (nq) {                                                                                                    \
      case 1: value_tile(run, f, first, n, p, 1, ld, acc, acc_stride, t); break;                                     \
      case 2: value_tile(run, f, first, n, p, 2, ld, acc, acc_stride, t); break;                                     \
      case 3: value_tile(run, f, first, n, p, 3, ld, acc, acc_stride, t); break;                                     \
      default: value_tile(run, f, first, n, p, 4, ld, acc, acc_stride, t); break;                                    \
    }                                                                                                                \
  }
B_VALUES(int8, CKV_SCALED_ROW, CKV_INT8)
B_VALUES(int4, CKV_SCALED_ROW, CKV_INT4)
B_VALUES(q8_0, CKV_GGML, CKV_Q8_0)
B_VALUES(q5_0, CKV_GGML, CKV_Q5_0)
B_VALUES(q5_1, CKV_GGML, CKV_Q5_1)
B_VALUES(q4_0, CKV_GGML, CKV_Q4_0)
B_VALUES(q4_1, CKV_GGML, CKV_Q4_1)
B_VALUES(iq4_nl, CKV_GGML, CKV_IQ4_NL)

size_t ckv_blocks_scratch_floats(void) {
  return 16 + 2 * STRIP * TILE + TILE / 4 * 512 / 4 + TILE / 4 * QUERIES * 32;
}

bool ckv_blocks_accumulate(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                           float *acc, size_t acc_stride, float *scratch) {
  if (!fits(run, m)) return false;
  b_tile t;
  float *next = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  t.digits = (int32_t *)next;
  t.codes = (uint8_t *)(next + TILE / 4 * QUERIES * 32);
  t.scales = next + TILE / 4 * QUERIES * 32 + TILE / 4 * 512 / 4;
  t.mins = t.scales + STRIP * TILE;
  for (uint32_t i = 0; i < count; i += TILE) {
    const uint32_t n = ckv_min_u32(TILE, count - i);
    for (uint32_t j = 0; j < m; j += QUERIES) {
      const float *weights = p + j * ld + i;
      float *to = acc + j * acc_stride;
      const uint32_t nq = ckv_min_u32(QUERIES, m - j), row = first + i;
#define B_CALL(name) values_##name(run, row, n, weights, nq, ld, to, acc_stride, &t)
      if (run->kind != CKV_GGML) run->code == CKV_INT8 ? B_CALL(int8) : B_CALL(int4);
      else if (run->code == CKV_Q8_0) B_CALL(q8_0);
      else if (run->code == CKV_Q5_0) B_CALL(q5_0);
      else if (run->code == CKV_Q5_1) B_CALL(q5_1);
      else if (run->code == CKV_Q4_0) B_CALL(q4_0);
      else if (run->code == CKV_Q4_1) B_CALL(q4_1);
      else B_CALL(iq4_nl);
#undef B_CALL
    }
  }
  return true;
}

#pragma clang attribute pop
#endif
