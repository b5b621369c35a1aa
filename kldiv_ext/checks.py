"""Checks of tensors, and the row scales and divisor that operators take for labels, mask, weight and reduction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library
from .linear import Models
from .options import LogitsOptions, LossOptions, OperatorOptions, denominator, operator_options

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_DIMS = 9
"""What the kernels' RowLayout holds whatever the strides."""


class Argument(NamedTuple):
    """A tensor and the name of the argument that it was passed as."""

    name: str
    tensor: Tensor


def has_kernels(device: torch.device) -> bool:
    """Whether the operators run there."""
    return device.type in ("cpu", "meta") or (device.type == "cuda" and not _library.cuda_missing_reason)


# ---------------------------------------------------------------- logits, hidden states, heads


def check_floating(name: str, tensor: object) -> None:
    """Raise unless `tensor` is a dense tensor of a dtype that the kernels take."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got layout {kind}")


def check_last_dimension(name: str, tensor: object, letter: str) -> None:
    """Raise unless `tensor` is [..., letter] with at least one column."""
    check_floating(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., {letter}] with {letter} >= 1, got shape {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, like: Argument) -> None:
    """Raise unless `tensor` is on the device of `like`."""
    if tensor.device != like.tensor.device:
        raise ValueError(f"{name} must be on the device of {like.name}, {like.tensor.device}, got {tensor.device}")


def check_kernels(name: str, device: torch.device) -> None:
    """Raise where no operator runs on `device`."""
    if device.type == "cuda" and _library.cuda_missing_reason:
        raise RuntimeError(
            f"kldiv_ext has no CUDA kernels here: {_library.cuda_missing_reason}. Rebuild with a CUDA toolkit and a "
            "CUDA build of torch (FORCE_CUDA=1 pip install . makes a missing one an error); "
            "python -m kldiv_ext.info tells what was built."
        )
    if not has_kernels(device):
        raise ValueError(
            f"{name} must be on the CPU or a CUDA device, got {device}; kldiv_ext.reference has what runs anywhere"
        )


def check_logits(student_logits: Tensor, teacher_logits: Tensor, valid_vocab: int | None) -> None:
    """Raise unless the two [..., V] can be compared."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_last_dimension(name, logits, "V")
    student, teacher = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if student != teacher and (valid_vocab is None or student[:-1] != teacher[:-1]):
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, with valid_vocab but for the last dimension, "
            f"got {student} and {teacher}"
        )
    if valid_vocab is not None and valid_vocab > min(student[-1], teacher[-1]):
        raise ValueError(
            f"valid_vocab must not exceed either vocabulary, got {valid_vocab} for logits of shapes "
            f"{student} and {teacher}"
        )
    check_device("teacher_logits", teacher_logits, Argument("student_logits", student_logits))
    check_kernels("student_logits", student_logits.device)


def check_models(models: Models, teacher_is_logits: bool, valid_vocab: int | None, autocast: bool) -> None:
    """Raise unless both sides' logits can be computed from `models` and compared."""
    student, teacher = models.student, models.teacher
    check_head("student", student, models.student_weight, models.student_bias, autocast)
    if teacher_is_logits:
        name = "teacher_logits"
        check_last_dimension(name, teacher, "V")
        for given, tensor in (("teacher_weight", models.teacher_weight), ("teacher_bias", models.teacher_bias)):
            check_absent(given, tensor)
        teacher_vocab = teacher.shape[-1]
    else:
        name = "teacher_hidden"
        check_head("teacher", teacher, models.teacher_weight, models.teacher_bias, autocast)
        assert models.teacher_weight is not None
        teacher_vocab = models.teacher_weight.shape[0]
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of student_hidden but for the last dimension, "
            f"{(*student.shape[:-1], '...')}, got {tuple(teacher.shape)}"
        )
    check_device(name, teacher, Argument("student_hidden", student))
    student_vocab = models.student_weight.shape[0]
    if valid_vocab is None and teacher_vocab != student_vocab:
        raise ValueError(
            "both sides must have the same vocabulary, or valid_vocab be given, got student_weight of shape "
            f"{tuple(models.student_weight.shape)} and {teacher_vocab} classes of the teacher"
        )
    if valid_vocab is not None and valid_vocab > min(student_vocab, teacher_vocab):
        raise ValueError(
            f"valid_vocab must not exceed either vocabulary, got {valid_vocab} for {student_vocab} classes "
            f"of the student and {teacher_vocab} of the teacher"
        )
    check_kernels("student_hidden", student.device)


def check_absent(name: str, value: object) -> None:
    """Raise where an argument is given in addition to teacher_logits."""
    if value is not None:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be None where teacher_logits are given, got {got}")


def check_head(
    side: str,
    hidden: Tensor | None,  # [..., H]
    weight: Tensor | None,  # [V, H]
    bias: Tensor | None,  # [V]
    autocast: bool,
) -> None:
    """Raise unless hidden @ weight.T + bias can be computed; without autocast all have one dtype."""
    if side == "teacher" and (hidden is None or weight is None):
        missing = "teacher_hidden" if hidden is None else "teacher_weight"
        raise TypeError(f"{missing} must be a Tensor where teacher_logits are not given, got None")
    check_last_dimension(f"{side}_hidden", hidden, "H")
    check_floating(f"{side}_weight", weight)
    if bias is not None:
        check_floating(f"{side}_bias", bias)
    assert hidden is not None and weight is not None
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight must be [V, {hidden.shape[-1]}], as {side}_hidden has it, with V >= 1, "
            f"got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{side}_bias must be [{weight.shape[0]}], as {side}_weight has it, got shape {tuple(bias.shape)}"
        )
    for name, tensor in ((f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is None:
            continue
        check_device(name, tensor, Argument(f"{side}_hidden", hidden))
        cast = autocast and torch.float64 not in (tensor.dtype, hidden.dtype)
        if tensor.dtype != hidden.dtype and not cast:
            raise TypeError(
                f"{name} must have the dtype of {side}_hidden, {hidden.dtype}, or torch.autocast be in use, "
                f"got {tensor.dtype}"
            )


# ---------------------------------------------------------------- gradients in place


def check_in_place(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise where a gradient must not overwrite the student's logits."""
    base = student_logits if student_logits._base is None else student_logits._base
    if base.is_leaf:
        raise ValueError(
            "inplace_backward: student_logits must not be a leaf or a view of one, whose values are still needed; got "
            f"{'a leaf' if base is student_logits else 'a view of a leaf'} of shape {tuple(student_logits.shape)}"
        )
    if _overlaps_itself(student_logits):
        raise ValueError(
            "inplace_backward: elements of student_logits must not share memory; "
            f"got shape {tuple(student_logits.shape)} with strides {student_logits.stride()}"
        )
    if _share_memory(student_logits, teacher_logits):
        raise ValueError(
            "inplace_backward: student_logits must not share memory with teacher_logits; got tensors of one storage, "
            f"shapes {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share an address: false if every stride exceeds the extent of all smaller ones."""
    extent = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride <= extent:
            return tensor.numel() > 0
        extent += stride * (size - 1)
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges from first to last element intersect; false for tensors without memory."""
    if torch._C._len_torch_dispatch_stack() > 0 or "meta" in (a.device.type, b.device.type):
        return False

    def end(tensor: Tensor) -> int:
        steps = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
        return tensor.data_ptr() + (steps + 1) * tensor.element_size()

    return a.numel() > 0 and a.data_ptr() != 0 and a.data_ptr() < end(b) and b.data_ptr() < end(a)


# ---------------------------------------------------------------- positions


def check_label_range(labels: Tensor, row_scale: Tensor | None, columns: int) -> None:
    """IndexError for a label that counts and lies outside [0, columns), where reading labels does not synchronize."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(labels) is not Tensor
    if traced or labels.device.type != "cpu":
        return
    wrong = (labels < 0) | (labels >= columns)
    if row_scale is not None:
        wrong &= row_scale != 0
    if wrong.any():
        raise IndexError(f"labels must be in [0, {columns}) where a position counts, got {labels[wrong][0].item()}")


def check_num_items(num_items: int | Tensor, reduction: str, like: Argument) -> None:
    """Raise unless `num_items` can be the denominator of a mean."""
    if reduction != "mean":
        raise ValueError(f"num_items is the denominator of reduction='mean', got {num_items} with {reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0 or num_items.dtype == torch.bool or num_items.is_complex():
            raise ValueError(
                f"num_items must be a 0-d tensor of numbers, got {num_items.dtype} {tuple(num_items.shape)}"
            )
        if num_items.requires_grad:
            raise ValueError("num_items must not require a gradient")
        check_device("num_items", num_items, like)
    elif isinstance(num_items, bool) or not isinstance(num_items, int):
        raise TypeError(f"num_items must be an int or a 0-d tensor, got {num_items!r}")
    elif not 0 <= num_items < 2**63:
        raise ValueError(f"num_items must not be negative, nor beyond 64 bits, got {num_items}")


def check_per_position(name: str, tensor: object, like: Argument, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `tensor` has one element of one of `dtypes` per position of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {tensor.dtype}")
    batch = tuple(like.tensor.shape[:-1])
    if tensor.shape != batch:
        raise ValueError(
            f"{name} must have the shape of {like.name} without the last dimension, {batch}, got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, like)


class RowArguments(NamedTuple):
    """Everything that differs from position to position, as operators take it."""

    labels: Tensor | None  # [rows], where there is a cross entropy
    scale: Tensor | None  # [rows], multiplies a row's loss; None: all rows count alike; 0: the row is not read


def counting(
    like: Argument,  # [..., anything]
    labels: Tensor | None,  # [...]
    mask: Tensor | None,  # [...]
    options: LogitsOptions,
) -> Tensor | None:
    """Which positions mask and labels let count, [...] bool; None: all."""
    counts = None
    if labels is not None:
        check_per_position("labels", labels, like, (torch.int64,))
        counts = labels != options["ignore_index"]
    if mask is not None:
        check_per_position("mask", mask, like, (torch.bool,))
        counts = mask if counts is None else counts & mask
    return counts


def flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[...] as [rows], contiguous."""
    return None if tensor is None else tensor.to(dtype).reshape(-1).contiguous()


def loss_arguments(
    like: Argument,  # [..., anything]
    dtype: torch.dtype,  # of the row scales
    columns: int,
    labels: Tensor | None,  # [...]
    mask: Tensor | None,  # [...]
    weight: Tensor | None,  # [...]
    num_items: int | Tensor | None,
    options: LossOptions,
    composite: bool,
) -> tuple[RowArguments, OperatorOptions]:
    """Check the arguments that have one element per position, and return what an operator takes in their place.

    Where all rows count alike, the operator divides by the denominator of the reduction; elsewhere the denominator of
    the mean is in the row scales. Nothing is read on the host. `composite`: labels may be transformed tensors, whose
    values cannot be read.
    """
    reduction, hard_weight = options["reduction"], options["hard_weight"]
    if hard_weight != 0 and labels is None:
        raise ValueError(f"labels must be given where hard_weight is not 0, got None with hard_weight={hard_weight}")
    if num_items is not None:
        check_num_items(num_items, reduction, like)
    batch, device = like.tensor.shape[:-1], like.tensor.device
    scale = counting(like, labels, mask, options)
    if weight is not None:
        check_per_position("weight", weight, like, FLOATING)
        if weight.requires_grad:
            raise ValueError("weight must not require a gradient; use reduction='none' and multiply")
        scale = weight.double() if scale is None else torch.where(scale, weight.double(), 0)

    def count() -> int | Tensor:
        if isinstance(num_items, Tensor):
            return num_items.double()
        if num_items is not None:  # a copy from the host would synchronize
            return torch.full((), num_items, dtype=torch.float64, device=device)
        return math.prod(batch) if scale is None else scale.sum(dtype=torch.float64)

    divisor = denominator(reduction, batch, count)
    if isinstance(divisor, Tensor):  # num_items, a sum over positions, or a size that torch.jit.trace records
        # float64 is exact for counts; for weights the number of threads changes no digit that float32 keeps.
        scale = torch.ones(batch, device=device) if scale is None else scale
        scale = torch.where(divisor == 0, 0, scale.double() / divisor)
        divisor = 1
    rows = RowArguments(flat(labels, torch.int64) if hard_weight != 0 else None, flat(scale, dtype))
    if rows.labels is not None and not composite:
        check_label_range(rows.labels, rows.scale, columns)
    return rows, operator_options(options, divisor if divisor is None else max(divisor, 1))
