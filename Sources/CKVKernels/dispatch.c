/* Which levels exist, which of them this CPU can run, and the layout arithmetic that callers need. */
#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* The operating system saves the registers in `mask` (xcr0 bits). */
static bool os_saves(uint32_t mask) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

static bool cpu_has_avx2(void) {
  uint32_t a, b, c, d;
  if (!os_saves(0x6) || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  if (!(c & bit_FMA) || !(c & bit_F16C)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

static bool cpu_has_avx512(void) {
  uint32_t a, b, c, d, need = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  /* xmm, ymm, mask registers, upper halves of zmm0-15, zmm16-31 */
  if (!os_saves(0xe6) || !cpu_has_avx2()) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & need) == need;
}

static bool cpu_has_vnni(void) {
  uint32_t a, b, c, d;
  return cpu_has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & bit_AVX512VNNI);
}

static bool cpu_has_bf16(void) {
  uint32_t a, b, c, d;
  return cpu_has_vnni() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

const ckv_kernels *ckv_bf16_products(const ckv_kernels *level) {
  return level == &ckv_avx512_vnni && cpu_has_bf16() ? &ckv_avx512_bf16 : NULL;
}

size_t ckv_level_count(void) { return 3; }

const ckv_kernels *ckv_level(size_t index) {
  switch (index) {
    case 0: return cpu_has_vnni() ? &ckv_avx512_vnni : &ckv_avx512;
    case 1: return &ckv_avx2;
    case 2: return &ckv_portable;
    default: return NULL;
  }
}

bool ckv_level_supported(size_t index) {
  switch (index) {
    case 0: return cpu_has_avx512();
    case 1: return cpu_has_avx2();
    default: return index == 2;
  }
}

#elif defined(__aarch64__)

#if defined(__APPLE__)
#include <sys/sysctl.h>

static bool cpu_has_dot(void) {
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has;
}
#elif defined(__linux__)
#include <sys/auxv.h>

static bool cpu_has_dot(void) { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; } /* HWCAP_ASIMDDP */
#else
static bool cpu_has_dot(void) { return false; }
#endif

/* NEON with f16 conversions is part of baseline A64. */
size_t ckv_level_count(void) { return 2; }
const ckv_kernels *ckv_level(size_t index) {
  if (index == 0) return cpu_has_dot() ? &ckv_neon_dot : &ckv_neon;
  return index == 1 ? &ckv_portable : NULL;
}
bool ckv_level_supported(size_t index) { return index < 2; }

#else

size_t ckv_level_count(void) { return 1; }
const ckv_kernels *ckv_level(size_t index) { return index == 0 ? &ckv_portable : NULL; }
bool ckv_level_supported(size_t index) { return index == 0; }

#endif

#if !defined(__x86_64__)
const ckv_kernels *ckv_bf16_products(const ckv_kernels *level) {
  (void)level;
  return NULL;
}
#endif

const ckv_kernels *ckv_best(void) {
  size_t index = 0;
  while (!ckv_level_supported(index)) index++; /* the last one, portable, always is */
  return ckv_level(index);
}

const ckv_kernels *ckv_named(const char *name) {
  for (size_t i = 0; i < ckv_level_count(); i++) {
    const ckv_kernels *level = ckv_level(i);
    if (strcmp(level->name, name) == 0) return ckv_level_supported(i) ? level : NULL;
  }
  return NULL;
}

uint32_t ckv_row_words(uint32_t dim, uint32_t bits) {
  return bits == 3 ? ckv_plane_words(dim, 2) + ckv_plane_words(dim, 1) : ckv_plane_words(dim, bits);
}

uint32_t ckv_group_words(uint32_t group, uint32_t bits) { return group / 32 * bits; }

uint32_t ckv_block_bytes(uint32_t code) {
  switch (code) {
    case CKV_Q8_0: return 34;
    case CKV_Q5_0: return 22;
    case CKV_Q5_1: return 24;
    case CKV_Q4_1: return 20;
    default: return 18; /* q4_0, iq4_nl */
  }
}

size_t ckv_row_bytes(uint32_t kind, uint32_t code, uint32_t dim) {
  if (kind == CKV_GGML) return (size_t)(dim / 32) * ckv_block_bytes(code);
  return code == CKV_INT4 ? ((size_t)dim + 1) / 2 : dim;
}

static size_t at_least(size_t a, size_t b) { return a > b ? a : b; }
static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

/* Enough for the hungriest user of every level:
 *   rows as f32: a tile and its transpose;
 *   avx512 keys with VNNI: two bytes a channel of four query rows; values with VNNI, and what
 *     avx2 does with codes: see there;
 *   avx512 values: for every query row a sum for every code position of whole vectors of words, and 16 of the mins;
 *     the weights of 64 rows for four query rows, a lane for every word (8 bits have most), and where they come from.
 * Kernels take many query rows in blocks or by tiles, so m matters only up to CKV_MANY_QUERIES, but for products of
 * bf16, which keep all query rows in that form. */
size_t ckv_scratch_floats(uint32_t dim, uint32_t m) {
  size_t padded = round_up(dim, 16), lanes = round_up(((size_t)dim + 3) / 4, 16), few = at_least(m, 1);
  if (few > CKV_MANY_QUERIES) few = CKV_MANY_QUERIES;
  size_t rows = 2 * CKV_TILE_ROWS * padded, keys = 2 * padded;
  size_t values = few * (round_up(dim, 256) + 16) + at_least(64 * 4 * lanes, 4 * (64 * 16 + 16)) + 16 * lanes;
  values = at_least(values, (few + 1) * CKV_FP8_ROWS);
#if defined(__x86_64__)
  values = at_least(values, at_least(ckv_sums_scratch_floats(dim), ckv_avx2_scratch_floats(dim)));
  if (m >= CKV_MANY_QUERIES) values = at_least(values, ckv_bf16_scratch_floats(dim, m));
#elif defined(__aarch64__)
  keys = at_least(keys, ckv_dot_scratch_floats(dim));
#endif
  return at_least(at_least(rows, keys), values);
}
