#include <cmath>
#include <stdexcept>
#include <string>

#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {

RowStats row_stats_of(const Rows& rows, int64_t i, const char* name) {
  const RowStats stats = kernels().row_stats(rows.row(i), rows.dtype, rows.cols);
  if (std::isnan(stats.max) || stats.max == INFINITY) {
    throw std::invalid_argument(std::string(name) + ": expected numbers below infinity, got " +
                                std::string(std::isnan(stats.max) ? "NaN" : "inf") + " in row " +
                                std::to_string(i));
  }
  return stats;
}

void row_stats(const Rows& rows, RowStats* stats, const char* name) {
  parallel_for_work(rows.rows * rows.cols, rows.rows,
                    [&](int64_t i) { stats[i] = row_stats_of(rows, i, name); });
}

}  // namespace fastmrc
