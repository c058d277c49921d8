/* accumulate over scaled integers and ggml's blocks with VNNI: see avx512_block_keys.c.
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

#include "avx512_blocks.h"

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
      B_FOR_FORM(run, B_CALL);
#undef B_CALL
    }
  }
  return true;
}

#pragma clang attribute pop
#endif
