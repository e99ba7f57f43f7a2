#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "fastmrc/ops.h"

namespace fastmrc {

void check_at_least(const char* name, int64_t value, int64_t least) {
  if (value >= least) return;
  throw std::invalid_argument(std::string(name) + ": expected at least " + std::to_string(least) +
                              ", got " + std::to_string(value));
}

void check_end_id(int64_t end_id, int64_t vocabulary_size) {
  if (end_id >= 0 && end_id < vocabulary_size) return;
  throw std::invalid_argument("end_id: expected a token below " + std::to_string(vocabulary_size) +
                              ", got " + std::to_string(end_id));
}

void check_shape(const Rows& logits, int64_t rows, int64_t vocabulary_size) {
  if (logits.rows == rows && logits.cols == vocabulary_size) return;
  throw std::invalid_argument(
      "logits: expected shape [" + std::to_string(rows) + ", " + std::to_string(vocabulary_size) +
      "], got [" + std::to_string(logits.rows) + ", " + std::to_string(logits.cols) + "]");
}

void check_stats(const RowStats& stats, int64_t row, const char* name) {
  if (!std::isnan(stats.max) && stats.max != INFINITY) return;
  throw std::invalid_argument(std::string(name) + ": expected numbers below infinity, got " +
                              (std::isnan(stats.max) ? "NaN" : "inf") + " in row " +
                              std::to_string(row));
}

void throw_all_masked(int64_t row) {
  throw std::invalid_argument(
      "logits: expected a finite entry in every row, got only -inf in row " + std::to_string(row));
}

void check_allowed(const int32_t* begin, const int32_t* end, int64_t vocabulary_size,
                   int32_t end_id) {
  if (begin != end && end[-1] >= vocabulary_size) {
    throw std::invalid_argument("constraint: expected tokens below the vocabulary size " +
                                std::to_string(vocabulary_size) + ", got " +
                                std::to_string(end[-1]));
  }
  if (std::binary_search(begin, end, end_id)) {
    throw std::invalid_argument("constraint: expected no end token " + std::to_string(end_id) +
                                " inside a sequence");
  }
}

}  // namespace fastmrc
