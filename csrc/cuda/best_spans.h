// The best spans under a model with a start and an end head, see fastmrc::best_spans.
#pragma once

#include <cstdint>

#include "cuda/platform.h"
#include "fastmrc/rows.h"

namespace fastmrc::cuda {

// As SpanScores; all arrays are on the device. A row with NaN or +inf where a position counts has
// scores of NaN and spans of -1; Fault::kNan and kInfinity are faults of `start`, kNanEnd and
// kInfinityEnd those of `end`.
struct BestSpans {
  Rows start, end;                // [rows, cols]
  const uint8_t* mask = nullptr;  // [rows, cols], null: all set
  int64_t null_position = -1;     // below cols; -1: there is none
  int64_t max_length = 1;
  int64_t k = 1;                 // at most kMaxTopk
  float* scores = nullptr;       // [rows, k]
  int32_t* starts = nullptr;     // [rows, k]
  int32_t* ends = nullptr;       // [rows, k]
  float* null_scores = nullptr;  // [rows]
  int64_t* fault = nullptr;      // see report()
  void* workspace = nullptr;     // lent: memory for best_spans_bytes()
};

int64_t best_spans_bytes(int64_t rows, int64_t cols, int64_t k);
void best_spans(const BestSpans& input, Stream stream);

}  // namespace fastmrc::cuda
