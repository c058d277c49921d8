/* cuBLAS and cuSOLVER, opened at run time. Types and numbers are those of their documented interfaces. */
#include "ckv_cuda.h"

const char *ckv_cuda_blas_status(int status) {
  switch (status) {
    case 0: return "CUBLAS_STATUS_SUCCESS";
    case 1: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case 3: return "CUBLAS_STATUS_ALLOC_FAILED";
    case 7: return "CUBLAS_STATUS_INVALID_VALUE";
    case 8: return "CUBLAS_STATUS_ARCH_MISMATCH";
    case 11: return "CUBLAS_STATUS_MAPPING_ERROR";
    case 13: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case 14: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case 15: return "CUBLAS_STATUS_NOT_SUPPORTED";
    case 16: return "CUBLAS_STATUS_LICENSE_ERROR";
    default: return "an unknown status of cuBLAS";
  }
}

const char *ckv_cuda_solver_status(int status) {
  switch (status) {
    case 0: return "CUSOLVER_STATUS_SUCCESS";
    case 1: return "CUSOLVER_STATUS_NOT_INITIALIZED";
    case 2: return "CUSOLVER_STATUS_ALLOC_FAILED";
    case 3: return "CUSOLVER_STATUS_INVALID_VALUE";
    case 4: return "CUSOLVER_STATUS_ARCH_MISMATCH";
    case 5: return "CUSOLVER_STATUS_MAPPING_ERROR";
    case 6: return "CUSOLVER_STATUS_EXECUTION_FAILED";
    case 7: return "CUSOLVER_STATUS_INTERNAL_ERROR";
    case 8: return "CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED";
    case 9: return "CUSOLVER_STATUS_NOT_SUPPORTED";
    case 10: return "CUSOLVER_STATUS_ZERO_PIVOT";
    case 11: return "CUSOLVER_STATUS_INVALID_LICENSE";
    default: return "an unknown status of cuSOLVER";
  }
}

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

/* Releases of CUDA whose two libraries belong together, the first that is there. */
static const struct {
  const char *blas, *solver, *names;
} releases[] = {
    {"libcublas.so.12", "libcusolver.so.11", "libcublas.so.12 and libcusolver.so.11"},
    {"libcublas.so.13", "libcusolver.so.12", "libcublas.so.13 and libcusolver.so.12"},
    {"libcublas.so.11", "libcusolver.so.11", "libcublas.so.11 and libcusolver.so.11"},
};
enum { RELEASES = sizeof releases / sizeof *releases };

static ckv_cuda_libraries libraries;
static char sentence[1024];
static const char *missing;

/* The name that a library lacks, or null. */
static const char *find_functions(void *blas, void *solver) {
  struct {
    void *library;
    const char *name;
    void **place;
  } symbols[] = {
      {blas, "cublasCreate_v2", (void **)&libraries.blas_create},
      {blas, "cublasDestroy_v2", (void **)&libraries.blas_destroy},
      {blas, "cublasSetStream_v2", (void **)&libraries.blas_stream},
      {blas, "cublasSgemm_v2", (void **)&libraries.sgemm},
      {blas, "cublasDgemm_v2", (void **)&libraries.dgemm},
      {blas, "cublasDsyrk_v2", (void **)&libraries.dsyrk},
      {solver, "cusolverDnCreate", (void **)&libraries.solver_create},
      {solver, "cusolverDnDestroy", (void **)&libraries.solver_destroy},
      {solver, "cusolverDnSetStream", (void **)&libraries.solver_stream},
      {solver, "cusolverDnDsyevd_bufferSize", (void **)&libraries.dsyevd_size},
      {solver, "cusolverDnDsyevd", (void **)&libraries.dsyevd},
  };
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
    *symbols[i].place = dlsym(symbols[i].library, symbols[i].name);
    if (!*symbols[i].place) return symbols[i].name;
  }
  return NULL;
}

static void find_libraries(void) {
  size_t used = 0;
  /* What the process has loaded already comes first: an engine's own. */
  for (int pass = 0; pass < 2; pass++) {
    const int mode = RTLD_NOW | RTLD_LOCAL | (pass == 0 ? RTLD_NOLOAD : 0);
    for (size_t i = 0; i < RELEASES; i++) {
      void *blas = dlopen(releases[i].blas, mode);
      void *solver = blas ? dlopen(releases[i].solver, mode) : NULL;
      /* The loader's own words name the file, or the one that it needs. */
      const char *said = solver ? NULL : dlerror();
      const char *lacking = solver ? find_functions(blas, solver) : NULL;
      if (solver && !lacking) {
        libraries.names = releases[i].names;
        return;
      }
      if (pass == 1 && used < sizeof sentence) {
        const char *name = lacking ? releases[i].names : said ? said : releases[i].blas;
        const int more = snprintf(sentence + used, sizeof sentence - used, "%s%s%s%s", used ? "; " : "", name,
                                  lacking ? " lack " : "", lacking ? lacking : "");
        if (more > 0) used += (size_t)more;
      }
      if (solver) dlclose(solver);
      if (blas) dlclose(blas);
    }
  }
  missing = sentence;
}

const ckv_cuda_libraries *ckv_cuda_load_libraries(const char **why) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, find_libraries);
  *why = missing;
  return missing ? NULL : &libraries;
}

#else

const ckv_cuda_libraries *ckv_cuda_load_libraries(const char **why) {
  *why = "cuBLAS and cuSOLVER exist on Linux only";
  return NULL;
}

#endif
