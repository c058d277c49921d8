// Attention over rows in any encoding, in three launches: partials of pieces of rows, their merge, statistics.
//
// Work is cut by shapes alone and partials are merged in row order, so the bits do not depend on the batch or the card.
#include "device.cuh"

// A tile of rows and channels as f32 in shared memory; one column of padding against bank conflicts.
KV_DEVICE void kv_load_tile(const kv_slice *slices, uint32_t count, uint32_t first, uint32_t rows, uint32_t channel,
                            uint32_t channels, float *tile) {
  const uint32_t pitch = KV_TILE_CHANNELS + 1;
  for (uint32_t i = threadIdx.x; i < rows * KV_TILE_CHANNELS; i += KV_THREADS) {
    uint32_t r = i / KV_TILE_CHANNELS, c = i % KV_TILE_CHANNELS;
    if (c >= channels) continue;
    const kv_slice &s = kv_slice_of(slices, count, first + r);
    tile[r * pitch + c] = kv_element(s, s.first + first + r - s.start, channel + c);
  }
}

// Partials of one piece: max, sum and accumulators per query row, relative to the piece's own maximum.
KV_KERNEL kv_attend(const kv_piece *pieces, const kv_sequence *sequences, const kv_work *works, const kv_slice *slices,
                    float *memory) {
  KV_SHARED float tile[KV_TILE_ROWS * (KV_TILE_CHANNELS + 1)];
  KV_SHARED float query[KV_QUERY_ROWS * KV_TILE_CHANNELS];
  KV_SHARED float weight[KV_QUERY_ROWS * KV_TILE_ROWS];
  KV_SHARED float maximum[KV_QUERY_ROWS], total[KV_QUERY_ROWS], shrink[KV_QUERY_ROWS];

  const kv_piece piece = pieces[blockIdx.x];
  const kv_sequence sequence = sequences[piece.sequence];
  const kv_work work = works[piece.work];
  const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32, pitch = KV_TILE_CHANNELS + 1;
  const float *queries = (const float *)piece.queries + (uint64_t)piece.row * sequence.key_dim;

  // A thread owns value channels thread and thread + KV_THREADS of every query row.
  float sum[KV_QUERY_ROWS][KV_CHANNELS / KV_THREADS];
  for (uint32_t j = 0; j < KV_QUERY_ROWS; j++)
    for (uint32_t k = 0; k < KV_CHANNELS / KV_THREADS; k++) sum[j][k] = 0;
  if (thread < KV_QUERY_ROWS) {
    maximum[thread] = -KV_INFINITY;
    total[thread] = 0;
  }

  for (uint32_t first = piece.first; first < piece.end; first += KV_TILE_ROWS) {
    const uint32_t rows = piece.end - first < KV_TILE_ROWS ? piece.end - first : KV_TILE_ROWS;
    // Logits: a thread holds one row and every second (128 threads, 64 rows) query row.
    const uint32_t row = thread % KV_TILE_ROWS, part = thread / KV_TILE_ROWS, parts = KV_THREADS / KV_TILE_ROWS;
    float logit[KV_QUERY_ROWS];
    for (uint32_t j = 0; j < KV_QUERY_ROWS; j++) logit[j] = 0;
    for (uint32_t channel = 0; channel < sequence.key_dim; channel += KV_TILE_CHANNELS) {
      const uint32_t left = sequence.key_dim - channel;
      const uint32_t channels = left < KV_TILE_CHANNELS ? left : KV_TILE_CHANNELS;
      __syncthreads();
      kv_load_tile(slices + work.keys, work.key_slices, first, rows, channel, channels, tile);
      for (uint32_t i = thread; i < piece.rows * KV_TILE_CHANNELS; i += KV_THREADS) {
        const uint32_t j = i / KV_TILE_CHANNELS, c = i % KV_TILE_CHANNELS;
        query[i] = c < channels ? queries[(uint64_t)j * sequence.key_dim + channel + c] : 0;
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
      float x = logit[j] * sequence.scale;
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
        partial[2 * m + (uint64_t)(piece.row + j) * sequence.value_dim + piece.channel + c] = sum[j][slot];
    }
}

// Merges the partials of one query row in row order and writes its output.
KV_KERNEL kv_finish(const kv_merge *merges, const kv_sequence *sequences, const uint64_t *partials, float *memory) {
  const kv_merge merge = merges[blockIdx.x];
  const kv_sequence sequence = sequences[merge.sequence];
  const uint32_t m = sequence.tokens * sequence.group, token = merge.row / sequence.group;
  const uint32_t head = merge.head * sequence.group + merge.row % sequence.group;
  float top = -KV_INFINITY, sum = 0;
  for (uint32_t i = 0; i < merge.partials; i++) top = fmaxf(top, memory[partials[merge.first + i] + merge.row]);
  for (uint32_t i = 0; i < merge.partials; i++) {
    const float *partial = memory + partials[merge.first + i];
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
    output[c] = sum > 0 ? x / sum : 0;
  }
  if (threadIdx.x == 0) {
    if (sequence.log_sum_exp)
      ((float *)sequence.log_sum_exp)[head * sequence.tokens + token] = sum > 0 ? top + logf(sum) : -KV_INFINITY;
    memory[merge.total] = top;
    memory[merge.total + 1] = sum;
  }
}

// Adds to each row of a work item the probability it received, summed over its query rows in order.
KV_KERNEL kv_statistics(const kv_statistic *statistics, const kv_work *works, const float *memory) {
  const kv_statistic statistic = statistics[blockIdx.y];
  const kv_work work = works[statistic.work];
  const uint32_t row = blockIdx.x * KV_THREADS + threadIdx.x;
  if (row >= work.count) return;
  float sum = 0;
  for (uint32_t j = 0; j < statistic.rows; j++) {
    const float top = memory[statistic.totals + 2 * j], total = memory[statistic.totals + 2 * j + 1];
    const float x = memory[statistic.kept + (uint64_t)j * work.count + row];
    if (total > 0 && x != -KV_INFINITY) sum += expf(x - top) / total;
  }
  ((float *)work.score)[row] += sum;
}

// Column sums of a window: the probability each row received from every query head, summed over the window's tokens,
// then reduced over the heads of the group: 0 mean, 1 maximum, 2 sum.
KV_KERNEL kv_window(const kv_statistic *statistics, const kv_work *works, const float *memory, uint32_t group,
                    uint32_t reduction) {
  const kv_statistic statistic = statistics[blockIdx.y];
  const kv_work work = works[statistic.work];
  const uint32_t row = blockIdx.x * KV_THREADS + threadIdx.x;
  if (row >= work.count) return;
  float result = reduction == 1 ? -KV_INFINITY : 0;
  for (uint32_t member = 0; member < group; member++) {
    float sum = 0;
    for (uint32_t j = member; j < statistic.rows; j += group) {
      const float top = memory[statistic.totals + 2 * j], total = memory[statistic.totals + 2 * j + 1];
      const float x = memory[statistic.kept + (uint64_t)j * work.count + row];
      if (total > 0 && x != -KV_INFINITY) sum += expf(x - top) / total;
    }
    result = reduction == 1 ? fmaxf(result, sum) : result + sum;
  }
  ((float *)work.score)[row] = reduction == 0 ? result / group : result;
}
