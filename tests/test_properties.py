"""Properties that hold for any arguments, drawn by hypothesis; `make fuzz` draws many more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Result, run
from error_model import allowed_errors, finite, weights
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import GRADIENT, LOSS
from strategies import LAYOUTS, POINTWISE, Case, Pointwise, Problem, assume_documented, build, build_pointwise, calls
from torch import Tensor

import kldiv_ext
from kldiv_ext import TokenStats, distillation_loss, reference, token_stats

INF = math.inf
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")


def evaluate(case: Case, student: Tensor, teacher: Tensor, **arguments: Any) -> Result:
    arguments = {"grad_output": case.grad_outputs(), "needs_grad": case.needs_grad, **arguments}
    return run(arguments.pop("function", distillation_loss), student, teacher, **arguments)


def in_place(layout: str) -> Callable[..., Tensor]:
    return lambda s, *args, **options: distillation_loss(
        LAYOUTS[layout](s * 1), *args, **options, inplace_backward=True
    )


def gradient_scale(problem: Problem, expected: Result, allowed: Sequence[Tensor], grad_output: Tensor) -> float:
    """The factor of a GradScaler: float16 gradients neither overflow nor lose more than they must."""
    if torch.float16 not in (problem.student.dtype, problem.teacher.dtype):
        return 1.0
    largest = [
        (finite(g).norm(dim=-1) + grad_output.abs() * floor).max().item()
        for g, floor in zip(expected.gradients, allowed, strict=True)
        if g is not None and g.numel()
    ]
    return 2.0 ** min(max(math.floor(14 - math.log2(max([*largest, 1e-30]))), -120), 60)


def assert_within(name: str, value: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """NaN and infinities in the same places."""
    assert value.shape == expected.shape
    same = (value == expected) | (value.isnan() & expected.isnan())
    near = (value.double() - expected).abs() <= allowed
    assert (same | near).all(), f"{name} {value.tolist()}, expected {expected.tolist()}, allowed {allowed.tolist()}"


def assert_rows_within(name: str, value: Tensor, expected: Tensor, floor: Tensor) -> None:
    """The error of every row within GRADIENT of its size and `floor`; NaN in the same rows."""
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
@given(calls())
def test_oracle(case: Case) -> None:
    """Losses and gradients are the float64 reference's on the same, rounded inputs, row by row."""
    problem = build(case)
    assume_documented(problem)
    student, teacher, arguments = problem
    grad_output = case.grad_outputs().double()
    if torch.bfloat16 in (student.dtype, teacher.dtype) and not case.unreduced and case.grad_output == 3.7:
        grad_output += 0.3  # a bfloat16 gradient made in forward is rounded again by a factor that is no power of two
    wide = {"function": reference.distillation_loss, "grad_output": grad_output}
    expected = evaluate(case, student.double(), teacher.double(), **arguments, **wide)
    counts, factors = problem.factors()
    allowed = allowed_errors(student, teacher, arguments, counts)
    floors = [factors.abs() * floor for floor in allowed.gradients]
    factor = gradient_scale(problem, expected, floors, grad_output)
    written = case.in_place and case.needs_grad[0] and case.layouts[0] in LAYOUTS
    ours = evaluate(
        case,
        student.contiguous() if written else student,
        teacher,
        **arguments,
        grad_output=grad_output * factor,
        function=in_place(case.layouts[0]) if written else distillation_loss,
    )
    if case.num_items == 0:  # 0 whatever the rows hold; to the oracle 0 times what may be infinite
        assert not any(x is not None and x.any() for x in (ours.loss, *ours.gradients))
        return
    inside = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    assert ours.loss.dtype == inside
    of_rows = factors.abs() * allowed.loss
    assert_within("loss", ours.loss, expected.loss, of_rows if case.unreduced else of_rows.sum())
    # Probabilities of float32 stop at its smallest normal number, 1e-38.
    underflow = 0.0 if inside == torch.float64 else 1e-35 * sum(weights(arguments)) * factors.abs()
    for side, like, value, other, floor in zip(
        ("student", "teacher"), (student, teacher), ours.gradients, expected.gradients, floors, strict=True
    ):
        assert (value is None) == (other is None)
        if value is not None:
            assert value.dtype == like.dtype and value.shape == like.shape
            assert_rows_within(side, value, other * factor, grad_output.abs() * factor * (floor + underflow))
            assert not value[~counts].any()


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """NaN where NaN is."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_same_bits(ours: Result, other: Result) -> None:
    for x, y in zip((ours.loss, *ours.gradients), (other.loss, *other.gradients), strict=True):
        assert same_bits(x, y), f"{x}\nis not\n{y}"


def given_pairs(ours: Result, other: Result) -> list[tuple[Tensor, Tensor]]:
    """The gradients of both, None in the same places left out."""
    pairs = list(zip(ours.gradients, other.gradients, strict=True))
    assert all((x is None) == (y is None) for x, y in pairs)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


UNREDUCED = {"reduction": "none"}


@given(calls(options=UNREDUCED, num_items=None), st.data())
def test_rows_are_alone(case: Case, data: st.DataObject) -> None:
    """Any selection of rows gives the bits that those rows have in the whole."""
    assume(case.batch and math.prod(case.batch) > 0)
    student, teacher, arguments = build(case)
    whole = evaluate(case, student, teacher, **arguments)
    rows = data.draw(st.lists(st.integers(0, case.batch[0] - 1), min_size=1, max_size=3))
    some = {n: x[rows] if n in ("mask", "labels", "weight") else x for n, x in arguments.items()}
    part = evaluate(case, student[rows], teacher[rows], **some, grad_output=case.grad_outputs()[rows])
    expected = Result(whole.loss[rows], tuple(None if g is None else g[rows] for g in whole.gradients))
    assert_same_bits(part, expected)


@given(calls(num_items=None))
def test_mask_is_deletion(case: Case) -> None:
    """What does not count might as well not be there; its gradient is 0."""
    assume(case.options.get("reduction") != "batchmean")
    problem = build(case)
    counts, (student, teacher, arguments) = problem.counts, problem
    assume(counts.any() and case.batch)
    whole = evaluate(case, student, teacher, **arguments)
    rest = {n: x[counts] if n in ("labels", "weight") else x for n, x in arguments.items() if n != "mask"}
    grad_output = case.grad_outputs()[counts] if case.unreduced else case.grad_outputs()
    part = evaluate(case, student[counts], teacher[counts], **rest, grad_output=grad_output)
    if case.unreduced:
        assert same_bits(whole.loss[counts], part.loss) and not whole.loss[~counts].any()
    else:  # the factors of a mean over the rows that count may be summed in another order
        torch.testing.assert_close(whole.loss, part.loss, rtol=1e-6, atol=1e-12, equal_nan=True)
    for value, other in given_pairs(whole, part):
        assert not value[~counts].any()
        if case.options.get("reduction") in ("none", "sum"):
            assert same_bits(value[counts], other)
        else:  # a mean's factor of a row may be rounded otherwise
            value, largest = value[counts].double(), finite(other.double()).abs().amax(-1, keepdim=True)
            near = (value - other).abs() <= 4 * torch.finfo(other.dtype).eps * largest + 2.0**-24
            assert (near | (value == other) | (value.isnan() & other.isnan())).all()


@given(calls(), st.tuples(st.integers(0, 70), st.integers(0, 70)))
def test_valid_vocab_is_slicing(case: Case, padding: tuple[int, int]) -> None:
    student, teacher, arguments = build(case._replace(padding=padding))
    valid = arguments.pop("valid_vocab")
    whole = evaluate(case, student, teacher, **arguments, valid_vocab=valid)
    sliced = evaluate(case, student[..., :valid], teacher[..., :valid], **arguments)
    assert same_bits(whole.loss, sliced.loss)
    for value, other in given_pairs(whole, sliced):
        assert same_bits(value[..., :valid], other) and not value[..., valid:].any()


@given(calls())
def test_strides_change_nothing(case: Case) -> None:
    student, teacher, arguments = build(case)
    dense = student.clone(memory_format=torch.contiguous_format), teacher.contiguous()
    assert_same_bits(evaluate(case, student, teacher, **arguments), evaluate(case, *dense, **arguments))


@given(calls())
def test_runs_are_equal_and_read_only(case: Case) -> None:
    """Two runs give the same bits, and no argument is written."""
    student, teacher, arguments = build(case)
    tensors = [student, teacher, *(x for x in arguments.values() if isinstance(x, Tensor))]
    before = [x.clone() for x in tensors]
    assert_same_bits(*(evaluate(case, student, teacher, **arguments) for _ in range(2)))
    assert all(same_bits(x, y) for x, y in zip(tensors, before, strict=True))


@given(calls(options=UNREDUCED, num_items=None))
def test_in_place_is_out_of_place(case: Case) -> None:
    assume(case.layouts[0] in LAYOUTS)
    student, teacher, arguments = build(case)
    values = student.contiguous()
    ours = evaluate(case, values, teacher, **arguments, function=in_place(case.layouts[0]))
    assert_same_bits(ours, evaluate(case, values, teacher, **arguments))


@given(calls(rows="equal", special=()), st.lists(st.integers(0, 99), max_size=3))
def test_equal_rows_are_0(case: Case, dead: list[int]) -> None:
    """To the bit, with all gradients, where both sides have the same numbers; also where some of them are -inf."""
    assume(case.columns > 3)
    alike = {
        name: value[0] if isinstance(value, tuple) else value
        for name in ("logit_scale", "logit_softcap")
        if (value := case.options.get(name)) is not None
    }
    others = {n: x for n, x in case.options.items() if n not in ("logit_scale", "logit_softcap")}
    case = case._replace(
        options={**others, **alike, "hard_weight": 0.0},
        special=tuple(("both", row, column, -INF) for row, column in itertools.product(range(10), dead)),
        layouts=tuple(x if x in LAYOUTS else "contiguous" for x in case.layouts),
        dtypes=(case.dtypes[1] if case.seed % 2 else "f64", case.dtypes[1]),  # the student's holds the teacher's
    )
    student, teacher, arguments = build(case)
    result = evaluate(case, student, teacher, **arguments, grad_output=1.0)
    assert not result.loss.any(), result.loss
    assert not any(g is not None and g.any() for g in result.gradients)


@given(calls(options={"hard_weight": 0.0, "soft_weight": 1.0, "reduction": "none"}, num_items=None))
def test_never_negative(case: Case) -> None:
    student, teacher, arguments = build(case)
    loss = distillation_loss(student, teacher, **arguments)
    assert ((loss >= 0) | loss.isnan()).all(), loss


@given(calls())
def test_token_stats(case: Case) -> None:
    """Every figure against the reference's; the two divergences as distillation_loss has them."""
    taken = ("temperature", "logit_softcap", "logit_scale")
    case = case._replace(options={n: x for n, x in case.options.items() if n in taken})
    case = case._replace(positions=tuple(p for p in case.positions if p != "weight"), num_items=None)
    problem = build(case)
    assume_documented(problem)
    counts, (student, teacher, arguments) = problem.counts, problem
    ours, expected = token_stats(student, teacher, **arguments), reference.token_stats(student, teacher, **arguments)
    eps = torch.finfo(torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32).eps
    allowed = {
        name: allowed_errors(student, teacher, {**arguments, "divergence": name}, counts).loss
        for name in ("forward_kl", "reverse_kl")
    }
    largest = [finite(z).abs().amax(-1) for z in problem.scaled_logits()]
    for name, value, other in zip(TokenStats._fields, ours, expected, strict=True):
        assert (value is None) == (other is None), name
        if value is None or other is None:
            continue
        if name == "top1_agreement":  # a softcap is rounded: it may join two largest logits that float64 tells apart
            assert arguments.get("logit_softcap") or torch.equal(value, other)
            continue
        # A log-sum-exp, an entropy and a log-probability are differences of numbers of the logits' size.
        size = 1 + (largest[0] if name.startswith("student") else largest[1])
        floor = allowed.get(name, 8 * eps * (size + math.log(case.columns)))
        if name.endswith("entropy"):  # p is known from the larger of p and q, by the gap between them
            floor = floor + 4 * eps * size * (largest[0] + largest[1])
        assert_within(name, value, other, LOSS[value.dtype] * finite(other).abs() + floor)


@given(POINTWISE)
def test_kl_div(case: Pointwise) -> None:
    """As torch.nn.functional.kl_div in float64, but 0 where the target's probability is 0."""
    input, target = build_pointwise(case)
    options: dict[str, Any] = {"reduction": case.reduction, "log_target": case.log_target}
    common = {**options, "grad_output": case.grad_output, "needs_grad": case.needs_grad}
    before = input.clone(), target.clone()
    ours = run(kldiv_ext.kl_div, input, target, **common)
    assert_same_bits(ours, run(kldiv_ext.kl_div, input, target, **common))
    assert same_bits(input, before[0]) and same_bits(target, before[1])
    assert ours.loss.dtype == run(F.kl_div, input, target, **options, needs_grad=(False, False)).loss.dtype
    wide = input.double(), target.double()
    expected = run(reference.kl_div, *wide, **common)
    # PyTorch's own has 0 · inf where a probability is 0.
    if not (wide[1].exp() == 0 if case.log_target else wide[1] == 0).any():
        torch.testing.assert_close(expected, run(F.kl_div, *wide, **common), rtol=1e-12, atol=1e-12, equal_nan=True)
    compare_pointwise(case, wide, ours, expected)


def compare_pointwise(case: Pointwise, wide: tuple[Tensor, Tensor], ours: Result, expected: Result) -> None:
    """Rounding of p · log p and of p · input, of their sum, and of what is stored."""
    log_p = wide[1] if case.log_target else wide[1].log()
    p, input_size, log_size = log_p.exp(), finite(wide[0]).abs(), finite(log_p).abs()
    terms = finite(p * log_size * (1 + log_size * case.log_target) + p * input_size)  # exp(x) rounds x: eps |x|
    elements = math.prod(torch.broadcast_shapes(*case.shapes))
    divisor = {"mean": elements, "batchmean": (*case.shapes[0], 1)[0]}.get(case.reduction, 1) or 1
    eps = torch.finfo(torch.promote_types(ours.loss.dtype, torch.float32)).eps
    stored = torch.finfo(ours.loss.dtype)
    allowed = 8 * eps * (terms if case.reduction == "none" else terms.sum()) / divisor
    allowed = allowed + 0.501 * stored.eps * finite(expected.loss).abs() + stored.smallest_normal * stored.eps
    assert_within("loss", ours.loss, expected.loss, allowed)
    largest = 1 + sum(x.max() if x.numel() else 0.0 for x in (log_size, input_size))
    for gradient, other in given_pairs(ours, expected):
        # A gradient summed over a broadcast dimension is summed in its own dtype.
        many = max(1, elements // max(gradient.numel(), 1))
        size = finite(other).abs().max() if many > 1 and other.numel() else finite(other).abs()
        stored = torch.finfo(gradient.dtype)
        allowed = stored.eps * size + 16 * eps * largest * abs(case.grad_output) / divisor
        assert_within("gradient", gradient, other, many * (allowed + stored.smallest_normal * stored.eps))
