/* How rows of codes lie in memory that are multiplied as integers (affine rows, scaled integers, ggml's blocks), part
 * of the files that do it with VNNI. A block is 32 channels. */

enum { BLOCK = 32, AHEAD = 8192 };

/* How the codes of a block are stored: a byte each; nibbles, of channels i and i + 16 or of neighbours; nibbles and a
 * fifth bit; nibbles that stand for the values of a table; two bits each, four neighbours a byte; the same and a third
 * bit in a plane of its own. */
enum { BYTES, NIBBLES, FIVES, TABLE, QUARTERS, THIRDS };

typedef struct {
  uint32_t form;
  uint32_t codes;  /* bytes of a block before its codes */
  uint32_t fifths; /* before the fifth bits */
  uint32_t bytes;  /* of a block, third bits left out */
  uint32_t zero;   /* the unsigned code of 0, or with minima a middle one, for what rounding costs to be small */
  bool is_signed;  /* bytes */
  bool halves;     /* f16 scales inside the blocks */
  bool has_min;
  bool pairs;      /* a byte holds neighbouring channels, not i and i + 16 */
} b_form;

CKV_INLINE b_form form_of(const ckv_run *run) {
  const uint32_t code = run->code, bits = run->bits;
  if (run->kind == CKV_AFFINE_ROW)
    return (b_form){.form = bits == 8 ? BYTES : bits == 4 ? NIBBLES : bits == 3 ? THIRDS : QUARTERS,
                    .bytes = 4 * (bits == 3 ? 2 : bits), .zero = 1u << (bits - 1), .has_min = true, .pairs = bits == 4};
  if (run->kind != CKV_GGML)
    return code == CKV_INT8 ? (b_form){.form = BYTES, .bytes = 32, .zero = 128, .is_signed = true}
                            : (b_form){.form = NIBBLES, .bytes = 16, .zero = 8, .pairs = true};
  b_form f = {.form = NIBBLES, .codes = 2, .bytes = 18, .zero = 8, .halves = true};
  if (code == CKV_Q8_0) f.form = BYTES, f.bytes = 34, f.zero = 128, f.is_signed = true;
  if (code == CKV_IQ4_NL) f.form = TABLE, f.zero = 128;
  if (code == CKV_Q4_1 || code == CKV_Q5_1) f.has_min = true, f.codes = 4, f.bytes = 20;
  if (code == CKV_Q5_0) f.form = FIVES, f.fifths = 2, f.codes = 6, f.bytes = 22, f.zero = 16;
  if (code == CKV_Q5_1) f.form = FIVES, f.fifths = 4, f.codes = 8, f.bytes = 24, f.zero = 16;
  return f;
}

/* Whether the integer kernels take a run. Scales must not change inside a block. */
static bool fits(const ckv_run *run) {
  if (run->dim % BLOCK) return false;
  if (run->kind == CKV_GGML) return true;
  if (run->kind == CKV_AFFINE_ROW || run->kind == CKV_SCALED_ROW)
    if (run->group % BLOCK && run->group < run->dim) return false;
  if (run->kind == CKV_AFFINE_ROW) return true;
  if (run->kind < CKV_SCALED_ROW || run->kind > CKV_SCALED_FIXED) return false;
  return run->code == CKV_INT8 || run->code == CKV_INT4;
}

CKV_INLINE size_t row_bytes_of(const ckv_run *run) {
  return run->kind == CKV_AFFINE_ROW ? (size_t)ckv_row_words(run->dim, run->bits) * 4
                                     : ckv_row_bytes(run->kind, run->code, run->dim);
}

/* Groups of channels with a scale of their own; 0: rows share it. */
CKV_INLINE uint32_t groups_of(const ckv_run *run) {
  if (run->kind == CKV_GGML) return run->dim / BLOCK;
  return run->kind == CKV_SCALED_ROW || run->kind == CKV_AFFINE_ROW ? (run->dim + run->group - 1) / run->group : 0;
}

/* One scale for all blocks of a row. */
CKV_INLINE bool is_uniform(const ckv_run *run) { return groups_of(run) <= 1 && run->kind != CKV_GGML; }

/* Metadata of n rows, `groups` a row, as f32: [group][stride], zero up to a multiple of 16 rows. */
CKV_INLINE void load_meta(const void *from, const uint32_t type, uint32_t groups, uint32_t n,
                          const uint32_t stride, float *to) {
  const uint32_t padded = (n + 15) & ~15u;
  if (groups == 4) {
    const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(2));
    for (uint32_t i = 0; i < n; i += 16) {
      vf x[4];
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) { /* rows i + 4k ..< +4 */
        uint32_t begin = (i + 4 * k) * 4, have = n * 4 > begin ? ckv_min_u32(16, n * 4 - begin) : 0;
        x[k] = have == 16 ? vf_load_as(ckv_offset(from, type, begin), type)
               : have     ? vf_load_as_n(ckv_offset(from, type, begin), type, have)
                          : vf_zero();
      }
      vf a = _mm512_permutex2var_ps(x[0], even, x[1]), b = _mm512_permutex2var_ps(x[2], even, x[3]);
      vf c = _mm512_permutex2var_ps(x[0], odd, x[1]), d = _mm512_permutex2var_ps(x[2], odd, x[3]);
      vf_store(to + i, _mm512_shuffle_f32x4(a, b, 0x44));
      vf_store(to + stride + i, _mm512_shuffle_f32x4(a, b, 0xee));
      vf_store(to + 2 * stride + i, _mm512_shuffle_f32x4(c, d, 0x44));
      vf_store(to + 3 * stride + i, _mm512_shuffle_f32x4(c, d, 0xee));
    }
    return;
  }
  if (groups == 1) {
    for (uint32_t i = 0; i < n; i += 16)
      vf_store(to + i, vf_load_as_n(ckv_offset(from, type, i), type, ckv_min_u32(16, n - i)));
    return;
  }
  if (groups == 2) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (uint32_t i = 0; i < n; i += 16) {
      const uint32_t have = 2 * ckv_min_u32(16, n - i), low = ckv_min_u32(16, have);
      vf a = vf_load_as_n(ckv_offset(from, type, 2 * i), type, low), b = vf_zero();
      if (have > low) b = vf_load_as_n(ckv_offset(from, type, 2 * i + 16), type, have - low);
      vf_store(to + i, _mm512_permutex2var_ps(a, even, b));
      vf_store(to + stride + i, _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
    }
    return;
  }
  if (groups <= 16) { /* columns beyond are of the next rows, and left */
    for (uint32_t i = 0; i < n; i += 16) {
      float rows[17 * 16], columns[16 * 16];
      const uint32_t have = ckv_min_u32(16, n - i) * groups;
      for (uint32_t k = 0; k < 16 * groups + 16; k += 16)
        vf_store(rows + k, k >= have ? vf_zero()
                           : vf_load_as_n(ckv_offset(from, type, (size_t)i * groups + k), type,
                                          ckv_min_u32(16, have - k)));
      vf_transpose(rows, groups, columns, 16);
      for (uint32_t g = 0; g < groups; g++) vf_store(to + g * stride + i, vf_load(columns + 16 * g));
    }
    return;
  }
  for (uint32_t g = 0; g < groups; g++)
    for (uint32_t i = n / 16 * 16; i < padded; i += 16) vf_store(to + g * stride + i, vf_zero());
  for (uint32_t i = 0; i < n * groups; i += 16) {
    float some[16];
    uint32_t have = ckv_min_u32(16, n * groups - i);
    vf_store(some, vf_load_as_n(ckv_offset(from, type, i), type, have));
    for (uint32_t k = 0, r = i / groups, g = i % groups; k < have; k++) {
      to[g * stride + r] = some[k];
      if (++g == groups) g = 0, r++;
    }
  }
}

/* Four or two bytes of sixteen rows, put together in registers: loads of what was just stored in parts would wait. */
CKV_INLINE __m512i gather4(const uint8_t *p, size_t step) {
  __m128i x[4];
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i++, p += 4 * step) {
    int32_t y[4];
    CKV_UNROLL
    for (uint32_t r = 0; r < 4; r++) memcpy(y + r, p + r * step, 4);
    x[i] = _mm_setr_epi32(y[0], y[1], y[2], y[3]);
  }
  __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                            _mm256_inserti128_si256(_mm256_castsi128_si256(x[2]), x[3], 1), 1);
}

CKV_INLINE __m256i gather2(const uint8_t *p, size_t step) {
  __m128i x[2];
  CKV_UNROLL
  for (uint32_t i = 0; i < 2; i++, p += 8 * step) {
    int16_t y[8];
    CKV_UNROLL
    for (uint32_t r = 0; r < 8; r++) memcpy(y + r, p + r * step, 2);
    x[i] = _mm_setr_epi16(y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]);
  }
  return _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1);
}

/* The metadata at the head of a block in n rows. */
CKV_INLINE void load_heads(const uint8_t *block, size_t step, const bool has_min, uint32_t n, float *scales,
                           float *mins) {
  for (uint32_t r = 0; r < n; r += 16, block += 16 * step) {
    uint8_t some[16 * 4] = {0};
    const uint8_t *from = block;
    size_t apart = step;
    if (n - r < 16) { /* there may be no memory behind the last row */
      for (uint32_t i = 0; i < n - r; i++) memcpy(some + 4 * i, block + i * step, has_min ? 4 : 2);
      from = some;
      apart = 4;
    }
    if (has_min) {
      const __m512i x = gather4(from, apart);
      vf_store(scales + r, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)));
      vf_store(mins + r, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16))));
    } else {
      vf_store(scales + r, _mm512_cvtph_ps(gather2(from, apart)));
    }
  }
}

/* Scales and minima of n rows from `first` on: [group][stride], zero up to a multiple of 16 rows. */
CKV_INLINE void load_metadata(const ckv_run *run, const b_form f, uint32_t first, uint32_t n, const uint32_t stride,
                              float *scales, float *mins) {
  const uint32_t type = run->dtype, groups = groups_of(run), padded = (n + 15) & ~15u;
  if (f.halves) {
    const size_t step = row_bytes_of(run);
    const uint8_t *block = (const uint8_t *)run->data + first * step;
    for (uint32_t g = 0; g < groups; g++, block += f.bytes, scales += stride, mins += stride) {
      if (f.has_min) load_heads(block, step, true, n, scales, mins);
      else load_heads(block, step, false, n, scales, mins);
    }
  } else if (run->kind == CKV_SCALED_FIXED || run->kind == CKV_SCALED_BLOCK) {
    for (uint32_t r = 0; r < padded; r++)
      scales[r] = r >= n                           ? 0
                  : run->kind == CKV_SCALED_FIXED ? run->factor
                                                  : ckv_load_scalar(run->scale, type, (first + r) / run->group);
  } else {
    const void *scale = ckv_offset(run->scale, type, (size_t)first * groups);
    const void *min = f.has_min ? ckv_offset(run->min, type, (size_t)first * groups) : NULL;
    if (type == CKV_F16) {
      load_meta(scale, CKV_F16, groups, n, stride, scales);
      if (f.has_min) load_meta(min, CKV_F16, groups, n, stride, mins);
    } else {
      load_meta(scale, type, groups, n, stride, scales);
      if (f.has_min) load_meta(min, type, groups, n, stride, mins);
    }
  }
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

/* Sixteen bytes of sixteen rows, `step` bytes apart: lane r of x[i] is dword i of row r. */
CKV_INLINE void transpose16(const uint8_t *p, size_t step, __m512i x[4]) {
  __m512i a[4], b[4];
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i++) {
    const uint8_t *at = p + i * step;
    a[i] = load4(at, at + 4 * step, at + 8 * step, at + 12 * step);
  }
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  x[0] = _mm512_unpacklo_epi64(b[0], b[2]);
  x[1] = _mm512_unpackhi_epi64(b[0], b[2]);
  x[2] = _mm512_unpacklo_epi64(b[1], b[3]);
  x[3] = _mm512_unpackhi_epi64(b[1], b[3]);
}

CKV_INLINE __m128i load_eights(const uint8_t *p, size_t step) {
  __m128 low = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p));
  return _mm_castps_si128(_mm_loadh_pi(low, (const __m64 *)(p + step)));
}

/* Eight bytes of sixteen rows. */
CKV_INLINE void transpose8(const uint8_t *p, size_t step, __m512i x[2]) {
  __m512 a[2];
  CKV_UNROLL
  for (uint32_t i = 0; i < 2; i++) { /* rows 2i, 2i + 1 of each four */
    const uint8_t *at = p + 2 * i * step;
    __m512i y = _mm512_castsi128_si512(load_eights(at, step));
    y = _mm512_inserti32x4(y, load_eights(at + 4 * step, step), 1);
    y = _mm512_inserti32x4(y, load_eights(at + 8 * step, step), 2);
    a[i] = _mm512_castsi512_ps(_mm512_inserti32x4(y, load_eights(at + 12 * step, step), 3));
  }
  x[0] = _mm512_castps_si512(_mm512_shuffle_ps(a[0], a[1], 0x88));
  x[1] = _mm512_castps_si512(_mm512_shuffle_ps(a[0], a[1], 0xdd));
  __asm__ volatile("" : "+v"(x[0]), "+v"(x[1]) : : "memory"); /* else all loads come first, and most are spilled */
}

/* DEFINE(name, form): every form has functions of its own; what else tells formats apart is told to them. */
#define B_FORMS(DEFINE)      \
  DEFINE(bytes, BYTES)       \
  DEFINE(nibbles, NIBBLES)   \
  DEFINE(fives, FIVES)       \
  DEFINE(table, TABLE)       \
  DEFINE(quarters, QUARTERS) \
  DEFINE(thirds, THIRDS)

/* CALL(name) with the name of a form. */
#define B_FOR_FORM(f, CALL)               \
  do {                                    \
    switch ((f).form) {                   \
      case BYTES: CALL(bytes); break;     \
      case NIBBLES: CALL(nibbles); break; \
      case FIVES: CALL(fives); break;     \
      case TABLE: CALL(table); break;     \
      case QUARTERS: CALL(quarters); break; \
      default: CALL(thirds); break;       \
    }                                     \
  } while (0)
