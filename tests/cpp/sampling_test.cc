// Random numbers, draws and sequences: known answers, any number of threads, refusals. The
// comparison with the oracle is in tests/test_sampling.py.

#include "fastmrc/sampling.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "core/philox.h"
#include "core/thread_pool.h"
#include "cpu/kernels.h"
#include "fastmrc/ops.h"
#include "fastmrc/trie.h"

namespace {

using fastmrc::Automaton;
using fastmrc::DType;
using fastmrc::Rows;
using fastmrc::SampledSequence;
using fastmrc::SampleStep;
using fastmrc::SamplingOptions;
using fastmrc::SequenceSampler;

constexpr float kInf = std::numeric_limits<float>::infinity();

Rows rows_of(const std::vector<float>& values, int64_t cols) {
  return {values.data(), DType::kFloat32, static_cast<int64_t>(values.size()) / cols, cols, cols};
}

std::vector<float> random_logits(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> values(n);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<int32_t> draw(const Rows& logits, int32_t top_k, double top_p, double temperature) {
  const auto n = static_cast<size_t>(logits.rows);
  std::vector<uint64_t> streams(n);
  for (size_t i = 0; i < n; ++i) streams[i] = i;
  const std::vector<uint32_t> positions(n, 2);
  SampleStep step;
  step.logits = logits;
  step.top_k = top_k;
  step.top_p = top_p;
  step.temperature = temperature;
  step.seed = 77;
  step.draws = logits.rows;
  step.streams = streams.data();
  step.positions = positions.data();
  std::vector<int32_t> tokens(n);
  std::vector<double> log_probs(n);
  fastmrc::SampleWorkspace workspace;
  fastmrc::sample(step, workspace, tokens.data(), log_probs.data());
  return tokens;
}

// The known answers of Random123.
void test_philox() {
  using Words = std::array<uint32_t, 4>;
  CHECK((fastmrc::philox(0, {0, 0, 0, 0}) ==
         Words{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  CHECK((fastmrc::philox(~uint64_t{0}, {~0u, ~0u, ~0u, ~0u}) ==
         Words{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  CHECK(
      (fastmrc::philox(0x299f31d0a4093822u, {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}) ==
       Words{0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u}));
  for (uint64_t stream = 0; stream < 1000; ++stream) {
    const double u = fastmrc::uniform(5, stream, 3);
    CHECK(u >= 0 && u < 1);
  }
}

void test_threads() {
  const std::vector<float> values = random_logits(96 * 5000, 1);
  const Rows logits = rows_of(values, 5000);
  const double nucleus[] = {1.0, 0.9};
  for (const int32_t top_k : {0, 5}) {
    for (const double top_p : nucleus) {
      fastmrc::set_num_threads(1);
      const std::vector<int32_t> alone = draw(logits, top_k, top_p, 0.8);
      for (const int threads : {2, 4}) {
        fastmrc::set_num_threads(threads);
        CHECK_EQ(draw(logits, top_k, top_p, 0.8), alone);
      }
    }
  }
}

// Sums that stay the same on every set, also where a product with the maximum would be large.
void test_sum_exp() {
  std::vector<float> values = random_logits(5000, 2);
  values[17] = -kInf;
  for (const float offset : {0.0f, 1e7f, -3e8f}) {
    std::vector<float> shifted = values;
    float max = -kInf;
    for (float& value : shifted) {
      value += offset;
      max = std::max(max, value);
    }
    for (const double temperature : {1.0, 0.01, 50.0, 1e-300, 1e300}) {
      double expected = 0;
      for (const float value : shifted) {
        expected += std::exp((static_cast<double>(value) - static_cast<double>(max)) / temperature);
      }
      const double first = fastmrc::kernels_of(fastmrc::Isa::kGeneric)
                               .sum_exp(shifted.data(), DType::kFloat32, 0, 5000, max, temperature);
      CHECK(std::fabs(first - expected) <= 3e-6 * expected);
      for (const fastmrc::Isa isa : {fastmrc::Isa::kAvx2, fastmrc::Isa::kAvx512}) {
        if (!fastmrc::isa_available(isa)) continue;
        CHECK_EQ(fastmrc::kernels_of(isa).sum_exp(shifted.data(), DType::kFloat32, 0, 5000, max,
                                                  temperature),
                 first);
      }
    }
  }
}

std::vector<SampledSequence> sequences(const SamplingOptions& options, int32_t count,
                                       const Automaton* constraint, const std::vector<float>& row) {
  SequenceSampler sampler(options, {count}, {constraint});
  int64_t rows = 1;
  while (!sampler.done()) {
    std::vector<float> logits;
    for (int64_t i = 0; i < rows; ++i) logits.insert(logits.end(), row.begin(), row.end());
    sampler.step(rows_of(logits, static_cast<int64_t>(row.size())));
    rows = static_cast<int64_t>(sampler.request().row_passage.size());
  }
  return sampler.sequences(0);
}

void test_sequences() {
  const std::vector<float> row = random_logits(30, 3);
  SamplingOptions options;
  options.vocabulary_size = 30;
  options.end_id = 4;
  options.max_tokens = 5;
  options.min_tokens = 2;
  const auto drawn = sequences(options, 50, nullptr, row);
  const auto fewer = sequences(options, 20, nullptr, row);
  CHECK_EQ(drawn.size(), size_t{50});
  for (size_t i = 0; i < drawn.size(); ++i) {
    CHECK(drawn[i].tokens.size() >= 2 && drawn[i].tokens.size() <= 5);
    CHECK(drawn[i].finished == (drawn[i].tokens.size() < 5));
    CHECK(drawn[i].log_prob < 0);
    if (i < fewer.size()) CHECK_EQ(fewer[i].tokens, drawn[i].tokens);
  }
  const std::vector<int32_t> tokens = {1, 2, 3, 7};
  const std::vector<int64_t> offsets = {0, 3, 4};
  const Automaton trie = fastmrc::build_trie(tokens.data(), offsets.data(), 2);
  options.min_tokens = 0;
  for (const SampledSequence& one : sequences(options, 40, &trie, row)) {
    CHECK(one.tokens == std::vector<int32_t>({1, 2, 3}) || one.tokens == std::vector<int32_t>({7}));
    CHECK(one.finished);
  }
}

void test_refusals() {
  std::vector<float> values = random_logits(20, 4);
  const auto refused = [&](int32_t top_k, double top_p, double temperature) {
    return draw(rows_of(values, 10), top_k, top_p, temperature);
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS(refused(-1, 1, 1), std::invalid_argument, "top_k: expected at least 1");
  CHECK_THROWS(refused(0, 0, 1), std::invalid_argument, "top_p: expected a share");
  CHECK_THROWS(refused(0, nan, 1), std::invalid_argument, "top_p");
  CHECK_THROWS(refused(0, 1, 0), std::invalid_argument, "temperature: expected a finite number");
  CHECK_THROWS(refused(0, 1, nan), std::invalid_argument, "temperature");
  values[13] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS(refused(3, 1, 1), std::invalid_argument, "NaN in row 1");
  SamplingOptions options;
  CHECK_THROWS(SequenceSampler(options, {1}, {}), std::invalid_argument, "vocabulary_size");
  options.vocabulary_size = 10;
  CHECK_THROWS(SequenceSampler(options, {-1}, {}), std::invalid_argument, "sequences");
  CHECK_THROWS(SequenceSampler(options, {1}, {nullptr, nullptr}), std::invalid_argument,
               "one per prompt");
  options.min_ends = 0;
  CHECK_THROWS(SequenceSampler(options, {1}, {}), std::invalid_argument, "min_ends");
}

}  // namespace

int main() {
  test_philox();
  test_threads();
  test_sum_exp();
  test_sequences();
  test_refusals();
  return fastmrc_test::report();
}
