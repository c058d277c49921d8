/* Eight f32 lanes in AVX2 with FMA and F16C: the vocabulary that lanes_*.h is written in. */
#define VN 8
#define V_QUERIES 2       /* query rows a small block holds accumulators for: 8 of 16 registers */
#define V_TILE_VECTORS 2  /* vectors of rows in the micro kernel of many query rows, */
#define V_TILE_QUERIES 6  /* and its query rows: 12 accumulators */

typedef __m256 vf;
typedef __m256i vi;

CKV_INLINE vi v_first(uint32_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

CKV_INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
CKV_INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }
CKV_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
CKV_INLINE vf vf_load_n(const float *p, uint32_t n) { return _mm256_maskload_ps(p, v_first(n)); }
CKV_INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
/* Masked stores are slow on some CPUs: whole vectors do without. */
CKV_INLINE void vf_store_n(float *p, vf x, uint32_t n) {
  if (n == VN) _mm256_storeu_ps(p, x);
  else _mm256_maskstore_ps(p, v_first(n), x);
}

/* There are no masked 16-bit accesses: short ones go through memory. */
CKV_INLINE __m128i v_load_half_n(const void *p, uint32_t n) {
  uint16_t h[8] = {0};
  if (n == 4) return _mm_loadl_epi64((const __m128i *)p);
  memcpy(h, p, (size_t)n * 2);
  return _mm_loadu_si128((const __m128i *)h);
}
CKV_INLINE void v_store_half_n(void *p, __m128i x, uint32_t n) {
  if (n == 8) {
    _mm_storeu_si128((__m128i *)p, x);
    return;
  }
  uint16_t h[8];
  _mm_storeu_si128((__m128i *)h, x);
  memcpy(p, h, (size_t)n * 2);
}
CKV_INLINE vf v_widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
CKV_INLINE vf vf_set1_f16(const void *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return _mm256_cvtph_ps(_mm_set1_epi16((short)h));
}
CKV_INLINE vf vf_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
CKV_INLINE vf vf_load_f16_n(const void *p, uint32_t n) { return _mm256_cvtph_ps(v_load_half_n(p, n)); }
CKV_INLINE vf vf_load_bf16(const void *p) { return v_widen_bf16(_mm_loadu_si128((const __m128i *)p)); }
CKV_INLINE vf vf_load_bf16_n(const void *p, uint32_t n) { return v_widen_bf16(v_load_half_n(p, n)); }
/* FP8 by way of f16: E5M2 is its upper byte; E4M3 has one exponent bit less, and comes out as 2^-8 of it. */
CKV_INLINE vf vf_load_fp8(const void *p, uint32_t n, const bool e4m3) {
  uint64_t bytes = 0;
  if (n == 8) memcpy(&bytes, p, 8);
  else memcpy(&bytes, p, n);
  __m128i h = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_cvtsi64_si128((long long)bytes)), e4m3 ? 7 : 8);
  if (e4m3) h = _mm_and_si128(h, _mm_set1_epi16((short)0xbfff)); /* where the sign came twice */
  return _mm256_cvtph_ps(h);
}
CKV_INLINE void vf_store_f16_n(void *p, vf x, uint32_t n) {
  v_store_half_n(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
CKV_INLINE void vf_store_bf16_n(void *p, vf x, uint32_t n) {
  vi u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
  vi bias = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(high, _mm256_set1_epi32(1)));
  vi rounded = _mm256_srli_epi32(_mm256_add_epi32(u, bias), 16);
  vi quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  vi nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  vi both = _mm256_blendv_epi8(rounded, quiet, nan);
  v_store_half_n(p, _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)), n);
}

CKV_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
/* Of a NaN and a number both give the second operand. */
CKV_INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
CKV_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
/* NaN stays NaN. */
CKV_INLINE vf vf_at_least(vf x, vf low) { return _mm256_max_ps(low, x); }
CKV_INLINE vf vf_at_most(vf x, vf high) { return _mm256_min_ps(high, x); }
CKV_INLINE vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
CKV_INLINE vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
CKV_INLINE float vf_sum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
CKV_INLINE float vf_lowest(vf a) {
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}
CKV_INLINE float vf_highest(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
/* a < b ? x : y */
CKV_INLINE vf vf_select_less(vf a, vf b, vf x, vf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
/* s == 0 ? 0 : x */
CKV_INLINE vf vf_zero_where_zero(vf s, vf x) {
  return _mm256_and_ps(x, _mm256_cmp_ps(s, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
/* The magnitude of x with the sign of s. */
CKV_INLINE vf vf_copy_sign(vf x, vf s) {
  vf sign = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(sign, x), _mm256_and_ps(sign, s));
}

CKV_INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
CKV_INLINE vi vi_load_n(const uint32_t *p, uint32_t n) { return _mm256_maskload_epi32((const int *)p, v_first(n)); }
CKV_INLINE vi vi_load(const uint32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
CKV_INLINE void vi_store(uint32_t *p, vi x) { _mm256_storeu_si256((__m256i *)p, x); }
CKV_INLINE void vi_store_n(uint32_t *p, vi x, uint32_t n) {
  if (n == VN) vi_store(p, x);
  else _mm256_maskstore_epi32((int *)p, v_first(n), x);
}
CKV_INLINE vi vi_set1(uint32_t x) { return _mm256_set1_epi32((int)x); }
CKV_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
CKV_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
CKV_INLINE vi vi_right(vi a, uint32_t n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128((int)n)); }
CKV_INLINE vi vi_left(vi a, uint32_t n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128((int)n)); }
CKV_INLINE vf vf_from_vi(vi a) { return _mm256_cvtepi32_ps(a); }
CKV_INLINE vi vi_round(vf a) { return _mm256_cvtps_epi32(a); }
/* 2^n for whole n in -126 ... 127 */
CKV_INLINE vf v_power(vf n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
/* x * 2^n for whole n in -252 ... 254 */
CKV_INLINE vf vf_times_power(vf x, vf n) {
  vf half = vf_round(n * vf_set1(0.5f));
  return x * v_power(half) * v_power(n - half);
}
/* One byte a lane. */
CKV_INLINE void vi_store_bytes(uint8_t *p, vi x) {
  __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(h, h));
}
/* The lanes' codes, from 8*bits bits (bits = 1, 2, 4). */
CKV_INLINE vi vi_codes(uint64_t packed, uint32_t bits) {
  vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  vi shift = bits == 1 ? lane : _mm256_slli_epi32(lane, bits == 2 ? 1 : 2);
  return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)packed), shift),
                          _mm256_set1_epi32((1 << bits) - 1));
}
CKV_INLINE vi vi_code_bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }

/* The sums of four vectors. */
CKV_INLINE void vf_sum4(vf a, vf b, vf c, vf d, float out[4]) {
  vf all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

/* to[c * to_stride + r] = from[r * from_stride + c] for 8 x 8 floats. */
CKV_INLINE void vf_transpose(const float *from, size_t from_stride, float *to, size_t to_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    const float *p = from + (size_t)i * from_stride;
    __m256 x = _mm256_loadu_ps(p), y = _mm256_loadu_ps(p + from_stride);
    a[i] = _mm256_unpacklo_ps(x, y);
    a[i + 1] = _mm256_unpackhi_ps(x, y);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; k++) {
      __m256d x = _mm256_castps_pd(a[i + k]), y = _mm256_castps_pd(a[i + 2 + k]);
      b[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      b[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
  }
  for (int k = 0; k < 4; k++) {
    _mm256_storeu_ps(to + (size_t)k * to_stride, _mm256_permute2f128_ps(b[k], b[4 + k], 0x20));
    _mm256_storeu_ps(to + (size_t)(4 + k) * to_stride, _mm256_permute2f128_ps(b[k], b[4 + k], 0x31));
  }
}

/* Sums and differences of lanes 1, 2 and 4 apart: a Walsh-Hadamard transform of one vector, unscaled. */
CKV_INLINE vf vf_butterflies(vf x) {
  vf y = _mm256_permute_ps(x, 0xb1);
  x = _mm256_blend_ps(x + y, y - x, 0xaa);
  y = _mm256_permute_ps(x, 0x4e);
  x = _mm256_blend_ps(x + y, y - x, 0xcc);
  y = _mm256_permute2f128_ps(x, x, 0x01);
  return _mm256_blend_ps(x + y, y - x, 0xf0);
}
