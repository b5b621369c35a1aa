"""distillation_loss against the float64 reference: divergences, options, shapes, strides and dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ALL_DIVERGENCES,
    BOTH_PATHS,
    DTYPES,
    JSD,
    LAYOUTS,
    OPTION_MIXES,
    POSITIONS,
    REDUCTIONS,
    Divergence,
    Mix,
    make_pair,
    named,
    position_tensors,
    run,
)
from oracle import assert_equal, assert_gradients_close, assert_losses_close, check, loss_scale, row_errors
from torch import Tensor

from kldiv_ext import distillation_loss, reference

COLUMNS = 70

# ---------------------------------------------------------------- options


TWO_DTYPES = ((torch.bfloat16, torch.float32), (torch.float32, torch.float64))


@pytest.mark.parametrize("dtypes", [*((dtype, dtype) for dtype in DTYPES), *TWO_DTYPES], ids=str)
@pytest.mark.parametrize("mix", named({"defaults": Mix({}), **OPTION_MIXES}))
def test_options(device: str, mix: Mix, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Every mix with every divergence, every reduction, and every choice of gradients; two dtypes with two strides."""
    student, teacher = make_pair(3, 4, COLUMNS, dtype=dtypes[0], teacher_dtype=dtypes[1], spread=2.0, device=device)
    if dtypes in TWO_DTYPES:
        student, teacher = LAYOUTS["vocabulary first"](student), LAYOUTS["columns cut"](teacher)
    arguments = mix.arguments(3, 4, columns=COLUMNS, device=device)
    for divergence in ALL_DIVERGENCES:
        check(student, teacher, **arguments, **divergence.options)
    for divergence, reduction in itertools.product(BOTH_PATHS, REDUCTIONS):
        options = {**arguments, **divergence.options, "reduction": reduction}
        grad_output = torch.randn(3, 4, device=device) if reduction == "none" else 1.0
        for needs_grad in itertools.product((True, False), repeat=2):
            check(student, teacher, **options, grad_output=grad_output, needs_grad=needs_grad)


@pytest.mark.parametrize("mix", named(OPTION_MIXES))
@pytest.mark.parametrize("columns", [2100, 5000])
def test_options_over_many_columns(device: str, columns: int, mix: Mix) -> None:
    """Several chunks on the CPU, the last one partly padding; few rows, so that threads share a row."""
    student, teacher = make_pair(3, columns, dtype=torch.bfloat16, spread=2.0, device=device)
    arguments = {**mix.options, "labels": torch.tensor([0, columns - 10, 2049], device=device)}
    if "valid_vocab" in arguments:
        arguments["valid_vocab"] = columns - 9
    for divergence in BOTH_PATHS:
        check(student, teacher, **divergence.options, **arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("positions", named({"all": Mix({}), **POSITIONS}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)  # fp16: gradient in backward
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_positions_and_reductions(
    device: str, divergence: Divergence, dtype: torch.dtype, positions: Mix, reduction: str
) -> None:
    arguments = positions.arguments(3, 8, columns=COLUMNS, device=device)
    if "num_items" in arguments and reduction != "mean":
        pytest.skip("num_items is an error without the mean: test_checks.py")
    student, teacher = make_pair(3, 8, COLUMNS, dtype=dtype, device=device)
    grad_output = torch.randn(3, 8, device=device) if reduction == "none" else 1.0
    result = check(student, teacher, **arguments, **divergence.options, reduction=reduction, grad_output=grad_output)
    assert result.grad_student.any()


@pytest.mark.parametrize("num_items", [37, 0, torch.tensor(37), torch.tensor(0), torch.tensor(37.5)], ids=str)
@pytest.mark.parametrize("names", [(), ("labels",), ("mask",), ("weight",), ("labels", "mask", "weight")], ids=str)
def test_num_items(device: str, names: tuple[str, ...], num_items: int | Tensor) -> None:
    student, teacher = make_pair(3, 8, COLUMNS, device=device)
    num_items = num_items.to(device) if isinstance(num_items, Tensor) else num_items
    check(student, teacher, **position_tensors(names, (3, 8), COLUMNS, device), num_items=num_items)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weight_of_another_dtype(device: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    student, teacher = make_pair(3, 8, COLUMNS, dtype=dtype, device=device)
    weight = torch.rand(3, 8, device=device).to(weight_dtype)
    for reduction in ("mean", "sum"):
        check(student, teacher, weight=weight, reduction=reduction)


# ---------------------------------------------------------------- shapes, strides, dtypes

SHAPES = [
    (40,),
    (2, 3, 40),
    (2, 3, 2, 40),
    (1, 2, 1, 2, 1, 1, 2, 1, 1, 2, 5),
    (0, 40),
    (3, 0, 40),
    (1000, 9),
    # Vocabularies around a vector of AVX-512, around four of them, around a CPU chunk, and of five chunks.
    *((3, columns) for columns in (1, 2, 15, 16, 17, 31, 33, 63, 65, 2047, 2048, 2049, 4101, 8200)),
    (2, 50257),  # GPT-2: odd, so that rows start at odd addresses
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_shape(device: str, divergence: Divergence, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher = make_pair(*shape, dtype=dtype, device=device)
    for reduction in ("none", "mean", "batchmean"):
        check(student, teacher, **divergence.options, reduction=reduction)


STRIDES = {**LAYOUTS, "expanded": lambda x: x[:1].expand(x.shape)}


@pytest.mark.parametrize("teacher_layout", named(STRIDES))
@pytest.mark.parametrize("student_layout", named(STRIDES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(device: str, dtype: torch.dtype, student_layout: Any, teacher_layout: Any) -> None:
    student, teacher = make_pair(3, 4, COLUMNS, dtype=dtype, device=device)
    for reduction in ("mean", "none"):
        check(student_layout(student), teacher_layout(teacher), **JSD.options, reduction=reduction)


def test_many_dimensions_that_do_not_collapse(device: str) -> None:
    """Ten leading dimensions, each padded: more than the kernels index."""
    both = []
    for logits in make_pair(*(2,) * 10, 5, device=device):
        both.append(torch.full((3,) * 10 + (5,), torch.nan, device=device)[(slice(2),) * 10])
        both[-1].copy_(logits)
    check(*both)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = make_pair(3, 4, 2100, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    for divergence in BOTH_PATHS:
        check(student, teacher, **divergence.options)


# ---------------------------------------------------------------- hard labels


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_labels_are_cross_entropy(device: str, dtype: torch.dtype, reduction: str) -> None:
    """Loss and gradient are those of F.cross_entropy of the logits in float64."""
    student, teacher = make_pair(9, COLUMNS, dtype=dtype, spread=3.0, device=device)
    labels = position_tensors(("labels",), (9,), COLUMNS, device)["labels"]
    options = {"soft_weight": 0.0, "hard_weight": 1.0, "temperature": 4.0}
    scale = loss_scale(dtype)
    ours = run(distillation_loss, student, teacher, labels, grad_output=scale, reduction=reduction, **options)
    exact = run(F.cross_entropy, student.double(), labels, grad_output=scale, reduction=reduction)
    assert_losses_close(ours.loss, exact.loss)
    assert (row_errors(ours.grad_student, exact.grad_student) <= 4e-3).all()
    assert not ours.grad_teacher.any()


def test_hard_labels_at_the_ends(device: str) -> None:
    """The label is almost certain, almost impossible, impossible, certain."""
    student, teacher = make_pair(4, COLUMNS, device=device)
    student[0, 0], student[1, 1], student[2, 2], student[3, 3] = 60.0, -60.0, -torch.inf, 200.0
    teacher[2, 2] = -torch.inf
    result = check(student, teacher, torch.arange(4, device=device), hard_weight=0.5, reduction="none")
    assert result.loss.isinf().tolist() == [False, False, True, False]
    assert result.grad_student.isfinite().all()


def test_labels_out_of_range_under_the_compiler() -> None:
    """Compiled code cannot raise: the row is NaN, the others are not."""
    student, teacher = make_pair(4, COLUMNS)
    function = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True)
    result = run(function, student, teacher, torch.tensor([1, 70, -1, 3]), hard_weight=0.5, reduction="none")
    broken = [False, True, True, False]
    assert result.loss.isnan().tolist() == broken
    assert result.grad_student.isnan().all(-1).tolist() == result.grad_student.isnan().any(-1).tolist() == broken


# ---------------------------------------------------------------- weights of 0


def test_a_part_of_weight_0_is_0(device: str) -> None:
    """0 times an infinite divergence, or times an infinite cross entropy, is 0."""
    student, teacher = make_pair(2, COLUMNS, device=device)
    student[0, 3] = -torch.inf  # forward KL and the cross entropy of label 3 are infinite
    labels = torch.tensor([3, 4], device=device)
    assert check(student, teacher, labels, reduction="none").loss.isinf().tolist() == [True, False]
    labels[0] = 5
    hard = check(student, teacher, labels, soft_weight=0.0, hard_weight=0.5, reduction="none")
    assert hard.loss.isfinite().all() and hard.grad_student.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_any_weight_nothing_is_read(device: str, reduction: str) -> None:
    """Kernels, composites under torch.func and the reference give 0 for NaN logits."""
    student, teacher = torch.full((2, 5), torch.nan, device=device), torch.full((2, 5), torch.inf, device=device)

    def loss(student: Tensor, teacher: Tensor, function: Callable[..., Tensor] = distillation_loss) -> Tensor:
        return function(student, teacher, soft_weight=0.0, logit_softcap=(1.0, None), reduction=reduction).sum()

    results = [run(loss, student, teacher, function) for function in (distillation_loss, reference.distillation_loss)]
    assert not any(result.loss.any() for result in results)
    for gradients in (torch.func.grad(loss, (0, 1))(student, teacher), *(result.gradients for result in results)):
        assert not any(gradient.any() for gradient in gradients)


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
@pytest.mark.parametrize("valid", [1, 37, 64, 2050])
def test_padding(device: str, divergence: Divergence, dtype: torch.dtype, valid: int) -> None:
    """Results have the bits of sliced logits. Padding is never read, its gradient is 0, its size may differ."""
    student, teacher = make_pair(5, 3000, dtype=dtype, device=device)
    teacher = teacher[:, :2500].contiguous()
    student[:, valid:], teacher[:, valid:] = torch.nan, torch.inf
    labels = torch.tensor([0, valid - 1, -100, valid // 2, 0], device=device)
    for reduction in ("mean", "none"):
        options = {**divergence.options, "hard_weight": 0.5, "reduction": reduction}
        ours = run(distillation_loss, student, teacher, labels, valid_vocab=valid, **options)
        sliced = run(distillation_loss, student[:, :valid], teacher[:, :valid], labels, **options)
        assert ours.grad_student.shape == student.shape and ours.grad_teacher.shape == teacher.shape
        assert_equal((ours.loss, [g[:, :valid] for g in ours.gradients]), (sliced.loss, list(sliced.gradients)))
        assert not any(gradient[:, valid:].any() for gradient in ours.gradients)


# ---------------------------------------------------------------- softcap and scale


def test_common_scale_is_a_temperature(device: str) -> None:
    """The same bits: the scale rounds no logit."""
    for dtype, divergence in itertools.product(DTYPES, BOTH_PATHS):
        student, teacher = make_pair(5, COLUMNS, dtype=dtype, distance=1e-2, device=device)
        scaled = run(distillation_loss, student, teacher, logit_scale=0.25, **divergence.options)
        assert_equal(scaled, run(distillation_loss, student, teacher, temperature=4.0, **divergence.options))


@pytest.mark.parametrize("size", [0.1, 3.0, 8.0, 20.0, 80.0])
def test_gradients_where_the_softcap_is_flat(device: str, size: float) -> None:
    """The derivative of a softcap of 2 is right also where the capped logits are equal; logits up to some `size`."""
    student, teacher = make_pair(4, COLUMNS, spread=size, distance=size, device=device)
    labels = torch.arange(4, device=device)
    for divergence in BOTH_PATHS:
        options = {**divergence.options, "logit_softcap": 2.0, "hard_weight": 0.5, "reduction": "sum"}
        ours = run(distillation_loss, student, teacher, labels, **options)
        exact = run(reference.distillation_loss, student.double(), teacher.double(), labels, **options)
        for gradient, expected in zip(ours.gradients, exact.gradients, strict=True):
            # Element by element, down to what float32 holds.
            largest = expected.abs().max()
            torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=4e-7 * largest.item())
            if size == 20.0:
                tiny = expected.abs() < 1e-4 * largest
                assert tiny.any()
                tiny &= expected.abs() > 1e-30
                assert (gradient.double()[tiny] / expected[tiny] - 1).abs().median() < 1e-4


def test_softcap_of_infinities(device: str) -> None:
    """-inf becomes -cap and +inf becomes cap, both finite with a gradient of 0. NaN stays."""
    student, teacher = make_pair(4, COLUMNS, device=device)
    student[0, 1], teacher[1, 1], student[2, 2], student[3, 3] = -torch.inf, -torch.inf, torch.inf, torch.nan
    result = check(student, teacher, logit_softcap=5.0, reduction="none")
    assert result.loss.isnan().tolist() == [False, False, False, True]
    assert result.grad_student[0, 1] == 0 and result.grad_student[2, 2] == 0 and result.grad_teacher[1, 1] == 0


@pytest.mark.parametrize("options", [{"logit_softcap": 30.0}, {"logit_scale": (0.5, 1.0)}], ids=str)
def test_close_rows_with_rounded_logits(device: str, options: dict[str, Any]) -> None:
    """Close rows keep the promise for bfloat16, and the one for losses near 0."""
    student, teacher = make_pair(4, 8000, spread=6.0, distance=1e-2, dtype=torch.bfloat16, device=device)
    if "logit_scale" in options:
        student = student * 2
    for divergence in BOTH_PATHS:
        ours = run(distillation_loss, student, teacher, **options, **divergence.options)
        exact = run(reference.distillation_loss, student.double(), teacher.double(), **options, **divergence.options)
        assert abs(ours.loss / exact.loss - 1) <= 1e-4
        for gradient, expected in zip(ours.gradients, exact.gradients, strict=True):
            assert_gradients_close(gradient, expected)


def test_identical_rows_with_softcap(device: str) -> None:
    _, teacher = make_pair(4, 8000, spread=6.0, device=device)
    for divergence in BOTH_PATHS:
        same = run(distillation_loss, teacher, teacher.clone(), logit_softcap=5.0, **divergence.options)
        assert same.loss == 0 and not any(gradient.any() for gradient in same.gradients)
