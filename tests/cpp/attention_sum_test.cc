// attention_sum against sums of exponentials in extended precision, sorted; exp_to_largest on every
// set.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "core/thread_pool.h"
#include "cpu/kernels.h"
#include "fastmrc/ops.h"
#include "matrix.h"

namespace {

using fastmrc::attention_sum;
using fastmrc::AttentionSum;
using fastmrc::DType;
using fastmrc::Isa;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;
using fastmrc_test::name_of;
using fastmrc_test::same_bits;

constexpr uint32_t kSeed = 20261125;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  explicit Case(Matrix l) : logits(std::move(l)) {}

  Matrix logits;
  std::vector<int32_t> words;
  std::vector<uint8_t> mask;     // empty: none
  std::vector<int64_t> lengths;  // empty: none
  int64_t k = 1;

  AttentionSum input() const {
    AttentionSum input;
    input.logits = logits.view();
    input.word_ids = words.data();
    input.mask = mask.empty() ? nullptr : mask.data();
    input.lengths = lengths.empty() ? nullptr : lengths.data();
    return input;
  }

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
      : words(static_cast<size_t>(c.logits.rows() * c.k), 7),
        first(words.size(), 7),
        probs(words.size(), 7.0) {
    attention_sum(c.input(), c.k, words.data(), probs.data(), first.data());
  }

  std::vector<int32_t> words, first;
  std::vector<double> probs;
};

struct Word {
  int32_t word, first;
  long double sum;
};

// The words of a row, best first; sums that differ by no more than rounding are equal.
std::vector<Word> ranked(const Case& c, int64_t row) {
  long double max = -kInf;
  for (int64_t i = 0; i < c.logits.cols(); ++i) {
    if (c.counts(row, i)) max = std::max<long double>(max, c.logits.at(row, i));
  }
  std::map<int32_t, Word> found;
  for (int64_t i = 0; i < c.logits.cols(); ++i) {
    const float logit = c.logits.at(row, i);
    if (!c.counts(row, i) || logit == -kInf) continue;
    const int32_t word = c.words[c.place(row, i)];
    Word& own = found.emplace(word, Word{word, static_cast<int32_t>(i), 0}).first->second;
    own.sum += std::exp(static_cast<long double>(logit) - max);
  }
  std::vector<Word> words;
  for (const auto& entry : found) words.push_back(entry.second);
  std::sort(words.begin(), words.end(), [](const Word& a, const Word& b) {
    const long double near = 1e-17L * std::max(a.sum, b.sum);
    return std::fabs(a.sum - b.sum) > near ? a.sum > b.sum : a.first < b.first;
  });
  return words;
}

void compare(const Case& c) {
  const Result got(c);
  for (int64_t row = 0; row < c.logits.rows(); ++row) {
    const std::vector<Word> expected = ranked(c, row);
    long double total = 0;
    for (const Word& word : expected) total += word.sum;
    for (int64_t j = 0; j < c.k; ++j) {
      const auto at = static_cast<size_t>(row * c.k + j);
      if (j >= static_cast<int64_t>(expected.size())) {
        CHECK_EQ(got.words[at], -1);
        CHECK_EQ(got.first[at], -1);
        CHECK_EQ(got.probs[at], 0.0);
        continue;
      }
      const Word& word = expected[static_cast<size_t>(j)];
      CHECK_EQ(got.words[at], word.word);
      CHECK_EQ(got.first[at], word.first);
      const auto prob = static_cast<double>(word.sum / total);
      CHECK(std::fabs(got.probs[at] - prob) <= 2e-15 * prob);
    }
  }
}

void test_random() {
  std::mt19937 random(kSeed);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint32_t>(n));
  };
  std::normal_distribution<float> normal(0, 4);
  for (int i = 0; i < 3000; ++i) {
    fastmrc_test::context() = "case " + std::to_string(i);
    const int64_t rows = below(4), cols = 1 + below(i % 10 == 0 ? 900 : 40);
    Case c(Matrix(kDTypes[below(3)], rows, cols, cols + below(3), below(3)));
    const bool few_logits = below(2) == 0;  // so that words tie
    const int64_t vocabulary = 1 + below(2 * cols);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t col = 0; col < cols; ++col) {
        const float logit = few_logits ? static_cast<float>(below(4)) - 2 : normal(random);
        c.logits.set(r, col, below(20) == 0 ? -kInf : logit);
        c.words.push_back(static_cast<int32_t>(below(vocabulary) * 7919));
        if (i % 3 == 0) c.mask.push_back(below(4) == 0 ? 0 : 1);
      }
      if (i % 4 == 0) c.lengths.push_back(below(cols + 1));
    }
    c.k = 1 + below(8);
    compare(c);
  }
}

void test_edges() {
  Case one(Matrix(DType::kFloat32, 1, 1));
  one.logits.set(0, 0, -1e30f);
  one.words = {2147483647};
  one.k = 2;
  compare(one);
  CHECK_EQ(Result(one).probs[0], 1.0);

  Case none(Matrix(DType::kFloat32, 1, 3));
  none.logits.fill(-kInf);
  none.words = {1, 2, 3};
  compare(none);

  // What does not count is not looked at.
  Case masked(Matrix(DType::kFloat32, 1, 3));
  masked.logits.fill(kNan);
  masked.logits.set(0, 1, 5.0f);
  masked.words = {-1, 4, -1};
  masked.mask = {0, 1, 1};
  masked.lengths = {2};
  compare(masked);

  // One logit far above the others, which underflow.
  Case far(Matrix(DType::kFloat32, 1, 3));
  far.logits.fill(-1000.0f);
  far.logits.set(0, 2, 0.0f);
  far.words = {3, 4, 5};
  far.k = 3;
  const Result got(far);
  CHECK_EQ(got.words, (std::vector<int32_t>{5, 3, 4}));
  CHECK_EQ(got.probs, (std::vector<double>{1.0, 0.0, 0.0}));
}

void test_errors() {
  Case c(Matrix(DType::kFloat32, 2, 2));
  c.logits.fill(0.0f);
  c.words = {0, 1, 2, 3};
  c.logits.set(1, 0, kNan);
  CHECK_THROWS(Result(c), std::invalid_argument,
               "logits: expected numbers below infinity, got nan at row 1, position 0");
  c.logits.set(1, 0, kInf);
  CHECK_THROWS(Result(c), std::invalid_argument, "got inf at row 1, position 0");
  c.logits.set(1, 0, 0.0f);
  c.words[3] = -1;
  CHECK_THROWS(Result(c), std::invalid_argument,
               "word_ids: expected 0 or more, got -1 at row 1, position 1");
  c.words[3] = 0;
  c.lengths = {2, 3};
  CHECK_THROWS(Result(c), std::invalid_argument, "lengths: expected 0 to 2, got 3");
  c.lengths = {2, -1};
  CHECK_THROWS(Result(c), std::invalid_argument, "lengths: expected 0 to 2, got -1");
  c.lengths = {};
  int32_t word;
  double prob;
  CHECK_THROWS(attention_sum(c.input(), 0, &word, &prob, &word), std::invalid_argument,
               "k: expected at least 1, got 0");
}

void test_threads() {
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal(0, 2);
  Case c(Matrix(DType::kFloat32, 64, 700));
  for (int64_t r = 0; r < 64; ++r) {
    for (int64_t col = 0; col < 700; ++col) {
      c.logits.set(r, col, normal(random));
      c.words.push_back(static_cast<int32_t>(random() % 200));
    }
  }
  c.k = 10;
  fastmrc::set_num_threads(1);
  const Result alone(c);
  for (const int threads : {2, 4}) {
    fastmrc::set_num_threads(threads);
    const Result got(c);
    CHECK_EQ(got.words, alone.words);
    CHECK(std::equal(got.probs.begin(), got.probs.end(), alone.probs.begin(),
                     [](double a, double b) { return same_bits(a, b); }));
  }
}

void test_exponentials() {
  std::mt19937 random(kSeed);
  for (int64_t n = 1; n <= 70; ++n) {
    std::vector<float> x;
    for (int64_t i = 0; i < n; ++i) {
      const auto step = static_cast<float>(random() % 1000000) / 1000000.0f;
      x.push_back(-step * (i % 3 == 0 ? 800.0f : i % 3 == 1 ? 40.0f : 0.5f) + 3.0f);
    }
    const float max = *std::max_element(x.begin(), x.end());
    std::vector<double> first;
    for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
      if (!fastmrc::isa_available(isa)) continue;
      std::vector<double> got(static_cast<size_t>(n), -1.0);
      fastmrc::kernels_of(isa).exp_to_largest(x.data(), n, got.data());
      if (first.empty()) first = got;
      for (size_t i = 0; i < got.size(); ++i) {
        CHECK(same_bits(got[i], first[i]));
        const long double difference = static_cast<long double>(x[i]) - max;
        const long double exact = difference < -708 ? 0.0L : std::exp(difference);
        CHECK(std::fabs(got[i] - exact) <= 4e-16L * exact);
      }
    }
  }
}

}  // namespace

int main() {
  std::cout << "seed " << kSeed << std::endl;
  test_exponentials();
  test_edges();
  test_random();
  test_errors();
  test_threads();
  return fastmrc_test::report();
}
