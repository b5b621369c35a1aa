"""Inputs, the oracle and comparisons for the emulated kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulation.harness import DTYPES, Device, Guarded, accumulation_dtype
from kldiv_ext import reference

KB = 1024
A100 = Device(80, 108, 163 * KB)
RTX_4090 = Device(89, 128, 99 * KB)
H200 = Device(90, 132, 227 * KB, clusters=True)
B200 = Device(100, 148, 227 * KB, clusters=True)
RTX_5090 = Device(120, 170, 99 * KB, clusters=True)

# (name, parameter); the last two become another divergence.
DIVERGENCES = [
    ("forward_kl", 0.0),
    ("reverse_kl", 0.0),
    ("jeffreys", 0.0),
    ("jsd", 0.3),
    ("skew_forward_kl", 0.1),
    ("skew_reverse_kl", 0.2),
    ("total_variation", 0.0),
    ("alpha", 0.4),
    ("skew_forward_kl", 1.0),
    ("jsd", 1.0),
]
HALF = [torch.float16, torch.bfloat16]
# Around a group of eight, a warp's worth of groups and the limits of the launch rules.
COLUMNS = (1, 2, 7, 8, 9, 31, 33, 257, 1000, 4097)
ORDERS = [("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)]

EVERY_DIVERGENCE = pytest.mark.parametrize(("divergence", "parameter"), DIVERGENCES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FLOAT32_AND_BFLOAT16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

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
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    labels: Tensor | None = None,
    hard_scale: float = 0.0,
    logit_scale: tuple[float, float] = (1.0, 1.0),
    logit_softcap: tuple[float, float] = (0.0, 0.0),
    valid_vocab: int | None = None,
) -> dict[str, Tensor]:
    """Losses and gradients that Kernels.distillation should return for the same arguments, in float64."""
    leaves = [z.double().requires_grad_() for z in (student, teacher)]
    sides = zip(leaves, logit_scale, logit_softcap, strict=True)
    effective = [reference.effective_logits(z, scale, cap, valid_vocab) for z, scale, cap in sides]
    losses = reference.weighted_losses(*effective, labels, scale, hard_scale, divergence, parameter, temperature)
    if row_scale is not None:
        losses = losses * row_scale
    grad_student, grad_teacher = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    return {"row_loss": losses.detach(), "grad_student": grad_student, "grad_teacher": grad_teacher}


def assert_losses(actual: Tensor, expected: Tensor, rtol: float | None = None, atol: float = 1e-9) -> None:
    """Within the tolerance of the dtype, unless another is given."""
    rtol = LOSS_TOLERANCE[actual.dtype] if rtol is None else rtol
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    """Each row within the tolerance of its dtype; the log-sum-exps' own rounding and a subnormal step are allowed."""
    error = (actual.double() - expected).norm(dim=-1)
    step = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    floor = torch.finfo(accumulation_dtype(actual)).eps + step * actual.shape[-1] ** 0.5
    assert (error <= GRADIENT_TOLERANCE[actual.dtype] * expected.norm(dim=-1) + floor).all(), error.max()


def assert_close(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    rows: slice | list[int] = slice(None),
    rtol: float | None = None,
) -> None:
    """Losses and gradients of these rows, and what the oracle has for them."""
    for name, tensor in actual.items():
        if name == "row_loss":
            assert_losses(tensor[rows], expected[name], rtol)
        elif name.startswith("grad"):
            assert_gradient(tensor[rows], expected[name])


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], *names: str) -> None:
    """Bit by bit; `names`: only these outputs."""
    assert names or actual.keys() == expected.keys()
    for name in names or actual:
        bits = (tensor[name].reshape(-1).view(torch.uint8) for tensor in (actual, expected))
        assert torch.equal(*bits), name


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit, those that `actual` has."""
    assert_same(actual, expected, *(name for name in actual if name.startswith("grad")))
