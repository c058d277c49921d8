/* Rows of two layers that share a direction (see ckv_directions): sums in f64 and in one order, so that directions, lengths
 * and angles are the same bits at every level. */
#include "internal.h"
#include <math.h>

#define CKV_LANES 8u

/* Sums over channels, lane by lane and then the lanes in order. */
static double total(const double *lanes) {
  double sum = 0;
  for (uint32_t i = 0; i < CKV_LANES; i++) sum += lanes[i];
  return sum;
}

static double length(const float *x, uint32_t dim) {
  double lanes[CKV_LANES] = {0};
  uint32_t c = 0;
  for (; c + CKV_LANES <= dim; c += CKV_LANES)
    for (uint32_t i = 0; i < CKV_LANES; i++) lanes[i] += (double)x[c + i] * x[c + i];
  for (; c < dim; c++) lanes[0] += (double)x[c] * x[c];
  return sqrt(total(lanes));
}

/* e = a x + b y */
static void blend(float *e, const float *x, const float *y, double a, double b, uint32_t dim) {
  for (uint32_t c = 0; c < dim; c++) e[c] = (float)(a * x[c] + b * y[c]);
}

/* The angle between x / nx and y / ny, exact for small ones, where the arc cosine of a product is not. */
static double angle_of(const float *x, const float *y, double a, double b, uint32_t dim) {
  double apart[CKV_LANES] = {0}, together[CKV_LANES] = {0};
  uint32_t c = 0;
  for (; c + CKV_LANES <= dim; c += CKV_LANES)
    for (uint32_t i = 0; i < CKV_LANES; i++) {
      double u = a * x[c + i], w = b * y[c + i];
      apart[i] += (u - w) * (u - w);
      together[i] += (u + w) * (u + w);
    }
  for (; c < dim; c++) {
    double u = a * x[c], w = b * y[c];
    apart[0] += (u - w) * (u - w);
    together[0] += (u + w) * (u + w);
  }
  return 2 * atan2(sqrt(total(apart)), sqrt(total(together)));
}

void ckv_directions(const float *x, const float *y, size_t stride, uint32_t count, uint32_t dim, double t,
                    float largest, float *directions, float *lower, float *upper, float *angles) {
  for (uint32_t r = 0; r < count; r++) {
    const float *a = x + r * stride, *b = y + r * stride;
    double na = length(a, dim), nb = length(b, dim), angle = 0, wa, wb;
    bool lost = !(na <= largest && nb <= largest);
    if (na == 0 || nb == 0) { /* the direction of the row that has one; neither: zero */
      wa = na > 0 ? 1 / na : 0;
      wb = nb > 0 ? 1 / nb : 0;
      angle = -1;
    } else {
      wa = 1 / na;
      wb = 1 / nb;
      angle = angle_of(a, b, wa, wb, dim);
      double sine = sin(angle);
      if (sine < 1e-7) { /* parallel: the mean; opposite: none */
        lost = lost || angle > 2;
        wa *= angle > 2 ? 1 : 1 - t;
        wb *= angle > 2 ? 0 : t;
      } else {
        wa *= sin((1 - t) * angle) / sine;
        wb *= sin(t * angle) / sine;
      }
    }
    angles[r] = lost ? INFINITY : (float)angle;
    if (!directions) continue;
    lower[r] = na <= largest ? (float)na : 0;
    upper[r] = nb <= largest ? (float)nb : 0;
    blend(directions + r * stride, a, b, wa, wb, dim);
  }
}

void ckv_multiply(float *x, const float *by, size_t n) {
  for (size_t i = 0; i < n; i++) x[i] *= by[i];
}
