// math.h, logits.h, divergences.h and row_state.h over numpy arrays, for tests/test_math.py: as scalars, and as the
// vectors of the one instruction set that this module is compiled for.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/simd.h"
#include "row_state.h"

namespace py = pybind11;
using namespace kldiv;

template <typename T>
using Array = py::array_t<Scalar<T>, py::array::c_style | py::array::forcecast>;

// T at [i, i + lanes) of x; past the end, its last element again.
template <typename T>
T read(const Array<T>& x, int64_t i) {
  constexpr int lanes = sizeof(T) / sizeof(Scalar<T>);
  Scalar<T> lane[lanes];
  for (int j = 0; j < lanes; ++j) lane[j] = x.data()[i + j < x.size() ? i + j : x.size() - 1];
  T value;
  __builtin_memcpy(&value, lane, sizeof(value));
  return value;
}

template <typename T>
void write(Array<T>& x, int64_t i, T value) {
  constexpr int lanes = sizeof(T) / sizeof(Scalar<T>);
  Scalar<T> lane[lanes];
  __builtin_memcpy(lane, &value, sizeof(value));
  for (int j = 0; j < lanes && i + j < x.size(); ++j) x.mutable_data()[i + j] = lane[j];
}

// function(i) -> std::array<T, outputs> at every i, as a tuple of `outputs` arrays of n.
template <typename T, size_t outputs, typename Function>
py::tuple map(int64_t n, const Function& function) {
  std::array<Array<T>, outputs> results;
  for (auto& result : results) result = Array<T>(n);
  for (int64_t i = 0; i < n; i += sizeof(T) / sizeof(Scalar<T>)) {
    const std::array<T, outputs> values = function(i);
    for (size_t k = 0; k < outputs; ++k) write<T>(results[k], i, values[k]);
  }
  py::tuple tuple(outputs);
  for (size_t k = 0; k < outputs; ++k) tuple[k] = results[k];
  return tuple;
}

template <typename T>
Pair<T> column(const Array<T>& teacher, const Array<T>& student, int64_t i, const RowConstants<Scalar<T>>& row,
               Scalar<T> inverse_temperature) {
  return make_pair(read<T>(teacher, i), read<T>(student, i), row, inverse_temperature);
}

// The row whose logits are its log-probabilities.
template <typename S>
RowConstants<S> normalised() {
  return RowConstants<S>{};
}

template <typename T>
void bind(py::module_ m) {
  using S = Scalar<T>;
#define KLDIV_UNARY(NAME, ...)                               \
  m.def(#NAME, [](const Array<T>& array) {                   \
    return map<T, 1>(array.size(),                           \
                     [&](int64_t i) {                        \
                       const T x = read<T>(array, i);        \
                       return std::array<T, 1>{__VA_ARGS__}; \
                     })[0]                                   \
        .template cast<py::object>();                        \
  })
  KLDIV_UNARY(exp, kldiv::exp(x));
  KLDIV_UNARY(exp2, kldiv::exp2(x));
  KLDIV_UNARY(exp2_floored, exp2_floored(x));
  KLDIV_UNARY(exp_any, exp_any(x));
  KLDIV_UNARY(log, kldiv::log(x));
  KLDIV_UNARY(decay_ratio, Decay<T>(x).ratio);
  KLDIV_UNARY(decay_expm1, Decay<T>(x).expm1);
  KLDIV_UNARY(decay_excess, Decay<T>(x).excess);
  KLDIV_UNARY(log1p, Log1p<T>(x).value);
  KLDIV_UNARY(log1p_shortfall, Log1p<T>(x).shortfall);
  KLDIV_UNARY(softcap, LogitMap<S>{1, 1}(x));
  KLDIV_UNARY(softcap_slope, LogitMap<S>{1, 1}.slope(x));
#undef KLDIV_UNARY

  // (larger, gap, ratio, expm1, excess, teacher_is_larger) of columns given by their two log-probabilities
  m.def("make_pair", [](const Array<T>& teacher, const Array<T>& student) {
    return map<T, 6>(teacher.size(), [&](int64_t i) {
      const Pair<T> x = column<T>(teacher, student, i, normalised<S>(), 1);
      return std::array<T, 6>{x.larger, x.gap, x.ratio, x.expm1, x.excess, x.by_larger(splat<T>(1), splat<T>(0))};
    });
  });

  // (term, grad_q, grad_p) likewise
  m.def("divergence", [](const std::string& name, double parameter, const Array<T>& teacher, const Array<T>& student) {
    py::tuple result;
    const bool found = dispatch_divergence(name, parameter, [&](const auto& divergence) {
      result = map<T, 3>(teacher.size(), [&](int64_t i) {
        const Pair<T> x = column<T>(teacher, student, i, normalised<S>(), 1);
        return std::array<T, 3>{divergence.term(x), divergence.grad_q(x), divergence.grad_p(x)};
      });
    });
    if (!found) throw std::invalid_argument(name);
    return result;
  });
}

template <typename S>
[[maybe_unused]] void bind_state(py::module_ m) {
  using State = std::pair<S, S>;  // max, sum
  m.def("merge", [](State a, State b, S inverse_temperature) {
    const auto both = LogSumExp<S>{a.first, a.second}.merged(LogSumExp<S>{b.first, b.second}, inverse_temperature);
    return State{both.max, both.sum};
  });
  // (teacher_max, teacher_log2_sum, student_max, student_log2_sum, log_ratio) of a row
  m.def("row_constants", [](State teacher, State student) {
    RowState<S> state;
    state.teacher = {teacher.first, teacher.second};
    state.student = {student.first, student.second};
    state.difference = teacher.second - student.second;
    const RowConstants<S> row(state);
    return py::make_tuple(row.teacher.max, row.teacher.log2_sum, row.student.max, row.student.log2_sum, row.log_ratio);
  });
}

PYBIND11_MODULE(KLDIV_MODULE, m) {
  bind<VecF>(m.def_submodule("float32_simd"));
  bind<VecD>(m.def_submodule("float64_simd"));
#if KLDIV_VECTOR_BYTES == 16  // scalars once
  py::module_ float32 = m.def_submodule("float32"), float64 = m.def_submodule("float64");
  bind<float>(float32);
  bind<double>(float64);
  bind_state<float>(float32);
  bind_state<double>(float64);
#endif
}
