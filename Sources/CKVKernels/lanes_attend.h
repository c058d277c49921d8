/* Attention over rows, written once for every vector level.
 *
 * Few query rows: blocks of four rows by V_QUERIES query rows, straight from the stored type.
 * Many query rows: a tile of rows is converted to f32 once; logits transposes it, so that the lanes are rows and no
 * horizontal sums are needed. Affine runs go through the same tile unless the level has something better.
 * The order of additions of one logit depends on dim and m only, not on where the row lies in a call. */

/* How far ahead of the row in work memory is asked for, in bytes. Measured cold, one thread, Zen 5, f16, GB/s of
 * logits and accumulate: 2 KiB 22 and 25, 4 KiB 25 and 31, 8 KiB 34 and 33, 16 KiB 35 and 39, 32 KiB 31 and 30. */
#define V_AHEAD 16384

#define V_TILE_LANES (V_TILE_VECTORS * VN)

#include "query_groups.h"

/* ---- few query rows -------------------------------------------------------------------------------------------- */

CKV_INLINE void v_logits_few(const char *base, ptrdiff_t row_bytes, uint32_t type, uint32_t dim, uint32_t count,
                             const float *q, const uint32_t nq, size_t q_stride, float scale, float *out, size_t ld) {
  const size_t size = ckv_size_of(type);
  uint32_t whole = dim / VN * VN;
  for (uint32_t i = 0; i < count; i += 4) {
    /* Past the end the last row is repeated, and its result dropped. */
    const char *row[4];
    CKV_UNROLL
    for (uint32_t k = 0; k < 4; k++) row[k] = base + (ptrdiff_t)ckv_min_u32(i + k, count - 1) * row_bytes;
    vf sum[V_QUERIES][4];
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++)
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) sum[j][k] = vf_zero();
    for (uint32_t c = 0; c < whole; c += VN) {
      vf x[4];
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) {
        __builtin_prefetch(row[k] + c * size + V_AHEAD);
        x[k] = vf_load_as(row[k] + c * size, type);
      }
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) {
        vf y = vf_load(q + j * q_stride + c);
        CKV_UNROLL
        for (uint32_t k = 0; k < 4; k++) sum[j][k] = vf_fma(x[k], y, sum[j][k]);
      }
    }
    if (whole < dim) {
      uint32_t rest = dim - whole;
      vf x[4];
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) x[k] = vf_load_as_n(row[k] + whole * size, type, rest);
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++) {
        vf y = vf_load_n(q + j * q_stride + whole, rest);
        CKV_UNROLL
        for (uint32_t k = 0; k < 4; k++) sum[j][k] = vf_fma(x[k], y, sum[j][k]);
      }
    }
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      float four[4];
      vf_sum4(sum[j][0], sum[j][1], sum[j][2], sum[j][3], four);
      float *to = out + j * ld + i;
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) four[k] *= scale;
      if (i + 4 <= count) memcpy(to, four, sizeof four);
      else memcpy(to, four, (count - i) * sizeof(float));
    }
  }
}

/* All m query rows over rows of one type, in blocks. Row blocks outside, so that a row is in the first-level cache
 * for all but the first block of query rows. */
CKV_INLINE void v_logits_dense(const char *base, ptrdiff_t row_bytes, uint32_t type, uint32_t dim, uint32_t count,
                               const float *q, uint32_t m, size_t q_stride, float scale, float *out, size_t ld) {
  const uint32_t block = m > V_QUERIES ? 16 : count;
  for (uint32_t i = 0; i < count; i += block) {
    const char *from = base + (ptrdiff_t)i * row_bytes;
    uint32_t n = ckv_min_u32(block, count - i);
    for (uint32_t j = 0; j < m; j += V_QUERIES) {
      const float *queries = q + j * q_stride;
      float *to = out + j * ld + i;
      switch (ckv_min_u32(V_QUERIES, m - j)) {
        case 1: v_logits_few(from, row_bytes, type, dim, n, queries, 1, q_stride, scale, to, ld); break;
        case 2: v_logits_few(from, row_bytes, type, dim, n, queries, 2, q_stride, scale, to, ld); break;
#if V_QUERIES > 2
        case 3: v_logits_few(from, row_bytes, type, dim, n, queries, 3, q_stride, scale, to, ld); break;
        default: v_logits_few(from, row_bytes, type, dim, n, queries, 4, q_stride, scale, to, ld); break;
#endif
      }
    }
  }
}

/* acc[j][0 ..< cv vectors] += rows; `tail` = 0, or the channels of a single short vector. */
CKV_INLINE void v_accumulate_block(const char *base, ptrdiff_t row_bytes, uint32_t type, uint32_t count,
                                   const float *p, const uint32_t nq, size_t ld, const uint32_t cv, uint32_t tail,
                                   float *acc, size_t acc_stride) {
  const size_t step = VN * ckv_size_of(type);
  vf sum[V_QUERIES][4];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (uint32_t k = 0; k < cv; k++)
      sum[j][k] = tail ? vf_load_n(acc + j * acc_stride, tail) : vf_load(acc + j * acc_stride + k * VN);
  for (uint32_t i = 0; i < count; i++) {
    const char *row = base + (ptrdiff_t)i * row_bytes;
    vf x[4];
    CKV_UNROLL
    for (uint32_t k = 0; k < cv; k++) {
      __builtin_prefetch(row + k * step + V_AHEAD);
      x[k] = tail ? vf_load_as_n(row, type, tail) : vf_load_as(row + k * step, type);
    }
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf weight = vf_set1(p[j * ld + i]);
      CKV_UNROLL
      for (uint32_t k = 0; k < cv; k++) sum[j][k] = vf_fma(weight, x[k], sum[j][k]);
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (uint32_t k = 0; k < cv; k++) {
      if (tail) vf_store_n(acc + j * acc_stride, sum[j][k], tail);
      else vf_store(acc + j * acc_stride + k * VN, sum[j][k]);
    }
}

CKV_INLINE void v_accumulate_few(const char *base, ptrdiff_t row_bytes, uint32_t type, uint32_t dim, uint32_t count,
                                 const float *p, const uint32_t nq, size_t ld, float *acc, size_t acc_stride) {
  const size_t size = ckv_size_of(type);
  uint32_t c = 0;
  for (; c + 4 * VN <= dim; c += 4 * VN)
    v_accumulate_block(base + c * size, row_bytes, type, count, p, nq, ld, 4, 0, acc + c, acc_stride);
  for (; c + VN <= dim; c += VN)
    v_accumulate_block(base + c * size, row_bytes, type, count, p, nq, ld, 1, 0, acc + c, acc_stride);
  if (c < dim) v_accumulate_block(base + c * size, row_bytes, type, count, p, nq, ld, 1, dim - c, acc + c, acc_stride);
}

/* Blocks of rows outside, so that the strips of channels of a row are read close to each other in time. */
CKV_INLINE void v_accumulate_dense(const char *base, ptrdiff_t row_bytes, uint32_t type, uint32_t dim,
                                   uint32_t count, const float *p, uint32_t m, size_t ld, float *acc,
                                   size_t acc_stride) {
  const uint32_t block = 64;
  for (uint32_t i = 0; i < count; i += block) {
    const char *from = base + (ptrdiff_t)i * row_bytes;
    uint32_t n = ckv_min_u32(block, count - i);
    for (uint32_t j = 0; j < m; j += V_QUERIES) {
      const float *weights = p + j * ld + i;
      float *to = acc + j * acc_stride;
      switch (ckv_min_u32(V_QUERIES, m - j)) {
        case 1: v_accumulate_few(from, row_bytes, type, dim, n, weights, 1, ld, to, acc_stride); break;
        case 2: v_accumulate_few(from, row_bytes, type, dim, n, weights, 2, ld, to, acc_stride); break;
#if V_QUERIES > 2
        case 3: v_accumulate_few(from, row_bytes, type, dim, n, weights, 3, ld, to, acc_stride); break;
        default: v_accumulate_few(from, row_bytes, type, dim, n, weights, 4, ld, to, acc_stride); break;
#endif
      }
    }
  }
}

/* The f32 versions, compiled once and used by tiles and dense runs alike. */
static __attribute__((noinline)) void logits_f32(const float *rows, size_t stride, uint32_t dim, uint32_t count,
                                                 const float *q, uint32_t m, size_t q_stride, float scale,
                                                 float *out, size_t ld) {
  v_logits_dense((const char *)rows, (ptrdiff_t)(stride * 4), CKV_F32, dim, count, q, m, q_stride, scale, out, ld);
}
static __attribute__((noinline)) void accumulate_f32(const float *rows, size_t stride, uint32_t dim, uint32_t count,
                                                     const float *p, uint32_t m, size_t ld, float *acc,
                                                     size_t acc_stride) {
  v_accumulate_dense((const char *)rows, (ptrdiff_t)(stride * 4), CKV_F32, dim, count, p, m, ld, acc, acc_stride);
}

/* ---- many query rows ------------------------------------------------------------------------------------------- */

/* tile[c * V_TILE_LANES + i] is channel c of row i. */
CKV_INLINE void v_logits_tile(const float *tile, uint32_t dim, uint32_t count, const float *q, const uint32_t nq,
                              size_t q_stride, float scale, ckv_coming *ahead, float *out, size_t ld) {
  const char *next = ahead->next;
  const size_t next_step = ahead->step;
  ahead->next += dim * next_step;
  vf sum[V_TILE_QUERIES][V_TILE_VECTORS];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (uint32_t k = 0; k < V_TILE_VECTORS; k++) sum[j][k] = vf_zero();
  for (uint32_t c = 0; c < dim; c++, next += next_step) {
    __builtin_prefetch(next);
    vf x[V_TILE_VECTORS];
    CKV_UNROLL
    for (uint32_t k = 0; k < V_TILE_VECTORS; k++) x[k] = vf_load(tile + (size_t)c * V_TILE_LANES + k * VN);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf y = vf_set1(q[j * q_stride + c]);
      CKV_UNROLL
      for (uint32_t k = 0; k < V_TILE_VECTORS; k++) sum[j][k] = vf_fma(x[k], y, sum[j][k]);
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) {
    for (uint32_t k = 0; k < V_TILE_VECTORS && k * VN < count; k++) {
      vf y = sum[j][k] * vf_set1(scale);
      if ((k + 1) * VN <= count) vf_store(out + j * ld + k * VN, y);
      else vf_store_n(out + j * ld + k * VN, y, count - k * VN);
    }
  }
}

/* acc += weights of nq query rows times n rows of a tile, cv vectors of channels; `lanes` channels are there. */
CKV_INLINE void v_values_tile(const float *tile, size_t stride, uint32_t n, const float *p, const uint32_t nq, size_t ld,
                              const uint32_t cv, uint32_t lanes, ckv_coming *ahead, float *acc, size_t acc_stride) {
  const char *next = ahead->next;
  const size_t next_step = ahead->step;
  ahead->next += n * next_step;
  vf sum[V_TILE_QUERIES][V_TILE_VECTORS];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (uint32_t k = 0; k < cv; k++) {
      const float *from = acc + j * acc_stride + k * VN;
      sum[j][k] = (k + 1) * VN <= lanes ? vf_load(from) : vf_load_n(from, lanes - k * VN);
    }
  for (uint32_t i = 0; i < n; i++, tile += stride, next += next_step) {
    __builtin_prefetch(next);
    vf x[V_TILE_VECTORS];
    CKV_UNROLL
    for (uint32_t k = 0; k < cv; k++) x[k] = vf_load(tile + k * VN);
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      const vf weight = vf_set1(p[j * ld + i]);
      CKV_UNROLL
      for (uint32_t k = 0; k < cv; k++) sum[j][k] = vf_fma(weight, x[k], sum[j][k]);
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (uint32_t k = 0; k < cv; k++) {
      float *to = acc + j * acc_stride + k * VN;
      if ((k + 1) * VN <= lanes) vf_store(to, sum[j][k]);
      else vf_store_n(to, sum[j][k], lanes - k * VN);
    }
}

/* What lies behind rows `first` to `end` of a run, as many as are there, in steps of work on these: tiles are read in a
 * burst, too short for the hardware to see where it goes, and computed on for long, while memory would idle. */
CKV_INLINE ckv_coming v_rows_behind(const ckv_run *run, uint32_t first, uint32_t end, size_t steps) {
  const uint32_t count = ckv_min_u32(end - first, run->rows - end);
  size_t row = run->kind == CKV_DENSE ? (size_t)run->row_stride * ckv_size_of(run->dtype)
               : run->kind == CKV_AFFINE_ROW       ? (size_t)ckv_row_words(run->dim, run->bits) * 4
               : run->kind == CKV_AFFINE_CHANNEL   ? (size_t)run->dim * run->bits / 8
                                                   : ckv_row_bytes(run->kind, run->code, run->dim);
  return ckv_coming_bytes((const char *)run->data + end * row, count * row, steps);
}

static void logits_many(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m,
                        size_t q_stride, float scale, float *out, size_t ld, float *scratch) {
  uint32_t dim = run->dim, padded = (dim + VN - 1) / VN * VN;
  float *rows = scratch, *tile = scratch + (size_t)V_TILE_LANES * padded;
  memset(rows, 0, (size_t)V_TILE_LANES * padded * sizeof(float));
  for (uint32_t i = 0; i < count; i += V_TILE_LANES) {
    uint32_t n = ckv_min_u32(V_TILE_LANES, count - i);
    decode(run, first + i, n, rows, padded);
    for (uint32_t r = 0; r < V_TILE_LANES; r += VN)
      for (uint32_t c = 0; c < padded; c += VN)
        vf_transpose(rows + (size_t)r * padded + c, padded, tile + (size_t)c * V_TILE_LANES + r, V_TILE_LANES);
    ckv_coming ahead = v_rows_behind(run, first + i, first + i + n, dim * v_query_groups(m));
    for (uint32_t j = 0, nq; j < m; j += nq) {
      nq = v_queries_at_a_time(m - j);
      const float *queries = q + j * q_stride;
      float *to = out + j * ld + i;
#define LOGITS(k) v_logits_tile(tile, dim, n, queries, k, q_stride, scale, &ahead, to, ld)
      V_FOR_QUERIES(nq, LOGITS);
#undef LOGITS
    }
  }
}

static void accumulate_many(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                            float *acc, size_t acc_stride, float *scratch) {
  enum { ROWS = 2 * CKV_TILE_ROWS };
  const uint32_t dim = run->dim, padded = (dim + VN - 1) / VN * VN, wide = V_TILE_VECTORS * VN;
  const size_t panels = padded / wide + padded % wide / VN;
  for (uint32_t i = 0; i < count; i += ROWS) {
    const uint32_t n = ckv_min_u32(ROWS, count - i);
    decode(run, first + i, n, scratch, padded);
    ckv_coming ahead = v_rows_behind(run, first + i, first + i + n, n * panels * v_query_groups(m));
    for (uint32_t c = 0, step; c < padded; c += step) {
      step = c + wide <= padded ? wide : VN;
      const uint32_t lanes = ckv_min_u32(step, dim - c);
      for (uint32_t j = 0, nq; j < m; j += nq) {
        nq = v_queries_at_a_time(m - j);
        const float *weights = p + j * ld + i;
        float *to = acc + j * acc_stride + c;
#define VALUES(k) v_values_tile(scratch + c, padded, n, weights, k, ld, V_TILE_VECTORS, lanes, &ahead, to, acc_stride)
#define NARROW(k) v_values_tile(scratch + c, padded, n, weights, k, ld, 1, lanes, &ahead, to, acc_stride)
        if (step == wide) V_FOR_QUERIES(nq, VALUES);
        else V_FOR_QUERIES(nq, NARROW);
#undef NARROW
#undef VALUES
      }
    }
  }
}

/* ---- FP8 ------------------------------------------------------------------------------------------------------- */

/* Rows of one scale are read as they are, and the scale goes to the logit or the weight. */

CKV_INLINE bool v_is_fp8(const ckv_run *run) {
  if (run->kind < CKV_SCALED_ROW || run->kind > CKV_SCALED_FIXED) return false;
  if (run->code != CKV_E4M3 && run->code != CKV_E5M2) return false;
  return run->kind != CKV_SCALED_ROW || run->group >= run->dim;
}

/* The scales of n rows from `first` on, times what vf_load_fp8 leaves out. */
CKV_INLINE void v_fp8_scales(const ckv_run *run, uint32_t first, uint32_t n, float *to) {
  const float up = run->code == CKV_E4M3 ? 256.0f : 1.0f;
  for (uint32_t i = 0; i < n; i++)
    to[i] = up * (run->kind == CKV_SCALED_FIXED   ? run->factor
                  : run->kind == CKV_SCALED_BLOCK ? ckv_load_scalar(run->scale, run->dtype, (first + i) / run->group)
                                                  : ckv_load_scalar(run->scale, run->dtype, first + i));
}

static __attribute__((noinline)) void logits_fp8(const ckv_run *run, uint32_t first, uint32_t count, const float *q,
                                                 uint32_t m, size_t q_stride, float scale, float *out, size_t ld,
                                                 float *scratch) {
  const uint32_t dim = run->dim;
  for (uint32_t i = 0, n; i < count; i += n) {
    n = ckv_min_u32(CKV_FP8_ROWS, count - i);
    const char *base = (const char *)run->data + (size_t)(first + i) * dim;
    float *to = out + i;
    if (run->code == CKV_E4M3) v_logits_dense(base, dim, CKV_BYTES_E4M3, dim, n, q, m, q_stride, scale, to, ld);
    else v_logits_dense(base, dim, CKV_BYTES_E5M2, dim, n, q, m, q_stride, scale, to, ld);
    v_fp8_scales(run, first + i, n, scratch);
    for (uint32_t j = 0; j < m; j++)
      for (uint32_t k = 0; k < n; k++) to[j * ld + k] *= scratch[k];
  }
}

static __attribute__((noinline)) void accumulate_fp8(const ckv_run *run, uint32_t first, uint32_t count,
                                                     const float *p, uint32_t m, size_t ld, float *acc,
                                                     size_t acc_stride, float *scratch) {
  const uint32_t dim = run->dim;
  float *weights = scratch + CKV_FP8_ROWS;
  for (uint32_t i = 0, n; i < count; i += n) {
    n = ckv_min_u32(CKV_FP8_ROWS, count - i);
    v_fp8_scales(run, first + i, n, scratch);
    for (uint32_t j = 0; j < m; j++)
      for (uint32_t k = 0; k < n; k++) weights[j * CKV_FP8_ROWS + k] = p[j * ld + i + k] * scratch[k];
    const char *base = (const char *)run->data + (size_t)(first + i) * dim;
    if (run->code == CKV_E4M3)
      v_accumulate_dense(base, dim, CKV_BYTES_E4M3, dim, n, weights, m, CKV_FP8_ROWS, acc, acc_stride);
    else v_accumulate_dense(base, dim, CKV_BYTES_E5M2, dim, n, weights, m, CKV_FP8_ROWS, acc, acc_stride);
  }
}

/* ---- the table's entries ----------------------------------------------------------------------------------------- */

static void logits(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                   float scale, float *out, size_t ld, float *scratch) {
  if (count == 0 || m == 0) return;
#ifdef V_AFFINE_LOGITS
  if (V_AFFINE_LOGITS(run, first, count, q, m, q_stride, scale, out, ld, scratch)) return;
#endif
  if (m >= CKV_MANY_QUERIES) {
    logits_many(run, first, count, q, m, q_stride, scale, out, ld, scratch);
    return;
  }
  if (v_is_fp8(run)) {
    logits_fp8(run, first, count, q, m, q_stride, scale, out, ld, scratch);
    return;
  }
  uint32_t type = run->dtype, dim = run->dim;
  if (run->kind == CKV_DENSE) {
    ptrdiff_t row_bytes = (ptrdiff_t)(run->row_stride * (int64_t)ckv_size_of(type));
    const char *base = (const char *)run->data + (ptrdiff_t)first * row_bytes;
    if (type == CKV_F32) v_logits_dense(base, row_bytes, CKV_F32, dim, count, q, m, q_stride, scale, out, ld);
    else if (type == CKV_F16) v_logits_dense(base, row_bytes, CKV_F16, dim, count, q, m, q_stride, scale, out, ld);
    else v_logits_dense(base, row_bytes, CKV_BF16, dim, count, q, m, q_stride, scale, out, ld);
    return;
  }
  for (uint32_t i = 0; i < count; i += CKV_TILE_ROWS) {
    uint32_t n = ckv_min_u32(CKV_TILE_ROWS, count - i);
    decode(run, first + i, n, scratch, dim);
    logits_f32(scratch, dim, dim, n, q, m, q_stride, scale, out + i, ld);
  }
}

static void accumulate(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                       float *acc, size_t acc_stride, float *scratch) {
  if (count == 0 || m == 0) return;
  uint32_t type = run->dtype, dim = run->dim;
  if (run->kind == CKV_DENSE && m < CKV_MANY_QUERIES) {
    ptrdiff_t row_bytes = (ptrdiff_t)(run->row_stride * (int64_t)ckv_size_of(type));
    const char *base = (const char *)run->data + (ptrdiff_t)first * row_bytes;
    if (type == CKV_F32) v_accumulate_dense(base, row_bytes, CKV_F32, dim, count, p, m, ld, acc, acc_stride);
    else if (type == CKV_F16) v_accumulate_dense(base, row_bytes, CKV_F16, dim, count, p, m, ld, acc, acc_stride);
    else v_accumulate_dense(base, row_bytes, CKV_BF16, dim, count, p, m, ld, acc, acc_stride);
    return;
  }
  if (m < CKV_MANY_QUERIES && v_is_fp8(run)) {
    accumulate_fp8(run, first, count, p, m, ld, acc, acc_stride, scratch);
    return;
  }
#ifdef V_AFFINE_ACCUMULATE
  if (V_AFFINE_ACCUMULATE(run, first, count, p, m, ld, acc, acc_stride, scratch)) return;
#endif
  if (m >= CKV_MANY_QUERIES) {
    accumulate_many(run, first, count, p, m, ld, acc, acc_stride, scratch);
    return;
  }
  for (uint32_t i = 0; i < count; i += CKV_TILE_ROWS) {
    uint32_t n = ckv_min_u32(CKV_TILE_ROWS, count - i);
    decode(run, first + i, n, scratch, dim);
    accumulate_f32(scratch, dim, dim, n, p + i, m, ld, acc, acc_stride);
  }
}
