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
DTYPE = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

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


def parameters(name: str) -> st.SearchStrategy[float]:
    """The ends, and what lies 0.01 inside of them: nearer, digits are lost, as documented; of a skew KL from 0.9."""
    highest = 0.9 if name == "skew" else 0.99
    return st.sampled_from([0.0, 1.0, 0.1, 0.5, 0.9, 0.01, highest]) | st.floats(0.1, 0.9)


COLUMNS = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 3000, 4101])
BATCHES = st.lists(st.integers(1, 4), max_size=3).map(tuple) | st.sampled_from([(0,), (3, 0), (40,), (1,), (9,)])
SHAPES = st.tuples(BATCHES, st.integers(1, 130) | COLUMNS)
TEMPERATURES = st.sampled_from([1.0, 2.0]) | st.floats(0.3, 8.0)
WEIGHTS = st.sampled_from([1.0, 0.0, 0.5, 2.0]) | st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)
SIDES = st.sampled_from(["student", "teacher", "both"])
SPECIAL = st.tuples(
    SIDES, st.integers(0, 9), st.integers(0, 99), st.sampled_from([-INF, -INF, -INF, INF, NAN, -1e30, 1e4, -1e4])
)


def per_side(value: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    side = st.none() | value
    return st.none() | value | st.tuples(side, side)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Any call; `fixed` fields, and options, stay as given."""
    batch, columns = draw(SHAPES)
    divergence = draw(DIVERGENCES)
    options: dict[str, Any] = {"divergence": divergence}
    if divergence in PARAMETERS:
        options[PARAMETERS[divergence]] = draw(parameters(PARAMETERS[divergence]))
    positions = draw(st.sets(st.sampled_from(["labels", "mask", "weight", "nothing", "poison"]), max_size=4))
    extra: dict[str, st.SearchStrategy[Any]] = {
        "temperature": TEMPERATURES,
        "scale_by_temperature_squared": st.booleans(),
        "soft_weight": WEIGHTS,
        "hard_weight": WEIGHTS,
        "logit_softcap": per_side(st.floats(1, 60)),
        "logit_scale": per_side(st.floats(0.1, 4)),
        "reduction": st.sampled_from(["none", "sum", "mean", "batchmean"]),
    }
    for name in draw(st.sets(st.sampled_from(sorted(extra)))):
        options[name] = draw(extra[name])
    options.update(fixed.pop("options", {}))
    if options.get("hard_weight", 0.0) != 0:
        positions.add("labels")
    mean = options.get("reduction", "mean") == "mean"
    case = Case(
        batch=batch,
        columns=columns,
        dtypes=draw(st.tuples(st.sampled_from(sorted(DTYPE)), st.sampled_from(sorted(DTYPE)))),
        layouts=draw(st.tuples(*[st.sampled_from([*LAYOUTS, *OVERLAPPING])] * 2)),
        rows=draw(st.sampled_from(["random", "random", "equal", "constant", "shifted", "sure"])),
        spread=draw(st.sampled_from([1.0, 3.0, 0.01, 10.0, 30.0])),
        distance=draw(st.sampled_from([1.0, 3.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6])),
        special=tuple(draw(st.lists(SPECIAL, max_size=3))),
        seed=draw(st.integers(0, 2**16)),
        positions=tuple(sorted(positions)),
        ignore_index=draw(st.sampled_from([-100, -1, 0, 3])),
        num_items=draw(st.none() | st.sampled_from([0, 7, 11.5])) if mean else None,
        padding=draw(st.none() | st.tuples(st.integers(0, 40), st.integers(0, 40))),
        options=options,
        grad_output=draw(st.sampled_from([1.0, -0.25, 3.7, 1024.0, 0.0])),
        wanted=draw(st.sampled_from([(True, True), (True, False), (False, True), (False, False)])),
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
    side its divergence is not infinite. And in what has no weight at all it is NaN by other rules than the kernels.
    """
    arguments = problem.arguments
    scales, caps = pairs(arguments, "logit_scale", "logit_softcap")
    valid, temperature = arguments.get("valid_vocab"), arguments.get("temperature", 1.0)
    sides = zip(problem[:2], scales, caps, strict=True)
    lq, lp = (torch.log_softmax(reference.effective_logits(z, a, b, valid) / temperature, -1) for z, a, b in sides)
    for x, y in ((lq, lp), (lp, lq)):
        assume(not ((y == -INF) & (x > -INF) & (x < -700)).any())
    far = clean(problem[0].double().amax(-1) - problem[1].double().amax(-1)).abs() / temperature
    assume(not (far > 1e5).any())  # nothing is left of log p - log q where it is a difference of such numbers
    if arguments.get("soft_weight", 1.0) == 0 or arguments.get("skew") == 1 or arguments.get("num_items") == 0:
        assume(not ((lq + lp).isnan().any(-1) & row_factors(problem)[0]).any())


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
    gradient is then g - q * sum g, and where one column has all the mass those two cancel.
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
    top = (tops[0] - tops[1]).abs() / temperature
    lse = clean(torch.logsumexp(zt / temperature, -1) - torch.logsumexp(zs / temperature, -1)).abs()[..., None]
    away = clean((zt - tops[0]) - (zs - tops[1])).abs() / temperature > 1 / 64
    shift = top + lse + 4 * (larger * away).sum(-1, keepdim=True)
    of_log = 1 + log_larger + rounding
    of_delta = difference + shift + rs + rt + rounding
    a = divergence.parameter
    condition = 1.0 if a in (None, 0.0, 1.0) else max(1.0, 0.25 / (a * (1 - a)))
    noise = eps64 * condition * (1 + clean(zs).abs().amax(-1, True) / temperature) * 8
    noise = noise + eps64 * condition * clean(zt).abs().amax(-1, True) / temperature * 8

    def of_gradient(g: Tensor, share: Tensor, slope: Tensor, decay: Tensor, plain: bool) -> Tensor:
        g = clean(g)
        error = of_log * g.abs() + of_delta * (smaller if plain else larger * condition)
        total = g.sum(-1, keepdim=True).abs() * (of_log + of_delta) + error.sum(-1, keepdim=True)
        error = 2 * eps * (error if plain else error + share * total)
        own = (p + q) * (1 + gap)  # the oracle's rounding
        error = error + noise * (own + share * own.sum(-1, keepdim=True))
        error = error + eps * decay * (g - share * g.sum(-1, keepdim=True)).abs()
        if divergence.name == "total_variation":  # its gradient jumps where p = q
            unclear = larger * (gap <= 4 * eps * of_delta + 4 * noise)
            error = error + unclear + share * unclear.sum(-1, keepdim=True)
        return (clean(error) * slope / temperature).norm(dim=-1)

    name = {("jsd", 0.0): "forward_kl", ("jsd", 1.0): "reverse_kl", ("alpha", 0.0): "reverse_kl"}.get(
        (divergence.name, a),
        divergence.name,  # type: ignore[arg-type]
    )
    name = {("alpha", 1.0): "forward_kl", ("skew_forward_kl", 0.0): "forward_kl"}.get((divergence.name, a), name)  # type: ignore[arg-type]
    name = "reverse_kl" if (divergence.name, a) == ("skew_reverse_kl", 0.0) else name
    loss = 2 * eps * (of_log * clean(terms).abs() + of_delta * (clean(gq).abs() + clean(gp).abs()))
    soft = Allowed(
        clean(loss + noise * (p + q) * (1 + gap)).sum(-1) + (1e-14 if wide else TINY_LOSS),
        of_gradient(gq, q, slopes[0], decays[0], name == "forward_kl"),
        of_gradient(gp, p, slopes[1], decays[1], name == "reverse_kl"),
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
        4 * eps * (1 + rounded.amax(-1)), (error * slopes[0]).norm(dim=-1), torch.zeros(lq.shape[:-1]).double()
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


def tolerated(divergence: Divergence, wide: bool) -> tuple[float, float]:
    """Relative errors of the loss and of a gradient before it is stored; within 0.1 of an end those promised there."""
    a = divergence.parameter
    dtype = torch.float64 if wide else torch.float32
    if a is None or a in (0.0, 1.0) or 0.1 <= a <= 0.9:
        return LOSS[dtype], GRADIENT[dtype]
    return (LOSS[dtype] * 100, GRADIENT[dtype] * 100) if wide else (1e-5, 4e-3)


def ours_in_place(layout: str) -> Callable[..., Tensor]:
    function = LAYOUTS[layout]
    return lambda s, *args, **options: distillation_loss(function(s * 1), *args, **options, inplace_backward=True)


def compare_with_oracle(case: Case) -> None:
    """Losses and gradients within what is allowed, row by row; NaN and infinities in the same places."""
    problem = build(case)
    assume_documented(problem)
    student, teacher, arguments = problem
    options = dict(arguments)
    divergence = Divergence(options["divergence"], options.get(PARAMETERS.get(options["divergence"], "")))
    wide = torch.float64 in (student.dtype, teacher.dtype)
    labels = arguments.get("labels")
    soft_scale = options.get("soft_weight", 1.0) * (
        options.get("temperature", 1.0) ** 2 if options.get("scale_by_temperature_squared") else 1.0
    )
    hard_weight = options.get("hard_weight", 0.0)
    counts, factors = row_factors(problem)
    unreduced = options.get("reduction") == "none"
    grad_output: Any = case.grad_output
    if unreduced:
        grad_output = case.grad_output * torch.randn(case.batch, generator=torch.Generator().manual_seed(case.seed))
    elif torch.bfloat16 in (student.dtype, teacher.dtype) and case.grad_output == 3.7:
        grad_output = 4.0  # a bfloat16 gradient made in forward is rounded again by any other factor
    grad_output = torch.as_tensor(grad_output, dtype=torch.float64)
    expected = run(
        reference.distillation_loss, student.double(), teacher.double(),
        **options, grad_output=grad_output, wanted=case.wanted,
    )  # fmt: skip
    # The factor of a GradScaler, so that float16 gradients neither overflow nor underflow.
    if torch.float16 in (student.dtype, teacher.dtype):
        sizes = [clean(g).abs().max().item() for g in expected[1:] if g is not None and g.numel()]
        factor = 2.0 ** math.floor(13 - math.log2(max([*sizes, 1e-30])))
        factor = min(max(factor, 2.0**-120), 2.0**60)
        grad_output = grad_output * factor
        expected = Result(expected.loss, *(None if g is None else g * factor for g in expected[1:]))
    in_place = case.in_place and case.wanted[0] and case.layouts[0] in LAYOUTS
    function = ours_in_place(case.layouts[0]) if in_place else distillation_loss
    ours = run(
        function, student.contiguous() if in_place else student, teacher,
        **options, grad_output=grad_output, wanted=case.wanted,
    )  # fmt: skip

    # What is not read is 0 in the analysis as in the oracle.
    dead = ~counts[..., None]
    read = [x.masked_fill(dead, 0) for x in (student, teacher)]
    soft, hard = allowed_errors(*read, None if labels is None else labels.masked_fill(~counts, 0), divergence, options)
    relative_loss, relative = tolerated(divergence, wide)
    each = {**options, "reduction": "none"}
    each.pop("num_items", None)
    each.pop("weight", None)
    each["mask"] = counts
    parts = [
        run(reference.distillation_loss, student.double(), teacher.double(), **{**each, **weights})
        for weights in ({"hard_weight": 0.0}, {"soft_weight": 0.0})
    ]
    size = factors.abs()
    allowed_loss = size * (
        relative_loss * (clean(parts[0].loss).abs() + clean(parts[1].loss).abs())
        + abs(soft_scale) * soft.loss + abs(hard_weight) * hard.loss
    )  # fmt: skip
    if not unreduced:
        allowed_loss = allowed_loss.sum()
    value, wanted_loss = ours.loss.double(), expected.loss
    assert ours.loss.dtype == (torch.float64 if wide else torch.float32) and value.shape == wanted_loss.shape
    same = (value == wanted_loss) | (value.isnan() & wanted_loss.isnan())
    near = (value - wanted_loss).abs() <= allowed_loss
    assert (same | near).all(), (
        f"loss {value.tolist()}, expected {wanted_loss.tolist()}, allowed {allowed_loss.tolist()}"
    )

    both_parts = hard_weight != 0 and soft_scale != 0
    size = size * grad_output.abs()
    for i, like in ((1, student), (2, teacher)):
        gradient, wanted = ours[i], expected[i]
        assert (gradient is not None) == (wanted is not None) == case.wanted[i - 1]
        if gradient is None or wanted is None:
            continue
        assert gradient.dtype == like.dtype and gradient.shape == like.shape
        broken = wanted.isnan().any(-1)
        assert torch.equal(gradient.isnan().any(-1), broken), f"{('student', 'teacher')[i - 1]}: NaN in other rows"
        stored = max(GRADIENT[like.dtype], relative)
        bound = stored * clean(wanted).norm(dim=-1) + size * (abs(soft_scale) * soft[i] + abs(hard_weight) * hard[i])
        if both_parts:  # they may cancel
            bound = bound + relative * size * sum(clean(part[i]).norm(dim=-1) for part in parts)  # type: ignore[arg-type]
        # Below the smallest normal numbers; probabilities of float32 stop there.
        tiny = 2.0**-25 if like.dtype == torch.float16 else 2.0**-133
        floor = tiny * math.sqrt(like.shape[-1]) + (0 if wide else size * 1e-35 * (abs(soft_scale) + abs(hard_weight)))
        error = (gradient.double() - wanted).norm(dim=-1)
        wrong = ~broken & ~(error <= bound + floor)
        assert not wrong.any(), (
            f"{('student', 'teacher')[i - 1]}'s gradient, row {wrong.nonzero()[0].tolist()}: error "
            f"{error[wrong][0]:.3g} of {wanted.norm(dim=-1)[wrong][0]:.3g}, allowed {(bound + floor)[wrong][0]:.3g}"
        )
        assert not gradient[~counts].any()


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


def row_grad_output(case: Case) -> Tensor:
    return case.grad_output * torch.randn(case.batch, generator=torch.Generator().manual_seed(case.seed))


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
        if unreduced or "weight" not in arguments:
            assert same_bits(value[counts], other)


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
    problem = build(case)
    assume_documented(problem)
    student, teacher, arguments = problem
    arguments = {n: x for n, x in arguments.items() if n not in ("weight", "num_items")}
    if "poison" in case.positions and "weight" in case.positions:
        case = case._replace(positions=tuple(p for p in case.positions if p != "weight"))
        student, teacher, arguments = problem = build(case)
    counts, _ = row_factors(Problem(student, teacher, arguments))
    arguments.pop("num_items", None)
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
    dtypes=st.tuples(*[st.sampled_from(sorted(DTYPE))] * 2),
    layouts=st.tuples(*[st.sampled_from([*LAYOUTS, *OVERLAPPING])] * 2),
    log_target=st.booleans(),
    reduction=st.sampled_from(["none", "sum", "mean", "batchmean"]),
    zeros=st.booleans(),
    spread=st.sampled_from([1.0, 0.01, 10.0]),
    seed=st.integers(0, 2**16),
    grad_output=st.sampled_from([1.0, -0.25, 2.0, 0.0]),
    wanted=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
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
                torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-14, equal_nan=True)
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
        near_or_same |= gradient.isnan() & other.isnan() | (gradient == other)
        assert near_or_same.all(), f"gradient {gradient}, expected {other}"
