"""Shared by the tests: tables of cases and of tolerances, input makers, and the comparison with the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import pytest
import torch
from torch import Tensor

import kldiv_ext
from kldiv_ext import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# ---------------------------------------------------------------- tolerances

# Relative error of a loss, by the dtype it is accumulated in. The promise for float32 is 1e-5 away from 0.
LOSS = {
    torch.float64: 1e-13,  # some hundred eps, for sums of 1e5 terms in another order
    torch.float32: 3e-6,  # 20 eps: seen 6e-7, promised 1e-5
}

# Relative L2 error of every row of a gradient, by the dtype it is stored in.
GRADIENT = {
    torch.float64: 1e-12,  # seen 1e-13
    torch.float32: 1e-5,  # as the loss; seen 6e-6 in a thousand rows
    torch.bfloat16: 4.0e-3,  # the promise; half a unit in the last of 8 bits, 3.9e-3, where one entry is all of a row
    torch.float16: 5.0e-4,  # half a unit in the last of 11 bits is 4.9e-4
}

# Below this a loss is compared by its absolute error: DESIGN's "under 1e-9 below 1e-6", per position.
TINY_LOSS = 1e-9

# ---------------------------------------------------------------- divergences

PARAMETERS = {"jsd": "beta", "skew_forward_kl": "skew", "skew_reverse_kl": "skew", "alpha": "alpha"}


class Divergence(NamedTuple):
    """A divergence with a value of its parameter."""

    name: str
    parameter: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        if self.parameter is None:
            return {"divergence": self.name}
        return {"divergence": self.name, PARAMETERS[self.name]: self.parameter}

    def __str__(self) -> str:
        return self.name if self.parameter is None else f"{self.name}-{self.parameter:g}"


# What is in use (GKD: 0.1, 0.5, 0.9; DistiLLM: 0.1), from each side of 1/2.
DIVERGENCES = [
    Divergence(name, parameter)
    for name in kldiv_ext.DIVERGENCES
    for parameter in ((0.1, 0.5, 0.9) if name in PARAMETERS else (None,))
]
# Near its ends, where a mixture is nearly one of the two.
LOPSIDED = [Divergence(name, parameter) for name in PARAMETERS for parameter in (0.001, 0.999)]
# Where the divergence is another one.
ENDPOINTS = [Divergence(name, end) for name in PARAMETERS for end in (0.0, 1.0)]
# One of each way through the kernels: gradient in the pass of the sums, or in a pass of its own.
FORWARD_KL, JSD = Divergence("forward_kl"), Divergence("jsd", 0.1)


def _log_mixture(lp: Any, lq: Any, share: Any) -> Any:
    return mpmath.log(share * mpmath.exp(lp) + (1 - share) * mpmath.exp(lq))


def _skew(lp: Any, lq: Any, share: Any) -> Any:
    p, q = mpmath.exp(lp), mpmath.exp(lq)
    return p * (lp - _log_mixture(lp, lq, share)) - p + share * p + (1 - share) * q


def _jsd(lp: Any, lq: Any, beta: Any) -> Any:
    lm = _log_mixture(lp, lq, beta)
    return beta * mpmath.exp(lp) * (lp - lm) + (1 - beta) * mpmath.exp(lq) * (lq - lm)


def _alpha(lp: Any, lq: Any, alpha: Any) -> Any:
    p, q = mpmath.exp(lp), mpmath.exp(lq)
    return (mpmath.exp(alpha * lp + (1 - alpha) * lq) - alpha * p - (1 - alpha) * q) / (alpha * (alpha - 1))


def _forward(lp: Any, lq: Any, _: Any) -> Any:
    return mpmath.exp(lp) * (lp - lq) - mpmath.exp(lp) + mpmath.exp(lq)


# One column of every divergence, from log p, log q and the parameter, in mpmath numbers: DESIGN's table.
TERMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "forward_kl": _forward,
    "reverse_kl": lambda lp, lq, _: _forward(lq, lp, _),
    "jeffreys": lambda lp, lq, _: (mpmath.exp(lp) - mpmath.exp(lq)) * (lp - lq),
    "jsd": _jsd,
    "skew_forward_kl": _skew,
    "skew_reverse_kl": lambda lp, lq, share: _skew(lq, lp, share),
    "total_variation": lambda lp, lq, _: abs(mpmath.exp(lp) - mpmath.exp(lq)) / 2,
    "alpha": _alpha,
}

# ---------------------------------------------------------------- inputs


def make_pair(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: str = "cpu",
    spread: float = 1.0,
    distance: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(student, teacher): the teacher's logits are spread * N(0, 1), the student's `distance` * N(0, 1) off them."""
    generator = torch.Generator().manual_seed(seed)
    teacher = spread * torch.randn(*shape, generator=generator, dtype=torch.float64)
    student = teacher + distance * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return student.to(device, dtype), teacher.to(device, teacher_dtype or dtype)


# ---------------------------------------------------------------- comparison


class Result(NamedTuple):
    loss: Tensor
    grad_student: Tensor | None
    grad_teacher: Tensor | None


def run(
    function: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    *args: Any,
    grad_output: Tensor | float = 1.0,
    wanted: tuple[bool, bool] = (True, True),
    **options: Any,
) -> Result:
    """The loss and its gradients, on leaves that share the storage and the strides of the arguments."""
    student, teacher = (t.detach().requires_grad_(w) for t, w in zip((student, teacher), wanted, strict=True))
    loss = function(student, teacher, *args, **options)
    if any(wanted):
        grad = torch.as_tensor(grad_output, dtype=loss.dtype, device=loss.device).expand(loss.shape)
        loss.backward(grad)
    return Result(loss.detach(), student.grad, teacher.grad)


def assert_losses_close(value: Tensor, expected: Tensor, floor: float = TINY_LOSS) -> None:
    """Within LOSS, relatively; below `floor` absolutely; infinities and NaN in the same places."""
    torch.testing.assert_close(value.double(), expected.double(), rtol=LOSS[value.dtype], atol=floor, equal_nan=True)


def row_errors(value: Tensor, expected: Tensor, floor: float = 0.0) -> Tensor:
    """Relative L2 error of every row beyond an absolute `floor`; without one, a row of zeros must be exactly that."""
    value, expected = value.double(), expected.double()
    error, size = (value - expected).norm(dim=-1), expected.norm(dim=-1)
    return torch.where(error <= floor, 0.0, error / size)


def assert_gradients_close(value: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> None:
    """Row by row within GRADIENT; NaN in the same rows."""
    assert value is not None and expected is not None and value.shape == expected.shape
    broken = expected.isnan().any(-1)
    assert torch.equal(value.isnan().any(-1), broken), "NaN in other rows than expected"
    errors = row_errors(value, expected, floor)[~broken]
    assert (errors <= GRADIENT[value.dtype]).all(), f"relative error {errors.max():.2e}"


def loss_scale(dtype: torch.dtype) -> float:
    """The factor of a GradScaler, without which float16 gradients are subnormal numbers and lose their digits."""
    return 2.0**14 if dtype == torch.float16 else 1.0


def check(
    student: Tensor,
    teacher: Tensor,
    *args: Any,
    grad_output: Tensor | float = 1.0,
    wanted: tuple[bool, bool] = (True, True),
    floor: float = 0.0,
    **options: Any,
) -> Result:
    """Compare distillation_loss and both its gradients with the float64 oracle on the same, rounded inputs."""
    grad_output = grad_output * max(loss_scale(student.dtype), loss_scale(teacher.dtype))
    ours = run(kldiv_ext.distillation_loss, student, teacher, *args, grad_output=grad_output, wanted=wanted, **options)
    theirs = run(
        reference.distillation_loss,
        student.double(),
        teacher.double(),
        *args,
        grad_output=torch.as_tensor(grad_output).double(),
        wanted=wanted,
        **options,
    )
    both = (student.dtype, teacher.dtype)
    assert ours.loss.dtype == (torch.float64 if torch.float64 in both else torch.float32)
    assert ours.loss.shape == theirs.loss.shape and ours.loss.device == student.device
    assert_losses_close(ours.loss, theirs.loss)
    for wants, value, expected, like in zip(wanted, ours[1:], theirs[1:], (student, teacher), strict=True):
        assert (value is not None) == wants
        if value is not None:
            assert value.dtype == like.dtype and value.device == like.device
            assert_gradients_close(value, expected, floor)
    return ours


def need_isa(isa: str) -> None:
    """Skip where this machine cannot run that instruction set."""
    runs = {"AVX512": ("portable", "avx2", "avx512"), "AVX2": ("portable", "avx2")}
    if isa not in runs.get(torch.backends.cpu.get_cpu_capability(), ("portable",)):
        pytest.skip(f"this machine has no {isa}")


def cases(table: dict[str, Any]) -> Any:
    """A table {id: case} as arguments of pytest.mark.parametrize."""
    return [pytest.param(case, id=name) for name, case in table.items()]
