#include "ckv_cuda.h"
#include <string.h>

#pragma clang diagnostic ignored "-Wc23-extensions"

static const char attend[] = {
#embed "ptx/attend_80.ptx"
    , 0};

static const char rows[] = {
#embed "ptx/rows_80.ptx"
    , 0};

static const char measure[] = {
#embed "ptx/measure_80.ptx"
    , 0};

static const char select_rows[] = {
#embed "ptx/select_80.ptx"
    , 0};

static const char factor[] = {
#embed "ptx/factor_80.ptx"
    , 0};

const char *ckv_cuda_ptx(const char *name) {
  if (strcmp(name, "attend") == 0) return attend;
  if (strcmp(name, "rows") == 0) return rows;
  if (strcmp(name, "measure") == 0) return measure;
  if (strcmp(name, "select") == 0) return select_rows;
  if (strcmp(name, "factor") == 0) return factor;
  return NULL;
}
