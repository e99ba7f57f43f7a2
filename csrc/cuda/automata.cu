// States are independent: a thread each, or a block each where the tokens of a state are copied, as
// a root has thousands.
#include "cuda/automata.cuh"
#include "cuda/numbers.cuh"

namespace fastmrc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCopyThreads = 128;

// States to look up, one after the other.
struct Queries {
  Automata automata;
  const int32_t* automaton_of;
  const int32_t* states;
  int64_t n;
  int64_t* fault;

  __device__ AutomatonView automaton(int64_t i) const {
    return view_of(automata, automaton_of == nullptr ? 0 : automaton_of[i]);
  }

  // State i, the dead one in place of one that is none; `reporter`: the thread to say so.
  __device__ int32_t state(int64_t i, const AutomatonView& automaton, bool reporter = true) const {
    const int32_t state = states[i];
    if (state >= kDeadState && state < automaton.num_states) return state;
    if (reporter) report(fault, i, Fault::kState);
    return kDeadState;
  }
};

__device__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

int64_t blocks_for(int64_t n) { return (n + kThreads - 1) / kThreads; }

__global__ void __launch_bounds__(kThreads)
    advance_kernel(Queries queries, const int32_t* tokens, int32_t* out) {
  const int64_t i = thread_index();
  if (i >= queries.n) return;
  const AutomatonView automaton = queries.automaton(i);
  out[i] = automaton.advance(queries.state(i, automaton), tokens[i]);
}

__global__ void __launch_bounds__(kThreads) count_allowed_kernel(Queries queries, int64_t* counts) {
  const int64_t i = thread_index();
  if (i >= queries.n) return;
  const AutomatonView automaton = queries.automaton(i);
  counts[i] = automaton.edges(queries.state(i, automaton)).count;
}

__global__ void __launch_bounds__(kCopyThreads)
    write_allowed_kernel(Queries queries, const int64_t* offsets, int32_t* tokens) {
  const int64_t i = blockIdx.x;
  const AutomatonView automaton = queries.automaton(i);
  const Edges edges = automaton.edges(queries.state(i, automaton, threadIdx.x == 0));
  int32_t* out = tokens + offsets[i];
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < edges.count; e += kCopyThreads) {
    out[e] = edges.tokens[e];
  }
}

__global__ void __launch_bounds__(kThreads) final_flags_kernel(Queries queries, uint8_t* out) {
  const int64_t i = thread_index();
  if (i >= queries.n) return;
  const AutomatonView automaton = queries.automaton(i);
  out[i] = automaton.is_final(queries.state(i, automaton)) ? 1 : 0;
}

}  // namespace

void advance(const Automata& automata, const int32_t* automaton_of, const int32_t* states,
             const int32_t* tokens, int64_t n, int32_t* out, int64_t* fault, Stream stream) {
  const Queries queries{automata, automaton_of, states, n, fault};
  launch("advance", advance_kernel, blocks_for(n), kThreads, stream, queries, tokens, out);
}

void count_allowed(const Automata& automata, const int32_t* automaton_of, const int32_t* states,
                   int64_t n, int64_t* counts, int64_t* fault, Stream stream) {
  const Queries queries{automata, automaton_of, states, n, fault};
  launch("count_allowed", count_allowed_kernel, blocks_for(n), kThreads, stream, queries, counts);
}

void write_allowed(const Automata& automata, const int32_t* automaton_of, const int32_t* states,
                   int64_t n, const int64_t* offsets, int32_t* tokens, int64_t* fault,
                   Stream stream) {
  const Queries queries{automata, automaton_of, states, n, fault};
  launch("write_allowed", write_allowed_kernel, n, kCopyThreads, stream, queries, offsets, tokens);
}

void final_flags(const Automata& automata, const int32_t* automaton_of, const int32_t* states,
                 int64_t n, uint8_t* out, int64_t* fault, Stream stream) {
  const Queries queries{automata, automaton_of, states, n, fault};
  launch("final_flags", final_flags_kernel, blocks_for(n), kThreads, stream, queries, out);
}

}  // namespace fastmrc::cuda
