// Batched operations over rows of logits. None modifies its input, keeps state or allocates per
// element; all run on the threads of core/thread_pool.h and give the same result on any number of
// them and on every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "fastmrc/automaton.h"
#include "fastmrc/rows.h"

namespace fastmrc {

// Maximum, first argmax and log-sum-exp of each row, in one read of the logits.
// stats: [rows.rows]. Throws std::invalid_argument naming the argument and its first row with a NaN
// or +inf.
void row_stats(const Rows& rows, RowStats* stats, const char* name = "logits");

// The k largest entries of each row, falling, equal values by rising id; values and ids:
// [rows.rows, k]. Entries of -inf do not count: what is missing is padded with -inf and -1.
// Throws std::invalid_argument for k < 1 and for a row with a NaN.
void topk(const Rows& rows, int64_t k, float* values, int32_t* ids);

// The same of log_softmax(row); +inf is refused too.
void log_softmax_topk(const Rows& rows, int64_t k, float* log_probs, int32_t* ids);

// A continuation of one hypothesis. Order: score falling, token rising, parent rising.
struct Candidate {
  float score;
  int32_t token;
  int32_t parent;  // hypothesis within its question
};
bool better(const Candidate& a, const Candidate& b);

// One step of the beam search for a batch of questions:
//   score(k, v) = float32(scores[k] + log(vote_p P_pk(v) + 1e-12)),
// P_pk = softmax of the row of passage p and hypothesis k. Candidates are the tokens that the
// constraint allows after hypothesis k, and `end_id` where the state is final and the question's
// allow_end is set; the best `width` of each question are returned. A hypothesis in the dead state
// or of score -inf has no candidates.
struct BeamStep {
  Rows logits;
  const RowStats* stats;  // [logits.rows], from row_stats
  int32_t num_questions;
  const int32_t* passages;    // [questions] number of passages that vote
  const int32_t* hypotheses;  // [questions] number of live hypotheses
  const int64_t* row_of;      // rows in the order question, passage, hypothesis; null: 0, 1, 2...
  const float* scores;        // [sum of hypotheses]
  const int32_t* states;      // [sum of hypotheses], null: all at the root
  const Automaton* const* constraints;  // [questions], an entry may be null: no constraint
  const uint8_t* allow_end;             // [questions]
  const float* weights;                 // [sum of passages], vote kWeighted only
  Vote vote;
  int32_t end_id;
  int32_t width;
};

// Buffers that a loop keeps from step to step, so that steps do not allocate.
struct BeamStepWorkspace {
  struct Task {
    int32_t question, hypothesis, part;
    std::vector<Candidate> found;
    std::vector<float> best_votes;
    std::vector<float> gathered;             // [passages, allowed tokens of a block]
    std::vector<const void*> gathered_rows;  // [passages]
  };
  std::vector<int64_t> first_row, first_hypothesis, first_passage;  // [questions + 1]
  std::vector<const void*> row_data;  // rows in the order question, hypothesis, passage
  std::vector<double> row_logsumexp;
  std::vector<Task> tasks;
  size_t num_tasks = 0;
};

// The error for a row of logits without a finite entry.
[[noreturn]] void throw_all_masked(int64_t row);

// candidates: one vector per question, best first, at most `width` each.
void beam_step(const BeamStep& step, BeamStepWorkspace& workspace,
               std::vector<std::vector<Candidate>>& candidates);

}  // namespace fastmrc
