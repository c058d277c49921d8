/* accumulate over CKV_AFFINE_ROW for a few query rows, part of avx512.c.
 *
 * A vector holds the code words of a row (of two or four rows when they are short); its lanes are words, and code k
 * of all lanes belongs to channel word * (32/bits) + k. So accumulators are kept by (k, word), and put in the order
 * of channels once a call. The scale goes into the weight, the min into one sum for every group. Codes are masked but
 * not shifted down: converted where they stand they are larger by a power of two, which is taken out at the end.
 *
 * Every lane needs the weight of its row and group. Where groups are of 32 channels and rows fill vectors, words are
 * permuted so that the weights of neighbouring lanes are neighbours in memory too, and repeat: one broadcasting load.
 * Otherwise the weights of all lanes are written out. */

/* How codes, weights and metadata of a run lie in vectors. */
typedef struct {
  uint32_t per;          /* codes a word (low plane for bits = 3) */
  uint32_t words;        /* words a row, the high plane of bits = 3 left out */
  uint32_t row_words;    /* all words a row */
  uint32_t vectors;      /* vectors of words a row */
  uint32_t rows_a_vector; /* 1, 2 or 4; more than 1 only with vectors == 1 */
  uint32_t groups;       /* groups of channels */
  uint32_t words_a_group;
  uint32_t rows_a_meta;  /* rows whose scales fit in one vector */
  uint32_t period;       /* weights that repeat along the lanes; 16: all lanes are written out */
  /* Where weights lie, in floats from set to set, from vector to vector, from query row to query row. */
  size_t weight_set, weight_vector, weight_query;
} v_layout;

enum { V_TILE = 64 };

typedef double v_double __attribute__((aligned(4), may_alias)); /* two floats at once */

/* Bits below code k where it stands. The high words of bits = 3 are brought down first, to leave room for a bit. */
CKV_INLINE uint32_t v_below(uint32_t bits, uint32_t k) { return bits == 3 ? k % 8 * 2 : k * bits; }

CKV_INLINE size_t v_weight_floats(const v_layout *l) {
  return V_QUERIES * (l->period < 16 ? l->weight_query : (size_t)V_TILE * l->vectors * 16);
}

static bool v_layout_of(const ckv_run *run, v_layout *l) {
  uint32_t bits = run->bits;
  l->per = bits == 3 ? 16 : 32 / bits;
  l->words = ckv_plane_words(run->dim, bits == 3 ? 2 : bits);
  l->row_words = ckv_row_words(run->dim, bits);
  l->vectors = (l->words + 15) / 16;
  l->rows_a_vector = l->words == 8 ? 2 : l->words == 4 && bits != 3 ? 4 : 1;
  l->groups = (run->dim + run->group - 1) / run->group;
  l->words_a_group = run->group / l->per;
  l->rows_a_meta = 16 % l->groups == 0 ? 16 / l->groups : 1;
  bool repeats = run->group == 32 && l->rows_a_vector * l->words % 16 == 0 && l->words % l->words_a_group == 0;
  l->period = repeats ? 16 / l->words_a_group : 16;
  l->weight_set = repeats ? l->rows_a_vector * l->groups : l->vectors * V_QUERIES * 16;
  l->weight_vector = repeats ? l->period : V_QUERIES * 16;
  l->weight_query = repeats ? V_TILE * 16 + 16 : 16;
  /* A word must not straddle groups; otherwise, and with very many groups, rows are decoded first. */
  return run->group % l->per == 0 && l->groups <= 16 && l->rows_a_meta % l->rows_a_vector == 0;
}

/* The word in each lane: words of one group are `period` lanes apart. */
CKV_INLINE __m512i v_lane(const uint32_t period) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i group = _mm512_and_si512(lane, _mm512_set1_epi32((int)period - 1));
  const uint32_t log = (uint32_t)__builtin_ctz(period);
  return _mm512_add_epi32(_mm512_slli_epi32(group, 4 - log), _mm512_srli_epi32(lane, log));
}

CKV_INLINE vf v_repeat(const float *p, const uint32_t period) {
  if (period == 2) return _mm512_castpd_ps(_mm512_set1_pd(*(const v_double *)p));
  if (period == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
  if (period == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
  return vf_load(p);
}

/* Of a vector of metadata, which holds rows_a_meta rows. */
typedef struct {
  uint32_t row_of_lane[16]; /* the row of each of its lanes */
  uint32_t *lane_of_word;   /* which of its lanes belongs to each lane of the rows' vectors of words */
} v_places;

static void v_find_places(const v_layout *l, v_places *places) {
  for (uint32_t i = 0; i < 16; i++) places->row_of_lane[i] = i / l->groups;
  for (uint32_t row = 0, *to = places->lane_of_word; row < l->rows_a_meta; row++) {
    /* A row's words; when it has vectors of its own, also the lanes past its last word, which have code 0. */
    uint32_t lanes = l->rows_a_vector > 1 ? l->words : 16 * l->vectors, word_of_group = 0, g = 0;
    for (uint32_t i = 0; i < lanes; i++) {
      *to++ = row * l->groups + g;
      if (++word_of_group == l->words_a_group && g + 1 < l->groups) word_of_group = 0, g++;
    }
  }
}

/* Weights p * scale of a tile. min_sum[j]: sums of p * min, lanes as in memory, modulo rows. */
CKV_INLINE void v_weights(const ckv_run *run, const v_layout *l, uint32_t type, uint32_t first, uint32_t n,
                          const float *p, const uint32_t nq, size_t ld, const v_places *places, float *weights,
                          float *min_sum) {
  const __m512i row_of_lane = _mm512_loadu_si512(places->row_of_lane);
  vf mins[V_QUERIES];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) mins[j] = vf_load(min_sum + 16 * j);
  for (uint32_t i = 0; i < n; i += l->rows_a_meta) {
    uint32_t rows = ckv_min_u32(l->rows_a_meta, n - i);
    size_t at = (size_t)(first + i) * l->groups;
    vf s = vf_load_as_n(ckv_offset(run->scale, type, at), type, rows * l->groups);
    vf mn = vf_load_as_n(ckv_offset(run->min, type, at), type, rows * l->groups), w[V_QUERIES];
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf weight = _mm512_permutexvar_ps(row_of_lane, vf_load_n(p + j * ld + i, rows));
      mins[j] = vf_fma(weight, mn, mins[j]);
      w[j] = weight * s;
      /* Lanes past the last row are zero, or overwritten next. */
      if (l->period < 16) vf_store(weights + j * l->weight_query + i * l->groups, w[j]);
    }
    if (l->period < 16) continue;
    float *to = weights + (size_t)(i / l->rows_a_vector) * l->weight_set;
    const uint32_t count = (rows + l->rows_a_vector - 1) / l->rows_a_vector * l->vectors;
    for (uint32_t x = 0; x < count; x++) {
      __m512i from = _mm512_loadu_si512(places->lane_of_word + 16 * x);
      CKV_UNROLL
      for (uint32_t j = 0; j < nq; j++)
        vf_store(to + (x * V_QUERIES + j) * 16, _mm512_permutexvar_ps(from, w[j]));
    }
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++) vf_store(min_sum + 16 * j, mins[j]);
}

/* The words of the low plane of a set of rows, those of `mask`. */
CKV_INLINE __m512i v_words(const v_layout *l, const uint32_t bits, const bool paired, const uint32_t *row,
                           __mmask16 mask, uint32_t v) {
  if (bits != 3 || !paired) return _mm512_maskz_loadu_epi32(mask, row + 16 * v);
  /* Two rows with high planes between: lanes from 8 on are the second row's. */
  __m256i second = _mm256_maskz_loadu_epi32((__mmask8)(mask >> 8), row + l->row_words);
  return _mm512_inserti32x8(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)row)), second, 1);
}

/* The bits of the high plane of bits = 3 for the codes of each lane's word, from bit 0 on. */
CKV_INLINE __m512i v_high_plane(const v_layout *l, const bool paired, const uint32_t *row, __mmask16 mask, uint32_t v,
                                const __m512i lane) {
  const __m512i half = _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(1)), 4);
  const uint32_t *from = row + l->words;
  __m512i high;
  if (paired) {
    __m128i second = _mm_maskz_loadu_epi32((__mmask8)(mask >> 8), from + l->row_words);
    high = _mm512_inserti32x4(_mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from)), second, 1);
  } else {
    high = vi_load_n(from + 8 * v, ckv_min_u32(8, l->row_words - l->words - 8 * v));
  }
  return _mm512_srlv_epi32(_mm512_permutexvar_epi32(_mm512_srli_epi32(lane, 1), high), half);
}

/* Four code positions from `k` on of one vector of words, over `sets` sets of rows. */
CKV_INLINE void v_quad_sets(const v_layout *l, const uint32_t bits, const bool paired, const uint32_t period,
                            const uint32_t k, uint32_t v, const uint32_t *row, uint32_t sets, __mmask16 mask,
                            const uint32_t nq, const float *weight, vf sum[V_QUERIES][4]) {
  const size_t row_step = (size_t)l->rows_a_vector * l->row_words;
  const __m512i lane = v_lane(period);
  const uint32_t low = bits == 3 ? 3 : (1u << bits) - 1;
  for (; sets; sets--, row += row_step, weight += l->weight_set) {
    __builtin_prefetch((const char *)(row + 16 * v) + 8192);
    __m512i w = v_words(l, bits, paired, row, mask, v), high = w;
    if (bits == 3) high = v_high_plane(l, paired, row, mask, v, lane);
    if (period < 16) w = _mm512_permutexvar_epi32(lane, w);
    if (bits == 3 && k >= 8) w = _mm512_srli_epi32(w, 16);
    vf x[4];
    CKV_UNROLL
    for (uint32_t t = 0; t < 4; t++) {
      const uint32_t below = v_below(bits, k + t);
      __m512i code = _mm512_and_si512(w, vi_set1(low << below));
      if (bits == 3) { /* bit k + t of the high plane, put above the other two */
        const int up = (int)(below + 2) - (int)(k + t);
        __m512i third = up >= 0 ? _mm512_slli_epi32(high, up) : _mm512_srli_epi32(high, -up);
        code = _mm512_ternarylogic_epi32(code, third, vi_set1(4u << below), 0xf8); /* code | (third & mask) */
      }
      x[t] = _mm512_cvtepu32_ps(code);
    }
    CKV_UNROLL
    for (uint32_t j = 0; j < nq; j++) {
      vf y = v_repeat(weight + j * l->weight_query, period);
      CKV_UNROLL
      for (uint32_t t = 0; t < 4; t++) sum[j][t] = vf_fma(y, x[t], sum[j][t]);
    }
  }
}

CKV_INLINE void v_tile_quad(const v_layout *l, const uint32_t bits, const bool paired, const uint32_t period,
                            const uint32_t k, uint32_t v, const uint32_t *words, uint32_t n, const uint32_t nq,
                            const float *weights, float *acc, size_t acc_stride) {
  vf sum[V_QUERIES][4];
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (uint32_t t = 0; t < 4; t++) sum[j][t] = vf_load(acc + j * acc_stride + t * 16);
  const uint32_t sets = n / l->rows_a_vector, rest = n % l->rows_a_vector;
  const __mmask16 mask = v_first(ckv_min_u32(16, l->rows_a_vector * l->words - 16 * v));
  const float *weight = weights + v * l->weight_vector;
  v_quad_sets(l, bits, paired, period, k, v, words, sets, mask, nq, weight, sum);
  if (rest) { /* the rows that do not fill a set */
    words += (size_t)sets * l->rows_a_vector * l->row_words;
    weight += sets * l->weight_set;
    v_quad_sets(l, bits, paired, period, k, v, words, 1, v_first(rest * l->words), nq, weight, sum);
  }
  CKV_UNROLL
  for (uint32_t j = 0; j < nq; j++)
    CKV_UNROLL
    for (uint32_t t = 0; t < 4; t++) vf_store(acc + j * acc_stride + t * 16, sum[j][t]);
}

/* A tile of n <= V_TILE rows for nq query rows. acc[j]: by (vector, position, lane). */
CKV_INLINE void v_tile(const ckv_run *run, const v_layout *l, const uint32_t bits, uint32_t first, uint32_t n,
                       const float *p, const uint32_t nq, size_t ld, const v_places *places, float *weights,
                       float *min_sum, float *acc, size_t acc_stride) {
  if (run->dtype == CKV_F16) v_weights(run, l, CKV_F16, first, n, p, nq, ld, places, weights, min_sum);
  else v_weights(run, l, run->dtype, first, n, p, nq, ld, places, weights, min_sum);
  const uint32_t *words = (const uint32_t *)run->data + (size_t)first * l->row_words;
  const uint32_t quads = (bits == 3 ? 16 : 32 / bits) / 4;
  for (uint32_t v = 0; v < l->vectors; v++) {
    float *to = acc + (size_t)v * quads * 64;
    CKV_UNROLL
    for (uint32_t k = 0; k < quads; k++) {
      const uint32_t period = bits == 8 ? 2 : bits == 4 ? 4 : 8; /* for groups of 32 */
      const bool paired = bits == 3 && l->rows_a_vector == 2; /* never compiled for other bits */
      float *at = to + 64 * k;
      if (l->period < 16 && paired)
        v_tile_quad(l, bits, bits == 3, period, 4 * k, v, words, n, nq, weights, at, acc_stride);
      else if (l->period < 16)
        v_tile_quad(l, bits, false, period, 4 * k, v, words, n, nq, weights, at, acc_stride);
      else if (paired)
        v_tile_quad(l, bits, bits == 3, 16, 4 * k, v, words, n, nq, weights, at, acc_stride);
      else
        v_tile_quad(l, bits, false, 16, 4 * k, v, words, n, nq, weights, at, acc_stride);
    }
  }
}

/* acc[c] += the sums of channel c, which lie in one lane for every row of a set, plus its group's min. */
CKV_INLINE void v_spread(const ckv_run *run, const v_layout *l, const uint32_t per, const float *sums,
                         const float *min_sum, float *acc) {
  float mins[16] = {0}, by_word[16 * 16], powers[16];
  for (uint32_t k = 0; k < 16; k++) powers[k] = k < per ? ckv_float_of((127 - v_below(run->bits, k)) << 23) : 0;
  const vf down = vf_load(powers);
  uint32_t words[16], lane_of[16];
  _mm512_storeu_si512(words, v_lane(l->period));
  for (uint32_t i = 0; i < 16; i++) lane_of[words[i]] = i;
  for (uint32_t row = 0; row < l->rows_a_meta; row++)
    for (uint32_t g = 0; g < l->groups; g++) mins[g] += min_sum[row * l->groups + g];
  for (uint32_t w = 0, g = 0, word_of_group = 0; w < l->words; w++) {
    /* Sixteen words at a time; positions from `per` on are of no interest. */
    if (w % 16 == 0) vf_transpose(sums + (size_t)w * per, 16, by_word, 16);
    uint32_t n = ckv_min_u32(per, run->dim - w * per);
    vf sum = vf_zero();
    for (uint32_t x = w % 16; x < 16 && x < l->rows_a_vector * l->words; x += l->words)
      sum = sum + vf_load(by_word + lane_of[x] * 16);
    sum = vf_fma(sum, down, vf_set1(mins[g]));
    vf_store_n(acc + w * per, vf_load_n(acc + w * per, n) + sum, n);
    if (++word_of_group == l->words_a_group) word_of_group = 0, g++;
  }
}

CKV_INLINE void v_accumulate_bits(const ckv_run *run, const v_layout *l, const uint32_t bits, uint32_t first,
                                  uint32_t count, const float *p, uint32_t m, size_t ld, float *acc,
                                  size_t acc_stride, float *scratch) {
  const size_t stride = (size_t)l->vectors * l->per * 16;
  float *sums = scratch, *min_sum = sums + m * stride, *weights = min_sum + (size_t)m * 16;
  v_places places = {.lane_of_word = (uint32_t *)(weights + v_weight_floats(l))};
  memset(sums, 0, m * (stride + 16) * sizeof(float));
  v_find_places(l, &places);
  for (uint32_t i = 0; i < count; i += V_TILE) {
    uint32_t n = ckv_min_u32(V_TILE, count - i);
    for (uint32_t j = 0, nq; j < m; j += nq) {
      nq = m - j >= 4 ? 4 : m - j >= 2 ? 2 : 1;
      const float *weight = p + j * ld + i;
      float *to = sums + j * stride, *mins = min_sum + j * 16;
      if (nq == 4) v_tile(run, l, bits, first + i, n, weight, 4, ld, &places, weights, mins, to, stride);
      else if (nq == 2) v_tile(run, l, bits, first + i, n, weight, 2, ld, &places, weights, mins, to, stride);
      else v_tile(run, l, bits, first + i, n, weight, 1, ld, &places, weights, mins, to, stride);
    }
  }
  for (uint32_t j = 0; j < m; j++)
    v_spread(run, l, bits == 3 ? 16 : 32 / bits, sums + j * stride, min_sum + j * 16, acc + j * acc_stride);
}

static bool v_accumulate_affine(const ckv_run *run, uint32_t first, uint32_t count, const float *p, uint32_t m,
                                size_t ld, float *acc, size_t acc_stride, float *scratch) {
  v_layout l;
  if (run->kind != CKV_AFFINE_ROW || m >= CKV_MANY_QUERIES || !v_layout_of(run, &l)) return false;
  if (run->bits == 2) v_accumulate_bits(run, &l, 2, first, count, p, m, ld, acc, acc_stride, scratch);
  else if (run->bits == 3) v_accumulate_bits(run, &l, 3, first, count, p, m, ld, acc, acc_stride, scratch);
  else if (run->bits == 4) v_accumulate_bits(run, &l, 4, first, count, p, m, ld, acc, acc_stride, scratch);
  else v_accumulate_bits(run, &l, 8, first, count, p, m, ld, acc, acc_stride, scratch);
  return true;
}
