// What is known of a row: the online log-sum-exps of student and teacher, which merge over lanes, chunks,
// threads and blocks, and the row constants that turn two logits into a column of the divergence.
#pragma once

#include "divergences.h"
#include "logits.h"

namespace kldiv {
inline namespace KLDIV_ISA {

// sum of e^{(x - max) / T} over part of a row; max is in logits. Where all is -inf, max is, and sum means nothing. On a
// GPU max is one of the largest logits, not always the largest: see ThreadState.
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

// A bool that is known when this is compiled, for the device too.
template <bool kValue>
struct Constant {
  KLDIV_HD constexpr operator bool() const { return kValue; }
};

// (t - teacher_max) - (s - student_max), in the order that rounds least: where the maxima are close, the difference of
// the two logits comes first, which is exact of close ones; where they are not, it would round all that matters away.
template <typename acc_t, bool kNarrow = false>
struct Difference {
  acc_t teacher_offset, student_offset, after;
  acc_t of_equal;  // before `after`; finite, because it also stands for -inf less -inf

  KLDIV_HD Difference(acc_t teacher_max, acc_t student_max) {
    const bool close = absolute(teacher_max - student_max) < 1;
    teacher_offset = close ? 0 : teacher_max;
    student_offset = close ? 0 : student_max;
    after = close ? teacher_max - student_max : 0;
    of_equal = minimum(maximum(student_offset - teacher_offset, acc_t(-1e37)), acc_t(1e37));
  }

  template <typename T>
  KLDIV_HD T operator()(T teacher, T student) const {
    const T difference = (teacher - teacher_offset) - (student - student_offset);
    return (teacher == student ? splat<T>(of_equal) : difference) - after;
  }
};

// The same of logits that have so few digits, 16 bits, that the maxima are subtracted without rounding: what has to be
// done anyway. NaN of -inf and -inf.
template <typename acc_t>
struct Difference<acc_t, true> {
  acc_t teacher_max, student_max;

  KLDIV_HD acc_t operator()(acc_t teacher, acc_t student) const {
    return (teacher - teacher_max) - (student - student_max);
  }
};

// e^{(logit - offset) / T} of both sides, and what the teacher's exceeds the student's: of two close rows nothing else
// tells the log-sum-exps apart. In float two exponentials' own roundings would hide it where they are close; but beside
// rows of narrow logits, which are not that close, it is little.
template <typename T, bool kNarrow = false>
struct ExpPair {
  T teacher, student, difference;

  KLDIV_HD ExpPair(T teacher_logit, T student_logit, Scalar<T> teacher_offset, Scalar<T> student_offset,
                   Scalar<T> inverse_temperature) {
    const Scalar<T> per_bit = inverse_temperature * static_cast<Scalar<T>>(kLog2E);
    teacher = exp2_floored((teacher_logit - teacher_offset) * per_bit);
    student = exp2_floored((student_logit - student_offset) * per_bit);
    difference = teacher - student;
    if constexpr (kIsFloat<T> && !kNarrow) {
      const Difference<Scalar<T>> between(teacher_offset, student_offset);
      const T d = between(teacher_logit, student_logit) * inverse_temperature;
      const T expm1 = d * (d * (d * (1.0f / 6) + 0.5f) + 1);  // relative error 2e-7 where it is used
      difference = absolute(d) < 1.0f / 64 ? student * expm1 : difference;
    }
  }
};

template <typename acc_t>
struct OnePassTerm {
  acc_t value, error;  // and about how far off that is at most, in units of acc_t's epsilon
};

// A divergence whose sum over a row follows from that of the same terms of e^{(logit - max) / T}, before these become
// probabilities: sum x d - x + y for KL(x || y), with d = log x - log y.
template <typename Divergence>
concept OnePass = requires(float sum) { Divergence::weight(sum, sum); };

template <typename acc_t>
struct RowState {
  LogSumExp<acc_t> teacher, student;
  acc_t difference = 0;       // teacher.sum - student.sum, but with digits of its own
  acc_t term = 0;             // that sum, where it is asked for, and from its columns
  acc_t term_difference = 0;  // what `difference` is, with more digits
  LogSumExp<acc_t> hard;      // the student's for the cross entropy; untouched where there is none
  // The other side's logit where one side has its max; of several such columns the largest, of those in the first chunk
  // that has any or, on a GPU, where the base was raised.
  acc_t beside_student_max = static_cast<acc_t>(-__builtin_inff()), beside_teacher_max = beside_student_max;

  KLDIV_HD RowState merged(const RowState& other, const Scaling<acc_t>& scaling) const {
    RowState both = maxima(other);
    both.add_rescaled(*this, scaling.inverse_temperature);
    both.add_rescaled(other, scaling.inverse_temperature);
    both.hard = hard.merged(other.hard, scaling.hard_inverse_temperature);
    return both;
  }

  // The maxima of both, and nothing of their sums.
  KLDIV_HD RowState maxima(const RowState& other) const {
    RowState both;
    both.teacher.max = maximum(teacher.max, other.teacher.max);
    both.student.max = maximum(student.max, other.student.max);
    both.beside_student_max =
        beside_larger(student.max, beside_student_max, other.student.max, other.beside_student_max);
    both.beside_teacher_max =
        beside_larger(teacher.max, beside_teacher_max, other.teacher.max, other.beside_teacher_max);
    return both;
  }

  // Adds the sums of a part whose maxima are at most these.
  KLDIV_HD void add_rescaled(const RowState& part, acc_t inverse_temperature) {
    const ExpPair<acc_t> factor(part.teacher.max, part.student.max, teacher.offset(), student.offset(),
                                inverse_temperature);
    teacher.sum += part.teacher.sum * factor.teacher;
    student.sum += part.student.sum * factor.student;
    difference += part.difference * factor.student + part.teacher.sum * factor.difference;
  }

  // The same for `term`: e^{-d} is exact in d's change, and so all that is added is of the change's own size.
  template <OnePass Divergence>
  KLDIV_HD void add_rescaled_term(const RowState& part, const Divergence& divergence, acc_t inverse_temperature) {
    const acc_t teacher_offset = teacher.offset(), student_offset = student.offset();
    const ExpPair<acc_t> factor(part.teacher.max, part.student.max, teacher_offset, student_offset,
                                inverse_temperature);
    const acc_t change =
        Difference<acc_t>(teacher_offset, student_offset)(part.teacher.max, part.student.max) * inverse_temperature;
    const acc_t of_change = divergence.term(Pair<acc_t>::of(change, factor.teacher, factor.student));
    term += part.term * Divergence::weight(factor.teacher, factor.student) + part.term_difference * factor.difference +
            Divergence::weight(part.teacher.sum, part.student.sum) * of_change;
    term_difference += part.term_difference * factor.student + part.teacher.sum * factor.difference;
  }

  // The divergence: from the sum is taken off what the log-sum-exps differ by. All roundings are in proportion to that
  // difference, or to those of the logits.
  template <OnePass Divergence>
  KLDIV_HD OnePassTerm<acc_t> one_pass_term(const Divergence& divergence) const {
    const acc_t per_weight = 1 / Divergence::weight(teacher.sum, student.sum);
    const acc_t log_ratio = log_ratio_of_sums(term_difference);
    const acc_t value = term * per_weight -
                        divergence.term(Pair<acc_t>::of(log_ratio, teacher.sum * per_weight, student.sum * per_weight));
    return {value, static_cast<acc_t>(2.5) * absolute(log_ratio) + std::sqrt(2 * value)};
  }

  // log(teacher.sum / student.sum), of close rows by their difference.
  KLDIV_HD acc_t log_ratio_of_sums(acc_t difference) const {
    const acc_t excess = difference / student.sum;
    return absolute(excess) < static_cast<acc_t>(0.25) ? Log1p<acc_t>(excess).value : log(teacher.sum / student.sum);
  }

 private:
  KLDIV_HD static acc_t beside_larger(acc_t max, acc_t beside, acc_t other_max, acc_t beside_other) {
    return max == other_max ? maximum(beside, beside_other) : (max > other_max ? beside : beside_other);
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

template <typename Divergence, typename T>
concept HasShifted = requires(const Divergence& divergence, const Pair<T>& x) { divergence.grad_q_shifted(x); };

// Whether a divergence may be asked for columns as BalancedPair where is_balanced() says so; double has time.
template <typename Divergence, typename T>
concept HasBalanced = kIsFloat<T> && requires(const Divergence& divergence) { divergence.is_balanced(); };

// The derivative of the student's side in the form asked for, if there are two. `shifted` is a bool or, where a branch
// would cost more than either form, a Constant or std::bool_constant.
template <typename T, typename Divergence, typename Bool>
KLDIV_HD T derivative(const Divergence& divergence, const Pair<T>& x, Bool shifted) {
  if constexpr (HasShifted<Divergence, T>) {
    if (shifted) return divergence.grad_q_shifted(x);
  }
  return divergence.grad_q(x);
}

// The column where one side has its max: how far the other one's log-probability is above this one's, and the
// derivative of the divergence there per unit of this side's probability, `slope`. Every column's derivative is taken
// less slope times its probability. The softmax Jacobian does not see that; but where a row is sure of its choice, what
// is left is all of the gradient, and would be rounded away beside what is taken off.
template <typename acc_t>
struct Reference {
  static constexpr acc_t kFar = 2.5;  // log 12
  acc_t delta, slope;
  acc_t shifted;  // 1 where slope is of the shifted derivative, because that is the smaller one; else 0

  // Where the other side is far larger, this one is not sure, and nothing is taken off: beside a slope as large as the
  // ratio of the two it would be the small derivatives that are rounded away. A slope is infinite only where the
  // divergence is.
  template <typename Divergence>
  KLDIV_HD static Reference at(acc_t delta, const Divergence& divergence) {
    if (delta > kFar) return {nan<acc_t>(), 0, 0};
    const auto x = Pair<acc_t>::of(delta, exp(delta), 1);
    const acc_t plain = derivative(divergence, x, false), shifted = derivative(divergence, x, true);
    return absolute(shifted) < absolute(plain) ? Reference{delta, shifted, 1} : Reference{delta, plain, 0};
  }
};

// One side of a row, itself in the student's place.
template <typename acc_t>
struct SideConstants {
  acc_t max, log2_sum;  // log2 of a probability = (logit - max) log2(e) / T - log2_sum
  acc_t sum_grad;       // of the derivatives
  Reference<acc_t> at_max;

  KLDIV_HD bool shifted() const { return at_max.shifted != 0; }
  // Whether the other side excludes what this one is sure of: little but the shifted derivatives' digits is then left.
  KLDIV_HD bool is_apart() const { return at_max.delta < -4; }

  // A column's derivative without the reference's share; `shifted` says what shifted() does, see derivative().
  template <typename T, typename Divergence, typename Bool>
  KLDIV_HD T grad(const Divergence& divergence, const Pair<T>& x, Bool shifted) const {
    const T g = derivative(divergence, x, shifted);
    if constexpr (Divergence::kGradQSumsToZero) {
      return g;
    } else {
      return where_equal(x.delta, splat<T>(at_max.delta), T{}, g - x.student() * at_max.slope);
    }
  }

  // There the shifted derivative is the plain one and a constant times q.
  template <typename T, typename Divergence>
  KLDIV_HD T grad(const Divergence& divergence, const BalancedPair<T>& x, bool shifted) const {
    return x.student() * above_slope(divergence, x, shifted);
  }

  // A column's gradient but for a factor: the softmax Jacobian of the derivatives.
  template <typename T, typename Divergence, typename Bool>
  KLDIV_HD T gradient(const Divergence& divergence, const Pair<T>& x, Bool shifted) const {
    const T g = grad(divergence, x, shifted);
    if constexpr (Divergence::kGradQSumsToZero) {
      return g;
    } else {
      return g - x.student() * sum_grad;
    }
  }
  template <typename T, typename Divergence>
  KLDIV_HD T gradient(const Divergence& divergence, const BalancedPair<T>& x, bool shifted) const {
    return x.student() * (above_slope(divergence, x, shifted) - sum_grad);
  }

 private:
  template <typename T, typename Divergence>
  KLDIV_HD T above_slope(const Divergence& divergence, const BalancedPair<T>& x, bool shifted) const {
    const acc_t slope = at_max.slope - (shifted ? divergence.template grad_q_shift<acc_t>() : 0);
    return where_equal(x.delta, splat<T>(at_max.delta), T{}, divergence.grad_q(x) - slope);
  }
};

// All that phase 3 needs of a row; what backward saves instead of the row itself.
template <typename acc_t>
struct RowConstants {
  static constexpr int kCount = 14;
  SideConstants<acc_t> student, teacher;
  acc_t hard_log2_sum;  // the student's at the temperature of the cross entropy
  acc_t log_ratio;      // of the two sums, what log_ratio_at() needs; NaN where the row has no distributions

  RowConstants() = default;
  KLDIV_HD explicit RowConstants(const RowState<acc_t>& state)
      : student{state.student.max, log2_sum(state.student), 0, {}},
        teacher{state.teacher.max, log2_sum(state.teacher), 0, {}},
        hard_log2_sum(state.hard.sum == 0 ? 0 : log2_sum(state.hard)),
        log_ratio(state.log_ratio_of_sums(state.difference) + 0 * state.teacher.max + 0 * state.student.max) {}

  // With the references of the sides that are wanted; infinite in place of others, for whoever asks for those later.
  template <typename Divergence, bool kNarrow = false>
  KLDIV_HD RowConstants(const RowState<acc_t>& state, const Divergence& divergence, acc_t inverse_temperature,
                        Sides wanted, Constant<kNarrow> narrow = {})
      : RowConstants(state) {
    const Reference<acc_t> none = {infinity<acc_t>(), infinity<acc_t>(), 0};
    if constexpr (!Divergence::kGradQSumsToZero) {
      const acc_t delta = log_ratio_at(state.beside_student_max, student.max, inverse_temperature, narrow);
      student.at_max = wanted.student ? Reference<acc_t>::at(delta, divergence) : none;
    }
    if constexpr (!Divergence::kGradPSumsToZero) {
      const acc_t delta = log_ratio_at(teacher.max, state.beside_teacher_max, inverse_temperature, narrow);
      teacher.at_max = wanted.teacher ? Reference<acc_t>::at(-delta, exchanged(divergence)) : none;
    }
  }

  // log p - log q of a column; T is acc_t or a vector of it. To the same bits for all who call it: that is how the
  // reference's column is known.
  template <typename T, bool kNarrow = false>
  KLDIV_HD T log_ratio_at(T teacher_logit, T student_logit, acc_t inverse_temperature,
                          Constant<kNarrow> /*narrow*/ = {}) const {
    const Difference<acc_t, kNarrow> between{teacher.max, student.max};
    return between(teacher_logit, student_logit) * inverse_temperature - log_ratio;
  }

  // An infinite derivative has no gradient: NaN in this row, and only here.
  KLDIV_HD void set_sums(const RowSums<acc_t>& sums) {
    student.sum_grad = sums.grad_q + 0 * sums.grad_q;
    teacher.sum_grad = sums.grad_p + 0 * sums.grad_p;
  }

 private:
  // A row without any mass (all -inf) is NaN.
  KLDIV_HD static acc_t log2_sum(const LogSumExp<acc_t>& state) {
    return state.max == -infinity<acc_t>() ? nan<acc_t>() : log(state.sum) * static_cast<acc_t>(kLog2E);
  }
};

// -log softmax at a logit of a row.
template <typename acc_t>
KLDIV_HD acc_t cross_entropy(acc_t logit, acc_t max, acc_t log2_sum, acc_t inverse_temperature) {
  return (max - logit) * inverse_temperature + log2_sum * static_cast<acc_t>(kLn2);
}

// Of a column on one side, from its logit.
template <typename T>
KLDIV_HD T probability(T logit, Scalar<T> max, Scalar<T> log2_sum, Scalar<T> inverse_temperature) {
  return exp2((logit - max) * (inverse_temperature * static_cast<Scalar<T>>(kLog2E)) - log2_sum);
}

// One column from its two logits; T is acc_t or a vector of it.
template <template <typename> typename PairType = Pair, typename T, bool kNarrow = false>
KLDIV_HD PairType<T> make_pair(T teacher, T student, const RowConstants<Scalar<T>>& row, Scalar<T> inverse_temperature,
                               Constant<kNarrow> narrow = {}) {
  const Scalar<T> per_bit = inverse_temperature * static_cast<Scalar<T>>(kLog2E);
  return PairType<T>(row.log_ratio_at(teacher, student, inverse_temperature, narrow),
                     (teacher - row.teacher.max) * per_bit - row.teacher.log2_sum,
                     (student - row.student.max) * per_bit - row.student.log2_sum);
}

// The sums of phase 2 that tell about a position rather than train on it.
template <typename T>
struct StatsSums {
  T forward_kl{}, reverse_kl{};
  T teacher_drop{}, student_drop{};  // how far below max a draw lies on average, over T

  KLDIV_HD StatsSums operator+(const StatsSums& other) const {
    return {forward_kl + other.forward_kl, reverse_kl + other.reverse_kl, teacher_drop + other.teacher_drop,
            student_drop + other.student_drop};
  }
  template <bool kNarrow = false>
  KLDIV_HD static StatsSums of(T teacher, T student, const RowConstants<Scalar<T>>& row, Scalar<T> inverse_temperature,
                               Constant<kNarrow> narrow = {}) {
    const T delta = row.log_ratio_at(teacher, student, inverse_temperature, narrow);
    const T p = probability(teacher, row.teacher.max, row.teacher.log2_sum, inverse_temperature);
    const T q = probability(student, row.student.max, row.student.log2_sum, inverse_temperature);
    const auto x = Pair<T>::of(delta, p, q);
    return {ForwardKL().term(x), ReverseKL().term(x), drop(p, (row.teacher.max - teacher) * inverse_temperature),
            drop(q, (row.student.max - student) * inverse_temperature)};
  }

 private:
  KLDIV_HD static T drop(T probability, T below) { return probability == 0 ? T{} : probability * below; }
};

// What token_stats tells of a row, in the order of kldiv_ext.TokenStats.
template <typename acc_t>
struct RowStats {
  static constexpr int kCount = 9;
  acc_t forward_kl, reverse_kl;
  acc_t student_entropy, teacher_entropy;
  acc_t student_logsumexp, teacher_logsumexp;  // of logits / T
  acc_t student_label_log_prob, teacher_label_log_prob;
  acc_t top1_agreement;  // 1 or 0

  RowStats() = default;
  // From the labels' logits, and whether the largest ones are in the same column.
  KLDIV_HD RowStats(const RowConstants<acc_t>& row, const StatsSums<acc_t>& sums, acc_t inverse_temperature,
                    acc_t student_label, acc_t teacher_label, bool agree) {
    // A position where one side is broken is NaN throughout.
    const acc_t zero = 0 * row.log_ratio;
    const acc_t student_log_sum = natural(row.student.log2_sum) + zero;
    const acc_t teacher_log_sum = natural(row.teacher.log2_sum) + zero;
    forward_kl = sums.forward_kl;
    reverse_kl = sums.reverse_kl;
    student_entropy = student_log_sum + sums.student_drop;
    teacher_entropy = teacher_log_sum + sums.teacher_drop;
    student_logsumexp = row.student.max * inverse_temperature + student_log_sum;
    teacher_logsumexp = row.teacher.max * inverse_temperature + teacher_log_sum;
    student_label_log_prob =
        zero - cross_entropy(student_label, row.student.max, row.student.log2_sum, inverse_temperature);
    teacher_label_log_prob =
        zero - cross_entropy(teacher_label, row.teacher.max, row.teacher.log2_sum, inverse_temperature);
    top1_agreement = agree && zero == 0 ? 1 : 0;
  }

 private:
  KLDIV_HD static acc_t natural(acc_t log2) { return log2 * static_cast<acc_t>(kLn2); }
};

static_assert(sizeof(RowConstants<float>) == RowConstants<float>::kCount * sizeof(float));
static_assert(sizeof(RowStats<float>) == RowStats<float>::kCount * sizeof(float));

}  // namespace KLDIV_ISA
}  // namespace kldiv
