#pragma once

#include <cstdint>
#include <vector>

namespace fastmrc {

// The outgoing edges of one state, ascending by token. Valid while the automaton lives.
struct AllowedTokens {
  const int32_t* begin;    // [size()] tokens
  const int32_t* end;      // one past the last token
  const int32_t* targets;  // [size()] targets[i] is reached by begin[i]

  int64_t size() const { return end - begin; }
};

// A deterministic token automaton: the one constraint type of the search, whichever builder made it
// (SpanIndex: any piece of a passage; build_trie: one of a closed set of sequences).
//
// State 0 is the root, kDeadState the state nothing leads out of. Immutable, so one automaton may
// be read by many threads. Four flat arrays (CSR), 5 bytes per state and 8 per edge, that a kernel
// can read as they are; 32-bit indices, since kernels gather them by the million.
class Automaton {
 public:
  static constexpr int32_t kRootState = 0;
  static constexpr int32_t kDeadState = -1;

  // A root without edges that is not final: it accepts nothing.
  Automaton();

  // Takes the arrays over. Throws std::invalid_argument unless there is at least one state,
  // edge_begin rises from 0 to the number of edges, the tokens of a state are >= 0 and strictly
  // ascending, targets are states, and flags are 0 or 1.
  Automaton(std::vector<int32_t> edge_begin,   // [num_states + 1]
            std::vector<int32_t> edge_token,   // [num_edges]
            std::vector<int32_t> edge_target,  // [num_edges]
            std::vector<uint8_t> is_final);    // [num_states]

  // The same without the checks, for builders whose arrays are right by construction.
  static Automaton from_valid_arrays(std::vector<int32_t> edge_begin,
                                     std::vector<int32_t> edge_token,
                                     std::vector<int32_t> edge_target,
                                     std::vector<uint8_t> is_final);

  // In all of these a state must be kDeadState or in [0, num_states), else std::invalid_argument.

  // The state after `token`, kDeadState if there is none. O(log of the state's edges).
  int32_t advance(int32_t state, int32_t token) const;

  // out[i] = advance(states[i], tokens[i]). All states are checked before anything is written, so
  // `out` may be `states`.
  void advance(const int32_t* states,  // [n]
               const int32_t* tokens,  // [n]
               int64_t n,
               int32_t* out) const;  // [n]

  // What may follow `state`; nothing follows kDeadState.
  AllowedTokens allowed(int32_t state) const;

  // Whether a sequence may end in `state`; never in kDeadState.
  bool is_final(int32_t state) const;

  int32_t num_states() const { return static_cast<int32_t>(is_final_.size()); }
  int32_t num_edges() const { return static_cast<int32_t>(edge_token_.size()); }

  // The arrays themselves, for kernels and for export.
  const std::vector<int32_t>& edge_begin() const { return edge_begin_; }    // [num_states + 1]
  const std::vector<int32_t>& edge_token() const { return edge_token_; }    // [num_edges]
  const std::vector<int32_t>& edge_target() const { return edge_target_; }  // [num_edges]
  const std::vector<uint8_t>& final_flags() const { return is_final_; }     // [num_states]

 private:
  int32_t advance_unchecked(int32_t state, int32_t token) const;

  std::vector<int32_t> edge_begin_;
  std::vector<int32_t> edge_token_;
  std::vector<int32_t> edge_target_;
  std::vector<uint8_t> is_final_;
};

}  // namespace fastmrc
