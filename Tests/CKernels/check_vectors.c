/* Softmax, exponentials, conversions and plain vector operations. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const size_t lengths[] = {0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 67, 127, 128, 129, 255, 300, 1000};
#define LENGTHS (sizeof lengths / sizeof *lengths)
static const double eps = 0x1p-24;

static float *random_floats(rng *r, size_t n, float size) {
  float *x = exact(n * sizeof(float));
  for (size_t i = 0; i < n; i++) x[i] = size * rng_float(r);
  return x;
}

static float *copy_floats(const float *x, size_t n) {
  float *y = exact(n * sizeof(float));
  memcpy(y, x, n * sizeof(float));
  return y;
}

static void check_softmax(pair p, size_t n, float softcap, bool with_bias, int infinities) {
  rng r = {n + 1};
  float *x = random_floats(&r, n, 40), *bias = with_bias ? random_floats(&r, n, 5) : NULL;
  for (size_t i = 0; i < n; i++)
    if (infinities == 2 || (infinities == 1 && i % 3 == 1)) {
      if (bias) bias[i] = -INFINITY;
      else x[i] = -INFINITY;
    }
  bool capped = softcap > 0;
  double *exact_x = exact(n * sizeof(double)), high = -INFINITY, total = 0, x_error = 0;
  for (size_t i = 0; i < n; i++) {
    double v = (double)x[i];
    if (capped) {
      v = (double)softcap * tanh(v / (double)softcap);
      x_error = 8 * eps * (double)softcap; /* a few roundings of values of at most the cap */
    }
    if (bias) {
      v += (double)bias[i];
      if (!isinf(v)) x_error = fmax(x_error, 8 * eps * (double)softcap + 2 * eps * fabs(v));
    }
    exact_x[i] = v;
    high = fmax(high, v);
  }
  float *y = copy_floats(x, n), sum = -1, max = p.level->softmax(y, (uint32_t)n, softcap, bias, &sum);
  bool all_minus = high == -INFINITY;
  expect(all_minus ? max == -INFINITY : fabs((double)max - high) <= x_error, "%s softmax max n=%zu", p.level->name, n);
  for (size_t i = 0; i < n; i++) {
    double e = all_minus ? 0 : exp(exact_x[i] - high);
    /* x - max is rounded once; both operands carry x_error; exp itself 1e-6; subnormals may vanish. */
    double bound = e * (1e-6 + 2 * x_error + eps * fabs(exact_x[i] - high)) + 0x1p-126;
    expect(e == 0 ? y[i] == 0 : fabs((double)y[i] - e) <= bound, "%s softmax n=%zu i=%zu cap=%g got %g want %g",
           p.level->name, n, i, (double)softcap, (double)y[i], e);
    total += (double)y[i];
  }
  expect(fabs((double)sum - total) <= (double)n * eps * total, "%s softmax sum n=%zu", p.level->name, n);
  free(x);
  free(bias);
  free(y);
  free(exact_x);
}

/* A sum that is NaN is how a caller learns of logits that are none. */
static void check_softmax_of_no_numbers(pair p, size_t n) {
  for (size_t at = 0; at < n; at++)
    for (int kind = 0; kind < 4; kind++) {
      rng r = {n};
      float *x = random_floats(&r, n, 40), sum = 0;
      for (size_t i = 0; i < n && kind > 1; i++) x[i] = kind == 2 ? -INFINITY : NAN;
      x[at] = kind == 1 ? INFINITY : NAN;
      p.level->softmax(x, (uint32_t)n, kind == 0 && at % 2 ? 30 : 0, NULL, &sum);
      expect(isnan(sum), "%s softmax n=%zu: no number at %zu goes unnoticed, kind %d", p.level->name, n, at, kind);
      free(x);
    }
}

static void check_exp(pair p) {
  const size_t n = 20001;
  float *x = exact(n * sizeof(float)), *y;
  for (size_t i = 0; i < n; i++) x[i] = -87.0f + (float)i * (175.0f / (float)n);
  x[0] = -INFINITY;
  x[1] = -1000;
  x[2] = 89;
  y = copy_floats(x, n);
  p.level->exp_shift(y, n, 0);
  expect(y[0] == 0 && y[1] == 0 && isinf(y[2]), "%s exp of -inf, -1000, 89", p.level->name);
  for (size_t i = 3; i < n; i++) {
    double e = exp((double)x[i]);
    expect(fabs((double)y[i] - e) <= 1e-6 * e, "%s exp(%g) is %g", p.level->name, (double)x[i], (double)y[i]);
  }
  free(x);
  free(y);
}

static void check_plain(pair p, size_t n) {
  rng r = {n + 77};
  float *x = random_floats(&r, n, 3), *y = random_floats(&r, n, 3), a = rng_float(&r);
  float *z = copy_floats(y, n);
  p.level->axpy(z, x, a, n);
  double dot = 0, size = 0;
  for (size_t i = 0; i < n; i++) {
    double want = (double)y[i] + (double)a * (double)x[i], product = (double)x[i] * (double)y[i];
    expect(fabs((double)z[i] - want) <= 2 * eps * (fabs((double)y[i]) + fabs((double)a * (double)x[i])),
           "%s axpy n=%zu i=%zu", p.level->name, n, i);
    dot += product;
    size += fabs(product);
  }
  expect(fabs((double)p.level->dot(x, y, n) - dot) <= (double)(n + 1) * eps * size, "%s dot n=%zu", p.level->name, n);
  memcpy(z, y, n * sizeof(float));
  p.level->scale_in_place(z, a, n);
  for (size_t i = 0; i < n; i++) expect(z[i] == a * y[i], "%s scale n=%zu i=%zu", p.level->name, n, i);
  free(x);
  free(y);
  free(z);
}

static void check_turn(pair p, uint32_t pairs) {
  enum { ROWS = 3, TABLE = 5 };
  static const uint32_t offsets[ROWS] = {4, 0, 2};
  rng r = {pairs};
  for (int split = 0; split < 2; split++) {
    size_t stride = 2 * pairs + 1, n = ROWS * stride;
    float *x = random_floats(&r, n, 3), *c = random_floats(&r, TABLE * pairs, 1), *s = random_floats(&r, TABLE * pairs, 1);
    float *y = copy_floats(x, n);
    p.level->turn(y, stride, ROWS, pairs, split ? 1 : 2, split ? pairs : 1, c, s, offsets);
    p.portable->turn(x, stride, ROWS, pairs, split ? 1 : 2, split ? pairs : 1, c, s, offsets);
    expect(memcmp(x, y, n * sizeof(float)) == 0, "%s turn of %u pairs, split %d", p.level->name, pairs, split);
    free(x);
    free(y);
    free(c);
    free(s);
  }
}

/* The nearest 16-bit value by search in the sorted list of all finite ones; ties to the even pattern. */
static uint16_t nearest(double x, uint32_t type) {
  uint16_t sign = signbit(x) ? 0x8000 : 0, top = type == CKV_F16 ? 0x7c00 : 0x7f80, low = 0, high = top;
  double a = fabs(x);
  if (isnan(x)) return 0xffff;
  while (high - low > 1) { /* value(low) <= a < value(high), the infinity standing for the next power of two */
    uint16_t mid = (uint16_t)((low + high) / 2);
    if (value_of(&mid, type, 0) <= a) low = mid;
    else high = mid;
  }
  double below = value_of(&low, type, 0), above = value_of(&high, type, 0);
  if (high == top) above = type == CKV_F16 ? 65536.0 : 0x1p128;
  if (a >= above) return (uint16_t)(sign | high);
  bool up = a - below > above - a || (a - below == above - a && (low & 1));
  return (uint16_t)(sign | (up ? high : low));
}

static void check_convert(pair p) {
  static uint16_t all[65536], back[65536];
  static float wide[65536];
  for (uint32_t i = 0; i < 65536; i++) all[i] = (uint16_t)i;
  for (uint32_t type = CKV_F16; type <= CKV_BF16; type++) {
    p.level->convert(wide, CKV_F32, all, type, 65536);
    p.level->convert(back, type, wide, CKV_F32, 65536);
    for (size_t i = 0; i < 65536; i++) {
      double want = value_of(all, type, i);
      if (isnan(want)) {
        expect(isnan(wide[i]) && isnan(value_of(back, type, i)), "%s convert NaN %zx type %u", p.level->name, i, type);
      } else {
        expect((double)wide[i] == want && back[i] == all[i], "%s convert %zx type %u", p.level->name, i, type);
      }
    }
  }
  rng r = {5};
  enum { N = 40007 };
  static float x[N];
  static uint16_t h[N];
  static const float edges[] = {65504, 65519.996f, 65520, 65536, 1e30f, 0x1p-24f, 0x1p-25f, 0x1.8p-24f, 0x1.000002p-25f,
                                0x1p-14f, 0x1.ffep-15f, 0x1.fffp-15f, 0, INFINITY, NAN, 3.4e38f, 3.3961776e38f, 1e-40f};
  for (size_t i = 0; i < N; i++) {
    uint32_t bits = rng_next(&r);
    if (i % 2) bits = (bits & 0x8fffffffu) | 0x30000000u; /* exponents f16 can hold, mostly */
    if (i % 4 == 3) bits &= ~0xfffu; /* ties */
    memcpy(&x[i], &bits, 4);
    if (i < 2 * sizeof edges / sizeof *edges) x[i] = i % 2 ? -edges[i / 2] : edges[i / 2];
  }
  for (uint32_t type = CKV_F16; type <= CKV_BF16; type++) {
    p.level->convert(h, type, x, CKV_F32, N);
    for (size_t i = 0; i < N; i++) {
      bool ok = isnan(x[i]) ? isnan(value_of(h, type, i)) : h[i] == nearest((double)x[i], type);
      expect(ok, "%s convert %a to type %u gives %x", p.level->name, (double)x[i], type, h[i]);
    }
  }
  for (size_t l = 0; l < LENGTHS; l++) { /* tails and every pair of types */
    size_t n = lengths[l];
    for (uint32_t from = 0; from < 3; from++) {
      for (uint32_t to = 0; to < 3; to++) {
        void *src = exact(n * size_of(from)), *a = exact(n * size_of(to)), *b = exact(n * size_of(to));
        p.portable->convert(src, from, x, CKV_F32, n);
        p.level->convert(a, to, src, from, n);
        p.portable->convert(b, to, src, from, n);
        bool same = true;
        for (size_t i = 0; i < n; i++)
          same = same && (isnan(value_of(b, to, i)) ? isnan(value_of(a, to, i))
                                                    : memcmp((char *)a + i * size_of(to), (char *)b + i * size_of(to),
                                                             size_of(to)) == 0);
        expect(same, "%s convert %u to %u, n=%zu", p.level->name, from, to, n);
        free(src);
        free(a);
        free(b);
      }
    }
  }
}

static void check_nonfinite(pair p) {
  static const float bad[] = {NAN, INFINITY, -INFINITY};
  for (size_t l = 0; l < LENGTHS; l++) {
    size_t n = lengths[l];
    for (uint32_t type = 0; type < 3; type++) {
      float *x = exact(n * sizeof(float));
      void *y = exact(n * size_of(type));
      for (size_t i = 0; i < n; i++) x[i] = i % 2 ? 65504 : -1e-7f;
      p.portable->convert(y, type, x, CKV_F32, n);
      expect(p.level->first_nonfinite(y, type, n) == -1, "%s all finite n=%zu", p.level->name, n);
      for (size_t at = 0; at < n; at += 1 + n / 23) {
        float kept = x[at], last = x[n - 1];
        x[n - 1] = INFINITY;
        x[at] = bad[at % 3];
        p.portable->convert(y, type, x, CKV_F32, n);
        expect(p.level->first_nonfinite(y, type, n) == (int64_t)at, "%s nonfinite n=%zu at %zu", p.level->name, n, at);
        x[n - 1] = last;
        x[at] = kept;
      }
      free(x);
      free(y);
    }
  }
}

/* Measures of rows against f64, with rows further apart than they are long. */
static void check_scan(pair p, uint32_t dim) {
  const size_t count = 5, stride = dim + 3;
  rng r = {dim + 5};
  float *rows = random_floats(&r, count * stride, 3), *low = random_floats(&r, dim, 1), *out = exact(count * 4);
  float *inverse = exact(dim * sizeof(float));
  for (uint32_t c = 0; c < dim; c++) inverse[c] = c % 5 == 4 ? 0 : 0.25f + 0.5f * fabsf(rng_float(&r));
  for (uint32_t measure = CKV_SQUARES; measure <= CKV_SPREAD; measure++) {
    p.level->scan_rows(rows, stride, dim, count, measure, low, inverse, out);
    for (size_t i = 0; i < count; i++) {
      double sum = 0, scaled = 0, squares = 0, size = 0;
      for (uint32_t c = 0; c < dim; c++) {
        double x = (double)rows[i * stride + c], y = (x - (double)low[c]) * (double)inverse[c];
        sum += measure == CKV_SQUARES ? x * x : fabs(x);
        scaled += y;
        size = fmax(size, fabs(y));
      }
      for (uint32_t c = 0; c < dim; c++) {
        double d = ((double)rows[i * stride + c] - (double)low[c]) * (double)inverse[c] - scaled / dim;
        squares += d * d;
      }
      double want = measure == CKV_SPREAD ? (dim > 1 ? sqrt(squares / (dim - 1)) : 0) : sum;
      double bound = (dim + 4) * eps * (measure == CKV_SPREAD ? 4 * size * sqrt((double)dim) : sum);
      expect(fabs((double)out[i] - want) <= bound + 1e-30, "%s scan measure %u dim %u row %zu: %g, %g", p.level->name,
             measure, dim, i, (double)out[i], want);
    }
  }
  free(rows);
  free(low);
  free(inverse);
  free(out);
}

static void check_fold(pair p, size_t n) {
  rng r = {n + 9};
  float *x = random_floats(&r, n, 4), *start = random_floats(&r, n, 2);
  const uint32_t measures[] = {CKV_SQUARES, CKV_ABSOLUTES, CKV_PLAIN};
  for (int m = 0; m < 3; m++) {
    float *y = copy_floats(start, n);
    p.level->fold(x, n, measures[m], y);
    for (size_t i = 0; i < n; i++) {
      double a = (double)x[i], add = m == 0 ? a * a : m == 1 ? fabs(a) : a, want = (double)start[i] + add;
      expect(fabs((double)y[i] - want) <= 2 * eps * (fabs((double)start[i]) + fabs(add)), "%s fold %u of %zu",
             p.level->name, measures[m], n);
    }
    free(y);
  }
  free(x);
  free(start);
}

/* The bits of one call of axpy a row. */
static void check_add_rows(pair p, size_t n, uint32_t m) {
  rng r = {n * 131 + m};
  size_t ld = n + 3;
  float *x = random_floats(&r, m * ld, 3), *y = random_floats(&r, n, 3), *a = random_floats(&r, m, 1);
  float *want = copy_floats(y, n);
  if (m > 1) a[1] = 0;
  for (uint32_t j = 0; j < m; j++) p.level->axpy(want, x + j * ld, a[j], n);
  p.level->add_rows(y, x, ld, a, m, n);
  expect(memcmp(y, want, n * sizeof(float)) == 0, "%s add_rows n=%zu m=%u", p.level->name, n, m);
  free(x);
  free(y);
  free(a);
  free(want);
}

static void check_statistics(pair p, size_t n) {
  rng r = {n + 31};
  float *x = random_floats(&r, n, 1), *start = random_floats(&r, n, 1), *origin = random_floats(&r, n, 1);
  float a = 0.5f + fabsf(rng_float(&r)), pivot = 0.2f;
  for (size_t i = 0; i < n; i++) x[i] = fabsf(x[i]);
  float *max = copy_floats(start, n), *sum = copy_floats(start, n), *spread = copy_floats(start, n);
  float *count = copy_floats(start, n);
  p.level->max_scaled(max, x, a, n);
  p.level->moments(sum, spread, origin, x, a, n);
  p.level->count_below(count, x, a, pivot, n);
  double entropy = 0;
  for (size_t i = 0; i < n; i++) {
    float w = a * x[i];
    double weight = (double)a * (double)x[i], away = weight - (double)origin[i];
    expect(max[i] == (w > start[i] ? w : start[i]), "%s max_scaled n=%zu i=%zu", p.level->name, n, i);
    expect(count[i] == start[i] + (w < pivot ? 1.0f : 0.0f), "%s count_below n=%zu i=%zu", p.level->name, n, i);
    expect(fabs((double)sum[i] - (double)start[i] - weight) <= 4 * eps * (fabs((double)start[i]) + weight),
           "%s moments sum n=%zu i=%zu", p.level->name, n, i);
    double bound = 8 * eps * (fabs((double)start[i]) + (fabs(away) + weight + fabs((double)origin[i])) * fabs(away) +
                              away * away);
    expect(fabs((double)spread[i] - (double)start[i] - away * away) <= bound, "%s moments spread n=%zu i=%zu",
           p.level->name, n, i);
    entropy -= weight * log(weight + 1e-10);
  }
  double size = 0;
  for (size_t i = 0; i < n; i++) size += fabs((double)a * (double)x[i] * log((double)a * (double)x[i] + 1e-10));
  expect(fabs(p.level->entropy(x, a, n) - entropy) <= 1e-5 * size, "%s entropy n=%zu", p.level->name, n);
  free(x);
  free(start);
  free(origin);
  free(max);
  free(sum);
  free(spread);
  free(count);
}

/* Of equal numbers the last, whatever is hidden; both zeros are equal; NaN counts only where nothing hides it. */
static void check_lowest(pair p, size_t n, int values, bool hides) {
  rng r = {n * 7 + (size_t)values};
  float *x = exact(n * sizeof(float)), *bias = hides ? exact(n * sizeof(float)) : NULL;
  long want = -1;
  size_t hidden = 0;
  for (size_t i = 0; i < n; i++) {
    x[i] = (float)((int)(fabsf(rng_float(&r)) * (float)values) - 1);
    if (x[i] == 0 && i % 2) x[i] = -0.0f;
    if (hides) {
      bias[i] = rng_float(&r) > 0 ? -INFINITY : rng_float(&r);
      hidden += bias[i] == -INFINITY;
      if (bias[i] == -INFINITY && i % 5 == 0) x[i] = NAN;
      if (bias[i] == -INFINITY) continue;
    }
    if (want < 0 || x[i] <= x[want]) want = (long)i;
  }
  int64_t got = p.level->lowest(x, bias, n);
  expect(got == want, "%s lowest of %zu is %ld, not %ld", p.level->name, n, want, (long)got);
  if (hides) expect(p.level->count_hidden(bias, n) == hidden, "%s hidden of %zu", p.level->name, n);
  if (want >= 0) {
    x[want] = NAN;
    expect(p.level->lowest(x, bias, n) == -2, "%s lowest of %zu with a NaN", p.level->name, n);
  }
  free(x);
  free(bias);
}

void check_vectors(pair p) {
  for (size_t l = 0; l < LENGTHS; l++) {
    check_plain(p, lengths[l]);
    check_fold(p, lengths[l]);
    for (uint32_t m = 1; m < 10; m++) check_add_rows(p, lengths[l], m);
    check_statistics(p, lengths[l]);
    for (int values = 1; values < 5; values++) {
      check_lowest(p, lengths[l], values, false);
      check_lowest(p, lengths[l], values, true);
      check_lowest(p, lengths[l], 100 * values, true);
    }
    if (lengths[l] > 0) check_scan(p, (uint32_t)lengths[l]);
    for (int infinities = 0; infinities < 3; infinities++)
      for (int variant = 0; variant < 4; variant++)
        check_softmax(p, lengths[l], variant & 1 ? 30 : 0, variant & 2, infinities);
  }
  static const uint32_t pairs[] = {1, 2, 3, 7, 8, 15, 16, 20, 33, 64};
  for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) check_turn(p, pairs[i]);
  check_exp(p);
  static const size_t some[] = {1, 5, 16, 33, 64, 131};
  for (size_t i = 0; i < sizeof(some) / sizeof(some[0]); i++) check_softmax_of_no_numbers(p, some[i]);
  check_convert(p);
  check_nonfinite(p);
  void *memory = NULL;
  if (posix_memalign(&memory, 64, 2048) == 0) {
    memset(memory, 1, 2048);
    expect(p.level->read_memory(memory, 2048) == p.level->read_memory(memory, 2048), "%s read", p.level->name);
    free(memory);
  }
}
