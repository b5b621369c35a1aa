"""Loads the shared objects and registers the fake kernels: shapes and dtypes of what the operators return."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _C, _build_info

DIVERGENCES: dict[str, str] = _C.divergences
"""{divergence: name of its parameter, or "" where it has none}"""

ROW_CONSTANTS = _C.row_constants
"""How many numbers per row the operator `distillation_loss` keeps for its backward."""

ROW_STATS = _C.row_stats
"""How many numbers per row the operator `token_stats` returns."""

# Environment variables that choose among the kernels, and their values.
_FORCED = {"KLDIV_EXT_CPU_ISA": ("avx512", "avx2", "portable"), "KLDIV_EXT_CUDA_TIER": ("resident", "streamed")}
for _variable, _allowed in _FORCED.items():
    _value = os.environ.get(_variable, "")
    if _value not in ("", *_allowed):
        _names = ", ".join(_allowed[:-1]) + " or " + _allowed[-1]
        raise ValueError(f"the environment's {_variable} must be {_names}, but is {_value!r}")


def _load_cuda() -> str:
    """Load the CUDA kernels; returns why they are missing, or ""."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    path = Path(__file__).with_name("_C_cuda.abi3.so")
    if not path.exists():
        return f"this copy of kldiv_ext was built without CUDA kernels ({_build_info.no_cuda_reason or 'no object'})"
    built = _build_info.cuda_version or "?"
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"they were built with CUDA {built}, torch {torch.__version__} with CUDA {torch.version.cuda}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return ""


cuda_missing_reason = _load_cuda()

ops = torch.ops.kldiv_ext
library = torch.library.Library("kldiv_ext", "IMPL")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums and losses: float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _gradient(like: Tensor, needed: bool) -> Tensor:
    return like.new_empty(like.shape if needed else [0])


def _rows(logits: Tensor) -> int:
    return logits.numel() // logits.shape[-1]


def _losses(student: Tensor, teacher: Tensor, divisor: int | None) -> Tensor:
    """One loss per row, or their sum."""
    shape = [_rows(student)] if divisor is None else []
    return student.new_empty(shape, dtype=accumulation_dtype(student, teacher))


@torch.library.register_fake("kldiv_ext::distillation_loss")
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_scale: Tensor | None,
    soft_scale: float,
    hard_scale: float,
    divisor: int | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, grad_student, grad_teacher, grads_in_forward = others
    return (
        _losses(student, teacher, divisor),
        student.new_empty([_rows(student), ROW_CONSTANTS], dtype=accumulation_dtype(student, teacher)),
        _gradient(student, grads_in_forward and grad_student),
        _gradient(teacher, grads_in_forward and grad_teacher),
    )


@torch.library.register_fake("kldiv_ext::distillation_loss_backward")
def _(grad_output: Tensor, student: Tensor, teacher: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, grad_student, grad_teacher = others
    return _gradient(student, grad_student), _gradient(teacher, grad_teacher)


@torch.library.register_fake("kldiv_ext::distillation_loss_backward_")
def _(grad_output: Tensor, student: Tensor, teacher: Tensor, *others: Any) -> Tensor:
    return _gradient(teacher, others[-1])


@torch.library.register_fake("kldiv_ext::distillation_loss_out")
def _(student: Tensor, teacher: Tensor, *others: Any) -> None:
    return None


@torch.library.register_fake("kldiv_ext::linear_distillation_loss")
def _(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor | None,
    soft_scale: float,
    hard_scale: float,
    divisor: int | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    needs_grad = others[-1]
    sources = (student, student_weight, student_bias, teacher, teacher_weight, teacher_bias)
    gradients = (_gradient(student if t is None else t, n) for t, n in zip(sources, needs_grad, strict=True))
    return _losses(student, teacher, divisor), *gradients


@torch.library.register_fake("kldiv_ext::token_stats")
def _(student: Tensor, teacher: Tensor, *others: Any) -> Tensor:
    return student.new_empty([_rows(student), ROW_STATS], dtype=accumulation_dtype(student, teacher))


@torch.library.register_fake("kldiv_ext::new_output")
def _(like: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(sizes, dtype=dtype)


@torch.library.register_fake("kldiv_ext::scale_")
def _(gradient: Tensor, factor: Tensor) -> None:
    return None


@torch.library.register_fake("kldiv_ext::kl_div")
def _(input: Tensor, target: Tensor, divisor: int | None, log_target: bool) -> Tensor:
    if divisor is None:
        return input.new_empty(input.shape, dtype=torch.promote_types(input.dtype, target.dtype))
    return input.new_empty([], dtype=accumulation_dtype(input, target))


@torch.library.register_fake("kldiv_ext::kl_div_backward")
def _(
    grad_output: Tensor,
    input: Tensor | None,
    target: Tensor,
    divisor: int | None,
    log_target: bool,
    grad_input: bool,
    grad_target: bool,
) -> tuple[Tensor, Tensor]:
    return _gradient(target if input is None else input, grad_input), _gradient(target, grad_target)
