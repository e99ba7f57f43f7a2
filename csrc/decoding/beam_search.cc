#include "fastmrc/beam_search.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/thread_pool.h"

namespace fastmrc {
namespace {

// Indexing a token takes about as long as reading so many floats.
constexpr int64_t kLanesPerToken = 256;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

template <typename T>
void check_offsets(const char* name, const std::vector<T>& offsets, size_t end) {
  const bool rises = !offsets.empty() && offsets.front() == 0 &&
                     std::is_sorted(offsets.begin(), offsets.end()) &&
                     static_cast<size_t>(offsets.back()) == end;
  if (!rises) {
    fail(std::string(name) + ": expected offsets rising from 0 to " + std::to_string(end));
  }
}

}  // namespace

BeamSearch::BeamSearch(const BeamSearchOptions& options, std::vector<int32_t> tokens,
                       std::vector<int64_t> passage_offsets, std::vector<int32_t> question_offsets,
                       std::vector<const Automaton*> constraints, std::vector<float> weights)
    : options_(options),
      tokens_(std::move(tokens)),
      passage_offsets_(std::move(passage_offsets)),
      question_offsets_(std::move(question_offsets)),
      constraints_(std::move(constraints)),
      weights_(std::move(weights)) {
  check_input();
  surviving_.assign(passage_offsets_.size() - 1, 1);
  voting_ = surviving_;
  no_answer_.assign(surviving_.size(), 0.0);
  beams_.resize(static_cast<size_t>(num_questions()));
  for (int32_t q = 0; q < num_questions(); ++q) {
    Beam& beam = beams_[static_cast<size_t>(q)];
    beam.size = options_.beam_size;
    beam.scores = {0.0f};
    beam.states = {Automaton::kRootState};
    beam.nodes = {TokenTree::kNone};
    for (int32_t p = question_offsets_[static_cast<size_t>(q)];
         p < question_offsets_[static_cast<size_t>(q) + 1]; ++p) {
      beam.passages.push_back(p);
    }
  }
}

void BeamSearch::check_input() const {
  check_at_least("vocabulary_size", options_.vocabulary_size, 1);
  check_at_least("beam_size", options_.beam_size, 1);
  if (options_.beam_size > options_.vocabulary_size) {
    fail("beam_size: expected at most the vocabulary size " +
         std::to_string(options_.vocabulary_size) + ", got " + std::to_string(options_.beam_size));
  }
  check_at_least("min_tokens", options_.min_tokens, 0);
  check_at_least("max_tokens", options_.max_tokens, std::max(1, options_.min_tokens));
  check_at_least("look_ahead", options_.look_ahead, 0);
  if (!(options_.no_answer_ratio >= 1)) fail("no_answer_ratio: expected a number of at least 1");
  check_end_id(options_.end_id, options_.vocabulary_size);
  if (!std::isfinite(options_.length_penalty)) fail("length_penalty: expected a finite number");
  check_offsets("passage_offsets", passage_offsets_, tokens_.size());
  check_offsets("question_offsets", question_offsets_, passage_offsets_.size() - 1);
  for (size_t i = 0; i < tokens_.size(); ++i) {
    if (tokens_[i] < 0 || tokens_[i] >= options_.vocabulary_size || tokens_[i] == options_.end_id) {
      fail("passages: expected tokens in [0, " + std::to_string(options_.vocabulary_size) +
           ") other than the end token " + std::to_string(options_.end_id) + ", got " +
           std::to_string(tokens_[i]) + " at position " + std::to_string(i));
    }
  }
  if (!constraints_.empty() && constraints_.size() + 1 != question_offsets_.size()) {
    fail("constraints: expected one per question, " + std::to_string(question_offsets_.size() - 1) +
         ", got " + std::to_string(constraints_.size()));
  }
  const bool weighted = options_.vote == Vote::kWeighted;
  if (weights_.size() != (weighted ? passage_offsets_.size() - 1 : 0)) {
    fail(weighted
             ? "weights: expected one per passage, " + std::to_string(passage_offsets_.size() - 1) +
                   ", got " + std::to_string(weights_.size())
             : "weights: expected none unless vote is weighted, got " +
                   std::to_string(weights_.size()));
  }
  for (const float w : weights_) {
    if (!(w >= 0) || !std::isfinite(w)) fail("weights: expected finite numbers >= 0");
  }
}

void BeamSearch::step(const Rows& logits) {
  if (done()) fail("step: the search is done");
  const int64_t expected = step_ == 0 ? static_cast<int64_t>(surviving_.size())
                                      : static_cast<int64_t>(request_.row_passage.size());
  check_shape(logits, expected, options_.vocabulary_size);
  stats_.resize(static_cast<size_t>(logits.rows));
  row_stats(logits, stats_.data());
  if (step_ == 0) {
    choose_passages(logits);
    build_constraints();
  }
  select(logits);
  ++step_;
  prepare_request();
}

void BeamSearch::choose_passages(const Rows& logits) {
  for (int64_t p = 0; p < logits.rows; ++p) {
    const RowStats& stats = stats_[static_cast<size_t>(p)];
    if (stats.argmax < 0) throw_all_masked(p);
    surviving_[static_cast<size_t>(p)] = stats.argmax != options_.end_id;
    const float end = kernels().load_one(logits.row(p), logits.dtype, options_.end_id);
    no_answer_[static_cast<size_t>(p)] = std::exp(static_cast<double>(end) - stats.logsumexp);
  }
  voting_ = surviving_;
  for (Beam& beam : beams_) {
    if (std::isfinite(options_.no_answer_ratio)) drop_unsure_passages(beam);
    beam.passages.erase(
        std::remove_if(beam.passages.begin(), beam.passages.end(),
                       [&](int32_t p) { return voting_[static_cast<size_t>(p)] == 0; }),
        beam.passages.end());
    if (beam.passages.empty()) close(beam);
  }
}

// Passages of weight 0 do not set the bar.
void BeamSearch::drop_unsure_passages(const Beam& beam) {
  double least = 1.0;
  for (const int32_t p : beam.passages) {
    const auto i = static_cast<size_t>(p);
    const bool counts = surviving_[i] != 0 && (weights_.empty() || weights_[i] > 0);
    if (counts) least = std::min(least, no_answer_[i]);
  }
  for (const int32_t p : beam.passages) {
    const auto i = static_cast<size_t>(p);
    if (no_answer_[i] > options_.no_answer_ratio * least) voting_[i] = 0;
  }
}

// The span index waits for step 0, because only then the passages it may cover are known.
void BeamSearch::build_constraints() {
  parallel_for_work(
      static_cast<int64_t>(tokens_.size()) * kLanesPerToken, num_questions(), [&](int64_t i) {
        Beam& beam = beams_[static_cast<size_t>(i)];
        if (beam.done) return;
        if (!constraints_.empty()) beam.constraint = constraints_[static_cast<size_t>(i)];
        if (beam.constraint != nullptr || !options_.spans_only) return;
        std::vector<int32_t> tokens;
        std::vector<int64_t> offsets = {0};
        for (const int32_t p : beam.passages) {
          const auto first = static_cast<std::ptrdiff_t>(passage_offsets_[static_cast<size_t>(p)]);
          const auto last =
              static_cast<std::ptrdiff_t>(passage_offsets_[static_cast<size_t>(p) + 1]);
          tokens.insert(tokens.end(), tokens_.begin() + first, tokens_.begin() + last);
          offsets.push_back(static_cast<int64_t>(tokens.size()));
        }
        beam.index = std::make_unique<SpanIndex>(tokens.data(), offsets.data(),
                                                 static_cast<int32_t>(beam.passages.size()));
        beam.constraint = &beam.index->automaton();
      });
}

void BeamSearch::select(const Rows& logits) {
  step_passages_.clear();
  step_hypotheses_.clear();
  step_states_.clear();
  step_scores_.clear();
  step_weights_.clear();
  step_constraints_.clear();
  row_of_.clear();
  int32_t width = 1;
  for (const Beam& beam : beams_) {
    if (beam.done) continue;
    step_passages_.push_back(static_cast<int32_t>(beam.passages.size()));
    step_hypotheses_.push_back(static_cast<int32_t>(beam.scores.size()));
    step_states_.insert(step_states_.end(), beam.states.begin(), beam.states.end());
    step_scores_.insert(step_scores_.end(), beam.scores.begin(), beam.scores.end());
    step_constraints_.push_back(beam.constraint);
    for (const int32_t p : beam.passages) {
      if (step_ == 0) row_of_.push_back(p);
      if (!weights_.empty()) step_weights_.push_back(weights_[static_cast<size_t>(p)]);
    }
    width = std::max(width, beam.size);
  }
  // Of the best 2K candidates at most K are finished ones, so K live ones remain.
  if (options_.finish == Finish::kPool && !last_step()) width *= 2;
  allow_end_.assign(step_passages_.size(), step_ >= options_.min_tokens);
  BeamStep step;
  step.logits = logits;
  step.stats = stats_.data();
  step.num_questions = static_cast<int32_t>(step_passages_.size());
  step.passages = step_passages_.data();
  step.hypotheses = step_hypotheses_.data();
  step.row_of = step_ == 0 ? row_of_.data() : nullptr;
  step.scores = step_scores_.data();
  step.states = step_states_.data();
  step.constraints = step_constraints_.data();
  step.allow_end = allow_end_.data();
  step.weights = step_weights_.data();
  step.vote = options_.vote;
  step.end_id = options_.end_id;
  step.width = width;
  beam_step(step, workspace_, candidates_);
  size_t next = 0;
  for (Beam& beam : beams_) {
    if (beam.done) continue;
    std::vector<Candidate>& candidates = candidates_[next++];
    if (options_.finish == Finish::kPool) {
      finish_pool(beam, candidates);
    } else {
      if (candidates.size() > static_cast<size_t>(beam.size)) {
        candidates.resize(static_cast<size_t>(beam.size));
      }
      finish_original(beam, candidates);
    }
  }
}

int32_t BeamSearch::add_node(int32_t token, int32_t parent) {
  node_ahead_.push_back(TokenTree::kNone);
  return tree_.add(token, parent);
}

// The node of the candidate's token, added to the tree of hypotheses unless it was looked ahead to;
// the end token is not kept.
int32_t BeamSearch::node_of(const Beam& beam, const Candidate& candidate) {
  const int32_t parent = beam.nodes[static_cast<size_t>(candidate.parent)];
  if (candidate.token == options_.end_id) return parent;
  if (parent != TokenTree::kNone) {
    // There is one continuation only, so the candidate is it.
    const int32_t ahead = node_ahead_[static_cast<size_t>(parent)];
    if (ahead != TokenTree::kNone) return ahead;
  }
  return add_node(candidate.token, parent);
}

void BeamSearch::finish_original(Beam& beam, const std::vector<Candidate>& candidates) {
  if (candidates.empty()) {
    close(beam);
    return;
  }
  const bool finished = candidates.front().token == options_.end_id;
  if (finished || last_step()) {
    const auto answer = static_cast<int32_t>(beam.entries.size());
    for (const Candidate& c : candidates) {
      const int32_t node = node_of(beam, c);
      beam.entries.push_back({node, c.score, c.token == options_.end_id});
    }
    beam.best = answer;
    close(beam);
    return;
  }
  live_.clear();
  for (const Candidate& c : candidates) {
    if (c.token == options_.end_id) {
      beam.entries.push_back({node_of(beam, c), c.score, true});
      --beam.size;
    } else {
      live_.push_back(c);
    }
  }
  go_on_with(beam, live_);
}

void BeamSearch::finish_pool(Beam& beam, const std::vector<Candidate>& candidates) {
  const auto size = static_cast<size_t>(beam.size);
  live_.clear();
  for (size_t rank = 0; rank < candidates.size(); ++rank) {
    const Candidate& c = candidates[rank];
    if (c.token == options_.end_id || last_step()) {
      if (rank < size) add_to_pool(beam, c, node_of(beam, c), step_ + 1);
    } else if (live_.size() < size) {
      live_.push_back(c);
    }
  }
  go_on_with(beam, live_);
  if (live_.empty() || pool_is_settled(beam)) {
    beam.best = beam.entries.empty() ? -1 : 0;
    close(beam);
  }
}

float BeamSearch::normalized(float score, int32_t length) const {
  return static_cast<float>(static_cast<double>(score) /
                            std::pow(static_cast<double>(length), options_.length_penalty));
}

// Keeps the pool sorted: score falling, earlier entries first among equals.
void BeamSearch::add_to_pool(Beam& beam, const Candidate& candidate, int32_t node,
                             int32_t length) const {
  const Entry entry{node, normalized(candidate.score, length), candidate.token == options_.end_id};
  const auto place =
      std::upper_bound(beam.entries.begin(), beam.entries.end(), entry,
                       [](const Entry& a, const Entry& b) { return a.score > b.score; });
  beam.entries.insert(place, entry);
  if (beam.entries.size() > static_cast<size_t>(beam.size)) beam.entries.pop_back();
}

// Scores only fall, so a live hypothesis ends at best with its present score over the most
// favourable length.
bool BeamSearch::pool_is_settled(const Beam& beam) const {
  if (beam.entries.size() < static_cast<size_t>(beam.size)) return false;
  const int32_t length = options_.length_penalty > 0 ? options_.max_tokens : step_ + 2;
  return beam.entries.back().score >= normalized(beam.scores.front(), length);
}

void BeamSearch::go_on_with(Beam& beam, const std::vector<Candidate>& live) {
  next_nodes_.clear();
  next_states_.clear();
  next_scores_.clear();
  for (const Candidate& c : live) {
    const int32_t state = beam.states[static_cast<size_t>(c.parent)];
    next_nodes_.push_back(node_of(beam, c));
    next_scores_.push_back(c.score);
    next_states_.push_back(beam.constraint == nullptr ? state
                                                      : beam.constraint->advance(state, c.token));
  }
  beam.nodes.swap(next_nodes_);
  beam.states.swap(next_states_);
  beam.scores.swap(next_scores_);
}

// Sorts the n-best list; `best` follows its entry.
void BeamSearch::close(Beam& beam) {
  std::vector<size_t> order(beam.entries.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return beam.entries[a].score > beam.entries[b].score;
  });
  std::vector<Entry> sorted;
  int32_t best = -1;
  for (size_t i = 0; i < order.size(); ++i) {
    if (static_cast<int32_t>(order[i]) == beam.best) best = static_cast<int32_t>(i);
    sorted.push_back(beam.entries[order[i]]);
  }
  beam.entries = std::move(sorted);
  beam.best = best;
  beam.done = true;
  beam.nodes.clear();
  beam.states.clear();
  beam.scores.clear();
  beam.index.reset();
}

void BeamSearch::prepare_request() {
  StepRequest& request = request_;
  request.questions.clear();
  request.hypotheses.clear();
  bool encoded = true;
  for (int32_t q = 0; q < num_questions(); ++q) {
    const Beam& beam = beams_[static_cast<size_t>(q)];
    if (beam.done) continue;
    request.questions.push_back(q);
    request.hypotheses.push_back(static_cast<int32_t>(beam.nodes.size()));
    for (const int32_t node : beam.nodes) {
      encoded = encoded && tree_.column(node) >= 0;
    }
  }
  fresh_.resize(request.questions.size());
  request.width = 0;
  for (size_t a = 0; a < fresh_.size(); ++a) {
    fresh_[a].clear();
    if (encoded) continue;
    plan_tree(beams_[static_cast<size_t>(request.questions[a])], fresh_[a]);
    request.width = std::max(request.width, static_cast<int32_t>(fresh_[a].size()));
  }
  tree_.list(fresh_, request);
  list_rows();
}

// Appends the nodes of a question that are not encoded: its live hypotheses and, where their
// constraint leaves one continuation besides the end token, that and what follows it. Not for
// several questions: one of them would ask for a call all the same, and the others would be padded
// to it.
void BeamSearch::plan_tree(const Beam& beam, std::vector<int32_t>& fresh) {
  const bool alone = request_.questions.size() == 1;
  const int32_t most = alone ? std::min(options_.look_ahead, options_.max_tokens - 1 - step_) : 0;
  for (size_t k = 0; k < beam.nodes.size(); ++k) {
    int32_t node = beam.nodes[k];
    int32_t state = beam.states[k];
    if (tree_.column(node) < 0) fresh.push_back(node);
    for (int32_t i = 0; i < most && beam.constraint != nullptr; ++i) {
      const AllowedTokens allowed = beam.constraint->allowed(state);
      if (allowed.size() != 1) break;
      const int32_t token = *allowed.begin;
      // A constraint may hold tokens that the beam step refuses once it comes to them.
      if (token >= options_.vocabulary_size || token == options_.end_id) break;
      if (node_ahead_[static_cast<size_t>(node)] == TokenTree::kNone) {
        const int32_t ahead = add_node(token, node);
        node_ahead_[static_cast<size_t>(node)] = ahead;
        fresh.push_back(ahead);
      }
      node = node_ahead_[static_cast<size_t>(node)];
      state = *allowed.targets;
    }
  }
}

void BeamSearch::list_rows() {
  StepRequest& request = request_;
  request.row_passage.clear();
  request.row_question.clear();
  request.row_column.clear();
  for (size_t a = 0; a < request.questions.size(); ++a) {
    const Beam& beam = beams_[static_cast<size_t>(request.questions[a])];
    for (const int32_t p : beam.passages) {
      for (const int32_t node : beam.nodes) {
        request.row_passage.push_back(p);
        request.row_question.push_back(static_cast<int32_t>(a));
        request.row_column.push_back(tree_.column(node));
      }
    }
  }
}

std::vector<Hypothesis> BeamSearch::hypotheses(int32_t question) const {
  std::vector<Hypothesis> result;
  for (const Entry& entry : beams_[static_cast<size_t>(question)].entries) {
    result.push_back({tree_.path(entry.node), entry.score, entry.finished});
  }
  return result;
}

std::vector<std::vector<int32_t>> BeamSearch::live_tokens(int32_t question) const {
  std::vector<std::vector<int32_t>> result;
  for (const int32_t node : beams_[static_cast<size_t>(question)].nodes) {
    result.push_back(tree_.path(node));
  }
  return result;
}

}  // namespace fastmrc
