#pragma once

#include <cstdint>

#include "fastmrc/automaton.h"

namespace fastmrc {

// The automaton that accepts exactly the given sequences. Equal sequences count once; an empty one
// makes the root final; no sequences give a root that is not final.
//
// States are numbered breadth first and every edge makes its target, so num_states = num_edges + 1
// and edge_target[e] = e + 1. Working memory beside the result: 4 bytes per sequence, 8 per
// sequence of the largest group that shares a prefix, 4 per state of two neighbouring levels.
//
// Throws std::invalid_argument for a negative token, offsets that do not rise from 0, and more than
// 2^31 - 2 tokens or sequences (states are 32-bit).
Automaton build_trie(const int32_t* tokens,   // [offsets[num_sequences]], may be null if empty
                     const int64_t* offsets,  // [num_sequences + 1], may be null if there are none
                     int64_t num_sequences);

}  // namespace fastmrc
