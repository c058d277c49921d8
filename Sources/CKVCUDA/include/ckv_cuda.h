/* The CUDA driver as a table of functions, found at run time: nothing of CUDA is needed to build.
 *
 * Every function returns 0 or the driver's error number. Addresses are device addresses; with unified addressing those
 * of pinned host memory are the host's. Tests pass a table that runs the same kernels on the CPU. */
#ifndef CKV_CUDA_H
#define CKV_CUDA_H

#include "ckv_cuda_abi.h"
#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ckv_cuda_driver {
  /* Opens device `ordinal`: its primary context, or `context` of the engine when not null, and `stream` or one of its own. */
  int (*open)(int ordinal, void *context, void *stream, void **session);
  void (*close)(void *session);
  /* The card's name and compute capability (major * 10 + minor). */
  int (*describe)(void *session, char *name, size_t size, int *capability, size_t *memory);
  int (*load)(void *session, const void *ptx, void **module);
  int (*function)(void *session, void *module, const char *name, void **function);
  int (*allocate)(void *session, size_t bytes, uint64_t *address);
  int (*release)(void *session, uint64_t address);
  /* Pinned host memory that kernels read and write in place. */
  int (*allocate_host)(void *session, size_t bytes, void **address);
  int (*release_host)(void *session, void *address);
  /* Queued on the stream; any mixture of host and device addresses. */
  int (*copy)(void *session, uint64_t target, uint64_t source, size_t bytes);
  int (*launch)(void *session, void *function, uint32_t grid_x, uint32_t grid_y, uint32_t threads, void **arguments);
  int (*synchronize)(void *session);
  /* Whether kernels can use the address: device, managed or pinned memory. */
  bool (*accessible)(void *session, const void *address);
  const char *(*error_name)(int code);
} ckv_cuda_driver;

/* The driver of this machine, or null with a sentence about what was looked for and not found. */
const ckv_cuda_driver *ckv_cuda_load_driver(const char **why);

/* A compiled module by name ("attend", "rows", "measure", "select"), zero-terminated PTX. */
const char *ckv_cuda_ptx(const char *name);

#ifdef __cplusplus
}
#endif
#endif
