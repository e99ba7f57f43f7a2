#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <string>

#include "bindings/cuda/door.h"
#include "bindings/register.h"
#include "cuda/attention_sum.h"
#include "cuda/automata.h"
#include "cuda/beam_step.h"
#include "cuda/best_spans.h"
#include "cuda/row_pass.h"
#include "cuda/sample.h"
#include "cuda/slots.h"
#include "fastmrc/ops.h"

namespace fastmrc::bindings {
namespace {

int64_t* fault_of(Door& door, py::handle fault) {
  return door.required<int64_t>(fault, "fault", 1);
}

// --- automata ------------------------------------------------------------------------------------

std::unique_ptr<DeviceAutomata> make_automata(int64_t states, int64_t edges, int32_t count,
                                              py::handle edge_begin, py::handle edge_token,
                                              py::handle edge_target, py::handle final_flags,
                                              py::handle first_state, py::handle first_edge) {
  auto made = std::make_unique<DeviceAutomata>();
  Door& door = made->door;
  cuda::Automata& a = made->automata;
  a.edge_begin = door.required<const int32_t>(edge_begin, "edge_begin", states + count);
  a.edge_token = door.required<const int32_t>(edge_token, "edge_token", edges);
  a.edge_target = door.required<const int32_t>(edge_target, "edge_target", edges);
  a.final_flags = door.required<const uint8_t>(final_flags, "final_flags", states);
  a.first_state = door.required<const int64_t>(first_state, "first_state", count + 1);
  a.first_edge = door.required<const int64_t>(first_edge, "first_edge", count + 1);
  a.count = count;
  return made;
}

void advance(const DeviceAutomata& self, int64_t n, py::handle automaton_of, py::handle states,
             py::handle tokens, py::handle out, py::handle fault, uintptr_t stream) {
  Door door;
  const auto* of = door.array<const int32_t>(automaton_of, "automaton_of", n);
  const auto* from = door.required<const int32_t>(states, "states", n);
  const auto* token = door.required<const int32_t>(tokens, "tokens", n);
  auto* to = door.required<int32_t>(out, "out", n);
  int64_t* first = fault_of(door, fault);
  on_device(door, [&] {
    cuda::advance(self.automata, of, from, token, n, to, first, stream_of(stream));
  });
}

void count_allowed(const DeviceAutomata& self, int64_t n, py::handle automaton_of,
                   py::handle states, py::handle counts, py::handle fault, uintptr_t stream) {
  Door door;
  const auto* of = door.array<const int32_t>(automaton_of, "automaton_of", n);
  const auto* from = door.required<const int32_t>(states, "states", n);
  auto* to = door.required<int64_t>(counts, "counts", n);
  int64_t* first = fault_of(door, fault);
  on_device(door,
            [&] { cuda::count_allowed(self.automata, of, from, n, to, first, stream_of(stream)); });
}

void write_allowed(const DeviceAutomata& self, int64_t n, int64_t total, py::handle automaton_of,
                   py::handle states, py::handle offsets, py::handle tokens, py::handle fault,
                   uintptr_t stream) {
  Door door;
  const auto* of = door.array<const int32_t>(automaton_of, "automaton_of", n);
  const auto* from = door.required<const int32_t>(states, "states", n);
  const auto* at = door.required<const int64_t>(offsets, "offsets", n + 1);
  auto* to = door.required<int32_t>(tokens, "tokens", total);
  int64_t* first = fault_of(door, fault);
  on_device(door, [&] {
    cuda::write_allowed(self.automata, of, from, n, at, to, first, stream_of(stream));
  });
}

void final_flags(const DeviceAutomata& self, int64_t n, py::handle automaton_of, py::handle states,
                 py::handle out, py::handle fault, uintptr_t stream) {
  Door door;
  const auto* of = door.array<const int32_t>(automaton_of, "automaton_of", n);
  const auto* from = door.required<const int32_t>(states, "states", n);
  auto* to = door.required<uint8_t>(out, "out", n);
  int64_t* first = fault_of(door, fault);
  on_device(door,
            [&] { cuda::final_flags(self.automata, of, from, n, to, first, stream_of(stream)); });
}

// --- rows ----------------------------------------------------------------------------------------

void row_pass(py::handle x, py::handle live, py::handle max, py::handle argmax,
              py::handle logsumexp, int64_t k, py::handle values, py::handle ids, bool log_softmax,
              py::handle fault, py::handle counters, py::handle workspace, uintptr_t stream) {
  Door door;
  cuda::RowPass pass;
  pass.rows = door.rows(x, "x");
  const int64_t rows = pass.rows.rows;
  pass.live = door.array<const uint8_t>(live, "live", rows);
  pass.stats = {door.array<float>(max, "max", rows), door.array<int32_t>(argmax, "argmax", rows),
                door.array<double>(logsumexp, "logsumexp", rows)};
  pass.k = k;
  pass.values = door.array<float>(values, "values", rows * k);
  pass.ids = door.array<int32_t>(ids, "ids", rows * k);
  pass.log_softmax = log_softmax;
  pass.fault = fault_of(door, fault);
  pass.counters = door.required<int32_t>(counters, "counters", rows);
  pass.workspace =
      door.required<uint8_t>(workspace, "workspace", cuda::row_pass_bytes(rows, pass.rows.cols, k));
  on_device(door, [&] { cuda::row_pass(pass, stream_of(stream)); });
}

cuda::BeamStep beam_step_shape(int64_t cols, int32_t questions, int32_t slots, int32_t width,
                               bool all_constrained) {
  cuda::BeamStep step;
  step.logits.cols = cols;
  step.questions = questions;
  step.slots = slots;
  step.width = width;
  step.all_constrained = all_constrained;
  return step;
}

void beam_step(py::handle logits, py::handle argmax, py::handle logsumexp, int32_t questions,
               int32_t slots, int64_t passages, py::handle hypotheses, py::handle first_passage,
               py::handle passage_row, py::handle weights, py::handle scores, py::handle states,
               const DeviceAutomata* automata, py::handle automaton_of, bool all_constrained,
               py::handle allow_end, const std::string& vote, int32_t end_id, int32_t width,
               py::handle best_scores, py::handle tokens, py::handle parents, py::handle fault,
               py::handle workspace, uintptr_t stream) {
  Door door;
  const Rows rows = door.rows(logits, "logits");
  cuda::BeamStep step = beam_step_shape(rows.cols, questions, slots, width, all_constrained);
  const int64_t own = int64_t{questions} * slots, found = int64_t{questions} * width;
  step.logits = rows;
  step.stats.argmax = door.required<int32_t>(argmax, "argmax", rows.rows);
  step.stats.logsumexp = door.required<double>(logsumexp, "logsumexp", rows.rows);
  step.hypotheses = door.required<const int32_t>(hypotheses, "hypotheses", questions);
  step.first_passage = door.required<const int64_t>(first_passage, "first_passage", questions + 1);
  step.passage_row = door.required<const int64_t>(passage_row, "passage_row", passages);
  step.weights = door.array<const float>(weights, "weights", passages);
  step.scores = door.required<const float>(scores, "scores", own);
  step.states = door.array<const int32_t>(states, "states", own);
  if (automata != nullptr) step.automata = automata->automata;
  step.automaton_of = door.array<const int32_t>(automaton_of, "automaton_of", questions);
  step.allow_end = door.array<const uint8_t>(allow_end, "allow_end", questions);
  step.vote = parse_vote(vote);
  step.end_id = end_id;
  step.candidates = {door.required<float>(best_scores, "best_scores", found),
                     door.required<int32_t>(tokens, "tokens", found),
                     door.required<int32_t>(parents, "parents", found)};
  step.fault = fault_of(door, fault);
  step.workspace = door.required<uint8_t>(workspace, "workspace", cuda::beam_step_bytes(step));
  on_device(door, [&] { cuda::beam_step(step, stream_of(stream)); });
}

void sample(py::handle logits, const DeviceAutomata* automata, py::handle automaton_of,
            py::handle states, py::handle allow_end, int32_t end_id, int32_t top_k, double top_p,
            double temperature, uint64_t seed, int64_t draws, py::handle row_of, py::handle streams,
            py::handle positions, py::handle max, py::handle argmax, py::handle logsumexp,
            py::handle tokens, py::handle log_probs, py::handle fault, py::handle workspace,
            uintptr_t stream) {
  Door door;
  cuda::Sample step;
  step.logits = door.rows(logits, "logits");
  const int64_t rows = step.logits.rows;
  check_end_id(end_id, step.logits.cols);
  if (automata != nullptr) step.automata = automata->automata;
  step.automaton_of = door.array<const int32_t>(automaton_of, "automaton_of", rows);
  step.states = door.array<const int32_t>(states, "states", rows);
  step.allow_end = door.array<const uint8_t>(allow_end, "allow_end", rows);
  step.end_id = end_id;
  step.top_k = top_k;
  step.top_p = top_p;
  step.temperature = temperature;
  step.seed = seed;
  step.draws = draws;
  step.row_of = door.array<const int32_t>(row_of, "row_of", draws);
  // Bits of unsigned numbers: torch computes little with those.
  step.streams =
      reinterpret_cast<const uint64_t*>(door.array<const int64_t>(streams, "streams", draws));
  step.positions =
      reinterpret_cast<const uint32_t*>(door.array<const int32_t>(positions, "positions", draws));
  step.max = door.required<const float>(max, "max", rows);
  step.argmax = door.required<const int32_t>(argmax, "argmax", rows);
  step.logsumexp = door.required<const double>(logsumexp, "logsumexp", rows);
  step.tokens = door.required<int32_t>(tokens, "tokens", draws);
  step.log_probs = door.required<double>(log_probs, "log_probs", draws);
  step.fault = fault_of(door, fault);
  step.workspace =
      door.required<uint8_t>(workspace, "workspace", cuda::sample_bytes(rows, step.logits.cols));
  on_device(door, [&] { cuda::sample(step, stream_of(stream)); });
}

// --- slots, spans, words -------------------------------------------------------------------------

// width 0: greedy.
void slots(py::handle logits, int64_t passages, int64_t slots, int64_t width, py::handle max,
           py::handle argmax, py::handle logsumexp, const DeviceAutomata* automata,
           py::handle automaton_of, int32_t end_id, int64_t min_tokens, py::handle tokens,
           py::handle lengths, py::handle scores, py::handle fault, py::handle workspace,
           uintptr_t stream) {
  Door door;
  cuda::SlotSearch search;
  search.logits = door.rows(logits, "logits");
  const int64_t rows = search.logits.rows, found = passages * std::max<int64_t>(1, width);
  check_end_id(end_id, search.logits.cols);
  search.passages = passages;
  search.slots = slots;
  search.max = door.required<const float>(max, "max", rows);
  search.argmax = door.required<const int32_t>(argmax, "argmax", rows);
  search.logsumexp = door.required<const double>(logsumexp, "logsumexp", rows);
  if (automata != nullptr) search.automata = automata->automata;
  search.automaton_of = door.array<const int32_t>(automaton_of, "automaton_of", passages);
  search.end_id = end_id;
  search.min_tokens = min_tokens;
  search.tokens = door.required<int32_t>(tokens, "tokens", found * slots);
  search.lengths = door.required<int32_t>(lengths, "lengths", found);
  search.scores = door.required<float>(scores, "scores", found);
  search.fault = fault_of(door, fault);
  if (width > 0) {
    search.workspace = door.required<uint8_t>(workspace, "workspace",
                                              cuda::slot_topk_bytes(passages, slots, width));
  }
  on_device(door, [&] {
    if (width == 0) {
      cuda::slot_argmax(search, stream_of(stream));
    } else {
      cuda::slot_topk(search, width, stream_of(stream));
    }
  });
}

void best_spans(py::handle start, py::handle end, py::handle mask, int64_t null_position,
                int64_t max_length, int64_t k, py::handle scores, py::handle starts,
                py::handle ends, py::handle null_scores, py::handle fault, py::handle workspace,
                uintptr_t stream) {
  Door door;
  cuda::BestSpans spans;
  spans.start = door.rows(start, "start");
  spans.end = door.rows(end, "end");
  const int64_t rows = spans.start.rows, cols = spans.start.cols;
  if (spans.end.rows != rows || spans.end.cols != cols) {
    throw py::value_error("end: expected the shape of start, [" + std::to_string(rows) + ", " +
                          std::to_string(cols) + "], got [" + std::to_string(spans.end.rows) +
                          ", " + std::to_string(spans.end.cols) + "]");
  }
  if (null_position >= cols) {
    throw py::value_error("null_position: expected a position below " + std::to_string(cols) +
                          ", got " + std::to_string(null_position));
  }
  check_at_least("k", k, 1);
  check_at_least("max_length", max_length, 1);
  spans.mask = door.array<const uint8_t>(mask, "mask", rows * cols);
  spans.null_position = null_position;
  spans.max_length = max_length;
  spans.k = k;
  spans.scores = door.required<float>(scores, "scores", rows * k);
  spans.starts = door.required<int32_t>(starts, "starts", rows * k);
  spans.ends = door.required<int32_t>(ends, "ends", rows * k);
  spans.null_scores = door.required<float>(null_scores, "null_scores", rows);
  spans.fault = fault_of(door, fault);
  spans.workspace =
      door.required<uint8_t>(workspace, "workspace", cuda::best_spans_bytes(rows, cols, k));
  on_device(door, [&] { cuda::best_spans(spans, stream_of(stream)); });
}

void attention_sum(py::handle logits, py::handle word_ids, py::handle mask, py::handle lengths,
                   int64_t k, py::handle words, py::handle probs, py::handle first,
                   py::handle fault, py::handle workspace, uintptr_t stream) {
  Door door;
  cuda::AttentionSum input;
  input.logits = door.rows(logits, "logits");
  const int64_t rows = input.logits.rows, cols = input.logits.cols;
  check_at_least("k", k, 1);
  input.word_ids = door.required<const int32_t>(word_ids, "word_ids", rows * cols);
  input.mask = door.array<const uint8_t>(mask, "mask", rows * cols);
  input.lengths = door.array<const int64_t>(lengths, "lengths", rows);
  input.k = k;
  input.words = door.required<int32_t>(words, "words", rows * k);
  input.probs = door.required<double>(probs, "probs", rows * k);
  input.first = door.required<int32_t>(first, "first", rows * k);
  input.fault = fault_of(door, fault);
  input.workspace =
      door.required<uint8_t>(workspace, "workspace", cuda::attention_sum_bytes(rows, cols, k));
  on_device(door, [&] { cuda::attention_sum(input, stream_of(stream)); });
}

}  // namespace

void register_cuda_ops(py::module_& module) {
  py::class_<DeviceAutomata>(module, "Automata")
      .def(py::init(&make_automata), py::arg("states"), py::arg("edges"), py::arg("count"),
           py::arg("edge_begin"), py::arg("edge_token"), py::arg("edge_target"),
           py::arg("final_flags"), py::arg("first_state"), py::arg("first_edge"))
      .def("advance", &advance, py::arg("n"), py::arg("automaton_of"), py::arg("states"),
           py::arg("tokens"), py::arg("out"), py::arg("fault"), py::arg("stream"))
      .def("count_allowed", &count_allowed, py::arg("n"), py::arg("automaton_of"),
           py::arg("states"), py::arg("counts"), py::arg("fault"), py::arg("stream"))
      .def("write_allowed", &write_allowed, py::arg("n"), py::arg("total"), py::arg("automaton_of"),
           py::arg("states"), py::arg("offsets"), py::arg("tokens"), py::arg("fault"),
           py::arg("stream"))
      .def("final_flags", &final_flags, py::arg("n"), py::arg("automaton_of"), py::arg("states"),
           py::arg("out"), py::arg("fault"), py::arg("stream"));
  module.def("row_pass_bytes", &cuda::row_pass_bytes, py::arg("rows"), py::arg("cols"),
             py::arg("k"));
  module.def("row_pass", &row_pass, py::arg("x"), py::arg("live"), py::arg("max"),
             py::arg("argmax"), py::arg("logsumexp"), py::arg("k"), py::arg("values"),
             py::arg("ids"), py::arg("log_softmax"), py::arg("fault"), py::arg("counters"),
             py::arg("workspace"), py::arg("stream"));
  module.def(
      "beam_step_bytes",
      [](int64_t cols, int32_t questions, int32_t slots, int32_t width, bool all_constrained) {
        return cuda::beam_step_bytes(
            beam_step_shape(cols, questions, slots, width, all_constrained));
      },
      py::arg("cols"), py::arg("questions"), py::arg("slots"), py::arg("width"),
      py::arg("all_constrained"));
  module.def("beam_step", &beam_step, py::arg("logits"), py::arg("argmax"), py::arg("logsumexp"),
             py::arg("questions"), py::arg("slots"), py::arg("passages"), py::arg("hypotheses"),
             py::arg("first_passage"), py::arg("passage_row"), py::arg("weights"),
             py::arg("scores"), py::arg("states"), py::arg("automata"), py::arg("automaton_of"),
             py::arg("all_constrained"), py::arg("allow_end"), py::arg("vote"), py::arg("end_id"),
             py::arg("width"), py::arg("best_scores"), py::arg("tokens"), py::arg("parents"),
             py::arg("fault"), py::arg("workspace"), py::arg("stream"));
  module.def("sample_bytes", &cuda::sample_bytes, py::arg("rows"), py::arg("cols"));
  module.def("sample", &sample, py::arg("logits"), py::arg("automata"), py::arg("automaton_of"),
             py::arg("states"), py::arg("allow_end"), py::arg("end_id"), py::arg("top_k"),
             py::arg("top_p"), py::arg("temperature"), py::arg("seed"), py::arg("draws"),
             py::arg("row_of"), py::arg("streams"), py::arg("positions"), py::arg("max"),
             py::arg("argmax"), py::arg("logsumexp"), py::arg("tokens"), py::arg("log_probs"),
             py::arg("fault"), py::arg("workspace"), py::arg("stream"));
  module.def("slot_topk_bytes", &cuda::slot_topk_bytes, py::arg("passages"), py::arg("slots"),
             py::arg("width"));
  module.def("slots", &slots, py::arg("logits"), py::arg("passages"), py::arg("slots"),
             py::arg("width"), py::arg("max"), py::arg("argmax"), py::arg("logsumexp"),
             py::arg("automata"), py::arg("automaton_of"), py::arg("end_id"), py::arg("min_tokens"),
             py::arg("tokens"), py::arg("lengths"), py::arg("scores"), py::arg("fault"),
             py::arg("workspace"), py::arg("stream"));
  module.def("best_spans_bytes", &cuda::best_spans_bytes, py::arg("rows"), py::arg("cols"),
             py::arg("k"));
  module.def("best_spans", &best_spans, py::arg("start"), py::arg("end"), py::arg("mask"),
             py::arg("null_position"), py::arg("max_length"), py::arg("k"), py::arg("scores"),
             py::arg("starts"), py::arg("ends"), py::arg("null_scores"), py::arg("fault"),
             py::arg("workspace"), py::arg("stream"));
  module.def("attention_sum_bytes", &cuda::attention_sum_bytes, py::arg("rows"), py::arg("cols"),
             py::arg("k"));
  module.def("attention_sum", &attention_sum, py::arg("logits"), py::arg("word_ids"),
             py::arg("mask"), py::arg("lengths"), py::arg("k"), py::arg("words"), py::arg("probs"),
             py::arg("first"), py::arg("fault"), py::arg("workspace"), py::arg("stream"));
}

}  // namespace fastmrc::bindings
