#include "fastmrc/automaton.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastmrc {
namespace {

// Below this many remaining edges a plain scan beats halving further: no mispredicted branches.
constexpr int32_t kScanLimit = 8;

[[noreturn]] void fail(const std::string& argument, const std::string& expected,
                       const std::string& got) {
  throw std::invalid_argument(argument + ": expected " + expected + ", got " + got);
}

std::string element(const char* array, int64_t index) {
  return std::string(array) + "[" + std::to_string(index) + "]";
}

[[noreturn]] void fail_state(const std::string& argument, int32_t num_states, int32_t state) {
  fail(argument, "-1 or a state in [0, " + std::to_string(num_states) + ")", std::to_string(state));
}

bool is_valid(int32_t state, int32_t num_states) {
  return state >= Automaton::kDeadState && state < num_states;
}

void check_sizes(const std::vector<int32_t>& edge_begin, const std::vector<int32_t>& edge_token,
                 const std::vector<int32_t>& edge_target, const std::vector<uint8_t>& is_final) {
  // One below the largest int32, so that num_states + 1 is an int32 too.
  constexpr size_t kMaxSize = std::numeric_limits<int32_t>::max() - 1;
  if (is_final.empty() || is_final.size() > kMaxSize) {
    fail("is_final", "1 to " + std::to_string(kMaxSize) + " states",
         std::to_string(is_final.size()));
  }
  if (edge_token.size() > kMaxSize) {
    fail("edge_token", "at most " + std::to_string(kMaxSize) + " edges",
         std::to_string(edge_token.size()));
  }
  if (edge_begin.size() != is_final.size() + 1) {
    fail("edge_begin", std::to_string(is_final.size() + 1) + " values (states + 1)",
         std::to_string(edge_begin.size()));
  }
  if (edge_target.size() != edge_token.size()) {
    fail("edge_target", std::to_string(edge_token.size()) + " values (one per token)",
         std::to_string(edge_target.size()));
  }
}

// Whether begin rises from 0 to num_edges, state by state.
void check_ranges(const std::vector<int32_t>& edge_begin, int32_t num_edges) {
  if (edge_begin.front() != 0) fail("edge_begin[0]", "0", std::to_string(edge_begin.front()));
  for (size_t i = 1; i < edge_begin.size(); ++i) {
    if (edge_begin[i] < edge_begin[i - 1]) {
      fail(element("edge_begin", static_cast<int64_t>(i)),
           "a value >= " + std::to_string(edge_begin[i - 1]), std::to_string(edge_begin[i]));
    }
  }
  if (edge_begin.back() != num_edges) {
    fail(element("edge_begin", static_cast<int64_t>(edge_begin.size()) - 1),
         std::to_string(num_edges) + " (the number of edges)", std::to_string(edge_begin.back()));
  }
}

void check_edges(const std::vector<int32_t>& edge_begin, const std::vector<int32_t>& edge_token,
                 const std::vector<int32_t>& edge_target, int32_t num_states) {
  for (size_t state = 0; state + 1 < edge_begin.size(); ++state) {
    int32_t previous = -1;
    for (int32_t e = edge_begin[state]; e < edge_begin[state + 1]; ++e) {
      const int32_t token = edge_token[static_cast<size_t>(e)];
      const int32_t target = edge_target[static_cast<size_t>(e)];
      if (token <= previous) {
        fail(element("edge_token", e), "a token > " + std::to_string(previous),
             std::to_string(token));
      }
      if (target < 0 || target >= num_states) {
        fail(element("edge_target", e), "a state in [0, " + std::to_string(num_states) + ")",
             std::to_string(target));
      }
      previous = token;
    }
  }
}

}  // namespace

Automaton::Automaton() : edge_begin_{0, 0}, is_final_{0} {}

Automaton::Automaton(std::vector<int32_t> edge_begin, std::vector<int32_t> edge_token,
                     std::vector<int32_t> edge_target, std::vector<uint8_t> is_final)
    : edge_begin_(std::move(edge_begin)),
      edge_token_(std::move(edge_token)),
      edge_target_(std::move(edge_target)),
      is_final_(std::move(is_final)) {
  check_sizes(edge_begin_, edge_token_, edge_target_, is_final_);
  check_ranges(edge_begin_, num_edges());
  check_edges(edge_begin_, edge_token_, edge_target_, num_states());
  for (size_t i = 0; i < is_final_.size(); ++i) {
    if (is_final_[i] > 1) {
      fail(element("is_final", static_cast<int64_t>(i)), "0 or 1", std::to_string(is_final_[i]));
    }
  }
}

Automaton Automaton::from_valid_arrays(std::vector<int32_t> edge_begin,
                                       std::vector<int32_t> edge_token,
                                       std::vector<int32_t> edge_target,
                                       std::vector<uint8_t> is_final) {
  Automaton result;
  result.edge_begin_ = std::move(edge_begin);
  result.edge_token_ = std::move(edge_token);
  result.edge_target_ = std::move(edge_target);
  result.is_final_ = std::move(is_final);
  return result;
}

int32_t Automaton::advance_unchecked(int32_t state, int32_t token) const {
  if (state == kDeadState) return kDeadState;
  const int32_t* tokens = edge_token_.data();
  int32_t low = edge_begin_[static_cast<size_t>(state)];
  int32_t high = edge_begin_[static_cast<size_t>(state) + 1];
  while (high - low > kScanLimit) {
    const int32_t middle = low + (high - low) / 2;
    if (tokens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  for (int32_t e = low; e < high; ++e) {
    if (tokens[e] == token) return edge_target_[static_cast<size_t>(e)];
  }
  return kDeadState;
}

int32_t Automaton::advance(int32_t state, int32_t token) const {
  if (!is_valid(state, num_states())) fail_state("state", num_states(), state);
  return advance_unchecked(state, token);
}

void Automaton::advance(const int32_t* states, const int32_t* tokens, int64_t n,
                        int32_t* out) const {
  if (n < 0) fail("n", "a count >= 0", std::to_string(n));
  for (int64_t i = 0; i < n; ++i) {
    if (!is_valid(states[i], num_states())) {
      fail_state(element("states", i), num_states(), states[i]);
    }
  }
  for (int64_t i = 0; i < n; ++i) out[i] = advance_unchecked(states[i], tokens[i]);
}

AllowedTokens Automaton::allowed(int32_t state) const {
  if (!is_valid(state, num_states())) fail_state("state", num_states(), state);
  const int32_t* tokens = edge_token_.data();
  const int32_t* targets = edge_target_.data();
  if (state == kDeadState) return {tokens, tokens, targets};
  const int32_t begin = edge_begin_[static_cast<size_t>(state)];
  const int32_t end = edge_begin_[static_cast<size_t>(state) + 1];
  return {tokens + begin, tokens + end, targets + begin};
}

bool Automaton::is_final(int32_t state) const {
  if (!is_valid(state, num_states())) fail_state("state", num_states(), state);
  return state != kDeadState && is_final_[static_cast<size_t>(state)] != 0;
}

}  // namespace fastmrc
