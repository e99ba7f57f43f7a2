#include "fastmrc/token_tree.h"

#include <algorithm>

namespace fastmrc {

int32_t TokenTree::add(int32_t token, int32_t parent) {
  token_.push_back(token);
  parent_.push_back(parent);
  column_.push_back(-1);
  return static_cast<int32_t>(token_.size()) - 1;
}

std::vector<int32_t> TokenTree::path(int32_t node) const {
  std::vector<int32_t> tokens;
  for (int32_t n = node; n != kNone; n = parent(n)) tokens.push_back(token(n));
  std::reverse(tokens.begin(), tokens.end());
  return tokens;
}

void TokenTree::list(const std::vector<std::vector<int32_t>>& fresh, StepRequest& request) {
  const auto width = static_cast<size_t>(request.width);
  const int32_t base = request.columns;
  request.columns += request.width;
  const auto columns = static_cast<size_t>(request.columns);
  request.tokens.assign(request.questions.size() * width, 0);
  request.depths.assign(request.questions.size() * width, 0);
  request.ancestors.assign(request.questions.size() * width * columns, 0);
  for (size_t a = 0; a < fresh.size(); ++a) {
    for (size_t i = 0; i < fresh[a].size(); ++i) {
      const int32_t node = fresh[a][i];
      column_[static_cast<size_t>(node)] = base + static_cast<int32_t>(i);
      request.tokens[a * width + i] = token(node);
      uint8_t* mask = request.ancestors.data() + (a * width + i) * columns;
      int32_t length = 0;
      for (int32_t n = node; n != kNone; n = parent(n)) {
        mask[column(n)] = 1;
        ++length;
      }
      request.depths[a * width + i] = length - 1;
    }
  }
}

}  // namespace fastmrc
