/* logits over CKV_AFFINE_CHANNEL with VNNI, for the level "avx512".
 *
 * dot(q, row) = sum_c (q_c scale_c) code_c + sum_c q_c min_c. The second sum is one number for a group. For the first
 * the folded query q_c scale_c is held in fixed point, relative to its largest element, as two signed bytes or, with
 * products of eight bits, one; the sums of bytes times codes are exact integers. The error is that of rounding the folded
 * query once (ckv.h).
 *
 * A block is 32 rows: codes are rearranged so that a vector holds four channels (a quad) of 16 rows, and vpdpbusd
 * multiplies them by the same four bytes of the folded query and adds them up. A sum of a lane is the sum of a row:
 * nothing is left to add horizontally. Codes of 2 and 3 bits become nibbles first, once for all query rows. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

#include "avx512_fixed.h"

enum { BLOCK = 32, DWORDS = COLUMNS * 4 /* of digits for 16 channels */ };

/* How far ahead codes and metadata are asked for, in bytes. */
enum { AHEAD = 8192, META_AHEAD = 1024 };

/* The query rows of a block folded with the scale and min of one group. */
typedef struct {
  int32_t *digits; /* [16 channels][four columns][quad][column] */
  float inverse[COLUMNS], factor[COLUMNS], bias[COLUMNS];
} folded;

/* Within 128 bits: byte k of dword d goes to byte d of dword k. */
CKV_INLINE __m512i transpose_bytes(__m512i x) {
  return _mm512_shuffle_epi8(
      x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

/* Bias and the largest product of n <= 16 channels from c on. */
CKV_INLINE void range_step(const ckv_run *run, const uint32_t bits, const uint32_t type, uint32_t g, uint32_t c,
                           const uint32_t n, const float *q, const uint32_t nq, size_t q_stride, vf bias[COLUMNS],
                           vf high[COLUMNS]) {
  const char *s_at = ckv_offset(run->scale, type, (size_t)g * run->dim + c);
  const char *mn_at = ckv_offset(run->min, type, (size_t)g * run->dim + c);
  __builtin_prefetch(s_at + META_AHEAD);
  __builtin_prefetch(mn_at + META_AHEAD);
  const vf s = vf_load_as_n(s_at, type, n);
  const vf mn = vf_fma(s, vf_set1(ckv_middle(bits)), vf_load_as_n(mn_at, type, n));
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    vf y = n == 16 ? vf_load(q + j * q_stride + c) : vf_load_n(q + j * q_stride + c, n);
    bias[j] = vf_fma(y, mn, bias[j]);
    high[j] = _mm512_range_ps(y * s, high[j], 0x0b); /* the larger magnitude */
  }
}

/* First half of folding: what follows from the largest product. Apart from the second half because that waits for
 * reductions and a division, which other work can hide. */
CKV_INLINE void find_range(const ckv_run *run, const uint32_t bits, const uint32_t digits, const uint32_t type,
                           uint32_t g, const float *q, const uint32_t nq, size_t q_stride, float scale, folded *f) {
  vf bias[COLUMNS], high[COLUMNS];
  CKV_UNROLL
  for (uint32_t j = 0; j < COLUMNS; j++) bias[j] = high[j] = vf_zero();
  uint32_t c = 0;
  for (; c + 16 <= run->dim; c += 16) range_step(run, bits, type, g, c, 16, q, nq, q_stride, bias, high);
  if (c < run->dim) range_step(run, bits, type, g, c, run->dim - c, q, nq, q_stride, bias, high);
  float largest[COLUMNS], sum[COLUMNS], down[COLUMNS];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j += 4) {
    vf_max4(high[j], high[j + 1], high[j + 2], high[j + 3], largest + j);
    vf_sum4(bias[j], bias[j + 1], bias[j + 2], bias[j + 3], sum + j);
  }
  v_fixed_scales(largest, nq, digits, f->inverse, down);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    f->factor[j] = scale * down[j];
    f->bias[j] = scale * sum[j];
  }
}

CKV_INLINE void digits_step(const ckv_run *run, const uint32_t digits, const uint32_t type, uint32_t g, uint32_t c,
                            const uint32_t n, const float *q, const uint32_t nq, size_t q_stride, const folded *f,
                            __m512i sum[2]) {
  const vf s = vf_load_as_n(ckv_offset(run->scale, type, (size_t)g * run->dim + c), type, n);
  vf x[COLUMNS], up[COLUMNS];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    const float *y = q + j * q_stride + c;
    x[j] = (n == 16 ? vf_load(y) : vf_load_n(y, n)) * s;
    up[j] = vf_set1(f->inverse[j]);
  }
  v_columns(x, up, nq, digits, f->digits + c / 16 * DWORDS, sum);
}

/* Second half: the products in fixed point, as signed digits. */
CKV_INLINE void fold_digits(const ckv_run *run, const uint32_t bits, const uint32_t digits, const uint32_t type,
                            uint32_t g, const float *q, const uint32_t nq, size_t q_stride, folded *f) {
  __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  uint32_t c = 0;
  for (; c + 16 <= run->dim; c += 16) digits_step(run, digits, type, g, c, 16, q, nq, q_stride, f, sum);
  if (c < run->dim) digits_step(run, digits, type, g, c, run->dim - c, q, nq, q_stride, f, sum);
  float totals[COLUMNS];
  v_column_totals(sum, nq, digits, totals);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) f->bias[j] -= f->factor[j] * (ckv_middle(bits) * totals[j]);
}

/* to[i], lane k = from[k], lane i, of 128 bits. */
CKV_INLINE void transpose_lanes(const __m512i from[4], __m512i to[4]) {
  __m512i a = _mm512_shuffle_i32x4(from[0], from[1], 0x44), b = _mm512_shuffle_i32x4(from[0], from[1], 0xee);
  __m512i c = _mm512_shuffle_i32x4(from[2], from[3], 0x44), d = _mm512_shuffle_i32x4(from[2], from[3], 0xee);
  to[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  to[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  to[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  to[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/* The same from four rows of words in memory, `dim` words apart. Moving 128 bits across lanes competes with the
 * multiplications; half of it is done by loads. */
CKV_INLINE void load_lanes(const uint32_t *from, uint32_t dim, __m512i to[4]) {
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i += 2, from += 8) {
    __m512i even = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from));
    __m512i odd = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(from + dim)));
    even = _mm512_inserti64x4(even, _mm256_loadu_si256((const __m256i *)(from + 2 * (size_t)dim)), 1);
    odd = _mm512_inserti64x4(odd, _mm256_loadu_si256((const __m256i *)(from + 3 * (size_t)dim)), 1);
    to[i] = _mm512_mask_permutex_epi64(even, 0xcc, odd, 0x44);
    to[i + 1] = _mm512_mask_permutex_epi64(odd, 0x33, even, 0xee);
  }
}

/* Codes of 2 bits of two rows of words, 16 channels each, as nibbles: lanes are the words, their low and high pairs. */
CKV_INLINE void load_pairs(const uint32_t *from, uint32_t dim, __m512i to[4]) {
  const __m512i down = _mm512_set_epi64(0x0002000200020002, 0x0002000200020002, 0, 0, 0x0002000200020002,
                                        0x0002000200020002, 0, 0);
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i++, from += 4) {
    __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)from));
    x = _mm512_mask_broadcast_i32x4(x, 0xff00, _mm_loadu_si128((const __m128i *)(from + dim)));
    to[i] = _mm512_and_si512(_mm512_srlv_epi16(x, down), _mm512_set1_epi8(0x33));
  }
}

/* Codes of 3 bits of 32 rows as nibbles: of the low plane's words and the high plane's. Nibble h of byte k of word w
 * is row 4 b + 2 h + w % 2, b = 2 (0 2 1 3)[k] + w / 2: see `places`. */
CKV_INLINE void nibbles_of_3(__m512i low0, __m512i low1, __m512i high, __m512i x[4]) {
  const __m512i bytes = _mm512_set1_epi16(0x00ff), pairs = _mm512_set1_epi8(0x33), nibble = _mm512_set1_epi8(0x0f);
  /* Four bits to bits 2 and 6: the first and third, the second and fourth. */
  const __m512i spread0 =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
  const __m512i spread1 =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
  const __m512i middle = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  high = _mm512_shuffle_epi8(high, middle);
  const __m512i h[2] = {_mm512_and_si512(high, nibble), _mm512_and_si512(_mm512_srli_epi16(high, 4), nibble)};
  /* Even bytes and odd bytes of both words; 0xca is a ? b : c. */
  const __m512i l[2] = {_mm512_ternarylogic_epi32(bytes, low0, _mm512_slli_epi16(low1, 8), 0xca),
                        _mm512_ternarylogic_epi32(bytes, _mm512_srli_epi16(low0, 8), low1, 0xca)};
  CKV_UNROLL
  for (uint32_t i = 0; i < 2; i++) { /* 0xea is (a & b) | c */
    x[2 * i] = _mm512_ternarylogic_epi32(l[i], pairs, _mm512_shuffle_epi8(spread0, h[i]), 0xea);
    __m512i odd = _mm512_srli_epi16(l[i], 2);
    x[2 * i + 1] = _mm512_ternarylogic_epi32(odd, pairs, _mm512_shuffle_epi8(spread1, h[i]), 0xea);
  }
}

/* The codes of a block and n <= 16 channels: vector i of a half holds channels 4i ..< 4i+4 of 16 rows. `words` is the
 * first word row of the block, `top` that of its high plane. For 8 bits the halves are rows 0 ..< 16 and 16 ..< 32,
 * otherwise low and high nibbles, the high ones where they stand; `places` says of which rows. */
CKV_INLINE void load_quads(const uint32_t *words, const uint32_t *top, uint32_t dim, const uint32_t n,
                           const uint32_t bits, __m512i quads[2][4]) {
  const uint32_t planes = bits == 3 ? 2 : bits;
  if (n == 16 && bits == 2) {
    __builtin_prefetch((const char *)words + AHEAD);
    __builtin_prefetch((const char *)(words + dim) + AHEAD);
    load_pairs(words, dim, quads[0]);
    CKV_UNROLL
    for (uint32_t i = 0; i < 4; i++) quads[0][i] = transpose_bytes(quads[0][i]);
  } else if (n == 16 && bits >= 4) {
    CKV_UNROLL
    for (uint32_t h = 0; h < bits / 4; h++) {
      const uint32_t *from = words + 4 * h * (size_t)dim;
      CKV_UNROLL
      for (uint32_t w = 0; w < 4; w++) __builtin_prefetch((const char *)(from + w * (size_t)dim) + AHEAD);
      load_lanes(from, dim, quads[h]);
      CKV_UNROLL
      for (uint32_t i = 0; i < 4; i++) quads[h][i] = transpose_bytes(quads[h][i]);
    }
  } else {
    __m512i x[8];
    CKV_UNROLL
    for (uint32_t w = 0; w < planes; w++) {
      const uint32_t *from = words + (size_t)w * dim;
      __builtin_prefetch((const char *)from + AHEAD);
      x[w] = vi_load_n(from, n);
    }
    if (bits == 3) {
      __builtin_prefetch((const char *)top + AHEAD);
      nibbles_of_3(x[0], x[1], vi_load_n(top, n), x);
    }
    if (bits == 2) {
      const __m512i pairs = _mm512_set1_epi8(0x33);
      x[3] = _mm512_and_si512(_mm512_srli_epi16(x[1], 2), pairs);
      x[2] = _mm512_and_si512(x[1], pairs);
      x[1] = _mm512_and_si512(_mm512_srli_epi16(x[0], 2), pairs);
      x[0] = _mm512_and_si512(x[0], pairs);
    }
    CKV_UNROLL
    for (uint32_t w = 0; w < (bits == 8 ? 8 : 4); w++) x[w] = transpose_bytes(x[w]);
    transpose_lanes(x, quads[0]);
    if (bits == 8) transpose_lanes(x + 4, quads[1]);
  }
  if (bits == 8) return;
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i++) {
    quads[1][i] = _mm512_and_si512(quads[0][i], _mm512_set1_epi8((char)0xf0));
    quads[0][i] = _mm512_and_si512(quads[0][i], _mm512_set1_epi8(0x0f));
  }
}

typedef struct {
  __m512i of[2][COLUMNS][4]; /* [half][column], and parts of a sum */
} block_sums;

/* With few columns each sum is split, for the instructions not to wait for each other. */
CKV_INLINE uint32_t split_of(uint32_t columns) { return columns <= 2 ? 4 : columns <= 4 ? 2 : 1; }

CKV_INLINE void add_channels(const uint32_t *words, const uint32_t *top, uint32_t dim, const uint32_t n,
                             const uint32_t bits, const int32_t *digits, const uint32_t columns, block_sums *sum) {
  __m512i quads[2][4];
  load_quads(words, top, dim, n, bits, quads);
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i++)
    CKV_UNROLL
    for (uint32_t t = 0; t < columns; t++) {
      __m512i y = _mm512_set1_epi32(digits[t / 4 * 16 + 4 * i + t % 4]);
      CKV_UNROLL
      for (uint32_t h = 0; h < 2; h++) {
        __m512i *to = &sum->of[h][t][i % split_of(columns)];
        *to = _mm512_dpbusd_epi32(*to, quads[h][i], y);
      }
    }
}

/* The sums of rows: out[half][j]. */
CKV_INLINE void half_blocks(const uint32_t *words, const uint32_t *top, uint32_t dim, const uint32_t bits,
                            const uint32_t digits, const int32_t *columns, const uint32_t nq, vf out[2][COLUMNS]) {
  const uint32_t count = nq * digits, split = split_of(count);
  block_sums sum;
  CKV_UNROLL
  for (uint32_t t = 0; t < 2 * count; t++)
    CKV_UNROLL
    for (uint32_t i = 0; i < split; i++) sum.of[t % 2][t / 2][i] = _mm512_setzero_si512();
  uint32_t c = 0;
  for (; c + 16 <= dim; c += 16, columns += DWORDS)
    add_channels(words + c, top + c, dim, 16, bits, columns, count, &sum);
  if (c < dim) add_channels(words + c, top + c, dim, dim - c, bits, columns, count, &sum);
  CKV_UNROLL
  for (uint32_t t = 0; t < 2 * nq; t++) {
    __m512i all[2];
    CKV_UNROLL
    for (uint32_t d = 0; d < digits; d++) {
      __m512i *parts = sum.of[t % 2][t / 2 * digits + d];
      all[d] = parts[0];
      CKV_UNROLL
      for (uint32_t i = 1; i < split; i++) all[d] = _mm512_add_epi32(all[d], parts[i]);
    }
    out[t % 2][t / 2] = v_joined(all, digits);
  }
}

/* Where the sums of rows 0 ..< 16 (index 0) and 16 ..< 32 of a block lie in its halves; 16 and more are the second. */
static const uint8_t places[4][2][16] = {
    /* 2 bits: lane 4 w + k of half h is row 16 (w / 2) + w % 2 + 4 k + 2 h */
    {{0, 4, 16, 20, 1, 5, 17, 21, 2, 6, 18, 22, 3, 7, 19, 23},
     {8, 12, 24, 28, 9, 13, 25, 29, 10, 14, 26, 30, 11, 15, 27, 31}},
    /* 3 bits: see nibbles_of_3 */
    {{0, 4, 16, 20, 8, 12, 24, 28, 2, 6, 18, 22, 10, 14, 26, 30},
     {1, 5, 17, 21, 9, 13, 25, 29, 3, 7, 19, 23, 11, 15, 27, 31}},
    /* 4 bits: row 8 w + 2 k + h */
    {{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
     {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}},
    {{0}, {0}},
};

/* Rows [begin, end) of block `block` of group g to out, whose first element is row `begin`. */
CKV_INLINE void block_logits(const ckv_run *run, const uint32_t bits, const uint32_t digits, uint32_t g,
                             uint32_t block, uint32_t begin, uint32_t end, const folded *f, const uint32_t nq,
                             float *out, size_t ld) {
  const uint32_t *words = ckv_group_codes(run, g), *top = words, dim = run->dim;
  if (bits == 3) {
    top += (size_t)(run->group / 16 + block) * dim;
    words += (size_t)(2 * block) * dim;
  } else {
    words += (size_t)block * bits * dim;
  }
  vf sums[2][COLUMNS];
  half_blocks(words, top, dim, bits, digits, f->digits, nq, sums);
  const uint8_t(*place)[16] = places[bits - 2 < 3 ? bits - 2 : 3];
  const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)place[0]));
  const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)place[1]));
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    vf factor = vf_set1(f->factor[j]), bias = vf_set1(f->bias[j]);
    vf low = vf_fma(sums[0][j], factor, bias);
    vf high = vf_fma(sums[1][j], bits == 8 ? factor : factor * vf_set1(0x1p-4f), bias);
    if (bits != 8) {
      vf rows = _mm512_permutex2var_ps(low, first, high);
      high = _mm512_permutex2var_ps(low, second, high);
      low = rows;
    }
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
CKV_INLINE void channel_logits(const ckv_run *run, const uint32_t bits, const uint32_t digits, const uint32_t type,
                               uint32_t first, uint32_t count, const float *q, const uint32_t nq, size_t q_stride,
                               float scale, float *out, size_t ld, float *scratch) {
  const uint32_t end = first + count;
  folded f[2];
  f[0].digits = f[1].digits = (int32_t *)scratch;
  uint32_t g = first / run->group, turn = 0;
  find_range(run, bits, digits, type, g, q, nq, q_stride, scale, &f[0]);
  for (uint32_t row = first; row < end; g++, turn ^= 1) {
    uint32_t stop = ckv_min_u32(end, (g + 1) * run->group);
    fold_digits(run, bits, digits, type, g, q, nq, q_stride, &f[turn]);
    if (stop < end) find_range(run, bits, digits, type, g + 1, q, nq, q_stride, scale, &f[turn ^ 1]);
    while (row < stop) {
      uint32_t in_group = row - g * run->group, block = in_group / BLOCK, begin = in_group % BLOCK;
      uint32_t n = ckv_min_u32(stop - row, BLOCK - begin);
      block_logits(run, bits, digits, g, block, begin, begin + n, &f[turn], nq, out + (row - first), ld);
      row += n;
    }
  }
}

/* A function for every width, number of digits and number of query rows; one digit is for metadata in f16 only. Together
 * they would be functions that compilers, with sanitizers above all, take minutes for. */
typedef void logits_of_rows(const ckv_run *run, uint32_t first, uint32_t count, const float *q, size_t q_stride,
                            float scale, float *out, size_t ld, float *scratch);

#define CKV_ROWS(bits, digits, nq)                                                                                   \
  static __attribute__((noinline)) void logits_##bits##_##digits##_##nq(                                             \
      const ckv_run *run, uint32_t first, uint32_t count, const float *q, size_t q_stride, float scale, float *out,  \
      size_t ld, float *scratch) {                                                                                   \
    if (digits == 1 || run->dtype == CKV_F16)                                                                        \
      channel_logits(run, bits, digits, CKV_F16, first, count, q, nq, q_stride, scale, out, ld, scratch);            \
    else channel_logits(run, bits, digits, run->dtype, first, count, q, nq, q_stride, scale, out, ld, scratch);      \
  }
#define CKV_FEW_ROWS(bits, digits) \
  CKV_ROWS(bits, digits, 1) CKV_ROWS(bits, digits, 2) CKV_ROWS(bits, digits, 3) CKV_ROWS(bits, digits, 4)
#define CKV_BITS(bits) CKV_FEW_ROWS(bits, 1) CKV_ROWS(bits, 1, 8) CKV_FEW_ROWS(bits, 2)
CKV_BITS(2)
CKV_BITS(3)
CKV_BITS(4)
CKV_BITS(8)

/* All m query rows, eight columns at a time and the rest, over parts of the rows that stay in the cache meanwhile.
 * rows[n]: the function for n query rows, or for 8 at 0. */
static void logits_all(logits_of_rows *const rows[5], const uint32_t digits, const ckv_run *run, uint32_t first,
                       uint32_t count, const float *q, uint32_t m, size_t q_stride, float scale, float *out, size_t ld,
                       float *scratch) {
  const uint32_t part = m <= v_rows_together(digits) ? count : 256;
  for (uint32_t i = 0, n; i < count; i += n) {
    n = ckv_min_u32(part, count - i);
    for (uint32_t j = 0, nq; j < m; j += nq) {
      nq = digits == 1 && m - j >= 8 ? 8 : ckv_min_u32(4, m - j);
      rows[nq % 8](run, first + i, n, q + j * q_stride, q_stride, scale, out + j * ld + i, ld, scratch);
    }
  }
}

#define CKV_TABLE(bits, digits, eight) \
  {eight, logits_##bits##_##digits##_1, logits_##bits##_##digits##_2, logits_##bits##_##digits##_3, \
   logits_##bits##_##digits##_4}
static logits_of_rows *const one_digit[4][5] = {CKV_TABLE(2, 1, logits_2_1_8), CKV_TABLE(3, 1, logits_3_1_8),
                                                CKV_TABLE(4, 1, logits_4_1_8), CKV_TABLE(8, 1, logits_8_1_8)};
static logits_of_rows *const two_digits[4][5] = {CKV_TABLE(2, 2, NULL), CKV_TABLE(3, 2, NULL), CKV_TABLE(4, 2, NULL),
                                                 CKV_TABLE(8, 2, NULL)};

static void logits_digits(const uint32_t digits, const ckv_run *run, uint32_t first, uint32_t count, const float *q,
                          uint32_t m, size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  if (ckv_blocks_logits(run, digits, first, count, q, m, q_stride, scale, out, ld, scratch)) return;
  if (run->kind != CKV_AFFINE_CHANNEL) {
    ckv_avx512.logits(run, first, count, q, m, q_stride, scale, out, ld, scratch);
    return;
  }
  if (count == 0 || m == 0) return;
  const uint32_t width = run->bits == 8 ? 3 : run->bits - 2;
  if (digits == 1 && run->dtype == CKV_F16)
    logits_all(one_digit[width], 1, run, first, count, q, m, q_stride, scale, out, ld, scratch);
  else logits_all(two_digits[width], 2, run, first, count, q, m, q_stride, scale, out, ld, scratch);
}

void ckv_logits_vnni(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                     float scale, float *out, size_t ld, float *scratch) {
  logits_digits(2, run, first, count, q, m, q_stride, scale, out, ld, scratch);
}

void ckv_logits_vnni_digit(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m,
                           size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  logits_digits(1, run, first, count, q, m, q_stride, scale, out, ld, scratch);
}

#pragma clang attribute pop
#endif
