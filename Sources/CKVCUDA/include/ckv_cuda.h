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
  /* Makes the session's context the calling thread's, for libraries that compute in it, until `leave`. */
  int (*enter)(void *session);
  void (*leave)(void *session);
  void *(*stream)(void *session);
} ckv_cuda_driver;

/* cuBLAS and cuSOLVER as a table of their own functions: matrices are column by column, numbers that scale them lie in
 * host memory. Each returns 0 or a status of its library. Tests pass a table that computes on the CPU. */
typedef struct ckv_cuda_libraries {
  const char *names;
  int (*blas_create)(void **handle);
  int (*blas_destroy)(void *handle);
  int (*blas_stream)(void *handle, void *stream);
  /* c [m][n] = alpha * op(a) op(b) + beta * c, op(a) [m][k]. */
  int (*sgemm)(void *handle, int op_a, int op_b, int m, int n, int k, const float *alpha, const float *a, int lda,
               const float *b, int ldb, const float *beta, float *c, int ldc);
  int (*dgemm)(void *handle, int op_a, int op_b, int m, int n, int k, const double *alpha, const double *a, int lda,
               const double *b, int ldb, const double *beta, double *c, int ldc);
  /* One triangle of c [n][n] = alpha * op(a) op(a)' + beta * c, op(a) [n][k]. */
  int (*dsyrk)(void *handle, int triangle, int op, int n, int k, const double *alpha, const double *a, int lda,
               const double *beta, double *c, int ldc);
  int (*solver_create)(void **handle);
  int (*solver_destroy)(void *handle);
  int (*solver_stream)(void *handle, void *stream);
  /* Doubles of memory that `dsyevd` works in. */
  int (*dsyevd_size)(void *handle, int mode, int triangle, int n, const double *a, int lda, const double *values,
                     int *size);
  /* Replaces a symmetric matrix by its eigenvectors, ascending values. `info` is on the card. */
  int (*dsyevd)(void *handle, int mode, int triangle, int n, double *a, int lda, double *values, double *work, int size,
                int *info);
} ckv_cuda_libraries;

/* Numbers of both libraries' interfaces. */
enum {
  CKV_CUDA_AS_IT_IS = 0,
  CKV_CUDA_TRANSPOSED = 1,
  CKV_CUDA_LOWER = 0,
  CKV_CUDA_UPPER = 1,
  CKV_CUDA_VECTORS = 1,
  CKV_CUDA_BLAS_OUT_OF_MEMORY = 3,
  CKV_CUDA_SOLVER_OUT_OF_MEMORY = 2,
};

/* The libraries of this machine, or null with a sentence about what was looked for and not found. */
const ckv_cuda_libraries *ckv_cuda_load_libraries(const char **why);

/* What a status is called. */
const char *ckv_cuda_blas_status(int status);
const char *ckv_cuda_solver_status(int status);

/* The driver of this machine, or null with a sentence about what was looked for and not found. */
const ckv_cuda_driver *ckv_cuda_load_driver(const char **why);

/* A compiled module by name ("attend", "rows", "measure", "select", "factor"), zero-terminated PTX. */
const char *ckv_cuda_ptx(const char *name);

#ifdef __cplusplus
}
#endif
#endif
