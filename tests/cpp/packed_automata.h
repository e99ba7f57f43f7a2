#pragma once

// Automata laid end to end, as the kernels of csrc/cuda read them.

#include <cstdint>
#include <vector>

#include "cuda/automata.h"
#include "fastmrc/automaton.h"

namespace fastmrc_test {

class PackedAutomata {
 public:
  explicit PackedAutomata(const std::vector<const fastmrc::Automaton*>& automata) {
    for (const fastmrc::Automaton* a : automata) {
      append(edge_begin_, a->edge_begin());
      append(edge_token_, a->edge_token());
      append(edge_target_, a->edge_target());
      append(final_flags_, a->final_flags());
      first_state_.push_back(static_cast<int64_t>(final_flags_.size()));
      first_edge_.push_back(static_cast<int64_t>(edge_token_.size()));
    }
  }

  // Valid while this object lives.
  fastmrc::cuda::Automata view() const {
    return {edge_begin_.data(),
            edge_token_.data(),
            edge_target_.data(),
            final_flags_.data(),
            first_state_.data(),
            first_edge_.data(),
            static_cast<int32_t>(first_state_.size()) - 1};
  }

 private:
  template <typename T>
  static void append(std::vector<T>& to, const std::vector<T>& from) {
    to.insert(to.end(), from.begin(), from.end());
  }

  std::vector<int32_t> edge_begin_, edge_token_, edge_target_;
  std::vector<uint8_t> final_flags_;
  std::vector<int64_t> first_state_ = {0}, first_edge_ = {0};
};

}  // namespace fastmrc_test
