#include "fastmrc/text_index.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "fastmrc/span_index.h"
#include "fastmrc/trie.h"
#include "ragged.h"

namespace fastmrc {
namespace {

// As Automaton and SpanIndex have them.
constexpr int64_t kMaxEdges = std::numeric_limits<int32_t>::max() - 1;
constexpr int64_t kMaxBytes = std::numeric_limits<int32_t>::max() / 3;
constexpr int32_t kNone = -1;

size_t index(int64_t i) { return static_cast<size_t>(i); }

// The bytes as tokens, for the builders of the other automata; what is wrong with them is said
// here, in bytes.
std::vector<int32_t> to_tokens(const uint8_t* text, const int64_t* offsets, int64_t count,
                               const char* count_name, int64_t max_bytes) {
  const int32_t unread = 0;  // only the offsets are looked at
  const int64_t total =
      check_ragged(&unread, offsets, count, count_name, std::numeric_limits<int64_t>::max());
  if (total > max_bytes) {
    throw std::invalid_argument("text: expected at most " + std::to_string(max_bytes) +
                                " bytes, got " + std::to_string(total));
  }
  if (total > 0 && text == nullptr) {
    throw std::invalid_argument("text: expected " + std::to_string(total) +
                                " bytes, got a null pointer");
  }
  return std::vector<int32_t>(text, text + total);
}

void check_ids(const int32_t* ids, int32_t num_tokens) {
  int32_t previous = -1;
  for (int32_t i = 0; i < num_tokens; ++i) {
    if (ids[i] <= previous) {
      throw std::invalid_argument("ids[" + std::to_string(i) + "]: expected a token id > " +
                                  std::to_string(previous) + ", got " + std::to_string(ids[i]));
    }
    previous = ids[i];
  }
}

// UTF-8 (RFC 3629): whether a byte goes on with a character, and how many bytes a character lacks
// after it if `pending` were lacking before.
bool is_continuation(int32_t byte) { return (byte & 0xc0) == 0x80; }

int32_t pending_after(int32_t byte, int32_t pending) {
  if (is_continuation(byte)) return std::max(0, pending - 1);
  return byte < 0xc0 ? 0 : byte < 0xe0 ? 1 : byte < 0xf0 ? 2 : 3;
}

// Breadth first from the beginning; each state reads the tokens that the bytes behind it spell.
class TextIndexBuilder {
 public:
  explicit TextIndexBuilder(const Automaton& pieces)
      : pieces_(pieces), state_of_(index(pieces.num_states()), kNone) {}

  Automaton build(const TokenSpellings& first, const TokenSpellings& following) {
    // The beginning; like every other, the state of the empty piece (after a first token without
    // bytes) goes on with `following`, so this one is not in state_of_.
    add_state(Automaton::kRootState, 0);
    for (int32_t state = 0; state < num_states(); ++state) {
      expand(state, state == 0 ? first : following);
    }
    remove_dead_ends();
    std::vector<uint8_t> is_final(index(num_states()));
    for (size_t i = 0; i < is_final.size(); ++i) is_final[i] = pending_[i] == 0 ? 1 : 0;
    return Automaton::from_valid_arrays(std::move(edge_begin_), std::move(edge_token_),
                                        std::move(edge_target_), std::move(is_final));
  }

 private:
  // Bytes read from a state: where they lead in the pieces and in the spellings.
  struct Reading {
    int32_t piece;
    int32_t node;
    int32_t pending;
  };

  int32_t num_states() const { return static_cast<int32_t>(piece_.size()); }

  int32_t add_state(int32_t piece, int32_t pending) {
    piece_.push_back(piece);
    pending_.push_back(static_cast<uint8_t>(pending));
    return num_states() - 1;
  }

  // `pending` is the same for all readings that lead here: a piece that begins with a character
  // tells where that ends.
  int32_t state_of(int32_t piece, int32_t pending) {
    int32_t& state = state_of_[index(piece)];
    if (state == kNone) state = add_state(piece, pending);
    return state;
  }

  void expand(int32_t state, const TokenSpellings& spellings) {
    edges_.clear();
    const Reading nothing = {piece_[index(state)], Automaton::kRootState, pending_[index(state)]};
    add_edges(nothing, spellings);
    readings_.assign(1, nothing);
    while (!readings_.empty()) {
      const Reading reading = readings_.back();
      readings_.pop_back();
      read_on(reading, spellings);
    }
    append_edges();
  }

  // All bytes that may follow a reading.
  void read_on(const Reading& reading, const TokenSpellings& spellings) {
    const AllowedTokens bytes = pieces_.allowed(reading.piece);
    const AllowedTokens spelt = spellings.trie().allowed(reading.node);
    const int32_t* at = spelt.begin;
    for (int64_t i = 0; i < bytes.size() && at != spelt.end; ++i) {
      const int32_t byte = bytes.begin[i];
      if (reading.piece == Automaton::kRootState && is_continuation(byte)) continue;
      at = std::lower_bound(at, spelt.end, byte);
      if (at == spelt.end || *at != byte) continue;
      const Reading next = {bytes.targets[i], spelt.targets[at - spelt.begin],
                            pending_after(byte, reading.pending)};
      add_edges(next, spellings);
      readings_.push_back(next);
    }
  }

  // One edge per token that is spelt by what was read.
  void add_edges(const Reading& reading, const TokenSpellings& spellings) {
    const int32_t begin = spellings.token_begin()[index(reading.node)];
    const int32_t end = spellings.token_begin()[index(reading.node) + 1];
    if (begin == end) return;
    const auto target = static_cast<uint64_t>(state_of(reading.piece, reading.pending));
    for (int32_t t = begin; t < end; ++t) {
      edges_.push_back(static_cast<uint64_t>(spellings.tokens()[index(t)]) << 32 | target);
    }
  }

  void append_edges() {
    const int64_t total = static_cast<int64_t>(edge_token_.size() + edges_.size());
    if (total > kMaxEdges) {
      throw std::invalid_argument("text: expected passages that can be read in at most " +
                                  std::to_string(kMaxEdges) + " steps of one token, got more");
    }
    std::sort(edges_.begin(), edges_.end());
    for (const uint64_t edge : edges_) {
      edge_token_.push_back(static_cast<int32_t>(edge >> 32));
      edge_target_.push_back(static_cast<int32_t>(edge & 0xffffffffu));
    }
    edge_begin_.push_back(static_cast<int32_t>(total));
  }

  // Only states inside a character can be dead ends, where the vocabulary lacks bytes.
  void remove_dead_ends() {
    const std::vector<uint8_t> alive = find_alive();
    if (std::find(alive.begin(), alive.end(), 0) == alive.end()) return;
    std::vector<int32_t> renamed(alive.size(), kNone);
    int32_t num_kept = 0;
    for (size_t s = 0; s < alive.size(); ++s) {
      if (alive[s] != 0) renamed[s] = num_kept++;
    }
    int32_t edges_kept = 0;
    for (size_t s = 0; s < alive.size(); ++s) {
      if (alive[s] == 0) continue;
      const int32_t begin = edge_begin_[s], end = edge_begin_[s + 1];
      const size_t to = index(renamed[s]);  // never beyond s, nor the kept edges beyond e
      edge_begin_[to] = edges_kept;
      pending_[to] = pending_[s];
      for (int32_t e = begin; e < end; ++e) {
        const int32_t target = renamed[index(edge_target_[index(e)])];
        if (target == kNone) continue;
        edge_token_[index(edges_kept)] = edge_token_[index(e)];
        edge_target_[index(edges_kept++)] = target;
      }
    }
    edge_begin_[index(num_kept)] = edges_kept;
    edge_begin_.resize(index(num_kept) + 1);
    edge_token_.resize(index(edges_kept));
    edge_target_.resize(index(edges_kept));
    pending_.resize(index(num_kept));
    piece_.resize(index(num_kept));
  }

  // Which states lead to a final one: backwards, from the final ones, through those that are not.
  std::vector<uint8_t> find_alive() const {
    std::vector<uint8_t> alive(index(num_states()));
    std::vector<int32_t> reached;                     // alive, but not final
    std::vector<std::pair<int32_t, int32_t>> inside;  // (target, source), none of them final
    for (size_t s = 0; s < alive.size(); ++s) {
      if (pending_[s] == 0) {
        alive[s] = 1;
        continue;
      }
      for (int32_t e = edge_begin_[s]; e < edge_begin_[s + 1]; ++e) {
        const int32_t target = edge_target_[index(e)];
        if (pending_[index(target)] == 0) alive[s] = 1;
        if (pending_[index(target)] != 0) inside.emplace_back(target, static_cast<int32_t>(s));
      }
      if (alive[s] != 0) reached.push_back(static_cast<int32_t>(s));
    }
    std::sort(inside.begin(), inside.end());
    while (!reached.empty()) {
      const int32_t target = reached.back();
      reached.pop_back();
      auto at = std::lower_bound(inside.begin(), inside.end(), std::make_pair(target, 0));
      for (; at != inside.end() && at->first == target; ++at) {
        uint8_t& source_alive = alive[index(at->second)];
        if (source_alive == 0) reached.push_back(at->second);
        source_alive = 1;
      }
    }
    return alive;
  }

  const Automaton& pieces_;        // the suffix automaton of the bytes
  std::vector<int32_t> state_of_;  // [states of pieces_] kNone or the state here
  std::vector<int32_t> piece_;     // [states] of pieces_
  std::vector<uint8_t> pending_;   // [states] bytes that the character at hand lacks
  std::vector<uint64_t> edges_;    // of the state at hand: token above target
  std::vector<Reading> readings_;  // to read on from
  std::vector<int32_t> edge_begin_ = {0};
  std::vector<int32_t> edge_token_;
  std::vector<int32_t> edge_target_;
};

}  // namespace

TokenSpellings::TokenSpellings(const int32_t* ids, const uint8_t* text, const int64_t* offsets,
                               int32_t num_tokens) {
  const std::vector<int32_t> bytes = to_tokens(text, offsets, num_tokens, "num_tokens", kMaxEdges);
  check_ids(ids, num_tokens);
  trie_ = build_trie(bytes.data(), offsets, num_tokens);
  std::vector<int32_t> node_of(index(num_tokens), Automaton::kRootState);
  token_begin_.assign(index(trie_.num_states()) + 1, 0);
  for (int32_t t = 0; t < num_tokens; ++t) {
    int32_t& node = node_of[index(t)];
    for (int64_t i = offsets[t]; i < offsets[t + 1]; ++i) {
      node = trie_.advance(node, bytes[index(i)]);
    }
    ++token_begin_[index(node) + 1];
  }
  for (size_t n = 1; n < token_begin_.size(); ++n) token_begin_[n] += token_begin_[n - 1];
  std::vector<int32_t> place(token_begin_.begin(), token_begin_.end() - 1);
  tokens_.resize(index(num_tokens));
  for (int32_t t = 0; t < num_tokens; ++t) {
    tokens_[index(place[index(node_of[index(t)])]++)] = ids[t];
  }
}

Automaton build_text_index(const uint8_t* text, const int64_t* offsets, int32_t num_passages,
                           const TokenSpellings& first, const TokenSpellings& following) {
  const std::vector<int32_t> bytes =
      to_tokens(text, offsets, num_passages, "num_passages", kMaxBytes);
  if (following.token_begin()[1] > 0) {
    throw std::invalid_argument("following: expected no token without bytes, got token " +
                                std::to_string(following.tokens()[0]));
  }
  const SpanIndex pieces(bytes.data(), offsets, num_passages);
  return TextIndexBuilder(pieces.automaton()).build(first, following);
}

}  // namespace fastmrc
