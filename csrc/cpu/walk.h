// How rows are walked on a CPU: chunk by chunk, converted to acc_t in the L1 cache, vector by vector.
// Included once per instruction set.
#pragma once

#include <memory>

#include "../row_state.h"
#include "../scalar_types.h"
#include "kernels.h"
#include "simd.h"

namespace kldiv::cpu {
inline namespace KLDIV_ISA {

template <typename acc_t>
int padded(int64_t n) {
  return static_cast<int>((n + kLanes<acc_t> - 1) / kLanes<acc_t> * kLanes<acc_t>);
}

// One chunk of a row as acc_t, filled up to whole vectors with `padding`: the row itself where it can be
// used as it lies, else a converted copy in `buffer` [kChunk].
template <typename acc_t>
const acc_t* stage(const Matrix& matrix, int64_t row_offset, int64_t begin, int64_t n, acc_t padding, acc_t* buffer) {
  const int64_t stride = matrix.layout.column_stride;
  const acc_t* staged = buffer;
  dispatch_dtype(matrix.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const scalar_t* source = static_cast<const scalar_t*>(matrix.data) + row_offset + begin * stride;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (stride == 1 && n % kLanes<acc_t> == 0) {
        staged = source;
        return;
      }
    }
    int64_t i = 0;
    if (stride == 1) {
      for (; i + kLanes<acc_t> <= n; i += kLanes<acc_t>) store(buffer + i, load_as<acc_t>(source + i));
    } else if (stride == 0) {
      const Vec<acc_t> same = splat<Vec<acc_t>>(widen<acc_t>(*source));
      for (; i + kLanes<acc_t> <= n; i += kLanes<acc_t>) store(buffer + i, same);
    }
    for (; i < n; ++i) buffer[i] = widen<acc_t>(source[i * stride]);
    for (; i < padded<acc_t>(n); ++i) buffer[i] = padding;
  });
  return staged;
}

// Where the results of one chunk go: the output itself where it takes acc_t as it is, else a buffer that
// commit() converts.
template <typename acc_t>
class Sink {
 public:
  // `shared`: what is still to be read lies where the output goes.
  acc_t* open(const Output& output, Dtype acc_dtype, int64_t offset, int64_t n, int64_t stride = 1,
              bool shared = false) {
    output_ = output;
    offset_ = offset;
    n_ = n;
    stride_ = stride;
    direct_ = output.dtype == acc_dtype && n % kLanes<acc_t> == 0 && stride == 1 && !shared;
    return direct_ ? static_cast<acc_t*>(output.data) + offset : buffer_;
  }

  void commit() const {
    if (direct_) return;
    dispatch_dtype(output_.dtype, [&](auto type) {
      using scalar_t = decltype(type);
      scalar_t* out = static_cast<scalar_t*>(output_.data) + offset_;
      int64_t i = 0;
      if (stride_ == 1) {
        for (; i + kLanes<acc_t> <= n_; i += kLanes<acc_t>) store_as(out + i, load(buffer_ + i));
      }
      for (; i < n_; ++i) out[i * stride_] = narrow<scalar_t>(buffer_[i]);
    });
  }

 private:
  Output output_;
  int64_t offset_, n_, stride_;
  bool direct_ = true;
  alignas(64) acc_t buffer_[kChunk];
};

// Columns from `begin` on.
inline void fill_zero(const LogitsGradient& gradient, int64_t row, int64_t begin) {
  if (gradient.out.data == nullptr || begin == gradient.columns) return;
  const int64_t stride = gradient.layout.column_stride;
  dispatch_dtype(gradient.out.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    scalar_t* out = static_cast<scalar_t*>(gradient.out.data) + gradient.layout.offset(row);
    if (stride == 1) {
      __builtin_memset(out + begin, 0, (gradient.columns - begin) * sizeof(scalar_t));
    } else {
      for (int64_t i = begin; i < gradient.columns; ++i) out[i * stride] = scalar_t{};
    }
  });
}

// parts[0] <- parts[0] + ... + parts[n - 1], as a balanced tree.
template <typename Part, typename Merge>
Part fold(Part* parts, int64_t n, const Merge& merge) {
  for (int64_t width = 1; width < n; width *= 2) {
    for (int64_t i = 0; i + width < n; i += 2 * width) parts[i] = merge(parts[i], parts[i + width]);
  }
  return parts[0];
}

template <typename Body>
void parallel_for(const Threads& threads, int64_t n, int64_t grain, const Body& body) {
  if (threads.count == 1 || n <= grain) {
    body(0, n);
    return;
  }
  threads.parallel_for(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// ---------------------------------------------------------------- divergences from logits

// What will be read soon, fetched line by line while something else is computed: otherwise memory and arithmetic
// would take turns.
struct Prefetch {
  const char* at;
  int64_t step;  // bytes per element

  KLDIV_HD void operator()(int64_t i) const { __builtin_prefetch(at + i * step); }
};

template <typename acc_t>
acc_t largest(const acc_t* x, int n) {
  using V = Vec<acc_t>;
  V best[4];  // as many as hide the latency of a comparison
  for (V& part : best) part = -infinity<V>();
  int i = 0;
  for (; i + 4 * kLanes<acc_t> <= n; i += 4 * kLanes<acc_t>) {
    for (int j = 0; j < 4; ++j) best[j] = maximum(best[j], load(x + i + j * kLanes<acc_t>));
  }
  for (; i < n; i += kLanes<acc_t>) best[0] = maximum(best[0], load(x + i));
  return max_lanes(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
}

// Phase 1 over one chunk.
template <typename acc_t>
RowState<acc_t> state_of(const acc_t* teacher, const acc_t* student, int n, acc_t inverse_temperature,
                         Prefetch next_teacher, Prefetch next_student) {
  using V = Vec<acc_t>;
  RowState<acc_t> state;
  state.teacher.max = largest(teacher, n);
  state.student.max = largest(student, n);
  const acc_t teacher_offset = state.teacher.offset(), student_offset = state.student.offset();
  V teacher_sum{}, student_sum{}, difference{};
  for (int i = 0; i < n; i += kLanes<acc_t>) {
    next_teacher(i);
    next_student(i);
    const ExpPair<V> x(load(teacher + i), load(student + i), teacher_offset, student_offset, inverse_temperature);
    teacher_sum += x.teacher;
    student_sum += x.student;
    difference += x.difference;
  }
  state.teacher.sum = sum_lanes(teacher_sum);
  state.student.sum = sum_lanes(student_sum);
  state.difference = sum_lanes(difference);
  return state;
}

// The student's alone, at the temperature of the cross entropy.
template <typename acc_t>
LogSumExp<acc_t> log_sum_exp(const acc_t* x, acc_t max, int n, acc_t inverse_temperature) {
  LogSumExp<acc_t> state{max, 0};
  const acc_t offset = state.offset(), per_bit = inverse_temperature * static_cast<acc_t>(kLog2E);
  Vec<acc_t> sum{};
  for (int i = 0; i < n; i += kLanes<acc_t>) sum += exp2_floored((load(x + i) - offset) * per_bit);
  state.sum = sum_lanes(sum);
  return state;
}

// What is made of one side's derivative, known to the compiler: a branch in the loop over columns would cost more than
// either form.
enum class Form { kNone, kPlain, kShifted };

// Calls function(the form, as std::integral_constant).
template <typename Divergence, typename acc_t, typename Function>
auto with_form(bool wanted, const SideConstants<acc_t>& side, const Function& function) {
  if (!wanted) return function(std::integral_constant<Form, Form::kNone>());
  if constexpr (HasShifted<Divergence, acc_t>) {
    if (side.shifted()) return function(std::integral_constant<Form, Form::kShifted>());
  }
  return function(std::integral_constant<Form, Form::kPlain>());
}

// One side of a vector of columns, from column i on, itself in the student's place; see evaluate().
template <bool kSums, bool kStore, Form form, typename acc_t, typename Divergence>
KLDIV_HD void evaluate_side(const Divergence& divergence, const SideConstants<acc_t>& side, const Pair<Vec<acc_t>>& x,
                            acc_t factor, int i, Vec<acc_t>& sum, acc_t* gradient) {
  constexpr std::bool_constant<form == Form::kShifted> shifted;
  if constexpr (form == Form::kNone) {
    return;
  } else if constexpr (kSums && !Divergence::kGradQSumsToZero) {
    const Vec<acc_t> g = side.grad(divergence, x, shifted);
    sum += g;
    if constexpr (kStore) store(gradient + i, g);
  } else if constexpr (kStore) {
    store(gradient + i, side.gradient(divergence, x, shifted) * factor);
  }
}

// Phases 2 and 3 over one chunk. kSums: the sums are taken. kStore: gradients are written, or, with kSums, while the
// sums that some of them need are not known, those without the sums' share, for finish().
template <bool kSums, bool kStore, Form kStudent, Form kTeacher, typename acc_t, typename Divergence>
RowSums<acc_t> evaluate(const Divergence& divergence, const RowConstants<acc_t>& row, const acc_t* teacher,
                        const acc_t* student, int n, acc_t inverse_temperature, acc_t factor, acc_t* grad_student,
                        acc_t* grad_teacher, Prefetch next_teacher, Prefetch next_student) {
  using V = Vec<acc_t>;
  RowSums<V> sums;
  for (int i = 0; i < n; i += kLanes<acc_t>) {
    next_teacher(i);
    next_student(i);
    const Pair<V> x = make_pair(load(teacher + i), load(student + i), row, inverse_temperature);
    if constexpr (kSums) sums.term += divergence.term(x);
    evaluate_side<kSums, kStore, kStudent>(divergence, row.student, x, factor, i, sums.grad_q, grad_student);
    evaluate_side<kSums, kStore, kTeacher>(exchanged(divergence), row.teacher, x.exchanged(), factor, i, sums.grad_p,
                                           grad_teacher);
  }
  return {sum_lanes(sums.term), sum_lanes(sums.grad_q), sum_lanes(sums.grad_p)};
}

// Phase 3 for one side, from the bare derivatives that evaluate() left: cheaper than all again.
template <typename acc_t>
void finish(const acc_t* bare, const acc_t* logits, int n, const SideConstants<acc_t>& side, acc_t inverse_temperature,
            acc_t factor, acc_t* gradient, Prefetch next) {
  for (int i = 0; i < n; i += kLanes<acc_t>) {
    next(i);
    const Vec<acc_t> share = probability(load(logits + i), side.max, side.log2_sum, inverse_temperature);
    store(gradient + i, (load(bare + i) - share * side.sum_grad) * factor);
  }
}

// One side of all rows.
template <typename acc_t>
struct Side {
  const Matrix& logits;
  const LogitMap<acc_t> map;
};

// One side of a chunk of a row, mapped, as acc_t.
template <typename acc_t>
class Chunk {
 public:
  Chunk(const Side<acc_t>& side, int64_t row, int64_t index, int64_t columns)
      : begin(index * kChunk),
        size(columns - begin < kChunk ? columns - begin : kChunk),
        padded_size(padded<acc_t>(size)),
        data(mapped(side, row)) {}
  Chunk(const Chunk&) = delete;

  const int64_t begin, size;
  const int padded_size;
  const acc_t* const data;

 private:
  const acc_t* mapped(const Side<acc_t>& side, int64_t row) {
    const acc_t padding = -infinity<acc_t>();  // a column with p = q = 0
    const acc_t* logits = stage(side.logits, side.logits.layout.offset(row), begin, size, padding, buffer_);
    if (side.map.is_identity()) return logits;
    for (int i = 0; i < padded_size; i += kLanes<acc_t>) store(buffer_ + i, side.map(load(logits + i)));
    for (int64_t i = size; i < padded_size; ++i) buffer_[i] = padding;
    return buffer_;
  }

  alignas(64) acc_t buffer_[kChunk];
};

// What every walk over a row begins with: its two sides, and phase 1. `for_each_chunk(chunks, body)` visits the chunks
// in order, or on several threads.
template <typename acc_t>
class RowReader {
 public:
  explicit RowReader(const LogitsArgs& args)
      : logits_(args),
        scaling_(args),
        chunks_(chunks_of(args.columns)),
        student_{args.student, scaling_.student},
        teacher_{args.teacher, scaling_.teacher},
        states_(new RowState<acc_t>[chunks_]) {}

 protected:
  // What is asked for of phase 1 besides the sums of the divergence.
  struct Extras {
    bool hard, beside_student_max, beside_teacher_max;
  };

  template <typename ForEachChunk>
  RowState<acc_t> state(int64_t row, const Extras& extras, const ForEachChunk& for_each_chunk) const {
    for_each_chunk(chunks_, [&](int64_t chunk) { states_[chunk] = state(row, chunk, extras.hard); });
    if (extras.beside_student_max) {
      RowState<acc_t>& state = largest(&RowState<acc_t>::student);
      state.beside_student_max = beside(student_, teacher_, row, &state - states_.get(), state.student.max);
    }
    if (extras.beside_teacher_max) {
      RowState<acc_t>& state = largest(&RowState<acc_t>::teacher);
      state.beside_teacher_max = beside(teacher_, student_, row, &state - states_.get(), state.teacher.max);
    }
    return fold(states_.get(), chunks_, [&](const auto& a, const auto& b) { return a.merged(b, scaling_); });
  }

  Chunk<acc_t> chunk(const Side<acc_t>& side, int64_t row, int64_t index) const {
    return Chunk<acc_t>(side, row, index, logits_.columns);
  }

  // Column `column` of a row and what follows; nothing new if there is no such row.
  Prefetch prefetch(const Matrix& matrix, int64_t row, int64_t column) const {
    const int64_t size = matrix.dtype == Dtype::kFloat64 ? 8 : (matrix.dtype == Dtype::kFloat32 ? 4 : 2);
    const int64_t offset = matrix.layout.offset(row < logits_.rows ? row : row - 1);
    const int64_t stride = matrix.layout.column_stride;
    return {static_cast<const char*>(matrix.data) + (offset + column * stride) * size, stride * size};
  }

  bool has_label(int64_t row) const { return logits_.labels[row] >= 0 && logits_.labels[row] < logits_.columns; }

  // NaN for a label that is no column.
  acc_t label_logit(const Side<acc_t>& side, int64_t row) const {
    if (!has_label(row)) return nan<acc_t>();
    acc_t logit[kLanes<acc_t>];
    stage(side.logits, side.logits.layout.offset(row), logits_.labels[row], 1, acc_t(0), logit);
    return side.map(logit[0]);
  }

  const LogitsArgs& logits_;
  const Scaling<acc_t> scaling_;
  const int64_t chunks_;
  const Side<acc_t> student_, teacher_;

 private:
  // The first chunk where one side is largest.
  RowState<acc_t>& largest(const LogSumExp<acc_t> RowState<acc_t>::* side) const {
    int64_t best = 0;
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      if ((states_[chunk].*side).max > (states_[best].*side).max) best = chunk;
    }
    return states_[best];
  }

  // The other side's largest logit where this side's is `max`, in one chunk.
  acc_t beside(const Side<acc_t>& side, const Side<acc_t>& other, int64_t row, int64_t index, acc_t max) const {
    const Chunk<acc_t> x = chunk(side, row, index), y = chunk(other, row, index);
    const Vec<acc_t> nothing = -infinity<Vec<acc_t>>();
    Vec<acc_t> best = nothing;
    for (int i = 0; i < x.padded_size; i += kLanes<acc_t>) {
      best = maximum(best, load(x.data + i) == max ? load(y.data + i) : nothing);
    }
    return max_lanes(best);
  }

  RowState<acc_t> state(int64_t row, int64_t index, bool hard) const {
    const Chunk<acc_t> teacher = chunk(teacher_, row, index), student = chunk(student_, row, index);
    const int64_t next = teacher.begin + kChunk;
    RowState<acc_t> state = state_of(teacher.data, student.data, teacher.padded_size, scaling_.inverse_temperature,
                                     prefetch(logits_.teacher, row, next), prefetch(logits_.student, row, next));
    if (hard) {
      state.hard =
          scaling_.hard_inverse_temperature == scaling_.inverse_temperature
              ? state.student
              : log_sum_exp(student.data, state.student.max, student.padded_size, scaling_.hard_inverse_temperature);
    }
    return state;
  }

  const std::unique_ptr<RowState<acc_t>[]> states_;
};

// Loss and gradients of a row.
template <typename acc_t, typename Divergence>
class RowWalk : RowReader<acc_t> {
 public:
  RowWalk(const DistillationArgs& args, const Divergence& divergence)
      : RowReader<acc_t>(args),
        args_(args),
        divergence_(divergence),
        sums_(new RowSums<acc_t>[chunks_]),
        of_student_(student_, &RowConstants<acc_t>::student, args.grad_student, Divergence::kGradQSumsToZero, args),
        of_teacher_(teacher_, &RowConstants<acc_t>::teacher, args.grad_teacher, Divergence::kGradPSumsToZero, args) {}

  template <typename ForEachChunk>
  void operator()(int64_t row, const ForEachChunk& for_each_chunk) const {
    acc_t* loss = args_.row_loss ? static_cast<acc_t*>(args_.row_loss) + row : nullptr;
    auto* constants = static_cast<RowConstants<acc_t>*>(args_.row_constants) + row;
    const acc_t scale = args_.row_scale ? static_cast<const acc_t*>(args_.row_scale)[row] : 1;
    const acc_t soft = args_.soft_scale == 0 ? 0 : static_cast<acc_t>(args_.soft_scale) * scale;
    const bool labelled = args_.hard_scale != 0;  // only then are there labels, whatever the scales are
    const acc_t hard = labelled ? static_cast<acc_t>(args_.hard_scale) * scale : 0;
    if (scale == 0 || (args_.soft_scale == 0 && !labelled)) {  // a position that does not count is not read
      fill_zero(args_.grad_student, row, 0);
      fill_zero(args_.grad_teacher, row, 0);
      if (loss) {
        *loss = 0;
        *constants = RowConstants<acc_t>();
      }
      return;
    }
    const bool gradients = of_student_.made || of_teacher_.made;
    const bool together = loss && gradients && of_student_.can_wait && of_teacher_.can_wait;
    if (loss) {
      const RowState<acc_t> state =
          this->state(row,
                      {args_.labels != nullptr, !Divergence::kGradQSumsToZero && args_.wanted.student,
                       !Divergence::kGradPSumsToZero && args_.wanted.teacher},
                      for_each_chunk);
      *constants = RowConstants<acc_t>(state, divergence_, scaling_.inverse_temperature, args_.wanted);
      *loss = !labelled ? 0
                        : hard * cross_entropy(label_logit(student_, row), constants->student.max,
                                               constants->hard_log2_sum, scaling_.hard_inverse_temperature);
    }
    const acc_t grad =
        args_.grad_output ? static_cast<const acc_t*>(args_.grad_output)[row * args_.grad_output_stride] : 1;
    // 0 * log_ratio makes the whole row NaN where one of its logits is.
    const Factors factors = {soft * grad * scaling_.inverse_temperature + 0 * constants->log_ratio,
                             labelled ? hard * grad * scaling_.hard_inverse_temperature : 0};
    if (loss) {
      for_each_chunk(chunks_, [&](int64_t chunk) {
        sums_[chunk] = together ? pass<true, true>(row, chunk, *constants, factors)
                                : pass<true, false>(row, chunk, *constants, factors);
      });
      const RowSums<acc_t> sums = fold(sums_.get(), chunks_, [](const auto& a, const auto& b) { return a + b; });
      constants->set_sums(sums);
      *loss += soft * sums.term;
    }
    if (!gradients) return;
    for_each_chunk(chunks_, [&](int64_t chunk) {
      if (!together) {
        pass<false, true>(row, chunk, *constants, factors);
        return;
      }
      finish_side(row, chunk, of_student_, *constants, factors);
      finish_side(row, chunk, of_teacher_, *constants, factors);
    });
    fill_zero(args_.grad_student, row, args_.columns);
    fill_zero(args_.grad_teacher, row, args_.columns);
  }

 private:
  using Reader = RowReader<acc_t>;
  using Reader::chunk, Reader::chunks_, Reader::has_label, Reader::label_logit, Reader::prefetch, Reader::scaling_,
      Reader::student_, Reader::teacher_;

  // What multiplies a row's gradient of the divergence and of the cross entropy.
  struct Factors {
    acc_t soft, hard;
  };

  // One side's gradient, and where its bare derivatives wait for their sum: in the gradient itself where it has room
  // for all their digits and nobody reads anything else there, else in a row that each thread keeps, unless that would
  // be large.
  struct Gradient {
    static constexpr int64_t kLongest = 131072;  // half a megabyte of float

    Gradient(const Side<acc_t>& side, const SideConstants<acc_t> RowConstants<acc_t>::* constants,
             const LogitsGradient& to, bool sums_to_zero, const DistillationArgs& args)
        : side(side),
          constants(constants),
          to(to),
          made(to.out.data != nullptr),
          waits(made && !sums_to_zero),
          shared(made && to.out.data == side.logits.data) {
      if (!waits || (to.out.dtype == args.acc_dtype() && to.layout.column_stride == 1 && !shared)) {
        bare = to;
      } else if (args.row_loss && args.columns <= kLongest) {
        row.reset(new acc_t[args.columns]);
        bare.out = {row.get(), args.acc_dtype()};
      }
      can_wait = !waits || bare.out.data;
    }

    const Side<acc_t>& side;
    const SideConstants<acc_t> RowConstants<acc_t>::* const constants;
    const LogitsGradient& to;
    const bool made, waits;
    const bool shared;  // it lies over the logits
    bool can_wait;
    LogitsGradient bare;
    std::unique_ptr<acc_t[]> row;
  };

  template <bool kSums, bool kStore>
  RowSums<acc_t> pass(int64_t row, int64_t index, const RowConstants<acc_t>& constants, const Factors& factors) const {
    const Chunk<acc_t> teacher = chunk(teacher_, row, index), student = chunk(student_, row, index);
    Sink<acc_t> student_sink, teacher_sink;
    acc_t *grad_student = nullptr, *grad_teacher = nullptr;
    if (kStore && args_.wanted.student) grad_student = open<kSums>(student_sink, of_student_, row, student);
    if (kStore && args_.wanted.teacher) grad_teacher = open<kSums>(teacher_sink, of_teacher_, row, teacher);
    const RowSums<acc_t> sums = with_form<Divergence>(args_.wanted.student, constants.student, [&](auto of_student) {
      return with_form<decltype(exchanged(divergence_))>(args_.wanted.teacher, constants.teacher, [&](auto of_teacher) {
        return evaluate<kSums, kStore, of_student(), of_teacher()>(
            divergence_, constants, teacher.data, student.data, teacher.padded_size, scaling_.inverse_temperature,
            factors.soft, grad_student, grad_teacher, prefetch(args_.teacher, row + 1, teacher.begin),
            prefetch(args_.student, row + 1, teacher.begin));
      });
    });
    if (grad_student && !(kSums && of_student_.waits)) {
      if (factors.hard != 0) add_cross_entropy(student, row, constants, factors.hard, grad_student);
      chain(student_, student, row, grad_student);
    }
    if (grad_teacher && !(kSums && of_teacher_.waits)) chain(teacher_, teacher, row, grad_teacher);
    student_sink.commit();
    teacher_sink.commit();
    return sums;
  }

  template <bool kBare>
  acc_t* open(Sink<acc_t>& sink, const Gradient& gradient, int64_t row, const Chunk<acc_t>& chunk) const {
    const LogitsGradient& to = kBare ? gradient.bare : gradient.to;
    const int64_t stride = to.layout.column_stride;
    return sink.open(to.out, args_.acc_dtype(), to.layout.offset(row) + chunk.begin * stride, chunk.size, stride,
                     gradient.shared);
  }

  // The cross entropy's part of the student's gradient: softmax less one at the label.
  void add_cross_entropy(const Chunk<acc_t>& student, int64_t row, const RowConstants<acc_t>& constants, acc_t factor,
                         acc_t* gradient) const {
    if (!has_label(row)) factor = nan<acc_t>();
    for (int i = 0; i < student.padded_size; i += kLanes<acc_t>) {
      const Vec<acc_t> softmax = probability(load(student.data + i), constants.student.max, constants.hard_log2_sum,
                                             scaling_.hard_inverse_temperature);
      store(gradient + i, load(gradient + i) + softmax * factor);
    }
    const int64_t label = args_.labels[row] - student.begin;
    if (label >= 0 && label < student.size) gradient[label] -= factor;
  }

  // The chain rule back through softcap and scale.
  void chain(const Side<acc_t>& side, const Chunk<acc_t>& chunk, int64_t row, acc_t* gradient) const {
    if (side.map.is_identity()) return;
    alignas(64) acc_t buffer[kChunk];
    const acc_t* logits = stage(side.logits, side.logits.layout.offset(row), chunk.begin, chunk.size, acc_t(0), buffer);
    for (int i = 0; i < chunk.padded_size; i += kLanes<acc_t>) {
      store(gradient + i, load(gradient + i) * side.map.slope(load(logits + i)));
    }
  }

  void finish_side(int64_t row, int64_t index, const Gradient& gradient, const RowConstants<acc_t>& constants,
                   const Factors& factors) const {
    if (!gradient.waits) return;
    const Chunk<acc_t> logits = chunk(gradient.side, row, index);
    alignas(64) acc_t bare_buffer[kChunk];
    const acc_t* bare = stage({gradient.bare.out.data, gradient.bare.out.dtype, {}}, gradient.bare.layout.offset(row),
                              logits.begin, logits.size, acc_t(0), bare_buffer);
    Sink<acc_t> sink;
    acc_t* out = open<false>(sink, gradient, row, logits);
    finish(bare, logits.data, logits.padded_size, constants.*gradient.constants, scaling_.inverse_temperature,
           factors.soft, out, prefetch(gradient.side.logits, row + 1, logits.begin));
    if (&gradient == &of_student_ && factors.hard != 0) add_cross_entropy(logits, row, constants, factors.hard, out);
    chain(gradient.side, logits, row, out);
    sink.commit();
  }

  const DistillationArgs& args_;
  const Divergence divergence_;
  const std::unique_ptr<RowSums<acc_t>[]> sums_;
  const Gradient of_student_, of_teacher_;
};

// What token_stats tells of a row.
template <typename acc_t>
class StatsWalk : RowReader<acc_t> {
 public:
  explicit StatsWalk(const TokenStatsArgs& args) : RowReader<acc_t>(args), args_(args), parts_(new Part[chunks_]) {}

  template <typename ForEachChunk>
  void operator()(int64_t row, const ForEachChunk& for_each_chunk) const {
    RowStats<acc_t>& stats = static_cast<RowStats<acc_t>*>(args_.row_stats)[row];
    if (args_.row_scale && static_cast<const acc_t*>(args_.row_scale)[row] == 0) {
      stats = RowStats<acc_t>();
      return;
    }
    const RowConstants<acc_t> constants(this->state(row, {}, for_each_chunk));
    for_each_chunk(chunks_, [&](int64_t chunk) { parts_[chunk] = part(row, chunk, constants); });
    const Part all = fold(parts_.get(), chunks_, [](const Part& a, const Part& b) {
      return Part{a.sums + b.sums, minimum(a.student_top, b.student_top), minimum(a.teacher_top, b.teacher_top)};
    });
    const bool labels = args_.labels != nullptr;
    stats = RowStats<acc_t>(constants, all.sums, scaling_.inverse_temperature, labels ? label_logit(student_, row) : 0,
                            labels ? label_logit(teacher_, row) : 0,
                            all.student_top == all.teacher_top && all.student_top < args_.columns);
  }

 private:
  using Reader = RowReader<acc_t>;
  using Reader::chunk, Reader::chunks_, Reader::label_logit, Reader::scaling_, Reader::student_, Reader::teacher_;

  // Of one chunk, or of several: its sums, and the first column that holds the row's largest logit, if any.
  struct Part {
    StatsSums<acc_t> sums;
    double student_top = __builtin_inf(), teacher_top = __builtin_inf();
  };

  Part part(int64_t row, int64_t index, const RowConstants<acc_t>& constants) const {
    using V = Vec<acc_t>;
    const Chunk<acc_t> teacher = chunk(teacher_, row, index), student = chunk(student_, row, index);
    V column;
    for (int i = 0; i < kLanes<acc_t>; ++i) column[i] = static_cast<acc_t>(i);
    V student_top = infinity<V>(), teacher_top = infinity<V>();
    StatsSums<V> sums;
    for (int i = 0; i < teacher.padded_size; i += kLanes<acc_t>, column += static_cast<acc_t>(kLanes<acc_t>)) {
      const V t = load(teacher.data + i), s = load(student.data + i);
      sums = sums + StatsSums<V>::of(t, s, constants, scaling_.inverse_temperature);
      teacher_top = minimum(teacher_top, t == constants.teacher.max ? column : infinity<V>());
      student_top = minimum(student_top, s == constants.student.max ? column : infinity<V>());
    }
    const auto first = [&](V top) { return static_cast<double>(teacher.begin - max_lanes(-top)); };
    return {{sum_lanes(sums.forward_kl), sum_lanes(sums.reverse_kl), sum_lanes(sums.teacher_drop),
             sum_lanes(sums.student_drop)},
            first(student_top),
            first(teacher_top)};
  }

  const TokenStatsArgs& args_;
  const std::unique_ptr<Part[]> parts_;
};

// Calls Walk(arguments...)(row, for_each_chunk) for every row.
template <typename Walk, typename... Arguments>
void walk_rows(const Threads& threads, const LogitsArgs& args, const Arguments&... arguments) {
  // Threads share out the rows; where there are too few of these, they share out the chunks of each.
  if (args.rows >= 4 * threads.count || chunks_of(args.columns) == 1) {
    const int64_t grain = 1 + 16384 / args.columns;
    parallel_for(threads, args.rows, grain, [&](int64_t begin, int64_t end) {
      const Walk walk(arguments...);
      for (int64_t row = begin; row < end; ++row) {
        walk(row, [](int64_t chunks, const auto& body) {
          for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
        });
      }
    });
  } else {
    const Walk walk(arguments...);
    for (int64_t row = 0; row < args.rows; ++row) {
      walk(row, [&](int64_t chunks, const auto& body) {
        parallel_for(threads, chunks, 8, [&](int64_t begin, int64_t end) {
          for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
        });
      });
    }
  }
}

template <typename acc_t, typename Divergence>
void distil_rows(const DistillationArgs& args, const Divergence& divergence, const Threads& threads) {
  walk_rows<RowWalk<acc_t, Divergence>>(threads, args, args, divergence);
  if (args.loss) {
    // In double: a mean over a million rows should not be less exact than one row.
    double total = 0;
    for (int64_t row = 0; row < args.rows; ++row) total += static_cast<const acc_t*>(args.row_loss)[row];
    *static_cast<acc_t*>(args.loss) = static_cast<acc_t>(total);
  }
}

inline void distillation(const DistillationArgs& args, const Threads& threads) {
  dispatch_divergence(args.divergence, args.parameter, [&](const auto& divergence) {
    if (args.acc_dtype() == Dtype::kFloat64) {
      distil_rows<double>(args, divergence, threads);
    } else {
      distil_rows<float>(args, divergence, threads);
    }
  });
}

inline void token_stats(const TokenStatsArgs& args, const Threads& threads) {
  if (args.acc_dtype() == Dtype::kFloat64) {
    walk_rows<StatsWalk<double>>(threads, args, args);
  } else {
    walk_rows<StatsWalk<float>>(threads, args, args);
  }
}

// ---------------------------------------------------------------- the drop-in, element by element

template <bool kLogTarget, typename acc_t>
acc_t pointwise_chunk(const PointwiseArgs& args, int64_t row, int64_t first, int64_t n) {
  constexpr int kPart = kChunk / 8;
  using KL = PointwiseKL<kLogTarget>;
  using V = Vec<acc_t>;
  alignas(64) acc_t target_buffer[kChunk], input_buffer[kChunk], grad_buffer[kChunk];
  const acc_t scale = static_cast<acc_t>(args.scale);
  const int64_t offset = row * args.columns + first;
  const int size = padded<acc_t>(n);
  const acc_t* target = stage(args.target, args.target.layout.offset(row), first, n,
                              kLogTarget ? -infinity<acc_t>() : acc_t(0), target_buffer);
  const acc_t* input = nullptr;
  if (args.input.data) input = stage(args.input, args.input.layout.offset(row), first, n, acc_t(0), input_buffer);

  V sum{};
  if (args.loss) {
    for (int begin = 0; begin < size; begin += kPart) {  // where lanes are few a long sum of them rounds often
      V part{};
      const int end = begin + kPart < size ? begin + kPart : size;
      for (int i = begin; i < end; i += kLanes<acc_t>) part += KL::term(load(input + i), load(target + i));
      sum += part;
    }
  }
  const auto write = [&](const Output& output, const auto& value) {
    if (output.data == nullptr) return;
    Sink<acc_t> sink;
    acc_t* out = sink.open(output, args.acc_dtype(), offset, n);
    for (int i = 0; i < size; i += kLanes<acc_t>) store(out + i, value(i));
    sink.commit();
  };
  write(args.output, [&](int i) { return KL::term(load(input + i), load(target + i)) * scale; });
  if (args.grad_output.data) {
    const acc_t* grad = stage(args.grad_output, args.grad_output.layout.offset(row), first, n, acc_t(0), grad_buffer);
    const auto product = [&](int i, V slope) {  // a zero slope stays 0 whatever comes in
      return slope == 0 ? V{} : load(grad + i) * scale * slope;
    };
    write(args.grad_input, [&](int i) { return product(i, KL::grad_input(V{}, load(target + i))); });
    write(args.grad_target, [&](int i) { return product(i, KL::grad_target(load(input + i), load(target + i))); });
  }
  return sum_lanes(sum);
}

template <bool kLogTarget, typename acc_t>
void pointwise_rows(const PointwiseArgs& args, const Threads& threads) {
  const int64_t chunks = chunks_of(args.columns);
  acc_t* partials = static_cast<acc_t*>(args.partials);
  parallel_for(threads, args.rows * chunks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / chunks, first = (i - row * chunks) * kChunk;
      const int64_t n = args.columns - first < kChunk ? args.columns - first : kChunk;
      const acc_t sum = pointwise_chunk<kLogTarget, acc_t>(args, row, first, n);
      if (args.loss) partials[i] = sum;
    }
  });
  if (args.loss) {
    double total = 0;
    for (int64_t i = 0; i < args.rows * chunks; ++i) total += partials[i];
    *static_cast<acc_t*>(args.loss) = static_cast<acc_t>(total * args.scale);
  }
}

inline void pointwise(const PointwiseArgs& args, const Threads& threads) {
  const bool wide = args.acc_dtype() == Dtype::kFloat64;
  if (args.log_target) {
    wide ? pointwise_rows<true, double>(args, threads) : pointwise_rows<true, float>(args, threads);
  } else {
    wide ? pointwise_rows<false, double>(args, threads) : pointwise_rows<false, float>(args, threads);
  }
}

// ---------------------------------------------------------------- grad_output that came late

inline void scale(const ScaleArgs& args, const Threads& threads) {
  double factor = 1;
  dispatch_dtype(args.factor_dtype,
                 [&](auto type) { factor = widen<double>(*static_cast<const decltype(type)*>(args.factor)); });
  if (factor == 1) return;
  dispatch_dtype(args.gradient.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    scalar_t* gradient = static_cast<scalar_t*>(args.gradient.data);
    parallel_for(threads, args.count, 16384, [&](int64_t begin, int64_t end) {
      const acc_t by = static_cast<acc_t>(factor);
      int64_t i = begin;
      for (; i + kLanes<acc_t> <= end; i += kLanes<acc_t>) store_as(gradient + i, load_as<acc_t>(gradient + i) * by);
      for (; i < end; ++i) gradient[i] = narrow<scalar_t>(widen<acc_t>(gradient[i]) * by);
    });
  });
}

}  // namespace KLDIV_ISA
}  // namespace kldiv::cpu

#define KLDIV_KERNELS(name)                                                           \
  {name, ::kldiv::cpu::KLDIV_ISA::distillation, ::kldiv::cpu::KLDIV_ISA::token_stats, \
   ::kldiv::cpu::KLDIV_ISA::pointwise, ::kldiv::cpu::KLDIV_ISA::scale}
