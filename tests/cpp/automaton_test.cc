// The automaton and its two builders against brute force on small alphabets.

#include "fastmrc/automaton.h"

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "fastmrc/span_index.h"
#include "fastmrc/trie.h"

namespace {

using fastmrc::Automaton;
using fastmrc::build_trie;
using fastmrc::find_occurrences;
using fastmrc::Occurrence;
using fastmrc::SpanIndex;

using Sequence = std::vector<int32_t>;
using Sequences = std::vector<Sequence>;
using Language = std::set<Sequence>;

constexpr uint32_t kSeed = 20240607;
constexpr int kRandomCases = 1500;

struct Ragged {
  std::vector<int32_t> tokens;
  std::vector<int64_t> offsets = {0};

  explicit Ragged(const Sequences& sequences) {
    for (const Sequence& sequence : sequences) {
      tokens.insert(tokens.end(), sequence.begin(), sequence.end());
      offsets.push_back(static_cast<int64_t>(tokens.size()));
    }
  }

  int32_t count() const { return static_cast<int32_t>(offsets.size()) - 1; }
  SpanIndex span_index() const { return SpanIndex(tokens.data(), offsets.data(), count()); }
  Automaton trie() const { return build_trie(tokens.data(), offsets.data(), count()); }
};

std::string describe(const Sequences& sequences) {
  std::string text;
  for (const Sequence& sequence : sequences) {
    text += "[";
    for (const int32_t token : sequence) text += std::to_string(token) + " ";
    text += "]";
  }
  return text;
}

Language all_pieces(const Sequences& passages) {
  Language pieces = {{}};
  for (const Sequence& passage : passages) {
    for (size_t begin = 0; begin < passage.size(); ++begin) {
      Sequence piece;
      for (size_t end = begin; end < passage.size(); ++end) {
        piece.push_back(passage[end]);
        pieces.insert(piece);
      }
    }
  }
  return pieces;
}

std::vector<Occurrence> all_occurrences(const Sequences& passages, const Sequence& span) {
  std::vector<Occurrence> found;
  for (size_t p = 0; p < passages.size() && !span.empty(); ++p) {
    for (size_t at = 0; at + span.size() <= passages[p].size(); ++at) {
      if (std::equal(span.begin(), span.end(), passages[p].begin() + static_cast<int64_t>(at))) {
        found.push_back({static_cast<int32_t>(p), static_cast<int32_t>(at)});
      }
    }
  }
  return found;
}

// Everything the automaton accepts, by walking all paths (it has no cycles).
void collect(const Automaton& automaton, int32_t state, Sequence* path, Language* language) {
  if (automaton.is_final(state)) language->insert(*path);
  const fastmrc::AllowedTokens allowed = automaton.allowed(state);
  for (int64_t i = 0; i < allowed.size(); ++i) {
    path->push_back(allowed.begin[i]);
    CHECK_EQ(automaton.advance(state, allowed.begin[i]), allowed.targets[i]);
    collect(automaton, allowed.targets[i], path, language);
    path->pop_back();
  }
}

Language accepted(const Automaton& automaton) {
  Language language;
  Sequence path;
  collect(automaton, Automaton::kRootState, &path, &language);
  return language;
}

// The builders skip the checks of the public constructor; here they have to pass them.
void check_invariants(const Automaton& automaton) {
  try {
    const Automaton copy(automaton.edge_begin(), automaton.edge_token(), automaton.edge_target(),
                         automaton.final_flags());
    CHECK_EQ(copy.num_states(), automaton.num_states());
    CHECK_EQ(copy.num_edges(), automaton.num_edges());
  } catch (const std::invalid_argument& error) {
    CHECK_EQ(std::string(error.what()), std::string());
  }
}

// Pieces that end at the same places share a state and no others do: the root and one state for
// each set of end places.
int32_t num_end_sets(const Sequences& passages) {
  std::set<std::vector<std::pair<int32_t, size_t>>> end_sets;
  for (const Sequence& piece : all_pieces(passages)) {
    if (piece.empty()) continue;
    std::vector<std::pair<int32_t, size_t>> ends;
    for (const Occurrence& occurrence : all_occurrences(passages, piece)) {
      ends.emplace_back(occurrence.passage,
                        static_cast<size_t>(occurrence.position) + piece.size());
    }
    end_sets.insert(ends);
  }
  return static_cast<int32_t>(end_sets.size()) + 1;
}

void check_size(const Automaton& automaton, int64_t num_tokens) {
  CHECK(automaton.num_states() <= std::max<int64_t>(1, 2 * num_tokens));
  CHECK(automaton.num_edges() <= 3 * num_tokens);
}

void check_span_index(const Sequences& passages) {
  fastmrc_test::context() = "passages " + describe(passages);
  const Ragged ragged(passages);
  const SpanIndex index = ragged.span_index();
  const Automaton& automaton = index.automaton();
  const Language pieces = all_pieces(passages);
  check_invariants(automaton);
  check_size(automaton, ragged.offsets.back());
  CHECK(accepted(automaton) == pieces);
  CHECK_EQ(automaton.num_states(), num_end_sets(passages));
  for (int32_t s = 0; s < automaton.num_states(); ++s) CHECK(automaton.is_final(s));
  CHECK_EQ(index.num_passages(), static_cast<int32_t>(passages.size()));
  for (const Sequence& piece : pieces) {
    CHECK(index.occurrences(piece.data(), static_cast<int64_t>(piece.size())) ==
          all_occurrences(passages, piece));
  }
  fastmrc_test::context().clear();
}

void check_trie(const Sequences& sequences) {
  fastmrc_test::context() = "sequences " + describe(sequences);
  const Automaton automaton = Ragged(sequences).trie();
  check_invariants(automaton);
  CHECK(accepted(automaton) == Language(sequences.begin(), sequences.end()));
  CHECK_EQ(automaton.num_states(), automaton.num_edges() + 1);
  Language prefixes = {{}};
  for (const Sequence& sequence : sequences) {
    for (size_t n = 1; n <= sequence.size(); ++n) {
      prefixes.insert(Sequence(sequence.begin(), sequence.begin() + static_cast<int64_t>(n)));
    }
  }
  CHECK_EQ(automaton.num_states(), static_cast<int32_t>(prefixes.size()));
  fastmrc_test::context().clear();
}

const std::vector<Sequences>& edge_cases() {
  static const std::vector<Sequences> cases = {
      {},
      {{}},
      {{}, {}, {}},
      {{5}},
      {{0}},
      {{5}, {}, {5}},
      {{}, {5, 6}},
      {{5}, {6}},
      {{7, 7, 7, 7, 7}},
      {{7, 7}, {7, 7, 7, 7}, {7}},
      {{1, 2, 1, 2, 1, 2}},
      {{1, 2, 1, 2}, {2, 1, 2, 1}},
      {{1, 2, 3}, {1, 2, 3}},
      {{1, 2, 3}, {1, 2, 3}, {1, 2, 3, 4}},
      {{1, 2, 3, 4}, {1, 2}, {3, 4}, {2, 3}},     // prefix, suffix and middle of an earlier one
      {{3, 4}, {1, 2}, {2, 3}, {1, 2, 3, 4}},     // the same, shorter ones first
      {{1, 2, 3, 9, 1, 2}, {2, 3}, {9, 1}, {2}},  // an existing edge whose target must be cloned
      {{1, 1, 2}, {1, 2}, {1, 1, 1, 2}},
      {{2147483647, 0, 2147483647}, {0, 65536, 255, 256, 65535, 16777216}},
      {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}},
      {{1, 30, 1, 29, 1, 28, 1, 27, 1, 26, 1, 25, 1, 24, 1, 23, 1, 22, 1, 21}},
  };
  return cases;
}

Sequences random_sequences(std::mt19937* random, uint32_t max_count, uint32_t max_length) {
  const auto alphabet = 1 + (*random)() % 4;
  Sequences sequences((*random)() % (max_count + 1));
  for (Sequence& sequence : sequences) {
    sequence.resize((*random)() % (max_length + 1));
    // Apart by more than a byte, so that sorting sees several digits.
    for (int32_t& token : sequence) token = static_cast<int32_t>((*random)() % alphabet * 40503);
  }
  return sequences;
}

void test_builders_on_edge_cases() {
  for (const Sequences& sequences : edge_cases()) {
    check_span_index(sequences);
    check_trie(sequences);
  }
}

void test_builders_on_random_cases() {
  std::cout << "seed " << kSeed << std::endl;
  std::mt19937 random(kSeed);
  for (int i = 0; i < kRandomCases; ++i) {
    check_span_index(random_sequences(&random, 5, 12));
    check_trie(random_sequences(&random, 20, 6));
  }
}

// Every walk, also one that leaves the automaton and goes on.
void test_walks_agree_with_the_language() {
  std::mt19937 random(kSeed + 1);
  for (int i = 0; i < 200; ++i) {
    const Sequences passages = random_sequences(&random, 4, 10);
    fastmrc_test::context() = "passages " + describe(passages);
    const SpanIndex index = Ragged(passages).span_index();
    const Language pieces = all_pieces(passages);
    for (int walk = 0; walk < 50; ++walk) {
      Sequence piece;
      int32_t state = Automaton::kRootState;
      for (int step = 0; step < 6; ++step) {
        piece.push_back(static_cast<int32_t>(random() % 5 * 40503));
        state = index.automaton().advance(state, piece.back());
        CHECK_EQ(state != Automaton::kDeadState, pieces.count(piece) == 1);
        CHECK_EQ(index.automaton().is_final(state), pieces.count(piece) == 1);
      }
    }
  }
  fastmrc_test::context().clear();
}

// Long enough for wide states, several bytes of token and the workspace that is not kept.
void test_large_index() {
  std::mt19937 random(kSeed + 2);
  Sequences passages(40);
  for (Sequence& passage : passages) {
    for (int i = 0; i < 600; ++i) {
      const int32_t r = static_cast<int32_t>(random() % 1000);
      passage.push_back(r * r / 1000 * 151);
    }
  }
  const Ragged ragged(passages);
  const SpanIndex index = ragged.span_index();
  const Automaton& automaton = index.automaton();
  check_invariants(automaton);
  check_size(automaton, ragged.offsets.back());
  std::map<std::pair<int32_t, int32_t>, std::set<int32_t>>
      after;  // two tokens -> those that follow
  std::set<int32_t> distinct;
  for (const Sequence& passage : passages) {
    distinct.insert(passage.begin(), passage.end());
    int32_t state = Automaton::kRootState;
    for (const int32_t token : passage) state = automaton.advance(state, token);
    CHECK(state != Automaton::kDeadState);
    for (size_t i = 2; i < passage.size(); ++i) {
      after[{passage[i - 2], passage[i - 1]}].insert(passage[i]);
    }
  }
  const fastmrc::AllowedTokens first = automaton.allowed(Automaton::kRootState);
  CHECK_EQ(Sequence(first.begin, first.end), Sequence(distinct.begin(), distinct.end()));
  for (const auto& [pair, tokens] : after) {
    const int32_t state = automaton.advance(automaton.advance(0, pair.first), pair.second);
    const fastmrc::AllowedTokens allowed = automaton.allowed(state);
    CHECK_EQ(Sequence(allowed.begin, allowed.end), Sequence(tokens.begin(), tokens.end()));
  }
  const Sequence span(passages[17].begin() + 100, passages[17].begin() + 102);
  CHECK(index.occurrences(span.data(), 2) == all_occurrences(passages, span));
}

// A small index after a large one and after a failed one uses the same memory again.
void test_builds_do_not_leak_into_each_other() {
  const Sequences small = {{3, 1, 3}, {1, 3, 1}};
  const Automaton before = Ragged(small).span_index().automaton();
  const Sequences large = {Sequence(3000, 3), Sequence(3000, 1)};
  check_size(Ragged(large).span_index().automaton(), 6000);
  CHECK_THROWS(Ragged({{3, 1, -5}}).span_index(), std::invalid_argument,
               "tokens[2]: expected a token id >= 0, got -5");
  const Automaton after = Ragged(small).span_index().automaton();
  CHECK_EQ(before.edge_begin(), after.edge_begin());
  CHECK_EQ(before.edge_token(), after.edge_token());
  CHECK_EQ(before.edge_target(), after.edge_target());
}

void test_large_trie() {
  std::mt19937 random(kSeed + 3);
  Sequences sequences(20000);
  for (Sequence& sequence : sequences) {
    sequence.resize(random() % 9);
    for (int32_t& token : sequence) token = static_cast<int32_t>(random() % 30 * random() % 21128);
  }
  const Automaton automaton = Ragged(sequences).trie();
  check_invariants(automaton);
  const Language language(sequences.begin(), sequences.end());
  for (const Sequence& sequence : sequences) {
    int32_t state = Automaton::kRootState;
    Sequence prefix;
    for (const int32_t token : sequence) {
      prefix.push_back(token);
      state = automaton.advance(state, token);
      CHECK_EQ(automaton.is_final(state), language.count(prefix) == 1);
    }
  }
}

void test_occurrences() {
  const Sequences passages = {{1, 1, 1, 2}, {}, {2}, {1, 2, 1, 1}};
  const Ragged ragged(passages);
  const SpanIndex index = ragged.span_index();
  const Sequence ones = {1, 1};
  const std::vector<Occurrence> expected = {{0, 0}, {0, 1}, {3, 2}};
  CHECK(index.occurrences(ones.data(), 2) == expected);
  CHECK(find_occurrences(ragged.tokens.data(), ragged.offsets.data(), 4, ones.data(), 2) ==
        expected);
  CHECK_EQ(index.occurrences(nullptr, 0).size(), size_t{0});
  const Sequence across = {2, 2};  // the end of one passage and the next one
  CHECK_EQ(index.occurrences(across.data(), 2).size(), size_t{0});
  const Sequence unknown = {-1};
  CHECK_EQ(index.occurrences(unknown.data(), 1).size(), size_t{0});
  const Sequence longer(50, 1);
  CHECK_EQ(index.occurrences(longer.data(), 50).size(), size_t{0});
  CHECK_EQ(SpanIndex(nullptr, nullptr, 0).occurrences(ones.data(), 2).size(), size_t{0});
  CHECK_THROWS(index.occurrences(ones.data(), -1), std::invalid_argument,
               "span_length: expected a count >= 0, got -1");
}

void test_batched_advance() {
  const Automaton automaton = Ragged({{4, 6}, {4, 8}, {}}).trie();
  std::vector<int32_t> states = {0, 0, -1, 1, 1, 1, 2};
  const std::vector<int32_t> tokens = {4, 6, 4, 6, 8, -7, 4};
  const std::vector<int32_t> expected = {1, -1, -1, 2, 3, -1, -1};
  std::vector<int32_t> out(states.size());
  automaton.advance(states.data(), tokens.data(), 7, out.data());
  CHECK_EQ(out, expected);
  automaton.advance(states.data(), tokens.data(), 7, states.data());
  CHECK_EQ(states, expected);
  automaton.advance(nullptr, nullptr, 0, nullptr);
  CHECK_THROWS(automaton.advance(nullptr, nullptr, -1, nullptr), std::invalid_argument,
               "n: expected a count >= 0, got -1");
}

void test_states_out_of_range() {
  const Automaton automaton = Ragged({{4, 6}}).trie();
  CHECK_EQ(automaton.advance(Automaton::kDeadState, 4), Automaton::kDeadState);
  CHECK_EQ(automaton.allowed(Automaton::kDeadState).size(), int64_t{0});
  CHECK(!automaton.is_final(Automaton::kDeadState));
  for (const int32_t state : {-2, 3, std::numeric_limits<int32_t>::max()}) {
    const std::string message =
        "state: expected -1 or a state in [0, 3), got " + std::to_string(state);
    CHECK_THROWS(automaton.advance(state, 4), std::invalid_argument, message);
    CHECK_THROWS(automaton.allowed(state), std::invalid_argument, message);
    CHECK_THROWS(automaton.is_final(state), std::invalid_argument, message);
  }
  const std::vector<int32_t> states = {0, 3};
  const std::vector<int32_t> tokens = {4, 4};
  std::vector<int32_t> out = {9, 9};
  CHECK_THROWS(automaton.advance(states.data(), tokens.data(), 2, out.data()),
               std::invalid_argument, "states[1]: expected -1 or a state in [0, 3), got 3");
  CHECK_EQ(out, (std::vector<int32_t>{9, 9}));
}

void test_default_automaton_accepts_nothing() {
  const Automaton automaton;
  check_invariants(automaton);
  CHECK_EQ(automaton.num_states(), 1);
  CHECK_EQ(automaton.num_edges(), 0);
  CHECK(!automaton.is_final(0));
  CHECK_EQ(automaton.advance(0, 0), Automaton::kDeadState);
}

void test_invalid_arrays() {
  using std::invalid_argument;
  CHECK_THROWS(Automaton({0}, {}, {}, {}), invalid_argument, "is_final: expected 1 to");
  CHECK_THROWS(Automaton({0}, {}, {}, {1}), invalid_argument, "edge_begin: expected 2 values");
  CHECK_THROWS(Automaton({0, 1}, {3}, {}, {1}), invalid_argument, "edge_target: expected 1 values");
  CHECK_THROWS(Automaton({1, 1}, {3}, {0}, {1}), invalid_argument, "edge_begin[0]: expected 0");
  CHECK_THROWS(Automaton({0, 2, 1}, {3}, {0}, {1, 1}), invalid_argument, "edge_begin[2]: expected");
  CHECK_THROWS(Automaton({0, 2}, {3}, {0}, {1}), invalid_argument, "edge_begin[1]: expected 1");
  CHECK_THROWS(Automaton({0, 1}, {-3}, {0}, {1}), invalid_argument, "edge_token[0]: expected");
  CHECK_THROWS(Automaton({0, 2}, {3, 3}, {0, 0}, {1}), invalid_argument, "edge_token[1]: expected");
  CHECK_THROWS(Automaton({0, 1}, {3}, {1}, {1}), invalid_argument, "edge_target[0]: expected");
  CHECK_THROWS(Automaton({0, 1}, {3}, {-1}, {1}), invalid_argument, "edge_target[0]: expected");
  CHECK_THROWS(Automaton({0, 1}, {3}, {0}, {2}), invalid_argument, "is_final[0]: expected 0 or 1");
}

void test_invalid_input() {
  using std::invalid_argument;
  const std::vector<int32_t> tokens = {1, 2, 3};
  const std::vector<int64_t> falling = {0, 2, 1};
  const std::vector<int64_t> late = {1, 3};
  const std::vector<int64_t> negative = {0, -1};
  const std::vector<int64_t> whole = {0, 3};
  // The totals are refused before any token is read.
  const std::vector<int64_t> too_many_edges = {0, int64_t{1} << 30};
  const std::vector<int64_t> too_many_tokens = {0, int64_t{1} << 31};
  CHECK_THROWS(SpanIndex(tokens.data(), falling.data(), 2), invalid_argument,
               "offsets[2]: expected a value >= 2, got 1");
  CHECK_THROWS(SpanIndex(tokens.data(), negative.data(), 1), invalid_argument, "offsets[1]");
  CHECK_THROWS(SpanIndex(tokens.data(), late.data(), 1), invalid_argument,
               "offsets[0]: expected 0");
  CHECK_THROWS(SpanIndex(tokens.data(), nullptr, 1), invalid_argument,
               "offsets: expected 2 values");
  CHECK_THROWS(SpanIndex(nullptr, whole.data(), 1), invalid_argument, "tokens: expected 3 values");
  CHECK_THROWS(SpanIndex(tokens.data(), whole.data(), -1), invalid_argument, "num_passages");
  CHECK_THROWS(SpanIndex(tokens.data(), too_many_edges.data(), 1), invalid_argument,
               "tokens: expected at most 715827882 tokens, got 1073741824");
  CHECK_THROWS(find_occurrences(tokens.data(), too_many_tokens.data(), 1, tokens.data(), 1),
               invalid_argument, "tokens: expected at most 2147483647 tokens");
  CHECK_THROWS(build_trie(tokens.data(), falling.data(), 2), invalid_argument, "offsets[2]");
  CHECK_THROWS(build_trie(tokens.data(), whole.data(), -1), invalid_argument, "num_sequences");
  CHECK_THROWS(build_trie(tokens.data(), whole.data(), int64_t{1} << 31), invalid_argument,
               "num_sequences: expected at most 2147483646 sequences");
  CHECK_THROWS(build_trie(tokens.data(), too_many_tokens.data(), 1), invalid_argument,
               "tokens: expected at most 2147483646 tokens");
  CHECK_THROWS(Ragged({{1}, {2, -3}}).trie(), invalid_argument,
               "tokens[2]: expected a token id >= 0, got -3");
}

}  // namespace

int main() {
  test_builders_on_edge_cases();
  test_builders_on_random_cases();
  test_walks_agree_with_the_language();
  test_large_index();
  test_builds_do_not_leak_into_each_other();
  test_large_trie();
  test_occurrences();
  test_batched_advance();
  test_states_out_of_range();
  test_default_automaton_accepts_nothing();
  test_invalid_arrays();
  test_invalid_input();
  return fastmrc_test::report();
}
