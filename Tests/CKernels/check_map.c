/* Rows behind a map: the transform against its matrix, attention and decoding against f64. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 70, MAX_DIM = 160, QUERIES = 5 };

/* Entry (i, j) of the orthonormal Walsh-Hadamard matrix of every block of `dim` channels. */
static double entry(uint32_t i, uint32_t j, uint32_t block) {
  if (i / block != j / block) return 0;
  return (__builtin_popcount(i % block & j % block) & 1 ? -1 : 1) / sqrt(block);
}

static void check_hadamard(pair p, uint32_t dim, uint32_t block) {
  rng r = {dim * 1000 + block};
  float *rows = exact(3 * dim * 4), *other = exact(3 * dim * 4), *source = exact(3 * dim * 4);
  for (uint32_t i = 0; i < 3 * dim; i++) source[i] = rng_float(&r);
  memcpy(rows, source, 3 * dim * 4);
  memcpy(other, source, 3 * dim * 4);
  p.level->hadamard(rows, dim, 3, dim, block);
  p.portable->hadamard(other, dim, 3, dim, block);
  expect(memcmp(rows, other, 3 * dim * 4) == 0, "%s hadamard %u of %u: not portable's bits", p.level->name, block, dim);
  for (uint32_t i = 0; i < 3 * dim; i++) {
    double sum = 0, size = 0;
    for (uint32_t j = 0; j < dim; j++) {
      double term = entry(i % dim, j, block) * source[i / dim * dim + j];
      sum += term;
      size += fabs(term);
    }
    expect(fabs(sum - rows[i]) <= 12 * 0x1p-24 * size, "%s hadamard %u of %u", p.level->name, block, dim);
  }
  free(rows);
  free(other);
  free(source);
}

static void check_run(pair p, uint32_t dim, uint32_t block, uint32_t bits, bool bare, bool ordered) {
  rng r = {dim * 7 + bits};
  float *source = exact(ROWS * dim * 4), *rows = exact(ROWS * dim * 4), *back = exact(ROWS * dim * 4);
  float *sign = exact(dim * 4), *factor = exact(dim * 4), *offset = exact(dim * 4);
  uint32_t *order = exact(dim * 4);
  for (uint32_t i = 0; i < ROWS * dim; i++) source[i] = rng_float(&r) * (i % dim == 2 ? 20 : 1);
  for (uint32_t c = 0; c < dim; c++) {
    sign[c] = rng_next(&r) % 2 ? 1 : -1;
    order[c] = ordered ? (c + 3) % dim : c;
  }
  ckv_map map = {.dim = dim, .block = block, .dtype = CKV_F32, .sign = sign, .order = order};
  float *low = exact(dim * 4), *high = exact(dim * 4);
  for (uint32_t c = 0; c < dim; c++) low[c] = INFINITY, high[c] = -INFINITY;
  memcpy(rows, source, ROWS * dim * 4);
  ckv_map_rows(p.level, &map, rows, dim, ROWS);
  ckv_channel_range(rows, dim, ROWS, dim, low, high);
  for (uint32_t c = 0; c < dim; c++) {
    factor[c] = bare ? (high[c] - low[c]) / (float)((1u << bits) - 1) : sqrtf(fmaxf(fabsf(low[c]), fabsf(high[c])));
    offset[c] = bare ? low[c] : 0.25f;
  }
  map.factor = factor;
  map.offset = offset;
  memcpy(rows, source, ROWS * dim * 4);
  ckv_map_rows(p.level, &map, rows, dim, ROWS);

  ckv_run run = {.kind = bare ? CKV_CODES_ROW : CKV_AFFINE_ROW, .dtype = CKV_F32, .bits = bits, .group = dim,
                 .dim = dim, .rows = ROWS, .row_stride = dim};
  uint32_t words = ckv_row_words(dim, bits);
  uint32_t *codes = exact(ROWS * words * 4);
  float *scale = exact(ROWS * 4), *min = exact(ROWS * 4);
  if (bare) ckv_encode_codes(rows, dim, ROWS, dim, bits, codes);
  else p.level->encode_row(rows, CKV_F32, dim, ROWS, dim, dim, bits, CKV_F32, codes, scale, min);
  run.data = codes;
  run.scale = scale;
  run.min = min;
  ckv_mapped_decode(p.level, &map, &run, 0, ROWS, back, dim);
  memcpy(rows, back, ROWS * dim * 4);
  ckv_mapped_decode(p.portable, &map, &run, 0, ROWS, rows, dim);
  expect(memcmp(rows, back, ROWS * dim * 4) == 0, "%s mapped decode %u: not portable's bits", p.level->name, dim);

  float *q = exact(QUERIES * dim * 4), *out = exact(QUERIES * ROWS * 4), *acc = exact(QUERIES * dim * 4);
  float *scratch = exact(ckv_scratch_floats(dim, QUERIES) * 4), *mapped = exact(ckv_mapped_floats(dim, QUERIES) * 4);
  for (uint32_t i = 0; i < QUERIES * dim; i++) q[i] = rng_float(&r);
  uint32_t first = 3, count = ROWS - 5;
  ckv_mapped_logits(p.level, &map, &run, first, count, q, QUERIES, dim, 0.5f, out, ROWS, scratch, mapped);
  memset(acc, 0, QUERIES * dim * 4);
  for (uint32_t j = 0; j < QUERIES; j++) {
    for (uint32_t i = 0; i < count; i++) {
      double sum = 0;
      for (uint32_t c = 0; c < dim; c++) sum += 0.5 * q[j * dim + c] * back[(first + i) * dim + c];
      /* 16-bit queries (ckv.h): a share of the largest for every channel and unit of code; generous here. */
      expect(fabs(sum - out[j * ROWS + i]) <= 2e-4 * (1 + dim), "%s mapped logits %u: %g and %g", p.level->name, dim,
             sum, (double)out[j * ROWS + i]);
      out[j * ROWS + i] = fabsf(rng_float(&r));
    }
  }
  ckv_mapped_accumulate(p.level, &map, &run, first, count, out, QUERIES, ROWS, acc, dim, scratch, mapped);
  for (uint32_t j = 0; j < QUERIES; j++) {
    for (uint32_t c = 0; c < dim; c++) {
      double sum = 0;
      for (uint32_t i = 0; i < count; i++) sum += (double)out[j * ROWS + i] * back[(first + i) * dim + c];
      expect(fabs(sum - acc[j * dim + c]) <= 2e-4 * (1 + ROWS), "%s mapped values %u: %g and %g", p.level->name, dim, sum,
             (double)acc[j * dim + c]);
    }
  }
  void *all[] = {source, rows, back, sign, factor, offset, order, low, high, codes, scale, min, q, out, acc, scratch, mapped};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

void check_map(pair p) {
  for (uint32_t block = 1; block <= 256; block *= 2)
    for (uint32_t blocks = 1; blocks <= 3; blocks += 2) check_hadamard(p, block * blocks, block);
  static const uint32_t shapes[][2] = {{8, 8}, {40, 8}, {67, 1}, {96, 32}, {128, 128}, {160, 32}};
  static const uint32_t bits[] = {2, 3, 4, 8};
  for (size_t s = 0; s < 6; s++)
    for (size_t b = 0; b < 4; b++)
      for (int bare = 0; bare < 2; bare++) check_run(p, shapes[s][0], shapes[s][1], bits[b], bare, s % 2);
  float beyond[5] = {1, -2, 3, -4, 5};
  expect(ckv_first_beyond(beyond, 5, 3) == 3 && ckv_first_beyond(beyond, 5, 5) == -1, "first beyond");
}
