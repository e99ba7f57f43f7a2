// The row kernels, compiled once per instruction set by kernels_<isa>.cc. See vec.h for the rules
// that make their results equal on every set.
#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastmrc {
namespace FASTMRC_ISA_NAMESPACE {
namespace {

static_assert(kMaxLanes == kGroupLanes, "lane_max writes one maximum per lane of a group");
static_assert(kMaxSegment % kGroupLanes == 0, "a segment holds whole groups");

template <typename T>
struct Group {
  T items[kGroupLanes];
};

// Elements [begin, end), end - begin < kGroupLanes, padded with -inf.
template <typename T>
inline Group<T> padded_tail(const T* row, int64_t begin, int64_t end) {
  Group<T> group;
  for (T& item : group.items) item = negative_infinity<T>();
  std::memcpy(group.items, row + begin, static_cast<size_t>(end - begin) * sizeof(T));
  return group;
}

// Calls visit(pointer to kGroupLanes elements, index of the first) over [begin, end).
template <typename T, typename Visit>
inline void for_each_group(const T* row, int64_t begin, int64_t end, Visit visit) {
  int64_t i = begin;
  for (; i + kGroupLanes <= end; i += kGroupLanes) visit(row + i, i);
  if (i < end) {
    const Group<T> tail = padded_tail(row, i, end);
    visit(tail.items, i);
  }
}

inline float reduce_max(const Vec* lanes) {
  Vec best = lanes[0];
  for (int j = 1; j < kGroup; ++j) best = vmax(lanes[j], best);
  float result = best[0];
  for (int i = 1; i < kWidth; ++i) result = best[i] > result ? best[i] : result;
  return result;
}

// Sum of the kGroupLanes lanes: halved down to 16 in float, the rest in double, in this order on
// every set.
inline double reduce_sum(Vec* lanes) {
  for (int half = kGroup / 2; half * kWidth >= 16; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  double sum = 0;
  for (int i = 0; i < 16; ++i) sum += static_cast<double>(lanes[i / kWidth][i % kWidth]);
  return sum;
}

// Of one segment; keeps the maxima of its lanes if asked to.
template <typename T>
float max_of(const T* row, int64_t begin, int64_t end, float* maxima) {
  Vec lanes[kGroup];
  for (Vec& lane : lanes) lane = broadcast(-kInf);
  for_each_group(row, begin, end, [&](const T* p, int64_t) {
    for (int j = 0; j < kGroup; ++j) lanes[j] = vmax(load(p + j * kWidth), lanes[j]);
  });
  if (maxima != nullptr) std::memcpy(maxima, lanes, sizeof(lanes));
  return reduce_max(lanes);
}

// Asks for the cache lines of the same group of the next segment, which then arrives while this one
// is computed on; without it the pass for the maximum waits for memory.
template <typename T>
inline void prefetch_next(const T* p) {
  const char* bytes = reinterpret_cast<const char*>(p + kMaxSegment);
  for (size_t i = 0; i < kGroupLanes * sizeof(T); i += 64) __builtin_prefetch(bytes + i);
}

template <typename T, typename Exponential>
inline double sum_of(const T* row, int64_t begin, int64_t end, Exponential exponential) {
  Vec lanes[kGroup] = {};
  for_each_group(row, begin, end, [&](const T* p, int64_t i) {
    prefetch_next(row + i);
    for (int j = 0; j < kGroup; ++j) lanes[j] += exponential(load(p + j * kWidth));
  });
  return reduce_sum(lanes);
}

// Sum of exp((x - max) / temperature) for a finite maximum; `scale` is log2(e) / temperature.
template <typename T>
double sum_exp_of(const T* row, int64_t begin, int64_t end, float max, float scale) {
  constexpr float kNear = 0x1p21f;
  const float scaled = max * scale;
  if (!(scaled > -kNear && scaled < kNear)) {
    return sum_of(row, begin, end, [max, scale](Vec x) { return vexp2((x - max) * scale); });
  }
  // One multiply-add both scales x and subtracts the maximum. By how much the product of the
  // maximum was rounded, which beyond kNear is no longer little, is divided out again, so that a
  // row of one certain token has the sum one.
  const Vec shift = broadcast(-scaled);
  const auto exponential = [shift, scale](Vec x) {
    return vexp2(vfma(x, broadcast(scale), shift));
  };
  const Vec unit = exponential(broadcast(max));
  return sum_of(row, begin, end, exponential) / static_cast<double>(unit[0]);
}

template <typename T>
int64_t collect_ids(const T* row, int64_t begin, int64_t end, float threshold, int32_t* ids) {
  const Vec bar = broadcast(threshold);
  int64_t count = 0;
  for_each_group(row, begin, end, [&](const T* p, int64_t first) {
    Vec group[kGroup];
    Vec best = broadcast(-kInf);  // first, so that a NaN hides nothing: see vmax
    for (int j = 0; j < kGroup; ++j) {
      group[j] = load(p + j * kWidth);
      best = vmax(group[j], best);
    }
    if (ge_mask(best, bar) == 0) return;  // one branch per group
    for (int j = 0; j < kGroup; ++j) {
      for (uint32_t mask = ge_mask(group[j], bar); mask != 0; mask &= mask - 1) {
        const int64_t i = first + j * kWidth + __builtin_ctz(mask);
        if (i < end) ids[count++] = static_cast<int32_t>(i);  // padding may pass a bar of -inf
      }
    }
  });
  return count;
}

template <typename T>
bool holds_nan(const T* row, int64_t n) {
  uint32_t unordered = 0;
  for_each_group(row, 0, n, [&](const T* p, int64_t) {
    for (int j = 0; j < kGroup; j += 2) {
      unordered |= unordered_mask(load(p + j * kWidth), load(p + (j + 1) * kWidth));
    }
  });
  return unordered != 0;
}

// Reads the row once from memory: segment by segment the maximum, then the sum of exponentials
// while the segment is still in the first-level cache (online softmax, Milakov and Gimelshein
// 2018).
template <typename T>
RowStats row_stats_of(const T* row, int64_t n, float* maxima) {
  float max = -kInf;
  double sum = 0;
  int64_t best_segment = 0;
  for (int64_t begin = 0; begin < n; begin += kMaxSegment) {
    const int64_t end = begin + kMaxSegment < n ? begin + kMaxSegment : n;
    float* kept = maxima == nullptr ? nullptr : maxima + begin / kMaxSegment * kMaxLanes;
    const float segment_max = max_of(row, begin, end, kept);
    if (segment_max > max) {
      sum *= std::exp(static_cast<double>(max) - static_cast<double>(segment_max));
      max = segment_max;
      best_segment = begin;
    }
    // A NaN never wins a maximum but always reaches the sum.
    if (max > -kInf && max < kInf) {
      sum += sum_exp_of(row, begin, end, max, kLog2E);
    } else if (holds_nan(row + begin, end - begin)) {
      sum = std::numeric_limits<double>::quiet_NaN();
    }
  }
  RowStats stats;
  stats.max = max;
  stats.logsumexp = static_cast<double>(max);
  if (std::isnan(sum)) {
    stats.max = std::numeric_limits<float>::quiet_NaN();
    stats.logsumexp = std::numeric_limits<double>::quiet_NaN();
    return stats;
  }
  if (max == -kInf) return stats;
  if (max < kInf) stats.logsumexp += std::log(sum);
  for (int64_t i = best_segment; stats.argmax < 0; i += kGroupLanes) {
    int32_t ids[kGroupLanes];
    const int64_t end = i + kGroupLanes < n ? i + kGroupLanes : n;
    if (collect_ids(row, i, end, max, ids) > 0) stats.argmax = ids[0];
  }
  stats.max = load_one(row + stats.argmax);  // which of +0 and -0 won depends on the set
  return stats;
}

template <typename T>
bool lane_max_of(const T* row, int64_t begin, int64_t end, float* out) {
  Vec lanes[kGroup];
  for (Vec& lane : lanes) lane = broadcast(-kInf);
  uint32_t unordered = 0;
  for_each_group(row, begin, end, [&](const T* p, int64_t) {
    for (int j = 0; j < kGroup; j += 2) {
      const Vec a = load(p + j * kWidth);
      const Vec b = load(p + (j + 1) * kWidth);
      unordered |= unordered_mask(a, b);
      lanes[j] = vmax(a, lanes[j]);
      lanes[j + 1] = vmax(b, lanes[j + 1]);
    }
  });
  std::memcpy(out, lanes, sizeof(lanes));
  return unordered == 0;
}

// Votes of the tokens of one group. P = exp(logit - logsumexp) per passage; the part of logsumexp
// that float32 cannot hold goes into a factor.
template <typename T, Vote kVote>
inline void vote_group(const VoteRows& rows, int64_t begin, int64_t end, Vec* out) {
  Vec first[kGroup] = {};   // sum of P, maximum of P or sum of logs
  Vec second[kGroup] = {};  // sum of P^2 (original, weighted)
  Group<T> tail;
  // sum w P^2 / (1 + sum w P), both parts divided by the largest weight if that is above 1: no
  // weight overflows.
  float largest = 1.0f;
  if (kVote == Vote::kWeighted) {
    for (int32_t p = 0; p < rows.passages; ++p) {
      if (rows.weights[p] > largest) largest = rows.weights[p];
    }
  }
  const float scale = 1.0f / largest;
  for (int32_t p = 0; p < rows.passages; ++p) {
    const T* items = static_cast<const T*>(rows.rows[p]) + begin;
    if (end - begin < kGroupLanes) {
      tail = padded_tail(items, 0, end - begin);
      items = tail.items;
    }
    const float shift = static_cast<float>(rows.logsumexp[p]);
    const float factor =
        static_cast<float>(std::exp(static_cast<double>(shift) - rows.logsumexp[p]));
    const float weight = kVote == Vote::kWeighted ? rows.weights[p] * scale : 1.0f;
    for (int j = 0; j < kGroup; ++j) {
      const Vec probability = vexp(load(items + j * kWidth) - shift) * factor;
      if (kVote == Vote::kMax) {
        first[j] = vmax(probability, first[j]);
      } else if (kVote == Vote::kProduct) {
        first[j] += vlog(probability + static_cast<float>(kEps));
      } else if (kVote == Vote::kMean) {
        first[j] += probability;
      } else {
        const Vec weighted = probability * weight;
        first[j] += weighted;
        second[j] += weighted * probability;
      }
    }
  }
  const float count = static_cast<float>(rows.passages);
  for (int j = 0; j < kGroup; ++j) {
    if (kVote == Vote::kMax) {
      out[j] = first[j];
    } else if (kVote == Vote::kMean) {
      out[j] = first[j] / count;
    } else if (kVote == Vote::kProduct) {
      out[j] = vexp(first[j] / count);
    } else {
      out[j] = second[j] / (first[j] + scale);
    }
    out[j] += static_cast<float>(kEps);
  }
}

template <typename T, Vote kVote>
void votes_of(const VoteRows& rows, int64_t begin, int64_t end, float* out) {
  Vec votes[kGroup];
  for (int64_t i = begin; i < end; i += kGroupLanes) {
    const int64_t stop = i + kGroupLanes < end ? i + kGroupLanes : end;
    vote_group<T, kVote>(rows, i, stop, votes);
    std::memcpy(out + (i - begin), votes, static_cast<size_t>(stop - i) * sizeof(float));
  }
}

template <typename T>
void votes_by_rule(const VoteRows& rows, int64_t begin, int64_t end, float* out) {
  switch (rows.vote) {
    case Vote::kOriginal:
      return votes_of<T, Vote::kOriginal>(rows, begin, end, out);
    case Vote::kMean:
      return votes_of<T, Vote::kMean>(rows, begin, end, out);
    case Vote::kMax:
      return votes_of<T, Vote::kMax>(rows, begin, end, out);
    case Vote::kProduct:
      return votes_of<T, Vote::kProduct>(rows, begin, end, out);
    case Vote::kWeighted:
      return votes_of<T, Vote::kWeighted>(rows, begin, end, out);
  }
}

// Calls fn with a typed pointer to the row.
template <typename Fn>
inline auto with_type(const void* row, DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat16:
      return fn(static_cast<const Float16*>(row));
    case DType::kBFloat16:
      return fn(static_cast<const BFloat16*>(row));
    case DType::kFloat32:
      break;
  }
  return fn(static_cast<const float*>(row));
}

RowStats row_stats(const void* row, DType dtype, int64_t n, float* maxima) {
  return with_type(row, dtype, [&](const auto* p) { return row_stats_of(p, n, maxima); });
}

double sum_exp(const void* row, DType dtype, int64_t begin, int64_t end, float max,
               double temperature) {
  constexpr double kLeast = 1e-30, kMost = 1e30;  // so that no product is 0 * inf
  const double exact = static_cast<double>(kLog2E) / temperature;
  const auto scale = static_cast<float>(exact < kLeast ? kLeast : exact > kMost ? kMost : exact);
  return with_type(row, dtype,
                   [&](const auto* p) { return sum_exp_of(p, begin, end, max, scale); });
}

bool lane_max(const void* row, DType dtype, int64_t begin, int64_t end, float* out) {
  return with_type(row, dtype, [&](const auto* p) { return lane_max_of(p, begin, end, out); });
}

void fold_max(const float* values, int64_t count, int64_t lanes, float* out) {
  for (int64_t lane = 0; lane < lanes; lane += kGroupLanes) {
    Vec best[kGroup];
    for (Vec& v : best) v = broadcast(-kInf);
    for (int64_t i = lane; i < count; i += lanes) {
      for (int j = 0; j < kGroup; ++j) best[j] = vmax(load(values + i + j * kWidth), best[j]);
    }
    std::memcpy(out + lane, best, sizeof(best));
  }
}

int64_t collect(const void* row, DType dtype, int64_t begin, int64_t end, float threshold,
                int32_t* ids) {
  return with_type(row, dtype,
                   [&](const auto* p) { return collect_ids(p, begin, end, threshold, ids); });
}

int64_t collect_lane(const void* row, DType dtype, int64_t begin, int64_t end, float threshold,
                     int32_t* ids) {
  return with_type(row, dtype, [&](const auto* p) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; i += kGroupLanes) {
      ids[count] = static_cast<int32_t>(i);  // kept if counted: no branch to be mispredicted
      count += load_one(p + i) >= threshold ? 1 : 0;
    }
    return count;
  });
}

void approximate_votes(const VoteRows& rows, int64_t begin, int64_t end, float* out) {
  with_type(nullptr, rows.dtype, [&](const auto* typed) {
    votes_by_rule<std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>>(rows, begin, end, out);
  });
}

void gather(const void* row, DType dtype, const int32_t* ids, int64_t n, float* out) {
  with_type(row, dtype, [&](const auto* p) {
    for (int64_t i = 0; i < n; ++i) out[i] = load_one(p + ids[i]);
  });
}

void exp_to_largest(const float* x, int64_t n, double* out) {
  const double max = static_cast<double>(max_of(x, 0, n, nullptr));
  const auto write = [max](const float* from, double* to) {
    FloatVec few;
    std::memcpy(&few, from, sizeof(few));
    const DoubleVec weights = vexp(__builtin_convertvector(few, DoubleVec) - max);
    std::memcpy(to, &weights, sizeof(weights));
  };
  int64_t i = 0;
  for (; i + kDoubleWidth <= n; i += kDoubleWidth) write(x + i, out + i);
  if (i == n) return;
  float last[kDoubleWidth] = {};
  double weights[kDoubleWidth];
  std::copy(x + i, x + n, last);
  write(last, weights);
  std::copy(weights, weights + (n - i), out + i);
}

float load_item(const void* row, DType dtype, int64_t i) {
  return with_type(row, dtype, [&](const auto* p) { return load_one(p + i); });
}

constexpr Kernels kTable{row_stats,    sum_exp,           lane_max, fold_max,       collect,
                         collect_lane, approximate_votes, gather,   exp_to_largest, load_item};

}  // namespace

const Kernels& table() { return kTable; }

}  // namespace FASTMRC_ISA_NAMESPACE
}  // namespace fastmrc
