// Exact top-k by threshold. One pass keeps, per segment of the row, the maximum of each of 64
// lanes. Folded into a few more lanes than k, the k-th largest is a lower bound of the k-th largest
// entry; only the few segments that reach it are read again, from the cache, for the entries at or
// above it. No index array, no heap.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
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
  std::vector<float> maxima;  // [segments, kMaxLanes]
  std::vector<float> folded;
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

Scratch& scratch_for(const Rows& rows) {
  thread_local Scratch scratch;
  const int64_t segments = (rows.cols + kMaxSegment - 1) / kMaxSegment;
  scratch.maxima.resize(static_cast<size_t>(segments * kMaxLanes));
  return scratch;
}

// Fills scratch.maxima. Throws if the row holds a NaN.
void find_maxima(const Kernels& table, const Rows& rows, int64_t i, Scratch& scratch) {
  const int64_t segments = static_cast<int64_t>(scratch.maxima.size()) / kMaxLanes;
  bool sound = true;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t end = std::min(rows.cols, (s + 1) * kMaxSegment);
    float* out = scratch.maxima.data() + s * kMaxLanes;
    sound &= table.lane_max(rows.row(i), rows.dtype, s * kMaxSegment, end, out);
  }
  if (!sound) {
    throw std::invalid_argument("x: expected no NaN, got NaN in row " + std::to_string(i));
  }
}

// A value that at least k entries reach if so many are above -inf; else the lowest finite one.
float lower_bound_of_kth(int64_t k, Scratch& scratch) {
  // Twice as many lanes as k make a close bound.
  const auto lanes = static_cast<size_t>((2 * k + kMaxLanes - 1) / kMaxLanes * kMaxLanes);
  if (scratch.maxima.size() < lanes) return kLowest;
  scratch.folded.assign(scratch.maxima.begin(),
                        scratch.maxima.begin() + static_cast<std::ptrdiff_t>(lanes));
  for (size_t first = lanes; first < scratch.maxima.size(); first += kMaxLanes) {
    float* best = scratch.folded.data() + first % lanes;
    const float* next = scratch.maxima.data() + first;
    for (int lane = 0; lane < kMaxLanes; ++lane) best[lane] = std::max(best[lane], next[lane]);
  }
  const auto kth = scratch.folded.begin() + (k - 1);
  std::nth_element(scratch.folded.begin(), kth, scratch.folded.end(), std::greater<float>());
  return std::max(*kth, kLowest);
}

// Writes the entries of at least `bound` to scratch.ids; returns their number.
int64_t collect_row(const Kernels& table, const Rows& rows, int64_t i, float bound,
                    Scratch& scratch) {
  scratch.ids.resize(static_cast<size_t>(rows.cols));
  int64_t found = 0;
  for (size_t first = 0; first < scratch.maxima.size(); first += kMaxLanes) {
    int32_t lanes[kMaxLanes];
    if (table.collect(scratch.maxima.data() + first, DType::kFloat32, 0, kMaxLanes, bound, lanes) ==
        0) {
      continue;
    }
    const int64_t begin = static_cast<int64_t>(first) / kMaxLanes * kMaxSegment;
    found += table.collect(rows.row(i), rows.dtype, begin, std::min(rows.cols, begin + kMaxSegment),
                           bound, scratch.ids.data() + found);
  }
  return found;
}

// The k largest entries, when scratch.maxima are known.
void topk_by_maxima(const Rows& rows, int64_t i, int64_t k, float* values, int32_t* ids,
                    Scratch& scratch) {
  const Kernels& table = kernels();
  const void* row = rows.row(i);
  const int64_t found = collect_row(table, rows, i, lower_bound_of_kth(k, scratch), scratch);
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

void topk_of(const Rows& rows, int64_t i, int64_t k, float* values, int32_t* ids) {
  Scratch& scratch = scratch_for(rows);
  find_maxima(kernels(), rows, i, scratch);
  topk_by_maxima(rows, i, k, values, ids, scratch);
}

RowStats stats_and_topk_of(const Rows& rows, int64_t i, int64_t k, float* values, int32_t* ids,
                           const char* name) {
  Scratch& scratch = scratch_for(rows);
  const RowStats stats =
      kernels().row_stats(rows.row(i), rows.dtype, rows.cols, scratch.maxima.data());
  check_stats(stats, i, name);
  topk_by_maxima(rows, i, k, values, ids, scratch);
  return stats;
}

void topk(const Rows& rows, int64_t k, float* values, int32_t* ids) {
  if (k < 1) throw std::invalid_argument("k: expected at least 1, got " + std::to_string(k));
  parallel_for_work(rows.rows * rows.cols, rows.rows,
                    [&](int64_t i) { topk_of(rows, i, k, values + i * k, ids + i * k); });
}

namespace {

// Merges `count` new entries, falling, with ids above those of the list [k].
void merge_sorted(const float* new_values, const int64_t* new_ids, int64_t count, int64_t k,
                  float* values, int64_t* ids) {
  thread_local std::vector<float> old_values;
  thread_local std::vector<int64_t> old_ids;
  old_values.assign(values, values + k);
  old_ids.assign(ids, ids + k);
  int64_t from_old = 0, from_new = 0;
  for (int64_t j = 0; j < k; ++j) {
    const auto o = static_cast<size_t>(from_old);
    const bool take_new =
        from_new < count && (old_ids[o] < 0 || new_values[from_new] > old_values[o]);
    values[j] = take_new ? new_values[from_new] : old_values[o];
    ids[j] = take_new ? new_ids[from_new] : old_ids[o];
    ++(take_new ? from_new : from_old);
  }
}

void merge_row(const Rows& scores, int64_t i, int64_t first_id, int64_t k, float* values,
               int64_t* ids) {
  thread_local std::vector<int32_t> found;
  thread_local std::vector<float> best;
  thread_local std::vector<int64_t> best_ids;
  const auto most = static_cast<size_t>(std::min(k, scores.cols));
  best.resize(most);
  best_ids.resize(most);
  if (ids[k - 1] >= 0) {
    // Of equal values the lower id is in the list already.
    const float bar = std::nextafter(values[k - 1], kInf);
    found.resize(static_cast<size_t>(scores.cols));
    const int64_t count =
        kernels().collect(scores.row(i), scores.dtype, 0, scores.cols, bar, found.data());
    if (count == 0) return;
    // Few, except in the first blocks.
    found.resize(static_cast<size_t>(count));
    const auto value = [&](int32_t id) {
      return kernels().load_one(scores.row(i), scores.dtype, id);
    };
    const auto kept = std::min(found.size(), most);
    std::partial_sort(
        found.begin(), found.begin() + static_cast<std::ptrdiff_t>(kept), found.end(),
        [&](int32_t a, int32_t b) { return value(a) != value(b) ? value(a) > value(b) : a < b; });
    best.resize(kept);
    best_ids.resize(kept);
    for (size_t j = 0; j < kept; ++j) best[j] = value(found[j]);
  } else {
    found.resize(most);
    topk_of(scores, i, static_cast<int64_t>(most), best.data(), found.data());
    while (!best.empty() && found[best.size() - 1] < 0) best.pop_back();
    best_ids.resize(best.size());
  }
  for (size_t j = 0; j < best.size(); ++j) best_ids[j] = first_id + found[j];
  merge_sorted(best.data(), best_ids.data(), static_cast<int64_t>(best.size()), k, values, ids);
}

}  // namespace

void topk_merge(const Rows& scores, int64_t first_id, int64_t k, float* values, int64_t* ids) {
  if (k < 1) throw std::invalid_argument("k: expected at least 1, got " + std::to_string(k));
  parallel_for_work(scores.rows * scores.cols, scores.rows, [&](int64_t i) {
    merge_row(scores, i, first_id, k, values + i * k, ids + i * k);
  });
}

void log_softmax_topk(const Rows& rows, int64_t k, float* log_probs, int32_t* ids) {
  if (k < 1) throw std::invalid_argument("k: expected at least 1, got " + std::to_string(k));
  parallel_for_work(rows.rows * rows.cols, rows.rows, [&](int64_t i) {
    float* values = log_probs + i * k;
    const int32_t* found = ids + i * k;
    const RowStats stats = stats_and_topk_of(rows, i, k, values, ids + i * k, "x");
    for (int64_t j = 0; j < k && found[j] >= 0; ++j) {
      values[j] = static_cast<float>(static_cast<double>(values[j]) - stats.logsumexp);
    }
  });
}

}  // namespace fastmrc
