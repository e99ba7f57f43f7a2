// The best spans of csrc/cuda, emulated on the host, against those of the CPU.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/best_spans.h"
#include "cuda/numbers.cuh"
#include "fastmrc/ops.h"
#include "matrix.h"

using namespace fastmrc;
using fastmrc_test::context;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;

namespace {

const float kNan = std::nanf("");

struct Case {
  Case(Matrix s, Matrix e) : start(std::move(s)), end(std::move(e)) {}

  Matrix start, end;
  std::vector<uint8_t> mask;  // empty: none
  int64_t null_position = -1;
  int64_t max_length = 1;
  int64_t k = 1;

  size_t place(int64_t row, int64_t col) const {
    return static_cast<size_t>(row * start.cols() + col);
  }
  bool counts(int64_t row, int64_t col) const {
    return mask.empty() || mask[place(row, col)] != 0 || col == null_position;
  }
};

struct Result {
  explicit Result(const Case& c)
      : scores(static_cast<size_t>(c.start.rows() * c.k), -7),
        null_scores(static_cast<size_t>(c.start.rows()), -7),
        starts(scores.size(), -7),
        ends(scores.size(), -7) {}

  std::vector<float> scores, null_scores;
  std::vector<int32_t> starts, ends;
  int64_t fault = cuda::kNoFault;
};

Result run(const Case& c) {
  Result r(c);
  const int64_t bytes = cuda::best_spans_bytes(c.start.rows(), c.start.cols(), c.k);
  std::vector<uint64_t> space(static_cast<size_t>(bytes / 8));
  cuda::BestSpans input;
  input.start = c.start.view();
  input.end = c.end.view();
  input.mask = c.mask.empty() ? nullptr : c.mask.data();
  input.null_position = c.null_position;
  input.max_length = c.max_length;
  input.k = c.k;
  input.scores = r.scores.data();
  input.starts = r.starts.data();
  input.ends = r.ends.data();
  input.null_scores = r.null_scores.data();
  input.fault = &r.fault;
  input.workspace = space.data();
  cuda::best_spans(input, nullptr);
  return r;
}

Result run_on_cpu(const Case& c) {
  Result r(c);
  SpanScores spans;
  spans.start = c.start.view();
  spans.end = c.end.view();
  spans.mask = c.mask.empty() ? nullptr : c.mask.data();
  spans.null_position = c.null_position;
  spans.max_length = c.max_length;
  spans.k = c.k;
  best_spans(spans, r.scores.data(), r.starts.data(), r.ends.data(), r.null_scores.data());
  return r;
}

bool near(float a, float b) {
  const auto x = static_cast<double>(a), y = static_cast<double>(b);
  return a == b || std::fabs(x - y) <= 1e-6 * std::fabs(y) + 3e-45;
}

bool near(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](float x, float y) { return near(x, y); });
}

void compare(const Case& c) {
  const Case copy = c;
  const Result ours = run(c), expected = run_on_cpu(copy);
  CHECK(c.start.bytes() == copy.start.bytes());
  CHECK(c.end.bytes() == copy.end.bytes());
  CHECK(c.mask == copy.mask);
  CHECK_EQ(ours.fault, cuda::kNoFault);
  CHECK_EQ(ours.starts, expected.starts);
  CHECK_EQ(ours.ends, expected.ends);
  CHECK(near(ours.scores, expected.scores));
  CHECK(near(ours.null_scores, expected.null_scores));
}

enum class Kind : uint8_t {
  kNormal,
  kCoarse,    // ties
  kEqual,     // all sums
  kZeros,     // 0 and -0
  kNearTies,  // sums that float32 cannot tell apart
  kMostlyMasked,
  kMasked,
  kHuge,  // sums beyond float32
  kCount
};

Matrix random_logits(DType dtype, int64_t rows, int64_t cols, Kind kind, std::mt19937& generator,
                     int64_t gap = 0) {
  Matrix x(dtype, rows, cols, cols + gap, gap / 2);
  std::normal_distribution<float> normal(0, 3);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const auto dice = generator();
      float value = normal(generator);
      if (kind == Kind::kCoarse) value = std::round(value);
      if (kind == Kind::kEqual) value = 0.5f;
      if (kind == Kind::kZeros) value = dice % 2 == 0 ? 0.0f : -0.0f;
      if (kind == Kind::kNearTies) {
        value = dice % 2 == 0 ? 4096.0f : static_cast<float>(dice / 2 % 4) * 0x1p-20f;
      }
      if (kind == Kind::kMostlyMasked && dice % 8 != 0) value = -kInf;
      if (kind == Kind::kMasked) value = -kInf;
      if (kind == Kind::kHuge) value = (dice % 2 == 0 ? 1.0f : -1.0f) * (3e38f + value * 1e36f);
      x.set(r, c, value);
    }
  }
  return x;
}

Kind random_kind(std::mt19937& generator) {
  return static_cast<Kind>(generator() % static_cast<uint32_t>(Kind::kCount));
}

// Of each row all, none, half or a run; what is set need not be 1.
std::vector<uint8_t> random_mask(int64_t rows, int64_t cols, std::mt19937& generator) {
  std::vector<uint8_t> mask;
  for (int64_t r = 0; r < rows; ++r) {
    const auto kind = generator() % 4;
    const int64_t first = generator() % static_cast<uint32_t>(cols);
    for (int64_t c = 0; c < cols; ++c) {
      const bool set = kind == 0 || (kind == 2 && c >= first && c < first + cols / 2) ||
                       (kind == 3 && generator() % 2 == 0);
      mask.push_back(set ? static_cast<uint8_t>(1u << (generator() % 8)) : uint8_t{0});
    }
  }
  return mask;
}

// What the mask leaves out may hold anything.
void spoil_the_rest(Case& c, std::mt19937& generator) {
  for (int64_t r = 0; r < c.start.rows(); ++r) {
    for (int64_t i = 0; i < c.start.cols(); ++i) {
      if (c.counts(r, i)) continue;
      const float values[] = {kNan, kInf, -kInf, 1e30f, 0.0f};
      c.start.set(r, i, values[generator() % 5]);
      c.end.set(r, i, values[generator() % 5]);
    }
  }
}

Case random_case(int64_t rows, int64_t cols, std::mt19937& generator) {
  const auto logits = [&] {
    return random_logits(kDTypes[generator() % 3], rows, cols, random_kind(generator), generator,
                         generator() % 3);
  };
  Matrix start = logits();
  Case c(std::move(start), logits());
  if (generator() % 2 == 0) c.mask = random_mask(rows, cols, generator);
  if (generator() % 2 == 0) {
    c.null_position = generator() % 2 == 0 ? 0 : generator() % static_cast<uint32_t>(cols);
  }
  const int64_t lengths[] = {1,    2,        1 + static_cast<int64_t>(generator() % 40), cols - 1,
                             cols, cols + 1, std::numeric_limits<int64_t>::max()};
  c.max_length = std::max<int64_t>(1, lengths[generator() % 7]);
  const int64_t counts[] = {1, 2, 5, 20, 100, 512, cols, cols + 1};
  c.k = std::min<int64_t>(counts[generator() % 8], 512);
  spoil_the_rest(c, generator);
  return c;
}

void describe(const Case& c, int i) {
  context() = "case " + std::to_string(i) + ": " + fastmrc_test::name_of(c.start.dtype()) + " " +
              fastmrc_test::name_of(c.end.dtype()) + " cols " + std::to_string(c.start.cols()) +
              " k " + std::to_string(c.k) + " max_length " + std::to_string(c.max_length) +
              " null " + std::to_string(c.null_position);
}

void test_random() {
  std::mt19937 generator(1);
  const int64_t widths[] = {1, 2, 3, 7, 31, 40, 64, 257, 300};
  for (int i = 0; i < 400; ++i) {
    const auto seed = static_cast<uint64_t>(i);
    emulation::set_order(seed % 3 == 0 ? 0 : seed);
    const Case c = random_case(1 + i % 3, widths[i % 9], generator);
    describe(c, i);
    compare(c);
  }
  emulation::set_order(0);
  context().clear();
}

// Rows that do and do not fit shared memory.
void test_long_rows() {
  std::mt19937 generator(2);
  const int64_t widths[] = {1023, 1024, 1025, 2500};
  int i = 0;
  for (const int64_t cols : widths) {
    for (const Kind kind : {Kind::kNormal, Kind::kCoarse, Kind::kEqual, Kind::kMostlyMasked}) {
      Case c(random_logits(kDTypes[i % 3], 2, cols, kind, generator, i % 2),
             random_logits(DType::kFloat32, 2, cols, kind, generator));
      c.max_length = i % 2 == 0 ? 30 : cols;
      c.k = i % 3 == 0 ? 500 : 10;
      // All spans of a row in one tie take long to emulate.
      if (kind == Kind::kEqual) c.max_length = std::min<int64_t>(c.max_length, 50);
      describe(c, i);
      emulation::set_order(static_cast<uint64_t>(++i));
      compare(c);
    }
  }
  emulation::set_order(0);
  context().clear();
}

// More long rows than there is memory for at once; most are cut short by a fault.
void test_many_long_rows() {
  std::mt19937 generator(3);
  const int64_t rows = 515, cols = 1025;
  Case c(random_logits(DType::kFloat16, rows, cols, Kind::kMasked, generator),
         random_logits(DType::kFloat16, rows, cols, Kind::kMasked, generator));
  CHECK_EQ(cuda::best_spans_bytes(rows, cols, 1), 512 * 4 * 4 * cols);
  c.max_length = 9;
  c.k = 3;
  for (int64_t r = 0; r < rows; ++r) {
    const bool sound = r < 2 || r > 511;
    for (int64_t j = r; sound && j < cols; j += 1 + r % 5) {
      c.start.set(r, j, static_cast<float>(generator() % 50));
      c.end.set(r, j, static_cast<float>(generator() % 50));
    }
    if (!sound) c.start.set(r, r, kNan);
  }
  const Result ours = run(c);
  CHECK_EQ(ours.fault, int64_t{2} << 8 | static_cast<int64_t>(cuda::Fault::kNan));
  for (int64_t r = 2; r < 512; ++r) c.start.set(r, r, -kInf);
  const Result expected = run_on_cpu(c);
  for (const int64_t r : {int64_t{0}, int64_t{1}, int64_t{512}, int64_t{513}, int64_t{514}}) {
    for (size_t i = c.place(r, 0) / static_cast<size_t>(cols) * 3, end = i + 3; i < end; ++i) {
      CHECK_EQ(ours.starts[i], expected.starts[i]);
      CHECK_EQ(ours.ends[i], expected.ends[i]);
      CHECK(near(ours.scores[i], expected.scores[i]));
    }
  }
}

// To the bit, wherever a row lies and whatever the order of the threads.
void test_equal_rows() {
  std::mt19937 generator(4);
  Case c(random_logits(DType::kFloat32, 3, 700, Kind::kNormal, generator, 3),
         random_logits(DType::kBFloat16, 3, 700, Kind::kCoarse, generator, 1));
  for (int64_t r = 1; r < 3; ++r) {
    for (int64_t i = 0; i < 700; ++i) {
      c.start.set(r, i, c.start.at(0, i));
      c.end.set(r, i, c.end.at(0, i));
    }
  }
  c.null_position = 4;
  c.max_length = 30;
  c.k = 8;
  const Result first = run(c);
  for (uint64_t seed = 1; seed < 4; ++seed) {
    emulation::set_order(seed);
    const Result again = run(c);
    CHECK_EQ(again.scores, first.scores);
    CHECK_EQ(again.null_scores, first.null_scores);
    for (size_t r = 0; r < 3; ++r) {
      CHECK_EQ(again.null_scores[r], first.null_scores[0]);
      CHECK(std::equal(first.scores.begin(), first.scores.begin() + 8,
                       again.scores.begin() + static_cast<std::ptrdiff_t>(r * 8)));
    }
  }
  emulation::set_order(0);
}

// Row 1 of 3 is not sound: what it gives, and that the others are as before.
void check_fault(const Case& c, const Result& sound, cuda::Fault kind) {
  const Result ours = run(c);
  CHECK_EQ(ours.fault, int64_t{1} << 8 | static_cast<int64_t>(kind));
  CHECK(std::isnan(ours.null_scores[1]));
  const auto k = static_cast<size_t>(c.k);
  for (size_t i = 0; i < 3 * k; ++i) {
    const bool bad = i / k == 1;
    CHECK_EQ(ours.starts[i], bad ? -1 : sound.starts[i]);
    CHECK_EQ(ours.ends[i], bad ? -1 : sound.ends[i]);
    CHECK(bad ? std::isnan(ours.scores[i]) : ours.scores[i] == sound.scores[i]);
  }
}

void test_faults() {
  std::mt19937 generator(5);
  for (const DType dtype : kDTypes) {
    Case c(random_logits(dtype, 3, 300, Kind::kNormal, generator),
           random_logits(dtype, 3, 300, Kind::kNormal, generator));
    c.mask.assign(900, 1);
    c.mask[c.place(1, 7)] = c.mask[c.place(1, 0)] = 0;
    c.null_position = 0;
    c.max_length = 5;
    c.k = 4;
    c.start.set(1, 7, kNan);  // is left out
    const Result sound = run(c);
    CHECK_EQ(sound.fault, cuda::kNoFault);
    c.end.set(1, 299, kInf);
    check_fault(c, sound, cuda::Fault::kInfinityEnd);
    c.end.set(1, 298, kNan);
    check_fault(c, sound, cuda::Fault::kNanEnd);
    c.start.set(1, 0, kInf);  // the null position counts
    check_fault(c, sound, cuda::Fault::kInfinity);
    c.start.set(1, 8, kNan);
    check_fault(c, sound, cuda::Fault::kNan);
    c.end.set(2, 1, kNan);
    CHECK_EQ(run(c).fault, int64_t{1} << 8 | static_cast<int64_t>(cuda::Fault::kNan));
  }
}

void test_edges() {
  Case empty(Matrix(DType::kFloat32, 2, 0), Matrix(DType::kFloat32, 2, 0));
  compare(empty);
  Case none(Matrix(DType::kFloat32, 0, 3), Matrix(DType::kFloat32, 0, 3));
  compare(none);

  // Only the score of the null position.
  std::mt19937 generator(6);
  Case c(random_logits(DType::kFloat32, 2, 50, Kind::kNormal, generator),
         random_logits(DType::kFloat32, 2, 50, Kind::kNormal, generator));
  c.null_position = 49;
  const Result expected = run_on_cpu(c);
  c.k = 0;
  CHECK(near(run(c).null_scores, expected.null_scores));

  CHECK_EQ(cuda::best_spans_bytes(100, 1024, 5), 0);
  CHECK_EQ(cuda::best_spans_bytes(100, 2000, 5), 100 * 2000 * 4 * 4);
  CHECK_EQ(cuda::best_spans_bytes(int64_t{1} << 40, int64_t{1} << 24, 5), int64_t{1} << 37);
  c.k = 513;
  CHECK_THROWS(run(c), std::invalid_argument, "k: expected at most 512, got 513");
  cuda::BestSpans input;
  input.k = -1;
  CHECK_THROWS(cuda::best_spans(input, nullptr), std::invalid_argument,
               "k: expected at least 0, got -1");
  input.k = 1;
  input.start = {nullptr, DType::kFloat32, int64_t{1} << 31, 5, 5};
  CHECK_THROWS(cuda::best_spans(input, nullptr), std::invalid_argument, "fewer than 2^31 blocks");
}

}  // namespace

int main() {
  test_random();
  test_long_rows();
  test_many_long_rows();
  test_equal_rows();
  test_faults();
  test_edges();
  return fastmrc_test::report();
}
