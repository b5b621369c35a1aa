// How rows are walked on a CUDA device: a block takes a row, its threads the groups of columns in turn, and a row
// is read again for each phase. The portable tier, for sm_80 and up.
#pragma once

#include "columns.h"
#include "launch.h"
#include "reduce.h"

namespace kldiv::cuda {

// What every walk over a row begins with: a thread's groups, and phase 1.
template <typename Side>
class RowReader {
 public:
  using acc_t = typename Side::acc_t;

  KLDIV_DEVICE RowReader(const LogitsArgs& args, const Scaling<acc_t>& scaling) : logits_(args), scaling_(scaling) {}

 protected:
  // Calls body(teacher's group, student's group, first, n) for this thread's groups.
  template <Use use, typename Body>
  KLDIV_DEVICE void walk(const Side& teacher, const Side& student, const Body& body) const {
    constexpr acc_t kPadding = -__builtin_inff();  // a column with p = q = 0
    for_each_group<acc_t, uint32_t>(logits_.columns, device::thread(), device::threads(), [&](uint32_t first, int n) {
      body(teacher.template load<use>(first, n, kPadding), student.template load<use>(first, n, kPadding), first, n);
    });
  }

  // Phase 1.
  KLDIV_DEVICE RowState<acc_t> state(const Side& teacher, const Side& student, bool hard) const {
    const acc_t hard_inverse_temperature = scaling_.hard_inverse_temperature;
    const bool one_temperature = scaling_.inverse_temperature == hard_inverse_temperature;
    const bool apart = hard && !one_temperature;
    RowState<acc_t> mine;
    walk<Use::kAgain>(teacher, student, [&](const auto& t, const auto& s, uint32_t, int) {
      extend(mine, t, s, scaling_);
      if (apart) mine.hard = extended(mine.hard, s, hard_inverse_temperature);
    });
    if (hard && one_temperature) mine.hard = mine.student;
    return block_reduce(mine, [&](const auto& a, const auto& b) { return a.merged(b, scaling_); });
  }

  const LogitsArgs& logits_;
  const Scaling<acc_t>& scaling_;
};

// Loss and gradients of a row.
template <typename Side, typename Divergence>
class RowWalk : RowReader<Side> {
 public:
  using acc_t = typename Side::acc_t;

  KLDIV_DEVICE RowWalk(const DistillationArgs& args, const Divergence& divergence, const Scaling<acc_t>& scaling)
      : RowReader<Side>(args, scaling), args_(args), divergence_(divergence) {}

  KLDIV_DEVICE void operator()(int64_t row) const {
    const bool forward = args_.row_loss != nullptr;
    const acc_t scale = args_.row_scale ? static_cast<const acc_t*>(args_.row_scale)[row] : 1;
    const acc_t soft = args_.soft_scale == 0 ? 0 : static_cast<acc_t>(args_.soft_scale) * scale;
    const bool labelled = args_.hard_scale != 0;  // only then are there labels, whatever the scales are
    acc_t hard = labelled ? static_cast<acc_t>(args_.hard_scale) * scale : 0;
    if (scale == 0 || (args_.soft_scale == 0 && !labelled)) {  // a position that does not count is not read
      fill_zero(args_.grad_student, row, 0);
      fill_zero(args_.grad_teacher, row, 0);
      if (forward) save(row, 0, RowConstants<acc_t>());
      return;
    }
    const Side teacher(args_.teacher, scaling_.teacher, row), student(args_.student, scaling_.student, row);
    const bool gradients = args_.grad_student.out.data || args_.grad_teacher.out.data;
    const bool together = Divergence::kGradQSumsToZero && gradients && !args_.wanted.teacher;
    RowConstants<acc_t> constants = forward
                                        ? RowConstants<acc_t>(state(teacher, student, args_.labels != nullptr),
                                                              divergence_, scaling_.inverse_temperature, args_.wanted)
                                        : static_cast<const RowConstants<acc_t>*>(args_.row_constants)[row];
    uint32_t label = 0;
    if (labelled) {
      const int64_t given = args_.labels[row];
      // A label that is no column makes the row NaN: to raise would be to wait for the device.
      const bool is_column = given >= 0 && given < args_.columns;
      label = is_column ? static_cast<uint32_t>(given) : 0;
      if (!is_column) hard = nan<acc_t>();
    }
    const acc_t grad =
        args_.grad_output ? static_cast<const acc_t*>(args_.grad_output)[row * args_.grad_output_stride] : 1;
    // 0 * log_ratio makes the whole row NaN where one of its logits is.
    const acc_t factor = soft * grad * scaling_.inverse_temperature + 0 * constants.log_ratio;
    const acc_t hard_factor = labelled ? hard * grad * scaling_.hard_inverse_temperature : 0;
    const Columns<acc_t, Divergence> columns{divergence_, constants, scaling_, factor, hard_factor, label};
    if (forward) {
      acc_t loss = 0;
      if (labelled) {
        const acc_t logit = student.template load<Use::kAgain>(label, 1, 0).x[0];
        loss = hard *
               cross_entropy(logit, constants.student.max, constants.hard_log2_sum, scaling_.hard_inverse_temperature);
      }
      const RowSums<acc_t> total =
          together ? sums_with_gradient(columns, teacher, student, row) : sums(columns, teacher, student);
      constants.set_sums(total);
      save(row, loss + soft * total.term, constants);
    }
    if (!gradients) return;
    if (!(forward && together)) write_gradients(columns, teacher, student, row);
    fill_zero(args_.grad_student, row, args_.columns);
    fill_zero(args_.grad_teacher, row, args_.columns);
  }

 private:
  using Evaluation = Columns<acc_t, Divergence>;
  using RowReader<Side>::scaling_, RowReader<Side>::state;

  // Phase 2.
  KLDIV_DEVICE RowSums<acc_t> sums(const Evaluation& columns, const Side& teacher, const Side& student) const {
    RowSums<acc_t> mine;
    this->template walk<Use::kAgain>(teacher, student, [&](const auto& t, const auto& s, uint32_t, int) {
      mine = mine + columns.sums(t, s, args_.wanted);
    });
    return block_reduce(mine, Plus());
  }

  // Phases 2 and 3 of the student's gradient in one walk, where nothing of phase 3 has to wait for a sum.
  KLDIV_DEVICE RowSums<acc_t> sums_with_gradient(const Evaluation& columns, const Side& teacher, const Side& student,
                                                 int64_t row) const {
    RowSums<acc_t> mine;
    if constexpr (Divergence::kGradQSumsToZero) {
      const auto to = Side::target(args_.grad_student, row);
      this->template walk<Use::kOnce>(teacher, student, [&](const auto& t, const auto& s, uint32_t first, int n) {
        Group<acc_t> gradient;
        mine.term += columns.sum_with_gradient(t, s, gradient);
        columns.add_cross_entropy(s, first, gradient);
        store(args_.grad_student, to, student, gradient, first, n);
      });
    }
    return block_reduce(mine, Plus());
  }

  // Phase 3.
  KLDIV_DEVICE void write_gradients(const Evaluation& columns, const Side& teacher, const Side& student,
                                    int64_t row) const {
    const auto to_student = Side::target(args_.grad_student, row);
    const auto to_teacher = Side::target(args_.grad_teacher, row);
    this->template walk<Use::kOnce>(teacher, student, [&](const auto& t, const auto& s, uint32_t first, int n) {
      if (args_.grad_student.out.data) {
        Group<acc_t> gradient = columns.student_gradient(t, s);
        columns.add_cross_entropy(s, first, gradient);
        store(args_.grad_student, to_student, student, gradient, first, n);
      }
      if (args_.grad_teacher.out.data) {
        store(args_.grad_teacher, to_teacher, teacher, columns.teacher_gradient(t, s), first, n);
      }
    });
  }

  KLDIV_DEVICE static void store(const LogitsGradient& to, typename Side::Target row, const Side& side,
                                 const Group<acc_t>& gradient, uint32_t first, int n) {
    Side::store(to, row, first, n, side.chained(gradient, first, n));
  }

  KLDIV_DEVICE void save(int64_t row, acc_t loss, const RowConstants<acc_t>& constants) const {
    if (device::thread() > 0) return;
    static_cast<acc_t*>(args_.row_loss)[row] = loss;
    static_cast<RowConstants<acc_t>*>(args_.row_constants)[row] = constants;
  }

  // Columns from `begin` on.
  KLDIV_DEVICE void fill_zero(const LogitsGradient& gradient, int64_t row, int64_t begin) const {
    if (gradient.out.data == nullptr || begin == gradient.columns) return;
    const auto to = Side::target(gradient, row);
    const auto body = [&](uint32_t first, int n) { Side::store(gradient, to, begin + first, n, Group<acc_t>{}); };
    for_each_group<acc_t, uint32_t>(gradient.columns - begin, device::thread(), device::threads(), body);
  }

  const DistillationArgs& args_;
  const Divergence& divergence_;
};

// What token_stats tells of a row.
template <typename Side>
class StatsWalk : RowReader<Side> {
 public:
  using acc_t = typename Side::acc_t;

  KLDIV_DEVICE StatsWalk(const TokenStatsArgs& args, const Scaling<acc_t>& scaling)
      : RowReader<Side>(args, scaling), args_(args) {}

  KLDIV_DEVICE void operator()(int64_t row) const {
    RowStats<acc_t>& stats = static_cast<RowStats<acc_t>*>(args_.row_stats)[row];
    if (args_.row_scale && static_cast<const acc_t*>(args_.row_scale)[row] == 0) {
      if (device::thread() == 0) stats = RowStats<acc_t>();
      return;
    }
    const Side teacher(args_.teacher, scaling_.teacher, row), student(args_.student, scaling_.student, row);
    const RowConstants<acc_t> constants(state(teacher, student, false));
    Part mine;
    this->template walk<Use::kOnce>(teacher, student, [&](const auto& t, const auto& s, uint32_t first, int n) {
      mine = mine + part(t, s, constants, first, n);
    });
    const Part all = block_reduce(mine, Plus());
    if (device::thread() > 0) return;
    acc_t student_label = 0, teacher_label = 0;
    if (args_.labels) {
      const int64_t label = args_.labels[row];
      const bool is_column = label >= 0 && label < args_.columns;
      student_label = is_column ? student.template load<Use::kAgain>(label, 1, 0).x[0] : nan<acc_t>();
      teacher_label = is_column ? teacher.template load<Use::kAgain>(label, 1, 0).x[0] : nan<acc_t>();
    }
    stats = RowStats<acc_t>(constants, all.sums, scaling_.inverse_temperature, student_label, teacher_label,
                            all.student_top == all.teacher_top && all.student_top != kNone);
  }

 private:
  using RowReader<Side>::scaling_, RowReader<Side>::state;
  static constexpr uint32_t kNone = 0xffffffff;

  // Of some columns: their sums, and the first one that holds the row's largest logit, if any.
  struct Part {
    StatsSums<acc_t> sums;
    uint32_t student_top = kNone, teacher_top = kNone;

    KLDIV_DEVICE Part operator+(const Part& other) const {
      Part both;
      both.sums = sums + other.sums;
      both.student_top = student_top < other.student_top ? student_top : other.student_top;
      both.teacher_top = teacher_top < other.teacher_top ? teacher_top : other.teacher_top;
      return both;
    }
  };

  KLDIV_DEVICE Part part(const Group<acc_t>& teacher, const Group<acc_t>& student, const RowConstants<acc_t>& constants,
                         uint32_t first, int n) const {
    Part part;
    KLDIV_UNROLL
    for (int i = kGroup<acc_t> - 1; i >= 0; --i) {  // the first of several comes last
      if (i >= n) continue;
      part.sums = part.sums + StatsSums<acc_t>::of(teacher.x[i], student.x[i], constants, scaling_.inverse_temperature);
      if (teacher.x[i] == constants.teacher.max) part.teacher_top = first + i;
      if (student.x[i] == constants.student.max) part.student_top = first + i;
    }
    return part;
  }

  const TokenStatsArgs& args_;
};

// This block's rows, counted in 32 bits: every register that lives through a row counts.
template <typename Walk>
KLDIV_DEVICE void for_each_row(int64_t rows, const Walk& walk) {
  KLDIV_NO_UNROLL
  for (uint32_t turn = 0; device::block() + turn * device::blocks() < rows; ++turn) {
    walk(device::block() + turn * device::blocks());
  }
}

template <typename Side, typename Divergence>
KLDIV_KERNEL(max_row_threads<typename Side::acc_t>)
distil_rows(KLDIV_ARGUMENT DistillationArgs args, KLDIV_ARGUMENT Divergence divergence,
            KLDIV_ARGUMENT Scaling<typename Side::acc_t> scaling) {
  const RowWalk<Side, Divergence> walk(args, divergence, scaling);
  for_each_row(args.rows, walk);
}

template <typename Side>
KLDIV_KERNEL(max_row_threads<typename Side::acc_t>)
stats_of_rows(KLDIV_ARGUMENT TokenStatsArgs args, KLDIV_ARGUMENT Scaling<typename Side::acc_t> scaling) {
  const StatsWalk<Side> walk(args, scaling);
  for_each_row(args.rows, walk);
}

// Host side, for one kind of Side.
template <typename Side>
void launch_rows(const DistillationArgs& args, void* stream) {
  using acc_t = typename Side::acc_t;
  dispatch_divergence(args.divergence, args.parameter, [&](const auto& divergence) {
    using Divergence = std::decay_t<decltype(divergence)>;
    // Quotients are made here: many GPUs are slow in double.
    device::launch(distil_rows<Side, Divergence>, row_blocks(args.rows), row_threads<acc_t>(args.columns), stream, args,
                   divergence, Scaling<acc_t>(args));
  });
}

template <typename Side>
void launch_stats(const TokenStatsArgs& args, void* stream) {
  using acc_t = typename Side::acc_t;
  device::launch(stats_of_rows<Side>, row_blocks(args.rows), row_threads<acc_t>(args.columns), stream, args,
                 Scaling<acc_t>(args));
}

}  // namespace kldiv::cuda
