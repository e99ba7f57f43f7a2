// Answers of masked slots on the device: see fastmrc::slot_argmax and fastmrc::slot_topk.
#pragma once

#include <cstdint>

#include "cuda/automata.h"
#include "cuda/platform.h"
#include "fastmrc/rows.h"

namespace fastmrc::cuda {

// Most answers of a passage that slot_topk finds.
constexpr int64_t kMaxSlotWidth = 64;

struct SlotSearch {
  Rows logits;           // [passages * slots], at least one slot
  int64_t passages = 0;  // fewer than 2^31
  int64_t slots = 0;     // fewer than 2^31
  // Of the rows of logits, as row_pass wrote them.
  const float* max = nullptr;
  const int32_t* argmax = nullptr;
  const double* logsumexp = nullptr;
  Automata automata;
  // [passages]; slot_argmax: -1 for no constraint, null for none at all.
  const int32_t* automaton_of = nullptr;
  int32_t end_id = 0;
  int64_t min_tokens = 0;  // the end is not allowed before so many tokens
  // The answers, `width` of each passage, best first.
  int32_t* tokens = nullptr;   // [passages, width, slots], padded with -1
  int32_t* lengths = nullptr;  // [passages, width] tokens, -1 where there is no answer
  float* scores = nullptr;  // [passages, width], -inf where there is no answer, NaN after a fault
  // Rows with NaN, +inf or nothing but -inf; of a constraint with a token that is none or with the
  // end token inside, the row of logits that it was to be applied to.
  int64_t* fault = nullptr;
  void* workspace = nullptr;  // lent, slot_topk_bytes(); slot_argmax needs none
};

// Greedy, width 1. Only rows that an answer reaches are judged, so the pass that makes the
// statistics should be given another place for its faults.
void slot_argmax(const SlotSearch& search, Stream stream);

// The `width` best answers, at most kMaxSlotWidth. All rows are judged, and all of a constraint.
int64_t slot_topk_bytes(int64_t passages, int64_t slots, int64_t width);
void slot_topk(const SlotSearch& search, int64_t width, Stream stream);

}  // namespace fastmrc::cuda
