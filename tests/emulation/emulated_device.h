// The names of csrc/cuda/device.h for a compiler without CUDA: threads are fibers, device memory is memory.
#pragma once

#include <cstring>
#include <tuple>

#include "fibers.h"

#define KLDIV_DEVICE inline
#define KLDIV_DEVICE_CALL inline
#define KLDIV_UNROLL
#define KLDIV_NO_UNROLL
#define KLDIV_KERNEL(max_threads) void
#define KLDIV_ARGUMENT const
#define KLDIV_SHARED(type, name, count) \
  static const char name##_name = 0;    \
  type* const name = static_cast<type*>(::kldiv::emulation::shared(&name##_name, sizeof(type) * (count)))

namespace kldiv::device {

constexpr int kWarp = emulation::kWarp;

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

inline int thread() { return emulation::position().thread; }
inline int threads() { return emulation::position().threads; }
inline int64_t block() { return emulation::position().block; }
inline int64_t blocks() { return emulation::position().blocks; }

inline void barrier() { emulation::barrier(); }

template <typename T>
T shuffle_down(T x, int lanes) {
  emulation::shuffle(&x, sizeof(T), lanes);
  return x;
}
template <typename T>
T broadcast(T x) {
  emulation::shuffle(&x, sizeof(T), emulation::kFromFirst);
  return x;
}

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

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* /*stream*/,
            const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters(arguments...);
  emulation::run(blocks, threads, [&] { std::apply(kernel, parameters); });
}

}  // namespace kldiv::device
