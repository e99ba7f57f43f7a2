// Token automata as the kernels read them: those of a batch laid end to end, see
// fastmrc::Automaton.
#pragma once

#include "cuda/automata.h"
#include "cuda/platform.h"

namespace fastmrc::cuda {

constexpr int32_t kRootState = 0;
constexpr int32_t kDeadState = -1;

// Edges of one state: tokens, rising, and where they lead.
struct Edges {
  const int32_t* tokens;
  const int32_t* targets;
  int32_t count;

  // The place of the first token that is at least `token`.
  __device__ int32_t lower_bound(int32_t token) const {
    int32_t low = 0, high = count;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (tokens[middle] < token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// One automaton. States must be kDeadState or states of it.
struct AutomatonView {
  const int32_t* edge_begin;
  const int32_t* edge_token;
  const int32_t* edge_target;
  const uint8_t* final_flags;
  int32_t num_states;

  __device__ Edges edges(int32_t state) const {
    if (state == kDeadState) return {edge_token, edge_target, 0};
    const int32_t begin = edge_begin[state];
    return {edge_token + begin, edge_target + begin, edge_begin[state + 1] - begin};
  }

  __device__ int32_t advance(int32_t state, int32_t token) const {
    const Edges found = edges(state);
    const int32_t at = found.lower_bound(token);
    return at < found.count && found.tokens[at] == token ? found.targets[at] : kDeadState;
  }

  __device__ bool is_final(int32_t state) const {
    return state != kDeadState && final_flags[state] != 0;
  }
};

__device__ inline AutomatonView view_of(const Automata& automata, int32_t a) {
  const int64_t state = automata.first_state[a], edge = automata.first_edge[a];
  return {automata.edge_begin + state + a, automata.edge_token + edge, automata.edge_target + edge,
          automata.final_flags + state, static_cast<int32_t>(automata.first_state[a + 1] - state)};
}

}  // namespace fastmrc::cuda
