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
#include <sanitizer/common_interface_defs.h>
#endif

namespace kldiv::emulation {
namespace {

enum State { kReady, kAtBarrier, kAtShuffle, kFinished };

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
  int lanes = 0;
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

  void run(int64_t blocks, int threads, const std::function<void()>& body) {
    if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024 || threads % kWarp != 0) {
      throw std::runtime_error("a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                               " threads");
    }
    body_ = &body;
    position_ = {0, blocks, 0, threads};
    while (fibers_.size() < static_cast<size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
    for (const int64_t block : ordered(blocks)) {
      position_.block = block;
      run_block();
    }
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

  void shuffle(void* value, size_t size, int lanes) {
    running_->value = value;
    running_->size = size;
    running_->lanes = lanes;
    wait(kAtShuffle);
  }

  void* shared(const void* name, size_t size) {
    std::vector<unsigned char>& bytes = shared_[name];
    bytes.resize(size, 0xff);
    return bytes.data();
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

  void run_block() {
    shared_.clear();
    failure_ = nullptr;
    for (int thread = 0; thread < position_.threads; ++thread) {
      Fiber& fiber = *fibers_[thread];
      fiber.state = kReady;
      fiber.started = false;
    }
    while (true) {
      for (const int64_t warp : ordered(position_.threads / kWarp)) {
        const auto lanes = ordered(kWarp);
        do {
          for (const int64_t lane : lanes) resume(static_cast<int>(warp * kWarp + lane));
        } while (shuffle_warp(static_cast<int>(warp)));
      }
      const int finished = count(kFinished), waiting = count(kAtBarrier);
      if (finished == position_.threads) return;
      if (waiting != position_.threads) {
        throw std::runtime_error("block " + std::to_string(position_.block) + " hangs: of " +
                                 std::to_string(position_.threads) + " threads " + std::to_string(waiting) +
                                 " wait at a barrier, " + std::to_string(count(kAtShuffle)) + " in a shuffle, " +
                                 std::to_string(finished) + " have finished");
      }
      for (int thread = 0; thread < position_.threads; ++thread) fibers_[thread]->state = kReady;
    }
  }

  int count(State state) const {
    return static_cast<int>(std::count_if(fibers_.begin(), fibers_.begin() + position_.threads,
                                          [&](const auto& fiber) { return fiber->state == state; }));
  }

  void resume(int thread) {
    Fiber& fiber = *fibers_[thread];
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
    if (failure_) {
      throw std::runtime_error("thread " + std::to_string(thread) + " of block " + std::to_string(position_.block) +
                               ": " + failure_);
    }
  }

  static void enter();

  // Does the shuffle that all lanes wait in; false if they do not.
  bool shuffle_warp(int warp) {
    const auto first = fibers_.begin() + warp * kWarp;
    const Fiber& leader = **first;
    for (auto fiber = first; fiber != first + kWarp; ++fiber) {
      if ((*fiber)->state != kAtShuffle) return false;
      if ((*fiber)->size != leader.size || (*fiber)->lanes != leader.lanes) {
        throw std::runtime_error("warp " + std::to_string(warp) + " of block " + std::to_string(position_.block) +
                                 ": its lanes wait in different shuffles");
      }
    }
    std::vector<unsigned char> values(leader.size * kWarp);
    for (int lane = 0; lane < kWarp; ++lane) std::memcpy(&values[lane * leader.size], first[lane]->value, leader.size);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int up = lane + leader.lanes;
      const int source = leader.lanes == kFromFirst ? 0 : (up < kWarp ? up : lane);
      std::memcpy(first[lane]->value, &values[source * leader.size], leader.size);
      first[lane]->state = kReady;
    }
    return true;
  }

  Order order_ = Order::kAscending;
  std::mt19937 random_;
  Position position_{};
  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::map<const void*, std::vector<unsigned char>> shared_;
  Fiber* running_ = nullptr;
  const char* failure_ = nullptr;
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
void run(int64_t blocks, int threads, const std::function<void()>& body) { machine.run(blocks, threads, body); }
const Position& position() { return machine.position(); }
void barrier() { machine.wait(kAtBarrier); }
void shuffle(void* value, size_t size, int lanes) { machine.shuffle(value, size, lanes); }
void* shared(const void* name, size_t size) { return machine.shared(name, size); }
void fail(const char* message) { machine.fail(message); }

}  // namespace kldiv::emulation
