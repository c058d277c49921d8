// Threads of a block are fibres: each runs until a barrier or a shuffle, then the next one. Blocks run one after the
// other, which every kernel must allow anyway. Device memory is memory that the processor may touch inside kernels and
// copies only: code of the host that reads it faults here as it would on a card. What is not accessible on a card (memory
// of the engine that was never pinned) is refused by `accessible`, so that staging runs here too.
#include "cuda_emulation.h"
#include "emulation.h"
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
#include <tuple>
#include <vector>
#include <csetjmp>
#include <sys/mman.h>
#include <ucontext.h>

#define KV_EMULATED 1
#define KV_KERNEL static void
#define KV_SHARED static
#define KV_DEVICE static inline
#define KV_DEVICE_MEMBER inline
#define KV_INFINITY INFINITY

struct Index3 {
  unsigned x, y;
};
static Index3 threadIdx, blockIdx, gridDim;

namespace {

enum class Waiting { no, warp, block };

struct Fibre {
  ucontext_t context;
  std::jmp_buf place;
  std::vector<char> stack;
  bool started = false;
  bool done = true;
  Waiting waiting = Waiting::no;
};

struct Block {
  std::vector<Fibre> fibres;
  std::jmp_buf scheduler;
  unsigned current = 0;
  std::function<void()> body;
  float exchange[1024];
} block;

// Back to the scheduler; returns when the fibre is run again. Jumps, because contexts cost a system call each time.
void leave(Fibre &fibre) {
  if (_setjmp(fibre.place) == 0) _longjmp(block.scheduler, 1);
}

// A fibre lives on: it runs one block after the other.
void run_fibre() {
  for (;;) {
    block.body();
    Fibre &fibre = block.fibres[block.current];
    fibre.done = true;
    leave(fibre);
  }
}

void enter(Fibre &fibre) {
  if (_setjmp(block.scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  setcontext(&fibre.context);
}

// Stops the running thread until the others of its warp or block have come to the same barrier.
void wait_for(Waiting others) {
  Fibre &own = block.fibres[block.current];
  own.waiting = others;
  leave(own);
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

void make_fibres(unsigned threads) {
  if (block.fibres.size() >= threads) return;
  block.fibres = std::vector<Fibre>(threads);
  for (Fibre &fibre : block.fibres) {
    fibre.stack.resize(64 * 1024);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, run_fibre, 0);
  }
}

void run_block(unsigned threads) {
  make_fibres(threads);
  for (unsigned i = 0; i < threads; i++) {
    block.fibres[i].done = false;
    block.fibres[i].waiting = Waiting::no;
  }
  for (;;) {
    bool running = false;
    for (unsigned i = 0; i < threads; i++) {
      if (block.fibres[i].done || block.fibres[i].waiting != Waiting::no) continue;
      block.current = i;
      threadIdx.x = i;
      enter(block.fibres[i]);
      running = true;
    }
    bool left = false, released = release(0, threads, Waiting::block);
    for (unsigned w = 0; w < threads; w += 32) released = release(w, w + 32, Waiting::warp) || released;
    for (unsigned i = 0; i < threads; i++) left = left || !block.fibres[i].done;
    if (!left) return;
    if (!running && !released) {
      // On a card this block would hang.
      fprintf(stderr, "cuda emulation: threads of a block wait at different barriers\n");
      abort();
    }
  }
}

}  // namespace

struct uint4 {
  unsigned x, y, z, w;
};

static void __syncthreads() { wait_for(Waiting::block); }
static void __syncwarp() { wait_for(Waiting::warp); }

static float __shfl_xor_sync(unsigned, float x, int mask) {
  unsigned thread = threadIdx.x;
  block.exchange[thread] = x;
  wait_for(Waiting::warp);
  float result = block.exchange[(thread & ~31u) | ((thread & 31u) ^ (unsigned)mask)];
  wait_for(Waiting::warp);
  return result;
}

static bool __any_sync(unsigned, bool x) {
  unsigned thread = threadIdx.x;
  block.exchange[thread] = x;
  wait_for(Waiting::warp);
  bool any = false;
  for (unsigned i = thread & ~31u; i < (thread | 31u) + 1; i++) any = any || block.exchange[i] != 0;
  wait_for(Waiting::warp);
  return any;
}

static unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; i++) result |= (unsigned)(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return result;
}

static void atomicMin(unsigned long long *place, unsigned long long value) {
  if (value < *place) *place = value;
}

static void atomicAdd(uint32_t *place, uint32_t value) { *place += value; }

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


static uint32_t kv_sub_halves(uint32_t a, uint32_t b) {
  return kv_to_half(kv_half((uint16_t)a) - kv_half((uint16_t)b)) |
         (uint32_t)kv_to_half(kv_half((uint16_t)(a >> 16)) - kv_half((uint16_t)(b >> 16))) << 16;
}

// A matrix product of a warp, from the fragments of its lanes as the instruction set lays them out: lane 4g + t holds rows
// g and g + 8 and columns 2t, 2t + 1, 2t + 8 and 2t + 9 of the first factor, the same rows and column g of the second.
template <bool bfloat>
static void kv_mma(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  static uint32_t fragments[1024][6];
  const unsigned thread = threadIdx.x, first = thread & ~31u, g = thread % 32 / 4, t = thread % 4;
  const uint32_t own[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(fragments[thread], own, sizeof own);
  wait_for(Waiting::warp);
  auto element = [](uint32_t pair, unsigned k) {
    const uint16_t bits = (uint16_t)(pair >> (16 * (k % 2)));
    return bfloat ? kv_float((uint32_t)bits << 16) : kv_half(bits);
  };
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = i / 2, column = 2 * t + i % 2;
    for (unsigned k = 0; k < 16; k++)
      c[i] += element(fragments[first + 4 * g + k % 8 / 2][row + k / 8 * 2], k) *
              element(fragments[first + 4 * column + k % 8 / 2][4 + k / 8], k);
  }
  wait_for(Waiting::warp);
}

#include "../../Sources/CKVCUDA/kernels/attend.cu"
#include "../../Sources/CKVCUDA/kernels/factor.cu"
#include "../../Sources/CKVCUDA/kernels/measure.cu"
#include "../../Sources/CKVCUDA/kernels/rows.cu"
#include "../../Sources/CKVCUDA/kernels/select.cu"

namespace {

std::recursive_mutex lock;
struct Allocation {
  size_t bytes;
  bool pinned;
};
std::map<uintptr_t, Allocation> allocations;  // device and pinned memory
std::atomic<long> failing{-1}, exhausting{-1};
std::map<std::string, size_t> launches;
std::map<std::string, size_t> calls;
std::string failing_call;
long failing_calls = -1;

// After an error a context is lost: nothing it was given runs any more, and every further call fails.
bool is_lost = false;
std::vector<std::function<void()>> queue;

// Counts a call; true: it fails.
bool counted(const char *name) {
  calls[name]++;
  if (failing_call == name && failing_calls >= 0 && failing_calls-- == 0) {
    is_lost = true;
    queue.clear();
  }
  return is_lost;
}
std::atomic<size_t> allocated{0};

// Makes a call of a kernel from the addresses of its arguments, which are copied as the driver copies them.
using Call = std::function<void()> (*)(void **);

template <typename... Arguments, size_t... I>
std::function<void()> bound(void (*kernel)(Arguments...), void **a, std::index_sequence<I...>) {
  std::tuple<Arguments...> values(*(std::remove_reference_t<Arguments> *)a[I]...);
  return [=] { std::apply(kernel, values); };
}

template <auto kernel> struct Trampoline;
template <typename... Arguments, void (*kernel)(Arguments...)> struct Trampoline<kernel> {
  static std::function<void()> call(void **a) { return bound(kernel, a, std::index_sequence_for<Arguments...>()); }
};

#define KERNEL(name) {#name, Trampoline<name>::call}
const std::map<std::string, Call> kernels = {
    KERNEL(kv_attend),
    KERNEL(kv_decode_f16_64),
    KERNEL(kv_decode_f16_128),
    KERNEL(kv_decode_bf16_64),
    KERNEL(kv_decode_bf16_128),
    KERNEL(kv_decode_affine2_128),
    KERNEL(kv_decode_affine4_128),
    KERNEL(kv_decode_affine8_128),
    KERNEL(kv_check_queries),
    KERNEL(kv_finish),
    KERNEL(kv_prepare),
    KERNEL(kv_restore_partials),
    KERNEL(kv_statistics),
    KERNEL(kv_window),
    KERNEL(kv_nonfinite),
    KERNEL(kv_write_rows),
    KERNEL(kv_read_rows),
    KERNEL(kv_map_rows),
    KERNEL(kv_gather),
    KERNEL(kv_to_dense),
    KERNEL(kv_to_channel),
    KERNEL(kv_to_row),
    KERNEL(kv_to_codes),
    KERNEL(kv_to_zero_numbers),
    KERNEL(kv_to_zero_row),
    KERNEL(kv_to_scaled_rows),
    KERNEL(kv_to_blocks),
    KERNEL(kv_channel_range),
    KERNEL(kv_compare),
    KERNEL(kv_normalise),
    KERNEL(kv_nearest),
    KERNEL(kv_turn_rows),
    KERNEL(kv_turn_keys),
    KERNEL(kv_mix),
    KERNEL(kv_scan),
    KERNEL(kv_add_rows),
    KERNEL(kv_restore_rows),
    KERNEL(kv_turn_channels),
    KERNEL(kv_scale_rows),
    KERNEL(kv_place_rows),
    KERNEL(kv_pool),
    KERNEL(kv_select),
    KERNEL(kv_zero_rows),
    KERNEL(kv_turn_back),
    KERNEL(kv_subtract_row),
    KERNEL(kv_to_double),
    KERNEL(kv_to_single),
    KERNEL(kv_scale_wide),
    KERNEL(kv_column_sums),
    KERNEL(kv_magnitudes),
    KERNEL(kv_sketch),
};

// Device memory: pages that nobody may touch but kernels and copies.
class Card {
public:
  // Opens the memory for as long as it lives.
  struct Access {
    Access() { card().protect(PROT_READ | PROT_WRITE); }
    ~Access() { card().protect(PROT_NONE); }
  };

  static Card &card() {
    static Card card;
    return card;
  }

  void *take(size_t bytes) {
    const size_t size = (bytes + 255) / 256 * 256;
    for (auto free = gaps.begin(); free != gaps.end(); ++free) {
      if (free->second < size) continue;
      const auto gap = *free;
      gaps.erase(free);
      if (gap.second > size) gaps[gap.first + size] = gap.second - size;
      return base + gap.first;
    }
    if (end + size > total) return nullptr;
    end += size;
    return base + end - size;
  }

  void give(void *address, size_t bytes) {
    size_t start = (char *)address - base, size = (bytes + 255) / 256 * 256;
    auto next = gaps.lower_bound(start);
    if (next != gaps.end() && next->first == start + size) {
      size += next->second;
      next = gaps.erase(next);
    }
    if (next != gaps.begin()) {
      --next;
      if (next->first + next->second == start) {
        next->second += size;
        return;
      }
    }
    gaps[start] = size;
  }

private:
  static constexpr size_t total = (size_t)1 << 34;
  char *base;
  size_t end = 0;
  std::map<size_t, size_t> gaps;
  unsigned open = 0;

  Card() : base((char *)mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (base == MAP_FAILED) abort();
  }

  void protect(int mode) {
    if (mode == PROT_NONE ? --open > 0 : open++ > 0) return;
    if (end && mprotect(base, end, mode)) abort();
  }
};

void *last_context, *last_stream;

int open_session(int ordinal, void *context, void *stream, void **session) {
  if (ordinal != 0) return 101;
  is_lost = false;
  last_context = context;
  last_stream = stream;
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

// Runs what was queued and not waited for: as late as a card might.
void drain() {
  if (queue.empty()) return;
  Card::Access access;
  std::vector<std::function<void()>> work;
  work.swap(queue);
  for (auto &call : work) call();
}

int take(size_t bytes, bool pinned, void **address) {
  std::lock_guard guard(lock);
  calls[pinned ? "allocate_host" : "allocate"]++;
  if (failing >= 0 && failing-- == 0) return 2;
  if (exhausting == 0) return 2;
  if (exhausting > 0) exhausting--;
  void *base = nullptr;
  if (pinned ? posix_memalign(&base, 256, bytes ? bytes : 1) : !(base = Card::card().take(bytes))) return 2;
  Card::Access access;
  memset(base, 0xA5, bytes < 65536 ? bytes : 65536);  // a card's memory is not zero either
  allocations[(uintptr_t)base] = {bytes, pinned};
  allocated += bytes;
  *address = base;
  return 0;
}

int give(void *address, bool pinned) {
  std::lock_guard guard(lock);
  calls[pinned ? "release_host" : "release"]++;
  auto found = allocations.find((uintptr_t)address);
  if (found == allocations.end() || found->second.pinned != pinned) return 1;
  allocated -= found->second.bytes;
  pinned ? free(address) : Card::card().give(address, found->second.bytes);
  allocations.erase(found);
  return 0;
}

int allocate(void *, size_t bytes, uint64_t *address) {
  void *base;
  int code = take(bytes, false, &base);
  if (!code) *address = (uint64_t)(uintptr_t)base;
  return code;
}
int release(void *, uint64_t address) {
  std::lock_guard guard(lock);
  drain();  // as a driver does
  return give((void *)(uintptr_t)address, false);
}
int allocate_host(void *, size_t bytes, void **address) { return take(bytes, true, address); }
int release_host(void *, void *address) {
  std::lock_guard guard(lock);
  if (!queue.empty()) {
    fprintf(stderr, "cuda emulation: pinned memory is released while work is queued\n");
    abort();
  }
  return give(address, true);
}

bool is_allocated(const void *address) {
  auto found = allocations.upper_bound((uintptr_t)address);
  if (found == allocations.begin()) return false;
  --found;
  return (uintptr_t)address < found->first + found->second.bytes;
}

bool accessible(void *, const void *address) {
  std::lock_guard guard(lock);
  calls["accessible"]++;
  return is_allocated(address);
}

// Ordinary memory is read before the call returns, and written before it returns.
int copy(void *, uint64_t target, uint64_t source, size_t bytes) {
  std::lock_guard guard(lock);
  if (counted("copy")) return 700;
  void *to = (void *)(uintptr_t)target;
  const void *from = (const void *)(uintptr_t)source;
  if (is_allocated(from)) {
    queue.push_back([=] { memmove(to, from, bytes); });
  } else {
    std::vector<char> copy((const char *)from, (const char *)from + bytes);
    queue.push_back([=] { memcpy(to, copy.data(), bytes); });
  }
  if (!is_allocated(to)) drain();
  return 0;
}

int launch(void *, void *opaque, uint32_t grid_x, uint32_t grid_y, uint32_t threads, void **arguments) {
  std::lock_guard guard(lock);
  if (counted("launch")) return 700;
  // A grid or block of nothing is an error on a card.
  if (grid_x == 0 || grid_y == 0 || grid_y > 65535 || threads == 0 || threads > 1024) return 1;
  launches[((const std::pair<const std::string, Call> *)opaque)->first]++;
  auto call = ((const std::pair<const std::string, Call> *)opaque)->second(arguments);
  queue.push_back([=] {
    block.body = call;
    gridDim = {grid_x, grid_y};
    for (unsigned y = 0; y < grid_y; y++)
      for (unsigned x = 0; x < grid_x; x++) {
        blockIdx = {x, y};
        run_block(threads);
      }
  });
  return 0;
}

int synchronize(void *) {
  std::lock_guard guard(lock);
  if (counted("synchronize")) return 700;
  drain();
  return 0;
}

thread_local unsigned entered = 0;

int enter(void *) {
  std::lock_guard guard(lock);
  if (is_lost) return 700;
  entered++;
  return 0;
}
void leave(void *) { entered--; }
void *stream_of(void *) { return last_stream; }

const char *error_name(int code) { return code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_EMULATED"; }

const ckv_cuda_driver driver = {open_session, close_session, describe,    load,      function,
                                allocate,     release,       allocate_host, release_host, copy,
                                launch,       synchronize,   accessible,  error_name,
                                enter,        leave,         stream_of};

}  // namespace

namespace emulation {
bool in_context() { return entered > 0; }

bool on_card(const void *address, size_t bytes) {
  std::lock_guard guard(lock);
  auto found = allocations.upper_bound((uintptr_t)address);
  if (found == allocations.begin()) return false;
  --found;
  return !found->second.pinned && (uintptr_t)address + bytes <= found->first + found->second.bytes;
}

bool enqueue(const char *name, std::function<void()> work) {
  std::lock_guard guard(lock);
  if (is_lost) return false;
  calls[name]++;
  queue.push_back(std::move(work));
  return true;
}
}  // namespace emulation

const void *cuda_emulation_driver(void) { return &driver; }
void cuda_emulation_fail_after(long count) { failing = count; }
void cuda_emulation_exhaust_after(long count) { exhausting = count; }
void cuda_emulation_fail_call(const char *name, long count) {
  std::lock_guard guard(lock);
  failing_call = name;
  failing_calls = count;
}
size_t cuda_emulation_calls(const char *name) {
  std::lock_guard guard(lock);
  return calls[name];
}
void cuda_emulation_opened(void **context, void **stream) {
  *context = last_context;
  *stream = last_stream;
}
void *cuda_emulation_take(size_t bytes) {
  void *address = nullptr;
  take(bytes, false, &address);
  return address;
}
void cuda_emulation_give(void *address) { release(nullptr, (uint64_t)(uintptr_t)address); }
void cuda_emulation_copy(void *target, const void *source, size_t bytes) {
  copy(nullptr, (uint64_t)(uintptr_t)target, (uint64_t)(uintptr_t)source, bytes);
  synchronize(nullptr);
}
size_t cuda_emulation_launches(const char *kernel) {
  std::lock_guard guard(lock);
  return launches[kernel];
}
size_t cuda_emulation_allocated(void) { return allocated; }
