// Token automata on the device, and what may follow their states.
#pragma once

#include <cstdint>

#include "cuda/platform.h"

namespace fastmrc::cuda {

// The arrays of fastmrc::Automaton, those of `count` automata laid end to end; automaton a has the
// states [first_state[a], first_state[a + 1]) and the edges [first_edge[a], first_edge[a + 1]), its
// states and edges being numbered from 0.
struct Automata {
  const int32_t* edge_begin = nullptr;   // [states + count], states + 1 values of each
  const int32_t* edge_token = nullptr;   // [edges]
  const int32_t* edge_target = nullptr;  // [edges]
  const uint8_t* final_flags = nullptr;  // [states]
  const int64_t* first_state = nullptr;  // [count + 1]
  const int64_t* first_edge = nullptr;   // [count + 1]
  int32_t count = 0;
};

// What fastmrc::Automaton answers for one state, for n of them. States must be -1 (dead) or states
// of their automaton: at others a fault of kind kState names the first index, and they are answered
// as dead. automaton_of: [n] in [0, count), null: all of automaton 0.

// out[i] = the state after tokens[i], -1 if there is none; `out` may be `states`.
void advance(const Automata& automata, const int32_t* automaton_of,
             const int32_t* states,  // [n]
             const int32_t* tokens,  // [n]
             int64_t n,
             int32_t* out,  // [n]
             int64_t* fault, Stream stream);

// How many tokens may follow each state.
void count_allowed(const Automata& automata, const int32_t* automaton_of,
                   const int32_t* states,  // [n]
                   int64_t n,
                   int64_t* counts,  // [n]
                   int64_t* fault, Stream stream);

// The tokens that may follow each state, ascending, those of state i from tokens[offsets[i]] on.
void write_allowed(const Automata& automata, const int32_t* automaton_of,
                   const int32_t* states,  // [n]
                   int64_t n,
                   const int64_t* offsets,  // [n + 1] running sums of the counts, from 0
                   int32_t* tokens,         // [offsets[n]]
                   int64_t* fault, Stream stream);

// out[i] = whether a sequence may end in states[i].
void final_flags(const Automata& automata, const int32_t* automaton_of,
                 const int32_t* states,  // [n]
                 int64_t n,
                 uint8_t* out,  // [n]
                 int64_t* fault, Stream stream);

}  // namespace fastmrc::cuda
