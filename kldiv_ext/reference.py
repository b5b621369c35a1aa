"""Slow, obvious definitions in plain PyTorch and float64: the documentation of every loss, and its test oracle.

Written from the formulas, without a line in common with the kernels. Differentiable any number of times and in
every mode that PyTorch has, so it also serves where a kernel cannot (forward-mode AD, `torch.func`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _plogr(p: Tensor, log_p: Tensor, log_r: Tensor) -> Tensor:
    """p (log p - log r), and exactly 0 with zero gradients where p is 0."""
    dead = p == 0
    return torch.where(dead, 0, p * (log_p.masked_fill(dead, 0) - log_r.masked_fill(dead, 0)))


def forward_kl(lp: Tensor, lq: Tensor) -> Tensor:
    """Σ p (log p - log q), Kullback and Leibler (1951)."""
    return _plogr(lp.exp(), lp, lq).sum(-1)


def reverse_kl(lp: Tensor, lq: Tensor) -> Tensor:
    """Σ q (log q - log p)."""
    return forward_kl(lq, lp)


def jeffreys(lp: Tensor, lq: Tensor) -> Tensor:
    """Σ (p - q)(log p - log q), Jeffreys (1946)."""
    return forward_kl(lp, lq) + reverse_kl(lp, lq)


def _log_mixture(lp: Tensor, lq: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    dead = (lp == -torch.inf) & (lq == -torch.inf)
    lp, lq = lp.masked_fill(dead, 0), lq.masked_fill(dead, 0)
    log_shares = torch.tensor([share, 1 - share], dtype=lp.dtype, device=lp.device).log()
    return torch.logaddexp(lp + log_shares[0], lq + log_shares[1])


def jsd(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    """β KL(p‖m) + (1-β) KL(q‖m), m = βp + (1-β)q; forward KL at β = 0, reverse at 1. Agarwal et al. (2024), GKD."""
    if beta == 0:
        return forward_kl(lp, lq)
    if beta == 1:
        return reverse_kl(lp, lq)
    lm = _log_mixture(lp, lq, beta)
    return (beta * _plogr(lp.exp(), lp, lm) + (1 - beta) * _plogr(lq.exp(), lq, lm)).sum(-1)


def skew_forward_kl(lp: Tensor, lq: Tensor, skew: float) -> Tensor:
    """KL(p ‖ κp + (1-κ)q), κ = skew. Ko et al. (2024), DistiLLM."""
    if skew == 0:
        return forward_kl(lp, lq)
    if skew == 1:  # the mixture is p itself; of both only a NaN is left
        return 0 * (lp.exp() * lq.exp()).sum(-1)
    return _plogr(lp.exp(), lp, _log_mixture(lp, lq, skew)).sum(-1)


def skew_reverse_kl(lp: Tensor, lq: Tensor, skew: float) -> Tensor:
    """KL(q ‖ κq + (1-κ)p), κ = skew."""
    return skew_forward_kl(lq, lp, skew)


def total_variation(lp: Tensor, lq: Tensor) -> Tensor:
    """½ Σ |p - q|; its gradient at p = q is 0."""
    difference = lp.exp() - lq.exp()
    sign = difference.sign().masked_fill(difference.isnan(), torch.nan).detach()  # the derivative of abs at NaN is 0
    return (difference * sign).sum(-1) / 2


def alpha(lp: Tensor, lq: Tensor, alpha: float) -> Tensor:
    """Σ (p^α q^(1-α) - αp - (1-α)q) / (α(α-1)); forward KL at α = 1, reverse at 0. Amari (1985)."""
    if alpha == 0:
        return reverse_kl(lp, lq)
    if alpha == 1:
        return forward_kl(lp, lq)
    power = (alpha * lp + (1 - alpha) * lq).exp()
    return (power - alpha * lp.exp() - (1 - alpha) * lq.exp()).sum(-1) / (alpha * (alpha - 1))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "alpha": alpha,
}


def row_losses(student: Tensor, teacher: Tensor, divergence: str, parameter: float, temperature: float) -> Tensor:
    """The divergence of every row of [..., V] logits, [...] float64."""
    lq = torch.log_softmax(student.double() / temperature, -1)
    lp = torch.log_softmax(teacher.double() / temperature, -1)
    formula = DIVERGENCES[divergence]
    return formula(lp, lq, parameter) if formula.__code__.co_argcount == 3 else formula(lp, lq)


def cross_entropies(student: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(student) at every position's label, [...] float64; NaN for a label that is no column."""
    wrong = (labels < 0) | (labels >= student.shape[-1])
    lq = torch.log_softmax(student.double(), -1)
    picked = lq.gather(-1, labels.masked_fill(wrong, 0)[..., None])[..., 0]
    return -picked * torch.where(wrong, torch.nan, 1.0)


def effective_logits(
    logits: Tensor, scale: float | None, softcap: float | None, valid_vocab: int | None = None
) -> Tensor:
    """What of a model's logits is compared, float64: without padding columns, scaled, then softcap·tanh(z/softcap)."""
    logits = logits[..., :valid_vocab].double()
    if scale is not None:
        logits = logits * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def weighted_losses(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    soft_weight: float,
    hard_weight: float,
    divergence: str,
    parameter: float,
    temperature: float,
) -> Tensor:
    """soft_weight · divergence + hard_weight · cross entropy, [...]; a part without weight is 0 even where infinite."""
    if soft_weight == 0:
        divergence, parameter = "skew_forward_kl", 1.0  # 0, and NaN where a row is broken
    losses = (soft_weight or 1.0) * row_losses(student, teacher, divergence, parameter, temperature)
    if hard_weight != 0:
        assert labels is not None
        losses = losses + hard_weight * cross_entropies(student, labels)
    return losses


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
    """`kldiv_ext.distillation_loss` in float64, written out; the arguments are not checked, nothing is in place."""
    parameter = {"jsd": beta, "alpha": alpha}.get(divergence, skew)
    counts = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    if mask is not None:
        counts = counts & mask
    if labels is not None:
        counts = counts & (labels != ignore_index)
    weights = counts.double() if weight is None else torch.where(counts, weight.double(), 0)
    counts = weights != 0
    if reduction == "mean":
        denominator = torch.as_tensor(weights.sum() if num_items is None else num_items, device=weights.device)
        counts = counts & (denominator != 0)
    if soft_weight == 0 and hard_weight == 0:
        counts = torch.zeros_like(counts)
    # A position that does not count is never read: whatever stands there, NaN too, is replaced.
    student, teacher = (z.double().masked_fill(~counts[..., None], 0) for z in (student_logits, teacher_logits))
    labels = None if labels is None else labels.masked_fill(~counts, 0)
    scales, softcaps = (x if isinstance(x, (tuple, list)) else (x, x) for x in (logit_scale, logit_softcap))
    student = effective_logits(student, scales[0], softcaps[0], valid_vocab)
    teacher = effective_logits(teacher, scales[1], softcaps[1], valid_vocab)
    soft_scale = soft_weight * (temperature**2 if scale_by_temperature_squared else 1)
    losses = weighted_losses(student, teacher, labels, soft_scale, hard_weight, divergence, parameter, temperature)
    losses = torch.where(counts, losses * weights, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "mean":
        return total / denominator.masked_fill(denominator == 0, 1)
    if reduction == "batchmean" and student_logits.dim() > 1:
        return total / max(student_logits.shape[0], 1)
    return total


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
    **options: Any,
) -> Tensor:
    """`kldiv_ext.linear_distillation_loss` in float64, with all logits at once; the arguments are not checked."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = hidden.double() @ weight.double().t()
        return product if bias is None else product + bias.double()

    student_logits = logits(student_hidden, student_weight, student_bias)
    if teacher_logits is None:
        assert teacher_hidden is not None and teacher_weight is not None
        teacher_logits = logits(teacher_hidden, teacher_weight, teacher_bias)
    return distillation_loss(student_logits, teacher_logits, labels, **options)


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
) -> tuple[Tensor | None, ...]:
    """What `kldiv_ext.token_stats` returns, in float64, written out; the arguments are not checked."""
    counts = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    if mask is not None:
        counts = counts & mask
    if labels is not None:
        counts = counts & (labels != ignore_index)
        labels = labels.masked_fill(~counts, 0)
    scales, softcaps = (x if isinstance(x, (tuple, list)) else (x, x) for x in (logit_scale, logit_softcap))
    z_student, z_teacher = (
        effective_logits(z.double().masked_fill(~counts[..., None], 0), scale, softcap, valid_vocab) / temperature
        for z, scale, softcap in zip((student_logits, teacher_logits), scales, softcaps, strict=True)
    )
    lq, lp = torch.log_softmax(z_student, -1), torch.log_softmax(z_teacher, -1)
    nothing = torch.zeros_like(lq)
    broken = (lq + lp).isnan().any(-1)
    values = [
        forward_kl(lp, lq),
        reverse_kl(lp, lq),
        -_plogr(lq.exp(), lq, nothing).sum(-1),
        -_plogr(lp.exp(), lp, nothing).sum(-1),
        torch.logsumexp(z_student, -1),
        torch.logsumexp(z_teacher, -1),
        *((None, None) if labels is None else (-cross_entropies(z, labels) for z in (z_student, z_teacher))),
    ]
    same = (z_student.argmax(-1) == z_teacher.argmax(-1)) & counts & ~broken
    return *(None if v is None else torch.where(counts, v.masked_fill(broken, torch.nan), 0) for v in values), same


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """`kldiv_ext.kl_div` in float64: Σ p (log p - input), with 0 wherever p is 0."""
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else ("sum" if size_average is False else "mean")
    return plain_kl_div(input.double(), target.double(), reduction, log_target)


def plain_kl_div(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    """The same in the dtype of its arguments, for what the kernel does not take: broadcasting, AD modes."""
    dead = target.exp() == 0 if log_target else target == 0
    log_p = target.masked_fill(dead, 0) if log_target else target.masked_fill(dead, 1).log()
    p = log_p.exp() if log_target else target
    terms = torch.where(dead, 0, p * (log_p - torch.where(dead, 0, input)))
    if reduction == "none":
        return terms
    if reduction == "mean":
        return terms.mean()
    if reduction == "batchmean" and input.dim() > 0:
        return terms.sum() / input.shape[0]
    return terms.sum()
