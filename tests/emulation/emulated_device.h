// The names of csrc/cuda/device.h for a compiler without CUDA: threads are fibers, device memory is memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <tuple>

#include "fibers.h"
#include "special_functions.h"

#define KLDIV_DEVICE inline
#define KLDIV_DEVICE_CALL inline
#define KLDIV_UNROLL
#define KLDIV_NO_UNROLL
#define KLDIV_KERNEL(max_threads, blocks) void
#define KLDIV_ARGUMENT const
#define KLDIV_SHARED(type, name, count) \
  static const char name##_name = 0;    \
  type* const name = static_cast<type*>(::kldiv::emulation::shared(&name##_name, sizeof(type) * (count), alignof(type)))

namespace kldiv::device {

constexpr int kWarp = emulation::kWarp;
using emulation::Properties;
using emulation::Shape;

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

inline int thread() { return emulation::position().thread; }
inline int threads() { return emulation::position().threads; }
inline int64_t block() { return emulation::position().block; }
inline int64_t blocks() { return emulation::position().blocks; }

inline void barrier() { emulation::barrier(); }

inline bool has_clusters() { return emulation::properties().clusters; }
inline void cluster_barrier() { emulation::cluster_barrier(); }
inline uint32_t next(uint32_t* count) { return (*count)++; }
inline void arrive(uint32_t* count) { emulation::arrive(count); }
inline void await(const uint32_t* count, uint32_t target) { emulation::await(count, target); }

inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(emulation::dynamic_shared()); }
template <typename T>
T* of_peer(T* shared, int rank) {
  return static_cast<T*>(emulation::of_peer(shared, rank));
}

template <typename T>
T shuffle_xor(const T& x, int lanes, int width = kWarp) {
  T value = x;
  emulation::shuffle(&value, sizeof(T), lanes, width);
  return value;
}

inline float exp2_approx(float x) { return emulation::exp2_approx(x); }
inline float log2_approx(float x) { return emulation::log2_approx(x); }
inline float reciprocal_approx(float x) { return emulation::reciprocal_approx(x); }

inline float maximum(float a, float b) { return a != a || a > b ? a : b; }
inline float minimum(float a, float b) { return a != a || a < b ? a : b; }
inline float where_less(float x, float y, float a, float b) { return x < y ? a : b; }
inline float where_equal(float x, float y, float a, float b) { return x == y ? a : b; }

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Bytes16) != 0) emulation::fail("a misaligned 16-byte access");
}
inline Bytes16 load16(const void* p) {
  check_aligned(p);
  Bytes16 bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return bytes;
}
inline Bytes16 load16_once(const void* p) { return load16(p); }
inline void store16_once(void* p, const Bytes16& bytes) {
  check_aligned(p);
  std::memcpy(p, &bytes, sizeof(bytes));
}

inline void copy16_async(void* to_shared, const void* from_global) {
  check_aligned(to_shared);
  check_aligned(from_global);
  emulation::copy16_async(to_shared, from_global);
}
inline void commit_copies() { emulation::commit_copies(); }
inline void await_copies(int but) { emulation::await_copies(but); }

inline const Properties& properties() { return emulation::properties(); }
// As if any blocks could run at the same time, two of them on a multiprocessor.
template <typename Kernel>
int active_clusters(Kernel*, const Shape& shape) {
  const auto [capability, multiprocessors, shared_bytes, clusters] = properties();
  const int64_t per_multiprocessor = std::min<int64_t>(shared_bytes / (shape.shared_bytes + 1024), 2);
  const bool possible = !clusters || shape.cluster <= (capability < 110 ? 16 : 8);
  return possible ? static_cast<int>(multiprocessors * per_multiprocessor / shape.cluster) : 0;
}

inline void clear(void* memory, size_t bytes, void* /*stream*/) { std::memset(memory, 0, bytes); }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, void* /*stream*/, const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters(arguments...);
  emulation::run(shape, [&] { std::apply(kernel, parameters); });
}

}  // namespace kldiv::device
