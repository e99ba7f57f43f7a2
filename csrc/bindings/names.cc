// Names of options, as Python gives them.
#include "bindings/register.h"

namespace fastmrc::bindings {

namespace py = pybind11;

Vote parse_vote(const std::string& name) {
  if (name == "original") return Vote::kOriginal;
  if (name == "mean") return Vote::kMean;
  if (name == "max") return Vote::kMax;
  if (name == "product") return Vote::kProduct;
  if (name == "weighted") return Vote::kWeighted;
  throw py::value_error("vote: expected original, mean, max, product or weighted, got " + name);
}

Finish parse_finish(const std::string& name) {
  if (name == "original") return Finish::kOriginal;
  if (name == "pool") return Finish::kPool;
  throw py::value_error("finish: expected original or pool, got " + name);
}

}  // namespace fastmrc::bindings
