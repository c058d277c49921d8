/* Counts the heap allocations of the calling thread, by standing in front of glibc's malloc.
 * On other C libraries and under sanitizers, which do the same for their own purposes, it reports that it cannot. */
#ifndef ALLOCATION_COUNTER_H
#define ALLOCATION_COUNTER_H
#include <stdbool.h>

bool allocation_counter_available(void);
/* Allocations (malloc, calloc, realloc, aligned forms) of this thread since it began. */
long allocation_counter_value(void);

#endif
