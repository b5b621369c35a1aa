"""What the property tests draw: calls in plain numbers, and the tensors that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import PARAMETERS, REDUCTIONS
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import kldiv_ext
from kldiv_ext import reference
from kldiv_ext.options import per_side

INF, NAN = math.inf, math.nan
DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}

# ---------------------------------------------------------------- distillation_loss


class Case(NamedTuple):
    """A call of distillation_loss in plain numbers: a failing one can be read and run again."""

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
    needs_grad: tuple[bool, bool] = (True, True)
    in_place: bool = False

    @property
    def unreduced(self) -> bool:
        return self.options.get("reduction") == "none"

    def grad_outputs(self) -> Tensor:
        """The gradient of the loss: per position without a reduction."""
        if not self.unreduced:
            return torch.tensor(self.grad_output)
        return self.grad_output * torch.randn(self.batch, generator=torch.Generator().manual_seed(self.seed))


class Problem(NamedTuple):
    """The tensors of a Case."""

    student: Tensor
    teacher: Tensor
    arguments: dict[str, Any]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Which positions count, and what a position's loss is multiplied by on its way to the result."""
        arguments, batch = self.arguments, self.student.shape[:-1]
        weights = arguments.get("weight", torch.ones(batch)).double()
        if "mask" in arguments:
            weights = torch.where(arguments["mask"], weights, 0)
        if "labels" in arguments:
            weights = torch.where(arguments["labels"] != arguments["ignore_index"], weights, 0)
        reduction, divisor = arguments.get("reduction", "mean"), 1.0
        if reduction == "mean":
            divisor = float(arguments.get("num_items", weights.sum()))
        elif reduction == "batchmean" and batch:
            divisor = float(batch[0])
        return weights != 0, weights / divisor if divisor != 0 else 0 * weights

    @property
    def counts(self) -> Tensor:
        return self.factors()[0]

    def scaled_logits(self) -> list[Tensor]:
        """What the softmax takes, of both sides, 0 where a position does not count."""
        option = self.arguments.get
        scales, caps = per_side(option("logit_scale"), 1.0), per_side(option("logit_softcap"), 0.0)
        return [
            reference.effective_logits(z.masked_fill(~self.counts[..., None], 0), scale, cap, option("valid_vocab"))
            / option("temperature", 1.0)
            for z, scale, cap in zip((self.student, self.teacher), scales, caps, strict=True)
        ]


def padded(x: Tensor, left: int, right: int) -> Tensor:
    """Cut out of a tensor with longer rows of NaN: a value from outside would be seen."""
    return F.pad(x, (left, right), value=NAN)[..., left : left + x.shape[-1]]


def reversed_batch(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim() - 1)), -1)


# Of any number of dimensions, by differentiable operators, which may stand between a leaf and its logits.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x * 1,
    "vocabulary first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "batch reversed": lambda x: reversed_batch(reversed_batch(x).contiguous()),
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
ANY_LAYOUT = LAYOUTS | OVERLAPPING

# The ends, and the range of the promises between them.
PARAMETER = st.sampled_from([0.0, 1.0, 0.1, 0.5, 0.9, 0.01, 0.99, 0.001, 0.999]) | st.floats(0.001, 0.999)
# Around vectors, unrolled loops and chunks of the kernels.
COLUMNS = st.integers(2, 130) | st.sampled_from(
    [2, 3, 8, 15, 16, 17, 31, 33, 63, 64, 65, 1, 1023, 1024, 1025, 2047, 2048, 2049, 3000, 4101]
)
BATCHES = st.sampled_from(
    [(), (1,), (2,), (3,), (5,), (9,), (2, 3), (4, 2), (1, 3), (3, 1, 2), (2, 2, 3), (40,), (2, 5), (0,), (3, 0)]
)
SHAPES = st.tuples(BATCHES, COLUMNS)
DTYPES = st.tuples(*[st.sampled_from(list(DTYPE))] * 2)
TWO_LAYOUTS = st.tuples(*[st.sampled_from(list(ANY_LAYOUT))] * 2)
WEIGHTS = st.sampled_from([1.0, 0.0, 0.5, 2.0]) | st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)
NEEDS_GRAD = st.sampled_from([(True, True), (True, False), (False, True), (True, True), (False, False)])
SPECIAL = st.tuples(
    st.sampled_from(["student", "teacher", "both"]),
    st.integers(0, 9),
    st.integers(0, 99),
    st.sampled_from([-INF, -INF, -INF, INF, NAN, -1e30, 1e4, -1e4, 1e9]),
)


def for_each_side(value: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    side = value | st.none()
    return value | st.tuples(side, side)


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([1.0, 2.0]) | st.floats(0.3, 8.0),
    "scale_by_temperature_squared": st.booleans(),
    "soft_weight": WEIGHTS,
    "hard_weight": WEIGHTS,
    "logit_softcap": for_each_side(st.floats(1, 60)),
    "logit_scale": for_each_side(st.floats(0.1, 4)),
    "reduction": st.sampled_from(REDUCTIONS),
}


@st.composite
def calls(draw: st.DrawFn, **fixed: Any) -> Case:
    """Any call; `fixed` fields, and options, stay as given."""
    batch, columns = draw(SHAPES)
    options: dict[str, Any] = {"divergence": draw(st.sampled_from(kldiv_ext.DIVERGENCES))}
    if options["divergence"] in PARAMETERS:
        options[PARAMETERS[options["divergence"]]] = draw(PARAMETER)
    seed = draw(st.integers(0, 2**16))
    positions = {name for name in ("labels", "mask", "weight", "poison") if draw(st.booleans())}
    if seed % 16 == 7:
        positions.add("nothing")
    options.update({name: draw(strategy) for name, strategy in OPTIONS.items() if draw(st.booleans())})
    options.update(fixed.pop("options", {}))
    if options.get("hard_weight", 0.0) != 0:
        positions.add("labels")
    mean = options.get("reduction", "mean") == "mean"
    case = Case(
        batch=batch,
        columns=columns,
        dtypes=draw(DTYPES),
        layouts=draw(TWO_LAYOUTS),
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
        needs_grad=draw(NEEDS_GRAD),
        in_place=draw(st.booleans()),
    )
    return case._replace(**fixed)


def make_values(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(student, teacher) in float64, before the special values."""
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
    """Tensors with the strides of the case, and the arguments that go with them."""
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
        sides[name] = ANY_LAYOUT[layout](F.pad(values, (0, extra), value=NAN))
    if case.padding is not None:
        arguments["valid_vocab"] = case.columns
    return Problem(sides["student"], sides["teacher"], arguments)


def assume_documented(problem: Problem) -> None:
    """Leave out where the oracle is not the contract.

    To the kernels only -inf is a probability of 0. To the oracle e^-1000 is too: beside a -inf of the other side its
    divergence is finite.
    """
    lq, lp = (torch.log_softmax(z, -1) for z in problem.scaled_logits())
    for x, y in ((lq, lp), (lp, lq)):
        assume(not ((y == -INF) & (x > -INF) & (x < -700)).any())


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
    needs_grad: tuple[bool, bool]


def shapes() -> st.SearchStrategy[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Mostly equal; else one of them broadcast."""

    def two(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
        narrowed = st.sampled_from([shape, shape[1:], tuple(1 if i == 0 else n for i, n in enumerate(shape))])
        return st.just((shape, shape)) | narrowed.map(lambda s: (shape, s)) | narrowed.map(lambda s: (s, shape))

    return SHAPES.map(lambda x: (*x[0], x[1])).flatmap(two)


POINTWISE = st.builds(
    Pointwise,
    shapes=shapes(),
    dtypes=DTYPES,
    layouts=TWO_LAYOUTS,
    log_target=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    zeros=st.booleans(),
    spread=st.sampled_from([1.0, 0.01, 10.0]),
    seed=st.integers(0, 2**16),
    grad_output=st.sampled_from([1.0, -0.25, 2.0, 0.0]),
    needs_grad=NEEDS_GRAD,
)


def build_pointwise(case: Pointwise) -> list[Tensor]:
    """(input, target)"""
    generator = torch.Generator().manual_seed(case.seed)
    input, target = (
        (case.spread * torch.randn(shape, generator=generator)).double().log_softmax(-1) if shape else -torch.rand(())
        for shape in case.shapes
    )
    if case.zeros:
        dead = torch.rand(target.shape, generator=generator) < 0.3
        target = target.masked_fill(dead, -INF)
        if case.shapes[0] == case.shapes[1] and not any(x in OVERLAPPING for x in case.layouts):
            input = input.masked_fill(dead & (torch.rand(input.shape, generator=generator) < 0.5), -INF)
    target = target if case.log_target else target.exp()
    return [
        ANY_LAYOUT[layout if x.dim() else "contiguous"](x.to(DTYPE[dtype]))
        for x, dtype, layout in zip((input, target), case.dtypes, case.layouts, strict=True)
    ]
