// The part of selftest.cpp about special_functions.h: errors as large as PTX allows and no larger, and special values.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.h"

namespace kldiv::emulation {

// Whether the error of approximate(x) is at most allowed(exact(x)), and comes near to it in both directions.
template <typename Place, typename Approximate, typename Exact, typename Allowed>
bool errs_as_allowed(const Place& place, const Approximate& approximate, const Exact& exact, const Allowed& allowed) {
  double lowest = 0, highest = 0;
  for (int i = 0; i < 10000; ++i) {
    const auto x = static_cast<float>(place(i));
    const double y = exact(static_cast<double>(x)), off = (approximate(x) - y) / allowed(y);
    if (!(std::fabs(off) <= 1) || approximate(x) != approximate(x)) return false;
    lowest = std::fmin(lowest, off);
    highest = std::fmax(highest, off);
  }
  return lowest < -0.9 && highest > 0.9;
}

// Equal, with the same sign; NaN equals NaN.
inline bool same(float x, float y) {
  return std::isnan(y) ? std::isnan(x) : x == y && std::signbit(x) == std::signbit(y);
}

// Prints what is wrong and returns how much is.
inline int wrong_special_functions() {
  int wrong = 0;
  const auto expect = [&](bool condition, const char* what) {
    if (condition) return;
    std::printf("%s\n", what);
    ++wrong;
  };
  const auto exp2 = [](double x) { return std::exp2(x); };
  const auto log2 = [](double x) { return std::log2(x); };
  const auto reciprocal = [](double x) { return 1 / x; };
  const auto two_ulp = [](double y) { return std::fabs(y) * 0x1p-22; };
  const auto absolute = [](double) { return 0x1p-22; };
  const auto one_ulp = [](double y) { return std::ldexp(1.0, std::ilogb(y) - 23); };
  const auto even = [](double first, double last) { return [=](int i) { return first + (last - first) * i / 10000; }; };
  const auto by_ratio = [](double first, double last) {
    return [=](int i) { return first * std::pow(last / first, i / 10000.0); };
  };
  expect(errs_as_allowed(even(-125, 127), device::exp2_approx, exp2, two_ulp), "exp2_approx");
  expect(errs_as_allowed(by_ratio(2, 3e38), device::log2_approx, log2, two_ulp), "log2_approx above 2");
  expect(errs_as_allowed(by_ratio(0.5, 2e-38), device::log2_approx, log2, two_ulp), "log2_approx below 0.5");
  expect(errs_as_allowed(even(0.8, 1), device::log2_approx, log2, absolute), "log2_approx below 1");
  expect(errs_as_allowed(even(1.00001, 1.2), device::log2_approx, log2, absolute), "log2_approx above 1");
  expect(errs_as_allowed(by_ratio(2e-38, 8e37), device::reciprocal_approx, reciprocal, one_ulp), "1 / x");
  expect(errs_as_allowed(by_ratio(-2e-38, -8e37), device::reciprocal_approx, reciprocal, one_ulp), "1 / -x");

  const float nan = NAN, infinity = INFINITY, tiny = 1e-40f;
  for (const auto& [x, y] : std::vector<std::pair<float, float>>{{-infinity, 0.0f},
                                                                 {-0.0f, 1},
                                                                 {0.0f, 1},
                                                                 {tiny, 1},
                                                                 {infinity, infinity},
                                                                 {128, infinity},
                                                                 {-127, 0.0f},
                                                                 {nan, nan}}) {
    expect(same(device::exp2_approx(x), y), ("exp2_approx of " + std::to_string(x)).c_str());
  }
  for (const auto& [x, y] : std::vector<std::pair<float, float>>{{0.0f, -infinity},
                                                                 {-0.0f, -infinity},
                                                                 {tiny, -infinity},
                                                                 {-tiny, -infinity},
                                                                 {1, 0.0f},
                                                                 {-1, nan},
                                                                 {-infinity, nan},
                                                                 {infinity, infinity},
                                                                 {nan, nan}}) {
    expect(same(device::log2_approx(x), y), ("log2_approx of " + std::to_string(x)).c_str());
  }
  for (const auto& [x, y] : std::vector<std::pair<float, float>>{{0.0f, infinity},
                                                                 {-0.0f, -infinity},
                                                                 {tiny, infinity},
                                                                 {-tiny, -infinity},
                                                                 {infinity, 0.0f},
                                                                 {-infinity, -0.0f},
                                                                 {3e38f, 0.0f},
                                                                 {-3e38f, -0.0f},
                                                                 {nan, nan}}) {
    expect(same(device::reciprocal_approx(x), y), ("reciprocal_approx of " + std::to_string(x)).c_str());
  }
  return wrong;
}

}  // namespace kldiv::emulation
