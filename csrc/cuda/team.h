// The threads that share a row, and how what each knows becomes what all know: in an order that depends on the shape
// of the team alone.
#pragma once

#include "units.h"

namespace kldiv::cuda {

// What `two` makes of all lanes' values, as a tree, to each lane of `width`. `two` must not care for the
// order of its two, so that all lanes have the same bits.
template <typename Value, typename Two>
KLDIV_DEVICE Value across_lanes(Value value, int width, const Two& two) {
  KLDIV_UNROLL
  for (int lanes = device::kWarp / 2; lanes > 0; lanes /= 2) {
    if (lanes < width) value = two(value, device::shuffle_xor(value, lanes, width));
  }
  return value;
}

struct Sum {
  template <typename Value>
  KLDIV_DEVICE Value operator()(const Value& value, int width) const {
    return across_lanes(value, width, [this](const Value& a, const Value& b) { return two(a, b); });
  }
  template <typename Value>
  KLDIV_DEVICE Value two(const Value& a, const Value& b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  KLDIV_DEVICE T operator()(T value, int width) const {
    return across_lanes(value, width, [](T a, T b) { return maximum(a, b); });
  }
};

constexpr int kMaxBlockWarps = 1024 / device::kWarp;

// To exchange values of up to kMaxValueBytes, all `warps` of a team with kCluster need so much at the beginning of each
// block's dynamic shared memory.
constexpr int kMaxValueBytes = 48;
KLDIV_HD constexpr int exchange_bytes(int warps) { return 2 * warps * kMaxValueBytes; }

// Where there are no clusters, several blocks meet in device memory instead, one room for all of them, and count who is
// there. So much for so many teams, zeros at first. Which blocks are a team follows from the order in which they start:
// so only the last to start can be waiting for one that has not, while the others get on and make room for it.
constexpr int kCountBytes = 128;
KLDIV_HD constexpr int64_t meeting_bytes(int64_t teams, int warps) {
  return kCountBytes + teams * (kCountBytes + exchange_bytes(warps));
}

// A team: 8, 16 or 32 lanes of a warp, so that a block has several; or a block; or several blocks, one after the other.
// Like a block, all of it goes through a row together. Several blocks exchange something with kCluster alone.
template <bool kCluster>
class Team {
 public:
  // `width` threads of a block are one team's: less than a warp, or all. `memory`: for teams of several blocks, where
  // there are no clusters.
  KLDIV_DEVICE explicit Team(int width, int blocks = 1, void* memory = nullptr)
      : thread_(device::thread() % width),
        width_(width),
        blocks_(blocks),
        started_(meets() ? start(memory) : 0),
        rank_(block() % blocks) {
    if (kCluster && device::has_clusters()) {
      device::cluster_barrier();  // no block writes to one that has not begun
    }
    if (meets()) memory_ = static_cast<unsigned char*>(memory) + meeting_bytes(index(), warps());
  }

  KLDIV_DEVICE uint32_t thread() const { return rank_ * width_ + thread_; }
  KLDIV_DEVICE uint32_t threads() const { return blocks_ * width_; }
  KLDIV_DEVICE bool is_first_thread() const { return thread() == 0; }
  // The lanes of one warp, or part of it, that are in the team; thread() % lanes() is one's own.
  KLDIV_DEVICE int lanes() const { return !kCluster && width_ < device::kWarp ? width_ : device::kWarp; }
  KLDIV_DEVICE int log2_lanes() const { return 3 + lanes() / 16; }

  // Which of the grid's teams this is. Divided anew for each row: to be kept it would take a register, which some
  // kernels do not have.
  KLDIV_DEVICE uint32_t index() const { return block() / blocks_ * per_block() + device::thread() / width_; }
  KLDIV_DEVICE uint32_t count() const { return static_cast<uint32_t>(device::blocks()) / blocks_ * per_block(); }

  // How much of a block's dynamic shared memory is for exchanges.
  KLDIV_DEVICE int shared_bytes() const { return meets() ? 0 : exchange_bytes(warps()); }

  // What over_lanes makes of all threads' values, to every thread. Value{} must be neutral.
  template <typename Value, typename OverLanes>
  KLDIV_DEVICE Value all(Value value, const OverLanes& over_lanes) {
    value = over_lanes(value, lanes());
    return kCluster || width_ > device::kWarp ? over_warps(value, over_lanes) : value;
  }

 private:
  template <typename Value, typename OverLanes>
  KLDIV_DEVICE Value over_warps(const Value& of_warp, const OverLanes& over_lanes) {
    const int lane = device::thread() % device::kWarp;
    Value* const room = this->room<Value>();
    turn_ = 1 - turn_;
    Value* const mine = room + thread() / device::kWarp;
    if (kCluster && device::has_clusters()) {
      if (lane < blocks_) *device::of_peer(mine, lane) = of_warp;
      device::cluster_barrier();
    } else {
      if (lane == 0) *mine = of_warp;
      device::barrier();
      if (meets()) meet();
    }
    Value value = lane < warps() ? room[lane] : Value{};
    KLDIV_NO_UNROLL
    for (int i = lane + device::kWarp; i < warps(); i += device::kWarp) value = over_lanes.two(value, room[i]);
    return over_lanes(value, device::kWarp);
  }

  // The blocks' barrier, in device memory; each has just passed its own.
  KLDIV_DEVICE void meet() {
    arrivals_ += blocks_;
    if (device::thread() == 0) {
      uint32_t* const count = reinterpret_cast<uint32_t*>(memory_);
      device::arrive(count);
      device::await(count, arrivals_);
    }
    device::barrier();
  }

  // Of two, in turn: who fills one has passed the barrier that came after the last look into it.
  template <typename Value>
  KLDIV_DEVICE Value* room() {
    if constexpr (kCluster) {
      static_assert(sizeof(Value) <= kMaxValueBytes);
      unsigned char* const rooms = meets() ? memory_ + kCountBytes : device::dynamic_shared();
      return reinterpret_cast<Value*>(rooms + turn_ * (exchange_bytes(warps()) / 2));
    } else {
      KLDIV_SHARED(Value, rooms, 2 * kMaxBlockWarps);
      return rooms + turn_ * kMaxBlockWarps;
    }
  }

  // How many blocks had started before this one.
  KLDIV_DEVICE static uint32_t start(void* memory) {
    uint32_t* const before = reinterpret_cast<uint32_t*>(device::dynamic_shared());
    if (device::thread() == 0) *before = device::next(static_cast<uint32_t*>(memory));
    device::barrier();
    const uint32_t started = *before;
    device::barrier();
    return started;
  }
  KLDIV_DEVICE uint32_t block() const { return meets() ? started_ : static_cast<uint32_t>(device::block()); }
  KLDIV_DEVICE int per_block() const { return device::threads() / width_; }
  KLDIV_DEVICE int warps() const { return threads() / device::kWarp; }
  // Whether its blocks have to meet in device memory.
  KLDIV_DEVICE bool meets() const { return kCluster && !device::has_clusters() && blocks_ > 1; }

  const int thread_, width_, blocks_;
  const uint32_t started_;
  const int rank_;
  unsigned char* memory_ = nullptr;
  uint32_t arrivals_ = 0;  // at all meetings so far
  int turn_ = 0;
};

}  // namespace kldiv::cuda
