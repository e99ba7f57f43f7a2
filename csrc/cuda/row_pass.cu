// A block reads its part of a row into registers, all loads at once, and works on it there: nothing
// is read twice. The last block of a row puts the parts together.
#include <cmath>

#include "cuda/block.cuh"
#include "cuda/row_pass.h"

namespace fastmrc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = static_cast<int>(kPartItems / kThreads);  // of a thread
constexpr int kRoom = 1024;                                      // keys
constexpr int64_t kLoadBytes = 16;

// What the blocks of a row tell the last one. [rows, parts] and [rows, parts, k]
struct Parts {
  float* max;
  int32_t* argmax;
  double* sum;
  uint64_t* keys;
};

Parts divide(Workspace& space, int64_t rows, int64_t cols, int64_t k) {
  const int64_t parts = rows * parts_of(cols);
  Parts result;
  result.max = space.take<float>(parts);
  result.argmax = space.take<int32_t>(parts);
  result.sum = space.take<double>(parts);
  result.keys = space.take<uint64_t>(parts * k);
  return result;
}

// Item `item` of this thread is element index_of(item) of the part: neighbouring threads read
// neighbouring 16 bytes. The order does not depend on the alignment, so equal rows give equal
// results.
template <typename T>
__device__ int index_of(int item) {
  constexpr int kVector = static_cast<int>(kLoadBytes / sizeof(T));
  return (item / kVector * kThreads + static_cast<int>(threadIdx.x)) * kVector + item % kVector;
}

// What is beyond the row is -inf.
template <typename T>
__device__ void load_part(const T* row, int64_t begin, int64_t cols, float (&x)[kItems]) {
  constexpr int kVector = static_cast<int>(kLoadBytes / sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(row) % kLoadBytes == 0;
#pragma unroll
  for (int j = 0; j < kItems; j += kVector) {
    const int64_t at = begin + index_of<T>(j);
    if (aligned && at + kVector <= cols) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(row + at));
      T items[kVector];
      memcpy(items, &raw, sizeof(raw));
#pragma unroll
      for (int e = 0; e < kVector; ++e) x[j + e] = to_float(items[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        x[j + e] = at + e < cols ? to_float(row[at + e]) : -kInfinity;
    }
  }
}

// Largest of the thread's items, NaN if there is one.
__device__ float max_of(const float (&x)[kItems]) {
  float largest = x[0];
#pragma unroll
  for (int i = 1; i < kItems; ++i) largest = max_or_nan(largest, x[i]);
  return largest;
}

// Sum of exp(x - max) over the block, for a finite maximum.
__device__ double sum_exp(const float (&x)[kItems], float max) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) sum += fast_exp(x[i] - max);
  return block_reduce(static_cast<double>(sum), Sum());
}

// First element of the part that equals `max`.
template <typename T>
__device__ int first_equal(const float (&x)[kItems], float max) {
  int first = static_cast<int>(kPartItems);
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) first = x[i] == max ? index_of<T>(i) : first;
  return block_reduce(first, Minimum());
}

// The k largest entries of the part, sorted to the front of the collector; returns their number.
// At least k threads hold an entry as large as the k-th largest of the threads' maxima, so that
// smaller entries do not count.
template <typename T>
__device__ int select_part(const float (&x)[kItems], const TypedRows<T>& rows, int64_t row,
                           int64_t begin, float largest, int k, Collector<uint64_t, kRoom>& keys) {
  constexpr int kManyThreads = kThreads / 2;  // beyond it the bound is too low to be of use
  float bound = -kInfinity;
  if (k <= kManyThreads) bound = block_kth_largest(largest, k);
  if (largest >= bound) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (x[i] >= bound && x[i] > -kInfinity) {
        keys.offer(sort_key(x[i], static_cast<int32_t>(begin + index_of<T>(i))));
      }
    }
  }
  if (keys.overflowed()) {  // rare: many equal entries, or a large k
    for (int64_t i = begin; i < begin + kPartItems; i += kThreads) {
      // Read again, as registers cannot be indexed.
      const int64_t at = i + threadIdx.x;
      const float value = at < rows.cols ? to_float(rows.row(row)[at]) : -kInfinity;
      keys.offer_all(value >= bound && value > -kInfinity,
                     sort_key(value, static_cast<int32_t>(at)));
    }
  }
  return keys.finish();
}

// What the passes of one row come to. Neither NaN nor +inf is an answer.
struct Total {
  float max;
  int32_t argmax;
  double logsumexp;
};

__device__ Total put_together(const Parts& of, int64_t first, int64_t parts) {
  Total total{-kInfinity, -1, 0};
  for (int64_t p = first; p < first + parts; ++p) {
    const float max = max_or_nan(total.max, of.max[p]);
    if (max != total.max) total.argmax = of.argmax[p];
    total.max = max;
  }
  total.logsumexp = static_cast<double>(total.max);
  if (!(total.max > -kInfinity && total.max < kInfinity)) {
    total.argmax = -1;
    return total;
  }
  double sum = 0;
  for (int64_t p = first; p < first + parts; ++p) {
    const double shift = static_cast<double>(of.max[p]) - static_cast<double>(total.max);
    if (of.max[p] > -kInfinity) sum += of.sum[p] * exp(shift);
  }
  total.logsumexp += log(sum);
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_pass_kernel(TypedRows<T> rows, RowPass pass, Parts parts, int32_t parts_per_row) {
  const int64_t row = blockIdx.x / parts_per_row;
  const int64_t part = blockIdx.x % parts_per_row;
  if (pass.live != nullptr && pass.live[row] == 0) return;
  const int64_t begin = part * kPartItems;
  const int64_t place = row * parts_per_row + part;
  const bool with_stats = pass.stats.logsumexp != nullptr || pass.log_softmax;
  const int k = static_cast<int>(pass.k);
  float x[kItems];
  load_part(rows.row(row), begin, rows.cols, x);
  const float largest = max_of(x);
  const float max = block_reduce(largest, MaximumOrNan());
  if (threadIdx.x == 0) parts.max[place] = max;
  const bool finite = max > -kInfinity && max < kInfinity;
  if (with_stats && finite) {
    const double sum = sum_exp(x, max);
    const int first = first_equal<T>(x, max);
    if (threadIdx.x == 0) {
      parts.sum[place] = sum;
      parts.argmax[place] = static_cast<int32_t>(begin) + first;
    }
  }
  if (k > 0) {
    Collector<uint64_t, kRoom> keys(k);
    const bool sound = max == max;  // NaN has no key
    const int found = sound ? select_part(x, rows, row, begin, largest, k, keys) : 0;
    for (int i = static_cast<int>(threadIdx.x); i < k; i += kThreads) {
      parts.keys[place * k + i] = i < found ? keys.key(i) : kNoKey;
    }
  }
  if (!is_last_block(pass.counters + row, parts_per_row)) return;

  const Total total = put_together(parts, row * parts_per_row, parts_per_row);
  const bool is_nan = total.max != total.max;
  if (threadIdx.x == 0) {
    if (is_nan) report(pass.fault, row, with_stats ? Fault::kNan : Fault::kNanOnly);
    if (with_stats && total.max == kInfinity) report(pass.fault, row, Fault::kInfinity);
    if (pass.stats.max != nullptr) {
      pass.stats.max[row] = total.argmax < 0 ? total.max : to_float(rows.row(row)[total.argmax]);
    }
    if (pass.stats.argmax != nullptr) pass.stats.argmax[row] = total.argmax;
    if (pass.stats.logsumexp != nullptr) pass.stats.logsumexp[row] = total.logsumexp;
  }
  if (k == 0) return;
  Collector<uint64_t, kRoom> keys(k);
  const uint64_t* found = parts.keys + row * parts_per_row * k;
  const int64_t count = static_cast<int64_t>(parts_per_row) * k;
  for (int64_t i = 0; i < count; i += kThreads) {
    const int64_t own = i + threadIdx.x;
    const uint64_t key = own < count ? found[own] : kNoKey;
    keys.offer_all(key != kNoKey, key);
  }
  const int number = is_nan ? 0 : keys.finish();
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kThreads) {
    const bool there = i < number;
    const int32_t id = there ? id_of(keys.key(i)) : -1;
    float value = there ? to_float(rows.row(row)[id]) : -kInfinity;
    if (there && pass.log_softmax) {
      value = static_cast<float>(static_cast<double>(value) - total.logsumexp);
    }
    pass.values[row * k + i] = is_nan ? total.max : value;
    pass.ids[row * k + i] = id;
  }
}

}  // namespace

bool runs_on_device() {
#if defined(FASTMRC_CUDA_EMULATION)
  return true;
#else
  cudaFuncAttributes attributes;
  const bool runs = cudaFuncGetAttributes(&attributes, row_pass_kernel<float>) == cudaSuccess;
  cudaGetLastError();  // a failure is an answer here, not an error of the next launch
  return runs;
#endif
}

int64_t row_pass_bytes(int64_t rows, int64_t cols, int64_t k) {
  Workspace space(nullptr);
  divide(space, rows, cols, k);
  return space.bytes();
}

void row_pass(const RowPass& pass, Stream stream) {
  check_topk(pass.k);
  Workspace space(pass.workspace);
  const Parts parts = divide(space, pass.rows.rows, pass.rows.cols, pass.k);
  const int64_t per_row = parts_of(pass.rows.cols);
  with_type(pass.rows, [&](auto rows) {
    using T = typename decltype(rows)::Item;
    launch("row_pass", row_pass_kernel<T>, pass.rows.rows * per_row, kThreads, stream, rows, pass,
           parts, static_cast<int32_t>(per_row));
  });
}

}  // namespace fastmrc::cuda
