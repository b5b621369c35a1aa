"""The promises of accuracy and determinism: from unrelated pairs down to nearly equal ones, to the bit where it is
said so, on every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    DIVERGENCES,
    DTYPES,
    ENDPOINTS,
    FORWARD_KL,
    JSD,
    LOPSIDED,
    PARAMETERS,
    Divergence,
    Result,
    assert_gradients_close,
    cases,
    make_pair,
    need_isa,
    row_errors,
    run,
)
from torch import Tensor

import kldiv_ext
from kldiv_ext import distillation_loss, reference

REAL = 32000  # Llama 2
LARGE = 151936  # Qwen

# ---------------------------------------------------------------- promises

# Distance of the student's logits from the teacher's, as a standard deviation: forward KL is about half its square.
DISTANCES = (4.0, 1.0, 1e-1, 1e-2, 1e-3, 1.5e-4)

PROMISED_GRADIENT = 4e-3  # relative L2, of the whole gradient
PROMISED_LOSS = 1e-5  # relative, away from 0,
NEAR_ZERO, PROMISED_NEAR_ZERO = 1e-4, 1e-3  # relative, from here
BELOW, PROMISED_BELOW = 1e-6, 1e-9  # down to here, and absolute below


def promised_loss_error(exact: Tensor, divergence: Divergence) -> Tensor:
    near = torch.where(exact < BELOW, PROMISED_BELOW, PROMISED_NEAR_ZERO * exact)
    # Total variation is of the first order in the distance of the logits, the others of the second.
    return torch.where(exact < (NEAR_ZERO**0.5 if first_order(divergence) else NEAR_ZERO), near, PROMISED_LOSS * exact)


def first_order(divergence: Divergence) -> bool:
    return divergence.name == "total_variation"


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def compare(student: Tensor, teacher: Tensor, divergence: Divergence, gradient_tolerance: float) -> Result:
    """Unreduced: every row has its own promise."""
    ours = run(distillation_loss, student, teacher, **divergence.options, reduction="none")
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **divergence.options, reduction="none")
    error = (ours.loss - exact.loss).abs()
    assert (ours.loss >= 0).all()
    worst = f"{error.max():.1e} at {exact.loss[error.argmax()]:.1e}"
    assert (error <= promised_loss_error(exact.loss, divergence)).all(), worst
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert relative(value, wanted) <= gradient_tolerance, f"{relative(value, wanted):.1e}"
    return ours


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_float32(device: str, divergence: Divergence, distance: float) -> None:
    """Also where the loss is 1e-8. Total variation alone jumps where p = q: columns that float32 cannot tell apart
    get the gradient of either side."""
    student, teacher = make_pair(2, REAL, spread=3.0, distance=distance, device=device)
    jumps = first_order(divergence) and distance < 1e-2
    compare(student, teacher, divergence, 0.05 if jumps else PROMISED_GRADIENT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_half_precision(device: str, divergence: Divergence, distance: float, dtype: torch.dtype) -> None:
    """A teacher of the student's dtype: as close as that can be, most logits are equal. float16 with the factor that
    keeps its gradient out of the subnormal numbers."""
    student, teacher = make_pair(2, 8000, spread=3.0, distance=distance, dtype=dtype, device=device)
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    ours = run(distillation_loss, student, teacher, **divergence.options, grad_output=scale)
    exact = run(
        reference.distillation_loss, student.double(), teacher.double(), **divergence.options, grad_output=scale
    )
    assert abs(ours.loss - exact.loss) <= promised_loss_error(exact.loss, divergence)
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert relative(value, wanted) <= PROMISED_GRADIENT, f"{relative(value, wanted):.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [300, 1000, 8000])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_rows_but_for_a_few_columns_equal(
    device: str, divergence: Divergence, columns: int, dtype: torch.dtype
) -> None:
    """As close as 16-bit logits come: one step in a few improbable columns. A log-sum-exp that is off by a rounding
    would be all of the gradient elsewhere."""
    _, teacher = make_pair(6, columns, spread=3.0, dtype=torch.bfloat16, device=device)
    teacher = teacher.to(dtype)
    student = teacher.clone()
    for row, few in enumerate((1, 1, 2, 3, 5, 8)):
        improbable = teacher[row].argsort()[columns // 2 :: 7][:few]
        student[row, improbable] += teacher[row, improbable].abs().clamp(min=0.25) * (2**-7 if row % 2 else -(2**-7))
    options = {**divergence.options, "reduction": "none"}
    ours = run(distillation_loss, student, teacher, **options)
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **options)
    assert (exact.loss > 0).all() and (exact.loss < 1e-3).all()
    assert ((ours.loss - exact.loss).abs() <= promised_loss_error(exact.loss, divergence)).all()
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert value is not None and wanted is not None
        errors = row_errors(value, wanted)
        assert (errors <= PROMISED_GRADIENT).all(), f"{errors.max():.1e}"


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_float64(device: str, divergence: Divergence, distance: float) -> None:
    """Against the oracle's own rounding error, which grows as the two come close."""
    student, teacher = make_pair(2, 5000, dtype=torch.float64, distance=distance, device=device)
    ours = run(distillation_loss, student, teacher, **divergence.options)
    exact = run(reference.distillation_loss, student, teacher, **divergence.options)
    assert abs(ours.loss - exact.loss) <= 1e-14 + 1e-12 * exact.loss
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert relative(value, wanted) <= 1e-12 / distance


@pytest.mark.parametrize("distance", [1.0, 1e-2])
def test_large_vocabulary(device: str, distance: float) -> None:
    student, teacher = make_pair(2, LARGE, spread=3.0, distance=distance, dtype=torch.bfloat16, device=device)
    compare(student, teacher, FORWARD_KL, 2.5e-3)  # no entry stands out: the error is that of rounding, 1.6e-3


@pytest.mark.parametrize("columns", [2**17, 2**17 + 1])
def test_long_rows_reduced(device: str, columns: int) -> None:
    """On either side of where the CPU stops keeping a row beside a 16-bit gradient."""
    student, teacher = make_pair(2, columns, spread=3.0, dtype=torch.bfloat16, device=device)
    ours = run(distillation_loss, student, teacher, **JSD.options)
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **JSD.options)
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert relative(value, wanted) <= 2.5e-3


@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD, Divergence("skew_forward_kl", 0.1)], ids=str)
def test_peaked_rows(device: str, divergence: Divergence) -> None:
    """As language models are where they are sure: one column has all but 1e-3 of the mass."""
    student, teacher = make_pair(4, REAL, device=device, distance=0.1)
    student[:, 17], teacher[:, 17] = student[:, 17] + 17.5, teacher[:, 17] + 17.5
    compare(student, teacher, divergence, PROMISED_GRADIENT)


def sure_rows(how: str, margin: float, **options: Any) -> tuple[Tensor, Tensor]:
    """One column has all but e^-margin, times their number, of the mass: on one side, on both, or two of them."""
    student, teacher = make_pair(32, 1000, distance=1.4, **options)
    for column in (3, 5, 40, 900):  # not where the other side has next to nothing: there is next to no gradient either
        student[:, column], teacher[:, column] = student[:, column].abs(), teacher[:, column].abs()
    if how != "teacher":
        student[:, 3] += margin
    if how != "student":
        teacher[:, 5 if how == "apart" else 3] += margin - (2 if how == "together" else 0)
    return student, teacher


@pytest.mark.parametrize("margin", [10.0, 18.0, 25.0])
@pytest.mark.parametrize("how", ["student", "teacher", "together", "apart"])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *LOPSIDED], ids=str)
def test_sure_rows(device: str, divergence: Divergence, how: str, margin: float) -> None:
    """A sure row's gradient is what its one probability lacks to 1, down to 1e-9 here: beside the derivatives that it
    is the difference of, less than a rounding."""
    student, teacher = sure_rows(how, margin, device=device)
    ours = run(distillation_loss, student, teacher, **divergence.options, reduction="none")
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **divergence.options, reduction="none")
    assert ((ours.loss - exact.loss).abs() <= promised_loss_error(exact.loss, divergence)).all()
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert value is not None and wanted is not None
        errors = row_errors(value, wanted, floor=1e-17)  # the oracle's own
        assert (errors <= 1e-4).all(), f"{errors.max():.1e}"


@pytest.mark.parametrize("reduction", ["none", "mean"])  # made in backward, and in forward
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_sure_rows_in_bfloat16(device: str, divergence: Divergence, reduction: str) -> None:
    student, teacher = sure_rows("apart", 18.0, dtype=torch.bfloat16, device=device)
    options = {**divergence.options, "reduction": reduction}
    ours = run(distillation_loss, student, teacher, **options)
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **options)
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert_gradients_close(value, wanted)


def test_several_largest_logits(device: str) -> None:
    """Of several columns where one side is largest any may be the one that the others are seen from; where the other
    side has a thousandth, their derivatives differ by no more than that, and are known to a rounding."""
    student, teacher = sure_rows("student", 25.0, device=device)
    student[:, 900] = student[:, 40] = student[:, 3]
    teacher[:, 40] += 3
    for divergence in DIVERGENCES:
        options = {**divergence.options, "reduction": "none"}
        value = run(distillation_loss, student, teacher, **options).grad_student
        wanted = run(reference.distillation_loss, student.double(), teacher.double(), **options).grad_student
        assert value is not None and wanted is not None
        assert (row_errors(value, wanted) <= 1e-3).all(), f"{divergence}: {row_errors(value, wanted).max():.1e}"


@pytest.mark.parametrize("skew", [1e-4, 1e-6, 1e-8, 1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_tiny_skew(device: str, name: str, skew: float) -> None:
    """Where the one side has about `skew` of what the other has: the mixture is of both."""
    student, teacher = make_pair(100, 5, device=device, distance=1.4)
    depth = math.log(skew) + torch.linspace(-3, 3, 100, device=device)
    (student if name == "skew_forward_kl" else teacher)[:, 0] = depth
    options = {"divergence": name, "skew": skew, "reduction": "none"}
    ours = run(distillation_loss, student, teacher, **options)
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **options)
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert value is not None and wanted is not None
        assert (row_errors(value, wanted) <= 1e-4).all(), f"{row_errors(value, wanted).max():.1e}"


def test_maxima_further_apart_than_float32_reaches(device: str) -> None:
    for student, teacher in (([2e38], [-2e38]), ([-3e38, -3e38], [3e38, 3e38])):
        result = run(distillation_loss, torch.tensor([student], device=device), torch.tensor([teacher], device=device))
        assert all(x is not None and not x.any() for x in result)


@pytest.mark.parametrize("columns", [3, 100])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_sure_of_two_tokens(device: str, divergence: Divergence, columns: int) -> None:
    """Nearly alike, while the teacher is sure of a third: their derivatives differ by what is left of p there, beside a
    constant that the softmax Jacobian does not see."""
    student, teacher = make_pair(200, columns, device=device, distance=1.4)
    margin = torch.linspace(5, 20, 200, device=device)
    student[:, 0], student[:, 2] = margin, margin + student[:, 2]
    teacher[:, 1] += margin
    options = {**divergence.options, "reduction": "none"}
    value = run(distillation_loss, student, teacher, **options).grad_student
    wanted = run(reference.distillation_loss, student.double(), teacher.double(), **options).grad_student
    assert value is not None and wanted is not None
    errors = row_errors(value, wanted, floor=1e-14)  # the oracle's own
    assert (errors <= PROMISED_GRADIENT).all() and (errors <= 1e-4).double().mean() > 0.98, f"{errors.max():.1e}"


# What one side is moved by, and how close the two are otherwise.
OFFSETS = [(7.9, 0.05), (50.0, 0.05), (-300.0, 0.05), (1e4, 4.0), (-1e4, 4.0)]


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_offset_of_one_side(device: str, divergence: Divergence, offset: tuple[float, float]) -> None:
    """Which softmax does not see: the loss is as exact as the logits that it leaves."""
    student, teacher = make_pair(4, 1000, distance=offset[1], device=device)
    compare(student + offset[0], teacher, divergence, 1e-3)
    compare(student, teacher + offset[0], divergence, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e6, 1e9, 1e18, 1e30])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_one_hot_teacher(device: str, divergence: Divergence, size: float, dtype: torch.dtype) -> None:
    """Made of one huge logit; or a student of nothing but very negative ones, which is uniform."""
    student, teacher = make_pair(3, 50, dtype=dtype, device=device)
    teacher[0, 7], student[1], teacher[2] = size, -size, 0.0
    teacher[2, student[2].argmax()] = size
    options = {**divergence.options, "reduction": "none"}
    ours = run(distillation_loss, student, teacher, **options)
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **options)
    finite = exact.loss < size / 10  # else infinite but for its size
    tolerance = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(ours.loss.double()[finite], exact.loss[finite], **tolerance)
    torch.testing.assert_close(ours.loss.double()[~finite], exact.loss[~finite], rtol=1e-2, atol=0.0)
    value, wanted = ours.grad_student, exact.grad_student
    assert value is not None and wanted is not None
    errors = row_errors(value, wanted)[finite]
    assert (errors <= (4e-3 if dtype == torch.bfloat16 else 1e-4)).all(), f"{errors.max():.1e}"


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *LOPSIDED], ids=str)
def test_flat_rows_beside_sure_ones(device: str, divergence: Divergence, spread: float) -> None:
    """The teacher's one column is the student's largest, if only by a little: its derivative is as large as the ratio
    of the two, and must not swallow the others. Where those are all alike, each is known to a rounding."""
    student, teacher = make_pair(4, REAL, device=device)
    student = spread * student
    teacher.scatter_(-1, student.argmax(-1, keepdim=True), 25.0)
    options = {**divergence.options, "reduction": "none"}
    ours = run(distillation_loss, student, teacher, **options)
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **options)
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert value is not None and wanted is not None
        assert (row_errors(value, wanted) <= 4e-4).all(), f"{row_errors(value, wanted).max():.1e}"
        if divergence.name in ("jeffreys", "alpha"):  # others' derivatives are bounded
            each = ((value - wanted).abs() / wanted.abs()).median()
            assert each <= 1e-2, f"{each:.1e}"


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDPOINTS], ids=str)
def test_nothing_on_one_side_where_the_other_is_largest(device: str, divergence: Divergence, side: str) -> None:
    student, teacher = make_pair(3, 300, device=device, distance=0.5)
    full, empty = (student, teacher) if side == "teacher" else (teacher, student)
    full[1, 7], empty[1, 7] = 9.0, -torch.inf
    options = {**divergence.options, "reduction": "none"}
    ours = run(distillation_loss, student, teacher, **options)
    exact = run(reference.distillation_loss, student.double(), teacher.double(), **options)
    assert torch.equal(ours.loss.isinf(), exact.loss.isinf())
    finite = exact.loss.isfinite()
    for value, wanted in zip(ours[1:], exact[1:], strict=True):
        assert value is not None and wanted is not None
        errors = row_errors(value[finite], wanted[finite], floor=1e-15)  # total variation's is 0 on the empty side
        assert (errors <= 1e-4).all(), f"{errors.max():.1e}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_near_their_ends(device: str, name: str) -> None:
    """The promises hold from 0.001 to 0.999; nearer to an end nothing breaks."""
    for distance in (2.0, 0.1, 1e-3):
        student, teacher = make_pair(4, 5000, distance=distance, device=device)
        for parameter in (0.001, 0.01, 0.99, 0.999):
            compare(student, teacher, Divergence(name, parameter), PROMISED_GRADIENT)
        if name.startswith("skew"):  # continuous at 0
            for parameter in (1e-5, 1e-8, 1e-12, 1e-20, 1e-30):
                compare(student, teacher, Divergence(name, parameter), PROMISED_GRADIENT)
        student[:, 3] = teacher[:, 4] = -torch.inf
        for parameter in (1e-12, 1e-7, 1e-4, 1 - 1e-4, 1 - 1e-7, 1 - 1e-12):
            result = run(distillation_loss, student, teacher, **Divergence(name, parameter).options)
            assert all(value.isfinite().all() for value in result) and result.loss >= 0


# ---------------------------------------------------------------- exactly 0


@pytest.mark.parametrize("shape", [(7, 1), (3, 33), (2, 4100), (1, REAL)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDPOINTS], ids=str)
def test_identical_rows(device: str, divergence: Divergence, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    _, teacher = make_pair(*shape, dtype=dtype, spread=3.0, device=device)
    teacher[..., ::7] = -torch.inf if shape[-1] > 1 else 1.0
    for temperature in (1.0, 0.7):
        result = run(distillation_loss, teacher.clone(), teacher, **divergence.options, temperature=temperature)
        assert result.loss == 0 and not result.loss.signbit()
        assert not result.grad_student.any() and not result.grad_teacher.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_identical_rows_of_two_dtypes(device: str, dtype: torch.dtype) -> None:
    student, _ = make_pair(3, 4100, dtype=dtype, device=device)
    for other in (torch.float32, torch.float64):
        result = run(distillation_loss, student, student.to(other), **JSD.options)
        assert result.loss == 0 and not result.grad_student.any() and not result.grad_teacher.any()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_never_negative(device: str, divergence: Divergence) -> None:
    """Rows that differ in their last bits, by a constant, or in one column."""
    _, teacher = make_pair(200, 300, spread=3.0, device=device)
    last_bits = torch.nextafter(teacher, torch.where(torch.rand_like(teacher) < 0.5, -torch.inf, torch.inf))
    one_column = teacher.clone()
    one_column[:, 5] += torch.logspace(-8, 1, 200, device=device)
    for student in (last_bits, teacher + 3.3, teacher + 1e-4 * torch.randn_like(teacher), one_column):
        loss = distillation_loss(student, teacher, **divergence.options, temperature=0.9, reduction="none")
        assert (loss >= 0).all()


# ---------------------------------------------------------------- the same bits


def same_bits(a: Result, b: Result) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Few long rows are shared out by their chunks, many by the row.
SIZES = {"few-long": (2, 50257), "one-long": (1, 130000), "many": (64, 3000), "many-short": (5000, 40)}


@pytest.mark.parametrize("shape", cases(SIZES))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
def test_runs_and_threads(
    divergence: Divergence, dtype: torch.dtype, reduction: str, shape: tuple[int, int], threads: Callable[[int], None]
) -> None:
    student, teacher = make_pair(*shape, dtype=dtype)
    weight = torch.rand(shape[0])
    results = []
    for count in (1, 2, 3, 8, 2, 1):
        threads(count)
        options = {**divergence.options, "weight": weight, "reduction": reduction}
        results.append(run(distillation_loss, student, teacher, **options))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs(device: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher = make_pair(64, 5000, dtype=dtype, device=device)
    first, *others = (run(distillation_loss, student, teacher, **JSD.options, reduction=reduction) for _ in range(5))
    assert all(same_bits(other, first) for other in others)


@pytest.mark.parametrize("columns", [40, 3000, 50257])
@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
def test_batch_composition(device: str, divergence: Divergence, columns: int) -> None:
    """A row alone, in a small batch and in a large one, beside a row of NaN."""
    student, teacher = make_pair(20, columns, device=device)
    whole = run(distillation_loss, student, teacher, **divergence.options, reduction="none")
    student[12] = torch.nan
    for rows in (slice(7, 8), slice(5, 9), slice(7, 13)):
        part = run(distillation_loss, student[rows], teacher[rows], **divergence.options, reduction="none")
        i = 7 - rows.start
        assert part.loss[i] == whole.loss[7]
        assert torch.equal(part.grad_student[i], whole.grad_student[7])
        assert torch.equal(part.grad_teacher[i], whole.grad_teacher[7])


@pytest.mark.parametrize("columns", [50, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
def test_addresses_and_strides(device: str, divergence: Divergence, dtype: torch.dtype, columns: int) -> None:
    student, teacher = make_pair(6, columns, dtype=dtype, device=device)
    expected = run(distillation_loss, student, teacher, **divergence.options)
    for offset in (0, 1, 3, 8):
        storage = torch.empty(6 * columns + offset, dtype=dtype, device=device)
        moved = storage[offset:].view(6, columns).copy_(student)
        assert same_bits(run(distillation_loss, moved, teacher, **divergence.options), expected)
        assert same_bits(run(distillation_loss, student, teacher + 0 * moved, **divergence.options), expected)
    doubled = torch.cat([teacher] * 2, 1)
    for strided in (teacher.t().contiguous().t(), teacher.repeat_interleave(2, 1)[:, ::2], doubled[:, :columns]):
        assert not strided.is_contiguous()
        assert same_bits(run(distillation_loss, student, strided, **divergence.options), expected)


def test_reductions_agree(device: str) -> None:
    """The sum is that of the unreduced losses; gradients made in forward and in backward differ in rounding alone."""
    student, teacher = make_pair(8, 3000, device=device)
    each = run(distillation_loss, student, teacher, **JSD.options, reduction="none")
    total = run(distillation_loss, student, teacher, **JSD.options, reduction="sum")
    assert total.loss == each.loss.double().sum().float()
    assert_gradients_close(total.grad_student, each.grad_student)
    assert_gradients_close(total.grad_teacher, each.grad_teacher)


# ---------------------------------------------------------------- 16-bit storage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_of_every_number(device: str, dtype: torch.dtype) -> None:
    """Widened exactly and rounded to nearest even, subnormal numbers, infinities and NaN included, vectors and tail."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    for factor in (2.0, 1 + 2**-9, 2**-9 + 2**-12, -(2**-20) * 3, 1e30, 0.0):
        for values in (patterns, patterns[:-3].clone()):
            expected = (values.float() * factor).to(dtype)
            torch.ops.kldiv_ext.scale_(values := values.clone(), torch.tensor(factor, device=device))
            assert torch.equal(values.isnan(), expected.isnan())
            number = ~expected.isnan()
            assert torch.equal(values[number].view(torch.int16), expected[number].view(torch.int16))


# ---------------------------------------------------------------- instruction sets

ON_ONE_ISA = """
import torch
from kldiv_ext import _C, distillation_loss, kl_div, reference
from oracle import DIVERGENCES, DTYPES, FORWARD_KL, check, make_pair
print(_C.cpu_isa)
for dtype in DTYPES:
    for divergence in DIVERGENCES:
        check(*make_pair(2, 2087, dtype=dtype), **divergence.options, temperature=1.5, reduction="mean")
    check(*make_pair(2, 2087, dtype=dtype), **FORWARD_KL.options, reduction="none")
student, teacher = make_pair(4, 2000, distance=1e-3)
loss = distillation_loss(student, teacher)
assert abs(loss / reference.distillation_loss(student, teacher) - 1) < 1e-3
student, teacher = make_pair(4, 2000)
log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
for log_target in (False, True):
    options = {"reduction": "sum", "log_target": log_target}
    target = log_p if log_target else log_p.exp()
    expected = reference.kl_div(log_q, target, **options)
    torch.testing.assert_close(kl_div(log_q, target, **options).double(), expected, rtol=1e-5, atol=0)
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_set(isa: str) -> None:
    need_isa(isa)
    paths = [str(Path(__file__).parent), str(Path(kldiv_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "KLDIV_EXT_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run([sys.executable, "-c", ON_ONE_ISA], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]
