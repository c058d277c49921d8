/* Comparing and mixing rows of f32, written once for every level: what a level brings is `dot` and `scale_in_place`,
 * and its instructions for the plain loops. */

/* Lengths below this count as this, so that the cosine with a zero row is 0. */
#define CKV_SMALLEST_NORM 1e-6f

CKV_INLINE float ckv_length(const float *x, uint32_t dim) {
  float length = __builtin_elementwise_sqrt(dot(x, x, dim));
  return length > CKV_SMALLEST_NORM ? length : CKV_SMALLEST_NORM;
}

static void normalise_rows(float *rows, size_t stride, uint32_t dim, size_t count) {
  for (size_t r = 0; r < count; r++) scale_in_place(rows + r * stride, 1 / ckv_length(rows + r * stride, dim), dim);
}

CKV_INLINE float ckv_squared(const float *x, const float *y, float sign, uint32_t dim) {
#pragma clang fp reassociate(on)
  float sum = 0;
  for (uint32_t c = 0; c < dim; c++) sum += (x[c] + sign * y[c]) * (x[c] + sign * y[c]);
  return sum;
}

static void compare_rows(const float *rows, size_t stride, uint32_t dim, const uint32_t *first, const uint32_t *second,
                         size_t n, uint32_t measure, float *out) {
  for (size_t i = 0; i < n; i++) {
    const float *x = rows + first[i] * stride, *y = rows + second[i] * stride;
    float cosine;
    switch (measure) {
      case CKV_COSINE:
        cosine = dot(x, y, dim) / (ckv_length(x, dim) * ckv_length(y, dim));
        out[i] = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
        break;
      case CKV_DISTANCE: out[i] = ckv_squared(x, y, -1, dim); break;
      case CKV_SUM: out[i] = ckv_squared(x, y, 1, dim); break;
      default: out[i] = dot(x, y, dim);
    }
  }
}

/* No fused operations and no sums across channels: the same bits at every level. */
static void mix_rows(const float *rows, size_t stride, uint32_t dim, const uint32_t *starts, const uint32_t *index,
                     const float *weight, const float *divisor, size_t n, float *out, size_t out_stride) {
  for (size_t i = 0; i < n; i++) {
    float *restrict y = out + i * out_stride;
    for (uint32_t t = starts[i]; t < starts[i + 1]; t++) {
      const float *x = rows + index[t] * stride;
      float w = weight[t];
      if (t == starts[i])
        for (uint32_t c = 0; c < dim; c++) y[c] = w * x[c];
      else
        for (uint32_t c = 0; c < dim; c++) y[c] += w * x[c];
    }
    if (divisor[i] != 1)
      for (uint32_t c = 0; c < dim; c++) y[c] /= divisor[i];
  }
}
