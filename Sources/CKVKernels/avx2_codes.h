/* logits and accumulate over affine codes by integer products, part of avx2.c.
 *
 * As in avx512_keys.c and avx512_sums.c the scales are folded into the query or the weights, which are then held in
 * 16-bit fixed point (ckv.h). Here they stay 16-bit numbers: codes are brought to 16 bits in a tile shared by all
 * query rows, and vpmaddwd multiplies and adds pairs of channels (keys) or of rows (values). */

enum {
  V_KEY_BLOCK = 32, /* rows of keys in a tile */
  V_KEY_DIM = 256,  /* channels whose products with 8-bit codes fit an i32 */
  V_ROW_TILE = 64,  /* rows of values in a tile */
  V_STRIPS = 4,     /* strips of 32 channels of values in a tile */
  V_FOUR = 4,       /* query rows that are multiplied together */
};

CKV_INLINE float v_total(vi x) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return (float)(_mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1));
}

/* ---- keys ------------------------------------------------------------------------------------------------------ */

typedef struct {
  float factor[V_FOUR], bias[V_FOUR];
} v_key_group;

/* The folded query: for eight channels (0 ... 3, 0 ... 3, 4 ... 7, 4 ... 7). */
CKV_INLINE void v_fold_query(const ckv_run *run, const uint32_t type, uint32_t g, const float *q, const uint32_t nq,
                             size_t q_stride, float scale, v_key_group *group, int16_t *folded) {
  const uint32_t dim = run->dim;
  const char *scales = ckv_offset(run->scale, type, (size_t)g * dim);
  const char *mins = ckv_offset(run->min, type, (size_t)g * dim);
  const size_t size = ckv_size_of(type);
  vf bias[V_FOUR], high[V_FOUR];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) bias[j] = high[j] = vf_zero();
  for (uint32_t c = 0; c < dim; c += 8) {
    const uint32_t n = ckv_min_u32(8, dim - c);
    const vf s = vf_load_as_n(scales + c * size, type, n);
    const vf mn = vf_fma(s, vf_set1(ckv_middle(run->bits)), vf_load_as_n(mins + c * size, type, n));
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf y = n == 8 ? vf_load(q + j * q_stride + c) : vf_load_n(q + j * q_stride + c, n);
      bias[j] = vf_fma(y, mn, bias[j]);
      high[j] = vf_max(vf_abs(y * s), high[j]);
    }
  }
  float inverse[V_FOUR];
  vi sum[V_FOUR];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    float largest = vf_highest(high[j]);
    inverse[j] = ckv_fixed_up(largest, CKV_FULL_RANGE);
    sum[j] = vi_zero();
    group->factor[j] = scale * ckv_fixed_down(largest, CKV_FULL_RANGE);
    group->bias[j] = scale * vf_sum(bias[j]);
  }
  for (uint32_t c = 0; c < dim; c += 8) {
    const uint32_t n = ckv_min_u32(8, dim - c);
    const vf s = vf_load_as_n(scales + c * size, type, n);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf y = n == 8 ? vf_load(q + j * q_stride + c) : vf_load_n(q + j * q_stride + c, n);
      vi v = vi_round(y * s * vf_set1(inverse[j]));
      vi_store((uint32_t *)(folded + (c * V_FOUR + 8 * j) * 2), _mm256_packs_epi32(v, v));
      sum[j] = _mm256_add_epi32(sum[j], v);
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) group->bias[j] -= group->factor[j] * (ckv_middle(run->bits) * v_total(sum[j]));
}

/* A block of 32 rows as 16-bit codes: [set of 4 rows][8 channels][two rows][(row a, channels
 * 0 ... 3), (row b, 0 ... 3), then channels 4 ... 7]. v_key_block says which rows are where. */
CKV_INLINE void v_unpack_keys(const ckv_run *run, const uint32_t bits, uint32_t g, uint32_t block, int16_t *tile) {
  const uint32_t dim = run->dim;
  const uint32_t *words = ckv_group_codes(run, g), *top = words + (size_t)(run->group / 16 + block) * dim;
  words += (size_t)block * (bits == 3 ? 2 : bits) * dim;
  const size_t stride = (size_t)(dim + 7) / 8 * 32; /* from set to set */
  const vi bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const vi zero = vi_zero();
  for (uint32_t c = 0; c < dim; c += 8, tile += 32) {
    const uint32_t n = ckv_min_u32(8, dim - c);
    if (bits >= 4) {
      CKV_UNROLL
      for (uint32_t w = 0; w < bits; w++) {
        const uint32_t *from = words + (size_t)w * dim + c;
        __builtin_prefetch((const char *)from + 8192);
        vi x = _mm256_shuffle_epi8(n == 8 ? vi_load(from) : vi_load_n(from, n), bytes);
        if (bits == 8) {
          vi_store((uint32_t *)(tile + w * stride), _mm256_unpacklo_epi8(x, zero));
          vi_store((uint32_t *)(tile + w * stride + 16), _mm256_unpackhi_epi8(x, zero));
          continue;
        }
        const vi mask = _mm256_set1_epi8(0x0f);
        vi even = vi_and(x, mask), odd = vi_and(_mm256_srli_epi16(x, 4), mask);
        int16_t *to = tile + 2 * w * stride;
        vi_store((uint32_t *)to, _mm256_unpacklo_epi8(even, zero));
        vi_store((uint32_t *)(to + 16), _mm256_unpacklo_epi8(odd, zero));
        vi_store((uint32_t *)(to + stride), _mm256_unpackhi_epi8(even, zero));
        vi_store((uint32_t *)(to + stride + 16), _mm256_unpackhi_epi8(odd, zero));
      }
      continue;
    }
    vi high = zero;
    if (bits == 3) high = n == 8 ? vi_load(top + c) : vi_load_n(top + c, n);
    CKV_UNROLL
    for (uint32_t w = 0; w < 2; w++) {
      const uint32_t *from = words + (size_t)w * dim + c;
      __builtin_prefetch((const char *)from + 8192);
      vi x = _mm256_shuffle_epi8(n == 8 ? vi_load(from) : vi_load_n(from, n), bytes), third = zero, y[4];
      if (bits == 3) { /* dword k: nibble k of the 16 bits of these rows */
        vi halves = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 1, 5, 9, 13, 1, 5, 9, 13));
        third = _mm256_shuffle_epi8(high, _mm256_add_epi8(halves, _mm256_set1_epi8((char)(2 * w))));
        third = _mm256_srlv_epi32(third, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
      }
      CKV_UNROLL
      for (uint32_t i = 0; i < 4; i++) { /* rows 4 * dword + i */
        y[i] = vi_and(_mm256_srli_epi16(x, 2 * (int)i), _mm256_set1_epi8(3));
        if (bits != 3) continue;
        vi moved = i < 2 ? _mm256_slli_epi16(third, 2 - (int)i) : _mm256_srli_epi16(third, (int)i - 2);
        y[i] = vi_or(y[i], vi_and(moved, _mm256_set1_epi8(4)));
      }
      int16_t *to = tile + 4 * w * stride;
      CKV_UNROLL
      for (uint32_t i = 0; i < 4; i++) {
        vi_store((uint32_t *)(to + i / 2 * stride + i % 2 * 16), _mm256_unpacklo_epi8(y[i], zero));
        vi_store((uint32_t *)(to + (2 + i / 2) * stride + i % 2 * 16), _mm256_unpackhi_epi8(y[i], zero));
      }
    }
  }
}

/* Rows [begin, end) of a block for nq query rows. */
CKV_INLINE void v_key_block(const uint32_t bits, uint32_t dim, const int16_t *tile, const int16_t *folded,
                            const v_key_group *group, uint32_t begin, uint32_t end, const uint32_t nq, float *out,
                            size_t ld) {
  float all[V_FOUR][V_KEY_BLOCK];
  const size_t steps = (size_t)(dim + 7) / 8;
  for (uint32_t set = 0; set < 8; set++) {
    vi sum[V_FOUR][2];
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) sum[j][0] = sum[j][1] = vi_zero();
    const int16_t *x = tile + set * steps * 32, *y = folded;
    for (size_t i = 0; i < steps; i++, x += 32, y += 16 * V_FOUR) {
      vi a = vi_load((const uint32_t *)x), b = vi_load((const uint32_t *)(x + 16));
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) {
        vi w = vi_load((const uint32_t *)(y + 16 * j));
        sum[j][0] = _mm256_add_epi32(sum[j][0], _mm256_madd_epi16(a, w));
        sum[j][1] = _mm256_add_epi32(sum[j][1], _mm256_madd_epi16(b, w));
      }
    }
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vi both = _mm256_hadd_epi32(sum[j][0], sum[j][1]);
      __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
      /* Rows 0 1 2 3 of 8 bits, 0 2 1 3 of 4; of 2 and 3 bits 0 4 1 5, and 2 6 3 7 in the next set. */
      if (bits == 4) four = _mm_shuffle_epi32(four, 0xd8);
      __m128 y4 = _mm_fmadd_ps(_mm_cvtepi32_ps(four), _mm_set1_ps(group->factor[j]), _mm_set1_ps(group->bias[j]));
      _mm_storeu_ps(all[j] + 4 * set, y4);
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    if (bits < 4)
      for (uint32_t i = 0; i < V_KEY_BLOCK; i += 8) {
        __m128 a = _mm_loadu_ps(all[j] + i), b = _mm_loadu_ps(all[j] + i + 4);
        _mm_storeu_ps(all[j] + i, _mm_shuffle_ps(a, b, 0x88));
        _mm_storeu_ps(all[j] + i + 4, _mm_shuffle_ps(a, b, 0xdd));
      }
    memcpy(out + j * ld, all[j] + begin, (end - begin) * sizeof(float));
  }
}

CKV_INLINE void v_fold_type(const ckv_run *run, uint32_t g, const float *q, const uint32_t nq, size_t q_stride,
                            float scale, v_key_group *group, int16_t *folded) {
  if (run->dtype == CKV_F16) v_fold_query(run, CKV_F16, g, q, nq, q_stride, scale, group, folded);
  else v_fold_query(run, run->dtype, g, q, nq, q_stride, scale, group, folded);
}

CKV_INLINE void v_key_logits(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t count, const float *q,
                             uint32_t m, size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  const uint32_t dim = run->dim, end = first + count;
  int16_t *tile = (int16_t *)scratch, *folded = tile + (size_t)(dim + 7) / 8 * 256; /* for eight query rows */
  v_key_group groups[2];
  for (uint32_t chunk = 0; chunk < m; chunk += 2 * V_FOUR) {
    const uint32_t have = ckv_min_u32(2 * V_FOUR, m - chunk), none = ~0u;
    for (uint32_t row = first, folded_group = none; row < end;) {
      const uint32_t g = row / run->group, block = row % run->group / V_KEY_BLOCK, begin = row % V_KEY_BLOCK;
      const uint32_t n = ckv_min_u32(end - row, V_KEY_BLOCK - begin);
      v_unpack_keys(run, bits, g, block, tile);
      for (uint32_t j = 0; j < have; j += V_FOUR) {
        const float *y = q + (chunk + j) * q_stride;
        float *to = out + (chunk + j) * ld + (row - first);
        v_key_group *group = &groups[j / V_FOUR];
        int16_t *digits = folded + (size_t)j / V_FOUR * ((dim + 7) / 8 * 16 * V_FOUR);
        switch (ckv_min_u32(V_FOUR, have - j)) {
#define CKV_FOR(nq)                                                                                                  \
  if (g != folded_group) v_fold_type(run, g, y, nq, q_stride, scale, group, digits);                                 \
  v_key_block(bits, dim, tile, digits, group, begin, begin + n, nq, to, ld);                                         \
  break;
          case 1: CKV_FOR(1)
          case 2: CKV_FOR(2)
          case 3: CKV_FOR(3)
          default: CKV_FOR(4)
#undef CKV_FOR
        }
      }
      folded_group = g;
      row += n;
    }
  }
}

static bool v_logits_codes(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m,
                           size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  if (run->kind != CKV_AFFINE_CHANNEL || run->dim > V_KEY_DIM) return false;
  if (run->bits == 2) v_key_logits(run, 2, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (run->bits == 3) v_key_logits(run, 3, first, count, q, m, q_stride, scale, out, ld, scratch);
  else if (run->bits == 4) v_key_logits(run, 4, first, count, q, m, q_stride, scale, out, ld, scratch);
  else v_key_logits(run, 8, first, count, q, m, q_stride, scale, out, ld, scratch);
  return true;
}

/* ---- values ---------------------------------------------------------------------------------------------------- */

/* Parts of the scratch memory of a call. */
typedef struct {
  uint32_t groups, strips; /* strips: of 32 channels */
  float *sums;             /* [query row][strip][vector][8] */
  float *min_sums;         /* [query row][group][8] */
  float *scales, *mins;    /* [group][V_ROW_TILE] of the tile at hand */
  float *factors;          /* [query row][group] */
  int16_t *weights;        /* [query row][group][V_ROW_TILE] */
  int16_t *codes;          /* [strip][pair of rows][vector][16] */
} v_value_memory;

/* Metadata of n rows as f32 by group, zero up to a multiple of 16 rows. */
CKV_INLINE void v_load_meta(const char *from, const uint32_t type, uint32_t groups, uint32_t n, float *to) {
  const uint32_t padded = (n + 15) & ~15u;
  for (uint32_t g = 0; g < groups; g++)
    for (uint32_t r = n; r < padded; r++) to[g * V_ROW_TILE + r] = 0;
  uint32_t r = 0;
  for (; groups == 4 && r + 4 <= n; r += 4) {
    const char *rows = from + r * 4 * ckv_size_of(type);
    vf a = vf_load_as(rows, type), b = vf_load_as(rows + 8 * ckv_size_of(type), type);
    __m128 x[4] = {_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1), _mm256_castps256_ps128(b),
                   _mm256_extractf128_ps(b, 1)};
    _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
    CKV_UNROLL
    for (uint32_t g = 0; g < 4; g++) _mm_storeu_ps(to + g * V_ROW_TILE + r, x[g]);
  }
  for (uint32_t i = r * groups, g = 0; i < n * groups; i += 8) {
    float some[8];
    uint32_t have = ckv_min_u32(8, n * groups - i);
    vf_store(some, vf_load_as_n(from + i * ckv_size_of(type), type, have));
    for (uint32_t k = 0; k < have; k++) {
      to[g * V_ROW_TILE + r] = some[k];
      if (++g == groups) g = 0, r++;
    }
  }
}

/* The weights of one query row over a tile of n rows. */
static void v_fold_weights(const v_value_memory *at, float middle, uint32_t n, const float *p, float *min_sums,
                           float *factors, int16_t *weights) {
  float padded[V_ROW_TILE];
  const uint32_t whole = n / 16 * 16;
  if (whole < n) { /* zero past the end */
    memset(padded, 0, sizeof padded);
    memcpy(padded, p, n * sizeof(float));
    p = padded;
  }
  for (uint32_t g = 0; g < at->groups; g++) {
    const float *scales = at->scales + g * V_ROW_TILE, *mins = at->mins + g * V_ROW_TILE;
    vf high = vf_zero(), sum = vf_load(min_sums + g * 8);
    for (uint32_t i = 0; i < n; i += 8) {
      vf weight = vf_load(p + i);
      sum = vf_fma(weight, vf_fma(vf_load(scales + i), vf_set1(middle), vf_load(mins + i)), sum);
      high = vf_max(vf_abs(weight * vf_load(scales + i)), high);
    }
    vf_store(min_sums + g * 8, sum);
    float largest = vf_highest(high);
    vf inverse = vf_set1(ckv_fixed_up(largest, CKV_FULL_RANGE));
    factors[g] = ckv_fixed_down(largest, CKV_FULL_RANGE);
    vi total = vi_zero();
    for (uint32_t i = 0; i < n; i += 16) {
      vi a = vi_round(vf_load(p + i) * vf_load(scales + i) * inverse);
      vi b = vi_round(vf_load(p + i + 8) * vf_load(scales + i + 8) * inverse);
      vi both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
      vi_store((uint32_t *)(weights + g * V_ROW_TILE + i), both);
      total = _mm256_add_epi32(total, _mm256_add_epi32(a, b));
    }
    min_sums[g * 8] -= factors[g] * (middle * v_total(total));
  }
}

/* A strip of 32 channels of two rows as 16-bit codes, in dwords of both rows: to[v] holds eight channels, see
 * v_channel. `low` and `high` are the bytes of the planes' parts. */
CKV_INLINE void v_widen_strip(const char *const low[2], const char *const high[2], const uint32_t bits, vi to[4]) {
  if (bits == 8) {
    CKV_UNROLL
    for (uint32_t k = 0; k < 2; k++) {
      vi a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(low[0] + 16 * k)));
      vi b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(low[1] + 16 * k)));
      to[2 * k] = _mm256_unpacklo_epi16(a, b);
      to[2 * k + 1] = _mm256_unpackhi_epi16(a, b);
    }
    return;
  }
  if (bits == 4) {
    const __m128i a = _mm_loadu_si128((const __m128i *)low[0]), b = _mm_loadu_si128((const __m128i *)low[1]);
    const vi x = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), y = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
    to[0] = vi_and(x, _mm256_set1_epi16(0x0f));
    to[1] = _mm256_srli_epi16(x, 4);
    to[2] = vi_and(y, _mm256_set1_epi16(0x0f));
    to[3] = _mm256_srli_epi16(y, 4);
    return;
  }
  const __m128i a = _mm_loadl_epi64((const __m128i *)low[0]), b = _mm_loadl_epi64((const __m128i *)low[1]);
  const vi x = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), mask = _mm256_set1_epi16(3);
  to[0] = vi_and(x, mask);
  to[1] = vi_and(_mm256_srli_epi16(x, 2), mask);
  to[2] = vi_and(_mm256_srli_epi16(x, 4), mask);
  to[3] = _mm256_srli_epi16(x, 6);
  if (bits != 3) return;
  int32_t words[2];
  memcpy(&words[0], high[0], 4);
  memcpy(&words[1], high[1], 4);
  /* The nibble of each byte of the low plane: bytes of both rows, each twice, the second time shifted down. */
  __m128i bytes = _mm_insert_epi32(_mm_cvtsi32_si128(words[0]), words[1], 1);
  bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 4, 0, 4, 1, 5, 1, 5, 2, 6, 2, 6, 3, 7, 3, 7));
  vi third = _mm256_srlv_epi32(_mm256_cvtepu8_epi16(bytes), _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
  const vi bit = _mm256_set1_epi16(4);
  to[0] = vi_or(to[0], vi_and(_mm256_slli_epi16(third, 2), bit));
  to[1] = vi_or(to[1], vi_and(_mm256_slli_epi16(third, 1), bit));
  to[2] = vi_or(to[2], vi_and(third, bit));
  to[3] = vi_or(to[3], vi_and(_mm256_srli_epi16(third, 1), bit));
}

/* The channel in lane `lane` of vector v of a strip. */
CKV_INLINE uint32_t v_channel(uint32_t bits, uint32_t v, uint32_t lane) {
  if (bits == 8) return v / 2 * 16 + v % 2 * 4 + lane % 4 + lane / 4 * 8;
  if (bits == 4) return v / 2 * 16 + 2 * lane + v % 2;
  return 4 * lane + v;
}

/* Codes of n rows, `count` strips from `strip` on. */
CKV_INLINE void v_unpack_values(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t n, uint32_t strip,
                                uint32_t count, int16_t *to) {
  const uint32_t step = 4 * (bits == 3 ? 2 : bits); /* bytes of a strip */
  const size_t low_bytes = (size_t)ckv_plane_words(run->dim, bits == 3 ? 2 : bits) * 4;
  const size_t row_bytes = (size_t)ckv_row_words(run->dim, bits) * 4;
  const char *row = (const char *)run->data + first * row_bytes;
  const uint32_t whole = ckv_min_u32(count, (uint32_t)(low_bytes / step) - strip);
  for (uint32_t i = 0; i < n; i += 2, row += 2 * row_bytes, to += 64) {
    const char *next = i + 1 < n ? row + row_bytes : row; /* past the end weights are zero */
    for (uint32_t k = 0; k < count; k++) {
      const size_t at = (size_t)(strip + k) * step, top = low_bytes + (size_t)(strip + k) * 4;
      const char *low[2] = {row + at, next + at}, *high[2] = {row + top, next + top};
      char copies[2][32];
      if (k >= whole) { /* the last words of a row */
        memset(copies, 0, sizeof copies);
        for (uint32_t r = 0; r < 2; r++) {
          memcpy(copies[r], low[r], low_bytes - at);
          low[r] = copies[r];
        }
      }
      __builtin_prefetch(row + at + 8192);
      __builtin_prefetch(next + at + 8192);
      vi x[4];
      v_widen_strip(low, high, bits, x);
      CKV_UNROLL
      for (uint32_t v = 0; v < 4; v++) vi_store((uint32_t *)(to + (size_t)k * V_ROW_TILE * 32 + 16 * v), x[v]);
    }
  }
}

/* Two vectors of a strip of n rows for nq query rows. */
CKV_INLINE void v_value_block(const int16_t *codes, uint32_t n, const int16_t *weights, size_t weight_stride,
                              const float *factors, size_t factor_stride, const uint32_t nq, float *sums,
                              size_t sum_stride) {
  vi sum[V_FOUR][2];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) sum[j][0] = sum[j][1] = vi_zero();
  for (uint32_t i = 0; i < n; i += 2, codes += 64) {
    vi a = vi_load((const uint32_t *)codes), b = vi_load((const uint32_t *)(codes + 16));
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      int32_t pair;
      memcpy(&pair, weights + j * weight_stride + i, 4);
      vi w = _mm256_set1_epi32(pair);
      sum[j][0] = _mm256_add_epi32(sum[j][0], _mm256_madd_epi16(a, w));
      sum[j][1] = _mm256_add_epi32(sum[j][1], _mm256_madd_epi16(b, w));
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    const vf factor = vf_set1(factors[j * factor_stride]);
    float *to = sums + j * sum_stride;
    vf_store(to, vf_fma(vf_from_vi(sum[j][0]), factor, vf_load(to)));
    vf_store(to + 8, vf_fma(vf_from_vi(sum[j][1]), factor, vf_load(to + 8)));
  }
}

CKV_INLINE void v_value_sums(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t count, const float *p,
                             uint32_t m, size_t ld, float *acc, size_t acc_stride, const v_value_memory *at) {
  const size_t sum_stride = (size_t)at->strips * 32, min_stride = (size_t)at->groups * 8;
  const size_t weight_stride = (size_t)at->groups * V_ROW_TILE;
  memset(at->sums, 0, m * sum_stride * sizeof(float));
  memset(at->min_sums, 0, m * min_stride * sizeof(float));
  for (uint32_t i = 0; i < count; i += V_ROW_TILE) {
    const uint32_t n = ckv_min_u32(V_ROW_TILE, count - i);
    const char *scale = ckv_offset(run->scale, run->dtype, (size_t)(first + i) * at->groups);
    const char *min = ckv_offset(run->min, run->dtype, (size_t)(first + i) * at->groups);
    if (run->dtype == CKV_F16) {
      v_load_meta(scale, CKV_F16, at->groups, n, at->scales);
      v_load_meta(min, CKV_F16, at->groups, n, at->mins);
    } else {
      v_load_meta(scale, run->dtype, at->groups, n, at->scales);
      v_load_meta(min, run->dtype, at->groups, n, at->mins);
    }
    for (uint32_t j = 0; j < m; j++)
      v_fold_weights(at, ckv_middle(bits), n, p + j * ld + i, at->min_sums + j * min_stride, at->factors + j * at->groups,
                     at->weights + j * weight_stride);
    for (uint32_t strip = 0; strip < at->strips; strip += V_STRIPS) {
      const uint32_t strips = ckv_min_u32(V_STRIPS, at->strips - strip);
      v_unpack_values(run, bits, first + i, n, strip, strips, at->codes);
      for (uint32_t j = 0; j < m; j += V_FOUR) {
        for (uint32_t k = 0; k < 2 * strips; k++) {
          const uint32_t c = strip * 32 + k * 16, g = c / run->group;
          const int16_t *codes = at->codes + (size_t)(k / 2) * V_ROW_TILE * 32 + k % 2 * 32;
          const int16_t *weights = at->weights + j * weight_stride + (size_t)g * V_ROW_TILE;
          const float *factors = at->factors + j * at->groups + g;
          float *sums = at->sums + j * sum_stride + c;
          const size_t step = at->groups;
          switch (ckv_min_u32(V_FOUR, m - j)) {
            case 1: v_value_block(codes, n, weights, weight_stride, factors, step, 1, sums, sum_stride); break;
            case 2: v_value_block(codes, n, weights, weight_stride, factors, step, 2, sums, sum_stride); break;
            case 3: v_value_block(codes, n, weights, weight_stride, factors, step, 3, sums, sum_stride); break;
            default: v_value_block(codes, n, weights, weight_stride, factors, step, 4, sums, sum_stride); break;
          }
        }
      }
    }
  }
  for (uint32_t j = 0; j < m; j++) {
    for (uint32_t g = 0; g < at->groups; g++) {
      const float mn = vf_sum(vf_load(at->min_sums + j * min_stride + g * 8));
      const uint32_t end = ckv_min_u32(run->dim, (g + 1) * run->group);
      for (uint32_t c = g * run->group; c < end; c++) acc[j * acc_stride + c] += mn;
    }
    for (uint32_t i = 0; i < at->strips * 32; i++) {
      const uint32_t c = i / 32 * 32 + v_channel(bits, i / 8 % 4, i % 8);
      if (c < run->dim) acc[j * acc_stride + c] += at->sums[j * sum_stride + i];
    }
  }
}

/* Floats of scratch of the above for rows of `dim` channels. */
size_t ckv_avx2_scratch_floats(uint32_t dim) {
  const size_t padded = ((size_t)dim + 31) & ~(size_t)31, groups = padded / 32;
  size_t values = 8 * padded + groups * (8 * 8 + 2 * V_ROW_TILE + 8 + 8 * V_ROW_TILE / 2);
  values += V_STRIPS * V_ROW_TILE * 16;
  const size_t keys = padded / 8 * (128 + 64);
  return (values > keys ? values : keys) + 64;
}

static bool v_accumulate_codes(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m,
                               size_t ld, float *acc, size_t acc_stride, float *scratch) {
  if (run->kind != CKV_AFFINE_ROW || run->group % 32) return false;
  v_value_memory at = {.groups = (run->dim + run->group - 1) / run->group, .strips = (run->dim + 31) / 32};
  at.sums = scratch;
  at.min_sums = at.sums + (size_t)8 * at.strips * 32;
  at.scales = at.min_sums + (size_t)8 * at.groups * 8;
  at.mins = at.scales + (size_t)at.groups * V_ROW_TILE;
  at.factors = at.mins + (size_t)at.groups * V_ROW_TILE;
  at.weights = (int16_t *)(at.factors + (size_t)8 * at.groups);
  at.codes = at.weights + (size_t)8 * at.groups * V_ROW_TILE;
  for (uint32_t j = 0; j < m; j += 8) {
    const float *weights = p + j * ld;
    float *to = acc + j * acc_stride;
    const uint32_t have = ckv_min_u32(8, m - j);
    if (run->bits == 2) v_value_sums(run, 2, first, count, weights, have, ld, to, acc_stride, &at);
    else if (run->bits == 3) v_value_sums(run, 3, first, count, weights, have, ld, to, acc_stride, &at);
    else if (run->bits == 4) v_value_sums(run, 4, first, count, weights, have, ld, to, acc_stride, &at);
    else v_value_sums(run, 8, first, count, weights, have, ld, to, acc_stride, &at);
  }
  return true;
}
