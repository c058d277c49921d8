/* Rows of symmetric integers, FP8 and ggml's blocks: decoding and encoding in plain C, compiled once for every level.
 *
 * The loops have no branches, so that each level's compiler makes vectors of them, and no operation is fused or
 * reordered: all levels give the same bits, the portable one by definition. Magnitudes are compared as integers,
 * whose maximum does not depend on an order. */

enum { B_CHANNELS = 32 };

/* ---- layout -------------------------------------------------------------------------------------------------- */

CKV_INLINE float b_scale(const ckv_run *run, uint32_t row, uint32_t c) {
  if (run->kind == CKV_SCALED_FIXED) return run->factor;
  if (run->kind == CKV_SCALED_BLOCK) return ckv_load_scalar(run->scale, run->dtype, row / run->group);
  size_t groups = (run->dim + run->group - 1) / run->group;
  return ckv_load_scalar(run->scale, run->dtype, row * groups + c / run->group);
}

/* Channels from `c` on that share a scale. */
CKV_INLINE uint32_t b_span(const ckv_run *run, uint32_t c) {
  return run->kind == CKV_SCALED_ROW ? ckv_min_u32(run->group, run->dim - c) : run->dim - c;
}

/* ---- FP8 ----------------------------------------------------------------------------------------------------- */

/* Bits of the mantissa, exponent bias, largest finite number. */
CKV_INLINE uint32_t b_mantissa(uint32_t code) { return code == CKV_E4M3 ? 3 : 2; }
CKV_INLINE uint32_t b_bias(uint32_t code) { return code == CKV_E4M3 ? 7 : 15; }
CKV_INLINE float b_largest(uint32_t code) { return code == CKV_E4M3 ? 448.0f : 57344.0f; }

CKV_INLINE float b_from_fp8(uint8_t x, const uint32_t code) {
  const uint32_t shift = 23 - b_mantissa(code), bias = b_bias(code);
  const float step = code == CKV_E4M3 ? 0x1p-9f : 0x1p-16f; /* of subnormals */
  uint32_t rest = x & 0x7fu;
  uint32_t normal = (rest << shift) + ((127 - bias) << 23), low = ckv_bits_of((float)rest * step);
  uint32_t bits = rest >> b_mantissa(code) ? normal : low;
  return ckv_float_of(bits | (uint32_t)(x & 0x80u) << 24);
}

/* Nearest, ties to even; beyond the largest finite number: that. */
CKV_INLINE uint8_t b_to_fp8(float x, const uint32_t code) {
  const uint32_t shift = 23 - b_mantissa(code), bias = b_bias(code);
  const float align = code == CKV_E4M3 ? 0x1p14f : 0x1p7f; /* whose last place is the step of subnormals */
  const float normal_from = code == CKV_E4M3 ? 0x1p-6f : 0x1p-14f;
  uint32_t u = ckv_bits_of(x), sign = u >> 24 & 0x80u, rest = u & 0x7fffffffu;
  uint32_t most = ckv_bits_of(b_largest(code));
  rest = rest < most ? rest : most;
  float magnitude = ckv_float_of(rest);
  uint32_t low = ckv_bits_of(magnitude + align) - ckv_bits_of(align);
  uint32_t even = rest + ((1u << (shift - 1)) - 1) + (rest >> shift & 1u);
  uint32_t high = (even >> shift) - ((127 - bias) << b_mantissa(code));
  return (uint8_t)(sign | (magnitude < normal_from ? low : high));
}

/* ---- decoding ------------------------------------------------------------------------------------------------ */

CKV_INLINE void b_decode_span(const uint8_t *row, const uint32_t code, uint32_t c, uint32_t n, float s, float *out) {
  if (code == CKV_INT8) {
    const int8_t *p = (const int8_t *)row + c;
    for (uint32_t i = 0; i < n; i++) out[i] = (float)p[i] * s;
  } else if (code == CKV_INT4) { /* c is even */
    const uint8_t *p = row + c / 2;
    for (uint32_t i = 0; i < n / 2; i++) {
      out[2 * i] = (float)((int32_t)(p[i] & 15u) - 8) * s;
      out[2 * i + 1] = (float)((int32_t)(p[i] >> 4) - 8) * s;
    }
    if (n % 2) out[n - 1] = (float)((int32_t)(p[n / 2] & 15u) - 8) * s;
  } else {
    const uint8_t *p = row + c;
    for (uint32_t i = 0; i < n; i++) out[i] = b_from_fp8(p[i], code) * s;
  }
}

CKV_INLINE void b_decode_scaled(const ckv_run *run, const uint32_t code, uint32_t first, uint32_t count, float *out,
                                size_t out_stride) {
  const size_t bytes = ckv_row_bytes(run->kind, run->code, run->dim);
  for (uint32_t i = 0; i < count; i++) {
    const uint8_t *row = (const uint8_t *)run->data + (size_t)(first + i) * bytes;
    for (uint32_t c = 0, n; c < run->dim; c += n) {
      n = b_span(run, c);
      b_decode_span(row, code, c, n, b_scale(run, first + i, c), out + i * out_stride + c);
    }
  }
}

static const int8_t b_iq4_values[16] = CKV_IQ4_VALUES;

CKV_INLINE uint16_t b_half_at(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return h;
}

CKV_INLINE void b_decode_block(const uint8_t *p, const uint32_t code, float *out) {
  const float d = ckv_from_f16(b_half_at(p));
  const bool has_min = code == CKV_Q4_1 || code == CKV_Q5_1, five = code == CKV_Q5_0 || code == CKV_Q5_1;
  const float m = has_min ? ckv_from_f16(b_half_at(p + 2)) : 0;
  const uint8_t *q = p + (has_min ? 4 : 2);
  if (code == CKV_Q8_0) {
    for (uint32_t i = 0; i < 32; i++) out[i] = (float)(int8_t)q[i] * d;
    return;
  }
  uint32_t high = 0;
  if (five) {
    memcpy(&high, q, 4);
    q += 4;
  }
  const int32_t zero = code == CKV_Q4_0 ? 8 : code == CKV_Q5_0 ? 16 : 0;
  for (uint32_t half = 0; half < 2; half++) {
    for (uint32_t i = 0; i < 16; i++) {
      uint32_t x = half ? q[i] >> 4 : q[i] & 15u;
      if (five) x |= (high >> (i + 16 * half) & 1u) << 4;
      int32_t value = code == CKV_IQ4_NL ? b_iq4_values[x] : (int32_t)x - zero;
      float product = (float)value * d;
      out[i + 16 * half] = has_min ? product + m : product;
    }
  }
}

CKV_INLINE void b_decode_blocks(const ckv_run *run, const uint32_t code, uint32_t first, uint32_t count, float *out,
                                size_t out_stride) {
  const uint32_t block = ckv_block_bytes(code), blocks = run->dim / B_CHANNELS;
  const uint8_t *p = (const uint8_t *)run->data + (size_t)first * blocks * block;
  for (uint32_t i = 0; i < count; i++)
    for (uint32_t b = 0; b < blocks; b++, p += block) b_decode_block(p, code, out + i * out_stride + b * B_CHANNELS);
}

static __attribute__((noinline)) void decode_blocks(const ckv_run *run, uint32_t first, uint32_t count, float *out,
                                                    size_t out_stride) {
  if (run->kind == CKV_GGML) {
    switch (run->code) {
      case CKV_Q8_0: b_decode_blocks(run, CKV_Q8_0, first, count, out, out_stride); break;
      case CKV_Q5_0: b_decode_blocks(run, CKV_Q5_0, first, count, out, out_stride); break;
      case CKV_Q5_1: b_decode_blocks(run, CKV_Q5_1, first, count, out, out_stride); break;
      case CKV_Q4_0: b_decode_blocks(run, CKV_Q4_0, first, count, out, out_stride); break;
      case CKV_Q4_1: b_decode_blocks(run, CKV_Q4_1, first, count, out, out_stride); break;
      default: b_decode_blocks(run, CKV_IQ4_NL, first, count, out, out_stride); break;
    }
    return;
  }
  switch (run->code) {
    case CKV_INT8: b_decode_scaled(run, CKV_INT8, first, count, out, out_stride); break;
    case CKV_INT4: b_decode_scaled(run, CKV_INT4, first, count, out, out_stride); break;
    case CKV_E4M3: b_decode_scaled(run, CKV_E4M3, first, count, out, out_stride); break;
    default: b_decode_scaled(run, CKV_E5M2, first, count, out, out_stride); break;
  }
}

/* ---- encoding scaled rows ------------------------------------------------------------------------------------ */

/* The largest magnitude, as its bits. */
CKV_INLINE uint32_t b_highest(const float *x, uint32_t n) {
  uint32_t high = 0;
  for (uint32_t i = 0; i < n; i++) {
    uint32_t u = ckv_bits_of(x[i]) & 0x7fffffffu;
    high = u > high ? u : high;
  }
  return high;
}

/* x / s, rounded to nearest even within +-most. */
CKV_INLINE int32_t b_rounded(float x, float s, float most) {
  float t = x / s;
  t = t > -most ? t : -most;
  t = t < most ? t : most;
  return (int32_t)((t + CKV_ROUND_MAGIC) - CKV_ROUND_MAGIC);
}

/* Channels [c, c + n) of a row to codes of scale s. c is even; s may be 0: then every code stands for 0. */
CKV_INLINE void b_encode_span(const float *x, const uint32_t code, uint32_t c, uint32_t n, float s, uint8_t *row) {
  const bool vanishes = s == 0;
  const float by = vanishes ? INFINITY : s; /* all finite numbers are 0 of these */
  if (code == CKV_INT8) {
    for (uint32_t i = 0; i < n; i++) row[c + i] = (uint8_t)b_rounded(x[i], by, 127.0f);
  } else if (code == CKV_INT4) {
    for (uint32_t i = 0; i < n / 2; i++) {
      uint32_t low = (uint32_t)(b_rounded(x[2 * i], by, 7.0f) + 8);
      uint32_t high = (uint32_t)(b_rounded(x[2 * i + 1], by, 7.0f) + 8);
      row[c / 2 + i] = (uint8_t)(low | high << 4);
    }
    /* The nibble without a channel stands for 0 too. */
    if (n % 2) row[(c + n) / 2] = (uint8_t)((uint32_t)(b_rounded(x[n - 1], by, 7.0f) + 8) | 0x80u);
  } else {
    for (uint32_t i = 0; i < n; i++) row[c + i] = b_to_fp8(x[i] / by, code);
  }
}

/* The scale of a largest magnitude, rounded to the type it is stored in. */
CKV_INLINE float b_store_scale(const ckv_run *run, const uint32_t code, uint32_t highest, size_t at) {
  float most = code == CKV_INT8 ? 127.0f : code == CKV_INT4 ? 7.0f : b_largest(code);
  ckv_store_scalar((void *)(uintptr_t)run->scale, run->dtype, at, ckv_float_of(highest) / most);
  return ckv_load_scalar(run->scale, run->dtype, at);
}

CKV_INLINE void b_encode_scaled(const ckv_run *run, const uint32_t code, uint32_t first, uint32_t count,
                                const float *src, size_t stride) {
  const size_t bytes = ckv_row_bytes(run->kind, run->code, run->dim);
  const uint32_t groups = (run->dim + run->group - 1) / run->group;
  uint8_t *row = (uint8_t *)(uintptr_t)run->data + (size_t)first * bytes;
  float s = run->factor;
  for (uint32_t i = 0; i < count; i++, row += bytes) {
    const float *x = src + i * stride;
    if (run->kind == CKV_SCALED_BLOCK && (first + i) % run->group == 0) {
      uint32_t high = 0;
      for (uint32_t r = 0; r < run->group; r++)
        high = ckv_max_u32(high, b_highest(x + r * stride, run->dim));
      s = b_store_scale(run, code, high, (first + i) / run->group);
    }
    for (uint32_t c = 0, n; c < run->dim; c += n) {
      n = b_span(run, c);
      if (run->kind == CKV_SCALED_ROW)
        s = b_store_scale(run, code, b_highest(x + c, n), (size_t)(first + i) * groups + c / run->group);
      b_encode_span(x + c, code, c, n, s, row);
    }
  }
}

/* ---- encoding ggml's blocks ------------------------------------------------------------------------------------ */

/* Numbers in the order of their values as integers, a negative zero just below zero. */
CKV_INLINE int32_t b_ordered(float x) {
  int32_t i = (int32_t)ckv_bits_of(x);
  return i ^ (int32_t)((uint32_t)(i >> 31) >> 1);
}

CKV_INLINE float b_from_ordered(int32_t i) {
  return ckv_float_of((uint32_t)(i ^ (int32_t)((uint32_t)(i >> 31) >> 1)));
}

/* The smallest and the largest. Of zeros of both signs the first counts, as when comparing one after the other. */
CKV_INLINE void b_range(const float *x, float *low, float *high) {
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (uint32_t i = 0; i < 32; i++) {
    int32_t u = b_ordered(x[i]);
    least = u < least ? u : least;
    most = u > most ? u : most;
  }
  *low = b_from_ordered(least);
  *high = b_from_ordered(most);
  if (*low == 0) {
    uint32_t i = 0;
    while (x[i] != 0) i++;
    *low = x[i];
  }
}

/* The element of largest magnitude, the first of equals. */
CKV_INLINE float b_extreme(const float *x) {
  uint32_t high = b_highest(x, 32), i = 0;
  while ((ckv_bits_of(x[i]) & 0x7fffffffu) != high) i++;
  return x[i];
}

/* 1 / d; 0 where that does not exist: all codes are then those of zero. */
CKV_INLINE float b_inverse(float d) {
  float id = d == 0 ? 0 : 1.0f / d;
  return id - id == 0 ? id : 0;
}

CKV_INLINE void b_put_half(uint8_t *p, float x) {
  uint16_t h = ckv_to_f16(x);
  memcpy(p, &h, 2);
}

CKV_INLINE void b_put_nibbles(const uint8_t *codes, uint8_t *q) {
  for (uint32_t i = 0; i < 16; i++) q[i] = (uint8_t)((codes[i] & 15u) | codes[i + 16] << 4);
}

CKV_INLINE void b_encode_q8_0(const float *x, uint8_t *p) {
  float d = ckv_float_of(b_highest(x, 32)) / 127.0f, id = b_inverse(d);
  b_put_half(p, d);
  for (uint32_t i = 0; i < 32; i++) { /* to nearest, halves away from zero */
    float t = x[i] * id;
    int32_t whole = (int32_t)t;
    float rest = t - (float)whole;
    p[2 + i] = (uint8_t)(whole + (rest >= 0.5f) - (rest <= -0.5f));
  }
}

/* 4 and 5 bits, a signed scale (levels = 16, 32). */
CKV_INLINE void b_encode_signed(const float *x, const uint32_t bits, uint8_t *p) {
  const float half = bits == 4 ? 8 : 16;
  const int32_t most = bits == 4 ? 15 : 31;
  float d = b_extreme(x) / -half, id = b_inverse(d);
  uint8_t codes[32];
  b_put_half(p, d);
  for (uint32_t i = 0; i < 32; i++) {
    int32_t q = (int32_t)(x[i] * id + (half + 0.5f));
    codes[i] = (uint8_t)(q < most ? q : most);
  }
  if (bits == 5) {
    uint32_t high = 0;
    for (uint32_t i = 0; i < 32; i++) high |= (uint32_t)(codes[i] >> 4) << i;
    memcpy(p + 2, &high, 4);
  }
  b_put_nibbles(codes, p + (bits == 5 ? 6 : 2));
}

/* 4 and 5 bits, scale and minimum. */
CKV_INLINE void b_encode_ranged(const float *x, const uint32_t bits, uint8_t *p) {
  const int32_t most = bits == 4 ? 15 : 31;
  float low, high, d, id;
  b_range(x, &low, &high);
  d = (high - low) / (float)most;
  id = b_inverse(d);
  uint8_t codes[32];
  b_put_half(p, d);
  b_put_half(p + 2, low);
  for (uint32_t i = 0; i < 32; i++) {
    int32_t q = (int32_t)((x[i] - low) * id + 0.5f);
    codes[i] = (uint8_t)(q < most ? q : most);
  }
  if (bits == 5) {
    uint32_t top = 0;
    for (uint32_t i = 0; i < 32; i++) top |= (uint32_t)(codes[i] >> 4) << i;
    memcpy(p + 4, &top, 4);
  }
  b_put_nibbles(codes, p + (bits == 5 ? 8 : 4));
}

/* The scale is fitted to the codes that the scale of the extreme element gives, by least squares with weights x^2;
 * the sums are in order. */
CKV_INLINE void b_encode_iq4_nl(const float *x, uint8_t *p) {
  float extreme = b_extreme(x), magnitude = extreme < 0 ? -extreme : extreme;
  float id = magnitude < 1e-15f ? 0 : b_inverse(extreme / -127.0f);
  uint8_t codes[32];
  float weighted[32], squares[32];
  for (uint32_t i = 0; i < 32; i++) {
    float t = x[i] * id;
    int32_t code = 0, value = -127;
    CKV_UNROLL
    for (uint32_t k = 1; k < 16; k++) { /* halfway the larger value wins */
      float middle = 0.5f * (float)(b_iq4_values[k - 1] + b_iq4_values[k]);
      int32_t at_least = -(int32_t)(t >= middle);
      code -= at_least;
      value += at_least & (b_iq4_values[k] - b_iq4_values[k - 1]);
    }
    codes[i] = (uint8_t)code;
    float w = x[i] * x[i], q = (float)value;
    weighted[i] = w * q * x[i];
    squares[i] = w * q * q;
  }
  float above = 0, below = 0;
  CKV_UNROLL
  for (uint32_t i = 0; i < 32; i++) {
    above += weighted[i];
    below += squares[i];
  }
  /* Squares of very small numbers vanish, of very large ones overflow: the scale of the extreme element is left. */
  float d = above / below;
  if (!(d - d == 0)) d = extreme / -127.0f;
  b_put_half(p, id == 0 ? 0 : d);
  b_put_nibbles(codes, p + 2);
}

CKV_INLINE void b_encode_blocks(const ckv_run *run, const uint32_t code, uint32_t first, uint32_t count,
                                const float *src, size_t stride) {
  const uint32_t block = ckv_block_bytes(code), blocks = run->dim / B_CHANNELS;
  uint8_t *p = (uint8_t *)(uintptr_t)run->data + (size_t)first * blocks * block;
  for (uint32_t i = 0; i < count; i++) {
    for (uint32_t b = 0; b < blocks; b++, p += block) {
      const float *x = src + i * stride + b * B_CHANNELS;
      switch (code) {
        case CKV_Q8_0: b_encode_q8_0(x, p); break;
        case CKV_Q5_0: b_encode_signed(x, 5, p); break;
        case CKV_Q5_1: b_encode_ranged(x, 5, p); break;
        case CKV_Q4_0: b_encode_signed(x, 4, p); break;
        case CKV_Q4_1: b_encode_ranged(x, 4, p); break;
        default: b_encode_iq4_nl(x, p); break;
      }
    }
  }
}

static void encode_blocks(const ckv_run *run, uint32_t first, uint32_t count, const float *src, size_t stride) {
  if (run->kind == CKV_GGML) {
    switch (run->code) {
      case CKV_Q8_0: b_encode_blocks(run, CKV_Q8_0, first, count, src, stride); break;
      case CKV_Q5_0: b_encode_blocks(run, CKV_Q5_0, first, count, src, stride); break;
      case CKV_Q5_1: b_encode_blocks(run, CKV_Q5_1, first, count, src, stride); break;
      case CKV_Q4_0: b_encode_blocks(run, CKV_Q4_0, first, count, src, stride); break;
      case CKV_Q4_1: b_encode_blocks(run, CKV_Q4_1, first, count, src, stride); break;
      default: b_encode_blocks(run, CKV_IQ4_NL, first, count, src, stride); break;
    }
    return;
  }
  switch (run->code) {
    case CKV_INT8: b_encode_scaled(run, CKV_INT8, first, count, src, stride); break;
    case CKV_INT4: b_encode_scaled(run, CKV_INT4, first, count, src, stride); break;
    case CKV_E4M3: b_encode_scaled(run, CKV_E4M3, first, count, src, stride); break;
    default: b_encode_scaled(run, CKV_E5M2, first, count, src, stride); break;
  }
}
