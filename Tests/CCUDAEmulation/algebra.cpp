// cuBLAS and cuSOLVER that are none: matrices column by column, computed by their definitions, on the emulated card's
// queue. Stricter than the libraries where it can be: every matrix must lie in device memory as a whole, scalars are
// read when the call is made, results are not read where they are to be overwritten, only the triangle that is asked for
// is written or read, and what eigenvectors were worked out in is spoiled.
#include "cuda_emulation.h"
#include "emulation.h"
#include "../../Sources/CKVCUDA/include/ckv_cuda.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

namespace {

std::mutex lock;
std::string failing_name;
long failing = -1;
int failing_status = 0, next_info = 0;
size_t handles = 0;

struct Handle {
  bool solver, has_stream = false;
};

// The status of a call that may not go on, else 0.
int refused(const char *name, Handle *handle, bool solver, bool ready = true) {
  std::lock_guard guard(lock);
  if (failing_name == name && failing >= 0 && failing-- == 0) return failing_status;
  if (!emulation::in_context()) return 1;
  if (handle && (handle->solver != solver || (ready && !handle->has_stream))) return 1;
  return 0;
}

int create(const char *name, void **handle, bool solver) {
  if (int status = refused(name, nullptr, solver)) return status;
  std::lock_guard guard(lock);
  handles++;
  *handle = new Handle{solver};
  return 0;
}

int destroy(const char *name, void *handle, bool solver) {
  int status = refused(name, (Handle *)handle, solver, false);
  std::lock_guard guard(lock);
  handles--;
  delete (Handle *)handle;
  return status;
}

int set_stream(const char *name, void *handle, bool solver) {
  int status = refused(name, (Handle *)handle, solver, false);
  if (!status) ((Handle *)handle)->has_stream = true;
  return status;
}

// Bytes from the first to the last element of a matrix.
template <typename T> size_t extent(int rows, int columns, int stride) {
  return rows == 0 || columns == 0 ? 0 : ((size_t)(columns - 1) * stride + rows) * sizeof(T);
}

template <typename T>
int gemm(const char *name, void *handle, int op_a, int op_b, int m, int n, int k, const T *alpha, const T *a, int lda,
         const T *b, int ldb, const T *beta, T *c, int ldc) {
  if (int status = refused(name, (Handle *)handle, false)) return status;
  const int a_rows = op_a ? k : m, b_rows = op_b ? n : k;
  if (m < 0 || n < 0 || k < 0 || lda < std::max(1, a_rows) || ldb < std::max(1, b_rows) || ldc < std::max(1, m))
    return 7;
  if (!emulation::on_card(a, extent<T>(a_rows, op_a ? m : k, lda)) ||
      !emulation::on_card(b, extent<T>(b_rows, op_b ? k : n, ldb)) || !emulation::on_card(c, extent<T>(m, n, ldc))) {
    fprintf(stderr, "cuda emulation: %s is given memory that is not the card's\n", name);
    abort();
  }
  const T scale = *alpha, keep = *beta;
  const bool queued = emulation::enqueue(name, [=] {
    std::vector<T> row(k);
    for (int i = 0; i < m; i++) {
      for (int l = 0; l < k; l++) row[l] = op_a ? a[(size_t)i * lda + l] : a[(size_t)l * lda + i];
      for (int j = 0; j < n; j++) {
        T sum = 0;
        for (int l = 0; l < k; l++) sum += row[l] * (op_b ? b[(size_t)l * ldb + j] : b[(size_t)j * ldb + l]);
        T &to = c[(size_t)j * ldc + i];
        to = keep == 0 ? scale * sum : scale * sum + keep * to;
      }
    }
  });
  return queued ? 0 : 13;
}

int sgemm(void *handle, int op_a, int op_b, int m, int n, int k, const float *alpha, const float *a, int lda,
          const float *b, int ldb, const float *beta, float *c, int ldc) {
  return gemm("cublasSgemm_v2", handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

int dgemm(void *handle, int op_a, int op_b, int m, int n, int k, const double *alpha, const double *a, int lda,
          const double *b, int ldb, const double *beta, double *c, int ldc) {
  return gemm("cublasDgemm_v2", handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

int dsyrk(void *handle, int triangle, int op, int n, int k, const double *alpha, const double *a, int lda,
          const double *beta, double *c, int ldc) {
  if (int status = refused("cublasDsyrk_v2", (Handle *)handle, false)) return status;
  const int rows = op ? k : n;
  if (n < 0 || k < 0 || lda < std::max(1, rows) || ldc < std::max(1, n)) return 7;
  if (!emulation::on_card(a, extent<double>(rows, op ? n : k, lda)) ||
      !emulation::on_card(c, extent<double>(n, n, ldc))) {
    fprintf(stderr, "cuda emulation: cublasDsyrk_v2 is given memory that is not the card's\n");
    abort();
  }
  const double scale = *alpha, keep = *beta;
  const bool queued = emulation::enqueue("cublasDsyrk_v2", [=] {
    std::vector<double> x((size_t)n * k);  // by rows of the product
    for (int i = 0; i < n; i++)
      for (int l = 0; l < k; l++) x[(size_t)i * k + l] = op ? a[(size_t)i * lda + l] : a[(size_t)l * lda + i];
    for (int j = 0; j < n; j++)
      for (int i = triangle == CKV_CUDA_LOWER ? j : 0; i < (triangle == CKV_CUDA_LOWER ? n : j + 1); i++) {
        double sum = 0;
        for (int l = 0; l < k; l++) sum += x[(size_t)i * k + l] * x[(size_t)j * k + l];
        double &to = c[(size_t)j * ldc + i];
        to = keep == 0 ? scale * sum : scale * sum + keep * to;
      }
  });
  return queued ? 0 : 13;
}

int dsyevd_size(void *handle, int mode, int, int n, const double *a, int lda, const double *values, int *size) {
  if (int status = refused("cusolverDnDsyevd_bufferSize", (Handle *)handle, true)) return status;
  if (mode != CKV_CUDA_VECTORS || n < 1 || lda < n || !a || !values) return 3;
  *size = 1 + 6 * n + 2 * n * n;
  return 0;
}

// Jacobi's rotations until nothing is left beside the diagonal; vectors column by column, unsorted.
void jacobi(int n, std::vector<double> &a, std::vector<double> &v) {
  v.assign((size_t)n * n, 0);
  for (int i = 0; i < n; i++) v[(size_t)i * n + i] = 1;
  for (int sweep = 0; sweep < 60; sweep++) {
    double off = 0, all = 0;
    for (int j = 0; j < n; j++)
      for (int i = 0; i < n; i++) {
        all += a[(size_t)j * n + i] * a[(size_t)j * n + i];
        if (i != j) off += a[(size_t)j * n + i] * a[(size_t)j * n + i];
      }
    if (off <= 1e-32 * all) return;
    for (int p = 0; p < n - 1; p++)
      for (int q = p + 1; q < n; q++) {
        const double apq = a[(size_t)q * n + p];
        if (std::fabs(apq) <= 1e-300) continue;
        const double theta = (a[(size_t)q * n + q] - a[(size_t)p * n + p]) / (2 * apq);
        const double t = (theta >= 0 ? 1 : -1) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
        const double c = 1 / std::sqrt(t * t + 1), s = t * c;
        double *columns[2] = {&a[(size_t)p * n], &a[(size_t)q * n]};
        for (int i = 0; i < n; i++) {
          const double x = columns[0][i], y = columns[1][i];
          columns[0][i] = c * x - s * y;
          columns[1][i] = s * x + c * y;
        }
        for (int i = 0; i < n; i++) {
          double &x = a[(size_t)i * n + p], &y = a[(size_t)i * n + q];
          const double was = x;
          x = c * was - s * y;
          y = s * was + c * y;
        }
        double *vectors[2] = {&v[(size_t)p * n], &v[(size_t)q * n]};
        for (int i = 0; i < n; i++) {
          const double x = vectors[0][i], y = vectors[1][i];
          vectors[0][i] = c * x - s * y;
          vectors[1][i] = s * x + c * y;
        }
      }
  }
}

int dsyevd(void *handle, int mode, int triangle, int n, double *a, int lda, double *values, double *work, int size,
           int *info) {
  if (int status = refused("cusolverDnDsyevd", (Handle *)handle, true)) return status;
  if (mode != CKV_CUDA_VECTORS || n < 1 || lda < n || size < 1 + 6 * n + 2 * n * n) return 3;
  if (!emulation::on_card(a, extent<double>(n, n, lda)) || !emulation::on_card(values, n * sizeof(double)) ||
      !emulation::on_card(work, size * sizeof(double)) || !emulation::on_card(info, sizeof(int))) {
    fprintf(stderr, "cuda emulation: cusolverDnDsyevd is given memory that is not the card's\n");
    abort();
  }
  int code;
  {
    std::lock_guard guard(lock);
    code = next_info;
    next_info = 0;
  }
  const bool queued = emulation::enqueue("cusolverDnDsyevd", [=] {
    std::fill(work, work + size, std::numeric_limits<double>::quiet_NaN());
    *info = code;
    std::vector<double> held((size_t)n * n), vectors;
    for (int j = 0; j < n; j++)
      for (int i = 0; i < n; i++) {
        const bool there = triangle == CKV_CUDA_LOWER ? i >= j : i <= j;
        held[(size_t)j * n + i] = there ? a[(size_t)j * lda + i] : a[(size_t)i * lda + j];
      }
    if (code) {
      std::fill(values, values + n, std::numeric_limits<double>::quiet_NaN());
      return;
    }
    jacobi(n, held, vectors);
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int x, int y) { return held[(size_t)x * n + x] < held[(size_t)y * n + y]; });
    for (int j = 0; j < n; j++) {
      values[j] = held[(size_t)order[j] * n + order[j]];
      for (int i = 0; i < n; i++) a[(size_t)j * lda + i] = vectors[(size_t)order[j] * n + i];
    }
  });
  return queued ? 0 : 6;
}

const ckv_cuda_libraries libraries = {
    .names = "libcublas and libcusolver, emulated",
    .blas_create = [](void **handle) { return create("cublasCreate_v2", handle, false); },
    .blas_destroy = [](void *handle) { return destroy("cublasDestroy_v2", handle, false); },
    .blas_stream = [](void *handle, void *) { return set_stream("cublasSetStream_v2", handle, false); },
    .sgemm = sgemm,
    .dgemm = dgemm,
    .dsyrk = dsyrk,
    .solver_create = [](void **handle) { return create("cusolverDnCreate", handle, true); },
    .solver_destroy = [](void *handle) { return destroy("cusolverDnDestroy", handle, true); },
    .solver_stream = [](void *handle, void *) { return set_stream("cusolverDnSetStream", handle, true); },
    .dsyevd_size = dsyevd_size,
    .dsyevd = dsyevd,
};

}  // namespace

const void *cuda_emulation_libraries(void) { return &libraries; }
void cuda_emulation_fail_library(const char *name, long count, int status) {
  std::lock_guard guard(lock);
  failing_name = name;
  failing = count;
  failing_status = status;
}
void cuda_emulation_set_info(int info) {
  std::lock_guard guard(lock);
  next_info = info;
}
size_t cuda_emulation_handles(void) {
  std::lock_guard guard(lock);
  return handles;
}
