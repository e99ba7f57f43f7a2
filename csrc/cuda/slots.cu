// A block fills the slots of a passage. The exact search needs no memory that grows with the number
// of paths: the threads walk them depth first, and those that run out take over half of what
// another one has left.
#include <algorithm>
#include <cmath>

#include "cuda/automata.cuh"
#include "cuda/block.cuh"
#include "cuda/slots.h"
#include "cuda/workspace.h"

namespace fastmrc::cuda {
namespace {

constexpr int kThreads = 256;

__device__ constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Whether a row may be answered from.
__device__ bool check_row(const SlotSearch& search, int64_t row) {
  const float max = search.max[row];
  if (max > -kInfinity && max < kInfinity) return true;
  if (threadIdx.x == 0) {
    const Fault bad = max != max ? Fault::kNan : Fault::kInfinity;
    report(search.fault, row, max == -kInfinity ? Fault::kMasked : bad);
  }
  return false;
}

// --- greedy --------------------------------------------------------------------------------------

// In place of a key where the end token is inside a constraint; above all keys.
constexpr uint64_t kEndInside = ~uint64_t{0};

// Largest key of the tokens that a constraint allows.
template <typename T>
__device__ uint64_t best_allowed(const T* row, const Edges& edges, int32_t end_id) {
  uint64_t best = kNoKey;
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < edges.count; e += kThreads) {
    const int32_t token = edges.tokens[e];
    const uint64_t key = token == end_id ? kEndInside : sort_key(to_float(row[token]), token);
    best = Maximum()(best, key);
  }
  return block_reduce(best, Maximum());
}

// Largest key of all tokens but the end.
template <typename T>
__device__ uint64_t best_but_end(const T* row, int64_t cols, int32_t end_id) {
  uint64_t best = kNoKey;
  for (int64_t i = threadIdx.x; i < cols; i += kThreads) {
    const auto token = static_cast<int32_t>(i);
    if (token != end_id) best = Maximum()(best, sort_key(to_float(row[i]), token));
  }
  return block_reduce(best, Maximum());
}

struct Outcome {
  int32_t length;
  float score;
};

// All threads call and get the same outcome; `tokens` [slots] holds those of an answer.
template <typename T>
class GreedySearch {
 public:
  __device__ GreedySearch(const TypedRows<T>& logits, const SlotSearch& search, int64_t passage)
      : logits_(logits), search_(search), first_row_(passage * search.slots) {
    const int32_t a = search.automaton_of == nullptr ? -1 : search.automaton_of[passage];
    constrained_ = a >= 0;
    if (constrained_) automaton_ = view_of(search.automata, a);
  }

  __device__ Outcome run(int32_t* tokens) const {
    const Outcome none{-1, -kInfinity}, faulty{-1, kNan};
    int32_t state = kRootState;
    double sum = 0;
    for (int64_t slot = 0; slot < search_.slots; ++slot) {
      const int64_t row = first_row_ + slot;
      if (!check_row(search_, row)) return faulty;
      const bool may_end = slot >= search_.min_tokens && (!constrained_ || is_final(state));
      uint64_t key = kNoKey;
      if (constrained_) {
        const Edges edges = automaton_.edges(state);
        if (!check_edges(edges, row)) return faulty;
        key = best_allowed(logits_.row(row), edges, search_.end_id);
        if (key == kEndInside) {
          report_by_one(row, Fault::kEndToken);
          return faulty;
        }
        if (may_end) key = Maximum()(key, end_key(row));
      } else {
        key = best_of_all(row, may_end);
      }
      if (key == kNoKey) return none;
      const int32_t token = id_of(key);
      sum += exp(static_cast<double>(value_of(key)) - search_.logsumexp[row]);
      if (token == search_.end_id) return {static_cast<int32_t>(slot), mean(sum, slot + 1)};
      if (threadIdx.x == 0) tokens[slot] = token;
      if (constrained_) state = automaton_.advance(state, token);
    }
    if (constrained_ && !is_final(state)) return none;
    return {static_cast<int32_t>(search_.slots), mean(sum, search_.slots)};
  }

 private:
  __device__ static float mean(double sum, int64_t count) {
    return static_cast<float>(sum / static_cast<double>(count));
  }

  __device__ bool is_final(int32_t state) const { return automaton_.is_final(state); }

  __device__ uint64_t end_key(int64_t row) const {
    return sort_key(to_float(logits_.row(row)[search_.end_id]), search_.end_id);
  }

  __device__ uint64_t best_of_all(int64_t row, bool may_end) const {
    const int32_t token = search_.argmax[row];
    if (may_end || token != search_.end_id) return sort_key(search_.max[row], token);
    return best_but_end(logits_.row(row), logits_.cols, search_.end_id);
  }

  // Whether the tokens, which rise, are in the vocabulary.
  __device__ bool check_edges(const Edges& edges, int64_t row) const {
    if (edges.count == 0 || edges.tokens[edges.count - 1] < logits_.cols) return true;
    report_by_one(row, Fault::kToken);
    return false;
  }

  __device__ void report_by_one(int64_t row, Fault kind) const {
    if (threadIdx.x == 0) report(search_.fault, row, kind);
  }

  const TypedRows<T>& logits_;
  const SlotSearch& search_;
  const int64_t first_row_;
  bool constrained_;
  AutomatonView automaton_{};
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    slot_argmax_kernel(TypedRows<T> logits, SlotSearch search) {
  const int64_t passage = blockIdx.x;
  int32_t* tokens = search.tokens + passage * search.slots;
  const Outcome outcome = GreedySearch<T>(logits, search, passage).run(tokens);
  __syncthreads();  // one thread wrote the tokens
  for (int64_t i = max(outcome.length, 0) + static_cast<int64_t>(threadIdx.x); i < search.slots;
       i += kThreads) {
    tokens[i] = -1;
  }
  if (threadIdx.x == 0) {
    search.lengths[passage] = outcome.length;
    search.scores[passage] = outcome.score;
  }
}

// --- exact ---------------------------------------------------------------------------------------

constexpr int kMaxWidth = static_cast<int>(kMaxSlotWidth);
constexpr int kRoom = kThreads - kMaxWidth;  // new answers between two rankings, a thread for each
constexpr int kSteps = 8;                    // of each thread between two rankings
// Blocks beyond those that a device runs at a time would only take memory; they serve several
// passages each.
constexpr int64_t kMaxBlocks = 256;

// A node on the path of a thread: the sum of the probabilities up to it, and its edges [next, end)
// that are not taken yet. If the path goes on, it does by edge next - 1.
struct alignas(16) Frame {
  double sum;
  int32_t next, end;
};

// By the sum of the probabilities up to a node: below `worse` nothing that goes on from there comes
// up to the bar, below `tied` nothing surpasses it.
struct alignas(16) Limits {
  double worse, tied;
};

struct Space {
  double* largest;  // [passages * slots] largest probability of a token of the constraint
  double* end;      // [passages * slots] probability of the end token
  uint8_t* sound;   // [passages * slots] whether there was no fault
  Frame* frames;    // [blocks, slots, kThreads]
  Limits* limits;   // [blocks, slots]
  int32_t* kept;    // [blocks, 2, width, slots]
  int32_t* fresh;   // [blocks, kRoom, slots]
};

int64_t blocks_for(int64_t passages) { return std::min(passages, kMaxBlocks); }

Space divide(Workspace& space, int64_t passages, int64_t slots, int64_t width) {
  const int64_t rows = passages * slots;
  const int64_t block_rows = blocks_for(passages) * slots;
  Space result;
  result.largest = space.take<double>(rows);
  result.end = space.take<double>(rows);
  result.sound = space.take<uint8_t>(rows);
  result.frames = space.take<Frame>(block_rows * kThreads);
  result.limits = space.take<Limits>(block_rows);
  result.kept = space.take<int32_t>(block_rows * 2 * width);
  result.fresh = space.take<int32_t>(block_rows * kRoom);
  return result;
}

// A block for each slot.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    read_slots_kernel(TypedRows<T> logits, SlotSearch search, Space space) {
  const int64_t row = blockIdx.x;
  const T* items = logits.row(row);
  const int32_t a = search.automaton_of[row / search.slots];
  const int64_t begin = search.automata.first_edge[a], end = search.automata.first_edge[a + 1];
  float largest = -kInfinity;
  bool beyond = false, end_inside = false;
  for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) {
    const int32_t token = search.automata.edge_token[e];
    end_inside |= token == search.end_id;
    beyond |= token >= logits.cols;
    if (token < logits.cols) largest = Maximum()(largest, to_float(items[token]));
  }
  largest = block_reduce(largest, Maximum());
  beyond = __syncthreads_count(beyond) > 0;
  end_inside = __syncthreads_count(end_inside) > 0;
  const bool sound = check_row(search, row) && !beyond && !end_inside;
  if (threadIdx.x != 0) return;
  if (beyond) report(search.fault, row, Fault::kToken);
  if (end_inside) report(search.fault, row, Fault::kEndToken);
  space.sound[row] = sound ? 1 : 0;
  const double logsumexp = search.logsumexp[row];
  space.largest[row] = exp(static_cast<double>(largest) - logsumexp);
  space.end[row] = exp(static_cast<double>(to_float(items[search.end_id])) - logsumexp);
}

// The best answers of a passage. After every few steps of its threads the block ranks what they
// found; the last of the best `width` answers is the bar. A path is dropped only if nothing that
// goes on from it comes before that one, by score and then by tokens. Each answer is met once at
// most and no two are equal, so what remains does not depend on which thread comes when.
template <typename T>
class ExactSearch {
 public:
  __device__ ExactSearch(const TypedRows<T>& logits, const SlotSearch& search, const Space& space,
                         int width, int64_t passage)
      : logits_(logits),
        search_(search),
        automaton_(view_of(search.automata, search.automaton_of[passage])),
        first_row_(passage * search.slots),
        slots_(static_cast<int32_t>(search.slots)),
        width_(width),
        largest_(space.largest + first_row_),
        end_probability_(space.end + first_row_) {
    const int64_t block_row = blockIdx.x * search.slots;
    frames_ = space.frames + block_row * kThreads;
    limits_ = space.limits + block_row;
    kept_ = space.kept + block_row * 2 * width;
    fresh_ = space.fresh + block_row * kRoom;
  }

  // All threads call, for input without faults.
  __device__ void run() {
    start();
    for (;;) {
      for (int i = 0; i < kSteps && walking() && step(); ++i) {
      }
      const int walkers = __syncthreads_count(walking());
      rank();
      if (walkers == 0) return;
      if (walkers < kThreads) share(kThreads - walkers);
    }
  }

  // Writes what was found; `missing`: the score where there is nothing.
  __device__ void write(int64_t passage, float missing) const {
    const int64_t first = passage * width_;
    const int64_t entries = static_cast<int64_t>(width_) * slots_;
    const int64_t found = static_cast<int64_t>(number_) * slots_;
    for (int64_t i = threadIdx.x; i < entries; i += kThreads) {
      search_.tokens[first * slots_ + i] = i < found ? kept_[i] : -1;
    }
    for (int i = static_cast<int>(threadIdx.x); i < width_; i += kThreads) {
      search_.lengths[first + i] = i < number_ ? shared().lengths[i] : -1;
      search_.scores[first + i] = i < number_ ? shared().scores[i] : missing;
    }
  }

 private:
  // What a thread leaves to another: its edges [next, end) of the node at `level`.
  struct Gift {
    int32_t thread, level, next, end;
  };
  struct Shared {
    // Of the answers kept, from 0, and of new ones, from kMaxWidth.
    float scores[kThreads];
    int32_t lengths[kThreads];
    int32_t sources[kMaxWidth];
    Gift gifts[kThreads];
    int fresh;  // answers offered since the last ranking
  };

  __device__ static Shared& shared() {
    __shared__ Shared memory;
    return memory;
  }

  __device__ Frame& frame(int32_t level, int32_t thread) const {
    return frames_[static_cast<int64_t>(level) * kThreads + thread];
  }
  __device__ Frame& frame(int32_t level) const {
    return frame(level, static_cast<int32_t>(threadIdx.x));
  }

  // --- walking ---

  // Each thread gets a part of the root's edges, and one the answer without tokens.
  __device__ void start() {
    const auto thread = static_cast<int64_t>(threadIdx.x);
    const Limits none{-kInfinityDouble, -kInfinityDouble};
    for (int64_t i = thread; i < slots_; i += kThreads) limits_[i] = none;
    const int64_t edges = automaton_.edges(kRootState).count;
    const int32_t first = automaton_.edge_begin[kRootState];
    next_ = first + static_cast<int32_t>(edges * thread / kThreads);
    end_ = first + static_cast<int32_t>(edges * (thread + 1) / kThreads);
    if (thread == 0) {
      shared().fresh = 0;
      if (may_end(kRootState, 0)) append(score(0, 0.0), 0, -1);
    }
    __syncthreads();
  }

  __device__ bool walking() const { return depth_ >= base_; }

  // Takes an edge, the next one depth first. False if there is none, or no room for the answer that
  // it leads to: then it is the next one again.
  __device__ bool step() {
    while (next_ == end_) {
      if (--depth_ < base_) return false;
      const Frame above = frame(depth_);
      sum_ = above.sum;
      next_ = above.next;
      end_ = above.end;
    }
    const int32_t edge = next_++;
    const int32_t token = automaton_.edge_token[edge], target = automaton_.edge_target[edge];
    const int64_t row = first_row_ + depth_;
    const auto logit = static_cast<double>(to_float(logits_.row(row)[token]));
    const double sum = sum_ + exp(logit - search_.logsumexp[row]);
    const int32_t length = depth_ + 1;
    if (may_end(target, length)) {
      const float found = score(length, sum);
      const bool wanted = found > bar_ || (found == bar_ && !behind_last(token));
      if (wanted && !append(found, length, token)) {
        --next_;
        return false;
      }
    }
    if (length == slots_) return true;
    const int32_t begin = automaton_.edge_begin[target], end = automaton_.edge_begin[target + 1];
    if (begin == end || hopeless(length, sum, token)) return true;
    frame(depth_) = {sum_, next_, end_};
    depth_ = length;
    sum_ = sum;
    next_ = begin;
    end_ = end;
    return true;
  }

  __device__ bool may_end(int32_t state, int32_t length) const {
    return (length == slots_ || length >= search_.min_tokens) && automaton_.is_final(state);
  }

  __device__ float score(int32_t length, double sum) const {
    if (length == slots_) return static_cast<float>(sum / static_cast<double>(length));
    return static_cast<float>((sum + end_probability_[length]) / static_cast<double>(length + 1));
  }

  // Whether nothing that goes on from a node, reached by `token`, can be kept.
  __device__ bool hopeless(int32_t length, double sum, int32_t token) const {
    const Limits limits = limits_[length];
    return sum < limits.worse || (sum < limits.tied && behind_last(token));
  }

  // Token i of the path of this thread, i < depth_.
  __device__ int32_t path_token(int32_t i) const {
    return automaton_.edge_token[frame(i).next - 1];
  }

  // Whether, of equal scores, the last answer kept comes before all that begin with the path and
  // `token`. There are `width` answers; none of them begins so, as the walk gets here only once.
  __device__ bool behind_last(int32_t token) const {
    const int32_t* last = kept_ + static_cast<int64_t>(width_ - 1) * slots_;
    for (int32_t i = 0; i < depth_; ++i) {
      const int32_t own = path_token(i);
      if (own != last[i]) return own > last[i];  // beyond its end that is -1
    }
    return token > last[depth_];
  }

  // Adds the answer of the path and, if it has any, its last token. False if there is no room.
  __device__ bool append(float score, int32_t length, int32_t token) {
    const int place = atomicAdd(&shared().fresh, 1);
    if (place >= kRoom) return false;
    shared().scores[kMaxWidth + place] = score;
    shared().lengths[kMaxWidth + place] = length;
    int32_t* tokens = fresh_ + static_cast<int64_t>(place) * slots_;
    for (int32_t i = 0; i + 1 < length; ++i) tokens[i] = path_token(i);
    if (length > 0) tokens[length - 1] = token;
    for (int32_t i = length; i < slots_; ++i) tokens[i] = -1;
    return true;
  }

  // --- ranking ---

  // Keeps the best answers, in their order. After a barrier.
  __device__ void rank() {
    const int fresh = min(shared().fresh, kRoom);
    __syncthreads();  // all have read
    if (fresh == 0) return;
    const int total = number_ + fresh;
    const int own = static_cast<int>(threadIdx.x);
    int place = width_;
    float own_score = 0;
    int32_t own_length = 0;
    if (own < total) {
      own_score = shared().scores[place_of(own)];
      own_length = shared().lengths[place_of(own)];
      place = 0;
      for (int i = 0; i < total && place < width_; ++i) place += before(i, own, own_score) ? 1 : 0;
    }
    __syncthreads();  // all have read
    if (place < width_) {
      shared().scores[place] = own_score;
      shared().lengths[place] = own_length;
      shared().sources[place] = own;
    }
    if (own == 0) shared().fresh = 0;
    __syncthreads();
    const int number = min(total, width_);
    move_tokens(number);
    number_ = number;
    const float bar = number == width_ ? shared().scores[width_ - 1] : -kInfinity;
    if (bar > bar_) set_limits(bar);
    bar_ = bar;
    __syncthreads();
  }

  // Answers by number: first those kept, then the new ones.
  __device__ int place_of(int i) const { return i < number_ ? i : kMaxWidth + i - number_; }
  __device__ const int32_t* tokens_of(int i) const {
    return i < number_ ? kept_ + static_cast<int64_t>(i) * slots_
                       : fresh_ + static_cast<int64_t>(i - number_) * slots_;
  }

  // Whether answer i comes before another one.
  __device__ bool before(int i, int other, float other_score) const {
    const float score = shared().scores[place_of(i)];
    if (score != other_score) return score > other_score;
    if (i == other) return false;
    const int32_t *a = tokens_of(i), *b = tokens_of(other);
    int32_t same = 0;
    while (a[same] == b[same]) ++same;  // no two are equal
    return a[same] < b[same];
  }

  // Moves the tokens of the best to the other half of `kept`.
  __device__ void move_tokens(int number) {
    const int64_t half = static_cast<int64_t>(width_) * slots_;
    int32_t* to = second_half_ ? kept_ - half : kept_ + half;
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(number) * slots_; i += kThreads) {
      to[i] = tokens_of(shared().sources[i / slots_])[i % slots_];
    }
    kept_ = to;
    second_half_ = !second_half_;
  }

  // For a node of `depth` tokens whose probabilities sum to s, no answer of `length` tokens scores
  // more than (s + rest) / count, rest: each further slot at its largest probability, and the end.
  __device__ void set_limits(float bar) {
    // Less than `below` is rounded to less than the bar, less than `above` to the bar at most;
    // with a margin as sums are rounded in another order.
    constexpr double kMargin = 1 - 1e-12;
    const uint32_t bits = __float_as_uint(bar);  // not negative, so neighbours are one apart
    const auto exact = static_cast<double>(bar);
    const double up = static_cast<double>(__uint_as_float(bits + 1)) - exact;
    const double down = bar > 0 ? exact - static_cast<double>(__uint_as_float(bits - 1)) : 0;
    const double above = (exact + up / 2) * kMargin;
    const double below = bar > 0 ? (exact - down / 2) * kMargin : -kInfinityDouble;
    for (int64_t depth = 1 + threadIdx.x; depth < slots_; depth += kThreads) {
      Limits limits{kInfinityDouble, kInfinityDouble};
      double sum = 0;
      for (int64_t length = depth + 1; length <= slots_; ++length) {
        sum += largest_[length - 1];
        const bool ends = length < slots_;
        const double rest = ends ? sum + end_probability_[length] : sum;
        const auto count = static_cast<double>(ends ? length + 1 : length);
        limits.worse = Minimum()(limits.worse, below * count - rest);
        limits.tied = Minimum()(limits.tied, above * count - rest);
      }
      limits_[depth] = limits;
    }
  }

  // --- sharing ---

  // Gives `idle` threads that have nothing to do what others leave to them.
  __device__ void share(int idle) {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const bool has_none = !walking();
    if (!has_none) frame(depth_) = {sum_, next_, end_};
    const bool gives = !has_none && find_spare();
    const int givers = __syncthreads_count(gives);
    if (givers == 0) return;
    const uint32_t counted = block_inclusive_scan((has_none ? 1u : 0u) | (gives ? 1u << 16 : 0u));
    const int order = static_cast<int>(gives ? counted >> 16 : counted & 0xffffu) - 1;
    if (gives && order < idle) shared().gifts[order] = give(thread);
    __syncthreads();
    if (has_none && order < givers) receive(shared().gifts[order]);
    __syncthreads();  // the frames of the givers are read
  }

  // Moves the base up to the first node with edges to spare; false if there is none. A thread keeps
  // one edge of the node that it is at.
  __device__ bool find_spare() {
    for (; base_ < depth_; ++base_) {
      if (frame(base_).next < frame(base_).end) return true;
    }
    return end_ - next_ > 1;
  }

  __device__ Gift give(int32_t thread) {
    Frame& from = frame(base_);
    const int32_t left = from.end - from.next;
    const int32_t end = from.end;
    from.end -= base_ < depth_ ? (left + 1) / 2 : left / 2;
    if (base_ == depth_) end_ = from.end;
    return {thread, base_, from.end, end};
  }

  __device__ void receive(const Gift& gift) {
    for (int32_t level = 0; level < gift.level; ++level) frame(level) = frame(level, gift.thread);
    base_ = gift.level;
    depth_ = gift.level;
    sum_ = frame(gift.level, gift.thread).sum;
    next_ = gift.next;
    end_ = gift.end;
  }

  const TypedRows<T>& logits_;
  const SlotSearch& search_;
  const AutomatonView automaton_;
  const int64_t first_row_;
  const int32_t slots_;
  const int width_;
  const double *largest_, *end_probability_;
  Frame* frames_;
  Limits* limits_;
  int32_t *kept_, *fresh_;  // tokens: of the answers kept, best first, and of new ones
  bool second_half_ = false;
  int number_ = 0;          // answers kept
  float bar_ = -kInfinity;  // score of the last, if there are `width`

  // The walk of this thread: it is at a node `depth_` edges below the root and returns to nodes
  // down from `base_` only. That node is not in its frames, unless threads share.
  int32_t depth_ = 0, base_ = 0;
  int32_t next_ = 0, end_ = 0;
  double sum_ = 0;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    slot_topk_kernel(TypedRows<T> logits, SlotSearch search, Space space, int32_t width) {
  for (int64_t passage = blockIdx.x; passage < search.passages; passage += gridDim.x) {
    bool faulty = false;
    for (int64_t slot = threadIdx.x; slot < search.slots; slot += kThreads) {
      faulty |= space.sound[passage * search.slots + slot] == 0;
    }
    faulty = __syncthreads_count(faulty) > 0;  // also: the last passage is written
    ExactSearch<T> exact(logits, search, space, width, passage);
    if (!faulty) exact.run();
    exact.write(passage, faulty ? kNan : -kInfinity);
  }
}

void check_search(const SlotSearch& search) {
  if (search.slots >= 1) return;
  throw std::invalid_argument("slots: expected at least 1, got " + std::to_string(search.slots));
}

}  // namespace

void slot_argmax(const SlotSearch& search, Stream stream) {
  check_search(search);
  with_type(search.logits, [&](auto logits) {
    using T = typename decltype(logits)::Item;
    launch("slot_argmax", slot_argmax_kernel<T>, search.passages, kThreads, stream, logits, search);
  });
}

int64_t slot_topk_bytes(int64_t passages, int64_t slots, int64_t width) {
  Workspace space(nullptr);
  divide(space, passages, slots, width);
  return space.bytes();
}

void slot_topk(const SlotSearch& search, int64_t width, Stream stream) {
  check_search(search);
  if (width < 1 || width > kMaxSlotWidth) {
    throw std::invalid_argument("width: expected 1 to " + std::to_string(kMaxSlotWidth) +
                                " answers, got " + std::to_string(width));
  }
  if (search.automaton_of == nullptr && search.passages > 0) {
    throw std::invalid_argument("automaton_of: expected a constraint for every passage");
  }
  Workspace lent(search.workspace);
  const Space space = divide(lent, search.passages, search.slots, width);
  with_type(search.logits, [&](auto logits) {
    using T = typename decltype(logits)::Item;
    launch("slot_topk: slots", read_slots_kernel<T>, search.passages * search.slots, kThreads,
           stream, logits, search, space);
    launch("slot_topk", slot_topk_kernel<T>, blocks_for(search.passages), kThreads, stream, logits,
           search, space, static_cast<int32_t>(width));
  });
}

}  // namespace fastmrc::cuda
