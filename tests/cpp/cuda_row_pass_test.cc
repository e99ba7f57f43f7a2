// The pass over rows of csrc/cuda, emulated on the host, against that of the CPU.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/numbers.cuh"
#include "cuda/row_pass.h"
#include "fastmrc/ops.h"
#include "matrix.h"

using namespace fastmrc;
using fastmrc_test::context;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;

namespace {

struct Result {
  std::vector<float> max, values;
  std::vector<int32_t> argmax, ids;
  std::vector<double> logsumexp;
  int64_t fault = cuda::kNoFault;
};

Result run(const Matrix& x, int64_t k, bool stats, bool log_softmax = false,
           const std::vector<uint8_t>& live = {}) {
  const auto rows = static_cast<size_t>(x.rows()), entries = static_cast<size_t>(x.rows() * k);
  Result r;
  r.max.assign(rows, -7);
  r.argmax.assign(rows, -7);
  r.logsumexp.assign(rows, -7);
  r.values.assign(entries, -7);
  r.ids.assign(entries, -7);
  std::vector<int32_t> counters(rows, 0);
  std::vector<uint64_t> space(
      static_cast<size_t>(cuda::row_pass_bytes(x.rows(), x.cols(), k) + 15) / 16 * 2);
  cuda::RowPass pass;
  pass.rows = x.view();
  if (!live.empty()) pass.live = live.data();
  if (stats) pass.stats = {r.max.data(), r.argmax.data(), r.logsumexp.data()};
  pass.k = k;
  pass.values = r.values.data();
  pass.ids = r.ids.data();
  pass.log_softmax = log_softmax;
  pass.fault = &r.fault;
  pass.counters = counters.data();
  pass.workspace = space.data();
  cuda::row_pass(pass, nullptr);
  CHECK_EQ(counters, std::vector<int32_t>(rows, 0));
  return r;
}

void compare(const Matrix& x, int64_t k) {
  const std::vector<unsigned char> before = x.bytes();
  const Result ours = run(x, k, true);
  CHECK(x.bytes() == before);
  const auto rows = static_cast<size_t>(x.rows()), entries = static_cast<size_t>(x.rows() * k);
  std::vector<RowStats> stats(rows);
  std::vector<float> values(entries);
  std::vector<int32_t> ids(entries);
  row_stats(x.view(), stats.data());
  topk(x.view(), k, values.data(), ids.data());
  CHECK_EQ(ours.fault, cuda::kNoFault);
  CHECK_EQ(ours.ids, ids);
  CHECK_EQ(ours.values, values);
  for (size_t i = 0; i < rows; ++i) {
    CHECK_EQ(ours.max[i], stats[i].max);
    CHECK_EQ(ours.argmax[i], stats[i].argmax);
    const double scale = 1e-6 * (1 + std::fabs(stats[i].logsumexp));
    CHECK(ours.logsumexp[i] == stats[i].logsumexp ||
          std::fabs(ours.logsumexp[i] - stats[i].logsumexp) < scale);
  }
  const Result only = run(x, k, false);
  CHECK_EQ(only.ids, ids);
  CHECK_EQ(only.max, std::vector<float>(rows, -7));
  const Result logs = run(x, k, false, true);
  CHECK_EQ(logs.ids, ids);
  for (size_t j = 0; j < entries && ids[j] >= 0; ++j) {
    const double expected =
        static_cast<double>(values[j]) - stats[j / static_cast<size_t>(k)].logsumexp;
    CHECK(std::fabs(static_cast<double>(logs.values[j]) - expected) <
          1e-5 * (1 + std::fabs(expected)));
  }
}

enum class Kind { kNormal, kCoarse, kEqual, kMostlyMasked, kMasked, kRising };
constexpr Kind kKinds[] = {Kind::kNormal,       Kind::kCoarse, Kind::kEqual,
                           Kind::kMostlyMasked, Kind::kMasked, Kind::kRising};

Matrix random_matrix(DType dtype, int64_t rows, int64_t cols, Kind kind, std::mt19937& generator,
                     int64_t stride = 0, int64_t shift = 0) {
  Matrix x(dtype, rows, cols, stride, shift);
  std::normal_distribution<float> normal(0, 3);
  std::uniform_real_distribution<float> uniform(0, 1);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      float value = normal(generator);
      if (kind == Kind::kCoarse) value = std::round(value);
      if (kind == Kind::kEqual) value = 0.5f;
      if (kind == Kind::kMostlyMasked && uniform(generator) < 0.99f) value = -kInf;
      if (kind == Kind::kMasked) value = -kInf;
      if (kind == Kind::kRising) value = static_cast<float>(c % 300);
      x.set(r, c, value);
    }
  }
  return x;
}

void test_random() {
  std::mt19937 generator(1);
  const int64_t widths[] = {1, 2, 31, 257, 1000, 8191, 8192, 8193, 21128};
  const int64_t ks[] = {1, 3, 8, 64, 200, 512};
  uint64_t seed = 0;
  for (const DType dtype : kDTypes) {
    for (const int64_t cols : widths) {
      for (const Kind kind : kKinds) {
        const int64_t k = ks[seed % 6];
        emulation::set_order(seed % 3 == 0 ? 0 : seed);
        context() = std::string(fastmrc_test::name_of(dtype)) + " cols " + std::to_string(cols) +
                    " kind " + std::to_string(static_cast<int>(kind)) + " k " + std::to_string(k);
        const int64_t stride = seed % 2 == 0 ? cols : cols + 3;
        compare(
            random_matrix(dtype, 2, cols, kind, generator, stride, static_cast<int64_t>(seed % 4)),
            k);
        ++seed;
      }
    }
  }
  emulation::set_order(0);
  context().clear();
}

// Rows that hold the same give the same to the bit, wherever they lie.
void test_equal_rows() {
  std::mt19937 generator(2);
  Matrix x = random_matrix(DType::kFloat32, 4, 9001, Kind::kNormal, generator, 9003, 1);
  for (int64_t r = 1; r < 4; ++r) {
    for (int64_t c = 0; c < 9001; ++c) x.set(r, c, x.at(0, c));
  }
  const Result result = run(x, 4, true);
  for (size_t r = 1; r < 4; ++r) CHECK(result.logsumexp[r] == result.logsumexp[0]);
}

void test_faults() {
  std::mt19937 generator(3);
  for (const DType dtype : kDTypes) {
    Matrix x = random_matrix(dtype, 3, 9000, Kind::kNormal, generator);
    x.set(1, 8500, kInf);
    Result result = run(x, 2, false);
    CHECK_EQ(result.fault, cuda::kNoFault);
    CHECK_EQ(result.ids[2], 8500);
    result = run(x, 2, true);
    CHECK_EQ(result.fault, int64_t{1} << 8 | static_cast<int64_t>(cuda::Fault::kInfinity));
    CHECK_EQ(result.argmax[1], -1);
    result = run(x, 2, false, true);
    CHECK_EQ(result.fault, int64_t{1} << 8 | static_cast<int64_t>(cuda::Fault::kInfinity));
    x.set(1, 3, 0);
    x.set(1, 8500, 0);
    x.set(2, 77, std::nanf(""));
    result = run(x, 2, false);
    CHECK_EQ(result.fault, int64_t{2} << 8 | static_cast<int64_t>(cuda::Fault::kNanOnly));
    CHECK_EQ(result.ids[4], -1);
    CHECK(std::isnan(result.values[4]));
    CHECK(result.ids[2] >= 0);
    CHECK_EQ(run(x, 0, true).fault, int64_t{2} << 8 | static_cast<int64_t>(cuda::Fault::kNan));
  }
}

void test_live() {
  std::mt19937 generator(4);
  Matrix x = random_matrix(DType::kFloat16, 3, 100, Kind::kNormal, generator);
  x.set(1, 5, std::nanf(""));
  const Result result = run(x, 2, true, false, {1, 0, 1});
  CHECK_EQ(result.fault, cuda::kNoFault);
  CHECK_EQ(result.argmax[1], -7);
  CHECK_EQ(result.ids[2], -7);
  CHECK(result.argmax[2] >= 0);
}

}  // namespace

int main() {
  test_random();
  test_equal_rows();
  test_faults();
  test_live();
  return fastmrc_test::report();
}
