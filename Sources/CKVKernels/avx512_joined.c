/* joined_logits for the level "avx512": keys of several heads side by side, affine rows behind a Walsh-Hadamard
 * transform and an order of channels, before their rotary embedding.
 *
 * Sixteen rows at a time, one a lane: a vector is a channel of all of them. So a channel goes to its place by where it
 * is stored, all butterflies are additions of whole vectors, the turn of a pair of channels is four products, and the
 * sums of the lanes are logits. A transform of 512 channels stays in the first-level cache. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

#include "avx512_blocks.h"

enum { LANES = 16, TOGETHER = 8 /* query rows */ };

/* Where the numbers of sixteen rows are: [channel][row], [group][row]. */
typedef struct {
  float *channels, *scales, *mins;
} j_tile;

/* The codes in 32 bits of every row, `per` of them, to their channels from c on. */
CKV_INLINE void put_codes(__m512i words, __m512i thirds, const uint32_t bits, uint32_t c, vf s, vf mn,
                          const uint32_t *order, float *to) {
  const uint32_t low = bits == 3 ? 2 : bits, per = 32 / low;
  const __m512i mask = _mm512_set1_epi32((1 << low) - 1);
  CKV_UNROLL
  for (uint32_t k = 0; k < per; k++) {
    __m512i code = _mm512_srli_epi32(words, k * low);
    if ((k + 1) * low < 32) code = _mm512_and_si512(code, mask);
    if (bits == 3) { /* 0xf8 is a | (b & c) */
      const uint32_t at = c % 32 + k;
      const __m512i third = at >= 2 ? _mm512_srl_epi32(thirds, _mm_cvtsi32_si128((int)at - 2))
                                    : _mm512_sll_epi32(thirds, _mm_cvtsi32_si128(2 - (int)at));
      code = _mm512_ternarylogic_epi32(code, third, _mm512_set1_epi32(4), 0xf8);
    }
    vf_store(to + (size_t)(order ? order[c + k] : c + k) * LANES, vf_fma(_mm512_cvtepi32_ps(code), s, mn));
  }
}

/* Channels [begin, end) of sixteen rows at p, multiples of 32. */
CKV_INLINE void put_rows(const ckv_run *run, const uint32_t bits, const uint8_t *p, size_t step, uint32_t begin,
                         uint32_t end, const uint32_t *order, const j_tile *t) {
  const uint32_t bytes = bits == 3 ? 8 : 4 * bits, groups = groups_of(run);
  for (uint32_t c = begin; c < end; c += BLOCK) {
    const uint32_t g = groups == 1 ? 0 : c / run->group;
    const vf s = vf_load(t->scales + g * LANES), mn = vf_load(t->mins + g * LANES);
    const uint8_t *at = p + (size_t)c / BLOCK * bytes;
    __m512i x[8], thirds = _mm512_setzero_si512();
    if (bits == 3) thirds = gather4(p + run->dim / 4 + c / 8, step);
    if (bits <= 3) transpose8(at, step, x);
    else transpose16(at, step, x);
    if (bits == 8) transpose16(at + 16, step, x + 4);
    const uint32_t words = bytes / 4;
    const uint8_t *next = p + LANES * step + (size_t)c / BLOCK * bytes * LANES;
    CKV_UNROLL
    for (uint32_t w = 0; w < words; w++) {
      __builtin_prefetch(next + 64 * w);
      put_codes(x[w], thirds, bits, c + w * (BLOCK / words), s, mn, order, t->channels);
    }
  }
}

/* One to three stages of butterflies over distances h, 2 h, 4 h: n = 2, 4 or 8 vectors at a time. */
CKV_INLINE void butterflies(float *x, uint32_t block, uint32_t h, const uint32_t n) {
  const size_t apart = (size_t)h * LANES;
  for (uint32_t i = 0; i < block; i += n * h) {
    for (uint32_t j = i; j < i + h; j++) {
      float *at = x + (size_t)j * LANES;
      vf a[8], b[8];
      CKV_UNROLL
      for (uint32_t t = 0; t < n; t++) a[t] = vf_load(at + t * apart);
      CKV_UNROLL
      for (uint32_t d = 1; d < n; d *= 2) {
        CKV_UNROLL
        for (uint32_t t = 0; t < n; t++) b[t] = t & d ? a[t ^ d] - a[t] : a[t] + a[t ^ d];
        CKV_UNROLL
        for (uint32_t t = 0; t < n; t++) a[t] = b[t];
      }
      CKV_UNROLL
      for (uint32_t t = 0; t < n; t++) vf_store(at + t * apart, a[t]);
    }
  }
}

static __attribute__((noinline)) void transform(float *x, uint32_t block) {
  uint32_t h = 1;
  for (; h * 8 <= block; h *= 8) butterflies(x, block, h, 8);
  if (h * 4 == block) butterflies(x, block, h, 4);
  if (h * 2 == block) butterflies(x, block, h, 2);
}

/* Logits of sixteen rows for nq query rows. `x`: the head's channels. */
CKV_INLINE void head_logits(const float *x, const ckv_turns *turns, uint32_t offset, uint32_t dim, const float *q,
                            const uint32_t nq, size_t q_stride, float scale, float *out, size_t ld, uint32_t n) {
  const float *cosines = turns->cosines + offset, *sines = turns->sines + offset;
  const size_t partner = turns->partner;
  vf sum[2][TOGETHER];
  CKV_UNROLL
  for (uint32_t t = 0; t < 2 * nq; t++) sum[t % 2][t / 2] = vf_zero();
  for (uint32_t pair = 0; pair < turns->pairs; pair++, cosines += turns->stride, sines += turns->stride) {
    const size_t c = pair * turns->step;
    const vf a = vf_load(x + c * LANES), b = vf_load(x + (c + partner) * LANES);
    const vf cosine = vf_load(cosines), sine = vf_load(sines);
    const vf first = vf_fma(-b, sine, a * cosine), second = vf_fma(a, sine, b * cosine);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      sum[0][j] = vf_fma(vf_set1(q[j * q_stride + c]), first, sum[0][j]);
      sum[1][j] = vf_fma(vf_set1(q[j * q_stride + c + partner]), second, sum[1][j]);
    }
  }
  for (uint32_t c = 2 * turns->pairs; c < dim; c++) {
    const vf a = vf_load(x + (size_t)c * LANES);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) sum[0][j] = vf_fma(vf_set1(q[j * q_stride + c]), a, sum[0][j]);
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) vf_store_n(out + j * ld, (sum[0][j] + sum[1][j]) * vf_set1(scale), n);
}

static __attribute__((noinline)) void logits_of_head(const float *x, const ckv_turns *turns, uint32_t offset,
                                                     uint32_t dim, const float *q, uint32_t m, size_t q_stride,
                                                     float scale, float *out, size_t ld, uint32_t n) {
  for (uint32_t j = 0, nq; j < m; j += nq, q += nq * q_stride, out += nq * ld) {
    nq = m - j >= 8 ? 8 : m - j >= 4 ? 4 : m - j >= 2 ? 2 : 1;
    switch (nq) {
      case 1: head_logits(x, turns, offset, dim, q, 1, q_stride, scale, out, ld, n); break;
      case 2: head_logits(x, turns, offset, dim, q, 2, q_stride, scale, out, ld, n); break;
      case 4: head_logits(x, turns, offset, dim, q, 4, q_stride, scale, out, ld, n); break;
      default: head_logits(x, turns, offset, dim, q, 8, q_stride, scale, out, ld, n); break;
    }
  }
}

static void load_channels(const ckv_run *run, const uint8_t *p, size_t step, uint32_t begin, uint32_t end,
                          const uint32_t *order, const j_tile *t) {
  switch (run->bits) {
    case 2: put_rows(run, 2, p, step, begin, end, order, t); break;
    case 3: put_rows(run, 3, p, step, begin, end, order, t); break;
    case 4: put_rows(run, 4, p, step, begin, end, order, t); break;
    default: put_rows(run, 8, p, step, begin, end, order, t); break;
  }
}

/* Heads whose channels are one part of a block each, and no number per channel. */
static bool joins(const ckv_run *run, const ckv_map *map, uint32_t dim) {
  if (run->kind != CKV_AFFINE_ROW || !fits(run) || !map || map->sign || map->factor || map->offset) return false;
  return map->block % BLOCK == 0 && map->block % dim == 0;
}

bool ckv_joined_avx512(const ckv_run *run, const ckv_map *map, uint32_t first, uint32_t count,
                       const ckv_joined_head *heads, uint32_t n_heads, uint32_t dim, uint32_t m, size_t q_stride,
                       float scale, size_t ld, const ckv_turns *turns, uint32_t offset, float *scratch) {
  if (!joins(run, map, dim)) return false;
  const uint32_t width = run->dim, block = map->block;
  const size_t step = row_bytes_of(run);
  float *room = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  const j_tile t = {.channels = room, .scales = room + (size_t)width * LANES,
                    .mins = room + (size_t)width * LANES + (size_t)groups_of(run) * LANES};
  uint8_t *rest = (uint8_t *)(t.mins + (size_t)groups_of(run) * LANES);
  const b_form f = form_of(run);
  scale *= ckv_hadamard_scale(block);
  for (uint32_t i = 0; i < count; i += LANES) {
    const uint32_t n = ckv_min_u32(LANES, count - i);
    const uint8_t *p = (const uint8_t *)run->data + (first + i) * step;
    load_metadata(run, f, first + i, n, LANES, t.scales, t.mins);
    if (n < LANES) { /* there may be no memory behind the last row */
      memset(rest, 0, LANES * step);
      memcpy(rest, p, n * step);
      p = rest;
    }
    if (map->order) load_channels(run, p, step, 0, width, map->order, &t);
    for (uint32_t begin = 0; begin < width; begin += block) {
      bool wanted = false;
      for (uint32_t h = 0; h < n_heads; h++) wanted = wanted || heads[h].channel / block == begin / block;
      if (!wanted) continue;
      if (!map->order) load_channels(run, p, step, begin, begin + block, NULL, &t);
      transform(t.channels + (size_t)begin * LANES, block);
      for (uint32_t h = 0; h < n_heads; h++)
        if (heads[h].channel / block == begin / block)
          logits_of_head(t.channels + (size_t)heads[h].channel * LANES, turns, offset + i, dim, heads[h].q, m,
                         q_stride, scale, heads[h].out + i, ld, n);
    }
  }
  return true;
}

#pragma clang attribute pop
#endif
