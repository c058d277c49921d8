/* Conversion, encoding and decoding, written once for every vector level. A level's .c file includes its vocabulary
 * (lanes_avx512.h and so on) and then this. No operation here is fused: all levels give the bits of portable.c. */

CKV_INLINE void v_convert(void *dst, uint32_t dst_type, const void *src, uint32_t src_type, size_t n) {
  size_t from = ckv_size_of(src_type), to = ckv_size_of(dst_type);
  for (size_t i = 0; i < n; i += VN) {
    uint32_t k = n - i < VN ? (uint32_t)(n - i) : VN;
    vf_store_as_n((char *)dst + i * to, dst_type, vf_load_as_n((const char *)src + i * from, src_type, k), k);
  }
}

static void convert(void *dst, uint32_t dst_type, const void *src, uint32_t src_type, size_t n) {
  if (dst_type == src_type) memmove(dst, src, n * ckv_size_of(src_type));
  else if (dst_type == CKV_F32 && src_type == CKV_F16) v_convert(dst, CKV_F32, src, CKV_F16, n);
  else if (dst_type == CKV_F32) v_convert(dst, CKV_F32, src, CKV_BF16, n);
  else if (dst_type == CKV_F16 && src_type == CKV_F32) v_convert(dst, CKV_F16, src, CKV_F32, n);
  else if (dst_type == CKV_F16) v_convert(dst, CKV_F16, src, CKV_BF16, n);
  else if (src_type == CKV_F32) v_convert(dst, CKV_BF16, src, CKV_F32, n);
  else v_convert(dst, CKV_BF16, src, CKV_F16, n);
}

/* Zero times a finite number is zero, times anything else NaN: one test a block of vectors. */
CKV_INLINE int64_t v_first_nonfinite(const void *src, uint32_t type, size_t n) {
  const size_t block = 8 * VN, size = ckv_size_of(type);
  size_t i = 0;
  for (; i + block <= n; i += block) {
    vf bad = vf_zero();
    for (size_t k = 0; k < block; k += VN)
      bad = bad + vf_load_as((const char *)src + (i + k) * size, type) * vf_zero();
    float sum = vf_sum(bad);
    if (sum != sum) break;
  }
  for (; i < n; i++)
    if ((ckv_bits_of(ckv_load_scalar(src, type, i)) & 0x7f800000u) == 0x7f800000u) return (int64_t)i;
  return -1;
}

static int64_t first_nonfinite(const void *src, uint32_t type, size_t n) {
  if (type == CKV_F32) return v_first_nonfinite(src, CKV_F32, n);
  return type == CKV_F16 ? v_first_nonfinite(src, CKV_F16, n) : v_first_nonfinite(src, CKV_BF16, n);
}

/* ---- encoding ---------------------------------------------------------------------------------------------------- */

/* The code of each lane; see code_of in portable.c. */
CKV_INLINE vi v_code(vf x, vf s, vf mn, vf levels) {
  vf t = vf_min(vf_max((x - mn) / s, vf_zero()), levels);
  return vi_round(vf_zero_where_zero(s, t));
}

/* A group of `n` <= VN channels. */
CKV_INLINE void v_encode_strip(const char *src, uint32_t type, size_t row_bytes, uint32_t dim, uint32_t group,
                               uint32_t bits, uint32_t meta_type, uint32_t n, uint32_t *codes, void *scale,
                               void *min) {
  vf low = vf_load_as_n(src, type, n), high = low;
  for (uint32_t r = 1; r < group; r++) {
    vf x = vf_load_as_n(src + r * row_bytes, type, n);
    low = vf_min(x, low);
    high = vf_max(x, high);
  }
  vf levels = vf_set1(ckv_levels(bits));
  low = low + vf_zero();
  high = high + vf_zero();
  vf_store_as_n(scale, meta_type, (high - low) / levels, n);
  vf_store_as_n(min, meta_type, low, n);
  vf s = vf_load_as_n(scale, meta_type, n), mn = vf_load_as_n(min, meta_type, n);
  uint32_t plane = bits == 3 ? 2 : bits, per = 32 / plane;
  uint32_t *top = codes + (size_t)(group / 16) * dim; /* second plane of 3-bit codes */
  vi high_bits = vi_zero();
  for (uint32_t r = 0; r < group; r += per) {
    vi word = vi_zero();
    for (uint32_t i = 0; i < per; i++) {
      vi code = v_code(vf_load_as_n(src + (r + i) * row_bytes, type, n), s, mn, levels);
      if (bits == 3) {
        high_bits = vi_or(high_bits, vi_left(vi_right(code, 2), (r + i) % 32));
        code = vi_and(code, vi_set1(3));
      }
      word = vi_or(word, vi_left(code, i * plane));
    }
    vi_store_n(codes + (size_t)(r / per) * dim, word, n);
    if (bits == 3 && r % 32 == 16) {
      vi_store_n(top + (size_t)(r / 32) * dim, high_bits, n);
      high_bits = vi_zero();
    }
  }
}

CKV_INLINE void v_encode_channel(const void *src, uint32_t type, size_t stride, uint32_t rows, uint32_t dim,
                                 uint32_t group, uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale,
                                 void *min) {
  size_t size = ckv_size_of(type), meta = ckv_size_of(meta_type), words = ckv_group_words(group, bits);
  for (uint32_t g = 0; g < rows / group; g++) {
    const char *from = (const char *)src + (size_t)g * group * stride * size;
    uint32_t *to = codes + g * words * dim;
    char *s = (char *)scale + (size_t)g * dim * meta, *mn = (char *)min + (size_t)g * dim * meta;
    uint32_t c = 0;
    for (; c + VN <= dim; c += VN)
      v_encode_strip(from + c * size, type, stride * size, dim, group, bits, meta_type, VN, to + c, s + c * meta,
                     mn + c * meta);
    if (c < dim)
      v_encode_strip(from + c * size, type, stride * size, dim, group, bits, meta_type, dim - c, to + c, s + c * meta,
                     mn + c * meta);
  }
}

static void encode_channel(const void *src, uint32_t src_type, size_t src_stride, uint32_t rows, uint32_t dim,
                           uint32_t group, uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale,
                           void *min) {
#define CKV_FOR(type, bits)                                                                                          \
  v_encode_channel(src, type, src_stride, rows, dim, group, bits, meta_type, codes, scale, min)
#define CKV_FOR_BITS(type)                                                                                           \
  (bits == 2 ? CKV_FOR(type, 2) : bits == 3 ? CKV_FOR(type, 3) : bits == 4 ? CKV_FOR(type, 4) : CKV_FOR(type, 8))
  if (src_type == CKV_F32) CKV_FOR_BITS(CKV_F32);
  else if (src_type == CKV_F16) CKV_FOR_BITS(CKV_F16);
  else CKV_FOR_BITS(CKV_BF16);
#undef CKV_FOR
#undef CKV_FOR_BITS
}

/* One group of a row: `n` channels to scale, min and one byte a code. */
CKV_INLINE void v_encode_group(const char *src, uint32_t type, uint32_t n, uint32_t bits, uint32_t meta_type,
                               void *scale, void *min, size_t at, uint8_t *codes) {
  size_t size = ckv_size_of(type);
  uint32_t whole = n / VN * VN;
  float low = ckv_load_scalar(src, type, 0), high = low;
  if (whole) {
    vf lows = vf_load_as(src, type), highs = lows;
    for (uint32_t c = VN; c < whole; c += VN) {
      vf x = vf_load_as(src + c * size, type);
      lows = vf_min(x, lows);
      highs = vf_max(x, highs);
    }
    low = vf_lowest(lows);
    high = vf_highest(highs);
  }
  for (uint32_t c = whole; c < n; c++) {
    float x = ckv_load_scalar(src, type, c);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  low += 0.0f;
  high += 0.0f;
  ckv_store_scalar(scale, meta_type, at, (high - low) / ckv_levels(bits));
  ckv_store_scalar(min, meta_type, at, low);
  vf s = vf_set1(ckv_load_scalar(scale, meta_type, at)), mn = vf_set1(ckv_load_scalar(min, meta_type, at));
  vf levels = vf_set1(ckv_levels(bits));
  for (uint32_t c = 0; c < whole; c += VN)
    vi_store_bytes(codes + c, v_code(vf_load_as(src + c * size, type), s, mn, levels));
  if (whole < n) {
    uint8_t tail[VN];
    vi_store_bytes(tail, v_code(vf_load_as_n(src + whole * size, type, n - whole), s, mn, levels));
    memcpy(codes + whole, tail, n - whole);
  }
}

CKV_INLINE void v_encode_row(const void *src, uint32_t type, size_t stride, uint32_t rows, uint32_t dim,
                             uint32_t group, uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale,
                             void *min) {
  uint8_t bytes[4096 + 64];
  uint32_t groups = (dim + group - 1) / group, words = ckv_row_words(dim, bits);
  size_t size = ckv_size_of(type);
  for (uint32_t r = 0; r < rows; r++) {
    const char *from = (const char *)src + (size_t)r * stride * size;
    for (uint32_t g = 0; g < groups; g++)
      v_encode_group(from + (size_t)g * group * size, type, ckv_min_u32(group, dim - g * group), bits, meta_type,
                     scale, min, (size_t)r * groups + g, bytes + (size_t)g * group);
    memset(bytes + dim, 0, 32); /* what packing reads past the row */
    ckv_pack_row(bytes, dim, bits, codes + (size_t)r * words);
  }
}

static void encode_row(const void *src, uint32_t src_type, size_t src_stride, uint32_t rows, uint32_t dim,
                       uint32_t group, uint32_t bits, uint32_t meta_type, uint32_t *codes, void *scale, void *min) {
  if (src_type == CKV_F32)
    v_encode_row(src, CKV_F32, src_stride, rows, dim, group, bits, meta_type, codes, scale, min);
  else if (src_type == CKV_F16)
    v_encode_row(src, CKV_F16, src_stride, rows, dim, group, bits, meta_type, codes, scale, min);
  else
    v_encode_row(src, CKV_BF16, src_stride, rows, dim, group, bits, meta_type, codes, scale, min);
}

/* ---- decoding ---------------------------------------------------------------------------------------------------- */

/* Rows [first, first + count) of one group, `n` <= VN channels from `c`. */
CKV_INLINE void v_decode_strip(const ckv_run *run, uint32_t bits, uint32_t meta_type, uint32_t g, uint32_t c,
                               uint32_t n, uint32_t first, uint32_t count, float *out, size_t out_stride) {
  uint32_t dim = run->dim, plane = bits == 3 ? 2 : bits, per = 32 / plane;
  const uint32_t *words = ckv_group_codes(run, g) + c, *top = words + (size_t)(run->group / 16) * dim;
  vf s = vf_load_as_n(ckv_offset(run->scale, meta_type, (size_t)g * dim + c), meta_type, n);
  vf mn = vf_load_as_n(ckv_offset(run->min, meta_type, (size_t)g * dim + c), meta_type, n);
  vi mask = vi_set1((1u << plane) - 1);
  for (uint32_t i = 0; i < count; i++) {
    uint32_t r = first + i;
    vi code = vi_and(vi_right(vi_load_n(words + (size_t)(r / per) * dim, n), r % per * plane), mask);
    if (bits == 3) {
      vi high = vi_and(vi_right(vi_load_n(top + (size_t)(r / 32) * dim, n), r % 32), vi_set1(1));
      code = vi_or(code, vi_left(high, 2));
    }
    vf product = vf_from_vi(code) * s;
    vf_store_n(out + i * out_stride, product + mn, n);
  }
}

CKV_INLINE void v_decode_channel(const ckv_run *run, uint32_t bits, uint32_t meta_type, uint32_t first,
                                 uint32_t count, float *out, size_t out_stride) {
  while (count) {
    uint32_t g = first / run->group, start = first % run->group, n = ckv_min_u32(count, run->group - start), c = 0;
    for (; c + VN <= run->dim; c += VN) v_decode_strip(run, bits, meta_type, g, c, VN, start, n, out + c, out_stride);
    if (c < run->dim) v_decode_strip(run, bits, meta_type, g, c, run->dim - c, start, n, out + c, out_stride);
    first += n;
    count -= n;
    out += n * out_stride;
  }
}

/* The codes of channels c ..< c + VN of a plane of `words` words; c is a multiple of VN. Lanes past the last word
 * get anything. */
CKV_INLINE vi v_row_codes(const uint32_t *plane, uint32_t words, uint32_t bits, uint32_t c) {
  size_t byte = (size_t)c * bits / 8, have = (size_t)words * 4 - byte;
  const uint8_t *p = (const uint8_t *)plane + byte;
  if (bits == 8) {
    uint8_t t[VN] = {0};
    if (have >= VN) return vi_code_bytes(p);
    memcpy(t, p, have);
    return vi_code_bytes(t);
  }
  const size_t want = VN * bits / 8;
  uint64_t packed = 0;
  if (want == 0) packed = (uint64_t)(*p >> (c * bits % 8)); /* four one-bit codes */
  else if (have >= want) memcpy(&packed, p, want);
  else memcpy(&packed, p, have);
  return vi_codes(packed, bits);
}

CKV_INLINE void v_decode_row(const ckv_run *run, uint32_t bits, uint32_t first, uint32_t count, float *out,
                             size_t out_stride) {
  uint32_t dim = run->dim, group = run->group, groups = (dim + group - 1) / group, type = run->dtype;
  uint32_t words = ckv_row_words(dim, bits), low_words = bits == 3 ? ckv_plane_words(dim, 2) : words;
  for (uint32_t i = 0; i < count; i++) {
    const uint32_t *row = (const uint32_t *)run->data + (size_t)(first + i) * words;
    const void *scales = ckv_offset(run->scale, type, (size_t)(first + i) * groups);
    const void *mins = ckv_offset(run->min, type, (size_t)(first + i) * groups);
    float *to = out + i * out_stride;
    vf s = vf_zero(), mn = vf_zero(); /* of the group that ends before channel `group_end`, unless lanes differ */
    for (uint32_t c = 0, group_end = 0; c < dim; c += VN) {
      vi code = v_row_codes(row, low_words, bits == 3 ? 2 : bits, c);
      if (bits == 3) code = vi_or(code, vi_left(v_row_codes(row + low_words, words - low_words, 1, c), 2));
      uint32_t n = ckv_min_u32(VN, dim - c);
      if (c + n > group_end) {
        uint32_t g = c / group;
        if (c + n <= (g + 1) * group) {
          group_end = (g + 1) * group;
          s = vf_set1_as(ckv_offset(scales, type, g), type);
          mn = vf_set1_as(ckv_offset(mins, type, g), type);
        } else {
          float lane_scales[VN] = {0}, lane_mins[VN] = {0};
          for (uint32_t k = 0; k < n; k++) {
            lane_scales[k] = ckv_load_scalar(scales, type, (c + k) / group);
            lane_mins[k] = ckv_load_scalar(mins, type, (c + k) / group);
          }
          s = vf_load(lane_scales);
          mn = vf_load(lane_mins);
          group_end = 0;
        }
      }
      vf product = vf_from_vi(code) * s;
      if (n == VN) vf_store(to + c, product + mn);
      else vf_store_n(to + c, product + mn, n);
    }
  }
}

static void decode(const ckv_run *run, uint32_t first, uint32_t count, float *out, size_t out_stride) {
  uint32_t bits = run->bits, type = run->dtype;
  if (run->kind >= CKV_SCALED_ROW && run->kind <= CKV_GGML) {
    decode_blocks(run, first, count, out, out_stride);
  } else if (run->kind == CKV_DENSE) {
    for (uint32_t i = 0; i < count; i++) {
      const void *row = ckv_offset(run->data, type, (size_t)((int64_t)(first + i) * run->row_stride));
      convert(out + i * out_stride, CKV_F32, row, type, run->dim);
    }
  } else if (run->kind == CKV_AFFINE_CHANNEL) {
#define CKV_FOR(bits)                                                                                                \
  (type == CKV_F16 ? v_decode_channel(run, bits, CKV_F16, first, count, out, out_stride)                             \
                   : v_decode_channel(run, bits, type, first, count, out, out_stride))
    bits == 2 ? CKV_FOR(2) : bits == 3 ? CKV_FOR(3) : bits == 4 ? CKV_FOR(4) : CKV_FOR(8);
#undef CKV_FOR
  } else {
    if (bits == 2) v_decode_row(run, 2, first, count, out, out_stride);
    else if (bits == 3) v_decode_row(run, 3, first, count, out, out_stride);
    else if (bits == 4) v_decode_row(run, 4, first, count, out, out_stride);
    else v_decode_row(run, 8, first, count, out, out_stride);
  }
}
