// Rows as matrices: what factorising and projecting do beside the products, which cuBLAS and cuSOLVER make.
#include "device.cuh"

// The rows a matrix has beyond those that are held: zeros.
KV_KERNEL kv_zero_rows(float *rows, uint64_t stride, uint32_t count, uint32_t dim) {
  KV_GRID(i, (uint64_t)count * dim) rows[i / dim * stride + i % dim] = 0;
}

// Rows times `scale`, then turned from their positions to 0: one block a row. Without pairs nothing turns.
KV_KERNEL kv_turn_back(float *rows, uint64_t stride, uint32_t dim, float scale, const int32_t *positions,
                       int64_t first_position, kv_rotary rotary) {
  float *row = rows + blockIdx.x * stride;
  if (scale != 1) KV_EACH(c, dim) row[c] = kv_mul(row[c], scale);
  __syncthreads();
  const int64_t position = positions ? positions[blockIdx.x] : first_position + blockIdx.x;
  KV_EACH(p, rotary.pairs) kv_turn_pair(rotary, row, p, position, 0);
}

KV_KERNEL kv_subtract_row(float *rows, uint32_t count, uint32_t width, const float *mean) {
  KV_GRID(i, (uint64_t)count * width) rows[i] = kv_add(rows[i], -mean[i % width]);
}

// Some columns of rows: products of f32 rows are summed in f64.
KV_KERNEL kv_to_double(const float *rows, uint64_t stride, uint32_t count, uint32_t columns, double *out) {
  KV_GRID(i, (uint64_t)count * columns) out[i] = (double)rows[i / columns * stride + i % columns];
}

// Rows of f64 as f32, the last one first where they are to flip.
KV_KERNEL kv_to_single(const double *rows, uint32_t count, uint32_t width, uint32_t flips, float *out) {
  KV_GRID(i, (uint64_t)count * width) {
    const uint64_t r = i / width;
    out[(flips ? count - 1 - r : r) * width + i % width] = (float)rows[i];
  }
}

// Rows times a factor each.
KV_KERNEL kv_scale_wide(double *rows, uint32_t count, uint32_t width, const double *factors) {
  KV_GRID(i, (uint64_t)count * width) rows[i] *= factors[i / width];
}

// Adds rows, or their squares, to sums of the columns: one thread a column. `fresh`: nothing is there yet.
KV_KERNEL kv_column_sums(const float *rows, uint32_t count, uint32_t width, uint32_t squares, uint32_t fresh,
                         double *sums) {
  KV_GRID(c, width) {
    double sum = fresh ? 0 : sums[c];
    for (uint32_t r = 0; r < count; r++) {
      const double x = (double)rows[(uint64_t)r * width + c];
      sum += squares ? x * x : x;
    }
    sums[c] = sum;
  }
}

// Of `chunk` numbers a block: the sum of their squares and the largest magnitude, [2]. What is no number counts as
// infinity.
KV_KERNEL kv_magnitudes(const float *numbers, uint64_t count, uint32_t chunk, double *out) {
  KV_SHARED double sums[KV_THREADS];
  KV_SHARED float most[KV_THREADS];
  const uint64_t first = (uint64_t)blockIdx.x * chunk, left = count - first;
  double sum = 0;
  float largest = 0;
  KV_EACH(i, left < chunk ? (uint32_t)left : chunk) {
    const float x = numbers[first + i], size = kv_finite(x) ? fabsf(x) : KV_INFINITY;
    sum += (double)x * (double)x;
    largest = size > largest ? size : largest;
  }
  sums[threadIdx.x] = sum;
  most[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x) return;
  for (uint32_t t = 1; t < KV_THREADS; t++) {
    sum += sums[t];
    largest = most[t] > largest ? most[t] : largest;
  }
  out[2 * (uint64_t)blockIdx.x] = sum;
  out[2 * (uint64_t)blockIdx.x + 1] = (double)largest;
}

// What a seed makes of a number: SplitMix64's last step.
KV_DEVICE uint64_t kv_hash(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Adds every row, with a sign, to a row of a sketch, in the order of the rows: one thread a column. `first` counts the
// rows of the matrix before these.
KV_KERNEL kv_sketch(const float *rows, uint32_t count, uint32_t width, uint64_t first, uint64_t seed,
                    uint32_t sketch_rows, float *sketch) {
  KV_GRID(c, width) {
    for (uint32_t r = 0; r < count; r++) {
      const uint64_t hash = kv_hash(seed + (first + r) * 0x9e3779b97f4a7c15ull);
      const float x = rows[(uint64_t)r * width + c];
      float *to = sketch + hash % sketch_rows * width + c;
      *to += hash >> 63 ? -x : x;
    }
  }
}
