/* What the host tells the kernels: plain structures that both sides lay out alike.
 *
 * Included by C, by Swift through the module, and by the CUDA sources, which NVRTC compiles without a C library. */
#ifndef CKV_CUDA_ABI_H
#define CKV_CUDA_ABI_H

#ifdef __CUDACC_RTC__
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned short uint16_t;
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif

/* Rows `first ..< first + count` of a run; layouts and numbers as in ckv.h. Addresses are device addresses. */
typedef struct {
  uint64_t data, scale, min;
  uint32_t kind, code, dtype, bits, group;
  float factor; /* the scale of rows that share one that was given */
  uint32_t dim, first, count;
  /* Rows of the slices before this one in its list. */
  uint32_t start;
} kv_slice;

/* What lies between rows of a model and rows of a run; as ckv_map. Addresses, 0 for a part that is left out. */
typedef struct {
  uint64_t sign;           /* f32 */
  uint64_t factor, offset; /* of `dtype` */
  uint64_t order;          /* uint32 */
  uint32_t dim, block, dtype, padding;
} kv_map;

/* What latents are multiplied by: `rank` rows of `dim` channels, and a mean that is added (f32, 0 for none). */
typedef struct {
  uint64_t data, mean;
  uint32_t dtype, rank, dim, padding;
} kv_basis;

/* A rotary embedding: the angle of a pair is its position times `frequencies[pair]` (f32). */
typedef struct {
  uint64_t frequencies;
  uint32_t pairs;
  uint32_t interleaved; /* pairs are neighbours, else `pairs` channels apart */
  uint32_t rounded;     /* the product is rounded to f32 */
  uint32_t padding;
} kv_rotary;

/* Consecutive slots of one KV head, read with one query phase. */
typedef struct {
  uint64_t positions; /* int32 per row, 0 when consecutive */
  uint64_t bias;      /* f32 per row, 0 when none */
  uint64_t score;     /* f32 per row, 0 when nobody asks */
  int64_t first_position;
  uint32_t count;
  uint32_t keys, key_slices;     /* range of the slice array */
  uint32_t values, value_slices; /* likewise */
  uint32_t padding;
} kv_work;

/* Query rows as they lie: row j is token j / group, member j % group. */
typedef struct {
  uint64_t base, shift; /* shift: f32 per row, added to every logit; 0 for none */
  int64_t token_stride, member_stride; /* elements */
  uint32_t type, dim, group, padding;
} kv_queries;

/* Query rows on their way to some rows: turned back by the positions those count as later, then brought behind their map
 * or into the space of their latents. One block a query row. */
typedef struct {
  kv_queries from, to; /* to: f32 */
  uint64_t map, basis, rotary; /* addresses, 0 for none */
  int64_t position;            /* of the first token; KV_EVERY_ROW: `later` for all */
  int64_t later;
  float scale; /* of logits: the shift is formed with it */
  uint32_t rows;
} kv_phase;

/* One block of the first kernel: some rows of one work item, some query rows, some value channels. */
typedef struct {
  uint32_t work, sequence;
  uint32_t first, end;        /* rows */
  uint32_t row, rows;         /* query rows, at most KV_QUERY_ROWS */
  uint32_t channel, channels; /* value channels, at most KV_CHANNELS */
  uint32_t queries;           /* index of kv_queries */
  uint32_t value_dim;         /* of the partial: channels of the model, or latents */
  uint64_t partial;           /* float offset: max[m], sum[m], accumulators[m][value_dim] of this piece of rows */
  uint64_t kept;              /* float offset of [m][count] logits, ~0 for none */
} kv_piece;

/* A partial over rows behind a map or over latents becomes one over rows of the model. */
typedef struct {
  uint64_t from, to; /* float offsets; equal without a basis */
  uint64_t map, basis;
  uint32_t rows, dim; /* m; channels of the accumulators as they are */
} kv_restore;

typedef struct {
  uint64_t output;      /* f32 */
  uint64_t log_sum_exp; /* f32, 0 for none */
  int64_t first_position; /* KV_EVERY_ROW: every row is visible */
  int64_t output_head_stride, output_token_stride, log_stride;
  float scale, softcap;
  uint32_t sliding_window;
  uint32_t tokens, group, key_dim, value_dim;
  /* Tokens of the whole call, and the first of these among them. */
  uint32_t all_tokens, first_token;
  /* Elements of queries and of outputs of the sequences before this one, heads and tokens in order. */
  uint64_t query_place, output_place;
} kv_sequence;

/* One block of the merging kernel: one query row of one KV head. */
typedef struct {
  uint32_t sequence, head, row;
  uint32_t partials; /* how many pieces of rows */
  uint64_t first;    /* index of the first partial offset in the list */
  uint64_t total;    /* float offset of [2]: maximum and sum */
  uint32_t queries;  /* index of kv_queries: as the engine passed them */
  uint32_t padding;
} kv_merge;

/* The first query element and the first output element that are not finite, ~0 for none. `guard` is on the card, and keeps
 * statistics from being added; `found` is where the host looks. */
typedef struct {
  uint64_t guard, found; /* addresses of [2] */
} kv_faults;

/* One work item whose rows gather statistics. */
typedef struct {
  uint64_t score;      /* f32 per row */
  uint64_t kept;       /* float offset of [rows][count] */
  uint64_t totals;     /* float offset of [rows][2] */
  uint32_t count, rows; /* rows of the cache, query rows */
  uint32_t reduction;  /* 0: added, 1: the largest */
  uint32_t fresh;      /* the score is written, not added to */
  /* Of windows only: shares of every token, and sums over the rows before `past`, [count] each; 0 for none. */
  uint64_t shares, entropy, variance;
  uint32_t past, padding;
} kv_statistic;

/* What is an even share for one query of a window, and which rows it sees. */
typedef struct {
  float share;
  uint32_t visible;
} kv_share;

/* How the columns of a window become scores. */
typedef struct {
  uint32_t statistic; /* 0: sum, 1: mean and variance, 2: maximum, 3: queries below an even share */
  uint32_t reduction; /* over the heads of the group. 0: mean, 1: maximum, 2: sum */
  uint32_t group;
  uint32_t window;
  float gamma;
} kv_window_rule;

/* Scores of one head, of which some rows are chosen: `take` of `count`, 1 or more. */
typedef struct {
  uint64_t scores; /* f32 */
  uint32_t count, take;
  uint32_t offset; /* is added to what is chosen */
  uint32_t first;  /* of the chosen in the list of all heads */
} kv_choice;

/* Scores of one head that are pooled over neighbours: the first `past` of `count` rows, the others become 0. */
typedef struct {
  uint64_t source, target; /* f32 */
  uint32_t count, past;
} kv_pooled;

/* A view of an engine's tensor, or a staged copy of one. */
typedef struct {
  uint64_t base;
  int64_t head_stride, token_stride; /* elements */
  uint32_t type, heads, tokens, dim;
} kv_view;

/* Tokens of one head of the first or second view that go to dense rows. `range` 1: must round to a finite f16, 2: at most
 * `limit`. */
typedef struct {
  kv_slice slice;
  uint32_t head, token, range;
  float limit;
  uint32_t view, padding;
} kv_write;

/* A row of a table that is turned from one position to another. */
typedef struct {
  uint32_t row, padding;
  int64_t from, to;
} kv_turn;

/* A first position from which every row is visible. */
#define KV_EVERY_ROW 0x7fffffffffffffffll

enum {
  KV_QUERY_ROWS = 8,
  KV_CHANNELS = 256,
  KV_TILE_ROWS = 64,
  KV_TILE_CHANNELS = 64,
  KV_THREADS = 128,
  /* Channels of the longest row. */
  KV_MOST_CHANNELS = 4096,
  /* Rows restored from latents together, and latent channels of one step. */
  KV_LATENT_ROWS = 8,
  KV_LATENT_CHANNELS = 128,
};

#endif
