"""How far the results of distillation_loss may be from the float64 reference's, row by row, for any arguments.

Allowed is what DESIGN promises, relative to the size of a row's result, and what rounding does to the reference itself:
it runs again on logits that are moved by two roundings, and twice the largest change of each result is allowed on top.
The logits are moved by what the kernels round and no more: where nothing is rounded, only the promise is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import PARAMETERS, Result, run
from oracle import GRADIENT, LOSS, TINY_LOSS
from torch import Tensor

from kldiv_ext import reference
from kldiv_ext.options import per_side

EPS64 = torch.finfo(torch.float64).eps
DRAWS = 4


class Allowed(NamedTuple):
    """Absolute errors per row."""

    loss: Tensor
    gradients: tuple[Tensor, Tensor]


class Rows(NamedTuple):
    """Effective logits, and the logarithms of their probabilities."""

    student: Tensor
    teacher: Tensor
    log_q: Tensor
    log_p: Tensor


def finite(x: Tensor) -> Tensor:
    """0 in place of infinities and NaN: where the reference has those, the results must have them too."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def both_sides(options: dict[str, Any]) -> list[tuple[float, float]]:
    """(student, teacher) of logit_scale, 1 without one, and of logit_softcap, 0 without one."""
    return [per_side(options.get("logit_scale"), 1.0), per_side(options.get("logit_softcap"), 0.0)]


def offsets(rows: Rows) -> Tensor:
    """What t - s is beside the difference of the maxima."""
    tops = [finite(z.amax(-1, keepdim=True)) for z in rows[:2]]
    return (finite(rows.teacher - rows.student) - (tops[1] - tops[0])).abs()


def moves(rows: Rows, options: dict[str, Any], dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """What kernels that compute in `dtype` may move the effective logits (student, teacher) by, in several draws."""
    few_eps = 2 * torch.finfo(dtype).eps
    # A probability p is known to eps |log p|. That moves both sides alike: close rows stay close.
    both = few_eps * options.get("temperature", 1.0) * (4 + finite(torch.maximum(rows.log_q, rows.log_p)).abs())
    # A softcap, or a scale of one side, rounds that side's logits. In the reference it rounds them in float64.
    scales, caps = both_sides(options)
    common_scale = caps == (0, 0) and scales[0] == scales[1]
    student, teacher = (
        16 * EPS64 * (1 + finite(z).abs())
        + (2 * few_eps * finite(z).abs() if (scale != 1 or cap) and not common_scale else 0)
        for z, scale, cap in zip(rows[:2], scales, caps, strict=True)
    )
    # t - s is rounded: less the difference of the maxima where that is below 1, else each side less its maximum.
    tops = [finite(z.amax(-1, keepdim=True)) for z in rows[:2]]
    difference, top = finite(rows.teacher - rows.student), tops[1] - tops[0]
    offset = offsets(rows)
    inexact = (difference.to(dtype) != difference) | (top.to(dtype) != top) | (dtype == torch.float64)
    close = offset + inexact * (difference.abs() + top.abs())
    apart = finite(rows.student - tops[0]).abs() + finite(rows.teacher - tops[1]).abs()
    distance = top.abs() / (scales[0] if common_scale else 1)  # a common scale belongs to the temperature
    either = torch.where(distance < 0.99, close, torch.where(distance > 1.01, apart, torch.maximum(close, apart)))
    teacher = teacher + few_eps * torch.where(offset == 0, 0, either)
    towards = torch.where(rows.log_p > rows.log_q, 1.0, -1.0)
    generator = torch.Generator().manual_seed(0)
    for draw in range(DRAWS):
        signs = [torch.randint(0, 2, both.shape, generator=generator) * 2.0 - 1 for _ in range(3)]
        if draw == 0:  # towards each other, where the gradient of total variation jumps
            signs[1:] = [towards, -towards]
        yield [finite(signs[0] * both + sign * move) for sign, move in zip(signs[1:], (student, teacher), strict=True)]


def run_moved(loss: Callable[[], Result], by: Sequence[Tensor | float] = (0.0, 0.0)) -> tuple[Result, list[Tensor]]:
    """The reference's result on effective logits that are moved, and those logits, with their gradients."""
    effective, original = [], reference._both_effective

    def both_effective(*args: Any) -> list[Tensor]:
        effective.extend(z + move for z, move in zip(original(*args), by, strict=True))
        for z in effective:
            z.retain_grad()
        return effective

    with mock.patch.object(reference, "_both_effective", both_effective):
        return loss(), effective


def sizes(loss: Tensor, gradients: Sequence[Any]) -> list[Tensor]:
    return [finite(loss).abs(), *(finite(g).norm(dim=-1) for g in gradients)]


def weights(options: dict[str, Any]) -> tuple[float, float]:
    """What the divergence and the cross entropy are multiplied by."""
    squared = options.get("temperature", 1.0) ** 2 if options.get("scale_by_temperature_squared") else 1.0
    return abs(options.get("soft_weight", 1.0)) * squared, abs(options.get("hard_weight", 0.0))


def column_errors(rows: Rows, options: dict[str, Any], eps: float) -> tuple[Tensor, list[Tensor]]:
    """What moved logits do not show, per column: of the divergence, and of its gradients by the effective logits."""
    temperature, parameter = options.get("temperature", 1.0), options.get(PARAMETERS.get(options["divergence"], ""))
    q, p = finite(rows.log_q.exp()), finite(rows.log_p.exp())
    # The reference's own rounding, which the formulas enlarge near the ends of their parameters.
    noise = 16 * EPS64 * (1.0 if parameter in (None, 0.0, 1.0) else max(1.0, 0.25 / (parameter * (1 - parameter))))
    largest = sum(finite(z).abs().amax(-1, keepdim=True) for z in rows[:2]) / temperature
    terms = noise * (1 + largest) * (p + q) * (1 + finite(rows.log_p - rows.log_q).abs())
    # The rounding of the difference of the log-sum-exps, whose terms cancel where the rows are close.
    larger, log_larger = torch.maximum(p, q), finite(torch.maximum(rows.log_q, rows.log_p)).abs()
    shift = (finite(rows.log_p.amax(-1, keepdim=True)) - finite(rows.log_q.amax(-1, keepdim=True))).abs()
    shift = shift + (larger * (offsets(rows) > temperature / 64) * (4 + log_larger)).sum(-1, keepdim=True)
    errors = terms
    if options["divergence"] == "total_variation":  # the sign of p - q where float64 does not resolve it
        errors = errors + larger * ((p - q).abs() <= 4 * EPS64 * larger)
    gradients = [errors + share * errors.sum(-1, keepdim=True) + 2 * eps * shift * larger for share in (q, p)]
    return terms, [g / temperature for g in gradients]


def allowed_errors(student: Tensor, teacher: Tensor, arguments: dict[str, Any], counts: Tensor) -> Allowed:
    """Of unreduced losses without `weight` over the positions that count, for a grad_output of 1."""
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    eps = torch.finfo(dtype).eps
    options = {name: x for name, x in arguments.items() if name not in ("num_items", "weight")}
    options |= {"reduction": "none", "mask": counts}

    def loss(**changed: Any) -> Result:
        return run(reference.distillation_loss, student.double(), teacher.double(), **{**options, **changed})

    exact, effective = run_moved(loss)
    logs = (torch.log_softmax(z.detach() / options.get("temperature", 1.0), -1) for z in effective)
    rows = Rows(*(z.detach() for z in effective), *logs)
    allowed = [torch.zeros(counts.shape, dtype=torch.float64)] * 3
    for by in moves(rows, options, dtype):
        moved, _ = run_moved(loss, by)
        changes = sizes(moved.loss - exact.loss, [a - b for a, b in zip(moved.gradients, exact.gradients, strict=True)])
        allowed = [torch.maximum(a, 2 * b) for a, b in zip(allowed, changes, strict=True)]

    # The promises. Divergence and cross entropy may cancel: the error of each remains.
    soft, hard = weights(options)
    parts = [loss(hard_weight=0.0), loss(soft_weight=0.0)] if soft and hard else [exact]
    of_loss, *of_gradients = (sum(each) for each in zip(*(sizes(*part) for part in parts), strict=True))
    allowed[0] = allowed[0] + LOSS[dtype] * of_loss + soft * (1e-14 if dtype == torch.float64 else TINY_LOSS)
    if soft and hard:  # else gradients are compared with GRADIENT of their own dtype
        allowed[1:] = [a + GRADIENT[dtype] * size for a, size in zip(allowed[1:], of_gradients, strict=True)]

    # A cross entropy is a log-sum-exp less a logit, its gradient q less 1 at the label.
    terms, columns = column_errors(rows, options, eps)
    allowed[0] = allowed[0] + soft * terms.sum(-1) + 4 * eps * hard
    of_label = [4 * eps * hard / terms.shape[-1] ** 0.5, 0.0]
    for i, (raw, z, scale, cap) in enumerate(zip((student, teacher), effective, *both_sides(options), strict=True)):
        slope, error = scale, 0.0
        if cap:  # 1 - tanh² is known to eps times the exponent, in the reference to eps64
            x = finite(raw[..., : z.shape[-1]].double() * scale / cap)
            slope = scale / x.cosh() ** 2
            error = (eps * 2 * x.abs() * slope + 4 * EPS64 * scale) * finite(z.grad).abs()
        error = error + slope * (soft * columns[i] + of_label[i])
        allowed[i + 1] = allowed[i + 1] + error.norm(dim=-1)
    return Allowed(allowed[0], (allowed[1], allowed[2]))
