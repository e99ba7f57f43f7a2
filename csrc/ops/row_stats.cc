#include <cmath>
#include <stdexcept>
#include <string>

#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {

void row_stats(const Rows& rows, RowStats* stats, const char* name) {
  const Kernels& table = kernels();
  parallel_for_work(rows.rows * rows.cols, rows.rows, [&](int64_t i) {
    stats[i] = table.row_stats(rows.row(i), rows.dtype, rows.cols);
  });
  for (int64_t i = 0; i < rows.rows; ++i) {
    if (std::isnan(stats[i].max) || stats[i].max == INFINITY) {
      throw std::invalid_argument(std::string(name) + ": expected numbers below infinity, got " +
                                  std::string(std::isnan(stats[i].max) ? "NaN" : "inf") +
                                  " in row " + std::to_string(i));
    }
  }
}

}  // namespace fastmrc
