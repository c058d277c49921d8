/* 16-bit fixed point as two signed digits of base 256, part of the files that multiply with VNNI. */

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

/* Adds up digits as v_digits puts them: (low, high) of a and of b in every 128 bits. */
CKV_INLINE __m512i v_add_digits(__m512i sum, __m512i digits) {
  return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), digits);
}

/* The sums of a and b. */
CKV_INLINE void v_digit_totals(__m512i sum, float to[2]) {
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  __m128i total = _mm_add_epi32(x, _mm_slli_epi32(_mm_srli_epi64(x, 32), 8));
  int32_t all[4];
  _mm_storeu_si128((__m128i *)all, total);
  to[0] = (float)all[0];
  to[1] = (float)all[2];
}
