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

  KLDIV_HD T ratio() const { return expm1 + 1; }  // smaller / larger
  KLDIV_HD T divisor() const { return maximum(ratio(), splat<T>(static_cast<Scalar<T>>(1e-30))); }  // never 0
  KLDIV_HD T teacher() const { return larger * by_larger(splat<T>(1), ratio()); }  // p
  KLDIV_HD T student() const { return larger * by_larger(ratio(), splat<T>(1)); }  // q
  // The same column with teacher and student exchanged.
  KLDIV_HD Pair exchanged() const { return {larger, gap, expm1, excess, !teacher_is_larger}; }
  // The gap where it meets a ratio that is 0 for all beyond it: inf must not meet 0.
  KLDIV_HD T finite_gap() const { return minimum(splat<T>(1000), gap); }
};

// KL(p || q) = sum p (log p - log q) - p + q.
struct ForwardKL {
  static constexpr bool kGradQSumsToZero = true;   // sum (q - p) = 0: no need to know it beforehand
  static constexpr bool kGradPSumsToZero = false;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return x.larger * relative(x);
  }
  template <typename T>
  KLDIV_HD static T relative(const Pair<T>& x) {  // to the larger probability
    // p larger: p (gap - 1 + e^-gap).  q larger: q (1 - e^-gap - gap e^-gap), whose first form keeps its
    // digits at small gaps and whose second does at large ones.
    const T below = x.gap < 1 ? -x.gap * x.expm1 - x.excess : -x.expm1 - x.finite_gap() * x.ratio();
    return x.by_larger(x.excess, below);
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

// Generalised Jensen-Shannon divergence (GKD): m = beta p + (1 - beta) q, beta KL(p || m) + (1 - beta) KL(q || m).
// With y = m / q - 1 = beta (p / q - 1) that is beta KL(p || q) - KL(m || q), the second term being
// q ((1 + y) log(1 + y) - y): for a beta up to 1/2 less than half of the first, so nothing cancels.
struct JensenShannon {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;
  double beta;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return beta > 0.5 ? View<T>(x.exchanged(), 1 - beta).term : View<T>(x, beta).term;
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {
    return beta > 0.5 ? View<T>(x.exchanged(), 1 - beta).grad_p : View<T>(x, beta).grad_q;
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {
    return beta > 0.5 ? View<T>(x.exchanged(), 1 - beta).grad_q : View<T>(x, beta).grad_p;
  }

 private:
  // With beta up to 1/2.
  template <typename T>
  struct View {
    T term, grad_q, grad_p;

    KLDIV_HD View(const Pair<T>& x, double beta) {
      const T b = splat<T>(static_cast<Scalar<T>>(beta)), rest = splat<T>(static_cast<Scalar<T>>(1 - beta));
      const T ratio = x.ratio(), drop = b * x.expm1;
      const T y = x.by_larger(-drop * Primitives<T>::reciprocal(x.divisor()), drop);
      // Where q vanishes beside p, everything is seen from p instead: m / p - 1.
      const auto far = y > 1;
      const T from = far ? rest * x.expm1 : y;
      const Log1p<T> logarithm(from);
      const T log = logarithm.value, gap = ratio * x.finite_gap();
      const T near_term =
          b * ForwardKL::relative(x) - x.by_larger(ratio, splat<T>(1)) * (y * log - logarithm.shortfall);
      term = x.larger * (far ? -(from + 1) * log - rest * gap : near_term);
      // (1 - beta) q log(q / m) and beta p log(p / m)
      grad_q = x.larger * -rest * x.by_larger(far ? gap + ratio * log : ratio * log, log);
      grad_p = x.larger * b * x.by_larger(far ? -log : x.gap - log, -gap - ratio * log);
    }
  };
};

// Skew KL (DistiLLM): m = skew p + (1 - skew) q, KL(p || m). With y = m / p - 1 = (1 - skew) (q / p - 1) its term is
// p (y - log(1 + y)).
struct SkewForwardKL {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;
  double skew;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    const T y = from_p(x), ratio = x.ratio();
    const Log1p<T> logarithm(y);
    // The second form is for a p that vanishes beside q; at small y it would cancel.
    const T below = y < 1 ? ratio * logarithm.shortfall : -share<T>() * x.expm1 - ratio * logarithm.value;
    return x.larger * x.by_larger(logarithm.shortfall, below);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // (1 - skew) q (1 - p / m)
    const T drop = share<T>() * x.expm1 * one_over_m(x);
    return x.larger * share<T>() * x.by_larger(x.ratio() * drop, -drop);
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // p (log(p / m) + skew (1 - p / m)), in terms of one sign
    const T y = from_p(x), ratio = x.ratio();
    const Log1p<T> logarithm(y);
    const T rise = y * logarithm.value - logarithm.shortfall + share<T>() * y;
    return -x.larger * x.by_larger(rise, ratio * ratio * rise) * one_over_m(x);
  }

 private:
  template <typename T>
  KLDIV_HD T share() const {  // of q
    return splat<T>(static_cast<Scalar<T>>(1 - skew));
  }
  template <typename T>
  KLDIV_HD T from_p(const Pair<T>& x) const {  // m / p - 1
    const T drop = share<T>() * x.expm1;
    return x.by_larger(drop, -drop * Primitives<T>::reciprocal(x.divisor()));
  }
  template <typename T>
  KLDIV_HD T one_over_m(const Pair<T>& x) const {  // larger / m, from shares that are exact close to 0 too
    const T kept = splat<T>(static_cast<Scalar<T>>(skew));
    return Primitives<T>::reciprocal(x.by_larger(kept + share<T>() * x.ratio(), share<T>() + kept * x.ratio()));
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
  double alpha;

  // The exponent of the smaller probability, so that r = larger * e^{-share gap}.
  template <typename T>
  KLDIV_HD T smaller_share(const Pair<T>& x) const {
    return x.by_larger(static_cast<Scalar<T>>(1 - alpha), static_cast<Scalar<T>>(alpha));
  }
  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    const T share = smaller_share(x);
    const Decay<T> r(share * x.gap);
    // Both are share * expm1 - r.expm1: the first cancels at large gaps, the second at small ones.
    const T difference = x.gap < 1 ? share * x.excess - r.excess : share * x.expm1 - r.expm1;
    return x.larger * difference * static_cast<Scalar<T>>(1 / (alpha * (1 - alpha)));
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // (q - r) / alpha
    const Decay<T> r(smaller_share(x) * x.gap);
    return x.larger * x.by_larger(x.expm1 - r.expm1, -r.expm1) * static_cast<Scalar<T>>(1 / alpha);
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // (p - r) / (1 - alpha)
    const Decay<T> r(smaller_share(x) * x.gap);
    return x.larger * x.by_larger(-r.expm1, x.expm1 - r.expm1) * static_cast<Scalar<T>>(1 / (1 - alpha));
  }
};

// KL(p || p): what a skew divergence is where the mixture is its own first argument. A NaN row stays NaN.
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
#define KLDIV_DIVERGENCES(ROW)                                                \
  ROW("forward_kl", "", ForwardKL{}, ForwardKL{}, ForwardKL{})                \
  ROW("reverse_kl", "", ReverseKL{}, ReverseKL{}, ReverseKL{})                \
  ROW("jeffreys", "", Jeffreys{}, Jeffreys{}, Jeffreys{})                     \
  ROW("jsd", "beta", JensenShannon{parameter}, ForwardKL{}, ReverseKL{})      \
  ROW("skew_forward_kl", "skew", SkewForwardKL{parameter}, ForwardKL{}, Zero{}) \
  ROW("skew_reverse_kl", "skew", SkewReverseKL{{parameter}}, ReverseKL{}, Zero{}) \
  ROW("total_variation", "", TotalVariation{}, TotalVariation{}, TotalVariation{}) \
  ROW("alpha", "alpha", Alpha{parameter}, ReverseKL{}, ForwardKL{})

// Calls function(divergence) with the struct of that name; false if there is none.
template <typename Function>
bool dispatch_divergence(std::string_view name, double parameter, const Function& function) {
#define KLDIV_CASE(NAME, PARAMETER, STRUCT, AT_ZERO, AT_ONE)                        \
  if (name == NAME) {                                                               \
    if (parameter == 0) {                                                           \
      function(AT_ZERO);                                                            \
    } else if (parameter == 1) {                                                    \
      function(AT_ONE);                                                             \
    } else {                                                                        \
      function(STRUCT);                                                             \
    }                                                                               \
    return true;                                                                    \
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
