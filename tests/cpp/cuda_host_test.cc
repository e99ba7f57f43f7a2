// What csrc/cuda does before it launches anything: arguments, launch geometry, sizes of workspaces.
// Built against the real kernels where nvcc is, too; needs no device.
#include <cstdint>
#include <stdexcept>

#include "check.h"
#include "cuda/attention_sum.h"
#include "cuda/automata.h"
#include "cuda/beam_search.h"
#include "cuda/beam_step.h"
#include "cuda/best_spans.h"
#include "cuda/fault.h"
#include "cuda/row_pass.h"
#include "cuda/sample.h"
#include "cuda/slots.h"
#include "cuda/workspace.h"

using namespace fastmrc;

namespace {

void test_workspace() {
  cuda::Workspace counting(nullptr);
  CHECK(counting.take<float>(3) == nullptr);
  CHECK_EQ(counting.bytes(), 16);
  CHECK(counting.take<uint8_t>(0) == nullptr);
  CHECK_EQ(counting.bytes(), 16);
  alignas(16) unsigned char memory[64];
  cuda::Workspace dividing(memory);
  dividing.take<uint8_t>(1);
  CHECK(reinterpret_cast<unsigned char*>(dividing.take<double>(2)) == memory + 16);
  CHECK_EQ(dividing.bytes(), 32);
}

void test_row_pass() {
  CHECK_EQ(cuda::parts_of(1), 1);
  CHECK_EQ(cuda::parts_of(8192), 1);
  CHECK_EQ(cuda::parts_of(8193), 2);
  CHECK_EQ(cuda::parts_of(151936), 19);
  CHECK_EQ(cuda::row_pass_bytes(0, 21128, 8), 0);
  // Two parts: 8 of maximum, 8 of argmax, 16 of sums and 2 * 3 * 8 of keys, in steps of 16.
  CHECK_EQ(cuda::row_pass_bytes(1, 8193, 3), 16 + 16 + 16 + 48);
  // 64-bit sizes: 2^20 rows of 2^20 columns in 128 parts with 512 keys.
  CHECK_EQ(cuda::row_pass_bytes(1 << 20, 1 << 20, 512), (int64_t{1} << 27) * (4 + 4 + 8 + 512 * 8));
  cuda::RowPass pass;
  pass.rows = {nullptr, DType::kFloat32, 0, 5, 5};
  pass.k = 513;
  CHECK_THROWS(cuda::row_pass(pass, nullptr), std::invalid_argument, "at most 512");
  pass.k = 1;
  cuda::row_pass(pass, nullptr);  // no rows: nothing to do
  pass.rows.rows = int64_t{1} << 31;
  CHECK_THROWS(cuda::row_pass(pass, nullptr), std::invalid_argument, "fewer than 2^31 blocks");
}

void test_beams() {
  cuda::BeamStep step;
  step.width = 513;
  CHECK_THROWS(cuda::beam_step(step, nullptr), std::invalid_argument, "beam_size");
  step.width = 3;
  step.questions = 2;
  step.slots = 3;
  step.logits = {nullptr, DType::kFloat32, 0, 21128, 21128};
  CHECK_EQ(cuda::beam_step_bytes(step), 2 * 3 * 6 * 3 * 8);  // 6 parts of 4,096 tokens
  step.all_constrained = true;
  CHECK_EQ(cuda::beam_step_bytes(step), 2 * 3 * 8 * 3 * 8);  // 8 parts of few tokens
  step.questions = 500;
  CHECK_EQ(cuda::beam_step_bytes(step), 500 * 3 * 3 * 8);  // enough without parts
  cuda::Beams beams;
  beams.slots = 257;
  CHECK_THROWS(cuda::advance_beams(beams, {}, {}, 1, {}, nullptr, 0, nullptr),
               std::invalid_argument, "beam_size");
  beams.slots = 1;
  beams.steps = 2;
  CHECK_THROWS(cuda::advance_beams(beams, {}, {}, 1, {}, nullptr, 2, nullptr),
               std::invalid_argument, "step");
}

void test_layout() {
  // 2 questions, 3 slots, 4 steps: 4 arrays of 2, 6 of 6 and 2 of 24 numbers.
  CHECK_EQ(cuda::beams_items(2, 3, 4), 4 * 2 + 6 * 6 + 2 * 24);
  int32_t state[4 * 2 + 6 * 6 + 2 * 24];
  const cuda::Beams beams = cuda::lay_out_beams(state, nullptr, 2, 3, 4);
  CHECK(beams.hypotheses == state);
  CHECK(beams.best == state + 4);
  CHECK(beams.node_tokens == state + 6 + 18);
  CHECK(beams.nodes + 6 == state + cuda::beams_items(2, 3, 4));
}

void test_spans_and_words() {
  cuda::BestSpans spans;
  spans.k = 513;
  CHECK_THROWS(cuda::best_spans(spans, nullptr), std::invalid_argument, "at most 512");
  cuda::AttentionSum words;
  words.k = 513;
  CHECK_THROWS(cuda::attention_sum(words, nullptr), std::invalid_argument, "at most 512");
  CHECK_EQ(cuda::best_spans_bytes(4, 1024, 8), 0);  // in shared memory
  CHECK(cuda::best_spans_bytes(1, 1025, 8) > 0);
  CHECK(cuda::attention_sum_bytes(1, 5000, 8) > 0);
}

void test_slots() {
  cuda::SlotSearch search;
  search.slots = 1;
  CHECK_THROWS(cuda::slot_topk(search, 65, nullptr), std::invalid_argument, "64");
  CHECK(cuda::slot_topk_bytes(2, 32, 8) >= cuda::slot_topk_bytes(1, 32, 8));
}

void test_sample() {
  cuda::Sample step;
  step.logits = {nullptr, DType::kFloat32, 0, 5, 5};
  step.top_p = 0;
  CHECK_THROWS(cuda::sample(step, nullptr), std::invalid_argument, "top_p");
  step.top_p = 1;
  step.temperature = 0;
  CHECK_THROWS(cuda::sample(step, nullptr), std::invalid_argument, "temperature");
  step.temperature = 1;
  step.top_k = -1;
  CHECK_THROWS(cuda::sample(step, nullptr), std::invalid_argument, "top_k");
}

void test_messages() {
  const auto message = [](int64_t row, cuda::Fault kind) {
    return cuda::fault_message(row << 8 | static_cast<int64_t>(kind), "x", 7, 3);
  };
  CHECK_EQ(cuda::fault_message(cuda::kNoFault, "x", 7, 3), std::string());
  CHECK_EQ(message(5, cuda::Fault::kNan),
           std::string("x: expected numbers below infinity, got NaN in row 5"));
  CHECK_EQ(message(5, cuda::Fault::kNanOnly), std::string("x: expected no NaN, got NaN in row 5"));
  CHECK_EQ(message(int64_t{1} << 40, cuda::Fault::kMasked),
           std::string("x: expected a finite entry in every row, got only -inf in row "
                       "1099511627776"));
  CHECK(message(0, cuda::Fault::kEndToken).find("no end token 3") != std::string::npos);
  CHECK(message(0, cuda::Fault::kToken).find("vocabulary size 7") != std::string::npos);
}

}  // namespace

int main() {
  test_workspace();
  test_row_pass();
  test_beams();
  test_layout();
  test_spans_and_words();
  test_slots();
  test_sample();
  test_messages();
  return fastmrc_test::report();
}
