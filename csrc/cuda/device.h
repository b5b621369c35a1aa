// All that kernels take from CUDA, under names of our own: nothing else in this folder says threadIdx, __shfl,
// __shared__ or cluster. So a compiler without CUDA can build the same kernels for tests/emulation, which brings these
// names.
#pragma once

#include "../platform.h"

#if !defined(__CUDACC__)
#include "emulated_device.h"
#else
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include <map>
#include <tuple>

#define KLDIV_DEVICE __device__ __forceinline__
#define KLDIV_DEVICE_CALL inline __device__ __noinline__

#define KLDIV_UNROLL _Pragma("unroll")
#define KLDIV_NO_UNROLL _Pragma("unroll 1")

// A kernel for blocks of at most max_threads, of which so many fit a multiprocessor: without that number ptxas would
// sooner spill registers than have fewer blocks. Big arguments are read where they lie, not copied for each thread.
#define KLDIV_KERNEL(max_threads, blocks) __global__ __launch_bounds__(max_threads, blocks) void
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

// Clusters: blocks that run at the same time and see each other's shared memory; in code for sm_90 and up.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
KLDIV_DEVICE constexpr bool has_clusters() { return true; }
// barrier() for all blocks of the cluster.
KLDIV_DEVICE void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
// The same place in the shared memory of block `rank`, once that block has begun and as long as it has not ended.
template <typename T>
KLDIV_DEVICE T* of_peer(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
KLDIV_DEVICE constexpr bool has_clusters() { return false; }
KLDIV_DEVICE void cluster_barrier() {}
template <typename T>
KLDIV_DEVICE T* of_peer(T* shared, int) {
  return shared;
}
#endif

// Numbers in device memory that blocks count by. The next one, from 0:
KLDIV_DEVICE uint32_t next(uint32_t* count) { return atomicAdd(count, 1); }
// Adds one, once the block's barrier() is behind it: what it wrote until then is seen by those that await this count.
KLDIV_DEVICE void arrive(uint32_t* count) {
  __threadfence();
  atomicAdd(count, 1);
}
// Until `count` has come to `target`, which is no more than 2^31 ahead; for all of the block after its next barrier().
KLDIV_DEVICE void await(const uint32_t* count, uint32_t target) {
  while (static_cast<int32_t>(*static_cast<const volatile uint32_t*>(count) - target) < 0) {
  }
  __threadfence();
}

// As many bytes as the launch says.
KLDIV_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// 16 bytes, both addresses multiples of 16, copied while the thread goes on; to be read by this thread, and that once
// it has awaited them.
KLDIV_DEVICE void copy16_async(void* to_shared, const void* from_global) {
  __pipeline_memcpy_async(to_shared, from_global, 16);
}
// What this thread began since it last committed is one lot.
KLDIV_DEVICE void commit_copies() { __pipeline_commit(); }
// Waits for all lots but the latest `but`, or for more of them.
KLDIV_DEVICE void await_copies(int but) {
  if (but >= 4) {
    __pipeline_wait_prior(4);
  } else if (but >= 2) {
    __pipeline_wait_prior(2);
  } else if (but == 1) {
    __pipeline_wait_prior(1);
  } else {
    __pipeline_wait_prior(0);
  }
}

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

// The lanes that shuffle together: `width` neighbours, a power of 2.
KLDIV_DEVICE uint32_t shuffle_mask(int width) {
  const uint32_t first = threadIdx.x % kWarp & ~(static_cast<uint32_t>(width) - 1);
  return (width == kWarp ? 0xffffffffu : (1u << width) - 1) << first;
}

// The value of the lane whose number differs from one's own in the bits of `lanes`, which are within the width. All
// lanes of it must take part.
template <typename T>
KLDIV_DEVICE T shuffle_xor(const T& x, int lanes, int width = kWarp) {
  return detail::shuffled(x, [=](uint32_t word) { return __shfl_xor_sync(shuffle_mask(width), word, lanes, width); });
}

// Of a float, in one instruction. The special function unit's take subnormal numbers for 0; relative errors up to
// 2^-22, 2^-23 and, in the logarithm of a number from 1/2 to 2, an absolute one of 2^-22. maximum and minimum are NaN
// where either number is; where_less and where_equal are a where that is so and b elsewhere. For the device alone, but
// called by functions that are for both.
#if defined(__CUDA_ARCH__)
#define KLDIV_INSTRUCTION(name, ...)      \
  float result;                           \
  asm(name : "=f"(result) : __VA_ARGS__); \
  return result
#else
#define KLDIV_INSTRUCTION(name, ...) return 0
#endif
KLDIV_HD float exp2_approx([[maybe_unused]] float x) { KLDIV_INSTRUCTION("ex2.approx.ftz.f32 %0, %1;", "f"(x)); }
KLDIV_HD float reciprocal_approx([[maybe_unused]] float x) { KLDIV_INSTRUCTION("rcp.approx.ftz.f32 %0, %1;", "f"(x)); }
KLDIV_HD float log2_approx([[maybe_unused]] float x) { KLDIV_INSTRUCTION("lg2.approx.ftz.f32 %0, %1;", "f"(x)); }
KLDIV_HD float maximum([[maybe_unused]] float a, [[maybe_unused]] float b) {
  KLDIV_INSTRUCTION("max.NaN.f32 %0, %1, %2;", "f"(a), "f"(b));
}
KLDIV_HD float minimum([[maybe_unused]] float a, [[maybe_unused]] float b) {
  KLDIV_INSTRUCTION("min.NaN.f32 %0, %1, %2;", "f"(a), "f"(b));
}
KLDIV_HD float where_less([[maybe_unused]] float x, [[maybe_unused]] float y, [[maybe_unused]] float a,
                          [[maybe_unused]] float b) {
  KLDIV_INSTRUCTION("{.reg .pred p; setp.lt.f32 p, %1, %2; selp.f32 %0, %3, %4, p;}", "f"(x), "f"(y), "f"(a), "f"(b));
}
KLDIV_HD float where_equal([[maybe_unused]] float x, [[maybe_unused]] float y, [[maybe_unused]] float a,
                           [[maybe_unused]] float b) {
  KLDIV_INSTRUCTION("{.reg .pred p; setp.eq.f32 p, %1, %2; selp.f32 %0, %3, %4, p;}", "f"(x), "f"(y), "f"(a), "f"(b));
}
#undef KLDIV_INSTRUCTION

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

// Host side. Errors are left for cudaGetLastError().
struct Properties {
  int multiprocessors;
  size_t shared_bytes_per_block;
  bool clusters;  // in the code that the device runs: of a driver that compiled older PTX for it there are none
};

namespace detail {
inline int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

// Compiled for what all kernels are compiled for.
template <typename = void>
__global__ void nothing() {}

inline Properties ask_properties() {
  cudaFuncAttributes attributes = {};
  cudaFuncGetAttributes(&attributes, nothing<>);
  return {attribute(cudaDevAttrMultiProcessorCount),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)), attributes.ptxVersion >= 90};
}
}  // namespace detail

// Of the current device.
inline const Properties& properties() {
  thread_local std::map<int, Properties> known;
  int device = 0;
  cudaGetDevice(&device);
  const auto [answer, is_new] = known.try_emplace(device);
  if (is_new) answer->second = detail::ask_properties();
  return answer->second;
}

struct Shape {
  int64_t blocks;
  int threads;
  int cluster = 1;  // blocks that work together: a cluster where there are clusters
  size_t shared_bytes = 0;
};

namespace detail {
// A launch without a stream; `cluster` has to live as long as it.
inline cudaLaunchConfig_t configuration(const Shape& shape, cudaLaunchAttribute& cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(shape.blocks);
  config.blockDim = static_cast<unsigned>(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 && properties().clusters ? 1 : 0;
  return config;
}

// What active_clusters() says, asked of CUDA.
template <typename Kernel>
int ask_active_clusters(Kernel* kernel, const Shape& shape) {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 0;
  const Properties& device = properties();
  // Not what this launch needs but all there is: it holds for all threads of the process.
  const int most = static_cast<int>(device.shared_bytes_per_block - attributes.sharedSizeBytes);
  if (shape.shared_bytes > static_cast<size_t>(most)) return 0;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  int clusters = 0;
  cudaError_t error;
  if (shape.cluster > 1 && device.clusters) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t config = configuration(shape, cluster);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  } else {
    int blocks = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads, shape.shared_bytes);
    clusters = blocks * device.multiprocessors / shape.cluster;
  }
  if (error == cudaSuccess) return clusters;
  cudaGetLastError();  // no error of a launch: there will be another shape
  return 0;
}
}  // namespace detail

// How many clusters of a shape run at a time on the current device, to be asked before a launch with clusters or
// dynamic shared memory; 0 where the shape does not fit.
template <typename Kernel>
int active_clusters(Kernel* kernel, const Shape& shape) {
  thread_local std::map<std::tuple<Kernel*, int, int, int, size_t>, int> known;
  int device = 0;
  cudaGetDevice(&device);
  const auto [answer, is_new] = known.try_emplace({kernel, device, shape.threads, shape.cluster, shape.shared_bytes});
  if (is_new) answer->second = detail::ask_active_clusters(kernel, shape);
  return answer->second;
}

// Zeros.
inline void clear(void* memory, size_t bytes, void* stream) {
  cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = detail::configuration(shape, cluster);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace kldiv::device
#endif
