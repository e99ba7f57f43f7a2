// Random sequences after prompts, driven step by step by whoever computes the logits.
#pragma once

#include <cstdint>
#include <vector>

#include "fastmrc/automaton.h"
#include "fastmrc/ops.h"
#include "fastmrc/rows.h"
#include "fastmrc/step_request.h"
#include "fastmrc/token_tree.h"

namespace fastmrc {

struct SamplingOptions {
  int32_t top_k = 0;  // as in SampleStep
  double top_p = 1;
  double temperature = 1;
  uint64_t seed = 0;
  uint64_t first_stream = 0;  // of the first sequence of each prompt
  int32_t min_tokens = 0;     // the end token is not allowed before so many tokens
  int32_t max_tokens = 32;    // number of steps
  int32_t min_ends = 1;       // a sequence is finished by its end token of this number
  int32_t end_id = 0;
  int32_t vocabulary_size = 0;
};

// A sequence without the end token that finished it; earlier ones are among its tokens.
struct SampledSequence {
  std::vector<int32_t> tokens;
  double log_prob = 0;  // of all its tokens and the last end; natural logarithm
  bool finished = false;
};

// Sequence i of a prompt takes its random numbers from stream first_stream + i, that of step t at
// position t, so what it becomes depends on the seed, the stream and the logits alone. Sequences
// that begin alike share the nodes of a tree: each distinct beginning is encoded once.
class SequenceSampler {
 public:
  // `sequences`: how many to draw after each prompt. `constraints`: empty or one automaton per
  // prompt (null: none), which must outlive the sampler; an end token that does not finish a
  // sequence leads back to its root. Throws std::invalid_argument.
  SequenceSampler(const SamplingOptions& options, std::vector<int32_t> sequences,
                  std::vector<const Automaton*> constraints);

  // The first call takes one row per prompt; the following ones take the rows of request(), whose
  // questions and passages are the prompts. Throws std::invalid_argument as sample() and for logits
  // of another shape; the sampler cannot go on after that.
  void step(const Rows& logits);

  // The same in two parts, for who draws elsewhere: what SampleStep takes of the next step beside
  // the logits and the options, and what it has drawn. Throws std::invalid_argument for a token
  // that is neither -1 nor in the vocabulary.
  struct Draws {
    const std::vector<int32_t>& row_of;      // [draws]
    const std::vector<uint64_t>& streams;    // [draws]
    const std::vector<int32_t>& row_prompt;  // [rows] whose constraint it is
    const std::vector<int32_t>& states;      // [rows]
  };
  Draws prepare_draws();
  int64_t num_draws() const { return static_cast<int64_t>(live_.size()); }
  void take(const int32_t* tokens, const double* log_probs);

  bool done() const { return request_.questions.empty() && step_ > 0; }
  int32_t steps() const { return step_; }
  const StepRequest& request() const { return request_; }
  int32_t num_prompts() const { return static_cast<int32_t>(counts_.size()); }
  std::vector<SampledSequence> sequences(int32_t prompt) const;

 private:
  // A sequence that goes on.
  struct Live {
    int32_t sequence;  // among all sequences
    int32_t node;      // its last token
    int32_t row;       // its row of logits
    int32_t token;     // drawn in this step
  };

  void check_input() const;
  void draw(const Rows& logits);
  void go_on();
  void finish();
  void extend();
  void prepare_request();
  const Automaton* constraint_of(int32_t prompt) const;

  SamplingOptions options_;
  std::vector<int32_t> counts_;  // sequences of each prompt
  std::vector<const Automaton*> constraints_;

  int32_t step_ = 0;
  std::vector<size_t> first_of_;  // [prompts + 1] sequences of each prompt
  // Of all sequences, prompt by prompt.
  std::vector<int32_t> prompt_of_, last_node_, ends_;
  std::vector<double> log_prob_;
  std::vector<uint8_t> finished_;
  std::vector<Live> live_;
  TokenTree tree_;
  std::vector<int32_t> node_state_;  // of the constraint
  std::vector<std::vector<int32_t>> fresh_;
  StepRequest request_;

  // Inputs and results of sample(), kept to avoid allocations.
  std::vector<int32_t> row_of_, row_prompt_, row_state_, tokens_;
  std::vector<const Automaton*> row_constraint_;
  std::vector<uint64_t> streams_;
  std::vector<uint32_t> positions_;
  std::vector<uint8_t> allow_end_;
  std::vector<double> log_probs_;
  SampleWorkspace workspace_;
};

}  // namespace fastmrc
