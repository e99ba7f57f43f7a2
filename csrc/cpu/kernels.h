// Row kernels, one table per instruction set, chosen once at run time.
#pragma once

#include <cstdint>

#include "fastmrc/rows.h"

namespace fastmrc {

// What one pass over a row of logits yields.
struct RowStats {
  float max = 0;        // NaN if the row holds a NaN
  int32_t argmax = -1;  // lowest index on ties; -1 if every entry is -inf or one is NaN
  double logsumexp = 0;
};

enum class Vote : uint8_t { kOriginal, kMean, kMax, kProduct, kWeighted };

constexpr double kEps = 1e-12;  // added to every vote before its logarithm

// The rows that vote on the continuations of one hypothesis.
struct VoteRows {
  const void* const* rows;  // [passages]
  DType dtype;
  const double* logsumexp;  // [passages]
  const float* weights;     // [passages], vote kWeighted only
  int32_t passages;
  Vote vote;
};

// Lanes over which the maxima of a part of a row are kept.
constexpr int kMaxLanes = 64;
// Elements of such a part: a multiple of the lanes; small enough that most parts hold none of the
// largest entries, large enough that their maxima are few.
constexpr int64_t kMaxSegment = 1024;

struct Kernels {
  // If `maxima` is not null, also what lane_max gives for each segment of kMaxSegment elements:
  // [segments, kMaxLanes].
  RowStats (*row_stats)(const void* row, DType dtype, int64_t n, float* maxima);

  // Sum of exp((x - max) / temperature) over elements [begin, end), to 1e-6 relative for
  // temperatures from 0.01; `max` finite and at least every element.
  double (*sum_exp)(const void* row, DType dtype, int64_t begin, int64_t end, float max,
                    double temperature);

  // Writes the maximum over (i - begin) % kMaxLanes == lane of elements [begin, end) to
  // out[kMaxLanes] (-inf where there is none). Returns false if a NaN was seen.
  bool (*lane_max)(const void* row, DType dtype, int64_t begin, int64_t end, float* out);

  // out[j] = largest of values[j], values[j + lanes], ...; `count` and `lanes` are multiples of
  // kMaxLanes, lanes <= count.
  void (*fold_max)(const float* values, int64_t count, int64_t lanes, float* out);

  // Appends the indices in [begin, end) whose value is at least `threshold`; returns their number.
  // `ids` must hold end - begin entries.
  int64_t (*collect)(const void* row, DType dtype, int64_t begin, int64_t end, float threshold,
                     int32_t* ids);

  // The same of every kMaxLanes-th element of [begin, end), from the first on.
  int64_t (*collect_lane)(const void* row, DType dtype, int64_t begin, int64_t end, float threshold,
                          int32_t* ids);

  // Writes to out[end - begin] votes of tokens [begin, end) plus kEps, to 2e-5 + 1e-6 * passages
  // relative; only a filter: what passes is scored again in double precision.
  void (*approximate_votes)(const VoteRows& rows, int64_t begin, int64_t end, float* out);

  // out[i] = element ids[i] of the row, as float.
  void (*gather)(const void* row, DType dtype, const int32_t* ids, int64_t n, float* out);

  // out[i] = exp(x[i] - largest of x) to 4e-16 relative, 0 below exp(-708); finite x.
  void (*exp_to_largest)(const float* x, int64_t n, double* out);

  // Single element as float.
  float (*load_one)(const void* row, DType dtype, int64_t i);
};

enum class Isa : uint8_t { kGeneric, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
// The set in use: the best one the processor offers, or the one named by the environment variable
// FASTMRC_FORCE_ISA (generic, avx2, avx512); std::invalid_argument if that is unknown or missing.
Isa active_isa();
const Kernels& kernels();
// The table of one set; std::invalid_argument if this processor or build does not offer it.
const Kernels& kernels_of(Isa isa);
bool isa_available(Isa isa);

}  // namespace fastmrc
