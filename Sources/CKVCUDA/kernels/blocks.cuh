// Scaled integers, FP8 and ggml's blocks: the arithmetic of CKVKernels/blocks.h, element by element. The same bits.
#pragma once

enum { KV_INT8 = 1, KV_INT4 = 2, KV_E4M3 = 3, KV_E5M2 = 4 };
enum { KV_Q4_0 = 2, KV_Q4_1 = 3, KV_Q5_0 = 6, KV_Q5_1 = 7, KV_Q8_0 = 8, KV_IQ4_NL = 20 };

KV_DEVICE uint32_t kv_row_bytes(uint32_t code, uint32_t dim) { return code == KV_INT4 ? (dim + 1) / 2 : dim; }

KV_DEVICE uint32_t kv_block_bytes(uint32_t code) {
  return code == KV_Q8_0 ? 34 : code == KV_Q5_0 ? 22 : code == KV_Q5_1 ? 24 : code == KV_Q4_1 ? 20 : 18;
}

// ---- FP8 ------------------------------------------------------------------------------------------------------------

KV_DEVICE float kv_fp8_largest(uint32_t code) { return code == KV_E4M3 ? 448.0f : 57344.0f; }

KV_DEVICE float kv_from_fp8(uint32_t x, uint32_t code) {
  const uint32_t mantissa = code == KV_E4M3 ? 3 : 2, bias = code == KV_E4M3 ? 7 : 15;
  const float step = code == KV_E4M3 ? 0.001953125f : 0.0000152587890625f;  // of subnormals
  const uint32_t rest = x & 0x7fu;
  const uint32_t normal = (rest << (23 - mantissa)) + ((127 - bias) << 23);
  const uint32_t bits = rest >> mantissa ? normal : kv_bits(kv_mul((float)rest, step));
  return kv_float(bits | (x & 0x80u) << 24);
}

// Nearest, ties to even; beyond the largest finite number: that.
KV_DEVICE uint32_t kv_to_fp8(float x, uint32_t code) {
  const uint32_t mantissa = code == KV_E4M3 ? 3 : 2, bias = code == KV_E4M3 ? 7 : 15, shift = 23 - mantissa;
  const float align = code == KV_E4M3 ? 16384.0f : 128.0f;  // whose last place is the step of subnormals
  const float normal_from = code == KV_E4M3 ? 0.015625f : 0.00006103515625f;
  const uint32_t u = kv_bits(x), sign = u >> 24 & 0x80u, most = kv_bits(kv_fp8_largest(code));
  uint32_t rest = u & 0x7fffffffu;
  rest = rest < most ? rest : most;
  const float magnitude = kv_float(rest);
  const uint32_t low = kv_bits(kv_add(magnitude, align)) - kv_bits(align);
  const uint32_t even = rest + ((1u << (shift - 1)) - 1) + (rest >> shift & 1u);
  const uint32_t high = (even >> shift) - ((127 - bias) << mantissa);
  return sign | (magnitude < normal_from ? low : high);
}

// ---- scaled rows ----------------------------------------------------------------------------------------------------

KV_DEVICE float kv_scaled_code(const uint8_t *row, uint32_t code, uint32_t c) {
  if (code == KV_INT8) return (float)(int8_t)row[c];
  if (code == KV_INT4) return (float)((int32_t)(row[c / 2] >> (c % 2 * 4) & 15u) - 8);
  return kv_from_fp8(row[c], code);
}

KV_DEVICE float kv_scaled_element(const kv_slice &s, uint32_t r, uint32_t c) {
  float scale = s.factor;
  if (s.kind == KV_SCALED_BLOCK) scale = kv_load((const void *)s.scale, s.dtype, r / s.group);
  if (s.kind == KV_SCALED_ROW)
    scale = kv_load((const void *)s.scale, s.dtype, (uint64_t)r * ((s.dim + s.group - 1) / s.group) + c / s.group);
  const uint8_t *row = (const uint8_t *)s.data + (uint64_t)r * kv_row_bytes(s.code, s.dim);
  return kv_mul(kv_scaled_code(row, s.code, c), scale);
}

// The largest code: what the largest magnitude of a group becomes.
KV_DEVICE float kv_scaled_most(uint32_t code) {
  return code == KV_INT8 ? 127.0f : code == KV_INT4 ? 7.0f : kv_fp8_largest(code);
}

// The code of x: a byte, or a nibble with 8 added. A scale of 0: the code of 0.
KV_DEVICE uint32_t kv_to_scaled(float x, float scale, uint32_t code) {
  float t = kv_div(x, scale == 0 ? KV_INFINITY : scale);
  if (code == KV_E4M3 || code == KV_E5M2) return kv_to_fp8(t, code);
  const float most = kv_scaled_most(code);
  t = t > -most ? t : -most;
  t = t < most ? t : most;
  const int32_t rounded = (int32_t)kv_round(t);
  return code == KV_INT8 ? (uint32_t)rounded & 0xffu : (uint32_t)(rounded + 8);
}

// ---- ggml's blocks --------------------------------------------------------------------------------------------------

// iq4_nl's values: fixed by the format.
KV_DEVICE float kv_iq4_value(uint32_t code) {
  const uint64_t low = 0xf6eaddcfbfad9881ull, high = 0x7159453526190d01ull;
  return (float)(int8_t)((code < 8 ? low >> (8 * code) : high >> (8 * (code - 8))) & 0xff);
}

KV_DEVICE uint16_t kv_half_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

KV_DEVICE float kv_block_element(const kv_slice &s, uint32_t r, uint32_t c) {
  const uint32_t i = c % 32;
  const uint8_t *p = (const uint8_t *)s.data + ((uint64_t)r * (s.dim / 32) + c / 32) * kv_block_bytes(s.code);
  const float d = kv_half(kv_half_at(p));
  const bool has_min = s.code == KV_Q4_1 || s.code == KV_Q5_1, five = s.code == KV_Q5_0 || s.code == KV_Q5_1;
  const uint8_t *q = p + (has_min ? 4 : 2);
  if (s.code == KV_Q8_0) return kv_mul((float)(int8_t)q[i], d);
  const uint32_t high = five ? q[i / 8] >> (i % 8) & 1u : 0;
  if (five) q += 4;
  const uint32_t x = (q[i % 16] >> (i / 16 * 4) & 15u) | high << 4;
  if (s.code == KV_IQ4_NL) return kv_mul(kv_iq4_value(x), d);
  const int32_t zero = s.code == KV_Q4_0 ? 8 : s.code == KV_Q5_0 ? 16 : 0;
  const float product = kv_mul((float)((int32_t)x - zero), d);
  return has_min ? kv_add(product, kv_half(kv_half_at(p + 2))) : product;
}

// 1 / d; 0 where that does not exist: all codes are then those of zero.
KV_DEVICE float kv_inverse(float d) {
  const float id = d == 0 ? 0 : kv_div(1.0f, d);
  return kv_finite(id) ? id : 0;
}

KV_DEVICE void kv_put_half(uint8_t *p, float x) {
  const uint16_t h = kv_to_half(x);
  p[0] = (uint8_t)h;
  p[1] = (uint8_t)(h >> 8);
}

KV_DEVICE uint32_t kv_least(int32_t code, int32_t most) { return (uint32_t)(code < most ? code : most); }

// A block from its 32 values.
KV_DEVICE void kv_encode_block(const float *x, uint32_t code, uint8_t *p) {
  float extreme = x[0], low = x[0], high = x[0];
  for (uint32_t i = 1; i < 32; i++) {
    // Of equal magnitudes, and of zeros of both signs, the first counts.
    extreme = fabsf(x[i]) > fabsf(extreme) ? x[i] : extreme;
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  if (code == KV_Q8_0) {
    const float d = kv_div(fabsf(extreme), 127.0f), id = kv_inverse(d);
    kv_put_half(p, d);
    for (uint32_t i = 0; i < 32; i++) {  // to nearest, halves away from zero
      const float t = kv_mul(x[i], id);
      const int32_t whole = (int32_t)t;
      const float rest = kv_add(t, -(float)whole);
      p[2 + i] = (uint8_t)(whole + (rest >= 0.5f) - (rest <= -0.5f));
    }
    return;
  }
  uint8_t codes[32];
  uint32_t header = 2;
  const bool five = code == KV_Q5_0 || code == KV_Q5_1;
  if (code == KV_Q4_0 || code == KV_Q5_0) {
    const float half = five ? 16 : 8, d = kv_div(extreme, -half), id = kv_inverse(d);
    kv_put_half(p, d);
    for (uint32_t i = 0; i < 32; i++)
      codes[i] = (uint8_t)kv_least((int32_t)kv_add(kv_mul(x[i], id), half + 0.5f), five ? 31 : 15);
  } else if (code == KV_Q4_1 || code == KV_Q5_1) {
    const float d = kv_div(kv_add(high, -low), five ? 31.0f : 15.0f), id = kv_inverse(d);
    kv_put_half(p, d);
    kv_put_half(p + 2, low);
    header = 4;
    for (uint32_t i = 0; i < 32; i++)
      codes[i] = (uint8_t)kv_least((int32_t)kv_add(kv_mul(kv_add(x[i], -low), id), 0.5f), five ? 31 : 15);
  } else {
    // iq4_nl: the scale is fitted to the codes that the scale of the extreme element gives, by least squares with
    // weights x^2; the sums are in order.
    const float first = kv_div(extreme, -127.0f), id = fabsf(extreme) < 1e-15f ? 0 : kv_inverse(first);
    float above = 0, below = 0;
    for (uint32_t i = 0; i < 32; i++) {
      const float t = kv_mul(x[i], id);
      uint32_t best = 0;
      for (uint32_t k = 1; k < 16; k++)  // halfway the larger value wins
        best += t >= 0.5f * (kv_iq4_value(k - 1) + kv_iq4_value(k)) ? 1 : 0;
      codes[i] = (uint8_t)best;
      const float w = kv_mul(x[i], x[i]), q = kv_iq4_value(best);
      above = kv_add(above, kv_mul(kv_mul(w, q), x[i]));
      below = kv_add(below, kv_mul(kv_mul(w, q), q));
    }
    // Squares of very small numbers vanish, of very large ones overflow: the scale of the extreme element is left.
    float d = kv_div(above, below);
    if (!kv_finite(d)) d = first;
    kv_put_half(p, id == 0 ? 0 : d);
  }
  if (five) {
    for (uint32_t b = 0; b < 4; b++) {
      uint32_t byte = 0;
      for (uint32_t i = 0; i < 8; i++) byte |= (uint32_t)(codes[8 * b + i] >> 4) << i;
      p[header + b] = (uint8_t)byte;
    }
    header += 4;
  }
  for (uint32_t i = 0; i < 16; i++) p[header + i] = (uint8_t)((codes[i] & 15u) | codes[i + 16] << 4);
}
