"""Checks of every argument, and what becomes of options, labels, masks and weights: numbers and one factor per row."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import DIVERGENCES
from .autograd import Options

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "sum", "mean", "batchmean")
LARGEST = 1e15
"""Of a temperature, a weight, a scale; its inverse is the smallest. Products of two still fit float32."""
MAX_DIMS = 9
"""What the kernels' RowLayout holds whatever the strides."""


def has_kernels(device: torch.device) -> bool:
    """Whether the operators run there."""
    return device.type in ("cpu", "meta") or (device.type == "cuda" and not _library.cuda_missing_reason)


def pair(
    value: float | tuple[float | None, float | None] | list[float | None] | None, default: float
) -> tuple[float, float]:
    """An option of both sides as (student, teacher)."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    student, teacher = (default if x is None else float(x) for x in pair)
    return student, teacher


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless it is a dense tensor of a dtype that the kernels take."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got layout {kind}")


def check_logits(student_logits: Tensor, teacher_logits: Tensor, valid_vocab: int | None) -> None:
    """Raise where these cannot be compared."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_floating(name, logits)
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name} must be [..., V] with V >= 1, got shape {tuple(logits.shape)}")
    shapes = student_logits.shape, teacher_logits.shape
    if shapes[0] != shapes[1] and (valid_vocab is None or shapes[0][:-1] != shapes[1][:-1]):
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, with valid_vocab but for the last dimension, "
            f"got {tuple(shapes[0])} and {tuple(shapes[1])}"
        )
    if valid_vocab is not None and valid_vocab > min(shapes[0][-1], shapes[1][-1]):
        raise ValueError(
            f"valid_vocab must not exceed either vocabulary, got {valid_vocab} for logits of shapes "
            f"{tuple(shapes[0])} and {tuple(shapes[1])}"
        )
    check_device("teacher_logits", teacher_logits, "student_logits", student_logits)
    check_kernels("student_logits", student_logits.device)


def check_models(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    valid_vocab: int | None,
    autocast: bool,
) -> None:
    """Raise where logits cannot be made of these."""
    _check_side("student", student_hidden, student_weight, student_bias, autocast)
    if teacher_logits is None:
        _check_side("teacher", teacher_hidden, teacher_weight, teacher_bias, autocast)
        name, teacher, vocab = (
            "teacher_hidden",
            teacher_hidden,
            teacher_weight.shape[0] if teacher_weight is not None else 0,
        )
    else:
        for given, tensor in (
            ("teacher_hidden", teacher_hidden),
            ("teacher_weight", teacher_weight),
            ("teacher_bias", teacher_bias),
        ):
            if tensor is not None:
                raise ValueError(f"{given} must be None where teacher_logits are given, got {_kind(tensor)}")
        name, teacher = "teacher_logits", teacher_logits
        check_floating(name, teacher)
        if teacher.dim() == 0 or teacher.shape[-1] == 0:
            raise ValueError(f"{name} must be [..., V] with V >= 1, got shape {tuple(teacher.shape)}")
        vocab = teacher.shape[-1]
    assert teacher is not None
    if teacher.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of student_hidden but for the last dimension, "
            f"{(*student_hidden.shape[:-1], '...')}, got {tuple(teacher.shape)}"
        )
    check_device(name, teacher, "student_hidden", student_hidden)
    if valid_vocab is None and vocab != student_weight.shape[0]:
        raise ValueError(
            "both sides must have the same vocabulary, or valid_vocab be given, "
            f"got student_weight of shape {tuple(student_weight.shape)} and {vocab} classes of the teacher"
        )
    if valid_vocab is not None and valid_vocab > min(student_weight.shape[0], vocab):
        raise ValueError(
            f"valid_vocab must not exceed either vocabulary, got {valid_vocab} for {student_weight.shape[0]} classes "
            f"of the student and {vocab} of the teacher"
        )
    check_kernels("student_hidden", student_hidden.device)


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _check_side(side: str, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, autocast: bool) -> None:
    """A model's hidden states [..., H], weight [V, H] and bias [V]; without autocast of one dtype."""
    if side == "teacher" and (hidden is None or weight is None):
        missing = "teacher_hidden" if hidden is None else "teacher_weight"
        raise TypeError(f"{missing} must be a Tensor where teacher_logits are not given, got None")
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is not None or not name.endswith("bias"):
            check_floating(name, tensor)  # type: ignore[arg-type]
    assert hidden is not None and weight is not None
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{side}_hidden must be [..., H] with H >= 1, got shape {tuple(hidden.shape)}")
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
        check_device(name, tensor, f"{side}_hidden", hidden)
        cast = autocast and torch.float64 not in (tensor.dtype, hidden.dtype)
        if tensor.dtype != hidden.dtype and not cast:
            raise TypeError(
                f"{name} must have the dtype of {side}_hidden, {hidden.dtype}, or torch.autocast be in use, "
                f"got {tensor.dtype}"
            )


def check_workspace(max_workspace: int | None, chunk_size: int | None) -> None:
    """Raise for the first of these options of `linear_distillation_loss` that is wrong."""
    for name, value in (("max_workspace", max_workspace), ("chunk_size", chunk_size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if not 1 <= value < 2**63:
            raise ValueError(f"{name} must be positive and fit 64 bits, got {value}")


def check_kernels(name: str, device: torch.device) -> None:
    """Raise where no operator runs."""
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


def check_options(
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    alpha: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    valid_vocab: int | None = None,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float | None, float | None] | None = None,
    inplace_backward: bool = False,
) -> None:
    """Raise for the first option of `distillation_loss` that is wrong."""
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    for name, value in (("beta", beta), ("skew", skew), ("alpha", alpha)):
        _check_number(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if 0 < value < 1e-30:  # its reciprocal overflows in float32
            raise ValueError(f"{name} must be 0 or at least 1e-30, got {value}")
    _check_positive("temperature", temperature)
    for name, value in (("soft_weight", soft_weight), ("hard_weight", hard_weight)):
        _check_number(name, value)
        if not -LARGEST <= value <= LARGEST:
            raise ValueError(f"{name} must be finite and at most {LARGEST} in size, got {value}")
    for name, option in (("logit_softcap", logit_softcap), ("logit_scale", logit_scale)):
        pair = option if isinstance(option, (tuple, list)) else (option, option)
        if len(pair) != 2:
            raise ValueError(f"{name} must be a number or a pair (student, teacher), got {option!r}")
        for side in pair:
            if side is not None:
                _check_positive(name, side)
    for name, flag in (
        ("scale_by_temperature_squared", scale_by_temperature_squared),
        ("inplace_backward", inplace_backward),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    for name, integer in (("ignore_index", ignore_index), ("valid_vocab", 1 if valid_vocab is None else valid_vocab)):
        if isinstance(integer, bool) or not isinstance(integer, int):
            raise TypeError(f"{name} must be an int, got {integer!r}")
        if not -(2**63) <= integer < 2**63:
            raise ValueError(f"{name} must be a 64-bit integer, got {integer}")
    if valid_vocab is not None and valid_vocab < 1:
        raise ValueError(f"valid_vocab must be positive, got {valid_vocab}")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_positive(name: str, value: float) -> None:
    _check_number(name, value)
    if not 1 / LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be positive and finite, from {1 / LARGEST} to {LARGEST}, got {value}")


def check_in_place(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise where a gradient must not be written over the student's logits."""
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
    """Whether two elements may lie at one place: unless every dimension steps over all that the smaller ones span."""
    span = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride <= span:
            return tensor.numel() > 0
        span += stride * (size - 1)
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the stretches of memory from first to last element meet; not where there is no memory."""
    if torch._C._len_torch_dispatch_stack() > 0 or "meta" in (a.device.type, b.device.type):
        return False

    def last(tensor: Tensor) -> int:
        steps = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
        return tensor.data_ptr() + (steps + 1) * tensor.element_size()

    return a.numel() > 0 and a.data_ptr() != 0 and a.data_ptr() < last(b) and b.data_ptr() < last(a)


def check_label_range(labels: Tensor, row_scale: Tensor | None, columns: int) -> None:
    """IndexError for a label that counts and is no column, where the host can look at it without waiting."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(labels) is not Tensor
    if traced or labels.device.type != "cpu":
        return
    wrong = (labels < 0) | (labels >= columns)
    if row_scale is not None:
        wrong &= row_scale != 0
    if wrong.any():
        raise IndexError(f"labels must be in [0, {columns}) where a position counts, got {labels[wrong][0].item()}")


def check_device(name: str, tensor: Tensor, of: str, like: Tensor) -> None:
    """Raise unless `tensor` is where `like`, the argument `of`, is."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {of}, {like.device}, got {tensor.device}")


def check_num_items(num_items: int | Tensor, reduction: str, of: str, like: Tensor) -> None:
    """Raise unless it can be the denominator of a mean."""
    if reduction != "mean":
        raise ValueError(f"num_items is the denominator of reduction='mean', got {num_items} with {reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0 or num_items.dtype == torch.bool or num_items.is_complex():
            raise ValueError(
                f"num_items must be a 0-d tensor of numbers, got {num_items.dtype} {tuple(num_items.shape)}"
            )
        if num_items.requires_grad:
            raise ValueError("num_items must not require a gradient")
        check_device("num_items", num_items, of, like)
    elif isinstance(num_items, bool) or not isinstance(num_items, int):
        raise TypeError(f"num_items must be an int or a 0-d tensor, got {num_items!r}")
    elif not 0 <= num_items < 2**63:
        raise ValueError(f"num_items must not be negative, nor beyond 64 bits, got {num_items}")


def _check_per_position(name: str, tensor: Tensor, of: str, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {tensor.dtype}")
    if tensor.shape != like.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of {of} without the last dimension, "
            f"{tuple(like.shape[:-1])}, got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, of, like)


def factor_per_row(
    of: str,
    like: Tensor,
    dtype: torch.dtype,
    labels: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor | None:
    """All that decides how much a position counts, as one factor per row, [rows]; None where every row counts alike.

    Labels, mask, weight and the denominator of the mean end here: the kernels know rows and factors. Everything
    stays on the device. `like`, [..., anything], is the argument `of`; `dtype` that of the factors.
    """
    counts = None
    if labels is not None:
        _check_per_position("labels", labels, of, like, (torch.int64,))
        counts = labels != ignore_index
    if mask is not None:
        _check_per_position("mask", mask, of, like, (torch.bool,))
        counts = mask if counts is None else counts & mask
    if weight is not None:
        _check_per_position("weight", weight, of, like, FLOATING)
        if weight.requires_grad:
            raise ValueError("weight must not require a gradient; use reduction='none' and multiply")
        row_weight = weight.double() if counts is None else torch.where(counts, weight.double(), 0)
    elif counts is not None:
        row_weight = counts
    elif num_items is not None:
        row_weight = torch.ones(like.shape[:-1], device=like.device)
    else:
        return None
    if reduction == "mean":
        # In float64: exact for counts, and as good as independent of the number of threads for weights.
        row_weight = row_weight.double()
        if num_items is None:
            denominator = row_weight.sum()
        elif isinstance(num_items, Tensor):
            denominator = num_items.double()
        else:  # filled on the device: a copy from the host would wait for it
            denominator = torch.full((), num_items, dtype=torch.float64, device=like.device)
        row_weight = torch.where(denominator == 0, 0, row_weight / denominator)
    return row_weight.to(dtype).reshape(-1).contiguous()


def kernel_arguments(
    of: str,
    like: Tensor,
    dtype: torch.dtype,
    columns: int,
    labels: Tensor | None,
    *,
    divergence: str,
    beta: float,
    skew: float,
    alpha: float,
    temperature: float,
    scale_by_temperature_squared: bool,
    soft_weight: float,
    hard_weight: float,
    mask: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_items: int | Tensor | None,
    valid_vocab: int | None,
    logit_softcap: float | tuple[float | None, float | None] | None,
    logit_scale: float | tuple[float | None, float | None] | None,
    plain: bool,
) -> tuple[Tensor | None, Tensor | None, Options]:
    """Labels [rows] where there is a cross entropy, a factor per row [rows] where rows differ, and the options, as
    operators take them. Positions are those of `like`, the argument `of`; each has `columns` classes. Checked are here
    the arguments that are tensors; `plain`: nobody may look at them.
    """
    if hard_weight != 0 and labels is None:
        raise ValueError(f"labels must be given where hard_weight is not 0, got None with hard_weight={hard_weight}")
    if num_items is not None:
        check_num_items(num_items, reduction, of, like)
    row_scale = factor_per_row(of, like, dtype, labels, mask, weight, ignore_index, reduction, num_items)
    hard_labels = None
    if hard_weight != 0 and labels is not None:
        hard_labels = labels.reshape(-1).contiguous()
        if not plain:
            check_label_range(hard_labels, row_scale, columns)
    parameter = {"": 0.0, "beta": beta, "skew": skew, "alpha": alpha}[DIVERGENCES[divergence]]
    options = Options(
        soft_scale=soft_weight * (float(temperature) ** 2 if scale_by_temperature_squared else 1.0),
        hard_scale=float(hard_weight),
        # With a row_scale the denominator of the mean is in it.
        reduction="sum" if reduction == "mean" and row_scale is not None else reduction,
        divergence=divergence,
        parameter=float(parameter),
        temperature=float(temperature),
        logit_scale=pair(logit_scale, 1.0),
        logit_softcap=pair(logit_softcap, 0.0),
        valid_vocab=valid_vocab,
    )
    return hard_labels, row_scale, options
