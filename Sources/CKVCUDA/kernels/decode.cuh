// Attention of few queries over dense 16-bit rows, and over affine codes with groups of tokens (keys) and of channels
// (values): the shapes that decoding mostly has, on tensor cores. Same pieces and partials as kv_attend.
//
// A warp takes 16 rows at a time and works alone until the end of the piece. Keys and values go from memory to registers,
// once for all query heads of the group (up to 8), and from there to mma.m16n8k16:
//
//   logits = queries (M) x keys (N):    M row g is the first part of query g, row g + 8 the second
//   output = weights (M) x values (N):  likewise
//
// Queries and weights are f32: each is the sum of two f16 parts (22 bits), or of three bf16 parts (24 bits), which are
// rows of M and cost nothing. Keys and values are what is stored, elements or codes, and sums are f32, so nothing is lost
// to 16 bits. Powers of two keep the parts in the middle of what f16 holds.
// In a fragment lane 4g + t holds row g and columns 2t, 2t + 1. Channels are permuted so that what a lane loads is what it
// needs: lane t of a row of keys has channels 8t ... 8t + 7 of every 32.
#pragma once

template <bool bfloat> KV_DEVICE uint16_t kv_narrow(float x) { return bfloat ? kv_to_bfloat(x) : kv_to_half(x); }
template <bool bfloat> KV_DEVICE float kv_widen(uint16_t x) { return bfloat ? kv_float((uint32_t)x << 16) : kv_half(x); }

// The parts of two numbers: first, second, third (bf16 only).
template <bool bfloat> KV_DEVICE void kv_split(float x, float y, uint32_t *parts) {
  for (uint32_t i = 0; i < (bfloat ? 3 : 2); i++) {
    const uint16_t a = kv_narrow<bfloat>(x), b = kv_narrow<bfloat>(y);
    parts[i] = a | (uint32_t)b << 16;
    x -= kv_widen<bfloat>(a);
    y -= kv_widen<bfloat>(b);
  }
}

// The exponent field of a magnitude, within 1 ... 253, and the power of two that has it.
KV_DEVICE uint32_t kv_exponent(float x) {
  const uint32_t exponent = kv_bits(x) >> 23;
  return exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
}
KV_DEVICE float kv_power(uint32_t exponent) { return kv_float(exponent << 23); }

// What a block of warps keeps while it walks over a piece, and how it ends.
template <uint32_t dim> struct kv_warp {
  static constexpr uint32_t warps = KV_THREADS / 32, tiles = dim / 8;
  const kv_piece piece;
  const kv_sequence sequence;
  const kv_work work;
  const uint32_t lane, warp, g, t;
  const int64_t own;  // position of query g
  float maximum, total;
  float sum[tiles][4];

  KV_DEVICE_MEMBER kv_warp(const kv_piece *pieces, const kv_sequence *sequences, const kv_work *works)
      : piece(pieces[blockIdx.x]), sequence(sequences[piece.sequence]), work(works[piece.work]),
        lane(threadIdx.x % 32), warp(threadIdx.x / 32), g(lane / 4), t(lane % 4),
        own(sequence.first_position + (piece.row + g) / sequence.group), maximum(-KV_INFINITY), total(0) {
    for (uint32_t i = 0; i < tiles; i++)
      for (uint32_t k = 0; k < 4; k++) sum[i][k] = 0;
  }

  // Queries in shared memory, scaled by a power of two so that the largest channel is in 1 ..< 2.
  KV_DEVICE_MEMBER void load(const kv_queries &queries, float *query, float *unscale) {
    KV_EACH(i, KV_QUERY_ROWS * dim) {
      const uint32_t j = i / dim;
      query[i] = j < piece.rows ? kv_load((const void *)queries.base, queries.type,
                                          kv_query_at(queries, piece.row + j) + i % dim)
                                : 0;
    }
    __syncthreads();
    for (uint32_t j = warp; j < KV_QUERY_ROWS; j += warps) {
      float most = 0;
      for (uint32_t c = lane; c < dim; c += 32) most = fmaxf(most, fabsf(query[j * dim + c]));
      const uint32_t exponent = kv_exponent(kv_warp_max(most));
      for (uint32_t c = lane; c < dim; c += 32) query[j * dim + c] *= kv_power(254 - exponent);
      if (lane == 0) unscale[j] = kv_power(exponent) * sequence.scale;
    }
    __syncthreads();
  }

  // Row i of the four whose logits a lane has: 0, 1 of the first half of a tile, 2, 3 of the second.
  KV_DEVICE_MEMBER uint32_t row(uint32_t tile, uint32_t i) const { return tile + i / 2 * 8 + 2 * t + i % 2; }

  // Logits of query g and four rows to weights relative to the running maximum, 2^14 times as large; what was summed up
  // shrinks where the maximum grows, by what is returned.
  KV_DEVICE_MEMBER float weigh(float *logit, uint32_t tile, float *memory) {
    float top = -KV_INFINITY;
    for (uint32_t i = 0; i < 4; i++) {
      const uint32_t row = this->row(tile, i);
      float x = logit[i];
      if (sequence.softcap > 0) x = sequence.softcap * tanhf(x / sequence.softcap);
      if (row >= piece.end) {
        x = -KV_INFINITY;
      } else {
        if (work.bias) x += ((const float *)work.bias)[row];
        const int64_t position = work.positions ? ((const int32_t *)work.positions)[row] : work.first_position + row;
        if (sequence.first_position != KV_EVERY_ROW &&
            (position > own || (sequence.sliding_window && position <= own - (int64_t)sequence.sliding_window)))
          x = -KV_INFINITY;
        if (piece.kept != ~0ull && g < piece.rows)
          memory[piece.kept + (uint64_t)(piece.row + g) * work.count + row] = x;
      }
      logit[i] = x;
      top = fmaxf(top, x);
    }
    // The lanes of one query are neighbours.
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float now = fmaxf(maximum, top);
    // Minus infinity minus itself is NaN: an empty side never reaches the arithmetic.
    const float shrink = maximum == -KV_INFINITY ? 0 : expf(maximum - now);
    if (__any_sync(0xffffffffu, now > maximum)) multiply(shrink);
    total *= shrink;
    maximum = now;
    for (uint32_t i = 0; i < 4; i++) {
      logit[i] = logit[i] == -KV_INFINITY ? 0 : 16384 * expf(logit[i] - now);
      total += logit[i];
    }
    return shrink;
  }

  KV_DEVICE_MEMBER void multiply(float factor) {
    for (uint32_t i = 0; i < tiles; i++)
      for (uint32_t k = 0; k < 4; k++) sum[i][k] *= factor;
  }

  // The warps of the block become one partial. Channel of column n of tile i: `channel(i, n)`; sums are multiplied
  // by `scale`, and `low` of its block of 32 channels is added.
  template <typename Channel>
  KV_DEVICE_MEMBER void finish(Channel channel, float scale, const float *low, float *merged, float *maxima, float *sums, float *memory) {
    __syncthreads();
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (t == 0) {
      maxima[warp * KV_QUERY_ROWS + g] = maximum;
      sums[warp * KV_QUERY_ROWS + g] = total / 16384;
    }
    for (uint32_t i = 0; i < tiles; i++)
      for (uint32_t k = 0; k < 2; k++)
        merged[(warp * KV_QUERY_ROWS + g) * dim + channel(i, 2 * t + k)] =
            (sum[i][k] + sum[i][k + 2]) * scale + (low ? low[channel(i, 0) / 32] : 0);
    __syncthreads();
    const uint32_t m = sequence.tokens * sequence.group;
    float *partial = memory + piece.partial;
    for (uint32_t j = 0; j < piece.rows; j++) {
      float top = -KV_INFINITY, weight[warps], all = 0;
      for (uint32_t w = 0; w < warps; w++) top = fmaxf(top, maxima[w * KV_QUERY_ROWS + j]);
      for (uint32_t w = 0; w < warps; w++) {
        const float own_top = maxima[w * KV_QUERY_ROWS + j];
        weight[w] = own_top == -KV_INFINITY ? 0 : expf(own_top - top);
        all += weight[w] * sums[w * KV_QUERY_ROWS + j];
      }
      KV_EACH(c, dim) {
        float x = 0;
        for (uint32_t w = 0; w < warps; w++) x += weight[w] * merged[(w * KV_QUERY_ROWS + j) * dim + c];
        partial[2 * m + (uint64_t)(piece.row + j) * dim + c] = x;
      }
      if (threadIdx.x == 0) {
        partial[piece.row + j] = top;
        partial[m + piece.row + j] = all;
      }
    }
  }
};

// Where rows of a list lie, for rows that ascend.
struct kv_cursor {
  const kv_slice *slice;
  uint32_t end;   // row behind the slice
  uint64_t base;  // address of row 0, were it in the slice
};

KV_DEVICE uint64_t kv_row_at(kv_cursor *cursor, uint32_t row, uint32_t row_bytes) {
  while (row >= cursor->end) {
    cursor->slice++;
    cursor->end = cursor->slice->start + cursor->slice->count;
    cursor->base = cursor->slice->data + ((uint64_t)cursor->slice->first - cursor->slice->start) * row_bytes;
  }
  return cursor->base + (uint64_t)row * row_bytes;
}

KV_DEVICE kv_cursor kv_cursor_at(const kv_slice *slices, uint32_t count, uint32_t row, uint32_t row_bytes) {
  kv_cursor cursor;
  cursor.slice = &kv_slice_of(slices, count, row);
  cursor.end = cursor.slice->start + cursor.slice->count;
  cursor.base = cursor.slice->data + ((uint64_t)cursor.slice->first - cursor.slice->start) * row_bytes;
  return cursor;
}

template <uint32_t dim, bool bfloat>
KV_DEVICE void kv_decode(const kv_piece *pieces, const kv_sequence *sequences, const kv_work *works,
                         const kv_slice *slices, const kv_queries *all_queries, float *memory) {
  constexpr uint32_t warps = KV_THREADS / 32, steps = dim / 16, row_bytes = dim * 2;
  KV_SHARED float merged[warps * KV_QUERY_ROWS * dim];
  KV_SHARED float maxima[warps * KV_QUERY_ROWS], sums[warps * KV_QUERY_ROWS], unscale[KV_QUERY_ROWS];
  kv_warp<dim> own(pieces, sequences, works);
  const uint32_t g = own.g, t = own.t;
  float *query = merged;
  own.load(all_queries[own.piece.queries], query, unscale);
  uint32_t part[steps][4], third[steps][2];
  for (uint32_t s = 0; s < steps; s++)
    for (uint32_t k = 0; k < 2; k++) {
      const float *pair = query + g * dim + s / 2 * 32 + 8 * t + s % 2 * 4 + 2 * k;
      uint32_t parts[3];
      kv_split<bfloat>(pair[0], pair[1], parts);
      part[s][2 * k] = parts[0];
      part[s][2 * k + 1] = parts[1];
      third[s][k] = bfloat ? parts[2] : 0;
    }
  const float factor = unscale[g];

  const uint32_t end = own.piece.end, last = end - 1, start = own.piece.first + 16 * own.warp;
  kv_cursor keys = kv_cursor_at(slices + own.work.keys, own.work.key_slices, start < last ? start : last, row_bytes);
  kv_cursor values =
      kv_cursor_at(slices + own.work.values, own.work.value_slices, start < last ? start : last, row_bytes);
  for (uint32_t tile = start; tile < end; tile += 16 * warps) {
    // Everything is loaded before anything is used. Rows behind the last one are that one, and weigh nothing.
    uint4 key[2][dim / 32], value[4][dim / 64];
    for (uint32_t i = 0; i < 2; i++) {
      const uint32_t row = tile + 8 * i + g < last ? tile + 8 * i + g : last;
      const uint4 *source = (const uint4 *)kv_row_at(&keys, row, row_bytes) + t;
      for (uint32_t s = 0; s < dim / 32; s++) key[i][s] = source[4 * s];
    }
    for (uint32_t i = 0; i < 4; i++) {
      const uint32_t at = own.row(tile, i), row = at < last ? at : last;
      const uint4 *source = (const uint4 *)kv_row_at(&values, row, row_bytes) + g;
      for (uint32_t s = 0; s < dim / 64; s++) value[i][s] = source[8 * s];
    }
    float logit[4];
    for (uint32_t i = 0; i < 2; i++) {
      float c[4] = {0, 0, 0, 0};
      for (uint32_t s = 0; s < dim / 32; s++) {
        const uint4 k = key[i][s];
        kv_mma<bfloat>(c, part[2 * s][0], part[2 * s][1], part[2 * s][2], part[2 * s][3], k.x, k.y);
        kv_mma<bfloat>(c, part[2 * s + 1][0], part[2 * s + 1][1], part[2 * s + 1][2], part[2 * s + 1][3], k.z, k.w);
        if (bfloat) {
          kv_mma<bfloat>(c, third[2 * s][0], 0, third[2 * s][1], 0, k.x, k.y);
          kv_mma<bfloat>(c, third[2 * s + 1][0], 0, third[2 * s + 1][1], 0, k.z, k.w);
        }
      }
      logit[2 * i] = (c[0] + c[2]) * factor;
      logit[2 * i + 1] = (c[1] + c[3]) * factor;
    }
    own.weigh(logit, tile, memory);

    uint32_t first[3], second[3];
    kv_split<bfloat>(logit[0], logit[1], first);
    kv_split<bfloat>(logit[2], logit[3], second);
    for (uint32_t h = 0; h < dim / 64; h++)
      for (uint32_t w = 0; w < 4; w++)
        for (uint32_t k = 0; k < 2; k++) {
          // One channel of two rows each.
          const uint32_t halves = k ? 0x7632 : 0x5410;
          const uint32_t b0 = __byte_perm((&value[0][h].x)[w], (&value[1][h].x)[w], halves);
          const uint32_t b1 = __byte_perm((&value[2][h].x)[w], (&value[3][h].x)[w], halves);
          float *c = own.sum[8 * h + 2 * w + k];
          kv_mma<bfloat>(c, first[0], first[1], second[0], second[1], b0, b1);
          if (bfloat) kv_mma<bfloat>(c, first[2], 0, second[2], 0, b0, b1);
        }
  }
  own.finish([](uint32_t i, uint32_t n) { return i / 8 * 64 + 8 * n + i % 8; }, 1.0f / 16384, nullptr, merged, maxima, sums,
             memory);
}

// ---- affine codes ---------------------------------------------------------------------------------------------------

// Two codes as two f16 numbers: both are at the bottom of their halves, below 1024.
KV_DEVICE uint32_t kv_code_pair(uint32_t codes) { return kv_sub_halves(codes | 0x64006400u, 0x64006400u); }

// Keys with a scale and minimum per channel and group of tokens, values with one per token and group of channels, f16 both,
// codes of the same bits. A key is code * scale + min: the scales go into the queries, once for 32 rows, and the mins are
// one number a query. A value likewise: the scales go into the weights of the rows, the mins are one number a group of
// channels, a multiple of 32. Pieces and slices of keys begin at multiples of 32 rows; values may begin anywhere.
template <uint32_t dim, uint32_t bits>
KV_DEVICE void kv_decode_affine(const kv_piece *pieces, const kv_sequence *sequences, const kv_work *works,
                                const kv_slice *slices, const kv_queries *all_queries, float *memory) {
  constexpr uint32_t warps = KV_THREADS / 32, steps = dim / 16, blocks = dim / 32, row_words = dim * bits / 32;
  constexpr uint32_t mask = ((1u << bits) - 1) * 0x00010001u;
  KV_SHARED float merged[warps * KV_QUERY_ROWS * dim], query[KV_QUERY_ROWS * dim];
  KV_SHARED float maxima[warps * KV_QUERY_ROWS], sums[warps * KV_QUERY_ROWS], unscale[KV_QUERY_ROWS];
  kv_warp<dim> own(pieces, sequences, works);
  const uint32_t g = own.g, t = own.t;
  own.load(all_queries[own.piece.queries], query, unscale);

  const uint32_t start = own.piece.first + 32 * own.warp, from = start < own.piece.end ? start : own.piece.first;
  const kv_slice *key = &kv_slice_of(slices + own.work.keys, own.work.key_slices, from);
  const kv_slice *value = &kv_slice_of(slices + own.work.values, own.work.value_slices, from);
  // Sums of weights times mins, of each block of 32 channels; the exponent of the scales that are in the sums.
  float low[blocks];
  for (uint32_t b = 0; b < blocks; b++) low[b] = 0;
  uint32_t held = 1;
  for (uint32_t block = start; block < own.piece.end; block += 32 * warps) {
    while (block >= key->start + key->count) key++;
    const uint32_t at = key->first + block - key->start, group = at / key->group, inside = at % key->group;
    const uint32_t *codes = (const uint32_t *)key->data + (uint64_t)group * (key->group * bits / 32) * dim + 8 * t;

    // The queries of this group of rows.
    uint4 scale[blocks];
    float most = 0, shift = 0;
    for (uint32_t b = 0; b < blocks; b++) {
      scale[b] = *((const uint4 *)((const uint16_t *)key->scale + (uint64_t)group * dim + 32 * b) + t);
      const uint4 min = *((const uint4 *)((const uint16_t *)key->min + (uint64_t)group * dim + 32 * b) + t);
      for (uint32_t k = 0; k < 8; k++) {
        most = fmaxf(most, fabsf(kv_half((uint16_t)((&scale[b].x)[k / 2] >> (k % 2 * 16)))));
        shift += query[g * dim + 32 * b + 8 * t + k] * kv_half((uint16_t)((&min.x)[k / 2] >> (k % 2 * 16)));
      }
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    shift += __shfl_xor_sync(0xffffffffu, shift, 1);
    shift += __shfl_xor_sync(0xffffffffu, shift, 2);
    const uint32_t exponent = kv_exponent(most);
    const float small = kv_power(254 - exponent), factor = unscale[g] * kv_power(exponent);
    shift *= unscale[g];
    uint32_t part[steps][4];
    for (uint32_t s = 0; s < steps; s++)
      for (uint32_t k = 0; k < 2; k++) {
        const float *pair = query + g * dim + s / 2 * 32 + 8 * t + s % 2 * 4 + 2 * k;
        const uint32_t both = (&scale[s / 2].x)[s % 2 * 2 + k];
        uint32_t parts[2];
        kv_split<false>(pair[0] * (kv_half((uint16_t)both) * small), pair[1] * (kv_half((uint16_t)(both >> 16)) * small),
                        parts);
        part[s][2 * k] = parts[0];
        part[s][2 * k + 1] = parts[1];
      }

    for (uint32_t tile = block; tile < block + 32; tile += 16) {
      float logit[4];
      for (uint32_t i = 0; i < 2; i++) {
        // The code of row g of eight, in the words of all its channels: which byte, and where in it.
        const uint32_t bit = (inside + tile - block + 8 * i + g) * bits, byte = bit / 8 % 4;
        const uint4 *source = (const uint4 *)(codes + (uint64_t)(bit / 32) * dim);
        const uint32_t halves = byte * 0x11 | (4 + byte) * 0x1100, rest = bit % 8;
        float c[4] = {0, 0, 0, 0};
        for (uint32_t s = 0; s < steps; s++) {
          const uint4 words = source[s / 2 * 8 + s % 2];
          const uint32_t x = __byte_perm(words.x, words.y, halves), y = __byte_perm(words.z, words.w, halves);
          kv_mma<false>(c, part[s][0], part[s][1], part[s][2], part[s][3],
                        kv_code_pair(x >> rest & mask), kv_code_pair(y >> rest & mask));
        }
        logit[2 * i] = (c[0] + c[2]) * factor + shift;
        logit[2 * i + 1] = (c[1] + c[3]) * factor + shift;
      }
      const float shrink = own.weigh(logit, tile, memory);
      for (uint32_t b = 0; b < blocks; b++) low[b] *= shrink;

      const uint32_t last = own.piece.end - 1, group_channels = value->group;
      const uint32_t groups = (dim + group_channels - 1) / group_channels;
      const uint32_t *row_codes[4];
      const uint16_t *row_scales[4], *row_mins[4];
      uint32_t first[2], second[2];
      for (uint32_t i = 0; i < 4; i++) {
        // Rows behind the last one are that one, and weigh nothing.
        const uint32_t place = own.row(tile, i) < last ? own.row(tile, i) : last;
        while (place >= value->start + value->count) value++;
        const uint64_t row = value->first + place - value->start;
        row_codes[i] = (const uint32_t *)value->data + row * row_words;
        row_scales[i] = (const uint16_t *)value->scale + row * groups;
        row_mins[i] = (const uint16_t *)value->min + row * groups;
      }
      for (uint32_t b = 0; b < blocks; b++) {
        // The weights of this group of channels.
        const uint32_t column = 32 * b / group_channels;
        float scales[4], most_scale = 0;
        for (uint32_t i = 0; i < 4; i++) {
          scales[i] = kv_half(row_scales[i][column]);
          most_scale = fmaxf(most_scale, fabsf(scales[i]));
          low[b] += logit[i] * kv_half(row_mins[i][column]);
        }
        most_scale = fmaxf(most_scale, __shfl_xor_sync(0xffffffffu, most_scale, 1));
        most_scale = fmaxf(most_scale, __shfl_xor_sync(0xffffffffu, most_scale, 2));
        const uint32_t wanted = kv_exponent(most_scale);
        if (wanted > held) {  // the same in all lanes
          own.multiply(wanted - held > 126 ? 0 : kv_power(127 - (wanted - held)));
          held = wanted;
        }
        const float down = kv_power(254 - held);
        kv_split<false>(logit[0] * (scales[0] * down), logit[1] * (scales[1] * down), first);
        kv_split<false>(logit[2] * (scales[2] * down), logit[3] * (scales[3] * down), second);

        // Channels 4g ... 4g + 3 of 32: one word of each row, brought to its bottom.
        uint32_t words[4];
        for (uint32_t i = 0; i < 4; i++)
          words[i] = row_codes[i][b * bits + g * bits / 8] >> (4 * g * bits % 32);
        for (uint32_t j = 0; j < 4; j++) {
          const uint32_t halves = j * bits < 16 ? 0x5410 : 0x7632, rest = j * bits % 16;
          const uint32_t b0 = kv_code_pair(__byte_perm(words[0], words[1], halves) >> rest & mask);
          const uint32_t b1 = kv_code_pair(__byte_perm(words[2], words[3], halves) >> rest & mask);
          kv_mma<false>(own.sum[4 * b + j], first[0], first[1], second[0], second[1], b0, b1);
        }
      }
    }
  }
  // Mins belong to every channel of their block: to one lane of a query each, which adds them to all of its own.
  const float up = kv_power(held) / 16384;
  for (uint32_t b = 0; b < blocks; b++) {
    float x = low[b];
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    x += __shfl_xor_sync(0xffffffffu, x, 2);
    low[b] = x / 16384;
  }
  own.finish([](uint32_t i, uint32_t n) { return i / 4 * 32 + 4 * n + i % 4; }, up, low, merged, maxima, sums, memory);
}

#define KV_DECODE(name, body)                                                                                        \
  KV_KERNEL name(const kv_piece *pieces, const kv_sequence *sequences, const kv_work *works, const kv_slice *slices, \
                 const kv_queries *queries, float *memory) {                                                         \
    body(pieces, sequences, works, slices, queries, memory);                                                         \
  }

KV_DECODE(kv_decode_f16_64, (kv_decode<64, false>))
KV_DECODE(kv_decode_f16_128, (kv_decode<128, false>))
KV_DECODE(kv_decode_bf16_64, (kv_decode<64, true>))
KV_DECODE(kv_decode_bf16_128, (kv_decode<128, true>))
KV_DECODE(kv_decode_affine2_128, (kv_decode_affine<128, 2>))
KV_DECODE(kv_decode_affine4_128, (kv_decode_affine<128, 4>))
KV_DECODE(kv_decode_affine8_128, (kv_decode_affine<128, 8>))
