// What is done with a group of columns, in each of a row's three phases; walks.h says how groups are come by. A group
// is summed up on its own before it meets the thread's long sum: fewer roundings.
#pragma once

#include "../row_state.h"
#include "walks.h"

namespace kldiv::cuda {

template <typename acc_t>
KLDIV_DEVICE acc_t largest(const Group<acc_t>& group) {
  acc_t max = group.x[0];
  KLDIV_UNROLL
  for (int i = 1; i < kGroup<acc_t>; ++i) max = maximum(max, group.x[i]);
  return max;
}

// In place of a divergence: no terms in phase 1.
struct NoTerms {};

// Phase 1 of one thread's groups. Sums are relative to bases that follow the maxima only when those are far ahead, and
// which group has a maximum is enough to know until all are seen: nearly always some lane of a warp has a new one.
template <typename acc_t, typename Terms>
class ThreadState {
 public:
  KLDIV_DEVICE explicit ThreadState(const Terms& terms) : terms_(terms) {}

  template <typename Bool>
  KLDIV_DEVICE void add(const Groups<acc_t>& group, int index, acc_t inverse_temperature, Bool narrow) {
    const acc_t per_bit = inverse_temperature * static_cast<acc_t>(kLog2E);
    const acc_t teacher = teacher_.see(largest(group.teacher), index);
    const acc_t student = student_.see(largest(group.student), index);
    if ((teacher - base_.teacher.max) * per_bit > kAhead || (student - base_.student.max) * per_bit > kAhead) {
      base_ = rebased(teacher, student, inverse_temperature);
    }
    const acc_t teacher_offset = base_.teacher.offset(), student_offset = base_.student.offset();
    acc_t teacher_sum = 0, student_sum = 0, difference = 0, term = 0;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      const ExpPair<acc_t> x(group.teacher.x[i], group.student.x[i], teacher_offset, student_offset,
                             inverse_temperature, narrow);
      teacher_sum += x.teacher;
      student_sum += x.student;
      difference += x.difference;
      if constexpr (OnePass<Terms>) {
        const Difference<acc_t> between(teacher_offset, student_offset, narrow);
        const acc_t d = between(group.teacher.x[i], group.student.x[i]) * inverse_temperature;
        term += terms_.term(Pair<acc_t>::of(d, x.teacher, x.student));
      }
    }
    base_.teacher.sum += teacher_sum;
    base_.student.sum += student_sum;
    base_.difference += difference;
    base_.term += term;
  }

  // again(index): that group.
  template <typename Again>
  KLDIV_DEVICE RowState<acc_t> state(acc_t inverse_temperature, const Again& again) const {
    RowState<acc_t> state = rebased(teacher_.max, student_.max, inverse_temperature);
    if (teacher_.index >= 0) {
      const Groups<acc_t> group = again(teacher_.index);
      state.beside_teacher_max = beside(group.teacher, teacher_.max, group.student);
    }
    if (student_.index >= 0) {
      const Groups<acc_t> group = again(student_.index);
      state.beside_student_max = beside(group.student, student_.max, group.teacher);
    }
    return state;
  }

 private:
  static constexpr acc_t kAhead = 32;  // in bits: how far sums may grow above 1

  struct Largest {
    acc_t max = static_cast<acc_t>(-__builtin_inff());
    int index = -1;  // of the first group that has it

    // The largest so far.
    KLDIV_DEVICE acc_t see(acc_t of_group, int of_index) {
      index = of_group > max ? of_index : index;
      max = of_group > max ? of_group : max;
      return max;
    }
  };

  KLDIV_DEVICE RowState<acc_t> rebased(acc_t teacher_max, acc_t student_max, acc_t inverse_temperature) const {
    RowState<acc_t> state;
    state.teacher.max = teacher_max;
    state.student.max = student_max;
    state.add_rescaled(base_, inverse_temperature);
    if constexpr (OnePass<Terms>) state.add_rescaled_term(base_, terms_, inverse_temperature);
    return state;
  }

  // The largest of `others` where `group` is `max`.
  KLDIV_DEVICE static acc_t beside(const Group<acc_t>& group, acc_t max, const Group<acc_t>& others) {
    acc_t largest = static_cast<acc_t>(-__builtin_inff());
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) largest = group.x[i] == max ? maximum(largest, others.x[i]) : largest;
    return largest;
  }

  const Terms& terms_;
  RowState<acc_t> base_;
  Largest teacher_, student_;
};

// The states of all lanes, to the first of each `width`: first the maxima, so that each rescales its sums but once.
template <typename acc_t, typename Terms>
struct MergeStates {
  const Terms& terms;
  const Scaling<acc_t>& scaling;
  bool hard;  // whether RowState::hard is in use

  KLDIV_DEVICE RowState<acc_t> operator()(const RowState<acc_t>& mine, int width) const {
    Maxima maxima(mine);
    KLDIV_NO_UNROLL
    for (int lanes = width / 2; lanes > 0; lanes /= 2) {
      maxima = Maxima(maxima.state().maxima(device::shuffle_down(maxima, lanes, width).state()));
    }
    RowState<acc_t> merged = device::broadcast(maxima, width).state();
    merged.add_rescaled(mine, scaling.inverse_temperature);
    const Sums sums = Sum()(Sums{merged.teacher.sum, merged.student.sum, merged.difference}, width);
    merged.teacher.sum = sums.teacher;
    merged.student.sum = sums.student;
    merged.difference = sums.difference;
    if constexpr (OnePass<Terms>) {
      merged.add_rescaled_term(mine, terms, scaling.inverse_temperature);
      merged.term = Sum()(merged.term, width);
    }
    if (hard) {
      merged.hard = mine.hard;
      KLDIV_NO_UNROLL
      for (int lanes = width / 2; lanes > 0; lanes /= 2) {
        const LogSumExp<acc_t> other = device::shuffle_down(merged.hard, lanes, width);
        merged.hard = merged.hard.merged(other, scaling.hard_inverse_temperature);
      }
    }
    return merged;
  }
  KLDIV_DEVICE RowState<acc_t> two(const RowState<acc_t>& a, const RowState<acc_t>& b) const {
    RowState<acc_t> both = a.merged(b, scaling);
    if constexpr (OnePass<Terms>) {
      both.add_rescaled_term(a, terms, scaling.inverse_temperature);
      both.add_rescaled_term(b, terms, scaling.inverse_temperature);
    }
    return both;
  }

 private:
  struct Maxima {
    acc_t teacher, student, beside_student, beside_teacher;

    Maxima() = default;
    KLDIV_DEVICE explicit Maxima(const RowState<acc_t>& state)
        : teacher(state.teacher.max),
          student(state.student.max),
          beside_student(state.beside_student_max),
          beside_teacher(state.beside_teacher_max) {}
    KLDIV_DEVICE RowState<acc_t> state() const {
      RowState<acc_t> state;
      state.teacher.max = teacher;
      state.student.max = student;
      state.beside_student_max = beside_student;
      state.beside_teacher_max = beside_teacher;
      return state;
    }
  };
  struct Sums {
    acc_t teacher, student, difference;

    KLDIV_DEVICE Sums operator+(const Sums& other) const {
      return {teacher + other.teacher, student + other.student, difference + other.difference};
    }
  };
};

// Phase 1 of one side alone, with a group added to what there was: the student's at the temperature of the cross
// entropy.
template <typename acc_t>
KLDIV_DEVICE LogSumExp<acc_t> extended(const LogSumExp<acc_t>& state, const Group<acc_t>& group,
                                       acc_t inverse_temperature) {
  LogSumExp<acc_t> both;
  both.max = maximum(state.max, largest(group));
  const acc_t offset = both.offset();
  const acc_t per_bit = inverse_temperature * static_cast<acc_t>(kLog2E);
  KLDIV_UNROLL
  for (int i = 0; i < kGroup<acc_t>; ++i) both.sum += exp2_floored((group.x[i] - offset) * per_bit);
  both.sum += state.sum * exp2_floored((state.max - offset) * per_bit);
  return both;
}

// Phases 2 and 3, once the row's constants are known.
template <typename acc_t, typename Divergence, typename Bool>
struct Columns {
  const Divergence& divergence;
  const RowConstants<acc_t>& row;
  const Scaling<acc_t>& scaling;
  Bool narrow;                // see Difference
  acc_t factor, hard_factor;  // multiply the gradients of the divergence and of the cross entropy
  uint32_t label;

  // Phase 2; the sums of the gradients that are wanted, where nobody knows them to be 0.
  KLDIV_DEVICE RowSums<acc_t> sums(const Groups<acc_t>& group, Sides wanted) const {
    constexpr bool kStudent = !Divergence::kGradQSumsToZero, kTeacher = !Divergence::kGradPSumsToZero;
    // Between columns a branch keeps them from being computed side by side: only where there is no other way.
    using No = Constant<false>;
    if (!(kStudent && wanted.student) && !(kTeacher && wanted.teacher)) return sums_of(group, No(), No());
    if constexpr (kStudent && kTeacher) {
      return sums_of(group, wanted.student, wanted.teacher);
    } else {
      return sums_of(group, Constant<kStudent>(), Constant<kTeacher>());
    }
  }

  // Phases 2 and 3 in one, for a divergence whose g_q sums to 0: the sum of terms, and the student's gradient.
  KLDIV_DEVICE acc_t sum_with_gradient(const Groups<acc_t>& group, Group<acc_t>& gradient) const {
    static_assert(Divergence::kGradQSumsToZero);
    acc_t sum = 0;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      const Pair<acc_t> x = pair(group, i);
      sum += divergence.term(x);
      gradient.x[i] = divergence.grad_q(x) * factor;
    }
    return sum;
  }

  // The cross entropy's part of the student's gradient: softmax less one at the label.
  KLDIV_DEVICE void add_cross_entropy(const Group<acc_t>& student, const Place& place, Group<acc_t>& gradient) const {
    if (hard_factor == 0) return;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      const acc_t softmax =
          probability(student.x[i], row.student.max, row.hard_log2_sum, scaling.hard_inverse_temperature);
      gradient.x[i] += (softmax - (place.column(i) == label ? 1 : 0)) * hard_factor;
    }
  }

  // Phase 3.
  KLDIV_DEVICE Group<acc_t> student_gradient(const Groups<acc_t>& group) const {
    Group<acc_t> gradient;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      gradient.x[i] = row.student.gradient(divergence, pair(group, i), row.student.shifted()) * factor;
    }
    return gradient;
  }
  KLDIV_DEVICE Group<acc_t> teacher_gradient(const Groups<acc_t>& group) const {
    Group<acc_t> gradient;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      const Pair<acc_t> x = pair(group, i).exchanged();
      gradient.x[i] = row.teacher.gradient(exchanged(divergence), x, row.teacher.shifted()) * factor;
    }
    return gradient;
  }

 private:
  template <typename OfStudent, typename OfTeacher>
  KLDIV_DEVICE RowSums<acc_t> sums_of(const Groups<acc_t>& group, OfStudent of_student, OfTeacher of_teacher) const {
    // Formulas of two forms are long: half a group at a time, or there are not enough registers.
    constexpr int kParts = HasShifted<Divergence, acc_t> ? 2 : 1, kSize = kGroup<acc_t> / kParts;
    RowSums<acc_t> sums;
    KLDIV_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      KLDIV_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const int other = i + (kParts - 1) * kSize;
        const Pair<acc_t> x = make_pair(part == 0 ? group.teacher.x[i] : group.teacher.x[other],
                                        part == 0 ? group.student.x[i] : group.student.x[other], row,
                                        scaling.inverse_temperature, narrow);
        sums.term += divergence.term(x);
        if (of_student) sums.grad_q += row.student.grad(divergence, x, row.student.shifted());
        if (of_teacher) sums.grad_p += row.teacher.grad(exchanged(divergence), x.exchanged(), row.teacher.shifted());
      }
    }
    return sums;
  }

  KLDIV_DEVICE Pair<acc_t> pair(const Groups<acc_t>& group, int i) const {
    return make_pair(group.teacher.x[i], group.student.x[i], row, scaling.inverse_temperature, narrow);
  }
};

}  // namespace kldiv::cuda
