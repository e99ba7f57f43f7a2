#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "fastmrc/beam_search.h"

namespace fastmrc::bindings {
namespace {

std::unique_ptr<BeamSearch> make_search(py::handle tokens, py::handle passage_offsets,
                                        py::handle question_offsets, int32_t vocabulary_size,
                                        int32_t end_id, int32_t beam_size, int32_t min_tokens,
                                        int32_t max_tokens, const std::string& vote,
                                        const std::string& finish, double length_penalty,
                                        double no_answer_ratio, bool spans_only, int32_t look_ahead,
                                        const std::vector<const PyAutomaton*>& constraints,
                                        const py::object& weights) {
  BeamSearchOptions options;
  options.beam_size = beam_size;
  options.min_tokens = min_tokens;
  options.max_tokens = max_tokens;
  options.vote = parse_vote(vote);
  options.finish = parse_finish(finish);
  options.length_penalty = length_penalty;
  options.end_id = end_id;
  options.vocabulary_size = vocabulary_size;
  options.no_answer_ratio = no_answer_ratio;
  options.spans_only = spans_only;
  options.look_ahead = look_ahead;
  return std::make_unique<BeamSearch>(
      options, int32_values(tokens, "tokens"), int64_values(passage_offsets, "passage_offsets"),
      int32_values(question_offsets, "question_offsets"), automata_of(constraints),
      weights.is_none() ? std::vector<float>{} : float32_values(weights, "weights"));
}

void check_question(const BeamSearch& self, int32_t question) {
  check_index("question", question, self.num_questions());
}

py::ssize_t ssize(size_t n) { return static_cast<py::ssize_t>(n); }

py::array_t<bool> to_flags(const std::vector<uint8_t>& flags) {
  py::array_t<bool> result(ssize(flags.size()));
  for (size_t i = 0; i < flags.size(); ++i) result.mutable_at(ssize(i)) = flags[i] != 0;
  return result;
}

}  // namespace

void register_beam_search(py::module_& module) {
  py::class_<StepRequest>(module, "StepRequest")
      .def_property_readonly("questions",
                             [](const StepRequest& r) { return to_array(r.questions); })
      .def_property_readonly("hypotheses",
                             [](const StepRequest& r) { return to_array(r.hypotheses); })
      .def_readonly("width", &StepRequest::width)
      .def_readonly("columns", &StepRequest::columns)
      .def_property_readonly("tokens",
                             [](const StepRequest& r) {
                               return to_array(r.tokens.data(),
                                               {ssize(r.questions.size()), py::ssize_t{r.width}});
                             })
      .def_property_readonly("depths",
                             [](const StepRequest& r) {
                               return to_array(r.depths.data(),
                                               {ssize(r.questions.size()), py::ssize_t{r.width}});
                             })
      .def_property_readonly("ancestors",
                             [](const StepRequest& r) {
                               return to_array(r.ancestors.data(),
                                               {ssize(r.questions.size()), py::ssize_t{r.width},
                                                py::ssize_t{r.columns}});
                             })
      .def_property_readonly("row_passage",
                             [](const StepRequest& r) { return to_array(r.row_passage); })
      .def_property_readonly("row_question",
                             [](const StepRequest& r) { return to_array(r.row_question); })
      .def_property_readonly("row_column",
                             [](const StepRequest& r) { return to_array(r.row_column); });

  py::class_<BeamSearch>(module, "BeamSearch")
      .def(py::init(&make_search), py::arg("tokens"), py::arg("passage_offsets"),
           py::arg("question_offsets"), py::arg("vocabulary_size"), py::arg("end_id"),
           py::arg("beam_size"), py::arg("min_tokens"), py::arg("max_tokens"), py::arg("vote"),
           py::arg("finish"), py::arg("length_penalty"), py::arg("no_answer_ratio"),
           py::arg("spans_only"), py::arg("look_ahead"), py::arg("constraints"), py::arg("weights"),
           py::keep_alive<1, 16>())  // the constraints outlive the search
      .def("step", &step_search<BeamSearch>, py::arg("logits"))
      .def_property_readonly("done", &BeamSearch::done)
      .def_property_readonly("steps", &BeamSearch::steps)
      .def_property_readonly("request", &BeamSearch::request,
                             py::return_value_policy::reference_internal)
      .def_property_readonly("surviving",
                             [](const BeamSearch& self) { return to_flags(self.surviving()); })
      .def_property_readonly("voting",
                             [](const BeamSearch& self) { return to_flags(self.voting()); })
      .def_property_readonly("no_answer",
                             [](const BeamSearch& self) { return to_array(self.no_answer()); })
      .def(
          "best",
          [](const BeamSearch& self, int32_t question) {
            check_question(self, question);
            return self.best(question);
          },
          py::arg("question"))
      .def(
          "hypotheses",
          [](const BeamSearch& self, int32_t question) {
            check_question(self, question);
            py::list result;
            for (const Hypothesis& h : self.hypotheses(question)) {
              result.append(py::make_tuple(h.tokens, h.score, h.finished));
            }
            return result;
          },
          py::arg("question"))
      .def(
          "live_tokens",
          [](const BeamSearch& self, int32_t question) {
            check_question(self, question);
            return self.live_tokens(question);
          },
          py::arg("question"));
}

}  // namespace fastmrc::bindings
