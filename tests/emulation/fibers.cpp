// The scheduler of fibers.h.
#undef _FORTIFY_SOURCE  // it takes a jump to another stack for an error
#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kldiv::emulation {
namespace {

constexpr int kNarrowest = 8;  // of the widths of a shuffle

enum State { kReady, kAtBarrier, kAtClusterBarrier, kAtShuffle, kAtCount, kFinished };

constexpr int kMaxCluster = 16;   // of a device that has clusters
constexpr int kMaxTogether = 64;  // blocks that run at the same time, elsewhere: as many as there is memory for
constexpr size_t kCopyBytes = 16;
constexpr unsigned char kNothing = 0xff;  // in memory that nobody wrote to

struct Stack {
  static constexpr size_t kBytes = 256 * 1024;
  std::unique_ptr<char[]> bytes{new char[kBytes]};
};

struct Fiber {
  State state = kReady;
  bool started = false;
  jmp_buf point;  // where it waits
  Stack stack;
  void* value = nullptr;  // of the shuffle it waits in
  size_t size = 0;
  int lanes = 0, width = 0;
  int calls = 0;  // so far, of the primitive of which one call is skipped
  struct Copy {
    void* to;
    const void* from;
  };
  std::vector<Copy> copies;    // begun and not awaited
  std::vector<size_t> groups;  // how many of the copies each commit closed

  void restart() {
    state = kReady;
    started = false;
    calls = 0;
    copies.clear();
    groups.clear();
  }
};

// A shared variable of a block.
class Room {
 public:
  Room() = default;
  Room(size_t size, size_t alignment)
      // Memory from new is aligned to 16: so far beyond that, it is aligned as asked for and no better.
      : size_(size), alignment_(alignment), offset_(alignment % kCopyBytes), bytes_(new unsigned char[offset_ + size]) {
    clear();
  }

  unsigned char* data() const { return bytes_.get() + offset_; }
  size_t size() const { return size_; }
  size_t alignment() const { return alignment_; }

  // How far p lies in it; -1 where [p, p + size) does not.
  ptrdiff_t offset_of(const void* p, size_t size) const {
    const auto first = reinterpret_cast<uintptr_t>(data()), address = reinterpret_cast<uintptr_t>(p);
    if (address < first || address + size > first + size_) return -1;
    return static_cast<ptrdiff_t>(address - first);
  }

  void clear() { std::memset(data(), kNothing, size_); }
  bool is_clear() const {
    return std::all_of(data(), data() + size_, [](unsigned char byte) { return byte == kNothing; });
  }

 private:
  static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= kCopyBytes);
  size_t size_ = 0, alignment_ = 1, offset_ = 0;
  std::unique_ptr<unsigned char[]> bytes_;
};

struct Block {
  enum { kWaits, kRuns, kHasEnded } stage = kWaits;
  std::map<const void*, Room> shared;  // by name; null is the dynamic one's

  bool is_clear() const {
    return std::all_of(shared.begin(), shared.end(), [](const auto& room) { return room.second.is_clear(); });
  }
};

// Leaves a stack at `here` for one that waits at `there`. swapcontext would ask the kernel for the signal mask each
// time.
void jump(jmp_buf& here, jmp_buf& there) {
  if (_setjmp(here) == 0) _longjmp(there, 1);
}
void begin(jmp_buf& here, const Stack& stack, void (*function)()) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack.bytes.get();
  context.uc_stack.ss_size = Stack::kBytes;
  makecontext(&context, function, 0);
  if (_setjmp(here) == 0) setcontext(&context);
}

// Tells the address sanitizer that nothing on a stack is in use.
void announce_empty([[maybe_unused]] const Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bytes.get(), Stack::kBytes);
#endif
}

// Tells the address sanitizer that execution moves to another stack. `kept` belongs to the stack that is left; null
// where nobody comes back to it.
void announce_switch([[maybe_unused]] void** kept, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(kept, stack, size);
#endif
}
void finish_switch([[maybe_unused]] void* kept, [[maybe_unused]] const void** old_stack,
                   [[maybe_unused]] size_t* old_size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, old_stack, old_size);
#endif
}

class Machine {
 public:
  void set_order(Order order, uint32_t seed) {
    order_ = order;
    random_.seed(seed);
  }

  void skip(Primitive primitive, int call) {
    skipped_primitive_ = primitive;
    skipped_call_ = call;
  }

  void set_properties(const Properties& properties) { properties_ = properties; }
  const Properties& properties() const { return properties_; }

  void run(const Shape& shape, const std::function<void()>& body) {
    check(shape);
    if (std::exchange(incomplete_, true)) {  // the last run failed and left frames on its stacks
      for (const auto& fiber : fibers_) announce_empty(fiber->stack);
    }
    body_ = &body;
    shared_bytes_ = shape.shared_bytes;
    position_ = {0, shape.blocks, 0, shape.threads, 0, shape.cluster};
    while (fibers_.size() < static_cast<size_t>(shape.cluster) * shape.threads) {
      fibers_.push_back(std::make_unique<Fiber>());
    }
    for (const int64_t cluster : ordered(shape.blocks / shape.cluster)) run_cluster(cluster * shape.cluster);
    incomplete_ = false;
  }

  const Position& position() const { return position_; }

  void wait(State state) {
    Fiber& fiber = *running_;
    fiber.state = state;
    void* kept = nullptr;
    announce_switch(state == kFinished ? nullptr : &kept, main_stack_, main_stack_size_);
    jump(fiber.point, main_);
    finish_switch(kept, &main_stack_, &main_stack_size_);
  }

  void barrier() {
    if (!skips(Primitive::kBarrier)) wait(kAtBarrier);
  }
  void cluster_barrier() {
    if (!properties_.clusters) fail("the device has no clusters");
    if (!skips(Primitive::kClusterBarrier)) wait(kAtClusterBarrier);
  }

  void arrive(uint32_t* count) {
    if (skips(Primitive::kArrive)) return;
    ++*count;
    counted_ = true;
  }
  void await(const uint32_t* count, uint32_t target) {
    if (skips(Primitive::kAwait)) return;
    while (static_cast<int32_t>(*count - target) < 0) wait(kAtCount);
  }

  void shuffle(void* value, size_t size, int lanes, int width) {
    if (width != kNarrowest && width != 16 && width != kWarp) fail("a shuffle within neither 8 nor 16 nor 32 lanes");
    if (lanes < 0 || lanes >= width) fail("a shuffle over more lanes than its width");
    running_->value = value;
    running_->size = size;
    running_->lanes = lanes;
    running_->width = width;
    wait(kAtShuffle);
  }

  void* shared(const void* name, size_t size, size_t alignment) { return room(block(), name, size, alignment).data(); }
  void* dynamic_shared() { return shared(nullptr, shared_bytes_, kCopyBytes); }

  void* of_peer(const void* shared, int rank) {
    if (!properties_.clusters) fail("the device has no clusters");
    if (rank < 0 || rank >= position_.cluster) fail("the cluster has no block of that rank");
    Block& peer = blocks_[rank];
    if (peer.stage == Block::kHasEnded) fail("the shared memory of a block that has ended");
    for (const auto& [name, own] : block().shared) {
      const ptrdiff_t offset = own.offset_of(shared, 1);
      if (offset >= 0) return room(peer, name, own.size(), own.alignment()).data() + offset;
    }
    fail("a peer's variable is asked for by an address that is not in the block's own shared memory");
    return nullptr;
  }

  void copy16_async(void* to_shared, const void* from) {
    if (!is_shared(to_shared)) fail("an asynchronous copy to elsewhere than the block's shared memory");
    if (is_shared(from)) fail("an asynchronous copy from shared memory");
    std::memset(to_shared, kNothing, kCopyBytes);
    running_->copies.push_back({to_shared, from});
  }

  void commit_copies() {
    std::vector<size_t>& groups = running_->groups;
    groups.push_back(running_->copies.size() - std::accumulate(groups.begin(), groups.end(), size_t{0}));
  }

  void await_copies(int but) {
    std::vector<Fiber::Copy>& copies = running_->copies;
    std::vector<size_t>& groups = running_->groups;
    if (but < 0) fail("fewer than no groups of copies may be under way");
    if (groups.size() <= static_cast<size_t>(but)) return;
    const auto last_group = groups.end() - but;
    const auto last_copy = copies.begin() + std::accumulate(groups.begin(), last_group, size_t{0});
    std::for_each(copies.begin(), last_copy, [](const auto& copy) { std::memcpy(copy.to, copy.from, kCopyBytes); });
    copies.erase(copies.begin(), last_copy);
    groups.erase(groups.begin(), last_group);
  }

  void fail(const char* message) {
    failure_ = message;
    wait(kFinished);
  }

 private:
  // 0 ... n - 1, in the order of the test.
  std::vector<int64_t> ordered(int64_t n) {
    std::vector<int64_t> indices(n);
    std::iota(indices.begin(), indices.end(), 0);
    if (order_ == Order::kDescending) std::reverse(indices.begin(), indices.end());
    if (order_ == Order::kRandom) std::shuffle(indices.begin(), indices.end(), random_);
    return indices;
  }

  // Whether the others of a cluster go before the rest of a block that has counted a thread.
  bool others_first() { return order_ == Order::kDescending || (order_ == Order::kRandom && random_() % 2 == 0); }

  void check(const Shape& shape) const {
    const auto [blocks, threads, cluster, shared_bytes] = shape;
    const bool possible = blocks >= 1 && blocks <= INT32_MAX && threads >= 1 && threads <= 1024 && threads % kWarp == 0;
    const bool together = cluster >= 1 && cluster <= (properties_.clusters ? kMaxCluster : kMaxTogether);
    if (possible && together && blocks % cluster == 0 && shared_bytes <= properties_.shared_bytes_per_block) return;
    throw std::runtime_error("a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                             " threads in clusters of " + std::to_string(cluster) + " with " +
                             std::to_string(shared_bytes) + " bytes of dynamic shared memory");
  }

  // Whether the running thread's present call of a primitive does nothing.
  bool skips(Primitive primitive) { return primitive == skipped_primitive_ && running_->calls++ == skipped_call_; }

  Block& block() { return blocks_[position_.rank]; }
  Fiber& fiber(int rank, int thread) { return *fibers_[rank * position_.threads + thread]; }

  bool is_shared(const void* p) {
    return std::any_of(block().shared.begin(), block().shared.end(),
                       [&](const auto& room) { return room.second.offset_of(p, kCopyBytes) >= 0; });
  }

  Room& room(Block& of, const void* name, size_t size, size_t alignment) {
    const auto found = of.shared.find(name);
    if (found != of.shared.end()) return found->second;
    size_t total = size;
    for (const auto& [_, other] : of.shared) total += other.size();
    if (total > properties_.shared_bytes_per_block) fail("more shared memory than a block can have");
    return of.shared.emplace(name, Room(size, alignment)).first->second;
  }

  // The blocks from `first` on.
  void run_cluster(int64_t first) {
    const int threads = position_.cluster * position_.threads;
    blocks_.clear();
    blocks_.resize(position_.cluster);
    failure_ = nullptr;
    for (int i = 0; i < threads; ++i) fibers_[i]->restart();
    bool counted;
    do {
      counted = false;
      for (const int64_t rank : ordered(position_.cluster)) {
        position_.rank = static_cast<int>(rank);
        position_.block = first + rank;
        counted |= run_block();
      }
      for (int i = 0; i < threads; ++i) {
        if (fibers_[i]->state == kAtCount && counted) fibers_[i]->state = kReady;
      }
    } while (counted || release(0, threads, kAtClusterBarrier));
    if (!all(0, threads, kFinished)) throw std::runtime_error(who_waits(first));
    for (int rank = 0; rank < position_.cluster; ++rank) {
      if (position_.cluster > 1 && !blocks_[rank].is_clear()) {
        throw std::runtime_error("block " + std::to_string(first + rank) +
                                 ": a peer wrote to its shared memory after it had ended");
      }
    }
  }

  // As far as it goes without the other blocks of the cluster, or until a thread counts: then they may go first.
  // Whether one did.
  bool run_block() {
    counted_ = false;
    if (std::exchange(block().stage, Block::kRuns) == Block::kWaits && !block().is_clear()) {
      throw std::runtime_error("block " + std::to_string(position_.block) +
                               ": a peer wrote to its shared memory before it had begun");
    }
    const int first = position_.rank * position_.threads;
    do {
      for (const int64_t warp : ordered(position_.threads / kWarp)) {
        const auto lanes = ordered(kWarp);
        do {
          for (const int64_t lane : lanes) resume(static_cast<int>(warp * kWarp + lane));
        } while (shuffle_warp(static_cast<int>(warp)));
        if (counted_ && others_first()) return true;
      }
    } while (release(first, position_.threads, kAtBarrier));
    if (position_.cluster > 1 && all(first, position_.threads, kFinished)) {
      block().stage = Block::kHasEnded;
      for (auto& [_, room] : block().shared) room.clear();
    }
    return counted_;
  }

  bool all(int first, int count, State state) const {
    return std::all_of(fibers_.begin() + first, fibers_.begin() + first + count,
                       [&](const auto& fiber) { return fiber->state == state; });
  }

  // Lets threads go on that all wait in the same state; false if they do not.
  bool release(int first, int count, State state) {
    if (!all(first, count, state)) return false;
    for (int i = first; i < first + count; ++i) fibers_[i]->state = kReady;
    return true;
  }

  std::string who_waits(int64_t first) {
    std::string message = "a hang:";
    for (int rank = 0; rank < position_.cluster; ++rank) {
      message += (rank == 0 ? " of block " : "; of block ") + std::to_string(first + rank);
      for (const auto& [state, what] : {std::pair{kAtBarrier, "wait at a barrier"},
                                        {kAtClusterBarrier, "wait at a cluster barrier"},
                                        {kAtShuffle, "wait in a shuffle"},
                                        {kAtCount, "wait for a count"},
                                        {kFinished, "have ended"}}) {
        int count = 0;
        for (int thread = 0; thread < position_.threads; ++thread) count += fiber(rank, thread).state == state;
        if (count > 0) message += ", " + std::to_string(count) + " threads " + what;
      }
    }
    return message;
  }

  void resume(int thread) {
    Fiber& fiber = this->fiber(position_.rank, thread);
    if (fiber.state != kReady) return;
    running_ = &fiber;
    position_.thread = thread;
    void* kept = nullptr;
    announce_switch(&kept, fiber.stack.bytes.get(), Stack::kBytes);
    if (std::exchange(fiber.started, true)) {
      jump(main_, fiber.point);
    } else {
      begin(main_, fiber.stack, &Machine::enter);
    }
    finish_switch(kept, nullptr, nullptr);
    if (fiber.state == kFinished && !fiber.copies.empty() && !failure_) failure_ = "ended without awaiting its copies";
    if (failure_) {
      throw std::runtime_error("thread " + std::to_string(thread) + " of block " + std::to_string(position_.block) +
                               ": " + failure_);
    }
  }

  static void enter();

  // Does the shuffles that all lanes of a width wait in; false if there are none.
  bool shuffle_warp(int warp) {
    const auto first = fibers_.begin() + position_.rank * position_.threads + warp * kWarp;
    bool any = false;
    for (int lane = 0; lane < kWarp; lane += kNarrowest) any |= shuffle_lanes(&first[lane], warp, lane);
    return any;
  }
  // Those of the lanes from `lane` on.
  bool shuffle_lanes(const std::unique_ptr<Fiber>* first, int warp, int lane) {
    const Fiber& leader = **first;
    const int width = leader.width;
    if (leader.state != kAtShuffle || lane % width != 0) return false;
    for (auto fiber = first; fiber != first + width; ++fiber) {
      if ((*fiber)->state != kAtShuffle) return false;
      if ((*fiber)->size != leader.size || (*fiber)->lanes != leader.lanes || (*fiber)->width != width) {
        throw std::runtime_error("warp " + std::to_string(warp) + " of block " + std::to_string(position_.block) +
                                 ": its lanes wait in different shuffles");
      }
    }
    std::vector<unsigned char> values(leader.size * width);
    for (int i = 0; i < width; ++i) std::memcpy(&values[i * leader.size], first[i]->value, leader.size);
    for (int i = 0; i < width; ++i) {
      std::memcpy(first[i]->value, &values[(i ^ leader.lanes) * leader.size], leader.size);
      first[i]->state = kReady;
    }
    return true;
  }

  Order order_ = Order::kAscending;
  std::mt19937 random_;
  Properties properties_ = kDefaultProperties;
  Primitive skipped_primitive_ = Primitive::kNone;
  int skipped_call_ = 0;
  Position position_{};
  size_t shared_bytes_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Block> blocks_;  // of the cluster
  Fiber* running_ = nullptr;
  bool counted_ = false;  // whether a thread has, since its block was last resumed
  const char* failure_ = nullptr;
  bool incomplete_ = false;  // whether a run began and did not end
  jmp_buf main_;
  const void* main_stack_ = nullptr;
  size_t main_stack_size_ = 0;
};

Machine machine;

void Machine::enter() {
  finish_switch(nullptr, &machine.main_stack_, &machine.main_stack_size_);
  (*machine.body_)();
  machine.wait(kFinished);
}

}  // namespace

void set_order(Order order, uint32_t seed) { machine.set_order(order, seed); }
void set_properties(const Properties& properties) { machine.set_properties(properties); }
const Properties& properties() { return machine.properties(); }
void run(const Shape& shape, const std::function<void()>& body) { machine.run(shape, body); }
const Position& position() { return machine.position(); }
void barrier() { machine.barrier(); }
void cluster_barrier() { machine.cluster_barrier(); }
void arrive(uint32_t* count) { machine.arrive(count); }
void await(const uint32_t* count, uint32_t target) { machine.await(count, target); }
void skip(Primitive primitive, int call) { machine.skip(primitive, call); }
void shuffle(void* value, size_t size, int lanes, int width) { machine.shuffle(value, size, lanes, width); }
void* shared(const void* name, size_t size, size_t alignment) { return machine.shared(name, size, alignment); }
void* dynamic_shared() { return machine.dynamic_shared(); }
void* of_peer(const void* shared, int rank) { return machine.of_peer(shared, rank); }
void copy16_async(void* to_shared, const void* from) { machine.copy16_async(to_shared, from); }
void commit_copies() { machine.commit_copies(); }
void await_copies(int but) { machine.await_copies(but); }
void fail(const char* message) { machine.fail(message); }

}  // namespace kldiv::emulation
