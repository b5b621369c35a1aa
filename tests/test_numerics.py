"""The promises of accuracy on every instruction set; the same bits for any run, threads, batch, address and stride."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    ALL_DIVERGENCES,
    BOTH_PATHS,
    DIVERGENCES,
    DTYPES,
    FORWARD_KL,
    JSD,
    LAYOUTS,
    LOPSIDED,
    PARAMETERS,
    Divergence,
    Result,
    make_pair,
    run,
)
from conftest import run_python
from oracle import assert_equal, assert_gradients_close, assert_norm_close, row_errors
from torch import Tensor

from kldiv_ext import distillation_loss, reference, token_stats

REAL = 32000  # Llama 2
LARGE = 151936  # Qwen
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)

# ---------------------------------------------------------------- promises

# Standard deviation of student - teacher; forward KL is about half its square.
DISTANCES = (4.0, 1.0, 1e-1, 1e-2, 1e-3, 1.5e-4)

PROMISED_GRADIENT = 4e-3  # relative L2 error of the whole gradient
PROMISED_LOSS = 1e-5  # relative error of a loss above NEAR_ZERO
NEAR_ZERO, PROMISED_NEAR_ZERO = 1e-4, 1e-3  # relative error below NEAR_ZERO
BELOW, PROMISED_BELOW = 1e-6, 1e-9  # absolute error below BELOW


def both(student: Tensor, teacher: Tensor, grad_output: float = 1.0, **options: Any) -> tuple[Result, Result]:
    """The result of the kernels, and of the float64 reference on the same logits."""
    ours = run(distillation_loss, student, teacher, grad_output=grad_output, **options)
    wide = student.double(), teacher.double()
    return ours, run(reference.distillation_loss, *wide, grad_output=grad_output, **options)


def both_unreduced(student: Tensor, teacher: Tensor, divergence: Divergence) -> tuple[Result, Result]:
    """Every row has its own promise."""
    return both(student, teacher, **divergence.options, reduction="none")


def assert_promised_loss(ours: Result, exact: Result, divergence: Divergence) -> None:
    near = torch.where(exact.loss < BELOW, PROMISED_BELOW, PROMISED_NEAR_ZERO * exact.loss)
    # Total variation is of the first order in the distance of the logits, the others of the second.
    near_zero = NEAR_ZERO**0.5 if divergence.name == "total_variation" else NEAR_ZERO
    promised = torch.where(exact.loss < near_zero, near, PROMISED_LOSS * exact.loss)
    error = (ours.loss - exact.loss).abs()
    worst = f"{error.max():.1e} at {exact.loss.view(-1)[error.argmax()]:.1e}"
    assert (ours.loss >= 0).all() and (error <= promised).all(), worst


def assert_gradients(ours: Result, exact: Result, tolerance: float) -> None:
    """The relative L2 error of each whole gradient."""
    for value, expected in zip(ours.gradients, exact.gradients, strict=True):
        assert_norm_close(value, expected, tolerance)


def assert_rows(ours: Result, exact: Result, tolerance: float, floor: float = 0.0, rows: Any = slice(None)) -> None:
    """The relative L2 error of every row of the gradients; `floor` is absolute, the reference's own error."""
    for value, expected in zip(ours.gradients, exact.gradients, strict=True):
        errors = row_errors(value[rows], expected[rows], floor)
        assert (errors <= tolerance).all(), f"{errors.max():.1e}"


def compare(student: Tensor, teacher: Tensor, divergence: Divergence, tolerance: float) -> None:
    ours, exact = both_unreduced(student, teacher, divergence)
    assert_promised_loss(ours, exact, divergence)
    assert_gradients(ours, exact, tolerance)


@pytest.mark.parametrize("distance", DISTANCES)
@EVERY_DIVERGENCE
def test_float32(device: str, divergence: Divergence, distance: float) -> None:
    """Losses down to 1e-8. Only total variation jumps where p = q: columns that float32 cannot tell apart get the
    gradient of either side."""
    student, teacher = make_pair(2, REAL, spread=3.0, distance=distance, device=device)
    jumps = divergence.name == "total_variation" and distance < 1e-2
    compare(student, teacher, divergence, 0.05 if jumps else PROMISED_GRADIENT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@EVERY_DIVERGENCE
def test_half_precision(device: str, divergence: Divergence, distance: float, dtype: torch.dtype) -> None:
    """Student and teacher of one dtype: at the smallest distance most logits are equal. float16 has the factor of a
    GradScaler, which keeps its gradient out of the subnormal numbers."""
    student, teacher = make_pair(2, 8000, spread=3.0, distance=distance, dtype=dtype, device=device)
    ours, exact = both(student, teacher, 2.0**14 if dtype == torch.float16 else 1.0, **divergence.options)
    assert_promised_loss(ours, exact, divergence)
    assert_gradients(ours, exact, PROMISED_GRADIENT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [300, 1000, 8000])
@EVERY_DIVERGENCE
def test_few_columns_differ(device: str, divergence: Divergence, columns: int, dtype: torch.dtype) -> None:
    """The smallest distance of 16-bit logits: one step in a few improbable columns. An error of one rounding in the
    log-sum-exp would be all of the gradient in the other columns."""
    _, teacher = make_pair(6, columns, spread=3.0, dtype=torch.bfloat16, device=device)
    teacher = teacher.to(dtype)
    student = teacher.clone()
    for row, few in enumerate((1, 1, 2, 3, 5, 8)):
        improbable = teacher[row].argsort()[columns // 2 :: 7][:few]
        student[row, improbable] += teacher[row, improbable].abs().clamp(min=0.25) * (2**-7 if row % 2 else -(2**-7))
    ours, exact = both_unreduced(student, teacher, divergence)
    assert (exact.loss > 0).all() and (exact.loss < 1e-3).all()
    assert_promised_loss(ours, exact, divergence)
    assert_rows(ours, exact, PROMISED_GRADIENT)


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
@EVERY_DIVERGENCE
def test_float64(device: str, divergence: Divergence, distance: float) -> None:
    """The reference's own rounding error grows as the distance shrinks."""
    student, teacher = make_pair(2, 5000, dtype=torch.float64, distance=distance, device=device)
    ours, exact = both(student, teacher, **divergence.options)
    assert abs(ours.loss - exact.loss) <= 1e-14 + 1e-12 * exact.loss
    assert_gradients(ours, exact, 1e-12 / distance)


def test_large_vocabulary(device: str) -> None:
    for distance in (1.0, 1e-2):
        student, teacher = make_pair(2, LARGE, spread=3.0, distance=distance, dtype=torch.bfloat16, device=device)
        compare(student, teacher, FORWARD_KL, 2.5e-3)  # no entry dominates: the error of rounding alone is 1.6e-3
    for columns in (2**17, 2**17 + 1):  # the CPU stops buffering a row beside a 16-bit gradient
        student, teacher = make_pair(2, columns, spread=3.0, dtype=torch.bfloat16, device=device)
        assert_gradients(*both(student, teacher, **JSD.options), 2.5e-3)


# ---------------------------------------------------------------- sure rows


def test_peaked_rows(device: str) -> None:
    """A language model that is sure of a token: one column has all but 1e-3 of the mass."""
    peak = 17.5 * (torch.arange(REAL, device=device) == 17)
    student, teacher = make_pair(4, REAL, device=device, distance=0.1)
    for divergence in (FORWARD_KL, JSD, Divergence("skew_forward_kl", 0.1)):
        compare(student + peak, teacher + peak, divergence, PROMISED_GRADIENT)


def sure_rows(how: str, margin: float, **options: Any) -> tuple[Tensor, Tensor]:
    """One column has all but about 1000 e^-margin of the mass: on one side, on both, or a column for each side."""
    student, teacher = make_pair(32, 1000, distance=1.4, **options)
    for column in (3, 5, 40, 900):  # where the other side has next to nothing, there is next to no gradient either
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
    """The gradient is of the size 1 - p_max, here down to 1e-9. It is less than a rounding of the derivatives that it
    is the difference of."""
    ours, exact = both_unreduced(*sure_rows(how, margin, device=device), divergence)
    assert_promised_loss(ours, exact, divergence)
    assert_rows(ours, exact, 1e-4, floor=1e-17)


@pytest.mark.parametrize("reduction", ["none", "mean"])  # gradients made in backward, and in forward
@EVERY_DIVERGENCE
def test_sure_rows_in_bfloat16(device: str, divergence: Divergence, reduction: str) -> None:
    student, teacher = sure_rows("apart", 18.0, dtype=torch.bfloat16, device=device)
    ours, exact = both(student, teacher, **divergence.options, reduction=reduction)
    for value, expected in zip(ours.gradients, exact.gradients, strict=True):
        assert_gradients_close(value, expected)


def test_several_largest_logits(device: str) -> None:
    """Ties for the argmax: any of the columns may be the one whose derivative is subtracted from the others'."""
    student, teacher = sure_rows("student", 25.0, device=device)
    student[:, 900] = student[:, 40] = student[:, 3]
    teacher[:, 40] += 3
    for divergence in DIVERGENCES:
        ours, exact = both_unreduced(student, teacher, divergence)
        errors = row_errors(ours.grad_student, exact.grad_student)
        assert (errors <= 1e-3).all(), f"{divergence}: {errors.max():.1e}"


@pytest.mark.parametrize("columns", [3, 100])
@EVERY_DIVERGENCE
def test_sure_of_two_tokens(device: str, divergence: Divergence, columns: int) -> None:
    """The student's two columns have nearly equal derivatives, since the teacher is sure of a third one. They differ by
    what is left of p there; the softmax Jacobian cancels the constant in them."""
    student, teacher = make_pair(200, columns, device=device, distance=1.4)
    margin = torch.linspace(5, 20, 200, device=device)
    student[:, 0], student[:, 2] = margin, margin + student[:, 2]
    teacher[:, 1] += margin
    ours, exact = both_unreduced(student, teacher, divergence)
    errors = row_errors(ours.grad_student, exact.grad_student, floor=1e-14)  # the reference's own
    assert (errors <= PROMISED_GRADIENT).all() and (errors <= 1e-4).double().mean() > 0.98, f"{errors.max():.1e}"


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *LOPSIDED], ids=str)
def test_flat_student_and_sure_teacher(device: str, divergence: Divergence, spread: float) -> None:
    """Both argmaxes are the same column. Its derivative is as large as p / q and must not swallow the others, each of
    which is known to a rounding where they are all alike."""
    student, teacher = make_pair(4, REAL, device=device)
    student = spread * student
    teacher.scatter_(-1, student.argmax(-1, keepdim=True), 25.0)
    ours, exact = both_unreduced(student, teacher, divergence)
    assert_rows(ours, exact, 4e-4)
    if divergence.name in ("jeffreys", "alpha"):  # the other divergences have bounded derivatives
        for value, expected in zip(ours.gradients, exact.gradients, strict=True):
            each = ((value - expected).abs() / expected.abs()).median()
            assert each <= 1e-2, f"{each:.1e}"


# ---------------------------------------------------------------- large logits

# Offset of one side, and the distance of the two without it.
OFFSETS = [(7.9, 0.05), (50.0, 0.05), (-300.0, 0.05), (1e4, 4.0), (-1e4, 4.0)]


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@EVERY_DIVERGENCE
def test_offset_of_one_side(device: str, divergence: Divergence, offset: tuple[float, float]) -> None:
    """Softmax ignores it. The loss is as exact as the sum of logit and offset."""
    student, teacher = make_pair(4, 1000, distance=offset[1], device=device)
    compare(student + offset[0], teacher, divergence, 1e-3)
    compare(student, teacher + offset[0], divergence, 1e-3)


@pytest.mark.parametrize("scale", [(0.5, None), (None, 0.3)], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e6, 1e9])
@EVERY_DIVERGENCE
def test_scale_of_one_side_of_large_logits(
    device: str, divergence: Divergence, size: float, scale: tuple[float | None, float | None]
) -> None:
    """(t - s) / T rounds in units of the largest logit if the maxima are not subtracted first."""
    student, teacher = make_pair(4, 50, device=device)
    student[:, 3] += size
    teacher[:, 3] += size
    student[1:, 5] = student[1:, 3] - torch.tensor([3.0, 9.0, 15.0], device=device)
    ours, exact = both(student, teacher, **divergence.options, logit_scale=scale, reduction="none")
    assert_promised_loss(ours, exact, divergence)
    assert_rows(ours, exact, 1e-4, floor=1e-17)
    if divergence.name in ("forward_kl", "reverse_kl"):
        assert torch.equal(getattr(token_stats(student, teacher, logit_scale=scale), divergence.name), ours.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e6, 1e9, 1e18, 1e30])
@EVERY_DIVERGENCE
def test_one_hot_teacher(device: str, divergence: Divergence, size: float, dtype: torch.dtype) -> None:
    """A teacher with one huge logit; a student with one very negative logit in every column, which is uniform."""
    student, teacher = make_pair(3, 50, dtype=dtype, device=device)
    teacher[0, 7], student[1], teacher[2] = size, -size, 0.0
    teacher[2, student[2].argmax()] = size
    ours, exact = both_unreduced(student, teacher, divergence)
    finite = exact.loss < size / 10  # the other losses would be infinite for an infinite logit
    torch.testing.assert_close(ours.loss.double()[finite], exact.loss[finite], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(ours.loss.double()[~finite], exact.loss[~finite], rtol=1e-2, atol=0.0)
    errors = row_errors(ours.grad_student, exact.grad_student)[finite]
    assert (errors <= (4e-3 if dtype == torch.bfloat16 else 1e-4)).all(), f"{errors.max():.1e}"


def test_maxima_further_apart_than_float32_reaches(device: str) -> None:
    for student, teacher in (([2e38], [-2e38]), ([-3e38, -3e38], [3e38, 3e38])):
        result = run(distillation_loss, torch.tensor([student], device=device), torch.tensor([teacher], device=device))
        assert not any(x.any() for x in (result.loss, *result.gradients))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES, ids=str)
def test_zero_probability_at_the_argmax_of_the_other_side(device: str, divergence: Divergence, side: str) -> None:
    student, teacher = make_pair(3, 300, device=device, distance=0.5)
    full, empty = (student, teacher) if side == "teacher" else (teacher, student)
    full[1, 7], empty[1, 7] = 9.0, -torch.inf
    ours, exact = both_unreduced(student, teacher, divergence)
    assert torch.equal(ours.loss.isinf(), exact.loss.isinf())
    # Total variation has a gradient of 0 on the empty side.
    assert_rows(ours, exact, 1e-4, floor=1e-15, rows=exact.loss.isfinite())


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("skew", [1e-4, 1e-6, 1e-8, 1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_tiny_skew(device: str, name: str, skew: float) -> None:
    """Around q = skew · p (or p = skew · q) both terms of the mixture count."""
    student, teacher = make_pair(100, 5, device=device, distance=1.4)
    depth = math.log(skew) + torch.linspace(-3, 3, 100, device=device)
    (student if name == "skew_forward_kl" else teacher)[:, 0] = depth
    assert_rows(*both_unreduced(student, teacher, Divergence(name, skew)), 1e-4)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_near_their_ends(device: str, name: str) -> None:
    """The promises hold from 0.001 to 0.999; closer to an end nothing breaks."""
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
            assert all(value.isfinite().all() for value in (result.loss, *result.gradients)) and result.loss >= 0


# ---------------------------------------------------------------- exactly 0


def assert_zero(result: Result) -> None:
    assert result.loss == 0 and not result.loss.signbit() and not any(g.any() for g in result.gradients)


@pytest.mark.parametrize("shape", [(7, 1), (3, 33), (2, 4100), (1, REAL)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES, ids=str)
def test_identical_rows(device: str, divergence: Divergence, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Of one dtype, and of a dtype and a wider one."""
    _, student = make_pair(*shape, dtype=dtype, spread=3.0, device=device)
    student[..., ::7] = -torch.inf if shape[-1] > 1 else 1.0
    for teacher_dtype in (dtype, torch.float32, torch.float64) if dtype.itemsize == 2 else (dtype,):
        for temperature in (1.0, 0.7):
            teacher = student.to(teacher_dtype, copy=True)
            assert_zero(run(distillation_loss, student, teacher, **divergence.options, temperature=temperature))


@EVERY_DIVERGENCE
def test_never_negative(device: str, divergence: Divergence) -> None:
    """Rows that differ in their last bits, by a constant, or in one column."""
    _, teacher = make_pair(200, 300, spread=3.0, device=device)
    last_bits = torch.nextafter(teacher, torch.where(torch.rand_like(teacher) < 0.5, -torch.inf, torch.inf))
    one_column = teacher.clone()
    one_column[:, 5] += torch.logspace(-8, 1, 200, device=device)
    for student in (last_bits, teacher + 3.3, teacher + 1e-4 * torch.randn_like(teacher), one_column):
        loss = distillation_loss(student, teacher, **divergence.options, temperature=0.9, reduction="none")
        assert (loss >= 0).all()


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
from cases import DIVERGENCES, DTYPES, FORWARD_KL, make_pair, run
from oracle import check
from kldiv_ext import _C, distillation_loss, info, kl_div, reference
assert info.collect()["isa"] == _C.cpu_isa
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
    ours = run(kl_div, log_q, target, **options)
    exact = run(reference.kl_div, log_q.double(), target.double(), **options)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=0)
    for value, expected in zip(ours.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.parametrize("wanted", ["portable", "avx2", "avx512"])
def test_instruction_set(wanted: str) -> None:
    """KLDIV_EXT_CPU_ISA is an upper bound: the best instruction set of the machine up to it is used."""
    order = ["portable", "avx2", "avx512"]
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    used = run_python("-c", ON_ONE_ISA, KLDIV_EXT_CPU_ISA=wanted).split()
    assert used == [order[min(order.index(wanted), order.index(best))]]


# ---------------------------------------------------------------- the same bits


# Threads share out few long rows by chunks, many rows by the row.
@pytest.mark.parametrize("shape", [(2, 50257), (1, 130000), (64, 3000), (5000, 40)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_runs_and_threads(divergence: Divergence, dtype: torch.dtype, reduction: str, shape: tuple[int, int]) -> None:
    student, teacher = make_pair(*shape, dtype=dtype)
    weight = torch.rand(shape[0])
    options = {**divergence.options, "weight": weight, "reduction": reduction}
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8, 2, 1):
            torch.set_num_threads(count)
            results.append(run(distillation_loss, student, teacher, **options))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("columns", [40, 3000, 50257])
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_batch_composition(device: str, divergence: Divergence, columns: int) -> None:
    """A row alone, in a small batch and in a large one, beside a row of NaN."""
    student, teacher = make_pair(20, columns, device=device)
    whole = run(distillation_loss, student, teacher, **divergence.options, reduction="none")
    student[12] = torch.nan
    for rows in (slice(7, 8), slice(5, 9), slice(7, 13)):
        part = run(distillation_loss, student[rows], teacher[rows], **divergence.options, reduction="none")
        i = 7 - rows.start
        assert_equal([part.loss[i], *(g[i] for g in part.gradients)], [whole.loss[7], *(g[7] for g in whole.gradients)])


@pytest.mark.parametrize("columns", [50, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_addresses_and_strides(device: str, divergence: Divergence, dtype: torch.dtype, columns: int) -> None:
    student, teacher = make_pair(6, columns, dtype=dtype, device=device)
    expected = run(distillation_loss, student, teacher, **divergence.options)
    for offset in (0, 1, 3, 8):
        storage = torch.empty(6 * columns + offset, dtype=dtype, device=device)
        moved = storage[offset:].view(6, columns).copy_(student)
        assert_equal(run(distillation_loss, moved, teacher, **divergence.options), expected)
        assert_equal(run(distillation_loss, student, teacher + 0 * moved, **divergence.options), expected)
    for layout in LAYOUTS.values():
        assert_equal(run(distillation_loss, student, layout(teacher), **divergence.options), expected)


def test_reductions_agree(device: str) -> None:
    """The sum is that of the unreduced losses; gradients made in forward and in backward differ only by rounding."""
    student, teacher = make_pair(8, 3000, device=device)
    each = run(distillation_loss, student, teacher, **JSD.options, reduction="none")
    total = run(distillation_loss, student, teacher, **JSD.options, reduction="sum")
    assert total.loss == each.loss.double().sum().float()
    for value, expected in zip(total.gradients, each.gradients, strict=True):
        assert_gradients_close(value, expected)
