#pragma once

#include <cstdint>

namespace fastmrc {

// Checks `count` token sequences laid end to end, sequence i being tokens[offsets[i],
// offsets[i+1]), and returns offsets[count]. The values of the tokens are not looked at. Throws
// std::invalid_argument naming the argument; `count_name` is what the caller calls `count`.
int64_t check_ragged(const int32_t* tokens,   // [offsets[count]], may be null if empty
                     const int64_t* offsets,  // [count + 1], may be null if count is 0
                     int64_t count, const char* count_name, int64_t max_tokens);

// The error for tokens[index], which is negative.
[[noreturn]] void throw_negative_token(int64_t index, int32_t token);

}  // namespace fastmrc
