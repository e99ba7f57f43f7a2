// Weights are whole numbers: exp((logit - max) / temperature) in steps of a power of two so small
// that it does not show, and large enough that the sum of a row has 64 bits. Their sums are exact,
// in any order, so that threads may add as they come and a sum can be taken apart again.
//
// One kernel finds per row which candidates count and adds up their weights by chunks of
// candidates; another has a warp per draw, which looks for its place in the sums and walks through
// one chunk. The candidates of a row are numbered by rising token; of equal logits the first is the
// likelier.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/philox.h"
#include "cuda/automata.cuh"
#include "cuda/block.cuh"
#include "cuda/sample.h"
#include "cuda/workspace.h"
#include "fastmrc/ops.h"

namespace fastmrc::cuda {
namespace {

constexpr int kThreads = 512;      // of a row
constexpr int kBlocksPerSm = 2;    // enough to keep it busy; more would take registers away
constexpr int kDrawThreads = 256;  // a warp for each draw
constexpr int kAhead = 4;          // loads of a thread at a time
constexpr int kChunkItems = 8;     // of a lane
constexpr int kChunk = kChunkItems * kWarpSize;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

int64_t chunks_of(int64_t cols) { return (cols + kChunk - 1) / kChunk; }

enum class Outcome : uint8_t { kDraw, kNothing, kFault };

// What may be drawn from a row.
struct Choice {
  Outcome outcome = Outcome::kNothing;
  Fault fault = Fault::kMasked;     // Outcome::kFault only
  bool listed = false;              // whether there is a constraint
  const int32_t* tokens = nullptr;  // of the constraint, rising
  int32_t count = 0;                // candidates: its tokens and the end, or the whole row
  int32_t end_at = 0;               // the place of the end among the listed, `count` if it has none
  int32_t excluded = -1;            // the end in a whole row where it is not allowed
  float max = -kInfinity;           // largest logit of a candidate
  uint64_t cut = kNoKey;            // candidates with smaller keys do not count
};

// How logits become weights.
struct Scale {
  double inverse_temperature;
  double one;  // the weight of the largest logit
};

// Per row, see divide().
struct Prepared {
  Choice* choices;  // [rows]
  uint64_t* sums;   // [rows, chunks_of(cols)] weights of the chunks so far
};

Prepared divide(Workspace& space, int64_t rows, int64_t cols) {
  Prepared result;
  result.choices = space.take<Choice>(rows);
  result.sums = space.take<uint64_t>(rows * chunks_of(cols));
  return result;
}

// Low bits of ordered_bits() that tell nothing of a T: all are 0 or, for negative numbers, 1.
template <typename T>
constexpr int kSpareBits = 0;
template <>
constexpr int kSpareBits<Float16> = 13;
template <>
constexpr int kSpareBits<BFloat16> = 16;
template <typename T>
constexpr int kRankBits = 32 - kSpareBits<T>;

// Larger for larger values.
template <typename T>
__device__ uint32_t rank_of(float value) {
  return ordered_bits(value) >> kSpareBits<T>;
}

// A value of that rank, or one a little below where it is negative.
template <typename T>
__device__ float value_of_rank(uint32_t rank) {
  return from_ordered_bits(rank << kSpareBits<T>);
}

// The key of the candidate at `place`: larger for likelier ones. Place -1 stands for the end of all
// candidates of this rank.
__device__ inline uint64_t key_of(uint32_t rank, int32_t place) {
  return (static_cast<uint64_t>(rank) << 32) | static_cast<uint32_t>(~place);
}

template <typename T>
struct Candidates {
  const T* row;
  int32_t end_id;
  Scale scale;
  Choice choice;

  __device__ int32_t token(int32_t place) const {
    if (!choice.listed) return place;
    if (place == choice.end_at) return end_id;
    return choice.tokens[place < choice.end_at ? place : place - 1];
  }

  // -inf beyond the last.
  __device__ float logit(int64_t place) const {
    if (place >= choice.count || place == choice.excluded) return -kInfinity;
    return to_float(row[token(static_cast<int32_t>(place))]);
  }

  __device__ bool counts(float logit, int64_t place) const {
    return logit > -kInfinity &&
           key_of(rank_of<T>(logit), static_cast<int32_t>(place)) >= choice.cut;
  }

  __device__ uint64_t weight(float logit) const {
    const double above = static_cast<double>(logit) - static_cast<double>(choice.max);
    return static_cast<uint64_t>(exp(above * scale.inverse_temperature) * scale.one + 0.5);
  }

  // Calls fn(logit, place) for those of this thread.
  template <typename Fn>
  __device__ void for_each(const Fn& fn) const {
    for (int64_t first = threadIdx.x; first < choice.count; first += kAhead * kThreads) {
      float x[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) x[n] = logit(first + n * kThreads);
#pragma unroll
      for (int n = 0; n < kAhead; ++n) fn(x[n], first + n * kThreads);
    }
  }
};

// What is added up of a candidate that counts: its weight, or one.
template <typename T>
struct Weight {
  const Candidates<T>& of;
  __device__ uint64_t operator()(float logit) const { return of.weight(logit); }
};
struct One {
  __device__ uint64_t operator()(float) const { return 1; }
};

// Among candidates of any rank, or of one.
template <typename T, typename Amount>
struct Measure {
  const Candidates<T>& of;
  Amount amount;
  bool any_rank;
  uint32_t rank;

  __device__ uint64_t operator()(float logit, int64_t place) const {
    if (!of.counts(logit, place)) return 0;
    return any_rank || rank_of<T>(logit) == rank ? amount(logit) : 0;
  }
};

template <typename T>
__device__ Measure<T, Weight<T>> weights_of(const Candidates<T>& of) {
  return {of, Weight<T>{of}, true, 0};
}

__device__ inline unsigned lane() { return threadIdx.x % kWarpSize; }

// Sum of the values of this lane and those before it.
__device__ inline uint64_t warp_inclusive_scan(uint64_t value) {
  for (unsigned delta = 1; delta < kWarpSize; delta *= 2) {
    const uint64_t before = __shfl_up_sync(kFullWarp, value, delta);
    if (lane() >= delta) value += before;
  }
  return value;
}

// Item n of a lane is candidate n * kWarpSize + lane of the chunk.
template <typename T>
__device__ void load_chunk(const Candidates<T>& of, int64_t begin, float (&x)[kChunkItems]) {
#pragma unroll
  for (int n = 0; n < kChunkItems; ++n) x[n] = of.logit(begin + n * kWarpSize + lane());
}

// Adds up a measure of the candidates; sums [chunks], of the chunks so far. By a block.
template <typename T, typename Measure>
__device__ void add_up(const Candidates<T>& of, const Measure& measure, uint64_t* sums) {
  const int32_t chunks = (of.choice.count - 1) / kChunk + 1;
  for (int32_t c = static_cast<int32_t>(threadIdx.x) / kWarpSize; c < chunks;
       c += kThreads / kWarpSize) {
    const int64_t begin = static_cast<int64_t>(c) * kChunk;
    float x[kChunkItems];
    load_chunk(of, begin, x);
    uint64_t sum = 0;
#pragma unroll
    for (int n = 0; n < kChunkItems; ++n) sum += measure(x[n], begin + n * kWarpSize + lane());
    sum = warp_inclusive_scan(sum);
    if (lane() == kWarpSize - 1) sums[c] = sum;
  }
  __syncthreads();
  uint64_t before = 0;
  for (int32_t first = 0; first < chunks; first += kThreads) {
    const int32_t own = first + static_cast<int32_t>(threadIdx.x);
    const uint64_t through = before + block_inclusive_scan(own < chunks ? sums[own] : 0);
    if (own < chunks) sums[own] = through;
    __syncthreads();
    before = sums[min(first + kThreads, chunks) - 1];
  }
}

// The first of sums [count], which do not fall, above the target, as the last one is. By a warp,
// which halves the stretch five times at once.
__device__ inline int32_t first_above(const uint64_t* sums, int32_t count, uint64_t target) {
  int32_t begin = 0;
  while (count > 1) {
    const int32_t step = (count - 1) / kWarpSize + 1;
    const int32_t end = min(static_cast<int32_t>(lane() + 1) * step, count);
    const unsigned above = __ballot_sync(kFullWarp, sums[begin + end - 1] > target);
    const int32_t skipped = (__ffs(static_cast<int>(above)) - 1) * step;
    begin += skipped;
    count = min(step, count - skipped);
  }
  return begin;
}

// The place of the first candidate at which the running sum of the measure that add_up() added up
// exceeds the target, as the whole sum does. By a warp.
template <typename T, typename Measure>
__device__ int32_t find(const Candidates<T>& of, const Measure& measure, const uint64_t* sums,
                        uint64_t target) {
  const int32_t chunk = first_above(sums, (of.choice.count - 1) / kChunk + 1, target);
  const int64_t begin = static_cast<int64_t>(chunk) * kChunk;
  uint64_t before = chunk == 0 ? 0 : sums[chunk - 1];
  float x[kChunkItems];
  load_chunk(of, begin, x);
  int32_t found = -1;
#pragma unroll
  for (int n = 0; n < kChunkItems; ++n) {
    if (found >= 0) continue;
    const int64_t first = begin + n * kWarpSize;
    const uint64_t through = before + warp_inclusive_scan(measure(x[n], first + lane()));
    const unsigned above = __ballot_sync(kFullWarp, through > target);
    if (above != 0) found = static_cast<int32_t>(first) + __ffs(static_cast<int>(above)) - 1;
    before = __shfl_sync(kFullWarp, through, kWarpSize - 1);
  }
  return found;
}

// A sum per digit, in halves, since shared memory adds 32 bits at a time.
struct Bins {
  uint32_t low[kBins], high[kBins];

  __device__ void clear() {
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) low[b] = high[b] = 0;
    __syncthreads();
  }

  __device__ void add(uint32_t bin, uint64_t amount) {
    const auto low_part = static_cast<uint32_t>(amount);
    if (amount == 0) return;
    const uint32_t old = atomicAdd(&low[bin], low_part);
    const uint32_t carry = old > ~low_part ? 1 : 0;
    const uint32_t high_part = static_cast<uint32_t>(amount >> 32) + carry;
    if (high_part != 0) atomicAdd(&high[bin], high_part);
  }

  __device__ uint64_t sum(int bin) const {
    return (static_cast<uint64_t>(high[bin]) << 32) | low[bin];
  }
};

__device__ inline Bins& shared_bins() {
  __shared__ Bins bins;
  return bins;
}

// The digit in which a sum from the largest digit down reaches what is needed.
struct Digit {
  uint32_t digit;
  uint64_t within;  // sum of this digit
  uint64_t needed;  // of it, above 0
};

// Finds it, where need(total) is needed, above 0 and at most the total. By a block.
template <typename Need>
__device__ Digit find_digit(const Bins& bins, const Need& need) {
  __shared__ uint64_t total;
  __shared__ Digit found;
  constexpr int kOwn = kBins / kThreads;
  const int largest = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn;
  uint64_t own = 0;
  for (int n = 0; n < kOwn; ++n) own += bins.sum(largest - n);
  const uint64_t through = block_inclusive_scan(own);
  if (threadIdx.x == kThreads - 1) total = through;
  __syncthreads();
  const uint64_t needed = need(total);
  uint64_t above = through - own;
  for (int n = 0; n < kOwn; ++n) {
    const uint64_t within = bins.sum(largest - n);
    if (above < needed && needed <= above + within) {
      found = {static_cast<uint32_t>(largest - n), within, needed - above};
    }
    above += within;
  }
  __syncthreads();
  return found;
}

// The smallest key of the fewest likeliest candidates whose amounts reach need(sum of all), above 0
// and at most that. By a block; `sums` as for add_up().
template <typename T, typename Amount, typename Need>
__device__ uint64_t find_cut(const Candidates<T>& of, const Amount& amount, const Need& need,
                             uint64_t* sums) {
  Bins& bins = shared_bins();
  uint32_t rank = 0;  // its first digits
  uint64_t within = 0, needed = 0;
  for (int left = kRankBits<T>; left > 0;) {
    const bool first = left == kRankBits<T>;
    const int bits = min(left, kDigitBits);
    left -= bits;
    bins.clear();
    of.for_each([&](float x, int64_t place) {
      if (!of.counts(x, place)) return;
      const uint32_t leading = rank_of<T>(x) >> left;
      if (leading >> bits == rank) bins.add(leading & ((1u << bits) - 1), amount(x));
    });
    __syncthreads();
    const Digit found =
        find_digit(bins, [&](uint64_t total) { return first ? need(total) : needed; });
    rank = (rank << bits) | found.digit;
    within = found.within;
    needed = found.needed;
  }
  uint64_t cut = key_of(rank, -1);
  if (within - needed >= amount(value_of_rank<T>(rank))) {  // perhaps not all of this rank
    const Measure<T, Amount> equal{of, amount, false, rank};
    add_up(of, equal, sums);
    cut = key_of(rank, find(of, equal, sums, needed - 1));
    __syncthreads();  // the sums are read
  }
  return max(cut, of.choice.cut);
}

// Sets the cut of top_k, then that of top_p among what is left.
template <typename T>
__device__ void truncate(Candidates<T>& of, int32_t top_k, double top_p, uint64_t* sums) {
  if (top_k > 0 && top_k < of.choice.count) {
    of.choice.cut = find_cut(
        of, One(), [=](uint64_t total) { return min(static_cast<uint64_t>(top_k), total); }, sums);
  }
  if (top_p < 1) {
    of.choice.cut = find_cut(
        of, Weight<T>{of},
        [=](uint64_t total) {
          const double share = ceil((top_p - kNucleusSlack) * static_cast<double>(total));
          return share < 1 ? uint64_t{1} : min(static_cast<uint64_t>(share), total);
        },
        sums);
  }
}

__device__ inline void set_fault(Choice& choice, Fault fault) {
  choice.outcome = Outcome::kFault;
  choice.fault = fault;
}

__device__ inline void list_allowed(const Sample& sample, const AutomatonView& automaton,
                                    int32_t state, bool allow_end, Choice& choice) {
  if (state < kDeadState || state >= automaton.num_states) return set_fault(choice, Fault::kState);
  const Edges edges = automaton.edges(state);
  const int32_t end_at = edges.lower_bound(sample.end_id);
  if (edges.count > 0 && edges.tokens[edges.count - 1] >= sample.logits.cols) {
    return set_fault(choice, Fault::kToken);
  }
  if (end_at < edges.count && edges.tokens[end_at] == sample.end_id) {
    return set_fault(choice, Fault::kEndToken);
  }
  const bool with_end = allow_end && automaton.is_final(state);
  choice.listed = true;
  choice.tokens = edges.tokens;
  choice.count = edges.count + (with_end ? 1 : 0);
  choice.end_at = with_end ? end_at : choice.count;
}

// What the arguments say of a row; neither the largest logit nor the cut.
__device__ inline Choice choose(const Sample& sample, int64_t row) {
  Choice choice;
  if (sample.argmax[row] < 0) {
    const float max = sample.max[row];
    set_fault(choice, max == -kInfinity  ? Fault::kMasked
                      : max == kInfinity ? Fault::kInfinity
                                         : Fault::kNan);
    return choice;
  }
  const int32_t state = sample.states == nullptr ? kRootState : sample.states[row];
  if (state == kDeadState) return choice;
  const bool allow_end = sample.allow_end == nullptr || sample.allow_end[row] != 0;
  const int32_t automaton = sample.automaton_of == nullptr ? -1 : sample.automaton_of[row];
  choice.outcome = Outcome::kDraw;
  if (automaton >= 0) {
    list_allowed(sample, view_of(sample.automata, automaton), state, allow_end, choice);
  } else {
    choice.count = static_cast<int32_t>(sample.logits.cols);
    choice.excluded = allow_end ? -1 : sample.end_id;
  }
  return choice;
}

// The largest logit of the candidates, -inf if there are none. By a block.
template <typename T>
__device__ float largest_of(const Candidates<T>& of, const Sample& sample, int64_t row) {
  if (!of.choice.listed && of.choice.excluded != sample.argmax[row]) return sample.max[row];
  float largest = -kInfinity;
  of.for_each([&](float x, int64_t) { largest = max(largest, x); });
  return block_reduce(largest, Maximum());
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    prepare_kernel(TypedRows<T> rows, Sample sample, Scale scale, Prepared prepared,
                   int64_t chunks_per_row) {
  const int64_t row = blockIdx.x;
  uint64_t* sums = prepared.sums + row * chunks_per_row;
  Candidates<T> of{rows.row(row), sample.end_id, scale, choose(sample, row)};
  if (of.choice.outcome == Outcome::kDraw) {
    of.choice.max = largest_of(of, sample, row);
    if (of.choice.max == -kInfinity) of.choice.outcome = Outcome::kNothing;
  }
  if (of.choice.outcome == Outcome::kDraw) {
    truncate(of, sample.top_k, sample.top_p, sums);
    add_up(of, weights_of(of), sums);
  }
  if (threadIdx.x == 0) prepared.choices[row] = of.choice;
}

template <typename T>
__global__ void __launch_bounds__(kDrawThreads)
    draw_kernel(TypedRows<T> rows, Sample sample, Scale scale, Prepared prepared,
                int64_t chunks_per_row) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * (kDrawThreads / kWarpSize) +
                    static_cast<int>(threadIdx.x) / kWarpSize;
  if (d >= sample.draws) return;
  const int64_t row = sample.row_of == nullptr ? d : sample.row_of[d];
  const uint64_t* sums = prepared.sums + row * chunks_per_row;
  const Candidates<T> of{rows.row(row), sample.end_id, scale, prepared.choices[row]};
  int32_t token = -1;
  double log_prob = -kInfinityDouble;
  if (of.choice.outcome == Outcome::kDraw) {
    const uint64_t stream =
        sample.streams == nullptr ? static_cast<uint64_t>(d) : sample.streams[d];
    const double u =
        uniform(sample.seed, stream, sample.positions == nullptr ? 0 : sample.positions[d]);
    const uint64_t total = sums[(of.choice.count - 1) / kChunk];
    const auto target = static_cast<uint64_t>(u * static_cast<double>(total));
    const int32_t place = find(of, weights_of(of), sums, min(target, total - 1));
    token = of.token(place);
    log_prob = static_cast<double>(of.logit(place)) - sample.logsumexp[row];
  } else if (of.choice.outcome == Outcome::kFault) {
    log_prob = kNan;
    if (lane() == 0) report(sample.fault, row, of.choice.fault);
  }
  if (lane() != 0) return;
  sample.tokens[d] = token;
  sample.log_probs[d] = log_prob;
}

Scale scale_of(int64_t cols, double temperature) {
  constexpr int kSumBits = 62, kDoubleBits = 52;
  int bits = kSumBits;
  for (int64_t n = cols; n > 1; n = (n + 1) / 2) --bits;
  return {std::fmin(1 / temperature, std::numeric_limits<double>::max()),
          std::ldexp(1.0, std::min(bits, kDoubleBits))};
}

}  // namespace

int64_t sample_bytes(int64_t rows, int64_t cols) {
  Workspace space(nullptr);
  divide(space, rows, cols);
  return space.bytes();
}

void sample(const Sample& sample, Stream stream) {
  const int64_t rows = sample.logits.rows, cols = sample.logits.cols;
  check_truncation(sample.top_k, sample.top_p, sample.temperature);
  if (sample.automaton_of != nullptr) check_end_id(sample.end_id, cols);
  Workspace space(sample.workspace);
  const Prepared prepared = divide(space, rows, cols);
  const Scale scale = scale_of(cols, sample.temperature);
  constexpr int kDraws = kDrawThreads / kWarpSize;  // of a block
  with_type(sample.logits, [&](auto typed) {
    using T = typename decltype(typed)::Item;
    launch("sample", prepare_kernel<T>, rows, kThreads, stream, typed, sample, scale, prepared,
           chunks_of(cols));
    launch("sample", draw_kernel<T>, (sample.draws + kDraws - 1) / kDraws, kDrawThreads, stream,
           typed, sample, scale, prepared, chunks_of(cols));
  });
}

}  // namespace fastmrc::cuda
