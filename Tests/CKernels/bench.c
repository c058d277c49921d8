/* The benchmark: one decode step of 32 query heads over 8 KV heads of 32768 rows of 128 channels, cold cache. */
#include "harness.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { HEADS = 8, ROWS = 32768, DIM = 128, CHUNK = 1024, GROUP = 32, MAX_M = 128, REPEATS = 15 };

typedef struct {
  const char *name;
  uint32_t type, bits; /* bits = 0: dense */
} store_kind;

/* One copy of a store: every head's keys and values. */
typedef struct {
  ckv_run keys[HEADS], values[HEADS];
  size_t bytes;
} store;

typedef struct {
  const ckv_kernels *k;
  const store *from;
  uint32_t m;
  uint32_t head_begin, head_end;
  float *q, *logits, *acc, *scratch;
} job;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare_doubles(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *times, int n) {
  qsort(times, (size_t)n, sizeof *times, compare_doubles);
  return times[n / 2];
}

static void *aligned(size_t bytes) {
  void *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!p) abort();
  memset(p, 0, bytes);
  return p;
}

static size_t code_bytes(uint32_t bits) { return (size_t)ROWS * DIM * bits / 8; }
static const size_t meta_bytes = (size_t)ROWS * DIM / GROUP * 2;

static store make_store(const ckv_kernels *k, store_kind kind, const float *source) {
  store s = {.bytes = 0};
  for (int h = 0; h < HEADS; h++) {
    for (int side = 0; side < 2; side++) {
      ckv_run run = {.dtype = kind.type, .bits = kind.bits, .group = GROUP, .dim = DIM, .rows = ROWS,
                     .row_stride = DIM};
      if (kind.bits == 0) {
        size_t bytes = (size_t)ROWS * DIM * (kind.type == CKV_F32 ? 4 : 2);
        void *data = aligned(bytes);
        k->convert(data, kind.type, source, CKV_F32, (size_t)ROWS * DIM);
        run.kind = CKV_DENSE;
        run.data = data;
        s.bytes += bytes;
      } else {
        uint32_t *codes = aligned(code_bytes(kind.bits));
        void *scale = aligned(meta_bytes), *min = aligned(meta_bytes);
        (side ? k->encode_row : k->encode_channel)(source, CKV_F32, DIM, ROWS, DIM, GROUP, kind.bits, CKV_F16, codes,
                                                   scale, min);
        run.kind = side ? CKV_AFFINE_ROW : CKV_AFFINE_CHANNEL;
        run.data = codes;
        run.scale = scale;
        run.min = min;
        s.bytes += code_bytes(kind.bits) + 2 * meta_bytes;
      }
      if (side) s.values[h] = run;
      else s.keys[h] = run;
    }
  }
  return s;
}

static void free_store(store *s) {
  for (int h = 0; h < HEADS; h++) {
    const ckv_run *runs[2] = {&s->keys[h], &s->values[h]};
    for (int side = 0; side < 2; side++) {
      free((void *)runs[side]->data);
      free((void *)runs[side]->scale);
      free((void *)runs[side]->min);
    }
  }
}

static void attend(const job *j) {
  for (uint32_t h = j->head_begin; h < j->head_end; h++) {
    for (uint32_t first = 0; first < ROWS; first += CHUNK) {
      j->k->logits(&j->from->keys[h], first, CHUNK, j->q, j->m, DIM, 0.088f, j->logits, CHUNK, j->scratch);
      for (uint32_t i = 0; i < j->m; i++) {
        float sum;
        j->k->softmax(j->logits + i * CHUNK, CHUNK, 0, NULL, &sum);
      }
      j->k->accumulate(&j->from->values[h], first, CHUNK, j->logits, j->m, CHUNK, j->acc, DIM, j->scratch);
    }
  }
}

static void *attend_thread(void *p) {
  attend(p);
  return NULL;
}

static double time_attend(const ckv_kernels *k, store *copies, int count, uint32_t m, uint32_t threads) {
  static float q[MAX_M * DIM];
  rng r = {7};
  for (int i = 0; i < MAX_M * DIM; i++) q[i] = rng_float(&r);
  job jobs[2];
  for (uint32_t t = 0; t < threads; t++) {
    jobs[t] = (job){.k = k, .m = m, .head_begin = t * HEADS / threads, .head_end = (t + 1) * HEADS / threads, .q = q,
                    .logits = aligned((size_t)MAX_M * CHUNK * 4), .acc = aligned((size_t)MAX_M * DIM * 4),
                    .scratch = aligned(ckv_scratch_floats(DIM, m) * 4)};
  }
  double times[REPEATS];
  for (int i = -1; i < REPEATS; i++) {
    for (uint32_t t = 0; t < threads; t++) jobs[t].from = &copies[(i + 1) % count];
    double start = now();
    if (threads == 1) {
      attend(&jobs[0]);
    } else {
      pthread_t other;
      pthread_create(&other, NULL, attend_thread, &jobs[1]);
      attend(&jobs[0]);
      pthread_join(other, NULL);
    }
    if (i >= 0) times[i] = now() - start;
  }
  for (uint32_t t = 0; t < threads; t++) {
    free(jobs[t].logits);
    free(jobs[t].acc);
    free(jobs[t].scratch);
  }
  return median(times, REPEATS);
}

/* Logits of many query rows over all heads: the scoring of a window. */
static double time_scoring(const ckv_kernels *k, const store *s, uint32_t m) {
  static float q[MAX_M * DIM];
  rng r = {9};
  for (int i = 0; i < MAX_M * DIM; i++) q[i] = rng_float(&r);
  float *out = aligned((size_t)MAX_M * CHUNK * 4), *scratch = aligned(ckv_scratch_floats(DIM, m) * 4);
  double times[5];
  for (int i = 0; i < 5; i++) {
    double start = now();
    for (int h = 0; h < HEADS; h++)
      for (uint32_t first = 0; first < ROWS; first += CHUNK)
        k->logits(&s->keys[h], first, CHUNK, q, m, DIM, 0.088f, out, CHUNK, scratch);
    times[i] = now() - start;
  }
  free(out);
  free(scratch);
  return median(times, 5);
}

typedef struct {
  const ckv_kernels *k;
  const char *data;
  size_t bytes;
} read_job;

static void *read_thread(void *p) {
  read_job *j = p;
  volatile uint64_t sum = j->k->read_memory(j->data, j->bytes);
  (void)sum;
  return NULL;
}

static double bandwidth(const ckv_kernels *k, uint32_t threads) {
  const size_t bytes = (size_t)512 << 20;
  static char *data;
  if (!data) {
    data = aligned(bytes);
    memset(data, 1, bytes);
  }
  double times[5];
  for (int i = 0; i < 5; i++) {
    read_job a = {k, data, bytes / threads}, b = {k, data + bytes / 2, bytes / 2};
    pthread_t other;
    double start = now();
    if (threads == 2) pthread_create(&other, NULL, read_thread, &b);
    read_thread(&a);
    if (threads == 2) pthread_join(other, NULL);
    times[i] = now() - start;
  }
  return (double)bytes / median(times, 5) * 1e-9;
}

static void bench_encoding(const ckv_kernels *k, const float *source) {
  uint32_t *codes = aligned(code_bytes(8));
  void *scale = aligned(meta_bytes), *min = aligned(meta_bytes);
  float *out = aligned((size_t)ROWS * DIM * 4);
  double bytes = (double)ROWS * DIM * 4;
  for (uint32_t bits = 2; bits <= 8; bits += bits == 4 ? 4 : 1) {
    double times[4][5];
    for (int i = 0; i < 5; i++) {
      double t0 = now();
      k->encode_channel(source, CKV_F32, DIM, ROWS, DIM, GROUP, bits, CKV_F16, codes, scale, min);
      double t1 = now();
      ckv_run run = {.kind = CKV_AFFINE_CHANNEL, .dtype = CKV_F16, .bits = bits, .group = GROUP, .dim = DIM,
                     .rows = ROWS, .data = codes, .scale = scale, .min = min};
      k->decode(&run, 0, ROWS, out, DIM);
      double t2 = now();
      k->encode_row(source, CKV_F32, DIM, ROWS, DIM, GROUP, bits, CKV_F16, codes, scale, min);
      double t3 = now();
      run.kind = CKV_AFFINE_ROW;
      k->decode(&run, 0, ROWS, out, DIM);
      times[0][i] = t1 - t0;
      times[1][i] = t2 - t1;
      times[2][i] = t3 - t2;
      times[3][i] = now() - t3;
    }
    printf("  %u bit: encode channel %5.2f  row %5.2f   decode channel %5.2f  row %5.2f GB/s of f32\n", bits,
           bytes / median(times[0], 5) * 1e-9, bytes / median(times[2], 5) * 1e-9,
           bytes / median(times[1], 5) * 1e-9, bytes / median(times[3], 5) * 1e-9);
  }
  free(codes);
  free(scale);
  free(min);
  free(out);
}

int run_bench(const char *name) {
  const ckv_kernels *k = name ? kernels_named(name) : ckv_best();
  static const store_kind kinds[] = {{"f32", CKV_F32, 0},      {"f16", CKV_F16, 0},      {"bf16", CKV_BF16, 0},
                                     {"affine8", CKV_F16, 8}, {"affine4", CKV_F16, 4}, {"affine3", CKV_F16, 3},
                                     {"affine2", CKV_F16, 2}};
  float *source = aligned((size_t)ROWS * DIM * 4);
  rng r = {3};
  for (size_t i = 0; i < (size_t)ROWS * DIM; i++) source[i] = rng_float(&r) + rng_float(&r);
  double read1 = bandwidth(k, 1), read2 = bandwidth(k, 2);
  printf("level %s; read_memory %.1f GB/s on one thread, %.1f on two\n", k->name, read1, read2);
  printf("decode step, %d KV heads x %d rows x %d channels, cold, median ms\n", HEADS, ROWS, DIM);
  printf("%-8s %7s | m=4: %7s %9s %7s %8s | m=1 %6s m=32 %7s %6s | m=128 logits\n", "store", "MB", "1 thr", "%of read",
         "vs f16", "2 thr", "", "", "/m=4");
  double f16 = 0;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    store copies[16];
    int count = 0;
    copies[count++] = make_store(k, kinds[i], source);
    while (count < 16 && (double)count * (double)copies[0].bytes < 160e6)
      copies[count++] = make_store(k, kinds[i], source);
    double one = time_attend(k, copies, count, 4, 1), two = time_attend(k, copies, count, 4, 2);
    double single = time_attend(k, copies, count, 1, 1), many = time_attend(k, copies, count, 32, 1);
    double scoring = time_scoring(k, &copies[0], 128);
    if (kinds[i].type == CKV_F16 && kinds[i].bits == 0) f16 = one;
    printf("%-8s %7.1f |      %7.2f %8.0f%% %7.2f %8.2f |     %6.2f      %7.2f %6.2f | %8.1f\n", kinds[i].name,
           (double)copies[0].bytes * 1e-6, one * 1e3, (double)copies[0].bytes / one * 1e-9 / read1 * 100,
           f16 > 0 ? one / f16 : 0, two * 1e3, single * 1e3, many * 1e3, many / one, scoring * 1e3);
    fflush(stdout);
    while (count) free_store(&copies[--count]);
  }
  bench_encoding(k, source);
  free(source);
  return 0;
}
