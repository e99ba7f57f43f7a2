#include <algorithm>
#include <vector>

#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {
namespace {

constexpr int kLanes = 8;

// In a fixed order, so that equal rows have equal products wherever they stand. The product of two
// float32 numbers is exact in double precision.
double inner_product(const float* a, const float* b, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
    }
  }
  for (int j = 0; i < n; ++i, ++j)
    lanes[j] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// The row as float32: its own memory, or `buffer`.
const float* as_float(const Rows& rows, int64_t i, std::vector<float>& buffer) {
  if (rows.dtype == DType::kFloat32) return static_cast<const float*>(rows.row(i));
  buffer.resize(static_cast<size_t>(rows.cols));
  for (int64_t j = 0; j < rows.cols; ++j) {
    buffer[static_cast<size_t>(j)] = kernels().load_one(rows.row(i), rows.dtype, j);
  }
  return buffer.data();
}

}  // namespace

void inner_products(const Rows& queries, const Rows& corpus, const int64_t* ids, int64_t count,
                    double* out) {
  parallel_for_work(queries.rows * count * corpus.cols, queries.rows, [&](int64_t q) {
    thread_local std::vector<float> query_buffer, row_buffer;
    const float* query = as_float(queries, q, query_buffer);
    for (int64_t j = q * count; j < (q + 1) * count; ++j) {
      out[j] = inner_product(query, as_float(corpus, ids[j], row_buffer), corpus.cols);
    }
  });
}

}  // namespace fastmrc
