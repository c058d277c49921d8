/* logits over CKV_AFFINE_CHANNEL with VNNI, for the level "avx512".
 *
 * dot(q, row) = sum_c (q_c scale_c) code_c + sum_c q_c min_c. The second sum is one number for a group. For the first
 * the folded query q_c scale_c is held in 24-bit fixed point, relative to its largest element, as three signed bytes;
 * the sums of bytes times codes are exact integers. So the error is that of rounding the folded query once, half of
 * 2^-23 of its largest element for every unit of code, about what f32 sums of the same products have.
 *
 * A block is 32 rows, taken 16 at a time: codes are rearranged so that a vector holds four channels (a quad) of 16
 * rows, and vpdpbusd multiplies them by the same four bytes of the folded query and adds them up. A sum of a lane is
 * the sum of a row: nothing is left to add horizontally. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

enum { BLOCK = 32, QUERIES = 4, PLANES = 3 };

/* How far ahead codes and metadata are asked for, in bytes. */
enum { AHEAD = 8192, META_AHEAD = 1024 };

/* The largest magnitude of three signed digits of base 256, with room for rounding. */
static const float full_range = 8355000.0f;

/* The query rows of a block folded with the scale and min of one group. */
typedef struct {
  float *products; /* [16 channels][query row][16] */
  int32_t *digits; /* [16 channels][query row][quad][plane, one unused] */
  vf inverse[QUERIES];
  float factor[QUERIES], bias[QUERIES];
} folded;

/* Within 128 bits: byte k of dword d goes to byte d of dword k. */
CKV_INLINE __m512i transpose_bytes(__m512i x) {
  return _mm512_shuffle_epi8(
      x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

CKV_INLINE void max4(const vf x[4], float out[4]) {
  vf ab = vf_max(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  vf cd = vf_max(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  vf low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  vf high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  vf all = vf_max(low, high);
  __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* First half of folding: the products and what follows from the largest. Apart from the second half because that
 * waits for reductions and a division, which other work can hide. */
CKV_INLINE void fold_products(const ckv_run *run, uint32_t type, uint32_t g, const float *q, const uint32_t nq,
                              size_t q_stride, float scale, folded *f) {
  const uint32_t dim = run->dim;
  vf bias[QUERIES], high[QUERIES];
  CKV_UNROLL
  for (uint32_t j = 0; j < QUERIES; j++) bias[j] = high[j] = vf_zero();
  for (uint32_t c = 0; c < dim; c += 16) {
    uint32_t n = ckv_min_u32(16, dim - c);
    const void *s_at = ckv_offset(run->scale, type, (size_t)g * dim + c);
    const void *mn_at = ckv_offset(run->min, type, (size_t)g * dim + c);
    __builtin_prefetch((const char *)s_at + META_AHEAD);
    __builtin_prefetch((const char *)mn_at + META_AHEAD);
    vf s = vf_load_as_n(s_at, type, n), mn = vf_load_as_n(mn_at, type, n);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf y = vf_load_n(q + j * q_stride + c, n), product = y * s;
      vf_store(f->products + c * QUERIES + 16 * j, product);
      bias[j] = vf_fma(y, mn, bias[j]);
      high[j] = vf_max(vf_abs(product), high[j]);
    }
  }
  float largest[4], sum[4];
  max4(high, largest);
  vf_sum4(bias[0], bias[1], bias[2], bias[3], sum);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    bool vanishes = largest[j] < 1e-30f; /* below what its inverse could scale */
    f->inverse[j] = vf_set1(vanishes ? 0 : full_range / largest[j]);
    f->factor[j] = vanishes ? 0 : scale * (largest[j] * (1 / full_range));
    f->bias[j] = scale * sum[j];
  }
}

/* Second half: the products in fixed point, as signed digits. */
CKV_INLINE void fold_digits(const folded *f, uint32_t dim, const uint32_t nq) {
  const __m512i half = _mm512_set1_epi32(0x808080);
  for (uint32_t c = 0; c < dim; c += 16) {
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      __m512i v = _mm512_cvtps_epi32(vf_load(f->products + c * QUERIES + 16 * j) * f->inverse[j]);
      v = _mm512_xor_si512(_mm512_add_epi32(v, half), half); /* bytes from -128 to 127 */
      _mm512_storeu_si512(f->digits + c * QUERIES + 16 * j, transpose_bytes(v));
    }
  }
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

/* The codes of 16 rows of a block and n <= 16 channels: quads[i] holds channels 4i ..< 4i+4. `words` is the first word
 * row of the block, `top` that of its high plane. Rows: for 8 bits lane * 4 + dword of rows 16 * half ..< +16, for 2
 * and 3 bits dword * 4 + lane of the same. For 4 bits the bytes of all 32 rows: lane * 8 + dword * 2 is the row of
 * the low nibble. Codes of 2 bits stay where they are in their bytes, in lane k larger by 4^k. */
CKV_INLINE void load_quads(const uint32_t *words, const uint32_t *top, uint32_t dim, uint32_t n, const uint32_t bits,
                           const uint32_t half, __m512i quads[4]) {
  __m512i x[4];
  if (bits >= 4) {
    const uint32_t first = bits == 8 ? 4 * half : 0;
    CKV_UNROLL
    for (uint32_t w = 0; w < 4; w++) {
      const uint32_t *from = words + (size_t)(first + w) * dim;
      __builtin_prefetch((const char *)from + AHEAD);
      x[w] = transpose_bytes(vi_load_n(from, n));
    }
    transpose_lanes(x, quads);
    return;
  }
  words += (size_t)half * dim;
  __builtin_prefetch((const char *)words + AHEAD);
  __m512i low = transpose_bytes(vi_load_n(words, n)), high = low;
  if (bits == 3) {
    /* Byte d of the low word is rows 16 * half + 4d ..< +4: a nibble of byte 2 * half + d / 2 of the high word. */
    const __m512i bytes = _mm512_add_epi8(
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 1, 5, 9, 13, 1, 5, 9, 13)),
        _mm512_set1_epi8((char)(2 * half)));
    const __m512i nibble = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 0, 4));
    high = _mm512_srlv_epi32(_mm512_shuffle_epi8(vi_load_n(top, n), bytes), nibble);
  }
  CKV_UNROLL
  for (uint32_t k = 0; k < 4; k++) {
    if (bits == 2) {
      x[k] = _mm512_and_si512(low, _mm512_set1_epi8((char)(3 << 2 * k)));
      continue;
    }
    x[k] = _mm512_and_si512(_mm512_srli_epi16(low, 2 * k), _mm512_set1_epi8(3));
    __m512i third = k < 2 ? _mm512_slli_epi16(high, 2 - k) : _mm512_srli_epi16(high, k - 2);
    x[k] = _mm512_ternarylogic_epi32(x[k], third, _mm512_set1_epi8(4), 0xf8); /* x | (third & 4) */
  }
  transpose_lanes(x, quads);
}

/* The sums of rows: out[half][j]. The halves are taken from a pair of nibbles for 4 bits, otherwise it is one half. */
CKV_INLINE void half_blocks(const uint32_t *words, const uint32_t *top, uint32_t dim, const uint32_t bits,
                            const uint32_t half, const uint32_t halves, const int32_t *digits, const uint32_t nq,
                            vf out[2][QUERIES]) {
  /* With few query rows each sum is split, for the instructions not to wait for each other. */
  const uint32_t split = nq == 1 ? 4 : nq == 2 ? 2 : 1;
  __m512i sum[2][QUERIES][PLANES][4];
  CKV_UNROLL
  for (uint32_t h = half; h < half + halves; h++)
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++)
      CKV_UNROLL
      for (uint32_t i = 0; i < PLANES * 4; i++) sum[h][j][i / 4][i % 4] = _mm512_setzero_si512();
  for (uint32_t c = 0; c < dim; c += 16) {
    __m512i quads[4];
    load_quads(words + c, top + c, dim, ckv_min_u32(16, dim - c), bits, half, quads);
    CKV_UNROLL
    for (uint32_t i = 0; i < 4; i++) {
      __m512i x[2] = {quads[i], quads[i]};
      if (bits == 4) {
        x[0] = _mm512_and_si512(x[0], _mm512_set1_epi8(0x0f));
        x[1] = _mm512_and_si512(x[1], _mm512_set1_epi8((char)0xf0));
      }
      CKV_UNROLL
      for (uint32_t t = 0; t < nq * PLANES; t++) {
        __m512i y = _mm512_set1_epi32(digits[c * QUERIES + t / PLANES * 16 + 4 * i + t % PLANES]);
        CKV_UNROLL
        for (uint32_t h = half; h < half + halves; h++) {
          __m512i *to = &sum[h][t / PLANES][t % PLANES][i % split];
          *to = _mm512_dpbusd_epi32(*to, x[h], y);
        }
      }
    }
  }
  CKV_UNROLL
  for (uint32_t h = half; h < half + halves; h++)
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      __m512i(*s)[4] = sum[h][j];
      CKV_UNROLL
      for (uint32_t i = 1; i < split; i++)
        CKV_UNROLL
        for (uint32_t t = 0; t < PLANES; t++) s[t][0] = _mm512_add_epi32(s[t][0], s[t][i]);
      vf rest = vf_fma(_mm512_cvtepi32_ps(s[1][0]), vf_set1(256), _mm512_cvtepi32_ps(s[0][0]));
      out[h][j] = vf_fma(_mm512_cvtepi32_ps(s[2][0]), vf_set1(65536), rest);
    }
}

/* Rows [begin, end) of block `block` of group g to out, whose first element is row `begin`. */
CKV_INLINE void block_logits(const ckv_run *run, const uint32_t bits, uint32_t g, uint32_t block, uint32_t begin,
                             uint32_t end, const folded *f, const uint32_t nq, float *out, size_t ld) {
  const uint32_t *words = ckv_group_codes(run, g), *top = words, dim = run->dim;
  if (bits == 3) {
    top += (size_t)(run->group / 16 + block) * dim;
    words += (size_t)(2 * block) * dim;
  } else {
    words += (size_t)block * bits * dim;
  }
  vf sums[2][QUERIES];
  if (bits == 4) {
    half_blocks(words, top, dim, bits, 0, 2, f->digits, nq, sums);
  } else {
    half_blocks(words, top, dim, bits, 0, 1, f->digits, nq, sums);
    half_blocks(words, top, dim, bits, 1, 1, f->digits, nq, sums);
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    vf low = sums[0][j], high = sums[1][j], factor = vf_set1(f->factor[j]), bias = vf_set1(f->bias[j]);
    if (bits == 4) { /* even and odd rows; the odd ones' codes were in the high nibble */
      const __m512i zip = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      vf odd = high * vf_set1(0x1p-4f);
      high = _mm512_permutex2var_ps(low, _mm512_add_epi32(zip, _mm512_set1_epi32(8)), odd);
      low = _mm512_permutex2var_ps(low, zip, odd);
    } else if (bits < 4) { /* dword * 4 + lane */
      const __m512i swap = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      low = _mm512_permutexvar_ps(swap, low);
      high = _mm512_permutexvar_ps(swap, high);
    }
    if (bits == 2) factor = factor * _mm512_broadcast_f32x4(_mm_setr_ps(1, 0x1p-2f, 0x1p-4f, 0x1p-6f));
    low = vf_fma(low, factor, bias);
    high = vf_fma(high, factor, bias);
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
CKV_INLINE void channel_logits(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t count, const float *q,
                               const uint32_t nq, size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  const uint32_t padded = (run->dim + 15) & ~15u, end = first + count;
  folded f[2];
  f[0].products = scratch;
  f[1].products = scratch + (size_t)padded * QUERIES;
  f[0].digits = f[1].digits = (int32_t *)(scratch + (size_t)2 * padded * QUERIES);
  uint32_t g = first / run->group, turn = 0;
  fold_products(run, run->dtype, g, q, nq, q_stride, scale, &f[0]);
  for (uint32_t row = first; row < end; g++, turn ^= 1) {
    uint32_t stop = ckv_min_u32(end, (g + 1) * run->group);
    fold_digits(&f[turn], run->dim, nq);
    if (stop < end) fold_products(run, run->dtype, g + 1, q, nq, q_stride, scale, &f[turn ^ 1]);
    while (row < stop) {
      uint32_t in_group = row - g * run->group, block = in_group / BLOCK, begin = in_group % BLOCK;
      uint32_t n = ckv_min_u32(stop - row, BLOCK - begin);
      block_logits(run, bits, g, block, begin, begin + n, &f[turn], nq, out + (row - first), ld);
      row += n;
    }
  }
}

/* All m query rows, four, two and one at a time, over parts of the rows that stay in the cache meanwhile. */
CKV_INLINE void channel_logits_all(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t count,
                                   const float *q, uint32_t m, size_t q_stride, float scale, float *out, size_t ld,
                                   float *scratch) {
  const uint32_t part = m <= QUERIES ? count : 256;
  for (uint32_t i = 0, n; i < count; i += n) {
    n = ckv_min_u32(part, count - i);
    for (uint32_t j = 0, nq; j < m; j += nq) {
      const float *y = q + j * q_stride;
      float *to = out + j * ld + i;
      nq = m - j >= 4 ? 4 : m - j >= 2 ? 2 : 1;
      if (nq == 4) channel_logits(run, bits, first + i, n, y, 4, q_stride, scale, to, ld, scratch);
      else if (nq == 2) channel_logits(run, bits, first + i, n, y, 2, q_stride, scale, to, ld, scratch);
      else channel_logits(run, bits, first + i, n, y, 1, q_stride, scale, to, ld, scratch);
    }
  }
}

void ckv_logits_vnni(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                     float scale, float *out, size_t ld, float *scratch) {
  if (run->kind != CKV_AFFINE_CHANNEL || m >= CKV_MANY_QUERIES)
    ckv_avx512.logits(run, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (count == 0 || m == 0) return;
  else if (run->bits == 2) channel_logits_all(run, 2, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (run->bits == 3) channel_logits_all(run, 3, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (run->bits == 4) channel_logits_all(run, 4, first, count, q, m, q_stride, scale, out, ld, scratch);
  else channel_logits_all(run, 8, first, count, q, m, q_stride, scale, out, ld, scratch);
}

#pragma clang attribute pop
#endif
