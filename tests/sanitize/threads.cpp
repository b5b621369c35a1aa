// The CPU kernels from several threads at once, each call on threads of its own and all on the same inputs, for a build
// with -fsanitize=thread. Results must be those of one thread, bit by bit. `threads faulty` is what has to be noticed.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "divergences.h"
#include "row_state.h"
#include "scalar_types.h"

namespace {

using namespace kldiv;

constexpr int kCallers = 3, kThreads = 4;
constexpr int kSkipped = 77;  // as CMakeLists.txt has it

void parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t piece = std::max(grain, (n + kThreads - 1) / kThreads);
  std::vector<std::thread> others;
  for (int64_t begin = piece; begin < n; begin += piece) {
    others.emplace_back(body, context, begin, std::min(n, begin + piece));
  }
  body(context, 0, std::min(n, piece));
  for (std::thread& other : others) other.join();
}

cpu::Threads threads(int count) {
  cpu::Threads threads;
  threads.count = count;
  if (count > 1) threads.parallel_for = parallel_for;
  return threads;
}

// ---------------------------------------------------------------- inputs and outputs

using Bytes = std::vector<char>;

int64_t size_of(Dtype dtype) {
  int64_t size = 0;
  dispatch_dtype(dtype, [&](auto type) { size = sizeof(type); });
  return size;
}

// Numbers around `middle`, 1 away at most.
Bytes numbers(Dtype dtype, int64_t count, double middle, double step) {
  Bytes bytes(count * size_of(dtype));
  dispatch_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    scalar_t* out = reinterpret_cast<scalar_t*>(bytes.data());
    for (int64_t i = 0; i < count; ++i) out[i] = narrow<scalar_t>(middle + std::sin(step * static_cast<double>(i)));
  });
  return bytes;
}

struct Shape {
  int64_t rows, columns;
};
// Threads share out the rows, of several chunks or of one (then neighbours' bytes share a word), or the chunks. A row
// that is longer than any thread keeps is read once more.
constexpr Shape kManyRows{32, 1537}, kShortRows{500, 101}, kLongRows{3, 16385}, kHugeRow{1, 131073};
constexpr int64_t kMostRows = 500, kMostElements = 131073;

// What all callers read, in every dtype.
struct Inputs {
  struct OfDtype {
    Bytes student, teacher, per_row, factor;
  };
  OfDtype of[4];
  std::vector<int64_t> labels;

  Inputs() {
    for (int i = 0; i < 4; ++i) {
      const Dtype dtype = static_cast<Dtype>(i);
      of[i].student = numbers(dtype, kMostElements, -1, 1.7);
      of[i].teacher = numbers(dtype, kMostElements, 1, 2.3);
      of[i].per_row = numbers(dtype, kMostRows, 0.1, 0.9);
      std::memset(of[i].per_row.data() + size_of(dtype), 0, size_of(dtype));  // row 1 does not count
      of[i].factor = numbers(dtype, 1, 3, 0);
    }
    for (int64_t row = 0; row < kMostRows; ++row) labels.push_back(row % kShortRows.columns);
  }
  const OfDtype& operator[](Dtype dtype) const { return of[static_cast<int>(dtype)]; }
};

// Where a call writes to. Filled with another byte for another number of threads: what is not written differs.
class Results {
 public:
  explicit Results(int fill) : fill_(static_cast<char>(fill)) {}

  void* of(Dtype dtype, int64_t count) { return arrays_.emplace_back(count * size_of(dtype), fill_).data(); }
  void* copy_of(const Bytes& bytes) { return arrays_.emplace_back(bytes).data(); }
  bool operator==(const Results& other) const { return arrays_ == other.arrays_; }

 private:
  char fill_;
  std::vector<Bytes> arrays_;
};

RowLayout layout(Shape shape, int64_t row_stride) {
  RowLayout layout;
  layout.dims = 1;
  layout.sizes[0] = shape.rows;
  layout.strides[0] = row_stride;
  return layout;
}

Matrix matrix(const void* data, Dtype dtype, Shape shape, int64_t row_stride) {
  Matrix m;
  m.data = data;
  m.dtype = dtype;
  m.layout = layout(shape, row_stride);
  return m;
}

Output output(Results& results, Dtype dtype, int64_t count) {
  Output out;
  out.data = results.of(dtype, count);
  out.dtype = dtype;
  return out;
}

LogitsGradient gradient(void* data, Dtype dtype, Shape shape, int64_t row_size) {
  LogitsGradient to;
  to.out.data = data;
  to.out.dtype = dtype;
  to.layout = layout(shape, row_size);
  to.columns = row_size;
  return to;
}

// ---------------------------------------------------------------- what is called

struct Case {
  std::string name;
  std::function<void(const cpu::Threads&, Results&)> run;
};

std::string of_dtype(Dtype dtype) {
  constexpr const char* kNames[] = {" float64", " float32", " float16", " bfloat16"};
  return kNames[static_cast<int>(dtype)];
}

// Which gradients, and whether with the loss.
enum class Way { kBoth, kStudent, kInPlace, kLater };

struct Distillation {
  const char* divergence = "forward_kl";
  Dtype student = Dtype::kFloat32, teacher = Dtype::kFloat32;
  Shape shape = kManyRows;
  Way way = Way::kBoth;
  bool all_options = false;

  std::string name() const {
    constexpr const char* kWays[] = {", both gradients", ", the student's gradient", ", in place", ", backward later"};
    return divergence + of_dtype(student) + of_dtype(teacher) + " in " + std::to_string(shape.rows) + " rows" +
           kWays[static_cast<int>(way)] + (all_options ? ", all options" : "");
  }

  void operator()(const Inputs& inputs, const cpu::Threads& threads, Results& results) const {
    const int64_t row_size = shape.columns, count = shape.rows * row_size;
    DistillationArgs args;
    args.rows = shape.rows;
    args.columns = all_options ? row_size - 2 : row_size;
    args.student = matrix(inputs[student].student.data(), student, shape, row_size);
    args.teacher = matrix(inputs[teacher].teacher.data(), teacher, shape, row_size);
    args.divergence = divergence;
    args.parameter = 0.3;
    args.temperature = 1.5;
    const Dtype acc = args.acc_dtype();
    args.row_scale = inputs[acc].per_row.data();
    if (all_options) {
      args.student_scale = 0.7;
      args.teacher_cap = 5;
      args.labels = inputs.labels.data();
      args.hard_scale = 0.4;
    }
    args.row_constants = results.of(acc, shape.rows * RowConstants<float>::kCount);
    args.row_loss = results.of(acc, shape.rows);
    args.loss = results.of(acc, 1);
    args.wanted = {true, way != Way::kStudent};
    if (way == Way::kLater) {
      cpu::kernels().distillation(args, threads);
      args.row_loss = args.loss = nullptr;
      args.grad_output = inputs[acc].per_row.data();
      args.grad_output_stride = 1;
    }
    if (way == Way::kInPlace) {
      void* logits = results.copy_of(inputs[student].student);
      args.student.data = logits;
      args.grad_student = gradient(logits, student, shape, row_size);
    } else {
      args.grad_student = gradient(results.of(student, count), student, shape, row_size);
    }
    if (way != Way::kStudent) {
      args.grad_teacher = gradient(results.of(teacher, count), teacher, shape, row_size);
    }
    cpu::kernels().distillation(args, threads);
  }
};

struct TokenStats {
  Dtype dtype;
  Shape shape;

  std::string name() const { return "token_stats" + of_dtype(dtype) + " in " + std::to_string(shape.rows) + " rows"; }

  void operator()(const Inputs& inputs, const cpu::Threads& threads, Results& results) const {
    TokenStatsArgs args;
    args.rows = shape.rows;
    args.columns = shape.columns;
    args.student = matrix(inputs[dtype].student.data(), dtype, shape, shape.columns);
    args.teacher = matrix(inputs[dtype].teacher.data(), dtype, shape, shape.columns);
    args.labels = inputs.labels.data();
    const Dtype acc = args.acc_dtype();
    args.row_scale = inputs[acc].per_row.data();
    args.row_stats = results.of(acc, shape.rows * RowStats<float>::kCount);
    cpu::kernels().token_stats(args, threads);
  }
};

struct Pointwise {
  Dtype dtype;
  bool log_target;
  Shape shape;

  std::string name() const {
    return "kl_div" + of_dtype(dtype) + " in " + std::to_string(shape.rows) + " rows" +
           (log_target ? ", log_target" : "");
  }

  void operator()(const Inputs& inputs, const cpu::Threads& threads, Results& results) const {
    const int64_t count = shape.rows * shape.columns;
    PointwiseArgs args;
    args.rows = shape.rows;
    args.columns = shape.columns;
    args.log_target = log_target;
    args.scale = 0.3;
    args.input = matrix(inputs[dtype].student.data(), dtype, shape, shape.columns);
    args.target = matrix(inputs[dtype].teacher.data(), dtype, shape, shape.columns);
    const Dtype acc = args.acc_dtype();
    args.loss = results.of(acc, 1);
    args.partials = results.of(acc, cpu::pointwise_partials(shape.rows, shape.columns));
    args.output = output(results, dtype, count);
    cpu::kernels().pointwise(args, threads);
    args.loss = args.partials = nullptr;
    args.output = Output();
    args.grad_output = matrix(inputs[acc].factor.data(), acc, shape, 0);
    args.grad_output.layout.column_stride = 0;
    args.grad_input = output(results, dtype, count);
    args.grad_target = output(results, dtype, count);
    cpu::kernels().pointwise(args, threads);
  }
};

struct Scale {
  Dtype dtype;

  std::string name() const { return "scale" + of_dtype(dtype); }

  void operator()(const Inputs& inputs, const cpu::Threads& threads, Results& results) const {
    ScaleArgs args;
    args.gradient.data = results.copy_of(inputs[dtype].student);
    args.gradient.dtype = dtype;
    args.count = kMostElements;
    args.factor = inputs[dtype].factor.data();
    args.factor_dtype = dtype;
    cpu::kernels().scale(args, threads);
  }
};

std::vector<Case> all_cases(const Inputs& inputs) {
  std::vector<Case> cases;
  const auto add = [&](const auto& call) {
    const auto run = [&inputs, call](const cpu::Threads& threads, Results& results) { call(inputs, threads, results); };
    cases.push_back({call.name(), run});
  };
  const auto distil = [&](const char* divergence, Dtype student, Dtype teacher, Shape shape, Way way) {
    Distillation call;
    call.divergence = divergence;
    call.student = student;
    call.teacher = teacher;
    call.shape = shape;
    call.way = way;
    call.all_options = way == Way::kInPlace || way == Way::kLater;
    add(call);
  };
  const auto token_stats = [&](Dtype dtype, Shape shape) {
    TokenStats call;
    call.dtype = dtype;
    call.shape = shape;
    add(call);
  };
  const auto kl_div = [&](Dtype dtype, bool log_target, Shape shape) {
    Pointwise call;
    call.dtype = dtype;
    call.log_target = log_target;
    call.shape = shape;
    add(call);
  };
  const auto scale = [&](Dtype dtype) {
    Scale call;
    call.dtype = dtype;
    add(call);
  };
  for (const Shape shape : {kManyRows, kShortRows, kLongRows}) {
#define KLDIV_EACH(NAME, ...) distil(NAME, Dtype::kFloat32, Dtype::kFloat32, shape, Way::kBoth);
    KLDIV_DIVERGENCES(KLDIV_EACH)
#undef KLDIV_EACH
    for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      for (const Way way : {Way::kBoth, Way::kStudent, Way::kInPlace, Way::kLater}) {
        distil("jsd", dtype, dtype, shape, way);  // its gradients wait for their sums
      }
      distil("forward_kl", dtype, Dtype::kFloat32, shape, Way::kStudent);
      token_stats(dtype, shape);
      for (const bool log_target : {false, true}) kl_div(dtype, log_target, shape);
    }
  }
  distil("jsd", Dtype::kBFloat16, Dtype::kBFloat16, kHugeRow, Way::kBoth);
  for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) scale(dtype);
  return cases;
}

// ---------------------------------------------------------------- running it

// Whether all callers, each of them going through all cases from another one on, get what one thread gets.
bool same_on_all_threads(const std::vector<Case>& cases) {
  std::vector<Results> expected;
  for (const Case& one : cases) one.run(threads(1), expected.emplace_back(1));
  std::atomic<int> failures = 0;
  const auto call = [&](int64_t caller) {
    for (size_t i = 0; i < cases.size(); ++i) {
      const size_t index = (i + caller * cases.size() / kCallers) % cases.size();
      Results results(kThreads);
      cases[index].run(threads(kThreads), results);
      if (results == expected[index]) continue;
      std::printf("other results on %d threads: %s\n", kThreads, cases[index].name.c_str());
      ++failures;
    }
  };
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) callers.emplace_back(call, caller);
  for (std::thread& caller : callers) caller.join();
  return failures == 0;
}

// Whether threads that ask for the kernels at once, and first of all, are given the same.
bool same_kernels_for_all_threads() {
  const cpu::Kernels* chosen[kCallers] = {};
  std::vector<std::thread> callers;
  for (const cpu::Kernels*& mine : chosen) callers.emplace_back([&mine] { mine = &cpu::kernels(); });
  for (std::thread& caller : callers) caller.join();
  return std::all_of(std::begin(chosen), std::end(chosen), [](auto* kernels) { return kernels == &cpu::kernels(); });
}

// Threads that add to one number.
int64_t faulty() {
  int64_t sum = 0;
  const auto body = [](void* context, int64_t begin, int64_t end) { *static_cast<int64_t*>(context) += end - begin; };
  parallel_for(100, 1, body, &sum);
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "faulty") == 0) return faulty() == 0 ? 1 : 0;
  if (!same_kernels_for_all_threads()) return 1;
  const char* wanted = std::getenv("KLDIV_EXT_CPU_ISA");
  std::printf("%s\n", cpu::kernels().name);
  if (wanted && std::strcmp(wanted, cpu::kernels().name) != 0) return kSkipped;
  const Inputs inputs;
  return same_on_all_threads(all_cases(inputs)) ? 0 : 1;
}
