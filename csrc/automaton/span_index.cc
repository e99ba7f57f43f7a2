#include "fastmrc/span_index.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "ragged.h"

namespace fastmrc {
namespace {

// 3 edges per token, and state and edge numbers fit int32.
constexpr int64_t kMaxSpanTokens = std::numeric_limits<int32_t>::max() / 3;
constexpr int32_t kNone = -1;

// Memory that is written before it is read (a vector would clear it first) and can be used again.
template <typename T>
class Buffer {
 public:
  // The contents are lost.
  void resize(int64_t size) {
    if (size <= capacity_) return;
    data_.reset();
    data_.reset(new T[static_cast<size_t>(size)]);
    capacity_ = size;
  }

  T& operator[](int64_t i) { return data_[static_cast<size_t>(i)]; }

 private:
  std::unique_ptr<T[]> data_;
  int64_t capacity_ = 0;
};

// Open addressing with linear probing. It stores the numbers of records that live elsewhere, so it
// is small enough to stay in the nearest caches; the caller compares the records.
class NumberTable {
 public:
  void reset(int64_t max_entries) {
    bits_ = 4;
    while ((int64_t{1} << bits_) < 2 * max_entries) ++bits_;  // at most half full
    slots_.resize(int64_t{1} << bits_);
    std::memset(&slots_[0], 0xff, sizeof(int32_t) << bits_);  // kNone everywhere
  }

  // The slot with the number that `equals` accepts, or the free slot where it belongs.
  template <typename Equals>
  int32_t& find(uint64_t key, Equals equals) {
    // Fibonacci hashing: the upper bits of the product depend on all bits of the key.
    int64_t slot = static_cast<int64_t>((key * 0x9e3779b97f4a7c15u) >> (64 - bits_));
    const int64_t mask = (int64_t{1} << bits_) - 1;
    while (slots_[slot] != kNone && !equals(slots_[slot])) slot = (slot + 1) & mask;
    return slots_[slot];
  }

 private:
  int bits_ = 0;
  Buffer<int32_t> slots_;
};

// A state stands for the pieces that end at the same places of the passages; `length` is that of
// the longest of them, `link` the state of its longest suffix that ends at more places. Most states
// have one edge, so the first edge of a state lies in the state itself and only later ones are
// records of their own. The root's edges are elsewhere (root_target).
struct State {
  int32_t length;
  int32_t link;
  int32_t first_rank;  // kNone if the state has no edge
  int32_t first_target;
  int32_t later_edge;  // kNone or the head of the list of its other edges
  int32_t num_edges;
};

struct Edge {
  int32_t source;
  int32_t rank;
  int32_t target;
  int32_t next;  // among the later edges of the source
};

struct Workspace {
  // First token -> number among the distinct ones, then (source, rank) -> number of the later edge.
  NumberTable table;
  Buffer<int32_t> rank;  // [total] the tokens as ranks among the ids that occur
  Buffer<State> states;
  Buffer<Edge> later_edges;
  Buffer<int32_t> edge_order;  // [number of later edges]
  Buffer<int32_t> next_place;  // [number of states]
};

// A thread keeps its workspace for builds up to this many tokens, about 2 MB: an index per question
// that gets fresh pages from the system spends a third of its time on their first touch.
constexpr int64_t kKeptTokens = 16384;

// Ascending by the upper 32 bits, one byte at a time: 4 linear passes at most.
void radix_sort_by_upper_half(std::vector<uint64_t>* keys) {
  uint64_t seen = 0;
  for (const uint64_t key : *keys) seen |= key;
  std::vector<uint64_t> sorted(keys->size());
  for (int shift = 32; shift < 64 && (seen >> shift) != 0; shift += 8) {
    size_t begin[257] = {};
    for (const uint64_t key : *keys) ++begin[((key >> shift) & 255) + 1];
    for (int byte = 0; byte < 256; ++byte) begin[byte + 1] += begin[byte];
    for (const uint64_t key : *keys) sorted[begin[(key >> shift) & 255]++] = key;
    keys->swap(sorted);
  }
}

// Renames the tokens to 0, 1, ... in ascending order of the ids that occur, and returns those ids.
// Ranks give the root a plain array of targets, and the edges an order by counting.
std::vector<int32_t> rank_tokens(const int32_t* tokens, int64_t total, Workspace* work) {
  std::vector<int32_t> distinct;
  work->rank.resize(total);
  work->table.reset(total);
  for (int64_t i = 0; i < total; ++i) {
    const int32_t token = tokens[i];
    if (token < 0) throw_negative_token(i, token);
    int32_t& number = work->table.find(static_cast<uint64_t>(token), [&](int32_t n) {
      return distinct[static_cast<size_t>(n)] == token;
    });
    if (number == kNone) {
      number = static_cast<int32_t>(distinct.size());
      distinct.push_back(token);
    }
    work->rank[i] = number;
  }
  std::vector<uint64_t> keys(distinct.size());
  for (size_t n = 0; n < keys.size(); ++n) {
    keys[n] = (static_cast<uint64_t>(distinct[n]) << 32) | n;
  }
  radix_sort_by_upper_half(&keys);
  std::vector<int32_t> rank_of(distinct.size());
  for (size_t r = 0; r < keys.size(); ++r) {
    distinct[r] = static_cast<int32_t>(keys[r] >> 32);
    rank_of[keys[r] & 0xffffffffu] = static_cast<int32_t>(r);
  }
  for (int64_t i = 0; i < total; ++i) {
    work->rank[i] = rank_of[static_cast<size_t>(work->rank[i])];
  }
  return distinct;
}

// The online construction, token by token.
class SuffixAutomatonBuilder {
 public:
  SuffixAutomatonBuilder(const int32_t* tokens, int64_t total, int64_t num_passages,
                         Workspace* work)
      : distinct_(rank_tokens(tokens, total, work)),
        root_target_(distinct_.size(), kNone),
        work_(*work),
        states_(work->states),
        later_edges_(work->later_edges) {
    // An automaton of this kind has at most `total` edges outside a spanning tree, one for each
    // suffix of a passage. The tree has one edge less than there are states, so leaving out a first
    // edge of every state that has any leaves `total` and one per state without edges, of which a
    // passage that is not empty makes one at most.
    const int64_t max_later_edges = total + std::min(total, num_passages);
    states_.resize(2 * total + 1);
    later_edges_.resize(max_later_edges);
    work_.table.reset(max_later_edges);
    add_state(0, kNone);
  }

  void add_passage(int64_t begin, int64_t end) {
    int32_t last = Automaton::kRootState;
    for (int64_t i = begin; i < end; ++i) last = extend(last, work_.rank[i]);
  }

  Automaton build();

 private:
  int32_t add_state(int32_t length, int32_t link) {
    states_[num_states_] = {length, link, kNone, kNone, kNone, 0};
    return num_states_++;
  }

  int32_t& later_edge(int32_t source, int32_t rank) {
    const uint64_t key = (static_cast<uint64_t>(source) << 32) | static_cast<uint32_t>(rank);
    return work_.table.find(key, [&](int32_t e) {
      return later_edges_[e].source == source && later_edges_[e].rank == rank;
    });
  }

  // The target of (source, rank), null if there is none.
  int32_t* find_target(int32_t source, int32_t rank) {
    if (source == Automaton::kRootState) {
      int32_t& target = root_target_[static_cast<size_t>(rank)];
      return target == kNone ? nullptr : &target;
    }
    State& state = states_[source];
    if (state.first_rank == rank) return &state.first_target;
    if (state.later_edge == kNone) return nullptr;
    const int32_t later = later_edge(source, rank);
    return later == kNone ? nullptr : &later_edges_[later].target;
  }

  // Like find_target, but adds an edge to `target` and returns null where there was none.
  int32_t* find_target_or_add(int32_t source, int32_t rank, int32_t target) {
    if (source == Automaton::kRootState) {
      int32_t& root_target = root_target_[static_cast<size_t>(rank)];
      if (root_target != kNone) return &root_target;
      root_target = target;
      return nullptr;
    }
    State& state = states_[source];
    if (state.first_rank == rank) return &state.first_target;
    if (state.first_rank == kNone) {
      state.first_rank = rank;
      state.first_target = target;
    } else {
      int32_t& later = later_edge(source, rank);
      if (later != kNone) return &later_edges_[later].target;
      later = num_later_edges_++;
      later_edges_[later] = {source, rank, target, state.later_edge};
      state.later_edge = later;
    }
    ++state.num_edges;
    return nullptr;
  }

  // The state of (pieces of last) + rank, with all suffixes in place.
  int32_t extend(int32_t last, int32_t rank) {
    const int32_t added = num_states_;
    // Only with several passages: an earlier one has this piece already, and the new state would
    // have no piece of its own.
    if (int32_t* target = find_target_or_add(last, rank, added)) {
      return own_state(last, rank, target);
    }
    add_state(states_[last].length + 1, Automaton::kRootState);
    for (int32_t s = states_[last].link; s != kNone; s = states_[s].link) {
      if (int32_t* target = find_target_or_add(s, rank, added)) {
        const int32_t link = own_state(s, rank, target);
        states_[added].link = link;
        break;
      }
    }
    return added;
  }

  // The state whose longest piece is (longest of source) + rank: the target of that edge, or, if
  // the target holds longer pieces too, which from now on end at fewer places, a clone split off
  // from it.
  int32_t own_state(int32_t source, int32_t rank, int32_t* source_target) {
    const int32_t target = *source_target;
    const int32_t length = states_[source].length + 1;
    if (states_[target].length == length) return target;
    const int32_t clone = add_state(length, states_[target].link);
    copy_edges(target, clone);
    states_[target].link = clone;
    while (*source_target == target) {
      *source_target = clone;
      source = states_[source].link;
      if (source == kNone) break;
      // Not null: a suffix of a piece goes on wherever the piece does.
      source_target = find_target(source, rank);
    }
    return clone;
  }

  // `to` has no edges yet.
  void copy_edges(int32_t from, int32_t to) {
    const State& source = states_[from];
    if (source.first_rank == kNone) return;
    find_target_or_add(to, source.first_rank, source.first_target);
    for (int32_t e = source.later_edge; e != kNone; e = later_edges_[e].next) {
      find_target_or_add(to, later_edges_[e].rank, later_edges_[e].target);
    }
  }

  void order_later_edges();

  std::vector<int32_t> distinct_;     // [number of ranks] token ids
  std::vector<int32_t> root_target_;  // [number of ranks]
  Workspace& work_;
  Buffer<State>& states_;
  Buffer<Edge>& later_edges_;
  int32_t num_states_ = 0;
  int32_t num_later_edges_ = 0;
};

// Counting sort by rank: placed in this order, the later edges of every state come out sorted.
void SuffixAutomatonBuilder::order_later_edges() {
  std::vector<int32_t> place(distinct_.size() + 1);
  for (int32_t e = 0; e < num_later_edges_; ++e) {
    ++place[static_cast<size_t>(later_edges_[e].rank) + 1];
  }
  for (size_t r = 1; r < place.size(); ++r) place[r] += place[r - 1];
  work_.edge_order.resize(num_later_edges_);
  for (int32_t e = 0; e < num_later_edges_; ++e) {
    work_.edge_order[place[static_cast<size_t>(later_edges_[e].rank)]++] = e;
  }
}

Automaton SuffixAutomatonBuilder::build() {
  Buffer<int32_t>& next_place = work_.next_place;  // of a later edge; the first place stays free
  next_place.resize(num_states_);
  std::vector<int32_t> edge_begin(static_cast<size_t>(num_states_) + 1);
  int32_t num_edges = static_cast<int32_t>(distinct_.size());
  for (int32_t s = 1; s < num_states_; ++s) {
    edge_begin[static_cast<size_t>(s)] = num_edges;
    next_place[s] = num_edges + 1;
    num_edges += states_[s].num_edges;
  }
  edge_begin.back() = num_edges;

  std::vector<int32_t> edge_token(static_cast<size_t>(num_edges));
  std::vector<int32_t> edge_target(static_cast<size_t>(num_edges));
  std::copy(distinct_.begin(), distinct_.end(), edge_token.begin());
  std::copy(root_target_.begin(), root_target_.end(), edge_target.begin());
  order_later_edges();
  for (int32_t i = 0; i < num_later_edges_; ++i) {
    const Edge& edge = later_edges_[work_.edge_order[i]];
    const size_t at = static_cast<size_t>(next_place[edge.source]++);
    edge_token[at] = distinct_[static_cast<size_t>(edge.rank)];
    edge_target[at] = edge.target;
  }
  for (int32_t s = 1; s < num_states_; ++s) {
    if (states_[s].num_edges == 0) continue;
    // The first edge moves up from its free place past the smaller tokens.
    const int32_t token = distinct_[static_cast<size_t>(states_[s].first_rank)];
    size_t at = static_cast<size_t>(edge_begin[static_cast<size_t>(s)]);
    const size_t last = static_cast<size_t>(edge_begin[static_cast<size_t>(s) + 1]) - 1;
    for (; at < last && edge_token[at + 1] < token; ++at) {
      edge_token[at] = edge_token[at + 1];
      edge_target[at] = edge_target[at + 1];
    }
    edge_token[at] = token;
    edge_target[at] = states_[s].first_target;
  }
  return Automaton::from_valid_arrays(std::move(edge_begin), std::move(edge_token),
                                      std::move(edge_target),
                                      std::vector<uint8_t>(static_cast<size_t>(num_states_), 1));
}

Automaton build_suffix_automaton(const int32_t* tokens, const std::vector<int64_t>& offsets) {
  thread_local Workspace kept;
  const int64_t total = offsets.back();
  Workspace large;
  const size_t num_passages = offsets.size() - 1;
  SuffixAutomatonBuilder builder(tokens, total, static_cast<int64_t>(num_passages),
                                 total <= kKeptTokens ? &kept : &large);
  for (size_t p = 0; p < num_passages; ++p) builder.add_passage(offsets[p], offsets[p + 1]);
  return builder.build();
}

std::vector<int64_t> checked_offsets(const int32_t* tokens, const int64_t* offsets,
                                     int32_t num_passages) {
  check_ragged(tokens, offsets, num_passages, "num_passages", kMaxSpanTokens);
  if (num_passages == 0) return {0};
  return std::vector<int64_t>(offsets, offsets + num_passages + 1);
}

}  // namespace

std::vector<Occurrence> find_occurrences(const int32_t* tokens, const int64_t* offsets,
                                         int32_t num_passages, const int32_t* span,
                                         int64_t span_length) {
  check_ragged(tokens, offsets, num_passages, "num_passages", std::numeric_limits<int32_t>::max());
  if (span_length < 0) {
    throw std::invalid_argument("span_length: expected a count >= 0, got " +
                                std::to_string(span_length));
  }
  std::vector<Occurrence> found;
  if (span_length == 0) return found;
  for (int32_t p = 0; p < num_passages; ++p) {
    if (offsets[p + 1] - offsets[p] < span_length) continue;
    const int32_t* begin = tokens + offsets[p];
    const int32_t* last_start = tokens + offsets[p + 1] - span_length;
    for (const int32_t* at = begin; at <= last_start; ++at) {
      // Nearly every position fails here, in the library's unrolled loop.
      at = std::find(at, last_start + 1, span[0]);
      if (at > last_start) break;
      if (std::equal(span + 1, span + span_length, at + 1)) {
        found.push_back({p, static_cast<int32_t>(at - begin)});
      }
    }
  }
  return found;
}

SpanIndex::SpanIndex(const int32_t* tokens, const int64_t* offsets, int32_t num_passages)
    : offsets_(checked_offsets(tokens, offsets, num_passages)),
      tokens_(tokens, tokens + offsets_.back()),
      automaton_(build_suffix_automaton(tokens, offsets_)) {}

std::vector<Occurrence> SpanIndex::occurrences(const int32_t* span, int64_t span_length) const {
  return find_occurrences(tokens_.data(), offsets_.data(), num_passages(), span, span_length);
}

}  // namespace fastmrc
