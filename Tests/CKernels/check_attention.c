/* logits and accumulate against sums in double over the decoded rows, with the bound of a dot product:
 * terms * eps * sum |x| |y|. For affine runs the two parts of a value, code * scale and min, are summed apart by
 * kernels that fold the scale into the query, so |x| is |code * scale| + |min| there; kernels that hold the folded
 * query or weight in 16-bit fixed point add 2^-16 of its largest for every unit of code from the middle (ckv.h). With
 * scaled rows and blocks that largest is one of queries or weights alone, times the largest scale. Products of bf16 round
 * both factors, and have 8 bits where others have 16. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const uint32_t dims[] = {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 40, 63, 64, 67, 80, 96, 127, 128, 129, 192, 256};
static const uint32_t ms[] = {1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 128};
enum { MAX_M = 128 };
static const double eps = 0x1p-24;

/* A run with its rows and their sizes in double. */
typedef struct {
  ckv_run run;
  void *data, *scale, *min;
  double *x, *size, *step; /* value, |code * scale| + |min|, middle code * scale: rows x dim */
} subject;

/* What the kernels of a level may be off by for the sake of bf16, in terms of the sum of magnitudes. */
static double product_rounding(const ckv_kernels *k, const ckv_run *r, uint32_t m) {
  return strstr(k->name, "bf16") && r->kind == CKV_DENSE && r->dtype != CKV_F32 && m >= 12 ? 0x1.01p-7 : 0;
}

/* What rounding a query or weight once to fixed point costs, of the largest. */
static double code_rounding(const ckv_kernels *k) { return strstr(k->name, "bf16") ? 0x1.03p-8 : 0x1.02p-16; }

static bool is_scaled(const ckv_run *r) { return r->kind >= CKV_SCALED_ROW && r->kind <= CKV_GGML; }

/* The largest code, and the scale and min of an element, of scaled rows and blocks; FP8 is not rounded. */
static double scaled_step(const ckv_run *r, uint32_t row, uint32_t c, double *mn) {
  *mn = 0;
  if (r->kind == CKV_GGML) {
    const char *block = (const char *)r->data + row * ckv_row_bytes(r->kind, r->code, r->dim);
    block += (size_t)(c / 32) * ckv_block_bytes(r->code);
    if (r->code == CKV_Q4_1 || r->code == CKV_Q5_1) *mn = value_of(block, CKV_F16, 1);
    const bool bytes = r->code == CKV_Q8_0 || r->code == CKV_IQ4_NL, four = r->code == CKV_Q4_0 || r->code == CKV_Q4_1;
    double most = bytes ? 128 : four ? 16 : 32;
    return most * fabs(value_of(block, CKV_F16, 0));
  }
  if (r->code != CKV_INT8 && r->code != CKV_INT4) return 0;
  uint32_t groups = (r->dim + r->group - 1) / r->group;
  double scale = r->kind == CKV_SCALED_FIXED   ? (double)r->factor
                 : r->kind == CKV_SCALED_BLOCK ? value_of(r->scale, r->dtype, row / r->group)
                                               : value_of(r->scale, r->dtype, row * groups + c / r->group);
  return (r->code == CKV_INT8 ? 128 : 8) * fabs(scale);
}

static void describe(subject *s) {
  const ckv_run *r = &s->run;
  size_t n = (size_t)r->rows * r->dim;
  float *rows = exact(n * 4);
  s->x = exact(n * sizeof(double));
  s->size = exact(n * sizeof(double));
  s->step = exact(n * sizeof(double));
  ckv_named("portable")->decode(r, 0, r->rows, rows, r->dim);
  uint32_t groups = r->kind == CKV_AFFINE_ROW ? (r->dim + r->group - 1) / r->group : 0;
  for (uint32_t i = 0; i < r->rows; i++) {
    for (uint32_t c = 0; c < r->dim; c++) {
      size_t at = (size_t)i * r->dim + c;
      s->x[at] = (double)rows[at];
      s->size[at] = fabs(s->x[at]);
      s->step[at] = 0;
      if (r->kind == CKV_DENSE) continue;
      if (is_scaled(r)) {
        double mn;
        s->step[at] = scaled_step(r, i, c, &mn);
        s->size[at] = fabs(s->x[at] - mn) + fabs(mn);
        continue;
      }
      size_t meta = groups ? (size_t)i * groups + c / r->group : (size_t)(i / r->group) * r->dim + c;
      double mn = value_of(r->min, r->dtype, meta), scale = value_of(r->scale, r->dtype, meta);
      s->size[at] = fabs(s->x[at] - mn) + fabs(mn);
      s->step[at] = scale * (1 << (r->bits - 1));
    }
  }
  free(rows);
}

static void release(subject *s) {
  free(s->data);
  free(s->scale);
  free(s->min);
  free(s->x);
  free(s->size);
  free(s->step);
}

static float *random_rows(rng *r, uint32_t rows, uint32_t dim, size_t stride) {
  float *x = exact(((size_t)(rows - 1) * stride + dim) * 4);
  for (uint32_t i = 0; i < rows; i++)
    for (uint32_t c = 0; c < dim; c++) x[i * stride + c] = rng_float(r) * (c % 11 == 3 ? 8 : 1) + (c % 7 == 2 ? 3 : 0);
  return x;
}

static subject dense(uint32_t dim, uint32_t rows, uint32_t type) {
  rng r = {dim * 3 + type + 1};
  size_t stride = dim + dim % 4, n = (rows - 1) * stride + dim;
  float *x = random_rows(&r, rows, dim, stride);
  if (type == CKV_F16) x[0] = 65504, x[dim - 1] = -6e-8f; /* the ends of f16 */
  subject s = {.data = exact(n * size_of(type))};
  for (uint32_t i = 0; i < rows; i++)
    ckv_named("portable")->convert((char *)s.data + i * stride * size_of(type), type, x + i * stride, CKV_F32, dim);
  free(x);
  s.run = (ckv_run){.kind = CKV_DENSE, .dtype = type, .dim = dim, .rows = rows, .row_stride = (int64_t)stride,
                    .data = s.data};
  describe(&s);
  return s;
}

static subject affine(uint32_t kind, uint32_t dim, uint32_t rows, uint32_t bits, uint32_t group, uint32_t type) {
  rng r = {dim * 7 + bits};
  const ckv_kernels *k = ckv_named("portable");
  float *x = random_rows(&r, rows, dim, dim);
  for (uint32_t i = 0; i < rows; i++) x[(size_t)i * dim + dim / 2] = -1.25f; /* a channel without range */
  size_t meta = kind == CKV_AFFINE_CHANNEL ? (size_t)rows / group * dim : (size_t)rows * ((dim + group - 1) / group);
  size_t words = kind == CKV_AFFINE_CHANNEL ? (size_t)rows / group * ckv_group_words(group, bits) * dim
                                            : (size_t)rows * ckv_row_words(dim, bits);
  subject s = {.data = exact(words * 4), .scale = exact(meta * size_of(type)), .min = exact(meta * size_of(type))};
  (kind == CKV_AFFINE_CHANNEL ? k->encode_channel : k->encode_row)(x, CKV_F32, dim, rows, dim, group, bits, type,
                                                                   s.data, s.scale, s.min);
  free(x);
  s.run = (ckv_run){.kind = kind, .dtype = type, .bits = bits, .group = group, .dim = dim, .rows = rows,
                    .data = s.data, .scale = s.scale, .min = s.min};
  describe(&s);
  return s;
}

static subject scaled(uint32_t kind, uint32_t code, uint32_t dim, uint32_t rows, uint32_t group, uint32_t type) {
  rng r = {dim * 5 + code};
  float *x = random_rows(&r, rows, dim, dim);
  size_t meta = kind == CKV_SCALED_ROW     ? (size_t)rows * ((dim + group - 1) / group)
                : kind == CKV_SCALED_BLOCK ? rows / group
                                           : 1;
  subject s = {.data = exact(rows * ckv_row_bytes(kind, code, dim)), .scale = exact(meta * size_of(type))};
  s.run = (ckv_run){.kind = kind, .code = code, .dtype = type, .group = group, .dim = dim, .rows = rows,
                    .factor = 0.125f, .data = s.data, .scale = s.scale};
  ckv_named("portable")->encode_blocks(&s.run, 0, rows, x, dim);
  free(x);
  describe(&s);
  return s;
}

/* Parts of the rows: all, an odd inner part, a single row, a part that starts inside a group and crosses one. */
static uint32_t part(uint32_t index, uint32_t rows, uint32_t *first) {
  *first = index == 0 ? 0 : index == 1 ? 3 : index == 2 ? rows - 1 : 29;
  return index == 0 ? rows : index == 1 ? rows - 8 : index == 2 ? 1 : 9;
}

static void check_logits(const ckv_kernels *k, const subject *s) {
  const ckv_run *run = &s->run;
  uint32_t dim = run->dim, rows = run->rows;
  size_t q_stride = dim + dim % 2, ld = rows + 3;
  rng r = {dim + run->bits};
  float *q = random_rows(&r, MAX_M, dim, q_stride), *out = exact(MAX_M * ld * 4), *again = exact(MAX_M * ld * 4);
  double *want = exact((size_t)MAX_M * rows * sizeof(double)), *bound = exact((size_t)MAX_M * rows * sizeof(double));
  double *sizes = exact((size_t)MAX_M * rows * sizeof(double));
  const float scale = 0.37f;
  for (uint32_t j = 0; j < MAX_M; j++) {
    for (uint32_t i = 0; i < rows; i++) {
      double sum = 0, size = 0, largest = 0, most = 0, step = 0;
      for (uint32_t c = 0; c < dim; c++) {
        double y = (double)q[j * q_stride + c];
        sum += y * s->x[(size_t)i * dim + c];
        size += fabs(y) * s->size[(size_t)i * dim + c];
        largest = fmax(largest, fabs(y) * s->step[(size_t)i * dim + c]);
        most = fmax(most, fabs(y));
        step = fmax(step, s->step[(size_t)i * dim + c]);
      }
      if (is_scaled(run) || run->kind == CKV_AFFINE_ROW) largest = most * step;
      want[(size_t)j * rows + i] = (double)scale * sum;
      sizes[(size_t)j * rows + i] = (double)scale * size;
      bound[(size_t)j * rows + i] = (double)scale * ((dim + 8) * eps * size + dim * code_rounding(k) * largest) + 0x1p-120;
    }
  }
  for (size_t mi = 0; mi < sizeof ms / sizeof *ms; mi++) {
    uint32_t m = ms[mi];
    float *scratch = exact(ckv_scratch_floats(dim, m) * 4);
    for (uint32_t index = 0; index < 4; index++) {
      uint32_t first, count = part(index, rows, &first);
      memset(again, 0x5a, MAX_M * ld * 4);
      float *to = index ? again : out;
      k->logits(run, first, count, q, m, q_stride, scale, to, ld, scratch);
      if (index) {
        bool same = true;
        for (uint32_t j = 0; j < m; j++) same = same && memcmp(again + j * ld, out + j * ld + first, count * 4) == 0;
        expect(same, "%s logits of a part differ: kind %u type %u bits %u group %u dim %u m %u first %u", k->name,
               run->kind, run->dtype, run->bits, run->group, dim, m, first);
        float beyond;
        memset(&beyond, 0x5a, 4);
        expect(memcmp(&again[count], &beyond, 4) == 0, "%s logits wrote past the end", k->name);
        continue;
      }
      for (uint32_t j = 0; j < m; j++)
        for (uint32_t i = 0; i < rows; i++) {
          double error = fabs((double)out[j * ld + i] - want[(size_t)j * rows + i]);
          double limit = bound[(size_t)j * rows + i] + product_rounding(k, run, m) * sizes[(size_t)j * rows + i];
          expect(error <= limit,
                 "%s logits kind %u type %u bits %u group %u dim %u m %u j %u i %u: %g, want %g, bound %g", k->name,
                 run->kind, run->dtype, run->bits, run->group, dim, m, j, i, (double)out[j * ld + i],
                 want[(size_t)j * rows + i], limit);
        }
    }
    free(scratch);
  }
  free(q);
  free(out);
  free(again);
  free(want);
  free(bound);
  free(sizes);
}

static void check_accumulate(const ckv_kernels *k, const subject *s) {
  const ckv_run *run = &s->run;
  uint32_t dim = run->dim, rows = run->rows;
  size_t ld = rows + 1, stride = dim + dim % 3;
  rng r = {dim + 5 * run->bits};
  float *p = exact(MAX_M * ld * 4), *acc = exact(MAX_M * stride * 4), *again = exact(MAX_M * stride * 4);
  for (size_t i = 0; i < MAX_M * ld; i++) p[i] = i % 5 == 2 ? 0 : rng_float(&r) * (i % 7 ? 1 : 1e-6f);
  for (uint32_t index = 0; index < 4; index++) {
    uint32_t first, count = part(index, rows, &first);
    double *sum = exact((size_t)MAX_M * dim * sizeof(double)), *size = exact((size_t)MAX_M * dim * sizeof(double));
    double *rounding = exact((size_t)MAX_M * dim * sizeof(double));
    for (uint32_t j = 0; j < MAX_M; j++) {
      double *a = sum + (size_t)j * dim, *b = size + (size_t)j * dim, *e = rounding + (size_t)j * dim;
      double most = 0;
      for (uint32_t c = 0; c < dim; c++) a[c] = 0.5, b[c] = 0.5, e[c] = 0;
      for (uint32_t i = 0; i < count; i++) most = fmax(most, fabs((double)p[j * ld + i]));
      for (uint32_t i = 0; i < count; i++) {
        double w = (double)p[j * ld + i], magnitude = fabs(w);
        const double *x = s->x + (size_t)(first + i) * dim, *y = s->size + (size_t)(first + i) * dim;
        for (uint32_t c = 0; c < dim; c++) {
          a[c] += w * x[c];
          b[c] += magnitude * y[c];
          e[c] = fmax(e[c], (is_scaled(run) ? most : magnitude) * s->step[(size_t)(first + i) * dim + c]);
        }
      }
    }
    for (size_t mi = 0; mi < sizeof ms / sizeof *ms; mi++) {
      uint32_t m = ms[mi];
      float *scratch = exact(ckv_scratch_floats(dim, m) * 4);
      for (int turn = 0; turn < 2; turn++) {
        float *to = turn ? again : acc;
        for (size_t i = 0; i < MAX_M * stride; i++) to[i] = 0.5f;
        k->accumulate(run, first, count, p, m, ld, to, stride, scratch);
        memset(scratch, 0xff, ckv_scratch_floats(dim, m) * 4); /* what scratch held must not matter */
      }
      expect(memcmp(acc, again, MAX_M * stride * 4) == 0, "%s accumulate differs from call to call", k->name);
      for (uint32_t j = 0; j < m; j++)
        for (uint32_t c = 0; c < dim; c++) {
          double error = fabs((double)acc[j * stride + c] - sum[(size_t)j * dim + c]);
          double bound = (count + 8) * eps * size[(size_t)j * dim + c];
          bound += count * code_rounding(k) * rounding[(size_t)j * dim + c];
          bound += product_rounding(k, run, m) * size[(size_t)j * dim + c];
          expect(error <= bound,
                 "%s accumulate kind %u type %u bits %u group %u dim %u m %u j %u c %u: %g, want %g, bound %g", k->name,
                  run->kind, run->dtype, run->bits, run->group, dim, m, j, c, (double)acc[j * stride + c],
                 sum[(size_t)j * dim + c], bound);
        }
      bool rest = true;
      for (size_t i = m * stride; i < MAX_M * stride; i++) rest = rest && acc[i] == 0.5f;
      expect(rest, "%s accumulate wrote past the last row", k->name);
      free(scratch);
    }
    free(sum);
    free(size);
    free(rounding);
  }
  free(p);
  free(acc);
  free(again);
}

/* Rows of weight 0 contribute nothing, not even to the rounding of the others. */
static void check_zero_weights(const ckv_kernels *k, subject *s) {
  const ckv_run *run = &s->run;
  uint32_t dim = run->dim, rows = run->rows, m = 5, groups = (dim + run->group - 1) / run->group;
  rng r = {dim};
  float *p = exact(m * rows * 4), *acc = exact(2 * m * dim * 4), *scratch = exact(ckv_scratch_floats(dim, m) * 4);
  for (size_t i = 0; i < m * rows; i++) p[i] = i % rows % 3 == 1 ? 0 : rng_float(&r);
  memset(acc, 0, 2 * m * dim * 4);
  k->accumulate(run, 0, rows, p, m, rows, acc, dim, scratch);
  for (uint32_t i = 1; i < rows; i += 3) {
    memset((char *)s->data + (size_t)i * ckv_row_words(dim, run->bits) * 4, 0xa7, ckv_row_words(dim, run->bits) * 4);
    for (uint32_t g = 0; g < groups; g++) ((uint16_t *)s->scale)[i * groups + g] = 0x7000; /* 8192 */
  }
  k->accumulate(run, 0, rows, p, m, rows, acc + m * dim, dim, scratch);
  bool same = memcmp(acc, acc + m * dim, m * dim * 4) == 0;
  expect(same, "%s accumulate: weights of 0 count, bits %u", k->name, run->bits);
  free(p);
  free(acc);
  free(scratch);
  release(s);
}

static void check_subject(const ckv_kernels *k, subject s) {
  check_logits(k, &s);
  check_accumulate(k, &s);
  release(&s);
}

/* What a level does with codes on CPUs that have less than this one. */
void check_attention_codes(const ckv_kernels *k) {
  static const uint32_t all_bits[] = {2, 3, 4, 8}, few_dims[] = {40, 80, 128, 192};
  for (size_t d = 0; d < 4; d++)
    for (size_t b = 0; b < 4; b++)
      check_subject(k, affine(CKV_AFFINE_CHANNEL, few_dims[d], 128, all_bits[b], 32, CKV_F16));
  check_subject(k, scaled(CKV_SCALED_ROW, CKV_INT8, 67, 75, 4096, CKV_F16));
  check_subject(k, scaled(CKV_SCALED_BLOCK, CKV_INT4, 128, 96, 16, CKV_F32));
  check_subject(k, scaled(CKV_GGML, CKV_Q5_1, 96, 75, 32, CKV_F16));
}

/* Partials of rows in two parts against a softmax in double. Logits may be off by 2^-7 of the magnitudes they sum, weights
 * by as much over again, products with values by 2^-7 of themselves. */
static void check_attend_rows(const ckv_kernels *k, const subject *keys, const subject *values, uint32_t m) {
  const uint32_t dim = keys->run.dim, wide = values->run.dim, count = keys->run.rows - 1, part = count / 3;
  const size_t q_stride = dim + 3, stride = wide + wide % 3;
  const size_t floats = ckv_scratch_floats(dim > wide ? dim : wide, m);
  rng r = {dim * m + wide};
  float *q = random_rows(&r, m, dim, q_stride), *scratch = exact(floats * 4), scale = 0.3f / sqrtf((float)dim);
  float *max = exact(2 * m * 4), *sum = exact(2 * m * 4), *acc = exact(2 * m * stride * 4);
  double *weights = exact(count * sizeof(double));
  for (uint32_t turn = 0; turn < 2; turn++) {
    float *to_max = max + turn * m, *to_sum = sum + turn * m, *to = acc + turn * m * stride;
    for (uint32_t j = 0; j < m; j++) to_max[j] = -INFINITY, to_sum[j] = 0;
    for (size_t i = 0; i < m * stride; i++) to[i] = i % stride < wide ? 0 : 0.5f;
    for (uint32_t from = 0, n = part; from < count; from += n, n = count - from) {
      memset(scratch, 0xff, floats * 4); /* what scratch held must not matter */
      /* Values lie one row further on than keys. */
      const bool done = k->attend(&keys->run, from, &values->run, from + 1, n, q, m, q_stride, scale, to_max, to_sum, to,
                                  stride, scratch);
      expect(done, "%s attend refuses dim %u m %u", k->name, dim, m);
    }
  }
  expect(memcmp(acc, acc + m * stride, m * stride * 4) == 0 && memcmp(sum, sum + m, m * 4) == 0 &&
             memcmp(max, max + m, m * 4) == 0, "%s attend differs from call to call", k->name);
  for (uint32_t j = 0; j < m; j++) {
    double most = -INFINITY, total = 0, off = 0;
    for (uint32_t i = 0; i < count; i++) {
      double logit = 0, size = 0;
      for (uint32_t c = 0; c < dim; c++) {
        const double product = (double)q[j * q_stride + c] * keys->x[(size_t)i * dim + c];
        logit += product, size += fabs(product);
      }
      weights[i] = (double)scale * logit;
      most = fmax(most, weights[i]);
      off = fmax(off, (double)scale * size * 0x1.02p-7);
    }
    for (uint32_t i = 0; i < count; i++) total += weights[i] = exp(weights[i] - most);
    expect(fabs((double)max[j] - most) <= off, "%s attend dim %u m %u j %u: largest %g, want %g, bound %g", k->name, dim,
           m, j, (double)max[j], most, off);
    expect(fabs((double)max[j] + log((double)sum[j]) - most - log(total)) <= off + 1e-5, "%s attend dim %u m %u j %u: sums",
           k->name, dim, m, j);
    for (uint32_t c = 0; c < wide; c++) {
      double want = 0, size = 0;
      for (uint32_t i = 0; i < count; i++) {
        const double product = weights[i] / total * values->x[(size_t)(i + 1) * wide + c];
        want += product, size += fabs(product);
      }
      const double got = (double)acc[j * stride + c] / (double)sum[j], bound = (exp(2 * off) - 1 + 0x1.02p-7) * size;
      expect(fabs(got - want) <= bound + 1e-6, "%s attend dims %u %u m %u j %u c %u: %g, want %g, bound %g", k->name, dim,
             wide, m, j, c, got, want, bound);
    }
    for (size_t c = wide; c < stride; c++) expect(acc[j * stride + c] == 0.5f, "%s attend wrote past a row", k->name);
  }
  free(q);
  free(scratch);
  free(max);
  free(sum);
  free(acc);
  free(weights);
}

/* Logits beyond f32: of one query row alone, and so is what becomes of them. */
static void check_attend_beyond(const ckv_kernels *k) {
  enum { M = 32, DIM = 40, ROWS = 70 };
  subject keys = dense(DIM, ROWS, CKV_BF16), values = dense(DIM, ROWS, CKV_F16);
  float q[M * DIM], max[M], sum[M], acc[M * DIM], *scratch = exact(ckv_scratch_floats(DIM, M) * 4);
  for (uint32_t i = 0; i < M * DIM; i++) q[i] = 0.01f, acc[i] = 0;
  for (uint32_t j = 0; j < M; j++) max[j] = -INFINITY, sum[j] = 0;
  uint16_t *row = (uint16_t *)keys.data + 5 * keys.run.row_stride;
  for (uint32_t c = 0; c < DIM; c++) row[c] = 0x7e00; /* 4e37 */
  for (uint32_t c = 0; c < DIM; c++) q[3 * DIM + c] = 1e3f, q[4 * DIM + c] = -1e3f, q[5 * DIM + c] = NAN;
  expect(k->attend(&keys.run, 0, &values.run, 0, ROWS, q, M, DIM, 1, max, sum, acc, DIM, scratch), "%s attend", k->name);
  expect(isnan(sum[3]) && isnan(sum[5]), "%s attend: infinite and NaN logits are not seen", k->name);
  for (uint32_t j = 0; j < M; j++)
    expect(j == 3 || j == 5 || (isfinite(sum[j]) && sum[j] >= 1), "%s attend: sum %g of query row %u", k->name,
           (double)sum[j], j);
  /* The one row that query row 4 is infinitely far from. */
  max[4] = -INFINITY, sum[4] = 0;
  expect(k->attend(&keys.run, 5, &values.run, 5, 1, q, M, DIM, 1, max, sum, acc, DIM, scratch), "%s attend", k->name);
  expect(sum[4] == 0 && max[4] == -INFINITY, "%s attend: sum %g of hidden rows", k->name, (double)sum[4]);
  release(&keys);
  release(&values);
  free(scratch);
}

static void check_attend(const ckv_kernels *k) {
  static const uint32_t some_dims[][2] = {{128, 128}, {1, 7}, {40, 33}, {33, 40}, {64, 16}, {80, 257}, {256, 64}};
  static const uint32_t some_ms[] = {26, 31, 32, 61, 128};
  for (uint32_t d = 0; d < sizeof some_dims / sizeof *some_dims; d++)
    for (uint32_t i = 0; i < sizeof some_ms / sizeof *some_ms; i++) {
      const uint32_t rows = 67 + 61 * ((d + i) % 4), type = (d + i) % 2 ? CKV_F16 : CKV_BF16;
      subject keys = dense(some_dims[d][0], rows, type), values = dense(some_dims[d][1], rows, i % 2 ? CKV_F16 : CKV_BF16);
      if (type == CKV_F16) memset(keys.data, 0, 2), keys.x[0] = 0; /* not the end of f16 */
      check_attend_rows(k, &keys, &values, some_ms[i]);
      release(&keys);
      release(&values);
    }
  check_attend_beyond(k);
  subject exact_rows = dense(16, 9, CKV_F32), rows = dense(16, 9, CKV_F16);
  const ckv_run *runs[2] = {&rows.run, &exact_rows.run};
  for (uint32_t m = 1; m < 32; m++)
    for (uint32_t i = 0; i < 4; i++) {
      const bool taken = k->attend(runs[i & 1], 0, runs[i >> 1], 0, 0, NULL, m, 16, 1, NULL, NULL, NULL, 16, NULL);
      expect(taken == (i == 0 && m >= 26), "%s attend: %u query rows, runs %u", k->name, m, i);
    }
  release(&exact_rows);
  release(&rows);
}

/* Symmetric integers, FP8 and ggml's blocks. */
static void check_scaled(const ckv_kernels *k) {
  static const uint32_t codes[] = {CKV_INT8, CKV_INT4, CKV_E4M3, CKV_E5M2}, some_dims[] = {1, 7, 40, 64, 128, 160};
  static const uint32_t blocks[] = {CKV_Q4_0, CKV_Q4_1, CKV_Q5_0, CKV_Q5_1, CKV_Q8_0, CKV_IQ4_NL};
  for (size_t d = 0; d < sizeof some_dims / sizeof *some_dims; d++)
    for (uint32_t c = 0; c < 4; c++) {
      const uint32_t dim = some_dims[d], code = codes[c];
      check_subject(k, scaled(CKV_SCALED_ROW, code, dim, 75, 4096, c % 3));
      check_subject(k, scaled(CKV_SCALED_ROW, code, dim, 67, 32, (uint32_t)(c + d) % 3));
      check_subject(k, scaled(CKV_SCALED_BLOCK, code, dim, 96, 16, CKV_F32));
      check_subject(k, scaled(CKV_SCALED_FIXED, code, dim, 75, 1, CKV_F32));
    }
  for (uint32_t c = 0; c < 4; c++) check_subject(k, scaled(CKV_SCALED_ROW, codes[c], 128, 299, 4096, CKV_F32));
  for (uint32_t b = 0; b < 6; b++) {
    check_subject(k, scaled(CKV_GGML, blocks[b], 32, 75, 32, CKV_F16));
    check_subject(k, scaled(CKV_GGML, blocks[b], 128, 299, 32, CKV_F16));
    check_subject(k, scaled(CKV_GGML, blocks[b], 160, 67, 32, CKV_F16));
  }
}

/* Affine codes. */
static void check_affine(const ckv_kernels *k) {
  static const uint32_t all_bits[] = {2, 3, 4, 8};
  /* The longest rows, where scratch memory is tightest. */
  check_subject(k, affine(CKV_AFFINE_CHANNEL, 4096, 64, 8, 32, CKV_F16));
  check_subject(k, affine(CKV_AFFINE_ROW, 4096, 41, 8, 256, CKV_F16));
  check_subject(k, affine(CKV_AFFINE_ROW, 4096, 41, 8, 4096, CKV_BF16));
  check_subject(k, affine(CKV_AFFINE_ROW, 1000, 70, 3, 128, CKV_F16));
  check_subject(k, affine(CKV_AFFINE_ROW, 512, 70, 2, 32, CKV_F16));
  for (size_t b = 0; b < 4; b++) {
    subject s = affine(CKV_AFFINE_ROW, 96, 300, all_bits[b], 32, CKV_F16);
    check_zero_weights(k, &s);
    /* More rows than the sums of integers are taken over at a time. */
    check_subject(k, affine(CKV_AFFINE_ROW, 128, 299, all_bits[b], 32, CKV_F16));
  }
  uint32_t turn = 0;
  for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
    for (size_t b = 0; b < 4; b++, turn++) {
      uint32_t group = 32u << turn % 3, bits = all_bits[b];
      /* A third of the other groups each time: every pair of bits and group comes up at every alignment of dim. */
      check_subject(k, affine(CKV_AFFINE_CHANNEL, dims[d], group == 32 ? 96 : 128, bits, group, turn % 3));
      check_subject(k, affine(CKV_AFFINE_ROW, dims[d], 75, bits, group, (turn + 1) % 3));
      if (dims[d] >= 64) {
        check_subject(k, affine(CKV_AFFINE_CHANNEL, dims[d], 64, bits, 32, CKV_F16));
        check_subject(k, affine(CKV_AFFINE_ROW, dims[d], 67, bits, 32, CKV_F16));
        check_subject(k, affine(CKV_AFFINE_ROW, dims[d], 41, bits, 20, CKV_F32));
      }
    }
  }
}

void check_attention(pair p) {
  check_subject(p.level, dense(4095, 41, CKV_BF16));
  for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
    for (uint32_t type = 0; type < 3; type++) check_subject(p.level, dense(dims[d], 75, type));
  check_affine(p.level);
  check_scaled(p.level);
}

/* What products of bf16 change. */
void check_attention_bf16(const ckv_kernels *k) {
  check_attend(k);
  check_subject(k, dense(4095, 41, CKV_BF16));
  check_subject(k, dense(4096, 41, CKV_F16));
  for (uint32_t type = 0; type < 3; type++) {
    check_subject(k, dense(128, 300, type)); /* more rows than values are taken of at a time */
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) check_subject(k, dense(dims[d], 75, type));
  }
  check_affine(k);
  check_scaled(k);
}
