// Faults of the input that only the device sees.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace fastmrc::cuda {

enum class Fault : uint8_t {
  kNan = 1,
  kInfinity = 2,
  kMasked = 3,
  kNegativeWord = 4,
  kToken = 5,
  kEndToken = 6,
  kNanEnd = 7,
  kInfinityEnd = 8,
  kLength = 9,
  kState = 10,
  kNanOnly = 11,  // where infinity is no fault
};

// A call's fault: row << 8 | kind of the first row at fault, kNoFault while there is none. Kernels
// note it where they find it and go on; whoever reads the results reads it with them.
constexpr int64_t kNoFault = std::numeric_limits<int64_t>::max();

// What to tell the caller, in the words of the CPU's checks where the device knows as much; `name`
// is what it calls its rows. Empty for kNoFault.
inline std::string fault_message(int64_t code, const std::string& name, int64_t vocabulary_size,
                                 int32_t end_id) {
  if (code == kNoFault) return "";
  const std::string row = std::to_string(code >> 8);
  const std::string below = ": expected numbers below infinity, got ";
  switch (static_cast<Fault>(code & 0xff)) {
    case Fault::kNan:
      return name + below + "NaN in row " + row;
    case Fault::kNanOnly:
      return name + ": expected no NaN, got NaN in row " + row;
    case Fault::kInfinity:
      return name + below + "inf in row " + row;
    case Fault::kMasked:
      return name + ": expected a finite entry in every row, got only -inf in row " + row;
    case Fault::kNegativeWord:
      return "word_ids: expected 0 or more, got a negative one in row " + row;
    case Fault::kToken:
      return "constraint: expected tokens below the vocabulary size " +
             std::to_string(vocabulary_size) + ", got another one after row " + row;
    case Fault::kEndToken:
      return "constraint: expected no end token " + std::to_string(end_id) +
             " inside a sequence, got one after row " + row;
    case Fault::kNanEnd:
      return "end" + below + "NaN in row " + row;
    case Fault::kInfinityEnd:
      return "end" + below + "inf in row " + row;
    case Fault::kLength:
      return "lengths: expected 0 to the number of positions, got another number in row " + row;
    case Fault::kState:
      return "states: expected -1 or a state of the automaton, got another number at " + row;
  }
  return name + ": unknown fault " + std::to_string(code);
}

}  // namespace fastmrc::cuda
