/* The level "neon": baseline A64. */
#if defined(__aarch64__)
#include "internal.h"

#include <arm_neon.h>

#include "lanes_neon.h"

#include "lanes_typed.h"

#include "blocks.h"
#include "lanes_coding.h"
#include "lanes_vector.h"

#include "rows_compare.h"
#include "lanes_statistics.h"
#include "rows_scan.h"

#include "lanes_attend.h"
#include "lanes_table.h"

const ckv_kernels ckv_neon = V_TABLE("neon", logits, accumulate, NULL);
const ckv_kernels ckv_neon_dot = V_TABLE("neon", ckv_logits_dot, accumulate, NULL);
#endif
