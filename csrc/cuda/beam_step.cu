// Two kernels: the best continuations of each hypothesis, its vocabulary in parts unless a
// constraint makes it short, and the best of these of each question.
//
// Without a constraint votes are computed in float32 first; those that may be among the best are
// scored again in double precision, as all others are from the start. No second [rows, vocabulary]
// array is written.
#include <algorithm>
#include <cmath>

#include "cuda/automata.cuh"
#include "cuda/beam_step.h"
#include "cuda/block.cuh"

namespace fastmrc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 16;  // tokens of a thread
constexpr int kPartTokens = kThreads * kItems;
constexpr int kRoom = 1024;

// What the first kernel leaves for the second: keys [questions, slots, parts, width], kNoKey where
// there is none.
struct Found {
  uint64_t* keys;
  int32_t parts;
};

// Blocks for each hypothesis: as many as the vocabulary takes, or, where constraints make it short,
// up to 8 while the hypotheses alone would not fill a device.
int64_t parts_of(const BeamStep& step) {
  constexpr int64_t kEnoughBlocks = 1024, kMostParts = 8;
  if (!step.all_constrained) return (step.logits.cols + kPartTokens - 1) / kPartTokens;
  const int64_t hypotheses = std::max<int64_t>(1, int64_t{step.questions} * step.slots);
  return std::min(std::max<int64_t>(1, kEnoughBlocks / hypotheses), kMostParts);
}

Found divide(Workspace& space, const BeamStep& step) {
  Found found;
  found.parts = static_cast<int32_t>(parts_of(step));
  found.keys =
      space.take<uint64_t>(int64_t{step.questions} * step.slots * found.parts * step.width);
  return found;
}

// The rows that vote on the continuations of one hypothesis.
template <typename T>
struct Voters {
  TypedRows<T> logits;
  const double* logsumexp;
  const int64_t* passage_row;  // [passages]
  const float* weights;        // [passages], vote kWeighted only
  int32_t passages;
  int32_t hypothesis;
  Vote vote;

  __device__ int64_t row(int32_t p) const { return passage_row[p] + hypothesis; }

  __device__ double vote_on(int64_t token) const {
    double first = 0, second = 0;
    for (int32_t p = 0; p < passages; ++p) {
      const auto logit = static_cast<double>(to_float(logits.row(row(p))[token]));
      const double x = exp(logit - logsumexp[row(p)]);
      const double w = vote == Vote::kWeighted ? static_cast<double>(weights[p]) : 1.0;
      if (vote == Vote::kMax) {
        first = max(first, x);
      } else if (vote == Vote::kProduct) {
        first += log(x + kEps);
      } else {
        first += w * x;
        second += w * (x * x);
      }
    }
    if (vote == Vote::kMean) return first / passages;
    if (vote == Vote::kMax) return first;
    if (vote == Vote::kProduct) return exp(first / passages);
    return second / (1.0 + first);
  }
};

template <typename T>
__device__ float score_of(const Voters<T>& voters, float score, int64_t token) {
  return static_cast<float>(static_cast<double>(score) + log(voters.vote_on(token) + kEps));
}

// Whether all voting rows can be read; reports those of -inf. The pass over the rows has reported
// NaN and +inf.
template <typename T>
__device__ bool rows_are_sound(const BeamStep& step, const Voters<T>& voters) {
  int unsound = 0;
  for (int32_t p = static_cast<int32_t>(threadIdx.x); p < voters.passages; p += kThreads) {
    const int64_t row = voters.row(p);
    if (step.stats.argmax[row] >= 0) continue;
    unsound = 1;
    if (step.stats.logsumexp[row] == -kInfinityDouble) report(step.fault, row, Fault::kMasked);
  }
  return __syncthreads_or(unsound) == 0;
}

// A constraint must hold neither tokens beyond the vocabulary nor the end token.
__device__ bool edges_are_sound(const BeamStep& step, const Edges& edges, int64_t row) {
  const bool beyond = edges.count > 0 && edges.tokens[edges.count - 1] >= step.logits.cols;
  const int32_t at = edges.lower_bound(step.end_id);
  const bool has_end = at < edges.count && edges.tokens[at] == step.end_id;
  if (threadIdx.x == 0 && beyond) report(step.fault, row, Fault::kToken);
  if (threadIdx.x == 0 && !beyond && has_end) report(step.fault, row, Fault::kEndToken);
  return !beyond && !has_end;
}

template <typename T>
__device__ void score_allowed(const BeamStep& step, const Voters<T>& voters, float score,
                              const AutomatonView& automaton, int32_t state, bool allow_end,
                              int32_t part, int32_t parts, Collector<uint64_t, kRoom>& keys) {
  const Edges edges = automaton.edges(state);
  if (!edges_are_sound(step, edges, voters.row(0))) return;
  const bool with_end = allow_end && automaton.is_final(state);
  const int32_t count = edges.count + (with_end ? 1 : 0);
  for (int32_t i = part * kThreads; i < count; i += parts * kThreads) {
    const int32_t own = i + static_cast<int32_t>(threadIdx.x);
    uint64_t key = kNoKey;
    if (own < count) {
      const int32_t token = own < edges.count ? edges.tokens[own] : step.end_id;
      key = sort_key(score_of(voters, score, token), token);
    }
    keys.offer_all(own < count, key);
  }
}

// Votes of this thread's tokens begin + threadIdx.x + j * kThreads, plus kEps, nearly.
template <typename T>
__device__ void approximate_votes(const Voters<T>& voters, int64_t begin, float (&votes)[kItems]) {
  float second[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) votes[j] = second[j] = 0;
  for (int32_t p = 0; p < voters.passages; ++p) {
    const int64_t row = voters.row(p);
    const T* logits = voters.logits.row(row);
    // The part of the log-sum-exp that float32 cannot hold goes into a factor.
    const auto shift = static_cast<float>(voters.logsumexp[row]);
    const auto factor = static_cast<float>(exp(static_cast<double>(shift) - voters.logsumexp[row]));
    const float w = voters.vote == Vote::kWeighted ? voters.weights[p] : 1.0f;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int64_t token = begin + threadIdx.x + j * kThreads;
      if (token >= voters.logits.cols) continue;
      const float x = fast_exp(to_float(logits[token]) - shift) * factor;
      if (voters.vote == Vote::kMax) {
        votes[j] = max(votes[j], x);
      } else if (voters.vote == Vote::kProduct) {
        votes[j] += logf(x + static_cast<float>(kEps));
      } else {
        votes[j] += w * x;
        second[j] += w * x * x;
      }
    }
  }
  const auto passages = static_cast<float>(voters.passages);
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (voters.vote == Vote::kMean) {
      votes[j] /= passages;
    } else if (voters.vote == Vote::kProduct) {
      votes[j] = expf(votes[j] / passages);
    } else if (voters.vote != Vote::kMax) {
      votes[j] = second[j] / (1.0f + votes[j]);
    }
    votes[j] += static_cast<float>(kEps);
  }
}

// By how much a vote may fall short of another and still be the better one, as the errors of
// approximate_votes and the rounding of scores go: csrc/ops/beam_step.cc.
template <typename T>
__device__ float filter_factor(const Voters<T>& voters, float score) {
  constexpr float kLargeWeight = 1e15f;  // products of weights and squares stay finite
  for (int32_t p = 0; voters.vote == Vote::kWeighted && p < voters.passages; ++p) {
    if (voters.weights[p] > kLargeWeight) return 0;
  }
  const float factor =
      1.0f - 2e-4f - 2e-6f * static_cast<float>(voters.passages) - 1e-6f * fabsf(score);
  return factor > 0 ? factor : 0;
}

template <typename T>
__device__ void score_part(const BeamStep& step, const Voters<T>& voters, float score,
                           int64_t begin, bool allow_end, Collector<uint64_t, kRoom>& keys) {
  float votes[kItems];
  approximate_votes(voters, begin, votes);
  float largest = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int64_t token = begin + threadIdx.x + j * kThreads;
    if (token >= step.logits.cols || (token == step.end_id && !allow_end)) votes[j] = -1;
    largest = max(largest, votes[j]);
  }
  constexpr int kManyThreads = kThreads / 2;
  float bar = 0;
  if (step.width <= kManyThreads) {
    bar = block_kth_largest(largest, step.width) * filter_factor(voters, score);
  }
  if (largest >= bar) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (votes[j] < bar) continue;
      const auto token = static_cast<int32_t>(begin + threadIdx.x + j * kThreads);
      keys.offer(sort_key(score_of(voters, score, token), token));
    }
  }
  if (!keys.overflowed()) return;
  for (int j = 0; j < kItems; ++j) {  // rare: many equal votes, or a large width
    const int64_t token = begin + threadIdx.x + j * kThreads;
    const bool counts = token < step.logits.cols && (token != step.end_id || allow_end);
    const uint64_t key =
        counts ? sort_key(score_of(voters, score, token), static_cast<int32_t>(token)) : kNoKey;
    keys.offer_all(counts, key);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    score_kernel(TypedRows<T> logits, BeamStep step, Found found) {
  const int32_t part = static_cast<int32_t>(blockIdx.x % found.parts);
  const int64_t slot = blockIdx.x / found.parts;  // of all questions
  const int64_t question = slot / step.slots;
  const int64_t passage = step.first_passage[question];
  Voters<T> voters;
  voters.logits = logits;
  voters.logsumexp = step.stats.logsumexp;
  voters.passage_row = step.passage_row + passage;
  voters.weights = step.weights == nullptr ? nullptr : step.weights + passage;
  voters.passages = static_cast<int32_t>(step.first_passage[question + 1] - passage);
  voters.hypothesis = static_cast<int32_t>(slot % step.slots);
  voters.vote = step.vote;
  const int32_t a = step.automaton_of == nullptr ? -1 : step.automaton_of[question];
  const int32_t state = step.states == nullptr ? kRootState : step.states[slot];
  uint64_t* keys_out = found.keys + static_cast<int64_t>(blockIdx.x) * step.width;

  int number = 0;
  Collector<uint64_t, kRoom> keys(step.width);
  bool counts =
      voters.hypothesis < step.hypotheses[question] && voters.passages > 0 && state != kDeadState;
  const float score = counts ? step.scores[slot] : 0.0f;
  counts = counts && score > -kInfinity && score < kInfinity;  // no continuation of -inf
  if (counts && rows_are_sound(step, voters)) {
    const bool allow_end = step.allow_end == nullptr || step.allow_end[question] != 0;
    if (a >= 0) {
      score_allowed(step, voters, score, view_of(step.automata, a), state, allow_end, part,
                    found.parts, keys);
    } else {
      score_part(step, voters, score, int64_t{part} * kPartTokens, allow_end, keys);
    }
    number = keys.finish();
  }
  for (int i = static_cast<int>(threadIdx.x); i < step.width; i += kThreads) {
    keys_out[i] = i < number ? keys.key(i) : kNoKey;
  }
}

// A candidate, larger if better.
struct CandidateKey {
  uint64_t key = kNoKey;  // score and token
  int32_t parent = 0;

  __device__ bool operator>(const CandidateKey& other) const {
    return key != other.key ? key > other.key : parent < other.parent;
  }
};

__global__ void __launch_bounds__(kThreads) select_kernel(BeamStep step, Found found) {
  const int64_t question = blockIdx.x;
  const int32_t per_hypothesis = found.parts * step.width;
  const uint64_t* keys = found.keys + question * step.slots * per_hypothesis;
  const int32_t count = min(step.hypotheses[question], step.slots) * per_hypothesis;
  Collector<CandidateKey, kRoom> best(step.width);
  for (int32_t i = 0; i < count; i += kThreads) {
    const int32_t own = i + static_cast<int32_t>(threadIdx.x);
    CandidateKey key;
    if (own < count) {
      key.key = keys[own];
      key.parent = own / per_hypothesis;
    }
    best.offer_all(key.key != kNoKey, key);
  }
  const int number = best.finish();
  for (int i = static_cast<int>(threadIdx.x); i < step.width; i += kThreads) {
    const int64_t at = question * step.width + i;
    const bool there = i < number;
    step.candidates.scores[at] = there ? value_of(best.key(i).key) : -kInfinity;
    step.candidates.tokens[at] = there ? id_of(best.key(i).key) : -1;
    step.candidates.parents[at] = there ? best.key(i).parent : -1;
  }
}

}  // namespace

int64_t beam_step_bytes(const BeamStep& step) {
  Workspace space(nullptr);
  divide(space, step);
  return space.bytes();
}

void beam_step(const BeamStep& step, Stream stream) {
  if (step.width < 1 || step.width > kMaxTopk) {
    throw std::invalid_argument("beam_size: expected 1 to " + std::to_string(kMaxTopk) +
                                " candidates on a GPU, got " + std::to_string(step.width));
  }
  Workspace space(step.workspace);
  const Found found = divide(space, step);
  const int64_t blocks = int64_t{step.questions} * step.slots * found.parts;
  with_type(step.logits, [&](auto rows) {
    using T = typename decltype(rows)::Item;
    launch("score_kernel", score_kernel<T>, blocks, kThreads, stream, rows, step, found);
  });
  launch("select_kernel", select_kernel, step.questions, kThreads, stream, step, found);
}

}  // namespace fastmrc::cuda
