// The CPU kernels' entry points, one set per instruction set, and the choice among them at run time.
#pragma once

#include "../args.h"

namespace kldiv::cpu {

// A row's sums are those of its chunks, added as a balanced tree: the same for any number of threads. The chunks of all
// tensors that are at work together fit the L1 cache.
constexpr int64_t kChunk = 1024;
constexpr int64_t chunks_of(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

// How long PointwiseArgs::partials has to be.
constexpr int64_t pointwise_partials(int64_t rows, int64_t columns) { return rows * chunks_of(columns); }

// A thread pool, handed in by whoever calls: torch's in the extension, any other in a standalone build.
struct Threads {
  int count = 1;
  // Runs body(context, begin, end) over [0, n) in pieces of at least `grain`.
  void (*parallel_for)(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) = nullptr;
};

struct Kernels {
  const char* name;
  void (*distillation)(const DistillationArgs&, const Threads&);
  void (*token_stats)(const TokenStatsArgs&, const Threads&);
  void (*pointwise)(const PointwiseArgs&, const Threads&);
  void (*scale)(const ScaleArgs&, const Threads&);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KLDIV_HAS_X86_KERNELS 1
extern const Kernels avx2_kernels, avx512_kernels;
#endif

// The best set that this machine can run; KLDIV_EXT_CPU_ISA=portable|avx2|avx512 asks for a lesser one.
const Kernels& kernels();

}  // namespace kldiv::cpu
