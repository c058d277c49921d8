// Attention over rows in any encoding, in launches one after the other: queries on their way to the rows, partials of
// pieces of rows, partials back to the model's channels, their merge, statistics. Most calls need the second and the
// fourth only.
//
// Work is cut by shapes alone and partials are merged in row order, so the bits do not depend on the batch or the card.
#include "device.cuh"

KV_DEVICE uint64_t kv_query_at(const kv_queries &q, uint32_t row) {
  return row / q.group * q.token_stride + row % q.group * q.member_stride;
}

#include "decode.cuh"

// Queries turned, multiplied by a basis, mapped: one block a query row (y) of a phase (x). A key that is a latent times a
// basis: its logit is (basis q) . latent + q . mean. A row behind a map is y = (P H S x - offset) / factor: with
// r = P H S q its logit is (factor r) . y + r . offset.
KV_KERNEL kv_prepare(const kv_phase *phases) {
  KV_SHARED float row[KV_MOST_CHANNELS], moved[KV_MOST_CHANNELS];
  KV_SHARED float room[KV_THREADS / 32];
  const kv_phase phase = phases[blockIdx.x];
  const uint32_t j = blockIdx.y;
  if (j >= phase.rows) return;
  uint32_t dim = phase.from.dim;
  const uint64_t source = kv_query_at(phase.from, j);
  KV_EACH(c, dim) row[c] = kv_load((const void *)phase.from.base, phase.from.type, source + c);
  __syncthreads();
  if (phase.rotary) {
    const kv_rotary rotary = *(const kv_rotary *)phase.rotary;
    // Only the difference matters; queries that see everything have no position of their own.
    const int64_t own = phase.position == KV_EVERY_ROW ? phase.later : phase.position + j / phase.from.group;
    KV_EACH(p, rotary.pairs) kv_turn_pair(rotary, row, p, own, own - phase.later);
    __syncthreads();
  }
  float shift = 0;
  if (phase.basis) {
    const kv_basis basis = *(const kv_basis *)phase.basis;
    for (uint32_t r = threadIdx.x / 32; r < basis.rank; r += KV_THREADS / 32) {
      float sum = 0;
      for (uint32_t c = threadIdx.x % 32; c < dim; c += 32)
        sum += row[c] * kv_load((const void *)basis.data, basis.dtype, (uint64_t)r * dim + c);
      sum = kv_warp_sum(sum);
      if (threadIdx.x % 32 == 0) moved[r] = sum;
    }
    if (basis.mean) KV_EACH(c, dim) shift += row[c] * ((const float *)basis.mean)[c];
    __syncthreads();
    dim = basis.rank;
    KV_EACH(c, dim) row[c] = moved[c];
    __syncthreads();
  }
  float *target = (float *)phase.to.base + kv_query_at(phase.to, j);
  if (phase.map) {
    const kv_map map = *(const kv_map *)phase.map;
    kv_rotate(map, row, moved);
    KV_EACH(c, dim) {
      float x = row[c];
      if (map.offset) shift += x * kv_load((const void *)map.offset, map.dtype, c);
      if (map.factor) x = kv_mul(x, kv_load((const void *)map.factor, map.dtype, c));
      target[c] = x;
    }
  } else {
    KV_EACH(c, dim) target[c] = row[c];
  }
  if (!phase.to.shift) return;
  shift = kv_block_sum(shift, room);
  if (threadIdx.x == 0) ((float *)phase.to.shift)[j] = phase.scale * shift;
}

// A tile of rows and channels as f32 in shared memory; one column of padding against bank conflicts. Two threads a row:
// which slice and format it is in is looked up once for half its channels.
KV_DEVICE void kv_load_tile(const kv_slice *slices, uint32_t count, uint32_t first, uint32_t rows, uint32_t channel,
                            uint32_t channels, float *tile) {
  const uint32_t pitch = KV_TILE_CHANNELS + 1, half = KV_TILE_CHANNELS / 2;
  const uint32_t r = threadIdx.x / 2, begin = threadIdx.x % 2 * half;
  if (r >= rows || begin >= channels) return;
  const uint32_t end = channels < begin + half ? channels : begin + half;
  const kv_slice s = kv_slice_of(slices, count, first + r);
  const uint32_t row = s.first + first + r - s.start;
  for (uint32_t c = begin; c < end; c++) tile[r * pitch + c] = kv_element(s, row, channel + c);
}

// Partials of one piece: max, sum and accumulators per query row, relative to the piece's own maximum.
KV_KERNEL kv_attend(const kv_piece *pieces, const kv_sequence *sequences, const kv_work *works, const kv_slice *slices,
                    const kv_queries *all_queries, float *memory) {
  KV_SHARED float tile[KV_TILE_ROWS * (KV_TILE_CHANNELS + 1)];
  KV_SHARED float query[KV_QUERY_ROWS * KV_TILE_CHANNELS];
  KV_SHARED float weight[KV_QUERY_ROWS * KV_TILE_ROWS];
  KV_SHARED float maximum[KV_QUERY_ROWS], total[KV_QUERY_ROWS], shrink[KV_QUERY_ROWS], shift[KV_QUERY_ROWS];

  const kv_piece piece = pieces[blockIdx.x];
  const kv_sequence sequence = sequences[piece.sequence];
  const kv_work work = works[piece.work];
  const kv_queries queries = all_queries[piece.queries];
  const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32, pitch = KV_TILE_CHANNELS + 1;

  // A thread owns value channels thread and thread + KV_THREADS of every query row.
  float sum[KV_QUERY_ROWS][KV_CHANNELS / KV_THREADS];
  for (uint32_t j = 0; j < KV_QUERY_ROWS; j++)
    for (uint32_t k = 0; k < KV_CHANNELS / KV_THREADS; k++) sum[j][k] = 0;
  if (thread < KV_QUERY_ROWS) {
    maximum[thread] = -KV_INFINITY;
    total[thread] = 0;
    shift[thread] = queries.shift && thread < piece.rows ? ((const float *)queries.shift)[piece.row + thread] : 0;
  }

  for (uint32_t first = piece.first; first < piece.end; first += KV_TILE_ROWS) {
    const uint32_t rows = piece.end - first < KV_TILE_ROWS ? piece.end - first : KV_TILE_ROWS;
    // Logits: a thread holds one row and every second (128 threads, 64 rows) query row.
    const uint32_t row = thread % KV_TILE_ROWS, part = thread / KV_TILE_ROWS, parts = KV_THREADS / KV_TILE_ROWS;
    float logit[KV_QUERY_ROWS];
    for (uint32_t j = 0; j < KV_QUERY_ROWS; j++) logit[j] = 0;
    for (uint32_t channel = 0; channel < queries.dim; channel += KV_TILE_CHANNELS) {
      const uint32_t left = queries.dim - channel;
      const uint32_t channels = left < KV_TILE_CHANNELS ? left : KV_TILE_CHANNELS;
      __syncthreads();
      kv_load_tile(slices + work.keys, work.key_slices, first, rows, channel, channels, tile);
      for (uint32_t i = thread; i < piece.rows * KV_TILE_CHANNELS; i += KV_THREADS) {
        const uint32_t j = i / KV_TILE_CHANNELS, c = i % KV_TILE_CHANNELS;
        query[i] = c < channels ? kv_load((const void *)queries.base, queries.type,
                                          kv_query_at(queries, piece.row + j) + channel + c)
                                : 0;
      }
      __syncthreads();
      if (row < rows)
        for (uint32_t c = 0; c < channels; c++) {
          const float x = tile[row * pitch + c];
          for (uint32_t j = part; j < piece.rows; j += parts) logit[j] += query[j * KV_TILE_CHANNELS + c] * x;
        }
    }
    int64_t position = work.first_position + first + row;
    float bias = 0;
    if (row < rows) {
      if (work.positions) position = ((const int32_t *)work.positions)[first + row];
      if (work.bias) bias = ((const float *)work.bias)[first + row];
    }
    for (uint32_t j = part; j < piece.rows; j += parts) {
      float x = logit[j] * sequence.scale + shift[j];
      if (sequence.softcap > 0) x = sequence.softcap * tanhf(x / sequence.softcap);
      x += bias;
      if (sequence.first_position != KV_EVERY_ROW) {
        const int64_t own = sequence.first_position + (piece.row + j) / sequence.group;
        if (position > own || (sequence.sliding_window && position <= own - (int64_t)sequence.sliding_window))
          x = -KV_INFINITY;
      }
      if (row >= rows) x = -KV_INFINITY;
      weight[j * KV_TILE_ROWS + row] = x;
      // The blocks of further value channels form the same logits.
      if (row < rows && piece.kept != ~0ull && piece.channel == 0)
        memory[piece.kept + (uint64_t)(piece.row + j) * work.count + first + row] = x;
    }
    __syncthreads();

    // Softmax relative to the running maximum: one warp a query row.
    for (uint32_t j = warp; j < piece.rows; j += KV_THREADS / 32) {
      const float a = weight[j * KV_TILE_ROWS + lane], b = weight[j * KV_TILE_ROWS + lane + 32];
      const float top = kv_warp_max(fmaxf(a, b)), before = maximum[j], now = fmaxf(before, top);
      // Minus infinity minus itself is NaN: an empty side never reaches the arithmetic.
      const float x = a == -KV_INFINITY ? 0 : expf(a - now), y = b == -KV_INFINITY ? 0 : expf(b - now);
      const float added = kv_warp_sum(x + y), factor = before == -KV_INFINITY ? 0 : expf(before - now);
      weight[j * KV_TILE_ROWS + lane] = x;
      weight[j * KV_TILE_ROWS + lane + 32] = y;
      if (lane == 0) {
        shrink[j] = factor;
        total[j] = total[j] * factor + added;
        maximum[j] = now;
      }
    }

    // Values.
    for (uint32_t k = 0; k < KV_CHANNELS / KV_TILE_CHANNELS; k++) {
      const uint32_t channel = k * KV_TILE_CHANNELS;
      if (channel >= piece.channels) break;
      const uint32_t left = piece.channels - channel;
      const uint32_t channels = left < KV_TILE_CHANNELS ? left : KV_TILE_CHANNELS;
      __syncthreads();
      kv_load_tile(slices + work.values, work.value_slices, first, rows, piece.channel + channel, channels, tile);
      __syncthreads();
      const uint32_t slot = channel / KV_THREADS, c = thread - channel % KV_THREADS;
      if (thread >= channel % KV_THREADS && c < channels)
        for (uint32_t j = 0; j < piece.rows; j++) {
          float x = sum[j][slot] * shrink[j];
          for (uint32_t i = 0; i < rows; i++) {
            const float w = weight[j * KV_TILE_ROWS + i];
            // A hidden row contributes nothing, whatever it holds.
            if (w != 0) x += w * tile[i * pitch + c];
          }
          sum[j][slot] = x;
        }
    }
  }
  __syncthreads();

  const uint32_t m = sequence.tokens * sequence.group;
  float *partial = memory + piece.partial;
  if (thread < piece.rows && piece.channel == 0) {
    partial[piece.row + thread] = maximum[thread];
    partial[m + piece.row + thread] = total[thread];
  }
  for (uint32_t j = 0; j < piece.rows; j++)
    for (uint32_t slot = 0; slot < KV_CHANNELS / KV_THREADS; slot++) {
      const uint32_t c = slot * KV_THREADS + thread;
      if (c < piece.channels)
        partial[2 * m + (uint64_t)(piece.row + j) * piece.value_dim + piece.channel + c] = sum[j][slot];
    }
}

// Accumulators over rows behind a map, or over latents, as accumulators over rows of the model: one block a query row (y)
// of an item (x).
KV_KERNEL kv_restore_partials(const kv_restore *items, float *memory) {
  KV_SHARED float row[KV_MOST_CHANNELS], moved[KV_MOST_CHANNELS];
  const kv_restore item = items[blockIdx.x];
  const uint32_t j = blockIdx.y, m = item.rows;
  if (j >= m) return;
  const float total = memory[item.from + m + j];
  const float *sums = memory + item.from + 2 * m + (uint64_t)j * item.dim;
  KV_EACH(c, item.dim) row[c] = sums[c];
  if (item.map) {
    const kv_map map = *(const kv_map *)item.map;
    KV_EACH(c, map.dim) {
      float x = row[c];
      if (map.factor) x = kv_mul(x, kv_load((const void *)map.factor, map.dtype, c));
      if (map.offset) x += total * kv_load((const void *)map.offset, map.dtype, c);
      row[c] = x;
    }
    __syncthreads();
    kv_rotate_back(map, row, moved);
  }
  __syncthreads();
  if (!item.basis) {
    KV_EACH(c, item.dim) memory[item.to + 2 * m + (uint64_t)j * item.dim + c] = row[c];
    return;
  }
  const kv_basis basis = *(const kv_basis *)item.basis;
  KV_EACH(c, basis.dim) {
    float x = basis.mean ? total * ((const float *)basis.mean)[c] : 0;
    for (uint32_t r = 0; r < basis.rank; r++)
      x += row[r] * kv_load((const void *)basis.data, basis.dtype, (uint64_t)r * basis.dim + c);
    memory[item.to + 2 * m + (uint64_t)j * basis.dim + c] = x;
  }
  if (threadIdx.x == 0) {
    memory[item.to + j] = memory[item.from + j];
    memory[item.to + m + j] = total;
  }
}

// A query or an output that is not finite is put on record: `which` 0 or 1.
KV_DEVICE void kv_fault(kv_faults faults, uint32_t which, uint64_t place) {
  atomicMin((unsigned long long *)faults.guard + which, (unsigned long long)place);
  atomicMin((unsigned long long *)faults.found + which, (unsigned long long)place);
}

// Queries that several waves attend, before any of them adds statistics.
KV_KERNEL kv_check_queries(kv_view view, uint64_t first, kv_faults faults) {
  KV_GRID(i, (uint64_t)view.heads * view.tokens * view.dim) {
    const uint64_t c = i % view.dim, t = i / view.dim % view.tokens, h = i / view.dim / view.tokens;
    if (!kv_finite(kv_load((const void *)view.base, view.type, h * view.head_stride + t * view.token_stride + c)))
      kv_fault(faults, 0, first + i);
  }
}

// Merges the partials of one query row in row order, writes its output, and looks whether query and output are finite.
KV_KERNEL kv_finish(const kv_merge *merges, const kv_sequence *sequences, const uint64_t *partials,
                    const kv_queries *queries, kv_faults faults, float *memory) {
  const kv_merge merge = merges[blockIdx.x];
  const kv_sequence sequence = sequences[merge.sequence];
  const uint32_t m = sequence.tokens * sequence.group, token = merge.row / sequence.group;
  const uint32_t head = merge.head * sequence.group + merge.row % sequence.group;
  const uint64_t place = (uint64_t)head * sequence.all_tokens + sequence.first_token + token;
  const kv_queries own = queries[merge.queries];
  const uint64_t query = kv_query_at(own, merge.row);
  for (uint32_t c = threadIdx.x; c < sequence.key_dim; c += KV_THREADS)
    if (!kv_finite(kv_load((const void *)own.base, own.type, query + c)))
      kv_fault(faults, 0, sequence.query_place + place * sequence.key_dim + c);
  float top = -KV_INFINITY, sum = 0;
  for (uint32_t i = 0; i < merge.partials; i++) top = fmaxf(top, memory[partials[merge.first + i] + merge.row]);
  // A logit that is NaN or beyond f32 leaves a sum that is no number, or a maximum that is infinite.
  bool finite = top < KV_INFINITY;
  for (uint32_t i = 0; i < merge.partials; i++) {
    const float *partial = memory + partials[merge.first + i];
    finite = finite && partial[m + merge.row] >= 0;
    if (partial[m + merge.row] > 0) sum += partial[m + merge.row] * expf(partial[merge.row] - top);
  }
  float *output = (float *)sequence.output + head * sequence.output_head_stride + token * sequence.output_token_stride;
  for (uint32_t c = threadIdx.x; c < sequence.value_dim; c += KV_THREADS) {
    float x = 0;
    for (uint32_t i = 0; i < merge.partials; i++) {
      const float *partial = memory + partials[merge.first + i];
      if (partial[m + merge.row] > 0)
        x += partial[2 * m + (uint64_t)merge.row * sequence.value_dim + c] * expf(partial[merge.row] - top);
    }
    x = sum > 0 ? x / sum : 0;
    output[c] = x;
    if (!finite || !kv_finite(x)) kv_fault(faults, 1, sequence.output_place + place * sequence.value_dim + c);
  }
  if (threadIdx.x == 0) {
    if (sequence.log_sum_exp)
      ((float *)sequence.log_sum_exp)[head * sequence.log_stride + token] = sum > 0 ? top + logf(sum) : -KV_INFINITY;
    memory[merge.total] = top;
    memory[merge.total + 1] = sum;
  }
}

// The probability that query row j gave a row, 0 for a row it does not see.
KV_DEVICE float kv_probability(const kv_statistic &s, const float *memory, uint32_t j, uint32_t row) {
  const float top = memory[s.totals + 2 * j], total = memory[s.totals + 2 * j + 1];
  const float x = memory[s.kept + (uint64_t)j * s.count + row];
  return total > 0 && x != -KV_INFINITY ? expf(x - top) / total : 0;
}

// Adds to each row of a work item the probability it received, over its query rows in order, or keeps the largest.
KV_KERNEL kv_statistics(const kv_statistic *statistics, const float *memory, kv_faults faults) {
  const uint64_t *guard = (const uint64_t *)faults.guard;
  if (guard[0] != ~0ull || guard[1] != ~0ull) return;
  const kv_statistic statistic = statistics[blockIdx.x];
  const uint32_t row = blockIdx.y * KV_THREADS + threadIdx.x;
  if (row >= statistic.count) return;
  float *score = (float *)statistic.score + row, sum = 0;
  for (uint32_t j = 0; j < statistic.rows; j++) {
    const float p = kv_probability(statistic, memory, j, row);
    sum = statistic.reduction ? fmaxf(sum, p) : sum + p;
  }
  if (!statistic.fresh) sum = statistic.reduction ? fmaxf(*score, sum) : *score + sum;
  *score = sum;
}

// Columns of a window: what each row received from every query head over the window's tokens, reduced over the heads of
// the group. Query row j is token j / group, member j % group.
KV_KERNEL kv_window(const kv_statistic *statistics, const float *memory, kv_window_rule rule) {
  const kv_statistic statistic = statistics[blockIdx.x];
  const uint32_t row = blockIdx.y * KV_THREADS + threadIdx.x, group = rule.group;
  if (row >= statistic.count) return;
  const kv_share *shares = (const kv_share *)statistic.shares;
  const bool past = row < statistic.past;
  float result = rule.reduction == 1 ? -KV_INFINITY : 0, entropy = 0, variance = 0;
  for (uint32_t member = 0; member < group; member++) {
    float sum = 0, spread = 0, origin = 0;
    for (uint32_t j = member; j < statistic.rows; j += group) {
      const float p = kv_probability(statistic, memory, j, row);
      if (statistic.entropy && past) entropy -= p * logf(p + 1e-10f);
      if (rule.statistic == 2) {
        sum = fmaxf(sum, p);
      } else if (rule.statistic == 3) {
        sum += row < shares[j / group].visible && p < shares[j / group].share ? 1.0f : 0.0f;
      } else {
        // Moments around what the first query gave.
        if (j < group) origin = p;
        sum += p;
        spread += (p - origin) * (p - origin);
      }
    }
    float own = 0;
    if (rule.window > 1 && rule.statistic < 2) {
      const float offset = sum - (float)rule.window * origin;
      own = fmaxf(0, spread - offset * offset / (float)rule.window) / (float)(rule.window - 1);
    }
    if (past) variance += own;
    if (rule.statistic == 1) sum = sum / (float)rule.window + rule.gamma * own;
    result = rule.reduction == 1 ? fmaxf(result, sum) : result + sum;
  }
  ((float *)statistic.score)[row] = rule.reduction == 0 ? result / group : result;
  if (statistic.entropy) {
    ((float *)statistic.entropy)[row] = entropy;
    ((float *)statistic.variance)[row] = variance;
  }
}
