#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {

RowStats row_stats_of(const Rows& rows, int64_t i, const char* name) {
  const RowStats stats = kernels().row_stats(rows.row(i), rows.dtype, rows.cols, nullptr);
  check_stats(stats, i, name);
  return stats;
}

void row_stats(const Rows& rows, RowStats* stats, const char* name) {
  parallel_for_work(rows.rows * rows.cols, rows.rows,
                    [&](int64_t i) { stats[i] = row_stats_of(rows, i, name); });
}

}  // namespace fastmrc
