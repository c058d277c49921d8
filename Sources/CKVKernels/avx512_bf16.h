/* What products of bf16 are made of, at the level "avx512": see avx512_bf16.c. */
enum {
  LANES = 32,               /* of a panel: two vectors */
  QUERIES = V_TILE_QUERIES, /* rows of `a` a panel meets at a time */
};

CKV_INLINE uint32_t *aligned(float *scratch) { return (uint32_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63); }

/* x[0 ..< 16] in the low half, y in the high half: 32 bf16 in order. */
CKV_INLINE __m512i to_bf16(vf x, vf y) { return (__m512i)_mm512_cvtne2ps_pbh(y, x); }

/* 32 f32 as 16 pairs; those from n on are 0. */
CKV_INLINE __m512i load_pairs(const float *x, uint32_t n) {
  if (n >= 32) return to_bf16(vf_load(x), vf_load(x + 16));
  return n > 16 ? to_bf16(vf_load(x), vf_load_n(x + 16, n - 16)) : to_bf16(vf_load_n(x, n), vf_zero());
}

/* The same of stored elements. */
CKV_INLINE __m512i load_stored(const char *x, const uint32_t type, uint32_t n) {
  if (type == CKV_BF16)
    return n >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), x);
  if (n >= 32) return to_bf16(vf_load_f16(x), vf_load_f16(x + 32));
  return n > 16 ? to_bf16(vf_load_f16(x), vf_load_f16_n(x + 32, n - 16)) : to_bf16(vf_load_f16_n(x, n), vf_zero());
}

/* Rows as pairs, `steps` of each. */
CKV_INLINE void load_rows(const char *from, size_t row_bytes, const uint32_t type, uint32_t dim, uint32_t count,
                          uint32_t steps, uint32_t *to) {
  for (uint32_t r = 0; r < count; r++, from += row_bytes, to += steps) {
    uint32_t c = 0;
    for (; c + 32 <= dim; c += 32) _mm512_store_si512(to + c / 2, load_stored(from + 2 * c, type, 32));
    if (c < dim) _mm512_store_si512(to + c / 2, load_stored(from + 2 * c, type, dim - c));
  }
}

/* sum[j] += the products of `steps` pairs with row j of a, whose pairs lie a_step apart. */
CKV_INLINE void add_panel(const uint32_t *restrict tile, uint32_t steps, const uint32_t *restrict a, size_t a_stride,
                          const size_t a_step, const uint32_t nq, ckv_coming *ahead, vf sum[QUERIES][2]) {
  const char *next = ahead->next;
  const size_t next_step = ahead->step;
  ahead->next += steps * next_step;
  for (uint32_t s = 0; s < steps; s++, tile += LANES, a += a_step, next += next_step) {
    __builtin_prefetch(next);
    const __m512bh x = (__m512bh)_mm512_load_si512(tile), y = (__m512bh)_mm512_load_si512(tile + 16);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[j * a_stride]);
      sum[j][0] = _mm512_dpbf16_ps(sum[j][0], x, both);
      sum[j][1] = _mm512_dpbf16_ps(sum[j][1], y, both);
    }
  }
}

CKV_INLINE void logits_panel(const uint32_t *tile, uint32_t steps, const uint32_t *a, const uint32_t nq, uint32_t m,
                             float scale, uint32_t n, ckv_coming *ahead, float *out, size_t ld) {
  vf sum[QUERIES][2];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) sum[j][0] = sum[j][1] = vf_zero();
  add_panel(tile, steps, a, steps, 1, nq, ahead, sum);
  const vf by = vf_set1(scale);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    float *to = out + j * ld;
    if (j >= m) {
      /* a row that fills up the block */
    } else if (n == LANES) {
      vf_store(to, sum[j][0] * by);
      vf_store(to + 16, sum[j][1] * by);
    } else {
      vf_store_n(to, sum[j][0] * by, ckv_min_u32(n, 16));
      if (n > 16) vf_store_n(to + 16, sum[j][1] * by, n - 16);
    }
  }
}

CKV_INLINE vf load_lanes(const float *x, uint32_t n) { return n >= 16 ? vf_load(x) : vf_load_n(x, n); }
CKV_INLINE void store_lanes(float *to, vf x, uint32_t n) {
  if (n >= 16) vf_store(to, x);
  else vf_store_n(to, x, n);
}

CKV_INLINE void values_panel(const uint32_t *tile, uint32_t steps, const uint32_t *a, size_t a_stride,
                             const size_t a_step, const uint32_t nq, uint32_t m, uint32_t n, ckv_coming *ahead,
                             float *acc, size_t stride) {
  const uint32_t low = ckv_min_u32(n, 16), high = n - low;
  vf sum[QUERIES][2];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    sum[j][0] = j < m ? load_lanes(acc + j * stride, low) : vf_zero();
    sum[j][1] = j < m ? load_lanes(acc + j * stride + 16, high) : vf_zero();
  }
  add_panel(tile, steps, a, a_stride, a_step, nq, ahead, sum);
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    if (j < m) {
      store_lanes(acc + j * stride, sum[j][0], low);
      store_lanes(acc + j * stride + 16, sum[j][1], high);
    }
  }
}

/* Channels c ..< c + 16 of two rows as pairs. */
CKV_INLINE __m512i load_two(const char *x, const char *y, const uint32_t type, const uint32_t n) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  if (type == CKV_F16) {
    vf a = n >= 16 ? vf_load_f16(x) : vf_load_f16_n(x, n), b = vf_zero();
    if (y) b = n >= 16 ? vf_load_f16(y) : vf_load_f16_n(y, n);
    return _mm512_permutexvar_epi16(order, to_bf16(a, b));
  }
  const __mmask16 mask = n >= 16 ? 0xffff : v_first(n);
  __m256i a = _mm256_maskz_loadu_epi16(mask, x), b = _mm256_setzero_si256();
  if (y) b = _mm256_maskz_loadu_epi16(mask, y);
  return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

/* One step of every panel, which lie `panel` pairs apart; y null: the row is the last. */
CKV_INLINE void pair_rows(const char *x, const char *y, const uint32_t type, uint32_t dim, size_t panel,
                          uint32_t *to) {
  uint32_t c = 0;
  for (; c + 32 <= dim; c += 32, to += panel)
    CKV_UNROLL
    for (uint32_t k = 0; k < 32; k += 16)
      _mm512_store_si512(to + k, load_two(x + 2 * (c + k), y ? y + 2 * (c + k) : NULL, type, 16));
  if (c == dim) return;
  const uint32_t low = ckv_min_u32(dim - c, 16), high = dim - c - low;
  _mm512_store_si512(to, load_two(x + 2 * c, y ? y + 2 * c : NULL, type, low));
  c += 16;
  _mm512_store_si512(to + 16, high ? load_two(x + 2 * c, y ? y + 2 * c : NULL, type, high) : vi_zero());
}
