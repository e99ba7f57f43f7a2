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
  std::vector<int32_t> lanes;
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

// The k-th largest of the values, which are reordered.
float kth_largest(int64_t k, std::vector<float>& values) {
  constexpr int64_t kFew = 16;
  if (k > kFew) {
    const auto kth = values.begin() + (k - 1);
    std::nth_element(values.begin(), kth, values.end(), std::greater<float>());
    return *kth;
  }
  // Insertion into the k largest so far: of many values few get in. Twice as fast as selection.
  float best[kFew];
  std::fill(best, best + k, -kInf);
  for (const float value : values) {
    if (!(value > best[k - 1])) continue;
    int64_t j = k - 1;
    for (; j > 0 && best[j - 1] < value; --j) best[j] = best[j - 1];
    best[j] = value;
  }
  return best[k - 1];
}

// A value that at least k entries reach if so many are above -inf; else the lowest finite one.
float lower_bound_of_kth(int64_t k, Scratch& scratch) {
  // Twice as many lanes as k make a close bound.
  const auto lanes = static_cast<size_t>((2 * k + kMaxLanes - 1) / kMaxLanes * kMaxLanes);
  if (scratch.maxima.size() < lanes) return kLowest;
  scratch.folded.resize(lanes);
  kernels().fold_max(scratch.maxima.data(), static_cast<int64_t>(scratch.maxima.size()),
                     static_cast<int64_t>(lanes), scratch.folded.data());
  return std::max(kth_largest(k, scratch.folded), kLowest);
}

// Writes the entries of at least `bound` to scratch.ids, in no order; returns their number.
int64_t collect_row(const Kernels& table, const Rows& rows, int64_t i, float bound,
                    Scratch& scratch) {
  scratch.ids.resize(static_cast<size_t>(rows.cols));
  scratch.lanes.resize(scratch.maxima.size());
  const int64_t lanes =
      table.collect(scratch.maxima.data(), DType::kFloat32, 0,
                    static_cast<int64_t>(scratch.maxima.size()), bound, scratch.lanes.data());
  int64_t found = 0;
  for (int64_t j = 0; j < lanes; ++j) {
    const int64_t lane = scratch.lanes[static_cast<size_t>(j)];
    const int64_t begin = lane / kMaxLanes * kMaxSegment;
    found += table.collect_lane(rows.row(i), rows.dtype, begin + lane % kMaxLanes,
                                std::min(rows.cols, begin + kMaxSegment), bound,
                                scratch.ids.data() + found);
  }
  return found;
}

// Writes the largest of the `found` entries that scratch.ids lists, at most k; returns how many.
int64_t keep_largest(const Rows& rows, int64_t i, int64_t found, int64_t k, float* values,
                     int32_t* ids, Scratch& scratch) {
  const auto value = [&, row = rows.row(i), load = kernels().load_one](int32_t id) {
    return load(row, rows.dtype, id);
  };
  scratch.keys.resize(static_cast<size_t>(found));
  for (size_t j = 0; j < scratch.keys.size(); ++j) {
    scratch.keys[j] = sort_key(value(scratch.ids[j]), scratch.ids[j]);
  }
  const int64_t kept = std::min(k, found);
  std::partial_sort(scratch.keys.begin(), scratch.keys.begin() + kept, scratch.keys.end(),
                    std::greater<uint64_t>());
  for (int64_t j = 0; j < kept; ++j) {
    ids[j] = id_of(scratch.keys[static_cast<size_t>(j)]);
    values[j] = value(ids[j]);
  }
  return kept;
}

// The k largest entries, when scratch.maxima are known.
void topk_by_maxima(const Rows& rows, int64_t i, int64_t k, float* values, int32_t* ids,
                    Scratch& scratch) {
  const int64_t found = collect_row(kernels(), rows, i, lower_bound_of_kth(k, scratch), scratch);
  const int64_t kept = keep_largest(rows, i, found, k, values, ids, scratch);
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
  check_at_least("k", k, 1);
  parallel_for_work(rows.rows * rows.cols, rows.rows,
                    [&](int64_t i) { topk_of(rows, i, k, values + i * k, ids + i * k); });
}

namespace {

// Merges `count` new entries, falling, into the list [k]; entry j has the id first_id + new_ids[j],
// above those of the list.
void merge_sorted(const float* new_values, const int32_t* new_ids, int64_t count, int64_t first_id,
                  int64_t k, float* values, int64_t* ids) {
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
    ids[j] = take_new ? first_id + new_ids[from_new] : old_ids[o];
    ++(take_new ? from_new : from_old);
  }
}

void merge_row(const Rows& scores, int64_t i, int64_t first_id, int64_t k, float* values,
               int64_t* ids) {
  thread_local std::vector<float> best;
  thread_local std::vector<int32_t> best_ids;
  best.resize(static_cast<size_t>(std::min(k, scores.cols)));
  best_ids.resize(best.size());
  auto count = static_cast<int64_t>(best.size());
  if (ids[k - 1] >= 0) {
    // Of equal values the lower id is in the list already. Few are found, except in first blocks.
    const float bar = std::nextafter(values[k - 1], kInf);
    Scratch& scratch = scratch_for(scores);
    scratch.ids.resize(static_cast<size_t>(scores.cols));
    const int64_t found =
        kernels().collect(scores.row(i), scores.dtype, 0, scores.cols, bar, scratch.ids.data());
    count = keep_largest(scores, i, found, count, best.data(), best_ids.data(), scratch);
  } else {
    topk_of(scores, i, count, best.data(), best_ids.data());
    while (count > 0 && best_ids[static_cast<size_t>(count) - 1] < 0) --count;
  }
  if (count > 0) merge_sorted(best.data(), best_ids.data(), count, first_id, k, values, ids);
}

}  // namespace

void topk_merge(const Rows& scores, int64_t first_id, int64_t k, float* values, int64_t* ids) {
  check_at_least("k", k, 1);
  parallel_for_work(scores.rows * scores.cols, scores.rows, [&](int64_t i) {
    merge_row(scores, i, first_id, k, values + i * k, ids + i * k);
  });
}

void log_softmax_topk(const Rows& rows, int64_t k, float* log_probs, int32_t* ids) {
  check_at_least("k", k, 1);
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
