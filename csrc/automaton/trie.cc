#include "fastmrc/trie.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ragged.h"

namespace fastmrc {
namespace {

constexpr int64_t kMaxTrieSize = std::numeric_limits<int32_t>::max() - 1;

// Sorts and builds in one: the sequences that share a prefix are one group, one state. A level
// sorts each group by its next token, which splits it into the groups of the next level.
class TrieBuilder {
 public:
  TrieBuilder(const int32_t* tokens, const int64_t* offsets, int64_t num_sequences, int64_t total)
      : tokens_(tokens), offsets_(offsets), order_(static_cast<size_t>(num_sequences)) {
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<int32_t>(i);
    // Reserved pages cost nothing until they are written, a growing vector copies and doubles.
    edge_begin_.reserve(static_cast<size_t>(total) + 2);
    edge_token_.reserve(static_cast<size_t>(total));
    is_final_.reserve(static_cast<size_t>(total) + 1);
  }

  Automaton build() {
    std::vector<int32_t> groups = {0, static_cast<int32_t>(order_.size())};
    std::vector<int32_t> next_groups;
    edge_begin_.push_back(0);
    for (int64_t depth = 0; groups.size() > 1; ++depth) {
      next_groups.assign(1, 0);
      kept_ = 0;
      for (size_t g = 0; g + 1 < groups.size(); ++g) {
        split(groups[g], groups[g + 1], depth, &next_groups);
      }
      groups.swap(next_groups);
    }
    return finish();
  }

 private:
  // Turns order_[begin, end), sequences equal in their first `depth` tokens, into one state.
  void split(int32_t begin, int32_t end, int64_t depth, std::vector<int32_t>* next_groups) {
    bool is_final = false;
    keys_.clear();
    for (int32_t i = begin; i < end; ++i) {
      const int32_t sequence = order_[static_cast<size_t>(i)];
      const int64_t at = offsets_[sequence] + depth;
      if (at == offsets_[sequence + 1]) {
        is_final = true;
      } else {
        keys_.push_back(make_key(at, sequence));
      }
    }
    if (keys_.size() > 1) std::sort(keys_.begin(), keys_.end());
    int32_t previous = -1;
    for (const uint64_t key : keys_) {
      const int32_t token = static_cast<int32_t>(key >> 32);
      if (token != previous) {
        if (previous >= 0) next_groups->push_back(kept_);
        edge_token_.push_back(token);
        previous = token;
      }
      // Never overtakes the reading: what is kept is at most what was read so far.
      order_[static_cast<size_t>(kept_++)] = static_cast<int32_t>(key & 0xffffffffu);
    }
    if (previous >= 0) next_groups->push_back(kept_);
    is_final_.push_back(is_final ? 1 : 0);
    edge_begin_.push_back(static_cast<int32_t>(edge_token_.size()));
  }

  // Token above sequence: the order of the keys is the order of the tokens, and reading the group
  // again walks through memory in one direction.
  uint64_t make_key(int64_t at, int32_t sequence) const {
    const int32_t token = tokens_[at];
    if (token < 0) throw_negative_token(at, token);
    return (static_cast<uint64_t>(token) << 32) | static_cast<uint32_t>(sequence);
  }

  Automaton finish() {
    // Given back before the targets are made (assigning {} would keep the capacity).
    std::vector<int32_t>().swap(order_);
    std::vector<uint64_t>().swap(keys_);
    edge_begin_.shrink_to_fit();
    edge_token_.shrink_to_fit();
    is_final_.shrink_to_fit();
    std::vector<int32_t> edge_target(edge_token_.size());
    for (size_t e = 0; e < edge_target.size(); ++e) edge_target[e] = static_cast<int32_t>(e) + 1;
    return Automaton::from_valid_arrays(std::move(edge_begin_), std::move(edge_token_),
                                        std::move(edge_target), std::move(is_final_));
  }

  const int32_t* tokens_;
  const int64_t* offsets_;
  std::vector<int32_t> order_;  // sequences that are longer than the depth, grouped by prefix
  std::vector<uint64_t> keys_;  // of the group at hand
  int32_t kept_ = 0;            // how much of order_ belongs to the next level
  std::vector<int32_t> edge_begin_;
  std::vector<int32_t> edge_token_;
  std::vector<uint8_t> is_final_;
};

}  // namespace

Automaton build_trie(const int32_t* tokens, const int64_t* offsets, int64_t num_sequences) {
  if (num_sequences > kMaxTrieSize) {
    throw std::invalid_argument("num_sequences: expected at most " + std::to_string(kMaxTrieSize) +
                                " sequences, got " + std::to_string(num_sequences));
  }
  const int64_t total = check_ragged(tokens, offsets, num_sequences, "num_sequences", kMaxTrieSize);
  return TrieBuilder(tokens, offsets, num_sequences, total).build();
}

}  // namespace fastmrc
