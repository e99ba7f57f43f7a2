// Best spans by threshold: the best end of each start bounds its spans, and the k-th best of these
// bounds is reached by k spans already, so only the few starts that reach it are looked at.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Order: sum of the logits falling, start rising, end rising.
struct Span {
  double sum;
  int32_t start, end;
};

bool before(const Span& a, const Span& b) {
  if (a.sum != b.sum) return a.sum > b.sum;
  if (a.start != b.start) return a.start < b.start;
  return a.end < b.end;
}

struct Scratch {
  std::vector<float> start, end;  // [cols] logits, -inf where the mask is not set
  std::vector<float> best_end;    // [cols] largest end logit of the spans from each start
  std::vector<double> bounds, ranked;
  std::vector<Span> spans;
};

// Copies a row; returns its log-sum-exp, -inf if nothing is left by the mask.
double read_row(const Rows& rows, int64_t i, const SpanScores& spans, const char* name,
                std::vector<float>& values) {
  const Kernels& table = kernels();
  const uint8_t* mask = spans.mask == nullptr ? nullptr : spans.mask + i * rows.cols;
  values.resize(static_cast<size_t>(rows.cols));
  for (int64_t j = 0; j < rows.cols; ++j) {
    const bool counts = mask == nullptr || mask[j] != 0 || j == spans.null_position;
    values[static_cast<size_t>(j)] = counts ? table.load_one(rows.row(i), rows.dtype, j) : -kInf;
  }
  const RowStats stats = table.row_stats(values.data(), DType::kFloat32, rows.cols, nullptr);
  check_stats(stats, i, name);
  return stats.logsumexp;
}

// values[i] = max(values[i], values[i + shift]), for all i at once.
void max_with_shifted(std::vector<float>& values, int64_t shift) {
  float* v = values.data();
  const auto n = static_cast<int64_t>(values.size());
  for (int64_t i = 0; i + shift < n; ++i) v[i] = v[i] > v[i + shift] ? v[i] : v[i + shift];
}

// A maximum over the window of max_length positions from each one: windows of 1, 2, 4, ... are
// joined to those of twice the length, without a branch.
void find_best_ends(int64_t max_length, Scratch& s) {
  s.best_end = s.end;
  int64_t width = 1;
  for (; 2 * width <= max_length; width *= 2) max_with_shifted(s.best_end, width);
  if (width < max_length) max_with_shifted(s.best_end, max_length - width);
}

double sum_of(const Scratch& s, int64_t start, int64_t end) {
  return static_cast<double>(s.start[static_cast<size_t>(start)]) +
         static_cast<double>(s.end[static_cast<size_t>(end)]);
}

// A sum of logits that at least k spans reach, or -inf.
double bar_of(int64_t k, Scratch& s) {
  const auto n = static_cast<int64_t>(s.start.size());
  s.bounds.resize(s.start.size());
  for (int64_t i = 0; i < n; ++i) {
    const auto at = static_cast<size_t>(i);
    s.bounds[at] = static_cast<double>(s.start[at]) + static_cast<double>(s.best_end[at]);
  }
  if (k > n) return -static_cast<double>(kInf);
  s.ranked = s.bounds;
  const auto kth = s.ranked.begin() + (k - 1);
  std::nth_element(s.ranked.begin(), kth, s.ranked.end(), std::greater<double>());
  return *kth;
}

void find_spans(int64_t k, int64_t max_length, Scratch& s) {
  find_best_ends(max_length, s);
  const double bar = bar_of(k, s);
  const auto n = static_cast<int64_t>(s.start.size());
  s.spans.clear();
  for (int64_t i = 0; i < n; ++i) {
    if (!(s.bounds[static_cast<size_t>(i)] >= bar)) continue;
    for (int64_t j = i; j < std::min(n, i + max_length); ++j) {
      const double sum = sum_of(s, i, j);
      if (sum >= bar && !std::isinf(sum)) {
        s.spans.push_back({sum, static_cast<int32_t>(i), static_cast<int32_t>(j)});
      }
    }
  }
  const auto kept = std::min<size_t>(s.spans.size(), static_cast<size_t>(k));
  std::partial_sort(s.spans.begin(), s.spans.begin() + static_cast<std::ptrdiff_t>(kept),
                    s.spans.end(), before);
  s.spans.resize(kept);
}

}  // namespace

void best_spans(const SpanScores& spans, float* scores, int32_t* starts, int32_t* ends,
                float* null_scores) {
  const int64_t max_length = std::min(spans.max_length, spans.start.cols);
  constexpr int64_t kLanesPerPosition = 16;  // what is done for a position against an exponential
  const int64_t work = spans.start.rows * spans.start.cols * kLanesPerPosition;
  parallel_for_work(work, spans.start.rows, [&](int64_t i) {
    thread_local Scratch scratch;
    Scratch& s = scratch;  // looked up once
    const double logsumexp = read_row(spans.start, i, spans, "start", s.start) +
                             read_row(spans.end, i, spans, "end", s.end);
    null_scores[i] = 0;
    if (const int64_t null = spans.null_position; null >= 0) {
      const double sum = sum_of(s, null, null);
      if (!std::isinf(sum)) null_scores[i] = static_cast<float>(std::exp(sum - logsumexp));
      s.start[static_cast<size_t>(null)] = s.end[static_cast<size_t>(null)] = -kInf;
    }
    find_spans(spans.k, max_length, s);
    for (int64_t j = 0; j < spans.k; ++j) {
      const bool found = j < static_cast<int64_t>(s.spans.size());
      const Span span = found ? s.spans[static_cast<size_t>(j)] : Span{0, -1, -1};
      scores[i * spans.k + j] = found ? static_cast<float>(std::exp(span.sum - logsumexp)) : -kInf;
      starts[i * spans.k + j] = span.start;
      ends[i * spans.k + j] = span.end;
    }
  });
}

}  // namespace fastmrc
