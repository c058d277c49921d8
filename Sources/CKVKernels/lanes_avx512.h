/* Sixteen f32 lanes in AVX-512 (F, BW, VL, DQ): the vocabulary that lanes_*.h is written in. */
#define VN 16
#define V_QUERIES 4     /* query rows a small block holds accumulators for */
#define V_TILE_VECTORS 2 /* vectors of rows in the micro kernel of many query rows, */
#define V_TILE_QUERIES 12 /* and its query rows: 24 accumulators of 32 registers */

typedef __m512 vf;
typedef __m512i vi;

CKV_INLINE __mmask16 v_first(uint32_t n) { return (__mmask16)((1u << n) - 1); }

CKV_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
CKV_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
CKV_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
CKV_INLINE vf vf_load_n(const float *p, uint32_t n) { return _mm512_maskz_loadu_ps(v_first(n), p); }
CKV_INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
CKV_INLINE void vf_store_n(float *p, vf x, uint32_t n) { _mm512_mask_storeu_ps(p, v_first(n), x); }

CKV_INLINE vf vf_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
CKV_INLINE vf vf_load_f16_n(const void *p, uint32_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_first(n), p));
}
CKV_INLINE vf vf_set1_f16(const void *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return _mm512_cvtph_ps(_mm256_set1_epi16((short)h));
}
CKV_INLINE vf v_widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
CKV_INLINE vf vf_load_bf16(const void *p) { return v_widen_bf16(_mm256_loadu_si256((const __m256i *)p)); }
CKV_INLINE vf vf_load_bf16_n(const void *p, uint32_t n) {
  return v_widen_bf16(_mm256_maskz_loadu_epi16(v_first(n), p));
}
/* FP8 by way of f16: E5M2 is its upper byte; E4M3 has one exponent bit less, and comes out as 2^-8 of it. */
CKV_INLINE vf vf_load_fp8(const void *p, uint32_t n, const bool e4m3) {
  __m128i x = n == 16 ? _mm_loadu_si128((const __m128i *)p) : _mm_maskz_loadu_epi8(v_first(n), p);
  __m256i h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(x), e4m3 ? 7 : 8);
  if (e4m3) h = _mm256_and_si256(h, _mm256_set1_epi16((short)0xbfff)); /* where the sign came twice */
  return _mm512_cvtph_ps(h);
}
CKV_INLINE void vf_store_f16_n(void *p, vf x, uint32_t n) {
  _mm256_mask_storeu_epi16(p, v_first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
CKV_INLINE void vf_store_bf16_n(void *p, vf x, uint32_t n) {
  vi u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
  vi bias = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, _mm512_set1_epi32(1)));
  vi rounded = _mm512_srli_epi32(_mm512_add_epi32(u, bias), 16);
  vi quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  vi both = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_mask_storeu_epi16(p, v_first(n), _mm512_cvtepi32_epi16(both));
}

CKV_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/* Of a NaN and a number both give the second operand. */
CKV_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
CKV_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
/* NaN stays NaN. */
CKV_INLINE vf vf_at_least(vf x, vf low) { return _mm512_max_ps(low, x); }
CKV_INLINE vf vf_at_most(vf x, vf high) { return _mm512_min_ps(high, x); }
CKV_INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
CKV_INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
CKV_INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
CKV_INLINE float vf_lowest(vf a) { return _mm512_reduce_min_ps(a); }
CKV_INLINE float vf_highest(vf a) { return _mm512_reduce_max_ps(a); }
/* a < b ? x : y */
CKV_INLINE vf vf_select_less(vf a, vf b, vf x, vf y) {
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}
/* s == 0 ? 0 : x */
CKV_INLINE vf vf_zero_where_zero(vf s, vf x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(s, _mm512_setzero_ps(), _CMP_NEQ_UQ), x);
}
/* The magnitude of x with the sign of s. */
CKV_INLINE vf vf_copy_sign(vf x, vf s) {
  vf sign = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(sign, x), _mm512_and_ps(sign, s));
}

CKV_INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
CKV_INLINE vi vi_load_n(const uint32_t *p, uint32_t n) { return _mm512_maskz_loadu_epi32(v_first(n), p); }
CKV_INLINE vi vi_load(const uint32_t *p) { return _mm512_loadu_si512(p); }
CKV_INLINE void vi_store(uint32_t *p, vi x) { _mm512_storeu_si512(p, x); }
CKV_INLINE void vi_store_n(uint32_t *p, vi x, uint32_t n) { _mm512_mask_storeu_epi32(p, v_first(n), x); }
CKV_INLINE vi vi_set1(uint32_t x) { return _mm512_set1_epi32((int)x); }
CKV_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
CKV_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
CKV_INLINE vi vi_right(vi a, uint32_t n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128((int)n)); }
CKV_INLINE vi vi_left(vi a, uint32_t n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128((int)n)); }
CKV_INLINE vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
CKV_INLINE vi vi_round(vf a) { return _mm512_cvtps_epi32(a); }
/* x * 2^n for whole n */
CKV_INLINE vf vf_times_power(vf x, vf n) { return _mm512_scalef_ps(x, n); }
/* One byte a lane. */
CKV_INLINE void vi_store_bytes(uint8_t *p, vi x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(x)); }
/* The lanes' codes, from 16*bits bits (bits = 1, 2, 4). */
CKV_INLINE vi vi_codes(uint64_t packed, uint32_t bits) {
  vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  vi words = _mm512_set1_epi32((int)packed);
  if (bits == 4) {
    words = _mm512_mask_set1_epi32(words, 0xff00, (int)(packed >> 32));
    lane = _mm512_and_si512(lane, _mm512_set1_epi32(7));
  }
  vi shift = bits == 1 ? lane : _mm512_slli_epi32(lane, bits == 2 ? 1 : 2);
  return _mm512_and_si512(_mm512_srlv_epi32(words, shift), _mm512_set1_epi32((1 << bits) - 1));
}
CKV_INLINE vi vi_code_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }

/* The sums of four vectors. */
CKV_INLINE void vf_sum4(vf a, vf b, vf c, vf d, float out[4]) {
  vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  vf cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  vf low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  vf high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  vf all = _mm512_add_ps(low, high);
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* The largest of each of four vectors. */
CKV_INLINE void vf_max4(vf a, vf b, vf c, vf d, float out[4]) {
  vf ab = vf_max(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  vf cd = vf_max(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  vf low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  vf high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  vf all = vf_max(low, high);
  __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* to[c * to_stride + r] = from[r * from_stride + c] for 16 x 16 floats. */
CKV_INLINE void vf_transpose(const float *from, size_t from_stride, float *to, size_t to_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    const float *p = from + (size_t)i * from_stride;
    __m512 x = _mm512_loadu_ps(p), y = _mm512_loadu_ps(p + from_stride);
    a[i] = _mm512_unpacklo_ps(x, y);
    a[i + 1] = _mm512_unpackhi_ps(x, y);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; k++) {
      __m512d x = _mm512_castps_pd(a[i + k]), y = _mm512_castps_pd(a[i + 2 + k]);
      b[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      b[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  /* b[4*i + k], 128-bit lane l: column 4*l + k of rows 4*i ... 4*i+3 */
  for (int k = 0; k < 4; k++) {
    __m512 low02 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0x88), low13 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0xdd);
    __m512 high02 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x88);
    __m512 high13 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xdd);
    _mm512_storeu_ps(to + (size_t)k * to_stride, _mm512_shuffle_f32x4(low02, high02, 0x88));
    _mm512_storeu_ps(to + (size_t)(4 + k) * to_stride, _mm512_shuffle_f32x4(low13, high13, 0x88));
    _mm512_storeu_ps(to + (size_t)(8 + k) * to_stride, _mm512_shuffle_f32x4(low02, high02, 0xdd));
    _mm512_storeu_ps(to + (size_t)(12 + k) * to_stride, _mm512_shuffle_f32x4(low13, high13, 0xdd));
  }
}

/* Sums and differences of lanes 1, 2, 4 and 8 apart: a Walsh-Hadamard transform of one vector, unscaled. */
CKV_INLINE vf vf_butterflies(vf x) {
  vf y = _mm512_permute_ps(x, 0xb1);
  x = _mm512_mask_sub_ps(x + y, 0xaaaa, y, x);
  y = _mm512_permute_ps(x, 0x4e);
  x = _mm512_mask_sub_ps(x + y, 0xcccc, y, x);
  y = _mm512_shuffle_f32x4(x, x, 0xb1);
  x = _mm512_mask_sub_ps(x + y, 0xf0f0, y, x);
  y = _mm512_shuffle_f32x4(x, x, 0x4e);
  return _mm512_mask_sub_ps(x + y, 0xff00, y, x);
}
