// What is done with a group of columns, in each of a row's three phases; walks.h says how groups are come by. A group
// is summed up on its own before it meets the thread's long sum: fewer roundings.
#pragma once

#include "../row_state.h"
#include "walks.h"

namespace kldiv::cuda {

// In place of a divergence: no terms in phase 1; and for bases that are the maxima.
struct NoTerms {};
struct Maxima {};

// Phase 1 of one thread's groups. What it gives as each side's maximum is a base: one of the row's logits, to which the
// sums are relative, and which the largest one is only so far above that the sums tell it. So nobody has to look for
// it.
template <typename acc_t, typename Terms, typename Narrow>
class ThreadState {
 public:
  // `least` has the bases to begin with, and no sums. `references`: whether somebody needs what is beside the bases.
  KLDIV_DEVICE ThreadState(const Terms& terms, const RowState<acc_t>& least, bool references)
      : terms_(terms),
        references_(references),
        state_(least),
        teacher_offset_(least.teacher.offset()),
        student_offset_(least.student.offset()) {}

  KLDIV_DEVICE void add(const Groups<acc_t>& group, acc_t inverse_temperature) {
    bool behind = is_behind(group), again;
    GroupSums sums;
    KLDIV_NO_UNROLL
    do {
      if (behind) rebase(group, inverse_temperature);
      sums = GroupSums(group, *this, inverse_temperature);
      again = !behind && (sums.teacher > kAhead || sums.student > kAhead);
      behind = true;
    } while (again);
    state_.teacher.sum += sums.teacher;
    state_.student.sum += sums.student;
    state_.difference += sums.difference;
    if constexpr (OnePass<Terms>) {
      state_.term += sums.term;
      state_.term_difference += sums.term_difference;
    }
  }

  KLDIV_DEVICE const RowState<acc_t>& state() const { return state_; }

 private:
  // How far a group's sum may grow above 1. Of a row that is sure of one column all is in the others: beside that
  // column's own rounding, which this lets be so much larger than theirs.
  static constexpr acc_t kAhead = 256;

  struct GroupSums {
    acc_t teacher, student, difference, term, term_difference;

    GroupSums() = default;
    KLDIV_DEVICE GroupSums(const Groups<acc_t>& group, const ThreadState& thread, acc_t inverse_temperature) {
      const acc_t teacher_offset = thread.teacher_offset_, student_offset = thread.student_offset_;
      acc_t moment = 0;
      KLDIV_UNROLL
      for (int i = 0; i < kGroup<acc_t>; ++i) {
        const ExpPair<acc_t, Narrow{}> x(group.teacher.x[i], group.student.x[i], teacher_offset, student_offset,
                                         inverse_temperature);
        teacher = i == 0 ? x.teacher : teacher + x.teacher;
        student = i == 0 ? x.student : student + x.student;
        difference = i == 0 ? x.difference : difference + x.difference;
        if constexpr (OnePass<Terms>) {
          const Difference<acc_t, Narrow{}> between{teacher_offset, student_offset};
          const acc_t d = between(group.teacher.x[i], group.student.x[i]) * inverse_temperature;
          const auto pair = Pair<acc_t>::of(d, x.teacher, x.student);
          const acc_t of_column = thread.terms_.term(pair), moment_of_column = Terms::moment(pair);
          term = i == 0 ? of_column : term + of_column;
          moment = i == 0 ? moment_of_column : moment + moment_of_column;
        }
      }
      if constexpr (OnePass<Terms>) term_difference = Terms::difference(moment - term);
    }
  };

  // Whether that is known before the sums are: where there is no base yet. In double an exponential that overflows is
  // anything, and the bases are the maxima.
  KLDIV_DEVICE bool is_behind(const Groups<acc_t>& group) const {
    if constexpr (kIsFloat<acc_t> && !std::is_same_v<Terms, Maxima>) {
      return state_.teacher.max == -infinity<acc_t>() || state_.student.max == -infinity<acc_t>();
    } else {
      return largest(group.teacher) > state_.teacher.max || largest(group.student) > state_.student.max;
    }
  }

  // Raises the bases to the group's largest logits, where these are larger.
  KLDIV_DEVICE void rebase(const Groups<acc_t>& group, acc_t inverse_temperature) {
    RowState<acc_t> of_group;
    of_group.teacher.max = largest(group.teacher);
    of_group.student.max = largest(group.student);
    if (references_) {
      of_group.beside_teacher_max = beside(group.teacher, of_group.teacher.max, group.student);
      of_group.beside_student_max = beside(group.student, of_group.student.max, group.teacher);
    }
    RowState<acc_t> rebased = state_.maxima(of_group);
    rebased.add_rescaled(state_, inverse_temperature);
    if constexpr (OnePass<Terms>) rebased.add_rescaled_term(state_, terms_, inverse_temperature);
    state_ = rebased;
    teacher_offset_ = state_.teacher.offset();
    student_offset_ = state_.student.offset();
  }

  KLDIV_DEVICE static acc_t largest(const Group<acc_t>& group) {
    acc_t max = group.x[0];
    KLDIV_UNROLL
    for (int i = 1; i < kGroup<acc_t>; ++i) max = maximum(max, group.x[i]);
    return max;
  }
  // The largest of `others` where `group` is `max`.
  KLDIV_DEVICE static acc_t beside(const Group<acc_t>& group, acc_t max, const Group<acc_t>& others) {
    acc_t largest = static_cast<acc_t>(-__builtin_inff());
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) largest = group.x[i] == max ? maximum(largest, others.x[i]) : largest;
    return largest;
  }

  const Terms& terms_;
  const bool references_;
  RowState<acc_t> state_;
  acc_t teacher_offset_, student_offset_;
};

// The states of all lanes, to each of `width`: first the bases, so that each rescales its sums but once.
template <typename acc_t, typename Terms>
struct MergeStates {
  const Terms& terms;
  const Scaling<acc_t>& scaling;
  bool references, hard;  // whether what is beside the bases, and RowState::hard, are in use

  KLDIV_DEVICE RowState<acc_t> operator()(const RowState<acc_t>& mine, int width) const {
    RowState<acc_t> all;
    all.teacher.max = Max()(mine.teacher.max, width);
    all.student.max = Max()(mine.student.max, width);
    if (references) {
      const acc_t none = all.beside_teacher_max;
      all.beside_teacher_max = Max()(mine.teacher.max == all.teacher.max ? mine.beside_teacher_max : none, width);
      all.beside_student_max = Max()(mine.student.max == all.student.max ? mine.beside_student_max : none, width);
    }
    add_rescaled(all, mine);
    all.teacher.sum = Sum()(all.teacher.sum, width);
    all.student.sum = Sum()(all.student.sum, width);
    all.difference = Sum()(all.difference, width);
    if constexpr (OnePass<Terms>) {
      all.term = Sum()(all.term, width);
      all.term_difference = Sum()(all.term_difference, width);
    }
    if (hard) {
      all.hard.max = Max()(mine.hard.max, width);
      all.hard.sum = Sum()(all.hard.merged(mine.hard, scaling.hard_inverse_temperature).sum, width);
    }
    return all;
  }
  KLDIV_DEVICE RowState<acc_t> two(const RowState<acc_t>& a, const RowState<acc_t>& b) const {
    RowState<acc_t> both = a.maxima(b);
    add_rescaled(both, a);
    add_rescaled(both, b);
    if (hard) both.hard = a.hard.merged(b.hard, scaling.hard_inverse_temperature);
    return both;
  }

 private:
  KLDIV_DEVICE void add_rescaled(RowState<acc_t>& all, const RowState<acc_t>& part) const {
    all.add_rescaled(part, scaling.inverse_temperature);
    if constexpr (OnePass<Terms>) all.add_rescaled_term(part, terms, scaling.inverse_temperature);
  }
};

// Phase 1 of one side alone, with a group added to what there was: the student's at the temperature of the cross
// entropy.
template <typename acc_t>
KLDIV_DEVICE LogSumExp<acc_t> extended(const LogSumExp<acc_t>& state, const Group<acc_t>& group,
                                       acc_t inverse_temperature) {
  LogSumExp<acc_t> both;
  both.max = state.max;
  KLDIV_UNROLL
  for (int i = 0; i < kGroup<acc_t>; ++i) both.max = maximum(both.max, group.x[i]);
  const acc_t offset = both.offset();
  const acc_t per_bit = inverse_temperature * static_cast<acc_t>(kLog2E);
  KLDIV_UNROLL
  for (int i = 0; i < kGroup<acc_t>; ++i) both.sum += exp2_floored((group.x[i] - offset) * per_bit);
  both.sum += state.sum * exp2_floored((state.max - offset) * per_bit);
  return both;
}

// Phases 2 and 3, once the row's constants are known.
template <typename acc_t, typename Divergence, typename Narrow>
struct Columns {
  const Divergence& divergence;
  const RowConstants<acc_t>& row;
  const Scaling<acc_t>& scaling;
  acc_t factor, hard_factor;  // multiply the gradients of the divergence and of the cross entropy
  uint32_t label;

  // Phase 2; the sums of the gradients that are wanted, where nobody knows them to be 0.
  KLDIV_DEVICE RowSums<acc_t> sums(const Groups<acc_t>& group, Sides wanted) const {
    RowSums<acc_t> sums;
    Group<acc_t> nothing;
    if (!Divergence::kGradQSumsToZero && wanted.student) {
      each_column(group, &row.student, nothing, [&](const auto& x, auto shifted, acc_t&) {
        sums.term += divergence.term(x);
        sums.grad_q += row.student.grad(divergence, x, shifted);
      });
    } else {
      each_column(group, nullptr, nothing, [&](const auto& x, auto, acc_t&) { sums.term += divergence.term(x); });
    }
    if (!Divergence::kGradPSumsToZero && wanted.teacher) {
      each_column(group, &row.teacher, nothing, [&](const auto& x, auto shifted, acc_t&) {
        sums.grad_p += row.teacher.grad(exchanged(divergence), x.exchanged(), shifted);
      });
    }
    return sums;
  }

  // The cross entropy's part of the student's gradient: softmax less one at the label.
  KLDIV_DEVICE Group<acc_t> cross_entropy_gradient(const Group<acc_t>& student, const Place& place) const {
    Group<acc_t> gradient{};
    if (hard_factor == 0) return gradient;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      const acc_t softmax =
          probability(student.x[i], row.student.max, row.hard_log2_sum, scaling.hard_inverse_temperature);
      gradient.x[i] = (softmax - (place.column(i) == label ? 1 : 0)) * hard_factor;
    }
    return gradient;
  }

  // Phases 2 and 3 in one, for a divergence whose g_q sums to 0: the sum of terms; the student's gradient is added.
  KLDIV_DEVICE acc_t sum_with_gradient(const Groups<acc_t>& group, Group<acc_t>& gradient) const {
    static_assert(Divergence::kGradQSumsToZero);
    acc_t sum = 0;
    each_column(group, nullptr, gradient, [&](const auto& x, auto, acc_t& value) {
      sum += divergence.term(x);
      value = divergence.grad_q(x) * factor + value;
    });
    return sum;
  }

  // Phase 3; the student's is added.
  KLDIV_DEVICE void add_student_gradient(const Groups<acc_t>& group, Group<acc_t>& gradient) const {
    each_column(group, &row.student, gradient, [&](const auto& x, auto shifted, acc_t& value) {
      value = row.student.gradient(divergence, x, shifted) * factor + value;
    });
  }
  KLDIV_DEVICE Group<acc_t> teacher_gradient(const Groups<acc_t>& group) const {
    Group<acc_t> gradient;
    each_column(group, &row.teacher, gradient, [&](const auto& x, auto shifted, acc_t& value) {
      value = row.teacher.gradient(exchanged(divergence), x.exchanged(), shifted) * factor;
    });
    return gradient;
  }

 private:
  // Calls function(pair, shifted, value) for each column and its value; `side` is the one whose derivative is asked
  // for, if any. Between columns a branch would keep them from being computed side by side: what is the same for all is
  // asked for before.
  template <typename Function>
  KLDIV_DEVICE void each_column(const Groups<acc_t>& group, const SideConstants<acc_t>* side, Group<acc_t>& values,
                                const Function& function) const {
    const bool shifted = side != nullptr && side->shifted();
    if constexpr (HasBalanced<Divergence, acc_t>) {
      const bool apart = shifted && side->is_apart();
      if (divergence.is_balanced() && !apart) return each<BalancedPair, 1>(group, shifted, values, function);
    }
    // Formulas of two forms are long: half a group at a time, or there are not enough registers.
    constexpr int kParts = HasShifted<Divergence, acc_t> ? 2 : 1;
    if (HasShifted<Divergence, acc_t> && shifted) {
      each<Pair, kParts>(group, Constant<true>(), values, function);
    } else {
      each<Pair, kParts>(group, Constant<false>(), values, function);
    }
  }
  template <template <typename> typename PairType, int kParts, typename Bool, typename Function>
  KLDIV_DEVICE void each(Groups<acc_t> group, Bool shifted, Group<acc_t>& values, const Function& function) const {
    constexpr int kSize = kGroup<acc_t> / kParts;
    KLDIV_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      KLDIV_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const auto x =
            make_pair<PairType>(group.teacher.x[i], group.student.x[i], row, scaling.inverse_temperature, Narrow());
        function(x, shifted, values.x[i]);
      }
      if constexpr (kParts == 2) {
        exchange_halves(group.teacher);
        exchange_halves(group.student);
        exchange_halves(values);
      }
    }
  }
  KLDIV_DEVICE static void exchange_halves(Group<acc_t>& group) {
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t> / 2; ++i) {
      const acc_t x = group.x[i];
      group.x[i] = group.x[i + kGroup<acc_t> / 2];
      group.x[i + kGroup<acc_t> / 2] = x;
    }
  }
};

}  // namespace kldiv::cuda
