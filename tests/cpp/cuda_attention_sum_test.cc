// The attention sum of csrc/cuda, emulated on the host, against that of the CPU.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/attention_sum.h"
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
  explicit Case(Matrix l) : logits(std::move(l)) {}

  Matrix logits;
  std::vector<int32_t> words;
  std::vector<uint8_t> mask;     // empty: none
  std::vector<int64_t> lengths;  // empty: none
  int64_t k = 1;

  size_t place(int64_t row, int64_t col) const {
    return static_cast<size_t>(row * logits.cols() + col);
  }
  bool counts(int64_t row, int64_t col) const {
    if (!lengths.empty() && col >= lengths[static_cast<size_t>(row)]) return false;
    return mask.empty() || mask[place(row, col)] != 0;
  }
};

struct Result {
  explicit Result(const Case& c)
      : words(static_cast<size_t>(c.logits.rows() * c.k), -7),
        first(words.size(), -7),
        probs(words.size(), -7) {}

  std::vector<int32_t> words, first;
  std::vector<double> probs;
  int64_t fault = cuda::kNoFault;
};

Result run(const Case& c) {
  Result r(c);
  const int64_t bytes = cuda::attention_sum_bytes(c.logits.rows(), c.logits.cols(), c.k);
  std::vector<uint64_t> space(static_cast<size_t>(bytes / 8));
  cuda::AttentionSum input;
  input.logits = c.logits.view();
  input.word_ids = c.words.data();
  input.mask = c.mask.empty() ? nullptr : c.mask.data();
  input.lengths = c.lengths.empty() ? nullptr : c.lengths.data();
  input.k = c.k;
  input.words = r.words.data();
  input.probs = r.probs.data();
  input.first = r.first.data();
  input.fault = &r.fault;
  input.workspace = space.data();
  cuda::attention_sum(input, nullptr);
  return r;
}

Result run_on_cpu(const Case& c) {
  Result r(c);
  AttentionSum input;
  input.logits = c.logits.view();
  input.word_ids = c.words.data();
  input.mask = c.mask.empty() ? nullptr : c.mask.data();
  input.lengths = c.lengths.empty() ? nullptr : c.lengths.data();
  attention_sum(input, c.k, r.words.data(), r.probs.data(), r.first.data());
  return r;
}

bool near(double a, double b) { return std::fabs(a - b) <= 1e-12 * b; }

void compare(const Case& c) {
  const Case copy = c;
  const Result ours = run(c), expected = run_on_cpu(copy);
  CHECK(c.logits.bytes() == copy.logits.bytes());
  CHECK(c.words == copy.words);
  CHECK(c.mask == copy.mask);
  CHECK(c.lengths == copy.lengths);
  CHECK_EQ(ours.fault, cuda::kNoFault);
  CHECK_EQ(ours.words, expected.words);
  CHECK_EQ(ours.first, expected.first);
  CHECK(std::equal(ours.probs.begin(), ours.probs.end(), expected.probs.begin(), near));
}

enum class Kind : uint8_t {
  kNormal,
  kCoarse,  // words tie
  kEqual,
  kMostlyMasked,
  kMasked,
  kFar,  // most logits have no share
  kCount
};

float random_logit(Kind kind, std::mt19937& generator) {
  std::normal_distribution<float> normal(0, 4);
  const auto dice = generator() % 20;
  const float value = normal(generator);
  if (kind == Kind::kEqual) return 0.5f;
  if (kind == Kind::kMasked || (kind == Kind::kMostlyMasked && dice != 0)) return -kInf;
  if (dice == 0) return -kInf;
  if (kind == Kind::kCoarse) return static_cast<float>(dice % 4) - 2;
  return kind == Kind::kFar ? std::round(value) * 400 : value;
}

Case random_case(int64_t rows, int64_t cols, int64_t vocabulary, Kind kind,
                 std::mt19937& generator) {
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(generator() % static_cast<uint32_t>(n));
  };
  const int64_t gap = below(3);
  Case c(Matrix(kDTypes[below(3)], rows, cols, cols + gap, gap / 2));
  const bool with_mask = below(2) == 0, with_lengths = below(3) == 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t col = 0; col < cols; ++col) {
      c.logits.set(r, col, random_logit(kind, generator));
      c.words.push_back(static_cast<int32_t>(below(vocabulary) * 7919));
      if (with_mask) c.mask.push_back(below(4) == 0 ? 0 : static_cast<uint8_t>(1 + below(255)));
    }
    if (with_lengths) c.lengths.push_back(below(cols + 1));
  }
  const int64_t counts[] = {1, 2, 5, 20, 100, 512, cols, cols + 1};
  c.k = std::min<int64_t>(counts[below(8)], 512);
  return c;
}

// What does not count may hold anything.
void spoil_the_rest(Case& c, std::mt19937& generator) {
  for (int64_t r = 0; r < c.logits.rows(); ++r) {
    for (int64_t i = 0; i < c.logits.cols(); ++i) {
      if (c.counts(r, i)) continue;
      const float values[] = {kNan, kInf, -kInf, 1e30f, 0.0f};
      c.logits.set(r, i, values[generator() % 5]);
      c.words[c.place(r, i)] = generator() % 2 == 0 ? -1 : 3;
    }
  }
}

void describe(const Case& c, int i) {
  context() = "case " + std::to_string(i) + ": " + fastmrc_test::name_of(c.logits.dtype()) +
              " cols " + std::to_string(c.logits.cols()) + " k " + std::to_string(c.k);
}

void test_random() {
  std::mt19937 generator(1);
  const int64_t widths[] = {1, 2, 3, 7, 32, 33, 100, 255, 300};
  for (int i = 0; i < 500; ++i) {
    const auto seed = static_cast<uint64_t>(i);
    emulation::set_order(seed % 3 == 0 ? 0 : seed);
    const int64_t cols = widths[i % 9];
    const auto kind = static_cast<Kind>(generator() % static_cast<uint32_t>(Kind::kCount));
    const int64_t vocabulary = 1 + static_cast<int64_t>(generator() % (2 * cols));
    Case c = random_case(1 + i % 3, cols, vocabulary, kind, generator);
    spoil_the_rest(c, generator);
    describe(c, i);
    compare(c);
  }
  emulation::set_order(0);
  context().clear();
}

// Rows that do and do not fit shared memory; one word, some, and more than the collector has room.
void test_long_rows() {
  std::mt19937 generator(2);
  int i = 0;
  for (const int64_t cols : {1000, 1024, 1025, 3000}) {
    for (const int64_t vocabulary : {1, 50, 1 << 18}) {
      for (const Kind kind : {Kind::kNormal, Kind::kCoarse, Kind::kEqual}) {
        Case c = random_case(1, cols, vocabulary, kind, generator);
        describe(c, i);
        emulation::set_order(static_cast<uint64_t>(++i));
        compare(c);
      }
    }
  }
  emulation::set_order(0);
  context().clear();
}

// More long rows than there is memory for at once; most are cut short by a fault.
void test_many_long_rows() {
  std::mt19937 generator(3);
  const int64_t rows = 515, cols = 1025;
  Case c(Matrix(DType::kFloat16, rows, cols));
  CHECK_EQ(cuda::attention_sum_bytes(rows, cols, 1), 512 * 2048 * (8 + 8));
  c.k = 3;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < cols; ++i) {
      c.logits.set(r, i, static_cast<float>(generator() % 5));
      c.words.push_back(static_cast<int32_t>(generator() % 90));
    }
    if (r >= 2 && r <= 511) c.words[c.place(r, r)] = -5;
  }
  const Result ours = run(c);
  CHECK_EQ(ours.fault, int64_t{2} << 8 | static_cast<int64_t>(cuda::Fault::kNegativeWord));
  for (int64_t r = 2; r < 512; ++r) c.words[c.place(r, r)] = 5;
  const Result expected = run_on_cpu(c);
  for (const size_t r : {0, 1, 512, 513, 514}) {
    for (size_t i = 3 * r; i < 3 * r + 3; ++i) {
      CHECK_EQ(ours.words[i], expected.words[i]);
      CHECK_EQ(ours.first[i], expected.first[i]);
      CHECK(near(ours.probs[i], expected.probs[i]));
    }
  }
}

// Words whose weights are the same in other orders tie, though a plain sum would tell them apart.
void test_ties_of_reordered_weights() {
  std::mt19937 generator(4);
  std::normal_distribution<float> normal(0, 3);
  const int64_t words = 40, times = 25;
  Case c(Matrix(DType::kFloat32, 1, words * times));
  std::vector<float> weights;
  for (int64_t i = 0; i < times; ++i) weights.push_back(normal(generator));
  c.words.resize(static_cast<size_t>(words * times));
  for (int64_t w = 0; w < words; ++w) {
    std::shuffle(weights.begin(), weights.end(), generator);
    for (int64_t i = 0; i < times; ++i) {
      c.logits.set(0, i * words + w, weights[static_cast<size_t>(i)]);
      c.words[c.place(0, i * words + w)] = static_cast<int32_t>(1000 - w);
    }
  }
  c.k = words;
  compare(c);
  const Result r = run(c);
  for (int32_t w = 0; w < words; ++w) {
    CHECK_EQ(r.first[static_cast<size_t>(w)], w);
    CHECK_EQ(r.probs[static_cast<size_t>(w)], r.probs[0]);
  }
}

// To the bit, wherever a row lies and whatever the order of the threads.
void test_equal_rows() {
  std::mt19937 generator(5);
  Case c(Matrix(DType::kFloat32, 3, 700, 703, 1));
  c.words.resize(2100);
  for (int64_t i = 0; i < 700; ++i) {
    const float logit = random_logit(Kind::kNormal, generator);
    const auto word = static_cast<int32_t>(generator() % 200);
    for (int64_t r = 0; r < 3; ++r) {
      c.logits.set(r, i, logit);
      c.words[c.place(r, i)] = word;
    }
  }
  c.k = 8;
  const Result first = run(c);
  for (uint64_t seed = 1; seed < 4; ++seed) {
    emulation::set_order(seed);
    const Result again = run(c);
    for (size_t i = 0; i < 24; ++i) CHECK_EQ(again.probs[i], first.probs[i % 8]);
    CHECK_EQ(again.first, first.first);
  }
  emulation::set_order(0);
}

void test_edges() {
  Case one(Matrix(DType::kFloat32, 1, 1));
  one.logits.set(0, 0, -1e30f);
  one.words = {2147483647};
  one.k = 2;
  compare(one);
  CHECK_EQ(run(one).probs[0], 1.0);

  // Logits 708 below the largest have a share, those below that have none.
  Case far(Matrix(DType::kFloat32, 1, 4));
  for (int64_t i = 0; i < 4; ++i) far.logits.set(0, i, i == 2 ? 0.0f : -707.375f - 0.375f * i);
  far.words = {3, 4, 5, 6};
  far.k = 4;
  compare(far);
  const Result r = run(far);
  CHECK_EQ(r.words, (std::vector<int32_t>{5, 3, 4, 6}));
  CHECK(r.probs[2] > 0.0);
  CHECK_EQ(r.probs[3], 0.0);

  Case empty(Matrix(DType::kFloat32, 2, 0));
  empty.k = 2;
  compare(empty);
  Case none(Matrix(DType::kFloat32, 0, 3));
  compare(none);
}

// Row 1 of 3 is not sound: what it gives, and that the others are as before.
void check_fault(const Case& c, const Result& sound, cuda::Fault kind) {
  const Result ours = run(c);
  CHECK_EQ(ours.fault, int64_t{1} << 8 | static_cast<int64_t>(kind));
  const auto k = static_cast<size_t>(c.k);
  for (size_t i = 0; i < 3 * k; ++i) {
    const bool bad = i / k == 1;
    CHECK_EQ(ours.words[i], bad ? -1 : sound.words[i]);
    CHECK_EQ(ours.first[i], bad ? -1 : sound.first[i]);
    CHECK(bad ? std::isnan(ours.probs[i]) : ours.probs[i] == sound.probs[i]);
  }
}

void test_faults() {
  std::mt19937 generator(6);
  Case c = random_case(3, 300, 50, Kind::kNormal, generator);
  c.mask.assign(900, 1);
  c.mask[c.place(1, 7)] = 0;
  c.lengths = {300, 290, 300};
  c.k = 4;
  c.words[c.place(1, 7)] = c.words[c.place(1, 295)] = c.words[c.place(1, 9)] = -1;
  c.logits.set(1, 7, kNan);    // masked
  c.logits.set(1, 295, kInf);  // beyond the length
  c.logits.set(1, 9, -kInf);   // without a weight, whatever its word
  compare(c);
  const Result sound = run(c);
  c.logits.set(1, 10, 1.0f);
  c.words[c.place(1, 10)] = -2147483647 - 1;
  check_fault(c, sound, cuda::Fault::kNegativeWord);
  c.logits.set(1, 280, kInf);
  check_fault(c, sound, cuda::Fault::kInfinity);
  c.logits.set(1, 281, kNan);
  check_fault(c, sound, cuda::Fault::kNan);
  c.logits.set(2, 1, kNan);
  CHECK_EQ(run(c).fault, int64_t{1} << 8 | static_cast<int64_t>(cuda::Fault::kNan));
}

void test_lengths() {
  std::mt19937 generator(7);
  for (const int64_t cols : {40, 1100}) {
    Case c = random_case(3, cols, 10, Kind::kNormal, generator);
    c.lengths = {cols, cols, 0};
    c.k = 4;
    compare(c);
    const Result sound = run(c);
    for (const int64_t far : {int64_t{1}, int64_t{1} << 40}) {
      c.lengths = {cols, cols + far, -far};
      const Result ours = run(c);
      CHECK_EQ(ours.fault, int64_t{1} << 8 | static_cast<int64_t>(cuda::Fault::kLength));
      CHECK_EQ(ours.words, sound.words);
      CHECK_EQ(ours.first, sound.first);
      CHECK_EQ(ours.probs, sound.probs);
    }
  }
}

void test_geometry() {
  CHECK_EQ(cuda::attention_sum_bytes(100, 1024, 5), 0);
  CHECK_EQ(cuda::attention_sum_bytes(100, 2049, 5), 100 * 4096 * 16);
  CHECK_EQ(cuda::attention_sum_bytes(int64_t{1} << 40, int64_t{1} << 24, 5), int64_t{1} << 37);
  cuda::AttentionSum input;
  input.k = 513;
  CHECK_THROWS(cuda::attention_sum(input, nullptr), std::invalid_argument,
               "k: expected at most 512, got 513");
  input.k = -1;
  CHECK_THROWS(cuda::attention_sum(input, nullptr), std::invalid_argument,
               "k: expected at least 0, got -1");
  input.k = 1;
  input.logits = {nullptr, DType::kFloat32, int64_t{1} << 31, 5, 5};
  CHECK_THROWS(cuda::attention_sum(input, nullptr), std::invalid_argument,
               "fewer than 2^31 blocks");
}

}  // namespace

int main() {
  test_random();
  test_long_rows();
  test_many_long_rows();
  test_ties_of_reordered_weights();
  test_equal_rows();
  test_edges();
  test_faults();
  test_lengths();
  test_geometry();
  return fastmrc_test::report();
}
