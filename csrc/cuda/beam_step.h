// One step of the beam search for a batch of questions, on the device: see fastmrc::beam_step.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cuda/automata.h"
#include "cuda/platform.h"
#include "cuda/row_pass.h"
#include "fastmrc/rows.h"

namespace fastmrc::cuda {

// Continuations of each question, [questions, width]: score falling, token rising, parent rising;
// padded with -inf, -1, -1.
struct Candidates {
  float* scores = nullptr;
  int32_t* tokens = nullptr;
  int32_t* parents = nullptr;
};

struct BeamStep {
  Rows logits;
  RowStatsArrays stats;  // [logits.rows], as row_pass wrote them; argmax and logsumexp are read
  int32_t questions = 0;
  int32_t slots = 0;                       // hypotheses that a question has room for
  const int32_t* hypotheses = nullptr;     // [questions] live ones
  const int64_t* first_passage = nullptr;  // [questions + 1] its voting passages
  // [voting passages] row of the first hypothesis of each; the others follow it.
  const int64_t* passage_row = nullptr;
  const float* weights = nullptr;   // [voting passages], vote kWeighted only
  const float* scores = nullptr;    // [questions, slots]
  const int32_t* states = nullptr;  // [questions, slots]
  Automata automata;
  const int32_t* automaton_of = nullptr;  // [questions], -1: no constraint; null: none at all
  bool all_constrained = false;           // the host knows that no question is without
  const uint8_t* allow_end = nullptr;     // [questions], null: allowed
  Vote vote = Vote::kOriginal;
  int32_t end_id = 0;
  int32_t width = 1;  // at most kMaxTopk
  Candidates candidates;
  int64_t* fault = nullptr;   // rows of -inf; tokens of a constraint that are none
  void* workspace = nullptr;  // lent, beam_step_bytes()
};

int64_t beam_step_bytes(const BeamStep& step);
void beam_step(const BeamStep& step, Stream stream);

}  // namespace fastmrc::cuda
