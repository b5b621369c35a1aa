// float arithmetic by a multiprocessor's special function unit, in place of the polynomials of math.h: an exponential,
// a logarithm or a reciprocal is one instruction, and instructions are what bfloat16 rows are short of (GPU.md).
//
// Relative errors (tests/test_cuda_kernels_emulated.py, with the worst ones that PTX allows): exp2 2.4e-7, reciprocal
// 1.2e-7, Decay 5e-7 but for excess, 1.5e-6; Log1p 7e-7, its shortfall 4e-6.
#pragma once

#include "../math.h"
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

// Of use in sums alone: what underflows is 0 here.
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
struct Decay<float> {
  float ratio, expm1, excess;

  KLDIV_HD explicit Decay(float gap) {
    const bool small = gap < 0.5f;
    // (e^-gap - 1 + gap) / gap^2 for gap in [0, 1/2]: relative error 3e-8
    const float tail = gap * gap *
                       polynomial::horner(gap, 0.5f, -0.16666559875f, 0.0416496098f, -0.00823720731f, 0.00116327964f);
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

}  // namespace KLDIV_ISA
}  // namespace kldiv
