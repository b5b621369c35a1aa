"""Expected values: tolerances, each divergence in mpmath, and the comparison with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from cases import Result, run, run_models
from torch import Tensor
from torch.utils._pytree import tree_leaves

import kldiv_ext
from kldiv_ext import reference

# Relative error of a loss, by the dtype of the accumulation. Away from 0 the promise for float32 is 1e-5.
LOSS = {
    torch.float64: 1e-13,  # some hundred eps: sums of 1e5 terms in another order
    torch.float32: 3e-6,  # 20 eps: seen 6e-7, promised 1e-5
}

# Relative L2 error of a row of a gradient, by the dtype of the gradient.
GRADIENT = {
    torch.float64: 1e-12,  # seen 1e-13
    torch.float32: 1e-5,  # as the loss; seen 6e-6 in a thousand rows
    torch.bfloat16: 4.0e-3,  # the promise; a row with one entry has half an ulp of 8 bits, 3.9e-3
    torch.float16: 5.0e-4,  # half an ulp of 11 bits is 4.9e-4
}

# Relative L2 error of a whole gradient of linear_distillation_loss, by its dtype. In 16 bits, gradients of logits are
# rounded, and on a CPU logits and the products of chunks are, too.
LINEAR_GRADIENT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

# Absolute error of a loss, per position: the promise for losses below 1e-6.
TINY_LOSS = 1e-9


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


# {divergence: the term of one column, from log p, log q and the parameter, in mpmath numbers}
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


def assert_equal(ours: Any, expected: Any) -> None:
    """The same bits and dtypes, in tensors or nested collections; None equals None."""
    for value, other in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        assert value is other is None or (value.dtype == other.dtype and torch.equal(value, other))


def assert_losses_close(value: Tensor, expected: Tensor, floor: float = TINY_LOSS) -> None:
    """Within LOSS, relatively; below `floor` absolutely; infinities and NaN in the same places."""
    torch.testing.assert_close(value.double(), expected.double(), rtol=LOSS[value.dtype], atol=floor, equal_nan=True)


def row_errors(value: Tensor, expected: Tensor, floor: float = 0.0) -> Tensor:
    """Relative L2 error of every row, 0 where the absolute error is at most `floor`; inf for a wrong row of zeros."""
    value, expected = value.double(), expected.double()
    error, size = (value - expected).norm(dim=-1), expected.norm(dim=-1)
    return torch.where(error <= floor, 0.0, error / size)


def assert_gradients_close(value: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> None:
    """Every row within GRADIENT; NaN in the same rows."""
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
    needs_grad: tuple[bool, bool] = (True, True),
    floor: float = 0.0,
    **options: Any,
) -> Result:
    """Compare distillation_loss and its gradients with the float64 reference on the same, rounded inputs."""
    scale = max(loss_scale(student.dtype), loss_scale(teacher.dtype))
    grad_output = grad_output if scale == 1 else grad_output * scale  # a product may have other strides
    options |= {"grad_output": grad_output, "needs_grad": needs_grad}
    ours = run(kldiv_ext.distillation_loss, student, teacher, *args, **options)
    theirs = run(reference.distillation_loss, student.double(), teacher.double(), *args, **options)
    assert ours.loss.dtype == (torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32)
    assert ours.loss.shape == theirs.loss.shape and ours.loss.device == student.device
    assert_losses_close(ours.loss, theirs.loss)
    assert [value is not None for value in ours.gradients] == list(needs_grad)
    for value, expected, like in zip(ours.gradients, theirs.gradients, (student, teacher), strict=True):
        if value is not None:
            assert value.dtype == like.dtype and value.device == like.device
            assert_gradients_close(value, expected, floor)
    return ours


def check_models(models: dict[str, Tensor], *, chunk_size: int | None = 5, **arguments: Any) -> None:
    """Compare linear_distillation_loss and its gradients with the float64 reference on the same, rounded inputs."""
    scale = max(loss_scale(x.dtype) for x in models.values()) / 8  # gradients of weights are sums over positions
    arguments["grad_output"] = scale * arguments.get("grad_output", 1.0)
    workspace = {"chunk_size": chunk_size, "max_workspace": arguments.pop("max_workspace", None)}
    loss, gradients = run_models(kldiv_ext.linear_distillation_loss, models, **workspace, **arguments)
    doubled = {name: x.double() for name, x in models.items()}
    exact_loss, exact_gradients = run_models(reference.linear_distillation_loss, doubled, **arguments)
    tolerance = max(LINEAR_GRADIENT[x.dtype] for x in models.values())
    assert loss.shape == exact_loss.shape
    torch.testing.assert_close(loss.double(), exact_loss, rtol=tolerance, atol=tolerance)
    assert set(gradients) == set(exact_gradients)
    for name, gradient in gradients.items():
        assert gradient.dtype == models[name].dtype and gradient.shape == models[name].shape
        assert_norm_close(gradient, exact_gradients[name], tolerance)


def assert_norm_close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """The relative L2 error of a whole tensor is at most `tolerance`; a tensor of zeros must be exactly that."""
    error, size = (value.double() - expected).norm(), expected.norm()
    assert error <= tolerance * size, f"relative error {error / size:.2e}"


def need_isa(isa: str) -> None:
    """Skip where this machine cannot run that instruction set."""
    runs = {"AVX512": ("portable", "avx2", "avx512"), "AVX2": ("portable", "avx2")}
    if isa not in runs.get(torch.backends.cpu.get_cpu_capability(), ("portable",)):
        pytest.skip(f"this machine has no {isa}")
