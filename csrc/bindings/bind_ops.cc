#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "fastmrc/ops.h"

namespace fastmrc::bindings {
namespace {

using TopK = void (*)(const Rows&, int64_t, float*, int32_t*);

template <TopK kTopK>
py::tuple bind_topk(py::handle x, int64_t k) {
  const Tensor tensor(x, "x");
  const Rows rows = tensor.rows();
  check_at_least("k", k, 1);
  py::array_t<float> values({rows.rows, k});
  py::array_t<int32_t> ids({rows.rows, k});
  float* value_data = values.mutable_data();
  int32_t* id_data = ids.mutable_data();
  {
    const py::gil_scoped_release release;
    kTopK(rows, k, value_data, id_data);
  }
  return py::make_tuple(values, ids);
}

// Unlike the other operations it writes into its arguments: the lists run over many blocks.
void bind_topk_merge(py::handle scores, int64_t first_id, py::array_t<float> values,
                     py::array_t<int64_t> ids) {
  const Tensor tensor(scores, "scores");
  const Rows rows = tensor.rows();
  const auto fits = [&](const py::array& list) {
    return list.ndim() == 2 && list.shape(0) == rows.rows && list.shape(1) >= 1 &&
           (list.flags() & py::array::c_style) != 0;
  };
  if (!fits(values) || !fits(ids) || ids.shape(1) != values.shape(1)) {
    throw py::value_error("values, ids: expected contiguous [rows, k] with " +
                          std::to_string(rows.rows) + " rows");
  }
  const int64_t k = values.shape(1);
  float* value_data = values.mutable_data();
  int64_t* id_data = ids.mutable_data();
  const py::gil_scoped_release release;
  topk_merge(rows, first_id, k, value_data, id_data);
}

py::array_t<double> bind_inner_products(py::handle queries, py::handle corpus,
                                        const py::array_t<int64_t, py::array::c_style>& ids) {
  const Tensor query_tensor(queries, "queries");
  const Tensor corpus_tensor(corpus, "corpus");
  const Rows asked = query_tensor.rows();
  const Rows entries = corpus_tensor.rows();
  if (asked.cols != entries.cols) {
    throw py::value_error("corpus: expected " + std::to_string(asked.cols) + " columns, got " +
                          std::to_string(entries.cols));
  }
  if (ids.ndim() != 2 || ids.shape(0) != asked.rows) {
    throw py::value_error("ids: expected one row per query, " + std::to_string(asked.rows));
  }
  const int64_t* id_data = ids.data();
  for (int64_t i = 0; i < ids.size(); ++i) {
    if (id_data[i] < 0 || id_data[i] >= entries.rows) {
      throw py::value_error("ids: expected rows below " + std::to_string(entries.rows) + ", got " +
                            std::to_string(id_data[i]));
    }
  }
  py::array_t<double> products({asked.rows, static_cast<int64_t>(ids.shape(1))});
  double* data = products.mutable_data();
  {
    const py::gil_scoped_release release;
    inner_products(asked, entries, id_data, ids.shape(1), data);
  }
  return products;
}

py::tuple bind_row_stats(py::handle x) {
  const Tensor tensor(x, "x");
  const Rows rows = tensor.rows();
  std::vector<RowStats> stats(static_cast<size_t>(rows.rows));
  {
    const py::gil_scoped_release release;
    row_stats(rows, stats.data(), "x");
  }
  py::array_t<float> max(rows.rows);
  py::array_t<int32_t> argmax(rows.rows);
  py::array_t<double> logsumexp(rows.rows);
  for (size_t i = 0; i < stats.size(); ++i) {
    const auto at = static_cast<py::ssize_t>(i);
    max.mutable_at(at) = stats[i].max;
    argmax.mutable_at(at) = stats[i].argmax;
    logsumexp.mutable_at(at) = stats[i].logsumexp;
  }
  return py::make_tuple(max, argmax, logsumexp);
}

struct StepSizes {
  int64_t rows = 0, hypotheses = 0, passages = 0;
};

// Counts of a ragged batch; the Python layer has checked that both have one entry per question.
StepSizes check_counts(const std::vector<int32_t>& passages,
                       const std::vector<int32_t>& hypotheses) {
  StepSizes sizes;
  for (size_t q = 0; q < passages.size(); ++q) {
    if (passages[q] < 0 || hypotheses[q] < 0) {
      throw py::value_error("passages, hypotheses: expected counts >= 0, got " +
                            std::to_string(passages[q]) + " and " + std::to_string(hypotheses[q]) +
                            " for question " + std::to_string(q));
    }
    sizes.rows += static_cast<int64_t>(passages[q]) * hypotheses[q];
    sizes.hypotheses += hypotheses[q];
    sizes.passages += passages[q];
  }
  return sizes;
}

void check_size(const char* name, size_t got, int64_t expected) {
  if (static_cast<int64_t>(got) != expected) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(expected) +
                          " entries, got " + std::to_string(got));
  }
}

py::tuple bind_beam_step(py::handle logits, py::handle scores, py::handle passages,
                         py::handle hypotheses, int32_t beam_size, int32_t end_id,
                         const std::string& vote, const py::object& weights,
                         const std::vector<const PyAutomaton*>& constraints,
                         const py::object& states, const std::vector<bool>& allow_end) {
  const Tensor tensor(logits, "logits");
  const std::vector<float> score_values = float32_values(scores, "scores");
  const std::vector<int32_t> passage_counts = int32_values(passages, "passages");
  const std::vector<int32_t> hypothesis_counts = int32_values(hypotheses, "hypotheses");
  std::vector<int32_t> state_values;
  if (!states.is_none()) state_values = int32_values(states, "states");
  std::vector<float> weight_values;
  if (!weights.is_none()) weight_values = float32_values(weights, "weights");
  const size_t questions = passage_counts.size();
  check_size("hypotheses", hypothesis_counts.size(), static_cast<int64_t>(questions));
  check_size("constraint", constraints.size(), static_cast<int64_t>(questions));
  check_size("allow_end", allow_end.size(), static_cast<int64_t>(questions));
  const StepSizes sizes = check_counts(passage_counts, hypothesis_counts);
  check_size("scores", score_values.size(), sizes.hypotheses);
  if (!states.is_none()) check_size("states", state_values.size(), sizes.hypotheses);
  if (!weights.is_none()) check_size("weights", weight_values.size(), sizes.passages);

  BeamStep step;
  step.logits = tensor.rows();
  step.vote = parse_vote(vote);
  if (step.logits.rows != sizes.rows) {
    throw py::value_error("logits: expected " + std::to_string(sizes.rows) +
                          " rows (passages x hypotheses of all questions), got " +
                          std::to_string(step.logits.rows));
  }
  if ((step.vote == Vote::kWeighted) == weights.is_none()) {
    throw py::value_error("weights: expected one per passage for vote 'weighted', None otherwise");
  }
  for (const float weight : weight_values) {
    if (!(weight >= 0) || !std::isfinite(weight)) {
      throw py::value_error("weights: expected finite numbers >= 0");
    }
  }
  for (const float score : score_values) {
    if (std::isnan(score) || score == std::numeric_limits<float>::infinity()) {
      throw py::value_error("scores: expected numbers below infinity");
    }
  }
  if (beam_size < 1 || beam_size > step.logits.cols) {
    throw py::value_error("beam_size: expected 1 to the vocabulary size " +
                          std::to_string(step.logits.cols) + ", got " + std::to_string(beam_size));
  }
  check_end_id(end_id, step.logits.cols);
  const std::vector<const Automaton*> automata = automata_of(constraints);
  const std::vector<uint8_t> end_flags(allow_end.begin(), allow_end.end());
  std::vector<RowStats> stats(static_cast<size_t>(sizes.rows));
  step.stats = stats.data();
  step.num_questions = static_cast<int32_t>(questions);
  step.passages = passage_counts.data();
  step.hypotheses = hypothesis_counts.data();
  step.row_of = nullptr;
  step.scores = score_values.data();
  step.states = states.is_none() ? nullptr : state_values.data();
  step.constraints = automata.data();
  step.allow_end = end_flags.data();
  step.weights = weight_values.data();
  step.end_id = end_id;
  step.width = beam_size;

  const auto shape = std::vector<py::ssize_t>{static_cast<py::ssize_t>(questions), beam_size};
  py::array_t<float> out_scores(shape);
  py::array_t<int32_t> out_tokens(shape), out_parents(shape);
  float* score_data = out_scores.mutable_data();
  int32_t* token_data = out_tokens.mutable_data();
  int32_t* parent_data = out_parents.mutable_data();
  {
    const py::gil_scoped_release release;
    row_stats(step.logits, stats.data());
    // One workspace per calling thread, kept for its next call.
    thread_local BeamStepWorkspace workspace;
    thread_local std::vector<std::vector<Candidate>> candidates;
    beam_step(step, workspace, candidates);
    for (size_t q = 0; q < questions; ++q) {
      for (size_t i = 0; i < static_cast<size_t>(beam_size); ++i) {
        const size_t at = q * static_cast<size_t>(beam_size) + i;
        const bool valid = i < candidates[q].size();
        score_data[at] = valid ? candidates[q][i].score : -std::numeric_limits<float>::infinity();
        token_data[at] = valid ? candidates[q][i].token : -1;
        parent_data[at] = valid ? candidates[q][i].parent : -1;
      }
    }
  }
  return py::make_tuple(out_scores, out_tokens, out_parents);
}

// The arguments that both slot operations take.
SlotSearch slot_search(const Rows& logits, int64_t slots, int32_t end_id, int64_t min_tokens,
                       const std::vector<const Automaton*>& constraints) {
  if (slots < 1) throw py::value_error("logits: expected at least one slot");
  check_end_id(end_id, logits.cols);
  if (min_tokens < 0 || min_tokens > slots) {
    throw py::value_error("min_tokens: expected 0 to the number of slots " + std::to_string(slots) +
                          ", got " + std::to_string(min_tokens));
  }
  SlotSearch search;
  search.logits = logits;
  search.passages = logits.rows / slots;
  search.slots = slots;
  search.constraints = constraints.data();
  search.end_id = end_id;
  search.min_tokens = min_tokens;
  check_size("constraint", constraints.size(), search.passages);
  return search;
}

// Tokens [passages, width, slots], lengths and scores [passages, width]; width 0: greedy.
py::tuple bind_slots(py::handle logits, int64_t slots, int32_t end_id, int64_t min_tokens,
                     const std::vector<const PyAutomaton*>& constraints, int64_t width) {
  const Tensor tensor(logits, "logits");
  const std::vector<const Automaton*> automata = automata_of(constraints);
  const SlotSearch search = slot_search(tensor.rows(), slots, end_id, min_tokens, automata);
  const int64_t answers = width == 0 ? 1 : width;
  py::array_t<int32_t> tokens({search.passages, answers, slots});
  py::array_t<int32_t> lengths({search.passages, answers});
  py::array_t<float> scores({search.passages, answers});
  const SlotAnswers out{tokens.mutable_data(), lengths.mutable_data(), scores.mutable_data()};
  {
    const py::gil_scoped_release release;
    if (width == 0) {
      slot_argmax(search, out);
    } else {
      slot_topk(search, width, out);
    }
  }
  return py::make_tuple(tokens, lengths, scores);
}

py::tuple bind_slot_argmax(py::handle logits, int64_t slots, int32_t end_id, int64_t min_tokens,
                           const std::vector<const PyAutomaton*>& constraints) {
  return bind_slots(logits, slots, end_id, min_tokens, constraints, 0);
}

py::tuple bind_slot_topk(py::handle logits, int64_t slots, int32_t end_id, int64_t min_tokens,
                         const std::vector<const PyAutomaton*>& constraints, int64_t k) {
  check_at_least("k", k, 1);
  for (const PyAutomaton* constraint : constraints) {
    if (constraint == nullptr) throw py::value_error("constraint: expected one per passage");
  }
  return bind_slots(logits, slots, end_id, min_tokens, constraints, k);
}

py::tuple bind_best_spans(py::handle start, py::handle end, int64_t k, int64_t max_length,
                          const py::object& mask, int64_t null_position) {
  const Tensor start_tensor(start, "start");
  const Tensor end_tensor(end, "end");
  SpanScores spans;
  spans.start = start_tensor.rows();
  spans.end = end_tensor.rows();
  const Rows& rows = spans.start;
  if (spans.end.rows != rows.rows || spans.end.cols != rows.cols) {
    throw py::value_error("end: expected the shape of start, [" + std::to_string(rows.rows) + ", " +
                          std::to_string(rows.cols) + "], got [" + std::to_string(spans.end.rows) +
                          ", " + std::to_string(spans.end.cols) + "]");
  }
  check_at_least("k", k, 1);
  check_at_least("max_length", max_length, 1);
  if (null_position < -1 || null_position >= rows.cols) {
    throw py::value_error("null_position: expected a position below " + std::to_string(rows.cols) +
                          ", got " + std::to_string(null_position));
  }
  std::vector<uint8_t> mask_values;
  if (!mask.is_none()) {
    mask_values = uint8_values(mask, "mask");
    check_size("mask", mask_values.size(), rows.rows * rows.cols);
    spans.mask = mask_values.data();
  }
  spans.null_position = null_position;
  spans.max_length = max_length;
  spans.k = k;
  py::array_t<float> scores({rows.rows, k});
  py::array_t<int32_t> starts({rows.rows, k}), ends({rows.rows, k});
  py::array_t<float> null_scores(rows.rows);
  float* score_data = scores.mutable_data();
  int32_t* start_data = starts.mutable_data();
  int32_t* end_data = ends.mutable_data();
  float* null_data = null_scores.mutable_data();
  {
    const py::gil_scoped_release release;
    best_spans(spans, score_data, start_data, end_data, null_data);
  }
  return py::make_tuple(scores, starts, ends, null_scores);
}

py::tuple bind_attention_sum(py::handle logits, py::handle word_ids, int64_t k, py::handle mask,
                             py::handle lengths) {
  const Tensor tensor(logits, "logits");
  const Rows rows = tensor.rows();
  const auto check_size = [](const char* name, size_t got, int64_t expected) {
    if (static_cast<int64_t>(got) == expected) return;
    throw py::value_error(std::string(name) + ": expected " + std::to_string(expected) +
                          " numbers, got " + std::to_string(got));
  };
  const std::vector<int32_t> word_values = int32_values(word_ids, "word_ids");
  check_size("word_ids", word_values.size(), rows.rows * rows.cols);
  std::vector<uint8_t> mask_values;
  std::vector<int64_t> length_values;
  AttentionSum input;
  input.logits = rows;
  input.word_ids = word_values.data();
  if (!mask.is_none()) {
    mask_values = uint8_values(mask, "mask");
    check_size("mask", mask_values.size(), rows.rows * rows.cols);
    input.mask = mask_values.data();
  }
  if (!lengths.is_none()) {
    length_values = int64_values(lengths, "lengths");
    check_size("lengths", length_values.size(), rows.rows);
    input.lengths = length_values.data();
  }
  check_at_least("k", k, 1);
  py::array_t<int32_t> words({rows.rows, k});
  py::array_t<double> probs({rows.rows, k});
  py::array_t<int32_t> first({rows.rows, k});
  int32_t* word_data = words.mutable_data();
  double* prob_data = probs.mutable_data();
  int32_t* first_data = first.mutable_data();
  {
    const py::gil_scoped_release release;
    attention_sum(input, k, word_data, prob_data, first_data);
  }
  return py::make_tuple(words, probs, first);
}

}  // namespace

void register_ops(py::module_& module) {
  module.def("topk", &bind_topk<topk>, py::arg("x"), py::arg("k"));
  module.def("log_softmax_topk", &bind_topk<log_softmax_topk>, py::arg("x"), py::arg("k"));
  // noconvert: a converted copy would be written to in vain.
  module.def("topk_merge", &bind_topk_merge, py::arg("scores"), py::arg("first_id"),
             py::arg("values").noconvert(), py::arg("ids").noconvert());
  module.def("inner_products", &bind_inner_products, py::arg("queries"), py::arg("corpus"),
             py::arg("ids"));
  module.def("row_stats", &bind_row_stats, py::arg("x"));
  module.def("beam_step", &bind_beam_step, py::arg("logits"), py::arg("scores"),
             py::arg("passages"), py::arg("hypotheses"), py::arg("beam_size"), py::arg("end_id"),
             py::arg("vote"), py::arg("weights"), py::arg("constraints"), py::arg("states"),
             py::arg("allow_end"));
  module.def("slot_argmax", &bind_slot_argmax, py::arg("logits"), py::arg("slots"),
             py::arg("end_id"), py::arg("min_tokens"), py::arg("constraints"));
  module.def("slot_topk", &bind_slot_topk, py::arg("logits"), py::arg("slots"), py::arg("end_id"),
             py::arg("min_tokens"), py::arg("constraints"), py::arg("k"));
  module.def("attention_sum", &bind_attention_sum, py::arg("logits"), py::arg("word_ids"),
             py::arg("k"), py::arg("mask"), py::arg("lengths"));
  module.def("best_spans", &bind_best_spans, py::arg("start"), py::arg("end"), py::arg("k"),
             py::arg("max_length"), py::arg("mask"), py::arg("null_position"));
}

}  // namespace fastmrc::bindings
