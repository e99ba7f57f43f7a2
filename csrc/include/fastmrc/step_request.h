// What a search asks its encoder for.
#pragma once

#include <cstdint>
#include <vector>

namespace fastmrc {

// What the encoder is asked for before the next call of step. The tokens of all hypotheses of a
// question form a tree; each has a column of answer keys and is encoded once.
struct StepRequest {
  // Questions that go on and how many live hypotheses they have.
  std::vector<int32_t> questions;   // [active]
  std::vector<int32_t> hypotheses;  // [active]
  // The tokens to encode, parents before children, at columns - width + (0, 1, ...); 0 where a
  // question has fewer than `width`. A width of 0: all is encoded that the rows below need.
  int32_t width = 0;
  std::vector<int32_t> tokens;  // [active, width]
  std::vector<int32_t> depths;  // [active, width] answer tokens before each
  // Answer columns, those of this request included. A token attends to the columns of its ancestors
  // and to its own.
  int32_t columns = 0;
  std::vector<uint8_t> ancestors;  // [active, width, columns]
  // The rows of logits expected, in order question, voting passage, hypothesis.
  std::vector<int32_t> row_passage;   // [rows] index into all passages
  std::vector<int32_t> row_question;  // [rows] index into `questions`
  std::vector<int32_t> row_column;    // [rows] column of the newest token of the hypothesis
};

}  // namespace fastmrc
