// One block per row. Its positions are sorted by word, so that those of a word lie together and in
// their order; the thread at the first of them adds up their weights. Sums carry what rounding took
// from them, as on the CPU: those of the same weights are equal in any order but for cases far
// rarer than tests can find, and words tie where their weights do.
#include <algorithm>
#include <cmath>

#include "cuda/attention_sum.h"
#include "cuda/double_keys.cuh"
#include "cuda/workspace.h"

namespace fastmrc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRoom = 768;              // keys
constexpr int kSharedPositions = 1024;  // rows up to this length stay in shared memory
constexpr int64_t kMostBlocks = 512;    // of longer rows: so many have memory of their own
constexpr double kLeastLogit = -708;    // against the largest: below it there is no weight

using Words = Collector<DoubleKey, kRoom>;
static_assert(kRoom >= kMaxTopk + kThreads, "offer_all needs room for a key of each thread");

// word << 32 | position, which sort by word and then position; words are not negative.
constexpr uint64_t kNoEntry = ~uint64_t{0};

__device__ uint64_t entry_of(int32_t word, int position) {
  return static_cast<uint64_t>(word) << 32 | static_cast<uint32_t>(position);
}
__device__ int32_t word_of(uint64_t entry) { return static_cast<int32_t>(entry >> 32); }
__device__ int32_t position_of(uint64_t entry) { return static_cast<int32_t>(entry); }

// What a block keeps of its row: the entries of the positions with a weight, and their weights,
// later the sums of their words. [slots], a power of two.
struct RowMemory {
  uint64_t* entries;
  double* sums;

  __device__ bool is_first(int i) const {
    if (entries[i] == kNoEntry) return false;
    return i == 0 || word_of(entries[i - 1]) != word_of(entries[i]);
  }
};

__host__ __device__ inline int64_t slots_of(int64_t positions) {
  int64_t slots = 1;
  while (slots < positions) slots *= 2;
  return slots;
}

__device__ float load(const Rows& rows, int64_t row, int position) {
  const int64_t at = row * rows.stride + position;
  if (rows.dtype == DType::kFloat32) return static_cast<const float*>(rows.data)[at];
  if (rows.dtype == DType::kFloat16) return to_float(static_cast<const Float16*>(rows.data)[at]);
  return to_float(static_cast<const BFloat16*>(rows.data)[at]);
}

__device__ int length_of(const AttentionSum& input, int64_t row) {
  const int64_t cols = input.logits.cols;
  if (input.lengths == nullptr) return static_cast<int>(cols);
  const int64_t length = input.lengths[row];
  if (threadIdx.x == 0 && (length < 0 || length > cols)) report(input.fault, row, Fault::kLength);
  return static_cast<int>(max(int64_t{0}, min(length, cols)));
}

// Writes the entries of a row; returns the largest logit. Where it is no number below +inf or a
// word is negative, it reports the fault and returns NaN.
__device__ float list_entries(const AttentionSum& input, int64_t row, int length, int slots,
                              uint64_t* entries) {
  const int64_t begin = row * input.logits.cols;
  float largest = -kInfinity;
  bool negative = false;
  for (int i = static_cast<int>(threadIdx.x); i < slots; i += kThreads) {
    uint64_t entry = kNoEntry;
    if (i < length && (input.mask == nullptr || input.mask[begin + i] != 0)) {
      const float logit = load(input.logits, row, i);
      largest = max_or_nan(largest, logit);
      if (logit > -kInfinity) {  // else it has no weight
        const int32_t word = input.word_ids[begin + i];
        negative |= word < 0;
        entry = entry_of(word, i);
      }
    }
    entries[i] = entry;
  }
  largest = block_reduce(largest, MaximumOrNan());
  const bool any_negative = __syncthreads_or(negative) != 0;
  if (largest < kInfinity && !any_negative) return largest;
  if (threadIdx.x == 0) {
    const Fault of_logits = largest == kInfinity ? Fault::kInfinity : Fault::kNan;
    report(input.fault, row, largest < kInfinity ? Fault::kNegativeWord : of_logits);
  }
  return kQuietNan;
}

// Batcher's bitonic sort: for runs of 2, 4, ... it merges a rising and a falling one of half the
// length, comparing items at falling distances.
__device__ void sort_entries(uint64_t* entries, int slots) {
  for (int run = 2; run <= slots; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int pair = static_cast<int>(threadIdx.x); pair < slots / 2; pair += kThreads) {
        const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
        const bool rising = (low & run) == 0;
        const uint64_t a = entries[low], b = entries[high];
        if ((a > b) == rising) {
          entries[low] = b;
          entries[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Knuth's two-sum: adds x to `high`, and to `low` what rounding took. Only additions, which no
// compiler may fuse.
__device__ void add(double& high, double& low, double x) {
  const double next = high + x;
  const double added = next - high;
  low += (high - (next - added)) + (x - added);
  high = next;
}

// sums[i]: the sum of the word whose first position is entry i; -1 elsewhere. Returns that of all.
__device__ double sum_words(const AttentionSum& input, int64_t row, int slots, float max,
                            const RowMemory& own) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < slots; i += kThreads) {
    if (own.entries[i] == kNoEntry) continue;
    const double logit = load(input.logits, row, position_of(own.entries[i]));
    const double x = logit - static_cast<double>(max);
    own.sums[i] = x < kLeastLogit ? 0.0 : exp(x);
  }
  __syncthreads();
  double total = 0, lost = 0;
  for (int i = thread; i < slots; i += kThreads) {
    if (!own.is_first(i)) continue;
    const int32_t word = word_of(own.entries[i]);
    double high = 0, low = 0;
    // No other thread reads these weights, so the sum takes the place of the first.
    for (int j = i; j < slots && word_of(own.entries[j]) == word; ++j) add(high, low, own.sums[j]);
    own.sums[i] = high + low;
    add(total, lost, own.sums[i]);
  }
  __syncthreads();
  for (int i = thread; i < slots; i += kThreads) {
    if (!own.is_first(i)) own.sums[i] = -1;
  }
  __syncthreads();
  return block_reduce(total + lost, Sum());
}

// Collects the words of the largest sums; returns how many there are.
__device__ int select(const RowMemory& own, int slots, int k, Words& words) {
  const double bar = static_cast<double>(bar_of(own.sums, slots, k));
  const auto counts = [bar](double sum) { return sum >= bar && sum >= 0; };
  const auto key = [&](int i) {
    return DoubleKey{ordered_bits_of_double(own.sums[i]),
                     ~static_cast<uint64_t>(position_of(own.entries[i]))};
  };
  for (int i = static_cast<int>(threadIdx.x); i < slots; i += kThreads) {
    if (counts(own.sums[i])) words.offer(key(i));
  }
  if (words.overflowed()) {  // rare: many equal sums, or a large k
    for (int begin = 0; begin < slots; begin += kThreads) {
      const int i = begin + static_cast<int>(threadIdx.x);
      const bool has_key = i < slots && counts(own.sums[i]);
      words.offer_all(has_key, has_key ? key(i) : DoubleKey{});
    }
  }
  return words.finish();
}

// Position -1 for none, whose probability is `prob`.
__device__ void write(const AttentionSum& input, int64_t row, int i, int32_t position,
                      double prob) {
  const int64_t to = row * input.k + i;
  const bool there = position >= 0;
  input.words[to] = there ? input.word_ids[row * input.logits.cols + position] : -1;
  input.first[to] = position;
  input.probs[to] = prob;
}

__device__ void sum_row(const AttentionSum& input, int64_t row, const RowMemory& own) {
  const int length = length_of(input, row);
  const auto slots = static_cast<int>(slots_of(length));
  const int thread = static_cast<int>(threadIdx.x), k = static_cast<int>(input.k);
  const float max = list_entries(input, row, length, slots, own.entries);
  if (max != max) {
    for (int i = thread; i < k; i += kThreads) write(input, row, i, -1, static_cast<double>(max));
    return;
  }
  if (k == 0) return;
  sort_entries(own.entries, slots);
  const double total = sum_words(input, row, slots, max, own);
  Words words(k);
  const int found = select(own, slots, k, words);
  for (int i = thread; i < k; i += kThreads) {
    if (i < found) {
      const DoubleKey key = words.key(i);
      write(input, row, i, static_cast<int32_t>(~key.rest),
            double_from_ordered_bits(key.ordered) / total);
    } else {
      write(input, row, i, -1, 0);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    attention_sum_kernel(AttentionSum input, RowMemory of_long_rows) {
  __shared__ uint64_t entries[kSharedPositions];
  __shared__ double sums[kSharedPositions];
  const int64_t cols = input.logits.cols;
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * slots_of(cols);
  RowMemory own{entries, sums};
  if (cols > kSharedPositions) own = {of_long_rows.entries + offset, of_long_rows.sums + offset};
  for (int64_t row = blockIdx.x; row < input.logits.rows; row += gridDim.x) {
    sum_row(input, row, own);
    __syncthreads();  // the memory serves the next row
  }
}

int64_t blocks_of(int64_t rows, int64_t cols) {
  return cols <= kSharedPositions ? rows : std::min(rows, kMostBlocks);
}

RowMemory divide(Workspace& space, int64_t rows, int64_t cols) {
  const int64_t items = cols <= kSharedPositions ? 0 : blocks_of(rows, cols) * slots_of(cols);
  RowMemory memory;
  memory.entries = space.take<uint64_t>(items);
  memory.sums = space.take<double>(items);
  return memory;
}

}  // namespace

int64_t attention_sum_bytes(int64_t rows, int64_t cols, int64_t) {
  Workspace space(nullptr);
  divide(space, rows, cols);
  return space.bytes();
}

void attention_sum(const AttentionSum& input, Stream stream) {
  check_topk(input.k);
  Workspace space(input.workspace);
  const RowMemory memory = divide(space, input.logits.rows, input.logits.cols);
  launch("attention_sum", attention_sum_kernel, blocks_of(input.logits.rows, input.logits.cols),
         kThreads, stream, input, memory);
}

}  // namespace fastmrc::cuda
