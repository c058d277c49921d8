/* Shared by the parts of the check. */
#ifndef CHECK_H
#define CHECK_H

#include "harness.h"

#include <stdbool.h>
#include <stddef.h>

/* Counts, and prints the first few failures with what was being compared. */
void expect(bool ok, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The level under test and the definition. */
typedef struct {
  const ckv_kernels *level, *portable;
} pair;

/* Exactly n bytes (and one byte that nobody may touch is caught by the address sanitizer), filled with a pattern. */
void *exact(size_t bytes);

double value_of(const void *p, uint32_t type, size_t i);
size_t size_of(uint32_t type);

/* softmax, exp_shift, axpy, scale, dot, statistics, convert, first_nonfinite, read_memory */
void check_vectors(pair p);
void check_coding(pair p);   /* encode_channel, encode_row, decode */
void check_attention(pair p); /* logits, accumulate */
void check_map(pair p); /* hadamard, rows behind a map */
void check_attention_codes(const ckv_kernels *k);
void check_attention_bf16(const ckv_kernels *k);

#endif
