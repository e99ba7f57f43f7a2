#include "fastmrc/sampling.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace fastmrc {

SequenceSampler::SequenceSampler(const SamplingOptions& options, std::vector<int32_t> sequences,
                                 std::vector<const Automaton*> constraints)
    : options_(options), counts_(std::move(sequences)), constraints_(std::move(constraints)) {
  check_input();
  first_of_.push_back(0);
  for (int32_t q = 0; q < num_prompts(); ++q) {
    row_prompt_.push_back(q);
    row_state_.push_back(Automaton::kRootState);
    for (int32_t i = 0; i < counts_[static_cast<size_t>(q)]; ++i) {
      live_.push_back({static_cast<int32_t>(prompt_of_.size()), TokenTree::kNone, q, -1});
      prompt_of_.push_back(q);
    }
    first_of_.push_back(prompt_of_.size());
  }
  last_node_.assign(prompt_of_.size(), TokenTree::kNone);
  ends_.assign(prompt_of_.size(), 0);
  log_prob_.assign(prompt_of_.size(), 0.0);
  finished_.assign(prompt_of_.size(), 0);
}

void SequenceSampler::check_input() const {
  check_at_least("vocabulary_size", options_.vocabulary_size, 1);
  check_at_least("min_tokens", options_.min_tokens, 0);
  check_at_least("max_tokens", options_.max_tokens, std::max(1, options_.min_tokens));
  check_at_least("min_ends", options_.min_ends, 1);
  check_end_id(options_.end_id, options_.vocabulary_size);
  for (const int32_t count : counts_) check_at_least("sequences", count, 0);
  if (!constraints_.empty() && constraints_.size() != counts_.size()) {
    throw std::invalid_argument("constraints: expected one per prompt, " +
                                std::to_string(counts_.size()) + ", got " +
                                std::to_string(constraints_.size()));
  }
}

const Automaton* SequenceSampler::constraint_of(int32_t prompt) const {
  return constraints_.empty() ? nullptr : constraints_[static_cast<size_t>(prompt)];
}

void SequenceSampler::step(const Rows& logits) {
  if (done()) throw std::invalid_argument("step: the sampling is done");
  check_shape(logits, static_cast<int64_t>(row_prompt_.size()), options_.vocabulary_size);
  draw(logits);
  go_on();
}

void SequenceSampler::go_on() {
  finish();
  extend();
  ++step_;
  prepare_request();
}

void SequenceSampler::take(const int32_t* tokens, const double* log_probs) {
  for (size_t d = 0; d < live_.size(); ++d) {
    if (tokens[d] >= -1 && tokens[d] < options_.vocabulary_size) continue;
    throw std::invalid_argument("tokens: expected -1 or tokens below " +
                                std::to_string(options_.vocabulary_size) + ", got " +
                                std::to_string(tokens[d]));
  }
  tokens_.assign(tokens, tokens + live_.size());
  log_probs_.assign(log_probs, log_probs + live_.size());
  go_on();
}

SequenceSampler::Draws SequenceSampler::prepare_draws() {
  const size_t rows = row_prompt_.size(), draws = live_.size();
  row_constraint_.resize(rows);
  for (size_t r = 0; r < rows; ++r) row_constraint_[r] = constraint_of(row_prompt_[r]);
  row_of_.resize(draws);
  streams_.resize(draws);
  for (size_t d = 0; d < draws; ++d) {
    const auto i = static_cast<size_t>(live_[d].sequence);
    row_of_[d] = live_[d].row;
    streams_[d] = options_.first_stream + (i - first_of_[static_cast<size_t>(prompt_of_[i])]);
  }
  return {row_of_, streams_, row_prompt_, row_state_};
}

void SequenceSampler::draw(const Rows& logits) {
  prepare_draws();
  const size_t rows = row_prompt_.size(), draws = live_.size();
  allow_end_.assign(rows, step_ >= options_.min_tokens);
  positions_.assign(draws, static_cast<uint32_t>(step_));
  tokens_.resize(draws);
  log_probs_.resize(draws);
  SampleStep step;
  step.logits = logits;
  step.constraints = row_constraint_.data();
  step.states = row_state_.data();
  step.allow_end = allow_end_.data();
  step.end_id = options_.end_id;
  step.top_k = options_.top_k;
  step.top_p = options_.top_p;
  step.temperature = options_.temperature;
  step.seed = options_.seed;
  step.draws = static_cast<int64_t>(draws);
  step.row_of = row_of_.data();
  step.streams = streams_.data();
  step.positions = positions_.data();
  sample(step, workspace_, tokens_.data(), log_probs_.data());
}

// Notes what was drawn and takes out the sequences that are finished or have no continuation.
void SequenceSampler::finish() {
  size_t kept = 0;
  for (size_t d = 0; d < live_.size(); ++d) {
    Live live = live_[d];
    live.token = tokens_[d];
    if (live.token < 0) continue;
    const auto i = static_cast<size_t>(live.sequence);
    log_prob_[i] += log_probs_[d];
    finished_[i] = live.token == options_.end_id && ++ends_[i] == options_.min_ends;
    if (finished_[i] == 0) live_[kept++] = live;
  }
  live_.resize(kept);
}

// Appends the tokens drawn to the tree, equal ones after the same node once.
void SequenceSampler::extend() {
  // Rows are distinct beginnings, those of a prompt together.
  std::sort(live_.begin(), live_.end(), [](const Live& a, const Live& b) {
    return std::tie(a.row, a.token, a.sequence) < std::tie(b.row, b.token, b.sequence);
  });
  int32_t row = -1, token = -1;
  for (Live& live : live_) {
    if (live.row != row || live.token != token) {
      row = live.row;
      token = live.token;
      const auto r = static_cast<size_t>(row);
      const Automaton* constraint = row_constraint_[r];
      int32_t state = Automaton::kRootState;
      if (constraint != nullptr && token != options_.end_id) {
        state = constraint->advance(row_state_[r], token);
      }
      node_state_.push_back(state);
      live.node = tree_.add(token, live.node);
    } else {
      live.node = static_cast<int32_t>(node_state_.size()) - 1;
    }
    last_node_[static_cast<size_t>(live.sequence)] = live.node;
  }
  if (step_ + 1 == options_.max_tokens) live_.clear();
}

void SequenceSampler::prepare_request() {
  StepRequest& request = request_;
  request.questions.clear();
  request.hypotheses.clear();
  request.row_passage.clear();
  request.row_question.clear();
  request.row_column.clear();
  row_prompt_.clear();
  row_state_.clear();
  fresh_.clear();
  int32_t node = TokenTree::kNone;
  for (Live& live : live_) {
    const int32_t prompt = prompt_of_[static_cast<size_t>(live.sequence)];
    if (request.questions.empty() || request.questions.back() != prompt) {
      request.questions.push_back(prompt);
      fresh_.emplace_back();
    }
    if (live.node != node) {
      node = live.node;
      fresh_.back().push_back(node);
      row_prompt_.push_back(prompt);
      row_state_.push_back(node_state_[static_cast<size_t>(node)]);
      request.row_passage.push_back(prompt);
      request.row_question.push_back(static_cast<int32_t>(fresh_.size()) - 1);
    }
    live.row = static_cast<int32_t>(row_prompt_.size()) - 1;
  }
  request.width = 0;
  for (const std::vector<int32_t>& nodes : fresh_) {
    request.hypotheses.push_back(static_cast<int32_t>(nodes.size()));
    request.width = std::max(request.width, request.hypotheses.back());
  }
  tree_.list(fresh_, request);
  for (const std::vector<int32_t>& nodes : fresh_) {
    for (const int32_t n : nodes) request.row_column.push_back(tree_.column(n));
  }
}

std::vector<SampledSequence> SequenceSampler::sequences(int32_t prompt) const {
  std::vector<SampledSequence> result;
  const auto q = static_cast<size_t>(prompt);
  for (size_t i = first_of_[q]; i < first_of_[q + 1]; ++i) {
    result.push_back({tree_.path(last_node_[i]), log_prob_[i], finished_[i] != 0});
  }
  return result;
}

}  // namespace fastmrc
