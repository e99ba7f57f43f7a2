// The draws of csrc/cuda, emulated on the host, against those of the CPU.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/numbers.cuh"
#include "cuda/row_pass.h"
#include "cuda/sample.h"
#include "fastmrc/ops.h"
#include "fastmrc/span_index.h"
#include "fastmrc/trie.h"
#include "matrix.h"
#include "packed_automata.h"

using namespace fastmrc;
using fastmrc_test::context;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;
using fastmrc_test::same_bits;

namespace {

using Random = std::mt19937_64;

int64_t below(Random& random, int64_t n) {
  return std::uniform_int_distribution<int64_t>(0, n - 1)(random);
}

// What is drawn from. Empty vectors: null pointers.
struct Case {
  explicit Case(Matrix logits) : x(std::move(logits)), draws(x.rows()) {}

  Matrix x;
  std::vector<Automaton> automata;
  std::vector<int32_t> automaton_of, states;
  std::vector<uint8_t> allow_end;
  int32_t end_id = 0, top_k = 0;
  double top_p = 1, temperature = 1;
  uint64_t seed = 1;
  int64_t draws;
  std::vector<int32_t> row_of;
  std::vector<uint64_t> streams;
  std::vector<uint32_t> positions;
};

struct Drawn {
  explicit Drawn(int64_t draws)
      : tokens(static_cast<size_t>(draws), -7), log_probs(static_cast<size_t>(draws), -7) {}

  std::vector<int32_t> tokens;
  std::vector<double> log_probs;
  int64_t fault = cuda::kNoFault;
};

template <typename T>
const T* pointer(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

std::vector<uint64_t> memory(int64_t bytes) {
  return std::vector<uint64_t>(static_cast<size_t>(bytes + 7) / 8, ~uint64_t{0});
}

struct Stats {
  std::vector<float> max;
  std::vector<int32_t> argmax;
  std::vector<double> logsumexp;
};

Stats stats_of(const Matrix& x, int64_t* fault) {
  const auto rows = static_cast<size_t>(x.rows());
  Stats stats{std::vector<float>(rows), std::vector<int32_t>(rows), std::vector<double>(rows)};
  std::vector<int32_t> counters(rows, 0);
  std::vector<uint64_t> space = memory(cuda::row_pass_bytes(x.rows(), x.cols(), 0));
  cuda::RowPass pass;
  pass.rows = x.view();
  pass.stats = {stats.max.data(), stats.argmax.data(), stats.logsumexp.data()};
  pass.fault = fault;
  pass.counters = counters.data();
  pass.workspace = space.data();
  cuda::row_pass(pass, nullptr);
  return stats;
}

Drawn run(const Case& c) {
  Drawn drawn(c.draws);
  std::vector<const Automaton*> constraints;
  for (const Automaton& automaton : c.automata) constraints.push_back(&automaton);
  const fastmrc_test::PackedAutomata automata(constraints);
  const Stats stats = stats_of(c.x, &drawn.fault);
  std::vector<uint64_t> space = memory(cuda::sample_bytes(c.x.rows(), c.x.cols()));
  cuda::Sample sample;
  sample.logits = c.x.view();
  sample.automata = automata.view();
  sample.automaton_of = pointer(c.automaton_of);
  sample.states = pointer(c.states);
  sample.allow_end = pointer(c.allow_end);
  sample.end_id = c.end_id;
  sample.top_k = c.top_k;
  sample.top_p = c.top_p;
  sample.temperature = c.temperature;
  sample.seed = c.seed;
  sample.draws = c.draws;
  sample.row_of = pointer(c.row_of);
  sample.streams = pointer(c.streams);
  sample.positions = pointer(c.positions);
  sample.max = stats.max.data();
  sample.argmax = stats.argmax.data();
  sample.logsumexp = stats.logsumexp.data();
  sample.tokens = drawn.tokens.data();
  sample.log_probs = drawn.log_probs.data();
  sample.fault = &drawn.fault;
  sample.workspace = space.data();
  cuda::sample(sample, nullptr);
  return drawn;
}

Drawn run_on_cpu(const Case& c) {
  Drawn drawn(c.draws);
  std::vector<const Automaton*> constraints;
  for (const int32_t a : c.automaton_of) {
    constraints.push_back(a < 0 ? nullptr : &c.automata[static_cast<size_t>(a)]);
  }
  SampleStep step;
  step.logits = c.x.view();
  step.constraints = pointer(constraints);
  step.states = pointer(c.states);
  step.allow_end = pointer(c.allow_end);
  step.end_id = c.end_id;
  step.top_k = c.top_k;
  step.top_p = c.top_p;
  step.temperature = c.temperature;
  step.seed = c.seed;
  step.draws = c.draws;
  step.row_of = pointer(c.row_of);
  step.streams = pointer(c.streams);
  step.positions = pointer(c.positions);
  SampleWorkspace space;
  sample(step, space, drawn.tokens.data(), drawn.log_probs.data());
  return drawn;
}

// Weights of kernel and CPU differ by 1e-6 at most, so that a draw may differ with a probability of
// that order; with the numbers of this test none does.
void compare(const Case& c) {
  const std::vector<unsigned char> before = c.x.bytes();
  const Drawn ours = run(c);
  const Drawn theirs = run_on_cpu(c);
  CHECK(c.x.bytes() == before);
  CHECK_EQ(ours.fault, cuda::kNoFault);
  CHECK_EQ(ours.tokens, theirs.tokens);
  for (size_t d = 0; d < ours.tokens.size(); ++d) {
    const double expected = theirs.log_probs[d];
    CHECK(ours.log_probs[d] == expected ||
          std::fabs(ours.log_probs[d] - expected) < 1e-5 * (1 + std::fabs(expected)));
  }
}

enum class Kind { kNormal, kCoarse, kEqual, kMostlyMasked, kTiny, kFew };
constexpr int64_t kKinds = 6;

// At least one entry of each row is finite.
Matrix random_matrix(DType dtype, int64_t rows, int64_t cols, Kind kind, Random& random) {
  Matrix x(dtype, rows, cols, cols + below(random, 4), below(random, 4));
  std::normal_distribution<float> normal(0, 3);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t finite = below(random, cols);
    for (int64_t c = 0; c < cols; ++c) {
      float value = normal(random);
      if (kind == Kind::kCoarse) value = std::round(value);
      if (kind == Kind::kEqual) value = -2.5f;
      if (kind == Kind::kMostlyMasked && c != finite && below(random, 50) != 0) value = -kInf;
      if (kind == Kind::kTiny) value *= 1e-6f;  // subnormal in half precision, both signs of zero
      if (kind == Kind::kFew) value = c == finite ? 0.0f : -40.0f + std::round(value);
      x.set(r, c, value);
    }
  }
  return x;
}

// None holds the end token; one has no edges, and a root that is final.
std::vector<Automaton> random_automata(int64_t cols, int32_t end_id, Random& random) {
  std::vector<int32_t> tokens;
  for (int64_t i = below(random, 2000); cols > 1 && i > 0; --i) {
    const auto token = static_cast<int32_t>(below(random, cols));
    if (token != end_id) tokens.push_back(token);
  }
  const auto n = static_cast<int64_t>(tokens.size());
  const std::vector<int64_t> passages = {0, n / 3, n};
  std::vector<int64_t> offsets = {0};
  while (offsets.back() < n) {
    offsets.push_back(std::min(n, offsets.back() + 1 + below(random, 4)));
  }
  const std::vector<int64_t> empty = {0, 0};
  return {SpanIndex(tokens.data(), passages.data(), 2).automaton(), Automaton(),
          build_trie(nullptr, empty.data(), 1),
          build_trie(tokens.data(), offsets.data(), static_cast<int64_t>(offsets.size()) - 1)};
}

void add_constraints(Case& c, Random& random) {
  c.automata = random_automata(c.x.cols(), c.end_id, random);
  for (int64_t i = 0; i < c.x.rows(); ++i) {
    const auto a = static_cast<int32_t>(below(random, 5)) - 1;
    const int32_t states = a < 0 ? 1 : c.automata[static_cast<size_t>(a)].num_states();
    c.automaton_of.push_back(a);
    // The root, which has most edges, half the time.
    const bool root = below(random, 2) == 0;
    c.states.push_back(root ? 0 : static_cast<int32_t>(below(random, states + 1)) - 1);
  }
}

void add_draws(Case& c, Random& random) {
  c.seed = random();
  if (below(random, 4) == 0) return;
  c.draws = below(random, 20);
  for (int64_t d = 0; d < c.draws; ++d) {
    c.row_of.push_back(static_cast<int32_t>(below(random, c.x.rows())));
    c.streams.push_back(random());
    c.positions.push_back(static_cast<uint32_t>(random()));
  }
}

void test_random() {
  Random random(1);
  const double temperatures[] = {0.05, 0.7, 1, 50};
  uint64_t order = 0;
  for (const DType dtype : kDTypes) {
    for (const int64_t cols : {1, 5, 300, 5000, 21128}) {
      for (const int64_t top_k : {int64_t{0}, int64_t{1}, int64_t{5}, cols, cols + 7}) {
        for (const double top_p : {1.0, 0.9, 0.1}) {
          const auto kind = static_cast<Kind>(below(random, kKinds));
          Case c(random_matrix(dtype, 3, cols, kind, random));
          c.end_id = static_cast<int32_t>(below(random, cols));
          c.top_k = static_cast<int32_t>(top_k);
          c.top_p = top_p;
          c.temperature = temperatures[below(random, 4)];
          if (below(random, 2) == 0) add_constraints(c, random);
          if (below(random, 4) != 0) {
            c.allow_end = {1, 0, static_cast<uint8_t>(below(random, 2))};
          }
          add_draws(c, random);
          context() = std::string(fastmrc_test::name_of(dtype)) + " cols " + std::to_string(cols) +
                      " kind " + std::to_string(static_cast<int>(kind)) + " top_k " +
                      std::to_string(top_k) + " top_p " + std::to_string(top_p) + " temperature " +
                      std::to_string(c.temperature) + " order " + std::to_string(order);
          emulation::set_order(order++);
          compare(c);
        }
      }
    }
  }
  emulation::set_order(0);
  context().clear();
}

// Cuts amid equal logits, in rows of more chunks than a block has threads.
void test_long_rows() {
  Random random(2);
  for (const DType dtype : kDTypes) {
    Case c(random_matrix(dtype, 2, 140000, Kind::kCoarse, random));
    c.draws = 60;
    for (int64_t d = 0; d < c.draws; ++d) c.row_of.push_back(static_cast<int32_t>(d % 2));
    compare(c);
    for (const int32_t top_k : {0, 70001}) {
      for (const double top_p : {0.5, 0.97}) {
        c.top_k = top_k;
        c.top_p = top_p;
        compare(c);
      }
    }
  }
}

// Of equal logits the lower tokens count: exactly as many as are asked for are drawn.
void test_ties() {
  for (const DType dtype : kDTypes) {
    for (const float value : {0.0f, -2.5f, 3.0f}) {
      Matrix x(dtype, 1, 1000);
      x.fill(value);
      Case c(std::move(x));
      c.draws = 300;
      c.row_of.assign(300, 0);
      const auto largest = [&] {
        int32_t found = -1;
        for (const int32_t token : run(c).tokens) found = std::max(found, token);
        return found;
      };
      c.top_k = 10;
      CHECK_EQ(largest(), 9);
      c.top_p = 0.5;
      CHECK_EQ(largest(), 4);
      c.top_k = 0;
      c.top_p = 0.01;
      CHECK_EQ(largest(), 9);
      c.top_p = 1e-9;
      CHECK_EQ(largest(), 0);
    }
  }
}

// The shares of very small and very large temperatures.
void test_temperatures() {
  Random random(3);
  for (const double temperature : {1e-310, 1e-300, 0.01, 1e10, 1e300}) {
    Case c(random_matrix(DType::kFloat32, 1, 3000, Kind::kNormal, random));
    c.draws = 40;
    c.row_of.assign(40, 0);
    c.temperature = temperature;
    compare(c);
    c.top_p = 0.3;
    compare(c);
  }
}

// A row gives the same draws wherever it lies, whatever the order of the threads.
void test_order() {
  Random random(4);
  Case c(random_matrix(DType::kFloat16, 1, 9000, Kind::kCoarse, random));
  c.top_k = 500;
  c.top_p = 0.8;
  c.draws = 128;
  c.row_of.assign(128, 0);
  const Drawn first = run(c);
  for (uint64_t order = 1; order < 6; ++order) {
    emulation::set_order(order);
    const Drawn again = run(c);
    CHECK_EQ(again.tokens, first.tokens);
    bool same = true;
    for (size_t d = 0; d < 128; ++d)
      same = same && same_bits(again.log_probs[d], first.log_probs[d]);
    CHECK(same);
  }
  emulation::set_order(0);
}

int64_t fault_of(int64_t row, cuda::Fault kind) { return row << 8 | static_cast<int64_t>(kind); }

// Row 1 is at fault, the others are drawn from as ever.
void check_fault(const Case& c, cuda::Fault kind) {
  const Drawn drawn = run(c);
  CHECK_EQ(drawn.fault, fault_of(1, kind));
  CHECK_EQ(drawn.tokens[1], -1);
  CHECK(std::isnan(drawn.log_probs[1]));
  for (const size_t d : {size_t{0}, size_t{2}}) {
    CHECK(drawn.tokens[d] >= 0);
    CHECK(drawn.log_probs[d] < 0);
  }
}

void test_bad_rows() {
  Random random(5);
  for (const int32_t top_k : {0, 2}) {
    Case c(random_matrix(DType::kBFloat16, 3, 700, Kind::kNormal, random));
    c.top_k = top_k;
    const Matrix good = c.x;
    c.x.set(1, 600, std::numeric_limits<float>::quiet_NaN());
    check_fault(c, cuda::Fault::kNan);
    c.x.set(1, 600, kInf);
    check_fault(c, cuda::Fault::kInfinity);
    for (int64_t v = 0; v < 700; ++v) c.x.set(1, v, -kInf);
    check_fault(c, cuda::Fault::kMasked);
    c.states = {0, -1, 0};  // the row is refused in any state
    check_fault(c, cuda::Fault::kMasked);
    c.row_of = {0, 2, 2};  // as long as it is drawn from
    CHECK_EQ(run(c).fault, cuda::kNoFault);
    CHECK(run(c).tokens[1] >= 0);
  }
}

void test_bad_constraints() {
  Random random(6);
  Case c(random_matrix(DType::kFloat32, 3, 50, Kind::kNormal, random));
  const std::vector<int32_t> tokens = {3, 7, 49, 3, 50};
  const std::vector<int64_t> all = {0, 5}, first = {0, 3};
  c.automata = {SpanIndex(tokens.data(), first.data(), 1).automaton(),
                SpanIndex(tokens.data(), all.data(), 1).automaton()};
  c.automaton_of = {0, 1, 0};
  check_fault(c, cuda::Fault::kToken);
  c.automaton_of = {-1, 0, -1};
  for (const int32_t end_id : {3, 7, 49}) {
    c.end_id = end_id;
    check_fault(c, cuda::Fault::kEndToken);
  }
  c.end_id = 4;
  CHECK_EQ(run(c).fault, cuda::kNoFault);
  for (const int32_t state : {-2, c.automata[0].num_states()}) {
    c.states = {0, state, 0};
    check_fault(c, cuda::Fault::kState);
  }
  c.end_id = 50;
  CHECK_THROWS(run(c), std::invalid_argument, "end_id: expected a token below 50");
}

// Where nothing may be drawn without a fault.
void test_nothing() {
  Matrix x(DType::kFloat16, 3, 9);
  x.fill(-kInf);
  for (int64_t r = 0; r < 3; ++r) x.set(r, 4, 1.0f);
  Case c(std::move(x));
  c.end_id = 4;
  c.allow_end = {1, 0, 1};
  c.states = {0, 0, -1};
  compare(c);
  const Drawn drawn = run(c);
  CHECK_EQ(drawn.tokens, std::vector<int32_t>({4, -1, -1}));
  CHECK_EQ(drawn.log_probs[0], 0.0);
  CHECK_EQ(drawn.log_probs[1], -static_cast<double>(kInf));
}

void test_arguments() {
  Case c(Matrix(DType::kFloat32, 2, 5));
  c.x.fill(1);
  const auto refused = [&](int32_t top_k, double top_p, double temperature) {
    c.top_k = top_k;
    c.top_p = top_p;
    c.temperature = temperature;
    return run(c);
  };
  CHECK_THROWS(refused(-1, 1, 1), std::invalid_argument, "top_k: expected at least 1, got -1");
  CHECK_THROWS(refused(0, 0, 1), std::invalid_argument, "top_p: expected a share");
  CHECK_THROWS(refused(0, 1.5, 1), std::invalid_argument, "top_p: expected a share");
  CHECK_THROWS(refused(0, 1, 0), std::invalid_argument, "temperature: expected a finite number");
  CHECK_THROWS(refused(0, 1, INFINITY), std::invalid_argument, "temperature");
  c = Case(Matrix(DType::kFloat32, 0, 5));
  CHECK_EQ(run(c).tokens.size(), size_t{0});
  CHECK_EQ(cuda::sample_bytes(0, 5000), 0);
  // 64-bit sizes: sums of 2^10 chunks for each row of 2^18 tokens.
  CHECK(cuda::sample_bytes(1 << 20, 1 << 18) > int64_t{8} << 30);
}

}  // namespace

int main() {
  test_random();
  test_long_rows();
  test_ties();
  test_temperatures();
  test_order();
  test_bad_rows();
  test_bad_constraints();
  test_nothing();
  test_arguments();
  return fastmrc_test::report();
}
