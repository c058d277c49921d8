// Moving rows: in from an engine's tensors, between encodings, out to f32.
#include "device.cuh"

// The first NaN or infinite element in head, token, channel order; `place` starts at ~0.
KV_KERNEL kv_nonfinite(kv_view view, unsigned long long *place) {
  const uint64_t count = (uint64_t)view.heads * view.tokens * view.dim;
  for (uint64_t i = (uint64_t)blockIdx.x * KV_THREADS + threadIdx.x; i < count; i += (uint64_t)gridDim.x * KV_THREADS) {
    const uint64_t c = i % view.dim, t = i / view.dim % view.tokens, h = i / view.dim / view.tokens;
    if (!kv_finite(kv_load((const void *)view.base, view.type, h * view.head_stride + t * view.token_stride + c)))
      atomicMin(place, (unsigned long long)i);
  }
}

// Converts rows of a view into dense rows. `place` gets the least (write index, element) that its range does not hold.
KV_KERNEL kv_write_rows(const kv_write *writes, kv_view view, unsigned long long *place) {
  const kv_write write = writes[blockIdx.y];
  const kv_slice s = write.slice;
  const uint64_t count = (uint64_t)s.count * s.dim;
  for (uint64_t i = (uint64_t)blockIdx.x * KV_THREADS + threadIdx.x; i < count; i += (uint64_t)gridDim.x * KV_THREADS) {
    const uint64_t t = i / s.dim, c = i % s.dim;
    const float x = kv_load((const void *)view.base, view.type,
                            write.head * view.head_stride + (write.token + t) * view.token_stride + c);
    kv_store((void *)s.data, s.dtype, (s.first + t) * s.dim + c, x);
    bool fits = kv_finite(s.dtype == KV_F16 ? kv_half(kv_to_half(x)) : s.dtype == KV_BF16 ? kv_float((uint32_t)kv_to_bfloat(x) << 16) : x);
    if (write.range == 1) fits = fits && kv_finite(kv_half(kv_to_half(x)));
    if (write.range == 2) fits = fits && fabsf(x) <= 1.7014117e38f;
    if (!fits) atomicMin(place, (unsigned long long)blockIdx.y << 40 | i);
  }
}

// Rows of a list of slices as f32.
KV_KERNEL kv_read_rows(const kv_slice *slices, uint32_t count, uint32_t rows, float *out, uint64_t stride) {
  const uint32_t dim = slices[0].dim;
  const uint64_t total = (uint64_t)rows * dim;
  for (uint64_t i = (uint64_t)blockIdx.x * KV_THREADS + threadIdx.x; i < total; i += (uint64_t)gridDim.x * KV_THREADS) {
    const uint32_t r = (uint32_t)(i / dim), c = (uint32_t)(i % dim);
    const kv_slice &s = kv_slice_of(slices, count, r);
    out[r * stride + c] = kv_element(s, s.first + r - s.start, c);
  }
}

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

KV_DEVICE float kv_source(const kv_slice *slices, uint32_t count, uint32_t r, uint32_t c) {
  const kv_slice &s = kv_slice_of(slices, count, r);
  return kv_element(s, s.first + r - s.start, c);
}

// Writes the rows of `slices` as dense elements from row `to.first` on. A decoded code can exceed the value it was made
// from by half a step: near the end of the f16 range that would be infinity.
KV_KERNEL kv_to_dense(const kv_slice *slices, uint32_t count, kv_slice to) {
  const uint64_t total = (uint64_t)to.count * to.dim;
  for (uint64_t i = (uint64_t)blockIdx.x * KV_THREADS + threadIdx.x; i < total; i += (uint64_t)gridDim.x * KV_THREADS) {
    float x = kv_source(slices, count, (uint32_t)(i / to.dim), (uint32_t)(i % to.dim));
    if (to.dtype == KV_F16) x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    kv_store((void *)to.data, to.dtype, (uint64_t)to.first * to.dim + i, x);
  }
}

// One thread a channel of a group: minimum and maximum over its tokens, then its words.
KV_KERNEL kv_to_channel(const kv_slice *slices, uint32_t count, kv_slice to) {
  const uint64_t total = (uint64_t)(to.count / to.group) * to.dim;
  const uint32_t words = kv_group_words(to.group, to.bits), plane = to.bits == 3 ? 2 : to.bits, per = 32 / plane;
  for (uint64_t i = (uint64_t)blockIdx.x * KV_THREADS + threadIdx.x; i < total; i += (uint64_t)gridDim.x * KV_THREADS) {
    const uint32_t g = (uint32_t)(i / to.dim), c = (uint32_t)(i % to.dim);
    float low = kv_source(slices, count, g * to.group, c), high = low, scale, min;
    for (uint32_t r = 1; r < to.group; r++) {
      const float x = kv_source(slices, count, g * to.group + r, c);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    const uint64_t group = to.first / to.group + g;
    kv_affine(to, low, high, group * to.dim + c, &scale, &min);
    uint32_t *target = (uint32_t *)to.data + group * words * to.dim + c;
    const float levels = (float)((1u << to.bits) - 1);
    for (uint32_t w = 0; w < to.group / per; w++) {
      uint32_t word = 0;
      for (uint32_t k = 0; k < per; k++) {
        const uint32_t code = kv_code_of(kv_source(slices, count, g * to.group + w * per + k, c), scale, min, levels);
        word |= (code & ((1u << plane) - 1)) << (k * plane);
      }
      target[(uint64_t)w * to.dim] = word;
    }
    if (to.bits != 3) continue;
    for (uint32_t w = 0; w < to.group / 32; w++) {
      uint32_t word = 0;
      for (uint32_t k = 0; k < 32; k++)
        word |= kv_code_of(kv_source(slices, count, g * to.group + w * 32 + k, c), scale, min, levels) >> 2 << k;
      target[(uint64_t)(to.group / 16 + w) * to.dim] = word;
    }
  }
}

// One thread a row: its groups one after the other, so that no two threads share a word.
KV_KERNEL kv_to_row(const kv_slice *slices, uint32_t count, kv_slice to) {
  const uint32_t words = kv_row_words(to.dim, to.bits), groups = (to.dim + to.group - 1) / to.group;
  const uint32_t plane = to.bits == 3 ? 2 : to.bits, per = 32 / plane, high_words = kv_plane_words(to.dim, 2);
  const float levels = (float)((1u << to.bits) - 1);
  for (uint32_t r = blockIdx.x * KV_THREADS + threadIdx.x; r < to.count; r += gridDim.x * KV_THREADS) {
    uint32_t *target = (uint32_t *)to.data + (uint64_t)(to.first + r) * words;
    for (uint32_t w = 0; w < words; w++) target[w] = 0;
    for (uint32_t g = 0; g < groups; g++) {
      const uint32_t begin = g * to.group, end = begin + to.group < to.dim ? begin + to.group : to.dim;
      float low = kv_source(slices, count, r, begin), high = low, scale, min;
      for (uint32_t c = begin + 1; c < end; c++) {
        const float x = kv_source(slices, count, r, c);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      kv_affine(to, low, high, (uint64_t)(to.first + r) * groups + g, &scale, &min);
      for (uint32_t c = begin; c < end; c++) {
        const uint32_t code = kv_code_of(kv_source(slices, count, r, c), scale, min, levels);
        target[c / per] |= (code & ((1u << plane) - 1)) << (c % per * plane);
        if (to.bits == 3) target[high_words + c / 32] |= code >> 2 << (c % 32);
      }
    }
  }
}

// Queries of a view as f32 [KV head][token][group][dim].
KV_KERNEL kv_load_queries(kv_view view, uint32_t group, float *out) {
  const uint64_t total = (uint64_t)view.heads * view.tokens * view.dim;
  for (uint64_t i = (uint64_t)blockIdx.x * KV_THREADS + threadIdx.x; i < total; i += (uint64_t)gridDim.x * KV_THREADS) {
    const uint64_t c = i % view.dim, member = i / view.dim % group, t = i / view.dim / group % view.tokens;
    const uint64_t h = i / view.dim / group / view.tokens * group + member;
    out[i] = kv_load((const void *)view.base, view.type, h * view.head_stride + t * view.token_stride + c);
  }
}
