/* The CUDA driver library, opened at run time. Types and numbers are those of its stable binary interface. */
#include "ckv_cuda.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

typedef uint64_t device_address;

static struct {
  int (*init)(unsigned);
  int (*device_get)(int *, int);
  int (*device_name)(char *, int, int);
  int (*device_attribute)(int *, int, int);
  int (*device_memory)(size_t *, int);
  int (*context_retain)(void **, int);
  int (*context_release)(int);
  int (*context_push)(void *);
  int (*context_pop)(void **);
  int (*context_device)(int *);
  int (*stream_create)(void **, unsigned);
  int (*stream_destroy)(void *);
  int (*stream_synchronize)(void *);
  int (*module_load)(void **, const void *);
  int (*module_function)(void **, void *, const char *);
  int (*memory_allocate)(device_address *, size_t);
  int (*memory_free)(device_address);
  int (*host_allocate)(void **, size_t, unsigned);
  int (*host_free)(void *);
  int (*copy)(device_address, device_address, size_t, void *);
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
  int (*pointer_attribute)(void *, int, device_address);
  int (*error_name)(int, const char **);
} cuda;

typedef struct {
  void *context, *stream;
  int device;
  bool owns_context, owns_stream;
} session;

/* Every call runs in the session's context, whichever thread makes it. */
#define IN_CONTEXT(call)                     \
  session *s = opaque;                       \
  void *popped;                              \
  int code = cuda.context_push(s->context);  \
  if (code) return code;                     \
  code = (call);                             \
  cuda.context_pop(&popped);                 \
  return code

static void close_session(void *opaque) {
  session *s = opaque;
  void *popped;
  if (s->stream && s->owns_stream && cuda.context_push(s->context) == 0) {
    cuda.stream_destroy(s->stream);
    cuda.context_pop(&popped);
  }
  if (s->owns_context) cuda.context_release(s->device);
  free(s);
}

static int open_session(int ordinal, void *context, void *stream, void **out) {
  int code = cuda.init(0);
  if (code) return code;
  session *s = calloc(1, sizeof *s);
  if (!s) return 2; /* out of memory */
  void *popped;
  if (context) {
    s->context = context;
    code = cuda.context_push(context);
    if (!code) {
      code = cuda.context_device(&s->device);
      cuda.context_pop(&popped);
    }
  } else {
    code = cuda.device_get(&s->device, ordinal);
    if (!code) code = cuda.context_retain(&s->context, s->device);
    s->owns_context = !code;
  }
  if (!code && context) {
    s->stream = stream; /* null is the engine's default stream */
  } else if (!code) {
    code = cuda.context_push(s->context);
    if (!code) {
      code = cuda.stream_create(&s->stream, 1 /* does not wait for the default stream */);
      s->owns_stream = !code;
      cuda.context_pop(&popped);
    }
  }
  if (code) {
    close_session(s);
    return code;
  }
  *out = s;
  return 0;
}

static int describe(void *opaque, char *name, size_t size, int *capability, size_t *memory) {
  session *s = opaque;
  int major, minor, code = cuda.device_name(name, (int)size, s->device);
  if (!code) code = cuda.device_attribute(&major, 75, s->device);
  if (!code) code = cuda.device_attribute(&minor, 76, s->device);
  if (!code) code = cuda.device_memory(memory, s->device);
  if (!code) *capability = major * 10 + minor;
  return code;
}

static int load(void *opaque, const void *ptx, void **module) { IN_CONTEXT(cuda.module_load(module, ptx)); }

static int function(void *opaque, void *module, const char *name, void **result) {
  IN_CONTEXT(cuda.module_function(result, module, name));
}

static int allocate(void *opaque, size_t bytes, uint64_t *address) { IN_CONTEXT(cuda.memory_allocate(address, bytes)); }

static int release(void *opaque, uint64_t address) { IN_CONTEXT(cuda.memory_free(address)); }

static int allocate_host(void *opaque, size_t bytes, void **address) {
  IN_CONTEXT(cuda.host_allocate(address, bytes, 1 | 2 /* usable from every context, mapped */));
}

static int release_host(void *opaque, void *address) { IN_CONTEXT(cuda.host_free(address)); }

static int copy(void *opaque, uint64_t target, uint64_t source, size_t bytes) {
  IN_CONTEXT(cuda.copy(target, source, bytes, s->stream));
}

static int launch(void *opaque, void *f, uint32_t grid_x, uint32_t grid_y, uint32_t threads, void **arguments) {
  IN_CONTEXT(cuda.launch(f, grid_x, grid_y, 1, threads, 1, 1, 0, s->stream, arguments, NULL));
}

static int synchronize(void *opaque) { IN_CONTEXT(cuda.stream_synchronize(s->stream)); }

static bool accessible(void *opaque, const void *address) {
  session *s = opaque;
  void *popped;
  unsigned type = 0;
  if (cuda.context_push(s->context)) return false;
  /* Memory the driver has never heard of is an error here, and means ordinary host memory. */
  int code = cuda.pointer_attribute(&type, 2, (device_address)(uintptr_t)address);
  cuda.context_pop(&popped);
  return code == 0 && type != 0;
}

static int enter(void *opaque) { return cuda.context_push(((session *)opaque)->context); }

static void leave(void *opaque) {
  void *popped;
  (void)opaque;
  cuda.context_pop(&popped);
}

static void *stream_of(void *opaque) { return ((session *)opaque)->stream; }

static const char *error_name(int code) {
  const char *name = NULL;
  return cuda.error_name(code, &name) == 0 && name ? name : "unknown CUDA error";
}

static const ckv_cuda_driver driver = {
    .open = open_session,
    .close = close_session,
    .describe = describe,
    .load = load,
    .function = function,
    .allocate = allocate,
    .release = release,
    .allocate_host = allocate_host,
    .release_host = release_host,
    .copy = copy,
    .launch = launch,
    .synchronize = synchronize,
    .accessible = accessible,
    .error_name = error_name,
    .enter = enter,
    .leave = leave,
    .stream = stream_of,
};

static const char *missing;

static void find_driver(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    missing = "libcuda.so.1, the driver library, is not installed";
    return;
  }
  struct {
    const char *name;
    void **place;
  } symbols[] = {
      {"cuInit", (void **)&cuda.init},
      {"cuDeviceGet", (void **)&cuda.device_get},
      {"cuDeviceGetName", (void **)&cuda.device_name},
      {"cuDeviceGetAttribute", (void **)&cuda.device_attribute},
      {"cuDeviceTotalMem_v2", (void **)&cuda.device_memory},
      {"cuDevicePrimaryCtxRetain", (void **)&cuda.context_retain},
      {"cuDevicePrimaryCtxRelease_v2", (void **)&cuda.context_release},
      {"cuCtxPushCurrent_v2", (void **)&cuda.context_push},
      {"cuCtxPopCurrent_v2", (void **)&cuda.context_pop},
      {"cuCtxGetDevice", (void **)&cuda.context_device},
      {"cuStreamCreate", (void **)&cuda.stream_create},
      {"cuStreamDestroy_v2", (void **)&cuda.stream_destroy},
      {"cuStreamSynchronize", (void **)&cuda.stream_synchronize},
      {"cuModuleLoadData", (void **)&cuda.module_load},
      {"cuModuleGetFunction", (void **)&cuda.module_function},
      {"cuMemAlloc_v2", (void **)&cuda.memory_allocate},
      {"cuMemFree_v2", (void **)&cuda.memory_free},
      {"cuMemHostAlloc", (void **)&cuda.host_allocate},
      {"cuMemFreeHost", (void **)&cuda.host_free},
      {"cuMemcpyAsync", (void **)&cuda.copy},
      {"cuLaunchKernel", (void **)&cuda.launch},
      {"cuPointerGetAttribute", (void **)&cuda.pointer_attribute},
      {"cuGetErrorName", (void **)&cuda.error_name},
  };
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
    *symbols[i].place = dlsym(library, symbols[i].name);
    if (!*symbols[i].place) {
      missing = "libcuda.so.1 is too old: it lacks a function this backend calls";
      return;
    }
  }
}

const ckv_cuda_driver *ckv_cuda_load_driver(const char **why) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, find_driver);
  *why = missing;
  return missing ? NULL : &driver;
}

#else

const ckv_cuda_driver *ckv_cuda_load_driver(const char **why) {
  *why = "CUDA exists on Linux only";
  return NULL;
}

#endif
