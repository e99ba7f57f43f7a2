// The beam loop: scripted searches with known outcomes, and random ones against a plain search that
// keeps every hypothesis as a list of tokens.

#include "fastmrc/beam_search.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "fastmrc/trie.h"
#include "matrix.h"

namespace {

using fastmrc::Automaton;
using fastmrc::BeamSearch;
using fastmrc::BeamSearchOptions;
using fastmrc::DType;
using fastmrc::Finish;
using fastmrc::Hypothesis;
using fastmrc::StepRequest;
using fastmrc::Vote;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;

constexpr uint32_t kSeed = 20240614;

using Tokens = std::vector<int32_t>;

struct Passage {
  int32_t id;  // names its logits, so that a passage gives the same ones in any batch
  Tokens tokens;
  float weight = 1;
};

struct Question {
  std::vector<Passage> passages;
  std::shared_ptr<const Automaton> constraint;
};

// The logits after an answer so far.
class Script {
 public:
  virtual ~Script() = default;
  virtual std::vector<float> row(int32_t passage, const Tokens& answer) const = 0;
};

struct Outcome {
  std::vector<Hypothesis> hypotheses;
  int32_t best = -1;
  std::vector<uint8_t> surviving;
  std::vector<uint8_t> voting;
};

std::string describe(const Outcome& outcome) {
  std::string text = "best " + std::to_string(outcome.best);
  for (const Hypothesis& h : outcome.hypotheses) {
    text += " [";
    for (const int32_t token : h.tokens) text += std::to_string(token) + " ";
    text += "] " + std::to_string(h.score) + (h.finished ? " finished" : " cut");
  }
  for (const uint8_t s : outcome.surviving) text += s != 0 ? " +" : " -";
  return text;
}

void check_equal(const Outcome& found, const Outcome& expected) {
  bool same = found.best == expected.best && found.surviving == expected.surviving &&
              found.voting == expected.voting &&
              found.hypotheses.size() == expected.hypotheses.size();
  for (size_t i = 0; same && i < expected.hypotheses.size(); ++i) {
    const Hypothesis& a = found.hypotheses[i];
    const Hypothesis& b = expected.hypotheses[i];
    same = a.tokens == b.tokens && a.score == b.score && a.finished == b.finished;
  }
  CHECK(same);
  if (!same) {
    std::cerr << "  found:    " << describe(found) << "\n  expected: " << describe(expected)
              << "\n";
  }
}

// What the encoder would do with the requests of a search: it keeps the answer that ends in every
// column, and checks that a token attends to those before it and to nothing else.
class Driver {
 public:
  Driver(const BeamSearchOptions& options, const std::vector<Question>& questions,
         const Script& script)
      : options_(options), script_(script) {
    Tokens tokens;
    std::vector<int64_t> passage_offsets = {0};
    std::vector<int32_t> question_offsets = {0};
    std::vector<const Automaton*> constraints;
    std::vector<float> weights;
    for (const Question& question : questions) {
      for (const Passage& passage : question.passages) {
        tokens.insert(tokens.end(), passage.tokens.begin(), passage.tokens.end());
        passage_offsets.push_back(static_cast<int64_t>(tokens.size()));
        ids_.push_back(passage.id);
        if (options.vote == Vote::kWeighted) weights.push_back(passage.weight);
      }
      question_offsets.push_back(static_cast<int32_t>(passage_offsets.size()) - 1);
      constraints.push_back(question.constraint.get());
    }
    question_offsets_ = question_offsets;
    const bool some = std::any_of(constraints.begin(), constraints.end(),
                                  [](const Automaton* a) { return a != nullptr; });
    if (!some) constraints.clear();
    search_ = std::make_unique<BeamSearch>(options, tokens, passage_offsets, question_offsets,
                                           constraints, weights);
  }

  BeamSearch& search() { return *search_; }
  int32_t encoder_calls() const { return encoder_calls_; }

  // The logits that the search waits for.
  Matrix logits() const {
    const bool first = search_->steps() == 0;
    const StepRequest& request = search_->request();
    const size_t rows = first ? ids_.size() : request.row_passage.size();
    Matrix logits(DType::kFloat32, static_cast<int64_t>(rows), options_.vocabulary_size);
    for (size_t r = 0; r < rows; ++r) {
      const auto passage = first ? r : static_cast<size_t>(request.row_passage[r]);
      const std::vector<float> row = script_.row(ids_[passage], first ? Tokens() : answer(r));
      for (size_t v = 0; v < row.size(); ++v) {
        logits.set(static_cast<int64_t>(r), static_cast<int64_t>(v), row[v]);
      }
    }
    return logits;
  }

  void step() {
    const Matrix rows = logits();
    search_->step(rows.view());
    check_request();
  }

  std::vector<Outcome> run() {
    do {
      step();
    } while (!search_->done());
    CHECK(search_->steps() <= options_.max_tokens);
    std::vector<Outcome> outcomes;
    for (int32_t q = 0; q < search_->num_questions(); ++q) outcomes.push_back(outcome(q));
    return outcomes;
  }

  Outcome outcome(int32_t q) const {
    const auto at = static_cast<size_t>(q);
    const int32_t first = question_offsets_[at], last = question_offsets_[at + 1];
    const auto surviving = search_->surviving().begin();
    const auto voting = search_->voting().begin();
    return {search_->hypotheses(q),
            search_->best(q),
            {surviving + first, surviving + last},
            {voting + first, voting + last}};
  }

 private:
  // The answer so far of row r.
  const Tokens& answer(size_t r) const {
    const StepRequest& request = search_->request();
    const int32_t question = request.questions[static_cast<size_t>(request.row_question[r])];
    return answers_.at(question).at(request.row_column[r]);
  }

  void check_request() {
    const StepRequest& request = search_->request();
    const size_t active = request.questions.size();
    const size_t slots = active * static_cast<size_t>(request.width);
    CHECK_EQ(request.hypotheses.size(), active);
    CHECK_EQ(request.tokens.size(), slots);
    CHECK_EQ(request.depths.size(), slots);
    CHECK_EQ(request.ancestors.size(), slots * static_cast<size_t>(request.columns));
    CHECK_EQ(request.columns - request.width, num_columns_);
    num_columns_ = request.columns;
    encoder_calls_ += request.width > 0;
    int32_t widest = 0;
    for (size_t a = 0; a < active; ++a) widest = std::max(widest, encode(a));
    CHECK_EQ(request.width, widest);
    check_rows();
    CHECK_EQ(search_->done(), active == 0);
    for (int32_t q = 0; q < search_->num_questions(); ++q) {
      const bool goes_on = std::find(request.questions.begin(), request.questions.end(), q) !=
                           request.questions.end();
      CHECK_EQ(search_->live_tokens(q).empty(), !goes_on);
    }
  }

  // Takes the new tokens of an active question; returns their number.
  int32_t encode(size_t a) {
    const StepRequest& request = search_->request();
    const auto width = static_cast<size_t>(request.width);
    const auto columns = static_cast<size_t>(request.columns);
    std::map<int32_t, Tokens>& answers = answers_[request.questions[a]];
    int32_t count = 0;
    for (size_t i = a * width; i < (a + 1) * width; ++i) {
      Tokens seen;
      for (size_t c = 0; c < columns; ++c) {
        if (request.ancestors[i * columns + c] != 0) seen.push_back(static_cast<int32_t>(c));
      }
      if (seen.empty()) {  // padding, behind the tokens
        CHECK_EQ(request.tokens[i], 0);
        CHECK_EQ(request.depths[i], 0);
        continue;
      }
      CHECK_EQ(static_cast<size_t>(count), i - a * width);
      const int32_t column = request.columns - request.width + count++;
      CHECK_EQ(seen.back(), column);
      Tokens tokens;
      for (size_t t = 0; t + 1 < seen.size(); ++t) {
        const Tokens& before = answers.at(seen[t]);
        CHECK_EQ(before.size(), t + 1);
        CHECK(std::equal(tokens.begin(), tokens.end(), before.begin()));
        tokens = before;
      }
      tokens.push_back(request.tokens[i]);
      CHECK_EQ(request.depths[i] + 1, static_cast<int32_t>(tokens.size()));
      CHECK(request.depths[i] < search_->steps() + options_.look_ahead);
      CHECK(request.depths[i] + 1 < options_.max_tokens);
      for (const auto& known : answers) CHECK(known.second != tokens);  // nothing is encoded twice
      answers[column] = tokens;
    }
    return count;
  }

  void check_rows() const {
    const StepRequest& request = search_->request();
    Tokens row_passage, row_question;
    size_t r = 0;
    bool needed = false;  // a row that waited for the encoder
    for (size_t a = 0; a < request.questions.size(); ++a) {
      const int32_t q = request.questions[a];
      const std::vector<Tokens> live = search_->live_tokens(q);
      CHECK_EQ(static_cast<size_t>(request.hypotheses[a]), live.size());
      CHECK(!live.empty());
      const auto at = static_cast<size_t>(q);
      for (int32_t p = question_offsets_[at]; p < question_offsets_[at + 1]; ++p) {
        if (search_->voting()[static_cast<size_t>(p)] == 0) continue;
        for (const Tokens& tokens : live) {
          row_passage.push_back(p);
          row_question.push_back(static_cast<int32_t>(a));
          CHECK_EQ(tokens.size(), static_cast<size_t>(search_->steps()));
          CHECK_EQ(answers_.at(q).at(request.row_column[r]), tokens);
          needed |= request.row_column[r++] >= request.columns - request.width;
        }
      }
    }
    CHECK_EQ(request.row_passage, row_passage);
    CHECK_EQ(request.row_question, row_question);
    CHECK_EQ(request.row_column.size(), r);
    CHECK_EQ(needed, request.width > 0);
  }

  BeamSearchOptions options_;
  const Script& script_;
  std::vector<int32_t> ids_, question_offsets_;
  std::unique_ptr<BeamSearch> search_;
  // Of each question and column, the answer that ends in its token.
  std::map<int32_t, std::map<int32_t, Tokens>> answers_;
  int32_t num_columns_ = 0;
  int32_t encoder_calls_ = 0;
};

// The plain search of one question.
class Naive {
 public:
  Naive(const BeamSearchOptions& options, const Question& question, const Script& script)
      : options_(options), question_(question), script_(script) {}

  Outcome run() {
    Outcome outcome;
    for (const Passage& passage : question_.passages) {
      const std::vector<float> row = script_.row(passage.id, {});
      const auto argmax = std::max_element(row.begin(), row.end()) - row.begin();
      outcome.surviving.push_back(argmax != options_.end_id);
    }
    outcome.voting = outcome.surviving;
    if (std::isfinite(options_.no_answer_ratio)) drop_unsure(&outcome.voting);
    for (size_t p = 0; p < question_.passages.size(); ++p) {
      if (outcome.voting[p] != 0) passages_.push_back(question_.passages[p]);
    }
    if (!passages_.empty()) search();
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return done_[a].score > done_[b].score; });
    for (const size_t i : order_) {
      if (static_cast<int64_t>(i) == best_) {
        outcome.best = static_cast<int32_t>(outcome.hypotheses.size());
      }
      outcome.hypotheses.push_back(done_[i]);
    }
    return outcome;
  }

 private:
  struct Live {
    Tokens tokens;
    float score;
  };

  void drop_unsure(std::vector<uint8_t>* voting) const {
    double least = 1;
    for (size_t p = 0; p < voting->size(); ++p) {
      const bool counts = options_.vote != Vote::kWeighted || question_.passages[p].weight > 0;
      if ((*voting)[p] != 0 && counts) least = std::min(least, no_answer(p));
    }
    for (size_t p = 0; p < voting->size(); ++p) {
      if (no_answer(p) > options_.no_answer_ratio * least) (*voting)[p] = 0;
    }
  }

  double no_answer(size_t p) const {
    const std::vector<float> row = script_.row(question_.passages[p].id, {});
    fastmrc::RowStats stats;
    const auto n = static_cast<int64_t>(row.size());
    fastmrc::row_stats({row.data(), DType::kFloat32, 1, n, n}, &stats);
    return std::exp(static_cast<double>(row[static_cast<size_t>(options_.end_id)]) -
                    stats.logsumexp);
  }

  struct Choice {
    float score;
    int32_t token;
    size_t parent;
  };

  void search() {
    std::vector<Live> live = {{{}, 0.0f}};
    size_t size = static_cast<size_t>(options_.beam_size);
    for (int32_t t = 0; t < options_.max_tokens; ++t) {
      const bool last = t + 1 == options_.max_tokens;
      const bool pool = options_.finish == Finish::kPool;
      std::vector<Choice> chosen = choices(live, t);
      chosen.resize(std::min(chosen.size(), pool && !last ? 2 * size : size));
      const bool stop = !pool && (chosen.empty() || last || ends(chosen[0]));
      std::vector<Live> next;
      if (stop && !chosen.empty()) best_ = static_cast<int64_t>(done_.size());
      for (size_t rank = 0; rank < chosen.size(); ++rank) {
        const Choice& c = chosen[rank];
        Tokens tokens = live[c.parent].tokens;
        if (!ends(c)) tokens.push_back(c.token);
        if (pool ? (ends(c) || last) : (ends(c) || stop)) {
          if (pool && rank < size) enter_pool({tokens, c.score, ends(c)}, t + 1);
          if (!pool) finish({tokens, c.score, ends(c)});
        } else if (next.size() < size) {
          next.push_back({tokens, c.score});
        }
      }
      live = next;
      if (stop) break;
      if (!pool) size -= chosen.size() - next.size();
      if (pool && (live.empty() || settled(live[0].score, t))) break;
    }
    if (options_.finish == Finish::kPool && !done_.empty()) best_ = 0;
  }

  bool ends(const Choice& c) const { return c.token == options_.end_id; }

  void finish(Hypothesis h) {
    order_.push_back(done_.size());
    done_.push_back(std::move(h));
  }

  float normalized(float score, int32_t length) const {
    return static_cast<float>(static_cast<double>(score) /
                              std::pow(length, options_.length_penalty));
  }

  void enter_pool(Hypothesis h, int32_t length) {
    h.score = normalized(h.score, length);
    finish(std::move(h));
    std::stable_sort(done_.begin(), done_.end(),
                     [](const Hypothesis& a, const Hypothesis& b) { return a.score > b.score; });
    if (done_.size() > static_cast<size_t>(options_.beam_size)) {
      done_.pop_back();
      order_.pop_back();
    }
  }

  bool settled(float best_live, int32_t t) const {
    if (done_.size() < static_cast<size_t>(options_.beam_size)) return false;
    const int32_t length = options_.length_penalty > 0 ? options_.max_tokens : t + 2;
    return done_.back().score >= normalized(best_live, length);
  }

  // Whether answer + token is a piece of a voting passage.
  bool is_piece(const Tokens& answer) const {
    return std::any_of(passages_.begin(), passages_.end(), [&](const Passage& p) {
      return std::search(p.tokens.begin(), p.tokens.end(), answer.begin(), answer.end()) !=
             p.tokens.end();
    });
  }

  bool allowed(const Tokens& answer, int32_t token, int32_t t) const {
    const Automaton* automaton = question_.constraint.get();
    int32_t state = Automaton::kRootState;
    for (size_t i = 0; automaton != nullptr && i < answer.size(); ++i) {
      state = automaton->advance(state, answer[i]);
    }
    if (token == options_.end_id) {
      return t >= options_.min_tokens && (automaton == nullptr || automaton->is_final(state));
    }
    if (automaton != nullptr) return automaton->advance(state, token) != Automaton::kDeadState;
    Tokens longer = answer;
    longer.push_back(token);
    return !options_.spans_only || is_piece(longer);
  }

  std::vector<Choice> choices(const std::vector<Live>& live, int32_t t) const {
    std::vector<Choice> all;
    for (size_t k = 0; k < live.size(); ++k) {
      const std::vector<double> votes = vote(live[k].tokens);
      for (int32_t v = 0; v < options_.vocabulary_size; ++v) {
        if (!allowed(live[k].tokens, v, t)) continue;
        const double gain = std::log(votes[static_cast<size_t>(v)] + 1e-12);
        all.push_back({static_cast<float>(static_cast<double>(live[k].score) + gain), v, k});
      }
    }
    std::sort(all.begin(), all.end(), [](const Choice& a, const Choice& b) {
      if (a.score != b.score) return a.score > b.score;
      return a.token != b.token ? a.token < b.token : a.parent < b.parent;
    });
    return all;
  }

  // The log-sum-exp is that of row_stats, so that scores agree bit by bit.
  std::vector<double> vote(const Tokens& answer) const {
    std::vector<double> sum(static_cast<size_t>(options_.vocabulary_size), 0.0);
    std::vector<double> squares(sum), largest(sum), logs(sum), votes(sum);
    for (const Passage& passage : passages_) {
      const std::vector<float> row = script_.row(passage.id, answer);
      fastmrc::RowStats stats;
      const auto n = static_cast<int64_t>(row.size());
      fastmrc::row_stats({row.data(), DType::kFloat32, 1, n, n}, &stats);
      const double w = options_.vote == Vote::kWeighted ? static_cast<double>(passage.weight) : 1.0;
      for (size_t v = 0; v < row.size(); ++v) {
        const double p = std::exp(static_cast<double>(row[v]) - stats.logsumexp);
        sum[v] += w * p;
        squares[v] += w * (p * p);
        largest[v] = std::max(largest[v], p);
        logs[v] += std::log(p + 1e-12);
      }
    }
    const auto n = static_cast<double>(passages_.size());
    for (size_t v = 0; v < votes.size(); ++v) {
      votes[v] = squares[v] / (1 + sum[v]);
      if (options_.vote == Vote::kMean) votes[v] = sum[v] / n;
      if (options_.vote == Vote::kMax) votes[v] = largest[v];
      if (options_.vote == Vote::kProduct) votes[v] = std::exp(logs[v] / n);
    }
    return votes;
  }

  const BeamSearchOptions& options_;
  const Question& question_;
  const Script& script_;
  std::vector<Passage> passages_;  // voting ones
  std::vector<Hypothesis> done_;
  std::vector<size_t> order_;
  int64_t best_ = -1;
};

// Random logits; few different ones where ties are wanted.
class RandomScript : public Script {
 public:
  RandomScript(uint32_t seed, int32_t vocabulary_size, int32_t end_id, bool ties, float end_bias)
      : seed_(seed), size_(vocabulary_size), end_id_(end_id), ties_(ties), end_bias_(end_bias) {}

  std::vector<float> row(int32_t passage, const Tokens& answer) const override {
    std::vector<uint32_t> key = {seed_, static_cast<uint32_t>(passage)};
    // With ties, rows do not depend on the order of the tokens.
    for (const int32_t token : answer) key.push_back(static_cast<uint32_t>(token));
    if (ties_) std::sort(key.begin() + 2, key.end());
    std::seed_seq sequence(key.begin(), key.end());
    std::mt19937 random(sequence);
    std::vector<float> row(static_cast<size_t>(size_));
    for (float& x : row) {
      x = ties_ ? static_cast<float>(random() % 3) : static_cast<float>(random() % 60000) / 10000;
    }
    row[static_cast<size_t>(end_id_)] += end_bias_;
    return row;
  }

 private:
  uint32_t seed_;
  int32_t size_, end_id_;
  bool ties_;
  float end_bias_;
};

Tokens random_tokens(std::mt19937* random, const BeamSearchOptions& options, uint32_t most) {
  Tokens tokens((*random)() % (most + 1));
  for (int32_t& token : tokens) {
    token = static_cast<int32_t>((*random)() % static_cast<uint32_t>(options.vocabulary_size - 1));
    if (token >= options.end_id) ++token;
  }
  return tokens;
}

std::shared_ptr<const Automaton> random_trie(std::mt19937* random,
                                             const BeamSearchOptions& options) {
  Tokens tokens;
  std::vector<int64_t> offsets = {0};
  const auto count = static_cast<int64_t>((*random)() % 8);
  for (int64_t i = 0; i < count; ++i) {
    const Tokens sequence = random_tokens(random, options, 5);
    tokens.insert(tokens.end(), sequence.begin(), sequence.end());
    offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
  return std::make_shared<Automaton>(fastmrc::build_trie(tokens.data(), offsets.data(), count));
}

BeamSearchOptions random_options(std::mt19937* random) {
  BeamSearchOptions options;
  options.vocabulary_size = 4 + static_cast<int32_t>((*random)() % 9);
  options.beam_size = 1 + static_cast<int32_t>((*random)() % 4);
  options.max_tokens = 1 + static_cast<int32_t>((*random)() % 7);
  options.min_tokens = (*random)() % 2 == 0 ? 0 : static_cast<int32_t>((*random)() % 4);
  options.min_tokens = std::min(options.min_tokens, options.max_tokens);
  options.vote = static_cast<Vote>((*random)() % 5);
  options.finish = (*random)() % 2 == 0 ? Finish::kOriginal : Finish::kPool;
  const double penalties[] = {0.0, 1.0, 0.6, 2.0, -0.5};
  options.length_penalty = penalties[(*random)() % 5];
  options.end_id =
      static_cast<int32_t>((*random)() % static_cast<uint32_t>(options.vocabulary_size));
  options.spans_only = (*random)() % 2 == 0;
  options.look_ahead = static_cast<int32_t>((*random)() % 5);
  const double ratios[] = {1.0, 1.5, 4.0, kInf, kInf};
  options.no_answer_ratio = ratios[(*random)() % 5];
  return options;
}

// A batch against the plain search of each question, and each question alone.
void test_random_searches() {
  std::mt19937 random(kSeed);
  int64_t answered = 0, finished_early = 0, calls_saved = 0;
  for (int i = 0; i < 1200; ++i) {
    fastmrc_test::context() = "case " + std::to_string(i);
    const BeamSearchOptions options = random_options(&random);
    const RandomScript script(static_cast<uint32_t>(i), options.vocabulary_size, options.end_id,
                              random() % 3 == 0, static_cast<float>(random() % 7) - 4);
    std::vector<Question> questions(random() % 5);
    int32_t id = 0;
    for (Question& question : questions) {
      question.passages.resize(random() % 4);
      for (Passage& passage : question.passages) {
        passage = {id++, random_tokens(&random, options, 8), static_cast<float>(random() % 4) / 2};
      }
      if (random() % 3 == 0) question.constraint = random_trie(&random, options);
    }
    Driver driver(options, questions, script);
    const std::vector<Outcome> together = driver.run();
    calls_saved += driver.search().steps() - 1 - driver.encoder_calls();
    CHECK_EQ(together.size(), questions.size());
    for (size_t q = 0; q < questions.size(); ++q) {
      check_equal(together[q], Naive(options, questions[q], script).run());
      check_equal(Driver(options, {questions[q]}, script).run()[0], together[q]);
      CHECK(together[q].hypotheses.size() <= static_cast<size_t>(options.beam_size));
      answered += together[q].best >= 0;
      finished_early += together[q].best >= 0 && together[q].hypotheses[0].finished;
    }
  }
  CHECK(answered > 500);  // the cases are worth something
  CHECK(finished_early > 100);
  CHECK(calls_saved > 50);
}

// Probabilities by passage and answer; other answers have the row of passage -1.
class Table : public Script {
 public:
  explicit Table(std::map<std::pair<int32_t, Tokens>, std::vector<double>> rows)
      : rows_(std::move(rows)) {}

  std::vector<float> row(int32_t passage, const Tokens& answer) const override {
    auto found = rows_.find({passage, answer});
    if (found == rows_.end()) found = rows_.find({-1, {}});
    std::vector<float> logits;
    for (const double p : found->second) logits.push_back(static_cast<float>(std::log(p)));
    return logits;
  }

 private:
  std::map<std::pair<int32_t, Tokens>, std::vector<double>> rows_;
};

BeamSearchOptions small_options() {
  BeamSearchOptions options;
  options.beam_size = 2;
  options.max_tokens = 4;
  options.vocabulary_size = 4;
  options.end_id = 0;
  options.spans_only = false;
  options.vote = Vote::kMean;  // of one passage: its probabilities
  return options;
}

// Every token of the passage has one continuation at most.
void test_look_ahead_follows_single_continuations() {
  fastmrc_test::context() = "look-ahead";
  const RandomScript script(1, 6, 0, false, -9);
  BeamSearchOptions options = small_options();
  options.vocabulary_size = 6;
  options.beam_size = 1;
  options.max_tokens = 5;
  options.min_tokens = 5;
  options.spans_only = true;
  const std::vector<Question> questions = {{{{0, {5, 4, 3, 2, 1}, 1}}, nullptr}};
  for (const int32_t look_ahead : {0, 1, 3, 9}) {
    options.look_ahead = look_ahead;
    Driver driver(options, questions, script);
    driver.step();
    const Tokens start = driver.search().live_tokens(0)[0];
    // The last token of the passage has no continuation, and the fifth needs no call.
    const int32_t left = std::min(look_ahead, start[0] - 1);
    CHECK_EQ(driver.search().request().width, 1 + std::min(left, 3));
  }
}

// A request of the encoder's never holds a token that the step would refuse.
void test_look_ahead_leaves_errors_to_the_step() {
  fastmrc_test::context() = "look-ahead and wrong constraints";
  const RandomScript script(1, 4, 0, false, -9);
  BeamSearchOptions options = small_options();
  options.look_ahead = 4;
  for (const int32_t wrong : {0, 4}) {  // the end token, one beyond the vocabulary
    const Tokens sequence = {1, 2, wrong, 3};
    const int64_t offsets[] = {0, 4};
    const auto trie = std::make_shared<Automaton>(fastmrc::build_trie(sequence.data(), offsets, 1));
    Driver driver(options, {{{{0, {}, 1}}, trie}}, script);
    driver.step();
    CHECK_EQ(driver.search().request().width, 2);
    driver.step();
    CHECK_EQ(driver.search().request().width, 0);
    CHECK_THROWS(driver.step(), std::invalid_argument, "constraint");
  }
}

void test_no_answer_ratio() {
  fastmrc_test::context() = "no_answer_ratio";
  const Table script({{{0, {}}, {0.30, 0.40, 0.15, 0.15}},
                      {{1, {}}, {0.45, 0.50, 0.03, 0.02}},
                      {{2, {}}, {0.30, 0.40, 0.15, 0.15}},
                      {{3, {}}, {0.70, 0.10, 0.10, 0.10}},
                      {{4, {}}, {0.20, 0.30, 0.25, 0.25}},
                      {{-1, {}}, {0.25, 0.25, 0.25, 0.25}}});
  BeamSearchOptions options = small_options();
  const std::vector<Question> questions = {
      {{{0, {1}, 1}, {1, {1}, 1}, {2, {1}, 1}, {3, {1}, 1}, {4, {1}, 1}}, nullptr}};
  const std::map<double, std::vector<uint8_t>> expected = {
      {1.0, {0, 0, 0, 0, 1}}, {1.4, {0, 0, 0, 0, 1}}, {1.6, {1, 0, 1, 0, 1}},
      {2.5, {1, 1, 1, 0, 1}}, {9.0, {1, 1, 1, 0, 1}}, {kInf, {1, 1, 1, 0, 1}}};
  for (const auto& [ratio, voting] : expected) {
    options.no_answer_ratio = ratio;
    Driver driver(options, questions, script);
    const Outcome outcome = driver.run()[0];
    CHECK_EQ(outcome.voting, voting);
    CHECK_EQ(outcome.surviving, (std::vector<uint8_t>{1, 1, 1, 0, 1}));
    const std::vector<double>& no_answer = driver.search().no_answer();
    const std::vector<double> by_hand = {0.30, 0.45, 0.30, 0.70, 0.20};
    for (size_t p = 0; p < by_hand.size(); ++p) CHECK(std::abs(no_answer[p] - by_hand[p]) < 1e-6);
  }
  // A passage of weight 0 does not set the bar.
  std::vector<Question> weighted = questions;
  weighted[0].passages[4].weight = 0;
  options.vote = Vote::kWeighted;
  options.no_answer_ratio = 1.2;
  CHECK_EQ(Driver(options, weighted, script).run()[0].voting,
           (std::vector<uint8_t>{1, 0, 1, 0, 1}));
  for (const double wrong : {0.9, -1.0, std::nan("")}) {
    options.no_answer_ratio = wrong;
    CHECK_THROWS(Driver(options, questions, script), std::invalid_argument,
                 "no_answer_ratio: expected a number of at least 1");
  }
}

void check_hypothesis(const Outcome& outcome, size_t i, const Tokens& tokens, double probability,
                      bool finished) {
  CHECK(i < outcome.hypotheses.size());
  if (i >= outcome.hypotheses.size()) return;
  CHECK_EQ(outcome.hypotheses[i].tokens, tokens);
  CHECK_EQ(outcome.hypotheses[i].finished, finished);
  CHECK(std::fabs(static_cast<double>(outcome.hypotheses[i].score) - std::log(probability)) < 1e-5);
}

// Passage 1 prefers the end token, passage 2 does so by a tie that the lower id wins.
void test_passages_without_answer_leave() {
  fastmrc_test::context() = "passages leave";
  const Table script({{{0, {}}, {0.3, 0.4, 0.2, 0.1}},
                      {{1, {}}, {0.7, 0.1, 0.1, 0.1}},
                      {{2, {}}, {0.4, 0.1, 0.1, 0.4}},
                      {{-1, {}}, {0.7, 0.1, 0.1, 0.1}}});
  BeamSearchOptions options = small_options();
  options.spans_only = true;
  // Token 2 stands in passages that left only, so it is not allowed.
  const Question question{{{0, {1, 3}}, {1, {2}}, {2, {2, 3}}}, nullptr};
  const Outcome outcome = Driver(options, {question}, script).run()[0];
  CHECK_EQ(outcome.surviving, (std::vector<uint8_t>{1, 0, 0}));
  CHECK_EQ(outcome.best, 1);
  CHECK_EQ(outcome.hypotheses.size(), size_t{2});
  check_hypothesis(outcome, 0, {}, 0.3, true);  // left the beam at step 0
  check_hypothesis(outcome, 1, {1}, 0.4 * 0.7, true);
  // Where the end token is the highest id, the tie goes to the other token.
  options.end_id = 3;
  const Question last_id{{{2, {2, 1}}}, nullptr};
  CHECK_EQ(Driver(options, {last_id}, script).run()[0].surviving, (std::vector<uint8_t>{1}));
}

// Rule 5 with K = 3: an ended hypothesis behind the best shrinks the beam, one in front ends the
// search.
void test_original_rule() {
  fastmrc_test::context() = "original rule";
  const Table script({{{0, {}}, {0.25, 0.4, 0.3, 0.05}},
                      {{0, {1}}, {0.1, 0.1, 0.7, 0.1}},
                      {{0, {2}}, {0.45, 0.25, 0.2, 0.1}},
                      {{0, {1, 2}}, {0.6, 0.2, 0.1, 0.1}},
                      {{-1, {}}, {0.1, 0.3, 0.3, 0.3}}});
  BeamSearchOptions options = small_options();
  options.beam_size = 3;
  Driver driver(options, {{{{0, {}}}, nullptr}}, script);
  driver.step();  // selected: 1 (0.4), 2 (0.3), end (0.25)
  CHECK(driver.search().live_tokens(0) == (std::vector<Tokens>{{1}, {2}}));
  driver.step();  // two places: 1 2 (0.28), 2 end (0.135); 2 1 (0.075) has none
  CHECK(driver.search().live_tokens(0) == (std::vector<Tokens>{{1, 2}}));
  CHECK_EQ(driver.search().best(0), -1);
  driver.step();  // one place: 1 2 end (0.168)
  CHECK(driver.search().done());
  CHECK_EQ(driver.search().steps(), 3);
  const Outcome outcome = driver.outcome(0);
  CHECK_EQ(outcome.hypotheses.size(), size_t{3});
  check_hypothesis(outcome, 0, {}, 0.25, true);
  check_hypothesis(outcome, 1, {1, 2}, 0.168, true);
  check_hypothesis(outcome, 2, {2}, 0.135, true);
  CHECK_EQ(outcome.best, 1);  // what ended the search, whatever the score of earlier ones
}

// The best of the selected ends at once: the others are returned as they are.
void test_original_rule_at_step_0() {
  fastmrc_test::context() = "end at once";
  const Table script({{{0, {}}, {0.35, 0.4, 0.2, 0.05}},
                      {{1, {}}, {0.35, 0.2, 0.4, 0.05}},
                      {{-1, {}}, {0.1, 0.3, 0.3, 0.3}}});
  const Question question{{{0, {}}, {1, {}}}, nullptr};  // both stay, and together choose the end
  const Outcome outcome = Driver(small_options(), {question}, script).run()[0];
  CHECK_EQ(outcome.best, 0);
  CHECK_EQ(outcome.hypotheses.size(), size_t{2});
  check_hypothesis(outcome, 0, {}, 0.35, true);
  check_hypothesis(outcome, 1, {1}, 0.3, false);
}

void test_pool_rule() {
  fastmrc_test::context() = "pool rule";
  const Table script({{{0, {}}, {0.25, 0.5, 0.2, 0.05}},
                      {{0, {1}}, {0.5, 0.3, 0.1, 0.1}},
                      {{0, {2}}, {0.1, 0.3, 0.3, 0.3}},
                      {{0, {1, 1}}, {0.9, 0.04, 0.03, 0.03}},
                      {{-1, {}}, {0.1, 0.3, 0.3, 0.3}}});
  BeamSearchOptions options = small_options();
  options.finish = Finish::kPool;
  options.length_penalty = 0;
  Driver driver(options, {{{{0, {}}}, nullptr}}, script);
  driver.step();  // end (0.25) enters the pool, and the beam keeps its two places
  CHECK(driver.search().live_tokens(0) == (std::vector<Tokens>{{1}, {2}}));
  // 1 end (0.25) enters too, behind the equal one that was there. The pool is full and its worst is
  // no worse than 1 1 (0.15): settled.
  driver.step();
  CHECK(driver.search().done());
  CHECK_EQ(driver.search().best(0), 0);
  Outcome outcome = driver.outcome(0);
  CHECK_EQ(outcome.hypotheses.size(), size_t{2});
  check_hypothesis(outcome, 0, {}, 0.25, true);
  check_hypothesis(outcome, 1, {1}, 0.25, true);

  // By length: log(0.25) / 1 loses to log(0.25) / 2 and log(0.135) / 3, and the search goes on as
  // long as log(live) / 4 may win.
  options.length_penalty = 1;
  outcome = Driver(options, {{{{0, {}}}, nullptr}}, script).run()[0];
  CHECK_EQ(outcome.best, 0);
  CHECK_EQ(outcome.hypotheses.size(), size_t{2});
  check_hypothesis(outcome, 0, {1, 1}, std::cbrt(0.5 * 0.3 * 0.9), true);
  check_hypothesis(outcome, 1, {1}, std::sqrt(0.25), true);
}

// Ended hypotheses behind the first K are not finished ones, and what the last step cuts enters the
// pool as it is.
void test_pool_rule_ranks_and_last_step() {
  fastmrc_test::context() = "pool ranks";
  const Table script({{{0, {}}, {0.2, 0.45, 0.3, 0.05}}, {{-1, {}}, {0.2, 0.4, 0.3, 0.1}}});
  BeamSearchOptions options = small_options();
  options.finish = Finish::kPool;
  options.length_penalty = 0;
  options.max_tokens = 2;
  const Outcome outcome = Driver(options, {{{{0, {}}}, nullptr}}, script).run()[0];
  CHECK_EQ(outcome.hypotheses.size(), size_t{2});
  check_hypothesis(outcome, 0, {1, 1}, 0.18, false);
  check_hypothesis(outcome, 1, {1, 2}, 0.135, false);
}

void test_lengths() {
  fastmrc_test::context() = "lengths";
  const Table script({{{0, {}}, {0.3, 0.4, 0.2, 0.1}}, {{-1, {}}, {0.97, 0.01, 0.01, 0.01}}});
  for (const Finish finish : {Finish::kOriginal, Finish::kPool}) {
    for (int32_t min_tokens = 0; min_tokens <= 4; ++min_tokens) {
      BeamSearchOptions options = small_options();
      options.finish = finish;
      options.min_tokens = min_tokens;
      const Outcome outcome = Driver(options, {{{{0, {}}}, nullptr}}, script).run()[0];
      CHECK(outcome.best >= 0);
      for (const Hypothesis& h : outcome.hypotheses) {
        CHECK(h.tokens.size() >= static_cast<size_t>(min_tokens));
        CHECK(h.tokens.size() <= 4);
        CHECK_EQ(h.finished, min_tokens < 4);
      }
    }
  }
}

void test_empty_answers() {
  fastmrc_test::context() = "empty answers";
  const Table none({{{-1, {}}, {0.7, 0.1, 0.1, 0.1}}});
  const Question rejected{{{0, {}}, {1, {}}}, nullptr};
  const Question without_passages;
  for (const Finish finish : {Finish::kOriginal, Finish::kPool}) {
    BeamSearchOptions options = small_options();
    options.finish = finish;
    Driver driver(options, {rejected, without_passages}, none);
    CHECK(!driver.search().done());
    driver.step();
    CHECK(driver.search().done());
    CHECK_EQ(driver.search().surviving(), (std::vector<uint8_t>{0, 0}));
    for (int32_t q = 0; q < 2; ++q) {
      CHECK_EQ(driver.search().best(q), -1);
      CHECK(driver.search().hypotheses(q).empty());
    }
    for (const std::vector<Question>& questions :
         {std::vector<Question>{}, std::vector<Question>{without_passages}}) {
      Driver empty(options, questions, none);
      empty.step();  // no rows
      CHECK(empty.search().done());
    }
  }
}

// A constraint without a way on: the hypotheses that ended before remain, none of them is the
// answer of the original rule.
void test_dead_ends() {
  fastmrc_test::context() = "dead ends";
  const Table script({{{0, {}}, {0.3, 0.4, 0.2, 0.1}}, {{-1, {}}, {0.7, 0.1, 0.1, 0.1}}});
  const Tokens tokens = {1, 2};
  const std::vector<int64_t> offsets = {0, 2};
  const auto trie =
      std::make_shared<Automaton>(fastmrc::build_trie(tokens.data(), offsets.data(), 1));
  BeamSearchOptions options = small_options();
  options.max_tokens = 9;
  options.min_tokens = 3;  // beyond the only sequence
  Outcome outcome = Driver(options, {{{{0, {}}}, trie}}, script).run()[0];
  CHECK_EQ(outcome.best, -1);
  CHECK(outcome.hypotheses.empty());
  options.min_tokens = 0;
  outcome = Driver(options, {{{{0, {}}}, trie}}, script).run()[0];
  CHECK_EQ(outcome.best, 0);
  check_hypothesis(outcome, 0, {1, 2}, 0.4 * 0.1 * 0.7, true);
  // Nothing is allowed at all.
  const auto nothing = std::make_shared<Automaton>();
  outcome = Driver(options, {{{{0, {}}}, nothing}}, script).run()[0];
  CHECK_EQ(outcome.best, -1);
  CHECK(outcome.hypotheses.empty());
}

// A search cannot go on after an error, so each one has its own.
void test_step_errors() {
  fastmrc_test::context() = "step errors";
  const Table script({{{0, {}}, {0.1, 0.4, 0.3, 0.2}}, {{-1, {}}, {0.1, 0.7, 0.1, 0.1}}});
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t steps : {0, 1}) {
    const int64_t rows = steps == 0 ? 2 : 4;
    const auto fails = [&](const Matrix* logits, int64_t row, float value,
                           const std::string& part) {
      Driver driver(small_options(), {{{{0, {}}, {1, {}}}, nullptr}}, script);
      for (int64_t i = 0; i < steps; ++i) driver.step();
      Matrix bad = logits == nullptr ? driver.logits() : *logits;
      for (int64_t v = 0; logits == nullptr && v < 4; ++v) bad.set(row, v, value);
      CHECK_THROWS(driver.search().step(bad.view()), std::invalid_argument, part);
    };
    const std::string shape = "logits: expected shape [" + std::to_string(rows) + ", 4], got ";
    const Matrix long_one(DType::kFloat32, rows + 1, 4), wide_one(DType::kFloat32, rows, 5);
    fails(&long_one, 0, 0, shape + "[" + std::to_string(rows + 1) + ", 4]");
    fails(&wide_one, 0, 0, shape + "[" + std::to_string(rows) + ", 5]");
    fails(nullptr, rows - 1, nan, "got NaN in row " + std::to_string(rows - 1));
    fails(nullptr, rows - 1, kInf, "got inf in row " + std::to_string(rows - 1));
    fails(nullptr, rows - 1, -kInf, "got only -inf in row " + std::to_string(rows - 1));
  }
  Driver driver(small_options(), {{{{0, {}}}, nullptr}}, script);
  driver.run();
  for (const int64_t rows : {0, 2}) {
    CHECK_THROWS(driver.search().step(Matrix(DType::kFloat32, rows, 4).view()),
                 std::invalid_argument, "step: the search is done");
  }
}

void test_option_errors() {
  fastmrc_test::context() = "option errors";
  using std::invalid_argument;
  const auto search = [](void (*change)(BeamSearchOptions*)) {
    BeamSearchOptions options = small_options();
    change(&options);
    BeamSearch(options, {}, {0}, {0}, {}, {});
  };
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->beam_size = 0; }), invalid_argument,
               "beam_size: expected at least 1, got 0");
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->beam_size = 5; }), invalid_argument,
               "beam_size: expected at most the vocabulary size 4, got 5");
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->min_tokens = -1; }), invalid_argument,
               "min_tokens: expected at least 0, got -1");
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->max_tokens = 0; }), invalid_argument,
               "max_tokens: expected at least 1, got 0");
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->min_tokens = 5; }), invalid_argument,
               "max_tokens: expected at least 5, got 4");
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->end_id = 4; }), invalid_argument,
               "end_id: expected a token below 4, got 4");
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->end_id = -1; }), invalid_argument, "end_id");
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->vocabulary_size = 0; }), invalid_argument,
               "vocabulary_size: expected at least 1, got 0");
  CHECK_THROWS(search([](BeamSearchOptions* o) { o->length_penalty = std::nan(""); }),
               invalid_argument, "length_penalty: expected a finite number");
}

void test_input_errors() {
  fastmrc_test::context() = "input errors";
  using std::invalid_argument;
  BeamSearchOptions options = small_options();
  CHECK_THROWS(BeamSearch(options, {1, 2}, {0, 3}, {0, 1}, {}, {}), invalid_argument,
               "passage_offsets: expected offsets rising from 0 to 2");
  CHECK_THROWS(BeamSearch(options, {1, 2}, {0, 2, 1, 2}, {0, 3}, {}, {}), invalid_argument,
               "passage_offsets");
  CHECK_THROWS(BeamSearch(options, {}, {}, {0}, {}, {}), invalid_argument, "passage_offsets");
  CHECK_THROWS(BeamSearch(options, {1}, {0, 1}, {0, 2}, {}, {}), invalid_argument,
               "question_offsets: expected offsets rising from 0 to 1");
  CHECK_THROWS(BeamSearch(options, {1}, {0, 1}, {1}, {}, {}), invalid_argument, "question_offsets");
  CHECK_THROWS(
      BeamSearch(options, {1, 4}, {0, 2}, {0, 1}, {}, {}), invalid_argument,
      "passages: expected tokens in [0, 4) other than the end token 0, got 4 at position 1");
  CHECK_THROWS(BeamSearch(options, {1, 0}, {0, 2}, {0, 1}, {}, {}), invalid_argument,
               "got 0 at position 1");
  CHECK_THROWS(BeamSearch(options, {-1}, {0, 1}, {0, 1}, {}, {}), invalid_argument,
               "got -1 at position 0");
  CHECK_THROWS(BeamSearch(options, {1}, {0, 1}, {0, 1}, {nullptr, nullptr}, {}), invalid_argument,
               "constraints: expected one per question, 1, got 2");
  CHECK_THROWS(BeamSearch(options, {1}, {0, 1}, {0, 1}, {}, {1.0f}), invalid_argument,
               "weights: expected none unless vote is weighted, got 1");
  options.vote = Vote::kWeighted;
  CHECK_THROWS(BeamSearch(options, {1}, {0, 1}, {0, 1}, {}, {}), invalid_argument,
               "weights: expected one per passage, 1, got 0");
  for (const float weight : {-1.0f, kInf, std::nanf("")}) {
    CHECK_THROWS(BeamSearch(options, {1}, {0, 1}, {0, 1}, {}, {weight}), invalid_argument,
                 "weights: expected finite numbers >= 0");
  }
}

}  // namespace

int main() {
  std::cout << "seed " << kSeed << std::endl;
  test_random_searches();
  test_look_ahead_follows_single_continuations();
  test_look_ahead_leaves_errors_to_the_step();
  test_no_answer_ratio();
  test_passages_without_answer_leave();
  test_original_rule();
  test_original_rule_at_step_0();
  test_pool_rule();
  test_pool_rule_ranks_and_last_step();
  test_lengths();
  test_empty_answers();
  test_dead_ends();
  test_step_errors();
  test_option_errors();
  test_input_errors();
  return fastmrc_test::report();
}
