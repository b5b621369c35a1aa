"""What users call: docstrings, and the choice between kernel and plain operators; checks.py has the checks."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library, reference
from ._library import accumulation_dtype
from .autograd import (
    DistillationLoss,
    KLDiv,
    LinearDistillationLoss,
    plain_distillation_loss,
    plain_kl_div,
    plain_linear_distillation_loss,
    plain_needed,
)
from .checks import (
    FLOATING,
    MAX_DIMS,
    REDUCTIONS,
    check_in_place,
    check_label_range,
    check_logits,
    check_models,
    check_options,
    check_workspace,
    factor_per_row,
    has_kernels,
    kernel_arguments,
    pair,
)
from .linear import DEFAULT_WORKSPACE, Models, Workspace

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

    ``Σ target · (log target - input)``, or with ``log_target`` ``Σ exp(target) · (target - input)``. With
    ``input`` = log q and ``target`` = p this is KL(p‖q).

    Signature, warnings, broadcasting, type promotion, reductions, result dtype, autocast, gradients for both
    arguments and of any order are those of `torch.nn.functional.kl_div`. What the fused kernel does not take
    (broadcasting, integer or complex dtypes, other devices, tensor subclasses, forward-mode AD, `torch.func`) is
    computed by plain PyTorch. One improvement: where a target probability is 0 the element contributes exactly 0
    and has zero gradients, also if ``input`` is -inf there or, with ``log_target``, ``target`` is (PyTorch: NaN).

    Args:
        input: log-probabilities, any shape, any floating dtype.
        target: probabilities, or log-probabilities with ``log_target``; the shape of ``input``.
        size_average, reduce: deprecated, as in PyTorch.
        reduction: ``"none"`` | ``"mean"`` (over all elements) | ``"batchmean"`` (sum / ``input.size(0)``) | ``"sum"``.
        log_target: whether ``target`` is given as logarithms.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor of the inputs' shape, in their promoted dtype. Sums are
        accumulated in float32 or better whatever that dtype is.

    Raises:
        What `torch.nn.functional.kl_div` raises.

    Equivalent to::

        torch.nn.functional.kl_div(input, target, size_average, reduce, reduction, log_target)
    """
    if not (_is_ours(input) and _is_ours(target) and isinstance(log_target, bool)):
        return torch.nn.functional.kl_div(input, target, size_average, reduce, reduction, log_target)
    each = _kl_div_reduction(size_average, reduce, reduction)
    # PyTorch divides by the batch also where a deprecated argument has chosen another reduction.
    divisor = input.shape[0] if reduction == "batchmean" and each != "batchmean" and input.dim() > 0 else 1
    loss = _kl_div(input, target, each, log_target)
    return loss / divisor if divisor != 1 else loss


def _kl_div(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    dtype = _kl_div_dtype(input, target)
    if not _fusable(input, target):
        return plain_kl_div(input, target, reduction, log_target).to(dtype)
    if reduction == "none" and dtype != torch.promote_types(input.dtype, target.dtype):
        input = input.to(dtype)  # the terms are written in the promoted dtype
    return KLDiv.apply(input, target, reduction, log_target).to(dtype)  # type: ignore[no-untyped-call,no-any-return]


def _kl_div_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of what F.kl_div would return: promoted, though not by a 0-d tensor; under autocast float32 or more."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    if (input.dim() == 0) != (target.dim() == 0):
        dtype = input.dtype if input.dim() > 0 else target.dtype
    kind = input.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # meta has no autocast to ask for
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype


def _is_ours(tensor: Tensor) -> bool:
    """Whether our rules apply: a dense floating tensor that is neither a subclass with a `__torch_function__` nor made
    of other tensors as DTensor is. Everything else is PyTorch's to compute or to refuse.
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
        and not plain_needed(input, target)
    )


def _kl_div_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that F.kl_div would use, with its warnings, except under the compiler, which refuses them."""
    warning = ""
    if size_average is not None or reduce is not None:
        wanted, averaged = (flag is None or bool(flag) for flag in (reduce, size_average))
        reduction = ("mean" if averaged else "sum") if wanted else "none"
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


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    alpha: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    valid_vocab: int | None = None,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float | None, float | None] | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Divergence between a teacher's and a student's next-token distributions, straight from their logits, in nats.

    With p = softmax(teacher_logits / T) and q = softmax(student_logits / T), per position:

    =================  ==========================================================  =====================
    divergence         formula                                                     source
    =================  ==========================================================  =====================
    forward_kl         KL(p‖q) = Σ p (log p - log q), what `F.kl_div` computes     Hinton et al. 2015
    reverse_kl         KL(q‖p)                                                     Gu et al. 2024, MiniLLM
    jeffreys           KL(p‖q) + KL(q‖p)                                           Jeffreys 1946
    jsd                β KL(p‖m) + (1-β) KL(q‖m), m = βp + (1-β)q                  Agarwal et al. 2024, GKD
    skew_forward_kl    KL(p ‖ κp + (1-κ)q), κ = skew                               Ko et al. 2024, DistiLLM
    skew_reverse_kl    KL(q ‖ κq + (1-κ)p), κ = skew                               Ko et al. 2024, DistiLLM
    total_variation    ½ Σ |p - q|                                                 Wen et al. 2023
    alpha              Σ (p^α q^(1-α) - αp - (1-α)q) / (α(α-1))                    Amari 1985
    =================  ==========================================================  =====================

    Nothing of the size of the logits is allocated except the gradients that are asked for, and on the CPU, beside
    16-bit gradients of other divergences than forward KL, up to half a megabyte per thread for each. Sums and
    exponentials are float32 whatever the logits' dtype (float64 for float64); the result is deterministic and a
    row's value does not depend on the other rows.

    Args:
        student_logits: ``[..., V]`` float64, float32, float16 or bfloat16; any strides.
        teacher_logits: ``[..., V]``, the same shape; the dtype may differ. Gets its true gradient if it requires one.
        labels: ``[...]`` int64; positions whose label is ``ignore_index`` do not count. With ``hard_weight`` they are
            the classes of a cross entropy.
        divergence: one of the names above.
        beta: ``jsd`` only, weight of p in the mixture, 0 to 1; 0 is forward KL and 1 reverse KL, as in TRL and Liger.
        skew: ``skew_*`` only, share of the first argument that is kept in the mixture, 0 to 1.
        alpha: ``alpha`` only, the order, 0 to 1; 1 is forward KL and 0 reverse KL.
        temperature: divides the logits, > 0.
        scale_by_temperature_squared: multiply the divergence by T², so that its gradients keep their size as T grows.
        soft_weight: weight of the divergence.
        hard_weight: weight of the student's cross entropy against ``labels`` at temperature 1, as `F.cross_entropy` has
            it, from the same pass over the student. A part of weight 0 is 0 even where it would be infinite.
        mask: ``[...]`` bool, True where a position counts.
        weight: ``[...]`` floating, multiplies each position's loss; a position of weight 0 does not count.
        ignore_index: the label of positions that do not count.
        reduction: ``"none"``: ``[...]``, 0 where a position does not count; ``"sum"``; ``"mean"``: divided by the
            number of positions that count, or with ``weight`` by the sum of their weights, never by V;
            ``"batchmean"``: sum / ``student_logits.size(0)``, for 1-D logits the sum.
        num_items: int, or 0-d tensor on the logits' device: the denominator of ``"mean"`` instead of the own count, so
            that gradient accumulation over unequal micro-batches equals the one big batch.
        valid_vocab: columns from here on are padding: probability 0, never read, gradient exactly 0. With it the two
            vocabularies may be padded to different sizes.
        logit_softcap: c replaces every logit by c·tanh(logit/c), as Gemma does; a pair is (student, teacher), where
            None is without. Capped logits are float32 numbers: between close rows their rounding is what remains.
        logit_scale: multiplies every logit, before the softcap and the temperature (Cohere; for Granite the inverse of
            its ``logits_scaling``), > 0; a pair is (student, teacher).
        inplace_backward: backward writes the student's gradient over ``student_logits``, so that no memory of that size
            is needed in addition; afterwards they are garbage. Autograd raises where somebody else still needs the old
            values (another loss, a second backward, an operator before this one). Without effect under
            `torch.compile` and `torch.func`.

    Returns:
        float32 (float64 if either input is), a scalar or with ``reduction="none"`` ``[...]``. A loss over no
        positions is 0 with zero gradients. Positions that do not count are never read and have zero gradients.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything runs; with ``inplace_backward`` also
            for student logits that are a leaf, overlap themselves or the teacher's.
        IndexError: for a label out of range where ``hard_weight`` needs it, on the CPU; on CUDA, where raising would
            wait for the device, and under the compiler that position's loss is NaN.
        RuntimeError: for CUDA tensors where the CUDA kernels are missing, saying why; from a backward of
            ``inplace_backward`` with ``create_graph``.

    Infinities: a column where both logits are -inf contributes 0. Where only one probability is 0, forward KL
    (q = 0), reverse KL (p = 0) and Jeffreys (either) are +inf; a gradient that then is infinite is NaN throughout that
    row, one that is not, such as forward KL's q - p, is given. A row that holds NaN or +inf, or nothing but -inf, is
    NaN; other rows never are. All of this is meant after the softcap, which makes infinite logits finite.

    Equivalent to (for ``forward_kl``, ``mean``, where every position counts)::

        student, teacher = (z[..., :valid_vocab].float() * logit_scale for z in (student_logits, teacher_logits))
        student, teacher = (logit_softcap * torch.tanh(z / logit_softcap) for z in (student, teacher))
        log_q = torch.log_softmax(student / temperature, -1)
        p = torch.softmax(teacher / temperature, -1)
        soft = F.kl_div(log_q, p, reduction="sum") / log_q[..., 0].numel()
        hard = F.cross_entropy(student.flatten(0, -2), labels.flatten())
        soft_weight * soft + hard_weight * hard
    """
    check_options(
        divergence,
        beta,
        skew,
        alpha,
        temperature,
        scale_by_temperature_squared,
        soft_weight,
        hard_weight,
        ignore_index,
        reduction,
        valid_vocab,
        logit_softcap,
        logit_scale,
        inplace_backward,
    )
    check_logits(student_logits, teacher_logits, valid_vocab)
    batch = student_logits.shape[:-1]
    plain = plain_needed(student_logits, teacher_logits)
    in_place = inplace_backward and not plain and student_logits.requires_grad and torch.is_grad_enabled()
    if in_place and not torch.compiler.is_compiling():
        check_in_place(student_logits, teacher_logits)
    if student_logits.dim() > MAX_DIMS:
        student_logits, teacher_logits = student_logits.contiguous(), teacher_logits.contiguous()
    hard_labels, row_scale, options = kernel_arguments(
        "student_logits",
        student_logits,
        accumulation_dtype(student_logits, teacher_logits),
        valid_vocab or student_logits.shape[-1],
        labels,
        divergence=divergence,
        beta=beta,
        skew=skew,
        alpha=alpha,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        mask=mask,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        valid_vocab=valid_vocab,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        plain=plain,
    )
    if plain:
        loss = plain_distillation_loss(student_logits, teacher_logits, hard_labels, row_scale, options)
    else:
        if not torch.is_grad_enabled():  # or the Function would make gradients that nobody can ask for
            student_logits, teacher_logits = student_logits.detach(), teacher_logits.detach()
        loss = DistillationLoss.apply(student_logits, teacher_logits, hard_labels, row_scale, options, in_place)  # type: ignore[no-untyped-call]
    return loss.reshape(batch) if reduction == "none" else loss


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
    max_workspace: int | None = None,
    chunk_size: int | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    alpha: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    valid_vocab: int | None = None,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float | None, float | None] | None = None,
) -> Tensor:
    r"""`distillation_loss` from hidden states and output heads: no logits of all positions exist at any time, in nats.

    Logits are ``hidden @ weight.T + bias`` on both sides. They are computed for some positions at a time, by PyTorch's
    matrix products; then come the fused loss and gradient, and the products that make of it the gradients of hidden
    states, weights and biases, those that are asked for and no others. Beside these, and what is named under Memory,
    no more than ``max_workspace`` bytes are in use, however many positions there are.

    Args:
        student_hidden: ``[..., H]`` float64, float32, float16 or bfloat16: what the student's head is applied to.
        student_weight: ``[V, H]``, the head, in the dtype of its hidden states. It may be an embedding's, and both
            models' the same tensor.
        teacher_hidden: ``[..., H']``, the same positions; size and dtype may differ from the student's.
        teacher_weight: ``[V, H']``.
        labels: ``[...]`` int64, as in `distillation_loss`.
        student_bias: ``[V]``, the head's.
        teacher_bias: ``[V]``.
        teacher_logits: ``[..., V]`` in place of ``teacher_hidden`` and ``teacher_weight``, of any floating dtype.
        max_workspace: bytes for logits and their gradients; by default 1 GB on a GPU and 256 MB on the CPU. The more,
            the nearer the products are to their full speed.
        chunk_size: positions whose logits' gradients are held at a time, whatever memory that takes.
        divergence, beta, skew, alpha, temperature, scale_by_temperature_squared: as in `distillation_loss`.
        soft_weight, hard_weight, mask, weight, ignore_index, num_items, logit_softcap, logit_scale: likewise.
        reduction: likewise; ``"batchmean"`` divides by ``student_hidden.size(0)``.
        valid_vocab: likewise; with it the heads may have different numbers of rows. Those beyond it are not read, and
            their gradients are 0. (There is no ``inplace_backward``: logits have no place that a gradient could take.)

    Returns:
        As `distillation_loss` of the logits. Every input that requires a gradient gets it, in its dtype, the teacher's
        too. On the CPU positions that do not count take part in no product; on a GPU, where finding them would be to
        wait for it, in products alone.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `distillation_loss`; ValueError also for a
            ``max_workspace`` that does not hold one position.

    Autocast: hidden states, weights and biases that are not float64 are cast as `F.linear` would; gradients of weights
    are not rounded to autocast's dtype.

    Accuracy: a product of 16-bit numbers is rounded to 16-bit logits on the CPU, as a model's own logits are; on a GPU
    it is float32, so that the loss is that of the hidden states. Gradients of logits have the dtype of the products. A
    weight's gradient is added up in float32 over the chunks, and rounded once; on the CPU each chunk's 16-bit products
    are also rounded to that dtype before they are added, as there is no product that would not round them (of two
    chunks only the first: the second product adds itself to it in float32).

    Memory beyond ``max_workspace``: the gradients that are returned; for each 16-bit weight that gets one, unless there
    is a single chunk (on the CPU two), ``4 * V * H`` bytes for its sum, until it has been rounded; under autocast,
    copies of weights of another dtype; a few megabytes on the CPU, ``4 * V`` for a bias, and a chunk's hidden states
    where some do not count, are cast, or lie so that no view has them side by side; and what PyTorch's products take
    themselves, on a CPU up to a repacked weight. Never anything in the number of positions times the vocabulary.

    Where the gradients are made: in this call, so that backward only multiplies them by ``grad_output``. With
    ``reduction="none"``, and in float16, where they would underflow without the `GradScaler`'s factor, they are made in
    backward, and the logits computed again. Second derivatives, forward-mode AD and `torch.func` work, by plain
    operators in float64 and with all logits at once. Deterministic as far as PyTorch's matrix products are.

    Equivalent to::

        student_logits = F.linear(student_hidden, student_weight, student_bias)
        teacher_logits = F.linear(teacher_hidden, teacher_weight, teacher_bias)
        kldiv_ext.distillation_loss(student_logits, teacher_logits, labels, **options)
    """
    check_options(
        divergence,
        beta,
        skew,
        alpha,
        temperature,
        scale_by_temperature_squared,
        soft_weight,
        hard_weight,
        ignore_index,
        reduction,
        valid_vocab,
        logit_softcap,
        logit_scale,
    )
    check_workspace(max_workspace, chunk_size)
    autocast_dtype = _autocast_dtype(student_hidden)
    check_models(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
        valid_vocab,
        autocast_dtype is not None,
    )
    teacher = teacher_hidden if teacher_logits is None else teacher_logits
    assert teacher is not None
    models = Models(student_hidden, student_weight, student_bias, teacher, teacher_weight, teacher_bias)
    columns = valid_vocab or student_weight.shape[0]
    plain = plain_needed(*models)
    hard_labels, row_scale, options = kernel_arguments(
        "student_hidden",
        student_hidden,
        accumulation_dtype(student_hidden, teacher),
        columns,
        labels,
        divergence=divergence,
        beta=beta,
        skew=skew,
        alpha=alpha,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        mask=mask,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        valid_vocab=valid_vocab,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        plain=plain,
    )
    if not torch.is_grad_enabled():  # or the Function would make gradients that nobody can ask for
        models = Models(*(None if x is None else x.detach() for x in models))  # type: ignore[arg-type]
    wanted = [x is not None and x.requires_grad for x in models]
    workspace = Workspace(
        autocast_dtype, max_workspace or DEFAULT_WORKSPACE.get(student_hidden.device.type, 1), chunk_size
    )
    one = workspace.need(models, columns, (any(wanted[:3]), any(wanted[3:])))(1)
    if chunk_size is None and max_workspace is not None and one > max_workspace:
        raise ValueError(f"max_workspace must hold the logits of one position, {one} bytes, got {max_workspace}")
    if plain:
        loss = plain_linear_distillation_loss(models, hard_labels, row_scale, options)
    else:
        loss = LinearDistillationLoss.apply(*models, hard_labels, row_scale, options, workspace)  # type: ignore[no-untyped-call]
    return loss.reshape(student_hidden.shape[:-1]) if reduction == "none" else loss


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast computes products in, where it is in use."""
    kind = tensor.device.type if isinstance(tensor, Tensor) else "meta"
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta has no autocast to ask for
        return None
    return torch.get_autocast_dtype(kind)


class TokenStats(NamedTuple):
    """What `token_stats` returns; every tensor is ``[...]``, in nats where it has a unit."""

    forward_kl: Tensor
    """KL(p‖q) = Σ p (log p - log q)."""
    reverse_kl: Tensor
    """KL(q‖p)."""
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
    """bool: whether both sides' largest logit, the first of equal ones, is in the same column."""


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float | None, float | None] | None = None,
) -> TokenStats:
    r"""What there is to know about student and teacher at every position, from one reading of the logits, in nats.

    With p = softmax(teacher_logits / T) and q = softmax(student_logits / T): both Kullback-Leibler divergences, both
    entropies, both log-sum-exps, both log-probabilities of the label, and whether the two agree on the most probable
    token. For evaluation and for logging: nothing has a gradient, and nothing of the size of the logits is allocated.

    Args:
        student_logits: ``[..., V]`` float64, float32, float16 or bfloat16; any strides.
        teacher_logits: ``[..., V]``, the same shape; the dtype may differ.
        labels: ``[...]`` int64; positions whose label is ``ignore_index`` do not count.
        temperature: divides the logits, > 0; all results are at this temperature.
        mask: ``[...]`` bool, True where a position counts.
        ignore_index: the label of positions that do not count.
        valid_vocab, logit_softcap, logit_scale: as in `distillation_loss`.

    Returns:
        A `TokenStats` of ``[...]`` tensors, float32 (float64 if either input is) but for the bool; zeros and False
        where a position does not count. Positions that do not count are never read. A position where one side is all
        -inf, or holds +inf or NaN, is NaN throughout.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `distillation_loss` with ``hard_weight`` does.

    Equivalent to, for the first and the last::

        log_q, log_p = (torch.log_softmax(z.float() / temperature, -1) for z in (student_logits, teacher_logits))
        forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        top1_agreement = log_q.argmax(-1) == log_p.argmax(-1)
    """
    check_options(
        temperature=temperature,
        ignore_index=ignore_index,
        valid_vocab=valid_vocab,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
    )
    check_logits(student_logits, teacher_logits, valid_vocab)
    student_logits, teacher_logits = student_logits.detach(), teacher_logits.detach()
    batch = student_logits.shape[:-1]
    dtype = accumulation_dtype(student_logits, teacher_logits)
    counts = factor_per_row("student_logits", student_logits, dtype, labels, mask, None, ignore_index, "none", None)
    if plain_needed(student_logits, teacher_logits):
        plain = reference.token_stats(
            student_logits,
            teacher_logits,
            labels,
            temperature=temperature,
            mask=mask,
            ignore_index=ignore_index,
            valid_vocab=valid_vocab,
            logit_softcap=logit_softcap,
            logit_scale=logit_scale,
        )
        return TokenStats(*(v if v is None or v.dtype == torch.bool else v.to(dtype) for v in plain))  # type: ignore[arg-type]
    if labels is not None:
        labels = labels.reshape(-1).contiguous()
        check_label_range(labels, counts, valid_vocab or student_logits.shape[-1])
    stats = _library.ops.token_stats(
        student_logits,
        teacher_logits,
        labels,
        counts,
        float(temperature),
        pair(logit_scale, 1.0),
        pair(logit_softcap, 0.0),
        valid_vocab,
    )
    *values, agreement = (column.reshape(batch) for column in stats.unbind(-1))
    return TokenStats(*values[:6], *(values[6:] if labels is not None else (None, None)), agreement != 0)  # type: ignore[call-arg]
