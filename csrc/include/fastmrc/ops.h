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
// The same of row i alone, on the caller's thread.
RowStats row_stats_of(const Rows& rows, int64_t i, const char* name = "logits");

// Throws std::invalid_argument unless value >= least.
void check_at_least(const char* name, int64_t value, int64_t least);
// Throws std::invalid_argument unless the end token is in the vocabulary.
void check_end_id(int64_t end_id, int64_t vocabulary_size);
// Throws std::invalid_argument unless the logits have this shape.
void check_shape(const Rows& logits, int64_t rows, int64_t vocabulary_size);
// Throws std::invalid_argument, naming argument and row, where the row holds NaN or +inf.
void check_stats(const RowStats& stats, int64_t row, const char* name);
// The error for a row of logits without a finite entry.
[[noreturn]] void throw_all_masked(int64_t row);
// Throws std::invalid_argument unless tokens [begin, end) of a constraint, ascending, are below the
// vocabulary size and none is the end token.
void check_allowed(const int32_t* begin, const int32_t* end, int64_t vocabulary_size,
                   int32_t end_id);
// Throws std::invalid_argument unless these may be those of a SampleStep.
void check_truncation(int32_t top_k, double top_p, double temperature);

// The k largest entries of each row, falling, equal values by rising id; values and ids:
// [rows.rows, k]. Entries of -inf do not count: what is missing is padded with -inf and -1.
// Throws std::invalid_argument for k < 1 and for a row with a NaN.
void topk(const Rows& rows, int64_t k, float* values, int32_t* ids);

// The same of row i alone, on the caller's thread; values and ids: [k].
void topk_of(const Rows& rows, int64_t i, int64_t k, float* values, int32_t* ids);
// row_stats_of and topk_of in one read of the row.
RowStats stats_and_topk_of(const Rows& rows, int64_t i, int64_t k, float* values, int32_t* ids,
                           const char* name = "logits");

// The same of log_softmax(row); +inf is refused too.
void log_softmax_topk(const Rows& rows, int64_t k, float* log_probs, int32_t* ids);

// Merges rows of new scores into running lists of the k largest of each row; column j stands for
// entry first_id + j, above all that the lists hold. values, ids: [rows.rows, k], falling, equal
// values by rising id, at first padded with -inf and -1. Scores of NaN are undefined.
void topk_merge(const Rows& scores, int64_t first_id, int64_t k, float* values, int64_t* ids);

// out[q, j] = <queries[q], corpus[ids[q, j]]> in double precision; ids, out: [queries.rows, count],
// ids in [0, corpus.rows). Equal rows give equal results to the bit.
void inner_products(const Rows& queries, const Rows& corpus, const int64_t* ids, int64_t count,
                    double* out);

// Answers of masked slots: row p * slots + i holds the distribution P_pi of token i of the answer
// of passage p. An answer is a path of its constraint from the root to a final state; one of m <
// slots tokens is followed by `end_id` and scores (sum of P_pi(token i) + P_pm(end)) / (m + 1), one
// of `slots` tokens scores sum / slots. Sums are double, scores float32.
struct SlotSearch {
  Rows logits;  // [passages * slots]
  int64_t passages = 0;
  int64_t slots = 0;
  const Automaton* const* constraints;  // [passages]; slot_argmax: null for no constraint
  int32_t end_id = 0;
  int64_t min_tokens = 0;  // the end is not allowed before so many tokens
};

// The answers found, `width` per passage, best first.
struct SlotAnswers {
  int32_t* tokens;   // [passages, width, slots], padded with -1
  int32_t* lengths;  // [passages, width] tokens, -1 where there is no answer
  float* scores;     // [passages, width], -inf where there is no answer
};

// Slot by slot the most likely of the allowed tokens and the end, the lower id of equal ones, until
// the end is chosen; width 1. Only the rows that are reached are read. Throws std::invalid_argument
// for a row read with NaN, +inf or nothing but -inf.
void slot_argmax(const SlotSearch& search, const SlotAnswers& answers);

// The `width` best answers of all that the constraint admits; equal scores by their tokens in
// lexicographic order. Throws as above, for any row.
void slot_topk(const SlotSearch& search, int64_t width, const SlotAnswers& answers);

// The best spans under a model with a start and an end head. P(i, j) = softmax(start)[i] *
// softmax(end)[j] over the positions whose mask is set and the null position; spans have
// i <= j < i + max_length and begin and end where the mask is set, not at the null position.
struct SpanScores {
  Rows start, end;                // [rows, cols]
  const uint8_t* mask = nullptr;  // [rows, cols] where an answer may begin or end; null: all
  int64_t null_position = -1;     // stands for "no answer"; -1: there is none
  int64_t max_length = 1;
  int64_t k = 1;
};

// scores, starts, ends: [rows, k], ordered by start logit + end logit (exact in double), then
// start, then end; padded with -inf, -1, -1. null_scores: [rows], P(null, null), 0 without null
// position. What the mask leaves out is not read. Throws std::invalid_argument for NaN and +inf.
void best_spans(const SpanScores& spans, float* scores, int32_t* starts, int32_t* ends,
                float* null_scores);

// Logits over the positions of documents. A position counts if it is before the row's length and
// its mask is set.
struct AttentionSum {
  Rows logits;                       // [rows, positions]
  const int32_t* word_ids;           // [rows, positions], 0 or more where a position counts
  const uint8_t* mask = nullptr;     // [rows, positions], null: all set
  const int64_t* lengths = nullptr;  // [rows], null: all positions
};

// The k words of each row with the largest sums of the softmax over the positions that count,
// logits more than 708 below the largest having no share; equal sums by first position. words,
// first (position): [rows, k] padded with -1; probs: [rows, k] padded with 0. Weights and sums are
// accurate to double precision. Throws std::invalid_argument for NaN, +inf or a negative word id at
// a position that counts and for lengths beyond the positions.
void attention_sum(const AttentionSum& input, int64_t k, int32_t* words, double* probs,
                   int32_t* first);

// By how little a nucleus may miss its share: more than the error of the sums, so that rounding
// does not decide where shares are equal.
constexpr double kNucleusSlack = 1e-5;

// Draws from rows of logits. The tokens that may be drawn are those that the constraint allows,
// `end_id` among them where the state is final and allow_end is set (without a constraint: every
// token, the end if it is allowed); of these the top_k likeliest (of equal logits the lower token),
// of these the fewest likeliest whose share of the weights exp(logit / temperature) reaches top_p
// (or misses it by kNucleusSlack at most).
// A draw takes the first token, by rising token, at which the running sum of the weights exceeds
// uniform(seed, stream, position) times their total.
struct SampleStep {
  Rows logits;
  const Automaton* const* constraints = nullptr;  // [rows], null or null entries: no constraint
  const int32_t* states = nullptr;                // [rows], null: all at the root
  const uint8_t* allow_end = nullptr;             // [rows], null: allowed
  int32_t end_id = 0;
  int32_t top_k = 0;  // 0: all
  double top_p = 1;
  double temperature = 1;
  uint64_t seed = 0;
  int64_t draws = 0;
  const int32_t* row_of = nullptr;      // [draws], null: draw d is of row d
  const uint64_t* streams = nullptr;    // [draws], null: draw d is of stream d
  const uint32_t* positions = nullptr;  // [draws], null: 0

  int64_t row(int64_t draw) const { return row_of == nullptr ? draw : row_of[draw]; }
  uint64_t stream(int64_t draw) const {
    return streams == nullptr ? static_cast<uint64_t>(draw) : streams[draw];
  }
  uint32_t position(int64_t draw) const { return positions == nullptr ? 0 : positions[draw]; }
};

// Buffers that a loop keeps from step to step.
struct SampleWorkspace {
  std::vector<int64_t> first, next, order;
};

// tokens, log_probs: [draws]; the log-probability is that of the softmax of the whole row at
// temperature 1. -1 and -inf where no token may be drawn. Throws std::invalid_argument for values
// out of range and for a row that is drawn from with NaN, +inf or nothing but -inf.
void sample(const SampleStep& step, SampleWorkspace& workspace, int32_t* tokens, double* log_probs);

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

// candidates: one vector per question, best first, at most `width` each.
void beam_step(const BeamStep& step, BeamStepWorkspace& workspace,
               std::vector<std::vector<Candidate>>& candidates);

}  // namespace fastmrc
