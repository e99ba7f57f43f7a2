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

// A sum and what rounding took from it (Knuth's two-sum: unlike a comparison of the terms, which
// nothing foretells, it takes no branch).
struct Sum {
  double high = 0, low = 0;

  void add(double x) {
    const double next = high + x;
    const double added = next - high;
    low += (high - (next - added)) + (x - added);
    high = next;
  }
  double value() const { return high + low; }
};

// The words of one row, in the order of their first positions.
class WordSums {
 public:
  // Adds up the weights of `count` positions by word; returns the first position of a negative
  // word, -1 if there is none.
  int32_t sum(const int32_t* positions, const int32_t* words, const double* weights,
              int64_t count) {
    int bits = 2;
    while ((int64_t{1} << bits) < 2 * count) ++bits;
    const size_t mask = (size_t{1} << bits) - 1;
    keys_.assign(mask + 1, -1);
    if (slots_.size() <= mask) slots_.resize(mask + 1);
    if (entries_.size() < static_cast<size_t>(count)) entries_.resize(static_cast<size_t>(count));
    int32_t* const keys = keys_.data();
    int32_t* const slots = slots_.data();
    Entry* const entries = entries_.data();
    int32_t found = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int32_t position = positions[j];
      const int32_t word = words[position];
      if (word < 0) return position;
      size_t at = (static_cast<uint32_t>(word) * 2654435769u) >> (32 - bits);
      // One branch asks whether the slot is of another word, which is rare. Whether a word is new,
      // nothing foretells: no branch for that.
      while ((keys[at] != word) & (keys[at] >= 0)) at = (at + 1) & mask;
      const bool is_new = keys[at] < 0;
      const int32_t i = is_new ? found : slots[at];
      keys[at] = word;
      slots[at] = i;
      entries[found] = {Sum(), word, position};  // overwritten unless it is new
      entries[i].sum.add(weights[j]);
      found += is_new ? 1 : 0;
    }
    found_ = found;
    return -1;
  }

  // Writes the k words of the largest sums; equal ones by first position.
  void write_largest(int64_t k, int32_t* words, double* probs, int32_t* first) {
    Sum total;
    ranked_.resize(static_cast<size_t>(found_));
    for (size_t j = 0; j < ranked_.size(); ++j) {
      ranked_[j] = {entries_[j].sum.value(), j};
      total.add(ranked_[j].value);
    }
    const auto kept = std::min(k, static_cast<int64_t>(ranked_.size()));
    std::partial_sort(ranked_.begin(), ranked_.begin() + kept, ranked_.end());
    for (int64_t j = 0; j < kept; ++j) {
      const Ranked& best = ranked_[static_cast<size_t>(j)];
      words[j] = entries_[best.entry].word;
      first[j] = entries_[best.entry].first;
      probs[j] = best.value / total.value();
    }
    std::fill(words + kept, words + k, -1);
    std::fill(first + kept, first + k, -1);
    std::fill(probs + kept, probs + k, 0.0);
  }

 private:
  struct Entry {
    Sum sum;
    int32_t word, first;
  };
  struct Ranked {
    double value;
    size_t entry;

    bool operator<(const Ranked& other) const {
      return value != other.value ? value > other.value : entry < other.entry;
    }
  };

  std::vector<int32_t> keys_;   // open addressing: the word of a slot, -1 if it is free
  std::vector<int32_t> slots_;  // its entry
  std::vector<Entry> entries_;  // the first found_ are in use
  int32_t found_ = 0;
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
  bool sound = true, masked = false;  // of all at once, as nearly always all are sound
  for (const float logit : logits) {
    sound &= logit < INFINITY;
    masked |= logit == -INFINITY;
  }
  for (size_t j = 0; !sound && j < logits.size(); ++j) {
    if (logits[j] < INFINITY) continue;
    refuse("logits: expected numbers below infinity, got " + std::to_string(logits[j]), row,
           positions[j]);
  }
  if (!masked) return;
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
