// exp, expm1, log and log1p, written once for float, double, their SIMD vectors and CUDA threads, with the
// small differences that the divergences need (gap + expm1(-gap), y - log1p(y)) to full relative accuracy.
//
// T is a scalar or a SIMD vector; conditions are written with ?: because it selects lane by lane on both.
// Relative error: exp, decay().expm1 and log1p below 2 ulp, the two differences below 8 ulp
// (tests/test_math.py measures them against mpmath). No function here needs or survives -ffast-math.
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
  static constexpr int32_t kOne = 0x3f800000;        // bits of 1.0f
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;   // bits of sqrt(1/2)
  static constexpr float kRound = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2Hi = 0.693359375f;      // 9 bits: k * kLn2Hi is exact
  static constexpr float kLn2Lo = -2.12194440e-4f;
  static constexpr float kSmallestExp = -87.0f;      // exp below this is flushed to 0
  static constexpr float kLargestExp = 88.7f;
  static constexpr float kTiny = 1.17549435e-38f;    // smallest normal number
  static constexpr float kScaleTiny = 8388608.0f;    // 2^23
  static constexpr int kExpTerms = 7;                // up to f^7 / 7!, |f| <= ln(2) / 2
  static constexpr int kLogTerms = 5;                // up to s^10 / 11, |s| <= 0.172
};
template <>
struct Format<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kSmallestExp = -708.0;
  static constexpr double kLargestExp = 709.7;
  static constexpr double kTiny = 2.2250738585072014e-308;
  static constexpr double kScaleTiny = 4503599627370496.0;  // 2^52
  static constexpr int kExpTerms = 13;
  static constexpr int kLogTerms = 11;
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

// Keep a if it is larger; a NaN in b is passed over, one in a is kept.
template <typename T>
KLDIV_HD T maximum(T a, T b) {
  return b > a ? b : a;
}

template <typename T>
KLDIV_HD T minimum(T a, T b) {
  return b < a ? b : a;
}

namespace series {

template <int n>
constexpr double kFactorial = n * kFactorial<n - 1>;
template <>
constexpr double kFactorial<0> = 1;

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

// 2 (1/(2n+1) + z/(2n+3) + ... ), up to z^(last-n) / (2 last+1)
template <int n, int last, typename T>
KLDIV_HD T odd_reciprocals(T z) {
  constexpr auto c = static_cast<Scalar<T>>(2.0 / (2 * n + 1));
  if constexpr (n == last) {
    return splat<T>(c);
  } else {
    return odd_reciprocals<n + 1, last>(z) * z + c;
  }
}

}  // namespace series

// x = k ln 2 + f with |f| <= ln(2)/2; `scale` is 2^k. Needs kSmallestExp <= x <= kLargestExp.
template <typename T>
struct ExpReduction {
  T f, scale;

  KLDIV_HD explicit ExpReduction(T x) {
    using F = FormatOf<T>;
    constexpr auto kLog2E = static_cast<Scalar<T>>(1.44269504088896340736);
    const T rounded = x * kLog2E + F::kRound;  // the low bits of its mantissa hold k
    const T k = rounded - F::kRound;
    f = x - k * F::kLn2Hi;
    f = f - k * F::kLn2Lo;
    scale = bit_cast<T>(static_cast<IntOf<T>>((bit_cast<IntOf<T>>(rounded) << F::kMantissaBits) + F::kOne));
  }
};

// e^x of a log-probability, that is for x up to kLargestExp; 0 below kSmallestExp (no subnormal results).
template <typename T>
KLDIV_HD T exp(T x) {
  using F = FormatOf<T>;
  const T lowest = splat<T>(F::kSmallestExp);
  const ExpReduction<T> r(maximum(x, lowest));
  const T value = r.scale * series::exponential<0, F::kExpTerms>(r.f);
  return x < lowest ? T{} : value;
}

// The same for any x: +inf above kLargestExp.
template <typename T>
KLDIV_HD T exp_any(T x) {
  const T highest = splat<T>(FormatOf<T>::kLargestExp);
  return x > highest ? infinity<T>() : exp(minimum(x, highest));
}

// How far e^{-gap} has fallen, for gap in [0, +inf]: both numbers to full relative accuracy near 0,
// where `gap + expm1` on its own would cancel.
template <typename T>
struct Decay {
  T expm1;   // e^{-gap} - 1, in [-1, 0]
  T excess;  // gap + expm1 >= 0, about gap^2 / 2 near 0

  KLDIV_HD explicit Decay(T gap) {
    using F = FormatOf<T>;
    const ExpReduction<T> r(maximum(-gap, splat<T>(F::kSmallestExp)));
    const T tail = r.f * r.f * series::exponential<2, F::kExpTerms>(r.f);  // e^f - 1 - f
    const T drop = r.scale - 1;
    expm1 = r.scale * (r.f + tail) + drop;
    // Where k = 0, f is -gap to the bit, the bracket is exactly 0 and only the series is left.
    excess = r.scale * tail + (gap + (r.scale * r.f + drop));
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

// f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)): log(1+f) = 2 atanh(s), s = f / (2 + f), and f - 2s = s f.
template <typename T>
KLDIV_HD T log_shortfall(T f) {
  const T s = f / (f + 2);
  const T z = s * s;
  return s * (f - z * series::odd_reciprocals<1, FormatOf<T>::kLogTerms>(z));
}

// log(1 + y) for y in (-1, 0], and what it lacks to y: both to full relative accuracy near 0.
template <typename T>
struct Log1p {
  T value;      // log(1 + y)
  T shortfall;  // y - log(1 + y) >= 0, about y^2 / 2 near 0

  KLDIV_HD explicit Log1p(T y) {
    using F = FormatOf<T>;
    LogReduction<T> r(y + 1);
    // Where no power of two came out, y itself is the reduced argument, without the rounding of 1 + y.
    r.f = r.k == 0 ? y : r.f;
    const T reduced = log_shortfall(r.f);
    value = r.k * F::kLn2Hi + (r.k * F::kLn2Lo + (r.f - reduced));
    shortfall = (y - r.f - r.k * F::kLn2Hi) - r.k * F::kLn2Lo + reduced;
  }
};

// log(x) for every x: -inf at 0, NaN below, subnormals included.
template <typename T>
KLDIV_HD T log(T x) {
  using F = FormatOf<T>;
  const auto tiny = x < splat<T>(F::kTiny);
  const LogReduction<T> r(tiny ? x * F::kScaleTiny : x);
  const T k = tiny ? r.k - static_cast<Scalar<T>>(F::kMantissaBits) : r.k;
  const T value = k * F::kLn2Hi + (k * F::kLn2Lo + (r.f - log_shortfall(r.f)));
  const T special = x == 0 ? -infinity<T>() : x;  // +inf and NaN are their own logarithm
  return x > 0 ? (x < infinity<T>() ? value : special) : (x < 0 ? nan<T>() : special);
}

}  // namespace KLDIV_ISA
}  // namespace kldiv
