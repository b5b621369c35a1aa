// SIMD vectors of the instruction set this file is compiled for: loads, stores and fixed-order sums.
#pragma once

#include "../math.h"

namespace kldiv {
inline namespace KLDIV_ISA {

// kernels_*.cpp say how wide the vectors of their instruction set are.
#if defined(KLDIV_VECTOR_BYTES)
constexpr int kVectorBytes = KLDIV_VECTOR_BYTES;
#else
constexpr int kVectorBytes = 16;
#endif

using VecF = float __attribute__((vector_size(kVectorBytes)));
using VecD = double __attribute__((vector_size(kVectorBytes)));

template <>
struct Lanes<VecF> {
  using Scalar = float;
  using Int = int32_t __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<VecD> {
  using Scalar = double;
  using Int = int64_t __attribute__((vector_size(kVectorBytes)));
};

template <typename acc_t>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF;
};
template <>
struct VecOf<double> {
  using type = VecD;
};
template <typename acc_t>
using Vec = typename VecOf<acc_t>::type;

template <typename acc_t>
constexpr int kLanes = kVectorBytes / sizeof(acc_t);

template <typename acc_t>
KLDIV_HD Vec<acc_t> load(const acc_t* p) {
  Vec<acc_t> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename acc_t>
KLDIV_HD void store(acc_t* p, Vec<acc_t> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Sum over the lanes as a balanced tree.
template <typename V>
KLDIV_HD Scalar<V> sum_lanes(V v) {
  constexpr int n = sizeof(V) / sizeof(Scalar<V>);
  Scalar<V> lane[n];
  for (int i = 0; i < n; ++i) lane[i] = v[i];
  for (int width = n / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

template <typename V>
KLDIV_HD Scalar<V> max_lanes(V v) {
  Scalar<V> best = v[0];
  for (int i = 1; i < static_cast<int>(sizeof(V) / sizeof(Scalar<V>)); ++i) best = maximum<Scalar<V>>(best, v[i]);
  return best;
}

}  // namespace KLDIV_ISA
}  // namespace kldiv
