// Moving rows: in from an engine's tensors, between encodings, out to f32.
#include "device.cuh"

// The first NaN or infinite element in head, token, channel order; `place` starts at ~0.
KV_KERNEL kv_nonfinite(kv_view view, unsigned long long *place) {
  KV_GRID(i, (uint64_t)view.heads * view.tokens * view.dim) {
    const uint64_t c = i % view.dim, t = i / view.dim % view.tokens, h = i / view.dim / view.tokens;
    if (!kv_finite(kv_load((const void *)view.base, view.type, h * view.head_stride + t * view.token_stride + c)))
      atomicMin(place, (unsigned long long)i);
  }
}

// Converts rows of two views into dense rows. `place` gets the least (write index, element) that is not finite, and the
// least one that its range does not hold.
KV_KERNEL kv_write_rows(const kv_write *writes, kv_view first, kv_view second, unsigned long long *place) {
  const kv_write write = writes[blockIdx.y];
  const kv_slice s = write.slice;
  const kv_view &view = write.view ? second : first;
  KV_GRID(i, (uint64_t)s.count * s.dim) {
    const uint64_t t = i / s.dim, c = i % s.dim;
    const float x = kv_load((const void *)view.base, view.type,
                            write.head * view.head_stride + (write.token + t) * view.token_stride + c);
    const uint64_t at = (s.first + t) * s.dim + c;
    kv_store((void *)s.data, s.dtype, at, x);
    const float held = kv_load((const void *)s.data, s.dtype, at);
    bool fits = kv_finite(held);
    if (write.range == 1) fits = fits && kv_finite(kv_half(kv_to_half(x)));
    if (write.range == 2) fits = fits && fabsf(held) <= write.limit;
    if (!fits) atomicMin(place + (kv_finite(x) ? 1 : 0), (unsigned long long)blockIdx.y << 40 | i);
  }
}

// Rows of a list of slices as f32, as they are encoded: before their map is undone.
KV_KERNEL kv_read_rows(const kv_slice *slices, uint32_t count, uint32_t rows, float *out, uint64_t stride) {
  const uint32_t dim = slices[0].dim;
  KV_GRID(i, (uint64_t)rows * dim) {
    const uint32_t r = (uint32_t)(i / dim), c = (uint32_t)(i % dim);
    out[r * stride + c] = kv_source(slices, count, r, c);
  }
}

// Rows of f32 behind a map, or back from behind it: one block a row. `numbers` 0 leaves factor and offset out.
KV_KERNEL kv_map_rows(float *rows, uint64_t stride, kv_map map, uint32_t back, uint32_t numbers) {
  KV_SHARED float row[KV_MOST_CHANNELS], moved[KV_MOST_CHANNELS];
  float *target = rows + blockIdx.x * stride;
  const bool scaled = numbers && map.factor, shifted = numbers && map.offset;
  if (back) {
    KV_EACH(c, map.dim) {
      float x = target[c];
      if (scaled) x = kv_mul(x, kv_load((const void *)map.factor, map.dtype, c));
      if (shifted) x = kv_add(x, kv_load((const void *)map.offset, map.dtype, c));
      row[c] = x;
    }
    __syncthreads();
    kv_rotate_back(map, row, moved);
    KV_EACH(c, map.dim) target[c] = row[c];
    return;
  }
  KV_EACH(c, map.dim) row[c] = target[c];
  kv_rotate(map, row, moved);
  KV_EACH(c, map.dim) {
    float x = row[c];
    if (shifted) x = kv_add(x, -kv_load((const void *)map.offset, map.dtype, c));
    if (scaled) {
      const float factor = kv_load((const void *)map.factor, map.dtype, c);
      x = factor == 0 ? 0 : kv_div(x, factor);
    }
    target[c] = x;
  }
}

// Copies units of rows as they are, codes and numbers: a unit is a row, or the rows of a group. `payload`, `scale` and
// `min` are bytes of a unit, `rows` its rows, `width` the bytes moved at a time. One warp a unit.
KV_DEVICE void kv_copy_bytes(uint64_t to, uint64_t from, uint32_t bytes, uint32_t width) {
  const uint32_t lane = threadIdx.x % 32;
  if (width == 16) {
    for (uint32_t i = lane; i < bytes / 16; i += 32) ((uint4 *)to)[i] = ((const uint4 *)from)[i];
  } else if (width == 4) {
    for (uint32_t i = lane; i < bytes / 4; i += 32) ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
  } else {
    for (uint32_t i = lane; i < bytes; i += 32) ((uint8_t *)to)[i] = ((const uint8_t *)from)[i];
  }
}

KV_KERNEL kv_gather(const kv_slice *slices, uint32_t count, kv_slice to, uint32_t rows, uint32_t payload, uint32_t scale,
                    uint32_t min, uint32_t width) {
  const uint32_t units = to.count / rows, warps = gridDim.x * (KV_THREADS / 32);
  for (uint32_t u = blockIdx.x * (KV_THREADS / 32) + threadIdx.x / 32; u < units; u += warps) {
    const kv_slice &s = kv_slice_of(slices, count, u * rows);
    const uint64_t from = (s.first + u * rows - s.start) / rows, target = to.first / rows + u;
    kv_copy_bytes(to.data + target * payload, s.data + from * payload, payload, width);
    kv_copy_bytes(to.scale + target * scale, s.scale + from * scale, scale, scale % 4 ? 1 : 4);
    kv_copy_bytes(to.min + target * min, s.min + from * min, min, min % 4 ? 1 : 4);
  }
}

// ---- encoding -------------------------------------------------------------------------------------------------------

// Scale and minimum as they are stored, and as decoding will read them.
KV_DEVICE void kv_affine(const kv_slice &to, float low, float high, uint64_t at, float *scale, float *min) {
  low = kv_add(low, 0.0f);
  high = kv_add(high, 0.0f);
  kv_store((void *)to.scale, to.dtype, at, kv_div(kv_add(high, -low), (float)((1u << to.bits) - 1)));
  kv_store((void *)to.min, to.dtype, at, low);
  *scale = kv_load((const void *)to.scale, to.dtype, at);
  *min = kv_load((const void *)to.min, to.dtype, at);
}

KV_DEVICE uint32_t kv_code_of(float x, float scale, float min, float levels) {
  if (scale == 0) return 0;
  float t = kv_div(kv_add(x, -min), scale);
  t = t > 0 ? t : 0;
  t = t < levels ? t : levels;
  return (uint32_t)kv_round(t);
}

// The nearest integer, ties to even and no negative zero, of any finite value, and a value within what a type holds.
KV_DEVICE float kv_nearest_integer(float x) { return fabsf(x) >= 16777216.0f ? x : kv_add(kv_round(x), 0.0f); }
KV_DEVICE float kv_saturated(float x, uint32_t type) {
  const float most = type == KV_F16 ? 65504.0f : kv_float(type == KV_BF16 ? 0x7f7f0000u : 0x7f7fffffu);
  return x > most ? most : x < -most ? -most : x;
}

// Codes around a zero point that is one of them, as `ZeroPoint.clamped`: the code of such rows' encoding.
enum { KV_CLAMPED = 201 };

KV_DEVICE float kv_clamped_zero(float low, float scale, float levels) {
  float zero = scale > 0 ? kv_nearest_integer(kv_div(-low, scale)) : 0;
  zero = zero > 0 ? zero : 0;
  return zero < levels ? zero : levels;
}

KV_DEVICE void kv_clamped(const kv_slice &to, float low, float high, uint64_t at, float *scale, float *zero) {
  const float levels = (float)((1u << to.bits) - 1), range = kv_add(high, -low);
  kv_store((void *)to.scale, to.dtype, at, kv_saturated(kv_div(range > 1e-5f ? range : 1e-5f, levels), to.dtype));
  *scale = kv_load((const void *)to.scale, to.dtype, at);
  *zero = kv_clamped_zero(low, *scale, levels);
  kv_store((void *)to.min, to.dtype, at, kv_saturated(kv_add(kv_mul(-*scale, *zero), 0.0f), to.dtype));
}

KV_DEVICE uint32_t kv_clamped_code(float x, float scale, float zero, float levels) {
  float code = scale > 0 ? kv_add(kv_nearest_integer(kv_div(x, scale)), zero) : zero;
  code = code > 0 ? code : 0;
  return (uint32_t)(code < levels ? code : levels);
}

// `origin`: the least value, or the zero point of clamped codes.
KV_DEVICE uint32_t kv_channel_code(const kv_slice &to, float x, float scale, float origin, float levels) {
  return to.code == KV_CLAMPED ? kv_clamped_code(x, scale, origin, levels) : kv_code_of(x, scale, origin, levels);
}

// Writes the rows of `slices` as dense elements from row `to.first` on.
KV_KERNEL kv_to_dense(const kv_slice *slices, uint32_t count, kv_slice to) {
  KV_GRID(i, (uint64_t)to.count * to.dim) {
    const float x = kv_source(slices, count, (uint32_t)(i / to.dim), (uint32_t)(i % to.dim));
    kv_store_within((void *)to.data, to.dtype, (uint64_t)to.first * to.dim + i, x);
  }
}

// One thread a channel of a group: minimum and maximum over its tokens, then its words.
KV_KERNEL kv_to_channel(const kv_slice *slices, uint32_t count, kv_slice to) {
  const uint32_t words = kv_group_words(to.group, to.bits), plane = to.bits == 3 ? 2 : to.bits, per = 32 / plane;
  KV_GRID(i, (uint64_t)(to.count / to.group) * to.dim) {
    const uint32_t g = (uint32_t)(i / to.dim), c = (uint32_t)(i % to.dim);
    float low = kv_source(slices, count, g * to.group, c), high = low, scale, origin;
    for (uint32_t r = 1; r < to.group; r++) {
      const float x = kv_source(slices, count, g * to.group + r, c);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    const uint64_t group = to.first / to.group + g;
    if (to.code == KV_CLAMPED)
      kv_clamped(to, low, high, group * to.dim + c, &scale, &origin);
    else
      kv_affine(to, low, high, group * to.dim + c, &scale, &origin);
    uint32_t *target = (uint32_t *)to.data + group * words * to.dim + c;
    const float levels = (float)((1u << to.bits) - 1);
    for (uint32_t w = 0; w < to.group / per; w++) {
      uint32_t word = 0;
      for (uint32_t k = 0; k < per; k++) {
        const float x = kv_source(slices, count, g * to.group + w * per + k, c);
        const uint32_t code = kv_channel_code(to, x, scale, origin, levels);
        word |= (code & ((1u << plane) - 1)) << (k * plane);
      }
      target[(uint64_t)w * to.dim] = word;
    }
    if (to.bits != 3) continue;
    for (uint32_t w = 0; w < to.group / 32; w++) {
      uint32_t word = 0;
      for (uint32_t k = 0; k < 32; k++) {
        const float x = kv_source(slices, count, g * to.group + w * 32 + k, c);
        word |= kv_channel_code(to, x, scale, origin, levels) >> 2 << k;
      }
      target[(uint64_t)(to.group / 16 + w) * to.dim] = word;
    }
  }
}

// One warp a row: minimum and maximum of each group over its lanes, then whole words, so that no two lanes share one.
KV_KERNEL kv_to_row(const kv_slice *slices, uint32_t count, kv_slice to) {
  const uint32_t words = kv_row_words(to.dim, to.bits), groups = (to.dim + to.group - 1) / to.group;
  const uint32_t plane = to.bits == 3 ? 2 : to.bits, per = 32 / plane, low_words = kv_plane_words(to.dim, plane);
  const uint32_t lane = threadIdx.x % 32, warps = gridDim.x * (KV_THREADS / 32);
  const float levels = (float)((1u << to.bits) - 1);
  for (uint32_t r = blockIdx.x * (KV_THREADS / 32) + threadIdx.x / 32; r < to.count; r += warps) {
    const kv_slice &s = kv_slice_of(slices, count, r);
    const uint32_t row = s.first + r - s.start;
    const uint64_t meta = (uint64_t)(to.first + r) * groups;
    for (uint32_t g = 0; g < groups; g++) {
      const uint32_t begin = g * to.group, end = begin + to.group < to.dim ? begin + to.group : to.dim;
      float low = KV_INFINITY, high = -KV_INFINITY, scale, min;
      for (uint32_t c = begin + lane; c < end; c += 32) {
        const float x = kv_element(s, row, c);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      low = -kv_warp_max(-low);
      high = kv_warp_max(high);
      if (lane == 0) kv_affine(to, low, high, meta + g, &scale, &min);
    }
    __syncwarp();
    uint32_t *target = (uint32_t *)to.data + (uint64_t)(to.first + r) * words;
    for (uint32_t w = lane; w < words; w += 32) {
      const bool top = w >= low_words;
      const uint32_t first = top ? (w - low_words) * 32 : w * per, codes = top ? 32 : per;
      uint32_t word = 0;
      for (uint32_t k = 0; k < codes && first + k < to.dim; k++) {
        const uint32_t c = first + k;
        const float scale = kv_load((const void *)to.scale, to.dtype, meta + c / to.group);
        const float min = kv_load((const void *)to.min, to.dtype, meta + c / to.group);
        const uint32_t code = kv_code_of(kv_element(s, row, c), scale, min, levels);
        word |= top ? code >> 2 << k : (code & ((1u << plane) - 1)) << (k * plane);
      }
      target[w] = word;
    }
  }
}

// Rows around integer zero points: one thread a group of a row, then one thread a word.
KV_KERNEL kv_to_zero_numbers(const kv_slice *slices, uint32_t count, kv_slice to, float clip, float steps) {
  const uint32_t groups = (to.dim + to.group - 1) / to.group;
  KV_GRID(i, (uint64_t)to.count * groups) {
    const uint32_t r = (uint32_t)(i / groups), begin = (uint32_t)(i % groups) * to.group;
    const uint32_t end = begin + to.group < to.dim ? begin + to.group : to.dim;
    const kv_slice &s = kv_slice_of(slices, count, r);
    float low = kv_element(s, s.first + r - s.start, begin), high = low;
    for (uint32_t c = begin + 1; c < end; c++) {
      const float x = kv_element(s, s.first + r - s.start, c);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    low = kv_add(low, 0.0f);
    high = kv_add(high, 0.0f);
    const uint64_t at = (uint64_t)to.first * groups + i;
    if (to.code == KV_CLAMPED) {
      float scale, zero;
      kv_clamped(to, low, high, at, &scale, &zero);
      continue;
    }
    const float wanted = kv_div(kv_add(kv_mul(high, clip), -kv_mul(low, clip)), steps);
    kv_store((void *)to.scale, to.dtype, at, kv_saturated(wanted, to.dtype));
    const float scale = kv_load((const void *)to.scale, to.dtype, at);
    // Equal values, or values closer than the type can tell: the least one stands for all.
    const float zero = scale == 0 ? 0 : kv_nearest_integer(kv_div(kv_mul(-low, clip), scale));
    kv_store((void *)to.min, to.dtype, at, kv_saturated(scale == 0 ? low : kv_mul(-scale, zero), to.dtype));
  }
}

KV_KERNEL kv_to_zero_row(const kv_slice *slices, uint32_t count, kv_slice to, float clip) {
  const uint32_t words = kv_row_words(to.dim, to.bits), groups = (to.dim + to.group - 1) / to.group;
  const uint32_t plane = to.bits == 3 ? 2 : to.bits, per = 32 / plane, low_words = kv_plane_words(to.dim, plane);
  const float levels = (float)((1u << to.bits) - 1);
  KV_GRID(i, (uint64_t)to.count * words) {
    const uint32_t r = (uint32_t)(i / words), w = (uint32_t)(i % words);
    const bool top = w >= low_words;
    const uint32_t first = top ? (w - low_words) * 32 : w * per, codes = top ? 32 : per;
    const kv_slice &s = kv_slice_of(slices, count, r);
    const uint32_t row = s.first + r - s.start;
    uint32_t word = 0, group = ~0u;
    float scale = 0, zero = 0;
    for (uint32_t k = 0; k < codes && first + k < to.dim; k++) {
      const uint32_t c = first + k;
      if (c / to.group != group) {
        // The zero point again, from the least value: what is stored is its product with the scale.
        group = c / to.group;
        const uint32_t begin = group * to.group, end = begin + to.group < to.dim ? begin + to.group : to.dim;
        float low = kv_element(s, row, begin);
        for (uint32_t i = begin + 1; i < end; i++) {
          const float x = kv_element(s, row, i);
          low = x < low ? x : low;
        }
        scale = kv_load((const void *)to.scale, to.dtype, (uint64_t)(to.first + r) * groups + group);
        if (to.code == KV_CLAMPED)
          zero = kv_clamped_zero(low, scale, levels);
        else
          zero = scale == 0 ? 0 : kv_nearest_integer(kv_div(kv_mul(-kv_add(low, 0.0f), clip), scale));
      }
      // Without a scale all codes are 0; zero points that are codes are 0 then, too.
      const uint32_t held = kv_clamped_code(kv_element(s, row, c), scale, zero, levels);
      word |= top ? held >> 2 << k : (held & ((1u << plane) - 1)) << (k * plane);
    }
    ((uint32_t *)to.data)[(uint64_t)to.first * words + i] = word;
  }
}

// Rows that were divided already to their codes alone: one thread a word.
KV_KERNEL kv_to_codes(const kv_slice *slices, uint32_t count, kv_slice to) {
  const uint32_t words = kv_row_words(to.dim, to.bits), plane = to.bits == 3 ? 2 : to.bits, per = 32 / plane;
  const uint32_t low_words = kv_plane_words(to.dim, plane);
  const float levels = (float)((1u << to.bits) - 1);
  KV_GRID(i, (uint64_t)to.count * words) {
    const uint32_t r = (uint32_t)(i / words), w = (uint32_t)(i % words);
    const bool top = w >= low_words;
    const uint32_t first = top ? (w - low_words) * 32 : w * per, codes = top ? 32 : per;
    uint32_t word = 0;
    for (uint32_t k = 0; k < codes && first + k < to.dim; k++) {
      const uint32_t code = kv_code_of(kv_source(slices, count, r, first + k), 1, 0, levels);
      word |= top ? code >> 2 << k : (code & ((1u << plane) - 1)) << (k * plane);
    }
    ((uint32_t *)to.data)[(uint64_t)to.first * words + i] = word;
  }
}

// Channels begin ..< end of a row to codes; a warp. `begin` is even.
KV_DEVICE void kv_encode_span(const kv_slice &s, uint32_t row, const kv_slice &to, uint32_t target, uint32_t begin,
                              uint32_t end, float scale) {
  uint8_t *bytes = (uint8_t *)to.data + (uint64_t)target * kv_row_bytes(to.code, to.dim);
  if (to.code == KV_INT4) {
    for (uint32_t b = begin / 2 + threadIdx.x % 32; b < (end + 1) / 2; b += 32) {
      const uint32_t low = kv_to_scaled(kv_element(s, row, 2 * b), scale, KV_INT4);
      // The nibble without a channel stands for 0 too.
      const uint32_t high = 2 * b + 1 < end ? kv_to_scaled(kv_element(s, row, 2 * b + 1), scale, KV_INT4) : 8;
      bytes[b] = (uint8_t)(low | high << 4);
    }
    return;
  }
  for (uint32_t c = begin + threadIdx.x % 32; c < end; c += 32)
    bytes[c] = (uint8_t)kv_to_scaled(kv_element(s, row, c), scale, to.code);
}

// One warp a row, or the rows that share a scale.
KV_KERNEL kv_to_scaled_rows(const kv_slice *slices, uint32_t count, kv_slice to) {
  const uint32_t unit = to.kind == KV_SCALED_BLOCK ? to.group : 1, lane = threadIdx.x % 32;
  const uint32_t span = to.kind == KV_SCALED_ROW ? to.group : to.dim, groups = (to.dim + span - 1) / span;
  const uint32_t warps = gridDim.x * (KV_THREADS / 32);
  for (uint32_t u = blockIdx.x * (KV_THREADS / 32) + threadIdx.x / 32; u < to.count / unit; u += warps)
    for (uint32_t g = 0; g < groups; g++) {
      const uint32_t begin = g * span, end = begin + span < to.dim ? begin + span : to.dim;
      float scale = to.factor;
      if (to.kind != KV_SCALED_FIXED) {
        float most = 0;
        for (uint32_t r = u * unit; r < (u + 1) * unit; r++)
          for (uint32_t c = begin + lane; c < end; c += 32) most = fmaxf(most, fabsf(kv_source(slices, count, r, c)));
        most = kv_warp_max(most);
        const uint64_t at = to.kind == KV_SCALED_BLOCK ? to.first / unit + u : (uint64_t)(to.first + u) * groups + g;
        if (lane == 0) kv_store((void *)to.scale, to.dtype, at, kv_div(most, kv_scaled_most(to.code)));
        __syncwarp();
        scale = kv_load((const void *)to.scale, to.dtype, at);
      }
      for (uint32_t r = u * unit; r < (u + 1) * unit; r++) {
        const kv_slice &s = kv_slice_of(slices, count, r);
        kv_encode_span(s, s.first + r - s.start, to, to.first + r, begin, end, scale);
      }
    }
}

// One thread a block of 32 channels.
KV_KERNEL kv_to_blocks(const kv_slice *slices, uint32_t count, kv_slice to) {
  const uint32_t blocks = to.dim / 32, bytes = kv_block_bytes(to.code);
  KV_GRID(i, (uint64_t)to.count * blocks) {
    const uint32_t r = (uint32_t)(i / blocks), b = (uint32_t)(i % blocks);
    const kv_slice &s = kv_slice_of(slices, count, r);
    float x[32];
    for (uint32_t c = 0; c < 32; c++) x[c] = kv_element(s, s.first + r - s.start, 32 * b + c);
    kv_encode_block(x, to.code, (uint8_t *)to.data + ((uint64_t)to.first * blocks + i) * bytes);
  }
}
