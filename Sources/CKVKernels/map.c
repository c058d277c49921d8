/* Rows behind a map (see ckv_map): attention, decoding and encoding of any run through the kernels of a level.
 *
 * The map costs a few operations per channel and call, so it is plain C but for the butterflies. Nothing is fused:
 * rows and codes are the same bits at every level. */
#include "internal.h"

#define CKV_MOST_CHANNELS 4096u
/* Query rows whose logits are shifted together. */
#define CKV_SHIFTS 256u

/* ---- runs of bare codes ------------------------------------------------------------------------------------------ */

#define CKV_BARE_ROWS 1024u
static const float ones[CKV_BARE_ROWS] = {[0 ... CKV_BARE_ROWS - 1] = 1};
static const float zeros[CKV_BARE_ROWS];

/* Rows first ... of a run of bare codes, at most CKV_BARE_ROWS of them, as a run with a scale of 1 and a min of 0. */
static ckv_run with_metadata(const ckv_run *run, uint32_t first, uint32_t count) {
  ckv_run result = *run;
  result.kind = CKV_AFFINE_ROW;
  result.dtype = CKV_F32;
  result.group = run->dim;
  result.rows = count;
  result.data = (const uint32_t *)run->data + (size_t)first * ckv_row_words(run->dim, run->bits);
  result.scale = ones;
  result.min = zeros;
  return result;
}

static void logits_of(const ckv_kernels *k, const ckv_run *run, uint32_t first, uint32_t count, const float *q,
                      uint32_t m, size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  if (run->kind != CKV_CODES_ROW) {
    k->logits(run, first, count, q, m, q_stride, scale, out, ld, scratch);
    return;
  }
  for (uint32_t i = 0; i < count; i += CKV_BARE_ROWS) {
    uint32_t n = ckv_min_u32(CKV_BARE_ROWS, count - i);
    ckv_run rows = with_metadata(run, first + i, n);
    k->logits(&rows, 0, n, q, m, q_stride, scale, out + i, ld, scratch);
  }
}

static void accumulate_of(const ckv_kernels *k, const ckv_run *run, uint32_t first, uint32_t count, const float *p,
                          uint32_t m, size_t ld, float *acc, size_t acc_stride, float *scratch) {
  if (run->kind != CKV_CODES_ROW) {
    k->accumulate(run, first, count, p, m, ld, acc, acc_stride, scratch);
    return;
  }
  for (uint32_t i = 0; i < count; i += CKV_BARE_ROWS) {
    uint32_t n = ckv_min_u32(CKV_BARE_ROWS, count - i);
    ckv_run rows = with_metadata(run, first + i, n);
    k->accumulate(&rows, 0, n, p + i, m, ld, acc, acc_stride, scratch);
  }
}

static void decode_of(const ckv_kernels *k, const ckv_run *run, uint32_t first, uint32_t count, float *out,
                      size_t out_stride) {
  if (run->kind != CKV_CODES_ROW) {
    k->decode(run, first, count, out, out_stride);
    return;
  }
  for (uint32_t i = 0; i < count; i += CKV_BARE_ROWS) {
    uint32_t n = ckv_min_u32(CKV_BARE_ROWS, count - i);
    ckv_run rows = with_metadata(run, first + i, n);
    k->decode(&rows, 0, n, out + i * out_stride, out_stride);
  }
}

void ckv_encode_codes(const float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t bits, uint32_t *codes) {
  uint8_t bytes[CKV_MOST_CHANNELS + 64];
  float levels = ckv_levels(bits);
  uint32_t words = ckv_row_words(dim, bits);
  for (uint32_t r = 0; r < count; r++) {
    const float *x = rows + r * stride;
    for (uint32_t c = 0; c < dim; c++) {
      float t = x[c] > 0 ? x[c] : 0;
      t = t < levels ? t : levels;
      float rounded = t + CKV_ROUND_MAGIC; /* as in code_of of portable.c */
      bytes[c] = (uint8_t)(int32_t)(rounded - CKV_ROUND_MAGIC);
    }
    memset(bytes + dim, 0, 32);
    ckv_pack_row(bytes, dim, bits, codes + (size_t)r * words);
  }
}

void ckv_channel_range(const float *rows, size_t stride, uint32_t count, uint32_t dim, float *low, float *high) {
  for (uint32_t r = 0; r < count; r++) {
    const float *x = rows + r * stride;
    for (uint32_t c = 0; c < dim; c++) {
      low[c] = x[c] < low[c] ? x[c] : low[c];
      high[c] = x[c] > high[c] ? x[c] : high[c];
    }
  }
}

int64_t ckv_first_beyond(const float *x, size_t n, float limit) {
  size_t beyond = 0; /* no early end: it is almost always 0 */
  for (size_t i = 0; i < n; i++) beyond += x[i] > limit || x[i] < -limit;
  if (!beyond) return -1;
  size_t i = 0;
  while (x[i] <= limit && x[i] >= -limit) i++;
  return (int64_t)i;
}

/* ---- the map ------------------------------------------------------------------------------------------------------ */

/* One of the map's numbers per channel as f32: where they are, or in `room`. */
static const float *numbers(const ckv_kernels *k, const void *p, uint32_t type, uint32_t dim, float *room) {
  if (!p || type == CKV_F32) return p;
  k->convert(room, CKV_F32, p, type, dim);
  return room;
}

static void multiply(float *x, const float *by, uint32_t n) {
  for (uint32_t c = 0; c < n; c++) x[c] *= by[c];
}

/* P H S x */
static void rotate(const ckv_kernels *k, const ckv_map *map, float *rows, size_t stride, uint32_t count) {
  float moved[CKV_MOST_CHANNELS];
  if (map->sign)
    for (uint32_t r = 0; r < count; r++) multiply(rows + r * stride, map->sign, map->dim);
  if (map->block > 1) k->hadamard(rows, stride, count, map->dim, map->block);
  if (!map->order) return;
  for (uint32_t r = 0; r < count; r++) {
    float *x = rows + r * stride;
    for (uint32_t c = 0; c < map->dim; c++) moved[c] = x[map->order[c]];
    memcpy(x, moved, map->dim * sizeof(float));
  }
}

/* S H P' y */
static void rotate_back(const ckv_kernels *k, const ckv_map *map, float *rows, size_t stride, uint32_t count) {
  float moved[CKV_MOST_CHANNELS];
  if (map->order) {
    for (uint32_t r = 0; r < count; r++) {
      float *x = rows + r * stride;
      for (uint32_t c = 0; c < map->dim; c++) moved[map->order[c]] = x[c];
      memcpy(x, moved, map->dim * sizeof(float));
    }
  }
  if (map->block > 1) k->hadamard(rows, stride, count, map->dim, map->block);
  if (map->sign)
    for (uint32_t r = 0; r < count; r++) multiply(rows + r * stride, map->sign, map->dim);
}

void ckv_map_rows(const ckv_kernels *k, const ckv_map *map, float *rows, size_t stride, uint32_t count) {
  float factors[CKV_MOST_CHANNELS], offsets[CKV_MOST_CHANNELS];
  uint32_t dim = map->dim;
  const float *factor = numbers(k, map->factor, map->dtype, dim, factors);
  const float *offset = numbers(k, map->offset, map->dtype, dim, offsets);
  rotate(k, map, rows, stride, count);
  for (uint32_t r = 0; r < count; r++) {
    float *x = rows + r * stride;
    if (offset)
      for (uint32_t c = 0; c < dim; c++) x[c] -= offset[c];
    if (factor)
      for (uint32_t c = 0; c < dim; c++) x[c] = factor[c] == 0 ? 0 : x[c] / factor[c];
  }
}

/* ---- attention and decoding --------------------------------------------------------------------------------------- */

size_t ckv_mapped_floats(uint32_t dim, uint32_t m) { return (size_t)dim * (m + 2); }

void ckv_mapped_logits(const ckv_kernels *k, const ckv_map *map, const ckv_run *run, uint32_t first, uint32_t count,
                       const float *q, uint32_t m, size_t q_stride, float scale, float *out, size_t ld, float *scratch,
                       float *mapped) {
  if (!map) {
    logits_of(k, run, first, count, q, m, q_stride, scale, out, ld, scratch);
    return;
  }
  uint32_t dim = map->dim;
  float *queries = mapped + 2 * dim;
  const float *factor = numbers(k, map->factor, map->dtype, dim, mapped);
  const float *offset = numbers(k, map->offset, map->dtype, dim, mapped + dim);
  for (uint32_t j = 0; j < m; j++) memcpy(queries + (size_t)j * dim, q + j * q_stride, dim * sizeof(float));
  rotate(k, map, queries, dim, m);
  float shifts[CKV_SHIFTS];
  for (uint32_t start = 0; start < m; start += CKV_SHIFTS) {
    uint32_t n = ckv_min_u32(CKV_SHIFTS, m - start);
    float *block = queries + (size_t)start * dim, *rows = out + start * ld;
    for (uint32_t j = 0; j < n; j++) {
      if (offset) shifts[j] = scale * k->dot(block + (size_t)j * dim, offset, dim);
      if (factor) multiply(block + (size_t)j * dim, factor, dim);
    }
    logits_of(k, run, first, count, block, n, dim, scale, rows, ld, scratch);
    if (!offset) continue;
    for (uint32_t j = 0; j < n; j++)
      for (uint32_t i = 0; i < count; i++) rows[j * ld + i] += shifts[j];
  }
}

void ckv_mapped_accumulate(const ckv_kernels *k, const ckv_map *map, const ckv_run *run, uint32_t first,
                           uint32_t count, const float *p, uint32_t m, size_t ld, float *acc, size_t acc_stride,
                           float *scratch, float *mapped) {
  if (!map) {
    accumulate_of(k, run, first, count, p, m, ld, acc, acc_stride, scratch);
    return;
  }
  uint32_t dim = map->dim;
  float *sums = mapped + 2 * dim;
  const float *factor = numbers(k, map->factor, map->dtype, dim, mapped);
  const float *offset = numbers(k, map->offset, map->dtype, dim, mapped + dim);
  memset(sums, 0, (size_t)m * dim * sizeof(float));
  accumulate_of(k, run, first, count, p, m, ld, sums, dim, scratch);
  for (uint32_t j = 0; j < m; j++) {
    float *sum = sums + (size_t)j * dim, weight = 0;
    if (factor) multiply(sum, factor, dim);
    if (!offset) continue;
    for (uint32_t i = 0; i < count; i += CKV_BARE_ROWS)
      weight += k->dot(p + j * ld + i, ones, ckv_min_u32(CKV_BARE_ROWS, count - i));
    k->axpy(sum, offset, weight, dim);
  }
  rotate_back(k, map, sums, dim, m);
  for (uint32_t j = 0; j < m; j++) k->axpy(acc + j * acc_stride, sums + (size_t)j * dim, 1, dim);
}

void ckv_mapped_decode(const ckv_kernels *k, const ckv_map *map, const ckv_run *run, uint32_t first, uint32_t count,
                       float *out, size_t out_stride) {
  decode_of(k, run, first, count, out, out_stride);
  if (!map) return;
  float factors[CKV_MOST_CHANNELS], offsets[CKV_MOST_CHANNELS];
  const float *factor = numbers(k, map->factor, map->dtype, map->dim, factors);
  const float *offset = numbers(k, map->offset, map->dtype, map->dim, offsets);
  for (uint32_t r = 0; r < count; r++) {
    float *x = out + r * out_stride;
    if (factor) multiply(x, factor, map->dim);
    if (offset)
      for (uint32_t c = 0; c < map->dim; c++) x[c] += offset[c];
  }
  rotate_back(k, map, out, out_stride, count);
}
