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
// Where g_q comes to be a constant times q as q gets far larger than p, grad_q_shifted() is what is then left of it:
// g_q less that constant times q, which the Jacobian does not see. Likewise grad_p_shifted(), asked for through
// Exchanged.
//
// Divergences of a mixture have their formulas a second time, of a BalancedPair: fewer instructions where all that the
// first ones guard against cannot be. A GPU, whose threads are short of them, takes these where it may.
//
// To add a divergence: a struct below, a row in KLDIV_DIVERGENCES, a formula in kldiv_ext/reference.py and a
// line in the README's table.
#pragma once

#include <algorithm>
#include <cmath>
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
  T delta;   // log p - log q
  T gap;     // |delta|, in [0, +inf]
  T ratio;   // min(p, q) / max(p, q) = e^{-gap}, in [0, 1]
  T expm1;   // ratio - 1, in [-1, 0]
  T excess;  // gap + expm1 >= 0; like ratio and expm1 to full relative accuracy

  // From log p - log q, and log2 of each.
  KLDIV_HD Pair(T delta, T log2_p, T log2_q) : Pair(delta) { larger = exp2(by_larger(log2_p, log2_q)); }
  // From log p - log q, and p and q.
  KLDIV_HD static Pair of(T delta, T p, T q) {
    Pair x(delta);
    x.larger = x.by_larger(p, q);
    return x;
  }

  KLDIV_HD Mask teacher_is_larger() const { return delta >= 0; }
  KLDIV_HD T by_larger(T if_teacher, T if_student) const { return teacher_is_larger() ? if_teacher : if_student; }
  KLDIV_HD T by_larger(Scalar<T> if_teacher, Scalar<T> if_student) const
    requires(!std::is_same_v<T, Scalar<T>>)
  {
    return by_larger(splat<T>(if_teacher), splat<T>(if_student));
  }

  KLDIV_HD T teacher() const { return larger * by_larger(splat<T>(1), ratio); }  // p
  KLDIV_HD T student() const { return larger * by_larger(ratio, splat<T>(1)); }  // q
  KLDIV_HD T difference() const { return larger * by_larger(-expm1, expm1); }    // p - q
  KLDIV_HD T teacher_log_ratio() const {                                         // p (log p - log q); 0 where p is
    return larger * by_larger(gap, -finite_gap() * ratio);
  }
  KLDIV_HD T teacher_excess() const {  // p (log p - log q) - p + q >= 0
    // p larger: p (gap - 1 + e^-gap).  q larger: q (1 - e^-gap - gap e^-gap), which is q where the gap is large.
    constexpr auto kLarge = FormatOf<T>::kLargeGap;
    const T below = -minimum(splat<T>(kLarge), gap) * expm1 - minimum(splat<T>(kLarge - 1), excess);
    return larger * by_larger(excess, below);
  }
  // The same column with teacher and student exchanged.
  KLDIV_HD Pair exchanged() const {
    Pair x = *this;
    x.delta = -delta;
    return x;
  }
  // The gap and the excess where they meet a ratio that is 0 for all beyond it: inf must not meet 0.
  KLDIV_HD T finite_gap() const { return minimum(splat<T>(1000), gap); }
  KLDIV_HD T finite_excess() const { return minimum(splat<T>(1000), excess); }

 private:
  KLDIV_HD explicit Pair(T delta) : delta(delta), gap(absolute(delta)) {
    const Decay<T> decay(gap);
    ratio = decay.ratio;
    expm1 = decay.expm1;
    excess = decay.excess;
  }
};

// KL(p || q) = sum p (log p - log q) - p + q.
struct ForwardKL {
  static constexpr bool kGradQSumsToZero = true;  // sum (q - p) = 0: no need to know it beforehand
  static constexpr bool kGradPSumsToZero = false;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return x.teacher_excess();
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // q - p
    return -x.difference();
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // p (log p - log q)
    return x.teacher_log_ratio();
  }
  // For OnePass: by which of the two sums a sum of terms is divided that is made of p and q before they are; and what,
  // less the term, is p - q, or by difference() what that is.
  template <typename T>
  KLDIV_HD static T weight(T of_teacher, T) {
    return of_teacher;
  }
  template <typename T>
  KLDIV_HD static T moment(const Pair<T>& x) {
    return x.teacher_log_ratio();
  }
  template <typename T>
  KLDIV_HD static T difference(T moment_less_term) {
    return moment_less_term;
  }
};

// D(q || p) from D(p || q).
template <typename Divergence>
struct Exchanged {
  static constexpr bool kGradQSumsToZero = Divergence::kGradPSumsToZero;
  static constexpr bool kGradPSumsToZero = Divergence::kGradQSumsToZero;
  Divergence divergence;

  template <typename X>
  KLDIV_HD auto term(const X& x) const {
    return divergence.term(x.exchanged());
  }
  template <typename X>
  KLDIV_HD auto grad_q(const X& x) const {
    return divergence.grad_p(x.exchanged());
  }
  template <typename X>
  KLDIV_HD auto grad_p(const X& x) const {
    return divergence.grad_q(x.exchanged());
  }
  KLDIV_HD bool is_balanced() const
    requires requires { divergence.is_balanced(); }
  {
    return divergence.is_balanced();
  }
  void prepare()
    requires requires { divergence.prepare(); }
  {
    divergence.prepare();
  }
  template <typename T>
  KLDIV_HD T grad_q_shift() const {
    return divergence.template grad_p_shift<T>();
  }
  template <typename T>
  KLDIV_HD T grad_q_shifted(const Pair<T>& x) const
    requires requires { divergence.grad_p_shifted(x); }
  {
    return divergence.grad_p_shifted(x.exchanged());
  }
  template <typename T>
  KLDIV_HD static T weight(T of_teacher, T of_student)
    requires requires { Divergence::weight(of_student, of_teacher); }
  {
    return Divergence::weight(of_student, of_teacher);
  }
  template <typename T>
  KLDIV_HD static T moment(const Pair<T>& x)
    requires requires { Divergence::moment(x); }
  {
    return Divergence::moment(x.exchanged());
  }
  template <typename T>
  KLDIV_HD static T difference(T moment_less_term)
    requires requires { Divergence::difference(moment_less_term); }
  {
    return -Divergence::difference(moment_less_term);
  }
};

template <typename Divergence>
KLDIV_HD Exchanged<Divergence> exchanged(const Divergence& divergence) {
  return {divergence};
}
template <typename Divergence>
KLDIV_HD Divergence exchanged(const Exchanged<Divergence>& divergence) {
  return divergence.divergence;
}

using ReverseKL = Exchanged<ForwardKL>;

// KL(p || q) + KL(q || p) = sum (p - q)(log p - log q).
struct Jeffreys {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return x.difference() * x.delta;
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // q (log q - log p) - (p - q)
    return x.exchanged().teacher_log_ratio() - x.difference();
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {
    return grad_q(x.exchanged());
  }
};

// A number that a divergence comes with, converted on the host: many GPUs are slow in double.
struct Parameter {
  double in_double;
  float in_float;  // a normal number, or the special function unit of a GPU would take it for 0

  explicit Parameter(double x)
      : in_double(x), in_float(static_cast<float>(x > 0 ? std::max<double>(x, Format<float>::kTiny) : x)) {}

  template <typename T>
  KLDIV_HD Scalar<T> as() const {
    if constexpr (kIsFloat<T>) {
      return in_float;
    } else {
      return in_double;
    }
  }
};

// How much a mixture holds of the teacher, and of the student.
struct Shares {
  Parameter teacher, student;

  explicit Shares(double teacher) : teacher(teacher), student(1 - teacher) {}  // 1 - teacher not rounded to 0

  KLDIV_HD bool are_balanced() const { return teacher.in_float > 0.09f && student.in_float > 0.09f; }
};

// The mixture m = share p + (1 - share) q of a column, everything relative to the larger one. One logarithm serves
// both sides: that of m over the one which it is closer to, so that no share, however small, costs digits.
template <typename T>
struct Mixture {
  T larger_share, smaller_share;          // how much m holds of the larger and of the smaller probability
  typename Pair<T>::Mask near_smaller;    // m is made mostly of the smaller one, and at most twice as large
  T log;                                  // log(m / larger)
  T kl_larger;                            // of larger || m: larger log(larger / m) - larger + m
  T kl_smaller;                           // of smaller || m
  T smaller_gap;                          // smaller * log(m / smaller)
  T one_minus_larger, one_minus_smaller;  // 1 - larger / m, 1 - smaller / m
  T product;                              // larger * smaller / m

  KLDIV_HD Mixture(const Pair<T>& x, const Shares& shares) {
    const auto teacher_share = shares.teacher.as<T>(), student_share = shares.student.as<T>();
    larger_share = x.by_larger(teacher_share, student_share);
    smaller_share = x.by_larger(student_share, teacher_share);
    const T below = smaller_share * x.expm1;  // m / larger - 1
    const T above = -larger_share * x.expm1;  // (m - smaller) / larger
    near_smaller = (larger_share < static_cast<Scalar<T>>(0.5)) & (above < x.ratio);
    const T total = larger_share + smaller_share * x.ratio;  // m / larger
    const T above_smaller = above * Primitives<T>::reciprocal(x.ratio);
    const T y = near_smaller ? above_smaller : below;  // m / (the closer one) - 1
    const Log1p<T> logarithm(y, near_smaller ? y + 1 : total);
    log = near_smaller ? logarithm.value - x.gap : logarithm.value;
    smaller_gap = x.ratio * (near_smaller ? logarithm.value : x.finite_gap() + logarithm.value);
    const T shortfall = logarithm.shortfall;
    kl_larger = near_smaller ? maximum(x.excess + shortfall + y * x.expm1, T{}) : shortfall;
    const T rest = x.ratio * (x.finite_excess() - shortfall) + above * x.expm1;
    kl_smaller = near_smaller ? x.ratio * shortfall : maximum(-rest, T{});
    const T reciprocal = Primitives<T>::reciprocal(total);
    one_minus_larger = below * reciprocal;
    one_minus_smaller = above * reciprocal;
    product = x.ratio * reciprocal;
  }
};

// A column of a mixture that holds much of either side, by fewer instructions: where p and q are within a factor of e
// the divergence's formulas are polynomials in delta, made of themselves; elsewhere nothing cancels.
template <typename T>
struct BalancedPair {
  T delta, bits;  // log p - log q, also in bits; may be NaN where p = q = 0
  T log2_p, log2_q;

  KLDIV_HD BalancedPair(T log_ratio, T log2_p, T log2_q)
      : delta(log_ratio), bits(log_ratio * static_cast<Scalar<T>>(kLog2E)), log2_p(log2_p), log2_q(log2_q) {}

  KLDIV_HD T student() const { return exp2_floored(log2_q); }
  KLDIV_HD T larger() const { return exp2_floored(maximum(log2_p, log2_q)); }
  KLDIV_HD T gap() const { return finite(absolute(bits)); }
  KLDIV_HD T by_larger(T if_teacher, T if_student) const { return delta >= 0 ? if_teacher : if_student; }
  KLDIV_HD T where_near(T near, T far) const { return where_less(absolute(delta), splat<T>(1), near, far); }
  KLDIV_HD BalancedPair exchanged() const {
    BalancedPair x = *this;
    x.delta = -delta;
    x.bits = -bits;
    x.log2_p = log2_q;
    x.log2_q = log2_p;
    return x;
  }

  // m / q and m / p.
  KLDIV_HD T mixture_per_student(const Shares& shares) const {
    return exp2_floored(finite(bits)) * shares.teacher.as<T>() + shares.student.as<T>();
  }
  KLDIV_HD T mixture_per_teacher(const Shares& shares) const {
    return exp2_floored(finite(-bits)) * shares.student.as<T>() + shares.teacher.as<T>();
  }

 private:
  // By how many bits one is larger, or so many that the other is nothing beside it.
  KLDIV_HD static T finite(T bits) { return bits < kMost ? bits : splat<T>(kMost); }
  static constexpr Scalar<T> kMost = 126;
};

// m relative to the larger one: for terms, which may be large where either one is 0.
template <typename T>
struct BalancedMixture {
  T gap, ratio;         // as of Pair, the gap in bits
  T total, log2_total;  // m
  T of_smaller;         // what of it is the smaller one's

  KLDIV_HD BalancedMixture(const BalancedPair<T>& x, const Shares& shares) : gap(x.gap()), ratio(exp2_floored(-gap)) {
    const auto teacher_share = splat<T>(shares.teacher.as<T>()), student_share = splat<T>(shares.student.as<T>());
    of_smaller = x.by_larger(student_share, teacher_share) * ratio;
    total = x.by_larger(teacher_share, student_share) + of_smaller;
    log2_total = log2_normal(total);
  }
};

// What a divergence of a mixture is for delta in [-1, 1]: term / (m delta^2), g_q / (q delta), g_p / (p delta).
// Relative errors up to 3e-6, where shares are balanced.
class NearPolynomials {
 public:
  // On the host: microseconds, and so kept for the next call.
  template <typename Divergence>
  static const NearPolynomials& of(const Divergence& divergence) {
    thread_local double known = -1;
    thread_local NearPolynomials near;
    if (const double share = divergence.shares.teacher.in_double; share != known) {
      near.term_ = through([&](double d) {
        const double m = divergence.shares.teacher.in_double * std::expm1(d) + 1;
        return divergence.term(Pair<double>::of(d, std::exp(d), 1)) / (m * d * d);
      });
      near.grad_q_ = through([&](double d) { return divergence.grad_q(Pair<double>::of(d, std::exp(d), 1)) / d; });
      near.grad_p_ = through([&](double d) { return divergence.grad_p(Pair<double>::of(d, 1, std::exp(-d))) / d; });
      known = share;
    }
    return near;
  }

  template <typename T>
  KLDIV_HD T term(const BalancedPair<T>& x) const {  // per m
    return x.delta * x.delta * term_(x.delta);
  }
  template <typename T>
  KLDIV_HD T grad_q(const BalancedPair<T>& x) const {  // per q
    return x.delta * grad_q_(x.delta);
  }
  template <typename T>
  KLDIV_HD T grad_p(const BalancedPair<T>& x) const {  // per p
    return x.delta * grad_p_(x.delta);
  }

 private:
  static constexpr int kDegree = 7;

  struct Polynomial {
    float c[kDegree + 1] = {};

    template <typename T>
    KLDIV_HD T operator()(T x) const {
      T y = splat<T>(c[kDegree]);
      for (int i = kDegree - 1; i >= 0; --i) y = y * x + c[i];
      return y;
    }
  };

  // The polynomial through a function's values at the roots of a Chebyshev polynomial, by Newton.
  template <typename Function>
  static Polynomial through(const Function& function) {
    constexpr int n = kDegree + 1;
    double x[n], divided[n], c[n] = {};
    for (int i = 0; i < n; ++i) {
      x[i] = std::cos((2 * i + 1) * std::acos(-1.0) / (2 * n));
      divided[i] = function(x[i]);
    }
    for (int order = 1; order < n; ++order) {
      for (int i = n - 1; i >= order; --i) divided[i] = (divided[i] - divided[i - 1]) / (x[i] - x[i - order]);
    }
    for (int i = n - 1; i >= 0; --i) {  // c = c * (x - x[i]) + divided[i]
      for (int j = n - 1; j > 0; --j) c[j] = c[j - 1] - x[i] * c[j];
      c[0] = divided[i] - x[i] * c[0];
    }
    Polynomial result;
    for (int i = 0; i < n; ++i) result.c[i] = static_cast<float>(c[i]);
    return result;
  }

  Polynomial term_, grad_q_, grad_p_;
};

// Generalised Jensen-Shannon divergence (GKD): m = beta p + (1 - beta) q,
// beta KL(p || m) + (1 - beta) KL(q || m).
struct JensenShannon {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;
  Shares shares;                 // beta and 1 - beta
  Parameter odds, inverse_odds;  // beta / (1 - beta)
  Parameter shift_q, shift_p;    // (1 - beta) log(1 - beta), beta log(beta)
  NearPolynomials near;

  explicit JensenShannon(double beta)
      : shares(beta),
        odds(beta / (1 - beta)),
        inverse_odds((1 - beta) / beta),
        shift_q((1 - beta) * std::log1p(-beta)),
        shift_p(beta * std::log(beta)) {}

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    const Mixture<T> m(x, shares);
    return x.larger * (m.larger_share * m.kl_larger + m.smaller_share * m.kl_smaller);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // (1 - beta) q log(q / m)
    const Mixture<T> m(x, shares);
    return -x.larger * x.by_larger(m.smaller_share * m.smaller_gap, m.larger_share * m.log);
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // beta p log(p / m)
    const Mixture<T> m(x, shares);
    return -x.larger * x.by_larger(m.larger_share * m.log, m.smaller_share * m.smaller_gap);
  }
  template <typename T>
  KLDIV_HD T grad_q_shifted(const Pair<T>& x) const {  // (1 - beta) q log((1 - beta) q / m)
    const T shifted = -x.student() * Log1p<T>(x.ratio * odds.as<T>()).value;
    const T sum = grad_q(x) + x.student() * shift_q.as<T>();
    return x.teacher_is_larger() ? sum : shifted * shares.student.as<T>();
  }
  template <typename T>
  KLDIV_HD T grad_p_shifted(const Pair<T>& x) const {  // beta p log(beta p / m)
    const T shifted = -x.teacher() * Log1p<T>(x.ratio * inverse_odds.as<T>()).value;
    const T sum = grad_p(x) + x.teacher() * shift_p.as<T>();
    return x.teacher_is_larger() ? shifted * shares.teacher.as<T>() : sum;
  }

  template <typename T>
  KLDIV_HD T term(const BalancedPair<T>& x) const {
    const BalancedMixture<T> m(x, shares);
    const T bits = m.total * m.log2_total + m.of_smaller * m.gap;
    return x.larger() * x.where_near(m.total * near.term(x), bits * static_cast<Scalar<T>>(-kLn2));
  }
  // The derivatives per q and per p.
  template <typename T>
  KLDIV_HD T grad_q(const BalancedPair<T>& x) const {
    const Scalar<T> share = shares.student.as<T>() * static_cast<Scalar<T>>(-kLn2);
    return x.where_near(near.grad_q(x), log2_normal(x.mixture_per_student(shares)) * share);
  }
  template <typename T>
  KLDIV_HD T grad_p(const BalancedPair<T>& x) const {
    const Scalar<T> share = shares.teacher.as<T>() * static_cast<Scalar<T>>(-kLn2);
    return x.where_near(near.grad_p(x), log2_normal(x.mixture_per_teacher(shares)) * share);
  }
  // Whether BalancedPair will do; prepare() has to come first.
  KLDIV_HD bool is_balanced() const { return shares.are_balanced(); }
  void prepare() { near = NearPolynomials::of(*this); }
  // What the shifted derivatives have more, per q and per p.
  template <typename T>
  KLDIV_HD T grad_q_shift() const {
    return shift_q.as<T>();
  }
  template <typename T>
  KLDIV_HD T grad_p_shift() const {
    return shift_p.as<T>();
  }
};

// Skew KL (DistiLLM): m = skew p + (1 - skew) q, KL(p || m).
struct SkewForwardKL {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;
  Shares shares;           // skew and 1 - skew
  Parameter limit;         // of g_p / p as p gets far larger than q
  Parameter inverse_odds;  // (1 - skew) / skew
  NearPolynomials near;

  explicit SkewForwardKL(double skew)
      : shares(skew), limit(skew - 1 - std::log(skew)), inverse_odds((1 - skew) / skew) {}

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    const Mixture<T> m(x, shares);
    return x.larger * x.by_larger(m.kl_larger, m.kl_smaller);
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // (1 - skew) q (1 - p / m)
    const Mixture<T> m(x, shares);
    return shares.student.as<T>() * x.student() * x.by_larger(m.one_minus_larger, m.one_minus_smaller);
  }
  template <typename T>
  KLDIV_HD T grad_q_shifted(const Pair<T>& x) const {  // -(1 - skew) q p / m
    return -shares.student.as<T>() * x.larger * Mixture<T>(x, shares).product;
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // p log(p / m) + skew p (1 - p / m) = term - g_q
    // The difference cancels where q is far larger, the sum where skew is near 1.
    const Mixture<T> m(x, shares);
    const T sum = x.ratio * (shares.teacher.as<T>() * m.one_minus_smaller) - m.smaller_gap;
    return (m.near_smaller | x.teacher_is_larger()) ? term(x) - grad_q(x) : x.larger * sum;
  }
  template <typename T>
  KLDIV_HD T grad_p_shifted(const Pair<T>& x) const {  // the same less limit * p
    const T w = x.ratio * inverse_odds.as<T>();        // m / (skew p) - 1 where p is larger
    const Log1p<T> logarithm(w);                       // w / (1 + w) - log(1 + w), whose first orders cancel
    const T fraction = w * Primitives<T>::reciprocal(w + 1);
    const T shifted = w < 1 ? logarithm.shortfall - w * fraction : fraction - logarithm.value;
    const T difference = grad_p(x) - x.teacher() * limit.as<T>();
    return x.teacher_is_larger() ? x.larger * shifted : difference;
  }

  template <typename T>
  KLDIV_HD T term(const BalancedPair<T>& x) const {
    const BalancedMixture<T> m(x, shares);
    const T log2_per_teacher = m.log2_total + x.by_larger(T{}, m.gap);
    const T excess = log2_per_teacher * static_cast<Scalar<T>>(kLn2) + 1;
    return x.larger() * x.where_near(m.total * near.term(x), m.total - x.by_larger(splat<T>(1), m.ratio) * excess);
  }
  template <typename T>
  KLDIV_HD T grad_q(const BalancedPair<T>& x) const {
    // 1 - p / m = (1 - m / q) / (m / q) * (1 - skew) / skew
    const T per_student = x.mixture_per_student(shares);
    const T one_minus_teacher = (1 - per_student) * Primitives<T>::reciprocal(per_student) * inverse_odds.as<T>();
    return x.where_near(near.grad_q(x), one_minus_teacher * shares.student.as<T>());
  }
  template <typename T>
  KLDIV_HD T grad_p(const BalancedPair<T>& x) const {
    const T per_teacher = x.mixture_per_teacher(shares);
    const T one_minus_teacher = 1 - Primitives<T>::reciprocal(per_teacher);
    const T log_ratio = log2_normal(per_teacher) * static_cast<Scalar<T>>(-kLn2);
    return x.where_near(near.grad_p(x), one_minus_teacher * shares.teacher.as<T>() + log_ratio);
  }
  // Likewise; but of less than a quarter of q the mixture is so close to p that digits cancel where they are far apart.
  KLDIV_HD bool is_balanced() const { return shares.are_balanced() && shares.student.in_float >= 0.25f; }
  void prepare() { near = NearPolynomials::of(*this); }
  template <typename T>
  KLDIV_HD T grad_q_shift() const {
    return -shares.student.as<T>();
  }
  template <typename T>
  KLDIV_HD T grad_p_shift() const {
    return -limit.as<T>();
  }
};

using SkewReverseKL = Exchanged<SkewForwardKL>;

// Half the L1 distance; the gradient at p = q is 0.
struct TotalVariation {
  static constexpr bool kGradQSumsToZero = false;
  static constexpr bool kGradPSumsToZero = false;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return absolute(x.difference()) * static_cast<Scalar<T>>(0.5);
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
  Parameter alpha, rest, per_alpha, per_rest, per_both;

  explicit Alpha(double alpha)
      : alpha(alpha),
        rest(1 - alpha),
        per_alpha(1 / alpha),
        per_rest(1 / (1 - alpha)),
        per_both((1 / alpha) * (1 / (1 - alpha))) {}

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return x.larger * Power<T>(*this, x).term * per_both.as<T>();
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {  // (q - r) / alpha
    const Power<T> r(*this, x);
    return x.larger * x.by_larger(-r.minus_smaller, r.below_larger) * per_alpha.as<T>();
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {  // (p - r) / (1 - alpha)
    const Power<T> r(*this, x);
    return x.larger * x.by_larger(r.below_larger, -r.minus_smaller) * per_rest.as<T>();
  }
  template <typename T>
  KLDIV_HD T grad_q_shifted(const Pair<T>& x) const {  // -r / alpha
    return -x.larger * Power<T>(*this, x).value * per_alpha.as<T>();
  }
  template <typename T>
  KLDIV_HD T grad_p_shifted(const Pair<T>& x) const {  // -r / (1 - alpha)
    return -x.larger * Power<T>(*this, x).value * per_rest.as<T>();
  }

 private:
  // r, what it lacks to the larger probability and has over the smaller one, everything relative to the larger one:
  // from the one that it is closer to in the logarithm, so that no alpha, however small, costs digits.
  template <typename T>
  struct Power {
    T value, below_larger, minus_smaller;
    T term;  // share smaller + (1 - share) larger - r, where r = larger^(1 - share) smaller^share

    KLDIV_HD Power(const Alpha& divergence, const Pair<T>& x) {
      const auto alpha = divergence.alpha.as<T>(), rest = divergence.rest.as<T>();
      const T share = x.by_larger(rest, alpha), nearest = minimum(share, x.by_larger(alpha, rest));
      const auto near_smaller = share > static_cast<Scalar<T>>(0.5);
      const auto close = x.gap < 1;
      // e^{-nearest gap}: r / larger or, near the smaller one, smaller / r. That is divided by; far before this limit
      // ratio is 0.
      const T limit = near_smaller ? splat<T>(FormatOf<T>::kSmallestExponent / -2) : infinity<T>();
      const Decay<T> step(minimum(nearest * x.gap, limit));
      const T remainder = close ? step.expm1 - x.expm1 : step.ratio - x.ratio;
      const T reciprocal = Primitives<T>::reciprocal(step.ratio);
      value = near_smaller ? x.ratio * reciprocal : step.ratio;
      below_larger = near_smaller ? remainder * reciprocal : -step.expm1;
      minus_smaller = near_smaller ? value * -step.expm1 : remainder;
      // At small gaps their first orders cancel: without them.
      const T second_order = nearest * x.excess - step.excess;
      const T small = near_smaller ? -below_larger * step.expm1 - second_order : second_order;
      const T large = near_smaller ? -nearest * x.expm1 - minus_smaller : below_larger + nearest * x.expm1;
      term = close ? small : large;
    }
  };
};

// No divergence, and what a skew divergence is where the mixture is its own first argument. A NaN row stays NaN.
struct Zero {
  static constexpr bool kGradQSumsToZero = true;
  static constexpr bool kGradPSumsToZero = true;

  template <typename T>
  KLDIV_HD T term(const Pair<T>& x) const {
    return x.difference() * T{};
  }
  template <typename T>
  KLDIV_HD T grad_q(const Pair<T>& x) const {
    return x.difference() * T{};
  }
  template <typename T>
  KLDIV_HD T grad_p(const Pair<T>& x) const {
    return x.difference() * T{};
  }
};

// The table: name, the name of its parameter ("" for none), the struct, and what it is at parameter 0 and 1.
#define KLDIV_DIVERGENCES(ROW)                                                                 \
  ROW("forward_kl", "", ForwardKL{}, ForwardKL{}, ForwardKL{})                                 \
  ROW("reverse_kl", "", ReverseKL{}, ReverseKL{}, ReverseKL{})                                 \
  ROW("jeffreys", "", Jeffreys{}, Jeffreys{}, Jeffreys{})                                      \
  ROW("jsd", "beta", JensenShannon{parameter}, ForwardKL{}, ReverseKL{})                       \
  ROW("skew_forward_kl", "skew", SkewForwardKL{parameter}, ForwardKL{}, Zero{})                \
  ROW("skew_reverse_kl", "skew", SkewReverseKL{SkewForwardKL{parameter}}, ReverseKL{}, Zero{}) \
  ROW("total_variation", "", TotalVariation{}, TotalVariation{}, TotalVariation{})             \
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
    const T p = probability(target), log_p = kLogTarget ? target : log_in_product(target);
    return where_equal(p, T{}, T{}, p * (log_p - input));
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
