// Probabilities of words that occur at several positions. Weights are computed together in double
// precision and added up per word in a small table of open addressing; sums carry what rounding
// took from them, so that those of the same weights, rounded once at the end, are equal in any
// order but for cases far rarer than tests can find, and words tie where their weights do.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {
namespace {

// Knuth's two-sum: adds x to `high`, and to `low` what rounding took. Unlike a comparison of the
// terms, which nothing foretells, it takes no branch.
void add(double& high, double& low, double x) {
  const double next = high + x;
  const double added = next - high;
  low += (high - (next - added)) + (x - added);
  high = next;
}

// The words of one row, in the order of their first positions.
class WordSums {
 public:
  // Adds up the weights of `count` positions by word; returns the first position of a negative
  // word, -1 if there is none.
  int32_t sum(const int32_t* positions, const int32_t* words, const double* weights,
              int64_t count) {
    const int32_t negative = find_entries(positions, words, count);
    if (negative >= 0) return negative;
    high_.assign(static_cast<size_t>(found_), 0.0);
    low_.assign(static_cast<size_t>(found_), 0.0);
    // Apart from the look-up, whose stores and loads the processor would else wait for.
    for (int64_t j = 0; j < count; ++j) {
      const auto i = static_cast<size_t>(entry_of_[static_cast<size_t>(j)]);
      add(high_[i], low_[i], weights[j]);
    }
    return -1;
  }

  // Writes the k words of the largest sums; equal ones by first position.
  void write_largest(int64_t k, int32_t* words, double* probs, int32_t* first) {
    double total = 0, lost = 0;
    ranked_.resize(static_cast<size_t>(found_));
    for (size_t j = 0; j < ranked_.size(); ++j) {
      ranked_[j] = {high_[j] + low_[j], j};
      add(total, lost, ranked_[j].value);
    }
    total += lost;
    const auto kept = std::min(k, static_cast<int64_t>(ranked_.size()));
    std::partial_sort(ranked_.begin(), ranked_.begin() + kept, ranked_.end());
    for (int64_t j = 0; j < kept; ++j) {
      const Ranked& best = ranked_[static_cast<size_t>(j)];
      words[j] = word_[best.entry];
      first[j] = first_[best.entry];
      probs[j] = best.value / total;
    }
    std::fill(words + kept, words + k, -1);
    std::fill(first + kept, first + k, -1);
    std::fill(probs + kept, probs + k, 0.0);
  }

 private:
  // Numbers the words by their first positions and notes which one stands at each position; returns
  // the first position of a negative word, -1 if there is none.
  int32_t find_entries(const int32_t* positions, const int32_t* words, int64_t count) {
    int bits = 2;
    while ((int64_t{1} << bits) < 2 * count) ++bits;
    const size_t mask = (size_t{1} << bits) - 1;
    table_.assign(mask + 1, kFree);
    for (std::vector<int32_t>* own : {&entry_of_, &word_, &first_}) {
      if (own->size() <= static_cast<size_t>(count)) own->resize(static_cast<size_t>(count) + 1);
    }
    int64_t* const table = table_.data();
    int32_t* const entry_of = entry_of_.data();
    int32_t* const word_of = word_.data();
    int32_t* const first = first_.data();
    int32_t found = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int32_t position = positions[j];
      const int32_t word = words[position];
      if (word < 0) return position;
      size_t at = (static_cast<uint32_t>(word) * 2654435769u) >> (32 - bits);
      // Above 0 if the slot is of another word, which is rare; below if it is free, as words are
      // not negative. Whether a word is new, nothing foretells: no branch for that.
      int64_t slot = table[at];
      int32_t other = static_cast<int32_t>(slot >> 32) ^ word;
      while (other > 0) {
        at = (at + 1) & mask;
        slot = table[at];
        other = static_cast<int32_t>(slot >> 32) ^ word;
      }
      const bool is_new = other < 0;
      const int64_t own = is_new ? (int64_t{word} << 32) | found : slot;
      table[at] = own;
      entry_of[j] = static_cast<int32_t>(own);
      word_of[found] = word;  // kept if it is new
      first[found] = position;
      found += is_new ? 1 : 0;
    }
    found_ = found;
    return -1;
  }

  struct Ranked {
    double value;
    size_t entry;

    bool operator<(const Ranked& other) const {
      return value != other.value ? value > other.value : entry < other.entry;
    }
  };

  static constexpr int64_t kFree = -1;

  std::vector<int64_t> table_;     // open addressing: word << 32 | entry, or kFree
  std::vector<int32_t> entry_of_;  // of each position
  int32_t found_ = 0;              // entries in use
  std::vector<int32_t> word_, first_;
  std::vector<double> high_, low_;  // sums, and what rounding took from them
  std::vector<Ranked> ranked_;
};

struct Scratch {
  std::vector<int32_t> positions;
  std::vector<float> logits;
  std::vector<double> weights;
  WordSums sums;
};

[[noreturn]] void refuse(const std::string& what, int64_t row, int32_t position) {
  throw std::invalid_argument(what + " at row " + std::to_string(row) + ", position " +
                              std::to_string(position));
}

// Lists the positions of a row that count, and their logits. Those of -inf have no weight.
void list_positions(const AttentionSum& input, int64_t row, Scratch& scratch) {
  const int64_t cols = input.logits.cols;
  const int64_t length = input.lengths == nullptr ? cols : input.lengths[row];
  std::vector<int32_t>& positions = scratch.positions;
  positions.resize(static_cast<size_t>(length));
  std::iota(positions.begin(), positions.end(), 0);
  if (input.mask != nullptr) {
    const uint8_t* mask = input.mask + row * cols;
    positions.erase(std::remove_if(positions.begin(), positions.end(),
                                   [mask](int32_t i) { return mask[i] == 0; }),
                    positions.end());
  }
  std::vector<float>& logits = scratch.logits;
  logits.resize(positions.size());
  kernels().gather(input.logits.row(row), input.logits.dtype, positions.data(),
                   static_cast<int64_t>(positions.size()), logits.data());
  int32_t unsound = 0, masked = 0;  // of all at once, as nearly always all are sound
  for (const float logit : logits) {
    unsound |= logit < INFINITY ? 0 : 1;
    masked |= logit == -INFINITY ? 1 : 0;
  }
  for (size_t j = 0; unsound != 0 && j < logits.size(); ++j) {
    if (logits[j] < INFINITY) continue;
    refuse("logits: expected numbers below infinity, got " + std::to_string(logits[j]), row,
           positions[j]);
  }
  if (masked == 0) return;
  size_t kept = 0;
  for (size_t j = 0; j < positions.size(); ++j) {
    if (logits[j] == -INFINITY) continue;
    positions[kept] = positions[j];
    logits[kept++] = logits[j];
  }
  positions.resize(kept);
  logits.resize(kept);
}

void sum_row(const AttentionSum& input, int64_t row, Scratch& scratch) {
  list_positions(input, row, scratch);
  const size_t count = scratch.positions.size();
  scratch.weights.resize(count);
  kernels().exp_to_largest(scratch.logits.data(), static_cast<int64_t>(count),
                           scratch.weights.data());
  const int32_t* words = input.word_ids + row * input.logits.cols;
  const int32_t negative = scratch.sums.sum(scratch.positions.data(), words, scratch.weights.data(),
                                            static_cast<int64_t>(count));
  if (negative < 0) return;
  refuse("word_ids: expected 0 or more, got " + std::to_string(words[negative]), row, negative);
}

}  // namespace

void attention_sum(const AttentionSum& input, int64_t k, int32_t* words, double* probs,
                   int32_t* first) {
  check_at_least("k", k, 1);
  const int64_t cols = input.logits.cols;
  for (int64_t i = 0; input.lengths != nullptr && i < input.logits.rows; ++i) {
    if (input.lengths[i] >= 0 && input.lengths[i] <= cols) continue;
    throw std::invalid_argument("lengths: expected 0 to " + std::to_string(cols) + ", got " +
                                std::to_string(input.lengths[i]));
  }
  parallel_for_work(input.logits.rows * cols, input.logits.rows, [&](int64_t row) {
    thread_local Scratch scratch;
    Scratch& own = scratch;  // looked up once
    sum_row(input, row, own);
    own.sums.write_largest(k, words + row * k, probs + row * k, first + row * k);
  });
}

}  // namespace fastmrc
