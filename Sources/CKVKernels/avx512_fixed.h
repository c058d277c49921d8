/* 16-bit fixed point as two signed digits of base 256, part of the files that multiply with VNNI. */

/* The largest magnitude of two signed digits, less what a carry needs. */
static const float v_full_range = 32639.0f;

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
