/* The kernels of swift-kv-compression: everything that touches a row of a cache in a hot loop.
 *
 * One table of function pointers per CPU level. The portable column is the definition of each operation; the
 * others must agree with it within the bounds the tests compute. A missing column falls back to portable.
 * No kernel allocates, locks, or keeps state; scratch memory is passed in by the caller.
 *
 * All query, logit, probability and accumulator memory is f32. Rows of a cache are described by `ckv_run`.
 */
#ifndef CKV_H
#define CKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Element types. The numbers are part of the saved-cache format: never renumber. */
enum { CKV_F32 = 0, CKV_F16 = 1, CKV_BF16 = 2 };

/* How the rows of a run are encoded. The numbers are part of the saved-cache format. */
enum {
    /* Row r: `dim` elements of `dtype` at data + r * row_stride elements. */
    CKV_DENSE = 0,

    /* One (scale, min) pair per channel over `group` consecutive rows (KIVI keys).
     * Group g holds rows [g*group, (g+1)*group). `group` is a multiple of 32. Codes of group g are
     * group*bits/32 rows of `dim` 32-bit words, starting at word g * (group*bits/32) * dim:
     *     word[w][c] holds the codes of rows g*group + w*(32/bits) + i, i = 0 ..< 32/bits, of channel c,
     *     row i at bits [i*bits, (i+1)*bits).
     * For bits = 3 the words are two planes: first group*2/32 word rows with the low two bits of every code laid
     * out as for bits = 2, then group/32 word rows with the high bit laid out as for a 1-bit code.
     * scale[g][dim], min[g][dim] in `dtype`. value = code * scale + min.
     * A run always holds whole groups in memory; `rows` counts all of them. */
    CKV_AFFINE_CHANNEL = 1,

    /* One (scale, min) pair per row and per `group` consecutive channels (KIVI values).
     * Row r is W = ceil(dim*bits/32) words at word r*W; channel c is the code at bits
     * [(c % (32/bits))*bits, +bits) of word c / (32/bits).
     * For bits = 3: first ceil(dim*2/32) words with the low two bits as for bits = 2, then ceil(dim/32) words with
     * the high bit as for 1 bit (W is the sum of both).
     * scale[r][ng], min[r][ng] in `dtype`, ng = ceil(dim/group); the last group may be short. */
    CKV_AFFINE_ROW = 2,

    /* Codes without metadata, laid out as CKV_AFFINE_ROW: value = code. Only behind a `ckv_map` that gives them their
     * scale; the functions ckv_mapped_... take such runs, the kernels of a level do not. */
    CKV_CODES_ROW = 7,

    /* Codes of `code` times a scale: one of `dtype` per row and `group` channels, scale[r][ceil(dim/group)]; one per
     * `group` rows, scale[r / group] (a run then holds whole groups); or `factor` for all. Row r is at byte
     * r * ckv_row_bytes. */
    CKV_SCALED_ROW = 3,
    CKV_SCALED_BLOCK = 4,
    CKV_SCALED_FIXED = 5,

    /* ggml's blocks of 32 channels, `code` says which, as the bytes of its structs; dim is a multiple of 32. Row r is at
     * byte r * ckv_row_bytes. */
    CKV_GGML = 6,
};

/* What the codes of scaled rows are. The numbers are part of the saved-cache format. */
enum {
    CKV_INT8 = 1, /* a signed byte a channel, -127 ... 127 */
    CKV_INT4 = 2, /* two channels a byte, the first low: -7 ... 7, with 8 added */
    CKV_E4M3 = 3, /* FP8 without infinity */
    CKV_E5M2 = 4,
};

/* ggml's types, by its own numbers. d and m are f16; byte i of q: element i low, i + 16 high; bit i of qh: the fifth
 * bit of element i. */
enum {
    CKV_Q4_0 = 2,    /* d, q[16]: (q - 8) d */
    CKV_Q4_1 = 3,    /* d, m, q[16]: q d + m */
    CKV_Q5_0 = 6,    /* d, qh u32, q[16]: (q - 16) d */
    CKV_Q5_1 = 7,    /* d, m, qh u32, q[16]: q d + m */
    CKV_Q8_0 = 8,    /* d, i8[32]: q d */
    CKV_IQ4_NL = 20, /* d, q[16]: value[q] d */
};

/* Measures of two rows: x.y, the cosine, |x - y|^2, |x + y|^2. */
enum { CKV_DOT = 0, CKV_COSINE = 1, CKV_DISTANCE = 2, CKV_SUM = 3 };

/* What scan_rows and fold make of numbers. */
enum { CKV_SQUARES = 0, CKV_ABSOLUTES = 1, CKV_SPREAD = 2, CKV_PLAIN = 3 };

/* A run of rows of one KV head, one side (keys or values), one encoding, contiguous in memory. */
typedef struct {
    uint32_t kind;       /* CKV_DENSE and so on */
    uint32_t code;       /* scaled rows and blocks: which */
    uint32_t dtype;      /* dense: element type; others: type of scale and min */
    uint32_t bits;       /* affine: 2, 3, 4, 8 */
    uint32_t group;      /* affine and scaled: group length */
    float factor;        /* CKV_SCALED_FIXED: the scale */
    uint32_t dim;        /* channels of a row: 1 ... 4096, any number */
    uint32_t rows;       /* rows present */
    int64_t row_stride;  /* dense: elements between rows */
    const void *data;    /* dense: elements; affine: code words (4-byte aligned at least) */
    const void *scale;
    const void *min;
} ckv_run;

/* The map between rows of a model and rows of a run that was encoded behind it:
 *
 *     y = (P H S x - offset) / factor        x = S H P' (factor y + offset)
 *
 * S: a sign per channel. H: the orthonormal Walsh-Hadamard transform of every `block` channels, its own inverse.
 * P: y[c] = z[order[c]]. A null pointer, and a block of 1, leave that part out. Dividing by a factor of 0 gives 0.
 * Attention never restores rows: with r = P H S q, a key's logit is (factor r) . y + r . offset, and the weighted sum of
 * values is restored after the sum. */
typedef struct {
    uint32_t dim;
    uint32_t block;        /* a power of two that divides dim */
    uint32_t dtype;        /* type of factor and offset */
    const float *sign;     /* 1 or -1 per channel */
    const void *factor;
    const void *offset;
    const uint32_t *order; /* a permutation of 0 ..< dim */
} ckv_map;

/* A head whose keys are some channels of rows that several heads share. */
typedef struct {
  uint32_t channel; /* its first */
  const float *q;   /* its query rows */
  float *out;       /* their logits */
} ckv_joined_head;

/* Turns by the first positions, for pairs of channels as `turn` has them. Position i of pair p is at p * stride + i;
 * the last of `positions` is followed by 15 numbers that may be read. */
typedef struct {
  uint32_t pairs;
  size_t step, partner, stride;
  const float *cosines, *sines;
} ckv_turns;

/* Result of the operations that look at input values. */
typedef struct {
    int64_t row;     /* first offending row, -1 when all is well */
    int64_t channel; /* its channel */
} ckv_bad;

typedef struct {
    const char *name; /* "portable", "avx2", "avx512", "neon" */

    /* ---- attention over rows ------------------------------------------------------------------------------ */

    /* Codes may be multiplied as integers. The query or weight with what scales can be folded in, w = q_c scale_c for
     * CKV_AFFINE_CHANNEL, w = q_c for logits of rows of codes (CKV_AFFINE_ROW, scaled integers, ggml's blocks) and
     * w = p_r scale_r for their accumulate, is then rounded once to a multiple of largest / 32639; products of it with
     * code - 2^(bits - 1) (or the zero point, where codes have one) and their sums are exact. `largest` is the largest
     * |w| over
     *     logits: the channels of one query row, for CKV_AFFINE_CHANNEL in one group of rows;
     *     accumulate: one query row and group of channels, over at most 128 rows counted from `first`.
     * Beyond the rounding of f32 sums an output is off by at most 2^(bits - 1) * largest / 65278 for every
     * channel (logits, times |scale| and the row's scales) or row (accumulate) that is summed; the mins are added in
     * f32. */

    /* out[j*ld + i] = scale * dot(q + j*q_stride, row first+i), i < count, j < m. Every row is read, converted or
     * unpacked once for all m query rows (in blocks of a few query rows at most). `scratch` has at least
     * ckv_scratch_floats(dim, m) floats. Rows may start anywhere, also inside a group. */
    void (*logits)(const ckv_run *run, uint32_t first, uint32_t count, const float *q, uint32_t m, size_t q_stride,
                   float scale, float *out, size_t ld, float *scratch);

    /* As `logits`, of n heads of `dim` channels against rows of keys of all of them behind `map`, turned on the way: row
     * first + i by position offset + i. out of a head as above. False, and nothing done: not for such a run, map and
     * head size (also to ask, with a count of 0). Null where a level has no such thing: then the same is made of
     * ckv_mapped_decode, turn and logits. `scratch` has 64 floats for every channel of the rows. */
    bool (*joined_logits)(const ckv_run *run, const ckv_map *map, uint32_t first, uint32_t count,
                          const ckv_joined_head *heads, uint32_t n, uint32_t dim, uint32_t m, size_t q_stride,
                          float scale, size_t ld, const ckv_turns *turns, uint32_t offset, float *scratch);

    /* acc[j*acc_stride + c] += sum_i p[j*ld + i] * row(first+i)[c]. A weight of exactly 0 contributes nothing. */
    void (*accumulate)(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m, size_t ld,
                       float *acc, size_t acc_stride, float *scratch);

    /* logits, softmax and accumulate in one go: adds rows first_key + i with rows first_value + i, i < count, to partials
     * of m query rows: maxima[j] becomes the largest logit so far (minus infinity: none), sums[j] the sum of
     * exp(logit - maxima[j]), acc[j*acc_stride + c] that of the same times values, all relative to the new maximum.
     * Weights may be off by 1e-5 of themselves before they are rounded. Logits beyond f32: as in softmax.
     * False, and nothing done: not for such runs, or not worth it for that many rows (also to ask, with a count of 0).
     * Null where a level has no such thing. Scratch as for the greater of both dims. */
    bool (*attend)(const ckv_run *keys, uint32_t first_key, const ckv_run *values, uint32_t first_value, uint32_t count,
                   const float *q, uint32_t m, size_t q_stride, float scale, float *maxima, float *sums, float *acc,
                   size_t acc_stride, float *scratch);

    /* In place over one row of n logits:
     *   x = logits[i]; if (softcap > 0) x = softcap * tanhf(x / softcap); if (bias) x += bias[i];
     *   max = maximum of x; logits[i] = exp(x - max); *sum = their sum; return max.
     * n == 0 or all x == -inf: every output 0, *sum = 0, returns -INFINITY. Where some x is NaN or +inf, *sum is NaN and
     * the rest means nothing. exp within 2 ulp-ish (rel. error 1e-6). */
    float (*softmax)(float *logits, uint32_t n, float softcap, const float *bias, float *sum);

    /* x[i] = exp(x[i] - shift) ; x[i] == -inf gives 0. */
    void (*exp_shift)(float *x, size_t n, float shift);

    /* y[i] += a * x[i] ; y[i] *= a */
    void (*axpy)(float *y, const float *x, float a, size_t n);
    /* y[i] += a[j] * x[j*ld + i], j from 0 to m - 1: the bits of m calls of axpy. */
    void (*add_rows)(float *y, const float *x, size_t ld, const float *a, uint32_t m, size_t n);
    void (*scale_in_place)(float *y, float a, size_t n);

    /* Plain strict-order-free dot product and the block product used for attention of many queries when BLAS is
     * not worth calling: same contract as logits with a dense f32 run. */
    float (*dot)(const float *x, const float *y, size_t n);

    /* ---- comparing and mixing rows ------------------------------------------------------------------------- */

    /* Rows divided by their lengths, in place; lengths below 1e-6 count as that, so a zero row stays one. */
    void (*normalise_rows)(float *rows, size_t stride, uint32_t dim, size_t count);

    /* out[i] = the measure of rows first[i] and second[i], i < n; rows are `stride` floats apart. A cosine with a row
     * shorter than 1e-6 takes that for its length. */
    void (*compare_rows)(const float *rows, size_t stride, uint32_t dim, const uint32_t *first,
                         const uint32_t *second, size_t n, uint32_t measure, float *out);

    /* out[i*out_stride + c] = (sum over t of weight[t] * row index[t] [c]) / divisor[i], t from starts[i] to
     * starts[i+1], in that order, one rounding per operation: the same bits at every level. At least one t each. */
    void (*mix_rows)(const float *rows, size_t stride, uint32_t dim, const uint32_t *starts, const uint32_t *index,
                     const float *weight, const float *divisor, size_t n, float *out, size_t out_stride);

    /* ---- measuring rows -------------------------------------------------------------------------------------- */

    /* out[i] of row i, rows `stride` floats apart. CKV_SQUARES: sum of squares; CKV_ABSOLUTES: sum of magnitudes;
     * CKV_SPREAD: standard deviation over the channels (divisor dim - 1; 0 for one channel) of
     * (x[c] - low[c]) * inverse[c]. */
    void (*scan_rows)(const float *rows, size_t stride, uint32_t dim, size_t count, uint32_t measure, const float *low,
                      const float *inverse, float *out);

    /* out[i] += x[i]^2 (CKV_SQUARES), |x[i]| (CKV_ABSOLUTES) or x[i]. */
    void (*fold)(const float *x, size_t n, uint32_t measure, float *out);

    /* Turns pairs of channels of `count` f32 rows, `stride` floats apart, in place. Pair p of a row is the channels
     * first = p * step and first + partner (half split: step 1, partner = pairs; interleaved: step 2, partner 1):
     *   x' = x c - y s,  y' = y c + x s,  c and s those of row offsets[i] of the tables [rows][pairs].
     * No operation is fused, so that every CPU level gives the same bits. */
    void (*turn)(float *rows, size_t stride, uint32_t count, uint32_t pairs, size_t step, size_t partner,
                 const float *cosines, const float *sines, const uint32_t *offsets);

    /* ---- conversion and encoding --------------------------------------------------------------------------- */

    /* dst[i] = (dst_type) src[i], n elements, round to nearest even, overflow to infinity, NaN stays NaN. */
    void (*convert)(void *dst, uint32_t dst_type, const void *src, uint32_t src_type, size_t n);

    /* Index of the first element that is NaN or infinite, or -1. */
    int64_t (*first_nonfinite)(const void *src, uint32_t type, size_t n);

    /* Encode whole groups per channel. src: rows x dim elements of src_type, src_stride elements between rows.
     * rows is a multiple of group. Writes codes, scale, min in the layout of CKV_AFFINE_CHANNEL.
     * Per (group, channel): mn = min x, mx = max x (f32); s = (mx - mn) / Q, Q = 2^bits - 1;
     * both rounded to meta_type first; when the rounded s is 0 the codes are 0;
     * else code = clamp(rne((x - mn) / s), 0, Q) with the *rounded* s and mn, division (not a reciprocal multiply)
     * or anything that gives identical codes. */
    void (*encode_channel)(const void *src, uint32_t src_type, size_t src_stride, uint32_t rows, uint32_t dim,
                           uint32_t group, uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale, void *min);

    /* Encode rows, groups of channels within a row, in the layout of CKV_AFFINE_ROW. Same arithmetic. */
    void (*encode_row)(const void *src, uint32_t src_type, size_t src_stride, uint32_t rows, uint32_t dim,
                       uint32_t group, uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale, void *min);

    /* Encode rows [first, first + count) of a run of scaled rows or blocks, whose memory is written although the run
     * says const. src: f32 rows, stride floats apart, finite.
     * Scaled rows: s = max |x| / M (127, 7, 448 or 57344) rounded to dtype, or factor; the code of x / s, rounded to
     * nearest even and saturated; where s is 0, the code of 0. For CKV_SCALED_BLOCK first and count are multiples of
     * group. Blocks: the bytes that ggml's reference C writes. */
    void (*encode_blocks)(const ckv_run *run, uint32_t first, uint32_t count, const float *src, size_t stride);

    /* out[i*out_stride + c] = row(first+i)[c] as f32: code * scale + min with one rounding per operation
     * (no fused multiply-add), so that every CPU level gives the same bits. */
    void (*decode)(const ckv_run *run, uint32_t first, uint32_t count, float *out, size_t out_stride);

    /* In place, for every row and every `block` channels: the orthonormal Walsh-Hadamard transform. Butterflies over
     * distances 1, 2, 4 ... in that order, then one multiplication; no fused operation: the same bits at every level.
     * `block` is a power of two that divides dim. */
    void (*hadamard)(float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t block);

    /* ---- statistics of attention rows ---------------------------------------------------------------------- */

    /* y[i] = max(y[i], a * x[i]) */
    void (*max_scaled)(float *y, const float *x, float a, size_t n);
    /* p = a * x[i]: sum[i] += p; spread[i] += (p - origin[i])^2 */
    void (*moments)(float *sum, float *spread, const float *origin, const float *x, float a, size_t n);
    /* y[i] += a * x[i] < pivot ? 1 : 0 */
    void (*count_below)(float *y, const float *x, float a, float pivot, size_t n);
    /* The sum of -p ln(p + 1e-10), p = a * x[i] >= 0. Relative error below 1e-5. */
    double (*entropy)(const float *x, float a, size_t n);
    /* Index of the smallest x[i] whose bias (if any) is not minus infinity, of equal ones the last; both zeros are
     * equal. -1: there is none. -2: one of them is NaN. */
    int64_t (*lowest)(const float *x, const float *bias, size_t n);
    /* How many are minus infinity. */
    size_t (*count_hidden)(const float *bias, size_t n);

    /* ---- memory bandwidth, for benchmarks ------------------------------------------------------------------ */

    /* Reads n bytes (multiple of 256, 64-byte aligned) as fast as the level can, returns a checksum. */
    uint64_t (*read_memory)(const void *data, size_t n);
} ckv_kernels;

/* ---- rows behind a map ------------------------------------------------------------------------------------------ */

/* What each function calls `map` may be null: then it is the kernel of the level, for every kind of run. */

/* As `logits`. `mapped` has room for ckv_mapped_floats(dim, m) floats; unused without a map. */
void ckv_mapped_logits(const ckv_kernels *k, const ckv_map *map, const ckv_run *run, uint32_t first, uint32_t count,
                       const float *q, uint32_t m, size_t q_stride, float scale, float *out, size_t ld, float *scratch,
                       float *mapped);

/* As `accumulate`. */
void ckv_mapped_accumulate(const ckv_kernels *k, const ckv_map *map, const ckv_run *run, uint32_t first,
                           uint32_t count, const float *p, uint32_t m, size_t ld, float *acc, size_t acc_stride,
                           float *scratch, float *mapped);

/* As `decode`: rows of the model. */
void ckv_mapped_decode(const ckv_kernels *k, const ckv_map *map, const ckv_run *run, uint32_t first, uint32_t count,
                       float *out, size_t out_stride);

/* Rows of the model to rows that are encoded, in place. */
void ckv_map_rows(const ckv_kernels *k, const ckv_map *map, float *rows, size_t stride, uint32_t count);

/* Rounds values to codes 0 ... 2^bits - 1, nearest even, clamped; the layout of CKV_CODES_ROW. */
void ckv_encode_codes(const float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t bits, uint32_t *codes);

/* Rows in the layout of CKV_AFFINE_ROW around integer zero points. Per row and group of channels, mn = clip * min x,
 * mx = clip * max x: s = (mx - mn) / steps rounded to meta_type, z = rne(-mn / s),
 * code = clamp(rne(x / s) + z, 0, 2^bits - 1), and -s z is what is stored as the min. `steps` is 2^bits - 1 but for the
 * authors of RotateKV. Where s is 0: codes 0, min x. */
void ckv_encode_zero_row(const float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t group, uint32_t bits,
                         float clip, float steps, uint32_t meta_type, uint32_t *codes, void *scale, void *min);

/* Rows in the layout of CKV_AFFINE_ROW, or whole groups in that of CKV_AFFINE_CHANNEL, around zero points that are codes:
 * s = max(max x - min x, 1e-5) / Q rounded to meta_type, Q = 2^bits - 1, z = clamp(rne(-min x / s), 0, Q),
 * code = clamp(rne(x / s) + z, 0, Q), and -s z is what is stored as the min. */
void ckv_encode_clamped_row(const float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t group,
                            uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale, void *min);
void ckv_encode_clamped_channel(const float *rows, size_t stride, uint32_t count, uint32_t dim, uint32_t group,
                                uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale, void *min);

/* Smallest and largest value of every channel. low and high hold a range already, infinities at first. */
void ckv_channel_range(const float *rows, size_t stride, uint32_t count, uint32_t dim, float *low, float *high);

/* Index of the first of n values beyond +-limit, or -1. */
int64_t ckv_first_beyond(const float *x, size_t n, float limit);

/* ---- rows of two layers that share a direction --------------------------------------------------------------------- */

/* For every pair of rows, `stride` floats apart: their lengths, the angle between them in radians, and the unit row at
 * the part t of the arc from x to y (0: the direction of x, 1: of y). The same bits at every level.
 * angles: -1 where a row is zero (the direction is the other's, zero if both are); infinity where the rows are opposite,
 * so that no direction lies between them, or a length is beyond `largest`, in whose place 0 is written.
 * directions may be x; null: only angles are wanted. */
void ckv_directions(const float *x, const float *y, size_t stride, uint32_t count, uint32_t dim, double t,
                    float largest, float *directions, float *lower, float *upper, float *angles);

/* x[i] *= by[i] */
void ckv_multiply(float *x, const float *by, size_t n);

/* Floats of `mapped` for rows of `dim` channels and m query rows. */
size_t ckv_mapped_floats(uint32_t dim, uint32_t m);

/* Floats of scratch that logits and accumulate need for rows of `dim` channels and m query rows. */
size_t ckv_scratch_floats(uint32_t dim, uint32_t m);

/* The levels compiled in for this architecture, best first; the last one is portable. */
size_t ckv_level_count(void);
const ckv_kernels *ckv_level(size_t index);
/* Whether the CPU that runs this can run that level. */
bool ckv_level_supported(size_t index);
/* The best supported level. */
const ckv_kernels *ckv_best(void);
/* By name; NULL when not compiled in or not supported by this CPU. */
const ckv_kernels *ckv_named(const char *name);

/* A level, and this CPU, with products of eight significant bits. attend, logits and accumulate
 *   of dense f16 and bf16 rows and many query rows (12 at least) round queries, weights and elements of rows to bf16 once.
 *     Products and sums are f32; numbers below 2^-126 count as 0. An output is off by at most 2^-7 + 2^-16 of the sum of
 *     the magnitudes of its products, besides the rounding of the sum.
 *   of codes that are multiplied as integers (see above) round w to a multiple of largest / 127: off by at most
 *     2^(bits - 1) * largest / 254 for every channel or row.
 * Everything else is as in `level`. NULL: there is no such thing. */
const ckv_kernels *ckv_bf16_products(const ckv_kernels *level);

/* Words per row (CKV_AFFINE_ROW) and per group of one channel (CKV_AFFINE_CHANNEL). */
uint32_t ckv_row_words(uint32_t dim, uint32_t bits);
uint32_t ckv_group_words(uint32_t group, uint32_t bits);
/* Bytes of a block of ggml's type `code`, and of a row of scaled codes or blocks. */
uint32_t ckv_block_bytes(uint32_t code);
size_t ckv_row_bytes(uint32_t kind, uint32_t code, uint32_t dim);

#ifdef __cplusplus
}
#endif
#endif
