// How rows are walked on a CUDA device: a block takes a row, its threads the groups of columns in turn, and a row
// is read again for each phase. The portable tier, for sm_80 and up.
#pragma once

#include "columns.h"
#include "launch.h"
#include "reduce.h"

namespace kldiv::cuda {

template <typename Side, typename Divergence>
class RowWalk {
 public:
  using acc_t = typename Side::acc_t;

  KLDIV_DEVICE RowWalk(const DistillationArgs& args, const Divergence& divergence, acc_t inverse_temperature)
      : args_(args), divergence_(divergence), inverse_temperature_(inverse_temperature) {}

  KLDIV_DEVICE void operator()(int64_t row) const {
    const bool forward = args_.row_loss != nullptr;
    acc_t scale = static_cast<acc_t>(args_.scale);
    if (args_.row_scale) scale *= static_cast<const acc_t*>(args_.row_scale)[row];
    if (scale == 0) {  // a position that does not count is not read
      fill_zero(args_.grad_student, row);
      fill_zero(args_.grad_teacher, row);
      if (forward) save(row, 0, RowConstants<acc_t>());
      return;
    }
    const Side teacher(args_.teacher, row), student(args_.student, row);
    const bool gradients = args_.grad_student.data || args_.grad_teacher.data;
    const bool together = Divergence::kGradQSumsToZero && gradients && !args_.grad_teacher.data;
    RowConstants<acc_t> constants = forward ? RowConstants<acc_t>(state(teacher, student), inverse_temperature_)
                                            : static_cast<const RowConstants<acc_t>*>(args_.row_constants)[row];
    if (args_.grad_output) scale *= static_cast<const acc_t*>(args_.grad_output)[row * args_.grad_output_stride];
    // 0 * shift makes the whole row NaN where one of its logits is.
    const acc_t factor = scale * inverse_temperature_ + 0 * constants.shift;
    const Columns<acc_t, Divergence> columns{divergence_, constants, inverse_temperature_, factor};
    if (forward) {
      const RowSums<acc_t> total =
          together ? sums_with_gradient(columns, teacher, student, row) : sums(columns, teacher, student);
      constants.set_sums(total);
      save(row, scale * total.term, constants);
    }
    if (gradients && !(forward && together)) write_gradients(columns, teacher, student, row);
  }

 private:
  using Evaluation = Columns<acc_t, Divergence>;

  // Calls body(teacher's group, student's group, first, n) for this thread's groups.
  template <Use use, typename Body>
  KLDIV_DEVICE void walk(const Side& teacher, const Side& student, const Body& body) const {
    constexpr acc_t kPadding = -__builtin_inff();  // a column with p = q = 0
    for_each_group<acc_t, uint32_t>(args_.columns, device::thread(), device::threads(), [&](uint32_t first, int n) {
      body(teacher.template load<use>(first, n, kPadding), student.template load<use>(first, n, kPadding), first, n);
    });
  }

  // Phase 1.
  KLDIV_DEVICE RowState<acc_t> state(const Side& teacher, const Side& student) const {
    RowState<acc_t> mine;
    walk<Use::kAgain>(teacher, student, [&](const auto& t, const auto& s, uint32_t, int) {
      mine.teacher = extended(mine.teacher, t, inverse_temperature_);
      mine.student = extended(mine.student, s, inverse_temperature_);
    });
    return block_reduce(mine, [&](const auto& a, const auto& b) { return a.merged(b, inverse_temperature_); });
  }

  // Phase 2.
  KLDIV_DEVICE RowSums<acc_t> sums(const Evaluation& columns, const Side& teacher, const Side& student) const {
    RowSums<acc_t> mine;
    walk<Use::kAgain>(teacher, student,
                      [&](const auto& t, const auto& s, uint32_t, int) { mine = mine + columns.sums(t, s); });
    return block_reduce(mine, Plus());
  }

  // Phases 2 and 3 of the student's gradient in one walk, where nothing of phase 3 has to wait for a sum.
  KLDIV_DEVICE RowSums<acc_t> sums_with_gradient(const Evaluation& columns, const Side& teacher, const Side& student,
                                                 int64_t row) const {
    RowSums<acc_t> mine;
    if constexpr (Divergence::kGradQSumsToZero) {
      walk<Use::kOnce>(teacher, student, [&](const auto& t, const auto& s, uint32_t first, int n) {
        Group<acc_t> gradient;
        mine.term += columns.sum_with_gradient(t, s, gradient);
        Side::store(args_.grad_student, row * args_.columns + first, n, gradient);
      });
    }
    return block_reduce(mine, Plus());
  }

  // Phase 3.
  KLDIV_DEVICE void write_gradients(const Evaluation& columns, const Side& teacher, const Side& student,
                                    int64_t row) const {
    walk<Use::kOnce>(teacher, student, [&](const auto& t, const auto& s, uint32_t first, int n) {
      const int64_t offset = row * args_.columns + first;
      if (args_.grad_student.data) Side::store(args_.grad_student, offset, n, columns.student_gradient(t, s));
      if (args_.grad_teacher.data) Side::store(args_.grad_teacher, offset, n, columns.teacher_gradient(t, s));
    });
  }

  KLDIV_DEVICE void save(int64_t row, acc_t loss, const RowConstants<acc_t>& constants) const {
    if (device::thread() > 0) return;
    static_cast<acc_t*>(args_.row_loss)[row] = loss;
    static_cast<RowConstants<acc_t>*>(args_.row_constants)[row] = constants;
  }

  KLDIV_DEVICE void fill_zero(const Output& output, int64_t row) const {
    if (output.data == nullptr) return;
    for_each_group<acc_t, uint32_t>(args_.columns, device::thread(), device::threads(), [&](uint32_t first, int n) {
      Side::store(output, row * args_.columns + first, n, Group<acc_t>{});
    });
  }

  const DistillationArgs& args_;
  const Divergence& divergence_;
  const acc_t inverse_temperature_;
};

template <typename Side, typename Divergence>
KLDIV_KERNEL(max_row_threads<typename Side::acc_t>)
distil_rows(KLDIV_ARGUMENT DistillationArgs args, KLDIV_ARGUMENT Divergence divergence,
            typename Side::acc_t inverse_temperature) {
  const RowWalk<Side, Divergence> walk(args, divergence, inverse_temperature);
  for (int64_t row = device::block(); row < args.rows; row += device::blocks()) walk(row);
}

// Host side, for one kind of Side.
template <typename Side>
void launch_rows(const DistillationArgs& args, void* stream) {
  dispatch_divergence(args.divergence, args.parameter, [&](const auto& divergence) {
    using Divergence = std::decay_t<decltype(divergence)>;
    // The quotient is made here: many GPUs are slow in double.
    device::launch(distil_rows<Side, Divergence>, row_blocks(args.rows),
                   row_threads<typename Side::acc_t>(args.columns), stream, args, divergence,
                   static_cast<typename Side::acc_t>(1 / args.temperature));
  });
}

}  // namespace kldiv::cuda
