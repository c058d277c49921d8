/* The level "avx512": F, BW, VL, DQ. */
#if defined(__x86_64__)
#include "internal.h"

#include <immintrin.h>

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)

#include "lanes_avx512.h"

#include "lanes_typed.h"

#include "blocks.h"
#include "lanes_coding.h"
#include "lanes_vector.h"

#include "rows_compare.h"
#include "lanes_statistics.h"
#include "rows_scan.h"

#include "avx512_values.h"
#define V_AFFINE_ACCUMULATE v_accumulate_affine

#include "lanes_attend.h"
#define V_JOINED ckv_joined_avx512
#include "lanes_table.h"

#pragma clang attribute pop

const ckv_kernels ckv_avx512 = V_TABLE("avx512", logits, accumulate, NULL);
const ckv_kernels ckv_avx512_vnni = V_TABLE("avx512", ckv_logits_vnni, ckv_accumulate_vnni, NULL);
const ckv_kernels ckv_avx512_bf16 = V_TABLE("avx512+bf16", ckv_logits_bf16, ckv_accumulate_bf16, ckv_attend_avx512);
#endif
