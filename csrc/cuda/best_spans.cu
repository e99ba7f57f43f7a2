// One block per row. The best end of each start bounds its spans, and the k-th best of these bounds
// is reached by k spans already, so only the few starts that reach it are looked at, as on the CPU.
#include <algorithm>
#include <cmath>

#include "cuda/best_spans.h"
#include "cuda/double_keys.cuh"
#include "cuda/workspace.h"

namespace fastmrc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRoom = 768;            // keys
constexpr int kSharedCols = 1024;     // rows up to this length stay in shared memory
constexpr int64_t kMostBlocks = 512;  // of longer rows: so many have memory of their own
constexpr int kArrays = 4;            // of a row, see RowMemory

using Spans = Collector<DoubleKey, kRoom>;
static_assert(kRoom >= kMaxTopk + kThreads, "offer_all needs room for a key of each thread");

// What a block keeps of its row: arrays [n], one after the other.
struct RowMemory {
  float* memory;
  int n;

  // Logits, -inf where no span may begin or end.
  __device__ float* start() const { return memory; }
  __device__ float* end() const { return memory + n; }
  // For what is worked out.
  __device__ float* one() const { return memory + int64_t{2} * n; }
  __device__ float* other() const { return memory + int64_t{3} * n; }

  __device__ double sum(int i, int j) const {
    return static_cast<double>(start()[i]) + static_cast<double>(end()[j]);
  }
};

// Whether position j of the row has a part in the softmax.
__device__ bool counts(const BestSpans& input, int64_t row, int j) {
  return input.mask == nullptr || input.mask[row * input.start.cols + j] != 0 ||
         j == input.null_position;
}

// Reads a row; returns this thread's largest logit, NaN if there is one.
template <typename T>
__device__ float read_typed(const Rows& rows, int64_t row, const BestSpans& input, float* values) {
  const T* logits = static_cast<const T*>(rows.data) + row * rows.stride;
  const int n = static_cast<int>(rows.cols);
  float largest = -kInfinity;
  for (int j = static_cast<int>(threadIdx.x); j < n; j += kThreads) {
    const float logit = counts(input, row, j) ? to_float(logits[j]) : -kInfinity;
    values[j] = logit;
    largest = max_or_nan(largest, logit);
  }
  return largest;
}

// Reads a row; returns its largest logit. Its dtype is no parameter of the kernel, of which there
// would be one for each pair of them.
__device__ float read_row(const Rows& rows, int64_t row, const BestSpans& input, float* values) {
  float largest = 0;
  switch (rows.dtype) {
    case DType::kFloat32:
      largest = read_typed<float>(rows, row, input, values);
      break;
    case DType::kFloat16:
      largest = read_typed<Float16>(rows, row, input, values);
      break;
    case DType::kBFloat16:
      largest = read_typed<BFloat16>(rows, row, input, values);
      break;
  }
  return block_reduce(largest, MaximumOrNan());
}

// -inf if all are.
__device__ double logsumexp_of(const float* values, int n, float max) {
  if (max == -kInfinity) return -kInfinityDouble;
  double sum = 0;
#pragma unroll 1  // more takes registers beyond those that there are
  for (int j = static_cast<int>(threadIdx.x); j < n; j += kThreads) {
    sum += exp(static_cast<double>(values[j]) - static_cast<double>(max));
  }
  return static_cast<double>(max) + log(block_reduce(sum, Sum()));
}

// The largest end logit of the spans from each start. Windows of 1, 2, 4, ... positions are joined
// to those of twice the length, at last to those of max_length; two arrays take turns, as a window
// is read by two threads.
__device__ const float* find_best_ends(const RowMemory& own, int max_length) {
  const float* from = own.end();
  float* to = own.one();
  for (int width = 1; width < max_length;) {
    const int shift = min(width, max_length - width);
    for (int i = static_cast<int>(threadIdx.x); i < own.n; i += kThreads) {
      to[i] = i < own.n - shift ? max(from[i], from[i + shift]) : from[i];
    }
    __syncthreads();
    from = to;
    to = from == own.one() ? own.other() : own.one();
    width += shift;
  }
  return from;
}

// The spans of a row that may be among its best.
struct Search {
  RowMemory own;
  const float* best_end;
  int max_length;
  double bar;  // reached by k spans

  __device__ bool start_reaches(int i) const {
    return counts_as_span(static_cast<double>(own.start()[i]) + static_cast<double>(best_end[i]));
  }
  __device__ bool counts_as_span(double sum) const { return sum >= bar && sum > -kInfinityDouble; }
  __device__ int num_ends(int i) const { return min(max_length, own.n - i); }
};

// Sum falling, start rising, end rising.
__device__ DoubleKey key_of(double sum, int start, int end) {
  const uint64_t span = static_cast<uint64_t>(start) << 32 | static_cast<uint64_t>(end);
  return {ordered_bits_of_double(sum), ~span};
}

__device__ Search prepare(const RowMemory& own, int max_length, int k) {
  Search search{own, find_best_ends(own, max_length), max_length, 0};
  float* bounds = search.best_end == own.one() ? own.other() : own.one();
  for (int i = static_cast<int>(threadIdx.x); i < own.n; i += kThreads) {
    bounds[i] =
        float_below(static_cast<double>(own.start()[i]) + static_cast<double>(search.best_end[i]));
  }
  search.bar = static_cast<double>(bar_of(bounds, own.n, k));  // a thread reads what it wrote
  return search;
}

// Each warp takes 32 starts and goes together through the ends of those that reach the bar. It
// stops where it alone has found more than there is room for.
__device__ void offer_spans(const Search& search, Spans& spans) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_start = static_cast<int>(threadIdx.x) - lane;
  int offered = 0;
  for (int begin = warp_start; begin < search.own.n; begin += kThreads) {
    const int own_start = begin + lane;
    const bool reaches = own_start < search.own.n && search.start_reaches(own_start);
    for (unsigned left = __ballot_sync(kFullWarp, reaches); left != 0; left &= left - 1) {
      const int i = begin + __ffs(static_cast<int>(left)) - 1;
      const int num_ends = search.num_ends(i);
      for (int first = 0; first < num_ends; first += kWarpSize) {
        const int length = first + lane;
        const double sum = length < num_ends ? search.own.sum(i, i + length) : -kInfinityDouble;
        const bool counts = search.counts_as_span(sum);
        if (counts) spans.offer(key_of(sum, i, i + length));
        offered += __popc(__ballot_sync(kFullWarp, counts));
        if (offered > kRoom) return;
      }
    }
  }
}

// The same where there may be any number of them: `width` threads for each of several starts.
__device__ void offer_all_spans(const Search& search, Spans& spans) {
  int width = 1;
  while (width < search.max_length && width < kThreads) width *= 2;
  const int thread = static_cast<int>(threadIdx.x);
  for (int begin = 0; begin < search.own.n; begin += kThreads / width) {
    const int i = begin + thread / width;
    const bool reaches = i < search.own.n && search.start_reaches(i);
    if (__syncthreads_or(reaches) == 0) continue;
    const int num_ends = reaches ? search.num_ends(i) : 0;
    for (int first = 0; first < search.max_length; first += width) {
      const int length = first + thread % width;
      const double sum = length < num_ends ? search.own.sum(i, i + length) : -kInfinityDouble;
      spans.offer_all(search.counts_as_span(sum), key_of(sum, i, i + length));
    }
  }
}

__device__ void write_fault(const BestSpans& input, int64_t row) {
  for (int64_t i = threadIdx.x; i < input.k; i += kThreads) {
    input.scores[row * input.k + i] = kQuietNan;
    input.starts[row * input.k + i] = input.ends[row * input.k + i] = -1;
  }
  if (threadIdx.x == 0) input.null_scores[row] = kQuietNan;
}

// Whether the largest logits are numbers below +inf; reports a fault, of `start` before `end`.
__device__ bool sound(const BestSpans& input, int64_t row, float start_max, float end_max) {
  const bool start_sound = start_max < kInfinity, end_sound = end_max < kInfinity;
  if (threadIdx.x == 0 && !start_sound) {
    report(input.fault, row, start_max == kInfinity ? Fault::kInfinity : Fault::kNan);
  } else if (threadIdx.x == 0 && !end_sound) {
    report(input.fault, row, end_max == kInfinity ? Fault::kInfinityEnd : Fault::kNanEnd);
  }
  return start_sound && end_sound;
}

// Writes the score of the null position and takes it from the spans.
__device__ void take_null(const BestSpans& input, int64_t row, const RowMemory& own,
                          double logsumexp) {
  __syncthreads();  // the row is read
  if (threadIdx.x == 0) {
    const auto null = static_cast<int>(input.null_position);
    float score = 0;
    if (null >= 0) {
      const double sum = own.sum(null, null);
      if (sum > -kInfinityDouble) score = static_cast<float>(exp(sum - logsumexp));
      own.start()[null] = own.end()[null] = -kInfinity;
    }
    input.null_scores[row] = score;
  }
  __syncthreads();
}

__device__ void search_row(const BestSpans& input, int64_t row, const RowMemory& own) {
  const float start_max = read_row(input.start, row, input, own.start());
  const float end_max = read_row(input.end, row, input, own.end());
  if (!sound(input, row, start_max, end_max)) return write_fault(input, row);
  const double logsumexp =
      logsumexp_of(own.start(), own.n, start_max) + logsumexp_of(own.end(), own.n, end_max);
  take_null(input, row, own, logsumexp);
  const int k = static_cast<int>(input.k);
  if (k == 0) return;
  const Search search = prepare(own, static_cast<int>(min(input.max_length, input.start.cols)), k);
  Spans spans(k);
  offer_spans(search, spans);
  if (spans.overflowed()) offer_all_spans(search, spans);  // rare: many equal sums, or a large k
  const int found = spans.finish();
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kThreads) {
    const bool there = i < found;
    const DoubleKey key = there ? spans.key(i) : DoubleKey{};
    const double sum = there ? double_from_ordered_bits(key.ordered) : -kInfinityDouble;
    input.scores[row * k + i] = there ? static_cast<float>(exp(sum - logsumexp)) : -kInfinity;
    input.starts[row * k + i] = there ? static_cast<int32_t>(~key.rest >> 32) : -1;
    input.ends[row * k + i] = there ? static_cast<int32_t>(~key.rest) : -1;
  }
}

__global__ void __launch_bounds__(kThreads) best_spans_kernel(BestSpans input, float* space) {
  __shared__ float of_short_row[kArrays * kSharedCols];
  const int64_t n = input.start.cols;
  float* memory = n <= kSharedCols ? of_short_row : space + int64_t{blockIdx.x} * kArrays * n;
  const RowMemory own{memory, static_cast<int>(n)};
  for (int64_t row = blockIdx.x; row < input.start.rows; row += gridDim.x) {
    search_row(input, row, own);
    __syncthreads();  // the memory serves the next row
  }
}

int64_t blocks_of(int64_t rows, int64_t cols) {
  return cols <= kSharedCols ? rows : std::min(rows, kMostBlocks);
}

float* divide(Workspace& space, int64_t rows, int64_t cols) {
  return space.take<float>(cols <= kSharedCols ? 0 : blocks_of(rows, cols) * kArrays * cols);
}

}  // namespace

int64_t best_spans_bytes(int64_t rows, int64_t cols, int64_t) {
  Workspace space(nullptr);
  divide(space, rows, cols);
  return space.bytes();
}

void best_spans(const BestSpans& input, Stream stream) {
  check_topk(input.k);
  Workspace space(input.workspace);
  float* const memory = divide(space, input.start.rows, input.start.cols);
  launch("best_spans", best_spans_kernel, blocks_of(input.start.rows, input.start.cols), kThreads,
         stream, input, memory);
}

}  // namespace fastmrc::cuda
