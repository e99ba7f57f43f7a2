// Draws of tokens from rows of logits.
#pragma once

#include <cstdint>

#include "cuda/automata.h"
#include "cuda/platform.h"
#include "fastmrc/rows.h"

namespace fastmrc::cuda {

// As fastmrc::SampleStep on the CPU, which says what may be drawn and what is, and with the same
// random numbers. Arrays are on the device.
struct Sample {
  Rows logits;
  Automata automata;
  const int32_t* automaton_of = nullptr;  // [rows], -1: no constraint; null: none anywhere
  const int32_t* states = nullptr;        // [rows], null: all at the root
  const uint8_t* allow_end = nullptr;     // [rows], null: allowed
  int32_t end_id = 0;
  int32_t top_k = 0;  // 0: all
  double top_p = 1;
  double temperature = 1;
  uint64_t seed = 0;
  int64_t draws = 0;
  const int32_t* row_of = nullptr;      // [draws], null: draw d is of row d
  const uint64_t* streams = nullptr;    // [draws], null: draw d is of stream d
  const uint32_t* positions = nullptr;  // [draws], null: 0
  // What row_pass found in the rows. [rows]
  const float* max = nullptr;
  const int32_t* argmax = nullptr;
  const double* logsumexp = nullptr;
  // [draws]; -1 and -inf where no token may be drawn, -1 and NaN where the row is at fault.
  int32_t* tokens = nullptr;
  double* log_probs = nullptr;
  // See report(): rows that are drawn from with NaN, +inf or nothing but -inf, with a state that is
  // none of the constraint, and with tokens beyond the vocabulary or the end token after it.
  int64_t* fault = nullptr;
  void* workspace = nullptr;  // lent: memory for sample_bytes()
};

int64_t sample_bytes(int64_t rows, int64_t cols);
// Throws std::invalid_argument for scalars out of range.
void sample(const Sample& sample, Stream stream);

}  // namespace fastmrc::cuda
