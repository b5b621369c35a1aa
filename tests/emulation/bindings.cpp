// The emulated kernels as a Python module, called with torch's CPU tensors, and what tests want to know of their parts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "args.h"
#include "cuda/launch.h"
#include "cuda/shapes.h"
#include "cuda/team.h"
#include "fibers.h"
#include "row_state.h"

namespace py = pybind11;

namespace {

using namespace kldiv;
using cuda::Team;
using device::Shape;

// ---------------------------------------------------------------- tensors

template <typename T = void>
T* data(const py::object& tensor) {
  return tensor.is_none() ? nullptr : reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

// A value by its name.
template <typename Value>
Value named(const std::string& name, std::initializer_list<std::pair<const char*, Value>> values) {
  for (const auto& [known, value] : values) {
    if (name == known) return value;
  }
  throw std::invalid_argument(name);
}

Dtype dtype(const py::object& tensor) {
  return named<Dtype>(py::str(tensor.attr("dtype")), {{"torch.float64", Dtype::kFloat64},
                                                      {"torch.float32", Dtype::kFloat32},
                                                      {"torch.float16", Dtype::kFloat16},
                                                      {"torch.bfloat16", Dtype::kBFloat16}});
}

// `flat`: a contiguous tensor is a single row.
Matrix matrix(const py::object& tensor, bool flat = false) {
  if (tensor.is_none()) return {};
  Matrix result{data(tensor), dtype(tensor), {}};
  const auto sizes = tensor.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  if (sizes.empty()) result.layout.column_stride = 0;
  if (sizes.empty() || flat) return result;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    result.layout.sizes[result.layout.dims] = sizes[d];
    result.layout.strides[result.layout.dims++] = strides[d];
  }
  result.layout.column_stride = strides.back();
  return result;
}

Output output(const py::object& tensor) { return tensor.is_none() ? Output() : Output{data(tensor), dtype(tensor)}; }

LogitsGradient gradient(const py::object& tensor) {
  if (tensor.is_none()) return {};
  return {output(tensor), matrix(tensor).layout, tensor.attr("shape").attr("__getitem__")(-1).cast<int64_t>()};
}

// An output by its name, or None.
py::object find(const py::dict& outputs, const char* name) { return outputs.attr("get")(name); }

void set_logits(LogitsArgs& args, const py::object& student, const py::object& teacher, int64_t columns,
                double temperature, std::pair<double, double> scales, std::pair<double, double> softcaps,
                const py::object& labels, const py::object& row_scale) {
  args.student = matrix(student);
  args.teacher = matrix(teacher);
  const auto sizes = student.attr("shape").cast<std::vector<int64_t>>();
  args.rows = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) args.rows *= sizes[d];
  args.columns = columns > 0 ? columns : sizes.back();
  args.temperature = temperature;
  std::tie(args.student_scale, args.teacher_scale) = scales;
  std::tie(args.student_cap, args.teacher_cap) = softcaps;
  args.labels = data<int64_t>(labels);
  args.row_scale = data(row_scale);
}

// ---------------------------------------------------------------- a kernel that tests team.h

// Lets the next sum of a team use the room of the last one. That is private: only a template argument may name it.
template <typename Team, int Team::* kTurn>
struct Rooms {
  friend void keep_room(Team& team) { team.*kTurn = 1 - team.*kTurn; }
};
void keep_room(Team<false>&);
void keep_room(Team<true>&);
template struct Rooms<Team<false>, &Team<false>::turn_>;
template struct Rooms<Team<true>, &Team<true>::turn_>;

constexpr int kTeams = 2, kTeamThreads = 256;  // threads in each of a team's blocks

// Two sums, one after the other: of 1, then of the first sum plus the thread's number.
template <bool kCluster>
KLDIV_KERNEL(kTeamThreads, 1)
two_sums(int blocks, unsigned char* memory, bool in_one_room, double* out) {
  Team<kCluster> team(kTeamThreads, blocks, memory);
  if (team.index() >= kTeams) emulation::fail("there is no such team");
  device::dynamic_shared()[team.shared_bytes() + device::thread()] = 0;  // overwrites what the constructor exchanged
  const double first = team.all(1.0, cuda::Sum());
  if (in_one_room) keep_room(team);
  out[device::block() * kTeamThreads + device::thread()] = team.all(first + team.thread(), cuda::Sum());
}

// Of teams of so many blocks each; every thread's result in `out`.
void launch_two_sums(int blocks, bool in_one_room, const py::object& out) {
  const int warps = blocks * kTeamThreads / device::kWarp;
  const size_t shared = static_cast<size_t>(cuda::exchange_bytes(warps)) + kTeamThreads;
  std::vector<unsigned char> memory(cuda::meeting_bytes(kTeams, warps));
  device::launch(blocks > 1 ? two_sums<true> : two_sums<false>, {kTeams * blocks, kTeamThreads, blocks, shared},
                 nullptr, blocks, memory.data(), in_one_room, data<double>(out));
}

// ---------------------------------------------------------------- parts of the kernels

// Functions of csrc/cuda/units.h: Decay's ratio, expm1 and excess of |x|, Log1p's value and shortfall of x, and a
// column's p - q and p (log p - log q) - p + q where log p is 0 and log q is -x.
std::vector<float> units(float x) {
  const Decay<float> decay(absolute(x));
  const Log1p<float> logarithm(x);
  const Pair<float> pair(x, 0, static_cast<float>(-x * kLog2E));
  return {decay.ratio,         decay.expm1,       decay.excess,         logarithm.value,
          logarithm.shortfall, pair.difference(), pair.teacher_excess()};
}

// For rows in shared memory: blocks, threads, blocks per cluster and bytes of shared memory; 0 blocks where rows are
// streamed.
std::tuple<int64_t, int, int, size_t> resident_shape(int64_t rows, int64_t columns, const py::object& dtype) {
  const auto scalar_bytes = dtype.attr("itemsize").cast<size_t>();
  const auto active = [](const Shape& shape) { return device::active_clusters(resident_shape, shape); };
  const auto [blocks, threads, cluster, bytes] =
      cuda::resident_shape(device::properties(), rows, columns, scalar_bytes, active);
  return {blocks, threads, cluster, bytes};
}

// For streamed rows: blocks, threads, threads of a block that share a row, blocks that share a row. `sums`: whether
// anything is summed over a row.
std::tuple<int64_t, int, int, int> row_shape(int64_t rows, int64_t columns, const py::object& dtype, bool sums) {
  const bool wide = dtype.attr("itemsize").cast<size_t>() == sizeof(double);
  const auto [launch, width, per_row] =
      cuda::row_shape(rows, columns, wide ? cuda::kMaxSlowRowThreads : cuda::kMaxRowThreads, sums);
  return {launch.blocks, launch.threads, width, per_row};
}

}  // namespace

PYBIND11_MODULE(emulation_kernels, m) {
  using namespace py::literals;
  using Factors = std::pair<double, double>;
  constexpr Factors kOnes{1, 1}, kZeros{0, 0};
  const py::none none;

  m.attr("ROW_CONSTANTS") = RowConstants<float>::kCount;
  m.attr("ROW_STATS") = RowStats<float>::kCount;

  m.def("set_order", [](const std::string& order, uint32_t seed) {
    using emulation::Order;
    const auto value = named<Order>(
        order, {{"ascending", Order::kAscending}, {"descending", Order::kDescending}, {"random", Order::kRandom}});
    emulation::set_order(value, seed);
  });
  m.def("skip", [](const std::string& primitive, int call) {
    using emulation::Primitive;
    const auto value = named<Primitive>(primitive, {{"", Primitive::kNone},
                                                    {"barrier", Primitive::kBarrier},
                                                    {"cluster_barrier", Primitive::kClusterBarrier},
                                                    {"arrive", Primitive::kArrive},
                                                    {"await", Primitive::kAwait}});
    emulation::skip(value, call);
  });
  m.def("set_device", [](int compute_capability, int multiprocessors, size_t shared_bytes_per_block, bool clusters) {
    emulation::set_properties({compute_capability, multiprocessors, shared_bytes_per_block, clusters});
  });

  m.def("two_sums", launch_two_sums);
  m.def("units", units);
  m.def("resident_shape", resident_shape);
  m.def("row_shape", row_shape, "rows"_a, "columns"_a, "dtype"_a, "sums"_a = true);

  m.def(
      "distillation",
      [](const py::object& student, const py::object& teacher, const py::dict& outputs,
         std::pair<bool, bool> needs_grad, const py::object& grad_output, const std::string& divergence,
         double parameter, double scale, double hard_scale, int64_t valid_vocab, double temperature,
         Factors logit_scale, Factors logit_softcap, const py::object& labels, const py::object& row_scale) {
        DistillationArgs args;
        set_logits(args, student, teacher, valid_vocab, temperature, logit_scale, logit_softcap, labels, row_scale);
        if (scale != 0) args.divergence = divergence;  // as csrc/operators.h does
        args.parameter = parameter;
        args.soft_scale = scale;
        args.hard_scale = hard_scale;
        args.grad_output = data(grad_output);
        args.grad_output_stride = grad_output.is_none() ? 0 : grad_output.attr("dim")().cast<int64_t>();
        args.wanted = {needs_grad.first, needs_grad.second};
        args.grad_student = gradient(find(outputs, "grad_student"));
        args.grad_teacher = gradient(find(outputs, "grad_teacher"));
        args.row_constants = data(outputs["row_constants"]);
        args.row_loss = data(find(outputs, "row_loss"));
        args.loss = data(find(outputs, "loss"));
        std::vector<unsigned char> scratch(cuda::distillation_scratch(args.columns), 0xff);
        if (!scratch.empty()) args.scratch = scratch.data();
        cuda::distillation(args, nullptr);
      },
      "student"_a, "teacher"_a, "outputs"_a, "needs_grad"_a, "grad_output"_a, "divergence"_a, "parameter"_a,
      "scale"_a = 1.0, "hard_scale"_a = 0.0, "valid_vocab"_a = 0, "temperature"_a = 1.0, "logit_scale"_a = kOnes,
      "logit_softcap"_a = kZeros, "labels"_a = none, "row_scale"_a = none);

  m.def(
      "token_stats",
      [](const py::object& student, const py::object& teacher, const py::object& labels, const py::object& row_scale,
         const py::object& stats, double temperature, Factors logit_scale, Factors logit_softcap) {
        TokenStatsArgs args;
        set_logits(args, student, teacher, 0, temperature, logit_scale, logit_softcap, labels, row_scale);
        args.row_stats = data(stats);
        cuda::token_stats(args, nullptr);
      },
      "student"_a, "teacher"_a, "labels"_a, "row_scale"_a, "stats"_a, "temperature"_a = 1.0, "logit_scale"_a = kOnes,
      "logit_softcap"_a = kZeros);

  m.def("pointwise_partials", [](int64_t count) { return cuda::pointwise_partials(1, count); });
  m.def("pointwise", [](const py::object& input, const py::object& target, const py::object& grad_output,
                        bool log_target, double scale, bool flat, int64_t columns, const py::dict& outputs) {
    PointwiseArgs args;
    args.columns = columns;
    args.rows = columns > 0 ? target.attr("numel")().cast<int64_t>() / columns : 0;
    args.input = matrix(input, flat);
    args.target = matrix(target, flat);
    args.grad_output = matrix(grad_output, flat);
    args.log_target = log_target;
    args.scale = scale;
    args.output = output(find(outputs, "terms"));
    args.loss = data(find(outputs, "loss"));
    args.partials = data(find(outputs, "partials"));
    args.grad_input = output(find(outputs, "grad_input"));
    args.grad_target = output(find(outputs, "grad_target"));
    cuda::pointwise(args, nullptr);
  });

  m.def("scale_", [](const py::object& gradient, const py::object& factor) {
    cuda::scale({output(gradient), gradient.attr("numel")().cast<int64_t>(), data(factor), dtype(factor)}, nullptr);
  });
}
