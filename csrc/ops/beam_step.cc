#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>

#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {
namespace {

// Tokens of the vocabulary that one task scores in the unconstrained mode.
constexpr int64_t kPartTokens = 8192;
// Tokens whose approximate votes are held at once, on the stack.
constexpr int64_t kBlockTokens = 1024;
// The approximate vote decides only what is certain: relative error of float32 exponentials over
// all votes stays below 2e-5, and float32 sums add 1e-6 per passage (sums of logarithms down to
// log(kEps), as rounded, are off by up to 28 * passages * 2^-25 in the mean); the rounding of
// scores to float32 adds a part that grows with them.
// Nothing is certain with weights so large that probabilities below the least float32 count.
double filter_factor(const VoteRows& rows, float score) {
  constexpr float kLargeWeight = 1e25f;
  for (int32_t p = 0; rows.vote == Vote::kWeighted && p < rows.passages; ++p) {
    if (rows.weights[p] > kLargeWeight) return 0;
  }
  return 1.0 - 1e-4 - 2e-6 * rows.passages - 1e-6 * static_cast<double>(std::fabs(score));
}

// The rows of one hypothesis and the vote over them in double precision, passages in order.
class HypothesisRows {
 public:
  HypothesisRows(const BeamStep& step, const BeamStepWorkspace& space, int32_t question,
                 int32_t hypothesis)
      : step_(step), passages_(step.passages[question]) {
    const auto q = static_cast<size_t>(question);
    const int64_t first = space.first_row[q] + static_cast<int64_t>(hypothesis) * passages_;
    data_ = space.row_data.data() + first;
    logsumexp_ = space.row_logsumexp.data() + first;
    if (step.vote == Vote::kWeighted) weights_ = step.weights + space.first_passage[q];
    score_ = step.scores[space.first_hypothesis[q] + hypothesis];
  }

  float score_of(int32_t token) const {
    return static_cast<float>(static_cast<double>(score_) + std::log(vote(token) + kEps));
  }

  float score() const { return score_; }

  VoteRows view() const {
    return {data_, step_.logits.dtype, logsumexp_, weights_, passages_, step_.vote};
  }

 private:
  double probability(int32_t p, int32_t token) const {
    const float logit = load_one_(data_[p], step_.logits.dtype, token);
    return std::exp(static_cast<double>(logit) - logsumexp_[p]);
  }

  double vote(int32_t token) const {
    double first = 0, second = 0;
    for (int32_t p = 0; p < passages_; ++p) {
      const double x = probability(p, token);
      switch (step_.vote) {
        case Vote::kMean:
          first += x;
          break;
        case Vote::kMax:
          first = std::max(first, x);
          break;
        case Vote::kProduct:
          first += std::log(x + kEps);
          break;
        case Vote::kOriginal:
          first += x;
          second += x * x;
          break;
        case Vote::kWeighted: {
          const double w = static_cast<double>(weights_[p]);
          first += w * x;
          second += w * (x * x);
          break;
        }
      }
    }
    switch (step_.vote) {
      case Vote::kMean:
        return first / passages_;
      case Vote::kMax:
        return first;
      case Vote::kProduct:
        return std::exp(first / passages_);
      default:
        return second / (1.0 + first);
    }
  }

  const BeamStep& step_;
  int32_t passages_;
  float score_ = 0;
  const void* const* data_ = nullptr;  // [passages]
  const double* logsumexp_ = nullptr;  // [passages]
  const float* weights_ = nullptr;     // [passages], vote kWeighted only
  float (*load_one_)(const void*, DType, int64_t) = kernels().load_one;
};

// Keeps the best `width` of `found`, sorted.
void keep_best(std::vector<Candidate>& found, int32_t width) {
  const auto kept = std::min<size_t>(found.size(), static_cast<size_t>(width));
  std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(kept), found.end(),
                    better);
  found.resize(kept);
}

// The `width` largest approximate votes so far; their least is the bar for new ones.
class Bar {
 public:
  Bar(int32_t width, double factor, std::vector<float>& heap)
      : width_(static_cast<size_t>(width)), factor_(factor), heap_(heap) {
    heap_.clear();
  }

  // Below this a vote can no longer reach the best `width`.
  float value() const { return value_; }

  void add(float vote) {
    if (heap_.size() == width_) {
      if (vote <= heap_.front()) return;
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<float>());
      heap_.pop_back();
    }
    heap_.push_back(vote);
    std::push_heap(heap_.begin(), heap_.end(), std::greater<float>());
    if (heap_.size() == width_) {
      value_ = static_cast<float>(static_cast<double>(heap_.front()) * factor_);
    }
  }

 private:
  size_t width_;
  double factor_;
  float value_ = 0;  // votes are never negative: all pass until `width` are known
  std::vector<float>& heap_;
};

// Adds to task.found the tokens of a block whose approximate vote may be among the best; `tokens`
// names them, null: first, first + 1, ...
void keep_promising(const BeamStep& step, const float* votes, int64_t count, const int32_t* tokens,
                    int64_t first, bool allow_end, Bar& bar, BeamStepWorkspace::Task& task) {
  int32_t passing[kBlockTokens];
  const int64_t number = kernels().collect(votes, DType::kFloat32, 0, count, bar.value(), passing);
  for (int64_t j = 0; j < number; ++j) {
    const int32_t i = passing[j];
    const auto token = tokens == nullptr ? static_cast<int32_t>(first + i) : tokens[i];
    if (token == step.end_id && !allow_end) continue;
    if (votes[i] < bar.value()) continue;
    bar.add(votes[i]);
    task.found.push_back({votes[i], token, task.hypothesis});
  }
}

// Scores what passed the filter in double precision and keeps the best.
void score_exactly(const BeamStep& step, const HypothesisRows& rows, float least,
                   std::vector<Candidate>& found) {
  found.erase(std::remove_if(found.begin(), found.end(),
                             [least](const Candidate& c) { return c.score < least; }),
              found.end());
  for (Candidate& candidate : found) candidate.score = rows.score_of(candidate.token);
  keep_best(found, step.width);
}

// Candidates of one hypothesis among the tokens [begin, end), without a constraint. Votes are
// computed block by block on the stack in float32; those that may be among the best are scored
// again in double precision. No second [rows, vocabulary] array is written.
void score_part(const BeamStep& step, int64_t begin, int64_t end, bool allow_end,
                const HypothesisRows& rows, BeamStepWorkspace::Task& task) {
  const VoteRows view = rows.view();
  Bar bar(step.width, filter_factor(view, rows.score()), task.best_votes);
  float votes[kBlockTokens];
  for (int64_t block = begin; block < end; block += kBlockTokens) {
    const int64_t stop = std::min(end, block + kBlockTokens);
    kernels().approximate_votes(view, block, stop, votes);
    keep_promising(step, votes, stop - block, nullptr, block, allow_end, bar, task);
  }
  score_exactly(step, rows, bar.value(), task.found);
}

// Candidates of one hypothesis under a constraint: the logits of the allowed tokens are gathered,
// the rest is as without one.
void score_allowed(const BeamStep& step, const Automaton& constraint, int32_t state, bool allow_end,
                   const HypothesisRows& rows, BeamStepWorkspace::Task& task) {
  const AllowedTokens allowed = constraint.allowed(state);
  check_allowed(allowed.begin, allowed.end, step.logits.cols, step.end_id);
  VoteRows view = rows.view();
  Bar bar(step.width, filter_factor(view, rows.score()), task.best_votes);
  float votes[kBlockTokens];
  for (const int32_t* block = allowed.begin; block < allowed.end; block += kBlockTokens) {
    const int64_t count = std::min<int64_t>(allowed.end - block, kBlockTokens);
    task.gathered.resize(static_cast<size_t>(count * view.passages));
    task.gathered_rows.resize(static_cast<size_t>(view.passages));
    for (int32_t p = 0; p < view.passages; ++p) {
      float* row = task.gathered.data() + p * count;
      kernels().gather(rows.view().rows[p], step.logits.dtype, block, count, row);
      task.gathered_rows[static_cast<size_t>(p)] = row;
    }
    view.rows = task.gathered_rows.data();
    view.dtype = DType::kFloat32;
    kernels().approximate_votes(view, 0, count, votes);
    keep_promising(step, votes, count, block, 0, allow_end, bar, task);
  }
  score_exactly(step, rows, bar.value(), task.found);
  if (allow_end && constraint.is_final(state)) {
    task.found.push_back({rows.score_of(step.end_id), step.end_id, task.hypothesis});
    keep_best(task.found, step.width);
  }
}

void count_offsets(const BeamStep& step, BeamStepWorkspace& space) {
  const auto n = static_cast<size_t>(step.num_questions) + 1;
  space.first_row.assign(n, 0);
  space.first_hypothesis.assign(n, 0);
  space.first_passage.assign(n, 0);
  for (size_t q = 0; q + 1 < n; ++q) {
    const int64_t passages = step.passages[q];
    const int64_t hypotheses = step.hypotheses[q];
    space.first_row[q + 1] = space.first_row[q] + passages * hypotheses;
    space.first_hypothesis[q + 1] = space.first_hypothesis[q] + hypotheses;
    space.first_passage[q + 1] = space.first_passage[q] + passages;
  }
}

// Brings the rows of each hypothesis together and refuses those without a finite entry.
void gather_rows(const BeamStep& step, BeamStepWorkspace& space) {
  space.row_data.resize(static_cast<size_t>(space.first_row.back()));
  space.row_logsumexp.resize(space.row_data.size());
  for (int32_t q = 0; q < step.num_questions; ++q) {
    const int64_t first = space.first_row[static_cast<size_t>(q)];
    for (int32_t p = 0; p < step.passages[q]; ++p) {
      for (int32_t k = 0; k < step.hypotheses[q]; ++k) {
        const int64_t slot = first + static_cast<int64_t>(p) * step.hypotheses[q] + k;
        const int64_t row = step.row_of == nullptr ? slot : step.row_of[slot];
        if (step.stats[row].argmax < 0) throw_all_masked(row);
        const auto to = static_cast<size_t>(first + static_cast<int64_t>(k) * step.passages[q] + p);
        space.row_data[to] = step.logits.row(row);
        space.row_logsumexp[to] = step.stats[row].logsumexp;
      }
    }
  }
}

int32_t state_of(const BeamStep& step, const BeamStepWorkspace& space, int32_t q, int32_t k) {
  if (step.states == nullptr) return Automaton::kRootState;
  return step.states[space.first_hypothesis[static_cast<size_t>(q)] + k];
}

// Splits the step into tasks: one per constrained hypothesis, one per hypothesis and part of the
// vocabulary otherwise. Returns the work in float32 lanes, for the decision about threads.
int64_t plan_tasks(const BeamStep& step, BeamStepWorkspace& space) {
  constexpr int64_t kLanesPerAllowed = 16;  // a gathered and scored token against one in a row
  int64_t work = 0;
  space.num_tasks = 0;
  for (int32_t q = 0; q < step.num_questions; ++q) {
    const Automaton* constraint = step.constraints[q];
    const int64_t parts =
        constraint != nullptr ? 1 : (step.logits.cols + kPartTokens - 1) / kPartTokens;
    for (int32_t k = 0; k < step.hypotheses[q]; ++k) {
      const int64_t lanes =
          constraint == nullptr
              ? step.logits.cols
              : constraint->allowed(state_of(step, space, q, k)).size() * kLanesPerAllowed;
      work += lanes * step.passages[q];
      for (int64_t part = 0; part < parts; ++part) {
        if (space.num_tasks == space.tasks.size()) space.tasks.emplace_back();
        BeamStepWorkspace::Task& task = space.tasks[space.num_tasks++];
        task.question = q;
        task.hypothesis = k;
        task.part = static_cast<int32_t>(part);
        task.found.clear();
      }
    }
  }
  return work;
}

void run_task(const BeamStep& step, const BeamStepWorkspace& space, BeamStepWorkspace::Task& task) {
  const int32_t q = task.question;
  const int32_t state = state_of(step, space, q, task.hypothesis);
  if (step.passages[q] == 0 || state == Automaton::kDeadState) return;
  const HypothesisRows rows(step, space, q, task.hypothesis);
  if (std::isinf(rows.score())) return;  // a hypothesis of score -inf has no continuation
  const bool allow_end = step.allow_end[q] != 0;
  if (step.constraints[q] != nullptr) {
    score_allowed(step, *step.constraints[q], state, allow_end, rows, task);
  } else {
    const int64_t begin = task.part * kPartTokens;
    score_part(step, begin, std::min(step.logits.cols, begin + kPartTokens), allow_end, rows, task);
  }
}

}  // namespace

bool better(const Candidate& a, const Candidate& b) {
  if (a.score != b.score) return a.score > b.score;
  if (a.token != b.token) return a.token < b.token;
  return a.parent < b.parent;
}

void beam_step(const BeamStep& step, BeamStepWorkspace& space,
               std::vector<std::vector<Candidate>>& candidates) {
  count_offsets(step, space);
  gather_rows(step, space);
  const int64_t work = plan_tasks(step, space);
  parallel_for_work(work, static_cast<int64_t>(space.num_tasks),
                    [&](int64_t i) { run_task(step, space, space.tasks[static_cast<size_t>(i)]); });
  candidates.resize(static_cast<size_t>(step.num_questions));
  for (std::vector<Candidate>& list : candidates) list.clear();
  for (size_t i = 0; i < space.num_tasks; ++i) {
    const BeamStepWorkspace::Task& task = space.tasks[i];
    std::vector<Candidate>& list = candidates[static_cast<size_t>(task.question)];
    list.insert(list.end(), task.found.begin(), task.found.end());
  }
  for (std::vector<Candidate>& list : candidates) keep_best(list, step.width);
}

}  // namespace fastmrc
