#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "fastmrc/automaton.h"
#include "fastmrc/beam_search.h"

namespace fastmrc::bindings {

// What Python sees as an automaton, whichever builder made it.
class PyAutomaton {
 public:
  virtual ~PyAutomaton() = default;
  virtual const Automaton& automaton() const = 0;
};

// The core's automata, null where Python gave None; valid while the Python objects live.
std::vector<const Automaton*> automata_of(const std::vector<const PyAutomaton*>& constraints);

Vote parse_vote(const std::string& name);
Finish parse_finish(const std::string& name);

void register_automata(pybind11::module_& module);
void register_ops(pybind11::module_& module);
void register_beam_search(pybind11::module_& module);
void register_sampling(pybind11::module_& module);

}  // namespace fastmrc::bindings
