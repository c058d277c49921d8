/* Measures of rows of f32, a tile at a time, written once for every level: its instructions make the plain loops fast. */

static void scan_rows(const float *rows, size_t stride, uint32_t dim, size_t count, uint32_t measure, const float *low,
                      const float *inverse, float *out) {
#pragma clang fp reassociate(on)
  for (size_t i = 0; i < count; i++) {
    const float *x = rows + i * stride;
    float sum = 0;
    switch (measure) {
      case CKV_SQUARES:
        for (uint32_t c = 0; c < dim; c++) sum += x[c] * x[c];
        break;
      case CKV_ABSOLUTES:
        for (uint32_t c = 0; c < dim; c++) sum += x[c] < 0 ? -x[c] : x[c];
        break;
      default: {
        /* The mean first: scaled numbers may lie far from zero. */
        float squares = 0;
        for (uint32_t c = 0; c < dim; c++) sum += (x[c] - low[c]) * inverse[c];
        float mean = sum / (float)dim;
        for (uint32_t c = 0; c < dim; c++) {
          float d = (x[c] - low[c]) * inverse[c] - mean;
          squares += d * d;
        }
        sum = dim > 1 ? __builtin_elementwise_sqrt(squares / (float)(dim - 1)) : 0;
      }
    }
    out[i] = sum;
  }
}

static void fold(const float *x, size_t n, uint32_t measure, float *restrict out) {
  if (measure == CKV_SQUARES)
    for (size_t i = 0; i < n; i++) out[i] += x[i] * x[i];
  else if (measure == CKV_ABSOLUTES)
    for (size_t i = 0; i < n; i++) out[i] += x[i] < 0 ? -x[i] : x[i];
  else
    for (size_t i = 0; i < n; i++) out[i] += x[i];
}
