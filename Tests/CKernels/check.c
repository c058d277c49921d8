/* Runs every check for every level. */
#include "check.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long passed, failed;

void expect(bool ok, const char *format, ...) {
  if (ok) {
    passed++;
    return;
  }
  if (failed++ >= 40) return;
  va_list words;
  va_start(words, format);
  printf("FAILED: ");
  vprintf(format, words);
  printf("\n");
  va_end(words);
}

void *exact(size_t bytes) {
  void *p = malloc(bytes ? bytes : 1);
  if (!p) abort();
  memset(p, 0x5a, bytes);
  return p;
}

size_t size_of(uint32_t type) { return type == CKV_F32 ? 4 : 2; }

/* Written from the formats' definitions, not from the library's conversions. */
double value_of(const void *p, uint32_t type, size_t i) {
  if (type == CKV_F32) {
    float x;
    memcpy(&x, (const char *)p + i * 4, 4);
    return (double)x;
  }
  uint16_t h;
  memcpy(&h, (const char *)p + i * 2, 2);
  int mantissa_bits = type == CKV_F16 ? 10 : 7, exponent_bits = 15 - mantissa_bits;
  int mantissa = h & ((1 << mantissa_bits) - 1), exponent = h >> mantissa_bits & ((1 << exponent_bits) - 1);
  int top = (1 << exponent_bits) - 1, bias = top / 2;
  double sign = h >> 15 ? -1.0 : 1.0;
  if (exponent == top) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

int run_check(const char *name) {
  const ckv_kernels *portable = ckv_named("portable");
  expect(portable != NULL && ckv_best() != NULL, "portable and a best level exist");
  expect(ckv_named("nonsense") == NULL, "unknown names give NULL");
  expect(ckv_row_words(40, 3) == 5 && ckv_row_words(33, 4) == 5 && ckv_group_words(64, 3) == 6, "words");
  for (size_t i = 0; i < ckv_level_count(); i++) {
    const ckv_kernels *level = ckv_level(i);
    if (name && strcmp(name, level->name) != 0) continue;
    if (!ckv_level_supported(i)) {
      printf("level %s: not supported by this CPU, skipped\n", level->name);
      continue;
    }
    long before = passed + failed;
    pair p = {level, portable};
    check_vectors(p);
    check_coding(p);
    check_attention(p);
    check_map(p);
    printf("level %s: %ld checks\n", level->name, passed + failed - before);
  }
  const ckv_kernels *products = kernels_named("bf16");
  if (products && (!name || strcmp(name, "bf16") == 0)) check_attention_bf16(products);
  else if (!products) printf("products of bf16: not supported by this CPU, skipped\n");
#if defined(__x86_64__)
  extern const ckv_kernels ckv_avx512; /* the level without VNNI, which this CPU's table may not be */
  if (ckv_level_supported(0) && (!name || strcmp(name, "avx512") == 0)) check_attention_codes(&ckv_avx512);
#elif defined(__aarch64__)
  extern const ckv_kernels ckv_neon; /* the level without dot products */
  if (ckv_level(0) != &ckv_neon) check_attention_codes(&ckv_neon);
#endif
  printf("%ld passed, %ld failed\n", passed, failed);
  return failed ? 1 : 0;
}
