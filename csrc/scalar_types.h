// The storage types bfloat16 and float16 and their conversions, without branches so that loops over them
// vectorise; round to nearest even.
#pragma once

#include "args.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace kldiv {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace detail {
KLDIV_HD uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
KLDIV_HD float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
}  // namespace detail

template <typename acc_t>
KLDIV_HD acc_t widen(double x) {
  return static_cast<acc_t>(x);
}
template <typename acc_t>
KLDIV_HD acc_t widen(float x) {
  return static_cast<acc_t>(x);
}
template <typename acc_t>
KLDIV_HD acc_t widen(BFloat16 x) {
  return static_cast<acc_t>(detail::float_of(static_cast<uint32_t>(x.bits) << 16));
}
template <typename acc_t>
KLDIV_HD acc_t widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  return static_cast<acc_t>(__half2float(__ushort_as_half(x.bits)));
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t finite = detail::bits_of(detail::float_of(magnitude) * 0x1p112f);
  return static_cast<acc_t>(detail::float_of(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite)));
#endif
}

template <typename scalar_t>
KLDIV_HD scalar_t narrow(double x) {
  return static_cast<scalar_t>(x);
}
template <typename scalar_t>
KLDIV_HD scalar_t narrow(float x) {
  return static_cast<scalar_t>(x);
}
template <>
KLDIV_HD BFloat16 narrow<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = detail::bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
#endif
}
template <>
KLDIV_HD Float16 narrow<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t sign = (detail::bits_of(x) >> 16) & 0x8000u, bits = detail::bits_of(x) & 0x7fffffffu;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // Adding 1/2 lets the adder round to a multiple of 2^-24, the step of the subnormals.
  const uint32_t subnormal = detail::bits_of(detail::float_of(bits) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  return {static_cast<uint16_t>(sign | (bits >= 0x47800000u ? special : (bits < 0x38800000u ? subnormal : normal)))};
#endif
}
template <>
KLDIV_HD BFloat16 narrow<BFloat16>(double x) {
  return narrow<BFloat16>(static_cast<float>(x));
}
template <>
KLDIV_HD Float16 narrow<Float16>(double x) {
  return narrow<Float16>(static_cast<float>(x));
}

// Calls function(scalar_t{}) with the storage type of that name.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // host code passes host functions, device code device functions
#endif
template <typename Function>
KLDIV_HD void dispatch_dtype(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFloat64:
      return function(double{});
    case Dtype::kFloat32:
      return function(float{});
    case Dtype::kFloat16:
      return function(Float16{});
    case Dtype::kBFloat16:
      return function(BFloat16{});
  }
}

}  // namespace kldiv
