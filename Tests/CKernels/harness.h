/* Shared by the check and the benchmark of the C kernels. */
#ifndef HARNESS_H
#define HARNESS_H

#include "ckv.h"

#include <stdint.h>

/* A repeatable random sequence (xorshift64*). */
typedef struct {
  uint64_t state;
} rng;

static inline uint32_t rng_next(rng *r) {
  r->state ^= r->state >> 12;
  r->state ^= r->state << 25;
  r->state ^= r->state >> 27;
  return (uint32_t)((r->state * 0x2545f4914f6cdd1du) >> 32);
}

/* In [-1, 1). */
static inline float rng_float(rng *r) { return (float)(int32_t)rng_next(r) * 0x1p-31f; }

const ckv_kernels *kernels_named(const char *name);
int run_check(const char *level);
int run_bench(const char *level);

#endif
