// Every operator's schema, and what Python reads of the binary: the table of divergences. Nothing else.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "divergences.h"
#include "options.h"
#include "row_state.h"

#define KLDIV_LOSS KLDIV_LOSS_OPTIONS(KLDIV_SCHEMA)

STABLE_TORCH_LIBRARY(kldiv_ext, m) {
  // Options (options.h). A row's loss, over its first valid_vocab columns (all by default), is
  //   row_scale * (soft_scale * divergence of softmax(teacher' / T) and softmax(student' / T)
  //                + hard_scale * cross entropy of softmax(student') at labels) / divisor
  // with z' = cap * tanh(scale * z / cap) for each side; a softcap of 0 is none. A divisor of None divides by 1.
  //
  // loss: [], or [rows] without a divisor. row_constants: [rows, RowConstants::kCount], what a backward for the needed
  // gradients reads. grads_in_forward: those gradients are made in this call. A gradient that is not made is [0].
  m.def("distillation_loss(Tensor student, Tensor teacher" KLDIV_LOSS
        ", bool grad_student, bool grad_teacher, bool grads_in_forward) "
        "-> (Tensor loss, Tensor row_constants, Tensor grad_student, Tensor grad_teacher)");
  // The gradients alone, times grad_output ([] or [rows]).
  m.def("distillation_loss_backward(Tensor grad_output, Tensor student, Tensor teacher, Tensor row_constants" KLDIV_LOSS
        ", bool grad_student, bool grad_teacher) -> (Tensor grad_student, Tensor grad_teacher)");
  // The same; the student's gradient overwrites the student's logits.
  m.def(
      "distillation_loss_backward_(Tensor grad_output, Tensor(a!) student, Tensor teacher, "
      "Tensor row_constants" KLDIV_LOSS ", bool grad_teacher) -> Tensor grad_teacher");
  // Row losses / divisor, and gradients times grad_output ([] or [rows]), in one call, into given tensors. A gradient
  // may have another dtype than its logits, and may overwrite them.
  m.def("distillation_loss_out(Tensor student, Tensor teacher" KLDIV_LOSS
        ", Tensor? grad_output, Tensor(a!) row_loss, Tensor(b!)? grad_student, Tensor(c!)? grad_teacher) -> ()");
  // distillation_loss from hidden states [..., hidden]: logits are hidden @ weight.T + bias; a teacher without a weight
  // is given as logits. Logits are computed in chunks of chunk_size rows or, where that is None, of at most
  // max_workspace bytes. Products are computed in autocast_dtype where it is given. Returns the loss and the gradients
  // of the first six arguments for which needs_grad is true; the others are [0]. Implemented in linear.py.
  m.def(
      "linear_distillation_loss(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor teacher, "
      "Tensor? teacher_weight, Tensor? teacher_bias" KLDIV_LOSS
      ", Tensor? grad_output, ScalarType? autocast_dtype, int max_workspace, int? chunk_size, bool[] needs_grad) "
      "-> (Tensor loss, Tensor grad_student, Tensor grad_student_weight, Tensor grad_student_bias, "
      "Tensor grad_teacher, Tensor grad_teacher_weight, Tensor grad_teacher_bias)");
  // [rows, RowStats::kCount]: the fields of kldiv_ext.TokenStats in their order; zeros where row_scale is 0.
  m.def("token_stats(Tensor student, Tensor teacher" KLDIV_STATS_OPTIONS(KLDIV_SCHEMA) ") -> Tensor");
  // An uninitialised tensor [sizes] on the device of `like`, in memory that is fast to write for the first time.
  m.def("new_output(Tensor like, int[] sizes, ScalarType dtype) -> Tensor");
  // gradient *= factor ([]), without a host read of the factor and without a write where it is 1.
  m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
  // F.kl_div: the sum of all terms / divisor, [] in the accumulation dtype; without a divisor the terms.
  m.def("kl_div(Tensor input, Tensor target, SymInt? divisor, bool log_target) -> Tensor");
  // Its gradients; only grad_target needs `input`.
  m.def(
      "kl_div_backward(Tensor grad_output, Tensor? input, Tensor target, SymInt? divisor, bool log_target, "
      "bool grad_input, bool grad_target) -> (Tensor grad_input, Tensor grad_target)");
}

// kldiv_ext._C.divergences: {name: name of its parameter or ""}; cpu_isa: the instruction set of the CPU kernels;
// row_constants and row_stats: how many numbers per row distillation_loss keeps and token_stats returns.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  PyObject* table = PyDict_New();
  bool ok = module != nullptr && table != nullptr;
#define KLDIV_ROW(NAME, PARAMETER, ...)                                       \
  if (PyObject* parameter = ok ? PyUnicode_FromString(PARAMETER) : nullptr) { \
    ok = PyDict_SetItemString(table, NAME, parameter) == 0;                   \
    Py_DECREF(parameter);                                                     \
  } else {                                                                    \
    ok = false;                                                               \
  }
  KLDIV_DIVERGENCES(KLDIV_ROW)
#undef KLDIV_ROW
  ok = ok && PyModule_AddObjectRef(module, "divergences", table) == 0 &&
       PyModule_AddStringConstant(module, "cpu_isa", kldiv::cpu::kernels().name) == 0 &&
       PyModule_AddIntConstant(module, "row_constants", kldiv::RowConstants<float>::kCount) == 0 &&
       PyModule_AddIntConstant(module, "row_stats", kldiv::RowStats<float>::kCount) == 0;
  Py_XDECREF(table);
  if (ok) return module;
  Py_XDECREF(module);
  return nullptr;
}
