// slot_argmax and slot_topk against plain enumeration: the tokens that may follow are looked up in
// the passages themselves, and the exact search is compared with a sort of all answers.
//
// The enumeration takes the log-sum-exp of row_stats, which kernels_test checks, so that scores
// have to agree bit by bit and ties are the same. All scores are also compared with those of a
// plain softmax in double precision.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/thread_pool.h"
#include "fastmrc/ops.h"
#include "fastmrc/span_index.h"
#include "fastmrc/trie.h"
#include "matrix.h"

namespace {

using fastmrc::Automaton;
using fastmrc::DType;
using fastmrc::slot_argmax;
using fastmrc::slot_topk;
using fastmrc::SlotAnswers;
using fastmrc::SlotSearch;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;
using fastmrc_test::name_of;
using fastmrc_test::same_bits;

constexpr uint32_t kSeed = 20240614;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Tokens = std::vector<int32_t>;

// --- constraints ---------------------------------------------------------------------------------

enum class Kind : uint8_t { kFree, kSpans, kTrie };

// What an answer may be: anything, a span of one of the sequences, or one of the sequences.
struct Constraint {
  Kind kind;
  std::vector<Tokens> sequences;
  std::shared_ptr<const Automaton> automaton;

  explicit Constraint(Kind k, std::vector<Tokens> s = {}) : kind(k), sequences(std::move(s)) {
    Tokens tokens;
    std::vector<int64_t> offsets = {0};
    for (const Tokens& sequence : sequences) {
      tokens.insert(tokens.end(), sequence.begin(), sequence.end());
      offsets.push_back(static_cast<int64_t>(tokens.size()));
    }
    const auto count = static_cast<int32_t>(sequences.size());
    if (kind == Kind::kSpans) {
      const fastmrc::SpanIndex index(tokens.data(), offsets.data(), count);
      automaton = std::make_shared<Automaton>(index.automaton());
    } else if (kind == Kind::kTrie) {
      automaton =
          std::make_shared<Automaton>(fastmrc::build_trie(tokens.data(), offsets.data(), count));
    }
  }

  // Whether an answer may end here.
  bool complete(const Tokens& answer) const {
    if (kind != Kind::kTrie) return true;
    return std::find(sequences.begin(), sequences.end(), answer) != sequences.end();
  }

  // The tokens that follow `prefix` where it occurs.
  std::set<int32_t> following(const Tokens& prefix) const {
    std::set<int32_t> tokens;
    const size_t length = prefix.size();
    for (const Tokens& sequence : sequences) {
      for (size_t i = 0; i + length < sequence.size(); ++i) {
        if (i > 0 && kind == Kind::kTrie) break;
        const auto first = sequence.begin() + static_cast<std::ptrdiff_t>(i);
        if (std::equal(prefix.begin(), prefix.end(), first)) tokens.insert(sequence[i + length]);
      }
    }
    return tokens;
  }
};

// --- cases ---------------------------------------------------------------------------------------

// A search with everything it points to.
struct Case {
  Case(Matrix m, int64_t n) : logits(std::move(m)), slots(n) {}

  Matrix logits;
  int64_t slots;
  int32_t end_id = 0;
  int64_t min_tokens = 0;
  std::vector<Constraint> constraints;
  std::vector<const Automaton*> pointers;

  int64_t passages() const { return static_cast<int64_t>(constraints.size()); }

  SlotSearch search() {
    pointers.clear();
    for (const Constraint& constraint : constraints) pointers.push_back(constraint.automaton.get());
    SlotSearch search;
    search.logits = logits.view();
    search.passages = passages();
    search.slots = slots;
    search.constraints = pointers.data();
    search.end_id = end_id;
    search.min_tokens = min_tokens;
    return search;
  }
};

// One passage, float32; the rows hold zeros.
Case small_case(int64_t slots, int64_t cols, int32_t end_id, Constraint constraint) {
  Case c(Matrix(DType::kFloat32, slots, cols), slots);
  c.logits.fill(0.0f);
  c.end_id = end_id;
  c.constraints.push_back(std::move(constraint));
  return c;
}

// --- what is expected ----------------------------------------------------------------------------

double naive_logsumexp(const Matrix& x, int64_t r) {
  double max = -static_cast<double>(kInf), sum = 0;
  for (int64_t c = 0; c < x.cols(); ++c) max = std::max(max, static_cast<double>(x.at(r, c)));
  for (int64_t c = 0; c < x.cols(); ++c) sum += std::exp(static_cast<double>(x.at(r, c)) - max);
  return max + std::log(sum);
}

// Sums of probabilities: by the log-sum-exp of the core, and by the plain one.
struct Sum {
  double core = 0, plain = 0;

  Sum operator+(const Sum& other) const { return {core + other.core, plain + other.plain}; }
};

struct Answer {
  Tokens tokens;
  float score;   // float32 of the sum in double
  double plain;  // by plain softmax
};

bool before(const Answer& a, const Answer& b) {
  return a.score != b.score ? a.score > b.score : a.tokens < b.tokens;
}

class Oracle {
 public:
  explicit Oracle(const Case& c) : case_(c) {}

  Sum probability(int64_t passage, size_t slot, int32_t token) {
    const int64_t row = passage * case_.slots + static_cast<int64_t>(slot);
    const auto found = rows_.find(row);
    const Sum logsumexp =
        found != rows_.end()
            ? found->second
            : (rows_[row] = {fastmrc::row_stats_of(case_.logits.view(), row).logsumexp,
                             naive_logsumexp(case_.logits, row)});
    const auto logit = static_cast<double>(case_.logits.at(row, token));
    return {std::exp(logit - logsumexp.core), std::exp(logit - logsumexp.plain)};
  }

  // One of `length` tokens, not named here; `sum`: of their probabilities.
  Answer answer(int64_t passage, size_t length, Sum sum) {
    const bool ends = static_cast<int64_t>(length) < case_.slots;
    if (ends) sum = sum + probability(passage, length, case_.end_id);
    const auto count = static_cast<double>(length + (ends ? 1 : 0));
    return {{}, static_cast<float>(sum.core / count), sum.plain / count};
  }

  Answer answer(int64_t passage, const Tokens& tokens, Sum sum) {
    Answer answer_of = answer(passage, tokens.size(), sum);
    answer_of.tokens = tokens;
    return answer_of;
  }

  // At most one answer. `rows_read`: how many rows it takes.
  std::vector<Answer> greedy(int64_t passage, int64_t* rows_read) {
    const Constraint& constraint = case_.constraints[static_cast<size_t>(passage)];
    Tokens tokens;
    Sum sum;
    *rows_read = 0;
    while (!full(tokens)) {
      const int64_t row = passage * case_.slots + (*rows_read)++;
      int32_t best = -1;
      for (const int32_t token : choices(constraint, tokens)) {  // ascending
        if (best < 0 || case_.logits.at(row, token) > case_.logits.at(row, best)) best = token;
      }
      if (best < 0) return {};
      if (best == case_.end_id) return {answer(passage, tokens, sum)};
      sum = sum + probability(passage, tokens.size(), best);
      tokens.push_back(best);
    }
    if (!constraint.complete(tokens)) return {};
    return {answer(passage, tokens, sum)};
  }

  // All answers, best first.
  std::vector<Answer> all(int64_t passage) {
    std::vector<Answer> answers;
    Tokens tokens;
    collect(passage, tokens, {}, answers);
    std::sort(answers.begin(), answers.end(), before);
    return answers;
  }

 private:
  bool full(const Tokens& tokens) const {
    return static_cast<int64_t>(tokens.size()) == case_.slots;
  }

  bool may_end(const Constraint& constraint, const Tokens& tokens) const {
    const bool enough = full(tokens) || static_cast<int64_t>(tokens.size()) >= case_.min_tokens;
    return enough && constraint.complete(tokens);
  }

  std::set<int32_t> choices(const Constraint& constraint, const Tokens& tokens) const {
    std::set<int32_t> all;
    if (constraint.kind == Kind::kFree) {
      for (int32_t v = 0; v < case_.logits.cols(); ++v) all.insert(v);
      all.erase(case_.end_id);
    } else {
      all = constraint.following(tokens);
    }
    if (may_end(constraint, tokens)) all.insert(case_.end_id);
    return all;
  }

  void collect(int64_t passage, Tokens& tokens, Sum sum, std::vector<Answer>& answers) {
    const Constraint& constraint = case_.constraints[static_cast<size_t>(passage)];
    if (may_end(constraint, tokens)) answers.push_back(answer(passage, tokens, sum));
    if (full(tokens)) return;
    for (const int32_t token : constraint.following(tokens)) {
      const Sum more = sum + probability(passage, tokens.size(), token);
      tokens.push_back(token);
      collect(passage, tokens, more, answers);
      tokens.pop_back();
    }
  }

  const Case& case_;
  std::map<int64_t, Sum> rows_;  // log-sum-exp
};

// --- comparison ----------------------------------------------------------------------------------

// What a search wrote; sanitizers see a write beyond it.
struct Found {
  Tokens tokens, lengths;
  std::vector<float> scores;

  Found(int64_t passages, int64_t width, int64_t slots)
      : tokens(static_cast<size_t>(passages * width * slots), -7),
        lengths(static_cast<size_t>(passages * width), -7),
        scores(static_cast<size_t>(passages * width), kNan) {}

  SlotAnswers out() { return {tokens.data(), lengths.data(), scores.data()}; }

  bool operator==(const Found& other) const {
    return tokens == other.tokens && lengths == other.lengths &&
           scores.size() == other.scores.size() &&
           std::equal(scores.begin(), scores.end(), other.scores.begin(),
                      [](float a, float b) { return same_bits(a, b); });
  }
};

Found run_greedy(Case& c) {
  Found found(c.passages(), 1, c.slots);
  slot_argmax(c.search(), found.out());
  return found;
}

Found run_exact(Case& c, int64_t width) {
  Found found(c.passages(), width, c.slots);
  slot_topk(c.search(), width, found.out());
  return found;
}

// answers: best first, one vector per passage.
void check_found(const Found& found, const std::vector<std::vector<Answer>>& answers, int64_t width,
                 int64_t slots) {
  Found expected(static_cast<int64_t>(answers.size()), width, slots);
  std::fill(expected.tokens.begin(), expected.tokens.end(), -1);
  std::fill(expected.lengths.begin(), expected.lengths.end(), -1);
  std::fill(expected.scores.begin(), expected.scores.end(), -kInf);
  bool near = true;
  for (size_t p = 0; p < answers.size(); ++p) {
    for (size_t i = 0; i < std::min(answers[p].size(), static_cast<size_t>(width)); ++i) {
      const Answer& answer = answers[p][i];
      const size_t place = p * static_cast<size_t>(width) + i;
      std::copy(answer.tokens.begin(), answer.tokens.end(),
                expected.tokens.begin() + static_cast<std::ptrdiff_t>(place) * slots);
      expected.lengths[place] = static_cast<int32_t>(answer.tokens.size());
      expected.scores[place] = answer.score;
      const double error = std::fabs(static_cast<double>(found.scores[place]) - answer.plain);
      near &= error <= 2e-6 * answer.plain + 1e-44;
    }
  }
  CHECK_EQ(found.tokens, expected.tokens);
  CHECK_EQ(found.lengths, expected.lengths);
  CHECK_EQ(found.scores, expected.scores);
  CHECK(near);
}

void check_greedy(Case& c) {
  Oracle oracle(c);
  std::vector<std::vector<Answer>> expected;
  for (int64_t p = 0; p < c.passages(); ++p) {
    int64_t rows_read = 0;
    expected.push_back(oracle.greedy(p, &rows_read));
  }
  const std::vector<unsigned char> bytes = c.logits.bytes();
  check_found(run_greedy(c), expected, 1, c.slots);
  CHECK(c.logits.bytes() == bytes);
}

// Widths 1, 3 and more than there are answers; the best one against slot_argmax.
void check_exact(Case& c) {
  Oracle oracle(c);
  std::vector<std::vector<Answer>> expected;
  size_t most = 0;
  for (int64_t p = 0; p < c.passages(); ++p) {
    expected.push_back(oracle.all(p));
    most = std::max(most, expected.back().size());
  }
  const std::vector<unsigned char> bytes = c.logits.bytes();
  for (const int64_t width : {int64_t{1}, int64_t{3}, static_cast<int64_t>(most) + 2}) {
    check_found(run_exact(c, width), expected, width, c.slots);
  }
  CHECK(c.logits.bytes() == bytes);
  const Found greedy = run_greedy(c);
  const Found best = run_exact(c, 1);
  for (size_t p = 0; p < expected.size(); ++p) CHECK(best.scores[p] >= greedy.scores[p]);
}

// --- random cases --------------------------------------------------------------------------------

enum class Logits : uint8_t {
  kNormal,
  kSharp,     // many probabilities near 0, some that float32 cannot hold
  kTies,      // few different numbers
  kZeros,     // 0, -0 and -1
  kNearTies,  // apart by units in the last place
  kMasked,    // most entries -inf
  kOneEntry,  // all but one -inf
  kEnd,       // the end token is the most likely one
  kCount
};

void fill_row(Logits kind, int64_t row, int32_t end_id, Matrix* x, std::mt19937* random) {
  std::normal_distribution<float> normal(0, kind == Logits::kSharp ? 20.0f : 2.0f);
  const auto cols = static_cast<uint32_t>(x->cols());
  for (int64_t c = 0; c < x->cols(); ++c) {
    const auto dice = (*random)();
    float value = normal(*random);
    if (kind == Logits::kTies) value = static_cast<float>(dice % 3);
    if (kind == Logits::kZeros) value = dice % 3 == 0 ? -1.0f : dice % 3 == 1 ? 0.0f : -0.0f;
    if (kind == Logits::kNearTies) value = 1.0f + static_cast<float>(dice % 4) * 0x1p-22f;
    if (kind == Logits::kMasked && dice % 4 != 0) value = -kInf;
    if (kind == Logits::kOneEntry) value = -kInf;
    if (kind == Logits::kEnd && c == end_id) value = 8.0f;
    x->set(row, c, value);
  }
  if (kind == Logits::kMasked || kind == Logits::kOneEntry) x->set(row, (*random)() % cols, 1.0f);
}

// Sequences of few different tokens, none of them the end token: so they share pieces.
std::vector<Tokens> random_sequences(size_t count, size_t length, int64_t cols, int32_t end_id,
                                     std::mt19937* random) {
  Tokens alphabet(1 + (*random)() % 6);
  for (int32_t& token : alphabet) {
    if (cols == 1) break;
    token = static_cast<int32_t>((*random)() % static_cast<uint32_t>(cols - 1));
    if (token >= end_id) ++token;
  }
  std::vector<Tokens> sequences(count);
  for (Tokens& sequence : sequences) {
    sequence.resize(cols == 1 ? 0 : (*random)() % (length + 1));
    for (int32_t& token : sequence) token = alphabet[(*random)() % alphabet.size()];
  }
  return sequences;
}

Constraint random_constraint(bool free, int64_t cols, int32_t end_id, std::mt19937* random) {
  switch ((*random)() % (free ? 5 : 4)) {
    case 0:
      return Constraint(Kind::kSpans, random_sequences(1, 14, cols, end_id, random));
    case 1:
      return Constraint(Kind::kSpans, random_sequences((*random)() % 4, 8, cols, end_id, random));
    case 2:
    case 3:
      return Constraint(Kind::kTrie, random_sequences((*random)() % 9, 7, cols, end_id, random));
    default:
      return Constraint(Kind::kFree);
  }
}

// free: passages without a constraint too.
Case random_case(bool free, std::mt19937* random) {
  const int64_t sizes[] = {1, 2, 3, 5, 9, 9, 40, 70};
  const int64_t cols = sizes[(*random)() % 8];
  const int64_t passages = (*random)() % 4;
  const int64_t slots = 1 + (*random)() % 6;
  const int64_t gap = (*random)() % 3;
  Case c(Matrix(kDTypes[(*random)() % 3], passages * slots, cols, cols + gap, gap / 2), slots);
  const int64_t ends[] = {0, cols / 2, cols - 1};
  c.end_id = static_cast<int32_t>(ends[(*random)() % 3]);
  if ((*random)() % 2 == 0) c.min_tokens = (*random)() % static_cast<uint32_t>(slots + 1);
  for (int64_t p = 0; p < passages; ++p) {
    c.constraints.push_back(random_constraint(free, cols, c.end_id, random));
    const auto kind = static_cast<Logits>((*random)() % static_cast<uint32_t>(Logits::kCount));
    for (int64_t i = 0; i < slots; ++i) {
      fill_row(kind, p * slots + i, c.end_id, &c.logits, random);
    }
  }
  return c;
}

std::string describe(int i, const Case& c) {
  return "case " + std::to_string(i) + ": " + name_of(c.logits.dtype()) + " " +
         std::to_string(c.passages()) + "x" + std::to_string(c.slots) + "x" +
         std::to_string(c.logits.cols()) + " end " + std::to_string(c.end_id) + " min " +
         std::to_string(c.min_tokens);
}

// What makes a row unusable, and what the message says.
std::string spoil(Case* c, int64_t row, std::mt19937* random) {
  const auto kind = (*random)() % 3;
  if (kind == 2) {
    for (int64_t v = 0; v < c->logits.cols(); ++v) c->logits.set(row, v, -kInf);
    return "logits: expected a finite entry in every row, got only -inf in row " +
           std::to_string(row);
  }
  const int64_t at = (*random)() % static_cast<uint32_t>(c->logits.cols());
  c->logits.set(row, at, kind == 0 ? kNan : kInf);
  return std::string("logits: expected numbers below infinity, got ") +
         (kind == 0 ? "NaN" : "inf") + " in row " + std::to_string(row);
}

void test_greedy_on_random_cases() {
  std::mt19937 random(kSeed);
  for (int i = 0; i < 4000; ++i) {
    Case c = random_case(true, &random);
    fastmrc_test::context() = "greedy " + describe(i, c);
    check_greedy(c);
  }
}

void test_exact_on_random_cases() {
  std::mt19937 random(kSeed + 1);
  for (int i = 0; i < 2500; ++i) {
    Case c = random_case(false, &random);
    fastmrc_test::context() = "exact " + describe(i, c);
    check_exact(c);
  }
}

// Rows that greedy does not reach may hold anything; those it reads may not. The exact search reads
// all of them.
void test_the_rows_that_are_read() {
  std::mt19937 random(kSeed + 2);
  int unread_rows = 0;
  for (int i = 0; i < 1000; ++i) {
    Case c = random_case(true, &random);
    fastmrc_test::context() = "rows of " + describe(i, c);
    if (c.passages() == 0) continue;
    const Found expected = run_greedy(c);
    Oracle oracle(c);
    std::vector<int64_t> read, unread;
    for (int64_t p = 0; p < c.passages(); ++p) {
      int64_t count = 0;
      oracle.greedy(p, &count);
      for (int64_t s = 0; s < c.slots; ++s) (s < count ? read : unread).push_back(p * c.slots + s);
    }
    Case behind = c;
    for (const int64_t row : unread) spoil(&behind, row, &random);
    CHECK(run_greedy(behind) == expected);
    unread_rows += static_cast<int>(unread.size());

    Case bad = c;
    const std::string message = spoil(&bad, read[random() % read.size()], &random);
    CHECK_THROWS(run_greedy(bad), std::invalid_argument, message);

    Case free = random_case(false, &random);
    if (free.passages() == 0) continue;
    const int64_t rows = free.passages() * free.slots;
    const std::string any = spoil(&free, random() % static_cast<uint32_t>(rows), &random);
    CHECK_THROWS(run_exact(free, 2), std::invalid_argument, any);
  }
  CHECK(unread_rows > 100);
}

// --- by hand -------------------------------------------------------------------------------------

Tokens tokens_of(const Found& found, int64_t slots, int64_t place) {
  const auto first = found.tokens.begin() + place * slots;
  return Tokens(first, first + slots);
}

bool near(float score, double expected) {
  return std::fabs(static_cast<double>(score) - expected) < 1e-6;
}

// P = 1/8, 1/2, 1/4, 1/8 in each slot; the passage is 2 3 2, the end token 1.
void test_scores_by_hand() {
  fastmrc_test::context() = "by hand";
  Case c = small_case(3, 4, 1, Constraint(Kind::kSpans, {{2, 3, 2}}));
  const double p[] = {0.125, 0.5, 0.25, 0.125};
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t v = 0; v < 4; ++v) {
      c.logits.set(row, v, static_cast<float>(std::log(p[v])) + 3.0f);
    }
  }
  const Found all = run_exact(c, 9);
  CHECK_EQ(all.lengths, (Tokens{0, 1, 1, 2, 2, 3, -1, -1, -1}));
  CHECK_EQ(tokens_of(all, 3, 0), (Tokens{-1, -1, -1}));
  CHECK_EQ(tokens_of(all, 3, 1), (Tokens{2, -1, -1}));
  CHECK_EQ(tokens_of(all, 3, 2), (Tokens{3, -1, -1}));
  CHECK_EQ(tokens_of(all, 3, 3), (Tokens{2, 3, -1}));
  CHECK_EQ(tokens_of(all, 3, 4), (Tokens{3, 2, -1}));
  CHECK_EQ(tokens_of(all, 3, 5), (Tokens{2, 3, 2}));
  CHECK_EQ(tokens_of(all, 3, 6), (Tokens{-1, -1, -1}));
  CHECK(near(all.scores[0], 0.5));
  CHECK(near(all.scores[1], 0.75 / 2));
  CHECK(near(all.scores[2], 0.625 / 2));
  CHECK(near(all.scores[3], 0.875 / 3));
  CHECK(near(all.scores[5], 0.625 / 3));
  CHECK_EQ(all.scores[8], -kInf);

  c.min_tokens = 1;
  const Found greedy = run_greedy(c);
  CHECK_EQ(greedy.tokens, (Tokens{2, -1, -1}));
  CHECK_EQ(greedy.lengths, Tokens{1});
  CHECK(near(greedy.scores[0], 0.75 / 2));
  c.min_tokens = 3;
  const Found full = run_greedy(c);
  CHECK_EQ(full.tokens, (Tokens{2, 3, 2}));
  CHECK(near(full.scores[0], 0.625 / 3));
  CHECK(run_exact(c, 1) == full);
}

void test_small_cases() {
  fastmrc_test::context() = "ties";
  Case ties = small_case(2, 5, 2, Constraint(Kind::kSpans, {{4, 3, 4, 1}}));
  CHECK_EQ(run_greedy(ties).tokens, (Tokens{1, -1}));  // 1 before the end, then the end alone
  ties.end_id = 0;
  CHECK_EQ(run_greedy(ties).tokens, (Tokens{-1, -1}));
  ties.min_tokens = 2;
  CHECK_EQ(run_greedy(ties).lengths, Tokens{-1});  // nothing follows 1
  CHECK_EQ(tokens_of(run_exact(ties, 1), 2, 0), (Tokens{3, 4}));

  fastmrc_test::context() = "tokens of probability 0";
  Case masked = small_case(1, 6, 5, Constraint(Kind::kTrie, {{3}, {1}, {4}}));
  for (int64_t v = 1; v < 6; ++v) masked.logits.set(0, v, -kInf);
  for (const bool free : {false, true}) {
    if (free) masked.constraints[0] = Constraint(Kind::kFree);
    if (free) masked.logits.set(0, 0, -kInf);
    if (free) masked.logits.set(0, 5, 1.0f);
    masked.min_tokens = free ? 1 : 0;
    const Found found = run_greedy(masked);
    CHECK_EQ(found.tokens, Tokens{free ? 0 : 1});
    CHECK_EQ(found.lengths, Tokens{1});
    CHECK_EQ(found.scores, std::vector<float>{0.0f});
  }

  fastmrc_test::context() = "empty passage";
  for (const Kind kind : {Kind::kSpans, Kind::kTrie}) {
    Case empty = small_case(2, 3, 1, Constraint(kind, {{}}));
    Found found = run_exact(empty, 2);
    CHECK_EQ(found.lengths, (Tokens{0, -1}));
    CHECK(near(found.scores[0], 1.0 / 3));
    CHECK_EQ(run_greedy(empty).lengths, Tokens{0});
    empty.min_tokens = 1;
    CHECK_EQ(run_exact(empty, 2).lengths, (Tokens{-1, -1}));
    found = run_greedy(empty);
    CHECK_EQ(found.lengths, Tokens{-1});
    CHECK_EQ(found.scores, std::vector<float>{-kInf});
  }
  Case none = small_case(1, 3, 1, Constraint(Kind::kTrie));  // a root that is not final
  CHECK_EQ(run_greedy(none).lengths, Tokens{-1});
  CHECK_EQ(run_exact(none, 1).lengths, Tokens{-1});

  fastmrc_test::context() = "vocabulary 1";
  for (const Kind kind : {Kind::kSpans, Kind::kFree}) {
    Case one = small_case(3, 1, 0, Constraint(kind));
    CHECK_EQ(run_greedy(one).lengths, Tokens{0});
    CHECK_EQ(run_greedy(one).scores, std::vector<float>{1.0f});
    one.min_tokens = 1;
    CHECK_EQ(run_greedy(one).lengths, Tokens{-1});
  }

  fastmrc_test::context() = "not final after all slots";
  Case longer = small_case(2, 6, 0, Constraint(Kind::kTrie, {{5, 4, 3}, {1, 2}, {2}}));
  longer.logits.set(0, 5, 3.0f);
  Found found = run_greedy(longer);
  CHECK_EQ(found.tokens, (Tokens{-1, -1}));
  CHECK_EQ(found.lengths, Tokens{-1});
  CHECK_EQ(found.scores, std::vector<float>{-kInf});
  found = run_exact(longer, 3);
  CHECK_EQ(found.lengths, (Tokens{2, 1, -1}));
  CHECK_EQ(tokens_of(found, 2, 0), (Tokens{1, 2}));

  fastmrc_test::context() = "no passages";
  Case nothing(Matrix(DType::kFloat32, 0, 4), 2);
  CHECK(run_greedy(nothing) == run_exact(nothing, 3));
}

// Each of several constraints in one call, one of them none.
void test_constraints_apply_to_their_passage() {
  fastmrc_test::context() = "constraints";
  Case c(Matrix(DType::kFloat32, 6, 5), 2);
  c.logits.fill(0.0f);
  for (int64_t row = 0; row < 6; ++row) c.logits.set(row, 4, row < 2 ? 1.0f : 2.0f);
  c.end_id = 0;
  c.min_tokens = 1;
  c.constraints = {Constraint(Kind::kFree), Constraint(Kind::kTrie, {{3, 4}}),
                   Constraint(Kind::kSpans, {{2, 1}})};
  CHECK_EQ(run_greedy(c).tokens, (Tokens{4, 4, 3, 4, 1, -1}));
}

// An answer that is tiny must not be lost below one that is tinier, whatever the probability of
// tokens that its slots cannot take: here 9 has all of slot 0 but stands only behind other tokens.
void test_tiny_scores() {
  const Constraint trie(Kind::kTrie, {{1, 9}, {2, 9}, {3, 9}, {4, 9}});
  const Constraint spans(Kind::kSpans, {{1, 9}, {2, 9}, {3, 9}, {4, 9}});
  for (const float logit : {-10.0f, -20.0f, -30.0f, -45.0f, -80.0f}) {
    for (const Constraint& constraint : {trie, spans}) {
      fastmrc_test::context() = "tiny scores, logit " + std::to_string(logit);
      Case c = small_case(2, 10, 0, constraint);
      c.min_tokens = 2;
      c.logits.fill(-kInf);
      c.logits.set(0, 9, 0.0f);
      c.logits.set(1, 5, 0.0f);
      for (int32_t v = 1; v <= 4; ++v) {
        c.logits.set(0, v, logit + 0.5f * static_cast<float>(v));
      }
      c.logits.set(1, 9, logit);
      check_exact(c);
      CHECK_EQ(tokens_of(run_exact(c, 1), 2, 0), (Tokens{4, 9}));
    }
  }
}

// --- long answers --------------------------------------------------------------------------------

// The best answers among the spans of `passage` that begin at its first `starts` tokens, which are
// all different ones and rise with their first token and their length.
std::vector<Answer> best_long_spans(const Case& c, const Tokens& passage, int64_t starts,
                                    size_t width) {
  struct Scored {
    Answer answer;  // without the tokens
    int64_t first, length;
  };
  Oracle oracle(c);
  std::vector<Scored> spans;
  const auto offer = [&](int64_t first, int64_t length, Sum sum) {
    if (length < c.min_tokens) return;
    const Answer answer = oracle.answer(0, static_cast<size_t>(length), sum);
    spans.push_back({answer, first, length});
  };
  offer(0, 0, {});
  for (int64_t first = 0; first < starts; ++first) {
    Sum sum;
    const int64_t longest = std::min(c.slots, static_cast<int64_t>(passage.size()) - first);
    for (int64_t length = 1; length <= longest; ++length) {
      const int32_t token = passage[static_cast<size_t>(first + length - 1)];
      sum = sum + oracle.probability(0, static_cast<size_t>(length - 1), token);
      offer(first, length, sum);
    }
  }
  std::stable_sort(spans.begin(), spans.end(), [](const Scored& a, const Scored& b) {
    return a.answer.score > b.answer.score;
  });
  spans.resize(std::min(spans.size(), width));
  std::vector<Answer> answers;
  for (const Scored& span : spans) {
    answers.push_back(span.answer);
    const auto first = passage.begin() + span.first;
    answers.back().tokens.assign(first, first + span.length);
  }
  return answers;
}

// 400 slots, a passage of 500 tokens: distinct ones, and the same one again and again.
void test_long_answers() {
  constexpr int64_t kSlots = 400;
  std::mt19937 random(kSeed + 3);
  std::normal_distribution<float> normal(0, 1);
  for (const bool repeated : {false, true}) {
    Tokens passage(500);
    for (size_t i = 0; i < 500; ++i) passage[i] = repeated ? 7 : static_cast<int32_t>(i) + 1;
    Case c = small_case(kSlots, 501, 0, Constraint(Kind::kSpans, {passage}));
    for (int64_t i = 0; i < kSlots; ++i) {
      for (int64_t v = 0; v < 501; ++v) c.logits.set(i, v, normal(random));
      c.logits.set(i, passage[static_cast<size_t>(i) + 80], 9.0f);
    }
    for (const int64_t min_tokens : {0, 395, 400}) {
      fastmrc_test::context() = "long answers of at least " + std::to_string(min_tokens);
      c.min_tokens = min_tokens;
      const int64_t starts = repeated ? 1 : 500;
      const std::vector<Answer> expected = best_long_spans(c, passage, starts, 4);
      for (const int64_t width : {1, 4}) {
        check_found(run_exact(c, width), {expected}, width, kSlots);
      }
      check_greedy(c);
    }
  }
}

// --- threads, errors -----------------------------------------------------------------------------

// Enough work for the threads.
Case large_case(DType dtype, std::mt19937* random) {
  constexpr int64_t kPassages = 24, kSlots = 6, kCols = 600;
  Case c(Matrix(dtype, kPassages * kSlots, kCols, kCols + 1), kSlots);
  c.end_id = 300;
  for (int64_t p = 0; p < kPassages; ++p) {
    Tokens passage(400);
    for (int32_t& token : passage) {
      token = static_cast<int32_t>((*random)() % (kCols - 1));
      if (token >= c.end_id) ++token;
    }
    c.constraints.emplace_back(Kind::kSpans, std::vector<Tokens>{passage});
    const auto kind = static_cast<Logits>((*random)() % static_cast<uint32_t>(Logits::kCount));
    for (int64_t i = 0; i < kSlots; ++i) {
      fill_row(kind, p * kSlots + i, c.end_id, &c.logits, random);
    }
  }
  return c;
}

void test_any_number_of_threads() {
  std::mt19937 random(kSeed + 4);
  const int threads = fastmrc::num_threads();
  for (const DType dtype : kDTypes) {
    fastmrc_test::context() = std::string("threads, ") + name_of(dtype);
    Case c = large_case(dtype, &random);
    fastmrc::set_num_threads(1);
    check_greedy(c);
    const Found greedy = run_greedy(c);
    const Found exact = run_exact(c, 5);
    if (dtype == DType::kFloat16) {  // one of them takes long enough
      Oracle oracle(c);
      std::vector<std::vector<Answer>> expected;
      for (int64_t p = 0; p < c.passages(); ++p) expected.push_back(oracle.all(p));
      check_found(exact, expected, 5, c.slots);
    }
    for (const int n : {2, 5}) {
      fastmrc::set_num_threads(n);
      for (int i = 0; i < 5; ++i) {
        CHECK(run_greedy(c) == greedy);
        CHECK(run_exact(c, 5) == exact);
      }
    }
    // Of several bad rows the first one.
    for (int64_t row = 48; row < 144; row += 6) c.logits.set(row, 599, kNan);
    for (int i = 0; i < 5; ++i) {
      CHECK_THROWS(run_greedy(c), std::invalid_argument, "got NaN in row 48");
      CHECK_THROWS(run_exact(c, 2), std::invalid_argument, "got NaN in row 48");
    }
  }
  fastmrc::set_num_threads(threads);
}

// Many tokens to choose from, so that the threads choose at the same time.
void test_large_constraints_on_threads() {
  constexpr int64_t kPassages = 200, kCols = 3000;
  fastmrc_test::context() = "large constraints on threads";
  std::mt19937 random(kSeed + 6);
  Tokens passage(kCols - 1);
  for (size_t i = 0; i < passage.size(); ++i) passage[i] = static_cast<int32_t>(i) + 1;
  Case c(Matrix(DType::kFloat32, kPassages, kCols), 1);
  c.min_tokens = 1;
  c.constraints.assign(kPassages, Constraint(Kind::kSpans, {passage}));
  Tokens expected;
  for (int64_t p = 0; p < kPassages; ++p) {
    for (int64_t v = 0; v < kCols; ++v) c.logits.set(p, v, static_cast<float>(random() % 4));
    expected.push_back(1 + static_cast<int32_t>(random() % (kCols - 1)));
    c.logits.set(p, expected.back(), 5.0f);
  }
  const int threads = fastmrc::num_threads();
  for (const int n : {1, 2, 5}) {
    fastmrc::set_num_threads(n);
    for (int i = 0; i < 5; ++i) CHECK_EQ(run_greedy(c).tokens, expected);
  }
  fastmrc::set_num_threads(threads);
}

void test_inputs_are_not_modified() {
  fastmrc_test::context() = "inputs";
  std::mt19937 random(kSeed + 5);
  Case c = large_case(DType::kFloat32, &random);
  const SlotSearch search = c.search();
  const std::vector<const Automaton*> pointers = c.pointers;
  const std::vector<unsigned char> bytes = c.logits.bytes();
  const Automaton automaton = *c.constraints[3].automaton;
  Found found(24, 2, 6);
  slot_topk(search, 2, found.out());
  slot_argmax(search, found.out());
  CHECK(c.logits.bytes() == bytes);
  CHECK(c.pointers == pointers);
  CHECK_EQ(c.constraints[3].automaton->edge_begin(), automaton.edge_begin());
  CHECK_EQ(c.constraints[3].automaton->edge_token(), automaton.edge_token());
  CHECK_EQ(c.constraints[3].automaton->edge_target(), automaton.edge_target());
  CHECK_EQ(c.constraints[3].automaton->final_flags(), automaton.final_flags());
}

void test_check_allowed() {
  fastmrc_test::context() = "check_allowed";
  const auto check = [](const Tokens& tokens, int64_t vocabulary_size, int32_t end_id) {
    fastmrc::check_allowed(tokens.data(), tokens.data() + tokens.size(), vocabulary_size, end_id);
    return true;
  };
  fastmrc::check_allowed(nullptr, nullptr, 1, 0);
  CHECK(check({0, 2, 4}, 5, 1));
  CHECK(check({0, 2, 4}, 5, 3));
  CHECK(check({1}, 2, 0));
  for (const int32_t end_id : {0, 2, 4}) {
    CHECK_THROWS(check({0, 2, 4}, 5, end_id), std::invalid_argument,
                 "constraint: expected no end token " + std::to_string(end_id));
  }
  CHECK_THROWS(check({0, 2, 4}, 4, 1), std::invalid_argument,
               "constraint: expected tokens below the vocabulary size 4, got 4");
  CHECK_THROWS(check({7}, 2, 1), std::invalid_argument, "vocabulary size 2, got 7");
}

void test_bad_constraints() {
  fastmrc_test::context() = "bad constraints";
  for (const Kind kind : {Kind::kSpans, Kind::kTrie}) {
    Case wide = small_case(2, 6, 0, Constraint(kind, {{1, 6}}));
    wide.logits.set(0, 1, 1.0f);
    CHECK_THROWS(run_greedy(wide), std::invalid_argument, "vocabulary size 6, got 6");
    CHECK_THROWS(run_exact(wide, 1), std::invalid_argument, "vocabulary size 6, got 6");
    Case with_end = small_case(2, 6, 2, Constraint(kind, {{1, 2}}));
    with_end.logits.set(0, 1, 1.0f);
    CHECK_THROWS(run_greedy(with_end), std::invalid_argument, "expected no end token 2 inside");
    CHECK_THROWS(run_exact(with_end, 1), std::invalid_argument, "expected no end token 2 inside");
  }
}

}  // namespace

int main() {
  std::cout << "seed " << kSeed << std::endl;
  test_greedy_on_random_cases();
  test_exact_on_random_cases();
  test_the_rows_that_are_read();
  test_scores_by_hand();
  test_small_cases();
  test_constraints_apply_to_their_passage();
  test_tiny_scores();
  test_long_answers();
  test_any_number_of_threads();
  test_large_constraints_on_threads();
  test_inputs_are_not_modified();
  test_check_allowed();
  test_bad_constraints();
  return fastmrc_test::report();
}
