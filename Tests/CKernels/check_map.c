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

/* Logits of heads side by side against what decoding, turning and multiplying in f64 gives. */
static void check_joined(pair p, uint32_t width, uint32_t block, uint32_t dim, uint32_t bits, uint32_t group,
                         uint32_t turned, bool interleaved, bool ordered) {
  enum { COUNT = 37, FIRST = 5, OFFSET = 3, POSITIONS = COUNT + OFFSET, M = 9 };
  if (!p.level->joined_logits) return;
  rng r = {width + bits + turned};
  const uint32_t groups = (width + group - 1) / group, heads = width / dim, words = ckv_row_words(width, bits);
  uint32_t *codes = exact(ROWS * words * 4), *order = exact(width * 4);
  float *source = exact(ROWS * width * 4), *rows = exact(ROWS * width * 4), *q = exact(heads * M * dim * 4);
  uint16_t *scales = exact(ROWS * groups * 2), *mins = exact(ROWS * groups * 2);
  float *out = exact(heads * M * COUNT * 4), *scratch = exact(64 * width * 4);
  const uint32_t pairs = turned / 2;
  const size_t stride = POSITIONS + 15;
  float *cosines = exact(pairs * stride * 4), *sines = exact(pairs * stride * 4);
  for (uint32_t i = 0; i < ROWS * width; i++) source[i] = rng_float(&r) * (i % width == 2 ? 20 : 1);
  for (uint32_t c = 0; c < width; c++) order[c] = (c * 5 + 3) % width;
  for (uint32_t i = 0; i < heads * M * dim; i++) q[i] = rng_float(&r);
  for (uint32_t i = 0; i < pairs * stride; i++) {
    double angle = (double)(i % stride) * pow(100, -(double)(i / stride) / pairs);
    cosines[i] = (float)cos(angle);
    sines[i] = (float)sin(angle);
  }
  p.portable->encode_row(source, CKV_F32, width, ROWS, width, group, bits, CKV_F16, codes, scales, mins);
  ckv_run run = {.kind = CKV_AFFINE_ROW, .dtype = CKV_F16, .bits = bits, .group = group, .dim = width, .rows = ROWS,
                 .data = codes, .scale = scales, .min = mins};
  ckv_map map = {.dim = width, .block = block, .dtype = CKV_F32, .order = ordered ? order : NULL};
  ckv_mapped_decode(p.portable, &map, &run, 0, ROWS, rows, width);
  /* What a channel of a block is a sum of. */
  float *codes_as = exact(ROWS * width * 4);
  p.portable->decode(&run, 0, ROWS, codes_as, width);
  ckv_turns turns = {.pairs = pairs, .step = interleaved ? 2 : 1, .partner = interleaved ? 1 : pairs, .stride = stride,
                     .cosines = cosines, .sines = sines};
  ckv_joined_head *members = exact(heads * sizeof *members);
  for (uint32_t h = 0; h < heads; h++)
    members[h] = (ckv_joined_head){.channel = h * dim, .q = q + h * M * dim, .out = out + h * M * COUNT};
  for (uint32_t m = 1; m <= M; m++) {
    memset(out, 0x5a, heads * M * COUNT * 4);
    bool done = p.level->joined_logits(&run, &map, FIRST, COUNT, members, heads, dim, m, dim, 0.3f, COUNT, &turns,
                                       OFFSET, scratch);
    expect(done, "%s joined_logits refuses %u bits in blocks of %u", p.level->name, bits, block);
    for (uint32_t h = 0; h < heads; h++)
      for (uint32_t i = 0; i < COUNT; i++) {
        const float *row = rows + (FIRST + i) * width + h * dim;
        double size = 0; /* no channel is larger than this, nor was on the way */
        for (uint32_t c = 0; c < width; c++) {
          float y = fabsf(codes_as[(FIRST + i) * width + c]);
          uint32_t at = ordered ? order[c] : c;
          double mn = fabs(value_of(mins, CKV_F16, (FIRST + i) * groups + c / group));
          if (at / block == h * dim / block) size += (double)y + 2 * mn;
        }
        size /= sqrt(block);
        for (uint32_t j = 0; j < m; j++) {
          const float *y = q + (h * M + j) * dim;
          double sum = 0, weight = 0;
          for (uint32_t c = 0; c < dim; c++) {
            double x = row[c];
            if (c < turned) {
              uint32_t pair = interleaved ? c / 2 : c % pairs;
              bool second = interleaved ? c % 2 : c >= pairs;
              size_t other = second ? c - turns.partner : c + turns.partner, at = pair * stride + OFFSET + i;
              x = x * cosines[at] + (second ? 1.0 : -1.0) * (double)row[other] * sines[at];
            }
            sum += 0.3f * (double)y[c] * x;
            weight += 0.3f * fabs((double)y[c]) * 2;
          }
          double error = fabs(out[(h * M + j) * COUNT + i] - sum);
          expect(error <= (dim + 16) * 0x1p-24 * weight * size,
                 "%s joined_logits: %u bits, head %u of %u channels, m %u row %u: off by %g", p.level->name, bits, h,
                 dim, m, i, error);
        }
      }
    for (uint32_t i = 0; i < heads * M * COUNT; i++) {
      uint32_t untouched = 0x5a5a5a5a;
      if (i / COUNT % M < m) continue;
      expect(memcmp(out + i, &untouched, 4) == 0, "%s joined_logits wrote elsewhere", p.level->name);
    }
  }
  run.group = 24;
  expect(!p.level->joined_logits(&run, &map, 0, 0, members, heads, dim, 1, dim, 1, COUNT, &turns, 0, scratch),
         "%s joined_logits: groups within blocks", p.level->name);
  void *all[] = {codes, order, source, rows, q, scales, mins, out, scratch, cosines, sines, codes_as, members};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

void check_map(pair p) {
  for (uint32_t bits = 2; bits <= 8; bits += bits == 4 ? 4 : 1)
    for (uint32_t variant = 0; variant < 4; variant++) {
      check_joined(p, 256, variant < 2 ? 256 : 128, variant % 2 ? 64 : 32, bits, variant ? 128 : 32,
                   variant % 2 ? 64 : 24, variant >= 2, variant % 2);
      check_joined(p, 512, 512, 128, bits, 512, 128, false, variant % 2);
    }

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
