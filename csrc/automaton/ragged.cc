#include "ragged.h"

#include <stdexcept>
#include <string>

namespace fastmrc {

int64_t check_ragged(const int32_t* tokens, const int64_t* offsets, int64_t count,
                     const char* count_name, int64_t max_tokens) {
  if (count < 0) {
    throw std::invalid_argument(std::string(count_name) + ": expected a count >= 0, got " +
                                std::to_string(count));
  }
  if (offsets == nullptr) {
    if (count == 0) return 0;
    throw std::invalid_argument("offsets: expected " + std::to_string(count + 1) +
                                " values, got a null pointer");
  }
  if (offsets[0] != 0) {
    throw std::invalid_argument("offsets[0]: expected 0, got " + std::to_string(offsets[0]));
  }
  for (int64_t i = 1; i <= count; ++i) {
    if (offsets[i] < offsets[i - 1]) {
      throw std::invalid_argument("offsets[" + std::to_string(i) +
                                  "]: expected a value >= " + std::to_string(offsets[i - 1]) +
                                  ", got " + std::to_string(offsets[i]));
    }
  }
  const int64_t total = offsets[count];
  if (total > max_tokens) {
    throw std::invalid_argument("tokens: expected at most " + std::to_string(max_tokens) +
                                " tokens, got " + std::to_string(total));
  }
  if (total > 0 && tokens == nullptr) {
    throw std::invalid_argument("tokens: expected " + std::to_string(total) +
                                " values, got a null pointer");
  }
  return total;
}

void throw_negative_token(int64_t index, int32_t token) {
  throw std::invalid_argument("tokens[" + std::to_string(index) +
                              "]: expected a token id >= 0, got " + std::to_string(token));
}

}  // namespace fastmrc
