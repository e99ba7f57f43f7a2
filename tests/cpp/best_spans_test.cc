// best_spans against a sort of all pairs of positions in double precision.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/thread_pool.h"
#include "fastmrc/ops.h"
#include "matrix.h"

namespace {

using fastmrc::best_spans;
using fastmrc::DType;
using fastmrc::SpanScores;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;
using fastmrc_test::name_of;
using fastmrc_test::same_bits;

constexpr uint32_t kSeed = 20240615;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Ids = std::vector<int32_t>;

// Scores with everything they point to.
struct Case {
  Case(Matrix s, Matrix e) : start(std::move(s)), end(std::move(e)) {}

  Matrix start, end;
  std::vector<uint8_t> mask;  // empty: none
  int64_t null_position = -1;
  int64_t max_length = 1;
  int64_t k = 1;

  SpanScores spans() const {
    SpanScores spans;
    spans.start = start.view();
    spans.end = end.view();
    spans.mask = mask.empty() ? nullptr : mask.data();
    spans.null_position = null_position;
    spans.max_length = max_length;
    spans.k = k;
    return spans;
  }

  bool inside(int64_t row, int64_t col) const {
    if (col == null_position) return false;
    return mask.empty() || mask[static_cast<size_t>(row * start.cols() + col)] != 0;
  }

  bool counts(int64_t row, int64_t col) const { return col == null_position || inside(row, col); }
};

Case small_case(int64_t rows, int64_t cols) {
  Case c(Matrix(DType::kFloat32, rows, cols), Matrix(DType::kFloat32, rows, cols));
  c.start.fill(0.0f);
  c.end.fill(0.0f);
  return c;
}

struct Found {
  std::vector<float> scores, null_scores;
  Ids starts, ends;

  Found(int64_t rows, int64_t k)
      : scores(static_cast<size_t>(rows * k), kNan),
        null_scores(static_cast<size_t>(rows), kNan),
        starts(static_cast<size_t>(rows * k), -7),
        ends(static_cast<size_t>(rows * k), -7) {}

  bool operator==(const Found& other) const {
    return starts == other.starts && ends == other.ends && same(scores, other.scores) &&
           same(null_scores, other.null_scores);
  }

 private:
  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](float x, float y) { return same_bits(x, y); });
  }
};

Found run(const Case& c) {
  Found found(c.start.rows(), c.k);
  best_spans(c.spans(), found.scores.data(), found.starts.data(), found.ends.data(),
             found.null_scores.data());
  return found;
}

// --- what is expected ----------------------------------------------------------------------------

// -inf if nothing counts.
double naive_logsumexp(const Case& c, const Matrix& x, int64_t row) {
  double max = -static_cast<double>(kInf), sum = 0;
  for (int64_t i = 0; i < x.cols(); ++i) {
    if (c.counts(row, i)) max = std::max(max, static_cast<double>(x.at(row, i)));
  }
  if (std::isinf(max)) return max;
  for (int64_t i = 0; i < x.cols(); ++i) {
    if (c.counts(row, i)) sum += std::exp(static_cast<double>(x.at(row, i)) - max);
  }
  return max + std::log(sum);
}

struct Span {
  double sum;
  int32_t start, end;
};

double sum_of(const Case& c, int64_t row, int64_t i, int64_t j) {
  return static_cast<double>(c.start.at(row, i)) + static_cast<double>(c.end.at(row, j));
}

// All spans, best first. Only their ends have to be inside of the mask.
std::vector<Span> all_spans(const Case& c, int64_t row) {
  std::vector<Span> spans;
  for (int32_t i = 0; i < c.start.cols(); ++i) {
    for (int32_t j = i; j < c.start.cols(); ++j) {
      if (j - i + 1 > c.max_length || !c.inside(row, i) || !c.inside(row, j)) continue;
      const double sum = sum_of(c, row, i, j);
      if (!std::isinf(sum)) spans.push_back({sum, i, j});
    }
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    if (a.sum != b.sum) return a.sum > b.sum;
    return a.start != b.start ? a.start < b.start : a.end < b.end;
  });
  return spans;
}

bool near(float found, double expected) {
  return std::fabs(static_cast<double>(found) - expected) <= 4e-6 * expected + 3e-45;
}

void check_row(const Case& c, const Found& found, int64_t row) {
  const double logsumexp = naive_logsumexp(c, c.start, row) + naive_logsumexp(c, c.end, row);
  const std::vector<Span> spans = all_spans(c, row);
  Ids starts[2], ends[2];
  bool right = true;
  for (int64_t i = 0; i < c.k; ++i) {
    const auto at = static_cast<size_t>(row * c.k + i);
    const auto rank = static_cast<size_t>(i);
    const bool exists = rank < spans.size();
    starts[0].push_back(found.starts[at]);
    ends[0].push_back(found.ends[at]);
    starts[1].push_back(exists ? spans[rank].start : -1);
    ends[1].push_back(exists ? spans[rank].end : -1);
    right &= exists ? near(found.scores[at], std::exp(spans[rank].sum - logsumexp))
                    : found.scores[at] == -kInf;
    right &= i == 0 || found.scores[at] <= found.scores[at - 1];
  }
  CHECK_EQ(starts[0], starts[1]);
  CHECK_EQ(ends[0], ends[1]);
  CHECK(right);
  double null_score = 0;
  if (c.null_position >= 0) {
    const double sum = sum_of(c, row, c.null_position, c.null_position);
    if (!std::isinf(sum)) null_score = std::exp(sum - logsumexp);
  }
  CHECK(near(found.null_scores[static_cast<size_t>(row)], null_score));
}

void check_case(const Case& c) {
  const Case copy = c;
  const Found found = run(c);
  for (int64_t row = 0; row < c.start.rows(); ++row) check_row(copy, found, row);
  CHECK(c.start.bytes() == copy.start.bytes());
  CHECK(c.end.bytes() == copy.end.bytes());
  CHECK(c.mask == copy.mask);
}

// --- random cases --------------------------------------------------------------------------------

enum class Logits : uint8_t {
  kNormal,
  kTies,      // few different numbers
  kZeros,     // 0 and -0
  kNearTies,  // sums that float32 cannot tell apart
  kMasked,    // most entries -inf
  kAllMasked,
  kHuge,  // sums beyond float32
  kCount
};

void fill(Logits kind, Matrix* x, std::mt19937* random) {
  std::normal_distribution<float> normal(0, 3);
  for (int64_t r = 0; r < x->rows(); ++r) {
    for (int64_t c = 0; c < x->cols(); ++c) {
      const auto dice = (*random)();
      float value = normal(*random);
      if (kind == Logits::kTies) value = static_cast<float>(dice % 3);
      if (kind == Logits::kZeros) value = dice % 2 == 0 ? 0.0f : -0.0f;
      if (kind == Logits::kNearTies) {
        value = dice % 2 == 0 ? 4096.0f : static_cast<float>(dice / 2 % 4) * 0x1p-20f;
      }
      if (kind == Logits::kMasked && dice % 4 != 0) value = -kInf;
      if (kind == Logits::kAllMasked) value = -kInf;
      if (kind == Logits::kHuge) value = (dice % 2 == 0 ? 1.0f : -1.0f) * (3e38f + value * 1e36f);
      x->set(r, c, value);
    }
  }
}

Matrix random_logits(int64_t rows, int64_t cols, std::mt19937* random) {
  const int64_t gap = (*random)() % 3;
  Matrix x(kDTypes[(*random)() % 3], rows, cols, cols + gap, gap / 2);
  fill(static_cast<Logits>((*random)() % static_cast<uint32_t>(Logits::kCount)), &x, random);
  return x;
}

// All set, none, a run of them or any; what is set need not be 1.
std::vector<uint8_t> random_mask(int64_t rows, int64_t cols, std::mt19937* random) {
  std::vector<uint8_t> mask;
  for (int64_t r = 0; r < rows; ++r) {
    const auto kind = (*random)() % 4;
    const int64_t first = (*random)() % static_cast<uint32_t>(cols);
    for (int64_t c = 0; c < cols; ++c) {
      const bool set = kind == 0 || (kind == 2 && c >= first && c < first + cols / 2) ||
                       (kind == 3 && (*random)() % 2 == 0);
      mask.push_back(set ? static_cast<uint8_t>(1u << ((*random)() % 8)) : uint8_t{0});
    }
  }
  return mask;
}

// What the mask leaves out may hold anything.
void spoil_the_rest(Case* c, std::mt19937* random) {
  for (int64_t r = 0; r < c->start.rows(); ++r) {
    for (int64_t i = 0; i < c->start.cols(); ++i) {
      if (c->counts(r, i)) continue;
      const float values[] = {kNan, kInf, -kInf, 1e30f, 0.0f};
      c->start.set(r, i, values[(*random)() % 5]);
      c->end.set(r, i, values[(*random)() % 5]);
    }
  }
}

Case random_case(std::mt19937* random) {
  const int64_t sizes[] = {1, 2, 3, 4, 7, 16, 17, 40};
  const int64_t cols = sizes[(*random)() % 8];
  const int64_t rows = (*random)() % 5;
  Case c(random_logits(rows, cols, random), random_logits(rows, cols, random));
  if ((*random)() % 2 == 0) c.mask = random_mask(rows, cols, random);
  if ((*random)() % 2 == 0) {
    c.null_position = (*random)() % 2 == 0 ? 0 : (*random)() % static_cast<uint32_t>(cols);
  }
  const int64_t lengths[] = {1,    2,        1 + static_cast<int64_t>((*random)() % 9), cols - 1,
                             cols, cols + 1, std::numeric_limits<int64_t>::max()};
  c.max_length = std::max<int64_t>(1, lengths[(*random)() % 7]);
  const int64_t counts[] = {1,    2,        1 + static_cast<int64_t>((*random)() % 6),
                            cols, cols + 1, cols * (cols + 1) / 2 + 1};
  c.k = counts[(*random)() % 6];
  spoil_the_rest(&c, random);
  return c;
}

void test_random_cases() {
  std::mt19937 random(kSeed);
  for (int i = 0; i < 4000; ++i) {
    const Case c = random_case(&random);
    fastmrc_test::context() = "case " + std::to_string(i) + ": " + name_of(c.start.dtype()) + " " +
                              name_of(c.end.dtype()) + " " + std::to_string(c.start.rows()) + "x" +
                              std::to_string(c.start.cols()) + " k " + std::to_string(c.k) +
                              " max_length " + std::to_string(c.max_length) + " null " +
                              std::to_string(c.null_position);
    check_case(c);
  }
}

// Every length and k for one row each of several widths.
void test_every_length() {
  std::mt19937 random(kSeed + 1);
  for (const int64_t cols : {1, 5, 12}) {
    for (int64_t max_length = 1; max_length <= cols + 1; ++max_length) {
      for (int64_t k = 1; k <= cols * (cols + 1) / 2 + 1; ++k) {
        fastmrc_test::context() = "max_length " + std::to_string(max_length) + " k " +
                                  std::to_string(k) + " of " + std::to_string(cols);
        Case c(random_logits(1, cols, &random), random_logits(1, cols, &random));
        c.max_length = max_length;
        c.k = k;
        check_case(c);
      }
    }
  }
}

// A NaN or +inf that counts: of start before end, with its row.
void test_what_may_not_be() {
  std::mt19937 random(kSeed + 2);
  int spoiled = 0;
  for (int i = 0; i < 1500; ++i) {
    Case c = random_case(&random);
    if (c.start.rows() == 0) continue;
    fastmrc_test::context() = "spoiled case " + std::to_string(i);
    const int64_t row = random() % static_cast<uint32_t>(c.start.rows());
    const int64_t col = i % 3 == 0 && c.null_position >= 0
                            ? c.null_position
                            : random() % static_cast<uint32_t>(c.start.cols());
    if (!c.counts(row, col)) continue;
    const bool nan = random() % 2 == 0;
    const auto where = random() % 3;  // start, end, both
    if (where != 1) c.start.set(row, col, nan ? kNan : kInf);
    if (where != 0) c.end.set(row, col, nan ? kNan : kInf);
    const std::string message = std::string(where == 1 ? "end" : "start") +
                                ": expected numbers below infinity, got " + (nan ? "NaN" : "inf") +
                                " in row " + std::to_string(row);
    CHECK_THROWS(run(c), std::invalid_argument, message);
    ++spoiled;
  }
  CHECK(spoiled > 500);
}

// --- by hand -------------------------------------------------------------------------------------

// P(start) = 1/2, 1/4, 1/4 and P(end) = 1/4, 1/4, 1/2.
void test_scores_by_hand() {
  fastmrc_test::context() = "by hand";
  Case c = small_case(1, 3);
  for (int64_t i = 0; i < 3; ++i) {
    c.start.set(0, i, static_cast<float>(std::log(i == 0 ? 0.5 : 0.25)) - 2.0f);
    c.end.set(0, i, static_cast<float>(std::log(i == 2 ? 0.5 : 0.25)) + 7.0f);
  }
  c.max_length = 3;
  c.k = 7;
  Found found = run(c);
  CHECK_EQ(found.starts, (Ids{0, 0, 0, 1, 2, 1, -1}));
  CHECK_EQ(found.ends, (Ids{2, 0, 1, 2, 2, 1, -1}));
  const double expected[] = {0.25, 0.125, 0.125, 0.125, 0.125, 0.0625};
  for (size_t i = 0; i < 6; ++i) CHECK(near(found.scores[i], expected[i]));
  CHECK_EQ(found.scores[6], -kInf);
  CHECK_EQ(found.null_scores, std::vector<float>{0.0f});

  c.max_length = 2;
  c.k = 1;
  found = run(c);
  CHECK_EQ(found.starts, Ids{0});
  CHECK_EQ(found.ends, Ids{0});

  // Position 0 stands for no answer, 1 is left out: what remains is 0 and 2.
  c.null_position = 0;
  c.mask = {0, 0, 1};
  c.k = 2;
  found = run(c);
  CHECK_EQ(found.starts, (Ids{2, -1}));
  CHECK_EQ(found.ends, (Ids{2, -1}));
  CHECK(near(found.scores[0], (1.0 / 3) * (2.0 / 3)));
  CHECK(near(found.null_scores[0], (2.0 / 3) * (1.0 / 3)));
}

void test_small_cases() {
  fastmrc_test::context() = "ties";
  Case ties = small_case(1, 4);
  ties.max_length = 3;
  ties.k = 5;
  const Found found = run(ties);
  CHECK_EQ(found.starts, (Ids{0, 0, 0, 1, 1}));
  CHECK_EQ(found.ends, (Ids{0, 1, 2, 1, 2}));

  fastmrc_test::context() = "one column";
  Case one = small_case(2, 1);
  one.start.set(1, 0, -kInf);
  one.k = 2;
  Found column = run(one);
  CHECK_EQ(column.starts, (Ids{0, -1, -1, -1}));
  CHECK_EQ(column.scores, (std::vector<float>{1.0f, -kInf, -kInf, -kInf}));
  one.null_position = 0;
  column = run(one);
  CHECK_EQ(column.starts, Ids(4, -1));
  CHECK_EQ(column.null_scores, (std::vector<float>{1.0f, 0.0f}));

  fastmrc_test::context() = "no columns, no rows";
  const Found empty = run(small_case(2, 0));
  CHECK_EQ(empty.starts, Ids(2, -1));
  CHECK_EQ(empty.scores, std::vector<float>(2, -kInf));
  CHECK_EQ(empty.null_scores, std::vector<float>(2, 0.0f));
  best_spans(small_case(0, 3).spans(), nullptr, nullptr, nullptr, nullptr);

  // Each number has a span, none of which may be seen in the next row.
  fastmrc_test::context() = "rows of one call";
  Case rows = small_case(3, 4);
  rows.mask = {1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1};
  rows.max_length = 4;
  rows.k = 3;
  const Found each = run(rows);
  CHECK_EQ(each.starts, (Ids{0, 0, 1, -1, -1, -1, 2, 2, 3}));
  CHECK_EQ(each.ends, (Ids{0, 1, 1, -1, -1, -1, 2, 3, 3}));
}

// The order is that of the sums in double, also where float32 or the probabilities are equal.
void test_order_is_that_of_the_sums() {
  fastmrc_test::context() = "order of sums";
  Case c = small_case(1, 3);
  c.start.set(0, 0, 4096.0f);
  c.start.set(0, 1, 4096.0f);
  c.start.set(0, 2, 4096.0f);
  c.end.set(0, 1, 0x1p-20f);
  c.end.set(0, 2, 0x1p-19f);
  c.k = 3;
  CHECK_EQ(run(c).starts, (Ids{2, 1, 0}));
  // Probabilities of 0: far below the largest logit, which belongs to no span.
  c.null_position = 0;
  c.start.set(0, 0, 1e6f);
  const Found found = run(c);
  CHECK_EQ(found.starts, (Ids{2, 1, -1}));
  CHECK_EQ(found.scores, (std::vector<float>{0.0f, 0.0f, -kInf}));
}

// --- threads -------------------------------------------------------------------------------------

void test_any_number_of_threads() {
  std::mt19937 random(kSeed + 3);
  const int threads = fastmrc::num_threads();
  for (const DType dtype : kDTypes) {
    fastmrc_test::context() = std::string("threads, ") + name_of(dtype);
    Case c(Matrix(dtype, 60, 100, 101), Matrix(dtype, 60, 100, 103, 1));
    fill(Logits::kNormal, &c.start, &random);
    fill(Logits::kTies, &c.end, &random);
    c.mask = random_mask(60, 100, &random);
    c.null_position = 0;
    c.max_length = 20;
    c.k = 10;
    fastmrc::set_num_threads(1);
    check_case(c);
    const Found found = run(c);
    for (const int n : {2, 5}) {
      fastmrc::set_num_threads(n);
      for (int i = 0; i < 5; ++i) CHECK(run(c) == found);
    }
    // Of several bad rows the first one.
    for (int64_t row = 17; row < 60; row += 2) c.end.set(row, 0, kInf);
    for (int64_t row = 18; row < 60; row += 2) c.start.set(row, 0, kNan);
    for (int i = 0; i < 5; ++i) {
      CHECK_THROWS(run(c), std::invalid_argument,
                   "end: expected numbers below infinity, got inf in row 17");
    }
  }
  fastmrc::set_num_threads(threads);
}

}  // namespace

int main() {
  std::cout << "seed " << kSeed << std::endl;
  test_random_cases();
  test_every_length();
  test_what_may_not_be();
  test_scores_by_hand();
  test_small_cases();
  test_order_is_that_of_the_sums();
  test_any_number_of_threads();
  return fastmrc_test::report();
}
