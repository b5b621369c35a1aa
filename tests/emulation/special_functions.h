// What a GPU's special function unit may give: results that are off by as much as the PTX manual lets them be, and how
// far depends on the input in no orderly way. Subnormal numbers are zeros, before and after.
#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace kldiv::emulation {

inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// Between -1 and 1.
inline double disorder(float x) {
  uint32_t hash = std::bit_cast<uint32_t>(x);
  hash = (hash ^ hash >> 16) * 0x7feb352du;
  hash = (hash ^ hash >> 15) * 0x846ca68bu;
  return (hash ^ hash >> 16) / 2147483647.5 - 1;
}

// A float at most `most` away from the exact result for x.
inline float inexact(float x, double exact, double most) {
  float result = static_cast<float>(exact + most * disorder(x));
  if (std::fabs(result - exact) > most) result = std::nextafter(result, static_cast<float>(exact));
  return flushed(result);
}

// 2 ulp, where an ulp is a part of 2^23.
inline float exp2_approx(float x) {
  x = flushed(x);
  if (std::isnan(x)) return NAN;
  if (x == 0) return 1;
  if (x >= FLT_MAX_EXP) return INFINITY;
  const double exact = std::exp2(static_cast<double>(x));
  return inexact(x, exact, exact * 0x1p-22);
}

// 2 ulp, but around 1 as much as 2^-22.
inline float log2_approx(float x) {
  x = flushed(x);
  if (std::isnan(x) || x < 0) return NAN;
  if (x == 0) return -INFINITY;
  if (x == 1) return 0;
  if (std::isinf(x)) return x;
  const double exact = std::log2(static_cast<double>(x));
  return inexact(x, exact, x > 0.5f && x < 2.0f ? 0x1p-22 : std::fabs(exact) * 0x1p-22);
}

// 1 ulp.
inline float reciprocal_approx(float x) {
  x = flushed(x);
  if (std::isnan(x)) return NAN;
  if (x == 0) return std::copysign(INFINITY, x);
  if (std::isinf(x)) return std::copysign(0.0f, x);
  const double exact = 1 / static_cast<double>(x);
  return inexact(x, exact, std::ldexp(1.0, std::ilogb(exact) - (FLT_MANT_DIG - 1)));
}

}  // namespace kldiv::emulation
