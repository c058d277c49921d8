/* Rows as codes around an integer zero point: value = s (code - z). Plain C: a compiler makes vectors of these loops, and
 * every operation rounds once, so codes and metadata are the same bits on every machine. */
#include "internal.h"

#define CKV_LANES 16u

static void range_of(const float *x, uint32_t n, float *low, float *high) {
  float least[CKV_LANES], most[CKV_LANES];
  for (uint32_t i = 0; i < CKV_LANES; i++) least[i] = most[i] = x[0];
  uint32_t c = 0;
  for (; c + CKV_LANES <= n; c += CKV_LANES) {
    for (uint32_t i = 0; i < CKV_LANES; i++) {
      least[i] = x[c + i] < least[i] ? x[c + i] : least[i];
      most[i] = x[c + i] > most[i] ? x[c + i] : most[i];
    }
  }
  for (; c < n; c++) {
    least[0] = x[c] < least[0] ? x[c] : least[0];
    most[0] = x[c] > most[0] ? x[c] : most[0];
  }
  for (uint32_t i = 1; i < CKV_LANES; i++) {
    least[0] = least[i] < least[0] ? least[i] : least[0];
    most[0] = most[i] > most[0] ? most[i] : most[0];
  }
  *low = least[0] + 0.0f;
  *high = most[0] + 0.0f;
}

/* The nearest integer, ties to even, of any finite value. */
static float nearest(float x) {
  if (x >= 0x1p24f || x <= -0x1p24f) return x;
  double rounded = (double)x + 0x1.8p52;
  return (float)(rounded - 0x1.8p52);
}

/* The largest number a type holds, where a value would become infinite. */
static float saturated(float x, uint32_t type) {
  float most = type == CKV_F16 ? 65504.0f : type == CKV_BF16 ? 0x1.fep127f : 0x1.fffffep127f;
  return x > most ? most : x < -most ? -most : x;
}

void ckv_encode_zero_row(const float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t group, uint32_t bits,
                         float clip, float steps, uint32_t meta_type, uint32_t *codes, void *scale, void *min) {
  uint8_t bytes[4096 + 64];
  uint32_t groups = (dim + group - 1) / group, words = ckv_row_words(dim, bits);
  float levels = ckv_levels(bits);
  for (uint32_t r = 0; r < count; r++) {
    const float *x = rows + r * stride;
    for (uint32_t g = 0; g < groups; g++) {
      uint32_t from = g * group, n = ckv_min_u32(dim, from + group) - from;
      size_t at = (size_t)r * groups + g;
      float low, high;
      range_of(x + from, n, &low, &high);
      float wanted = (high * clip - low * clip) / steps;
      ckv_store_scalar(scale, meta_type, at, saturated(wanted, meta_type));
      float s = ckv_load_scalar(scale, meta_type, at);
      if (s == 0) {
        /* Equal values, or values closer than the type can tell: the least one stands for all. */
        ckv_store_scalar(min, meta_type, at, saturated(low, meta_type));
        memset(bytes + from, 0, n);
        continue;
      }
      float zero = nearest(-low * clip / s);
      ckv_store_scalar(min, meta_type, at, saturated(-s * zero, meta_type));
      /* Up to 2^21 steps from zero the sum below is an integer that f32 holds, and rounding is one addition. */
      if (low / s > -0x1p21f && high / s < 0x1p21f) {
        for (uint32_t c = 0; c < n; c++) {
          float rounded = x[from + c] / s + CKV_ROUND_MAGIC;
          float code = rounded - CKV_ROUND_MAGIC + zero;
          code = code > 0 ? code : 0;
          code = code < levels ? code : levels;
          bytes[from + c] = (uint8_t)(int32_t)code;
        }
      } else {
        for (uint32_t c = 0; c < n; c++) {
          float code = nearest(x[from + c] / s) + zero;
          code = code > 0 ? code : 0;
          bytes[from + c] = (uint8_t)(code < levels ? code : levels);
        }
      }
    }
    memset(bytes + dim, 0, 32);
    ckv_pack_row(bytes, dim, bits, codes + (size_t)r * words);
  }
}

/* Scale and zero of a group, as CSKV's code has them. */
static float clamped_zero(float low, float high, float levels, uint32_t type, void *scale, void *min, size_t at,
                          float *s) {
  float range = high - low;
  ckv_store_scalar(scale, type, at, saturated((range > 1e-5f ? range : 1e-5f) / levels, type));
  *s = ckv_load_scalar(scale, type, at);
  float zero = *s > 0 ? nearest(-low / *s) : 0;
  zero = zero > 0 ? zero : 0;
  zero = zero < levels ? zero : levels;
  ckv_store_scalar(min, type, at, saturated(-*s * zero + 0.0f, type));
  return zero;
}

static uint8_t clamped_code(float x, float s, float zero, float levels) {
  float code = s > 0 ? nearest(x / s) + zero : zero;
  code = code > 0 ? code : 0;
  return (uint8_t)(code < levels ? code : levels);
}

void ckv_encode_clamped_row(const float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t group,
                            uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale, void *min) {
  uint8_t bytes[4096 + 64];
  uint32_t groups = (dim + group - 1) / group, words = ckv_row_words(dim, bits);
  float levels = ckv_levels(bits);
  for (uint32_t r = 0; r < count; r++) {
    const float *x = rows + r * stride;
    for (uint32_t g = 0; g < groups; g++) {
      uint32_t from = g * group, end = ckv_min_u32(dim, from + group);
      float low, high, s;
      range_of(x + from, end - from, &low, &high);
      float zero = clamped_zero(low, high, levels, meta_type, scale, min, (size_t)r * groups + g, &s);
      for (uint32_t c = from; c < end; c++) bytes[c] = clamped_code(x[c], s, zero, levels);
    }
    memset(bytes + dim, 0, 32);
    ckv_pack_row(bytes, dim, bits, codes + (size_t)r * words);
  }
}

void ckv_encode_clamped_channel(const float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t group,
                                uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale, void *min) {
  size_t words = ckv_group_words(group, bits);
  uint32_t plane = bits == 3 ? 2 : bits, per = 32 / plane;
  float levels = ckv_levels(bits);
  memset(codes, 0, count / group * words * dim * sizeof(uint32_t));
  for (uint32_t g = 0; g < count / group; g++) {
    for (uint32_t c = 0; c < dim; c++) {
      const float *x = rows + (size_t)g * group * stride + c;
      float low = x[0], high = x[0], s;
      for (uint32_t r = 1; r < group; r++) {
        low = x[r * stride] < low ? x[r * stride] : low;
        high = x[r * stride] > high ? x[r * stride] : high;
      }
      float zero = clamped_zero(low, high, levels, meta_type, scale, min, (size_t)g * dim + c, &s);
      uint32_t *to = codes + (size_t)g * words * dim + c;
      for (uint32_t r = 0; r < group; r++) {
        uint32_t code = clamped_code(x[r * stride], s, zero, levels);
        to[(size_t)(r / per) * dim] |= (code & ((1u << plane) - 1)) << (r % per * plane);
        if (bits == 3) to[(size_t)(group / 16 + r / 32) * dim] |= (code >> 2) << (r % 32);
      }
    }
  }
}
