/* A CUDA driver that is none: the kernels of Sources/CKVCUDA, compiled as C++, run thread by thread on the CPU. */
#ifndef CUDA_EMULATION_H
#define CUDA_EMULATION_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A `ckv_cuda_driver`. */
const void *cuda_emulation_driver(void);

/* A `ckv_cuda_libraries`: matrix products by their definition, eigenvectors by Jacobi's rotations. */
const void *cuda_emulation_libraries(void);

/* Makes the call of a function of the libraries ("cublasDsyrk_v2") after `count` further ones give `status`; a negative
 * count none. */
void cuda_emulation_fail_library(const char *name, long count, int status);

/* What `info` of the next decompositions will be. */
void cuda_emulation_set_info(int info);

/* Handles of both libraries that are open now. */
size_t cuda_emulation_handles(void);

/* Makes the allocation after `count` further ones fail; a negative count never. */
void cuda_emulation_fail_after(long count);

/* Makes all allocations after `count` further ones fail; a negative count none. */
void cuda_emulation_exhaust_after(long count);

/* Makes the call of a function of the driver ("launch", "copy", "synchronize") after `count` further ones give an error; a
 * negative count none. The context is lost then: all further calls fail until one is opened anew. */
void cuda_emulation_fail_call(const char *name, long count);

/* Calls of a function of the driver so far, by its name in `ckv_cuda_driver`. */
size_t cuda_emulation_calls(const char *name);

/* The context and stream that the last session was opened with. */
void cuda_emulation_opened(void **context, void **stream);

/* Device memory of an engine, and copies to and from it. */
void *cuda_emulation_take(size_t bytes);
void cuda_emulation_give(void *address);
void cuda_emulation_copy(void *target, const void *source, size_t bytes);

/* How often a kernel was launched. */
size_t cuda_emulation_launches(const char *kernel);

/* Bytes of device memory that are allocated now. */
size_t cuda_emulation_allocated(void);

#ifdef __cplusplus
}
#endif
#endif
