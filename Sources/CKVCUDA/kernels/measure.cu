// Comparing, mixing, measuring and restoring rows: what policies do between steps. Rows are f32 tables here.
#include "device.cuh"

// Smallest and largest value of every channel of some rows: one block a chunk of rows, [chunk][2][dim].
KV_KERNEL kv_channel_range(const float *rows, uint32_t count, uint32_t dim, uint32_t chunk, float *out) {
  const uint32_t first = blockIdx.x * chunk, end = first + chunk < count ? first + chunk : count;
  float *target = out + (uint64_t)blockIdx.x * 2 * dim;
  KV_EACH(c, dim) {
    float low = KV_INFINITY, high = -KV_INFINITY;
    for (uint32_t r = first; r < end; r++) {
      const float x = rows[(uint64_t)r * dim + c];
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    target[c] = low;
    target[dim + c] = high;
  }
}

// The dot product of two rows, for every lane of a warp.
KV_DEVICE float kv_dot(const float *x, const float *y, uint32_t dim) {
  float sum = 0;
  for (uint32_t c = threadIdx.x % 32; c < dim; c += 32) sum += x[c] * y[c];
  return kv_warp_sum(sum);
}

// A measure of each pair of rows: one warp a pair. 0: product, 1: cosine, 2: squared distance, 3: squared sum.
KV_KERNEL kv_compare(const float *rows, uint32_t dim, const uint32_t *first, const uint32_t *second, uint32_t count,
                     uint32_t measure, float *out) {
  const uint32_t warps = gridDim.x * (KV_THREADS / 32);
  for (uint32_t i = blockIdx.x * (KV_THREADS / 32) + threadIdx.x / 32; i < count; i += warps) {
    const float *x = rows + (uint64_t)first[i] * dim, *y = rows + (uint64_t)second[i] * dim;
    float result;
    if (measure < 2) {
      result = kv_dot(x, y, dim);
      if (measure == 1) {
        // Rows shorter than 1e-6 count as that long.
        const float a = fmaxf(sqrtf(kv_dot(x, x, dim)), 1e-6f), b = fmaxf(sqrtf(kv_dot(y, y, dim)), 1e-6f);
        result = fminf(fmaxf(result / (a * b), -1), 1);
      }
    } else {
      float sum = 0;
      for (uint32_t c = threadIdx.x % 32; c < dim; c += 32) {
        const float d = measure == 2 ? x[c] - y[c] : x[c] + y[c];
        sum += d * d;
      }
      result = kv_warp_sum(sum);
    }
    if (threadIdx.x % 32 == 0) out[i] = result;
  }
}

// Rows divided by their lengths; a zero row stays one. One warp a row.
KV_KERNEL kv_normalise(float *rows, uint32_t count, uint32_t dim) {
  const uint32_t warps = gridDim.x * (KV_THREADS / 32);
  for (uint32_t i = blockIdx.x * (KV_THREADS / 32) + threadIdx.x / 32; i < count; i += warps) {
    float *row = rows + (uint64_t)i * dim;
    const float inverse = 1 / fmaxf(sqrtf(kv_dot(row, row, dim)), 1e-6f);
    for (uint32_t c = threadIdx.x % 32; c < dim; c += 32) row[c] *= inverse;
  }
}

// For every source row the target row with the largest product, the first of equal ones: one block a source.
KV_KERNEL kv_nearest(const float *sources, const float *targets, uint32_t count, uint32_t dim, float *cosines,
                     uint32_t *indices) {
  KV_SHARED float best_cosine[KV_THREADS / 32];
  KV_SHARED uint32_t best_index[KV_THREADS / 32];
  const float *row = sources + (uint64_t)blockIdx.x * dim;
  const uint32_t warp = threadIdx.x / 32;
  float top = -KV_INFINITY;
  uint32_t index = 0;
  for (uint32_t t = warp; t < count; t += KV_THREADS / 32) {
    const float x = kv_dot(row, targets + (uint64_t)t * dim, dim);
    if (x > top) {
      top = x;
      index = t;
    }
  }
  if (threadIdx.x % 32 == 0) {
    best_cosine[warp] = top;
    best_index[warp] = index;
  }
  __syncthreads();
  if (threadIdx.x) return;
  for (uint32_t w = 1; w < KV_THREADS / 32; w++)
    if (best_cosine[w] > top || (best_cosine[w] == top && best_index[w] < index)) {
      top = best_cosine[w];
      index = best_index[w];
    }
  cosines[blockIdx.x] = fminf(fmaxf(top, -1), 1);
  indices[blockIdx.x] = index;
}

// Rows of a table turned from one position to another: one block a row.
KV_KERNEL kv_turn_rows(float *rows, uint32_t dim, const kv_turn *turns, kv_rotary rotary) {
  const kv_turn turn = turns[blockIdx.x];
  float *row = rows + (uint64_t)turn.row * dim;
  if (turn.from == turn.to) return;
  KV_EACH(p, rotary.pairs) kv_turn_pair(rotary, row, p, turn.from, turn.to);
}

// Keys turned where they lie, later by as many positions as their slice says: one thread a pair of channels, or a channel
// that does not turn. Without `writes` nothing changes, and `place` gets the least row with an element beyond `limit`.
KV_KERNEL kv_turn_keys(const kv_slice *slices, const int64_t *by, uint32_t count, uint32_t rows, kv_rotary rotary,
                       float limit, uint32_t writes, unsigned long long *place) {
  const uint32_t dim = slices[0].dim, items = dim - rotary.pairs;
  KV_GRID(i, (uint64_t)rows * items) {
    const uint32_t r = (uint32_t)(i / items), p = (uint32_t)(i % items);
    const kv_slice &s = kv_slice_of(slices, count, r);
    const uint64_t row = (uint64_t)(s.first + r - s.start) * dim;
    const uint32_t first = p >= rotary.pairs ? p + rotary.pairs : rotary.interleaved ? 2 * p : p;
    const uint32_t second = rotary.interleaved ? first + 1 : first + rotary.pairs;
    float x = kv_load((const void *)s.data, s.dtype, row + first), y = 0;
    if (p < rotary.pairs) {
      const double angle = (double)by[&s - slices] * (double)((const float *)rotary.frequencies)[p];
      const float c = (float)cos(angle), sine = (float)sin(angle), a = x;
      y = kv_load((const void *)s.data, s.dtype, row + second);
      x = kv_add(kv_mul(a, c), -kv_mul(y, sine));
      y = kv_add(kv_mul(y, c), kv_mul(a, sine));
      if (writes) {
        kv_store_within((void *)s.data, s.dtype, row + first, x);
        kv_store_within((void *)s.data, s.dtype, row + second, y);
      }
    }
    if (!writes && !(fabsf(x) <= limit && fabsf(y) <= limit)) atomicMin(place, (unsigned long long)r);
  }
}

// Weighted sums of rows in the order of their list, divided: one block a sum, one rounding per operation. `place` gets
// the least sum with an element beyond `limit`.
KV_KERNEL kv_mix(const float *rows, uint32_t dim, const uint32_t *starts, const uint32_t *index, const float *weight,
                 const float *divisor, float *out, float limit, unsigned long long *place) {
  const uint32_t begin = starts[blockIdx.x], end = starts[blockIdx.x + 1];
  KV_EACH(c, dim) {
    float sum = kv_mul(weight[begin], rows[(uint64_t)index[begin] * dim + c]);
    for (uint32_t t = begin + 1; t < end; t++)
      sum = kv_add(sum, kv_mul(weight[t], rows[(uint64_t)index[t] * dim + c]));
    sum = kv_div(sum, divisor[blockIdx.x]);
    out[(uint64_t)blockIdx.x * dim + c] = sum;
    if (!(fabsf(sum) <= limit)) atomicMin(place, (unsigned long long)blockIdx.x);
  }
}

// A number for every row: one warp a row. 0: squares, 1: magnitudes, 2: spread of (x - low) * inverse over the channels,
// 3: products with `vectors` rows of `matrix`, folded by `fold` (0: squares, 1: magnitudes, 3: plain).
KV_KERNEL kv_scan(const float *rows, uint32_t count, uint32_t dim, uint32_t quantity, const float *low,
                  const float *inverse, const float *matrix, uint32_t stride, uint32_t vectors, uint32_t fold,
                  float *out) {
  const uint32_t lane = threadIdx.x % 32, warps = gridDim.x * (KV_THREADS / 32);
  for (uint32_t i = blockIdx.x * (KV_THREADS / 32) + threadIdx.x / 32; i < count; i += warps) {
    const float *row = rows + (uint64_t)i * dim;
    float result = 0;
    if (quantity < 2) {
      for (uint32_t c = lane; c < dim; c += 32) result += quantity ? fabsf(row[c]) : row[c] * row[c];
      result = kv_warp_sum(result);
    } else if (quantity == 2) {
      float sum = 0, squares = 0;
      for (uint32_t c = lane; c < dim; c += 32) sum += (row[c] - low[c]) * inverse[c];
      const float mean = kv_warp_sum(sum) / (float)dim;
      for (uint32_t c = lane; c < dim; c += 32) {
        const float d = (row[c] - low[c]) * inverse[c] - mean;
        squares += d * d;
      }
      squares = kv_warp_sum(squares);
      result = dim < 2 ? 0 : sqrtf(squares / (float)(dim - 1));
    } else {
      for (uint32_t v = 0; v < vectors; v++) {
        const float x = kv_dot(row, matrix + (uint64_t)v * stride, dim);
        result += fold == 0 ? x * x : fold == 1 ? fabsf(x) : x;
      }
    }
    if (lane == 0) out[i] = result;
  }
}

// Sums of rows times their weights, over chunks of rows: one block a chunk, [chunk][dim].
KV_KERNEL kv_add_rows(const float *rows, uint32_t count, uint32_t dim, uint32_t chunk, const float *weights,
                      float *out) {
  const uint32_t first = blockIdx.x * chunk, end = first + chunk < count ? first + chunk : count;
  KV_EACH(c, dim) {
    float sum = 0;
    for (uint32_t r = first; r < end; r++) sum += weights[r] * rows[(uint64_t)r * dim + c];
    out[(uint64_t)blockIdx.x * dim + c] = sum;
  }
}

// Rows from their latents: latents times basis, plus the mean, turned to their positions. A block restores
// KV_LATENT_ROWS rows (x) of KV_THREADS channels (y); each element of the basis is read once for all of them.
KV_KERNEL kv_restore_rows(const float *rows_of_latents, uint32_t count, kv_basis basis, float *out) {
  KV_SHARED float latents[KV_LATENT_ROWS * KV_LATENT_CHANNELS];
  const uint32_t first = blockIdx.x * KV_LATENT_ROWS, c = blockIdx.y * KV_THREADS + threadIdx.x;
  const uint32_t rows = count - first < KV_LATENT_ROWS ? count - first : KV_LATENT_ROWS;
  float sum[KV_LATENT_ROWS];
  for (uint32_t r = 0; r < KV_LATENT_ROWS; r++) sum[r] = basis.mean && c < basis.dim ? ((const float *)basis.mean)[c] : 0;
  for (uint32_t start = 0; start < basis.rank; start += KV_LATENT_CHANNELS) {
    const uint32_t left = basis.rank - start, n = left < KV_LATENT_CHANNELS ? left : KV_LATENT_CHANNELS;
    __syncthreads();
    KV_EACH(i, rows * n)
      latents[i / n * KV_LATENT_CHANNELS + i % n] = rows_of_latents[(uint64_t)(first + i / n) * basis.rank + start + i % n];
    __syncthreads();
    if (c >= basis.dim) continue;
    for (uint32_t k = 0; k < n; k++) {
      const float b = kv_load((const void *)basis.data, basis.dtype, (uint64_t)(start + k) * basis.dim + c);
      for (uint32_t r = 0; r < rows; r++) sum[r] += latents[r * KV_LATENT_CHANNELS + k] * b;
    }
  }
  if (c < basis.dim)
    for (uint32_t r = 0; r < rows; r++) out[(uint64_t)(first + r) * basis.dim + c] = sum[r];
}

// Some channels of rows, turned to their positions: one block a row. `rows` and `out` may be the same.
KV_KERNEL kv_turn_channels(const float *rows, uint64_t stride, uint32_t first, uint32_t dim, const int32_t *positions,
                           int64_t first_position, kv_rotary rotary, float *out) {
  KV_SHARED float row[KV_MOST_CHANNELS];
  const float *source = rows + blockIdx.x * stride + first;
  const int64_t position = positions ? positions[blockIdx.x] : first_position + blockIdx.x;
  KV_EACH(c, dim) row[c] = source[c];
  __syncthreads();
  KV_EACH(p, rotary.pairs) kv_turn_pair(rotary, row, p, 0, position);
  __syncthreads();
  KV_EACH(c, dim) out[(uint64_t)blockIdx.x * dim + c] = row[c];
}

// Directions to rows: each times its length, a row of one channel. One block a row.
KV_KERNEL kv_scale_rows(float *rows, uint32_t dim, const kv_slice *lengths, uint32_t list) {
  const float length = kv_source(lengths, list, blockIdx.x, 0);
  KV_EACH(c, dim) rows[(uint64_t)blockIdx.x * dim + c] *= length;
}

// Rows to the slots they take the place of, those of `count` slots from `offset` on: one block a row.
KV_KERNEL kv_place_rows(const float *rows, uint32_t dim, const int32_t *slots, int32_t offset, uint32_t count,
                        float *out) {
  const int32_t slot = slots[blockIdx.x] - offset;
  if (slot < 0 || (uint32_t)slot >= count) return;
  KV_EACH(c, dim) out[(uint64_t)slot * dim + c] = rows[(uint64_t)blockIdx.x * dim + c];
}
