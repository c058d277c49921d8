/* Softmax, exponentials and plain vector operations, written once for every vector level. */

/* exp(x): x = n ln 2 + r, a polynomial in r of degree 6 (error below 2e-7 for |r| <= ln 2 / 2), times 2^n, which may
 * overflow to infinity or vanish. Minus infinity gives exactly 0. */
CKV_INLINE vf v_exp(vf x) {
  x = vf_at_most(vf_at_least(x, vf_set1(-150)), vf_set1(100));
  vf n = vf_round(x * vf_set1(1.44269504088896341f));
  vf r = vf_fma(n, vf_set1(-0.693359375f), x);
  r = vf_fma(n, vf_set1(2.12194440e-4f), r);
  vf y = vf_set1(1.9875691500e-4f);
  y = vf_fma(y, r, vf_set1(1.3981999507e-3f));
  y = vf_fma(y, r, vf_set1(8.3334519073e-3f));
  y = vf_fma(y, r, vf_set1(4.1665795894e-2f));
  y = vf_fma(y, r, vf_set1(1.6666665459e-1f));
  y = vf_fma(y, r, vf_set1(5.0000001201e-1f));
  y = vf_fma(y, r * r, r) + vf_set1(1);
  return vf_times_power(y, n);
}

/* tanh: an odd polynomial near zero, where 1 - 2 / (exp(2x) + 1) would cancel. */
CKV_INLINE vf v_tanh(vf x) {
  vf a = vf_at_most(vf_abs(x), vf_set1(10)), z = a * a;
  vf far = vf_set1(1) - vf_set1(2) / (v_exp(a + a) + vf_set1(1));
  vf p = vf_set1(-5.70498872745e-3f);
  p = vf_fma(p, z, vf_set1(2.06390887954e-2f));
  p = vf_fma(p, z, vf_set1(-5.37397155531e-2f));
  p = vf_fma(p, z, vf_set1(1.33314422036e-1f));
  p = vf_fma(p, z, vf_set1(-3.33332819422e-1f));
  vf near = vf_fma(p * z, a, a);
  return vf_copy_sign(vf_select_less(a, vf_set1(0.625f), near, far), x);
}

static void exp_shift(float *x, size_t n, float shift) {
  size_t i = 0;
  for (; i + VN <= n; i += VN) vf_store(x + i, v_exp(vf_load(x + i) - vf_set1(shift)));
  if (i < n) vf_store_n(x + i, v_exp(vf_load_n(x + i, (uint32_t)(n - i)) - vf_set1(shift)), (uint32_t)(n - i));
}

/* Lanes from `n` on replaced by `other`: through memory, for tails only. */
CKV_INLINE vf v_fill(vf x, uint32_t n, float other) {
  float t[VN];
  vf_store(t, vf_set1(other));
  vf_store_n(t, x, n);
  return vf_load(t);
}

CKV_INLINE vf v_adjust(vf x, float softcap, vf bias) {
  if (softcap > 0) x = v_tanh(x / vf_set1(softcap)) * vf_set1(softcap);
  return x + bias;
}

static float softmax(float *x, uint32_t n, float softcap, const float *bias, float *sum) {
  uint32_t whole = n / VN * VN, rest = n - whole;
  vf high = vf_set1(-INFINITY), other = high;
  uint32_t at = 0;
  if (softcap > 0 || bias) {
    for (; at < whole; at += VN) {
      vf v = v_adjust(vf_load(x + at), softcap, bias ? vf_load(bias + at) : vf_zero());
      vf_store(x + at, v);
      high = vf_max(v, high);
    }
  }
  /* Two at a time, for neither to wait for the other. */
  for (; at + 4 * VN <= whole; at += 4 * VN) {
    high = vf_max(vf_max(vf_load(x + at), vf_load(x + at + VN)), high);
    other = vf_max(vf_max(vf_load(x + at + 2 * VN), vf_load(x + at + 3 * VN)), other);
  }
  for (; at < whole; at += VN) high = vf_max(vf_load(x + at), high);
  high = vf_max(other, high);
  if (rest) {
    vf v = v_adjust(vf_load_n(x + whole, rest), softcap, bias ? vf_load_n(bias + whole, rest) : vf_zero());
    vf_store_n(x + whole, v, rest);
    high = vf_max(v_fill(v, rest, -INFINITY), high);
  }
  float max = vf_highest(high);
  *sum = 0;
  if (max == -INFINITY) {
    for (uint32_t i = 0; i < n; i++)
      if (x[i] != x[i]) *sum = NAN;
    memset(x, 0, (size_t)n * sizeof(float));
    return max;
  }
  vf total[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()}, shift = vf_set1(max);
  uint32_t i = 0;
  for (; i + 4 * VN <= whole; i += 4 * VN) {
    CKV_UNROLL
    for (uint32_t k = 0; k < 4; k++) {
      vf e = v_exp(vf_load(x + i + k * VN) - shift);
      vf_store(x + i + k * VN, e);
      total[k] = total[k] + e;
    }
  }
  for (; i < whole; i += VN) {
    vf e = v_exp(vf_load(x + i) - shift);
    vf_store(x + i, e);
    total[0] = total[0] + e;
  }
  if (rest) {
    vf e = v_exp(vf_load_n(x + whole, rest) - shift);
    vf_store_n(x + whole, e, rest);
    total[1] = total[1] + v_fill(e, rest, 0);
  }
  *sum = vf_sum((total[0] + total[1]) + (total[2] + total[3]));
  return max;
}

static void axpy(float *y, const float *x, float a, size_t n) {
  vf factor = vf_set1(a);
  size_t i = 0;
  for (; i + VN <= n; i += VN) vf_store(y + i, vf_fma(factor, vf_load(x + i), vf_load(y + i)));
  uint32_t rest = (uint32_t)(n - i);
  if (rest) vf_store_n(y + i, vf_fma(factor, vf_load_n(x + i, rest), vf_load_n(y + i, rest)), rest);
}

/* Four rows at a time: what they are added to is read and written once. */
static void add_rows(float *y, const float *x, size_t ld, const float *a, uint32_t m, size_t n) {
  uint32_t j = 0;
  for (; j + 4 <= m; j += 4, x += 4 * ld) {
    const vf f0 = vf_set1(a[j]), f1 = vf_set1(a[j + 1]), f2 = vf_set1(a[j + 2]), f3 = vf_set1(a[j + 3]);
    size_t i = 0;
    for (; i + VN <= n; i += VN) {
      vf sum = vf_fma(f0, vf_load(x + i), vf_load(y + i));
      sum = vf_fma(f1, vf_load(x + ld + i), sum);
      sum = vf_fma(f2, vf_load(x + 2 * ld + i), sum);
      vf_store(y + i, vf_fma(f3, vf_load(x + 3 * ld + i), sum));
    }
    uint32_t rest = (uint32_t)(n - i);
    if (!rest) continue;
    vf sum = vf_fma(f0, vf_load_n(x + i, rest), vf_load_n(y + i, rest));
    sum = vf_fma(f1, vf_load_n(x + ld + i, rest), sum);
    sum = vf_fma(f2, vf_load_n(x + 2 * ld + i, rest), sum);
    vf_store_n(y + i, vf_fma(f3, vf_load_n(x + 3 * ld + i, rest), sum), rest);
  }
  for (; j < m; j++, x += ld) axpy(y, x, a[j], n);
}

static void scale_in_place(float *y, float a, size_t n) {
  vf factor = vf_set1(a);
  size_t i = 0;
  for (; i + VN <= n; i += VN) vf_store(y + i, factor * vf_load(y + i));
  uint32_t rest = (uint32_t)(n - i);
  if (rest) vf_store_n(y + i, factor * vf_load_n(y + i, rest), rest);
}

static float dot(const float *x, const float *y, size_t n) {
  vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
  size_t i = 0;
  for (; i + 4 * VN <= n; i += 4 * VN)
    for (size_t k = 0; k < 4; k++) sum[k] = vf_fma(vf_load(x + i + k * VN), vf_load(y + i + k * VN), sum[k]);
  for (; i + VN <= n; i += VN) sum[0] = vf_fma(vf_load(x + i), vf_load(y + i), sum[0]);
  uint32_t rest = (uint32_t)(n - i);
  if (rest) sum[1] = vf_fma(vf_load_n(x + i, rest), vf_load_n(y + i, rest), sum[1]);
  return vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* Neighbours inside a vector first, then vectors: the order of portable. */
CKV_INLINE void v_hadamard_block(float *x, uint32_t block) {
  for (uint32_t i = 0; i < block; i += VN) vf_store(x + i, vf_butterflies(vf_load(x + i)));
  for (uint32_t h = VN; h < block; h *= 2) {
    for (uint32_t i = 0; i < block; i += 2 * h) {
      for (uint32_t j = i; j < i + h; j += VN) {
        vf a = vf_load(x + j), b = vf_load(x + j + h);
        vf_store(x + j, a + b);
        vf_store(x + j + h, a - b);
      }
    }
  }
  vf scale = vf_set1(ckv_hadamard_scale(block));
  for (uint32_t i = 0; i < block; i += VN) vf_store(x + i, vf_load(x + i) * scale);
}

static void hadamard(float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t block) {
  if (block < 2) return;
  for (uint32_t r = 0; r < count; r++) {
    for (uint32_t c = 0; c < dim; c += block) {
      if (block < VN) ckv_hadamard_block(rows + r * stride + c, block);
      else v_hadamard_block(rows + r * stride + c, block);
    }
  }
}

/* Four sums, so that the additions do not wait for each other. `n` is a multiple of 256 bytes. */
static uint64_t read_memory(const void *data, size_t n) {
  const uint32_t *p = data, *end = p + n / 4;
  vi sum[4] = {vi_zero(), vi_zero(), vi_zero(), vi_zero()};
  for (; p < end; p += 4 * VN)
    for (int k = 0; k < 4; k++) sum[k] = sum[k] + vi_load(p + k * VN);
  uint32_t lanes[VN];
  uint64_t total = 0;
  vi_store(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (int k = 0; k < VN; k++) total += lanes[k];
  return total;
}

/* The portable loop, compiled for the level: the compiler makes vectors of it. */
static void turn(float *rows, size_t stride, uint32_t count, uint32_t pairs, size_t step, size_t partner,
                 const float *cosines, const float *sines, const uint32_t *offsets) {
  if (step == 1) ckv_turn_rows(rows, stride, count, pairs, 1, partner, cosines, sines, offsets);
  else ckv_turn_rows(rows, stride, count, pairs, 2, partner, cosines, sines, offsets);
}
