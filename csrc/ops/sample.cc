#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "core/philox.h"
#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {
namespace {

// Tokens whose weights are added up before it is known which of them is drawn.
constexpr int64_t kChunk = 1024;
// Among so many of the likeliest tokens the nucleus is looked for first.
constexpr int64_t kSmallNucleus = 64;

struct Entry {
  float logit;
  int32_t token;
};

bool likelier(const Entry& a, const Entry& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

// The distribution after one row of logits: either a list of tokens or the whole row in chunks.
class Distribution {
 public:
  // Makes the distribution of row `i`; false if nothing can be drawn.
  bool prepare(const SampleStep& step, int64_t i);

  // The token at which the running sum of the weights, by rising token, exceeds u times the total.
  int32_t draw(double u) const {
    const size_t place = first_above(sums_, u * sums_.back());
    return whole_row_ ? token_in_chunk(place, u * sums_.back()) : entries_[place].token;
  }

  double log_prob(int32_t token) const {
    const float logit = kernels_.load_one(row_, dtype_, token);
    return static_cast<double>(logit) - stats_.logsumexp;
  }

 private:
  // The first place whose sum is above the target; else the last one that adds something.
  static size_t first_above(const std::vector<double>& sums, double target) {
    auto found = std::upper_bound(sums.begin(), sums.end(), target);
    if (found == sums.end()) found = std::lower_bound(sums.begin(), sums.end(), sums.back());
    return static_cast<size_t>(found - sums.begin());
  }

  double weight(float logit) const {
    return std::exp((static_cast<double>(logit) - static_cast<double>(max_)) / temperature_);
  }

  bool excluded(int32_t token) const { return token == excluded_; }

  void list_allowed(const SampleStep& step, const Automaton& constraint, int32_t state,
                    bool allow_end);
  void read_row(const SampleStep& step, int64_t i, int64_t count);
  int64_t make_room(int64_t count);
  void keep_largest(int64_t count);
  void list_nucleus(const SampleStep& step, int64_t i);
  void select_nucleus(double target);
  bool cut_nucleus(double top_p, double total);
  void add_up_entries();
  void add_up_row();
  double chunk_weight(int64_t begin, int64_t end) const;
  int32_t token_in_chunk(size_t chunk, double target) const;

  const Kernels& kernels_ = kernels();
  const void* row_ = nullptr;
  DType dtype_ = DType::kFloat32;
  int64_t cols_ = 0;
  RowStats stats_;
  float max_ = 0;  // weights are relative to this logit
  double temperature_ = 1;
  int32_t excluded_ = -1;  // the end token where it is not allowed
  bool whole_row_ = false;
  std::vector<Entry> entries_;
  std::vector<double> sums_;  // running sums of the weights, by entry or by chunk
  std::vector<float> values_;
  std::vector<int32_t> ids_;
};

bool Distribution::prepare(const SampleStep& step, int64_t i) {
  row_ = step.logits.row(i);
  dtype_ = step.logits.dtype;
  cols_ = step.logits.cols;
  temperature_ = step.temperature;
  const bool allow_end = step.allow_end == nullptr || step.allow_end[i] != 0;
  excluded_ = allow_end ? -1 : step.end_id;
  whole_row_ = false;
  entries_.clear();
  const Automaton* constraint = step.constraints == nullptr ? nullptr : step.constraints[i];
  const int32_t state = step.states == nullptr ? Automaton::kRootState : step.states[i];
  // Without a constraint and a top_k one token is listed: the one that weights are relative to.
  read_row(step, i, constraint != nullptr ? 0 : std::max<int64_t>(1, step.top_k));
  if (state == Automaton::kDeadState) return false;
  if (constraint != nullptr) list_allowed(step, *constraint, state, allow_end);
  if (entries_.empty()) return false;
  if (constraint == nullptr && step.top_k == 0) {
    add_up_row();
    whole_row_ = step.top_p >= 1;
    if (!whole_row_) list_nucleus(step, i);
  } else if (step.top_p < 1) {
    double total = 0;
    for (const Entry& entry : entries_) total += weight(entry.logit);
    cut_nucleus(step.top_p, total);
  }
  if (!whole_row_) add_up_entries();
  return true;
}

void Distribution::list_allowed(const SampleStep& step, const Automaton& constraint, int32_t state,
                                bool allow_end) {
  const AllowedTokens allowed = constraint.allowed(state);
  check_allowed(allowed.begin, allowed.end, cols_, step.end_id);
  const auto add = [&](int32_t token) {
    const float logit = kernels_.load_one(row_, dtype_, token);
    if (logit > -INFINITY) entries_.push_back({logit, token});
  };
  for (const int32_t* token = allowed.begin; token < allowed.end; ++token) add(*token);
  if (allow_end && constraint.is_final(state)) add(step.end_id);
  if (entries_.empty()) return;
  const auto first = entries_.begin();
  if (step.top_k > 0 && static_cast<size_t>(step.top_k) < entries_.size()) {
    std::partial_sort(first, first + step.top_k, entries_.end(), likelier);
    entries_.resize(static_cast<size_t>(step.top_k));
  } else {
    std::sort(first, entries_.end(), likelier);
  }
  max_ = entries_.front().logit;
}

// Reads the statistics of the row and, with them, its `count` likeliest tokens.
void Distribution::read_row(const SampleStep& step, int64_t i, int64_t count) {
  if (count == 0) {
    stats_ = row_stats_of(step.logits, i);
  } else {
    const int64_t read = make_room(count);
    stats_ = stats_and_topk_of(step.logits, i, read, values_.data(), ids_.data());
    keep_largest(count);
  }
  if (stats_.argmax < 0) throw_all_masked(i);
}

// Returns how many entries to read for `count`, one more where one of them may be excluded.
int64_t Distribution::make_room(int64_t count) {
  const int64_t read = std::min(cols_, count + (excluded_ >= 0 ? 1 : 0));
  values_.resize(static_cast<size_t>(read));
  ids_.resize(static_cast<size_t>(read));
  return read;
}

// Makes entries of what was read.
void Distribution::keep_largest(int64_t count) {
  entries_.clear();
  for (size_t j = 0; j < ids_.size() && static_cast<int64_t>(entries_.size()) < count; ++j) {
    if (ids_[j] >= 0 && !excluded(ids_[j])) entries_.push_back({values_[j], ids_[j]});
  }
  if (!entries_.empty()) max_ = entries_.front().logit;
}

// Lists the likeliest tokens that reach the share top_p of the whole row.
void Distribution::list_nucleus(const SampleStep& step, int64_t i) {
  const double total = sums_.back();
  const int64_t read = make_room(kSmallNucleus);
  topk_of(step.logits, i, read, values_.data(), ids_.data());
  keep_largest(kSmallNucleus);
  if (cut_nucleus(step.top_p, total)) return;
  entries_.clear();
  for (int64_t v = 0; v < cols_; ++v) {
    const auto token = static_cast<int32_t>(v);
    const float logit = kernels_.load_one(row_, dtype_, v);
    if (logit > -INFINITY && !excluded(token)) entries_.push_back({logit, token});
  }
  select_nucleus((step.top_p - kNucleusSlack) * total);
}

// Keeps the likeliest entries whose weights reach `target`, or all; their order is undefined.
// Halves the stretch in which the last of them lies: no sort of the whole row.
void Distribution::select_nucleus(double target) {
  const auto begin = entries_.begin();
  auto low = begin, high = entries_.end();
  double below = 0;  // weights of the entries before `low`
  while (high - low > 1) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high, likelier);
    double half = 0;
    for (auto entry = low; entry < middle; ++entry) half += weight(entry->logit);
    if (below + half >= target) {
      high = middle;
    } else {
      below += half;
      low = middle;
    }
  }
  entries_.erase(high, entries_.end());
}

// Keeps the shortest beginning of the entries, which fall, whose weights reach top_p times the
// total; false if they do not.
bool Distribution::cut_nucleus(double top_p, double total) {
  double sum = 0;
  for (size_t j = 0; j < entries_.size(); ++j) {
    sum += weight(entries_[j].logit);
    if (sum >= (top_p - kNucleusSlack) * total) {
      entries_.resize(j + 1);
      return true;
    }
  }
  return false;
}

void Distribution::add_up_entries() {
  std::sort(entries_.begin(), entries_.end(),
            [](const Entry& a, const Entry& b) { return a.token < b.token; });
  sums_.clear();
  double sum = 0;
  for (const Entry& entry : entries_) {
    sum += weight(entry.logit);
    sums_.push_back(sum);
  }
}

void Distribution::add_up_row() {
  sums_.clear();
  double sum = 0;
  for (int64_t begin = 0; begin < cols_; begin += kChunk) {
    sum += chunk_weight(begin, std::min(cols_, begin + kChunk));
    sums_.push_back(sum);
  }
}

double Distribution::chunk_weight(int64_t begin, int64_t end) const {
  const auto part = [&](int64_t first, int64_t last) {
    return first < last ? kernels_.sum_exp(row_, dtype_, first, last, max_, temperature_) : 0.0;
  };
  if (excluded_ < begin || excluded_ >= end) return part(begin, end);
  return part(begin, excluded_) + part(excluded_ + 1, end);
}

// Weights in a chunk are added again in double precision, its beginning as before.
int32_t Distribution::token_in_chunk(size_t chunk, double target) const {
  double sum = chunk == 0 ? 0.0 : sums_[chunk - 1];
  const int64_t begin = static_cast<int64_t>(chunk) * kChunk;
  int32_t last = -1;
  for (int64_t v = begin; v < std::min(cols_, begin + kChunk); ++v) {
    const auto token = static_cast<int32_t>(v);
    const double own = excluded(token) ? 0.0 : weight(kernels_.load_one(row_, dtype_, v));
    if (own <= 0) continue;
    sum += own;
    last = token;
    if (sum > target) return token;
  }
  return last;
}

// Draws by row: those of row i are order[first[i], first[i + 1]).
void group_draws(const SampleStep& step, SampleWorkspace& space) {
  const auto rows = static_cast<size_t>(step.logits.rows);
  space.first.assign(rows + 1, 0);
  for (int64_t d = 0; d < step.draws; ++d) ++space.first[static_cast<size_t>(step.row(d)) + 1];
  for (size_t i = 0; i < rows; ++i) space.first[i + 1] += space.first[i];
  space.next.assign(space.first.begin(), space.first.end() - 1);
  space.order.resize(static_cast<size_t>(step.draws));
  for (int64_t d = 0; d < step.draws; ++d) {
    const auto slot = static_cast<size_t>(space.next[static_cast<size_t>(step.row(d))]++);
    space.order[slot] = d;
  }
}

}  // namespace

void check_truncation(int32_t top_k, double top_p, double temperature) {
  if (top_k < 0) {
    throw std::invalid_argument("top_k: expected at least 1, got " + std::to_string(top_k));
  }
  if (!(top_p > 0 && top_p <= 1)) {
    throw std::invalid_argument("top_p: expected a share above 0 and at most 1, got " +
                                std::to_string(top_p));
  }
  if (!(temperature > 0) || std::isinf(temperature)) {
    throw std::invalid_argument("temperature: expected a finite number above 0, got " +
                                std::to_string(temperature));
  }
}

void sample(const SampleStep& step, SampleWorkspace& space, int32_t* tokens, double* log_probs) {
  check_truncation(step.top_k, step.top_p, step.temperature);
  group_draws(step, space);
  parallel_for_work(2 * step.logits.rows * step.logits.cols, step.logits.rows, [&](int64_t i) {
    thread_local Distribution distribution;
    const int64_t begin = space.first[static_cast<size_t>(i)];
    const int64_t end = space.first[static_cast<size_t>(i) + 1];
    const bool possible = begin < end && distribution.prepare(step, i);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t d = space.order[static_cast<size_t>(at)];
      tokens[d] = -1;
      log_probs[d] = -INFINITY;
      if (!possible) continue;
      const double u = uniform(step.seed, step.stream(d), step.position(d));
      tokens[d] = distribution.draw(u);
      log_probs[d] = distribution.log_prob(tokens[d]);
    }
  });
}

}  // namespace fastmrc
