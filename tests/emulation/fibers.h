// A CUDA block on a CPU: every thread a fiber. Fibers run one at a time, each until it waits for the others, so that
// whatever is not ordered by a barrier or a shuffle happens in an order that a test can choose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace kldiv::emulation {

constexpr int kWarp = 32;

// Which block, warp of a block and lane of a warp goes first. A warp runs ahead of the others as far as it can.
enum class Order { kAscending, kDescending, kRandom };
void set_order(Order order, uint32_t seed);

// Runs body() in every thread of every block, one block after the other. Throws std::runtime_error for what would hang
// or be undefined on a device: threads of a block that wait for different things, a misaligned access.
void run(int64_t blocks, int threads, const std::function<void()>& body);

// For body(): where it runs.
struct Position {
  int64_t block, blocks;
  int thread, threads;
};
const Position& position();

// For body(): waits for all threads of the block.
void barrier();

// For body(): waits for all lanes of the warp, then replaces [value, value + size) by that of the lane `lanes` up
// (one's own beyond the last lane) or, with kFromFirst, of the first lane.
constexpr int kFromFirst = -1;
void shuffle(void* value, size_t size, int lanes);

// For body(): the block's shared memory of that name; all bytes 0xff at first, which makes every number a NaN.
void* shared(const void* name, size_t size);

// For body(): ends the run.
void fail(const char* message);

}  // namespace kldiv::emulation
