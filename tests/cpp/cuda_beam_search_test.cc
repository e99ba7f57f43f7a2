// The beam step and the beam search of csrc/cuda, emulated on the host, against those of the CPU.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/beam_search.h"
#include "cuda/beam_step.h"
#include "cuda/numbers.cuh"
#include "fastmrc/beam_search.h"
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
using fastmrc_test::PackedAutomata;

namespace {

constexpr Vote kVotes[] = {Vote::kOriginal, Vote::kMean, Vote::kMax, Vote::kProduct,
                           Vote::kWeighted};
using Tokens = std::vector<int32_t>;

int64_t ssize(size_t n) { return static_cast<int64_t>(n); }

std::vector<unsigned char> lend(int64_t bytes) {
  return std::vector<unsigned char>(static_cast<size_t>(std::max<int64_t>(bytes, 1)));
}

// The statistics of rows, by the kernel.
struct Stats {
  std::vector<float> max;
  std::vector<int32_t> argmax;
  std::vector<double> logsumexp;
  cuda::RowStatsArrays view() { return {max.data(), argmax.data(), logsumexp.data()}; }
};

Stats stats_of(const Rows& rows, int64_t* fault, const uint8_t* live = nullptr) {
  const auto n = static_cast<size_t>(rows.rows);
  Stats stats{std::vector<float>(n), Tokens(n, -1), std::vector<double>(n)};
  Tokens counters(n, 0);
  std::vector<unsigned char> space = lend(cuda::row_pass_bytes(rows.rows, rows.cols, 0));
  cuda::RowPass pass;
  pass.rows = rows;
  pass.live = live;
  pass.stats = stats.view();
  pass.fault = fault;
  pass.counters = counters.data();
  pass.workspace = space.data();
  cuda::row_pass(pass, nullptr);
  return stats;
}

// --- one step ------------------------------------------------------------------------------------

struct StepCase {
  Matrix logits{DType::kFloat32, 0, 1};
  std::vector<int32_t> passages, hypotheses;
  std::vector<float> scores, weights;
  Tokens states;
  std::vector<std::unique_ptr<Automaton>> owned;
  std::vector<const Automaton*> constraints;
  std::vector<uint8_t> allow_end;
  Vote vote = Vote::kOriginal;
  int32_t end_id = 0, width = 3;
};

std::unique_ptr<Automaton> random_trie(int32_t vocabulary, int32_t end_id, std::mt19937& random) {
  Tokens tokens;
  std::vector<int64_t> offsets = {0};
  const int sequences = static_cast<int>(random() % 40);
  for (int s = 0; s < sequences; ++s) {
    for (uint32_t i = random() % 4; i > 0; --i) {
      const auto token = static_cast<int32_t>(random() % static_cast<uint32_t>(vocabulary));
      if (token != end_id) tokens.push_back(token);
    }
    offsets.push_back(ssize(tokens.size()));
  }
  return std::make_unique<Automaton>(build_trie(tokens.data(), offsets.data(), sequences));
}

StepCase random_step(DType dtype, int32_t vocabulary, bool rounded, std::mt19937& random) {
  StepCase c;
  c.vote = kVotes[random() % 5];
  c.end_id = static_cast<int32_t>(random() % static_cast<uint32_t>(vocabulary));
  c.width = 1 + static_cast<int32_t>(random() % static_cast<uint32_t>(std::min(vocabulary, 6)));
  if (random() % 20 == 0) c.width = std::min(vocabulary, 300);
  int64_t rows = 0;
  for (uint32_t q = 0; q < 1 + random() % 3; ++q) {
    c.passages.push_back(static_cast<int32_t>(random() % 4));
    c.hypotheses.push_back(static_cast<int32_t>(random() % 4));
    rows += int64_t{c.passages.back()} * c.hypotheses.back();
    c.owned.push_back(random() % 2 == 0 ? nullptr : random_trie(vocabulary, c.end_id, random));
    c.constraints.push_back(c.owned.back().get());
    c.allow_end.push_back(random() % 3 != 0);
    for (int32_t p = 0; p < c.passages.back(); ++p) {
      c.weights.push_back(static_cast<float>(random() % 5));
    }
    for (int32_t k = 0; k < c.hypotheses.back(); ++k) {
      c.scores.push_back(random() % 10 == 0 ? -kInf : -0.5f * static_cast<float>(random() % 6));
      const Automaton* a = c.constraints.back();
      const auto states = static_cast<uint32_t>(a == nullptr ? 1 : a->num_states());
      c.states.push_back(random() % 10 == 0 ? -1 : static_cast<int32_t>(random() % states));
    }
  }
  c.logits = Matrix(dtype, rows, vocabulary, vocabulary + static_cast<int64_t>(random() % 3), 1);
  std::normal_distribution<float> normal(0, 4);
  for (int64_t r = 0; r < rows; ++r) {
    const bool copy = r > 0 && random() % 4 == 0;  // equal rows make equal scores
    for (int64_t v = 0; v < vocabulary; ++v) {
      float x = copy ? c.logits.at(r - 1, v) : normal(random);
      if (rounded && !copy) x = std::round(x / 4);
      if (random() % 30 == 0 && v > 0) x = -kInf;
      c.logits.set(r, v, x);
    }
  }
  return c;
}

void compare_step(const StepCase& c) {
  const auto questions = static_cast<int32_t>(c.passages.size());
  const Rows logits = c.logits.view();
  std::vector<RowStats> stats(static_cast<size_t>(logits.rows));
  row_stats(logits, stats.data());
  BeamStep cpu{};
  cpu.logits = logits;
  cpu.stats = stats.data();
  cpu.num_questions = questions;
  cpu.passages = c.passages.data();
  cpu.hypotheses = c.hypotheses.data();
  cpu.scores = c.scores.data();
  cpu.states = c.states.data();
  cpu.constraints = c.constraints.data();
  cpu.allow_end = c.allow_end.data();
  cpu.weights = c.weights.data();
  cpu.vote = c.vote;
  cpu.end_id = c.end_id;
  cpu.width = c.width;
  BeamStepWorkspace space;
  std::vector<std::vector<Candidate>> expected;
  beam_step(cpu, space, expected);

  const int32_t slots = std::max(1, *std::max_element(c.hypotheses.begin(), c.hypotheses.end()));
  std::vector<int64_t> first_passage = {0}, passage_row;
  std::vector<float> scores(static_cast<size_t>(questions * slots));
  Tokens states(scores.size(), 0), automaton_of;
  std::vector<const Automaton*> automata;
  int64_t row = 0;
  size_t hypothesis = 0;
  for (int32_t q = 0; q < questions; ++q) {
    const auto i = static_cast<size_t>(q);
    for (int32_t p = 0; p < c.passages[i]; ++p, row += c.hypotheses[i]) passage_row.push_back(row);
    first_passage.push_back(ssize(passage_row.size()));
    for (int32_t k = 0; k < c.hypotheses[i]; ++k, ++hypothesis) {
      scores[static_cast<size_t>(q * slots + k)] = c.scores[hypothesis];
      states[static_cast<size_t>(q * slots + k)] = c.states[hypothesis];
    }
    automaton_of.push_back(c.constraints[i] == nullptr ? -1
                                                       : static_cast<int32_t>(automata.size()));
    if (c.constraints[i] != nullptr) automata.push_back(c.constraints[i]);
  }
  const PackedAutomata packed(automata);
  int64_t fault = cuda::kNoFault;
  Stats ours;  // those of the CPU, so that near ties fall alike
  for (const RowStats& row_stats : stats) {
    ours.max.push_back(row_stats.max);
    ours.argmax.push_back(row_stats.argmax);
    ours.logsumexp.push_back(row_stats.logsumexp);
  }
  const auto found = static_cast<size_t>(questions * c.width);
  std::vector<float> best_scores(found, -7);
  Tokens tokens(found, -7), parents(found, -7);
  cuda::BeamStep step;
  step.logits = logits;
  step.stats = ours.view();
  step.questions = questions;
  step.slots = slots;
  step.hypotheses = c.hypotheses.data();
  step.first_passage = first_passage.data();
  step.passage_row = passage_row.data();
  step.weights = c.weights.data();
  step.scores = scores.data();
  step.states = states.data();
  step.automata = packed.view();
  step.automaton_of = automaton_of.data();
  step.all_constrained = automata.size() == static_cast<size_t>(questions);
  step.allow_end = c.allow_end.data();
  step.vote = c.vote;
  step.end_id = c.end_id;
  step.width = c.width;
  step.candidates = {best_scores.data(), tokens.data(), parents.data()};
  step.fault = &fault;
  std::vector<unsigned char> memory = lend(cuda::beam_step_bytes(step));
  step.workspace = memory.data();
  cuda::beam_step(step, nullptr);
  CHECK_EQ(fault, cuda::kNoFault);
  for (size_t q = 0; q < expected.size(); ++q) {
    for (size_t i = 0; i < static_cast<size_t>(c.width); ++i) {
      const size_t at = q * static_cast<size_t>(c.width) + i;
      const bool there = i < expected[q].size();
      const Candidate e = there ? expected[q][i] : Candidate{-kInf, -1, -1};
      CHECK_EQ(tokens[at], e.token);
      CHECK_EQ(parents[at], e.parent);
      CHECK_EQ(best_scores[at], e.score);
    }
  }
}

void test_steps() {
  std::mt19937 random(5);
  const int32_t vocabularies[] = {1, 2, 7, 300, 4096, 5000};
  for (int i = 0; i < 300; ++i) {
    emulation::set_order(i % 2 == 0 ? 0 : static_cast<uint64_t>(i));
    context() = "step " + std::to_string(i);
    compare_step(random_step(kDTypes[i % 3], vocabularies[i % 6], i % 4 == 0, random));
  }
  context().clear();
  emulation::set_order(0);
}

// --- the search ----------------------------------------------------------------------------------

// Logits after an answer of a passage: any, but always the same.
std::vector<float> logits_after(uint32_t seed, int32_t passage, const Tokens& answer,
                                int32_t vocabulary, int32_t end_id, bool rounded) {
  uint32_t hash = seed * 31 + static_cast<uint32_t>(passage);
  for (const int32_t token : answer) hash = hash * 1000003 + static_cast<uint32_t>(token) + 7;
  std::mt19937 random(hash);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> row(static_cast<size_t>(vocabulary));
  for (float& x : row) x = rounded ? std::round(normal(random)) : normal(random);
  row[static_cast<size_t>(end_id)] += answer.empty() ? -1.0f : 0.5f;
  return row;
}

struct SearchCase {
  BeamSearchOptions options;
  Tokens tokens;
  std::vector<int64_t> passage_offsets = {0};
  std::vector<int32_t> question_offsets = {0};
  std::vector<float> weights;
  uint32_t seed = 0;
  bool rounded = false;
};

struct SearchResult {
  std::vector<std::vector<Hypothesis>> hypotheses;
  Tokens best;
  std::vector<uint8_t> surviving;
  std::vector<double> no_answer;
  int32_t steps = 0;
};

SearchResult on_cpu(const SearchCase& c) {
  BeamSearch search(c.options, c.tokens, c.passage_offsets, c.question_offsets, {}, c.weights);
  const int32_t vocabulary = c.options.vocabulary_size;
  const auto rows = [&](const std::vector<int32_t>& passages, const std::vector<Tokens>& answers) {
    Matrix logits(DType::kFloat32, ssize(passages.size()), vocabulary);
    for (size_t r = 0; r < passages.size(); ++r) {
      const std::vector<float> row =
          logits_after(c.seed, passages[r], answers[r], vocabulary, c.options.end_id, c.rounded);
      for (size_t v = 0; v < row.size(); ++v) logits.set(ssize(r), ssize(v), row[v]);
    }
    return logits;
  };
  std::vector<int32_t> all;
  for (size_t p = 0; p + 1 < c.passage_offsets.size(); ++p) all.push_back(static_cast<int32_t>(p));
  while (!search.done()) {
    std::vector<Tokens> answers(all.size());
    std::vector<int32_t> passages = all;
    if (search.steps() > 0) {
      const StepRequest& request = search.request();
      passages = request.row_passage;
      answers.clear();
      int32_t place = 0, before = -1;
      for (size_t r = 0; r < passages.size(); ++r) {
        // Rows of a passage are its hypotheses in order.
        place = passages[r] == before ? place + 1 : 0;
        before = passages[r];
        const auto q = static_cast<size_t>(request.row_question[r]);
        answers.push_back(search.live_tokens(request.questions[q])[static_cast<size_t>(place)]);
      }
    }
    const Matrix logits = rows(passages, answers);
    search.step(logits.view());
  }
  SearchResult result;
  for (int32_t q = 0; q < search.num_questions(); ++q) {
    result.hypotheses.push_back(search.hypotheses(q));
    result.best.push_back(search.best(q));
  }
  result.surviving = search.surviving();
  result.no_answer = search.no_answer();
  result.steps = search.steps();
  return result;
}

// What the Python loop does, with host memory as the device's.
class DeviceSearch {
 public:
  explicit DeviceSearch(const SearchCase& c)
      : c_(c),
        questions_(c.question_offsets.size() - 1),
        slots_(static_cast<size_t>(c.options.beam_size)),
        columns_(slots_ * static_cast<size_t>(c.options.max_tokens)) {}

  SearchResult run() {
    allocate();
    first_step();
    for (int32_t t = 0; t < c_.options.max_tokens; ++t) {
      step(t);
      if (std::all_of(beams_.hypotheses, beams_.hypotheses + questions_,
                      [](int32_t n) { return n == 0; })) {
        result_.steps = std::max(result_.steps, t + 1);
        break;
      }
    }
    CHECK_EQ(fault_, cuda::kNoFault);
    read();
    return result_;
  }

 private:
  void allocate() {
    const auto q = static_cast<int32_t>(questions_);
    const int32_t slots = c_.options.beam_size, steps = c_.options.max_tokens;
    state_.assign(static_cast<size_t>(cuda::beams_items(q, slots, steps)), -7);
    ancestors_.assign(2 * questions_ * slots_ * columns_, 0);
    beams_ = cuda::lay_out_beams(state_.data(), ancestors_.data(), q, slots, steps);
    for (size_t i = 0; i < questions_; ++i) {
      beams_.hypotheses[i] = beams_.entries[i] = 0;
      beams_.sizes[i] = slots;
      beams_.best[i] = -1;
      beams_.scores[i * slots_] = 0;
      beams_.states[i * slots_] = 0;
      beams_.nodes[i * slots_] = -1;
    }
  }

  // The host's part between the two halves of step 0: votes, constraints, rows.
  void first_step() {
    const size_t passages = c_.passage_offsets.size() - 1;
    first_logits_ = Matrix(DType::kFloat32, ssize(passages), c_.options.vocabulary_size);
    for (size_t p = 0; p < passages; ++p) {
      fill(first_logits_, ssize(p), static_cast<int32_t>(p), {});
    }
    Stats stats = stats_of(first_logits_.view(), &fault_);
    result_.surviving.assign(passages, 7);
    result_.no_answer.assign(passages, 7);
    cuda::FirstStep first;
    first.logits = first_logits_.view();
    first.stats = stats.view();
    first.end_id = c_.options.end_id;
    first.surviving = result_.surviving.data();
    first.no_answer = result_.no_answer.data();
    first.fault = &fault_;
    cuda::first_step(first, nullptr);
    first_passage_ = {0};
    for (size_t q = 0; q < questions_; ++q) {
      Tokens tokens;
      std::vector<int64_t> offsets = {0};
      for (int32_t p = c_.question_offsets[q]; p < c_.question_offsets[q + 1]; ++p) {
        const auto i = static_cast<size_t>(p);
        if (result_.surviving[i] == 0) continue;
        first_rows_.push_back(p);
        question_of_.push_back(static_cast<int32_t>(q));
        passage_of_.push_back(p);
        if (!c_.weights.empty()) weights_.push_back(c_.weights[i]);
        tokens.insert(tokens.end(), c_.tokens.begin() + c_.passage_offsets[i],
                      c_.tokens.begin() + c_.passage_offsets[i + 1]);
        offsets.push_back(ssize(tokens.size()));
      }
      first_passage_.push_back(ssize(first_rows_.size()));
      beams_.hypotheses[q] = offsets.size() > 1 ? 1 : 0;
      indices_.push_back(std::make_unique<SpanIndex>(tokens.data(), offsets.data(),
                                                     static_cast<int32_t>(offsets.size()) - 1));
      automata_.push_back(&indices_.back()->automaton());
      automaton_of_.push_back(c_.options.spans_only ? static_cast<int32_t>(q) : -1);
    }
    for (size_t r = 0; r < first_rows_.size(); ++r) rows_.push_back(ssize(r * slots_));
    packed_ = std::make_unique<PackedAutomata>(automata_);
    inputs_.rows = ssize(rows_.size());
    prefix_ = 3;
    width_ = prefix_ + columns_ + 2;
    tokens_.assign(rows_.size() * slots_, -7);
    positions_ = tokens_;
    live_.assign(rows_.size() * slots_, 7);
    mask_.assign(rows_.size() * slots_ * width_, 9);
    cache_columns_.assign(slots_, -7);
    for (size_t r = 0; r < rows_.size(); ++r) first_position_.push_back(100 + ssize(r));
    inputs_.prefix = ssize(prefix_);
    inputs_.columns = ssize(width_);
    inputs_.question_of = question_of_.data();
    inputs_.first_position = first_position_.data();
    inputs_.tokens = tokens_.data();
    inputs_.positions = positions_.data();
    inputs_.mask = mask_.data();
    inputs_.cache_columns = cache_columns_.data();
    inputs_.live = live_.data();
  }

  void fill(Matrix& logits, int64_t row, int32_t passage, const Tokens& answer) {
    const std::vector<float> values = logits_after(
        c_.seed, passage, answer, c_.options.vocabulary_size, c_.options.end_id, c_.rounded);
    for (size_t v = 0; v < values.size(); ++v) logits.set(row, ssize(v), values[v]);
  }

  Tokens path(size_t question, int32_t node) const {
    Tokens tokens;
    for (; node >= 0; node = beams_.node_parents[question * columns_ + static_cast<size_t>(node)]) {
      tokens.push_back(beams_.node_tokens[question * columns_ + static_cast<size_t>(node)]);
    }
    std::reverse(tokens.begin(), tokens.end());
    return tokens;
  }

  // The encoder: reads what it is given, keeps the token of every column and checks the mask.
  Matrix encode(int32_t t) {
    Matrix logits(DType::kFloat32, ssize(rows_.size() * slots_), c_.options.vocabulary_size);
    cache_.resize(rows_.size(), Tokens(columns_, -1));
    for (size_t r = 0; r < rows_.size(); ++r) {
      const auto q = static_cast<size_t>(question_of_[r]);
      for (size_t k = 0; k < slots_; ++k) {
        const size_t at = r * slots_ + k;
        CHECK_EQ(live_[at] != 0, static_cast<int32_t>(k) < beams_.hypotheses[q]);
        const uint8_t* mask = mask_.data() + at * width_;
        CHECK(mask[0] == 9 && mask[width_ - 1] == 9);  // not its own
        const size_t own = static_cast<size_t>(t) * slots_ + k;
        CHECK_EQ(cache_columns_[k], ssize(prefix_ + own));
        cache_[r][own] = static_cast<int32_t>(tokens_[at]);
        if (live_[at] == 0) {
          CHECK_EQ(tokens_[at], 0);
          CHECK(std::count(mask + prefix_, mask + prefix_ + columns_, 0) == ssize(columns_));
          continue;
        }
        Tokens seen;
        for (size_t column = 0; column < columns_; ++column) {
          if (mask[prefix_ + column] != 0) seen.push_back(cache_[r][column]);
        }
        CHECK_EQ(seen, path(q, beams_.nodes[q * slots_ + k]));
        CHECK_EQ(positions_[at], 100 + ssize(r) + t);
        CHECK_EQ(ssize(seen.size()), int64_t{t} + 1);
        fill(logits, ssize(at), passage_of_[r], seen);
      }
    }
    return logits;
  }

  void step(int32_t t) {
    const bool first = t == 0;
    Matrix logits = first ? first_logits_ : encode(t - 1);
    Stats stats = stats_of(logits.view(), &fault_, first ? nullptr : live_.data());
    int32_t width = c_.options.beam_size;
    if (c_.options.finish == Finish::kPool && t + 1 < c_.options.max_tokens) width *= 2;
    const auto found = questions_ * static_cast<size_t>(width);
    std::vector<float> scores(found);
    Tokens tokens(found), parents(found);
    const std::vector<uint8_t> no_end(questions_, 0);
    cuda::BeamStep beam;
    beam.logits = logits.view();
    beam.stats = stats.view();
    beam.questions = static_cast<int32_t>(questions_);
    beam.slots = c_.options.beam_size;
    beam.hypotheses = beams_.hypotheses;
    beam.first_passage = first_passage_.data();
    beam.passage_row = first ? first_rows_.data() : rows_.data();
    beam.weights = weights_.data();
    beam.scores = beams_.scores;
    beam.states = beams_.states;
    beam.automata = packed_->view();
    beam.automaton_of = automaton_of_.data();
    beam.all_constrained = c_.options.spans_only;
    beam.allow_end = t < c_.options.min_tokens ? no_end.data() : nullptr;
    beam.vote = c_.options.vote;
    beam.end_id = c_.options.end_id;
    beam.width = width;
    beam.candidates = {scores.data(), tokens.data(), parents.data()};
    beam.fault = &fault_;
    std::vector<unsigned char> memory = lend(cuda::beam_step_bytes(beam));
    beam.workspace = memory.data();
    cuda::beam_step(beam, nullptr);
    const cuda::FinishRules rules{c_.options.finish, c_.options.length_penalty, c_.options.end_id,
                                  c_.options.max_tokens};
    cuda::advance_beams(beams_, rules, beam.candidates, width, packed_->view(),
                        automaton_of_.data(), t, nullptr);
    cuda::prepare_inputs(beams_, inputs_, t, nullptr);
  }

  void read() {
    for (size_t q = 0; q < questions_; ++q) {
      const auto count = static_cast<size_t>(beams_.entries[q]);
      std::vector<size_t> order(count);
      for (size_t i = 0; i < count; ++i) order[i] = i;
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return beams_.entry_scores[q * slots_ + a] > beams_.entry_scores[q * slots_ + b];
      });
      std::vector<Hypothesis> found;
      int32_t best = -1;
      for (const size_t i : order) {
        if (static_cast<int32_t>(i) == beams_.best[q]) best = static_cast<int32_t>(found.size());
        const size_t at = q * slots_ + i;
        found.push_back({path(q, beams_.entry_nodes[at]), beams_.entry_scores[at],
                         beams_.entry_finished[at] != 0});
      }
      result_.hypotheses.push_back(found);
      result_.best.push_back(best);
    }
  }

  const SearchCase& c_;
  size_t questions_, slots_, columns_, prefix_ = 0, width_ = 0;
  SearchResult result_;
  int64_t fault_ = cuda::kNoFault;
  Matrix first_logits_{DType::kFloat32, 0, 1};
  Tokens state_, question_of_, passage_of_, automaton_of_;
  cuda::Beams beams_;
  std::vector<float> weights_;
  std::vector<uint8_t> ancestors_, mask_, live_;
  std::vector<int64_t> first_passage_, first_rows_, rows_, tokens_, positions_, cache_columns_,
      first_position_;
  std::vector<std::unique_ptr<SpanIndex>> indices_;
  std::vector<const Automaton*> automata_;
  std::unique_ptr<PackedAutomata> packed_;
  std::vector<Tokens> cache_;
  cuda::EncoderInputs inputs_;
};

SearchCase random_search(std::mt19937& random) {
  SearchCase c;
  c.seed = static_cast<uint32_t>(random());
  c.rounded = random() % 3 == 0;
  const auto vocabulary = static_cast<int32_t>(4 + random() % 20);
  c.options.vocabulary_size = vocabulary;
  c.options.end_id = static_cast<int32_t>(random() % 4);
  c.options.beam_size = 1 + static_cast<int32_t>(random() % 4);
  c.options.max_tokens = 1 + static_cast<int32_t>(random() % 6);
  c.options.min_tokens =
      static_cast<int32_t>(random() % static_cast<uint32_t>(c.options.max_tokens));
  if (random() % 2 == 0) c.options.min_tokens = 0;
  c.options.vote = kVotes[random() % 5];
  c.options.finish = random() % 2 == 0 ? Finish::kOriginal : Finish::kPool;
  c.options.length_penalty = 0.5 * static_cast<double>(random() % 4);
  c.options.spans_only = random() % 3 != 0;
  for (uint32_t q = 0; q < 1 + random() % 3; ++q) {
    for (uint32_t p = random() % 4; p > 0; --p) {
      for (uint32_t i = random() % 7; i > 0; --i) {
        const auto token = static_cast<int32_t>(random() % static_cast<uint32_t>(vocabulary));
        if (token != c.options.end_id) c.tokens.push_back(token);
      }
      c.passage_offsets.push_back(ssize(c.tokens.size()));
      if (c.options.vote == Vote::kWeighted) {
        c.weights.push_back(static_cast<float>(random() % 3));
      }
    }
    c.question_offsets.push_back(static_cast<int32_t>(c.passage_offsets.size()) - 1);
  }
  return c;
}

void test_searches() {
  std::mt19937 random(6);
  int64_t several_steps = 0, answers = 0;
  for (int i = 0; i < 600; ++i) {
    emulation::set_order(i % 2 == 0 ? 0 : static_cast<uint64_t>(i));
    context() = "search " + std::to_string(i);
    const SearchCase c = random_search(random);
    const SearchResult expected = on_cpu(c);
    const SearchResult found = DeviceSearch(c).run();
    CHECK_EQ(found.best, expected.best);
    CHECK_EQ(found.surviving, expected.surviving);
    for (size_t p = 0; p < expected.no_answer.size(); ++p) {
      CHECK(std::fabs(found.no_answer[p] - expected.no_answer[p]) < 1e-6);
    }
    for (size_t q = 0; q < expected.hypotheses.size(); ++q) {
      CHECK_EQ(found.hypotheses[q].size(), expected.hypotheses[q].size());
      for (size_t j = 0; j < expected.hypotheses[q].size(); ++j) {
        const Hypothesis &ours = found.hypotheses[q][j], &theirs = expected.hypotheses[q][j];
        CHECK_EQ(ours.tokens, theirs.tokens);
        CHECK_EQ(ours.finished, theirs.finished);
        CHECK(ours.score == theirs.score || std::fabs(ours.score - theirs.score) < 1e-4f);
      }
    }
    several_steps += expected.steps > 2 ? 1 : 0;
    answers += std::count_if(expected.best.begin(), expected.best.end(),
                             [](int32_t best) { return best >= 0; });
  }
  context().clear();
  emulation::set_order(0);
  CHECK(several_steps > 100);
  CHECK(answers > 300);
}

void test_faults() {
  // Question 0 has a row of -inf, question 1 a constraint with a token beyond the vocabulary.
  const auto fault_of = [](const Tokens& sequence, float first_row) {
    std::mt19937 random(7);
    StepCase c;
    Matrix logits(DType::kFloat32, 1, 5);
    for (int64_t v = 0; v < 5; ++v) logits.set(0, v, first_row);
    const int64_t offsets[] = {0, ssize(sequence.size())};
    const Automaton trie = build_trie(sequence.data(), offsets, 1);
    const PackedAutomata packed({&trie});
    int64_t fault = cuda::kNoFault;
    Stats stats = stats_of(logits.view(), &fault);
    const int32_t hypotheses = 1, automaton_of = 0;
    const int64_t first_passage[] = {0, 1}, passage_row = 0;
    const float score = 0;
    float scores[2];
    int32_t tokens[2], parents[2];
    cuda::BeamStep step;
    step.logits = logits.view();
    step.stats = stats.view();
    step.questions = step.slots = 1;
    step.hypotheses = &hypotheses;
    step.first_passage = first_passage;
    step.passage_row = &passage_row;
    step.scores = &score;
    step.automata = packed.view();
    step.automaton_of = &automaton_of;
    step.end_id = 2;
    step.width = 2;
    step.candidates = {scores, tokens, parents};
    step.fault = &fault;
    std::vector<unsigned char> memory = lend(cuda::beam_step_bytes(step));
    step.workspace = memory.data();
    cuda::beam_step(step, nullptr);
    if (fault != cuda::kNoFault) CHECK_EQ(tokens[0], -1);
    return fault;
  };
  CHECK_EQ(fault_of({1}, 0), cuda::kNoFault);
  CHECK_EQ(fault_of({1}, -kInf), static_cast<int64_t>(cuda::Fault::kMasked));
  CHECK_EQ(fault_of({1}, kInf), static_cast<int64_t>(cuda::Fault::kInfinity));
  CHECK_EQ(fault_of({5}, 0), static_cast<int64_t>(cuda::Fault::kToken));
  CHECK_EQ(fault_of({2}, 0), static_cast<int64_t>(cuda::Fault::kEndToken));
}

}  // namespace

int main() {
  test_steps();
  test_searches();
  test_faults();
  return fastmrc_test::report();
}
