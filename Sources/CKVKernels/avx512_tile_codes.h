/* Tiles of code bytes for avx512_sums.c, which includes this behind the layout of its memory: four rows at a time
 * transposed, so that a lane holds the same byte of four rows, and codes of 2 and 3 bits brought to nibbles. */

CKV_INLINE void transpose4(const __m512i r[4], __m512i to[4]) {
  __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  to[0] = _mm512_unpacklo_epi16(a, c);
  to[1] = _mm512_unpackhi_epi16(a, c);
  to[2] = _mm512_unpacklo_epi16(b, d);
  to[3] = _mm512_unpackhi_epi16(b, d);
}

CKV_INLINE void transpose4_half(const __m256i r[4], __m256i to[4]) {
  __m256i a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
  __m256i c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
  to[0] = _mm256_unpacklo_epi16(a, c);
  to[1] = _mm256_unpackhi_epi16(a, c);
  to[2] = _mm256_unpacklo_epi16(b, d);
  to[3] = _mm256_unpackhi_epi16(b, d);
}

CKV_INLINE void transpose4_quarter(const __m128i r[4], __m128i to[4]) {
  __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpackhi_epi8(r[0], r[1]);
  __m128i c = _mm_unpacklo_epi8(r[2], r[3]), d = _mm_unpackhi_epi8(r[2], r[3]);
  to[0] = _mm_unpacklo_epi16(a, c);
  to[1] = _mm_unpackhi_epi16(a, c);
  to[2] = _mm_unpacklo_epi16(b, d);
  to[3] = _mm_unpackhi_epi16(b, d);
}

/* Whether codes are a byte each once they are ready to be multiplied, or two of them share one. */
CKV_INLINE bool is_wide(const uint32_t form) { return form == BYTES || form == FIVES || form == TABLE; }

/* Sixteen bytes of each of four blocks, or of those there are: `have` bytes. */
CKV_INLINE __m512i load_blocks(const char *from, size_t step, const bool gaps, const bool whole, uint32_t have) {
  if (!gaps) {
    if (whole) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi8(have >= 64 ? ~0ull : (1ull << have) - 1, from);
  }
  const uint8_t *at[4];
  CKV_UNROLL
  for (uint32_t i = 0; i < 4; i++)
    at[i] = (const uint8_t *)from + (whole || 16 * i < have ? i * step : 0); /* what there is not is not used */
  return load4(at[0], at[1], at[2], at[3]);
}

/* Codes of a strip with their fifth bits: dword i is byte i of 16 and its two nibbles' channels are i and i + 16;
 * dword i of `fifths` is byte i of 4. */
CKV_INLINE void add_fifths(__m512i nibbles, __m128i fifths, uint8_t *to) {
  const __m512i low = _mm512_set1_epi8(15), bit = _mm512_set1_epi8(16);
  const __m512i bits = _mm512_setr_epi32(0x01010101, 0x02020202, 0x04040404, 0x08080808, 0x10101010, 0x20202020,
                                         0x40404040, (int)0x80808080u, 0x01010101, 0x02020202, 0x04040404, 0x08080808,
                                         0x10101010, 0x20202020, 0x40404040, (int)0x80808080u);
  const __m512i dwords = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  CKV_UNROLL
  for (int h = 0; h < 2; h++) {
    __m512i which = _mm512_add_epi32(dwords, _mm512_set1_epi32(2 * h));
    __mmask64 set = _mm512_test_epi8_mask(_mm512_permutexvar_epi32(which, _mm512_castsi128_si512(fifths)), bits);
    __m512i codes = _mm512_and_si512(h ? _mm512_srli_epi16(nibbles, 4) : nibbles, low);
    _mm512_store_si512(to + 64 * h, _mm512_or_si512(codes, _mm512_maskz_mov_epi8(set, bit)));
  }
}

/* The codes of n rows from `first` on, channels of strips [s, s + STRIPS), to at->codes. Dword i of a vector is byte i
 * of its 16 in the row. Of a strip there are two vectors, of bytes, or one of nibbles. 2 and 3 bits: nibbles; dword
 * i < 8 is byte i of the 8 of the low plane, codes 0 and 2 of it, and dword i + 8 codes 1 and 3. `whole`: rows have all
 * the channels asked for. */
CKV_INLINE void transpose_codes(const ckv_run *run, const uint32_t form, const b_form *f, const bool gaps,
                                const bool whole, uint32_t first, uint32_t n, uint32_t s, memory *at) {
  const bool few = form == QUARTERS || form == THIRDS; /* bits */
  const uint32_t low_bytes = form == THIRDS ? ckv_plane_words(run->dim, 2) * 4 : (uint32_t)at->row_bytes;
  const uint32_t begin = s * f->bytes, high_begin = low_bytes + s * STRIP / 8;
  const uint32_t step = is_wide(form) ? 128 : 64, stride = STEPS * step;
  const uint32_t have = whole ? 0 : low_bytes - begin;
  const uint32_t high_have = whole || form != THIRDS ? 0 : (uint32_t)at->row_bytes - high_begin;
  const size_t row_bytes = at->row_bytes;
  const char *rows = (const char *)run->data + (size_t)first * row_bytes, *row[4];
  const __mmask16 m_high = high_have >= 16 ? 0xffff : (__mmask16)((1u << high_have) - 1);
  const size_t next_step = at->next_step, meta_bytes = f->halves ? 0 : at->groups * ckv_size_of(run->dtype);
  const size_t meta_at = (first + DISTANCE * TILE) * meta_bytes;
  const bool ask = s == 0 && (run->kind == CKV_AFFINE_ROW || run->kind == CKV_SCALED_ROW);
  const char *next = at->next;
  uint8_t *restrict to = at->codes;
  for (uint32_t i = 0; i < n; i += 4, rows += 4 * row_bytes, to += step, next += 2 * next_step) {
    __builtin_prefetch(next);
    __builtin_prefetch(next + next_step);
    if (ask) {
      __builtin_prefetch((const char *)run->scale + meta_at + i * meta_bytes);
      if (f->has_min) __builtin_prefetch((const char *)run->min + meta_at + i * meta_bytes);
    }
    row[0] = rows;
    if (i + 4 <= n) {
      row[1] = rows + row_bytes;
      row[2] = rows + 2 * row_bytes;
      row[3] = rows + 3 * row_bytes;
    } else { /* past the end weights are zero */
      for (uint32_t k = 1; k < 4; k++) row[k] = i + k < n ? row[k - 1] + row_bytes : row[k - 1];
    }
    if (!few) {
      /* Two vectors of bytes a row: strips 0, 1 and 2, 3 where they follow each other, or first and second halves. */
      const bool split = form == BYTES && !gaps;
      const __m512i sign = _mm512_set1_epi8(f->is_signed ? (char)0x80 : 0);
      const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      CKV_UNROLL
      for (uint32_t v = 0; v < (form == BYTES ? 2 : 1); v++) {
        __m512i x[4], y[4];
        const uint32_t from = begin + f->codes + (split ? 64 : 16) * v;
        const uint32_t left = gaps ? have / f->bytes * 16 : have > 64 * v ? have - 64 * v : 0;
        CKV_UNROLL
        for (uint32_t k = 0; k < 4; k++) {
          x[k] = load_blocks(row[k] + from, gaps ? f->bytes : 16, gaps, whole, left);
          if (form == BYTES) x[k] = _mm512_xor_si512(x[k], sign);
          x[k] = _mm512_permutexvar_epi32(lanes, x[k]);
        }
        transpose4(x, y);
        __m128i u[4], h[4];
        if (form == FIVES) {
          CKV_UNROLL
          for (uint32_t k = 0; k < 4; k++) {
            uint32_t bits[4];
            CKV_UNROLL
            for (uint32_t b = 0; b < 4; b++) {
              const char *block = row[k] + begin + (whole || b * f->bytes < have ? b * f->bytes : 0);
              memcpy(bits + b, block + f->fifths, 4);
            }
            u[k] = _mm_setr_epi32((int)bits[0], (int)bits[1], (int)bits[2], (int)bits[3]);
          }
          transpose4_quarter(u, h);
        }
        CKV_UNROLL
        for (uint32_t k = 0; k < 4; k++) {
          uint8_t *codes = split ? to + (2 * v + k / 2) * stride + k % 2 * 64 : to + k * stride + v * 64;
          if (form == FIVES) {
            add_fifths(y[k], h[k], codes);
          } else if (form == TABLE) {
            const __m512i nibble = _mm512_set1_epi8(15);
            _mm512_store_si512(codes, table_bytes(_mm512_and_si512(y[k], nibble)));
            _mm512_store_si512(codes + 64, table_bytes(_mm512_and_si512(_mm512_srli_epi16(y[k], 4), nibble)));
          } else {
            _mm512_store_si512(codes, y[k]);
          }
        }
      }
      continue;
    }
    const __m256i lanes = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __mmask32 m = have >= 32 ? ~0u : (1u << have) - 1;
    __m256i x[4], y[4];
    CKV_UNROLL
    for (uint32_t k = 0; k < 4; k++) {
      const char *from = row[k] + begin;
      x[k] = whole ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi8(m, from);
      x[k] = _mm256_permutevar8x32_epi32(x[k], lanes);
    }
    transpose4_half(x, y);
    __m128i u[4], h[4];
    if (form == THIRDS) {
      CKV_UNROLL
      for (uint32_t k = 0; k < 4; k++) {
        const char *from = row[k] + high_begin;
        u[k] = whole ? _mm_loadu_si128((const __m128i *)from) : _mm_maskz_loadu_epi8(m_high, from);
      }
      transpose4_quarter(u, h);
    }
    CKV_UNROLL
    for (uint32_t k = 0; k < 4; k++) {
      const __m512i pairs = _mm512_set1_epi8(0x33);
      __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(y[k]), _mm256_srli_epi16(y[k], 2), 1);
      if (form == QUARTERS) {
        codes = _mm512_and_si512(codes, pairs);
      } else {
        /* Dword i is a nibble of dword i / 2 of the high plane; its bits go to bits 2 and 6, the first and third of
         * them or the second and fourth. */
        const __m512i dwords = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
        const __m512i nibble = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 0, 4));
        const __m128i first_third = _mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68);
        const __m128i second_fourth = _mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68);
        const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_broadcastsi128_si256(first_third)),
                                                 _mm256_broadcastsi128_si256(second_fourth), 1);
        __m512i index = _mm512_srlv_epi32(_mm512_permutexvar_epi32(dwords, _mm512_castsi128_si512(h[k])), nibble);
        index = _mm512_and_si512(index, _mm512_set1_epi8(0x0f));
        codes = _mm512_ternarylogic_epi32(codes, pairs, _mm512_shuffle_epi8(table, index), 0xea); /* (a & b) | c */
      }
      _mm512_store_si512(to + k * stride, codes);
    }
  }
  at->next = next;
}
