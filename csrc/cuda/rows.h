// What is done with a row on a CUDA device, whoever shares it (team.h) and however it is read (walks.h).
#pragma once

#include "columns.h"
#include "launch.h"
#include "shapes.h"
#include "walks.h"

namespace kldiv::cuda {

// What every kernel over rows begins with.
template <typename Walk>
class RowReader {
 public:
  using Side = typename Walk::Side;
  using acc_t = typename Side::acc_t;
  using Narrow = typename Side::Narrow;
  using TeamType = typename Walk::TeamType;

  KLDIV_DEVICE RowReader(const LogitsArgs& args, const Scaling<acc_t>& scaling, TeamType& team)
      : scaling_(scaling), team_(team), walk_(args, scaling, team) {}

 protected:
  // Phase 1; with the terms of a divergence, or NoTerms, and bases not below `least`. `references`: whether what is
  // beside the bases is asked for.
  template <typename Terms>
  KLDIV_DEVICE RowState<acc_t> state(const Side& teacher, const Side& student, const RowState<acc_t>& least,
                                     bool references, bool hard, const Terms& terms) {
    const acc_t hard_inverse_temperature = scaling_.hard_inverse_temperature;
    const bool one_temperature = scaling_.inverse_temperature == hard_inverse_temperature;
    const bool apart = hard && !one_temperature;
    ThreadState<acc_t, Terms, Narrow> thread(terms, least, references);
    LogSumExp<acc_t> of_hard;
    walk_.template walk<Pass::kFirst>(teacher, student, false, [&](const auto& group, const Place&) {
      thread.add(group, scaling_.inverse_temperature);
      if (apart) of_hard = extended(of_hard, group.student, hard_inverse_temperature);
    });
    RowState<acc_t> mine = thread.state();
    mine.hard = of_hard;
    RowState<acc_t> all = team_.all(mine, MergeStates<acc_t, Terms>{terms, scaling_, references, apart});
    if (hard && one_temperature) all.hard = all.student;
    return all;
  }

  const Scaling<acc_t>& scaling_;
  TeamType& team_;
  Walk walk_;
};

// Loss and gradients.
template <typename Walk, typename Divergence>
class RowDistillation : RowReader<Walk> {
 public:
  using typename RowReader<Walk>::Side, typename RowReader<Walk>::acc_t, typename RowReader<Walk>::TeamType;

  KLDIV_DEVICE RowDistillation(const DistillationArgs& args, const Divergence& divergence,
                               const Scaling<acc_t>& scaling, TeamType& team)
      : RowReader<Walk>(args, scaling, team), args_(args), divergence_(divergence) {}

  // All rows of this team.
  KLDIV_DEVICE void operator()() {
    int64_t row = next_that_counts(team_.index());
    if constexpr (requires { walk_.fetch(row); }) walk_.fetch(row);
    KLDIV_NO_UNROLL
    while (row < args_.rows) {
      walk_.begin();
      row = distil(row);
    }
  }

 private:
  // How far off, in units of epsilon and relatively, a divergence may be that one pass tells; otherwise there is a
  // second one. In float these are 1e-5 and, of near rows, 1e-3.
  static constexpr acc_t kError = 84, kNearError = 8400, kNear = kIsFloat<acc_t> ? static_cast<acc_t>(5e-5) : 0;

  using Evaluation = Columns<acc_t, Divergence, typename Side::Narrow>;
  using RowReader<Walk>::scaling_, RowReader<Walk>::team_, RowReader<Walk>::walk_, RowReader<Walk>::state;

  // `row`, or the first one of this team's after it whose position counts. Others are not read.
  KLDIV_DEVICE int64_t next_that_counts(int64_t row) const {
    KLDIV_NO_UNROLL
    for (; row < args_.rows; row += team_.count()) {
      if (row_scale(row) != 0 && (args_.soft_scale != 0 || args_.hard_scale != 0)) break;
      fill_zero(args_.grad_student, row, 0);
      fill_zero(args_.grad_teacher, row, 0);
      if (args_.row_loss) save(row, 0, RowConstants<acc_t>());
    }
    return row;
  }
  KLDIV_DEVICE acc_t row_scale(int64_t row) const {
    return args_.row_scale ? static_cast<const acc_t*>(args_.row_scale)[row] : 1;
  }

  // Whether there are gradients that need a sum over the row, now or later.
  KLDIV_DEVICE bool needs_sums_of_gradients() const {
    return (args_.wanted.student && !Divergence::kGradQSumsToZero) ||
           (args_.wanted.teacher && !Divergence::kGradPSumsToZero);
  }

  // Returns the row after it.
  KLDIV_DEVICE int64_t distil(int64_t row) {
    const bool forward = args_.row_loss != nullptr;
    const acc_t scale = row_scale(row);
    const acc_t soft = args_.soft_scale == 0 ? 0 : static_cast<acc_t>(args_.soft_scale) * scale;
    const bool labelled = args_.hard_scale != 0;  // only then are there labels, whatever the scales are
    acc_t hard = labelled ? static_cast<acc_t>(args_.hard_scale) * scale : 0;
    const Side teacher(args_.teacher, scaling_.teacher, row), student(args_.student, scaling_.student, row);
    const bool gradients = args_.grad_student.out.data || args_.grad_teacher.out.data;
    const bool together = Divergence::kGradQSumsToZero && gradients && !args_.wanted.teacher;
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
    RowState<acc_t> least, state;
    acc_t label_logit = 0;  // read before phase 1: the gradient may lie over the logits
    if (forward && labelled) {
      // Nothing of the cross entropy cancels if the label's logit is not above what all is relative to.
      label_logit = student.logit(label);
      least.teacher.max = least.beside_student_max = teacher.logit(label);
      least.student.max = least.beside_teacher_max = label_logit;
    }
    const bool references = needs_sums_of_gradients();
    bool one_pass = OnePass<Divergence> && forward && !gradients && !references;
    if constexpr (OnePass<Divergence>) {
      if (one_pass) state = this->state(teacher, student, least, false, labelled, divergence_);
    }
    if (forward && !one_pass) state = this->state(teacher, student, least, references, labelled, NoTerms());
    RowConstants<acc_t> constants;
    if (forward) {
      constants =
          RowConstants<acc_t>(state, divergence_, scaling_.inverse_temperature, args_.wanted, typename Side::Narrow());
      if (labelled) {  // relative to the same base as all else of the student's
        constants.hard_log2_sum +=
            (state.hard.max - state.student.max) * scaling_.hard_inverse_temperature * static_cast<acc_t>(kLog2E);
      }
    } else {
      constants = static_cast<const RowConstants<acc_t>*>(args_.row_constants)[row];
    }
    const int64_t next = next_that_counts(row + team_.count());
    walk_.prepare(next);
    // 0 * log_ratio makes the whole row NaN where one of its logits is.
    const acc_t factor = soft * grad * scaling_.inverse_temperature + 0 * constants.log_ratio;
    const acc_t hard_factor = labelled ? hard * grad * scaling_.hard_inverse_temperature : 0;
    const Evaluation columns{divergence_, constants, scaling_, factor, hard_factor, label};
    if (forward) {
      acc_t loss = 0;
      if (labelled) {
        loss = hard * cross_entropy(label_logit, constants.student.max, constants.hard_log2_sum,
                                    scaling_.hard_inverse_temperature);
      }
      RowSums<acc_t> total;
      if constexpr (OnePass<Divergence>) {
        if (one_pass) {
          const auto [value, error] = state.one_pass_term(divergence_);
          one_pass = error <= (value < kNear ? kNearError : kError) * value;  // not where either is NaN
          total.term = value;
        }
      }
      if (!one_pass) {
        total =
            together ? sums_with_gradient(columns, teacher, student, row) : sums(columns, teacher, student, !gradients);
      } else if constexpr (requires { walk_.fetch(next); }) {
        walk_.fetch(next);
      }
      constants.set_sums(total);
      // The probability of a column that the other side excludes may have underflowed: 0 * inf.
      const bool infinite = total.term != total.term && constants.log_ratio == constants.log_ratio;
      save(row, loss + soft * (infinite ? infinity<acc_t>() : total.term), constants);
    }
    if (!gradients) return next;
    if (!(forward && together)) write_gradients(columns, teacher, student, row);
    fill_zero(args_.grad_student, row, args_.columns);
    fill_zero(args_.grad_teacher, row, args_.columns);
    return next;
  }

  // Phase 2.
  KLDIV_DEVICE RowSums<acc_t> sums(const Evaluation& columns, const Side& teacher, const Side& student, bool last) {
    RowSums<acc_t> mine;
    walk_.template walk<Pass::kMiddle>(teacher, student, last, [&](const auto& group, const Place&) {
      mine = mine + columns.sums(group, args_.wanted);
    });
    return team_.all(mine, Sum());
  }

  // Phases 2 and 3 of the student's gradient in one walk, where nothing of phase 3 has to wait for a sum.
  KLDIV_DEVICE RowSums<acc_t> sums_with_gradient(const Evaluation& columns, const Side& teacher, const Side& student,
                                                 int64_t row) {
    RowSums<acc_t> mine;
    if constexpr (Divergence::kGradQSumsToZero) {
      const auto to = Side::target(args_.grad_student, row);
      walk_.template walk<Pass::kLast>(teacher, student, true, [&](const auto& group, const Place& place) {
        Group<acc_t> gradient = columns.cross_entropy_gradient(group.student, place);
        mine.term += columns.sum_with_gradient(group, gradient);
        Side::store(args_.grad_student, to, place, student.chained(gradient, place));
      });
    }
    return team_.all(mine, Sum());
  }

  // Phase 3.
  KLDIV_DEVICE void write_gradients(const Evaluation& columns, const Side& teacher, const Side& student, int64_t row) {
    const auto to_student = Side::target(args_.grad_student, row);
    const auto to_teacher = Side::target(args_.grad_teacher, row);
    walk_.template walk<Pass::kLast>(teacher, student, true, [&](const auto& group, const Place& place) {
      if (args_.grad_student.out.data) {
        Group<acc_t> gradient = columns.cross_entropy_gradient(group.student, place);
        columns.add_student_gradient(group, gradient);
        Side::store(args_.grad_student, to_student, place, student.chained(gradient, place));
      }
      if (args_.grad_teacher.out.data) {
        Side::store(args_.grad_teacher, to_teacher, place, teacher.chained(columns.teacher_gradient(group), place));
      }
    });
  }

  KLDIV_DEVICE void save(int64_t row, acc_t loss, const RowConstants<acc_t>& constants) const {
    if (!team_.is_first_thread()) return;
    static_cast<acc_t*>(args_.row_loss)[row] = loss;
    static_cast<RowConstants<acc_t>*>(args_.row_constants)[row] = constants;
  }

  // Columns from `begin` on.
  KLDIV_DEVICE void fill_zero(const LogitsGradient& gradient, int64_t row, int64_t begin) const {
    if (gradient.out.data == nullptr || begin == gradient.columns) return;
    const auto to = Side::target(gradient, row, begin);
    Places<acc_t>(gradient.columns - begin, team_).for_each([&](const Place& place) {
      Side::store(gradient, to, place, Group<acc_t>{});
    });
  }

  const DistillationArgs& args_;
  const Divergence& divergence_;
};

// What token_stats tells.
template <typename Walk>
class RowTokenStats : RowReader<Walk> {
 public:
  using typename RowReader<Walk>::Side, typename RowReader<Walk>::acc_t, typename RowReader<Walk>::TeamType;

  KLDIV_DEVICE RowTokenStats(const TokenStatsArgs& args, const Scaling<acc_t>& scaling, TeamType& team)
      : RowReader<Walk>(args, scaling, team), args_(args) {}

  KLDIV_DEVICE void operator()() {
    KLDIV_NO_UNROLL
    for (int64_t row = team_.index(); row < args_.rows; row += team_.count()) tell(row);
  }

 private:
  using RowReader<Walk>::scaling_, RowReader<Walk>::team_, RowReader<Walk>::walk_, RowReader<Walk>::state;

  KLDIV_DEVICE void tell(int64_t row) {
    RowStats<acc_t>& stats = static_cast<RowStats<acc_t>*>(args_.row_stats)[row];
    if (args_.row_scale && static_cast<const acc_t*>(args_.row_scale)[row] == 0) {
      if (team_.is_first_thread()) stats = RowStats<acc_t>();
      return;
    }
    const Side teacher(args_.teacher, scaling_.teacher, row), student(args_.student, scaling_.student, row);
    const RowConstants<acc_t> constants(state(teacher, student, {}, false, false, Maxima()));
    Part mine;
    walk_.template walk<Pass::kLast>(teacher, student, true, [&](const auto& group, const Place& place) {
      mine = mine + part(group, constants, place);
    });
    const Part all = team_.all(mine, Sum());
    if (!team_.is_first_thread()) return;
    acc_t student_label = 0, teacher_label = 0;
    if (args_.labels) {
      const int64_t label = args_.labels[row];
      const bool is_column = label >= 0 && label < args_.columns;
      student_label = is_column ? student.logit(label) : nan<acc_t>();
      teacher_label = is_column ? teacher.logit(label) : nan<acc_t>();
    }
    stats = RowStats<acc_t>(constants, all.sums, scaling_.inverse_temperature, student_label, teacher_label,
                            all.student.column == all.teacher.column);
  }

  // Of some columns of one side: the first one with the largest logit.
  struct Top {
    acc_t logit = -infinity<acc_t>();
    uint32_t column = 0xffffffff;

    KLDIV_DEVICE Top operator+(const Top& other) const {
      const bool mine = logit > other.logit || (logit == other.logit && column < other.column);
      return mine ? *this : other;
    }
  };

  // Of some columns.
  struct Part {
    StatsSums<acc_t> sums;
    Top student, teacher;

    KLDIV_DEVICE Part operator+(const Part& other) const {
      return {sums + other.sums, student + other.student, teacher + other.teacher};
    }
  };

  KLDIV_DEVICE Part part(const Groups<acc_t>& group, const RowConstants<acc_t>& constants, const Place& place) const {
    const auto& [teacher, student] = group;
    Part part;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      if (i >= place.n) continue;
      const auto sums = StatsSums<acc_t>::of(teacher.x[i], student.x[i], constants, scaling_.inverse_temperature,
                                             typename Side::Narrow());
      part = part + Part{sums, {student.x[i], place.column(i)}, {teacher.x[i], place.column(i)}};
    }
    return part;
  }

  const TokenStatsArgs& args_;
};

// Whether a side is DenseSide in float.
template <typename Side>
constexpr bool kIsFast = requires { typename Side::scalar_t; } && kIsFloat<typename Side::acc_t>;

template <typename Side>
constexpr int max_row_threads = kIsFast<Side> ? kMaxRowThreads : kMaxSlowRowThreads;

// `width` threads of a block share a row: part of a warp, or all; or, where nothing is summed over it, `blocks` do.
template <typename Side, typename Divergence>
KLDIV_KERNEL(max_row_threads<Side>, 1)
distil_rows(KLDIV_ARGUMENT DistillationArgs args, KLDIV_ARGUMENT Divergence divergence,
            KLDIV_ARGUMENT Scaling<typename Side::acc_t> scaling, int width, int blocks) {
  Team<false> team(width, blocks);
  RowDistillation<Streamed<Side>, Divergence>(args, divergence, scaling, team)();
}

// `blocks` share a row.
template <typename Side, typename Divergence>
KLDIV_KERNEL(kMaxClusterThreads, kClusterBlocksPerMultiprocessor)
distil_resident_rows(KLDIV_ARGUMENT DistillationArgs args, KLDIV_ARGUMENT Divergence divergence,
                     KLDIV_ARGUMENT Scaling<typename Side::acc_t> scaling, int blocks) {
  Team<true> team(device::threads(), blocks, args.scratch);
  RowDistillation<Resident<Side>, Divergence>(args, divergence, scaling, team)();
}

template <typename Side>
KLDIV_KERNEL(max_row_threads<Side>, 1)
stats_of_rows(KLDIV_ARGUMENT TokenStatsArgs args, KLDIV_ARGUMENT Scaling<typename Side::acc_t> scaling, int width) {
  Team<false> team(width);
  RowTokenStats<Streamed<Side>>(args, scaling, team)();
}

// Host side, for one kind of Side.
template <typename Side>
void launch_rows(const DistillationArgs& args, void* stream) {
  using acc_t = typename Side::acc_t;
  dispatch_divergence(args.divergence, args.parameter, [&](auto divergence) {
    using Divergence = decltype(divergence);
    if constexpr (HasBalanced<Divergence, acc_t>) divergence.prepare();
    const Scaling<acc_t> scaling(args);  // quotients are made here: many GPUs are slow in double
    if constexpr (kIsFast<Side>) {
      if (args.row_loss) {  // a backward of its own reads a row but once as it is
        const auto kernel = distil_resident_rows<Side, Divergence>;
        const auto active = [&](const device::Shape& shape) { return device::active_clusters(kernel, shape); };
        const device::Properties& properties = device::properties();
        const device::Shape shape =
            resident_shape(properties, args.rows, args.columns, sizeof(typename Side::scalar_t), active);
        if (shape.blocks > 0) {
          if (shape.cluster > 1 && !properties.clusters) {
            const int warps = shape.cluster * shape.threads / device::kWarp;
            device::clear(args.scratch, meeting_bytes(shape.blocks / shape.cluster, warps), stream);
          }
          return device::launch(kernel, shape, stream, args, divergence, scaling, shape.cluster);
        }
      }
    }
    const RowShape streamed = row_shape(args.rows, args.columns, max_row_threads<Side>, args.row_loss != nullptr);
    device::launch(distil_rows<Side, Divergence>, streamed.shape, stream, args, divergence, scaling, streamed.width,
                   streamed.blocks);
  });
}

template <typename Side>
void launch_stats(const TokenStatsArgs& args, void* stream) {
  using acc_t = typename Side::acc_t;
  const RowShape shape = row_shape(args.rows, args.columns, max_row_threads<Side>, true);
  device::launch(stats_of_rows<Side>, shape.shape, stream, args, Scaling<acc_t>(args), shape.width);
}

}  // namespace kldiv::cuda
