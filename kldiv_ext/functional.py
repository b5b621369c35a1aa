"""The public functions: docstrings, and the choice between a fused operator and its composite."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import _library, reference
from ._library import accumulation_dtype
from .autograd import (
    DistillationLoss,
    KLDiv,
    LinearDistillationLoss,
    composite_distillation_loss,
    composite_kl_div,
    composite_linear_distillation_loss,
    composite_needed,
)
from .checks import (
    FLOATING,
    MAX_DIMS,
    Argument,
    check_absent,
    check_in_place,
    check_label_range,
    check_logits,
    check_models,
    counting,
    flat,
    has_kernels,
    loss_arguments,
)
from .linear import DEFAULT_WORKSPACE, Models, Workspace
from .options import (
    REDUCTIONS,
    DistillationOptions,
    LinearDistillationOptions,
    LogitsOptions,
    completed,
    denominator,
    per_side,
    takes,
)

# ---------------------------------------------------------------- the drop-in


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence of given log-probabilities, in nats: `torch.nn.functional.kl_div`, fused.

    The terms are ``target · (log target - input)``, or ``exp(target) · (target - input)`` with ``log_target``. With
    ``input`` = log q and ``target`` = p their sum is KL(p‖q).

    Signature, warnings, broadcasting, type promotion, reductions, result dtype, autocast and gradients (for both
    arguments, of any order) are those of `torch.nn.functional.kl_div`. Plain PyTorch computes what the fused kernel
    does not take: broadcasting, integer and complex dtypes, other devices, tensor subclasses, forward-mode AD,
    `torch.func`. One improvement: an element with target probability 0 contributes exactly 0 and has zero gradients,
    also where ``input`` is -inf and, with ``log_target``, where ``target`` is -inf (PyTorch returns NaN).

    Args:
        input: log-probabilities, any shape, any floating dtype.
        target: probabilities, or log-probabilities with ``log_target``; same shape as ``input``.
        size_average: deprecated, as in PyTorch.
        reduce: deprecated, as in PyTorch.
        reduction: ``none`` | ``mean`` (over all elements) | ``batchmean`` (sum / ``input.size(0)``) | ``sum``.
        log_target: whether ``target`` holds logarithms.

    Returns:
        Tensor: a scalar, or with ``reduction="none"`` a tensor of the inputs' shape, in their promoted dtype. Sums are
            accumulated in float32, or float64 for float64 inputs.

    Raises:
        RuntimeError, TypeError, ValueError: what `torch.nn.functional.kl_div` raises.

    Equivalent to:

        torch.nn.functional.kl_div(input, target, size_average, reduce, reduction, log_target)
    """
    if not (_is_plain(input) and _is_plain(target) and isinstance(log_target, bool)):
        return torch.nn.functional.kl_div(input, target, size_average, reduce, reduction, log_target)
    effective = _kl_div_reduction(size_average, reduce, reduction)
    # F.kl_div divides by the batch size even where a deprecated argument has replaced this reduction.
    divisor = input.shape[0] if reduction == "batchmean" and effective != "batchmean" and input.dim() > 0 else 1
    loss = _kl_div(input, target, effective, log_target)
    return loss / divisor if divisor != 1 else loss


def _kl_div(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    dtype = _kl_div_dtype(input, target)
    if not _fusable(input, target):
        terms = composite_kl_div(input, target, None, log_target)
        return reference.reduced(terms, denominator(reduction, input.shape, terms.numel)).to(dtype)
    divisor = denominator(reduction, input.shape, input.numel)
    if divisor is None and dtype != torch.promote_types(input.dtype, target.dtype):
        input = input.to(dtype)  # the kernel writes terms in the promoted dtype
    return KLDiv.apply(input, target, divisor, log_target).to(dtype)  # type: ignore[no-untyped-call,no-any-return]


def _kl_div_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of F.kl_div's result: promoted as for 0-d tensors too; under autocast at least float32."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    if (input.dim() == 0) != (target.dim() == 0):
        dtype = input.dtype if input.dim() > 0 else target.dtype
    kind = input.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # the query raises for meta
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype


def _is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is dense and floating, without a `__torch_function__` and not a wrapper such as DTensor.

    PyTorch computes or refuses all other arguments.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING or tensor.layout != torch.strided:
        return False
    kind = type(tensor)
    overridden = kind is not Tensor and kind.__torch_function__ is not torch._C._disabled_torch_function_impl
    return not overridden and not hasattr(kind, "__tensor_flatten__")


def _fusable(input: Tensor, target: Tensor) -> bool:
    return (
        0 < input.dim() <= MAX_DIMS
        and input.shape == target.shape
        and input.numel() > 0
        and input.device == target.device
        and has_kernels(input.device)
        and not composite_needed(input, target)
    )


def _kl_div_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that F.kl_div uses, with its warnings, which the compiler does not trace."""
    warning = ""
    if size_average is not None or reduce is not None:
        reduces, averages = (flag is None or bool(flag) for flag in (reduce, size_average))
        reduction = ("mean" if averages else "sum") if reduces else "none"
        warning = f"size_average and reduce args will be deprecated, please use reduction='{reduction}' instead."
    elif reduction == "mean":
        warning = (
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release."
        )
    elif reduction == "elementwise_mean":
        reduction = "mean"
        warning = "reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead."
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if warning and not torch.compiler.is_compiling():
        warnings.warn(warning, stacklevel=3)
    return reduction


# ---------------------------------------------------------------- from logits


@takes(DistillationOptions)
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    **options: Unpack[DistillationOptions],
) -> Tensor:
    r"""Divergence between a teacher's and a student's next-token distributions, from their logits, in nats.

    With p = softmax(teacher_logits / T) and q = softmax(student_logits / T), ``divergence`` is one of:

    **divergences:

    At β = 0 and 1 ``jsd`` is forward and reverse KL, as in TRL and Liger. At α = 1 and 0 so is ``alpha``.

    The result is deterministic, and a row's loss does not depend on the other rows. Sums and exponentials are float32,
    or float64 for float64 logits. The call allocates the requested gradients and O(rows); for 16-bit gradients of
    divergences other than forward KL, the CPU also uses up to half a megabyte per thread for each gradient.

    Args:
        student_logits: ``[..., V]`` float64, float32, float16 or bfloat16; any strides.
        teacher_logits: ``[..., V]``, the same shape; the dtype may differ. Gets a gradient if it requires one.
        labels: ``[...]`` int64. Positions whose label is ``ignore_index`` do not count. With ``hard_weight``, labels
            are the classes of a cross entropy.
        mask: ``[...]`` bool, True where a position counts.
        weight: ``[...]`` floating, multiplies each position's loss. A position of weight 0 does not count.
        num_items: int, or 0-d tensor on the logits' device: the denominator of ``mean`` in place of the number of
            positions that count. With a shared ``num_items``, accumulated micro-batches equal the one large batch.
        **options: The keywords of `kldiv_ext.options.DistillationOptions`.

    Returns:
        Tensor: float32 (float64 if either input is), a scalar or with ``reduction="none"`` ``[...]``. A loss over no
            positions is 0 with zero gradients. Positions that do not count are never read and have zero gradients.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it and its value, before anything runs; with
            ``inplace_backward`` also for student logits that are a leaf, overlap themselves, or overlap the teacher's.
        IndexError: on the CPU, for a label out of range where ``hard_weight`` needs it. On CUDA, where raising would
            synchronize, and under the compiler, that position's loss is NaN.
        RuntimeError: for CUDA tensors where the CUDA kernels are missing, with the reason; from a backward of
            ``inplace_backward`` with ``create_graph``.

    Infinities: a column with both logits -inf contributes 0. Where only q = 0, forward KL and Jeffreys are +inf; where
    only p = 0, reverse KL and Jeffreys are +inf. A gradient that is infinite there is NaN in that row; one that is
    finite, such as forward KL's q - p, is returned. A row that holds NaN or +inf, or only -inf, is NaN; other rows are
    not affected. These rules apply after the softcap, which makes infinite logits finite.

    Equivalent to (for ``forward_kl`` and ``mean``, where every position counts):

        student, teacher = (z[..., :valid_vocab].float() * logit_scale for z in (student_logits, teacher_logits))
        student, teacher = (logit_softcap * torch.tanh(z / logit_softcap) for z in (student, teacher))
        log_q = torch.log_softmax(student / temperature, -1)
        p = torch.softmax(teacher / temperature, -1)
        soft = F.kl_div(log_q, p, reduction="sum") / log_q[..., 0].numel()
        hard = F.cross_entropy(student.flatten(0, -2), labels.flatten())
        soft_weight * soft + hard_weight * hard
    """
    chosen: DistillationOptions = completed("distillation_loss", DistillationOptions, options)
    check_logits(student_logits, teacher_logits, chosen["valid_vocab"])
    batch = student_logits.shape[:-1]
    composite = composite_needed(student_logits, teacher_logits)
    in_place = chosen["inplace_backward"] and not composite and student_logits.requires_grad and torch.is_grad_enabled()
    if in_place and not torch.compiler.is_compiling():
        check_in_place(student_logits, teacher_logits)
    if student_logits.dim() > MAX_DIMS:
        student_logits, teacher_logits = student_logits.contiguous(), teacher_logits.contiguous()
    rows, arguments = loss_arguments(
        Argument("student_logits", student_logits),
        accumulation_dtype(student_logits, teacher_logits),
        chosen["valid_vocab"] or student_logits.shape[-1],
        labels,
        mask,
        weight,
        num_items,
        chosen,
        composite,
    )
    if composite:
        loss = composite_distillation_loss(student_logits, teacher_logits, *rows, arguments)
    else:
        if not torch.is_grad_enabled():  # else the Function computes gradients that cannot be requested
            student_logits, teacher_logits = student_logits.detach(), teacher_logits.detach()
        loss = DistillationLoss.apply(student_logits, teacher_logits, *rows, arguments, in_place)  # type: ignore[no-untyped-call]
    return loss.reshape(batch) if arguments.divisor is None else loss


# The definitions of the divergences are also their documentation.
_DIVERGENCES = "\n".join(f"    - ``{name}``: {formula.__doc__}" for name, formula in reference.DIVERGENCES.items())
distillation_loss.__doc__ = (distillation_loss.__doc__ or "").replace("    **divergences:", _DIVERGENCES)

# ---------------------------------------------------------------- from hidden states


@takes(LinearDistillationOptions)
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    **options: Unpack[LinearDistillationOptions],
) -> Tensor:
    r"""`distillation_loss` from hidden states and output heads, in nats, without ever holding all logits.

    Both sides' logits are ``hidden @ weight.T + bias``. They are computed in chunks of positions by PyTorch's matrix
    products; the fused kernel turns a chunk into losses and gradients of logits; further products turn those into the
    requested gradients of hidden states, weights and biases. A chunk takes at most ``max_workspace`` bytes, however
    many positions there are.

    Args:
        student_hidden: ``[..., H]`` float64, float32, float16 or bfloat16: the input of the student's head.
        student_weight: ``[V, H]``, the student's head, in the dtype of its hidden states. It may be tied to an
            embedding and may be the same tensor as ``teacher_weight``.
        teacher_hidden: ``[..., H']``, the same positions; H' and the dtype may differ from the student's.
        teacher_weight: ``[V, H']``, the teacher's head.
        labels: ``[...]`` int64, as in `distillation_loss`.
        student_bias: ``[V]``, the bias of the student's head.
        teacher_bias: ``[V]``, the bias of the teacher's head.
        teacher_logits: ``[..., V]`` in place of ``teacher_hidden`` and ``teacher_weight``, of any floating dtype.
        mask: ``[...]`` bool, as in `distillation_loss`.
        weight: ``[...]`` floating, as in `distillation_loss`.
        num_items: as in `distillation_loss`.
        **options: The keywords of `kldiv_ext.options.LinearDistillationOptions`.

    Returns:
        Tensor: the `distillation_loss` of the logits. Every input that requires a gradient gets it, in its dtype, the
            teacher's too. The CPU skips positions that do not count; a GPU skips only their loss, because finding them
            would synchronize. Rows of a weight beyond ``valid_vocab`` are not read, and their gradients are 0.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `distillation_loss`; ValueError also for a
            ``max_workspace`` too small for one position.

    Autocast: hidden states, weights and biases that are not float64 are cast as by `F.linear`; gradients of weights are
    not rounded to autocast's dtype.

    Accuracy: on the CPU, a product of 16-bit factors gives 16-bit logits, as in a model; on a GPU it gives float32
    logits. Gradients of logits have the dtype of the products. A weight's gradient is summed over chunks in float32 and
    rounded once; on the CPU, each chunk's 16-bit product is rounded before it is added, because PyTorch has no product
    that does not round (of two chunks only the first: the second accumulates in float32).

    Memory beyond ``max_workspace``:

    - the returned gradients;
    - ``4 * V * H`` bytes for the sum of each 16-bit weight gradient, unless there is one chunk (on the CPU two);
    - under autocast, copies of weights of another dtype;
    - a few megabytes on the CPU, and ``4 * V`` bytes for a bias;
    - a chunk's hidden states, where some positions do not count, are cast, or have strides that no view can flatten;
    - what PyTorch's products allocate, on a CPU up to a repacked weight.

    No tensor of the size positions · V exists at any time.

    Gradients: this call makes them, and backward multiplies them by ``grad_output``. With ``reduction="none"``, and in
    float16, where they would underflow without the factor of a `GradScaler`, backward makes them and computes the
    logits again. Second derivatives, forward-mode AD and `torch.func` use plain operators in float64 with all logits at
    once. Results are as deterministic as PyTorch's matrix products.

    Equivalent to:

        student_logits = F.linear(student_hidden, student_weight, student_bias)
        teacher_logits = F.linear(teacher_hidden, teacher_weight, teacher_bias)
        kldiv_ext.distillation_loss(student_logits, teacher_logits, labels, **options)
    """
    chosen: LinearDistillationOptions = completed("linear_distillation_loss", LinearDistillationOptions, options)
    valid_vocab, max_workspace, chunk_size = (chosen[name] for name in ("valid_vocab", "max_workspace", "chunk_size"))
    if teacher_logits is not None:
        check_absent("teacher_hidden", teacher_hidden)
    teacher = teacher_hidden if teacher_logits is None else teacher_logits
    models = Models(student_hidden, student_weight, student_bias, teacher, teacher_weight, teacher_bias)  # type: ignore[arg-type]
    autocast_dtype = _autocast_dtype(student_hidden)
    check_models(models, teacher_logits is not None, valid_vocab, autocast_dtype is not None)
    columns = valid_vocab or student_weight.shape[0]
    composite = composite_needed(*models)
    rows, arguments = loss_arguments(
        Argument("student_hidden", student_hidden),
        accumulation_dtype(student_hidden, models.teacher),
        columns,
        labels,
        mask,
        weight,
        num_items,
        chosen,
        composite,
    )
    if not torch.is_grad_enabled():  # else the Function computes gradients that cannot be requested
        models = Models(*(None if x is None else x.detach() for x in models))  # type: ignore[arg-type]
    workspace = Workspace(
        autocast_dtype, max_workspace or DEFAULT_WORKSPACE.get(student_hidden.device.type, 1), chunk_size
    )
    needs_grad = [x is not None and x.requires_grad for x in models]
    least = workspace.bytes_per_position(models, columns, (any(needs_grad[:3]), any(needs_grad[3:]))).total(1)
    if chunk_size is None and max_workspace is not None and least > max_workspace:
        raise ValueError(f"max_workspace must hold the logits of one position, {least} bytes, got {max_workspace}")
    if composite:
        loss = composite_linear_distillation_loss(models, *rows, arguments)
    else:
        loss = LinearDistillationLoss.apply(*models, *rows, arguments, workspace)  # type: ignore[no-untyped-call]
    return loss.reshape(student_hidden.shape[:-1]) if arguments.divisor is None else loss


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes products in; None where autocast is not in use."""
    kind = tensor.device.type if isinstance(tensor, Tensor) else "meta"
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # the query raises for meta
        return None
    return torch.get_autocast_dtype(kind)


# ---------------------------------------------------------------- statistics


class TokenStats(NamedTuple):
    """The result of `token_stats`; every tensor is ``[...]``, divergences, entropies and logarithms in nats."""

    forward_kl: Tensor
    """KL(p‖q) = Σ p (log p - log q)."""
    reverse_kl: Tensor
    """KL(q‖p) = Σ q (log q - log p)."""
    student_entropy: Tensor
    """-Σ q log q."""
    teacher_entropy: Tensor
    """-Σ p log p."""
    student_logsumexp: Tensor
    """log Σ exp(student_logits / T)."""
    teacher_logsumexp: Tensor
    """log Σ exp(teacher_logits / T)."""
    student_label_log_prob: Tensor | None
    """log q at the label; None without labels."""
    teacher_label_log_prob: Tensor | None
    """log p at the label; None without labels."""
    top1_agreement: Tensor
    """bool: whether both sides have the same argmax, the first of equal maxima."""


@takes(LogitsOptions)
def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    **options: Unpack[LogitsOptions],
) -> TokenStats:
    r"""Per-position statistics of student and teacher from one pass over the logits, in nats, without gradients.

    With p = softmax(teacher_logits / T) and q = softmax(student_logits / T): both Kullback-Leibler divergences,
    entropies and log-sum-exps, both log-probabilities of the label, and whether the two argmaxes agree. For evaluation
    and logging. Nothing of the size of the logits is allocated.

    Args:
        student_logits: ``[..., V]`` float64, float32, float16 or bfloat16; any strides.
        teacher_logits: ``[..., V]``, the same shape; the dtype may differ.
        labels: ``[...]`` int64. Positions whose label is ``ignore_index`` do not count.
        mask: ``[...]`` bool, True where a position counts.
        **options: The keywords of `kldiv_ext.options.LogitsOptions`.

    Returns:
        TokenStats: ``[...]`` tensors, float32 (float64 if either input is) and one bool. Where a position does not
            count, values are 0 and False; such positions are never read. A position with a side that is all -inf, or
            holds +inf or NaN, is NaN throughout.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `distillation_loss` with ``hard_weight`` does.

    Equivalent to, for the first and the last:

        log_q, log_p = (torch.log_softmax(z.float() / temperature, -1) for z in (student_logits, teacher_logits))
        forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        top1_agreement = log_q.argmax(-1) == log_p.argmax(-1)
    """
    chosen: LogitsOptions = completed("token_stats", LogitsOptions, options)
    valid_vocab = chosen["valid_vocab"]
    check_logits(student_logits, teacher_logits, valid_vocab)
    student_logits, teacher_logits = student_logits.detach(), teacher_logits.detach()
    batch = student_logits.shape[:-1]
    dtype = accumulation_dtype(student_logits, teacher_logits)
    row_scale = flat(counting(Argument("student_logits", student_logits), labels, mask, chosen), dtype)
    if composite_needed(student_logits, teacher_logits):
        stats = reference.token_stats(student_logits, teacher_logits, labels, mask=mask, **chosen)
        return TokenStats(*(v if v is None or v.dtype == torch.bool else v.to(dtype) for v in stats))  # type: ignore[arg-type]
    if labels is not None:
        labels = labels.reshape(-1).contiguous()
        check_label_range(labels, row_scale, valid_vocab or student_logits.shape[-1])
    columns = _library.ops.token_stats(
        student_logits,
        teacher_logits,
        labels,
        row_scale,
        float(chosen["temperature"]),
        per_side(chosen["logit_scale"], 1.0),
        per_side(chosen["logit_softcap"], 0.0),
        valid_vocab,
    )
    *values, agreement = (column.reshape(batch) for column in columns.unbind(-1))
    return TokenStats(*values[:6], *(values[6:] if labels is not None else (None, None)), agreement != 0)  # type: ignore[call-arg]
