// The native vector of one instruction set, on the compiler's vector extensions.
//
// Included by the per-instruction-set translation units only, inside their own namespace
// (FASTMRC_ISA_NAMESPACE), so that no symbol compiled for one set can be linked into another.
//
// Results must not depend on the instruction set. Every kernel therefore works on groups of
// kGroupLanes elements, element i of a row always belongs to lane i % kGroupLanes, lanes are
// reduced in one fixed order, and a multiply-add is fused only where vfma says so
// (-ffp-contract=off); a set without the instruction computes the same bits in double precision.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastmrc {
namespace FASTMRC_ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

constexpr int kGroupLanes = 64;
constexpr int kGroup = kGroupLanes / kWidth;  // native vectors per group

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth)));

constexpr float kInf = std::numeric_limits<float>::infinity();

// Storage types of the two half-precision formats.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline Vec broadcast(float x) { return Vec{} + x; }

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline UintVec load_bits(const void* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, UintVec);
}

inline Vec load(const BFloat16* p) { return bit_cast<Vec>(load_bits(p) << 16); }

// IEEE binary16 to binary32, exact; integer arithmetic so that no set needs F16C.
inline Vec load(const Float16* p) {
  const UintVec bits = load_bits(p);
  const UintVec sign = (bits & 0x8000u) << 16;
  const UintVec magnitude = bits & 0x7fffu;
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  UintVec normal = (magnitude << 13) + kRebias;
  normal += bit_cast<UintVec>(magnitude >= 0x7c00u) & kRebias;  // infinities and NaN
  const Vec subnormal = __builtin_convertvector(bit_cast<IntVec>(magnitude), Vec) * 0x1.0p-24f;
  const UintVec is_subnormal = bit_cast<UintVec>(magnitude < 0x0400u);
  const UintVec value = (normal & ~is_subnormal) | (bit_cast<UintVec>(subnormal) & is_subnormal);
  return bit_cast<Vec>(value | sign);
}

template <typename T>
inline float load_one(const T* p) {
  T padded[kWidth] = {};
  padded[0] = *p;
  return load(padded)[0];
}
template <>
inline float load_one<float>(const float* p) {
  return *p;
}

template <typename T>
inline T negative_infinity();
template <>
inline float negative_infinity<float>() {
  return -kInf;
}
template <>
inline Float16 negative_infinity<Float16>() {
  return {0xfc00};
}
template <>
inline BFloat16 negative_infinity<BFloat16>() {
  return {0xff80};
}

// Larger of a and b; b where either is NaN.
inline Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Bit i is set where a[i] >= b[i].
inline uint32_t ge_mask(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(a, b)));
#else
  const IntVec ge = a >= b;
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= (ge[i] & 1u) << i;
  return mask;
#endif
}

// Whether any lane of a or b is NaN: one comparison serves two vectors.
inline uint32_t unordered_mask(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpunord_ps(a, b)));
#else
  const IntVec unordered = (a != a) | (b != b);
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= (unordered[i] & 1u) << i;
  return mask;
#endif
}

inline bool any(IntVec mask) {
  typedef int64_t Pairs __attribute__((vector_size(4 * kWidth)));
  const Pairs pairs = bit_cast<Pairs>(mask);
  int64_t joined = 0;
  for (int i = 0; i < kWidth / 2; ++i) joined |= pairs[i];
  return joined != 0;
}

inline Vec select(IntVec mask, Vec yes, Vec no) {
  return bit_cast<Vec>((bit_cast<IntVec>(yes) & mask) | (bit_cast<IntVec>(no) & ~mask));
}

// a * b + c, rounded once.
inline Vec vfma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return bit_cast<Vec>(
      vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
#else
  // The product is exact in double precision, so rounding its sum with c to float is right unless
  // that sum, itself rounded, lies halfway between two floats (the test of musl's fmaf); results
  // here are never subnormal. Halfway cases are rare and take the library's function.
  typedef double Double __attribute__((vector_size(8 * kWidth)));
  typedef uint64_t Long __attribute__((vector_size(8 * kWidth)));
  const Double sum = __builtin_convertvector(a, Double) * __builtin_convertvector(b, Double) +
                     __builtin_convertvector(c, Double);
  Vec result = __builtin_convertvector(sum, Vec);
  const UintVec low = __builtin_convertvector(bit_cast<Long>(sum), UintVec) & 0x1fffffffu;
  const IntVec halfway = low == 0x10000000u;
  for (int i = 0; any(halfway) && i < kWidth; ++i) {
    if (halfway[i] != 0) result[i] = std::fma(a[i], b[i], c[i]);
  }
  return result;
#endif
}

constexpr float kLog2E = 1.44269504088896341f;

// 2^t for t <= 64 to 2e-7 relative, 1 for 0. Below -126 the result is at most 2^-126, and how much
// less is the one thing here that depends on the set: sums are taken relative to a term of about
// one and votes get kEps added, so it is lost in rounding. NaN stays NaN whatever its payload.
//
// With n the nearest integer and f the rest, 2^t = 2^n * 2^f: 2^f by a polynomial of degree 5
// fitted to least relative error on [-0.5, 0.5] with value 1 at 0 (8e-8).
inline Vec vexp2(Vec t) {
#if defined(__AVX512F__)
  const Vec f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // 1.5 * 2^23, adding which rounds to the nearest integer, as above to an even one if two are.
  constexpr float kMagic = 12582912.0f;
  t = vmax(broadcast(-126.0f), t);
  const Vec shifted = t + kMagic;
  const Vec f = t - (shifted - kMagic);  // exact
#endif
  Vec p = vfma(f, broadcast(1.3274633365618637e-3f), broadcast(9.6719616795933085e-3f));
  p = vfma(p, f, broadcast(5.5506783687203055e-2f));
  p = vfma(p, f, broadcast(2.4022235322361932e-1f));
  p = vfma(p, f, broadcast(6.9314706156025063e-1f));
  p = vfma(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, t - f);
#else
  // The low bits of `shifted` hold n; 127 is the bias of the exponent.
  return p * bit_cast<Vec>((bit_cast<UintVec>(shifted) + 127u) << 23);
#endif
}

// exp(x) for x <= 0; the rounding of x * log2(e) adds a relative error of 4e-6 at -87.
inline Vec vexp(Vec x) { return vexp2(x * kLog2E); }

constexpr int kDoubleWidth = kWidth / 2;
typedef double DoubleVec __attribute__((vector_size(4 * kWidth)));
typedef float FloatVec __attribute__((vector_size(2 * kWidth)));  // as many as doubles
typedef int64_t LongVec __attribute__((vector_size(4 * kWidth)));

// exp(x) for x <= 0 to 4e-16 relative; 0 below -708. No fused operations: the same on every set.
//
// x = n ln 2 + r, |r| <= ln(2) / 2, with ln 2 in two parts of which the first has few digits, so
// that n times it is exact; exp(r) by its Taylor series, whose rest is below 5e-18.
inline DoubleVec vexp(DoubleVec x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52, adding which rounds to an integer
  const LongVec tiny = x < -708.0;
  x = bit_cast<DoubleVec>(bit_cast<LongVec>(x) & ~tiny);
  const DoubleVec shifted = x * 1.4426950408889634 + kMagic;
  const DoubleVec n = shifted - kMagic;
  const DoubleVec r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  DoubleVec p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  constexpr double kFactorials[] = {39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                    720.0,      120.0,     24.0,     6.0,     2.0};
  for (const double factorial : kFactorials) p = p * r + 1.0 / factorial;
  p = (p * r) * r + r + 1.0;
  // The low bits of `shifted` hold n, those of kMagic's exponent are shifted out.
  const LongVec exponent = (bit_cast<LongVec>(shifted) + 1023) << 52;
  p *= bit_cast<DoubleVec>(exponent);
  return bit_cast<DoubleVec>(bit_cast<LongVec>(p) & ~tiny);
}

// log(x) for positive normal x: Cephes logf.
inline Vec vlog(Vec x) {
  const UintVec bits = bit_cast<UintVec>(x);
  IntVec exponent = bit_cast<IntVec>(bits >> 23) - 126;
  Vec m = bit_cast<Vec>((bits & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  const IntVec below = m < 0.707106781186547524f;
  exponent += below;  // minus one where true
  m = m + select(below, m, Vec{}) - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  const Vec z = m * m;
  Vec p = vfma(m, broadcast(7.0376836292e-2f), broadcast(-1.1514610310e-1f));
  p = vfma(p, m, broadcast(1.1676998740e-1f));
  p = vfma(p, m, broadcast(-1.2420140846e-1f));
  p = vfma(p, m, broadcast(1.4249322787e-1f));
  p = vfma(p, m, broadcast(-1.6668057665e-1f));
  p = vfma(p, m, broadcast(2.0000714765e-1f));
  p = vfma(p, m, broadcast(-2.4999993993e-1f));
  p = vfma(p, m, broadcast(3.3333331174e-1f));
  p = p * m * z + e * -2.12194440e-4f - z * 0.5f;
  return m + p + e * 0.693359375f;
}

}  // namespace
}  // namespace FASTMRC_ISA_NAMESPACE
}  // namespace fastmrc
