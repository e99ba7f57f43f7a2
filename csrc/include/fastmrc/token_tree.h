// All tokens that a search ever appended, with their predecessors: hypotheses are read off
// backwards, so nothing is copied when they are reordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fastmrc/step_request.h"

namespace fastmrc {

class TokenTree {
 public:
  static constexpr int32_t kNone = -1;  // before the first token

  int32_t add(int32_t token, int32_t parent);

  int32_t token(int32_t node) const { return token_[static_cast<size_t>(node)]; }
  int32_t parent(int32_t node) const { return parent_[static_cast<size_t>(node)]; }
  // Column of its answer keys, -1 while it is not encoded.
  int32_t column(int32_t node) const { return column_[static_cast<size_t>(node)]; }

  // The tokens up to a node.
  std::vector<int32_t> path(int32_t node) const;

  // Gives the nodes of each active question, `fresh`, their columns and writes down in the request
  // what they are and attend to; request.questions and width are known.
  void list(const std::vector<std::vector<int32_t>>& fresh, StepRequest& request);

 private:
  std::vector<int32_t> token_, parent_, column_;
};

}  // namespace fastmrc
