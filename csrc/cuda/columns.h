// What is done with a group of columns, in each of a row's three phases; walks.h says how groups are come by. A group
// is summed up on its own before it meets the thread's long sum: fewer roundings.
#pragma once

#include "../row_state.h"
#include "sides.h"

namespace kldiv::cuda {

template <typename acc_t>
KLDIV_DEVICE acc_t largest(const Group<acc_t>& group) {
  acc_t max = group.x[0];
  KLDIV_UNROLL
  for (int i = 1; i < kGroup<acc_t>; ++i) max = maximum(max, group.x[i]);
  return max;
}

// Phase 1: adds a group to the state of the columns so far.
template <typename acc_t, typename Bool>
KLDIV_DEVICE void extend(RowState<acc_t>& state, const Group<acc_t>& teacher, const Group<acc_t>& student,
                         const Scaling<acc_t>& scaling, Bool narrow) {
  RowState<acc_t> group;
  group.teacher.max = largest(teacher);
  group.student.max = largest(student);
  // Seldom to a thread, once a row has begun; and so for both sides, whatever is wanted.
  if (group.teacher.max >= state.teacher.max || group.student.max >= state.student.max) {
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      if (student.x[i] == group.student.max) group.beside_student_max = maximum(group.beside_student_max, teacher.x[i]);
      if (teacher.x[i] == group.teacher.max) group.beside_teacher_max = maximum(group.beside_teacher_max, student.x[i]);
    }
    RowState<acc_t> raised = state.maxima(group);
    raised.add_rescaled(state, scaling.inverse_temperature);
    raised.hard = state.hard;
    state = raised;
  }
  const acc_t teacher_offset = state.teacher.offset(), student_offset = state.student.offset();
  acc_t teacher_sum = 0, student_sum = 0, difference = 0;
  KLDIV_UNROLL
  for (int i = 0; i < kGroup<acc_t>; ++i) {
    const ExpPair<acc_t> x(teacher.x[i], student.x[i], teacher_offset, student_offset, scaling.inverse_temperature,
                           narrow);
    teacher_sum += x.teacher;
    student_sum += x.student;
    difference += x.difference;
  }
  state.teacher.sum += teacher_sum;
  state.student.sum += student_sum;
  state.difference += difference;
}

// The states of all lanes, to the first of each `width`: first the maxima, so that each rescales its sums but once.
template <typename acc_t>
struct MergeStates {
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
    return a.merged(b, scaling);
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

// The same for one side alone: the student's at the temperature of the cross entropy.
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
  KLDIV_DEVICE RowSums<acc_t> sums(const Group<acc_t>& teacher, const Group<acc_t>& student, Sides wanted) const {
    RowSums<acc_t> sums;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      const Pair<acc_t> x = pair(teacher, student, i);
      sums.term += divergence.term(x);
      if constexpr (!Divergence::kGradQSumsToZero) {
        if (wanted.student) sums.grad_q += row.student.grad(divergence, x, row.student.shifted());
      }
      if constexpr (!Divergence::kGradPSumsToZero) {
        if (wanted.teacher)
          sums.grad_p += row.teacher.grad(exchanged(divergence), x.exchanged(), row.teacher.shifted());
      }
    }
    return sums;
  }

  // Phases 2 and 3 in one, for a divergence whose g_q sums to 0: the sum of terms, and the student's gradient.
  KLDIV_DEVICE acc_t sum_with_gradient(const Group<acc_t>& teacher, const Group<acc_t>& student,
                                       Group<acc_t>& gradient) const {
    static_assert(Divergence::kGradQSumsToZero);
    acc_t sum = 0;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      const Pair<acc_t> x = pair(teacher, student, i);
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
  KLDIV_DEVICE Group<acc_t> student_gradient(const Group<acc_t>& teacher, const Group<acc_t>& student) const {
    Group<acc_t> gradient;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      gradient.x[i] = row.student.gradient(divergence, pair(teacher, student, i), row.student.shifted()) * factor;
    }
    return gradient;
  }
  KLDIV_DEVICE Group<acc_t> teacher_gradient(const Group<acc_t>& teacher, const Group<acc_t>& student) const {
    Group<acc_t> gradient;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      const Pair<acc_t> x = pair(teacher, student, i).exchanged();
      gradient.x[i] = row.teacher.gradient(exchanged(divergence), x, row.teacher.shifted()) * factor;
    }
    return gradient;
  }

 private:
  KLDIV_DEVICE Pair<acc_t> pair(const Group<acc_t>& teacher, const Group<acc_t>& student, int i) const {
    return make_pair(teacher.x[i], student.x[i], row, scaling.inverse_temperature, narrow);
  }
};

}  // namespace kldiv::cuda
