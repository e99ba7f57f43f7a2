// The automaton of token sequences that spell a piece of a text, against enumeration.

#include "fastmrc/text_index.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace {

using fastmrc::Automaton;
using fastmrc::build_text_index;
using fastmrc::TokenSpellings;

using Sequence = std::vector<int32_t>;
using Language = std::set<Sequence>;
using Spelling = std::map<int32_t, std::string>;  // token -> its bytes
using Texts = std::vector<std::string>;

constexpr uint32_t kSeed = 20240811;
constexpr int kRandomCases = 1500;

struct Ragged {
  std::vector<uint8_t> text;
  std::vector<int64_t> offsets = {0};

  explicit Ragged(const Texts& texts) {
    for (const std::string& part : texts) {
      text.insert(text.end(), part.begin(), part.end());
      offsets.push_back(static_cast<int64_t>(text.size()));
    }
  }

  int32_t count() const { return static_cast<int32_t>(offsets.size()) - 1; }
};

TokenSpellings make_spellings(const Spelling& spelling) {
  std::vector<int32_t> ids;
  Texts texts;
  for (const auto& [id, text] : spelling) {
    ids.push_back(id);
    texts.push_back(text);
  }
  const Ragged ragged(texts);
  return TokenSpellings(ids.data(), ragged.text.data(), ragged.offsets.data(), ragged.count());
}

Automaton build(const Texts& passages, const Spelling& first, const Spelling& following) {
  const Ragged ragged(passages);
  return build_text_index(ragged.text.data(), ragged.offsets.data(), ragged.count(),
                          make_spellings(first), make_spellings(following));
}

bool is_border(const std::string& text, size_t at) {
  return at == text.size() || (static_cast<uint8_t>(text[at]) & 0xc0) != 0x80;
}

// What begins at a character of a passage -> whether it may end there.
std::map<std::string, bool> all_beginnings(const Texts& passages) {
  std::map<std::string, bool> beginnings = {{"", true}};
  for (const std::string& passage : passages) {
    for (size_t begin = 0; begin < passage.size(); ++begin) {
      if (!is_border(passage, begin)) continue;
      for (size_t end = begin + 1; end <= passage.size(); ++end) {
        beginnings[passage.substr(begin, end - begin)] = is_border(passage, end);
      }
    }
  }
  return beginnings;
}

struct Case {
  Texts passages;
  Spelling first;
  Spelling following;
};

std::string describe(const Case& item) {
  std::string text;
  for (const std::string& passage : item.passages) text += "[" + passage + "]";
  for (const Spelling* spelling : {&item.first, &item.following}) {
    text += spelling == &item.first ? " first" : " following";
    for (const auto& [id, bytes] : *spelling) {
      text += " " + std::to_string(id) + "=";
      for (const char byte : bytes) text += std::to_string(static_cast<uint8_t>(byte)) + ".";
    }
  }
  return text;
}

// All sequences that spell a piece, longest first cut off by the pieces themselves.
void enumerate(const Case& item, const std::map<std::string, bool>& beginnings,
               const std::string& text, Sequence* path, Language* language) {
  const auto at = beginnings.find(text);
  if (at == beginnings.end()) return;
  if (at->second) language->insert(*path);
  for (const auto& [id, bytes] : path->empty() ? item.first : item.following) {
    path->push_back(id);
    enumerate(item, beginnings, text + bytes, path, language);
    path->pop_back();
  }
}

// Everything the automaton accepts, by walking all paths (it has no cycles).
void collect(const Automaton& automaton, int32_t state, Sequence* path, Language* language) {
  if (automaton.is_final(state)) language->insert(*path);
  const fastmrc::AllowedTokens allowed = automaton.allowed(state);
  for (int64_t i = 0; i < allowed.size(); ++i) {
    path->push_back(allowed.begin[i]);
    collect(automaton, allowed.targets[i], path, language);
    path->pop_back();
  }
}

// The arrays have to pass the checks of the public constructor; every state but the root is some
// edge's target, and every state that is not final leads on.
void check_invariants(const Automaton& automaton) {
  try {
    const Automaton copy(automaton.edge_begin(), automaton.edge_token(), automaton.edge_target(),
                         automaton.final_flags());
    CHECK_EQ(copy.num_states(), automaton.num_states());
  } catch (const std::invalid_argument& error) {
    CHECK_EQ(std::string(error.what()), std::string());
  }
  CHECK(automaton.is_final(Automaton::kRootState));
  const std::set<int32_t> targets(automaton.edge_target().begin(), automaton.edge_target().end());
  CHECK_EQ(static_cast<int32_t>(targets.size()), automaton.num_states() - 1);
  CHECK_EQ(targets.count(Automaton::kRootState), size_t{0});
  for (int32_t s = 0; s < automaton.num_states(); ++s) {
    CHECK(automaton.is_final(s) || automaton.allowed(s).size() > 0);
  }
}

void check_case(const Case& item) {
  fastmrc_test::context() = describe(item);
  const Automaton automaton = build(item.passages, item.first, item.following);
  check_invariants(automaton);
  Language expected, accepted;
  Sequence path;
  enumerate(item, all_beginnings(item.passages), "", &path, &expected);
  collect(automaton, Automaton::kRootState, &path, &accepted);
  CHECK(accepted == expected);
  size_t bytes = 0;
  for (const std::string& passage : item.passages) bytes += passage.size();
  CHECK(automaton.num_states() <= static_cast<int32_t>(std::max<size_t>(1, 2 * bytes) + 1));
  fastmrc_test::context().clear();
}

void test_edge_cases() {
  const Spelling letters = {{1, "a"}, {2, "b"}, {3, "ab"}, {9, "ba"}};
  const Spelling words = {{1, "a"}, {2, " a"}, {3, "b"}, {4, " b"}};
  const Spelling starts = {{1, "a"}, {2, "a"}, {3, "b"}, {4, "b"}, {5, ""}, {6, ""}};
  const Spelling pieces = {{1, "\xe4"}, {2, "\xb8"}, {3, "\xad"}, {4, "\xb8\xad"}, {5, "\xadx"}};
  const Spelling lacking = {{1, "\xe4"}, {2, "\xe4\xb8"}, {3, "a"}, {4, "a\xe4"}};
  const std::vector<Case> cases = {
      {{}, {}, {}},
      {{}, letters, letters},
      {{""}, letters, letters},
      {{"", "", "ab"}, letters, letters},
      {{"ab"}, {}, letters},
      {{"ab"}, letters, {}},
      {{"abab", "ba", "abab"}, letters, letters},
      {{"aaaa"}, {{0, "a"}, {1, "aa"}, {2147483647, "aaaa"}}, {{0, "a"}, {1, "aa"}}},
      {{"a b a", "ab"}, {{1, "a"}, {3, "b"}}, words},  // word pieces: a token has two spellings
      {{"a b a", "ab"}, starts, words},
      {{"a"}, {{5, ""}}, letters},
      {{"a\xe4\xb8\xad\xe4\xb8\xad"}, pieces, pieces},  // 中 in pieces, and the end of another one
      {{"\xe4\xb8\xadx\xc2\xadx"},                      // one byte ends characters of two lengths
       {{1, "\xe4"}, {5, "\xadx"}},
       {{2, "\xb8"}, {5, "\xadx"}, {6, "\xc2"}}},
      {{"a\xe4\xb8\xad"}, lacking, lacking},  // dead ends, also one behind another
      {{"\xf0\x9f\x98\x80\xf0\x9f\x98\x81"},  // two faces that differ in the last of four bytes
       {{1, "\xf0\x9f"}, {2, "\xf0"}},
       {{1, "\xf0\x9f"}, {2, "\x98"}, {3, "\x80"}, {4, "\x81"}, {5, "\x80\xf0\x9f\x98"}}},
      {{"ab"}, {{4, "a"}, {6, "a"}, {7, "ab"}, {8, "ab"}}, {{4, "b"}, {6, "b"}}},
      {{std::string("a\0b", 3)}, {{1, std::string("\0", 1)}}, {{2, "b"}}},
  };
  for (const Case& item : cases) check_case(item);
}

Spelling random_spelling(std::mt19937* random, const std::string& source, bool may_be_empty) {
  Spelling spelling;
  const auto count = (*random)() % 9;
  for (uint32_t t = 0; t < count; ++t) {
    const size_t begin = (*random)() % source.size();
    const size_t length = may_be_empty ? (*random)() % 5 : 1 + (*random)() % 4;
    spelling[static_cast<int32_t>((*random)() % 40)] = source.substr(begin, length);
  }
  return spelling;
}

void test_random_cases() {
  std::cout << "seed " << kSeed << std::endl;
  std::mt19937 random(kSeed);
  const Texts characters = {"a", "b", " ", "\xc3\xa9", "\xe4\xb8\xad", "\xf0\x9f\x98\x80"};
  for (int i = 0; i < kRandomCases; ++i) {
    const auto alphabet = 1 + random() % characters.size();
    Case item;
    item.passages.resize(random() % 4);
    std::string source = "x\xe4";
    for (std::string& passage : item.passages) {
      const auto length = random() % 6;
      for (uint32_t c = 0; c < length; ++c) passage += characters[random() % alphabet];
      source += passage;
    }
    item.following = random_spelling(&random, source, false);
    item.first = random() % 2 == 0 ? item.following : random_spelling(&random, source, true);
    check_case(item);
  }
}

// Whatever the bytes are, it ends with an automaton; the language is that of the bytes as far as
// they are UTF-8.
void test_any_bytes() {
  std::mt19937 random(kSeed + 1);
  for (int i = 0; i < 300; ++i) {
    Texts passages(1 + random() % 3);
    for (std::string& passage : passages) {
      passage.resize(random() % 40);
      for (char& byte : passage) byte = static_cast<char>(0x78 + random() % 136);
    }
    const Spelling spelling = random_spelling(&random, passages[0] + "x", false);
    check_invariants(build(passages, spelling, spelling));
  }
}

// A text of 100,000 bytes with tokens of all lengths up to 8: linear size.
void test_large_index() {
  std::mt19937 random(kSeed + 2);
  Texts passages(1);
  while (passages[0].size() < 100000) {
    passages[0] += random() % 3 == 0 ? "\xe4\xb8\xad" : std::string(1, "etaoin "[random() % 7]);
  }
  Spelling spelling;
  std::set<std::string> spelt;
  for (int32_t byte = 0; byte < 256; ++byte) {
    spelling[byte] = std::string(1, static_cast<char>(byte));
  }
  for (int32_t id = 256; id < 20000; ++id) {
    const std::string token = passages[0].substr(random() % 99000, 2 + random() % 7);
    if (spelt.insert(token).second) spelling[id] = token;
  }
  const auto begin = std::chrono::steady_clock::now();
  const Automaton automaton = build(passages, spelling, spelling);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::cout << passages[0].size() << " bytes: " << automaton.num_states() << " states, "
            << automaton.num_edges() << " edges, " << seconds.count() << " s" << std::endl;
  check_invariants(automaton);
  CHECK(automaton.num_states() <= static_cast<int32_t>(2 * passages[0].size() + 1));
  // Byte by byte through the whole text, and nothing after it.
  int32_t state = Automaton::kRootState;
  for (size_t i = 0; i < passages[0].size(); ++i) {
    state = automaton.advance(state, static_cast<uint8_t>(passages[0][i]));
    CHECK_EQ(automaton.is_final(state), is_border(passages[0], i + 1));
  }
  CHECK_EQ(automaton.allowed(state).size(), int64_t{0});
}

void test_spellings() {
  const TokenSpellings spellings = make_spellings({{2, "ab"}, {5, "a"}, {7, "ab"}, {8, ""}});
  CHECK_EQ(spellings.trie().num_states(), 3);
  CHECK_EQ(spellings.token_begin(), (Sequence{0, 1, 2, 4}));
  CHECK_EQ(spellings.tokens(), (Sequence{8, 5, 2, 7}));
  const TokenSpellings nothing(nullptr, nullptr, nullptr, 0);
  CHECK_EQ(nothing.token_begin(), (Sequence{0, 0}));
  CHECK_EQ(build_text_index(nullptr, nullptr, 0, nothing, nothing).num_edges(), 0);
}

void test_invalid_input() {
  using std::invalid_argument;
  const std::vector<uint8_t> text = {'a', 'b', 'c'};
  const std::vector<int64_t> whole = {0, 3};
  const std::vector<int64_t> falling = {0, 2, 1};
  const std::vector<int64_t> halves = {0, 1, 3};
  const std::vector<int64_t> too_many = {0, int64_t{1} << 40};
  const std::vector<int32_t> ids = {4, 4};
  const int32_t negative = -1, four = 4;
  CHECK_THROWS(TokenSpellings(ids.data(), text.data(), halves.data(), 2), invalid_argument,
               "ids[1]: expected a token id > 4, got 4");
  CHECK_THROWS(TokenSpellings(&negative, text.data(), whole.data(), 1), invalid_argument,
               "ids[0]: expected a token id > -1, got -1");
  CHECK_THROWS(TokenSpellings(ids.data(), text.data(), falling.data(), 2), invalid_argument,
               "offsets[2]: expected a value >= 2, got 1");
  CHECK_THROWS(TokenSpellings(&four, text.data(), whole.data(), -1), invalid_argument,
               "num_tokens: expected a count >= 0, got -1");
  CHECK_THROWS(TokenSpellings(&four, nullptr, whole.data(), 1), invalid_argument,
               "text: expected 3 bytes, got a null pointer");
  CHECK_THROWS(TokenSpellings(&four, text.data(), nullptr, 1), invalid_argument,
               "offsets: expected 2 values, got a null pointer");
  CHECK_THROWS(TokenSpellings(&four, text.data(), too_many.data(), 1), invalid_argument,
               "text: expected at most 2147483646 bytes, got 1099511627776");
  const TokenSpellings letters = make_spellings({{4, "a"}});
  const TokenSpellings empty = make_spellings({{3, "a"}, {4, ""}});
  CHECK_THROWS(build_text_index(text.data(), whole.data(), 1, empty, empty), invalid_argument,
               "following: expected no token without bytes, got token 4");
  CHECK_THROWS(build_text_index(text.data(), falling.data(), 2, letters, letters), invalid_argument,
               "offsets[2]");
  CHECK_THROWS(build_text_index(text.data(), whole.data(), -1, letters, letters), invalid_argument,
               "num_passages: expected a count >= 0, got -1");
  CHECK_THROWS(build_text_index(nullptr, whole.data(), 1, letters, letters), invalid_argument,
               "text: expected 3 bytes, got a null pointer");
  CHECK_THROWS(build_text_index(text.data(), too_many.data(), 1, letters, letters),
               invalid_argument, "text: expected at most 715827882 bytes, got 1099511627776");
}

}  // namespace

int main() {
  test_edge_cases();
  test_random_cases();
  test_any_bytes();
  test_large_index();
  test_spellings();
  test_invalid_input();
  return fastmrc_test::report();
}
