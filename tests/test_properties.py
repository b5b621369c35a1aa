"""Properties of whatever one may pass: drawn at random, shrunk where one fails. `make fuzz` draws for long."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import GRADIENT, LOSS, PARAMETERS, TINY_LOSS, Divergence, Result, run
from torch import Tensor

import kldiv_ext
from kldiv_ext import TokenStats, distillation_loss, reference, token_stats

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")

_ALL = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("ci", max_examples=120, deadline=None, derandomize=True, database=None)
settings.register_profile(
    "fuzz", max_examples=400, deadline=None, database=None, report_multiple_bugs=False, suppress_health_check=_ALL
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

INF, NAN = math.inf, math.nan
DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}

# ---------------------------------------------------------------- what is drawn


class Case(NamedTuple):
    """A call of distillation_loss in plain numbers, so that a failing one can be read and run again."""

    batch: tuple[int, ...] = (2,)
    columns: int = 5
    dtypes: tuple[str, str] = ("f32", "f32")  # student, teacher
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    rows: str = "random"
    spread: float = 1.0
    distance: float = 1.0
    special: tuple[tuple[str, int, int, float], ...] = ()  # side, row, column, value
    seed: int = 0
    positions: tuple[str, ...] = ()
    ignore_index: int = -100
    num_items: float | None = None
    padding: tuple[int, int] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    grad_output: float = 1.0
    wanted: tuple[bool, bool] = (True, True)
    in_place: bool = False


class Problem(NamedTuple):
    """The tensors of a Case."""

    student: Tensor
    teacher: Tensor
    arguments: dict[str, Any]


def padded(x: Tensor, left: int, right: int) -> Tensor:
    """Cut out of a tensor with longer rows of NaN: a value from outside would be seen."""
    return F.pad(x, (left, right), value=NAN)[..., left : left + x.shape[-1]]


# In operators with a gradient, so that they also stand between a leaf and its logits.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x * 1,
    "vocabulary first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "batch reversed": lambda x: (
        x.permute(*reversed(range(x.dim() - 1)), -1).contiguous().permute(*reversed(range(x.dim() - 1)), -1)
    ),
    "rows cut": lambda x: torch.cat([x, x], 0)[: x.shape[0]],
    "rows shifted": lambda x: torch.cat([x[:1], x], 0)[x[:1].shape[0] :],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns cut": lambda x: padded(x, 0, 3),
    "columns shifted": lambda x: padded(x, 1, 1),
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "misaligned": lambda x: padded(x.flatten(), 3, 0).view(x.shape),
}
OVERLAPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "one row": lambda x: x[:1].expand(x.shape),
    "one column": lambda x: x[..., :1].expand(x.shape),
}

DIVERGENCES = st.sampled_from(kldiv_ext.DIVERGENCES)


# The ends, and all that lies 0.001 inside of them.
PARAMETER = st.sampled_from([0.0, 1.0, 0.1, 0.5, 0.9, 0.01, 0.99, 0.001, 0.999]) | st.floats(0.001, 0.999)

# Mostly what there is something to see in; around vectors, unrolled loops and chunks of the kernels.
COLUMNS = st.integers(2, 130) | st.sampled_from(
    [2, 3, 8, 15, 16, 17, 31, 33, 63, 64, 65, 1, 1023, 1024, 1025, 2047, 2048, 2049, 3000, 4101]
)
BATCHES = st.sampled_from(
    [(), (1,), (2,), (3,), (5,), (9,), (2, 3), (4, 2), (1, 3), (3, 1, 2), (2, 2, 3), (40,), (2, 5), (0,), (3, 0)]
)
SHAPES = st.tuples(BATCHES, COLUMNS)
DTYPES = st.sampled_from(list(DTYPE))
TEMPERATURES = st.sampled_from([1.0, 2.0]) | st.floats(0.3, 8.0)
WEIGHTS = st.sampled_from([1.0, 0.0, 0.5, 2.0]) | st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)
WANTED = st.sampled_from([(True, True), (True, False), (False, True), (True, True), (False, False)])
SIDES = st.sampled_from(["student", "teacher", "both"])
SPECIAL = st.tuples(
    SIDES, st.integers(0, 9), st.integers(0, 99), st.sampled_from([-INF, -INF, -INF, INF, NAN, -1e30, 1e4, -1e4, 1e9])
)


def per_side(value: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    side = value | st.none()
    return value | st.tuples(side, side)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Any call; `fixed` fields, and options, stay as given."""
    batch, columns = draw(SHAPES)
    divergence = draw(DIVERGENCES)
    options: dict[str, Any] = {"divergence": divergence}
    if divergence in PARAMETERS:
        options[PARAMETERS[divergence]] = draw(PARAMETER)
    seed = draw(st.integers(0, 2**16))
    positions = {name for name in ("labels", "mask", "weight", "poison") if draw(st.booleans())}
    if seed % 16 == 7:
        positions.add("nothing")
    extra: dict[str, st.SearchStrategy[Any]] = {
        "temperature": TEMPERATURES,
        "scale_by_temperature_squared": st.booleans(),
        "soft_weight": WEIGHTS,
        "hard_weight": WEIGHTS,
        "logit_softcap": per_side(st.floats(1, 60)),
        "logit_scale": per_side(st.floats(0.1, 4)),
        "reduction": st.sampled_from(["none", "sum", "mean", "batchmean"]),
    }
    options.update({name: draw(strategy) for name, strategy in extra.items() if draw(st.booleans())})
    options.update(fixed.pop("options", {}))
    if options.get("hard_weight", 0.0) != 0:
        positions.add("labels")
    mean = options.get("reduction", "mean") == "mean"
    case = Case(
        batch=batch,
        columns=columns,
        dtypes=draw(st.tuples(DTYPES, DTYPES)),
        layouts=draw(st.tuples(*[st.sampled_from([*LAYOUTS, *OVERLAPPING])] * 2)),
        rows=draw(st.sampled_from(["random", "random", "equal", "constant", "shifted", "sure", "apart", "offset"])),
        spread=draw(st.sampled_from([1.0, 3.0, 0.01, 10.0, 30.0])),
        distance=draw(st.sampled_from([1.0, 3.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6])),
        special=tuple(draw(st.lists(SPECIAL, max_size=3))) if draw(st.booleans()) else (),
        seed=seed,
        positions=tuple(sorted(positions)),
        ignore_index=draw(st.sampled_from([-100, -1, 0, 3])),
        num_items=draw(st.sampled_from([None, None, None, None, 7, 11.5, 7, 0])) if mean else None,
        padding=draw(st.none() | st.tuples(st.integers(0, 40), st.integers(0, 40))),
        options=options,
        grad_output=draw(st.sampled_from([1.0, -0.25, 3.7, 1024.0, 3.7, -0.25, 0.0])),
        wanted=draw(WANTED),
        in_place=draw(st.booleans()),
    )
    return case._replace(**fixed)


def make_values(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both sides' logits in float64, before the special ones."""
    shape = (*case.batch, case.columns)
    teacher = case.spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.rows == "constant":
        teacher = teacher[..., :1].expand(shape).clone()
    if case.rows == "sure":
        teacher[..., case.seed % case.columns] += 20.0
    student = teacher + case.distance * torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.rows == "offset":
        student += (case.seed % 7 - 3) * 200.0
    if case.rows == "apart":
        student[..., (case.seed // 7) % case.columns] += 20.0 + case.seed % 7
    if case.rows == "equal":
        student = teacher.to(DTYPE[case.dtypes[1]]).double()
    if case.rows == "shifted":
        student = teacher + case.distance
    return student, teacher


def build(case: Case) -> Problem:
    """Tensors whose strides are those of the case, and the arguments that go with them."""
    generator = torch.Generator().manual_seed(case.seed)
    sides = dict(zip(("student", "teacher"), make_values(case, generator), strict=True))
    for side, row, column, value in case.special:
        for name in sides if side == "both" else (side,):
            rows = sides[name].view(-1, case.columns)
            if len(rows) > 0:
                rows[row % len(rows), column % case.columns] = value
    arguments: dict[str, Any] = {**case.options}
    chance = lambda: torch.rand(case.batch, generator=generator)  # noqa: E731
    counts = torch.ones(case.batch, dtype=torch.bool)
    if "mask" in case.positions:
        arguments["mask"] = chance() < (0.0 if "nothing" in case.positions else 0.7)
        counts &= arguments["mask"]
    if "labels" in case.positions:
        labels = torch.randint(0, case.columns, case.batch, generator=generator)
        labels[chance() < 0.2] = case.ignore_index
        arguments["labels"], arguments["ignore_index"] = labels, case.ignore_index
        if "poison" in case.positions:
            labels[~counts] = 10**9
        counts &= labels != case.ignore_index
    if "weight" in case.positions:
        weight = (3 * chance()).to(DTYPE[sorted(DTYPE)[case.seed % 4]])
        weight[chance() < 0.2] = 0
        arguments["weight"] = weight
        counts &= weight != 0
    if case.num_items is not None:
        whole = case.num_items == int(case.num_items) and case.seed % 2 == 0
        arguments["num_items"] = int(case.num_items) if whole else torch.tensor(case.num_items)
    for name, dtype, layout, extra in zip(sides, case.dtypes, case.layouts, case.padding or (0, 0), strict=True):
        values = sides[name].to(DTYPE[dtype])
        if "poison" in case.positions:
            values[~counts] = NAN
        values = F.pad(values, (0, extra), value=NAN)
        sides[name] = {**LAYOUTS, **OVERLAPPING}[layout](values)
    if case.padding is not None:
        arguments["valid_vocab"] = case.columns
    return Problem(sides["student"], sides["teacher"], arguments)


def clean(x: Tensor) -> Tensor:
    """Without what is infinite or NaN: there the results are compared as such."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def pairs(arguments: dict[str, Any], *names: str) -> list[tuple[Any, Any]]:
    """Options of both sides as (student, teacher)."""
    return [x if isinstance(x, tuple) else (x, x) for x in map(arguments.get, names)]


def assume_documented(problem: Problem) -> None:
    """Leave out where the oracle is not the contract.

    To the kernels only -inf is a probability of 0. To the oracle e^-1000 is too, so that beside a -inf of the other
    side its divergence is not infinite.
    """
    arguments = problem.arguments
    scales, caps = pairs(arguments, "logit_scale", "logit_softcap")
    valid, temperature = arguments.get("valid_vocab"), arguments.get("temperature", 1.0)
    sides = zip(problem[:2], scales, caps, strict=True)
    lq, lp = (torch.log_softmax(reference.effective_logits(z, a, b, valid) / temperature, -1) for z, a, b in sides)
    for x, y in ((lq, lp), (lp, lq)):
        assume(not ((y == -INF) & (x > -INF) & (x < -700)).any())


# ---------------------------------------------------------------- how far from the oracle a result may be


class Allowed(NamedTuple):
    """What an exact kernel in float32 may be off by, per row: absolute errors beyond the relative ones."""

    loss: Tensor
    student: Tensor
    teacher: Tensor


def columns_of(divergence: Divergence, lp: Tensor, lq: Tensor) -> Tensor:
    """The terms that the kernels sum: of a Bregman divergence, so that they and their slopes are 0 for equal rows."""
    formula, parameter = reference.DIVERGENCES[divergence.name], divergence.parameter
    lp1, lq1 = lp[..., None], lq[..., None]
    terms = formula(lp1, lq1) if parameter is None else formula(lp1, lq1, parameter)
    excess = lq.exp() - lp.exp()
    return terms + excess * {
        "forward_kl": 1.0,
        "reverse_kl": -1.0,
        "jsd": {0.0: 1.0, 1.0: -1.0}.get(parameter, 0.0),  # type: ignore[arg-type]
        "skew_forward_kl": 1 - (parameter or 0.0),
        "skew_reverse_kl": (parameter or 0.0) - 1,
        "alpha": {0.0: -1.0, 1.0: 1.0}.get(parameter, 0.0),  # type: ignore[arg-type]
    }.get(divergence.name, 0.0)


def allowed_errors(
    student: Tensor, teacher: Tensor, labels: Tensor | None, divergence: Divergence, options: dict[str, Any]
) -> tuple[Allowed, Allowed]:
    """Per row, of the soft part without its weight, and of the hard part: first-order error analysis of the kernels.

    A column is `larger` probability times a function of delta = (t - s) / T - shift. The probability is known to eps
    times its logarithm. delta is known to eps times what it is the difference of, not absolutely: so nothing is allowed
    to rows that are close. Where logits are rounded (a softcap, a scale of one side) that rounding comes on top. A
    gradient is then h - q * sum h, where h is g less what the column of the largest probability has of it per q: 0
    there, and so nothing is allowed to rows that are sure.
    """
    wide = torch.float64 in (student.dtype, teacher.dtype)
    eps, eps64 = torch.finfo(torch.float64 if wide else torch.float32).eps, torch.finfo(torch.float64).eps
    temperature = options.get("temperature", 1.0)
    scale, cap = pairs(options, "logit_scale", "logit_softcap")
    alike = cap == (None, None) and (scale[0] or 1) == (scale[1] or 1)
    z, slopes, decays = [], [], []
    for raw, a, b in zip((student, teacher), scale, cap, strict=True):
        leaf = raw[..., : options.get("valid_vocab")].detach().double().requires_grad_()
        with torch.enable_grad():
            effective = reference.effective_logits(leaf, a, b)
            slopes.append(clean(torch.autograd.grad(effective.sum(), leaf)[0]) if leaf.numel() else leaf.detach())
        z.append(effective.detach())
        decays.append(clean(2 * leaf.detach() * (a or 1) / b).abs() if b else torch.zeros(()))
    # The oracle's 1 - tanh^2 is a difference.
    flat = [4 * eps64 * (a or 1.0) if b else 0.0 for a, b in zip(scale, cap, strict=True)]
    zs, zt = z
    # Rounding of the logits themselves, in units of eps.
    rs, rt = (
        torch.zeros_like(x) if alike or (a is None and b is None) else 4 * clean(x).abs() / temperature
        for x, a, b in zip(z, scale, cap, strict=True)
    )
    rounding = rs.amax(-1, keepdim=True) + rt.amax(-1, keepdim=True)
    lq, lp = (torch.log_softmax(x / temperature, -1).requires_grad_() for x in z)
    with torch.enable_grad():
        terms = columns_of(divergence, lp, lq)
        gq, gp = (
            torch.autograd.grad(terms.sum(), (lq, lp), allow_unused=True, materialize_grads=True)
            if terms.numel()
            else (lq, lp)
        )
    lp, lq, terms, gq, gp = (x.detach() for x in (lp, lq, terms, gq, gp))
    p, q = clean(lp.exp()), clean(lq.exp())
    larger, smaller = torch.maximum(p, q), torch.minimum(p, q)
    log_larger = clean(torch.maximum(lp, lq)).abs()
    gap = clean(lp - lq).abs()
    difference = clean(zt - zs).abs() / temperature
    tops = clean(zt.amax(-1, keepdim=True)), clean(zs.amax(-1, keepdim=True))
    top = clean(tops[0] - tops[1])
    lse = clean(torch.logsumexp((zt - tops[0]) / temperature, -1) - torch.logsumexp((zs - tops[1]) / temperature, -1))
    # A common offset of one side is gone, exactly, before anything is rounded; it stays where t - s is rounded first.
    offset = clean((zt - zs) - top).abs() / temperature
    narrow = torch.float64 if wide else torch.float32
    rounded_first = (clean(zt - zs).to(narrow).double() != clean(zt - zs)) | (top.to(narrow).double() != top) | wide
    difference = torch.where(offset == 0, 0, offset + rounded_first * (difference + top.abs() / temperature))
    # Where the maxima are far apart both logits are first taken off their own.
    own = [clean(x - m).abs() / temperature for x, m in zip((zt, zs), tops, strict=True)]
    far = sum(own)
    apart = top.abs() / ((scale[0] or 1.0) if alike else 1.0)  # a scale of both sides is the temperature's
    near_one = (apart - 1).abs() < 0.01  # either, by how the maxima's own difference is rounded
    difference = torch.where(near_one, torch.maximum(difference, far), torch.where(apart < 1, difference, far))
    away = offset > 1 / 64
    of_log = 4 + log_larger + rounding  # exp and log themselves: 4e-7, as math.h says
    shift = lse.abs()[..., None] + (larger * away * of_log).sum(-1, keepdim=True)
    of_delta = difference + shift + rs + rt + rounding
    a = divergence.parameter
    condition = 1.0 if a in (None, 0.0, 1.0) else max(1.0, 0.25 / (a * (1 - a)))
    largest = clean(zs).abs().amax(-1, True) + clean(zt).abs().amax(-1, True)
    noise = 16 * eps64 * condition * (1 + largest / temperature)  # the oracle's own

    def of_gradient(g: Tensor, share: Tensor, slope: Tensor, flat: float, decay: Tensor, plain: bool) -> Tensor:
        g = clean(g)
        if plain:
            error = of_log * g.abs() + of_delta * smaller
        else:
            at = (share + 1e-12 * larger).argmax(-1, keepdim=True)  # of several the one with the other side's largest
            per_share = g.gather(-1, at).abs() / share.gather(-1, at)
            other = (larger / share).gather(-1, at) * of_delta.gather(-1, at) + per_share * (of_log + of_delta)
            error = of_log * g.abs() + of_delta * larger + share * other
            exact = (clean(zt - zs) == clean(zt - zs).gather(-1, at)) & (rounding == 0)
            error = torch.where(exact, 0, error)
            rest = (g - share * g.gather(-1, at) / share.gather(-1, at)).abs()
            total = (rest * (of_log + 4)).sum(-1, keepdim=True) + error.sum(-1, keepdim=True)
            error = error + share * (total + rest.sum(-1, keepdim=True) * (of_log + of_delta))
        error = eps * error
        own = (p + q) * (1 + gap)  # the oracle's rounding
        error = error + noise * (own + share * own.sum(-1, keepdim=True))
        through = (g - share * g.sum(-1, keepdim=True)).abs()
        error = error + eps * decay * through
        if divergence.name == "total_variation":  # its gradient jumps where p = q
            unclear = larger * (gap <= 4 * eps * of_delta + 4 * noise)
            error = error + unclear + share * unclear.sum(-1, keepdim=True)
        return ((clean(error) * (slope + flat) + clean(through) * flat) / temperature).norm(dim=-1)

    name = {("jsd", 0.0): "forward_kl", ("jsd", 1.0): "reverse_kl", ("alpha", 0.0): "reverse_kl"}.get(
        (divergence.name, a),
        divergence.name,  # type: ignore[arg-type]
    )
    name = {("alpha", 1.0): "forward_kl", ("skew_forward_kl", 0.0): "forward_kl"}.get((divergence.name, a), name)  # type: ignore[arg-type]
    name = "reverse_kl" if (divergence.name, a) == ("skew_reverse_kl", 0.0) else name
    slope = larger if divergence.name == "total_variation" else clean(gq).abs() + clean(gp).abs()
    loss = eps * (of_log * clean(terms).abs() + of_delta * slope)
    loss = loss + larger * (eps * of_delta) ** 2  # the second order, where the first is 0
    soft = Allowed(
        clean(loss + noise * (p + q) * (1 + gap)).sum(-1) + (1e-14 if wide else TINY_LOSS),
        of_gradient(gq, q, slopes[0], flat[0], decays[0], name == "forward_kl"),
        of_gradient(gp, p, slopes[1], flat[1], decays[1], name == "reverse_kl"),
    )
    # The cross entropy is a log-sum-exp, known to a rounding of 1, less a logit.
    lq = torch.log_softmax(zs, -1)
    q = clean(lq.exp())
    rounded = temperature * (rs + rs.amax(-1, keepdim=True))
    error = 2 * eps * (q * (2 + clean(lq).abs() + rounded)) + eps * decays[0] * q
    if labels is not None:
        at_label = labels.clamp(0, lq.shape[-1] - 1)[..., None]
        error.scatter_add_(-1, at_label, torch.full(at_label.shape, 4 * eps, dtype=torch.float64))
    hard = Allowed(
        4 * eps * (1 + rounded.amax(-1)),
        (error * slopes[0] + q * flat[0]).norm(dim=-1) + flat[0],
        torch.zeros(lq.shape[:-1]).double(),
    )
    return soft, hard


def row_factors(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which positions count, and what a position's loss is multiplied by on its way to the result."""
    arguments, batch = problem.arguments, problem.student.shape[:-1]
    counts = torch.ones(batch, dtype=torch.bool)
    if "mask" in arguments:
        counts = counts & arguments["mask"]
    if "labels" in arguments:
        counts = counts & (arguments["labels"] != arguments["ignore_index"])
    factors = torch.where(counts, arguments["weight"].double(), 0) if "weight" in arguments else counts.double()
    reduction = arguments.get("reduction", "mean")
    divisor = 1.0
    if reduction == "mean":
        divisor = float(arguments["num_items"]) if "num_items" in arguments else factors.sum().item()
    elif reduction == "batchmean" and batch:
        divisor = float(batch[0])
    return factors != 0, factors / divisor if divisor != 0 else 0 * factors


def ours_in_place(layout: str) -> Callable[..., Tensor]:
    function = LAYOUTS[layout]
    return lambda s, *args, **options: distillation_loss(function(s * 1), *args, **options, inplace_backward=True)


def weights_of(options: dict[str, Any]) -> tuple[float, float]:
    """What soft and hard part are multiplied by."""
    squared = options.get("temperature", 1.0) ** 2 if options.get("scale_by_temperature_squared") else 1.0
    return abs(options.get("soft_weight", 1.0)) * squared, abs(options.get("hard_weight", 0.0))


def bounds(problem: Problem) -> Allowed:
    """Per row, of the result and for a grad_output of 1; what storing a gradient adds is not in it."""
    student, teacher, arguments = problem
    divergence = divergence_of(arguments)
    counts, factors = row_factors(problem)
    # What is not read is 0 in the analysis as in the oracle.
    read = [x.masked_fill(~counts[..., None], 0) for x in (student, teacher)]
    labels = arguments["labels"].masked_fill(~counts, 0) if "labels" in arguments else None
    soft, hard = allowed_errors(*read, labels, divergence, arguments)
    inside = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    of_loss, of_gradient = LOSS[inside], GRADIENT[inside]
    each = {n: x for n, x in arguments.items() if n not in ("num_items", "weight")}
    each.update(reduction="none", mask=counts)
    parts = [
        run(reference.distillation_loss, student.double(), teacher.double(), **{**each, **only})
        for only in ({"hard_weight": 0.0}, {"soft_weight": 0.0})
    ]
    weights = weights_of(arguments)
    total = [sum(w * x for w, x in zip(weights, both, strict=True)) for both in zip(soft, hard, strict=True)]
    sizes = [sum(clean(part.loss).abs() for part in parts)]
    sizes += [sum(clean(part[i]).norm(dim=-1) for part in parts) for i in (1, 2)]  # type: ignore[arg-type]
    # Two parts may cancel: what each was known to remains. Otherwise what is stored is compared within this as it is.
    of_gradient *= all(weights)
    relative = (of_loss, of_gradient, of_gradient)
    return Allowed(*(factors.abs() * (t + r * s) for t, r, s in zip(total, relative, sizes, strict=True)))


def divergence_of(arguments: dict[str, Any]) -> Divergence:
    name = arguments["divergence"]
    return Divergence(name, arguments.get(PARAMETERS.get(name, "")))


def chosen_grad_output(case: Case, problem: Problem) -> Tensor:
    if case.options.get("reduction") == "none":
        return row_grad_output(case).double()
    if case.grad_output == 3.7 and torch.bfloat16 in (problem.student.dtype, problem.teacher.dtype):
        return torch.tensor(4.0).double()  # a bfloat16 gradient made in forward is rounded again by any other factor
    return torch.tensor(case.grad_output).double()


def row_grad_output(case: Case) -> Tensor:
    return case.grad_output * torch.randn(case.batch, generator=torch.Generator().manual_seed(case.seed))


def loss_scale(problem: Problem, expected: Result, allowed: Allowed, grad_output: Tensor) -> float:
    """The factor of a GradScaler, so that float16 gradients neither overflow nor lose more than they must."""
    if torch.float16 not in (problem.student.dtype, problem.teacher.dtype):
        return 1.0
    sizes = [
        (clean(g).norm(dim=-1) + grad_output.abs() * a).max().item()
        for g, a in zip(expected[1:], allowed[1:], strict=True)
        if g is not None and g.numel()
    ]
    return 2.0 ** min(max(math.floor(14 - math.log2(max([*sizes, 1e-30]))), -120), 60)


def compare_with_oracle(case: Case) -> None:
    """Losses and gradients within what is allowed, row by row; NaN and infinities in the same places."""
    problem = build(case)
    assume_documented(problem)
    student, teacher, arguments = problem
    grad_output = chosen_grad_output(case, problem)
    wide = student.double(), teacher.double()
    expected = run(reference.distillation_loss, *wide, **arguments, grad_output=grad_output, wanted=case.wanted)
    allowed = bounds(problem)
    factor = loss_scale(problem, expected, allowed, grad_output)
    in_place = case.in_place and case.wanted[0] and case.layouts[0] in LAYOUTS
    ours = run(
        ours_in_place(case.layouts[0]) if in_place else distillation_loss,
        student.contiguous() if in_place else student,
        teacher,
        **arguments,
        grad_output=grad_output * factor,
        wanted=case.wanted,
    )
    if case.num_items == 0:  # 0 whatever the rows hold; to the oracle 0 times what may be infinite
        assert not any(x is not None and x.any() for x in ours)
        return
    assert ours.loss.dtype == (torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32)
    assert_within("loss", ours.loss, expected.loss, allowed.loss if expected.loss.dim() else allowed.loss.sum())
    for i, like, wanted in zip((1, 2), (student, teacher), case.wanted, strict=True):
        value, other = ours[i], expected[i]
        assert (value is not None) == (other is not None) == wanted
        if value is not None and other is not None:
            assert value.dtype == like.dtype and value.shape == like.shape
            floor = grad_output.abs() * factor * (allowed[i] + underflow(problem))
            assert_rows_within(Allowed._fields[i], value, other * factor, floor)
            assert not value[~row_factors(problem)[0]].any()


def assert_within(name: str, value: Tensor, expected: Tensor, allowed: Tensor) -> None:
    assert value.shape == expected.shape
    same = (value == expected) | (value.isnan() & expected.isnan())
    near = (value.double() - expected).abs() <= allowed
    assert (same | near).all(), f"{name} {value.tolist()}, expected {expected.tolist()}, allowed {allowed.tolist()}"


def underflow(problem: Problem) -> Tensor | float:
    """Probabilities of float32 stop at its smallest normal number, 1e-38."""
    if torch.float64 in (problem.student.dtype, problem.teacher.dtype):
        return 0.0
    return 1e-35 * sum(weights_of(problem.arguments)) * row_factors(problem)[1].abs()


def assert_rows_within(name: str, value: Tensor, expected: Tensor, floor: Tensor) -> None:
    """Every row's error within GRADIENT of its size and `floor`; NaN in the same rows."""
    broken = expected.isnan().any(-1)
    assert torch.equal(value.isnan().any(-1), broken), f"{name}: NaN in rows {value.isnan().any(-1)}, not {broken}"
    size, error = expected.norm(dim=-1), (value.double() - expected).norm(dim=-1)
    # Half the distance of subnormal numbers.
    subnormal = {torch.float16: 2.0**-25, torch.float64: 0.0}.get(value.dtype, 2.0**-133) * math.sqrt(value.shape[-1])
    allowed = GRADIENT[value.dtype] * size + floor + subnormal
    wrong = ~broken & ~(error <= allowed)
    assert not wrong.any(), (
        f"{name}'s gradient, rows {wrong.nonzero().tolist()}: errors {error[wrong].tolist()} "
        f"of {size[wrong].tolist()}, allowed {allowed[wrong].tolist()}"
    )


@settings(max_examples=3 * settings().max_examples)
@given(cases())
def test_oracle(case: Case) -> None:
    """Any call is what the float64 oracle makes of the same, rounded inputs."""
    compare_with_oracle(case)


# ---------------------------------------------------------------- to the bit


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """NaN where NaN is."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_same_bits(ours: Any, others: Any) -> None:
    for value, other in zip(ours, others, strict=True):
        assert same_bits(value, other), f"{value}\nis not\n{other}"


UNREDUCED = {"reduction": "none"}


@given(cases(options=UNREDUCED, num_items=None), st.data())
def test_rows_are_alone(case: Case, data: st.DataObject) -> None:
    """Any selection of rows gives the bits that those rows have in the whole."""
    assume(case.batch and math.prod(case.batch) > 0)
    student, teacher, arguments = build(case)
    grad_output = row_grad_output(case)
    whole = run(distillation_loss, student, teacher, **arguments, grad_output=grad_output, wanted=case.wanted)
    rows = data.draw(st.lists(st.integers(0, case.batch[0] - 1), min_size=1, max_size=3))
    some = {n: x[rows] if n in ("mask", "labels", "weight") else x for n, x in arguments.items()}
    part = run(
        distillation_loss, student[rows], teacher[rows], **some, grad_output=grad_output[rows], wanted=case.wanted
    )
    assert_same_bits(part, [None if x is None else x[rows] for x in whole])


@given(cases(num_items=None))
def test_mask_is_deletion(case: Case) -> None:
    """What does not count might as well not be there; its gradient is 0."""
    assume(case.options.get("reduction") != "batchmean")
    problem = build(case)
    counts, _ = row_factors(problem)
    assume(counts.any() and case.batch)
    student, teacher, arguments = problem
    unreduced = case.options.get("reduction") == "none"
    grad_output = row_grad_output(case) if unreduced else torch.tensor(case.grad_output)
    whole = run(distillation_loss, student, teacher, **arguments, grad_output=grad_output, wanted=case.wanted)
    rest = {n: x[counts] if n in ("labels", "weight") else x for n, x in arguments.items() if n != "mask"}
    grad_output = grad_output[counts] if unreduced else grad_output
    part = run(distillation_loss, student[counts], teacher[counts], **rest, grad_output=grad_output, wanted=case.wanted)
    if unreduced:
        assert same_bits(whole.loss[counts], part.loss) and not whole.loss[~counts].any()
    else:
        # The factors of a mean over the rows that count may be summed in another order.
        torch.testing.assert_close(whole.loss, part.loss, rtol=1e-6, atol=1e-12, equal_nan=True)
    for value, other in zip(whole[1:], part[1:], strict=True):
        assert (value is None) == (other is None)
        if value is None or other is None:
            continue
        assert not value[~counts].any()
        if unreduced or arguments.get("reduction") == "sum":
            assert same_bits(value[counts], other)
        else:  # a mean's factor of a row may be rounded otherwise
            value, largest = value[counts].double(), clean(other.double()).abs().amax(-1, keepdim=True)
            near = (value - other).abs() <= 4 * torch.finfo(other.dtype).eps * largest + 2.0**-24
            assert (near | (value == other) | (value.isnan() & other.isnan())).all()


@given(cases(padding=(3, 17)), st.tuples(st.integers(0, 70), st.integers(0, 70)))
def test_valid_vocab_is_slicing(case: Case, padding: tuple[int, int]) -> None:
    case = case._replace(padding=padding)
    student, teacher, arguments = build(case)
    valid = arguments.pop("valid_vocab")
    grad_output = row_grad_output(case) if case.options.get("reduction") == "none" else case.grad_output
    options = {**arguments, "grad_output": grad_output, "wanted": case.wanted}
    whole = run(distillation_loss, student, teacher, **options, valid_vocab=valid)
    sliced = run(distillation_loss, student[..., :valid], teacher[..., :valid], **options)
    assert same_bits(whole.loss, sliced.loss)
    for value, other in zip(whole[1:], sliced[1:], strict=True):
        assert (value is None) == (other is None)
        if value is not None:
            assert same_bits(value[..., :valid], other) and not value[..., valid:].any()


@given(cases())
def test_strides_change_nothing(case: Case) -> None:
    student, teacher, arguments = build(case)
    grad_output = row_grad_output(case) if case.options.get("reduction") == "none" else case.grad_output
    options = {**arguments, "grad_output": grad_output, "wanted": case.wanted}
    strided = run(distillation_loss, student, teacher, **options)
    dense = run(
        distillation_loss, student.clone(memory_format=torch.contiguous_format), teacher.contiguous(), **options
    )
    assert_same_bits(strided, dense)


@given(cases())
def test_runs_are_equal_and_read_only(case: Case) -> None:
    """Two runs give the same bits, and nothing that is passed is written."""
    student, teacher, arguments = build(case)
    tensors = {"student": student, "teacher": teacher, **{n: x for n, x in arguments.items() if isinstance(x, Tensor)}}
    before = {name: x.clone() for name, x in tensors.items()}
    grad_output = row_grad_output(case) if case.options.get("reduction") == "none" else case.grad_output
    first, second = (
        run(distillation_loss, student, teacher, **arguments, grad_output=grad_output, wanted=case.wanted)
        for _ in range(2)
    )
    assert_same_bits(first, second)
    assert all(same_bits(x, before[name]) for name, x in tensors.items())


@given(cases(options=UNREDUCED, num_items=None))
def test_in_place_is_out_of_place(case: Case) -> None:
    assume(case.layouts[0] in LAYOUTS)
    student, teacher, arguments = build(case)
    values = student.contiguous()
    options = {**arguments, "grad_output": row_grad_output(case), "wanted": case.wanted}
    ours = run(ours_in_place(case.layouts[0]), values, teacher, **options)
    assert_same_bits(ours, run(distillation_loss, values, teacher, **options))


@given(cases(rows="equal", special=()), st.lists(st.integers(0, 99), max_size=3))
def test_equal_rows_are_0(case: Case, dead: list[int]) -> None:
    """To the bit, with all gradients, where both sides have the same numbers; also where some of them are -inf."""
    options = {n: x for n, x in case.options.items() if n not in ("logit_scale", "logit_softcap")}
    for name in ("logit_scale", "logit_softcap"):
        if (value := case.options.get(name)) is not None:
            options[name] = value[0] if isinstance(value, tuple) else value
    special = tuple(("both", row, column, -INF) for row, column in itertools.product(range(10), dead))
    layouts = tuple(x if x in LAYOUTS else "contiguous" for x in case.layouts)
    case = case._replace(options={**options, "hard_weight": 0.0}, special=special, layouts=layouts)
    assume(case.columns > 3)
    # The student's dtype holds what the teacher's does.
    case = case._replace(dtypes=(case.dtypes[1] if case.seed % 2 else "f64", case.dtypes[1]))
    student, teacher, arguments = build(case)
    result = run(distillation_loss, student, teacher, **arguments, wanted=case.wanted)
    assert not result.loss.any(), result.loss
    assert not any(g is not None and g.any() for g in result[1:])


@given(cases(options={"hard_weight": 0.0, "soft_weight": 1.0, "reduction": "none"}, num_items=None))
def test_never_negative(case: Case) -> None:
    student, teacher, arguments = build(case)
    loss = distillation_loss(student, teacher, **arguments)
    assert ((loss >= 0) | loss.isnan()).all(), loss


# ---------------------------------------------------------------- token_stats


STATS_OPTIONS = ("temperature", "logit_softcap", "logit_scale")


@given(cases())
def test_token_stats(case: Case) -> None:
    """Every figure against the reference's; the two divergences as distillation_loss has them."""
    case = case._replace(options={n: case.options[n] for n in STATS_OPTIONS if n in case.options})
    case = case._replace(positions=tuple(p for p in case.positions if p != "weight"), num_items=None)
    problem = build(case)
    assume_documented(problem)
    student, teacher, arguments = problem
    counts, _ = row_factors(problem)
    ours, expected = token_stats(student, teacher, **arguments), reference.token_stats(student, teacher, **arguments)
    wide = torch.float64 in (student.dtype, teacher.dtype)
    eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    read = [x.masked_fill(~counts[..., None], 0) for x in (student, teacher)]
    allowed = {
        name: allowed_errors(*read, None, Divergence(name), arguments)[0].loss for name in ("forward_kl", "reverse_kl")
    }
    scales, caps = pairs(arguments, "logit_scale", "logit_softcap")
    largest = [
        clean(reference.effective_logits(z, a, b, arguments.get("valid_vocab"))).abs().amax(-1)
        / arguments.get("temperature", 1.0)
        for z, a, b in zip(read, scales, caps, strict=True)
    ]
    for name, value, other in zip(TokenStats._fields, ours, expected, strict=True):
        assert (value is None) == (other is None), name
        if value is None or other is None:
            continue
        if name == "top1_agreement":
            # Softcap and scale are rounded: they may join two largest logits that float64 tells apart.
            if caps == (None, None):
                assert torch.equal(value, other), name
            continue
        # A log-sum-exp, an entropy and a log-probability are differences of numbers of the logits' size.
        size = largest[0] if name.startswith("student") else largest[1]
        floor = allowed.get(name, 8 * eps * (1 + size + math.log(case.columns)))
        if name.endswith("entropy"):  # p is known from the larger of p and q, by the gap between them
            floor = floor + 4 * eps * (1 + size) * (largest[0] + largest[1])
        same = (value == other) | (value.isnan() & other.isnan())
        near = (value.double() - other).abs() <= LOSS[value.dtype] * clean(other).abs() + floor
        assert (same | near).all(), f"{name}: {value.tolist()}, expected {other.tolist()}"


# ---------------------------------------------------------------- kl_div


class Pointwise(NamedTuple):
    """A call of kl_div in plain numbers."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    layouts: tuple[str, str]
    log_target: bool
    reduction: str
    zeros: bool
    spread: float
    seed: int
    grad_output: float
    wanted: tuple[bool, bool]


def shapes() -> st.SearchStrategy[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Mostly equal; else one of them broadcast."""

    def two(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
        narrowed = st.sampled_from([shape, shape[1:], tuple(1 if i == 0 else n for i, n in enumerate(shape))])
        return st.just((shape, shape)) | narrowed.map(lambda s: (shape, s)) | narrowed.map(lambda s: (s, shape))

    return SHAPES.map(lambda x: (*x[0], x[1])).flatmap(two)


POINTWISE = st.builds(
    Pointwise,
    shapes=shapes(),
    dtypes=st.tuples(DTYPES, DTYPES),
    layouts=st.tuples(*[st.sampled_from([*LAYOUTS, *OVERLAPPING])] * 2),
    log_target=st.booleans(),
    reduction=st.sampled_from(["none", "sum", "mean", "batchmean"]),
    zeros=st.booleans(),
    spread=st.sampled_from([1.0, 0.01, 10.0]),
    seed=st.integers(0, 2**16),
    grad_output=st.sampled_from([1.0, -0.25, 2.0, 0.0]),
    wanted=WANTED,
)


@given(POINTWISE)
def test_kl_div(case: Pointwise) -> None:
    """As torch.nn.functional.kl_div in float64, but 0 where the target's probability is 0."""
    generator = torch.Generator().manual_seed(case.seed)
    input, target = (
        (case.spread * torch.randn(shape, generator=generator)).double().log_softmax(-1) if shape else -torch.rand(())
        for shape in case.shapes
    )
    dead = torch.zeros(target.shape, dtype=torch.bool)
    if case.zeros:
        dead = torch.rand(target.shape, generator=generator) < 0.3
        target = target.masked_fill(dead, -INF)
        if case.shapes[0] == case.shapes[1] and not any(x in OVERLAPPING for x in case.layouts):
            input = input.masked_fill(dead & (torch.rand(input.shape, generator=generator) < 0.5), -INF)
    target = target if case.log_target else target.exp()
    input, target = (
        (({**LAYOUTS, **OVERLAPPING}[layout]) if x.dim() else LAYOUTS["contiguous"])(x.to(DTYPE[dtype]))
        for x, dtype, layout in zip((input, target), case.dtypes, case.layouts, strict=True)
    )
    options: dict[str, Any] = {"reduction": case.reduction, "log_target": case.log_target}
    wide = [x.double() for x in (input, target)]
    common = {**options, "grad_output": case.grad_output, "wanted": case.wanted}
    before = input.clone(), target.clone()
    ours = run(kldiv_ext.kl_div, input, target, **common)
    expected = run(reference.kl_div, *wide, **common)
    assert same_bits(input, before[0]) and same_bits(target, before[1])
    assert_same_bits(ours, run(kldiv_ext.kl_div, input, target, **common))
    # PyTorch's own: 0 · inf there, so only where no probability is 0 and for the loss's dtype.
    if not (wide[1].exp() == 0 if case.log_target else wide[1] == 0).any():
        theirs = run(F.kl_div, *wide, **common)
        for value, other in zip(expected, theirs, strict=True):
            assert (value is None) == (other is None)
            if value is not None:
                torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert ours.loss.dtype == run(F.kl_div, input, target, **options, wanted=(False, False)).loss.dtype
    compare_pointwise(case, wide, ours, expected)


def compare_pointwise(case: Pointwise, wide: list[Tensor], ours: Result, expected: Result) -> None:
    """Rounding of each of p · log p and p · input, of the sum of them, and of what is stored."""
    log_p = wide[1] if case.log_target else wide[1].log()
    p = log_p.exp()
    # exp(x) rounds x: relative eps |x|.
    terms = (p * clean(log_p).abs() * (1 + clean(log_p).abs() * case.log_target) + p * clean(wide[0]).abs()).abs()
    inside = torch.finfo(torch.promote_types(ours.loss.dtype, torch.float32)).eps
    terms = clean(terms)
    elements = math.prod(torch.broadcast_shapes(*case.shapes))
    if case.reduction != "none":
        terms = terms.sum() * (elements / max(terms.numel(), 1))
    first = case.shapes[0][0] if case.shapes[0] else 1
    divisor = {"mean": elements, "batchmean": first}.get(case.reduction, 1)
    floor = 8 * inside * terms / max(divisor, 1)
    smallest = torch.finfo(ours.loss.dtype).smallest_normal * torch.finfo(ours.loss.dtype).eps
    stored = torch.finfo(ours.loss.dtype).eps / 2 * (1.001) * clean(expected.loss).abs() + smallest
    value = ours.loss.double()
    same = (value == expected.loss) | (value.isnan() & expected.loss.isnan())
    near = (value - expected.loss).abs() <= floor + stored
    assert (same | near).all(), f"loss {value}, expected {expected.loss}"
    for gradient, other in zip(ours[1:], expected[1:], strict=True):
        assert (gradient is None) == (other is None)
        if gradient is None or other is None:
            continue
        # A gradient summed over a broadcast dimension is summed in its own dtype.
        many = max(1, math.prod(torch.broadcast_shapes(*case.shapes)) // max(gradient.numel(), 1))
        eps, tiny = torch.finfo(gradient.dtype).eps, torch.finfo(gradient.dtype).smallest_normal
        size = clean(other).abs().max() if many > 1 and other.numel() else clean(other).abs()
        part = 1 + clean(log_p).abs().max() + clean(wide[0]).abs().max() if p.numel() and wide[0].numel() else 1.0
        near_or_same = (gradient.double() - other).abs() <= (
            eps * many * size + 16 * inside * part * abs(case.grad_output) * many / max(divisor, 1) + many * tiny * eps
        )
        near_or_same |= gradient.isnan() & other.isnan() | (gradient == other.to(gradient.dtype))
        assert near_or_same.all(), f"gradient {gradient}, expected {other}"
