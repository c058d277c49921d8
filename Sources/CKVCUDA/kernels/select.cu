// Choosing rows by their scores: pooling over neighbours, and the largest of each head.
#include "device.cuh"

// Scores pooled over `kernel` neighbours: the mean, which counts rows beyond the ends as 0, or the largest. One thread a
// row (x) of a head (y).
KV_KERNEL kv_pool(const kv_pooled *items, uint32_t kernel, uint32_t largest) {
  const kv_pooled item = items[blockIdx.y];
  const float *source = (const float *)item.source;
  float *target = (float *)item.target;
  const uint32_t reach = kernel / 2;
  KV_GRID(i, item.count) {
    const uint32_t row = (uint32_t)i;
    float x = 0;
    if (row < item.past) {
      const uint32_t first = row < reach ? 0 : row - reach, last = row + reach < item.past ? row + reach : item.past - 1;
      x = source[first];
      // In row order, one rounding per operation: the same bits as on the host.
      for (uint32_t r = first + 1; r <= last; r++) x = !largest ? kv_add(x, source[r]) : source[r] > x ? source[r] : x;
      if (!largest && kernel > 1) x = kv_div(x, (float)kernel);
    }
    target[row] = x;
  }
}

// Larger keys for larger scores; zeros of both signs are equal.
KV_DEVICE uint32_t kv_order(float x) {
  const uint32_t bits = x == 0 ? 0 : kv_bits(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The rows with the largest scores, of equal ones the earliest, ascending: one block a head. Four passes count the keys by
// a byte each, among those that begin like the last key that is taken; then every thread writes a run of rows. `place`
// gets the least (head, row) whose score is NaN.
KV_KERNEL kv_select(const kv_choice *choices, uint32_t *chosen, unsigned long long *place) {
  KV_SHARED uint32_t counts[256], above[KV_THREADS], equal[KV_THREADS], last, left;
  const kv_choice choice = choices[blockIdx.x];
  const float *scores = (const float *)choice.scores;
  if (threadIdx.x == 0) {
    last = 0;
    left = choice.take;
  }
  for (uint32_t pass = 0; pass < 4; pass++) {
    const uint32_t shift = 24 - 8 * pass;
    KV_EACH(i, 256) counts[i] = 0;
    __syncthreads();
    const uint32_t begin = last;
    KV_EACH(i, choice.count) {
      const float x = scores[i];
      if (pass == 0 && x != x) atomicMin(place, (unsigned long long)blockIdx.x << 32 | i);
      const uint32_t key = kv_order(x);
      if (pass == 0 || (key ^ begin) >> (shift + 8) == 0) atomicAdd(&counts[key >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t byte = 255, wanted = left;
      for (; byte > 0 && counts[byte] < wanted; byte--) wanted -= counts[byte];
      last = begin | byte << shift;
      left = wanted;
    }
    __syncthreads();
  }
  // Every key above the last goes, and of its equals as many as are left.
  const uint32_t each = (choice.count + KV_THREADS - 1) / KV_THREADS, key = last, ties = left;
  const uint32_t begin = threadIdx.x * each < choice.count ? threadIdx.x * each : choice.count;
  const uint32_t end = begin + each < choice.count ? begin + each : choice.count;
  uint32_t larger = 0, same = 0;
  for (uint32_t i = begin; i < end; i++) {
    const uint32_t own = kv_order(scores[i]);
    larger += own > key;
    same += own == key;
  }
  above[threadIdx.x] = larger;
  equal[threadIdx.x] = same;
  __syncthreads();
  larger = same = 0;
  for (uint32_t t = 0; t < threadIdx.x; t++) {
    larger += above[t];
    same += equal[t];
  }
  for (uint32_t i = begin; i < end; i++) {
    const uint32_t own = kv_order(scores[i]);
    const bool taken = own > key || (own == key && same < ties);
    if (taken) chosen[choice.first + larger + (same < ties ? same : ties)] = choice.offset + i;
    larger += own > key;
    same += own == key;
  }
}
