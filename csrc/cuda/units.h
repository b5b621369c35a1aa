// float arithmetic by a multiprocessor's special function unit, in place of the polynomials of math.h: an exponential,
// a logarithm or a reciprocal is one instruction, and instructions are what rows of 16-bit logits are short of.
//
// Relative errors are larger than those of math.h, and measured in tests/emulation/test_columns.py with the worst
// results that PTX allows.
#pragma once

#include "../divergences.h"
#include "device.h"

namespace kldiv {
inline namespace KLDIV_ISA {

template <>
struct Primitives<float> {
  KLDIV_HD static float maximum(float a, float b) { return device::maximum(a, b); }
  KLDIV_HD static float minimum(float a, float b) { return device::minimum(a, b); }
  KLDIV_HD static float reciprocal(float x) { return device::reciprocal_approx(x); }
};

template <>
KLDIV_HD float absolute(float x) {
  return ::fabsf(x);
}

template <>
KLDIV_HD float where_less(float x, float y, float a, float b) {
  return device::where_less(x, y, a, b);
}
template <>
KLDIV_HD float where_equal(float x, float y, float a, float b) {
  return device::where_equal(x, y, a, b);
}

// What underflows is 0 here.
template <>
KLDIV_HD float exp2_floored(float x) {
  return device::exp2_approx(x);
}

template <>
KLDIV_HD float exp2(float x) {
  const float value = device::exp2_approx(x);
  return value == 0 && x != -infinity<float>() ? Format<float>::kTiny : value;
}

template <>
KLDIV_HD float log2_normal(float x) {
  return device::log2_approx(x);
}

template <>
struct Decay<float> {
  float ratio, expm1, excess;

  KLDIV_HD explicit Decay(float gap) {
    const bool small = gap < 0.5f;
    // (e^-gap - 1 + gap) / gap^2 for gap in [0, 1/2]: relative error 3e-8
    const float tail =
        gap * gap * polynomial::horner(gap, 0.5f, -0.16666559875f, 0.0416496098f, -0.00823720731f, 0.00116327964f);
    ratio = device::exp2_approx(gap * static_cast<float>(-kLog2E));
    expm1 = small ? tail - gap : ratio - 1;
    excess = small ? tail : gap + expm1;
  }
};

template <>
struct Log1p<float> {
  float value, shortfall;

  KLDIV_HD explicit Log1p(float y) : Log1p(y, y + 1) {}

  KLDIV_HD Log1p(float y, float one_plus_y) {
    const bool small = absolute(y - 0.0625f) < 0.3125f;  // [-1/4, 3/8], where the polynomial holds
    const float reduced = polynomial::log_shortfall(y);
    const float log = device::log2_approx(one_plus_y) * static_cast<float>(kLn2);
    value = small ? y - reduced : log;
    shortfall = small ? reduced : y - log;
  }
};

template <>
KLDIV_HD float log_in_product(float x) {
  return maximum(Log1p<float>(x - 1, x).value, -104.0f);  // -inf of a subnormal number
}

// With p and q at an instruction each, what they differ by is taken from them wherever it is not small, and nothing has
// to be seen from the larger one.
template <>
struct Pair<float> {
  using Mask = bool;

  float p, q, delta;
  float larger, gap, ratio, expm1, excess;  // as everywhere, for who asks for them

  KLDIV_HD Pair(float delta, float log2_p, float log2_q)
      : Pair(of(delta, device::exp2_approx(log2_p), device::exp2_approx(log2_q))) {}
  // NaN, of narrow logits that are both -inf, stands for any number.
  KLDIV_HD static Pair of(float log_ratio, float p, float q) {
    const float delta = log_ratio != log_ratio ? 0 : log_ratio;
    return {log_ratio, delta, p, q, Decay<float>(absolute(delta))};
  }

  KLDIV_HD bool teacher_is_larger() const { return delta >= 0; }
  KLDIV_HD float by_larger(float if_teacher, float if_student) const {
    return teacher_is_larger() ? if_teacher : if_student;
  }

  KLDIV_HD float teacher() const { return p; }
  KLDIV_HD float student() const { return q; }
  KLDIV_HD float difference() const { return where_small(teacher_log_ratio() - small_excess(), p - q); }
  // What a p of 0 can be multiplied with.
  KLDIV_HD float teacher_log_ratio() const { return p * ::fmaxf(log_ratio, -1e30f); }
  KLDIV_HD float teacher_excess() const { return where_small(small_excess(), teacher_log_ratio() - (p - q)); }
  KLDIV_HD Pair exchanged() const {
    Pair x = *this;
    x.p = q;
    x.q = p;
    x.log_ratio = -log_ratio;
    x.delta = -delta;
    return x;
  }
  KLDIV_HD float finite_gap() const { return minimum(gap, 1000.0f); }
  KLDIV_HD float finite_excess() const { return minimum(excess, 1000.0f); }

 private:
  KLDIV_HD Pair(float log_ratio, float delta, float p, float q, const Decay<float>& decay)
      : p(p),
        q(q),
        delta(delta),
        larger(maximum(p, q)),
        gap(absolute(delta)),
        ratio(decay.ratio),
        expm1(decay.expm1),
        excess(decay.excess),
        log_ratio(log_ratio) {}

  KLDIV_HD float where_small(float small, float large) const {
    return where_less(absolute(log_ratio), 0.5f, small, large);
  }
  // p (e^-delta - 1 + delta), for |delta| < 1/2: relative error 8e-7
  KLDIV_HD float small_excess() const {
    return teacher_log_ratio() * (log_ratio * polynomial::horner(log_ratio, 0.49999996f, -0.166662801f, 0.0416674768f,
                                                                 -0.00839541123f, 0.00139146527f));
  }

  float log_ratio;
};

}  // namespace KLDIV_ISA
}  // namespace kldiv
