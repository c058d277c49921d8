/* A CUDA driver library whose calls return at once: what is left of a decoding step is what the host does.
 *
 *   make host-time
 *
 * builds this as libcuda.so.1 and runs `kvlab bench --backend cuda --filter host/` on it. Device memory is never touched
 * by the host, so only addresses are handed out. Kernels do nothing, but for the one whose result decides which rows stay:
 * it takes the first ones, because what is chosen must be rows that exist.
 *
 * Loaded in advance (LD_PRELOAD) it also stands in front of glibc's malloc and counts. */
#define _GNU_SOURCE
#include "ckv_cuda_abi.h"
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static _Thread_local long allocations __attribute__((tls_model("initial-exec")));

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

void *malloc(size_t size) {
  allocations++;
  return __libc_malloc(size);
}

void *calloc(size_t number, size_t size) {
  allocations++;
  return __libc_calloc(number, size);
}

void *realloc(void *old, size_t size) {
  allocations++;
  return __libc_realloc(old, size);
}

void *aligned_alloc(size_t alignment, size_t size) {
  allocations++;
  return __libc_memalign(alignment, size);
}

int posix_memalign(void **result, size_t alignment, size_t size) {
  allocations++;
  void *memory = __libc_memalign(alignment, size);
  if (!memory) return ENOMEM;
  *result = memory;
  return 0;
}

/* Heap allocations of the calling thread so far. */
long null_cuda_allocations(void) { return allocations; }

/* Calls that decoding makes: launches, copies, waits, questions after an address, allocations. */
static long calls[5];
long null_cuda_calls(int kind) { return calls[kind]; }

int cuInit(unsigned flags) { return 0; }

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? 0 : 101;
}

int cuDeviceGetName(char *name, int size, int device) {
  snprintf(name, (size_t)size, "none");
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0;
  return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = (size_t)1 << 40;
  return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = (void *)16;
  return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxPushCurrent_v2(void *context) { return 0; }

int cuCtxPopCurrent_v2(void **context) {
  *context = (void *)16;
  return 0;
}

int cuCtxGetDevice(int *device) {
  *device = 0;
  return 0;
}

int cuStreamCreate(void **stream, unsigned flags) {
  *stream = (void *)32;
  return 0;
}

int cuStreamDestroy_v2(void *stream) { return 0; }

int cuStreamSynchronize(void *stream) {
  calls[2]++;
  return 0;
}

int cuModuleLoadData(void **module, const void *text) {
  *module = (void *)48;
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = strcmp(name, "kv_select") == 0 ? (void *)80 : (void *)64;
  return 0;
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  static uint64_t next = (uint64_t)1 << 44;
  *address = next;
  next += (bytes + 511) / 512 * 512;
  calls[4]++;
  return 0;
}

int cuMemFree_v2(uint64_t address) { return 0; }

int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
  calls[4]++;
  *address = __libc_memalign(256, bytes);
  if (!*address) return 2;
  memset(*address, 0, bytes);
  return 0;
}

int cuMemFreeHost(void *address) {
  free(address);
  return 0;
}

/* The last choice of rows: its heads, and where the card would have put it. */
static struct {
  const kv_choice *choices;
  uint64_t result;
  unsigned count;
} chosen;

int cuMemcpyAsync(uint64_t target, uint64_t source, size_t bytes, void *stream) {
  calls[1]++;
  if (source != chosen.result || !source) return 0;
  uint32_t *rows = (uint32_t *)(uintptr_t)target;
  for (unsigned head = 0; head < chosen.count; head++)
    for (uint32_t row = 0; row < chosen.choices[head].take; row++)
      rows[chosen.choices[head].first + row] = chosen.choices[head].offset + row;
  return 0;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
  calls[0]++;
  if (function == (void *)80) {
    chosen.choices = *(const kv_choice **)arguments[0];
    chosen.result = *(uint64_t *)arguments[1];
    chosen.count = x;
  }
  return 0;
}

/* Every address is one the card reaches: tensors of an engine in device memory. */
int cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
  calls[3]++;
  *(unsigned *)value = 2;
  return 0;
}

int cuGetErrorName(int code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_NULL";
  return 0;
}
