// Threads of a block are fibres: each runs until a barrier or a shuffle, then the next one. Blocks run one after the
// other, which every kernel must allow anyway. Device memory is host memory; what is not accessible on a card (memory
// of the engine that was never pinned) is refused by `accessible`, so that staging runs here too.
#include "cuda_emulation.h"
#include "../../Sources/CKVCUDA/include/ckv_cuda.h"
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>
#include <ucontext.h>

#define KV_EMULATED 1
#define KV_KERNEL static void
#define KV_SHARED static
#define KV_DEVICE static inline
#define KV_INFINITY INFINITY

struct Index3 {
  unsigned x, y;
};
static Index3 threadIdx, blockIdx, gridDim;

namespace {

enum class Waiting { no, warp, block };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  Waiting waiting;
};

struct Block {
  std::vector<Fibre> fibres;
  ucontext_t scheduler;
  unsigned current = 0;
  std::function<void()> body;
  float exchange[1024];
} block;

void run_fibre() {
  block.body();
  block.fibres[block.current].done = true;
  swapcontext(&block.fibres[block.current].context, &block.scheduler);
}

// Stops the running thread until the others of its warp or block have come to the same barrier.
void wait_for(Waiting others) {
  unsigned own = block.current;
  block.fibres[own].waiting = others;
  swapcontext(&block.fibres[own].context, &block.scheduler);
}

// Lets threads first ..< end go on if all that still run wait at the same kind of barrier.
bool release(unsigned first, unsigned end, Waiting kind) {
  bool any = false;
  for (unsigned i = first; i < end; i++) {
    if (block.fibres[i].done) continue;
    if (block.fibres[i].waiting != kind) return false;
    any = true;
  }
  for (unsigned i = first; i < end; i++) block.fibres[i].waiting = Waiting::no;
  return any;
}

void run_block(unsigned threads) {
  block.fibres.resize(threads);
  for (unsigned i = 0; i < threads; i++) {
    Fibre &fibre = block.fibres[i];
    fibre.done = false;
    fibre.waiting = Waiting::no;
    fibre.stack.resize(64 * 1024);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, run_fibre, 0);
  }
  for (;;) {
    bool running = false;
    for (unsigned i = 0; i < threads; i++) {
      if (block.fibres[i].done || block.fibres[i].waiting != Waiting::no) continue;
      block.current = i;
      threadIdx.x = i;
      swapcontext(&block.scheduler, &block.fibres[i].context);
      running = true;
    }
    bool left = false, released = release(0, threads, Waiting::block);
    for (unsigned w = 0; w < threads; w += 32) released = release(w, w + 32, Waiting::warp) || released;
    for (const Fibre &fibre : block.fibres) left = left || !fibre.done;
    if (!left) return;
    if (!running && !released) {
      // On a card this block would hang.
      fprintf(stderr, "cuda emulation: threads of a block wait at different barriers\n");
      abort();
    }
  }
}

}  // namespace

static void __syncthreads() { wait_for(Waiting::block); }

static float __shfl_xor_sync(unsigned, float x, int mask) {
  unsigned thread = threadIdx.x;
  block.exchange[thread] = x;
  wait_for(Waiting::warp);
  float result = block.exchange[(thread & ~31u) | ((thread & 31u) ^ (unsigned)mask)];
  wait_for(Waiting::warp);
  return result;
}

static void atomicMin(unsigned long long *place, unsigned long long value) {
  if (value < *place) *place = value;
}

static inline float kv_half(uint16_t bits) {
  _Float16 h;
  memcpy(&h, &bits, 2);
  return (float)h;
}
static inline uint16_t kv_to_half(float x) {
  _Float16 h = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}
#pragma clang fp contract(off)
static inline float kv_mul(float a, float b) { return a * b; }
static inline float kv_add(float a, float b) { return a + b; }
static inline float kv_div(float a, float b) { return a / b; }
static inline float kv_round(float x) { return rintf(x); }
static inline uint32_t kv_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float kv_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

#include "../../Sources/CKVCUDA/kernels/attend.cu"
#include "../../Sources/CKVCUDA/kernels/rows.cu"

namespace {

std::recursive_mutex lock;
std::map<uintptr_t, size_t> allocations;  // device and pinned memory
std::atomic<long> failing{-1};
std::atomic<size_t> allocated{0};

using Call = void (*)(void **);

template <typename... Arguments, size_t... I>
void apply(void (*kernel)(Arguments...), void **a, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<Arguments> *)a[I]...);
}

template <auto kernel> struct Trampoline;
template <typename... Arguments, void (*kernel)(Arguments...)> struct Trampoline<kernel> {
  static void call(void **a) { apply(kernel, a, std::index_sequence_for<Arguments...>()); }
};

const std::map<std::string, Call> kernels = {
    {"kv_attend", Trampoline<kv_attend>::call},         {"kv_finish", Trampoline<kv_finish>::call},
    {"kv_statistics", Trampoline<kv_statistics>::call}, {"kv_window", Trampoline<kv_window>::call},
    {"kv_nonfinite", Trampoline<kv_nonfinite>::call},
    {"kv_write_rows", Trampoline<kv_write_rows>::call}, {"kv_read_rows", Trampoline<kv_read_rows>::call},
    {"kv_to_dense", Trampoline<kv_to_dense>::call},     {"kv_to_channel", Trampoline<kv_to_channel>::call},
    {"kv_to_row", Trampoline<kv_to_row>::call},         {"kv_load_queries", Trampoline<kv_load_queries>::call},
};

int open_session(int ordinal, void *, void *, void **session) {
  if (ordinal != 0) return 101;
  *session = &lock;
  return 0;
}
void close_session(void *) {}

int describe(void *, char *name, size_t size, int *capability, size_t *memory) {
  snprintf(name, size, "emulated");
  *capability = 80;
  *memory = (size_t)1 << 40;
  return 0;
}

int load(void *, const void *ptx, void **module) {
  // A card would refuse a text without these; the emulation checks that the right thing was passed.
  if (!strstr((const char *)ptx, ".target sm_80")) return 218;
  *module = (void *)ptx;
  return 0;
}

int function(void *, void *module, const char *name, void **result) {
  auto found = kernels.find(name);
  std::string entry = std::string(".entry ") + name + "(";
  if (found == kernels.end() || !strstr((const char *)module, entry.c_str())) return 500;
  *result = (void *)&*found;
  return 0;
}

int take(size_t bytes, void **address) {
  std::lock_guard guard(lock);
  if (failing >= 0 && failing-- == 0) return 2;
  void *base = nullptr;
  if (posix_memalign(&base, 256, bytes ? bytes : 1)) return 2;
  memset(base, 0xA5, bytes);  // a card's memory is not zero either
  allocations[(uintptr_t)base] = bytes;
  allocated += bytes;
  *address = base;
  return 0;
}

int give(void *address) {
  std::lock_guard guard(lock);
  auto found = allocations.find((uintptr_t)address);
  if (found == allocations.end()) return 1;
  allocated -= found->second;
  allocations.erase(found);
  free(address);
  return 0;
}

int allocate(void *, size_t bytes, uint64_t *address) {
  void *base;
  int code = take(bytes, &base);
  if (!code) *address = (uint64_t)(uintptr_t)base;
  return code;
}
int release(void *, uint64_t address) { return give((void *)(uintptr_t)address); }
int allocate_host(void *, size_t bytes, void **address) { return take(bytes, address); }
int release_host(void *, void *address) { return give(address); }

int copy(void *, uint64_t target, uint64_t source, size_t bytes) {
  memmove((void *)(uintptr_t)target, (const void *)(uintptr_t)source, bytes);
  return 0;
}

int launch(void *, void *opaque, uint32_t grid_x, uint32_t grid_y, uint32_t threads, void **arguments) {
  std::lock_guard guard(lock);
  // A grid or block of nothing is an error on a card.
  if (grid_x == 0 || grid_y == 0 || grid_y > 65535 || threads == 0 || threads > 1024) return 1;
  auto entry = (const std::pair<const std::string, Call> *)opaque;
  block.body = [&] { entry->second(arguments); };
  gridDim = {grid_x, grid_y};
  for (unsigned y = 0; y < grid_y; y++)
    for (unsigned x = 0; x < grid_x; x++) {
      blockIdx = {x, y};
      run_block(threads);
    }
  return 0;
}

int synchronize(void *) { return 0; }

bool accessible(void *, const void *address) {
  std::lock_guard guard(lock);
  auto found = allocations.upper_bound((uintptr_t)address);
  if (found == allocations.begin()) return false;
  --found;
  return (uintptr_t)address < found->first + found->second;
}

const char *error_name(int code) { return code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_EMULATED"; }

const ckv_cuda_driver driver = {open_session, close_session, describe,    load,      function,
                                allocate,     release,       allocate_host, release_host, copy,
                                launch,       synchronize,   accessible,  error_name};

}  // namespace

const void *cuda_emulation_driver(void) { return &driver; }
void cuda_emulation_fail_after(long count) { failing = count; }
size_t cuda_emulation_allocated(void) { return allocated; }
