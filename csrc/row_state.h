// What is known of a row: the online log-sum-exps of student and teacher, which merge over lanes, chunks,
// threads and blocks, and the row constants that turn two logits into a column of the divergence.
#pragma once

#include "divergences.h"
#include "logits.h"

namespace kldiv {
inline namespace KLDIV_ISA {

// sum of e^{(x - max) / T} over part of a row; max is in logits. Where all is -inf, max is, and sum means nothing.
template <typename acc_t>
struct LogSumExp {
  acc_t max = static_cast<acc_t>(-__builtin_inff());
  acc_t sum = 0;

  // What to subtract from a logit before exponentiating: max, or 0 where all is -inf, so that
  // -inf gives 0 and not NaN.
  KLDIV_HD acc_t offset() const { return max == -infinity<acc_t>() ? acc_t(0) : max; }

  KLDIV_HD LogSumExp merged(const LogSumExp& other, acc_t inverse_temperature) const {
    LogSumExp both;
    both.max = maximum(max, other.max);
    const acc_t offset = both.offset();
    both.sum =
        sum * exp((max - offset) * inverse_temperature) + other.sum * exp((other.max - offset) * inverse_temperature);
    return both;
  }
};

template <typename acc_t>
struct RowState {
  LogSumExp<acc_t> teacher, student;
  LogSumExp<acc_t> hard;  // the student's for the cross entropy; untouched where there is none

  KLDIV_HD RowState merged(const RowState& other, const Scaling<acc_t>& scaling) const {
    return {teacher.merged(other.teacher, scaling.inverse_temperature),
            student.merged(other.student, scaling.inverse_temperature),
            hard.merged(other.hard, scaling.hard_inverse_temperature)};
  }
};

// The three sums of phase 2.
template <typename T>
struct RowSums {
  T term{}, grad_q{}, grad_p{};

  KLDIV_HD RowSums operator+(const RowSums& other) const {
    return {term + other.term, grad_q + other.grad_q, grad_p + other.grad_p};
  }
};

// All that phase 3 needs of a row; what backward saves instead of the row itself.
template <typename acc_t>
struct RowConstants {
  static constexpr int kCount = 8;
  acc_t teacher_max, teacher_log2_sum;  // log2 p = (t - teacher_max) log2(e) / T - teacher_log2_sum
  acc_t student_max, student_log2_sum;
  acc_t hard_log2_sum;  // the student's at the temperature of the cross entropy
  acc_t shift;          // log p - log q = (t - s) / T - shift
  acc_t sum_grad_q, sum_grad_p;

  RowConstants() = default;
  KLDIV_HD RowConstants(const RowState<acc_t>& state, const Scaling<acc_t>& scaling)
      : teacher_max(state.teacher.max),
        teacher_log2_sum(log_sum(state.teacher) * static_cast<acc_t>(kLog2E)),
        student_max(state.student.max),
        student_log2_sum(log_sum(state.student) * static_cast<acc_t>(kLog2E)),
        hard_log2_sum(state.hard.sum == 0 ? 0 : log_sum(state.hard) * static_cast<acc_t>(kLog2E)),
        // One logarithm of the ratio: for close rows the difference of two would lose their common digits.
        shift((state.teacher.max - state.student.max) * scaling.inverse_temperature +
              log(state.teacher.sum / state.student.sum)),
        sum_grad_q(0),
        sum_grad_p(0) {}

  // An infinite divergence has no gradient: NaN in this row, and only here.
  KLDIV_HD void set_sums(const RowSums<acc_t>& sums) {
    sum_grad_q = sums.grad_q + 0 * sums.grad_q;
    sum_grad_p = sums.grad_p + 0 * sums.grad_p;
  }

  // -log softmax of the student at a label's logit.
  KLDIV_HD acc_t cross_entropy(acc_t logit, acc_t hard_inverse_temperature) const {
    return (student_max - logit) * hard_inverse_temperature + hard_log2_sum * static_cast<acc_t>(kLn2);
  }

 private:
  // A row without any mass (all -inf) is NaN.
  KLDIV_HD static acc_t log_sum(const LogSumExp<acc_t>& state) {
    return state.max == -infinity<acc_t>() ? nan<acc_t>() : log(state.sum);
  }
};

// One column from its two logits; T is acc_t or a vector of it.
template <typename T>
KLDIV_HD Pair<T> make_pair(T teacher, T student, const RowConstants<Scalar<T>>& row, Scalar<T> inverse_temperature) {
  // Equal logits differ by 0, also where both are -inf.
  const T difference = teacher == student ? T{} : teacher - student;
  const T delta = difference * inverse_temperature - row.shift;
  Pair<T> x;
  x.teacher_is_larger = delta >= 0;
  x.gap = absolute(delta);
  const Decay<T> decay(x.gap);
  x.expm1 = decay.expm1;
  x.excess = decay.excess;
  const Scalar<T> per_bit = inverse_temperature * static_cast<Scalar<T>>(kLog2E);
  x.larger = exp2(x.by_larger((teacher - row.teacher_max) * per_bit - row.teacher_log2_sum,
                              (student - row.student_max) * per_bit - row.student_log2_sum));
  return x;
}

}  // namespace KLDIV_ISA
}  // namespace kldiv
