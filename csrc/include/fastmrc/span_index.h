#pragma once

#include <cstdint>
#include <vector>

#include "fastmrc/automaton.h"

namespace fastmrc {

// Where a span begins: `position` tokens into passage `passage`.
struct Occurrence {
  int32_t passage;
  int32_t position;

  bool operator==(const Occurrence& other) const {
    return passage == other.passage && position == other.position;
  }
};

// All places where `span` occurs, by passage and then position; overlapping ones count, and the
// empty span occurs nowhere. A scan of the tokens; the span is compared where its first token
// stands. Throws std::invalid_argument for a negative length or count, offsets that do not rise
// from 0, and more than 2^31 - 1 tokens.
std::vector<Occurrence> find_occurrences(const int32_t* tokens,   // [offsets[num_passages]]
                                         const int64_t* offsets,  // [num_passages + 1]
                                         int32_t num_passages,
                                         const int32_t* span,  // [span_length]
                                         int64_t span_length);

// Which tokens may follow a piece of a passage, and where a finished piece stands.
//
// The automaton accepts exactly the contiguous pieces of the passages, the empty one included (so
// every state is final); no piece reaches across two passages. For n tokens in all it has at most
// max(1, 2n) states and 3n edges and is built in expected linear time: the suffix automaton of
// Blumer, Blumer, Haussler, Ehrenfeucht, Chen, Seiferas, "The smallest automaton recognizing the
// subwords of a text", Theoretical Computer Science 40 (1985), in the form for several texts of
// Blumer et al., "Complete inverted files for efficient text retrieval and analysis", JACM 34
// (1987).
class SpanIndex {
 public:
  // Keeps a copy of the tokens. Throws std::invalid_argument for a negative token or count, offsets
  // that do not rise from 0, and more than (2^31 - 1) / 3 tokens (edges are 32-bit).
  SpanIndex(const int32_t* tokens,   // [offsets[num_passages]], may be null if there are no tokens
            const int64_t* offsets,  // [num_passages + 1], may be null if there are no passages
            int32_t num_passages);

  const Automaton& automaton() const { return automaton_; }
  int32_t num_passages() const { return static_cast<int32_t>(offsets_.size()) - 1; }

  // find_occurrences on the indexed passages.
  std::vector<Occurrence> occurrences(const int32_t* span,  // [span_length]
                                      int64_t span_length) const;

 private:
  std::vector<int64_t> offsets_;  // [num_passages + 1]; first, its initializer checks the input
  std::vector<int32_t> tokens_;   // [offsets_.back()]
  Automaton automaton_;
};

}  // namespace fastmrc
