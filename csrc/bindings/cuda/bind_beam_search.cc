#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <string>

#include "bindings/cuda/door.h"
#include "bindings/register.h"
#include "cuda/beam_search.h"
#include "cuda/workspace.h"
#include "fastmrc/ops.h"

namespace fastmrc::bindings {
namespace {

// What the steps of one search share; divided out of one lent block.
struct Scratch {
  cuda::RowStatsArrays stats;
  int32_t* counters;  // zeros
  uint8_t* row_pass;
  uint8_t* beam_step;
  cuda::Candidates candidates;
};

// The state of a search lives in tensors that Python owns and exports once; a step takes the logits
// alone.
class PyBeamSearch {
 public:
  PyBeamSearch(int32_t questions, int32_t slots, int32_t steps, int32_t vocabulary_size,
               int32_t end_id, int32_t min_tokens, const std::string& vote,
               const std::string& finish, double length_penalty, int64_t rows, py::handle state,
               py::handle ancestors, py::handle zeros, py::handle fault, py::handle workspace)
      : vocabulary_size_(vocabulary_size), rows_(rows), min_tokens_(min_tokens) {
    const int64_t columns = int64_t{slots} * steps;
    beams_ = cuda::lay_out_beams(
        door_.required<int32_t>(state, "state", cuda::beams_items(questions, slots, steps)),
        door_.required<uint8_t>(ancestors, "ancestors", 2 * questions * slots * columns), questions,
        slots, steps);
    rules_ = {parse_finish(finish), length_penalty, end_id, steps};
    step_.questions = questions;
    step_.slots = slots;
    step_.hypotheses = beams_.hypotheses;
    step_.scores = beams_.scores;
    step_.states = beams_.states;
    step_.vote = parse_vote(vote);
    step_.end_id = end_id;
    step_.fault = door_.required<int64_t>(fault, "fault", 1);
    no_end_ = door_.required<const uint8_t>(zeros, "zeros", questions);
    width_ = slots * (rules_.finish == Finish::kPool ? 2 : 1);
    scratch_ = divide(door_.required<uint8_t>(
        workspace, "workspace", workspace_bytes(questions, slots, vocabulary_size, finish, rows)));
  }

  // For logits of up to `rows` rows.
  static int64_t workspace_bytes(int32_t questions, int32_t slots, int32_t vocabulary_size,
                                 const std::string& finish, int64_t rows) {
    cuda::Workspace space(nullptr);
    const int32_t width = slots * (parse_finish(finish) == Finish::kPool ? 2 : 1);
    divide(space, questions, slots, width, vocabulary_size, rows);
    return space.bytes();
  }

  // Step 0's statistics of all passages.
  void first_step(py::handle logits, py::handle surviving, py::handle no_answer, uintptr_t stream) {
    Door door;
    cuda::FirstStep first;
    first.logits = checked_logits(door, logits);
    const int64_t rows = first.logits.rows;
    first.stats = scratch_.stats;
    first.end_id = step_.end_id;
    first.surviving = door.required<uint8_t>(surviving, "surviving", rows);
    first.no_answer = door.required<double>(no_answer, "no_answer", rows);
    first.fault = step_.fault;
    on_device(door, [&] {
      read_rows(first.logits, nullptr, stream_of(stream));
      cuda::first_step(first, stream_of(stream));
    });
  }

  // Which passages vote, their rows in the logits of step 0, and what constrains their questions.
  void set_passages(int64_t passages, py::handle first_passage, py::handle first_rows,
                    py::handle weights, const DeviceAutomata* automata, py::handle automaton_of,
                    bool all_constrained) {
    passages_ = passages;
    const int32_t questions = step_.questions;
    step_.first_passage =
        door_.required<const int64_t>(first_passage, "first_passage", questions + 1);
    first_rows_ = door_.required<const int64_t>(first_rows, "first_rows", passages);
    step_.weights = door_.array<const float>(weights, "weights", passages);
    if (automata != nullptr) step_.automata = automata->automata;
    step_.automaton_of = door_.array<const int32_t>(automaton_of, "automaton_of", questions);
    step_.all_constrained = all_constrained;
  }

  // Where the encoder reads; `passage_row` says which row of its logits is the first of each
  // passage.
  void set_inputs(int64_t rows, int64_t prefix, int64_t columns, py::handle passage_row,
                  py::handle question_of, py::handle first_position, py::handle tokens,
                  py::handle positions, py::handle mask, py::handle cache_columns,
                  py::handle live) {
    auto door = std::make_unique<Door>();
    const int64_t slots = step_.slots;
    check_at_least("prefix", prefix, 0);
    check_at_least("columns", columns, prefix + slots * beams_.steps);
    rows_of_passages_ = door->required<const int64_t>(passage_row, "passage_row", passages_);
    inputs_.rows = rows;
    inputs_.prefix = prefix;
    inputs_.columns = columns;
    inputs_.question_of = door->required<const int32_t>(question_of, "question_of", rows);
    inputs_.first_position = door->required<const int64_t>(first_position, "first_position", rows);
    inputs_.tokens = door->required<int64_t>(tokens, "tokens", rows * slots);
    inputs_.positions = door->required<int64_t>(positions, "positions", rows * slots);
    inputs_.mask = door->required<uint8_t>(mask, "mask", rows * slots * columns);
    inputs_.cache_columns = door->required<int64_t>(cache_columns, "cache_columns", slots);
    inputs_.live = door->required<uint8_t>(live, "live", rows * slots);
    inputs_door_ = std::move(door);
  }

  // Selects by the logits of step `t`, moves the questions on and writes the next inputs. Of step 0
  // the logits are those of first_step().
  void step(py::handle logits, int32_t t, uintptr_t stream) {
    Door door;
    cuda::BeamStep own = step_;
    own.logits = checked_logits(door, logits);
    own.stats = scratch_.stats;
    own.passage_row = t == 0 ? first_rows_ : rows_of_passages_;
    own.allow_end = t < min_tokens_ ? no_end_ : nullptr;
    own.width = t + 1 == beams_.steps ? beams_.slots : width_;
    own.candidates = scratch_.candidates;
    own.workspace = scratch_.beam_step;
    on_device(door, [&] {
      if (t > 0) read_rows(own.logits, inputs_.live, stream_of(stream));
      cuda::beam_step(own, stream_of(stream));
      cuda::advance_beams(beams_, rules_, own.candidates, own.width, own.automata, own.automaton_of,
                          t, stream_of(stream));
      cuda::prepare_inputs(beams_, inputs_, t, stream_of(stream));
    });
  }

  // Writes the inputs of the tokens of step `t` again, as for other buffers.
  void prepare(int32_t t, uintptr_t stream) {
    on_device(*inputs_door_, [&] { cuda::prepare_inputs(beams_, inputs_, t, stream_of(stream)); });
  }

 private:
  static Scratch divide(cuda::Workspace& space, int32_t questions, int32_t slots, int32_t width,
                        int32_t vocabulary_size, int64_t rows) {
    Scratch scratch;
    scratch.counters = space.take<int32_t>(rows);
    scratch.stats = {space.take<float>(rows), space.take<int32_t>(rows), space.take<double>(rows)};
    scratch.row_pass = space.take<uint8_t>(cuda::row_pass_bytes(rows, vocabulary_size, 0));
    cuda::BeamStep step;
    step.logits.cols = vocabulary_size;
    step.questions = questions;
    step.slots = slots;
    step.width = width;
    // Whether all questions are constrained is known after step 0 only.
    const int64_t without = cuda::beam_step_bytes(step);
    step.all_constrained = true;
    scratch.beam_step = space.take<uint8_t>(std::max(without, cuda::beam_step_bytes(step)));
    const int64_t found = int64_t{questions} * width;
    scratch.candidates = {space.take<float>(found), space.take<int32_t>(found),
                          space.take<int32_t>(found)};
    return scratch;
  }

  Scratch divide(uint8_t* memory) const {
    cuda::Workspace space(memory);
    return divide(space, step_.questions, step_.slots, width_, vocabulary_size_, rows_);
  }

  Rows checked_logits(Door& door, py::handle logits) const {
    const Rows rows = door.rows(logits, "logits");
    if (rows.rows <= rows_ && rows.cols == vocabulary_size_) return rows;
    throw py::value_error("logits: expected at most " + std::to_string(rows_) + " rows of " +
                          std::to_string(vocabulary_size_) + ", got [" + std::to_string(rows.rows) +
                          ", " + std::to_string(rows.cols) + "]");
  }

  void read_rows(const Rows& logits, const uint8_t* live, cuda::Stream stream) const {
    cuda::RowPass pass;
    pass.rows = logits;
    pass.live = live;
    pass.stats = scratch_.stats;
    pass.fault = step_.fault;
    pass.counters = scratch_.counters;
    pass.workspace = scratch_.row_pass;
    cuda::row_pass(pass, stream);
  }

  Door door_;
  std::unique_ptr<Door> inputs_door_;
  int32_t vocabulary_size_;
  int64_t rows_;
  int32_t min_tokens_;
  int32_t width_ = 1;
  int64_t passages_ = 0;
  cuda::Beams beams_;
  cuda::FinishRules rules_;
  cuda::BeamStep step_;  // what does not change
  cuda::EncoderInputs inputs_;
  const uint8_t* no_end_ = nullptr;  // [questions] zeros: the end is not allowed
  const int64_t* first_rows_ = nullptr;
  const int64_t* rows_of_passages_ = nullptr;
  Scratch scratch_{};
};

}  // namespace

void register_cuda_beam_search(py::module_& module) {
  module.def("beams_items", &cuda::beams_items, py::arg("questions"), py::arg("slots"),
             py::arg("steps"));
  py::class_<PyBeamSearch>(module, "BeamSearch")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, const std::string&,
                    const std::string&, double, int64_t, py::handle, py::handle, py::handle,
                    py::handle, py::handle>(),
           py::arg("questions"), py::arg("slots"), py::arg("steps"), py::arg("vocabulary_size"),
           py::arg("end_id"), py::arg("min_tokens"), py::arg("vote"), py::arg("finish"),
           py::arg("length_penalty"), py::arg("rows"), py::arg("state"), py::arg("ancestors"),
           py::arg("zeros"), py::arg("fault"), py::arg("workspace"))
      .def_static("workspace_bytes", &PyBeamSearch::workspace_bytes, py::arg("questions"),
                  py::arg("slots"), py::arg("vocabulary_size"), py::arg("finish"), py::arg("rows"))
      .def("first_step", &PyBeamSearch::first_step, py::arg("logits"), py::arg("surviving"),
           py::arg("no_answer"), py::arg("stream"))
      .def("set_passages", &PyBeamSearch::set_passages, py::arg("passages"),
           py::arg("first_passage"), py::arg("first_rows"), py::arg("weights"), py::arg("automata"),
           py::arg("automaton_of"), py::arg("all_constrained"),
           py::keep_alive<1, 6>())  // the automata outlive the search
      .def("set_inputs", &PyBeamSearch::set_inputs, py::arg("rows"), py::arg("prefix"),
           py::arg("columns"), py::arg("passage_row"), py::arg("question_of"),
           py::arg("first_position"), py::arg("tokens"), py::arg("positions"), py::arg("mask"),
           py::arg("cache_columns"), py::arg("live"))
      .def("step", &PyBeamSearch::step, py::arg("logits"), py::arg("t"), py::arg("stream"))
      .def("prepare", &PyBeamSearch::prepare, py::arg("t"), py::arg("stream"));
}

}  // namespace fastmrc::bindings
