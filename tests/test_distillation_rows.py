"""distillation_loss row by row: positions that do not count, infinities and NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import (
    ALL_DIVERGENCES,
    BOTH_PATHS,
    DIVERGENCES,
    DTYPES,
    REDUCTIONS,
    Divergence,
    Result,
    make_pair,
    named,
    run,
)
from oracle import assert_equal, assert_gradients_close, assert_losses_close, check
from torch import Tensor

from kldiv_ext import distillation_loss, reference

INF, NAN = math.inf, math.nan

# ---------------------------------------------------------------- positions that do not count


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("by", ["labels", "mask", "weight"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_ignored_positions_are_not_read(device: str, divergence: Divergence, by: str, reduction: str) -> None:
    student, teacher = make_pair(4, 50, device=device)
    dead = torch.tensor([False, True, False, True], device=device)
    tensor = {"labels": torch.where(dead, -100, 1), "mask": ~dead, "weight": (~dead).float()}[by]
    options = {by: tensor, **divergence.options, "reduction": reduction}
    expected = run(distillation_loss, student, teacher, **options)
    student[dead], teacher[dead] = NAN, INF
    result = run(distillation_loss, student, teacher, **options)
    assert_equal(result, expected)
    assert not any(gradient[dead].any() for gradient in result.gradients)


def test_ignore_index(device: str) -> None:
    """Any label may be the one that does not count; -100 is then an ordinary label."""
    student, teacher = make_pair(4, 30, device=device)
    labels = torch.tensor([7, -100, 3, 7], device=device)
    result = check(student, teacher, labels, ignore_index=7, reduction="none")
    assert (result.loss == 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("by, reduction", [
    *((by, reduction) for by in ("labels", "mask", "weight") for reduction in REDUCTIONS), ("num_items", "mean"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_position_counts(device: str, dtype: torch.dtype, by: str, reduction: str) -> None:
    """The loss is 0 and differentiable, the gradients are 0."""
    student, teacher = make_pair(4, 50, dtype=dtype, device=device)
    student[0], teacher[1] = NAN, NAN
    value = {
        "labels": torch.full((4,), -100, device=device),
        "mask": torch.zeros(4, dtype=torch.bool, device=device),
        "weight": torch.zeros(4, device=device),
        "num_items": 0,
    }[by]
    result = run(distillation_loss, student, teacher, **{by: value}, reduction=reduction)
    assert not result.loss.any()
    assert_equal(result.gradients, (torch.zeros_like(student), torch.zeros_like(teacher)))


@pytest.mark.parametrize("shared", ["int", "tensor"])
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_gradient_accumulation(device: str, divergence: Divergence, shared: str) -> None:
    """With a shared num_items, unequal micro-batches add up to the large batch."""
    student, teacher = make_pair(12, 60, device=device)
    labels = torch.where(torch.rand(12) < 0.4, -100, 1).to(device)
    count = (labels != -100).sum()
    whole = run(distillation_loss, student, teacher, labels, **divergence.options)
    num_items = int(count) if shared == "int" else count
    parts = [
        run(distillation_loss, student[i], teacher[i], labels[i], **divergence.options, num_items=num_items)
        for i in torch.arange(12).split([1, 7, 4])
    ]
    assert_losses_close(sum(part.loss for part in parts), whole.loss)
    assert_gradients_close(torch.cat([part.grad_student for part in parts]), whole.grad_student)


# ---------------------------------------------------------------- columns of probability 0

INFINITE_FOR_DEAD_STUDENT = ("forward_kl", "jeffreys")  # q = 0 < p
INFINITE_FOR_DEAD_TEACHER = ("reverse_kl", "jeffreys")  # p = 0 < q
AT_0_AND_1 = {
    "jsd": ("forward_kl", "reverse_kl"),
    "skew_forward_kl": ("forward_kl", "zero"),
    "skew_reverse_kl": ("reverse_kl", "zero"),
    "alpha": ("reverse_kl", "forward_kl"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES, ids=str)
def test_columns_dead_on_both_sides(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """Such columns contribute 0 with zero gradients: the loss is that of the other columns."""
    student, teacher = make_pair(3, 70, dtype=dtype, device=device)
    dead = torch.arange(70, device=device) % 3 == 1
    student[:, dead] = teacher[:, dead] = -INF
    options = {**divergence.options, "reduction": "none"}
    result = check(student, teacher, **options)
    assert not any(gradient[:, dead].any() for gradient in result.gradients)
    without = reference.distillation_loss(student[:, ~dead].double(), teacher[:, ~dead].double(), **options)
    assert_losses_close(result.loss, without)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES, ids=str)
def test_columns_dead_on_one_side(device: str, divergence: Divergence, side: int, dtype: torch.dtype) -> None:
    """The loss is +inf where the definition is, in that row alone. A column of probability 0 has no gradient."""
    both = make_pair(3, 70, dtype=dtype, device=device)
    both[side][1, 5:9] = -INF
    options = {**divergence.options, "reduction": "none"}
    expected = run(reference.distillation_loss, *(x.double() for x in both), **options)
    result = run(distillation_loss, *both, **options)
    assert_losses_close(result.loss, expected.loss)
    name = divergence.name
    if divergence.parameter in (0.0, 1.0):
        name = AT_0_AND_1[name][int(divergence.parameter)]
    infinite = name in (INFINITE_FOR_DEAD_STUDENT, INFINITE_FOR_DEAD_TEACHER)[side]
    assert result.loss.isinf().tolist() == [False, infinite, False]
    assert infinite or not result.gradients[side][1, 5:9].any()
    if infinite and side == 1:  # for the other side: test_gradient_of_an_infinite_forward_kl
        assert result.grad_student[1].isnan().all()
    rows = [0, 2] if infinite else [0, 1, 2]
    for gradient, exact in zip(result.gradients, expected.gradients, strict=True):
        assert_gradients_close(gradient[rows], exact[rows])


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("teacher_too", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_an_infinite_forward_kl(device: str, dtype: torch.dtype, teacher_too: bool, reduction: str) -> None:
    """The student's gradient is finite, q - p."""
    student, teacher = make_pair(3, 70, dtype=dtype, device=device)
    student[1, 5:9] = -INF
    scale = 2.0**10  # keeps float16 above its subnormal numbers
    options = {"reduction": reduction, "grad_output": scale, "needs_grad": (True, teacher_too)}
    result = run(distillation_loss, student, teacher, **options)
    assert result.loss.isinf().any()
    expected = scale * (student.double().softmax(-1) - teacher.double().softmax(-1))
    assert_gradients_close(result.grad_student, expected)
    if teacher_too:
        assert result.grad_teacher.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_huge_and_distant_logits(device: str, divergence: Divergence) -> None:
    """Probabilities underflow, their logarithms do not: the results are finite."""
    teacher = torch.tensor([[0.0, -120.0, 5.0], [1e4, 1e4 - 1, 0.0], [-3e4, -3e4, 0.0]], device=device)
    student = torch.tensor([[-120.0, 0.0, 0.0], [1e4 - 2, 1e4, 0.0], [0.0, -3e4, -3e4]], device=device)
    # A column with all of the mass has a gradient of the size of the rounding of 1 - p.
    check(student, teacher, **divergence.options, reduction="none", floor=1e-6)


# ---------------------------------------------------------------- rows that are NaN


def only_row_is_nan(row: int, result: Result) -> bool:
    """Whether the loss and the gradients are NaN in every column of that row and in no other row."""
    expected = torch.arange(len(result.loss), device=result.loss.device) == row
    everywhere = [result.loss.isnan(), *(gradient.isnan().all(-1) for gradient in result.gradients)]
    anywhere = [gradient.isnan().any(-1) for gradient in result.gradients]
    return all(torch.equal(found, expected) for found in (*everywhere, *anywhere))


def with_value(index: int, value: float, background: float | None = None) -> Callable[[Tensor], None]:
    def change(row: Tensor) -> None:
        if background is not None:
            row.fill_(background)
        row[index] = value

    return change


BROKEN_ROWS = {
    "nan": with_value(3, NAN),
    "nan in the tail": with_value(69, NAN),
    "+inf": with_value(3, INF),
    "all -inf": with_value(3, -INF, -INF),
    "nan among -inf": with_value(3, NAN, -INF),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)], ids=["student", "teacher", "both"])
@pytest.mark.parametrize("damage", named(BROKEN_ROWS))
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES, ids=str)
def test_broken_rows_are_nan_alone(
    device: str, divergence: Divergence, damage: Callable[[Tensor], None], sides: tuple[int, ...], dtype: torch.dtype
) -> None:
    both = make_pair(3, 70, dtype=dtype, device=device)
    clean = run(distillation_loss, *both, **divergence.options, reduction="none")
    for side in sides:
        damage(both[side][1])
    result = run(distillation_loss, *both, **divergence.options, reduction="none")
    assert only_row_is_nan(1, result)
    for value, same in zip((result.loss, *result.gradients), (clean.loss, *clean.gradients), strict=True):
        assert torch.equal(value[[0, 2]], same[[0, 2]])


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize(
    "options", [{"soft_weight": 0.0, "hard_weight": 1.0}, {"divergence": "skew_reverse_kl", "skew": 1.0}], ids=str
)
def test_a_row_broken_on_one_side_is_nan_on_both(device: str, options: dict[str, float], side: int) -> None:
    """The results are NaN also where the divergence has weight 0 or is 0 by definition."""
    both = make_pair(2, 5, device=device)
    both[side][0, 3] = NAN
    labels = torch.tensor([1, 2], device=device)
    for function in (distillation_loss, reference.distillation_loss):
        assert only_row_is_nan(0, run(function, *both, labels, **options, reduction="none"))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_factors_that_are_not_finite(device: str, bad: float) -> None:
    """A weight or grad_output that is not finite affects its own rows alone; without labels, 0 · inf is 0."""
    student, teacher = make_pair(3, 70, device=device)
    first = torch.tensor([bad, 1, 1], device=device)
    for reduction in ("none", "sum"):
        weighted = run(distillation_loss, student, teacher, weight=first, reduction=reduction)
        assert not weighted.loss.isfinite().all() and weighted.grad_student[1:].isfinite().all()
    late = run(distillation_loss, student, teacher, reduction="none", grad_output=first)
    assert late.loss.isfinite().all()
    assert not late.grad_student[0].isfinite().any() and late.grad_student[1:].isfinite().all()
    assert not run(distillation_loss, student, teacher, num_items=torch.tensor(bad, device=device)).loss.isinf()
    half = run(distillation_loss, student.half(), teacher.half(), grad_output=bad)  # gradients made in backward
    assert not half.grad_student.isfinite().any()


def test_root_of_a_loss(device: str) -> None:
    """The root of a Jensen-Shannon divergence is a distance; its slope is infinite where the rows are equal."""
    student, teacher = make_pair(2, 70, device=device)
    student[0] = teacher[0]
    result = run(lambda s, t: distillation_loss(s, t, divergence="jsd", reduction="none").sqrt(), student, teacher)
    assert result.grad_student[1].isfinite().all() and not result.grad_student[0].isfinite().any()
