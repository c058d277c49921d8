/* Queries and weights in fixed point, part of the files that multiply with VNNI: `digits` signed digits of base 256 each,
 * two (16 bits) or one (8 bits). A column is one digit of one query row; eight columns go together. */

enum { COLUMNS = 8 };

CKV_INLINE float v_range(const uint32_t digits) { return digits == 2 ? CKV_FULL_RANGE : CKV_BYTE_RANGE; }

/* Query rows whose digits go together. */
CKV_INLINE uint32_t v_rows_together(const uint32_t digits) { return COLUMNS / digits; }

/* x * up, rounded to an integer, plus 128, in the low 16 bits. */
CKV_INLINE vf v_fixed(vf x, vf up) { return vf_fma(x, up, vf_set1(12582912.0f + 128.0f)); }

/* In every 128 bits: four low digits of a, four high ones, and the same of b. */
CKV_INLINE __m512i v_digits(vf a, vf b) {
  const __m512i first = _mm512_set4_epi32(-1, -1, 0x0d090501, 0x0c080400);
  const __m512i second = _mm512_set4_epi32(0x0d090501, 0x0c080400, -1, -1);
  /* The 128 has carried into the high digits; taken from the low ones it leaves -128 to 127. */
  const __m512i low = _mm512_set4_epi32(0, (int)0x80808080u, 0, (int)0x80808080u);
  __m512i x = _mm512_shuffle_epi8(_mm512_castps_si512(a), first);
  __m512i y = _mm512_shuffle_epi8(_mm512_castps_si512(b), second);
  return _mm512_ternarylogic_epi32(x, y, low, 0x56); /* (x | y) ^ low */
}

/* Sixteen numbers each of `rows` query rows, `up` what scales them: in every 128 bits of `to` four of them, a dword a
 * column, a vector four columns. Their sums are added to sum. */
CKV_INLINE void v_columns(const vf *x, const vf *up, const uint32_t rows, const uint32_t digits, int32_t *to,
                          __m512i sum[2]) {
  const uint32_t step = 4 / digits;
  CKV_UNROLL
  for (uint32_t j = 0; j < rows; j += step) {
    /* Where there are not enough rows the last one comes again. */
    const uint32_t b = j + 1 < rows ? j + 1 : j, c = j + 2 < rows ? j + 2 : b, d = j + 3 < rows ? j + 3 : c;
    __m512i all;
    if (digits == 2) {
      all = v_digits(v_fixed(x[j], up[j]), v_fixed(x[b], up[b]));
    } else {
      const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(x[j] * up[j]), _mm512_cvtps_epi32(x[b] * up[b]));
      const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(x[c] * up[c]), _mm512_cvtps_epi32(x[d] * up[d]));
      all = _mm512_packs_epi16(ab, cd);
    }
    sum[j / step] = _mm512_dpbusd_epi32(sum[j / step], _mm512_set1_epi8(1), all);
    _mm512_storeu_si512(to + j / step * 16, all);
  }
}

/* The sums of query rows. */
CKV_INLINE void v_column_totals(const __m512i sum[2], const uint32_t rows, const uint32_t digits,
                                float to[COLUMNS]) {
  const uint32_t step = 4 / digits;
  CKV_UNROLL
  for (uint32_t j = 0; j < rows; j += step) {
    const __m512i y = sum[j / step];
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(y), _mm512_extracti64x4_epi64(y, 1));
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    if (digits == 2) x = _mm_add_epi32(x, _mm_slli_epi32(_mm_srli_epi64(x, 32), 8));
    int32_t all[4];
    _mm_storeu_si128((__m128i *)all, x);
    CKV_UNROLL
    for (uint32_t k = 0; k < step; k++) to[j + k] = (float)all[k * digits];
  }
}

/* What scales numbers up to `largest` to fixed point, and the way back, as ckv_fixed_up and ckv_fixed_down. */
CKV_INLINE void v_fixed_scales(const float *largest, const uint32_t rows, const uint32_t digits, float *up,
                               float *down) {
  const float range = v_range(digits);
  CKV_UNROLL
  for (uint32_t j = 0; j < rows; j += 4) {
    __m128 x = _mm_loadu_ps(largest + j), vanishes = _mm_cmplt_ps(x, _mm_set1_ps(CKV_VANISHES));
    _mm_storeu_ps(up + j, _mm_andnot_ps(vanishes, _mm_div_ps(_mm_set1_ps(range), x)));
    __m128 back = _mm_add_ps(_mm_mul_ps(x, _mm_set1_ps(1 / range)), _mm_sub_ps(x, x));
    _mm_storeu_ps(down + j, _mm_andnot_ps(vanishes, back));
  }
}

/* The sum of a row from those of its columns. */
CKV_INLINE vf v_joined(const __m512i *column, const uint32_t digits) {
  const vf low = _mm512_cvtepi32_ps(column[0]);
  return digits == 2 ? vf_fma(_mm512_cvtepi32_ps(column[1]), vf_set1(256), low) : low;
}
