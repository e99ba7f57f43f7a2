#pragma once

// Random automata for the tests of csrc/cuda.

#include <cstdint>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "fastmrc/automaton.h"
#include "fastmrc/span_index.h"
#include "fastmrc/trie.h"

namespace fastmrc_test {

using Tokens = std::vector<int32_t>;

inline std::pair<Tokens, std::vector<int64_t>> end_to_end(const std::vector<Tokens>& sequences) {
  std::pair<Tokens, std::vector<int64_t>> laid{{}, {0}};
  for (const Tokens& sequence : sequences) {
    laid.first.insert(laid.first.end(), sequence.begin(), sequence.end());
    laid.second.push_back(static_cast<int64_t>(laid.first.size()));
  }
  return laid;
}

// Any piece of the sequences.
inline fastmrc::Automaton spans_of(const std::vector<Tokens>& sequences) {
  const auto [tokens, offsets] = end_to_end(sequences);
  const auto count = static_cast<int32_t>(sequences.size());
  return fastmrc::SpanIndex(tokens.data(), offsets.data(), count).automaton();
}

// One of the sequences.
inline fastmrc::Automaton trie_of(const std::vector<Tokens>& sequences) {
  const auto [tokens, offsets] = end_to_end(sequences);
  return fastmrc::build_trie(tokens.data(), offsets.data(), static_cast<int64_t>(sequences.size()));
}

// States with up to `most_edges` edges to any states, cycles among them.
inline fastmrc::Automaton random_graph(uint32_t states, uint32_t most_edges, const Tokens& alphabet,
                                       std::mt19937& random) {
  std::vector<int32_t> begin{0}, targets;
  Tokens edges;
  std::vector<uint8_t> flags;
  for (uint32_t s = 0; s < states; ++s) {
    std::set<int32_t> tokens;
    for (uint32_t e = random() % (most_edges + 1); e > 0; --e) {
      tokens.insert(alphabet[random() % alphabet.size()]);
    }
    for (const int32_t token : tokens) {
      edges.push_back(token);
      targets.push_back(static_cast<int32_t>(random() % states));
    }
    begin.push_back(static_cast<int32_t>(edges.size()));
    flags.push_back(static_cast<uint8_t>(random() % 2));
  }
  return fastmrc::Automaton(begin, edges, targets, flags);
}

// `size` tokens below `cols`, not necessarily different ones, none of them the end token.
inline Tokens random_alphabet(size_t size, int64_t cols, int32_t end_id, std::mt19937& random) {
  Tokens alphabet(size);
  for (int32_t& token : alphabet) {
    token = static_cast<int32_t>(random() % static_cast<uint32_t>(cols - 1));
    if (token >= end_id) ++token;
  }
  return alphabet;
}

// `count` sequences of up to `length` tokens, or of just as many.
inline std::vector<Tokens> random_sequences(size_t count, size_t length, bool exactly,
                                            const Tokens& alphabet, std::mt19937& random) {
  std::vector<Tokens> sequences(count);
  for (Tokens& sequence : sequences) {
    sequence.resize(exactly ? length : random() % (length + 1));
    for (int32_t& token : sequence) token = alphabet[random() % alphabet.size()];
  }
  return sequences;
}

}  // namespace fastmrc_test
