// The CUDA kernels' entry points, and how many threads and blocks they are launched with.
//
// All pointers in the arguments are device pointers. Nothing here waits for the device or throws; an error of a
// launch is left for cudaGetLastError().
#pragma once

#include "../args.h"

namespace kldiv::cuda {

void distillation(const DistillationArgs& args, void* stream);
void token_stats(const TokenStatsArgs& args, void* stream);
void pointwise(const PointwiseArgs& args, void* stream);
void scale(const ScaleArgs& args, void* stream);

// How long PointwiseArgs::partials has to be.
int64_t pointwise_partials(int64_t rows, int64_t columns);

// The row kernels for one kind of Side (groups.h); rows.h has the body, rows_*.cu an instance each.
template <typename Side>
void launch_rows(const DistillationArgs& args, void* stream);

// How many threads, one block, share a row: by its length alone, because the order of every sum follows from it.
struct RowRule {
  int64_t columns;  // for rows of up to so many columns
  int threads;
};
constexpr RowRule kRowRules[] = {
    {256, 32},         // a warp: its sums wait for nobody
    {512, 64},         // up to here a thread per group of columns: the shortest way through a short row
    {1024, 128},       //
    {65536, 256},      // two blocks fit a multiprocessor, so that one computes while the other waits for a sum
    {INT64_MAX, 512},  // one does: fewer rows at a time, more of each still in the L2 cache when it is read again
};
// Each quarter of a multiprocessor has 16384 registers for its warps. In float 512 threads leave each 128, and no
// kernel spills; up to 640 would leave 96, and some would. In double each needs twice as many.
template <typename acc_t>
constexpr int max_row_threads = sizeof(acc_t) == sizeof(float) ? 512 : 256;

template <typename acc_t>
constexpr int row_threads(int64_t columns) {
  int i = 0;
  while (columns > kRowRules[i].columns) ++i;
  return kRowRules[i].threads < max_row_threads<acc_t> ? kRowRules[i].threads : max_row_threads<acc_t>;
}

// Enough blocks to fill any device many times over; beyond it a block takes several rows.
constexpr int64_t kMaxRowBlocks = 65536;
constexpr int64_t row_blocks(int64_t rows) { return rows < kMaxRowBlocks ? rows : kMaxRowBlocks; }

// Element by element: about a group per thread at first, then more, so that the partial sums stay few. The last
// round of blocks is a small part of so many on any device.
constexpr int kElementThreads = 256;
constexpr int64_t kMaxElementBlocks = 8192;
constexpr int64_t element_blocks(int64_t count) {
  constexpr int64_t per_block = 8 * kElementThreads;
  const int64_t blocks = count / per_block + (count % per_block != 0);
  return blocks < kMaxElementBlocks ? blocks : kMaxElementBlocks;
}

}  // namespace kldiv::cuda
