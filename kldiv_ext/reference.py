"""Slow, obvious definitions in plain PyTorch and float64: the documentation of every loss, and the tests' oracle.

Written from the formulas; the kernels share none of this code. Differentiable any number of times and in every mode of
PyTorch, so the library also uses it where a kernel cannot serve (forward-mode AD, `torch.func`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .options import DistillationOptions, LogitsOptions, LossOptions, completed, denominator, takes


def _plogr(p: Tensor, log_p: Tensor, log_r: Tensor) -> Tensor:
    """p (log p - log r), and exactly 0 with zero gradients where p is 0."""
    dead = p == 0
    return torch.where(dead, 0, p * (log_p.masked_fill(dead, 0) - log_r.masked_fill(dead, 0)))


def forward_kl(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p - log q), as in `F.kl_div`. Kullback and Leibler (1951)."""
    return _plogr(lp.exp(), lp, lq).sum(-1)


def reverse_kl(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(q‖p) = Σ q (log q - log p). Gu et al. (2024), MiniLLM."""
    return forward_kl(lq, lp)


def jeffreys(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q). Jeffreys (1946)."""
    return forward_kl(lp, lq) + reverse_kl(lp, lq)


def _log_mixture(lp: Tensor, lq: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    dead = (lp == -torch.inf) & (lq == -torch.inf)
    lp, lq = lp.masked_fill(dead, 0), lq.masked_fill(dead, 0)
    log_shares = torch.tensor([share, 1 - share], dtype=lp.dtype, device=lp.device).log()
    return torch.logaddexp(lp + log_shares[0], lq + log_shares[1])


def jsd(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    """β KL(p‖m) + (1-β) KL(q‖m), m = βp + (1-β)q, β = ``beta``. Agarwal et al. (2024), GKD."""
    if beta == 0:
        return forward_kl(lp, lq)
    if beta == 1:
        return reverse_kl(lp, lq)
    lm = _log_mixture(lp, lq, beta)
    return (beta * _plogr(lp.exp(), lp, lm) + (1 - beta) * _plogr(lq.exp(), lq, lm)).sum(-1)


def skew_forward_kl(lp: Tensor, lq: Tensor, skew: float) -> Tensor:
    """KL(p ‖ κp + (1-κ)q), κ = ``skew``. Ko et al. (2024), DistiLLM."""
    if skew == 0:
        return forward_kl(lp, lq)
    if skew == 1:  # the mixture is p itself: 0, or NaN where the row is NaN
        return 0 * (lp.exp() * lq.exp()).sum(-1)
    return _plogr(lp.exp(), lp, _log_mixture(lp, lq, skew)).sum(-1)


def skew_reverse_kl(lp: Tensor, lq: Tensor, skew: float) -> Tensor:
    """KL(q ‖ κq + (1-κ)p), κ = ``skew``. Ko et al. (2024), DistiLLM."""
    return skew_forward_kl(lq, lp, skew)


def total_variation(lp: Tensor, lq: Tensor) -> Tensor:
    """½ Σ |p - q|, with gradient 0 at p = q. Wen et al. (2023)."""
    difference = lp.exp() - lq.exp()
    sign = difference.sign().masked_fill(difference.isnan(), torch.nan).detach()  # the derivative of abs at NaN is 0
    return (difference * sign).sum(-1) / 2


def alpha(lp: Tensor, lq: Tensor, alpha: float) -> Tensor:
    """Σ (p^α q^(1-α) - αp - (1-α)q) / (α(α-1)), α = ``alpha``. Amari (1985)."""
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
    """-log softmax(student) at every position's label, [...] float64; NaN for a label outside [0, V)."""
    wrong = (labels < 0) | (labels >= student.shape[-1])
    lq = torch.log_softmax(student.double(), -1)
    picked = lq.gather(-1, labels.masked_fill(wrong, 0)[..., None])[..., 0]
    return -picked * torch.where(wrong, torch.nan, 1.0)


def effective_logits(
    logits: Tensor, scale: float | None, softcap: float | None, valid_vocab: int | None = None
) -> Tensor:
    """softcap·tanh(scale·z / softcap) of the first valid_vocab columns, float64."""
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
    """soft_weight · divergence + hard_weight · cross entropy, [...]; a part of weight 0 is 0 even where infinite."""
    if soft_weight == 0:
        divergence, parameter = "skew_forward_kl", 1.0  # 0, or NaN where the row is NaN
    losses = (soft_weight or 1.0) * row_losses(student, teacher, divergence, parameter, temperature)
    if hard_weight != 0:
        assert labels is not None
        losses = losses + hard_weight * cross_entropies(student, labels)
    return losses


def reduced(losses: Tensor, divisor: Any) -> Tensor:
    """Their sum / divisor, or the losses themselves where the divisor is None."""
    return losses if divisor is None else losses.sum() / divisor


def _counting(logits: Tensor, labels: Tensor | None, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Which positions mask and labels let count, [...] bool."""
    counts = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if mask is not None:
        counts = counts & mask
    return counts if labels is None else counts & (labels != ignore_index)


def _both_effective(
    student_logits: Tensor, teacher_logits: Tensor, counts: Tensor, options: LogitsOptions
) -> list[Tensor]:
    """Both sides' effective logits; positions that do not count are replaced by 0, whatever they hold."""
    scales, softcaps = (
        x if isinstance(x, (tuple, list)) else (x, x) for x in (options["logit_scale"], options["logit_softcap"])
    )
    return [
        effective_logits(z.double().masked_fill(~counts[..., None], 0), scale, softcap, options["valid_vocab"])
        for z, scale, softcap in zip((student_logits, teacher_logits), scales, softcaps, strict=True)
    ]


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
    """`kldiv_ext.distillation_loss` in float64, written out; values are not checked, nothing is computed in place."""
    chosen: DistillationOptions = completed("distillation_loss", DistillationOptions, options, check=False)
    temperature, divergence, reduction = chosen["temperature"], chosen["divergence"], chosen["reduction"]
    soft_weight = chosen["soft_weight"] * (temperature**2 if chosen["scale_by_temperature_squared"] else 1)
    hard_weight = chosen["hard_weight"]
    counts = _counting(student_logits, labels, mask, chosen["ignore_index"])
    weights = counts.double() if weight is None else torch.where(counts, weight.double(), 0)
    counts = weights != 0
    total = torch.as_tensor(weights.sum() if num_items is None else num_items, device=weights.device)
    if reduction == "mean":
        counts = counts & (total != 0)
    if soft_weight == 0 and hard_weight == 0:
        counts = torch.zeros_like(counts)
    labels = None if labels is None else labels.masked_fill(~counts, 0)
    student, teacher = _both_effective(student_logits, teacher_logits, counts, chosen)
    code = DIVERGENCES[divergence].__code__
    name = code.co_varnames[2] if code.co_argcount == 3 else ""
    parameter = chosen[name] if name else 0.0  # type: ignore[literal-required]
    losses = weighted_losses(student, teacher, labels, soft_weight, hard_weight, divergence, parameter, temperature)
    divisor = denominator(reduction, student_logits.shape[:-1], lambda: total)
    if divisor is not None:
        divisor = torch.as_tensor(divisor, device=weights.device)
        divisor = divisor.masked_fill(divisor == 0, 1)  # a loss over no positions is 0, not 0 / 0
    return reduced(torch.where(counts, losses * weights, 0), divisor)


@takes(LossOptions)
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
    **options: Unpack[LossOptions],
) -> Tensor:
    """`kldiv_ext.linear_distillation_loss` in float64, with all logits at once; values are not checked."""
    chosen: LossOptions = completed("linear_distillation_loss", LossOptions, options, check=False)

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = hidden.double() @ weight.double().t()
        return product if bias is None else product + bias.double()

    student_logits = logits(student_hidden, student_weight, student_bias)
    if teacher_logits is None:
        assert teacher_hidden is not None and teacher_weight is not None
        teacher_logits = logits(teacher_hidden, teacher_weight, teacher_bias)
    return distillation_loss(
        student_logits, teacher_logits, labels, mask=mask, weight=weight, num_items=num_items, **chosen
    )


@takes(LogitsOptions)
def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[Tensor | None, ...]:
    """What `kldiv_ext.token_stats` returns, in float64, written out; values are not checked."""
    chosen: LogitsOptions = completed("token_stats", LogitsOptions, options, check=False)
    counts = _counting(student_logits, labels, mask, chosen["ignore_index"])
    labels = None if labels is None else labels.masked_fill(~counts, 0)
    both = _both_effective(student_logits, teacher_logits, counts, chosen)
    z_student, z_teacher = (z / chosen["temperature"] for z in both)
    lq, lp = torch.log_softmax(z_student, -1), torch.log_softmax(z_teacher, -1)
    zeros = torch.zeros_like(lq)
    broken = (lq + lp).isnan().any(-1)
    values = [
        forward_kl(lp, lq),
        reverse_kl(lp, lq),
        -_plogr(lq.exp(), lq, zeros).sum(-1),
        -_plogr(lp.exp(), lp, zeros).sum(-1),
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
    terms = kl_div_terms(input.double(), target.double(), log_target)
    return reduced(terms, denominator(reduction, input.shape, terms.numel))


def kl_div_terms(input: Tensor, target: Tensor, log_target: bool) -> Tensor:
    """p (log p - input), and 0 wherever p is 0, in the dtype of the arguments, broadcast."""
    dead = target.exp() == 0 if log_target else target == 0
    log_p = target.masked_fill(dead, 0) if log_target else target.masked_fill(dead, 1).log()
    p = log_p.exp() if log_target else target
    return torch.where(dead, 0, p * (log_p - torch.where(dead, 0, input)))
