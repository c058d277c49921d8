/* Statistics of attention rows. Plain loops that the compiler turns into vectors of the level they are compiled for:
 * every level, portable included, takes them from here. Only the sums differ between levels, by rounding. */
#ifndef CKV_LANES_STATISTICS_H
#define CKV_LANES_STATISTICS_H

#include "internal.h"

static void max_scaled(float *restrict y, const float *restrict x, float a, size_t n) {
  for (size_t i = 0; i < n; i++) {
    float scaled = a * x[i];
    y[i] = scaled > y[i] ? scaled : y[i];
  }
}

static void moments(float *restrict sum, float *restrict spread, const float *restrict origin, const float *restrict x,
                    float a, size_t n) {
  for (size_t i = 0; i < n; i++) {
    float p = a * x[i], d = p - origin[i];
    sum[i] += p;
    spread[i] += d * d;
  }
}

static void count_below(float *restrict y, const float *restrict x, float a, float pivot, size_t n) {
  for (size_t i = 0; i < n; i++) y[i] += a * x[i] < pivot ? 1.0f : 0.0f;
}

/* ln x for positive normal x: x = m 2^e, m in [sqrt 1/2, sqrt 2), 2 atanh((m - 1) / (m + 1)) by its series. */
CKV_INLINE float natural_log(float x) {
  uint32_t bits = ckv_bits_of(x) - 0x3f3504f3u;
  float e = (float)((int32_t)bits >> 23), m = ckv_float_of((bits & 0x7fffffu) + 0x3f3504f3u);
  float t = (m - 1) / (m + 1), s = t * t;
  float series = 2.0f / 9;
  series = series * s + 2.0f / 7;
  series = series * s + 2.0f / 5;
  series = series * s + 2.0f / 3;
  series = series * s + 2.0f;
  return e * 0.69314718f + t * series;
}

/* A row at a time is short enough for f32 sums in pieces of 256. */
static double entropy(const float *x, float a, size_t n) {
  double total = 0;
  for (size_t first = 0; first < n; first += 256) {
    size_t end = first + 256 < n ? first + 256 : n;
    float part = 0;
    {
#pragma clang fp reassociate(on)
      for (size_t i = first; i < end; i++) {
        float p = a * x[i];
        part += p * natural_log(p + 1e-10f);
      }
    }
    total -= (double)part;
  }
  return total;
}

/* Floats as integers of the same order; both zeros are one number. */
CKV_INLINE int32_t order_of(float x) {
  uint32_t bits = ckv_bits_of(x + 0.0f);
  return (int32_t)(bits ^ (uint32_t)((int32_t)bits >> 31) >> 1);
}

CKV_INLINE int64_t lowest_of(const float *restrict x, const float *restrict bias, size_t n, const bool biased) {
  int32_t least = INT32_MAX;
  uint32_t largest = 0;
  for (size_t i = 0; i < n; i++) {
    int32_t dead = biased ? bias[i] == -INFINITY : 0;
    uint32_t magnitude = dead ? 0 : ckv_bits_of(x[i]) & 0x7fffffffu;
    int32_t order = dead ? INT32_MAX : order_of(x[i]);
    least = order < least ? order : least;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest > 0x7f800000u) return -2;
  if (least == INT32_MAX) return -1;
  /* Whole pieces from the end, then the last of the first one that has it. */
  for (size_t end = n; end > 0;) {
    size_t first = end > 256 ? end - 256 : 0;
    uint32_t found = 0;
    for (size_t i = first; i < end; i++)
      found |= (uint32_t)(order_of(x[i]) == least) & (uint32_t)(biased ? bias[i] != -INFINITY : 1);
    for (size_t i = found ? end : first; i > first; i--)
      if (order_of(x[i - 1]) == least && !(biased && bias[i - 1] == -INFINITY)) return (int64_t)i - 1;
    end = first;
  }
  return -1;
}

static int64_t lowest(const float *restrict x, const float *restrict bias, size_t n) {
  return bias ? lowest_of(x, bias, n, true) : lowest_of(x, x, n, false);
}

static size_t count_hidden(const float *bias, size_t n) {
  size_t count = 0;
  for (size_t first = 0; first < n; first += 1u << 20) {
    size_t end = first + (1u << 20) < n ? first + (1u << 20) : n;
    uint32_t part = 0;
    for (size_t i = first; i < end; i++) part += bias[i] == -INFINITY ? 1 : 0;
    count += part;
  }
  return count;
}

#define CKV_STATISTICS                                                                                               \
  .max_scaled = max_scaled, .moments = moments, .count_below = count_below, .entropy = entropy, .lowest = lowest,    \
  .count_hidden = count_hidden

#endif
