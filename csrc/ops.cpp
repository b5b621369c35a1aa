// Every operator's schema, and what Python reads of the binary: the table of divergences. Nothing else.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "divergences.h"

#define KLDIV_OPTIONS                                                                                \
  "Tensor? labels, Tensor? row_scale, float soft_scale, float hard_scale, str reduction, "           \
  "str divergence, float parameter, float temperature, float[] logit_scale, float[] logit_softcap, " \
  "int? valid_vocab"

STABLE_TORCH_LIBRARY(kldiv_ext, m) {
  // reduction is one of F.kl_div's: none | sum | mean (over rows; in kl_div over elements) | batchmean (size(0)).
  //
  // Row by row, of the first valid_vocab columns (all by default), with z' = cap * tanh(scale * z / cap) for student
  // and teacher, where a softcap of 0 is none:
  //   row_scale * (soft_scale * divergence of softmax(student' / T) from softmax(teacher' / T)
  //                + hard_scale * cross entropy of softmax(student') at labels)
  // loss: [] or, with reduction none, [rows]; row_constants: [rows, RowConstants::kCount], for a backward of the sides
  // whose gradients are wanted; early: those are made here already. A gradient not made is [0].
  m.def("distillation_loss(Tensor student, Tensor teacher, " KLDIV_OPTIONS
        ", bool grad_student, bool grad_teacher, bool early) "
        "-> (Tensor loss, Tensor row_constants, Tensor grad_student, Tensor grad_teacher)");
  // The gradients alone, times grad_output ([] or [rows]).
  m.def(
      "distillation_loss_backward(Tensor grad_output, Tensor student, Tensor teacher, Tensor "
      "row_constants, " KLDIV_OPTIONS
      ", bool grad_student, bool grad_teacher) -> (Tensor grad_student, Tensor grad_teacher)");
  // The same with the student's gradient written over the student's logits.
  m.def(
      "distillation_loss_backward_(Tensor grad_output, Tensor(a!) student, Tensor teacher, Tensor "
      "row_constants, " KLDIV_OPTIONS ", bool grad_teacher) -> Tensor grad_teacher");
  // Losses, times row_scale as above, and gradients, times grad_output ([] or [rows]), in one call, into given tensors.
  // A gradient may have another dtype than its logits, or lie over them; reduction is none.
  m.def("distillation_loss_out(Tensor student, Tensor teacher, " KLDIV_OPTIONS
        ", Tensor? grad_output, Tensor(a!) row_loss, Tensor(b!)? grad_student, Tensor(c!)? grad_teacher) -> ()");
  // The same as distillation_loss from hidden states, [..., hidden]: logits are hidden @ weight.T + bias, or, of a
  // teacher without a weight, what is given. They exist for some rows at a time: chunk_size of them or, where that is
  // None, as many as max_workspace bytes hold. Products are computed in autocast_dtype where there is one. Loss, and
  // the gradients that are `wanted`, of the first six arguments; one not made is [0]. Implemented in linear.py.
  m.def(
      "linear_distillation_loss(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor teacher, "
      "Tensor? teacher_weight, Tensor? teacher_bias, " KLDIV_OPTIONS
      ", Tensor? grad_output, ScalarType? autocast_dtype, int max_workspace, int? chunk_size, bool[] wanted) "
      "-> (Tensor loss, Tensor grad_student, Tensor grad_student_weight, Tensor grad_student_bias, "
      "Tensor grad_teacher, Tensor grad_teacher_weight, Tensor grad_teacher_bias)");
  // Row by row, [rows, 9]: what kldiv_ext.TokenStats lists; zeros where row_scale is 0.
  m.def(
      "token_stats(Tensor student, Tensor teacher, Tensor? labels, Tensor? row_scale, float temperature, "
      "float[] logit_scale, float[] logit_softcap, int? valid_vocab) -> Tensor");
  // [sizes] on the device of `like`, not initialised: to be written whole, and soon.
  m.def("new_output(Tensor like, int[] sizes, ScalarType dtype) -> Tensor");
  // gradient *= factor ([]), without a host read of the factor and without a write where it is 1.
  m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
  // F.kl_div: [] in the accumulation type or, with reduction none, input's shape.
  m.def("kl_div(Tensor input, Tensor target, str reduction, bool log_target) -> Tensor");
  // Its gradients; `input` is needed for the target's alone.
  m.def(
      "kl_div_backward(Tensor grad_output, Tensor? input, Tensor target, str reduction, bool log_target, "
      "bool grad_input, bool grad_target) -> (Tensor grad_input, Tensor grad_target)");
}

// kldiv_ext._C.divergences: {name: name of its parameter or ""}; kldiv_ext._C.cpu_isa: what the CPU kernels use.
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
       PyModule_AddStringConstant(module, "cpu_isa", kldiv::cpu::kernels().name) == 0;
  Py_XDECREF(table);
  if (ok) return module;
  Py_XDECREF(module);
  return nullptr;
}
