/* Four f32 lanes in baseline A64 NEON: the vocabulary that lanes_*.h is written in. */
#define VN 4
#define V_QUERIES 4      /* query rows a small block holds accumulators for */
#define V_TILE_VECTORS 4 /* vectors of rows in the micro kernel of many query rows, */
#define V_TILE_QUERIES 6 /* and its query rows: 24 accumulators of 32 registers */

typedef float32x4_t vf;
typedef uint32x4_t vi;

CKV_INLINE vf vf_zero(void) { return vdupq_n_f32(0); }
CKV_INLINE vf vf_set1(float x) { return vdupq_n_f32(x); }
CKV_INLINE vf vf_load(const float *p) { return vld1q_f32(p); }
/* There are no masked accesses: short ones go through memory. */
CKV_INLINE vf vf_load_n(const float *p, uint32_t n) {
  if (n >= 4) return vld1q_f32(p);
  float t[4] = {0};
  memcpy(t, p, (size_t)n * 4);
  return vld1q_f32(t);
}
CKV_INLINE void vf_store(float *p, vf x) { vst1q_f32(p, x); }
CKV_INLINE void vf_store_n(float *p, vf x, uint32_t n) {
  if (n >= 4) {
    vst1q_f32(p, x);
    return;
  }
  float t[4];
  vst1q_f32(t, x);
  memcpy(p, t, (size_t)n * 4);
}

CKV_INLINE uint16x4_t v_load_half_n(const void *p, uint32_t n) {
  uint16_t h[4] = {0};
  memcpy(h, p, (size_t)n * 2);
  return vld1_u16(h);
}
CKV_INLINE void v_store_half_n(void *p, uint16x4_t x, uint32_t n) {
  uint16_t h[4];
  vst1_u16(h, x);
  if (n >= 4) memcpy(p, h, 8);
  else memcpy(p, h, (size_t)n * 2);
}
CKV_INLINE uint16x4_t v_load_half(const void *p) {
  uint16x4_t h;
  memcpy(&h, p, 8);
  return h;
}
CKV_INLINE vf v_widen_f16(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
CKV_INLINE vf v_widen_bf16(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
CKV_INLINE vf vf_set1_f16(const void *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return v_widen_f16(vdup_n_u16(h));
}
CKV_INLINE vf vf_load_f16(const void *p) { return v_widen_f16(v_load_half(p)); }
CKV_INLINE vf vf_load_f16_n(const void *p, uint32_t n) { return v_widen_f16(v_load_half_n(p, n)); }
CKV_INLINE vf vf_load_bf16(const void *p) { return v_widen_bf16(v_load_half(p)); }
CKV_INLINE vf vf_load_bf16_n(const void *p, uint32_t n) { return v_widen_bf16(v_load_half_n(p, n)); }
/* FP8 by way of f16: E5M2 is its upper byte; E4M3 has one exponent bit less, and comes out as 2^-8 of it. */
CKV_INLINE vf vf_load_fp8(const void *p, uint32_t n, const bool e4m3) {
  uint32_t bytes = 0;
  if (n == 4) memcpy(&bytes, p, 4);
  else memcpy(&bytes, p, n);
  uint16x4_t h = vreinterpret_u16_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes))));
  h = e4m3 ? vshl_n_u16(h, 7) : vshl_n_u16(h, 8);
  if (e4m3) h = vand_u16(h, vdup_n_u16(0xbfff)); /* where the sign came twice */
  return v_widen_f16(h);
}
CKV_INLINE void vf_store_f16_n(void *p, vf x, uint32_t n) {
  v_store_half_n(p, vreinterpret_u16_f16(vcvt_f16_f32(x)), n);
}
CKV_INLINE void vf_store_bf16_n(void *p, vf x, uint32_t n) {
  vi u = vreinterpretq_u32_f32(x), high = vshrq_n_u32(u, 16);
  vi bias = vaddq_u32(vdupq_n_u32(0x7fff), vandq_u32(high, vdupq_n_u32(1)));
  vi rounded = vshrq_n_u32(vaddq_u32(u, bias), 16);
  vi both = vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(high, vdupq_n_u32(0x40)));
  v_store_half_n(p, vmovn_u32(both), n);
}

CKV_INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
/* Of a NaN and a number both give the number. */
CKV_INLINE vf vf_min(vf a, vf b) { return vminnmq_f32(a, b); }
CKV_INLINE vf vf_max(vf a, vf b) { return vmaxnmq_f32(a, b); }
/* NaN stays NaN. */
CKV_INLINE vf vf_at_least(vf x, vf low) { return vmaxq_f32(x, low); }
CKV_INLINE vf vf_at_most(vf x, vf high) { return vminq_f32(x, high); }
CKV_INLINE vf vf_abs(vf a) { return vabsq_f32(a); }
CKV_INLINE vf vf_round(vf a) { return vrndnq_f32(a); }
CKV_INLINE float vf_sum(vf a) { return vaddvq_f32(a); }
CKV_INLINE float vf_lowest(vf a) { return vminnmvq_f32(a); }
CKV_INLINE float vf_highest(vf a) { return vmaxnmvq_f32(a); }
/* a < b ? x : y */
CKV_INLINE vf vf_select_less(vf a, vf b, vf x, vf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
/* s == 0 ? 0 : x */
CKV_INLINE vf vf_zero_where_zero(vf s, vf x) {
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vceqzq_f32(s)));
}
/* The magnitude of x with the sign of s. */
CKV_INLINE vf vf_copy_sign(vf x, vf s) { return vbslq_f32(vdupq_n_u32(0x80000000u), s, x); }

CKV_INLINE vi vi_zero(void) { return vdupq_n_u32(0); }
CKV_INLINE vi vi_load_n(const uint32_t *p, uint32_t n) {
  if (n >= 4) return vld1q_u32(p);
  uint32_t t[4] = {0};
  memcpy(t, p, (size_t)n * 4);
  return vld1q_u32(t);
}
CKV_INLINE vi vi_load(const uint32_t *p) { return vld1q_u32(p); }
CKV_INLINE void vi_store(uint32_t *p, vi x) { vst1q_u32(p, x); }
CKV_INLINE void vi_store_n(uint32_t *p, vi x, uint32_t n) {
  uint32_t t[4];
  vst1q_u32(t, x);
  memcpy(p, t, (size_t)(n < 4 ? n : 4) * 4);
}
CKV_INLINE vi vi_set1(uint32_t x) { return vdupq_n_u32(x); }
CKV_INLINE vi vi_and(vi a, vi b) { return vandq_u32(a, b); }
CKV_INLINE vi vi_or(vi a, vi b) { return vorrq_u32(a, b); }
CKV_INLINE vi vi_right(vi a, uint32_t n) { return vshlq_u32(a, vdupq_n_s32(-(int)n)); }
CKV_INLINE vi vi_left(vi a, uint32_t n) { return vshlq_u32(a, vdupq_n_s32((int)n)); }
CKV_INLINE vf vf_from_vi(vi a) { return vcvtq_f32_u32(a); }
CKV_INLINE vi vi_round(vf a) { return vcvtnq_u32_f32(a); }
/* 2^n for whole n in -126 ... 127 */
CKV_INLINE vf v_power(vf n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
/* x * 2^n for whole n in -252 ... 254 */
CKV_INLINE vf vf_times_power(vf x, vf n) {
  vf half = vf_round(n * vf_set1(0.5f));
  return x * v_power(half) * v_power(n - half);
}
/* One byte a lane. */
CKV_INLINE void vi_store_bytes(uint8_t *p, vi x) {
  uint16x4_t h = vmovn_u32(x);
  uint8x8_t b = vmovn_u16(vcombine_u16(h, h));
  memcpy(p, &b, 4);
}
/* The lanes' codes, from 4*bits bits (bits = 1, 2, 4). */
CKV_INLINE vi vi_codes(uint64_t packed, uint32_t bits) {
  const int32x4_t back1 = {0, -1, -2, -3}, back2 = {0, -2, -4, -6}, back4 = {0, -4, -8, -12};
  vi shifted = vshlq_u32(vdupq_n_u32((uint32_t)packed), bits == 1 ? back1 : bits == 2 ? back2 : back4);
  return vandq_u32(shifted, vdupq_n_u32((1u << bits) - 1));
}
CKV_INLINE vi vi_code_bytes(const uint8_t *p) {
  uint8x8_t b = {0};
  memcpy(&b, p, 4);
  return vmovl_u16(vget_low_u16(vmovl_u8(b)));
}

/* The sums of four vectors. */
CKV_INLINE void vf_sum4(vf a, vf b, vf c, vf d, float out[4]) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

/* to[c * to_stride + r] = from[r * from_stride + c] for 4 x 4 floats. */
CKV_INLINE void vf_transpose(const float *from, size_t from_stride, float *to, size_t to_stride) {
  vf a = vld1q_f32(from), b = vld1q_f32(from + from_stride), c = vld1q_f32(from + 2 * from_stride);
  vf d = vld1q_f32(from + 3 * from_stride);
  float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  float64x2_t cd0 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd1 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  vst1q_f32(to, vreinterpretq_f32_f64(vtrn1q_f64(ab0, cd0)));
  vst1q_f32(to + to_stride, vreinterpretq_f32_f64(vtrn1q_f64(ab1, cd1)));
  vst1q_f32(to + 2 * to_stride, vreinterpretq_f32_f64(vtrn2q_f64(ab0, cd0)));
  vst1q_f32(to + 3 * to_stride, vreinterpretq_f32_f64(vtrn2q_f64(ab1, cd1)));
}

/* Sums and differences of lanes 1 and 2 apart: a Walsh-Hadamard transform of one vector, unscaled. */
CKV_INLINE vf vf_butterflies(vf x) {
  const vi odd = {0, ~0u, 0, ~0u}, high = {0, 0, ~0u, ~0u};
  vf y = vrev64q_f32(x);
  x = vbslq_f32(odd, y - x, x + y);
  y = vextq_f32(x, x, 2);
  return vbslq_f32(high, y - x, x + y);
}
