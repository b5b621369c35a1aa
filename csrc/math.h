// exp, expm1, log and log1p, written once for float, double, their SIMD vectors and CUDA threads, with the
// small differences that the divergences need (gap + expm1(-gap), y - log1p(y)) to full relative accuracy.
//
// T is a scalar or a SIMD vector; conditions are written with ?: because it selects lane by lane on both.
// Relative errors (tests/test_math.py measures them against mpmath): 4e-7 in float and 1e-15 in double. exp and
// exp_any, which round x log2(e) first, eps |x| on top; Log1p's shortfall above 0: 1e-6 and 2e-15. Nothing here needs
// or survives -ffast-math.
#pragma once

#include "platform.h"

namespace kldiv {
inline namespace KLDIV_ISA {

// What a lane is made of. cpu/simd.h specialises this for vectors.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  using Scalar = float;
  using Int = int32_t;
};
template <>
struct Lanes<double> {
  using Scalar = double;
  using Int = int64_t;
};
template <typename T>
using Scalar = typename Lanes<T>::Scalar;
template <typename T>
using IntOf = typename Lanes<T>::Int;

// The floating-point format of a lane, and how many terms its series need.
template <typename S>
struct Format;
template <>
struct Format<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kOne = 0x3f800000;  // bits of 1.0f
  static constexpr int32_t kAllButSign = 0x7fffffff;
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;  // bits of sqrt(1/2)
  static constexpr float kRound = 12582912.0f;      // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kSmallestExponent = -126;  // of a normal number
  static constexpr float kLargestExponent = 127;
  static constexpr float kTiny = 1.17549435e-38f;  // smallest normal number
  static constexpr float kLargeGap = 20;           // (1 + gap) e^-gap is nothing beside 1
};
template <>
struct Format<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr int64_t kAllButSign = 0x7fffffffffffffff;
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kSmallestExponent = -1022;
  static constexpr double kLargestExponent = 1023;
  static constexpr double kTiny = 2.2250738585072014e-308;
  static constexpr double kLargeGap = 41;
};
template <typename T>
using FormatOf = Format<Scalar<T>>;

template <typename To, typename From>
KLDIV_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// The same number in every lane.
template <typename T>
KLDIV_HD T splat(Scalar<T> x) {
  return T{} + x;
}

template <typename T>
KLDIV_HD T infinity() {
  return splat<T>(static_cast<Scalar<T>>(__builtin_inff()));
}

template <typename T>
KLDIV_HD T nan() {
  return splat<T>(static_cast<Scalar<T>>(__builtin_nanf("")));
}

// 2^k for the integer k that `rounded` = k + kRound holds in its low mantissa bits.
template <typename T>
KLDIV_HD T power_of_two(T rounded) {
  using F = FormatOf<T>;
  return bit_cast<T>(static_cast<IntOf<T>>((bit_cast<IntOf<T>>(rounded) << F::kMantissaBits) + F::kOne));
}

// What some instruction sets have an instruction for; cpu/simd.h specialises it.
template <typename T>
struct Primitives {
  KLDIV_HD static T maximum(T a, T b) { return b > a ? b : a; }
  KLDIV_HD static T minimum(T a, T b) { return b < a ? b : a; }
  KLDIV_HD static T reciprocal(T x) { return 1 / x; }
  KLDIV_HD static T round(T x) { return (x + FormatOf<T>::kRound) - FormatOf<T>::kRound; }
  // x * 2^k for an integer k with both 2^k and the result normal numbers
  KLDIV_HD static T scale(T x, T k) { return x * power_of_two(k + FormatOf<T>::kRound); }
};

// The larger of the two; a NaN in b is passed over, one in a is kept.
template <typename T>
KLDIV_HD T maximum(T a, T b) {
  return Primitives<T>::maximum(a, b);
}
template <typename T>
KLDIV_HD T minimum(T a, T b) {
  return Primitives<T>::minimum(a, b);
}

// a where x < y, or where x == y, and b elsewhere; both of them computed: no branch.
template <typename T>
KLDIV_HD T where_less(T x, T y, T a, T b) {
  return x < y ? a : b;
}
template <typename T>
KLDIV_HD T where_equal(T x, T y, T a, T b) {
  return x == y ? a : b;
}

inline constexpr double kLn2 = 0.69314718055994530942;
inline constexpr double kLog2E = 1.44269504088896340736;

template <typename T>
inline constexpr bool kIsFloat = sizeof(Scalar<T>) == sizeof(float);

template <typename T>
KLDIV_HD T absolute(T x) {
  constexpr auto kAllButSign = FormatOf<T>::kAllButSign;
  return bit_cast<T>(static_cast<IntOf<T>>(bit_cast<IntOf<T>>(x) & kAllButSign));
}

// Polynomials. In float the best ones of their degree (Remez), in double the plain series.
namespace polynomial {

// c0 + x (c1 + x (c2 + ...))
template <typename T>
KLDIV_HD T horner(T, Scalar<T> c) {
  return splat<T>(c);
}
template <typename T, typename... Rest>
KLDIV_HD T horner(T x, Scalar<T> c, Rest... rest) {
  return horner(x, static_cast<Scalar<T>>(rest)...) * x + c;
}

template <int n>
inline constexpr double kFactorial = n * kFactorial<n - 1>;
template <>
inline constexpr double kFactorial<0> = 1;

// 1/first! + f/(first+1)! + ... + f^(last-first)/last!
template <int first, int last, typename T>
KLDIV_HD T exponential(T f) {
  constexpr auto c = static_cast<Scalar<T>>(1 / kFactorial<first>);
  if constexpr (first == last) {
    return splat<T>(c);
  } else {
    return exponential<first + 1, last>(f) * f + c;
  }
}

// 2^f for |f| <= 1/2; float: relative error 1.5e-7
template <typename T>
KLDIV_HD T exp2(T f) {
  if constexpr (kIsFloat<T>) {
    return horner(f, 1.0f, 0.693146967f, 0.240221197f, 0.0555071327f, 0.00967554134f, 0.00132764726f);
  } else {
    return exponential<0, 13>(f * kLn2);
  }
}

// (e^f - 1 - f) / f^2 for |f| <= ln(2) / 2; float: relative error 1.3e-7
template <typename T>
KLDIV_HD T exp_tail(T f) {
  if constexpr (kIsFloat<T>) {
    return horner(f, 0.5f, 0.166665771f, 0.0416665748f, 0.00836316861f, 0.00139239428f);
  } else {
    return exponential<2, 13>(f);
  }
}

// 2 (1/(2n+1) + z/(2n+3) + ... + z^(last-n)/(2 last+1))
template <int n, int last, typename T>
KLDIV_HD T odd_reciprocals(T z) {
  constexpr auto c = static_cast<Scalar<T>>(2.0 / (2 * n + 1));
  if constexpr (n == last) {
    return splat<T>(c);
  } else {
    return odd_reciprocals<n + 1, last>(z) * z + c;
  }
}

// f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)); float: relative error 5e-8
template <typename T>
KLDIV_HD T log_shortfall(T f) {
  if constexpr (kIsFloat<T>) {
    return f * f *
           horner(f, 0.499999976f, -0.333333254f, 0.250007788f, -0.200016363f, 0.166270935f, -0.141961451f,
                  0.131140359f, -0.127773386f, 0.0777804777f);
  } else {
    const T s = f / (f + 2);  // log(1 + f) = 2 atanh(s), and f - 2s = s f
    const T z = s * s;
    return s * (f - z * odd_reciprocals<1, 11>(z));
  }
}

}  // namespace polynomial

// 2^x for x up to kLargestExponent; what would underflow, -inf too, stays at the smallest normal number.
template <typename T>
KLDIV_HD T exp2_floored(T x) {
  const T clamped = maximum(x, splat<T>(FormatOf<T>::kSmallestExponent));
  const T k = Primitives<T>::round(clamped);
  return Primitives<T>::scale(polynomial::exp2(clamped - k), k);
}

// The same, and 0 at -inf: a probability is 0 only where its logarithm is -inf.
template <typename T>
KLDIV_HD T exp2(T x) {
  return x == -infinity<T>() ? T{} : exp2_floored(x);
}

// e^x, likewise.
template <typename T>
KLDIV_HD T exp(T x) {
  return exp2(x * static_cast<Scalar<T>>(kLog2E));
}

// e^x for any x: 0 where it underflows, +inf where it overflows.
template <typename T>
KLDIV_HD T exp_any(T x) {
  using F = FormatOf<T>;
  const T y = x * static_cast<Scalar<T>>(kLog2E);
  const T lowest = splat<T>(F::kSmallestExponent), highest = splat<T>(F::kLargestExponent);
  const T value = exp2(minimum(y, highest));
  return y < lowest ? T{} : (y > highest ? infinity<T>() : value);
}

// How far e^{-gap} has fallen, for gap in [0, +inf]: all three numbers to full relative accuracy, where 1 + expm1
// or gap + expm1 on their own would cancel.
template <typename T>
struct Decay {
  T ratio;   // e^{-gap}; 0 where it would underflow
  T expm1;   // e^{-gap} - 1, in [-1, 0]
  T excess;  // gap + expm1 >= 0, about gap^2 / 2 near 0

  KLDIV_HD explicit Decay(T gap) {
    using F = FormatOf<T>;
    // -gap = k ln 2 + f, |f| <= ln(2) / 2; beyond the smallest normal number k is one less, and 2^k comes out as 0.
    const T x = maximum(-gap, splat<T>((F::kSmallestExponent - 1) * static_cast<Scalar<T>>(kLn2)));
    const T rounded = x * static_cast<Scalar<T>>(kLog2E) + F::kRound;
    const T f = x - (rounded - F::kRound) * static_cast<Scalar<T>>(kLn2);
    const T scale = power_of_two(rounded);           // 2^k
    const T tail = f * f * polynomial::exp_tail(f);  // e^f - 1 - f
    const T drop = scale - 1;
    ratio = scale * (f + tail) + scale;
    expm1 = scale * (f + tail) + drop;
    // Where k = 0, f is -gap to the bit, the bracket is exactly 0 and only the tail is left.
    excess = scale * tail + (gap + (scale * f + drop));
  }
};

// u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); for positive normal u.
template <typename T>
struct LogReduction {
  T f, k;

  KLDIV_HD explicit LogReduction(T u) {
    using F = FormatOf<T>;
    const IntOf<T> bits = bit_cast<IntOf<T>>(u) - F::kSqrtHalf;
    const IntOf<T> exponent = bits >> F::kMantissaBits;
    f = bit_cast<T>(static_cast<IntOf<T>>(bits - (exponent << F::kMantissaBits) + F::kSqrtHalf)) - 1;
    // An integer in the low mantissa bits of kRound, read back as a number.
    k = bit_cast<T>(static_cast<IntOf<T>>(exponent + bit_cast<IntOf<T>>(splat<T>(F::kRound)))) - F::kRound;
  }
};

// log2(u) for a positive normal number, with an absolute error near 1.
template <typename T>
KLDIV_HD T log2_normal(T u) {
  const LogReduction<T> r(u);
  return r.k + (r.f - polynomial::log_shortfall(r.f)) * static_cast<Scalar<T>>(kLog2E);
}

// log(1 + y) for y > -1, and what it lacks to y: both to full relative accuracy near 0.
template <typename T>
struct Log1p {
  T value;      // log(1 + y)
  T shortfall;  // y - log(1 + y) >= 0, about y^2 / 2 near 0

  KLDIV_HD explicit Log1p(T y) : Log1p(y, y + 1) {}

  // Near y = -1 the sum has digits that y has not.
  KLDIV_HD Log1p(T y, T one_plus_y) {
    constexpr auto ln2 = static_cast<Scalar<T>>(kLn2);
    LogReduction<T> r(one_plus_y);
    // Where no power of two came out, y itself is the reduced argument, without the rounding of 1 + y.
    r.f = r.k == 0 ? y : r.f;
    const T reduced = polynomial::log_shortfall(r.f);
    value = r.k * ln2 + (r.f - reduced);
    shortfall = (y - r.f - r.k * ln2) + reduced;
  }
};

// log(x) for every x: -inf at 0, NaN below, subnormals included.
template <typename T>
KLDIV_HD T log(T x) {
  using F = FormatOf<T>;
  const auto tiny = x < splat<T>(F::kTiny);
  const LogReduction<T> r(tiny ? x * static_cast<Scalar<T>>(int64_t{1} << F::kMantissaBits) : x);
  const T k = tiny ? r.k - static_cast<Scalar<T>>(F::kMantissaBits) : r.k;
  const T value = k * static_cast<Scalar<T>>(kLn2) + (r.f - polynomial::log_shortfall(r.f));
  const T special = x == 0 ? -infinity<T>() : (x < 0 ? nan<T>() : x);  // +inf and NaN are their own logarithm
  return x > 0 && x < infinity<T>() ? value : special;
}

// log(x) of what is multiplied with x, so that below the normal numbers digits do not matter.
template <typename T>
KLDIV_HD T log_in_product(T x) {
  return log(x);
}

}  // namespace KLDIV_ISA
}  // namespace kldiv
