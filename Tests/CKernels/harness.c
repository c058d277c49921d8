/* ./harness check [level]   compare every level with portable and with a double-precision oracle
 * ./harness bench [level]   decode attention over a cold cache, encoding, window scoring */
#include "harness.h"

#include <stdio.h>
#include <string.h>

/* A level; "bf16": the best one with products of bf16. */
const ckv_kernels *kernels_named(const char *name) {
  return strcmp(name, "bf16") == 0 ? ckv_bf16_products(ckv_best()) : ckv_named(name);
}

int main(int count, char **words) {
  const char *level = count > 2 ? words[2] : NULL;
  if (level && !kernels_named(level)) {
    fprintf(stderr, "level %s is not compiled in or not supported by this CPU\n", level);
    return 2;
  }
  if (count > 1 && strcmp(words[1], "check") == 0) return run_check(level);
  if (count > 1 && strcmp(words[1], "bench") == 0) return run_bench(level);
  fprintf(stderr, "usage: %s check|bench [level]\n", words[0]);
  return 2;
}
