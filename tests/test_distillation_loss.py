"""distillation_loss against the float64 reference: options, shapes, strides, dtypes, infinities, NaN."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ALL_DIVERGENCES,
    BOTH_PATHS,
    DIVERGENCES,
    DTYPES,
    JSD,
    LAYOUTS,
    OPTION_MIXES,
    POSITIONS,
    REDUCTIONS,
    Divergence,
    Mix,
    Result,
    make_pair,
    named,
    position_tensors,
    run,
)
from oracle import assert_equal, assert_gradients_close, assert_losses_close, check, loss_scale, row_errors
from torch import Tensor

from kldiv_ext import distillation_loss, reference

INF, NAN = math.inf, math.nan
COLUMNS = 70

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


@pytest.mark.parametrize("positions", named({"all": Mix({}), **POSITIONS}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)  # fp16: gradient in backward
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_positions_and_reductions(device: str, divergence: Divergence, dtype: torch.dtype, positions: Mix) -> None:
    arguments = {**positions.arguments(3, 8, columns=COLUMNS, device=device), **divergence.options}
    student, teacher = make_pair(3, 8, COLUMNS, dtype=dtype, device=device)
    for reduction in ("mean",) if "num_items" in arguments else REDUCTIONS:
        grad_output = torch.randn(3, 8, device=device) if reduction == "none" else 1.0
        result = check(student, teacher, **arguments, reduction=reduction, grad_output=grad_output)
        assert result.grad_student.any()


@pytest.mark.parametrize("num_items", [37, 0, torch.tensor(37), torch.tensor(0), torch.tensor(37.5)], ids=str)
@pytest.mark.parametrize("names", [(), ("labels",), ("mask",), ("weight",), ("labels", "mask", "weight")], ids=str)
def test_num_items(device: str, names: tuple[str, ...], num_items: int | Tensor) -> None:
    student, teacher = make_pair(3, 8, COLUMNS, device=device)
    num_items = num_items.to(device) if isinstance(num_items, Tensor) else num_items
    check(student, teacher, **position_tensors(names, (3, 8), COLUMNS, device), num_items=num_items)


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
    """Ten leading dimensions with gaps: more than the kernels index."""
    check(*(logits[(slice(2),) * 10] for logits in make_pair(*(3,) * 10, 5, device=device)))


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    """The dtypes of student, teacher and weight are independent of each other."""
    student, teacher = make_pair(3, 4, 2100, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    for divergence in BOTH_PATHS:
        check(student, teacher, **divergence.options)
    for weight_dtype, reduction in itertools.product(DTYPES, ("mean", "sum")):
        check(student, teacher, weight=torch.rand(3, 4, device=device).to(weight_dtype), reduction=reduction)


# ---------------------------------------------------------------- hard labels, weights of 0, padding, scale, softcap


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
    student[0, 0], student[1, 1], student[2, 2], student[3, 3] = 60.0, -60.0, -INF, 200.0
    teacher[2, 2] = -INF
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


def test_a_part_of_weight_0_is_0(device: str) -> None:
    """0 times an infinite divergence, or times an infinite cross entropy, is 0."""
    student, teacher = make_pair(2, COLUMNS, device=device)
    student[0, 3] = -INF  # forward KL and the cross entropy of label 3 are infinite
    labels = torch.tensor([3, 4], device=device)
    assert check(student, teacher, labels, reduction="none").loss.isinf().tolist() == [True, False]
    labels[0] = 5
    hard = check(student, teacher, labels, soft_weight=0.0, hard_weight=0.5, reduction="none")
    assert hard.loss.isfinite().all() and hard.grad_student.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_any_weight_nothing_is_read(device: str, reduction: str) -> None:
    """Kernels, composites under torch.func and the reference give 0 for NaN logits."""
    student, teacher = torch.full((2, 5), NAN, device=device), torch.full((2, 5), INF, device=device)

    def loss(student: Tensor, teacher: Tensor, function: Callable[..., Tensor] = distillation_loss) -> Tensor:
        return function(student, teacher, soft_weight=0.0, logit_softcap=(1.0, None), reduction=reduction).sum()

    results = [run(loss, student, teacher, function) for function in (distillation_loss, reference.distillation_loss)]
    assert not any(result.loss.any() for result in results)
    for gradients in (torch.func.grad(loss, (0, 1))(student, teacher), *(result.gradients for result in results)):
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
@pytest.mark.parametrize("valid", [1, 37, 64, 2050])
def test_padding(device: str, divergence: Divergence, dtype: torch.dtype, valid: int) -> None:
    """Results have the bits of sliced logits. Padding is never read, its gradient is 0, its size may differ."""
    student, teacher = make_pair(5, 3000, dtype=dtype, device=device)
    teacher = teacher[:, :2500].contiguous()
    student[:, valid:], teacher[:, valid:] = NAN, INF
    labels = torch.tensor([0, valid - 1, -100, valid // 2, 0], device=device)
    for reduction in ("mean", "none"):
        options = {**divergence.options, "hard_weight": 0.5, "reduction": reduction}
        ours = run(distillation_loss, student, teacher, labels, valid_vocab=valid, **options)
        sliced = run(distillation_loss, student[:, :valid], teacher[:, :valid], labels, **options)
        assert ours.grad_student.shape == student.shape and ours.grad_teacher.shape == teacher.shape
        assert_equal((ours.loss, [g[:, :valid] for g in ours.gradients]), (sliced.loss, list(sliced.gradients)))
        assert not any(gradient[:, valid:].any() for gradient in ours.gradients)


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
    student[0, 1], teacher[1, 1], student[2, 2], student[3, 3] = -INF, -INF, INF, NAN
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


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_identical_rows(device: str, divergence: Divergence, softcap: float | None) -> None:
    """Loss and gradients are exactly 0, for equal tensors and for one tensor on both sides."""
    _, teacher = make_pair(4, 8000, spread=6.0, device=device)
    loss = functools.partial(distillation_loss, logit_softcap=softcap, **divergence.options)
    for result in (run(loss, teacher, teacher.clone()), run(lambda x: loss(x, x), teacher)):
        assert result.loss == 0 and not any(gradient.any() for gradient in result.gradients)


# ---------------------------------------------------------------- positions that do not count


def excluding(dead: Tensor) -> dict[str, dict[str, Any]]:
    """The ways to exclude positions; where ignore_index is another label, -100 is an ordinary one."""
    return {
        "labels": {"labels": torch.where(dead, -100, 1)},
        "ignore_index": {"labels": torch.where(dead, 7, -100), "ignore_index": 7},
        "mask": {"mask": ~dead},
        "weight": {"weight": (~dead).float()},
        "num_items": {"num_items": 0},
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("by", ["labels", "ignore_index", "mask", "weight"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_ignored_positions_are_not_read(device: str, divergence: Divergence, by: str, reduction: str) -> None:
    student, teacher = make_pair(4, 50, device=device)
    dead = torch.tensor([False, True, False, True], device=device)
    options = {**excluding(dead)[by], **divergence.options, "reduction": reduction}
    expected = check(student, teacher, **options)
    student[dead], teacher[dead] = NAN, INF
    result = run(distillation_loss, student, teacher, **options)
    assert_equal(result, expected)
    for gradient in result.gradients:
        assert torch.equal(gradient.any(-1), ~dead)


@pytest.mark.parametrize("by", ["labels", "mask", "weight", "num_items"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_position_counts(device: str, dtype: torch.dtype, by: str) -> None:
    """The loss is 0 and differentiable, the gradients are 0."""
    student, teacher = make_pair(4, 50, dtype=dtype, device=device)
    student[0], teacher[1] = NAN, NAN
    options = excluding(torch.ones(4, dtype=torch.bool, device=device))[by]
    for reduction in ("mean",) if by == "num_items" else REDUCTIONS:
        result = run(distillation_loss, student, teacher, **options, reduction=reduction)
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


# ---------------------------------------------------------------- columns of probability 0, rows that are NaN

# The divergences that are infinite where q = 0 < p, and where p = 0 < q.
INFINITE = (
    ("forward_kl", "jeffreys", "jsd-0", "skew_forward_kl-0", "alpha-1"),
    ("reverse_kl", "jeffreys", "jsd-1", "skew_reverse_kl-0", "alpha-0"),
)


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
    infinite = str(divergence) in INFINITE[side]
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


def only_row_is_nan(row: int, result: Result) -> bool:
    """Whether the loss and the gradients are NaN in every column of that row and in no other row."""
    expected = torch.arange(len(result.loss), device=result.loss.device) == row
    everywhere = [result.loss.isnan(), *(gradient.isnan().all(-1) for gradient in result.gradients)]
    anywhere = [gradient.isnan().any(-1) for gradient in result.gradients]
    return all(torch.equal(found, expected) for found in (*everywhere, *anywhere))


# {case: values of the row, by column}
BROKEN_ROWS: dict[str, dict[Any, float]] = {
    "nan": {3: NAN},
    "nan in the tail": {69: NAN},
    "+inf": {3: INF},
    "all -inf": {...: -INF},
    "nan among -inf": {...: -INF, 3: NAN},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", [[0], [1], [0, 1]], ids=["student", "teacher", "both"])
@pytest.mark.parametrize("damage", BROKEN_ROWS)
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES, ids=str)
def test_broken_rows(device: str, divergence: Divergence, damage: str, sides: list[int], dtype: torch.dtype) -> None:
    """The broken row is NaN; the others keep their bits."""
    both = make_pair(3, 70, dtype=dtype, device=device)
    clean = run(distillation_loss, *both, **divergence.options, reduction="none")
    for side, (column, value) in itertools.product(sides, BROKEN_ROWS[damage].items()):
        both[side][1, column] = value
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
