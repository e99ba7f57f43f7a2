// topk, log_softmax_topk and row_stats of batches of rows against a full sort.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "core/thread_pool.h"
#include "fastmrc/ops.h"
#include "matrix.h"

namespace {

using fastmrc::DType;
using fastmrc::log_softmax_topk;
using fastmrc::row_stats;
using fastmrc::topk;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;
using fastmrc_test::name_of;
using fastmrc_test::same_bits;

constexpr uint32_t kSeed = 20240612;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

enum class Pattern : uint8_t { kRandom, kMasked, kTies, kZeros, kEqual, kAllMasked, kInfinite };

constexpr Pattern kPatterns[] = {Pattern::kRandom,  Pattern::kMasked, Pattern::kTies,
                                 Pattern::kZeros,   Pattern::kEqual,  Pattern::kAllMasked,
                                 Pattern::kInfinite};

void fill(Pattern pattern, Matrix* x, std::mt19937* random) {
  std::normal_distribution<float> normal(0, 4);
  for (int64_t r = 0; r < x->rows(); ++r) {
    for (int64_t c = 0; c < x->cols(); ++c) {
      const auto dice = (*random)();
      float value = normal(*random);
      if (pattern == Pattern::kMasked && dice % 32 != 0) value = -kInf;
      if (pattern == Pattern::kTies) value = static_cast<float>(dice % 4) - 1;
      if (pattern == Pattern::kZeros) value = dice % 3 == 0 ? -1.0f : dice % 3 == 1 ? 0.0f : -0.0f;
      if (pattern == Pattern::kEqual) value = 2.5f;
      if (pattern == Pattern::kAllMasked) value = -kInf;
      if (pattern == Pattern::kInfinite && dice % 16 == 0) value = dice % 32 == 0 ? kInf : -kInf;
      x->set(r, c, value);
    }
  }
}

// The ids of a row by falling value and rising id, entries of -inf left out.
std::vector<int32_t> sorted_ids(const Matrix& x, int64_t r) {
  std::vector<int32_t> ids;
  std::vector<float> values;
  for (int64_t c = 0; c < x.cols(); ++c) {
    values.push_back(x.at(r, c));
    if (values.back() > -kInf) ids.push_back(static_cast<int32_t>(c));
  }
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  return ids;
}

double naive_logsumexp(const Matrix& x, int64_t r) {
  double max = -static_cast<double>(kInf), sum = 0;
  for (int64_t c = 0; c < x.cols(); ++c) max = std::max(max, static_cast<double>(x.at(r, c)));
  for (int64_t c = 0; c < x.cols(); ++c) sum += std::exp(static_cast<double>(x.at(r, c)) - max);
  return max + std::log(sum);
}

struct Found {
  std::vector<float> values;
  std::vector<int32_t> ids;
  Found(int64_t rows, int64_t k)
      : values(static_cast<size_t>(rows * k), kNan), ids(static_cast<size_t>(rows * k), -7) {}
};

void check_topk(const Matrix& x, int64_t k) {
  const std::vector<unsigned char> before = x.bytes();
  Found found(x.rows(), k);
  topk(x.view(), k, found.values.data(), found.ids.data());
  CHECK(x.bytes() == before);
  for (int64_t r = 0; r < x.rows(); ++r) {
    std::vector<int32_t> ids = sorted_ids(x, r);
    ids.resize(static_cast<size_t>(k), -1);
    const auto first = found.ids.begin() + r * k;
    CHECK_EQ(std::vector<int32_t>(first, first + k), ids);
    bool same = true;
    for (int64_t j = 0; j < k; ++j) {
      const int32_t id = ids[static_cast<size_t>(j)];
      same &= same_bits(found.values[static_cast<size_t>(r * k + j)], id < 0 ? -kInf : x.at(r, id));
    }
    CHECK(same);
  }
}

void check_log_softmax(const Matrix& x, int64_t k) {
  Found plain(x.rows(), k), found(x.rows(), k);
  topk(x.view(), k, plain.values.data(), plain.ids.data());
  log_softmax_topk(x.view(), k, found.values.data(), found.ids.data());
  CHECK_EQ(found.ids, plain.ids);
  for (int64_t r = 0; r < x.rows(); ++r) {
    const double logsumexp = naive_logsumexp(x, r);
    double worst = 0;
    for (auto i = static_cast<size_t>(r * k); i < static_cast<size_t>((r + 1) * k); ++i) {
      if (found.ids[i] < 0) {
        CHECK_EQ(found.values[i], -kInf);
      } else {
        const double expected = static_cast<double>(plain.values[i]) - logsumexp;
        const double error = std::fabs(static_cast<double>(found.values[i]) - expected);
        worst = std::max(worst, error / (1 + std::fabs(expected)));
      }
    }
    CHECK(worst < 1e-6);
  }
}

void test_against_a_full_sort() {
  std::mt19937 random(kSeed);
  for (const int64_t cols : {1, 2, 3, 63, 64, 65, 129, 255, 256, 257, 1000, 4097, 21128}) {
    for (const DType dtype : kDTypes) {
      for (const Pattern pattern : kPatterns) {
        const auto stride = cols + static_cast<int64_t>(random() % 3);
        Matrix x(dtype, cols > 4000 ? 2 : 4, cols, stride, static_cast<int64_t>(random() % 3));
        fill(pattern, &x, &random);
        for (const int64_t k : {int64_t{1}, int64_t{3}, int64_t{8}, int64_t{64}, cols, cols + 5}) {
          fastmrc_test::context() = std::string(name_of(dtype)) + " pattern " +
                                    std::to_string(static_cast<int>(pattern)) + " cols " +
                                    std::to_string(cols) + " k " + std::to_string(k);
          check_topk(x, k);
          if (pattern != Pattern::kInfinite && pattern != Pattern::kAllMasked) {
            check_log_softmax(x, k);
          }
        }
      }
    }
  }
  fastmrc_test::context().clear();
}

// Enough work for the threads: row i is a permutation of the same numbers.
void test_many_rows_on_any_number_of_threads() {
  std::mt19937 random(kSeed + 1);
  Matrix x(DType::kFloat32, 50, 5000, 5003);
  std::vector<float> numbers(5000);
  for (float& number : numbers) number = static_cast<float>(random() % 2000) / 8;
  for (int64_t r = 0; r < x.rows(); ++r) {
    std::shuffle(numbers.begin(), numbers.end(), random);
    for (int64_t c = 0; c < x.cols(); ++c) x.set(r, c, numbers[static_cast<size_t>(c)]);
  }
  const int threads = fastmrc::num_threads();
  for (const int n : {1, 2, 5}) {
    fastmrc::set_num_threads(n);
    check_topk(x, 8);
    check_log_softmax(x, 8);
  }
  fastmrc::set_num_threads(threads);
}

void test_nan_names_the_row() {
  std::mt19937 random(kSeed + 2);
  for (const DType dtype : kDTypes) {
    for (const int64_t cols : {1, 64, 65, 700, 5000}) {
      for (const int64_t k : {1, 8, 6000}) {
        Matrix x(dtype, 5, cols, cols + 1);  // what lies between the rows is NaN and never read
        fill(Pattern::kRandom, &x, &random);
        Found found(5, k);
        topk(x.view(), k, found.values.data(), found.ids.data());
        x.set(3, static_cast<int64_t>(random()) % cols, kNan);
        const std::string message = "expected no NaN, got NaN in row 3";
        CHECK_THROWS(topk(x.view(), k, found.values.data(), found.ids.data()),
                     std::invalid_argument, message);
        CHECK_THROWS(log_softmax_topk(x.view(), k, found.values.data(), found.ids.data()),
                     std::invalid_argument, "got NaN in row 3");
      }
    }
  }
}

// Of several bad rows the first one, whichever thread comes upon which first.
void test_nan_names_the_first_row() {
  Matrix x(DType::kFloat32, 40, 4000);
  x.fill(1.0f);
  for (int64_t r = 11; r < 40; r += 3) x.set(r, 100, kNan);
  const int threads = fastmrc::num_threads();
  fastmrc::set_num_threads(4);
  Found found(40, 2);
  for (int i = 0; i < 50; ++i) {
    CHECK_THROWS(topk(x.view(), 2, found.values.data(), found.ids.data()), std::invalid_argument,
                 "got NaN in row 11");
  }
  fastmrc::set_num_threads(threads);
}

void test_row_stats() {
  Matrix x(DType::kFloat32, 4, 3, 5, 2);
  const float values[4][3] = {{1, 2, 2}, {-kInf, -1, -kInf}, {-kInf, -kInf, -kInf}, {-0.0f, 0, -1}};
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t c = 0; c < 3; ++c) x.set(r, c, values[r][c]);
  }
  std::vector<fastmrc::RowStats> stats(4);
  row_stats(x.view(), stats.data());
  CHECK_EQ(stats[0].max, 2.0f);
  CHECK_EQ(stats[0].argmax, 1);
  CHECK(std::fabs(stats[0].logsumexp - naive_logsumexp(x, 0)) < 1e-6);
  CHECK_EQ(stats[1].argmax, 1);
  CHECK_EQ(stats[1].logsumexp, -1.0);
  CHECK_EQ(stats[2].max, -kInf);
  CHECK_EQ(stats[2].argmax, -1);
  CHECK_EQ(stats[2].logsumexp, -static_cast<double>(kInf));
  CHECK_EQ(stats[3].argmax, 0);
  x.set(2, 1, kInf);
  CHECK_THROWS(row_stats(x.view(), stats.data()), std::invalid_argument, "got inf in row 2");
  x.set(1, 2, kNan);
  CHECK_THROWS(row_stats(x.view(), stats.data()), std::invalid_argument, "got NaN in row 1");
}

void test_edges() {
  Matrix x(DType::kFloat32, 2, 3);
  x.fill(-kInf);
  Found found(2, 4);
  log_softmax_topk(x.view(), 4, found.values.data(), found.ids.data());
  CHECK_EQ(found.values, std::vector<float>(8, -kInf));
  CHECK_EQ(found.ids, std::vector<int32_t>(8, -1));
  for (const int64_t k : {int64_t{0}, int64_t{-3}}) {
    CHECK_THROWS(topk(x.view(), k, found.values.data(), found.ids.data()), std::invalid_argument,
                 "k: expected at least 1, got " + std::to_string(k));
  }
  x.set(1, 2, kInf);
  CHECK_THROWS(log_softmax_topk(x.view(), 4, found.values.data(), found.ids.data()),
               std::invalid_argument, "got inf in row 1");
  topk(Matrix(DType::kFloat32, 0, 3).view(), 2, nullptr, nullptr);
  topk(Matrix(DType::kFloat32, 2, 0).view(), 4, found.values.data(), found.ids.data());
  CHECK_EQ(found.ids, std::vector<int32_t>(8, -1));
}

// Lists that run over blocks hold what topk finds in the whole row.
void test_merge() {
  std::mt19937 random(kSeed);
  for (const Pattern pattern : {Pattern::kRandom, Pattern::kMasked, Pattern::kTies, Pattern::kZeros,
                                Pattern::kEqual, Pattern::kAllMasked}) {
    for (const int64_t k : {1, 3, 26}) {
      for (const int64_t block : {1, 7, 300}) {
        constexpr int64_t kRows = 3, kCols = 700, kFirst = int64_t{1} << 33;
        Matrix x(DType::kFloat32, kRows, kCols);
        fill(pattern, &x, &random);
        const fastmrc::Rows whole = x.view();
        std::vector<float> values(kRows * static_cast<size_t>(k), -kInf), expected = values;
        std::vector<int64_t> ids(values.size(), -1);
        std::vector<int32_t> expected_ids(values.size());
        for (int64_t begin = 0; begin < kCols; begin += block) {
          fastmrc::Rows part = whole;
          part.data = static_cast<const float*>(whole.data) + begin;
          part.cols = std::min(block, kCols - begin);
          fastmrc::topk_merge(part, kFirst + begin, k, values.data(), ids.data());
        }
        topk(whole, k, expected.data(), expected_ids.data());
        for (size_t i = 0; i < ids.size(); ++i) {
          CHECK_EQ(ids[i], expected_ids[i] < 0 ? int64_t{-1} : kFirst + expected_ids[i]);
          CHECK(values[i] == expected[i]);
        }
      }
    }
  }
}

void test_inner_products() {
  std::mt19937 random(kSeed);
  for (const DType dtype : kDTypes) {
    Matrix queries(DType::kFloat32, 3, 21), corpus(dtype, 9, 21);
    fill(Pattern::kRandom, &queries, &random);
    fill(Pattern::kRandom, &corpus, &random);
    const std::vector<int64_t> ids = {0, 8, 8, 3, 1, 2};
    std::vector<double> products(ids.size());
    fastmrc::inner_products(queries.view(), corpus.view(), ids.data(), 2, products.data());
    for (size_t i = 0; i < ids.size(); ++i) {
      double expected = 0;
      for (int64_t c = 0; c < 21; ++c) {
        expected += static_cast<double>(queries.at(static_cast<int64_t>(i / 2), c)) *
                    static_cast<double>(corpus.at(ids[i], c));
      }
      CHECK(std::fabs(products[i] - expected) < 1e-9);
    }
  }
}

}  // namespace

int main() {
  test_merge();
  test_inner_products();
  std::cout << "seed " << kSeed << std::endl;
  test_against_a_full_sort();
  test_many_rows_on_any_number_of_threads();
  test_nan_names_the_row();
  test_nan_names_the_first_row();
  test_row_stats();
  test_edges();
  return fastmrc_test::report();
}
