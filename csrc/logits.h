// From the logits that a model puts out to those that softmax sees: scale, then softcap, then temperature.
#pragma once

#include "args.h"
#include "math.h"

namespace kldiv {
inline namespace KLDIV_ISA {

// Scale and softcap of one side, cap * tanh(scale * z / cap), and the derivative.
template <typename acc_t>
struct LogitMap {
  acc_t scale = 1;
  acc_t cap = 0;  // 0: none

  KLDIV_HD bool is_identity() const { return scale == 1 && cap == 0; }

  template <typename T>
  KLDIV_HD T operator()(T z) const {
    const T scaled = z * scale;
    if (cap == 0) return scaled;
    const T x = scaled / cap;
    const T fallen = -Decay<T>(absolute(x) * 2).expm1;  // 1 - e^{-2|x|}
    const T tanh = fallen / (2 - fallen);
    return (x < 0 ? -tanh : tanh) * cap;
  }

  // From z, not from the mapped logit, which is near its cap for many z.
  template <typename T>
  KLDIV_HD T slope(T z) const {
    if (cap == 0) return splat<T>(scale);
    const T decayed = exp(absolute(z * scale / cap) * -2);
    return decayed * (4 * scale) / ((decayed + 1) * (decayed + 1));
  }
};

// What the options make of both sides' logits. A scale that is the same on both sides and has no softcap after it goes
// into the temperatures: the difference of two logits is then exact, which close rows need.
template <typename acc_t>
struct Scaling {
  LogitMap<acc_t> student, teacher;
  acc_t inverse_temperature;       // of the divergence
  acc_t hard_inverse_temperature;  // of the cross entropy

  explicit Scaling(const LogitsArgs& args) {
    const bool common = args.student_scale == args.teacher_scale && args.student_cap == 0 && args.teacher_cap == 0;
    if (!common) {
      student = {static_cast<acc_t>(args.student_scale), static_cast<acc_t>(args.student_cap)};
      teacher = {static_cast<acc_t>(args.teacher_scale), static_cast<acc_t>(args.teacher_cap)};
    }
    const double scale = common ? args.student_scale : 1;
    inverse_temperature = static_cast<acc_t>(scale / args.temperature);
    hard_inverse_temperature = static_cast<acc_t>(scale);
  }
};

}  // namespace KLDIV_ISA
}  // namespace kldiv
