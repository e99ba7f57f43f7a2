// Probabilities of words that occur at several positions, see fastmrc::attention_sum.
#pragma once

#include <cstdint>

#include "cuda/platform.h"
#include "fastmrc/rows.h"

namespace fastmrc::cuda {

// As fastmrc::AttentionSum; all arrays are on the device. A row with NaN, +inf or a negative word
// where a position counts has words of -1 and probabilities of NaN. A length out of range is a
// fault too (Fault::kLength); its row is worked on with the nearest one that is not.
struct AttentionSum {
  Rows logits;                        // [rows, positions]
  const int32_t* word_ids = nullptr;  // [rows, positions]
  const uint8_t* mask = nullptr;      // [rows, positions], null: all set
  const int64_t* lengths = nullptr;   // [rows], null: all positions
  int64_t k = 1;                      // at most kMaxTopk
  int32_t* words = nullptr;           // [rows, k]
  double* probs = nullptr;            // [rows, k]
  int32_t* first = nullptr;           // [rows, k]
  int64_t* fault = nullptr;           // see report()
  void* workspace = nullptr;          // lent: memory for attention_sum_bytes()
};

int64_t attention_sum_bytes(int64_t rows, int64_t cols, int64_t k);
void attention_sum(const AttentionSum& input, Stream stream);

}  // namespace fastmrc::cuda
