// The fused pass over rows of logits: statistics, the largest entries, or both in one read.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/platform.h"
#include "cuda/workspace.h"
#include "fastmrc/rows.h"

namespace fastmrc::cuda {

// Most entries of a row that row_pass selects.
constexpr int64_t kMaxTopk = 512;

// The selections keep their keys in shared memory, whose size is fixed.
inline void check_topk(int64_t k) {
  if (k >= 0 && k <= kMaxTopk) return;
  throw std::invalid_argument(
      "k: expected " + (k < 0 ? std::string("at least 0") : "at most " + std::to_string(kMaxTopk)) +
      ", got " + std::to_string(k));
}

// Of each row [rows]; null arrays: not wanted. As RowStats on the CPU, but of a row with NaN or
// +inf the maximum is NaN or +inf, the argmax -1.
struct RowStatsArrays {
  float* max = nullptr;
  int32_t* argmax = nullptr;
  double* logsumexp = nullptr;
};

struct RowPass {
  Rows rows;
  const uint8_t* live = nullptr;  // [rows], null: all; of other rows nothing is read or written
  RowStatsArrays stats;
  int64_t k = 0;             // largest entries wanted, at most kMaxTopk
  float* values = nullptr;   // [rows, k]
  int32_t* ids = nullptr;    // [rows, k]
  bool log_softmax = false;  // values are logarithms of the softmax
  int64_t* fault = nullptr;  // see report(); NaN, and +inf if statistics or logarithms are wanted
  // Lent: counters [rows] of zeros, which are zeros again at the end; and memory for
  // row_pass_bytes().
  int32_t* counters = nullptr;
  void* workspace = nullptr;
};

// Blocks that share a row of so many columns: each reads up to kPartItems entries. It depends on
// the columns alone, so that what a row gives does not depend on the rows beside it.
constexpr int64_t kPartItems = 8192;
inline int64_t parts_of(int64_t cols) { return (cols + kPartItems - 1) / kPartItems; }

// Whether this build holds code for the current device and its driver can run it.
bool runs_on_device();

int64_t row_pass_bytes(int64_t rows, int64_t cols, int64_t k);
void row_pass(const RowPass& pass, Stream stream);

}  // namespace fastmrc::cuda
