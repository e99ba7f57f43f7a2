// The beam search with all its state on the device: fastmrc::BeamSearch for a host that only
// enqueues. Hypothesis k of a question has slot k; its token of step t is node t * slots + k, which
// is the column of its answer keys too.
#pragma once

#include <cstdint>

#include "cuda/automata.h"
#include "cuda/beam_step.h"
#include "cuda/platform.h"
#include "fastmrc/beam_search.h"

namespace fastmrc::cuda {

// State of the questions, all on the device.
struct Beams {
  int32_t questions = 0;
  int32_t slots = 0;  // beam size
  int32_t steps = 0;  // most tokens
  // [questions]
  int32_t* hypotheses = nullptr;  // live ones, 0: the question is done
  int32_t* sizes = nullptr;       // hypotheses it may hold
  int32_t* entries = nullptr;     // finished ones; at the end the n-best list, not sorted
  int32_t* best = nullptr;        // index into them, -1: none
  // [questions, slots]
  float* scores = nullptr;
  int32_t* states = nullptr;
  int32_t* nodes = nullptr;  // of the last token, -1: none
  int32_t* entry_nodes = nullptr;
  float* entry_scores = nullptr;
  int32_t* entry_finished = nullptr;  // 0 or 1
  // [questions, steps * slots]
  int32_t* node_tokens = nullptr;
  int32_t* node_parents = nullptr;
  // [2, questions, slots, steps * slots]: 1 in the columns that a slot's token attends to; those of
  // even and of odd steps, as one is made of the other.
  uint8_t* ancestors = nullptr;
};

// Beams in one array of 32-bit numbers. The results come first and in the order hypotheses,
// entries, best [questions], entry_nodes, entry_finished, entry_scores [questions, slots],
// node_tokens, node_parents [questions, steps * slots]; then sizes, scores, states, nodes.
int64_t beams_items(int32_t questions, int32_t slots, int32_t steps);
Beams lay_out_beams(int32_t* state, uint8_t* ancestors, int32_t questions, int32_t slots,
                    int32_t steps);

// The rules that a finished candidate follows.
struct FinishRules {
  Finish finish = Finish::kOriginal;
  double length_penalty = 1;
  int32_t end_id = 0;
  int32_t max_tokens = 1;
};

// What the encoder reads for its next call, on the device. Rows are passages; a row of a question
// that is done or of none has tokens of 0 that see the input only.
struct EncoderInputs {
  int64_t rows = 0;
  int64_t prefix = 0;                       // columns of the input
  int64_t columns = 0;                      // of the mask: prefix, steps * slots, padding
  const int32_t* question_of = nullptr;     // [rows], -1: none
  const int64_t* first_position = nullptr;  // [rows] position of the first answer token
  int64_t* tokens = nullptr;                // [rows, slots]
  int64_t* positions = nullptr;             // [rows, slots]
  uint8_t* mask = nullptr;           // [rows, slots, columns]; that of the input is left alone
  int64_t* cache_columns = nullptr;  // [slots] where keys and values go
  uint8_t* live = nullptr;           // [rows * slots] whose logits are read
};

// Makes of step 0's statistics what is known of passages: whether one survives (its argmax is not
// the end token) and the probability of the end token. All [rows]; reports rows of -inf.
struct FirstStep {
  Rows logits;
  RowStatsArrays stats;
  int32_t end_id = 0;
  uint8_t* surviving = nullptr;
  double* no_answer = nullptr;
  int64_t* fault = nullptr;
};
void first_step(const FirstStep& step, Stream stream);

// Moves the questions on by the candidates of beam_step in step `step`.
void advance_beams(const Beams& beams, const FinishRules& rules, const Candidates& candidates,
                   int32_t width, const Automata& automata, const int32_t* automaton_of,
                   int32_t step, Stream stream);

// Writes the inputs for the tokens that step `step` added.
void prepare_inputs(const Beams& beams, const EncoderInputs& inputs, int32_t step, Stream stream);

}  // namespace fastmrc::cuda
