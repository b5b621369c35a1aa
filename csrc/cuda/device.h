// All that kernels take from CUDA, under names of our own: nothing else in this folder says threadIdx, __shfl or
// __shared__. So a compiler without CUDA can build the same kernels for tests/emulation, which brings these names.
#pragma once

#include "../platform.h"

#if !defined(__CUDACC__)
#include "emulated_device.h"
#else

#define KLDIV_DEVICE __device__ __forceinline__
#define KLDIV_DEVICE_CALL __device__ __noinline__

#define KLDIV_UNROLL _Pragma("unroll")
#define KLDIV_NO_UNROLL _Pragma("unroll 1")

// A kernel for blocks of at most max_threads, of which one on a multiprocessor is enough: without that "1" ptxas would
// sooner spill registers than have fewer blocks. Big arguments are read where they lie, not copied for each thread.
#define KLDIV_KERNEL(max_threads) __global__ __launch_bounds__(max_threads, 1) void
#define KLDIV_ARGUMENT const __grid_constant__

// `type* name`: room for `count` values that all threads of a block see; undefined at first.
#define KLDIV_SHARED(type, name, count)                                        \
  __shared__ alignas(type) unsigned char name##_bytes[sizeof(type) * (count)]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)

namespace kldiv::device {

constexpr int kWarp = 32;

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

KLDIV_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
KLDIV_DEVICE int threads() { return static_cast<int>(blockDim.x); }
KLDIV_DEVICE int64_t block() { return blockIdx.x; }
KLDIV_DEVICE int64_t blocks() { return gridDim.x; }

// Waits for all threads of the block; what they wrote to shared memory is then seen by all.
KLDIV_DEVICE void barrier() { __syncthreads(); }

namespace detail {
template <typename T, typename Shuffle>
KLDIV_DEVICE T shuffled(const T& x, const Shuffle& shuffle) {
  constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  static_assert(sizeof(T) == kWords * sizeof(uint32_t));
  uint32_t words[kWords];
  __builtin_memcpy(words, &x, sizeof(T));
  KLDIV_UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = shuffle(words[i]);
  T result;
  __builtin_memcpy(&result, words, sizeof(T));
  return result;
}
}  // namespace detail

// The value of the thread so many lanes up in the warp, one's own where there is none. All lanes must take part.
template <typename T>
KLDIV_DEVICE T shuffle_down(const T& x, int lanes) {
  return detail::shuffled(x, [=](uint32_t word) { return __shfl_down_sync(0xffffffffu, word, lanes); });
}

// The value of the warp's first thread. All lanes must take part.
template <typename T>
KLDIV_DEVICE T broadcast(const T& x) {
  return detail::shuffled(x, [](uint32_t word) { return __shfl_sync(0xffffffffu, word, 0); });
}

// 16 bytes at an address that is a multiple of 16, in one access. Plain or, for what nobody reads again soon, marked
// to leave the caches first.
KLDIV_DEVICE Bytes16 load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
KLDIV_DEVICE Bytes16 load16_once(const void* p) {
  const uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
KLDIV_DEVICE void store16_once(void* p, const Bytes16& b) {
  __stcs(static_cast<uint4*>(p), make_uint4(b.words[0], b.words[1], b.words[2], b.words[3]));
}

// Host side. An error is left for cudaGetLastError().
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, const Arguments&... arguments) {
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
}

}  // namespace kldiv::device
#endif
