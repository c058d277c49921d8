/* How scaled integers and ggml's blocks lie in memory, part of the files that multiply them with VNNI. */

enum { ROWS = 16, QUERIES = 4, BLOCK = 32, TILE = 128, STRIP = 4, AHEAD = 8192 };

/* How the codes of a block are stored. */
enum { BYTES, NIBBLES, FIVES, TABLE };

typedef struct {
  uint32_t form;
  uint32_t codes;  /* bytes of a block before its codes */
  uint32_t fifths; /* before the fifth bits */
  uint32_t bytes;  /* of a block */
  uint32_t zero;   /* the unsigned code of 0, or with minima a middle one, for what rounding costs to be small */
  bool halves;     /* f16 scales inside the blocks */
  bool has_min;
  bool pairs;      /* a byte holds neighbouring channels, not i and i + 16 */
} b_form;

CKV_INLINE b_form form_of(const uint32_t kind, const uint32_t code) {
  if (kind != CKV_GGML)
    return code == CKV_INT8 ? (b_form){.form = BYTES, .bytes = 32, .zero = 128}
                            : (b_form){.form = NIBBLES, .bytes = 16, .zero = 8, .pairs = true};
  b_form f = {.form = NIBBLES, .codes = 2, .bytes = 18, .zero = 8, .halves = true};
  if (code == CKV_Q8_0) f.form = BYTES, f.bytes = 34, f.zero = 128;
  if (code == CKV_IQ4_NL) f.form = TABLE, f.zero = 128;
  if (code == CKV_Q4_1 || code == CKV_Q5_1) f.has_min = true, f.codes = 4, f.bytes = 20;
  if (code == CKV_Q5_0) f.form = FIVES, f.fifths = 2, f.codes = 6, f.bytes = 22, f.zero = 16;
  if (code == CKV_Q5_1) f.form = FIVES, f.fifths = 4, f.codes = 8, f.bytes = 24, f.zero = 16;
  return f;
}

/* Where position i of a block's codes is in the block. */
CKV_INLINE uint32_t channel_of(const b_form f, uint32_t i) { return f.pairs ? i % 16 * 2 + i / 16 : i; }

/* Whether the integer kernels take a run. Scales must not change inside a block. */
static bool fits(const ckv_run *run, uint32_t m) {
  if (run->kind < CKV_SCALED_ROW || run->kind > CKV_GGML || run->dim % BLOCK || m >= CKV_MANY_QUERIES) return false;
  if (run->kind == CKV_GGML) return true;
  if (run->code != CKV_INT8 && run->code != CKV_INT4) return false;
  return run->kind != CKV_SCALED_ROW || run->group % BLOCK == 0 || run->group >= run->dim;
}

/* One scale for all blocks of a row. */
CKV_INLINE bool is_uniform(const ckv_run *run) {
  return run->kind == CKV_SCALED_FIXED || run->kind == CKV_SCALED_BLOCK ||
         (run->kind == CKV_SCALED_ROW && run->group >= run->dim);
}

/* The scales of n rows for one block, zeros up to a multiple of 16. */
CKV_INLINE void scales_of(const ckv_run *run, uint32_t first, uint32_t n, uint32_t block, float *to) {
  const uint32_t type = run->dtype, padded = (n + 15) & ~15u;
  if (run->kind == CKV_SCALED_FIXED) {
    for (uint32_t r = 0; r < padded; r++) to[r] = r < n ? run->factor : 0;
    return;
  }
  if (run->kind == CKV_SCALED_BLOCK) {
    for (uint32_t r = 0, k; r < n; r += k) {
      const uint32_t row = first + r;
      k = ckv_min_u32(n - r, run->group - row % run->group);
      const float s = ckv_load_scalar(run->scale, type, row / run->group);
      for (uint32_t i = 0; i < k; i++) to[r + i] = s;
    }
    for (uint32_t r = n; r < padded; r++) to[r] = 0;
    return;
  }
  const uint32_t groups = (run->dim + run->group - 1) / run->group;
  const char *at = ckv_offset(run->scale, type, (size_t)first * groups + block * BLOCK / run->group);
  if (groups == 1) {
    for (uint32_t r = 0; r < padded; r += 16)
      vf_store(to + r, vf_load_as_n(ckv_offset(at, type, r), type, n - r < 16 ? n - r : 16));
    return;
  }
  const size_t step = groups * ckv_size_of(type);
  if (groups == 4 && type != CKV_F32) { /* every fourth of 64 halves */
    const __m512i four = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 60, 56, 52, 48, 44, 40, 36,
                                          32, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i index = _mm512_add_epi16(four, _mm512_set1_epi16((short)(block * BLOCK / run->group)));
    const char *row = ckv_offset(run->scale, type, (size_t)first * 4);
    for (uint32_t r = 0; r < padded; r += 16, row += 128) {
      const uint32_t have = ckv_min_u32(16, n - r) * 4;
      const __mmask64 mask = have == 64 ? ~0ull : (1ull << have) - 1;
      __m512i low = _mm512_maskz_loadu_epi16((__mmask32)mask, row);
      __m512i high = _mm512_maskz_loadu_epi16((__mmask32)(mask >> 32), row + 64);
      __m256i h = _mm512_castsi512_si256(_mm512_permutex2var_epi16(low, index, high));
      vf_store(to + r, type == CKV_F16 ? _mm512_cvtph_ps(h) : v_widen_bf16(h));
    }
    return;
  }
  for (uint32_t r = 0; r < n; r++) to[r] = ckv_load_scalar(at + r * step, type, 0);
  for (uint32_t r = n; r < padded; r++) to[r] = 0;
}

CKV_INLINE __m512i table_bytes(__m512i nibbles) {
  const __m128i values = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153, (char)166,
                                       (char)181, (char)197, (char)217, (char)241);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), nibbles);
}

CKV_INLINE __m128i load128(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }

/* Sixteen bytes of four places. */
CKV_INLINE __m512i load4(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d) {
  __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(load128(a)), load128(b), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(x, load128(c), 2), load128(d), 3);
}

CKV_INLINE __m512i load2(const uint8_t *a, const uint8_t *b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)a)),
                            _mm256_loadu_si256((const __m256i *)b), 1);
}

/* CALL(name) with the name of a run's form, of which every one has a function of its own. */
#define B_FOR_FORM(run, CALL)                                                                                        \
  do {                                                                                                               \
    if ((run)->kind != CKV_GGML) (run)->code == CKV_INT8 ? CALL(int8) : CALL(int4);                                  \
    else if ((run)->code == CKV_Q8_0) CALL(q8_0);                                                                    \
    else if ((run)->code == CKV_Q5_0) CALL(q5_0);                                                                    \
    else if ((run)->code == CKV_Q5_1) CALL(q5_1);                                                                    \
    else if ((run)->code == CKV_Q4_0) CALL(q4_0);                                                                    \
    else if ((run)->code == CKV_Q4_1) CALL(q4_1);                                                                    \
    else CALL(iq4_nl);                                                                                               \
  } while (0)
