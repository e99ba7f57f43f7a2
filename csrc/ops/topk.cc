// Exact top-k by threshold: one pass keeps the maximum of each of many lanes of the row; the k-th
// largest of these is a lower bound of the k-th largest entry, so a second pass, over a row that is
// still in the cache, collects the few entries at or above it. No index array, no heap.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

struct Scratch {
  std::vector<float> maxima;
  std::vector<int32_t> ids;
  std::vector<uint64_t> keys;
};

// Larger for larger values, and among equal values for smaller ids.
uint64_t sort_key(float value, int32_t id) {
  value += 0.0f;  // -0 and +0 are equal values
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(bits) << 32) | static_cast<uint32_t>(~id);
}

int32_t id_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

// A value that at least k entries reach if so many are above -inf; else the lowest finite one.
float lower_bound_of_kth(const Kernels& table, const Rows& rows, int64_t i, int64_t k,
                         Scratch& scratch) {
  // Twice as many lanes as k keep the bound tight; more than a quarter of the row is no saving.
  const int64_t segments = (2 * k + kMaxLanes - 1) / kMaxLanes;
  const bool worthwhile = segments * kMaxLanes * 4 <= rows.cols;
  const int64_t parts = worthwhile ? segments : 1;
  scratch.maxima.resize(static_cast<size_t>(parts * kMaxLanes));
  for (int64_t s = 0; s < parts; ++s) {
    const int64_t begin = rows.cols * s / parts;
    const int64_t end = rows.cols * (s + 1) / parts;
    float* out = scratch.maxima.data() + s * kMaxLanes;
    if (!table.lane_max(rows.row(i), rows.dtype, begin, end, out)) {
      throw std::invalid_argument("x: expected no NaN, got NaN in row " + std::to_string(i));
    }
  }
  if (!worthwhile) return kLowest;
  const auto kth = scratch.maxima.begin() + (k - 1);
  std::nth_element(scratch.maxima.begin(), kth, scratch.maxima.end(), std::greater<float>());
  return std::max(*kth, kLowest);
}

void topk_row(const Kernels& table, const Rows& rows, int64_t i, int64_t k, float* values,
              int32_t* ids, Scratch& scratch) {
  const void* row = rows.row(i);
  const float bound = lower_bound_of_kth(table, rows, i, k, scratch);
  scratch.ids.resize(static_cast<size_t>(rows.cols));
  const int64_t found = table.collect(row, rows.dtype, 0, rows.cols, bound, scratch.ids.data());
  scratch.keys.resize(static_cast<size_t>(found));
  for (int64_t j = 0; j < found; ++j) {
    const int32_t id = scratch.ids[static_cast<size_t>(j)];
    scratch.keys[static_cast<size_t>(j)] = sort_key(table.load_one(row, rows.dtype, id), id);
  }
  const int64_t kept = std::min(k, found);
  std::partial_sort(scratch.keys.begin(), scratch.keys.begin() + kept, scratch.keys.end(),
                    std::greater<uint64_t>());
  for (int64_t j = 0; j < kept; ++j) {
    ids[j] = id_of(scratch.keys[static_cast<size_t>(j)]);
    values[j] = table.load_one(row, rows.dtype, ids[j]);
  }
  std::fill(values + kept, values + k, -kInf);
  std::fill(ids + kept, ids + k, -1);
}

}  // namespace

void topk(const Rows& rows, int64_t k, float* values, int32_t* ids) {
  if (k < 1) throw std::invalid_argument("k: expected at least 1, got " + std::to_string(k));
  const Kernels& table = kernels();
  parallel_for_work(rows.rows * rows.cols, rows.rows, [&](int64_t i) {
    thread_local Scratch scratch;
    topk_row(table, rows, i, k, values + i * k, ids + i * k, scratch);
  });
}

void log_softmax_topk(const Rows& rows, int64_t k, float* log_probs, int32_t* ids) {
  topk(rows, k, log_probs, ids);
  std::vector<RowStats> stats(static_cast<size_t>(rows.rows));
  row_stats(rows, stats.data());
  for (int64_t i = 0; i < rows.rows; ++i) {
    for (int64_t j = 0; j < k && ids[i * k + j] >= 0; ++j) {
      float& value = log_probs[i * k + j];
      value =
          static_cast<float>(static_cast<double>(value) - stats[static_cast<size_t>(i)].logsumexp);
    }
  }
}

}  // namespace fastmrc
