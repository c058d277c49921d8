/* logits over codes with the dot product instructions, for the level "neon" on CPUs that have them, up to
 * CKV_MANY_QUERIES query rows: KIVI's keys of 2, 4 and 8 bits, scaled integers and ggml's blocks.
 *
 * As on x86 (avx512_keys.c, avx512_block_keys.c) a query row, folded with the scales of its channels where there are
 * such, is held in 16-bit fixed point, relative to its largest element, as two signed bytes; sums of bytes times codes
 * are exact integers. What is lost is one rounding of the query. */
#if defined(__aarch64__)
#include "internal.h"

#include <arm_neon.h>

#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)

#include "lanes_neon.h"

#include "lanes_typed.h"

enum { QUERIES = 4, BLOCK = 32 };

/* Query rows as digits. */
typedef struct {
  int8_t *low, *high; /* [query row][stride] */
  size_t stride;
  float factor[QUERIES], bias[QUERIES];
} digits;

/* Bytes of both digits of all query rows, as floats. */
static size_t digit_floats(uint32_t dim) { return (((size_t)dim + BLOCK - 1) / BLOCK) * BLOCK * QUERIES * 2 / 4; }

CKV_INLINE digits digits_at(float *scratch, uint32_t dim) {
  digits to = {.low = (int8_t *)scratch, .stride = ((size_t)dim + BLOCK - 1) / BLOCK * BLOCK};
  to.high = to.low + QUERIES * to.stride;
  return to;
}

CKV_INLINE void store_digits(vf x, vf up, int8_t *low, int8_t *high) {
  const int32x4_t fixed = vcvtnq_s32_f32(x * up);
  const int32x4_t first = vshrq_n_s32(vshlq_n_s32(fixed, 24), 24);
  const int32x4_t second = vshrq_n_s32(vsubq_s32(fixed, first), 8);
  const int8x8_t both = vmovn_s16(vcombine_s16(vmovn_s32(first), vmovn_s32(second)));
  const uint64_t bytes = vget_lane_u64(vreinterpret_u64_s8(both), 0);
  const uint32_t a = (uint32_t)bytes, b = (uint32_t)(bytes >> 32);
  memcpy(low, &a, 4);
  memcpy(high, &b, 4);
}

/* ---- one scale a channel and group of rows ------------------------------------------------------------------------ */

/* Query row j folded with the scales of group g: q scale as digits, and what the mins and the middle of the codes give. */
CKV_INLINE void fold(const ckv_run *run, uint32_t g, const float *q, uint32_t j, float scale, digits *to) {
  const uint32_t dim = run->dim, type = run->dtype;
  const char *scales = (const char *)run->scale + (size_t)g * dim * ckv_size_of(type);
  const char *mins = (const char *)run->min + (size_t)g * dim * ckv_size_of(type);
  const vf middle = vf_set1(ckv_middle(run->bits));
  vf most = vf_zero(), bias = vf_zero();
  for (uint32_t c = 0; c < dim; c += 4) {
    const uint32_t n = ckv_min_u32(4, dim - c);
    const vf s = vf_load_as_n(ckv_offset(scales, type, c), type, n), y = vf_load_n(q + c, n);
    bias = vf_fma(y, vf_fma(s, middle, vf_load_as_n(ckv_offset(mins, type, c), type, n)), bias);
    most = vf_max(vf_abs(y * s), most);
  }
  const float largest = vf_highest(most);
  const vf up = vf_set1(ckv_fixed_up(largest, CKV_FULL_RANGE));
  to->factor[j] = scale * ckv_fixed_down(largest, CKV_FULL_RANGE);
  to->bias[j] = scale * vf_sum(bias);
  int8_t *low = to->low + j * to->stride, *high = to->high + j * to->stride;
  for (uint32_t c = 0; c < to->stride; c += 4) {
    const uint32_t n = c < dim ? ckv_min_u32(4, dim - c) : 0;
    const vf s = n ? vf_load_as_n(ckv_offset(scales, type, c), type, n) : vf_zero();
    store_digits(n ? vf_load_n(q + c, n) * s : vf_zero(), up, low + c, high + c);
  }
}

/* Byte k of four channels in dword k. */
CKV_INLINE uint8x16_t load_four(const uint32_t *words, uint32_t n) {
  static const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  uint32_t some[4] = {0};
  if (n < 4) memcpy(some, words, (size_t)n * 4);
  return vqtbl1q_u8(vreinterpretq_u8_u32(vld1q_u32(n < 4 ? some : words)), vld1q_u8(order));
}

/* Logits of the rows of one row of words: 4, 8 or 16 of them. */
CKV_INLINE void word_logits(const uint32_t *words, uint32_t dim, const uint32_t bits, const digits *d, const uint32_t nq,
                            float out[QUERIES][16]) {
  const uint32_t parts = 8 / bits;
  int32x4_t low[QUERIES][4], high[QUERIES][4];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (uint32_t h = 0; h < parts; h++) low[j][h] = high[j][h] = vdupq_n_s32(0);
  for (uint32_t c = 0; c < dim; c += 16) {
    int8x16_t first[QUERIES], second[QUERIES];
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      first[j] = vld1q_s8(d->low + j * d->stride + c);
      second[j] = vld1q_s8(d->high + j * d->stride + c);
    }
/* The lane of a dot product is part of the instruction, so no loop can count it. */
#define QUAD(i)                                                                                               \
  if (c + 4 * i < dim) {                                                                                      \
    const uint8x16_t x = load_four(words + c + 4 * i, ckv_min_u32(4, dim - c - 4 * i));                       \
    int8x16_t code[4];                                                                                        \
    CKV_UNROLL                                                                                                \
    for (uint32_t h = 0; h < parts; h++) {                                                                    \
      uint8x16_t part = bits == 8 ? x : vandq_u8(vshlq_u8(x, vdupq_n_s8(-(int8_t)(h * bits))),                \
                                                 vdupq_n_u8((uint8_t)((1u << bits) - 1)));                    \
      code[h] = vreinterpretq_s8_u8(vsubq_u8(part, vdupq_n_u8((uint8_t)(1u << (bits - 1)))));                 \
    }                                                                                                         \
    CKV_UNROLL                                                                                                \
    for (uint32_t j = 0; j < nq; j++) CKV_UNROLL for (uint32_t h = 0; h < parts; h++) {                       \
        low[j][h] = vdotq_laneq_s32(low[j][h], code[h], first[j], i);                                         \
        high[j][h] = vdotq_laneq_s32(high[j][h], code[h], second[j], i);                                      \
      }                                                                                                       \
  }
    QUAD(0) QUAD(1) QUAD(2) QUAD(3)
#undef QUAD
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    float32x4x4_t y = {{vf_zero(), vf_zero(), vf_zero(), vf_zero()}};
    CKV_UNROLL
    for (uint32_t h = 0; h < parts; h++) {
      const vf sum = vf_fma(vcvtq_f32_s32(high[j][h]), vf_set1(256), vcvtq_f32_s32(low[j][h]));
      y.val[h] = vf_fma(sum, vf_set1(d->factor[j]), vf_set1(d->bias[j]));
    }
    const float32x4x2_t pair = {{y.val[0], y.val[1]}};
    if (bits == 8) vst1q_f32(out[j], y.val[0]);
    else if (bits == 4) vst2q_f32(out[j], pair);
    else vst4q_f32(out[j], y);
  }
}

CKV_INLINE void channel_logits(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t count, const float *q,
                               const uint32_t nq, size_t q_stride, float scale, float *out, size_t ld, digits *d) {
  const uint32_t dim = run->dim, rows = 32 / bits, end = first + count;
  for (uint32_t row = first; row < end;) {
    const uint32_t g = row / run->group, last = ckv_min_u32(end, (g + 1) * run->group);
    for (uint32_t j = 0; j < nq; j++) fold(run, g, q + j * q_stride, j, scale, d);
    const uint32_t *codes = ckv_group_codes(run, g);
    while (row < last) {
      const uint32_t w = (row - g * run->group) / rows, begin = (row - g * run->group) % rows;
      const uint32_t n = ckv_min_u32(rows - begin, last - row);
      float some[QUERIES][16];
      word_logits(codes + (size_t)w * dim, dim, bits, d, nq, some);
      for (uint32_t j = 0; j < nq; j++) memcpy(out + j * ld + (row - first), some[j] + begin, (size_t)n * 4);
      row += n;
    }
  }
}

CKV_INLINE void channel_logits_of(const ckv_run *run, const uint32_t bits, uint32_t first, uint32_t count, const float *q,
                                  uint32_t m, size_t q_stride, float scale, float *out, size_t ld, digits *d) {
  /* Codes of two bits have twice the sums of four: half as many query rows at a time stay in registers. */
  const uint32_t most = bits == 2 ? 2 : 4;
  uint32_t j = 0;
  for (; j + most <= m; j += most)
    channel_logits(run, bits, first, count, q + j * q_stride, most, q_stride, scale, out + j * ld, ld, d);
  for (; j < m; j++)
    channel_logits(run, bits, first, count, q + j * q_stride, 1, q_stride, scale, out + j * ld, ld, d);
}

/* ---- scaled integers and ggml's blocks ----------------------------------------------------------------------------- */

/* Codes of 32 channels as signed bytes. `have` bytes of them are there. */
CKV_INLINE void load_codes(const ckv_run *run, const uint8_t *at, uint32_t have, int8x16_t code[2]) {
  static const int8_t values[16] = CKV_IQ4_VALUES;
  static const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  static const uint8_t byte[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  const bool blocks = run->kind == CKV_GGML;
  if (blocks ? run->code == CKV_Q8_0 : run->code == CKV_INT8) {
    uint8_t some[32] = {0};
    if (have < 32) memcpy(some, at, have);
    code[0] = vreinterpretq_s8_u8(vld1q_u8(have < 32 ? some : at));
    code[1] = vreinterpretq_s8_u8(vld1q_u8((have < 32 ? some : at) + 16));
    return;
  }
  uint8_t some[16] = {0};
  if (have < 16) memcpy(some, at, have);
  const uint8x16_t x = vld1q_u8(have < 16 ? some : at), nibble = vdupq_n_u8(15);
  uint8x16_t low = vandq_u8(x, nibble), high = vshrq_n_u8(x, 4);
  if (!blocks) { /* int4: two neighbours a byte */
    const uint8x16_t eight = vdupq_n_u8(8);
    code[0] = vreinterpretq_s8_u8(vsubq_u8(vzip1q_u8(low, high), eight));
    code[1] = vreinterpretq_s8_u8(vsubq_u8(vzip2q_u8(low, high), eight));
    return;
  }
  if (run->code == CKV_IQ4_NL) {
    code[0] = vqtbl1q_s8(vld1q_s8(values), low);
    code[1] = vqtbl1q_s8(vld1q_s8(values), high);
    return;
  }
  if (run->code == CKV_Q5_0 || run->code == CKV_Q5_1) {
    uint32_t fifth;
    memcpy(&fifth, at - 4, 4);
    const uint8x16_t bits = vreinterpretq_u8_u32(vdupq_n_u32(fifth)), index = vld1q_u8(byte), mask = vld1q_u8(bit);
    const uint8x16_t sixteen = vdupq_n_u8(16);
    low = vorrq_u8(low, vandq_u8(vtstq_u8(vqtbl1q_u8(bits, index), mask), sixteen));
    high = vorrq_u8(high, vandq_u8(vtstq_u8(vqtbl1q_u8(bits, vaddq_u8(index, vdupq_n_u8(2))), mask), sixteen));
  }
  const uint8x16_t zero = vdupq_n_u8(run->code == CKV_Q4_0 ? 8 : run->code == CKV_Q5_0 ? 16 : 0);
  code[0] = vreinterpretq_s8_u8(vsubq_u8(low, zero));
  code[1] = vreinterpretq_s8_u8(vsubq_u8(high, zero));
}

/* Logits of rows whose codes lie one row behind the other. sums[j][b]: the query's sum over block b, times the scale. */
CKV_INLINE void row_logits(const ckv_run *run, uint32_t first, uint32_t count, const uint32_t nq, const digits *d,
                           const float *sums, uint32_t blocks, float *out, size_t ld) {
  const bool ggml = run->kind == CKV_GGML, has_min = ggml && (run->code == CKV_Q4_1 || run->code == CKV_Q5_1);
  const uint32_t block_bytes = ggml ? ckv_block_bytes(run->code) : run->code == CKV_INT8 ? BLOCK : BLOCK / 2;
  const uint32_t head = ggml ? block_bytes - (run->code == CKV_Q8_0 ? BLOCK : BLOCK / 2) : 0;
  const size_t row_bytes = ckv_row_bytes(run->kind, run->code, run->dim);
  /* Blocks that share a scale. */
  const uint32_t shared = ggml ? 1 : run->kind == CKV_SCALED_ROW && run->group < run->dim ? run->group / BLOCK : blocks;
  for (uint32_t i = 0; i < count; i++) {
    const uint32_t row = first + i;
    const uint8_t *at = (const uint8_t *)run->data + row * row_bytes;
    vf total[QUERIES];
    float mins[QUERIES] = {0};
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) total[j] = vf_zero();
    for (uint32_t b = 0; b < blocks;) {
      const uint32_t end = ckv_min_u32(b + shared, blocks), groups = (blocks + shared - 1) / shared;
      const float s = ggml                            ? ckv_load_scalar(at + (size_t)b * block_bytes, CKV_F16, 0)
                      : run->kind == CKV_SCALED_FIXED ? run->factor
                      : run->kind == CKV_SCALED_BLOCK ? ckv_load_scalar(run->scale, run->dtype, row / run->group)
                                                      : ckv_load_scalar(run->scale, run->dtype, row * groups + b / shared);
      int32x4_t low[QUERIES], high[QUERIES];
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) low[j] = high[j] = vdupq_n_s32(0);
      const uint32_t begin = b;
      for (; b < end; b++) {
        int8x16_t code[2];
        const size_t offset = (size_t)b * block_bytes;
        load_codes(run, at + offset + head, (uint32_t)(row_bytes - offset - head), code);
        CKV_UNROLL
        for (uint32_t j = 0; j < nq; j++) {
          const int8_t *x = d->low + j * d->stride + b * BLOCK, *y = d->high + j * d->stride + b * BLOCK;
          low[j] = vdotq_s32(vdotq_s32(low[j], code[0], vld1q_s8(x)), code[1], vld1q_s8(x + 16));
          high[j] = vdotq_s32(vdotq_s32(high[j], code[0], vld1q_s8(y)), code[1], vld1q_s8(y + 16));
        }
      }
      const float mn = has_min ? ckv_load_scalar(at + (size_t)begin * block_bytes, CKV_F16, 1) : 0;
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) {
        const vf sum = vf_fma(vcvtq_f32_s32(high[j]), vf_set1(256), vcvtq_f32_s32(low[j]));
        total[j] = vf_fma(sum, vf_set1(s), total[j]);
        if (has_min) mins[j] += mn * sums[j * blocks + begin];
      }
    }
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) out[j * ld + i] = d->factor[j] * vf_sum(total[j]) + mins[j];
  }
}

static void row_logits_of(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                          float scale, float *out, size_t ld, float *scratch) {
  const uint32_t dim = run->dim, blocks = (dim + BLOCK - 1) / BLOCK;
  digits d = digits_at(scratch, dim);
  float *sums = scratch + digit_floats(dim);
  for (uint32_t j = 0, nq; j < m; j += nq) {
    nq = m - j >= QUERIES ? QUERIES : 1;
    for (uint32_t k = 0; k < nq; k++) {
      const float *y = q + (j + k) * q_stride;
      float largest = 0;
      for (uint32_t c = 0; c < dim; c++) largest = fmaxf(largest, fabsf(y[c]));
      const vf up = vf_set1(ckv_fixed_up(largest, CKV_FULL_RANGE));
      d.factor[k] = scale * ckv_fixed_down(largest, CKV_FULL_RANGE);
      for (uint32_t b = 0; b < blocks; b++) {
        vf sum = vf_zero();
        for (uint32_t c = b * BLOCK; c < (b + 1) * BLOCK; c += 4) {
          const vf x = c < dim ? vf_load_n(y + c, ckv_min_u32(4, dim - c)) : vf_zero();
          sum = sum + x;
          store_digits(x, up, d.low + k * d.stride + c, d.high + k * d.stride + c);
        }
        sums[k * blocks + b] = scale * vf_sum(sum);
      }
    }
    if (nq == QUERIES) row_logits(run, first, count, QUERIES, &d, sums, blocks, out + j * ld, ld);
    else row_logits(run, first, count, 1, &d, sums, blocks, out + j * ld, ld);
  }
}

/* ---- the table's entry --------------------------------------------------------------------------------------------- */

static bool is_ours(const ckv_run *run) {
  if (run->kind == CKV_GGML) return true;
  if (run->kind < CKV_SCALED_ROW || run->kind > CKV_SCALED_FIXED) return false;
  if (run->code != CKV_INT8 && run->code != CKV_INT4) return false;
  return run->kind != CKV_SCALED_ROW || run->group >= run->dim || run->group % BLOCK == 0;
}

void ckv_logits_dot(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                    float scale, float *out, size_t ld, float *scratch) {
  if (count == 0 || m == 0) return;
  const bool by_channel = run->kind == CKV_AFFINE_CHANNEL && run->bits != 3;
  if (m >= CKV_MANY_QUERIES || !(by_channel || is_ours(run))) {
    ckv_neon.logits(run, first, count, q, m, q_stride, scale, out, ld, scratch);
    return;
  }
  if (!by_channel) {
    row_logits_of(run, first, count, q, m, q_stride, scale, out, ld, scratch);
    return;
  }
  digits d = digits_at(scratch, run->dim);
  if (run->bits == 2) channel_logits_of(run, 2, first, count, q, m, q_stride, scale, out, ld, &d);
  else if (run->bits == 4) channel_logits_of(run, 4, first, count, q, m, q_stride, scale, out, ld, &d);
  else channel_logits_of(run, 8, first, count, q, m, q_stride, scale, out, ld, &d);
}

size_t ckv_dot_scratch_floats(uint32_t dim) {
  return digit_floats(dim) + QUERIES * (((size_t)dim + BLOCK - 1) / BLOCK);
}

#pragma clang attribute pop
#endif
