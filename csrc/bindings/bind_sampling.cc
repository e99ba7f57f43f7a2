#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "fastmrc/sampling.h"

namespace fastmrc::bindings {
namespace {

std::unique_ptr<SequenceSampler> make_sampler(
    const std::vector<int32_t>& sequences, int32_t vocabulary_size, int32_t end_id, int32_t top_k,
    double top_p, double temperature, uint64_t seed, uint64_t first_stream, int32_t min_tokens,
    int32_t max_tokens, int32_t min_ends, const std::vector<const PyAutomaton*>& constraints) {
  SamplingOptions options;
  options.top_k = top_k;
  options.top_p = top_p;
  options.temperature = temperature;
  options.seed = seed;
  options.first_stream = first_stream;
  options.min_tokens = min_tokens;
  options.max_tokens = max_tokens;
  options.min_ends = min_ends;
  options.end_id = end_id;
  options.vocabulary_size = vocabulary_size;
  return std::make_unique<SequenceSampler>(options, sequences, automata_of(constraints));
}

py::list sequences(const SequenceSampler& self, int32_t prompt) {
  check_index("prompt", prompt, self.num_prompts());
  py::list result;
  for (const SampledSequence& s : self.sequences(prompt)) {
    result.append(py::make_tuple(s.tokens, s.log_prob, s.finished));
  }
  return result;
}

// Of the next step: row and stream of each draw, prompt and state of each row.
py::tuple draws(SequenceSampler& self) {
  const SequenceSampler::Draws next = self.prepare_draws();
  return py::make_tuple(to_array(next.row_of), to_array(next.streams), to_array(next.row_prompt),
                        to_array(next.states));
}

void take(SequenceSampler& self, const py::array_t<int32_t, py::array::c_style>& tokens,
          const py::array_t<double, py::array::c_style>& log_probs) {
  const auto expected = static_cast<py::ssize_t>(self.num_draws());
  if (tokens.size() != expected || log_probs.size() != expected) {
    throw py::value_error("tokens, log_probs: expected " + std::to_string(expected) +
                          " entries, got " + std::to_string(tokens.size()) + " and " +
                          std::to_string(log_probs.size()));
  }
  self.take(tokens.data(), log_probs.data());
}

void check_rows(const char* name, int64_t got, int64_t rows) {
  if (got == rows) return;
  throw py::value_error(std::string(name) + ": expected one per row, " + std::to_string(rows) +
                        ", got " + std::to_string(got));
}

template <typename T>
int64_t ssize(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size());
}

// One number per row, or none for what the core takes without. Arrays, not lists: there may be many
// rows, and a list is converted item by item.
template <typename T>
using PerRow = std::optional<py::array_t<T, py::array::c_style>>;

template <typename T>
const T* per_row(const char* name, const PerRow<T>& values, int64_t rows) {
  if (!values) return nullptr;
  check_rows(name, values->size(), rows);
  return values->data();
}

py::tuple bind_sample(py::handle logits, uint64_t seed, const PerRow<uint64_t>& streams,
                      const PerRow<uint32_t>& positions, int32_t top_k, double top_p,
                      double temperature, int32_t end_id,
                      const std::vector<const PyAutomaton*>& constraints, py::handle states,
                      const PerRow<uint8_t>& allow_end) {
  const Tensor tensor(logits, "logits");
  const Rows rows = tensor.rows();
  if (!constraints.empty()) check_rows("constraint", ssize(constraints), rows.rows);
  check_end_id(end_id, rows.cols);
  std::vector<int32_t> state_values;
  if (!states.is_none()) {
    state_values = int32_values(states, "states");
    check_rows("states", ssize(state_values), rows.rows);
  }
  const std::vector<const Automaton*> automata = automata_of(constraints);
  SampleStep step;
  step.logits = rows;
  step.constraints = automata.empty() ? nullptr : automata.data();
  step.states = states.is_none() ? nullptr : state_values.data();
  step.allow_end = per_row("allow_end", allow_end, rows.rows);
  step.end_id = end_id;
  step.top_k = top_k;
  step.top_p = top_p;
  step.temperature = temperature;
  step.seed = seed;
  step.draws = rows.rows;
  step.streams = per_row("streams", streams, rows.rows);
  step.positions = per_row("positions", positions, rows.rows);
  py::array_t<int32_t> tokens(rows.rows);
  py::array_t<double> log_probs(rows.rows);
  int32_t* token_data = tokens.mutable_data();
  double* log_prob_data = log_probs.mutable_data();
  {
    const py::gil_scoped_release release;
    SampleWorkspace workspace;
    sample(step, workspace, token_data, log_prob_data);
  }
  return py::make_tuple(tokens, log_probs);
}

}  // namespace

void register_sampling(py::module_& module) {
  module.def("sample", &bind_sample, py::arg("logits"), py::arg("seed"), py::arg("streams"),
             py::arg("positions"), py::arg("top_k"), py::arg("top_p"), py::arg("temperature"),
             py::arg("end_id"), py::arg("constraints"), py::arg("states"), py::arg("allow_end"));
  py::class_<SequenceSampler>(module, "SequenceSampler")
      .def(py::init(&make_sampler), py::arg("sequences"), py::arg("vocabulary_size"),
           py::arg("end_id"), py::arg("top_k"), py::arg("top_p"), py::arg("temperature"),
           py::arg("seed"), py::arg("first_stream"), py::arg("min_tokens"), py::arg("max_tokens"),
           py::arg("min_ends"), py::arg("constraints"),
           py::keep_alive<1, 13>())  // the constraints outlive the sampler
      .def("step", &step_search<SequenceSampler>, py::arg("logits"))
      .def("draws", &draws)
      .def("take", &take, py::arg("tokens"), py::arg("log_probs"))
      .def_property_readonly("done", &SequenceSampler::done)
      .def_property_readonly("steps", &SequenceSampler::steps)
      .def_property_readonly("request", &SequenceSampler::request,
                             py::return_value_policy::reference_internal)
      .def("sequences", &sequences, py::arg("prompt"));
}

}  // namespace fastmrc::bindings
