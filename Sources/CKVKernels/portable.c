/* The definition of every operation, in plain C. The other levels are checked against this file. */
#include "internal.h"

#include "blocks.h"
#include "lanes_statistics.h"

/* ---- rows ------------------------------------------------------------------------------------------------------ */

static uint32_t code_at(const uint32_t *words, uint32_t index, uint32_t bits, size_t word_stride) {
  uint32_t per = 32 / bits;
  return words[(index / per) * word_stride] >> (index % per * bits) & ((1u << bits) - 1);
}

static float element(const ckv_run *run, uint32_t r, uint32_t c) {
  uint32_t bits = run->bits, dim = run->dim, code;
  size_t meta;
  if (run->kind == CKV_DENSE) return ckv_load_scalar(run->data, run->dtype, (size_t)((int64_t)r * run->row_stride) + c);
  if (run->kind == CKV_AFFINE_CHANNEL) {
    uint32_t g = r / run->group, i = r % run->group;
    const uint32_t *words = ckv_group_codes(run, g) + c;
    if (bits == 3) {
      const uint32_t *high = words + (size_t)(run->group / 16) * dim;
      code = code_at(words, i, 2, dim) | code_at(high, i, 1, dim) << 2;
    } else {
      code = code_at(words, i, bits, dim);
    }
    meta = (size_t)g * dim + c;
  } else {
    const uint32_t *words = (const uint32_t *)run->data + (size_t)r * ckv_row_words(dim, bits);
    if (bits == 3) {
      code = code_at(words, c, 2, 1) | code_at(words + ckv_plane_words(dim, 2), c, 1, 1) << 2;
    } else {
      code = code_at(words, c, bits, 1);
    }
    meta = (size_t)r * ((dim + run->group - 1) / run->group) + c / run->group;
  }
  float product = (float)code * ckv_load_scalar(run->scale, run->dtype, meta);
  return product + ckv_load_scalar(run->min, run->dtype, meta);
}

static void decode(const ckv_run *run, uint32_t first, uint32_t count, float *out, size_t out_stride) {
  if (run->kind >= CKV_SCALED_ROW && run->kind <= CKV_GGML) {
    decode_blocks(run, first, count, out, out_stride);
    return;
  }
  for (uint32_t i = 0; i < count; i++)
    for (uint32_t c = 0; c < run->dim; c++) out[i * out_stride + c] = element(run, first + i, c);
}

static float dot(const float *x, const float *y, size_t n) {
#pragma clang fp reassociate(on)
  float sum = 0;
  for (size_t i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}

static void logits(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                   float scale, float *out, size_t ld, float *scratch) {
  for (uint32_t i = 0; i < count; i++) {
    decode(run, first + i, 1, scratch, run->dim);
    for (uint32_t j = 0; j < m; j++) out[j * ld + i] = scale * dot(q + j * q_stride, scratch, run->dim);
  }
}

static void axpy(float *y, const float *x, float a, size_t n) {
  for (size_t i = 0; i < n; i++) y[i] += a * x[i];
}

static void add_rows(float *y, const float *x, size_t ld, const float *a, uint32_t m, size_t n) {
  for (uint32_t j = 0; j < m; j++) axpy(y, x + j * ld, a[j], n);
}

static void accumulate(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                       float *acc, size_t acc_stride, float *scratch) {
  for (uint32_t i = 0; i < count; i++) {
    decode(run, first + i, 1, scratch, run->dim);
    for (uint32_t j = 0; j < m; j++) axpy(acc + j * acc_stride, scratch, p[j * ld + i], run->dim);
  }
}

static void scale_in_place(float *y, float a, size_t n) {
  for (size_t i = 0; i < n; i++) y[i] *= a;
}

#include "rows_compare.h"
#include "rows_scan.h"

/* ---- softmax ---------------------------------------------------------------------------------------------------- */

/* exp in double: x = n ln 2 + r, |r| <= ln 2 / 2, a Taylor polynomial in r. */
static double exp_double(double x) {
  if (x != x) return x;
  if (x < -160) return 0; /* far below what f32 can hold */
  if (x > 160) x = 160;   /* far above */
  double magic = 0x1.8p52, n = (x * 1.4426950408889634 + magic) - magic;
  double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10, sum = 1;
  for (int k = 13; k >= 1; k--) sum = 1 + sum * r / k;
  uint64_t power = (uint64_t)((int64_t)n + 1023) << 52;
  double two_to_n;
  memcpy(&two_to_n, &power, 8);
  return sum * two_to_n;
}

static double tanh_double(double x) {
  if (x != x) return x;
  double magnitude = x < 0 ? -x : x;
  if (magnitude < 1e-4) return x - x * x * x / 3;
  double e = exp_double(2 * (magnitude < 20 ? magnitude : 20)), t = (e - 1) / (e + 1);
  return x < 0 ? -t : t;
}

static void exp_shift(float *x, size_t n, float shift) {
  for (size_t i = 0; i < n; i++) x[i] = (float)exp_double((double)(x[i] - shift));
}

static float softmax(float *x, uint32_t n, float softcap, const float *bias, float *sum) {
  float max = -INFINITY, total = 0;
  for (uint32_t i = 0; i < n; i++) {
    if (softcap > 0) x[i] = softcap * (float)tanh_double((double)(x[i] / softcap));
    if (bias) x[i] += bias[i];
    if (x[i] > max) max = x[i];
  }
  if (max == -INFINITY) {
    *sum = 0;
    for (uint32_t i = 0; i < n; i++)
      if (x[i] != x[i]) *sum = NAN;
    memset(x, 0, n * sizeof(float));
    return max;
  }
  exp_shift(x, n, max);
  for (uint32_t i = 0; i < n; i++) total += x[i];
  *sum = total;
  return max;
}

/* ---- conversion and encoding ------------------------------------------------------------------------------------ */

static void convert(void *dst, uint32_t dst_type, const void *src, uint32_t src_type, size_t n) {
  if (dst_type == src_type) {
    memmove(dst, src, n * ckv_size_of(src_type));
    return;
  }
  for (size_t i = 0; i < n; i++) ckv_store_scalar(dst, dst_type, i, ckv_load_scalar(src, src_type, i));
}

static int64_t first_nonfinite(const void *src, uint32_t type, size_t n) {
  for (size_t i = 0; i < n; i++)
    if ((ckv_bits_of(ckv_load_scalar(src, type, i)) & 0x7f800000u) == 0x7f800000u) return (int64_t)i;
  return -1;
}

/* Scale and min of values between `low` and `high`, rounded to the type they are stored in. Adding zero turns a
 * negative zero, which is the minimum or not depending on the order of comparison, into a positive one. */
static void affine_of(float low, float high, uint32_t bits, uint32_t meta_type, void *scale, void *min, size_t at,
                      float *s, float *mn) {
  low += 0.0f;
  high += 0.0f;
  ckv_store_scalar(scale, meta_type, at, (high - low) / ckv_levels(bits));
  ckv_store_scalar(min, meta_type, at, low);
  *s = ckv_load_scalar(scale, meta_type, at);
  *mn = ckv_load_scalar(min, meta_type, at);
}

/* Clamped before rounding, which is the same as after it because the limits are integers. The comparisons send NaN
 * (metadata that overflowed to infinity) to 0. */
static uint32_t code_of(float x, float s, float mn, float levels) {
  if (s == 0) return 0;
  float t = (x - mn) / s;
  t = t > 0 ? t : 0;
  t = t < levels ? t : levels;
  float rounded = t + CKV_ROUND_MAGIC;
  return (uint32_t)(rounded - CKV_ROUND_MAGIC);
}

static void encode_channel(const void *src, uint32_t src_type, size_t src_stride, uint32_t rows, uint32_t dim,
                           uint32_t group, uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale,
                           void *min) {
  size_t words = ckv_group_words(group, bits);
  memset(codes, 0, rows / group * words * dim * sizeof(uint32_t));
  for (uint32_t g = 0; g < rows / group; g++) {
    for (uint32_t c = 0; c < dim; c++) {
      size_t start = (size_t)g * group * src_stride + c;
      float low = ckv_load_scalar(src, src_type, start), high = low, s, mn;
      for (uint32_t r = 1; r < group; r++) {
        float x = ckv_load_scalar(src, src_type, start + r * src_stride);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      affine_of(low, high, bits, meta_type, scale, min, (size_t)g * dim + c, &s, &mn);
      uint32_t *to = codes + (size_t)g * words * dim + c, plane = bits == 3 ? 2 : bits;
      for (uint32_t r = 0; r < group; r++) {
        float x = ckv_load_scalar(src, src_type, start + r * src_stride);
        uint32_t code = code_of(x, s, mn, ckv_levels(bits)), per = 32 / plane;
        to[(size_t)(r / per) * dim] |= (code & ((1u << plane) - 1)) << (r % per * plane);
        if (bits == 3) to[(size_t)(group / 16 + r / 32) * dim] |= (code >> 2) << (r % 32);
      }
    }
  }
}

static void encode_row(const void *src, uint32_t src_type, size_t src_stride, uint32_t rows, uint32_t dim,
                       uint32_t group, uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale, void *min) {
  uint32_t groups = (dim + group - 1) / group, words = ckv_row_words(dim, bits), plane = bits == 3 ? 2 : bits;
  uint32_t per = 32 / plane;
  memset(codes, 0, (size_t)rows * words * sizeof(uint32_t));
  for (uint32_t r = 0; r < rows; r++) {
    uint32_t *to = codes + (size_t)r * words;
    for (uint32_t g = 0; g < groups; g++) {
      uint32_t from = g * group, end = ckv_min_u32(dim, from + group);
      float low = ckv_load_scalar(src, src_type, r * src_stride + from), high = low, s, mn;
      for (uint32_t c = from + 1; c < end; c++) {
        float x = ckv_load_scalar(src, src_type, r * src_stride + c);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      affine_of(low, high, bits, meta_type, scale, min, (size_t)r * groups + g, &s, &mn);
      for (uint32_t c = from; c < end; c++) {
        uint32_t code = code_of(ckv_load_scalar(src, src_type, r * src_stride + c), s, mn, ckv_levels(bits));
        to[c / per] |= (code & ((1u << plane) - 1)) << (c % per * plane);
        if (bits == 3) to[ckv_plane_words(dim, 2) + c / 32] |= (code >> 2) << (c % 32);
      }
    }
  }
}

static void hadamard(float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t block) {
  if (block < 2) return;
  for (uint32_t r = 0; r < count; r++)
    for (uint32_t c = 0; c < dim; c += block) ckv_hadamard_block(rows + r * stride + c, block);
}

static void turn(float *rows, size_t stride, uint32_t count, uint32_t pairs, size_t step, size_t partner,
                 const float *cosines, const float *sines, const uint32_t *offsets) {
  if (step == 1) ckv_turn_rows(rows, stride, count, pairs, 1, partner, cosines, sines, offsets);
  else ckv_turn_rows(rows, stride, count, pairs, 2, partner, cosines, sines, offsets);
}

static uint64_t read_memory(const void *data, size_t n) {
  uint64_t sum = 0;
  for (const uint64_t *p = data, *end = p + n / 8; p < end; p++) sum += *p;
  return sum;
}

const ckv_kernels ckv_portable = {
    .name = "portable",
    .logits = logits,
    .accumulate = accumulate,
    .softmax = softmax,
    .exp_shift = exp_shift,
    .axpy = axpy,
    .add_rows = add_rows,
    .scale_in_place = scale_in_place,
    .dot = dot,
    .normalise_rows = normalise_rows,
    .compare_rows = compare_rows,
    .mix_rows = mix_rows,
    .scan_rows = scan_rows,
    .fold = fold,
    .turn = turn,
    .convert = convert,
    .first_nonfinite = first_nonfinite,
    .encode_channel = encode_channel,
    .encode_row = encode_row,
    .encode_blocks = encode_blocks,
    .decode = decode,
    .hadamard = hadamard,
    .read_memory = read_memory,
    CKV_STATISTICS,
};
