/* The level "avx2": AVX2, FMA, F16C. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)

#include "lanes_avx2.h"

#include "lanes_typed.h"

#include "blocks.h"
#include "lanes_coding.h"
#include "lanes_vector.h"

#include "rows_compare.h"
#include "lanes_statistics.h"

#include "avx2_codes.h"
#define V_AFFINE_LOGITS v_logits_codes
#define V_AFFINE_ACCUMULATE v_accumulate_codes
#include "rows_scan.h"

#include "lanes_attend.h"
#include "lanes_table.h"

#pragma clang attribute pop

const ckv_kernels ckv_avx2 = V_TABLE("avx2", logits, accumulate, NULL);
#endif
