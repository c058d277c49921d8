/* Encoding and decoding: the layout against a naive reading of its description, the error against half a step, and
 * every level against portable bit for bit. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const uint32_t dims[] = {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 40, 63, 64, 67, 80, 96, 127, 128, 129, 192, 256};
static const uint32_t all_bits[] = {2, 3, 4, 8};

/* Rows of one kind of run, encoded, with what encoding was given. */
typedef struct {
  ckv_run run;
  uint32_t *codes;
  void *scale, *min, *src;
  uint32_t src_type;
  size_t src_stride, code_count, meta_count;
} encoded;

static encoded encode(const ckv_kernels *k, encoded e) {
  const ckv_run *r = &e.run;
  bool channel = r->kind == CKV_AFFINE_CHANNEL;
  e.codes = exact(e.code_count * 4);
  e.scale = exact(e.meta_count * size_of(r->dtype));
  e.min = exact(e.meta_count * size_of(r->dtype));
  (channel ? k->encode_channel : k->encode_row)(e.src, e.src_type, e.src_stride, r->rows, r->dim, r->group, r->bits,
                                                r->dtype, e.codes, e.scale, e.min);
  e.run.data = e.codes;
  e.run.scale = e.scale;
  e.run.min = e.min;
  return e;
}

static void release(encoded e) {
  free(e.codes);
  free(e.scale);
  free(e.min);
}

/* A code, one bit at a time. */
static uint32_t naive_code(const ckv_run *r, uint32_t row, uint32_t c) {
  const uint32_t *words = r->data;
  uint32_t low_bits = r->bits == 3 ? 2 : r->bits, code = 0;
  for (uint32_t b = 0; b < r->bits; b++) {
    bool high = b >= low_bits;
    uint32_t width = high ? 1 : low_bits, bit = high ? 0 : b;
    size_t word;
    uint32_t at;
    if (r->kind == CKV_AFFINE_CHANNEL) {
      uint32_t g = row / r->group, i = row % r->group, per = 32 / width;
      word = (size_t)g * (r->group * r->bits / 32) * r->dim + c + (size_t)(i / per) * r->dim;
      if (high) word += (size_t)(r->group * 2 / 32) * r->dim;
      at = i % per * width + bit;
    } else {
      uint32_t low_words = (r->dim * low_bits + 31) / 32, high_words = r->bits == 3 ? (r->dim + 31) / 32 : 0;
      word = (size_t)row * (low_words + high_words) + (high ? low_words : 0) + c * width / 32;
      at = c * width % 32 + bit;
    }
    code |= (words[word] >> at & 1) << b;
  }
  return code;
}

/* Values of different sizes per channel; some groups constant, some zero, some tiny. */
static void fill(void *src, uint32_t type, size_t stride, uint32_t rows, uint32_t dim, const ckv_kernels *k) {
  rng r = {rows * 131 + dim};
  float *line = exact(stride * sizeof(float));
  for (uint32_t i = 0; i < rows; i++) {
    for (uint32_t c = 0; c < stride; c++) {
      float x = rng_float(&r) * (c % 11 == 3 ? 30 : 1) + (c % 7 == 2 ? -9 : 0);
      if (c / 32 % 5 == 1 && i % 5 == 2) x = 2.5f; /* a constant group of a row */
      if (c % 13 == 5) x = -0.75f;                 /* a constant channel */
      if (c % 17 == 6) x = i % 2 ? 0.0f : -0.0f;
      if (c % 19 == 7) x *= 1e-9f; /* a scale that f16 rounds to zero */
      if (c % 23 == 8) x *= 3e-6f; /* a subnormal one */
      line[c] = x;
    }
    uint32_t n = i + 1 == rows ? dim : (uint32_t)stride; /* nothing after the last row */
    k->convert((char *)src + (size_t)i * stride * size_of(type), type, line, CKV_F32, n);
  }
  free(line);
}

static void check_values(encoded e) {
  const ckv_run *r = &e.run;
  uint32_t groups = (r->dim + r->group - 1) / r->group;
  double levels = (1 << r->bits) - 1;
  float *out = exact((size_t)r->rows * r->dim * 4);
  ckv_named("portable")->decode(r, 0, r->rows, out, r->dim);
  for (uint32_t i = 0; i < r->rows; i++) {
    for (uint32_t c = 0; c < r->dim; c++) {
      bool channel = r->kind == CKV_AFFINE_CHANNEL;
      size_t meta = channel ? (size_t)(i / r->group) * r->dim + c : (size_t)i * groups + c / r->group;
      float s = (float)value_of(r->scale, r->dtype, meta), mn = (float)value_of(r->min, r->dtype, meta);
      float product = (float)naive_code(r, i, c) * s, want = product + mn;
      expect(memcmp(&want, &out[(size_t)i * r->dim + c], 4) == 0, "portable decode kind %u bits %u dim %u row %u c %u",
             r->kind, r->bits, r->dim, i, c);
      /* Half a step; what rounding min and scale to their type took off the ends of the range. A scale that
       * vanished stands for a range of at most levels * 2^-25. */
      double relative = r->dtype == CKV_F32 ? 0x1p-24 : r->dtype == CKV_F16 ? 0x1p-11 : 0x1p-8;
      double x = value_of(e.src, e.src_type, (size_t)i * e.src_stride + c);
      double bound = (double)s / 2 + relative * (fabs((double)mn) + levels * (double)s) * 1.01 +
                     (levels + 1) * 0x1p-25 + 4 * 0x1p-24 * (fabs(x) + fabs((double)mn));
      expect(fabs((double)want - x) <= bound, "portable encode kind %u bits %u dim %u row %u c %u: %g for %g", r->kind,
             r->bits, r->dim, i, c, (double)want, x);
    }
  }
  free(out);
}

static void check_case(pair p, uint32_t kind, uint32_t dim, uint32_t bits, uint32_t group, uint32_t type,
                       uint32_t src_type) {
  uint32_t rows = kind == CKV_AFFINE_CHANNEL ? 2 * group : 37, groups = (dim + group - 1) / group;
  encoded e = {.run = {.kind = kind, .dtype = type, .bits = bits, .group = group, .dim = dim, .rows = rows},
               .src_type = src_type, .src_stride = dim + dim % 3};
  bool channel = kind == CKV_AFFINE_CHANNEL;
  e.code_count = channel ? (size_t)2 * ckv_group_words(group, bits) * dim : (size_t)rows * ckv_row_words(dim, bits);
  e.meta_count = channel ? (size_t)2 * dim : (size_t)rows * groups;
  e.src = exact(((size_t)(rows - 1) * e.src_stride + dim) * size_of(src_type));
  fill(e.src, src_type, e.src_stride, rows, dim, p.portable);
  encoded want = encode(p.portable, e), got = encode(p.level, e);
  const char *label = channel ? "channel" : "row";
  expect(memcmp(want.scale, got.scale, e.meta_count * size_of(type)) == 0, "%s encode %s scale dim %u bits %u group %u",
         p.level->name, label, dim, bits, group);
  expect(memcmp(want.min, got.min, e.meta_count * size_of(type)) == 0, "%s encode %s min dim %u bits %u group %u",
         p.level->name, label, dim, bits, group);
  expect(memcmp(want.codes, got.codes, e.code_count * 4) == 0,
         "%s encode %s codes dim %u bits %u group %u type %u src %u", p.level->name,
          label, dim, bits, group, type, src_type);
  if (p.level == p.portable) check_values(want);
  static const uint32_t starts[] = {0, 1, 13, 30};
  for (int i = 0; i < 4; i++) {
    uint32_t first = starts[i], count = i == 0 ? rows : i == 3 ? 7 : rows - first - 1;
    size_t stride = dim + (size_t)i, n = (count - 1) * stride + dim;
    float *a = exact(n * 4), *b = exact(n * 4);
    p.portable->decode(&want.run, first, count, a, stride);
    p.level->decode(&want.run, first, count, b, stride);
    expect(memcmp(a, b, n * 4) == 0, "%s decode %s dim %u bits %u group %u first %u", p.level->name, label, dim, bits,
           group, first);
    free(a);
    free(b);
  }
  release(want);
  release(got);
  free(e.src);
}

/* The example of the format description: words and codes by hand. */
static void check_golden(pair p) {
  static const float x[16] = {0.1f, 0.9f, -0.5f, 1.5f};
  uint32_t word;
  float s, mn;
  p.level->encode_row(x, CKV_F32, 4, 1, 4, 32, 2, CKV_F32, &word, &s, &mn);
  expect(word == (1u | 2u << 2 | 0u << 4 | 3u << 6) && mn == -0.5f, "%s golden 2 bits: %x", p.level->name, word);
  p.level->encode_row(x, CKV_F32, 4, 1, 4, 32, 4, CKV_F32, &word, &s, &mn);
  expect(word == (4u | 10u << 4 | 0u << 8 | 15u << 12), "%s golden 4 bits: %x", p.level->name, word);
  static const float codes[16] = {3, 0, 1, 2, 2, 3, 0, 1, 1, 1, 0, 0, 3, 3, 2, 2};
  p.level->encode_row(codes, CKV_F32, 16, 1, 16, 32, 2, CKV_F32, &word, &s, &mn);
  expect(word == 0xAF054E93u && s == 1 && mn == 0, "%s golden packing: %x", p.level->name, word);
}

void check_coding(pair p) {
  check_golden(p);
  uint32_t turn = 0;
  for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
    for (size_t b = 0; b < 4; b++) {
      for (uint32_t group = 32; group <= 128; group *= 2) {
        for (uint32_t kind = CKV_AFFINE_CHANNEL; kind <= CKV_AFFINE_ROW; kind++, turn++)
          check_case(p, kind, dims[d], all_bits[b], group, turn % 3, turn / 3 % 3);
      }
      check_case(p, CKV_AFFINE_ROW, dims[d], all_bits[b], 20, turn % 3, CKV_F32);
      check_case(p, CKV_AFFINE_CHANNEL, dims[d], all_bits[b], 96, turn % 3, CKV_F16);
    }
  }
  check_case(p, CKV_AFFINE_ROW, 4096, 3, 64, CKV_F16, CKV_F32);
  check_case(p, CKV_AFFINE_CHANNEL, 4096, 8, 32, CKV_F16, CKV_F32);
}
