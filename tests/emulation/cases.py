"""Inputs, the oracle and comparisons for the emulated kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emulation.harness import BOTH, NEITHER, STUDENT, TEACHER, Device, Guarded, Kernels, accumulation_dtype
from kldiv_ext import reference

Options = dict[str, Any]  # of Kernels.distillation
Outputs = dict[str, Tensor]

KB = 1024
A100 = Device(80, 108, 163 * KB)
RTX_4090 = Device(89, 128, 99 * KB)
H200 = Device(90, 132, 227 * KB, clusters=True)
B200 = Device(100, 148, 227 * KB, clusters=True)
RTX_5090 = Device(120, 170, 99 * KB, clusters=True)

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)
# Around a group of eight, a warp's worth of groups and the limits of the launch rules.
COLUMNS = (1, 2, 7, 8, 9, 31, 33, 257, 1000, 4097)
ORDERS = (("ascending", 0), ("descending", 0), ("random", 1), ("random", 2))

FORWARD_KL: Options = {"divergence": "forward_kl"}
REVERSE_KL: Options = {"divergence": "reverse_kl"}
JSD: Options = {"divergence": "jsd", "parameter": 0.3}
DIVERGENCES = (
    FORWARD_KL,
    REVERSE_KL,
    {"divergence": "jeffreys"},
    JSD,
    {"divergence": "skew_forward_kl", "parameter": 0.1},
    {"divergence": "skew_reverse_kl", "parameter": 0.2},
    {"divergence": "total_variation"},
    {"divergence": "alpha", "parameter": 0.4},
    # These two become another divergence.
    {"divergence": "skew_forward_kl", "parameter": 1.0},
    {"divergence": "jsd", "parameter": 1.0},
)


def each_divergence(*divergences: Options) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("divergence", divergences, ids=lambda d: "-".join(map(str, d.values())))


def each_dtype(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=str)


# Relative L2 error of a row's gradient: rounding to the dtype, plus float32 arithmetic.
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def logits(rows: int, columns: int, dtype: torch.dtype, gap: float = 1.0) -> tuple[Tensor, Tensor]:
    """A student and a teacher whose logits differ by about `gap`."""
    student = 3 * torch.randn(rows, columns, dtype=torch.float64)
    teacher = student + gap * torch.randn(rows, columns, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def placed(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy `offset` elements after a 16-byte boundary, with NaN around it."""
    first = Guarded.MARGIN + offset
    buffer = torch.full([tensor.numel() + 2 * Guarded.MARGIN], torch.nan, dtype=tensor.dtype)
    return buffer[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


def oracle(
    student: Tensor,
    teacher: Tensor,
    divergence: str = "forward_kl",
    parameter: float = 0.0,
    scale: float = 1.0,
    hard_scale: float = 0.0,
    row_scale: Tensor | None = None,
    **options: Any,
) -> Outputs:
    """What Kernels.distillation should return for the same arguments, in float64."""
    leaves = [z.double().requires_grad_() for z in (student, teacher)]
    options |= {"beta": parameter, "skew": parameter, "alpha": parameter, "divergence": divergence}
    options |= {"soft_weight": scale, "hard_weight": hard_scale, "weight": row_scale}
    losses = reference.distillation_loss(*leaves, reduction="none", **options)
    grad_student, grad_teacher = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    return {"row_loss": losses.detach(), "grad_student": grad_student, "grad_teacher": grad_teacher}


def assert_losses(actual: Tensor, expected: Tensor, rtol: float | None = None, atol: float = 1e-9) -> None:
    """Within the tolerance of the dtype, unless another is given."""
    rtol = LOSS_TOLERANCE[actual.dtype] if rtol is None else rtol
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_gradient(actual: Tensor, expected: Tensor, rtol: float | None = None, atol: float | None = None) -> None:
    """The L2 error of each row, within the tolerance of the dtype unless another is given."""
    rtol = GRADIENT_TOLERANCE[actual.dtype] if rtol is None else rtol
    if atol is None:  # the log-sum-exps' own rounding, and a subnormal step
        info = torch.finfo(actual.dtype)
        atol = torch.finfo(accumulation_dtype(actual)).eps + info.smallest_normal * info.eps * actual.shape[-1] ** 0.5
    error = (actual.double() - expected).norm(dim=-1)
    assert (error <= rtol * expected.norm(dim=-1) + atol).all(), error.max()


def assert_close(actual: Outputs, expected: Outputs, rtol: float | None = None, atol: float = 1e-9) -> None:
    """Losses, within these tolerances, and gradients."""
    for name, tensor in actual.items():
        if name == "row_loss":
            assert_losses(tensor, expected[name], rtol, atol)
        elif name.startswith("grad"):
            assert_gradient(tensor, expected[name])


def assert_same(actual: Outputs, expected: Outputs, *names: str) -> None:
    """Bit by bit; `names`: only outputs whose names begin like one of these."""
    compared = [name for name in actual if name.startswith(names or "")]
    assert compared and (names or actual.keys() == expected.keys())
    for name in compared:
        bits = (tensor[name].reshape(-1).view(torch.uint8) for tensor in (actual, expected))
        assert torch.equal(*bits), name


def rows_of(outputs: Outputs, rows: Any) -> Outputs:
    """What there is for these rows."""
    return {name: tensor[rows] for name, tensor in outputs.items() if tensor.dim() > 0}


def check(kernels: Kernels, student: Tensor, teacher: Tensor, **options: Any) -> Outputs:
    """Every way to a loss and its gradients: close to the oracle, and all with the same bits.

    A gradient is made in the forward or later, with the other gradient or without, at any address."""

    def run(gradients: tuple[bool, bool] = NEITHER, **arguments: Any) -> Outputs:
        return kernels.distillation(student, teacher, gradients=gradients, **arguments, **options)

    expected = oracle(student, teacher, **options)
    forward, both = run(), run(BOTH, reduce=True)
    assert_close(both, expected)
    torch.testing.assert_close(both["loss"], both["row_loss"].double().sum().to(both["loss"].dtype))
    assert_same(forward, both, "row_loss")
    for early in (run(STUDENT), run(STUDENT, offset=1), run(TEACHER)):
        assert_same(early, both, "row_loss", "grad")
    constants = {
        BOTH: forward["row_constants"],
        STUDENT: run(needs_grad=STUDENT)["row_constants"],
        TEACHER: run(needs_grad=TEACHER)["row_constants"],
    }
    for gradients, row_constants in constants.items():
        later = run(gradients, row_constants=row_constants, grad_output=torch.ones_like(both["loss"]))
        assert_same(later, both, "grad")
    per_row = torch.linspace(-2, 0.5, len(both["row_loss"]), dtype=both["loss"].dtype)
    later = run(TEACHER, row_constants=constants[BOTH], grad_output=per_row)
    assert_gradient(later["grad_teacher"], per_row.double()[:, None] * expected["grad_teacher"])
    assert_losses(run(needs_grad=NEITHER)["row_loss"], forward["row_loss"])
    return both
