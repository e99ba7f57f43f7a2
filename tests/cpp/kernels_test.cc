// The row kernels of every instruction set this machine offers: against plain loops in double
// precision, and bit by bit against each other.

#include "cpu/kernels.h"

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
#include "matrix.h"

namespace {

using fastmrc::DType;
using fastmrc::Isa;
using fastmrc::Kernels;
using fastmrc::kernels_of;
using fastmrc::kMaxLanes;
using fastmrc::RowStats;
using fastmrc::Vote;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;
using fastmrc_test::name_of;
using fastmrc_test::same_bits;

constexpr uint32_t kSeed = 20240611;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = std::numeric_limits<float>::lowest();

double worst_logsumexp = 0;  // absolute error
double worst_vote = 0;       // relative error

std::vector<Isa> available_sets() {
  std::vector<Isa> sets;
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (fastmrc::isa_available(isa)) sets.push_back(isa);
  }
  return sets;
}

const std::vector<Isa>& sets() {
  static const std::vector<Isa> all = available_sets();
  return all;
}

std::vector<int64_t> sizes() {
  std::vector<int64_t> all;
  for (int64_t n = 1; n <= 130; ++n) all.push_back(n);
  all.insert(all.end(), {4095, 4096, 4097, 8191, 8192, 8193, 21128});
  return all;
}

enum class Pattern : uint8_t {
  kRandom,
  kMasked,    // most entries are -inf
  kTies,      // few distinct values
  kZeros,     // maxima of +0 and -0
  kConstant,  // one value
  kAllMasked,
  kFarApart,   // from the lowest to the largest number
  kRising,     // the maximum moves with every chunk
  kLateStart,  // -inf up to the last entries
  kInfinite,   // one +inf
};

constexpr Pattern kPatterns[] = {Pattern::kRandom,   Pattern::kMasked,   Pattern::kTies,
                                 Pattern::kZeros,    Pattern::kConstant, Pattern::kAllMasked,
                                 Pattern::kFarApart, Pattern::kRising,   Pattern::kLateStart,
                                 Pattern::kInfinite};

Matrix row_of(Pattern pattern, DType dtype, int64_t n, int64_t shift, std::mt19937* random) {
  Matrix row(dtype, 1, n, 0, shift);
  std::normal_distribution<float> normal(0, 5);
  for (int64_t i = 0; i < n; ++i) {
    const auto r = (*random)();
    float x = normal(*random);
    if (pattern == Pattern::kMasked && r % 16 != 0) x = -kInf;
    if (pattern == Pattern::kTies) x = static_cast<float>(r % 3);
    if (pattern == Pattern::kZeros) x = r % 3 == 0 ? -1.0f : r % 3 == 1 ? 0.0f : -0.0f;
    if (pattern == Pattern::kConstant) x = -7.25f;
    if (pattern == Pattern::kAllMasked) x = -kInf;
    if (pattern == Pattern::kFarApart) {
      x = r % 5 == 0 ? kLowest : std::ldexp(x, static_cast<int>(r % 120));
    }
    if (pattern == Pattern::kRising) x = static_cast<float>(i) / 64 + x / 100;
    if (pattern == Pattern::kLateStart && i < n - 3) x = -kInf;
    row.set(0, i, x);
  }
  if (pattern == Pattern::kInfinite) row.set(0, (*random)() % static_cast<uint32_t>(n), kInf);
  return row;
}

RowStats naive_stats(const Matrix& row) {
  RowStats stats;
  stats.max = -kInf;
  for (int64_t i = 0; i < row.cols(); ++i) {
    const float x = row.at(0, i);
    if (std::isnan(x)) return {kNan, -1, kNan};
    if (x > stats.max) {
      stats.max = x;
      stats.argmax = static_cast<int32_t>(i);
    }
  }
  const auto max = static_cast<double>(stats.max);
  stats.logsumexp = max;
  if (std::isinf(stats.max)) return stats;
  double sum = 0;
  for (int64_t i = 0; i < row.cols(); ++i) {
    sum += std::exp(static_cast<double>(row.at(0, i)) - max);
  }
  stats.logsumexp += std::log(sum);
  return stats;
}

void check_stats(const Matrix& row) {
  const RowStats expected = naive_stats(row);
  const RowStats first =
      kernels_of(sets()[0]).row_stats(row.row(0), row.dtype(), row.cols(), nullptr);
  CHECK_EQ(first.argmax, expected.argmax);
  if (std::isnan(expected.max)) {
    CHECK(std::isnan(first.max));
    CHECK(std::isnan(first.logsumexp));
  } else {
    CHECK(same_bits(first.max, expected.max));
    if (std::isinf(expected.max)) {
      CHECK_EQ(first.logsumexp, expected.logsumexp);
    } else {
      const double error = std::fabs(first.logsumexp - expected.logsumexp);
      CHECK(error <= 1e-6 + 1e-15 * std::fabs(expected.logsumexp));
      worst_logsumexp = std::max(worst_logsumexp, error);
    }
  }
  for (const Isa isa : sets()) {
    const RowStats other = kernels_of(isa).row_stats(row.row(0), row.dtype(), row.cols(), nullptr);
    CHECK(same_bits(other.max, first.max));
    CHECK_EQ(other.argmax, first.argmax);
    CHECK(same_bits(other.logsumexp, first.logsumexp));
  }
}

void check_lane_max(const Matrix& row, int64_t begin, int64_t end) {
  std::vector<float> expected(kMaxLanes, -kInf);
  bool clean = true;
  for (int64_t i = begin; i < end; ++i) {
    float& lane = expected[static_cast<size_t>((i - begin) % kMaxLanes)];
    const float x = row.at(0, i);
    if (x > lane) lane = x;
    clean &= !std::isnan(x);
  }
  std::vector<float> first(kMaxLanes), other(kMaxLanes);
  kernels_of(sets()[0]).lane_max(row.row(0), row.dtype(), begin, end, first.data());
  for (const Isa isa : sets()) {
    std::fill(other.begin(), other.end(), kNan);
    CHECK_EQ(kernels_of(isa).lane_max(row.row(0), row.dtype(), begin, end, other.data()), clean);
    CHECK_EQ(other, expected);
    CHECK(std::equal(first.begin(), first.end(), other.begin(),
                     [](float a, float b) { return same_bits(a, b); }));
  }
}

void check_collect(const Matrix& row, int64_t begin, int64_t end, float threshold) {
  std::vector<int32_t> expected, of_lane;
  for (int64_t i = begin; i < end; ++i) {
    if (!(row.at(0, i) >= threshold)) continue;
    expected.push_back(static_cast<int32_t>(i));
    if ((i - begin) % kMaxLanes == 0) of_lane.push_back(static_cast<int32_t>(i));
  }
  for (const Isa isa : sets()) {
    const auto check = [&](auto collect, size_t room, const std::vector<int32_t>& wanted) {
      std::vector<int32_t> ids(room);
      const int64_t found = collect(row.row(0), row.dtype(), begin, end, threshold, ids.data());
      ids.resize(static_cast<size_t>(found));
      CHECK_EQ(ids, wanted);
    };
    const auto all = static_cast<size_t>(end - begin);
    check(kernels_of(isa).collect, all, expected);
    check(kernels_of(isa).collect_lane, (all + kMaxLanes - 1) / kMaxLanes, of_lane);
  }
}

void test_fold_max() {
  std::mt19937 random(7);
  for (const int64_t lanes : {1, 2, 3, 8}) {
    for (const int64_t count : {lanes, lanes + 1, 3 * lanes - 1, 40 * lanes}) {
      std::vector<float> values(static_cast<size_t>(count * kMaxLanes));
      for (float& value : values) value = static_cast<float>(random() % 100) - 50;
      values[random() % values.size()] = -kInf;
      std::vector<float> expected(static_cast<size_t>(lanes * kMaxLanes), -kInf);
      for (size_t i = 0; i < values.size(); ++i) {
        float& best = expected[i % expected.size()];
        if (values[i] > best) best = values[i];
      }
      for (const Isa isa : sets()) {
        std::vector<float> got(expected.size());
        kernels_of(isa).fold_max(values.data(), count * kMaxLanes, lanes * kMaxLanes, got.data());
        CHECK_EQ(got, expected);
      }
    }
  }
}

void check_row(const Matrix& row, std::mt19937* random) {
  check_stats(row);
  const int64_t n = row.cols();
  const auto cut = static_cast<int64_t>((*random)() % static_cast<uint32_t>(n));
  const std::pair<int64_t, int64_t> ranges[] = {{0, n}, {cut, n}, {0, cut}, {cut, cut}};
  for (const auto& [begin, end] : ranges) {
    check_lane_max(row, begin, end);
    for (const float threshold : {-kInf, kLowest, 0.0f, row.at(0, cut), kInf}) {
      if (!std::isnan(threshold)) check_collect(row, begin, end, threshold);
    }
  }
}

void test_load_one() {
  std::vector<uint16_t> patterns(65536);
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
  for (const Isa isa : sets()) {
    fastmrc_test::context() = fastmrc::isa_name(isa);
    const Kernels& table = kernels_of(isa);
    int64_t wrong = 0;
    for (const uint16_t bits : patterns) {
      const float half = table.load_one(patterns.data(), DType::kFloat16, bits);
      const float expected = fastmrc_test::from_half(bits);
      wrong += std::isnan(expected) ? !std::isnan(half) : !same_bits(half, expected);
      const float brain = table.load_one(patterns.data(), DType::kBFloat16, bits);
      const float wide = fastmrc_test::float_of(static_cast<uint32_t>(bits) << 16);
      wrong += std::isnan(wide) ? !std::isnan(brain) : !same_bits(brain, wide);
    }
    CHECK_EQ(wrong, int64_t{0});
    const std::vector<float> floats = {0.0f, -0.0f, 1.5f, -kInf, kLowest, 1e-45f};
    for (size_t i = 0; i < floats.size(); ++i) {
      const float x = table.load_one(floats.data(), DType::kFloat32, static_cast<int64_t>(i));
      CHECK(same_bits(x, floats[i]));
    }
  }
}

// What the vector loads make of every pattern shows in the maxima of 64 lanes.
void test_vector_loads() {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    std::vector<uint16_t> patterns(65536);
    for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
    for (const Isa isa : sets()) {
      const Kernels& table = kernels_of(isa);
      int64_t wrong = 0;
      for (int64_t begin = 0; begin < 65536; begin += kMaxLanes) {
        float lanes[kMaxLanes];
        bool expected_clean = true;
        const bool clean = table.lane_max(patterns.data(), dtype, begin, begin + kMaxLanes, lanes);
        for (int64_t i = 0; i < kMaxLanes; ++i) {
          const float x = table.load_one(patterns.data(), dtype, begin + i);
          expected_clean &= !std::isnan(x);
          wrong += !same_bits(lanes[i], std::isnan(x) ? -kInf : x);
        }
        wrong += clean != expected_clean;
      }
      fastmrc_test::context() = std::string(name_of(dtype)) + " " + fastmrc::isa_name(isa);
      CHECK_EQ(wrong, int64_t{0});
    }
  }
}

void test_rows() {
  std::mt19937 random(kSeed);
  for (const int64_t n : sizes()) {
    for (const DType dtype : kDTypes) {
      for (const Pattern pattern : kPatterns) {
        const auto shift = static_cast<int64_t>(random() % 4);  // elements, so never vectors
        fastmrc_test::context() = std::string(name_of(dtype)) + " pattern " +
                                  std::to_string(static_cast<int>(pattern)) + " n " +
                                  std::to_string(n);
        check_row(row_of(pattern, dtype, n, shift, &random), &random);
      }
    }
  }
}

// Logits whose exponent of two lies halfway between two integers must be rounded alike on all sets.
void test_exponents_between_integers() {
  const double log2e = static_cast<double>(1.44269504088896341f);
  int64_t found = 0;
  for (int n = 0; n < 100; ++n) {
    const double half = -n - 0.5;
    float x = static_cast<float>(half / log2e);
    for (int i = 0; i < 8; ++i) x = std::nextafter(x, 0.0f);
    for (int i = 0; i < 16; ++i, x = std::nextafter(x, -kInf)) {
      if (static_cast<double>(static_cast<float>(static_cast<double>(x) * log2e)) != half) continue;
      ++found;
      fastmrc_test::context() = "exponent " + std::to_string(half);
      Matrix row(DType::kFloat32, 1, 3);
      row.fill(x);
      row.set(0, 1, 0.0f);
      check_stats(row);
    }
  }
  CHECK(found > 50);
}

// Payloads that sums of exponents and signs could turn into numbers.
std::vector<float> nans() {
  std::vector<float> all;
  for (const uint32_t bits : {0x7fc00000u, 0x7fc00001u, 0xffc00001u, 0x7fffffffu, 0xffffffffu,
                              0x7fc000ffu, 0x7fc001ffu, 0xffc12345u, 0x7f800001u}) {
    all.push_back(fastmrc_test::float_of(bits));
  }
  return all;
}

void test_nan_at_each_place() {
  std::mt19937 random(kSeed + 1);
  const std::vector<float> payloads = nans();
  for (int64_t n = 1; n <= 130; ++n) {
    for (const DType dtype : kDTypes) {
      for (const float background : {0.5f, -kInf, kInf}) {
        fastmrc_test::context() = std::string(name_of(dtype)) + " n " + std::to_string(n) +
                                  " among " + std::to_string(background);
        for (int64_t i = 0; i < n; ++i) {
          Matrix row(dtype, 1, n);
          row.fill(background);
          row.set(0, i, payloads[random() % payloads.size()]);
          check_stats(row);
          check_lane_max(row, 0, n);
          row.fill(-1.0f);
          row.set(0, static_cast<int64_t>(random()) % n, 1.0f);
          row.set(0, i, kNan);
          check_collect(row, 0, n, 0.0f);
        }
      }
    }
  }
}

void test_nan_in_long_rows() {
  std::mt19937 random(kSeed + 2);
  const std::vector<float> payloads = nans();
  for (const int64_t n : {4095, 4096, 4097, 21128}) {
    for (const DType dtype : kDTypes) {
      for (const Pattern pattern : kPatterns) {
        for (const int64_t place : {int64_t{0}, int64_t{63}, int64_t{4094}, n / 2, n - 1}) {
          Matrix row = row_of(pattern, dtype, n, 1, &random);
          row.set(0, place, payloads[random() % payloads.size()]);
          fastmrc_test::context() = std::string(name_of(dtype)) + " pattern " +
                                    std::to_string(static_cast<int>(pattern)) + " n " +
                                    std::to_string(n) + " NaN at " + std::to_string(place);
          check_stats(row);
        }
      }
    }
  }
}

double exact_vote(const Matrix& logits, const std::vector<double>& logsumexp,
                  const std::vector<float>& weights, Vote vote, int64_t token) {
  double sum = 0, squares = 0, largest = 0, logs = 0;
  for (int64_t p = 0; p < logits.rows(); ++p) {
    const auto slot = static_cast<size_t>(p);
    const double w = vote == Vote::kWeighted ? static_cast<double>(weights[slot]) : 1.0;
    const double x = std::exp(static_cast<double>(logits.at(p, token)) - logsumexp[slot]);
    sum += w * x;
    squares += w * x * x;
    largest = std::max(largest, x);
    logs += std::log(x + fastmrc::kEps);
  }
  const auto n = static_cast<double>(logits.rows());
  if (vote == Vote::kMean) return sum / n + fastmrc::kEps;
  if (vote == Vote::kMax) return largest + fastmrc::kEps;
  if (vote == Vote::kProduct) return std::exp(logs / n) + fastmrc::kEps;
  return squares / (1 + sum) + fastmrc::kEps;
}

void check_votes(const Matrix& logits, const std::vector<float>& weights, double tolerance) {
  std::vector<const void*> rows;
  std::vector<double> logsumexp;
  for (int64_t p = 0; p < logits.rows(); ++p) {
    rows.push_back(logits.row(p));
    logsumexp.push_back(kernels_of(Isa::kGeneric)
                            .row_stats(rows.back(), logits.dtype(), logits.cols(), nullptr)
                            .logsumexp);
  }
  for (const Vote vote :
       {Vote::kOriginal, Vote::kMean, Vote::kMax, Vote::kProduct, Vote::kWeighted}) {
    const fastmrc::VoteRows view{rows.data(),
                                 logits.dtype(),
                                 logsumexp.data(),
                                 vote == Vote::kWeighted ? weights.data() : nullptr,
                                 static_cast<int32_t>(logits.rows()),
                                 vote};
    const int64_t begin = logits.cols() > 3 ? 3 : 0;
    std::vector<double> expected;
    for (int64_t i = begin; i < logits.cols(); ++i) {
      expected.push_back(exact_vote(logits, logsumexp, weights, vote, i));
    }
    for (const Isa isa : sets()) {
      std::vector<float> votes(expected.size());
      kernels_of(isa).approximate_votes(view, begin, logits.cols(), votes.data());
      double worst = 0;
      for (size_t i = 0; i < votes.size(); ++i) {
        const double error = std::fabs(static_cast<double>(votes[i]) / expected[i] - 1);
        worst = std::isnan(error) ? kInf : std::max(worst, error);
      }
      CHECK(worst <= tolerance);
      if (worst > tolerance) {
        std::cerr << "  vote " << static_cast<int>(vote) << " " << fastmrc::isa_name(isa)
                  << " passages " << logits.rows() << " error " << worst << "\n";
      }
      if (logits.rows() <= 16) worst_vote = std::max(worst_vote, worst);
    }
  }
}

void test_approximate_votes() {
  std::mt19937 random(kSeed + 3);
  for (const int64_t n : {1, 2, 3, 7, 63, 64, 65, 127, 130, 1000}) {
    for (const DType dtype : kDTypes) {
      for (const float scale : {0.1f, 3.0f, 20.0f, 300.0f}) {
        const auto gap = static_cast<int64_t>(random() % 3);
        Matrix logits(dtype, 1 + static_cast<int64_t>(random() % 16), n, n + gap, 1);
        std::normal_distribution<float> normal(random() % 2 == 0 ? 0.0f : 1000.0f, scale);
        std::lognormal_distribution<float> lognormal(0, 2);
        std::vector<float> weights;
        for (int64_t p = 0; p < logits.rows(); ++p) {
          for (int64_t i = 0; i < n; ++i) {
            logits.set(p, i, i > 0 && random() % 8 == 0 ? -kInf : normal(random));
          }
          weights.push_back(random() % 4 == 0 ? 0.0f : lognormal(random));
        }
        fastmrc_test::context() = std::string(name_of(dtype)) + " n " + std::to_string(n) +
                                  " scale " + std::to_string(scale);
        check_votes(logits, weights, 2e-5);
      }
    }
  }
}

// The float32 sums over passages lose more the more there are: see filter_factor in beam_step.cc.
void test_votes_of_many_passages() {
  std::mt19937 random(kSeed + 4);
  for (const int64_t passages : {100, 1000, 4000}) {
    for (const bool alike : {false, true}) {
      Matrix logits(DType::kFloat32, passages, 130);
      std::normal_distribution<float> normal(0, 10);
      for (int64_t p = 0; p < passages; ++p) {
        for (int64_t i = 0; i < 130; ++i) {
          logits.set(p, i, alike && p > 0 ? logits.at(0, i) : normal(random));
        }
      }
      const std::vector<float> weights(static_cast<size_t>(passages), 0.7f);
      fastmrc_test::context() = "many passages";
      check_votes(logits, weights, 2e-5 + 1e-6 * static_cast<double>(passages));
    }
  }
}

void test_dispatch() {
  fastmrc_test::context().clear();
  CHECK(fastmrc::isa_available(Isa::kGeneric));
  CHECK(fastmrc::isa_available(fastmrc::active_isa()));
  CHECK_EQ(&fastmrc::kernels(), &kernels_of(fastmrc::active_isa()));
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512}) {
    if (fastmrc::isa_available(isa)) continue;
    CHECK_THROWS(kernels_of(isa), std::invalid_argument, "isa: this machine or build has no");
  }
}

}  // namespace

int main() {
  std::cout << "seed " << kSeed << ", sets:";
  for (const Isa isa : sets()) std::cout << " " << fastmrc::isa_name(isa);
  std::cout << std::endl;
  test_load_one();
  test_fold_max();
  test_vector_loads();
  test_rows();
  test_exponents_between_integers();
  test_nan_at_each_place();
  test_nan_in_long_rows();
  test_approximate_votes();
  test_votes_of_many_passages();
  test_dispatch();
  std::cout << "largest errors: logsumexp " << worst_logsumexp << ", votes " << worst_vote
            << " relative" << std::endl;
  return fastmrc_test::report();
}
