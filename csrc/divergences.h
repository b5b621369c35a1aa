// The divergences: three formulas each, for one column of a row. The only file that knows them.
//
// A divergence of the teacher's p from the student's q over one row is L = sum_v term(v). With
// g_q = d term / d log q and g_p = d term / d log p, the softmax Jacobian is the same for all of them:
//
//   dL/ds = (g_q - q * sum g_q) / T        dL/dt = (g_p - p * sum g_p) / T
//
// Literal formulas lose their digits where p and q are close, and that is where distillation ends. So a column
// is seen from the larger of its two probabilities, and all else is written in the gap between them; then
// every term is non-negative by its form, exactly 0 for equal rows, and nothing overflows.
//
// To add a divergence: a struct below, a row in KLDIV_DIVERGENCES, a formula in kldiv_ext/reference.py and a
// line in the README's table.
#pragma once

#include <string_view>
#include <type_traits>

#include "math.h"

namespace kldiv {
inline namespace KLDIV_ISA {

// One column of a row.
template <typename T>
struct Pair {
  using Mask = decltype(T{} < T{});

  T larger;  // max(p, q)
  T gap;     // |log p - log q|, in [0, +inf]
  T expm1;   // min(p, q) / max(p, q) - 1 = e^{-gap} - 1, in [-1, 0]
  T excess;  // gap + expm1 >= 0, to full relative accuracy
  Mask teacher_is_larger;

  KLDIV_HD T by_larger(T if_teacher, T if_student) const { return teacher_is_larger ? if_teacher : if_student; }
  KLDIV_HD T by_larger(Scalar<T> if_teacher, Scalar<T> if_student) const
    requires(!std::is_same_v<T, Scalar<T>>)
  {
    return by_larger(splat<T>(if_teacher), splat<T>(if_student));
  }

  KLDIV_HD T ratio() const { return expm1 + 1; }                                   // smaller / larger
  KLDIV_HD T teacher() const { return larger * by_larger(splat<T>(1), ratio()); }  // p
  KLDIV_HD T student() const { return larger * by_larger(ratio(), splat<T>(1)); }  // q
  // The same column with teacher and student exchanged.
  KLDIV_HD Pair exchanged() const { return {larger, gap, expm1, excess, !teacher_is_larger}; }
  // The gap and the excess where they meet a ratio that is 0 for all beyond it: inf must not meet 0.
  KLDIV_HD T finite_gap() const { return minimum(splat<T>(1000), gap); }
  KLDIV_HD T finite_excess() const { return minimum(splat<T>(1000), excess); }
};

// KL(p || q) = sum p (log p - log q) - p + q.
struct ForwardKL {
  static constexpr bool kGradQSumsToZero = true;  // sum (q - p) = 0: no need to know it beforehand
  static constexpr bool kGradPSumsToZero = false;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    // p larger: p (gap - 1 + e^-gap).  q larger: q (1 - e^-gap - gap e^-gap), which is q where the gap is large.
    constexpr auto kLarge = FormatOf<T>::kLargeGap;
    const T below = -minimum(splat<T>(kLarge), x.gap) * x.expm1 - minimum(splat<T>(kLarge - 1), x.excess);
    return x.larger * x.by_larger(x.excess, below);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // q - p
    return x.larger * x.by_larger(x.expm1, -x.expm1);
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // p (log p - log q)
    return x.larger * x.by_larger(x.gap, -x.finite_gap() * x.ratio());
  }
};

// D(q || p) from D(p || q).
template <typename Divergence>
struct Exchanged {
  static constexpr bool kGradQSumsToZero = Divergence::kGradPSumsToZero;
  static constexpr bool kGradPSumsToZero = Divergence::kGradQSumsToZero;
  Divergence divergence;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return divergence.term(x.exchanged());
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {
    return divergence.grad_p(x.exchanged());
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {
    return divergence.grad_q(x.exchanged());
  }
};

using ReverseKL = Exchanged<ForwardKL>;

// KL(p || q) + KL(q || p) = sum (p - q)(log p - log q).
struct Jeffreys {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return x.larger * (x.gap * -x.expm1);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // -q (log p - log q) - (p - q)
    return x.larger * x.by_larger(x.expm1 - x.finite_gap() * x.ratio(), x.gap - x.expm1);
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {
    return grad_q(x.exchanged());
  }
};

// The mixture m = share p + (1 - share) q of a column, everything relative to the larger one. Digits are lost as m
// comes to be one of the two: relative errors grow as 1 / share of the other in jsd, as its square in a skew KL.
template <typename T>
struct Mixture {
  T larger_share, smaller_share;          // how much m holds of the larger and of the smaller probability
  T log;                                  // log(m / larger)
  T kl_larger;                            // of larger || m: larger log(larger / m) - larger + m
  T kl_smaller;                           // of smaller || m
  T smaller_gap;                          // smaller * log(m / smaller)
  T one_minus_larger, one_minus_smaller;  // 1 - larger / m, 1 - smaller / m

  KLDIV_HD Mixture(const Pair<T>& x, double share_of_teacher) {
    const auto teacher_share = static_cast<Scalar<T>>(share_of_teacher);
    const auto student_share = static_cast<Scalar<T>>(1 - share_of_teacher);  // not rounded to 0 where it is small
    larger_share = x.by_larger(teacher_share, student_share);
    smaller_share = x.by_larger(student_share, teacher_share);
    const T minus_one = smaller_share * x.expm1;  // m / larger - 1
    const Log1p<T> logarithm(minus_one);
    log = logarithm.value;
    kl_larger = logarithm.shortfall;
    kl_smaller = larger_share * x.expm1 * x.expm1 - x.ratio() * (x.finite_excess() - logarithm.shortfall);
    kl_smaller = maximum(kl_smaller, T{});  // where m is hardly more than the smaller one
    smaller_gap = x.ratio() * (x.finite_gap() + log);
    const T reciprocal = Primitives<T>::reciprocal(larger_share + smaller_share * x.ratio());
    one_minus_larger = minus_one * reciprocal;
    one_minus_smaller = -larger_share * x.expm1 * reciprocal;
  }
};

// Generalised Jensen-Shannon divergence (GKD): m = beta p + (1 - beta) q,
// beta KL(p || m) + (1 - beta) KL(q || m).
struct JensenShannon {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;
  double beta;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    const Mixture<T> m(x, beta);
    return x.larger * (m.larger_share * m.kl_larger + m.smaller_share * m.kl_smaller);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // (1 - beta) q log(q / m)
    const Mixture<T> m(x, beta);
    return -x.larger * x.by_larger(m.smaller_share * m.smaller_gap, m.larger_share * m.log);
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // beta p log(p / m)
    const Mixture<T> m(x, beta);
    return -x.larger * x.by_larger(m.larger_share * m.log, m.smaller_share * m.smaller_gap);
  }
};

// Skew KL (DistiLLM): m = skew p + (1 - skew) q, KL(p || m).
struct SkewForwardKL {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;
  double skew;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    const Mixture<T> m(x, skew);
    return x.larger * x.by_larger(m.kl_larger, m.kl_smaller);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // (1 - skew) q (1 - p / m)
    const Mixture<T> m(x, skew);
    return static_cast<Scalar<T>>(1 - skew) * x.student() * x.by_larger(m.one_minus_larger, m.one_minus_smaller);
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // p log(p / m) + skew p (1 - p / m)
    const Mixture<T> m(x, skew);
    return x.larger * x.by_larger(-m.log, -m.smaller_gap) +
           static_cast<Scalar<T>>(skew) * x.teacher() * x.by_larger(m.one_minus_larger, m.one_minus_smaller);
  }
};

using SkewReverseKL = Exchanged<SkewForwardKL>;

// Half the L1 distance; the gradient at p = q is 0.
struct TotalVariation {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return x.larger * x.expm1 * static_cast<Scalar<T>>(-0.5);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // -q sign(p - q) / 2
    const T half = x.student() * x.by_larger(static_cast<Scalar<T>>(-0.5), static_cast<Scalar<T>>(0.5));
    return x.gap == 0 ? T{} : half;
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {
    return grad_q(x.exchanged());
  }
};

// Amari's alpha divergence: (r - alpha p - (1 - alpha) q) / (alpha (alpha - 1)), r = p^alpha q^(1 - alpha).
struct Alpha {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;
  double alpha, rest, per_alpha, per_rest;  // quotients made on the host: many GPUs are slow in double

  explicit constexpr Alpha(double alpha)
      : alpha(alpha), rest(1 - alpha), per_alpha(1 / alpha), per_rest(1 / (1 - alpha)) {}

  // The exponent of the smaller probability, so that r = larger * e^{-share gap}.
  template <typename T>
  KLDIV_HD T smaller_share(const Pair<T>& x) const {
    return x.by_larger(static_cast<Scalar<T>>(rest), static_cast<Scalar<T>>(alpha));
  }
  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    const T share = smaller_share(x);
    const Decay<T> r(share * x.gap);
    // Both are share * expm1 - r.expm1: the first cancels at large gaps, the second at small ones.
    const T difference = x.gap < 1 ? share * x.excess - r.excess : share * x.expm1 - r.expm1;
    return x.larger * difference * static_cast<Scalar<T>>(per_alpha * per_rest);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // (q - r) / alpha
    const Decay<T> r(smaller_share(x) * x.gap);
    return x.larger * x.by_larger(x.expm1 - r.expm1, -r.expm1) * static_cast<Scalar<T>>(per_alpha);
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // (p - r) / (1 - alpha)
    const Decay<T> r(smaller_share(x) * x.gap);
    return x.larger * x.by_larger(-r.expm1, x.expm1 - r.expm1) * static_cast<Scalar<T>>(per_rest);
  }
};

// No divergence, and what a skew divergence is where the mixture is its own first argument. A NaN row stays NaN.
struct Zero {
  static constexpr bool kGradQSumsToZero = true;
  static constexpr bool kGradPSumsToZero = true;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return x.expm1 * T{};
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {
    return x.expm1 * T{};
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {
    return x.expm1 * T{};
  }
};

// The table: name, the name of its parameter ("" for none), the struct, and what it is at parameter 0 and 1.
#define KLDIV_DIVERGENCES(ROW)                                                     \
  ROW("forward_kl", "", ForwardKL{}, ForwardKL{}, ForwardKL{})                     \
  ROW("reverse_kl", "", ReverseKL{}, ReverseKL{}, ReverseKL{})                     \
  ROW("jeffreys", "", Jeffreys{}, Jeffreys{}, Jeffreys{})                          \
  ROW("jsd", "beta", JensenShannon{parameter}, ForwardKL{}, ReverseKL{})           \
  ROW("skew_forward_kl", "skew", SkewForwardKL{parameter}, ForwardKL{}, Zero{})    \
  ROW("skew_reverse_kl", "skew", SkewReverseKL{{parameter}}, ReverseKL{}, Zero{})  \
  ROW("total_variation", "", TotalVariation{}, TotalVariation{}, TotalVariation{}) \
  ROW("alpha", "alpha", Alpha{parameter}, ReverseKL{}, ForwardKL{})

// Calls function(divergence) with the struct of that name, Zero for the empty one; false if there is none.
template <typename Function>
bool dispatch_divergence(std::string_view name, double parameter, const Function& function) {
  if (name.empty()) {
    function(Zero{});
    return true;
  }
#define KLDIV_CASE(NAME, PARAMETER, STRUCT, AT_ZERO, AT_ONE) \
  if (name == NAME) {                                        \
    if (parameter == 0) {                                    \
      function(AT_ZERO);                                     \
    } else if (parameter == 1) {                             \
      function(AT_ONE);                                      \
    } else {                                                 \
      function(STRUCT);                                      \
    }                                                        \
    return true;                                             \
  }
  KLDIV_DIVERGENCES(KLDIV_CASE)
#undef KLDIV_CASE
  return false;
}

// KL divergence of given log-probabilities, element by element, as F.kl_div defines it: `target` is a
// probability or, with kLogTarget, its logarithm. Where that probability is 0 everything is exactly 0.
template <bool kLogTarget>
struct PointwiseKL {
  template <typename T>
  KLDIV_HD static T probability(T target) {
    return kLogTarget ? exp_any(target) : target;
  }
  template <typename T>
  KLDIV_HD static T log_probability(T target) {
    return kLogTarget ? target : log(target);
  }
  template <typename T>
  KLDIV_HD static T term(T input, T target) {  // p (log p - input)
    const T p = probability(target);
    return p == 0 ? T{} : p * (log_probability(target) - input);
  }
  template <typename T>
  KLDIV_HD static T grad_input(T, T target) {
    return -probability(target);
  }
  template <typename T>
  KLDIV_HD static T grad_target(T input, T target) {
    const T p = probability(target);
    const T slope = log_probability(target) - input + 1;
    return p == 0 ? T{} : (kLogTarget ? p * slope : slope);
  }
};

}  // namespace KLDIV_ISA
}  // namespace kldiv
