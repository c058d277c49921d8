/* What the host tells the kernels: plain structures in pinned memory that both sides lay out alike.
 *
 * Included by C, by Swift through the module, and by the CUDA sources, which NVRTC compiles without a C library. */
#ifndef CKV_CUDA_ABI_H
#define CKV_CUDA_ABI_H

#ifdef __CUDACC_RTC__
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned short uint16_t;
typedef unsigned char uint8_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif

/* Rows `first ..< first + count` of a run; layouts and numbers as in ckv.h. Addresses are device addresses. */
typedef struct {
  uint64_t data, scale, min;
  uint32_t kind, dtype, bits, group;
  uint32_t dim, first, count;
  /* Rows of the slices before this one in its list. */
  uint32_t start;
} kv_slice;

/* Consecutive slots of one KV head, read with one query phase. */
typedef struct {
  uint64_t positions; /* int32 per row, 0 when consecutive */
  uint64_t bias;      /* f32 per row, 0 when none */
  uint64_t score;     /* f32 per row, 0 when nobody asks */
  int64_t first_position;
  uint32_t count;
  uint32_t keys, key_slices;     /* range of the slice array */
  uint32_t values, value_slices; /* likewise */
} kv_work;

/* One block of the first kernel: some rows of one work item, some query rows, some value channels. */
typedef struct {
  uint32_t work, sequence;
  uint32_t first, end;       /* rows */
  uint32_t row, rows;        /* query rows, at most KV_QUERY_ROWS */
  uint32_t channel, channels; /* value channels, at most KV_CHANNELS */
  uint64_t queries;          /* f32 [m][key_dim], already turned to the phase of the rows */
  uint64_t partial;          /* float offset: max[m], sum[m], accumulators[m][value_dim] of this piece of rows */
  uint64_t kept;             /* float offset of [m][count] logits, ~0 for none */
} kv_piece;

typedef struct {
  uint64_t output;      /* f32 */
  uint64_t log_sum_exp; /* f32, 0 for none */
  int64_t first_position; /* KV_EVERY_ROW: every row is visible */
  int64_t output_head_stride, output_token_stride;
  float scale, softcap;
  uint32_t sliding_window;
  uint32_t tokens, group, key_dim, value_dim;
} kv_sequence;

/* One block of the merging kernel: one query row of one KV head. */
typedef struct {
  uint32_t sequence, head, row;
  uint32_t partials; /* how many pieces of rows */
  uint64_t first;    /* index of the first partial offset in the list */
  uint64_t total;    /* float offset of [2]: maximum and sum */
} kv_merge;

/* One work item whose rows gather statistics. */
typedef struct {
  uint32_t work, rows; /* query rows */
  uint64_t kept;       /* float offset of [m][count] */
  uint64_t totals;     /* float offset of [m][2] */
} kv_statistic;

/* A view of an engine's tensor, or a staged copy of one. */
typedef struct {
  uint64_t base;
  int64_t head_stride, token_stride; /* elements */
  uint32_t type, heads, tokens, dim;
} kv_view;

/* Tokens of one head of a view that go to dense rows. `range` 1: must round to a finite f16, 2: at most half of f32. */
typedef struct {
  kv_slice slice;
  uint32_t head, token, range, element;
} kv_write;

/* A first position from which every row is visible. */
#define KV_EVERY_ROW 0x7fffffffffffffffll

enum { KV_QUERY_ROWS = 8, KV_CHANNELS = 256, KV_TILE_ROWS = 64, KV_TILE_CHANNELS = 64, KV_THREADS = 128 };

#endif
