#pragma once

#include <cstdint>
#include <vector>

#include "fastmrc/automaton.h"

namespace fastmrc {

// Which bytes each token of a vocabulary stands for, as a trie in which texts are read.
class TokenSpellings {
 public:
  // Token ids[i] stands for the bytes text[offsets[i], offsets[i + 1]). Several tokens may stand
  // for the same bytes; one may stand for none. Throws std::invalid_argument for a negative count,
  // ids that are negative or not strictly ascending, offsets that do not rise from 0, and more than
  // 2^31 - 2 bytes.
  TokenSpellings(const int32_t* ids,      // [num_tokens]
                 const uint8_t* text,     // [offsets[num_tokens]]
                 const int64_t* offsets,  // [num_tokens + 1], may be null if there are no tokens
                 int32_t num_tokens);

  // The bytes as its tokens.
  const Automaton& trie() const { return trie_; }

  // The tokens that stand for the bytes on the way to a node of the trie, ascending:
  // tokens()[token_begin()[node], token_begin()[node + 1]).
  const std::vector<int32_t>& token_begin() const { return token_begin_; }  // [nodes + 1]
  const std::vector<int32_t>& tokens() const { return tokens_; }            // [num_tokens]

 private:
  Automaton trie_;
  std::vector<int32_t> token_begin_;
  std::vector<int32_t> tokens_;
};

// The automaton of all token sequences that spell a piece of a passage.
//
// The passages are UTF-8. A piece begins and ends at the borders of characters and lies within one
// passage; it may be empty, so the root is final. `first` spells the first token of a sequence,
// `following` the others: a word piece has a space before it except at the beginning. A first token
// without bytes has read nothing yet. Tokens may meet inside a character; a state there is not
// final, and states that no final one can be reached from are left out.
//
// With the suffix automaton of the bytes (SpanIndex) below, a state is a state of that one, so for
// n bytes there are at most max(1, 2n) + 1 of them; each has an edge per token that can be read
// there. Time is that of the walks along the bytes behind each state, as deep as the longest token.
// Throws std::invalid_argument for offsets that do not rise from 0, a token of `following` without
// bytes, more than (2^31 - 1) / 3 bytes, and more than 2^31 - 2 edges.
Automaton build_text_index(const uint8_t* text,     // [offsets[num_passages]]
                           const int64_t* offsets,  // [num_passages + 1], null if no passages
                           int32_t num_passages, const TokenSpellings& first,
                           const TokenSpellings& following);

}  // namespace fastmrc
