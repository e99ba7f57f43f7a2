#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "fastmrc/span_index.h"
#include "fastmrc/text_index.h"
#include "fastmrc/trie.h"

namespace fastmrc::bindings {
namespace {

// Offsets of `count` sequences, count + 1 of them, checked for size here and for order by the core.
int64_t count_of(const std::vector<int64_t>& offsets, size_t items, const char* name = "tokens") {
  if (offsets.empty() || offsets.back() != static_cast<int64_t>(items)) {
    throw py::value_error(
        std::string("offsets: expected at least one entry and the last to be the number of ") +
        name + ", " + std::to_string(items));
  }
  return static_cast<int64_t>(offsets.size()) - 1;
}

class PySpanIndex : public PyAutomaton {
 public:
  PySpanIndex(const std::vector<int32_t>& tokens, const std::vector<int64_t>& offsets)
      : index_(tokens.data(), offsets.data(),
               static_cast<int32_t>(count_of(offsets, tokens.size()))) {}
  const Automaton& automaton() const override { return index_.automaton(); }
  const SpanIndex& index() const { return index_; }

 private:
  SpanIndex index_;
};

class PyTrie : public PyAutomaton {
 public:
  PyTrie(const std::vector<int32_t>& tokens, const std::vector<int64_t>& offsets)
      : automaton_(build_trie(tokens.data(), offsets.data(), count_of(offsets, tokens.size()))) {}
  const Automaton& automaton() const override { return automaton_; }

 private:
  Automaton automaton_;
};

// Of every token sequence that spells a piece of a passage.
class PyTextIndex : public PyAutomaton {
 public:
  PyTextIndex(const std::vector<uint8_t>& text, const std::vector<int64_t>& offsets,
              const TokenSpellings& first, const TokenSpellings& following)
      : automaton_(build_text_index(text.data(), offsets.data(),
                                    static_cast<int32_t>(count_of(offsets, text.size(), "bytes")),
                                    first, following)) {}
  const Automaton& automaton() const override { return automaton_; }

 private:
  Automaton automaton_;
};

std::unique_ptr<PyTextIndex> build_text(py::handle text, py::handle offsets,
                                        const TokenSpellings& first,
                                        const TokenSpellings& following) {
  const std::vector<uint8_t> bytes = uint8_values(text, "text");
  const std::vector<int64_t> offset_values = int64_values(offsets, "offsets");
  const py::gil_scoped_release release;
  return std::make_unique<PyTextIndex>(bytes, offset_values, first, following);
}

std::unique_ptr<TokenSpellings> build_spellings(py::handle ids, py::handle text,
                                                py::handle offsets) {
  const std::vector<int32_t> id_values = int32_values(ids, "ids");
  const std::vector<uint8_t> bytes = uint8_values(text, "text");
  const std::vector<int64_t> offset_values = int64_values(offsets, "offsets");
  const int64_t count = count_of(offset_values, bytes.size(), "bytes");
  if (count != static_cast<int64_t>(id_values.size())) {
    throw py::value_error("ids: expected one per spelling, " + std::to_string(count) + ", got " +
                          std::to_string(id_values.size()));
  }
  const py::gil_scoped_release release;
  return std::make_unique<TokenSpellings>(id_values.data(), bytes.data(), offset_values.data(),
                                          static_cast<int32_t>(count));
}

template <typename T>
std::unique_ptr<T> build(py::handle tokens, py::handle offsets) {
  const std::vector<int32_t> token_values = int32_values(tokens, "tokens");
  const std::vector<int64_t> offset_values = int64_values(offsets, "offsets");
  const py::gil_scoped_release release;
  return std::make_unique<T>(token_values, offset_values);
}

py::array_t<int32_t> to_pairs(const std::vector<Occurrence>& found) {
  py::array_t<int32_t> result({static_cast<py::ssize_t>(found.size()), py::ssize_t{2}});
  auto out = result.mutable_unchecked<2>();
  for (size_t i = 0; i < found.size(); ++i) {
    out(static_cast<py::ssize_t>(i), 0) = found[i].passage;
    out(static_cast<py::ssize_t>(i), 1) = found[i].position;
  }
  return result;
}

py::array_t<int32_t> advance(const PyAutomaton& self, py::handle states, py::handle tokens) {
  const Tensor state_tensor(states, "states");
  const Tensor token_tensor(tokens, "tokens");
  int64_t n = 0, m = 0;
  const int32_t* state_data = state_tensor.int32_vector(&n);
  const int32_t* token_data = token_tensor.int32_vector(&m);
  if (n != m) {
    throw py::value_error("tokens: expected one per state, " + std::to_string(n) + ", got " +
                          std::to_string(m));
  }
  py::array_t<int32_t> result(n);
  int32_t* out = result.mutable_data();
  const py::gil_scoped_release release;
  self.automaton().advance(state_data, token_data, n, out);
  return result;
}

py::tuple allowed(const PyAutomaton& self, py::handle states) {
  const std::vector<int32_t> state_values = int32_values(states, "states");
  std::vector<int64_t> offsets = {0};
  std::vector<int32_t> tokens;
  for (const int32_t state : state_values) {
    const AllowedTokens edges = self.automaton().allowed(state);
    tokens.insert(tokens.end(), edges.begin, edges.end);
    offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
  return py::make_tuple(to_array(offsets), to_array(tokens));
}

py::array_t<bool> is_final(const PyAutomaton& self, py::handle states) {
  const std::vector<int32_t> state_values = int32_values(states, "states");
  py::array_t<bool> result(static_cast<py::ssize_t>(state_values.size()));
  for (size_t i = 0; i < state_values.size(); ++i) {
    result.mutable_at(static_cast<py::ssize_t>(i)) = self.automaton().is_final(state_values[i]);
  }
  return result;
}

// The arrays of automata laid end to end, for a device: edge_begin, edge_token, edge_target,
// final_flags, first_state, first_edge (csrc/cuda/automata.h).
py::tuple pack_automata(const std::vector<const PyAutomaton*>& automata) {
  std::vector<int64_t> first_state = {0}, first_edge = {0};
  for (const PyAutomaton* own : automata) {
    if (own == nullptr) throw py::type_error("automata: expected automata, got None");
    first_state.push_back(first_state.back() + own->automaton().num_states());
    first_edge.push_back(first_edge.back() + own->automaton().num_edges());
  }
  const auto count = static_cast<int64_t>(automata.size());
  py::array_t<int32_t> begin(first_state.back() + count), token(first_edge.back()),
      target(first_edge.back());
  py::array_t<uint8_t> flags(first_state.back());
  int32_t* begin_to = begin.mutable_data();
  for (size_t i = 0; i < automata.size(); ++i) {
    const Automaton& own = automata[i]->automaton();
    begin_to = std::copy(own.edge_begin().begin(), own.edge_begin().end(), begin_to);
    std::copy(own.edge_token().begin(), own.edge_token().end(),
              token.mutable_data() + first_edge[i]);
    std::copy(own.edge_target().begin(), own.edge_target().end(),
              target.mutable_data() + first_edge[i]);
    std::copy(own.final_flags().begin(), own.final_flags().end(),
              flags.mutable_data() + first_state[i]);
  }
  return py::make_tuple(begin, token, target, flags, to_array(first_state), to_array(first_edge));
}

}  // namespace

std::vector<const Automaton*> automata_of(const std::vector<const PyAutomaton*>& constraints) {
  std::vector<const Automaton*> automata;
  for (const PyAutomaton* constraint : constraints) {
    automata.push_back(constraint == nullptr ? nullptr : &constraint->automaton());
  }
  return automata;
}

void register_automata(py::module_& module) {
  py::class_<PyAutomaton>(module, "Automaton")
      .def("advance", &advance, py::arg("states"), py::arg("tokens"))
      .def("allowed", &allowed, py::arg("states"))
      .def("is_final", &is_final, py::arg("states"))
      .def_property_readonly("num_states",
                             [](const PyAutomaton& self) { return self.automaton().num_states(); })
      .def_property_readonly("num_edges",
                             [](const PyAutomaton& self) { return self.automaton().num_edges(); });
  py::class_<PySpanIndex, PyAutomaton>(module, "SpanIndex")
      .def(py::init(&build<PySpanIndex>), py::arg("tokens"), py::arg("offsets"))
      .def(
          "occurrences",
          [](const PySpanIndex& self, py::handle span) {
            const std::vector<int32_t> tokens = int32_values(span, "span");
            return to_pairs(
                self.index().occurrences(tokens.data(), static_cast<int64_t>(tokens.size())));
          },
          py::arg("span"));
  py::class_<PyTrie, PyAutomaton>(module, "Trie")
      .def(py::init(&build<PyTrie>), py::arg("tokens"), py::arg("offsets"));
  py::class_<TokenSpellings>(module, "TokenSpellings")
      .def(py::init(&build_spellings), py::arg("ids"), py::arg("text"), py::arg("offsets"));
  py::class_<PyTextIndex, PyAutomaton>(module, "TextIndex")
      .def(py::init(&build_text), py::arg("text"), py::arg("offsets"), py::arg("first"),
           py::arg("following"));
  module.def("pack_automata", &pack_automata, py::arg("automata"));
  module.def(
      "find_occurrences",
      [](py::handle tokens, py::handle offsets, py::handle span) {
        const std::vector<int32_t> token_values = int32_values(tokens, "tokens");
        const std::vector<int64_t> offset_values = int64_values(offsets, "offsets");
        const std::vector<int32_t> span_values = int32_values(span, "span");
        const int64_t count = count_of(offset_values, token_values.size());
        return to_pairs(find_occurrences(token_values.data(), offset_values.data(),
                                         static_cast<int32_t>(count), span_values.data(),
                                         static_cast<int64_t>(span_values.size())));
      },
      py::arg("tokens"), py::arg("offsets"), py::arg("span"));
}

}  // namespace fastmrc::bindings
