#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "core/thread_pool.h"
#include "fastmrc/ops.h"

namespace fastmrc {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Answer {
  float score = -kInf;
  std::vector<int32_t> tokens;
};

void write_answer(const SlotSearch& search, const SlotAnswers& answers, int64_t place,
                  const Answer& answer) {
  const bool found = answer.score > -kInf;
  int32_t* tokens = answers.tokens + place * search.slots;
  std::fill(tokens, tokens + search.slots, -1);
  if (found) std::copy(answer.tokens.begin(), answer.tokens.end(), tokens);
  answers.lengths[place] = found ? static_cast<int32_t>(answer.tokens.size()) : -1;
  answers.scores[place] = answer.score;
}

// --- greedy --------------------------------------------------------------------------------------

// The most likely token of a row so far, the lower id of equal ones.
struct Choice {
  float logit = -kInf;
  int32_t token = -1;

  void offer(float other_logit, int32_t other) {
    if (token < 0 || other_logit > logit || (other_logit == logit && other < token)) {
      logit = other_logit;
      token = other;
    }
  }
};

void offer_range(Choice& choice, const Rows& logits, int64_t row, int64_t begin, int64_t end) {
  if (begin >= end) return;
  Rows part = logits;
  part.cols = end - begin;
  part.data = static_cast<const unsigned char*>(logits.data) + begin * item_size(logits.dtype);
  const RowStats stats = kernels().row_stats(part.row(row), part.dtype, part.cols, nullptr);
  const bool masked = stats.argmax < 0;  // then the first one, of probability 0
  choice.offer(masked ? -kInf : stats.max,
               static_cast<int32_t>(begin) + (masked ? 0 : stats.argmax));
}

Choice choose(const SlotSearch& search, const AllowedTokens* allowed, bool allow_end, int64_t row,
              const RowStats& stats, std::vector<float>& gathered) {
  Choice choice;
  const Rows& logits = search.logits;
  if (allowed == nullptr) {
    if (allow_end || stats.argmax != search.end_id) return {stats.max, stats.argmax};
    offer_range(choice, logits, row, 0, search.end_id);
    offer_range(choice, logits, row, search.end_id + 1, logits.cols);
    return choice;
  }
  check_allowed(allowed->begin, allowed->end, logits.cols, search.end_id);
  gathered.resize(static_cast<size_t>(allowed->size()));
  kernels().gather(logits.row(row), logits.dtype, allowed->begin, allowed->size(), gathered.data());
  for (size_t i = 0; i < gathered.size(); ++i) choice.offer(gathered[i], allowed->begin[i]);
  if (allow_end) {
    choice.offer(kernels().load_one(logits.row(row), logits.dtype, search.end_id), search.end_id);
  }
  return choice;
}

Answer greedy_answer(const SlotSearch& search, int64_t passage, std::vector<float>& gathered) {
  const Automaton* constraint = search.constraints[passage];
  int32_t state = Automaton::kRootState;
  Answer answer;
  double sum = 0;
  for (int64_t slot = 0; slot < search.slots; ++slot) {
    const int64_t row = passage * search.slots + slot;
    const RowStats stats = row_stats_of(search.logits, row);
    if (stats.argmax < 0) throw_all_masked(row);
    AllowedTokens allowed{};
    if (constraint != nullptr) allowed = constraint->allowed(state);
    const bool allow_end =
        slot >= search.min_tokens && (constraint == nullptr || constraint->is_final(state));
    const Choice choice =
        choose(search, constraint == nullptr ? nullptr : &allowed, allow_end, row, stats, gathered);
    if (choice.token < 0) return answer;
    sum += std::exp(static_cast<double>(choice.logit) - stats.logsumexp);
    if (choice.token == search.end_id) {
      answer.score = static_cast<float>(sum / static_cast<double>(slot + 1));
      return answer;
    }
    answer.tokens.push_back(choice.token);
    if (constraint != nullptr) state = constraint->advance(state, choice.token);
  }
  const bool whole = constraint == nullptr || constraint->is_final(state);
  if (whole) answer.score = static_cast<float>(sum / static_cast<double>(search.slots));
  return answer;
}

// --- exact ---------------------------------------------------------------------------------------

// The tokens that a constraint holds.
struct TokenList {
  std::vector<int32_t> tokens;       // [n] ascending
  std::vector<int32_t> edge_column;  // [edges] index of each edge's token
};

TokenList list_tokens(const SlotSearch& search, const Automaton& constraint) {
  TokenList list;
  list.tokens = constraint.edge_token();
  std::sort(list.tokens.begin(), list.tokens.end());
  list.tokens.erase(std::unique(list.tokens.begin(), list.tokens.end()), list.tokens.end());
  check_allowed(list.tokens.data(), list.tokens.data() + list.tokens.size(), search.logits.cols,
                search.end_id);
  list.edge_column.reserve(constraint.edge_token().size());
  for (const int32_t token : constraint.edge_token()) {
    const auto at = std::lower_bound(list.tokens.begin(), list.tokens.end(), token);
    list.edge_column.push_back(static_cast<int32_t>(at - list.tokens.begin()));
  }
  return list;
}

// The probabilities of what the answers of one passage may hold.
struct SlotTable {
  const TokenList* list = nullptr;      // shared by the passages of one constraint
  std::vector<double> probability;      // [slots, n]
  std::vector<double> end_probability;  // [slots]
};

// Fills one slot of the table, while its row of logits is in the cache.
void read_slot(const SlotSearch& search, int64_t row, size_t slot, SlotTable& table) {
  const Rows& logits = search.logits;
  const RowStats stats = row_stats_of(logits, row);
  if (stats.argmax < 0) throw_all_masked(row);
  const std::vector<int32_t>& tokens = table.list->tokens;
  const size_t n = tokens.size();
  thread_local std::vector<float> gathered;
  gathered.resize(n);
  kernels().gather(logits.row(row), logits.dtype, tokens.data(), static_cast<int64_t>(n),
                   gathered.data());
  for (size_t i = 0; i < n; ++i) {
    table.probability[slot * n + i] = std::exp(static_cast<double>(gathered[i]) - stats.logsumexp);
  }
  const float end_logit = kernels().load_one(logits.row(row), logits.dtype, search.end_id);
  table.end_probability[slot] = std::exp(static_cast<double>(end_logit) - stats.logsumexp);
}

// Walks the answers of one passage depth first, tokens ascending: each once, in lexicographic
// order, so that of equal scores the one found first is the better one.
class ExactSearch {
 public:
  ExactSearch(const SlotSearch& search, int64_t passage, const SlotTable& table, int64_t width)
      : search_(search),
        constraint_(*search.constraints[passage]),
        table_(table),
        width_(static_cast<size_t>(width)) {
    const auto n = static_cast<std::ptrdiff_t>(table.list->tokens.size());
    auto slot = table.probability.begin();
    for (int64_t i = 0; i < search.slots; ++i, slot += n) {
      largest_.push_back(n == 0 ? 0.0 : *std::max_element(slot, slot + n));
    }
    for (int64_t length = 0; length <= search.slots; ++length) {
      const auto at = static_cast<size_t>(length);
      const bool ends = length < search.slots;
      end_.push_back(ends ? table.end_probability[at] : 0.0);
      share_.push_back(1.0 / static_cast<double>(ends ? length + 1 : length));
    }
  }

  std::vector<Answer> run() {
    visit(Automaton::kRootState, 0.0);
    return std::move(best_);
  }

 private:
  // `sum`: of the probabilities of path_, which leads to `state`.
  void visit(int32_t state, double sum) {
    const auto depth = static_cast<int64_t>(path_.size());
    if (constraint_.is_final(state)) {
      if (depth == search_.slots || depth >= search_.min_tokens) offer(score(depth, sum));
    }
    if (depth == search_.slots || static_cast<float>(bound(depth, sum)) <= bar()) return;
    const AllowedTokens allowed = constraint_.allowed(state);
    const int32_t* column =
        table_.list->edge_column.data() + (allowed.begin - constraint_.edge_token().data());
    const double* probability =
        table_.probability.data() + static_cast<size_t>(depth) * table_.list->tokens.size();
    for (int64_t i = 0; i < allowed.size(); ++i) {
      path_.push_back(allowed.begin[i]);
      visit(allowed.targets[i], sum + probability[column[i]]);
      path_.pop_back();
    }
  }

  double score(int64_t length, double sum) const {
    if (length == search_.slots) return sum / static_cast<double>(length);
    return (sum + table_.end_probability[static_cast<size_t>(length)]) /
           static_cast<double>(length + 1);
  }

  // No answer that goes on after `depth` tokens scores more: each slot at its largest probability.
  double bound(int64_t depth, double sum) const {
    double highest = 0;
    for (auto length = static_cast<size_t>(depth) + 1; length < share_.size(); ++length) {
      sum += largest_[length - 1];
      highest = std::max(highest, (sum + end_[length]) * share_[length]);
    }
    return highest * (1 + 1e-12);  // the sums are rounded in another order
  }

  // The score that an answer must exceed to be kept.
  float bar() const { return best_.size() < width_ ? -kInf : best_.back().score; }

  void offer(double exact_score) {
    const auto rounded = static_cast<float>(exact_score);
    if (rounded <= bar()) return;
    if (best_.size() == width_) best_.pop_back();
    const auto worse = [](float value, const Answer& answer) { return value > answer.score; };
    best_.insert(std::upper_bound(best_.begin(), best_.end(), rounded, worse),
                 Answer{rounded, path_});
  }

  const SlotSearch& search_;
  const Automaton& constraint_;
  const SlotTable& table_;
  const size_t width_;
  std::vector<double> largest_;  // [slots] largest probability of a token
  // Of answers by their length [slots + 1]: probability of the end after them, and one by the
  // number of probabilities in their mean.
  std::vector<double> end_, share_;
  std::vector<int32_t> path_;
  std::vector<Answer> best_;
};

}  // namespace

void slot_argmax(const SlotSearch& search, const SlotAnswers& answers) {
  constexpr int64_t kTypicalSlots = 8;  // that are read; the pool balances the rest
  const int64_t rows = search.passages * std::min(search.slots, kTypicalSlots);
  parallel_for_work(rows * search.logits.cols, search.passages, [&](int64_t p) {
    thread_local std::vector<float> gathered;
    write_answer(search, answers, p, greedy_answer(search, p, gathered));
  });
}

void slot_topk(const SlotSearch& search, int64_t width, const SlotAnswers& answers) {
  std::map<const Automaton*, TokenList> lists;
  std::vector<SlotTable> tables(static_cast<size_t>(search.passages));
  int64_t entries = 0;
  for (int64_t p = 0; p < search.passages; ++p) {
    const Automaton* constraint = search.constraints[p];
    if (lists.count(constraint) == 0) lists[constraint] = list_tokens(search, *constraint);
    SlotTable& table = tables[static_cast<size_t>(p)];
    table.list = &lists[constraint];
    const auto slots = static_cast<size_t>(search.slots);
    table.probability.resize(slots * table.list->tokens.size());
    table.end_probability.resize(slots);
    entries += static_cast<int64_t>(table.probability.size());
  }
  const int64_t rows = search.passages * search.slots;
  parallel_for_work(rows * search.logits.cols, rows, [&](int64_t row) {
    const int64_t p = row / search.slots;
    read_slot(search, row, static_cast<size_t>(row % search.slots), tables[static_cast<size_t>(p)]);
  });
  parallel_for_work(entries, search.passages, [&](int64_t p) {
    const SlotTable& table = tables[static_cast<size_t>(p)];
    std::vector<Answer> best = ExactSearch(search, p, table, width).run();
    best.resize(static_cast<size_t>(width));
    for (int64_t i = 0; i < width; ++i) {
      write_answer(search, answers, p * width + i, best[static_cast<size_t>(i)]);
    }
  });
}

}  // namespace fastmrc
