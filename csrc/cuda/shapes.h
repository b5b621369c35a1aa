// How many threads and blocks the kernels are launched with: all rules that say so.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "groups.h"
#include "team.h"

namespace kldiv::cuda {

// ---------------------------------------------------------------- rows that are streamed

// How many threads of a block share a row: by its length alone, because the order of every sum follows from it.
struct RowRule {
  int64_t columns;  // for rows of up to so many columns
  int width;
};
constexpr RowRule kRowRules[] = {
    {64, 8},           // a group per lane: four rows to a warp, whose sums take three steps and wait for nobody
    {128, 16},         //
    {256, 32},         //
    {512, 64},         // up to here a thread per group: the shortest way through a short row
    {1024, 128},       //
    {65536, 256},      // two blocks fit a multiprocessor, so that one computes while the other waits for a sum
    {INT64_MAX, 512},  // one does: fewer rows at a time, more of each still in the L2 cache when it is read again
};
// Each quarter of a multiprocessor has 16384 registers for its warps. In float 512 threads leave each 128, and no
// kernel for dense logits spills; up to 640 would leave 96, and some would. In double each needs twice as many, and
// some more than 128 where logits may be of any kind.
constexpr int kMaxRowThreads = 512, kMaxSlowRowThreads = 256;

// Rows that share a warp come several to a block: a multiprocessor takes no more than 32 blocks.
constexpr int kSharedBlockThreads = 128;
// Enough blocks to fill any device many times over; beyond it a block takes several rows.
constexpr int64_t kMaxRowBlocks = 65536;
// Enough to fill any device. Where there are at most half as many rows, read but once, several blocks share each.
constexpr int64_t kFewRowBlocks = 1024;

struct RowShape {
  device::Shape shape;
  int width;   // threads of a block for a row
  int blocks;  // for a row
};

// `sums`: whether anything is summed over a row.
inline RowShape row_shape(int64_t rows, int64_t columns, int max_threads, bool sums) {
  int i = 0;
  while (columns > kRowRules[i].columns) ++i;
  const int width = std::min(kRowRules[i].width, max_threads);
  const int threads = width > device::kWarp ? width : kSharedBlockThreads;
  const int64_t per_block = threads / width, blocks = std::min((rows + per_block - 1) / per_block, kMaxRowBlocks);
  const int64_t groups = (columns + kGroup<float> - 1) / kGroup<float>, steps = (groups + width - 1) / width;
  const int64_t per_row = sums || per_block > 1 ? 1 : std::clamp<int64_t>(kFewRowBlocks / blocks, 1, steps);
  return {{blocks * per_row, threads}, width, static_cast<int>(per_row)};
}

// ---------------------------------------------------------------- rows that stay on the chip

// The first rule that holds a row, student's and teacher's logits together, in the shared memory of so many blocks.
// Those come first that have few threads for a row: what each does but once for it, an exchange above all, is then the
// least.
struct ClusterRule {
  int blocks, threads;
  int per_multiprocessor;  // so many blocks must fit: while one waits the others compute
};
constexpr ClusterRule kClusterRules[] = {
    {1, 128, 4},   // nobody to wait for
    {1, 160, 3},   //
    {1, 256, 2},   //
    {2, 160, 3},   // from here on a row waits for its slowest block
    {2, 256, 2},   //
    {3, 256, 2},   //
    {4, 256, 2},   //
    {5, 256, 2},   //
    {6, 256, 2},   //
    {7, 256, 2},   //
    {8, 256, 2},   // the largest cluster that all devices with clusters have
    {16, 256, 2},  // what data centres' GPUs have besides; of sizes between fewer fit a part of such a GPU
    {32, 256, 2},  // only where there are no clusters
    {8, 256, 1},   // nobody computes while it waits, but the next row is fetched during this one's last pass
    {16, 256, 1},  // likewise
    {32, 256, 1},  // likewise; longer rows are streamed
};
// With 512 threads on a multiprocessor each has 128 registers.
constexpr int kMaxClusterThreads = 256;
constexpr int kClusterBlocksPerMultiprocessor = 2;
// Below that a row's few groups per thread are still in the L1 cache when they are read again.
constexpr int64_t kMinResidentColumns = 1025;
// Of a block's shared memory, what CUDA takes itself.
constexpr size_t kReservedBytes = 1024;

// How many blocks of teams of several meet in device memory at a time: on each multiprocessor the most that a rule asks
// for. And how many bytes they need for rows of so many columns.
constexpr int kMeetingBlocks = 3;
inline int64_t meeting_bytes(const device::Properties& device, int64_t columns) {
  if (device.clusters || columns < kMinResidentColumns) return 0;
  return meeting_bytes(kMeetingBlocks * device.multiprocessors, kMaxClusterThreads / device::kWarp);
}

// A cluster for rows of so many columns: the shape of the first rule that holds them and of which active(shape), the
// number of clusters that the device runs at a time, is not 0. No blocks where there is none, or where the
// environment's KLDIV_EXT_CUDA_TIER is "streamed".
template <typename Active>
device::Shape resident_shape(const device::Properties& device, int64_t rows, int64_t columns, size_t scalar_bytes,
                             const Active& active) {
  const char* tier = std::getenv("KLDIV_EXT_CUDA_TIER");
  if (columns < kMinResidentColumns || (tier && std::strcmp(tier, "streamed") == 0)) return {};
  const int64_t groups = (columns + kGroup<float> - 1) / kGroup<float>;
  for (const ClusterRule& rule : kClusterRules) {
    const int64_t per_step = rule.blocks * rule.threads, steps = (groups + per_step - 1) / per_step;
    const bool meets = rule.blocks > 1 && !device.clusters;
    const int exchanged = meets ? 0 : exchange_bytes(static_cast<int>(per_step / device::kWarp));
    const size_t bytes = exchanged + steps * rule.threads * 2 * kGroup<float> * scalar_bytes;
    const bool fits = rule.per_multiprocessor * (bytes + kReservedBytes) <= device.shared_bytes_per_block;
    if (!fits) continue;
    device::Shape shape{rule.blocks, rule.threads, rule.blocks, bytes};
    int64_t clusters = active(shape);
    if (meets) clusters = std::min<int64_t>(clusters, kMeetingBlocks * device.multiprocessors / rule.blocks);
    if (clusters == 0) continue;
    shape.blocks *= std::min(rows, clusters);
    return shape;
  }
  return {};
}

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
