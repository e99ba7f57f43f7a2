// The answers of slots of csrc/cuda, emulated on the host, against those of the CPU.
//
// With the statistics of the CPU both compute the same in double precision, so that the scores have
// to agree bit by bit and ties are the same; with those of row_pass they agree but for rounding.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cuda/numbers.cuh"
#include "cuda/row_pass.h"
#include "cuda/slots.h"
#include "cuda_cases.h"
#include "fastmrc/ops.h"
#include "matrix.h"
#include "packed_automata.h"

using namespace fastmrc;
using fastmrc_test::context;
using fastmrc_test::kDTypes;
using fastmrc_test::kInf;
using fastmrc_test::Matrix;
using fastmrc_test::PackedAutomata;
using fastmrc_test::same_bits;
using fastmrc_test::Tokens;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Stats {
  std::vector<float> max;
  std::vector<int32_t> argmax;
  std::vector<double> logsumexp;
};

Stats stats_of_cpu(const Matrix& x) {
  Stats stats;
  for (int64_t r = 0; r < x.rows(); ++r) {
    const RowStats row = kernels().row_stats(x.row(r), x.dtype(), x.cols(), nullptr);
    stats.max.push_back(row.max);
    stats.argmax.push_back(row.argmax);
    stats.logsumexp.push_back(row.logsumexp);
  }
  return stats;
}

Stats stats_of_row_pass(const Matrix& x) {
  const auto rows = static_cast<size_t>(x.rows());
  Stats stats{std::vector<float>(rows), std::vector<int32_t>(rows), std::vector<double>(rows)};
  std::vector<int32_t> counters(rows, 0);
  std::vector<uint64_t> space(
      static_cast<size_t>(cuda::row_pass_bytes(x.rows(), x.cols(), 0) + 15) / 16 * 2);
  int64_t fault_of_any_row = cuda::kNoFault;
  cuda::RowPass pass;
  pass.rows = x.view();
  pass.stats = {stats.max.data(), stats.argmax.data(), stats.logsumexp.data()};
  pass.fault = &fault_of_any_row;
  pass.counters = counters.data();
  pass.workspace = space.data();
  cuda::row_pass(pass, nullptr);
  return stats;
}

struct Case {
  Matrix logits;
  int64_t slots;
  int32_t end_id = 0;
  int64_t min_tokens = 0;
  std::vector<Automaton> automata;
  std::vector<int32_t> automaton_of;  // [passages], -1: no constraint

  int64_t passages() const { return logits.rows() / slots; }
};

// One passage, float32; the rows hold zeros.
Case small_case(int64_t slots, int64_t cols, int32_t end_id, Automaton automaton) {
  Case c{Matrix(DType::kFloat32, slots, cols), slots, end_id, 0, {}, {0}};
  c.logits.fill(0.0f);
  c.automata.push_back(std::move(automaton));
  return c;
}

// --- running -------------------------------------------------------------------------------------

constexpr int64_t kGreedy = 0;  // in place of a width: slot_argmax

// What a search wrote; sanitizers see a write beyond it.
struct Found {
  Tokens tokens, lengths;
  std::vector<float> scores;
  int64_t fault = cuda::kNoFault;

  Found(const Case& c, int64_t width)
      : tokens(static_cast<size_t>(c.passages() * std::max(width, int64_t{1}) * c.slots), -7),
        lengths(static_cast<size_t>(c.passages() * std::max(width, int64_t{1})), -7),
        scores(lengths.size(), -7) {}

  bool operator==(const Found& other) const {
    return tokens == other.tokens && lengths == other.lengths && fault == other.fault &&
           scores.size() == other.scores.size() &&
           std::equal(scores.begin(), scores.end(), other.scores.begin(),
                      [](float a, float b) { return same_bits(a, b); });
  }
};

std::vector<const Automaton*> pointers_of(const Case& c) {
  std::vector<const Automaton*> pointers;
  for (const Automaton& automaton : c.automata) pointers.push_back(&automaton);
  return pointers;
}

Found run_cpu(const Case& c, int64_t width) {
  std::vector<const Automaton*> constraints;
  for (const int32_t a : c.automaton_of) {
    constraints.push_back(a < 0 ? nullptr : &c.automata[static_cast<size_t>(a)]);
  }
  const SlotSearch search{c.logits.view(),    c.passages(), c.slots,
                          constraints.data(), c.end_id,     c.min_tokens};
  Found found(c, width);
  const SlotAnswers answers{found.tokens.data(), found.lengths.data(), found.scores.data()};
  if (width == kGreedy) {
    slot_argmax(search, answers);
  } else {
    slot_topk(search, width, answers);
  }
  return found;
}

Found run_device(const Case& c, int64_t width, const Stats& stats, bool no_automaton_of = false) {
  const PackedAutomata automata(pointers_of(c));
  Found found(c, width);
  const int64_t bytes = cuda::slot_topk_bytes(c.passages(), c.slots, width);
  std::vector<uint64_t> space(width == kGreedy ? 0 : static_cast<size_t>(bytes + 15) / 16 * 2,
                              ~uint64_t{0});
  cuda::SlotSearch search;
  search.logits = c.logits.view();
  search.passages = c.passages();
  search.slots = c.slots;
  search.max = stats.max.data();
  search.argmax = stats.argmax.data();
  search.logsumexp = stats.logsumexp.data();
  search.automata = automata.view();
  search.automaton_of = no_automaton_of ? nullptr : c.automaton_of.data();
  search.end_id = c.end_id;
  search.min_tokens = c.min_tokens;
  search.tokens = found.tokens.data();
  search.lengths = found.lengths.data();
  search.scores = found.scores.data();
  search.fault = &found.fault;
  search.workspace = space.data();
  if (width == kGreedy) {
    cuda::slot_argmax(search, nullptr);
  } else {
    cuda::slot_topk(search, width, nullptr);
  }
  return found;
}

Found run_device(const Case& c, int64_t width) {
  return run_device(c, width, stats_of_cpu(c.logits));
}

void compare(const Case& c, int64_t width) {
  const std::vector<unsigned char> bytes = c.logits.bytes();
  const Found expected = run_cpu(c, width), found = run_device(c, width);
  CHECK_EQ(found.fault, cuda::kNoFault);
  CHECK_EQ(found.lengths, expected.lengths);
  CHECK_EQ(found.tokens, expected.tokens);
  CHECK_EQ(found.scores, expected.scores);
  CHECK(c.logits.bytes() == bytes);
}

// With row_pass; `no_ties`: answers whose scores differ by rounding are the same one.
void compare_with_row_pass(const Case& c, int64_t width, bool no_ties) {
  const Found expected = run_cpu(c, width);
  const Found found = run_device(c, width, stats_of_row_pass(c.logits));
  CHECK_EQ(found.fault, cuda::kNoFault);
  if (no_ties) CHECK_EQ(found.lengths, expected.lengths);
  if (no_ties) CHECK_EQ(found.tokens, expected.tokens);
  for (size_t i = 0; i < found.scores.size(); ++i) {
    const float a = found.scores[i], b = expected.scores[i];
    CHECK(a == b || std::fabs(a - b) <= 1e-6f * b);
  }
}

// --- random cases --------------------------------------------------------------------------------

enum class Kind : uint8_t {
  kNormal,
  kSharp,     // many probabilities near 0, some that float32 cannot hold
  kTies,      // few different numbers
  kEqual,     // one number
  kNearTies,  // apart by units in the last place
  kMasked,    // most entries -inf
  kOneEntry,  // all but one -inf
  kCount
};

void fill_row(Kind kind, int64_t row, Matrix& x, std::mt19937& random) {
  std::normal_distribution<float> normal(0, kind == Kind::kSharp ? 20.0f : 2.0f);
  const auto cols = static_cast<uint32_t>(x.cols());
  for (int64_t c = 0; c < x.cols(); ++c) {
    const auto dice = random();
    float value = normal(random);
    if (kind == Kind::kTies) value = static_cast<float>(dice % 3);
    if (kind == Kind::kEqual) value = dice % 2 == 0 ? 0.0f : -0.0f;
    if (kind == Kind::kNearTies) value = 1.0f + static_cast<float>(dice % 4) * 0x1p-22f;
    if (kind == Kind::kMasked && dice % 4 != 0) value = -kInf;
    if (kind == Kind::kOneEntry) value = -kInf;
    x.set(row, c, value);
  }
  if (kind == Kind::kMasked || kind == Kind::kOneEntry) x.set(row, random() % cols, 1.0f);
}

// Of few different tokens, so that sequences share pieces.
Automaton random_automaton(int64_t cols, int32_t end_id, std::mt19937& random) {
  if (cols == 1) return random() % 2 == 0 ? Automaton() : fastmrc_test::trie_of({{}});
  const Tokens alphabet = fastmrc_test::random_alphabet(1 + random() % 6, cols, end_id, random);
  const auto kind = random() % 5;
  if (kind == 4) return fastmrc_test::random_graph(8, 2, alphabet, random);
  const bool spans = kind < 2;
  const auto sequences = fastmrc_test::random_sequences(random() % (spans ? 4 : 30), spans ? 30 : 7,
                                                        false, alphabet, random);
  return spans ? fastmrc_test::spans_of(sequences) : fastmrc_test::trie_of(sequences);
}

// Passages share automata. free: passages without a constraint too.
Case random_case(DType dtype, int64_t passages, int64_t slots, int64_t cols, Kind kind, bool free,
                 std::mt19937& random) {
  const int64_t gap = random() % 3;
  Case c{Matrix(dtype, passages * slots, cols, cols + gap, gap / 2), slots, 0, 0, {}, {}};
  const int64_t ends[] = {0, cols / 2, cols - 1};
  c.end_id = static_cast<int32_t>(ends[random() % 3]);
  if (random() % 2 == 0) c.min_tokens = random() % static_cast<uint32_t>(slots + 2);
  for (int a = 0; a < 3; ++a) c.automata.push_back(random_automaton(cols, c.end_id, random));
  for (int64_t p = 0; p < passages; ++p) {
    c.automaton_of.push_back(static_cast<int32_t>(random() % (free ? 4 : 3)) - (free ? 1 : 0));
  }
  for (int64_t r = 0; r < c.logits.rows(); ++r) fill_row(kind, r, c.logits, random);
  return c;
}

void describe(const char* what, uint64_t i, const Case& c, Kind kind, int64_t width) {
  context() = std::string(what) + " " + std::to_string(i) + ": " +
              fastmrc_test::name_of(c.logits.dtype()) + " " + std::to_string(c.passages()) + "x" +
              std::to_string(c.slots) + "x" + std::to_string(c.logits.cols()) + " kind " +
              std::to_string(static_cast<int>(kind)) + " end " + std::to_string(c.end_id) +
              " min " + std::to_string(c.min_tokens) + " width " + std::to_string(width);
}

void test_random(const char* what, bool greedy, uint64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  const int64_t widths[] = {1, 2, 3, 5, 8, 33, 64};
  const int64_t columns[] = {1, 2, 3, 9, 40, 300};
  const int64_t most_slots[] = {1, 2, 4, 7, 12};
  for (uint64_t i = 0; i < count; ++i) {
    const int64_t width = greedy ? kGreedy : widths[i % 7];
    const auto kind = static_cast<Kind>(random() % static_cast<uint32_t>(Kind::kCount));
    const int64_t passages = random() % 4, slots = most_slots[random() % 5];
    const Case c =
        random_case(kDTypes[i % 3], passages, slots, columns[random() % 6], kind, greedy, random);
    describe(what, i, c, kind, width);
    emulation::set_order(i % 3 == 0 ? 0 : i);
    compare(c, width);
    const bool no_ties = kind == Kind::kNormal && c.logits.dtype() == DType::kFloat32;
    if (i % 4 == 0) compare_with_row_pass(c, width, no_ties);
  }
  emulation::set_order(0);
}

// --- large cases ---------------------------------------------------------------------------------

// As a reader makes them: 32 slots, a vocabulary of 21,128, passages of 400 tokens, of which one
// span stands out or none; and a trie of many sequences that share their first token.
void test_large() {
  constexpr int64_t kSlots = 32, kCols = 21128;
  std::mt19937 random(11);
  for (const DType dtype : kDTypes) {
    Case c{Matrix(dtype, 4 * kSlots, kCols), kSlots, 102, 0, {}, {0, 0, 1, 2}};
    for (int64_t r = 0; r < c.logits.rows(); ++r) {
      fill_row(r < 3 * kSlots ? Kind::kNormal : Kind::kTies, r, c.logits, random);
    }
    const Tokens alphabet = fastmrc_test::random_alphabet(250, kCols, c.end_id, random);
    const Tokens passage = fastmrc_test::random_sequences(1, 400, true, alphabet, random)[0];
    for (int64_t i = 0; i < 7; ++i) {
      const int32_t token = i == 6 ? c.end_id : passage[static_cast<size_t>(100 + i)];
      c.logits.set(i, token, 14.0f);
    }
    c.automata.push_back(fastmrc_test::spans_of({passage}));
    std::vector<Tokens> names = fastmrc_test::random_sequences(800, 9, false, alphabet, random);
    for (Tokens& name : names) name.insert(name.begin(), alphabet[0]);
    c.automata.push_back(fastmrc_test::trie_of(names));
    c.automata.push_back(
        fastmrc_test::spans_of(fastmrc_test::random_sequences(2, 200, true, alphabet, random)));
    for (const int64_t width : {kGreedy, int64_t{1}, int64_t{5}, int64_t{64}}) {
      describe("large", 0, c, Kind::kNormal, width);
      emulation::set_order(static_cast<uint64_t>(width));
      compare(c, width);
    }
    c.min_tokens = 1;
    compare_with_row_pass(c, 3, false);
  }
  emulation::set_order(0);
}

// A root with several edges for each thread, of which few lead to answers: all threads go on
// without finding any.
void test_many_first_tokens() {
  constexpr int64_t kSlots = 3, kCols = 6000;
  std::mt19937 random(16);
  Case c{Matrix(DType::kBFloat16, kSlots, kCols), kSlots, 0, 3, {}, {0}};
  for (int64_t r = 0; r < kSlots; ++r) fill_row(Kind::kTies, r, c.logits, random);
  std::vector<Tokens> names;
  for (int32_t v = 1; v < kCols; ++v) {
    names.push_back({v});
    if (v % 500 == 7) names.push_back({v, v / 2, v});
  }
  c.automata.push_back(fastmrc_test::trie_of(names));
  for (uint64_t seed = 0; seed < 5; ++seed) {
    emulation::set_order(seed);
    describe("first tokens", seed, c, Kind::kTies, 4);
    compare(c, 4);
  }
  emulation::set_order(0);
}

// More passages than blocks: each block serves several, of equal logits with equal answers.
void test_many_passages() {
  context() = "many passages";
  std::mt19937 random(12);
  Case c = random_case(DType::kFloat32, 300, 2, 9, Kind::kNormal, false, random);
  c.min_tokens = 0;
  compare(c, 3);
  compare(c, kGreedy);
  for (int64_t r = 2; r < c.logits.rows(); ++r) {
    for (int64_t v = 0; v < 9; ++v) c.logits.set(r, v, c.logits.at(r % 2, v));
  }
  c.automaton_of.assign(300, 1);
  compare(c, 3);
}

// Every order of the threads gives the same, to the bit.
void test_orders() {
  std::mt19937 random(13);
  for (const Kind kind : {Kind::kNormal, Kind::kTies, Kind::kEqual, Kind::kNearTies}) {
    Case c{Matrix(DType::kFloat32, 6, 30), 6, 7, 0, {}, {0}};
    for (int64_t r = 0; r < 6; ++r) fill_row(kind, r, c.logits, random);
    const Tokens alphabet = fastmrc_test::random_alphabet(12, 30, 7, random);
    c.automata.push_back(
        fastmrc_test::spans_of(fastmrc_test::random_sequences(2, 150, true, alphabet, random)));
    emulation::set_order(0);
    const Found first = run_device(c, 17);
    for (uint64_t seed = 1; seed < 8; ++seed) {
      describe("order", seed, c, kind, 17);
      emulation::set_order(seed);
      CHECK(run_device(c, 17) == first);
      compare(c, 17);
    }
  }
  emulation::set_order(0);
}

// All strings of two tokens: states are few, paths many. Of equal answers the first ones; and the
// second token of a string is the likely one, so that what is tried first is worst.
void test_many_paths() {
  constexpr int64_t kSlots = 40;
  Tokens begin, tokens, targets;
  std::vector<uint8_t> flags;
  for (int32_t s = 0; s <= kSlots; ++s) {
    begin.push_back(static_cast<int32_t>(tokens.size()));
    flags.push_back(1);
    for (int32_t token = 1; token <= 2 && s < kSlots; ++token) {
      tokens.push_back(token);
      targets.push_back(s + 1);
    }
  }
  begin.push_back(static_cast<int32_t>(tokens.size()));
  Case c = small_case(kSlots, 4, 0, Automaton(begin, tokens, targets, flags));
  for (const float favour : {0.0f, 1.5f, -1.5f}) {
    for (int64_t r = 0; r < kSlots; ++r) c.logits.set(r, 2, favour);
    for (const int64_t min_tokens : {int64_t{0}, kSlots}) {
      c.min_tokens = min_tokens;
      for (const int64_t width : {1, 6, 64}) {
        describe("paths", 0, c, Kind::kEqual, width);
        compare(c, width);
      }
    }
  }
}

// Nothing but tiny probabilities: 9 has all of slot 0 but stands only behind other tokens.
void test_tiny_scores() {
  const std::vector<Tokens> sequences{{1, 9}, {2, 9}, {3, 9}, {4, 9}};
  for (const float logit : {-10.0f, -45.0f, -80.0f, -101.0f, -200.0f}) {
    for (const bool spans : {false, true}) {
      context() = "tiny scores, logit " + std::to_string(logit);
      Case c = small_case(
          2, 10, 0, spans ? fastmrc_test::spans_of(sequences) : fastmrc_test::trie_of(sequences));
      c.min_tokens = 2;
      c.logits.fill(-kInf);
      c.logits.set(0, 9, 0.0f);
      c.logits.set(1, 5, 0.0f);
      for (int32_t v = 1; v <= 4; ++v) c.logits.set(0, v, logit + 0.5f * static_cast<float>(v));
      c.logits.set(1, 9, logit);
      for (const int64_t width : {1, 2, 6}) compare(c, width);
    }
  }
}

// --- small cases ---------------------------------------------------------------------------------

// P = 1/8, 1/2, 1/4, 1/8 in each slot; the passage is 2 3 2, the end token 1.
void test_by_hand() {
  context() = "by hand";
  Case c = small_case(3, 4, 1, fastmrc_test::spans_of({{2, 3, 2}}));
  const double p[] = {0.125, 0.5, 0.25, 0.125};
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t v = 0; v < 4; ++v) c.logits.set(row, v, static_cast<float>(std::log(p[v])) + 3);
  }
  const Found all = run_device(c, 8);
  CHECK_EQ(all.lengths, (Tokens{0, 1, 1, 2, 2, 3, -1, -1}));
  CHECK_EQ(all.tokens, (Tokens{-1, -1, -1, 2, -1, -1, 3,  -1, -1, 2,  3,  -1,
                               3,  2,  -1, 2, 3,  2,  -1, -1, -1, -1, -1, -1}));
  const double scores[] = {0.5, 0.75 / 2, 0.625 / 2, 0.875 / 3, 0.875 / 3, 0.625 / 3};
  for (size_t i = 0; i < 6; ++i)
    CHECK(std::fabs(static_cast<double>(all.scores[i]) - scores[i]) < 1e-6);
  CHECK_EQ(all.scores[7], -kInf);
  c.min_tokens = 1;
  CHECK_EQ(run_device(c, kGreedy).tokens, (Tokens{2, -1, -1}));
}

void test_no_answer() {
  context() = "no answer";
  Case none = small_case(2, 3, 1, Automaton());
  CHECK_EQ(run_device(none, kGreedy).lengths, Tokens{-1});
  CHECK_EQ(run_device(none, 2).lengths, (Tokens{-1, -1}));
  CHECK_EQ(run_device(none, 2).scores, (std::vector<float>{-kInf, -kInf}));
  context() = "not final after all slots";
  Case longer = small_case(2, 6, 0, fastmrc_test::trie_of({{5, 4, 3}, {1, 2}, {2}}));
  longer.logits.set(0, 5, 3.0f);
  CHECK_EQ(run_device(longer, kGreedy).tokens, (Tokens{-1, -1}));
  CHECK_EQ(run_device(longer, kGreedy).scores, std::vector<float>{-kInf});
  compare(longer, 3);
  context() = "vocabulary 1";
  Case one = small_case(3, 1, 0, Automaton());
  one.automaton_of = {-1};
  compare(one, kGreedy);
  one.min_tokens = 1;
  compare(one, kGreedy);
  context() = "no passages";
  Case nothing{Matrix(DType::kFloat32, 0, 4), 2, 0, 0, {}, {}};
  CHECK_EQ(run_device(nothing, kGreedy).fault, cuda::kNoFault);
  CHECK_EQ(run_device(nothing, 3).fault, cuda::kNoFault);
}

// automaton_of null is the same as -1 everywhere.
void test_without_automata() {
  context() = "without automata";
  std::mt19937 random(14);
  Case c = random_case(DType::kFloat16, 5, 4, 300, Kind::kNormal, true, random);
  c.automaton_of.assign(5, -1);
  c.min_tokens = 2;
  for (int64_t r = 0; r < c.logits.rows(); r += 3) c.logits.set(r, c.end_id, 20.0f);
  compare(c, kGreedy);
  const Stats stats = stats_of_cpu(c.logits);
  CHECK(run_device(c, kGreedy, stats, true) == run_device(c, kGreedy, stats));
  CHECK_THROWS(run_device(c, 1, stats, true), std::invalid_argument, "automaton_of");
}

// --- faults --------------------------------------------------------------------------------------

int64_t fault_of(int64_t row, cuda::Fault kind) { return row << 8 | static_cast<int64_t>(kind); }

void spoil(Case& c, int64_t row, cuda::Fault kind, std::mt19937& random) {
  if (kind == cuda::Fault::kMasked) {
    for (int64_t v = 0; v < c.logits.cols(); ++v) c.logits.set(row, v, -kInf);
  } else {
    c.logits.set(row, random() % static_cast<uint32_t>(c.logits.cols()),
                 kind == cuda::Fault::kNan ? kNan : kInf);
  }
}

// Checks that passage p was faulty, and that the others came out as before.
void check_faulty(const Found& found, const Found& before, int64_t p, size_t width, size_t slots) {
  Found expected = before;
  for (size_t i = static_cast<size_t>(p) * width; i < static_cast<size_t>(p + 1) * width; ++i) {
    expected.lengths[i] = -1;
    for (size_t s = 0; s < slots; ++s) expected.tokens[i * slots + s] = -1;
    CHECK(std::isnan(found.scores[i]));
    expected.scores[i] = found.scores[i];
  }
  expected.fault = found.fault;
  CHECK(found == expected);
}

// How many rows the greedy answer of a passage takes.
int64_t rows_reached(const Case& c, const Found& found, int64_t p) {
  const int64_t length = found.lengths[static_cast<size_t>(p)];
  return length < 0 ? 1 : std::min(length + 1, c.slots);
}

void test_faulty_rows() {
  std::mt19937 random(15);
  int64_t unreached = 0;
  for (uint64_t i = 0; i < 18; ++i) {
    const Case c = random_case(kDTypes[i % 3], 3, 5, 40, Kind::kNormal, true, random);
    emulation::set_order(i);
    const Found greedy = run_device(c, kGreedy, stats_of_row_pass(c.logits));
    for (const cuda::Fault kind :
         {cuda::Fault::kNan, cuda::Fault::kInfinity, cuda::Fault::kMasked}) {
      describe("faulty rows", i, c, Kind::kNormal, kGreedy);
      const int64_t p = random() % 3, reached = rows_reached(c, greedy, p);
      const int64_t bad = p * c.slots + random() % static_cast<uint32_t>(reached);
      Case spoiled = c;
      spoil(spoiled, bad, kind, random);
      const Found found = run_device(spoiled, kGreedy, stats_of_row_pass(spoiled.logits));
      CHECK_EQ(found.fault, fault_of(bad, kind));
      check_faulty(found, greedy, p, 1, 5);
      if (greedy.lengths[static_cast<size_t>(p)] < 0) continue;
      Case behind = c;
      for (int64_t slot = reached; slot < c.slots; ++slot, ++unreached) {
        spoil(behind, p * c.slots + slot, kind, random);
      }
      CHECK(run_device(behind, kGreedy, stats_of_row_pass(behind.logits)) == greedy);
    }
    Case all = random_case(kDTypes[i % 3], 3, 5, 40, Kind::kNormal, false, random);
    describe("faulty rows", i, all, Kind::kNormal, 4);
    const Found exact = run_device(all, 4, stats_of_row_pass(all.logits));
    const cuda::Fault kinds[] = {cuda::Fault::kNan, cuda::Fault::kInfinity, cuda::Fault::kMasked};
    const int64_t bad = random() % 15;
    spoil(all, bad, kinds[i / 3 % 3], random);
    const Found found = run_device(all, 4, stats_of_row_pass(all.logits));
    CHECK_EQ(found.fault, fault_of(bad, kinds[i / 3 % 3]));
    check_faulty(found, exact, bad / 5, 4, 5);
  }
  CHECK(unreached > 20);
  emulation::set_order(0);
}

// Tokens that are none and end tokens inside, of one passage of two.
void test_faulty_constraints() {
  for (const bool spans : {false, true}) {
    const auto make = spans ? fastmrc_test::spans_of : fastmrc_test::trie_of;
    const auto run = [&](const std::vector<Tokens>& sequences, int64_t width) {
      Case c{Matrix(DType::kFloat32, 4, 6), 2, 2, 1, {}, {1, 0}};
      c.logits.fill(0.0f);
      for (int64_t r = 0; r < 4; ++r) c.logits.set(r, 1, 1.0f);
      c.automata = {make(sequences), make({{1, 3}})};
      return run_device(c, width);
    };
    context() = spans ? "faulty spans" : "faulty tries";
    for (const int64_t width : {kGreedy, int64_t{2}}) {
      const Found sound = run({{1, 3}}, width);
      CHECK_EQ(sound.fault, cuda::kNoFault);
      const auto w = static_cast<size_t>(std::max(width, int64_t{1}));
      // In the first slot or, where greedy looks at what it reaches only, in the second.
      const int64_t second = width == kGreedy && !spans ? 3 : 2;
      const Found beyond = run({{1, 6}}, width);
      CHECK_EQ(beyond.fault, fault_of(second, cuda::Fault::kToken));
      check_faulty(beyond, sound, 1, w, 2);
      const Found end = run({{1, 2}}, width);
      CHECK_EQ(end.fault, fault_of(second, cuda::Fault::kEndToken));
      check_faulty(end, sound, 1, w, 2);
      const Found both = run({{1, 2}, {1, 70000}}, width);
      CHECK_EQ(both.fault, fault_of(second, cuda::Fault::kToken));
    }
  }
}

void test_arguments() {
  context() = "arguments";
  Case c = small_case(2, 4, 0, Automaton());
  CHECK_THROWS(run_device(c, 65), std::invalid_argument, "expected 1 to 64 answers, got 65");
  CHECK_THROWS(run_device(c, -1), std::invalid_argument, "width: expected 1 to 64");
  cuda::SlotSearch search;
  CHECK_THROWS(cuda::slot_argmax(search, nullptr), std::invalid_argument, "slots");
  CHECK_THROWS(cuda::slot_topk(search, 1, nullptr), std::invalid_argument, "slots");
  // Memory for blocks does not grow beyond 256 passages; the rest, 17 bytes a row, does.
  const int64_t few = cuda::slot_topk_bytes(256, 64, 8);
  CHECK_EQ(cuda::slot_topk_bytes(int64_t{1} << 30, 64, 8) - few,
           ((int64_t{1} << 30) - 256) * 64 * 17);
  CHECK_EQ(few, int64_t{256} * 64 * (17 + 256 * 16 + 16 + (2 * 8 + 192) * 4));
}

}  // namespace

int main() {
  test_random("greedy", true, 400, 1);
  test_random("exact", false, 400, 2);
  test_large();
  test_many_first_tokens();
  test_many_passages();
  test_orders();
  test_many_paths();
  test_tiny_scores();
  test_by_hand();
  test_no_answer();
  test_without_automata();
  test_faulty_rows();
  test_faulty_constraints();
  test_arguments();
  return fastmrc_test::report();
}
