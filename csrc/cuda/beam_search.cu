#include <cmath>

#include "cuda/automata.cuh"
#include "cuda/beam_search.h"
#include "cuda/block.cuh"

namespace fastmrc::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostSlots = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    first_step_kernel(TypedRows<T> logits, FirstStep step, int64_t count) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= count) return;
  const int32_t argmax = step.stats.argmax[p];
  const double logsumexp = step.stats.logsumexp[p];
  if (argmax < 0 && logsumexp == -kInfinityDouble) report(step.fault, p, Fault::kMasked);
  step.surviving[p] = argmax != step.end_id ? 1 : 0;
  step.no_answer[p] = exp(static_cast<double>(to_float(logits.row(p)[step.end_id])) - logsumexp);
}

// What one thread knows of its question.
class Finisher {
 public:
  __device__ Finisher(const Beams& beams, const FinishRules& rules, const Candidates& candidates,
                      int32_t width, int32_t step, int64_t question)
      : beams_(beams),
        rules_(rules),
        step_(step),
        question_(question),
        first_slot_(question * beams.slots),
        first_node_(question * beams.steps * beams.slots),
        scores_(candidates.scores + question * width),
        tokens_(candidates.tokens + question * width),
        parents_(candidates.parents + question * width) {
    while (count_ < width && tokens_[count_] >= 0) ++count_;
  }

  // Decides which candidates go on: `chosen` gets their numbers. Returns how many; 0: the question
  // is done.
  __device__ int32_t run(int32_t* chosen) {
    return rules_.finish == Finish::kPool ? finish_pool(chosen) : finish_original(chosen);
  }

 private:
  __device__ bool last_step() const { return step_ + 1 == rules_.max_tokens; }
  __device__ bool ends(int32_t c) const { return tokens_[c] == rules_.end_id; }
  __device__ int32_t size() const { return beams_.sizes[question_]; }

  // The node of a candidate that does not go on; the end token is not kept.
  __device__ int32_t node_of(int32_t c) {
    const int32_t parent = beams_.nodes[first_slot_ + parents_[c]];
    if (ends(c)) return parent;
    const int32_t node = step_ * beams_.slots + added_++;
    beams_.node_tokens[first_node_ + node] = tokens_[c];
    beams_.node_parents[first_node_ + node] = parent;
    return node;
  }

  __device__ void set_entry(int32_t i, int32_t node, float score, bool finished) {
    beams_.entry_nodes[first_slot_ + i] = node;
    beams_.entry_scores[first_slot_ + i] = score;
    beams_.entry_finished[first_slot_ + i] = finished ? 1 : 0;
  }

  __device__ int32_t finish_original(int32_t* chosen) {
    const int32_t count = min(count_, size());
    if (count == 0) return 0;
    int32_t entries = beams_.entries[question_];
    if (ends(0) || last_step()) {
      beams_.best[question_] = entries;
      for (int32_t c = 0; c < count; ++c) set_entry(entries++, node_of(c), scores_[c], ends(c));
      beams_.entries[question_] = entries;
      return 0;
    }
    int32_t live = 0;
    for (int32_t c = 0; c < count; ++c) {
      if (ends(c)) {
        set_entry(entries++, node_of(c), scores_[c], true);
        --beams_.sizes[question_];
      } else {
        chosen[live++] = c;
      }
    }
    beams_.entries[question_] = entries;
    return live;
  }

  __device__ int32_t finish_pool(int32_t* chosen) {
    int32_t live = 0;
    for (int32_t c = 0; c < count_; ++c) {
      if (ends(c) || last_step()) {
        if (c < size()) add_to_pool(c);
      } else if (live < size()) {
        chosen[live++] = c;
      }
    }
    if (live > 0 && !pool_is_settled(scores_[chosen[0]])) return live;
    beams_.best[question_] = beams_.entries[question_] == 0 ? -1 : 0;
    return 0;
  }

  __device__ float normalized(float score, int32_t length) const {
    const double divisor = pow(static_cast<double>(length), rules_.length_penalty);
    return static_cast<float>(static_cast<double>(score) / divisor);
  }

  // Keeps the pool sorted: score falling, earlier entries first among equals.
  __device__ void add_to_pool(int32_t c) {
    const float score = normalized(scores_[c], step_ + 1);
    const int32_t node = node_of(c);
    int32_t entries = beams_.entries[question_];
    if (entries == size()) {
      if (beams_.entry_scores[first_slot_ + entries - 1] >= score) return;
      --entries;
    }
    int32_t place = entries;
    for (; place > 0 && beams_.entry_scores[first_slot_ + place - 1] < score; --place) {
      const int64_t from = first_slot_ + place - 1;
      set_entry(place, beams_.entry_nodes[from], beams_.entry_scores[from],
                beams_.entry_finished[from] != 0);
    }
    set_entry(place, node, score, ends(c));
    beams_.entries[question_] = entries + 1;
  }

  // Scores only fall, so a live hypothesis ends at best with its present score over the most
  // favourable length.
  __device__ bool pool_is_settled(float best_live) const {
    const int32_t entries = beams_.entries[question_];
    if (entries < size()) return false;
    const int32_t length = rules_.length_penalty > 0 ? rules_.max_tokens : step_ + 2;
    return beams_.entry_scores[first_slot_ + entries - 1] >= normalized(best_live, length);
  }

  const Beams& beams_;
  const FinishRules& rules_;
  int32_t step_;
  int64_t question_, first_slot_, first_node_;
  const float* scores_;
  const int32_t* tokens_;
  const int32_t* parents_;
  int32_t count_ = 0;
  int32_t added_ = 0;  // nodes of this step
};

// A block per question: one thread follows the rules, which are short and sequential; all move the
// state.
__global__ void __launch_bounds__(kThreads)
    advance_kernel(Beams beams, FinishRules rules, Candidates candidates, int32_t width,
                   Automata automata, const int32_t* automaton_of, int32_t step) {
  __shared__ int32_t chosen[kMostSlots], parent_state[kMostSlots], parent_node[kMostSlots];
  __shared__ int32_t live;
  const int64_t question = blockIdx.x;
  const bool done = beams.hypotheses[question] == 0;
  __syncthreads();  // all have read what is written next
  if (done) return;
  if (threadIdx.x == 0) {
    live = Finisher(beams, rules, candidates, width, step, question).run(chosen);
    beams.hypotheses[question] = live;
  }
  __syncthreads();
  const int64_t first_slot = question * beams.slots;
  const int64_t columns = int64_t{beams.steps} * beams.slots;
  const int64_t candidate = question * width;
  for (int k = static_cast<int>(threadIdx.x); k < live; k += kThreads) {
    const int32_t parent = candidates.parents[candidate + chosen[k]];
    parent_state[k] = beams.states[first_slot + parent];
    parent_node[k] = beams.nodes[first_slot + parent];
  }
  __syncthreads();  // the old state is read
  const int32_t a = automaton_of == nullptr ? -1 : automaton_of[question];
  for (int k = static_cast<int>(threadIdx.x); k < live; k += kThreads) {
    const int32_t token = candidates.tokens[candidate + chosen[k]];
    const int32_t node = step * beams.slots + k;
    beams.scores[first_slot + k] = candidates.scores[candidate + chosen[k]];
    beams.states[first_slot + k] =
        a < 0 ? parent_state[k] : view_of(automata, a).advance(parent_state[k], token);
    beams.nodes[first_slot + k] = node;
    beams.node_tokens[question * columns + node] = token;
    beams.node_parents[question * columns + node] = parent_node[k];
  }
  const int64_t buffer = int64_t{beams.questions} * beams.slots * columns;
  const uint8_t* old = beams.ancestors + (step + 1) % 2 * buffer + first_slot * columns;
  uint8_t* now = beams.ancestors + step % 2 * buffer + first_slot * columns;
  const int32_t before = step * beams.slots;  // columns of earlier steps
  for (int64_t i = threadIdx.x; i < live * columns; i += kThreads) {
    const auto k = static_cast<int32_t>(i / columns);
    const int64_t column = i % columns;
    const int32_t parent = candidates.parents[candidate + chosen[k]];
    const bool inherited = column < before && old[parent * columns + column] != 0;
    now[i] = inherited || column == before + k ? 1 : 0;
  }
}

// A block per row.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(Beams beams, EncoderInputs inputs, int32_t step) {
  const int64_t row = blockIdx.x;
  const int32_t question = inputs.question_of[row];
  const int32_t live = question < 0 ? 0 : beams.hypotheses[question];
  const int64_t own = row * beams.slots;
  const int64_t answer_columns = int64_t{beams.steps} * beams.slots;
  const int64_t slot = int64_t{question} * beams.slots;
  for (int k = static_cast<int>(threadIdx.x); k < beams.slots; k += kThreads) {
    const bool there = k < live;
    inputs.tokens[own + k] =
        there ? beams.node_tokens[question * answer_columns + beams.nodes[slot + k]] : 0;
    inputs.positions[own + k] = inputs.first_position[row] + (there ? step : 0);
    inputs.live[own + k] = there ? 1 : 0;
    if (row == 0) inputs.cache_columns[k] = inputs.prefix + int64_t{step} * beams.slots + k;
  }
  const int64_t buffer = int64_t{beams.questions} * beams.slots * answer_columns;
  const uint8_t* ancestors = beams.ancestors + step % 2 * buffer + slot * answer_columns;
  for (int64_t i = threadIdx.x; i < beams.slots * answer_columns; i += kThreads) {
    const int64_t k = i / answer_columns, column = i % answer_columns;
    inputs.mask[(own + k) * inputs.columns + inputs.prefix + column] =
        k < live ? ancestors[i] : static_cast<uint8_t>(0);
  }
}

}  // namespace

int64_t beams_items(int32_t questions, int32_t slots, int32_t steps) {
  const int64_t of_slots = int64_t{questions} * slots;
  return 4 * int64_t{questions} + 6 * of_slots + 2 * of_slots * steps;
}

Beams lay_out_beams(int32_t* state, uint8_t* ancestors, int32_t questions, int32_t slots,
                    int32_t steps) {
  const int64_t of_slots = int64_t{questions} * slots;
  const auto take = [&state](int64_t count) {
    int32_t* items = state;
    state += count;
    return items;
  };
  Beams beams;
  beams.questions = questions;
  beams.slots = slots;
  beams.steps = steps;
  beams.hypotheses = take(questions);
  beams.entries = take(questions);
  beams.best = take(questions);
  beams.entry_nodes = take(of_slots);
  beams.entry_finished = take(of_slots);
  beams.entry_scores = reinterpret_cast<float*>(take(of_slots));
  beams.node_tokens = take(of_slots * steps);
  beams.node_parents = take(of_slots * steps);
  beams.sizes = take(questions);
  beams.scores = reinterpret_cast<float*>(take(of_slots));
  beams.states = take(of_slots);
  beams.nodes = take(of_slots);
  beams.ancestors = ancestors;
  return beams;
}

void first_step(const FirstStep& step, Stream stream) {
  const int64_t count = step.logits.rows;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  with_type(step.logits, [&](auto rows) {
    using T = typename decltype(rows)::Item;
    launch("first_step_kernel", first_step_kernel<T>, blocks, kThreads, stream, rows, step, count);
  });
}

void advance_beams(const Beams& beams, const FinishRules& rules, const Candidates& candidates,
                   int32_t width, const Automata& automata, const int32_t* automaton_of,
                   int32_t step, Stream stream) {
  if (beams.slots < 1 || beams.slots > kMostSlots) {
    throw std::invalid_argument("beam_size: expected 1 to " + std::to_string(kMostSlots) +
                                " on a GPU, got " + std::to_string(beams.slots));
  }
  if (step < 0 || step >= beams.steps) {
    throw std::invalid_argument("step: expected 0 to " + std::to_string(beams.steps - 1) +
                                ", got " + std::to_string(step));
  }
  launch("advance_kernel", advance_kernel, beams.questions, kThreads, stream, beams, rules,
         candidates, width, automata, automaton_of, step);
}

void prepare_inputs(const Beams& beams, const EncoderInputs& inputs, int32_t step, Stream stream) {
  launch("prepare_kernel", prepare_kernel, inputs.rows, kThreads, stream, beams, inputs, step);
}

}  // namespace fastmrc::cuda
