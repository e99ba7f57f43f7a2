// beam_step on ragged batches against a plain loop over all continuations in double precision.
//
// The loop takes the log-sum-exp of row_stats, which kernels_test checks, so that scores have to
// agree bit by bit and ties are the same.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/thread_pool.h"
#include "fastmrc/ops.h"
#include "fastmrc/span_index.h"
#include "fastmrc/trie.h"
#include "matrix.h"

namespace {

using fastmrc::Automaton;
using fastmrc::beam_step;
using fastmrc::BeamStep;
using fastmrc::BeamStepWorkspace;
using fastmrc::Candidate;
using fastmrc::DType;
using fastmrc::RowStats;
using fastmrc::Vote;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;

constexpr uint32_t kSeed = 20240613;
constexpr Vote kVotes[] = {Vote::kOriginal, Vote::kMean, Vote::kMax, Vote::kProduct,
                           Vote::kWeighted};

using Candidates = std::vector<std::vector<Candidate>>;

// A step with everything it points to.
struct Case {
  explicit Case(Matrix m) : logits(std::move(m)) {}

  Matrix logits;
  std::vector<RowStats> stats;
  std::vector<int32_t> passages, hypotheses, states;
  std::vector<int64_t> row_of;
  std::vector<float> scores, weights;
  std::vector<std::shared_ptr<const Automaton>> automata;
  std::vector<const Automaton*> constraints;
  std::vector<uint8_t> allow_end;
  Vote vote = Vote::kOriginal;
  int32_t end_id = 0;
  int32_t width = 1;

  BeamStep step() {
    stats.resize(static_cast<size_t>(logits.rows()));
    fastmrc::row_stats(logits.view(), stats.data());
    constraints.clear();
    for (const auto& automaton : automata) constraints.push_back(automaton.get());
    BeamStep step;
    step.logits = logits.view();
    step.stats = stats.data();
    step.num_questions = static_cast<int32_t>(passages.size());
    step.passages = passages.data();
    step.hypotheses = hypotheses.data();
    step.row_of = row_of.empty() ? nullptr : row_of.data();
    step.scores = scores.data();
    step.states = states.empty() ? nullptr : states.data();
    step.constraints = constraints.data();
    step.allow_end = allow_end.data();
    step.weights = weights.empty() ? nullptr : weights.data();
    step.vote = vote;
    step.end_id = end_id;
    step.width = width;
    return step;
  }
};

double naive_vote(const std::vector<double>& p, const float* weights, Vote vote) {
  double sum = 0, squares = 0, largest = 0, logs = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double w = vote == Vote::kWeighted ? static_cast<double>(weights[i]) : 1.0;
    sum += w * p[i];
    squares += w * (p[i] * p[i]);
    largest = std::max(largest, p[i]);
    logs += std::log(p[i] + 1e-12);
  }
  const auto n = static_cast<double>(p.size());
  if (vote == Vote::kMean) return sum / n;
  if (vote == Vote::kMax) return largest;
  if (vote == Vote::kProduct) return std::exp(logs / n);
  return squares / (1 + sum);
}

std::vector<int32_t> naive_allowed(const Case& c, size_t q, int32_t state) {
  std::vector<int32_t> tokens;
  const Automaton* automaton = c.automata[q].get();
  if (automaton == nullptr) {
    for (int32_t v = 0; v < c.logits.cols(); ++v) {
      if (v != c.end_id) tokens.push_back(v);
    }
  } else {
    const fastmrc::AllowedTokens allowed = automaton->allowed(state);
    tokens.assign(allowed.begin, allowed.end);
  }
  const bool final = automaton == nullptr || automaton->is_final(state);
  if (final && c.allow_end[q] != 0) tokens.push_back(c.end_id);
  return tokens;
}

Candidates naive_step(const Case& c) {
  Candidates all(c.passages.size());
  int64_t row = 0, hypothesis = 0, passage = 0;
  for (size_t q = 0; q < c.passages.size(); ++q) {
    const int32_t live = c.hypotheses[q];
    for (int32_t k = 0; k < live; ++k) {
      const float score = c.scores[static_cast<size_t>(hypothesis + k)];
      const int32_t state = c.states.empty() ? 0 : c.states[static_cast<size_t>(hypothesis + k)];
      if (c.passages[q] == 0 || state < 0 || std::isinf(score)) continue;
      for (const int32_t v : naive_allowed(c, q, state)) {
        std::vector<double> p;
        for (int32_t i = 0; i < c.passages[q]; ++i) {
          const int64_t slot = row + i * live + k;
          const int64_t r = c.row_of.empty() ? slot : c.row_of[static_cast<size_t>(slot)];
          p.push_back(std::exp(static_cast<double>(c.logits.at(r, v)) -
                               c.stats[static_cast<size_t>(r)].logsumexp));
        }
        const float* weights = c.weights.empty() ? nullptr : c.weights.data() + passage;
        const double gain = std::log(naive_vote(p, weights, c.vote) + 1e-12);
        all[q].push_back({static_cast<float>(static_cast<double>(score) + gain), v, k});
      }
    }
    std::sort(all[q].begin(), all[q].end(), [](const Candidate& a, const Candidate& b) {
      if (a.score != b.score) return a.score > b.score;
      return a.token != b.token ? a.token < b.token : a.parent < b.parent;
    });
    all[q].resize(std::min(all[q].size(), static_cast<size_t>(c.width)));
    row += static_cast<int64_t>(live) * c.passages[q];
    hypothesis += live;
    passage += c.passages[q];
  }
  return all;
}

void check_equal(const Candidates& found, const Candidates& expected) {
  CHECK_EQ(found.size(), expected.size());
  for (size_t q = 0; q < std::min(found.size(), expected.size()); ++q) {
    std::vector<int32_t> tokens[2], parents[2];
    std::vector<float> scores[2];
    for (const int side : {0, 1}) {
      for (const Candidate& c : side == 0 ? found[q] : expected[q]) {
        tokens[side].push_back(c.token);
        parents[side].push_back(c.parent);
        scores[side].push_back(c.score);
      }
    }
    CHECK_EQ(tokens[0], tokens[1]);
    CHECK_EQ(parents[0], parents[1]);
    CHECK_EQ(scores[0], scores[1]);
  }
}

// One workspace for all cases: nothing of an earlier step may show.
BeamStepWorkspace& workspace() {
  static BeamStepWorkspace space;
  return space;
}

void check_case(Case& c) {
  const BeamStep step = c.step();
  const Candidates expected = naive_step(c);
  Candidates found(3, std::vector<Candidate>(2));
  beam_step(step, workspace(), found);
  check_equal(found, expected);
}

enum class Logits : uint8_t { kNormal, kSharp, kTies, kNearTies, kMasked };

Matrix random_logits(Logits kind, DType dtype, int64_t rows, int64_t cols, std::mt19937* random) {
  const auto gap = static_cast<int64_t>((*random)() % 3);
  Matrix logits(dtype, rows, cols, cols + gap, gap / 2);
  std::normal_distribution<float> normal(0, kind == Logits::kSharp ? 20.0f : 3.0f);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const auto dice = (*random)();
      float x = normal(*random);
      if (kind == Logits::kTies) x = static_cast<float>(dice % 3);
      if (kind == Logits::kNearTies) x = 1.0f + static_cast<float>(dice % 8) * 0x1p-22f;
      if (kind == Logits::kMasked && dice % 4 != 0) x = -kInf;
      logits.set(r, c, x);
    }
    if (kind == Logits::kMasked) logits.set(r, (*random)() % static_cast<uint32_t>(cols), 1.0f);
  }
  return logits;
}

using Sequences = std::vector<std::vector<int32_t>>;

// Tokens other than the end token; few different ones, so that prefixes are shared.
Sequences random_sequences(int64_t cols, int32_t end_id, std::mt19937* random) {
  Sequences sequences((*random)() % 8);
  for (std::vector<int32_t>& sequence : sequences) {
    sequence.resize((*random)() % 6);
    for (int32_t& token : sequence) {
      const auto last = static_cast<uint32_t>(std::min<int64_t>(cols - 1, 40));
      token = static_cast<int32_t>((*random)() % last);
      if (token >= end_id) ++token;
    }
  }
  return sequences;
}

std::shared_ptr<const Automaton> random_automaton(int64_t cols, int32_t end_id,
                                                  std::mt19937* random) {
  std::vector<int32_t> tokens;
  std::vector<int64_t> offsets = {0};
  for (const std::vector<int32_t>& sequence : random_sequences(cols, end_id, random)) {
    tokens.insert(tokens.end(), sequence.begin(), sequence.end());
    offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
  const auto count = static_cast<int32_t>(offsets.size()) - 1;
  if ((*random)() % 2 == 0) {
    return std::make_shared<Automaton>(fastmrc::build_trie(tokens.data(), offsets.data(), count));
  }
  const fastmrc::SpanIndex index(tokens.data(), offsets.data(), count);
  return std::make_shared<Automaton>(index.automaton());
}

float random_score(std::mt19937* random) {
  switch ((*random)() % 4) {
    case 0:
      return 0;
    case 1:
      return -1.5f;
    case 2:
      return (*random)() % 16 == 0 ? -kInf : -300.0f;
    default:
      return -static_cast<float>((*random)() % 100000) / 1000;
  }
}

// Rows in any order, and one that nobody uses.
void shuffle_rows(Case* c, int64_t used, std::mt19937* random) {
  for (int64_t i = 0; i < c->logits.rows(); ++i) c->row_of.push_back(i);
  std::shuffle(c->row_of.begin(), c->row_of.end(), *random);
  const int64_t unused = c->row_of.back();
  for (int64_t v = 0; v < c->logits.cols(); ++v) c->logits.set(unused, v, -kInf);
  c->row_of.resize(static_cast<size_t>(used));
}

Case random_case(int64_t cols, std::mt19937* random) {
  std::vector<int32_t> passages((*random)() % 5), hypotheses(passages.size());
  int64_t rows = 0;
  for (size_t q = 0; q < passages.size(); ++q) {
    passages[q] = static_cast<int32_t>((*random)() % 5);
    hypotheses[q] = static_cast<int32_t>((*random)() % 4);
    rows += static_cast<int64_t>(passages[q]) * hypotheses[q];
  }
  const bool shuffled = (*random)() % 2 == 0;
  const auto kind = static_cast<Logits>((*random)() % 5);
  Case c(random_logits(kind, kDTypes[(*random)() % 3], rows + (shuffled ? 1 : 0), cols, random));
  c.passages = passages;
  c.hypotheses = hypotheses;
  c.vote = kVotes[(*random)() % 5];
  c.end_id = static_cast<int32_t>((*random)() % static_cast<uint32_t>(cols));
  c.width = static_cast<int32_t>((*random)() % 3 == 0 ? 1 + (*random)() % 80 : 1 + (*random)() % 8);
  if (shuffled) shuffle_rows(&c, rows, random);
  const bool at_the_root = (*random)() % 4 == 0;
  for (size_t q = 0; q < passages.size(); ++q) {
    const bool constrained = cols > 1 && (*random)() % 2 == 0;
    c.automata.push_back(constrained ? random_automaton(cols, c.end_id, random) : nullptr);
    c.allow_end.push_back((*random)() % 3 != 0);
    for (int32_t k = 0; k < hypotheses[q]; ++k) {
      c.scores.push_back(random_score(random));
      const auto states = static_cast<uint32_t>(constrained ? c.automata[q]->num_states() : 1);
      // -1, the dead state, now and then.
      const auto state = static_cast<int32_t>((*random)() % (states + 1)) - 1;
      if (!at_the_root) c.states.push_back(state);
    }
    for (int32_t p = 0; p < passages[q] && c.vote == Vote::kWeighted; ++p) {
      c.weights.push_back(
          (*random)() % 3 == 0 ? 0.0f : std::ldexp(1.0f, static_cast<int>((*random)() % 41) - 20));
    }
  }
  return c;
}

void test_random_cases() {
  std::mt19937 random(kSeed);
  const int64_t sizes[] = {1, 2, 5, 64, 70, 300, 1024, 1025, 3000};
  for (int i = 0; i < 1500; ++i) {
    const int64_t cols = sizes[static_cast<size_t>(i) % 9];
    if (cols >= 1024 && i % 4 != 0) continue;
    fastmrc_test::context() = "case " + std::to_string(i);
    Case c = random_case(cols, &random);
    check_case(c);
  }
}

// Vocabularies of several parts, on several threads.
void test_large_vocabularies() {
  std::mt19937 random(kSeed + 1);
  const int threads = fastmrc::num_threads();
  for (int i = 0; i < 15; ++i) {
    fastmrc_test::context() = "large case " + std::to_string(i);
    fastmrc::set_num_threads(1 + i % 4);
    Case c = random_case(i % 3 == 0 ? 8193 : 21128, &random);
    check_case(c);
  }
  fastmrc::set_num_threads(threads);
}

// All that differ are votes for a few tokens; many tokens share a float32 score.
void test_ties() {
  for (const Vote vote : kVotes) {
    for (const float score : {0.0f, -30.0f, -5000.0f, -3e6f}) {
      for (const int32_t end_id : {0, 1999}) {
        fastmrc_test::context() = "ties, score " + std::to_string(score);
        Case c(Matrix(DType::kFloat32, 4, 2000));
        c.logits.fill(0.0f);
        // By one unit in the last place, which a score may or may not show.
        for (int64_t r = 0; r < 4; ++r) {
          for (int64_t v = 5; v < 2000; v += 7)
            c.logits.set(r, v, static_cast<float>(v % 5) * 0x1p-23f);
        }
        c.passages = {2};
        c.hypotheses = {2};
        c.scores = {score, score};
        c.weights = vote == Vote::kWeighted ? std::vector<float>{0.5f, 2.0f} : std::vector<float>{};
        c.automata = {nullptr};
        c.allow_end = {1};
        c.vote = vote;
        c.end_id = end_id;
        for (const int32_t width : {1, 7, 500}) {
          c.width = width;
          check_case(c);
        }
      }
    }
  }
}

// Every vote is nothing but kEps: the lowest tokens win.
void test_votes_without_weight() {
  fastmrc_test::context() = "no weight";
  std::mt19937 random(kSeed + 2);
  Case c(random_logits(Logits::kNormal, DType::kFloat32, 2, 100, &random));
  c.passages = {2};
  c.hypotheses = {1};
  c.scores = {0};
  c.weights = {0, 0};
  c.automata = {nullptr};
  c.allow_end = {1};
  c.vote = Vote::kWeighted;
  c.end_id = 2;
  c.width = 4;
  Candidates found;
  beam_step(c.step(), workspace(), found);
  CHECK_EQ(found[0].size(), size_t{4});
  for (size_t i = 0; i < found[0].size(); ++i) {
    CHECK_EQ(found[0][i].token, static_cast<int32_t>(i));
    CHECK_EQ(found[0][i].score, static_cast<float>(std::log(1e-12)));
  }
}

// Tokens whose products differ by little: the float32 sums of the filter err the more the more
// passages there are, and by another amount for each token.
void test_many_passages() {
  std::mt19937 random(kSeed + 3);
  for (const Vote vote : kVotes) {
    for (const int32_t passages : {30, 3000}) {
      fastmrc_test::context() =
          "vote " + std::to_string(static_cast<int>(vote)) + " of " + std::to_string(passages);
      Case c(Matrix(DType::kFloat32, passages, 200));
      c.logits.fill(0.0f);  // of the end token, which is not allowed
      for (int64_t v = 1; v < 200; ++v) {
        const float mean = -12.0f - static_cast<float>(random() % 1024) * 1e-6f;
        const float apart = static_cast<float>(random() % 1024) / 512;
        for (int64_t p = 0; p < passages; ++p) {
          c.logits.set(p, v, p % 2 == 0 ? mean + apart : mean - apart);
        }
      }
      c.passages = {passages};
      c.hypotheses = {1};
      c.scores = {0};
      if (vote == Vote::kWeighted) c.weights.assign(static_cast<size_t>(passages), 1.0f);
      c.automata = {nullptr};
      c.allow_end = {0};
      c.vote = vote;
      for (const int32_t width : {1, 5}) {
        c.width = width;
        check_case(c);
      }
    }
  }
}

// Weights whose sums float32 cannot hold, and probabilities that only such weights make count.
void test_extreme_weights() {
  std::mt19937 random(kSeed + 4);
  for (const float largest : {1e6f, 1e20f, 1e30f, 3e38f}) {
    for (const Logits kind : {Logits::kNormal, Logits::kSharp, Logits::kMasked}) {
      fastmrc_test::context() = "weight " + std::to_string(largest);
      Case c(random_logits(kind, DType::kFloat32, 4, 500, &random));
      for (int64_t v = 0; v < 500; ++v) c.logits.set(1, v, c.logits.at(1, v) * 8);
      c.passages = {4};
      c.hypotheses = {1};
      c.scores = {0};
      c.weights = {1.0f, largest, largest / 3, 1e-20f};
      c.automata = {nullptr};
      c.allow_end = {1};
      c.vote = Vote::kWeighted;
      for (const int32_t width : {1, 5, 60}) {
        c.width = width;
        check_case(c);
      }
    }
  }
}

// Figures worked out by hand, for every vote: P = (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4).
void test_the_votes_themselves() {
  const double p = 0.5, r = 0.125;
  const double expected[] = {(p * p + r * r) / (1 + p + r), (p + r) / 2, p, std::sqrt(p * r),
                             (2 * p * p + 3 * r * r) / (1 + 2 * p + 3 * r)};
  const double logits[2][3] = {{0.5, 0.25, 0.25}, {0.125, 0.125, 0.75}};
  for (const Vote vote : kVotes) {
    fastmrc_test::context() = "vote " + std::to_string(static_cast<int>(vote));
    Case c(Matrix(DType::kFloat32, 2, 3));
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t v = 0; v < 3; ++v) {
        c.logits.set(i, v, static_cast<float>(std::log(logits[i][v])) + 10.0f);
      }
    }
    c.passages = {2};
    c.hypotheses = {1};
    c.scores = {-1.25f};
    if (vote == Vote::kWeighted) c.weights = {2, 3};
    c.automata = {nullptr};
    c.allow_end = {1};
    c.vote = vote;
    c.end_id = 2;
    c.width = 9;
    Candidates found;
    beam_step(c.step(), workspace(), found);
    CHECK_EQ(found[0].size(), size_t{3});
    for (const Candidate& candidate : found[0]) {
      if (candidate.token != 0) continue;
      const double score = -1.25 + std::log(expected[static_cast<int>(vote)]);
      CHECK(std::fabs(static_cast<double>(candidate.score) - score) < 2e-6);
    }
  }
}

Case small_case(int64_t cols, std::shared_ptr<const Automaton> automaton) {
  Case c(Matrix(DType::kFloat32, 1, cols));
  c.logits.fill(0.5f);
  c.passages = {1};
  c.hypotheses = {1};
  c.scores = {0};
  c.states = {0};
  c.automata = {std::move(automaton)};
  c.allow_end = {1};
  c.width = 3;
  return c;
}

void test_errors() {
  fastmrc_test::context() = "errors";
  const std::vector<int32_t> tokens = {2, 6};
  const std::vector<int64_t> offsets = {0, 2};
  const auto trie =
      std::make_shared<Automaton>(fastmrc::build_trie(tokens.data(), offsets.data(), 1));
  Candidates found;
  Case narrow = small_case(6, trie);
  narrow.states = {1};
  CHECK_THROWS(beam_step(narrow.step(), workspace(), found), std::invalid_argument,
               "constraint: expected tokens below the vocabulary size 6, got 6");
  Case with_end = small_case(8, trie);
  with_end.end_id = 2;
  CHECK_THROWS(beam_step(with_end.step(), workspace(), found), std::invalid_argument,
               "constraint: expected no end token 2 inside a sequence");
  Case beyond = small_case(8, trie);
  beyond.states = {3};
  CHECK_THROWS(beam_step(beyond.step(), workspace(), found), std::invalid_argument,
               "state: expected -1 or a state in [0, 3), got 3");
  Case masked = small_case(8, nullptr);
  masked.logits.fill(-kInf);
  CHECK_THROWS(beam_step(masked.step(), workspace(), found), std::invalid_argument,
               "logits: expected a finite entry in every row, got only -inf in row 0");
  Case fine = small_case(8, trie);  // a failed step leaves nothing behind
  check_case(fine);
}

}  // namespace

int main() {
  std::cout << "seed " << kSeed << std::endl;
  test_random_cases();
  test_large_vocabularies();
  test_ties();
  test_votes_without_weight();
  test_many_passages();
  test_extreme_weights();
  test_the_votes_themselves();
  test_errors();
  return fastmrc_test::report();
}
