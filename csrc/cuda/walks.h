// How often a row's logits are read from memory: in each of its phases (Streamed), or once, to stay on the chip until
// the row is done (Resident).
#pragma once

#include "sides.h"

namespace kldiv::cuda {

// Which time it is that a row is gone through.
enum class Pass { kFirst, kMiddle, kLast };

constexpr float kNoColumn = -__builtin_inff();  // the logit, on both sides, of what pads a group

// Groups of both sides.
template <typename acc_t>
struct Groups {
  Group<acc_t> teacher, student;
};

// Any team, any side. What is read again soon is left in the caches.
template <typename SideType>
class Streamed {
 public:
  using Side = SideType;
  using acc_t = typename Side::acc_t;
  using TeamType = Team<false>;

  KLDIV_DEVICE Streamed(const LogitsArgs& args, const Scaling<acc_t>&, const TeamType& team)
      : args_(args), team_(team) {}

  // Before a row's first pass, and before its last: `next` is the row that comes after it, if any.
  KLDIV_DEVICE void begin() const {}
  KLDIV_DEVICE void prepare(int64_t /*next*/) const {}

  // Calls body(groups, place) for this thread's groups. `last`: of what is gone through again sometimes, whether
  // it is not.
  template <Pass pass, typename Body>
  KLDIV_DEVICE void walk(const Side& teacher, const Side& student, bool /*last*/, const Body& body) const {
    constexpr Use use = pass == Pass::kLast ? Use::kOnce : Use::kAgain;
    places().for_each([&](const Place& place) { body(load<use>(teacher, student, place), place); });
  }

 private:
  template <Use use>
  KLDIV_DEVICE static Groups<acc_t> load(const Side& teacher, const Side& student, const Place& place) {
    return {teacher.template load<use>(place, kNoColumn), student.template load<use>(place, kNoColumn)};
  }

  KLDIV_DEVICE Places<acc_t> places() const { return {static_cast<uint32_t>(args_.columns), team_}; }

  const LogitsArgs& args_;
  const TeamType& team_;
};

// The blocks of a team hold a row in their shared memory, each thread what it is going to work on: nobody waits for
// another's part. As soon as a group has been used for the last time, the next row's begins to move into its place.
template <typename SideType>
class Resident {
 public:
  using Side = SideType;
  using acc_t = typename Side::acc_t;
  using TeamType = Team<true>;

  KLDIV_DEVICE Resident(const LogitsArgs& args, const Scaling<acc_t>& scaling, const TeamType& team)
      : args_(args), scaling_(scaling), team_(team) {}

  KLDIV_DEVICE void begin() { fetched_ = fetching_; }
  KLDIV_DEVICE void prepare(int64_t next) { next_ = next; }

  // Starts to read a row.
  KLDIV_DEVICE void fetch(int64_t row) {
    if (row >= args_.rows) return;
    const Side teacher(args_.teacher, scaling_.teacher, row), student(args_.student, scaling_.student, row);
    fetching_ = can_fetch(teacher, student);
    if (!fetching_) return;
    unsigned char* slot = first_slot();
    places().for_each([&](const Place& place) {
      copy(teacher, student, place, slot);
      slot += slot_step();
    });
  }

  template <Pass pass, typename Body>
  KLDIV_DEVICE void walk(const Side& teacher, const Side& student, bool last, const Body& body) {
    const bool fetch_next = last && next_ < args_.rows;
    const int64_t row = fetch_next ? next_ : 0;
    const Side next_teacher(args_.teacher, scaling_.teacher, row), next_student(args_.student, scaling_.student, row);
    if (last) fetching_ = fetch_next && can_fetch(next_teacher, next_student);
    if (pass == Pass::kFirst && !fetched_) read(teacher, student);
    const Places<acc_t> places = this->places();
    int left = places.count();
    unsigned char* slot = first_slot();
    places.for_each([&](const Place& place) {
      if constexpr (pass == Pass::kFirst) device::await_copies(--left);
      body(get(slot), place);
      if constexpr (pass != Pass::kFirst) {
        if (last && fetching_) copy(next_teacher, next_student, place, slot);
      }
      slot += slot_step();
    });
  }

 private:
  using scalar_t = typename Side::scalar_t;
  using Bytes16 = device::Bytes16;
  static constexpr int kPieces = Packed<scalar_t>::kPieces;

  // Made anew each time: between the walks it would take registers.
  KLDIV_DEVICE Places<acc_t> places() const { return {static_cast<uint32_t>(args_.columns), team_}; }

  // Threads side by side in each step of 16 bytes.
  KLDIV_DEVICE unsigned char* first_slot() const {
    return device::dynamic_shared() + team_.shared_bytes() + device::thread() * sizeof(Bytes16);
  }
  KLDIV_DEVICE static int slot_step() { return 2 * kPieces * piece_bytes(); }
  KLDIV_DEVICE static int piece_bytes() { return device::threads() * static_cast<int>(sizeof(Bytes16)); }
  KLDIV_DEVICE static Bytes16* piece(unsigned char* slot, int side, int i) {
    return reinterpret_cast<Bytes16*>(slot + (side * kPieces + i) * piece_bytes());
  }

  KLDIV_DEVICE bool can_fetch(const Side& teacher, const Side& student) const {
    return args_.columns % kGroup<acc_t> == 0 && is_aligned(teacher.at(0)) && is_aligned(student.at(0));
  }

  KLDIV_DEVICE static void copy(const Side& teacher, const Side& student, const Place& place, unsigned char* slot) {
    KLDIV_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t column = place.first + i * Packed<scalar_t>::kPerPiece;
      device::copy16_async(piece(slot, 0, i), teacher.at(column));
      device::copy16_async(piece(slot, 1, i), student.at(column));
    }
    device::commit_copies();
  }

  // A row that nobody fetched.
  KLDIV_DEVICE void read(const Side& teacher, const Side& student) {
    unsigned char* slot = first_slot();
    places().for_each([&](const Place& place) {
      put(slot, 0, teacher.template load<Use::kOnce>(place, kNoColumn));
      put(slot, 1, student.template load<Use::kOnce>(place, kNoColumn));
      slot += slot_step();
    });
  }

  KLDIV_DEVICE static Groups<acc_t> get(unsigned char* slot) { return {get(slot, 0), get(slot, 1)}; }
  KLDIV_DEVICE static Group<acc_t> get(unsigned char* slot, int side) {
    Packed<scalar_t> packed;
    KLDIV_UNROLL
    for (int i = 0; i < kPieces; ++i) packed.pieces[i] = *piece(slot, side, i);
    return packed.widened();
  }
  KLDIV_DEVICE static void put(unsigned char* slot, int side, const Group<acc_t>& group) {
    const Packed<scalar_t> packed(group);
    KLDIV_UNROLL
    for (int i = 0; i < kPieces; ++i) *piece(slot, side, i) = packed.pieces[i];
  }

  const LogitsArgs& args_;
  const Scaling<acc_t>& scaling_;
  const TeamType& team_;
  int64_t next_ = 0;
  bool fetched_ = false, fetching_ = false;
};

}  // namespace kldiv::cuda
