// A cluster of CUDA blocks on a CPU: every thread a fiber. Fibers run one at a time, each until it waits for others, so
// that whatever is not ordered by a barrier or a shuffle happens in an order that a test can choose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace kldiv::emulation {

constexpr int kWarp = 32;

// Which block of a cluster, warp of a block and lane of a warp goes first. A warp runs ahead of the others of its
// block, and a block ahead of the others of its cluster, as far as it can.
enum class Order { kAscending, kDescending, kRandom };
void set_order(Order order, uint32_t seed);

// Of the device: what launches may ask for.
struct Properties {
  int compute_capability;  // 90 is 9.0
  int multiprocessors;
  size_t shared_bytes_per_block;
  bool clusters;
};
constexpr Properties kDefaultProperties = {80, 4, 100 * 1024, false};
void set_properties(const Properties& properties);
const Properties& properties();

// Of a launch. A cluster is so many consecutive blocks that run at the same time, also where the device has none of its
// own; shared_bytes are the dynamic ones of each block.
struct Shape {
  int64_t blocks;
  int threads;
  int cluster = 1;
  size_t shared_bytes = 0;
};

// Runs body() in every thread of every block, one cluster after the other. Throws std::runtime_error for what a device
// refuses, and for what would hang or be undefined on it: threads that wait for different things, a misaligned access,
// shared memory that a peer writes to before its block began or after it ended, copies that nobody awaited.
void run(const Shape& shape, const std::function<void()>& body);

// For body(): where it runs.
struct Position {
  int64_t block, blocks;
  int thread, threads;
  int rank, cluster;  // of the block in its cluster, and how many blocks that has
};
const Position& position();

// For body(): waits for all threads of the block or of the cluster.
void barrier();
void cluster_barrier();

// For body(): adds one to a number in the device's memory, and waits until it has come to `target`.
void arrive(uint32_t* count);
void await(const uint32_t* count, uint32_t target);

// A fault on purpose: in the runs that follow, every thread's call number `call` of one of these functions does
// nothing. A test shows so that the call is needed.
enum class Primitive { kNone, kBarrier, kClusterBarrier, kArrive, kAwait };
void skip(Primitive primitive, int call);

// For body(): waits for all of the `width` lanes that this one belongs to, then replaces [value, value + size) by that
// of the lane whose number differs from this one's in the bits of `lanes`.
void shuffle(void* value, size_t size, int lanes, int width);

// For body(): the block's shared memory of that name, aligned as asked for and no better; all bytes 0xff at first,
// which makes every number a NaN. A block that has ended leaves 0xff behind.
void* shared(const void* name, size_t size, size_t alignment);

// For body(): Shape::shared_bytes bytes, aligned to 16, otherwise as shared().
void* dynamic_shared();

// For body(): where `shared`, an address in this block's shared memory, lies in that of another block of the cluster.
void* of_peer(const void* shared, int rank);

// For body(): 16 bytes that are on their way to this block's shared memory: until they are awaited, 0xff is there.
void copy16_async(void* to_shared, const void* from);
void commit_copies();
void await_copies(int but);

// For body(): ends the run.
void fail(const char* message);

}  // namespace kldiv::emulation
