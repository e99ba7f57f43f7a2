// Automata of csrc/cuda, emulated on the host, against fastmrc::Automaton.
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/automata.h"
#include "cuda/numbers.cuh"
#include "cuda_cases.h"
#include "fastmrc/automaton.h"
#include "packed_automata.h"

using namespace fastmrc;
using fastmrc_test::context;
using fastmrc_test::PackedAutomata;
using fastmrc_test::Tokens;

namespace {

// Automata, and states of them to look up; what the kernels read is in memory of just that size.
struct Case {
  std::vector<Automaton> automata;
  std::vector<int32_t> automaton_of;  // empty: all of automaton 0
  std::vector<int32_t> states;
  Tokens tokens;

  PackedAutomata packed() const {
    std::vector<const Automaton*> pointers;
    for (const Automaton& automaton : automata) pointers.push_back(&automaton);
    return PackedAutomata(pointers);
  }
  const Automaton& automaton(size_t i) const {
    return automata[automaton_of.empty() ? 0 : static_cast<size_t>(automaton_of[i])];
  }
  const int32_t* choice() const { return automaton_of.empty() ? nullptr : automaton_of.data(); }
  int64_t n() const { return static_cast<int64_t>(states.size()); }
};

struct Result {
  std::vector<int32_t> advanced;
  std::vector<int64_t> counts;
  Tokens allowed;
  std::vector<uint8_t> flags;
  std::vector<int64_t> faults;  // of the four calls

  bool operator==(const Result& other) const {
    return advanced == other.advanced && counts == other.counts && allowed == other.allowed &&
           flags == other.flags && faults == other.faults;
  }
};

std::vector<int64_t> offsets_of(const std::vector<int64_t>& counts) {
  std::vector<int64_t> offsets{0};
  for (const int64_t count : counts) offsets.push_back(offsets.back() + count);
  return offsets;
}

Result run(const Case& c) {
  const PackedAutomata packed = c.packed();
  const cuda::Automata automata = packed.view();
  Result r;
  r.faults.assign(4, cuda::kNoFault);
  r.advanced.assign(c.states.size(), -7);
  cuda::advance(automata, c.choice(), c.states.data(), c.tokens.data(), c.n(), r.advanced.data(),
                &r.faults[0], nullptr);
  std::vector<int32_t> in_place = c.states;
  cuda::advance(automata, c.choice(), in_place.data(), c.tokens.data(), c.n(), in_place.data(),
                &r.faults[0], nullptr);
  CHECK_EQ(in_place, r.advanced);
  r.counts.assign(c.states.size(), -7);
  cuda::count_allowed(automata, c.choice(), c.states.data(), c.n(), r.counts.data(), &r.faults[1],
                      nullptr);
  const std::vector<int64_t> offsets = offsets_of(r.counts);
  r.allowed.assign(static_cast<size_t>(offsets.back()), -7);
  cuda::write_allowed(automata, c.choice(), c.states.data(), c.n(), offsets.data(),
                      r.allowed.data(), &r.faults[2], nullptr);
  r.flags.assign(c.states.size(), 7);
  cuda::final_flags(automata, c.choice(), c.states.data(), c.n(), r.flags.data(), &r.faults[3],
                    nullptr);
  return r;
}

// Of a case whose states are what they should be, but for `bad` ones.
Result expected(const Case& c, const std::vector<bool>& bad = {}) {
  Result r;
  int64_t fault = cuda::kNoFault;
  for (size_t i = 0; i < c.states.size(); ++i) {
    const bool none = !bad.empty() && bad[i];
    if (none && fault == cuda::kNoFault) {
      fault = static_cast<int64_t>(i) << 8 | static_cast<int64_t>(cuda::Fault::kState);
    }
    const int32_t state = none ? Automaton::kDeadState : c.states[i];
    const Automaton& automaton = c.automaton(i);
    const AllowedTokens allowed = automaton.allowed(state);
    r.advanced.push_back(automaton.advance(state, c.tokens[i]));
    r.counts.push_back(allowed.size());
    r.allowed.insert(r.allowed.end(), allowed.begin, allowed.end);
    r.flags.push_back(automaton.is_final(state) ? 1 : 0);
  }
  r.faults.assign(4, fault);
  return r;
}

std::vector<Automaton> random_automata(std::mt19937& random) {
  const Tokens few = fastmrc_test::random_alphabet(9, 60, 0, random);
  const Tokens many = fastmrc_test::random_alphabet(3000, 21128, 0, random);
  std::vector<Automaton> automata;
  automata.push_back(
      fastmrc_test::spans_of(fastmrc_test::random_sequences(3, 40, false, few, random)));
  automata.emplace_back();  // a root without edges
  automata.push_back(
      fastmrc_test::trie_of(fastmrc_test::random_sequences(30, 6, false, few, random)));
  automata.push_back(
      fastmrc_test::spans_of(fastmrc_test::random_sequences(1, 2500, true, many, random)));
  automata.push_back(fastmrc_test::random_graph(20, 12, few, random));
  automata.push_back(fastmrc_test::trie_of({{}}));
  return automata;
}

// Half of the tokens are such that something follows.
Case random_case(size_t n, bool one, std::mt19937& random) {
  Case c;
  c.automata = random_automata(random);
  for (size_t i = 0; i < n; ++i) {
    if (!one) c.automaton_of.push_back(static_cast<int32_t>(random() % c.automata.size()));
    const Automaton& automaton = c.automaton(i);
    const auto states = static_cast<uint32_t>(automaton.num_states());
    const bool at_root = random() % 4 == 0;
    c.states.push_back(at_root ? 0 : static_cast<int32_t>(random() % (states + 1)) - 1);
    const AllowedTokens allowed = automaton.allowed(c.states.back());
    int32_t token = static_cast<int32_t>(random() % 62) - 1;
    if (allowed.size() > 0 && random() % 2 == 0) {
      token = allowed.begin[random() % static_cast<uint32_t>(allowed.size())];
    }
    c.tokens.push_back(token);
  }
  return c;
}

void test_random() {
  std::mt19937 random(1);
  const size_t numbers[] = {0, 1, 31, 255, 256, 257, 700};
  for (int i = 0; i < 40; ++i) {
    emulation::set_order(static_cast<uint64_t>(i));
    context() = "case " + std::to_string(i);
    const Case c = random_case(numbers[i % 7], i % 3 == 0, random);
    CHECK(run(c) == expected(c));
  }
  emulation::set_order(0);
}

// Every state of every automaton, with the token of each of its edges.
void test_all_edges() {
  context() = "all edges";
  std::mt19937 random(2);
  Case c;
  c.automata = random_automata(random);
  for (size_t a = 0; a < c.automata.size(); ++a) {
    for (int32_t state = -1; state < std::min(c.automata[a].num_states(), 60); ++state) {
      const AllowedTokens allowed = c.automata[a].allowed(state);
      for (int64_t e = 0; e <= std::min(allowed.size(), int64_t{20}); ++e) {
        c.automaton_of.push_back(static_cast<int32_t>(a));
        c.states.push_back(state);
        c.tokens.push_back(e < allowed.size() ? allowed.begin[e] : 77);
      }
    }
  }
  CHECK(run(c) == expected(c));
}

// States that are none: of any kind, and such as only another automaton of the call has.
void test_faults() {
  std::mt19937 random(3);
  for (int i = 0; i < 20; ++i) {
    emulation::set_order(static_cast<uint64_t>(i));
    context() = "faults " + std::to_string(i);
    Case c = random_case(600, i % 4 == 0, random);
    std::vector<bool> bad(c.states.size());
    for (int b = 0; b < 3; ++b) {
      const size_t at = 100 + random() % 500;
      const int32_t states = c.automaton(at).num_states();
      const int32_t none[] = {states, states + 1, -2, std::numeric_limits<int32_t>::max(),
                              std::numeric_limits<int32_t>::min()};
      c.states[at] = none[random() % 5];
      bad[at] = true;
    }
    CHECK(run(c) == expected(c, bad));
  }
  emulation::set_order(0);
}

void test_geometry() {
  context() = "geometry";
  const PackedAutomata packed({});
  int64_t fault = cuda::kNoFault;
  CHECK_THROWS(cuda::write_allowed(packed.view(), nullptr, nullptr, int64_t{1} << 31, nullptr,
                                   nullptr, &fault, nullptr),
               std::invalid_argument, "fewer than 2^31 blocks");
  CHECK_THROWS(cuda::advance(packed.view(), nullptr, nullptr, nullptr, int64_t{1} << 39, nullptr,
                             &fault, nullptr),
               std::invalid_argument, "fewer than 2^31 blocks");
}

}  // namespace

int main() {
  test_random();
  test_all_edges();
  test_faults();
  test_geometry();
  return fastmrc_test::report();
}
