// SIMD vectors of the instruction set this file is compiled for: loads, stores and fixed-order sums.
#pragma once

// kernels_*.cpp say how wide the vectors of their instruction set are.
#if !defined(KLDIV_VECTOR_BYTES)
#define KLDIV_VECTOR_BYTES 16
#endif
#if KLDIV_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#include <type_traits>

#include "../math.h"
#include "../scalar_types.h"

namespace kldiv {
inline namespace KLDIV_ISA {

constexpr int kVectorBytes = KLDIV_VECTOR_BYTES;

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

#if KLDIV_VECTOR_BYTES == 64
template <>
struct Primitives<VecF> {
  // maxps and minps return their second operand if either is NaN.
  KLDIV_HD static VecF maximum(VecF a, VecF b) { return _mm512_max_ps(b, a); }
  KLDIV_HD static VecF minimum(VecF a, VecF b) { return _mm512_min_ps(b, a); }
  KLDIV_HD static VecF reciprocal(VecF x) {  // of a normal number: 14 bits, and a Newton step
    const VecF y = _mm512_rcp14_ps(x);
    return y * (2 - x * y);
  }
  KLDIV_HD static VecF round(VecF x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
  KLDIV_HD static VecF scale(VecF x, VecF k) { return _mm512_scalef_ps(x, k); }
};
#elif KLDIV_VECTOR_BYTES == 32
template <>
struct Primitives<VecF> {
  KLDIV_HD static VecF maximum(VecF a, VecF b) { return _mm256_max_ps(b, a); }
  KLDIV_HD static VecF minimum(VecF a, VecF b) { return _mm256_min_ps(b, a); }
  KLDIV_HD static VecF reciprocal(VecF x) { return 1 / x; }
  KLDIV_HD static VecF round(VecF x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  KLDIV_HD static VecF scale(VecF x, VecF k) { return x * power_of_two<VecF>(k + Format<float>::kRound); }
};
#endif

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

// Vectors of the 16-bit storage types that fill one VecF.
using VecU16 = uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using VecU32 = uint32_t __attribute__((vector_size(kVectorBytes)));

// kLanes<acc_t> elements of storage as a vector of acc_t, and back. bfloat16 is spelt out because its scalar
// conversion does not vectorise by itself; the rest is left to the compiler.
template <typename acc_t, typename scalar_t>
KLDIV_HD Vec<acc_t> load_as(const scalar_t* p) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return load(p);
  } else if constexpr (std::is_same_v<scalar_t, BFloat16> && std::is_same_v<acc_t, float>) {
    VecU16 bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return bit_cast<VecF>(__builtin_convertvector(bits, VecU32) << 16);
  } else {
    acc_t lanes[kLanes<acc_t>];
    for (int i = 0; i < kLanes<acc_t>; ++i) lanes[i] = widen<acc_t>(p[i]);
    return load(lanes);
  }
}

template <typename acc_t_vector, typename scalar_t>
KLDIV_HD void store_as(scalar_t* p, acc_t_vector v) {
  using acc_t = Scalar<acc_t_vector>;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    store(p, v);
  } else if constexpr (std::is_same_v<scalar_t, BFloat16> && std::is_same_v<acc_t, float>) {
    const VecU32 bits = bit_cast<VecU32>(v);
    const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VecU16 narrowed = __builtin_convertvector(v == v ? rounded : VecU32{} + 0x7fc0u, VecU16);
    __builtin_memcpy(p, &narrowed, sizeof(narrowed));
  } else {
    for (int i = 0; i < kLanes<acc_t>; ++i) p[i] = narrow<scalar_t>(v[i]);
  }
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
