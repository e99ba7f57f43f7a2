// The one beam loop: multi-passage search for a batch of questions, driven step by step by whoever
// computes the logits.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "fastmrc/automaton.h"
#include "fastmrc/ops.h"
#include "fastmrc/rows.h"
#include "fastmrc/span_index.h"
#include "fastmrc/step_request.h"
#include "fastmrc/token_tree.h"

namespace fastmrc {

// When a hypothesis that chose the end token ends the search.
enum class Finish : uint8_t {
  // Its question ends as soon as the best of the selected is finished; other finished ones leave
  // the beam, which shrinks by their number.
  kOriginal,
  // Finished ones enter a pool, ranked by score / length^length_penalty; the beam keeps its size
  // and the question ends when no live hypothesis can overtake a full pool.
  kPool,
};

struct BeamSearchOptions {
  int32_t beam_size = 3;
  int32_t min_tokens = 0;   // the end token is not allowed before so many tokens
  int32_t max_tokens = 32;  // number of steps
  Vote vote = Vote::kOriginal;
  Finish finish = Finish::kOriginal;
  double length_penalty = 1.0;  // finish kPool only
  int32_t end_id = 0;
  int32_t vocabulary_size = 0;
  // Of the passages that hold an answer those vote that are at most so many times as likely to hold
  // none as the surest one, at least 1; infinity: all vote.
  double no_answer_ratio = std::numeric_limits<double>::infinity();
  bool spans_only = true;  // answers are pieces of the voting passages, unless constraints say
  // Tokens that a request may ask for beyond a hypothesis of the last active question, as long as
  // its constraint leaves one continuation besides the end token. A step whose hypotheses are all
  // known needs no call of the encoder.
  int32_t look_ahead = 0;
};

// A hypothesis without its end token.
struct Hypothesis {
  std::vector<int32_t> tokens;
  float score = 0;
  bool finished = false;
};

class BeamSearch {
 public:
  // Passages of all questions laid end to end: passage p holds tokens
  // [passage_offsets[p], passage_offsets[p + 1]), question q passages
  // [question_offsets[q], question_offsets[q + 1]). `constraints` is empty or holds one automaton
  // per question (null: as spans_only says), which must outlive the search; `weights` is empty or
  // holds one weight per passage. Throws std::invalid_argument.
  BeamSearch(const BeamSearchOptions& options, std::vector<int32_t> tokens,
             std::vector<int64_t> passage_offsets, std::vector<int32_t> question_offsets,
             std::vector<const Automaton*> constraints, std::vector<float> weights);

  // The first call takes one row per passage, in order; the following ones take the rows of
  // request(). Throws std::invalid_argument for logits of another shape, NaN, +inf and rows of
  // -inf; the search cannot go on after that.
  void step(const Rows& logits);

  bool done() const { return request_.questions.empty() && step_ > 0; }
  int32_t steps() const { return step_; }
  const StepRequest& request() const { return request_; }

  int32_t num_questions() const { return static_cast<int32_t>(question_offsets_.size()) - 1; }
  // Whether each passage holds an answer as step 0 tells, and whether it votes. [passages]
  const std::vector<uint8_t>& surviving() const { return surviving_; }
  const std::vector<uint8_t>& voting() const { return voting_; }
  // Probability of the end token as the first one, known after step 0. [passages]
  const std::vector<double>& no_answer() const { return no_answer_; }
  // Finished and live hypotheses by falling score; best: index into them, -1 if there is no answer.
  std::vector<Hypothesis> hypotheses(int32_t question) const;
  int32_t best(int32_t question) const { return beams_[static_cast<size_t>(question)].best; }
  // The tokens of the live hypotheses of a question.
  std::vector<std::vector<int32_t>> live_tokens(int32_t question) const;

 private:
  // An entry of the n-best list; `node` is its last token.
  struct Entry {
    int32_t node;
    float score;
    bool finished;
  };

  struct Beam {
    std::vector<int32_t> passages;  // voting ones
    int32_t size = 0;               // hypotheses it may hold
    // Live hypotheses, a structure of arrays.
    std::vector<float> scores;
    std::vector<int32_t> states;
    std::vector<int32_t> nodes;
    std::vector<Entry> entries;  // finished ones; at the end the n-best list
    int32_t best = -1;
    bool done = false;
    std::unique_ptr<SpanIndex> index;
    const Automaton* constraint = nullptr;
  };

  void check_input() const;
  void choose_passages(const Rows& logits);
  void drop_unsure_passages(const Beam& beam);
  void build_constraints();
  void select(const Rows& logits);
  void finish_original(Beam& beam, const std::vector<Candidate>& candidates);
  void finish_pool(Beam& beam, const std::vector<Candidate>& candidates);
  bool pool_is_settled(const Beam& beam) const;
  void add_to_pool(Beam& beam, const Candidate& candidate, int32_t node, int32_t length) const;
  float normalized(float score, int32_t length) const;
  void go_on_with(Beam& beam, const std::vector<Candidate>& live);
  int32_t node_of(const Beam& beam, const Candidate& candidate);
  int32_t add_node(int32_t token, int32_t parent);
  void close(Beam& beam);
  void prepare_request();
  void plan_tree(const Beam& beam, std::vector<int32_t>& fresh);
  void list_rows();
  bool last_step() const { return step_ + 1 == options_.max_tokens; }

  BeamSearchOptions options_;
  std::vector<int32_t> tokens_;
  std::vector<int64_t> passage_offsets_;
  std::vector<int32_t> question_offsets_;
  std::vector<const Automaton*> constraints_;
  std::vector<float> weights_;

  int32_t step_ = 0;
  std::vector<uint8_t> surviving_, voting_;
  std::vector<double> no_answer_;
  std::vector<Beam> beams_;
  TokenTree tree_;
  std::vector<int32_t>
      node_ahead_;  // a node's only continuation if it was looked ahead to, else -1
  std::vector<std::vector<int32_t>> fresh_;  // per active question the nodes to encode
  StepRequest request_;

  // Inputs of beam_step, kept to avoid allocations.
  std::vector<RowStats> stats_;
  std::vector<int32_t> step_passages_, step_hypotheses_, step_states_;
  std::vector<int64_t> row_of_;
  std::vector<float> step_scores_, step_weights_;
  std::vector<const Automaton*> step_constraints_;
  std::vector<uint8_t> allow_end_;
  BeamStepWorkspace workspace_;
  std::vector<std::vector<Candidate>> candidates_;
  std::vector<Candidate> live_;
  std::vector<int32_t> next_nodes_, next_states_;
  std::vector<float> next_scores_;
};

}  // namespace fastmrc
