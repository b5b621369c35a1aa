"""distillation_loss's options on logits and labels: hard labels, padding, softcap, scale, gradients in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DIVERGENCES,
    DTYPES,
    ENDPOINTS,
    FORWARD_KL,
    JSD,
    Divergence,
    assert_gradients_close,
    assert_losses_close,
    check,
    loss_scale,
    make_pair,
    row_errors,
    run,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kldiv_ext import distillation_loss, reference

COLUMNS = 70


def labels_for(device: str, *shape: int, classes: int = COLUMNS, seed: int = 3) -> Tensor:
    """Some are ignored; the first and the last column are among the others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator)
    labels.view(-1)[:3] = torch.tensor([0, classes - 1, -100])
    return labels.to(device)


OPTIONS: dict[str, dict[str, Any]] = {
    "hard labels": {"hard_weight": 0.7},
    "hard labels, temperature": {
        "hard_weight": 0.7,
        "soft_weight": 0.3,
        "temperature": 2.0,
        "scale_by_temperature_squared": True,
    },
    "hard labels alone": {"hard_weight": 1.0, "soft_weight": 0.0, "temperature": 3.0},
    "soft part alone": {"soft_weight": 2.5},
    "nothing": {"soft_weight": 0.0},
    "negative": {"hard_weight": -0.5, "soft_weight": 2.0},
    "softcap": {"logit_softcap": 3.0},
    "softcap of the student": {"logit_softcap": (2.0, None), "temperature": 0.7},
    "softcap of both, hard labels": {"logit_softcap": [5.0, 2.0], "hard_weight": 0.5, "temperature": 2},
    "scale": {"logit_scale": 0.3, "hard_weight": 0.5, "temperature": 1.7},
    "scale of each": {"logit_scale": (1.2, 0.7), "hard_weight": 0.5},
    "scale of the teacher, softcap": {"logit_scale": (None, 2), "logit_softcap": 4},
    "padding": {"valid_vocab": 61},
    "everything": {
        "hard_weight": 0.2,
        "soft_weight": 0.9,
        "temperature": 1.5,
        "scale_by_temperature_squared": True,
        "valid_vocab": 61,
        "logit_softcap": (None, 3.0),
        "logit_scale": (0.5, 1.5),
    },
}


def arguments(option: str, device: str, *shape: int) -> dict[str, Any]:
    return {
        "labels": labels_for(device, *shape, classes=OPTIONS[option].get("valid_vocab", COLUMNS)),
        **OPTIONS[option],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(device: str, option: str, dtype: torch.dtype) -> None:
    """With every divergence, reduced and not."""
    student, teacher = make_pair(3, 4, COLUMNS, dtype=dtype, spread=2.0, device=device)
    for divergence in [*DIVERGENCES, *ENDPOINTS]:
        check(student, teacher, **arguments(option, device, 3, 4), **divergence.options)
    for divergence, wanted in itertools.product((FORWARD_KL, JSD), ((True, False), (False, True), (True, True))):
        check(
            student,
            teacher,
            **arguments(option, device, 3, 4),
            **divergence.options,
            reduction="none",
            grad_output=torch.randn(3, 4, device=device),
            wanted=wanted,
        )


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_option_with_two_dtypes_and_strides(device: str, option: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = make_pair(COLUMNS, 12, dtype=dtypes[0], teacher_dtype=dtypes[1], device=device)
    for divergence in (FORWARD_KL, JSD):
        check(student.t(), teacher.t(), **arguments(option, device, 12), **divergence.options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("columns", [2100, 5000])
def test_option_over_many_columns(device: str, option: str, columns: int) -> None:
    """Several chunks on the CPU, the last one partly padding; few rows, so that threads share one."""
    student, teacher = make_pair(3, columns, dtype=torch.bfloat16, spread=2.0, device=device)
    options = {**OPTIONS[option], "labels": torch.tensor([0, columns - 10, 2049], device=device)}
    if "valid_vocab" in options:
        options["valid_vocab"] = columns - 9
    for divergence in (FORWARD_KL, JSD):
        check(student, teacher, **divergence.options, **options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
def test_gradcheck(device: str, divergence: Divergence, option: str) -> None:
    student, teacher = (
        x.requires_grad_() for x in make_pair(4, COLUMNS, dtype=torch.float64, device=device, distance=0.5)
    )
    options = {**arguments(option, device, 4), **divergence.options, "reduction": "none"}
    function = lambda s, t: distillation_loss(s, t, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, (student, teacher), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (student, teacher), fast_mode=True)


# ---------------------------------------------------------------- hard labels


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_labels_are_cross_entropy(device: str, dtype: torch.dtype, reduction: str) -> None:
    """F.cross_entropy itself, of the logits in float64, for the loss and for the gradient."""
    student, teacher = make_pair(9, COLUMNS, dtype=dtype, spread=3.0, device=device)
    labels = labels_for(device, 9)
    options = {"soft_weight": 0.0, "hard_weight": 1.0, "reduction": reduction, "temperature": 4.0}
    grad_output = loss_scale(dtype)
    ours = run(distillation_loss, student, teacher, labels, grad_output=grad_output, **options)
    leaf = student.double().requires_grad_()
    expected = F.cross_entropy(leaf, labels, reduction=reduction)
    expected.backward(torch.full_like(expected, grad_output))
    assert_losses_close(ours.loss, expected.detach())
    assert ours.grad_student is not None and ours.grad_teacher is not None
    assert (row_errors(ours.grad_student, leaf.grad) <= 4e-3).all()
    assert not ours.grad_teacher.any()


def test_two_parts_are_two_losses(device: str) -> None:
    student, teacher = make_pair(3, 4, COLUMNS, dtype=torch.float64, device=device)
    labels = labels_for(device, 3, 4)
    both = run(distillation_loss, student, teacher, labels, soft_weight=0.3, hard_weight=0.7, temperature=2.0)
    soft = run(distillation_loss, student, teacher, labels, temperature=2.0)
    hard = run(distillation_loss, student, teacher, labels, soft_weight=0.0, hard_weight=1.0)
    for value, a, b in zip(both, soft, hard, strict=True):
        torch.testing.assert_close(value, 0.3 * a + 0.7 * b)


def test_hard_labels_count_with_masks_and_weights(device: str) -> None:
    student, teacher = make_pair(6, COLUMNS, device=device)
    labels = torch.tensor([1, -100, 3, 10**9, 5, 69], device=device)  # one out of range, where nothing counts
    mask = torch.tensor([True, True, True, False, True, True], device=device)
    weight = torch.tensor([0.5, 1.0, 0.0, 1.0, 2.0, 1.0], device=device)
    for reduction in ("none", "sum", "mean", "batchmean"):
        check(student, teacher, labels, hard_weight=0.5, mask=mask, weight=weight, reduction=reduction)
    check(student, teacher, labels, hard_weight=0.5, mask=mask, num_items=torch.tensor(11, device=device))


def test_hard_labels_at_the_ends(device: str) -> None:
    """A label that is all but certain, one that is all but impossible, and one that is impossible."""
    student, teacher = make_pair(4, COLUMNS, device=device)
    student[0, 0], student[1, 1], student[2, 2], student[3, 3] = 60.0, -60.0, -torch.inf, 200.0
    teacher[2, 2] = -torch.inf
    labels = torch.arange(4, device=device)
    result = check(student, teacher, labels, hard_weight=0.5, reduction="none")
    assert result.loss.isinf().tolist() == [False, False, True, False]
    assert result.grad_student is not None and result.grad_student.isfinite().all()


def test_a_part_without_weight_is_not_there(device: str) -> None:
    """0 times an infinite divergence, or times an infinite cross entropy, is 0."""
    student, teacher = make_pair(2, COLUMNS, device=device)
    student[0, 3] = -torch.inf  # forward KL and the cross entropy of label 3 are infinite
    labels = torch.tensor([3, 4], device=device)
    assert check(student, teacher, labels, reduction="none").loss.isinf().tolist() == [True, False]
    labels[0] = 5
    hard = check(student, teacher, labels, soft_weight=0.0, hard_weight=0.5, reduction="none")
    assert hard.loss.isfinite().all() and hard.grad_student is not None and hard.grad_student.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
def test_without_any_weight_nothing_is_read(device: str, reduction: str) -> None:
    """By the kernels, by what stands in for them under torch.func, and by the reference."""
    student, teacher = torch.full((2, 5), torch.nan, device=device), torch.full((2, 5), torch.inf, device=device)

    def loss(student: Tensor, teacher: Tensor, function: Callable[..., Tensor] = distillation_loss) -> Tensor:
        return function(student, teacher, soft_weight=0.0, logit_softcap=(1.0, None), reduction=reduction).sum()

    for gradients in (
        torch.func.grad(loss, (0, 1))(student, teacher),
        run(loss, student, teacher),
        run(loss, student, teacher, reference.distillation_loss),
    ):
        assert all(x is not None and not x.any() for x in gradients)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_infinite_factors_without_labels(device: str, bad: float) -> None:
    """0 times infinity is not a weight of the cross entropy: there are no labels to read."""
    student, teacher = make_pair(3, COLUMNS, device=device)
    first = torch.tensor([bad, 1, 1], device=device)
    for reduction in ("none", "sum"):
        by_weight = run(distillation_loss, student, teacher, weight=first, reduction=reduction)
        assert not by_weight.loss.isfinite().all()
        assert by_weight.grad_student is not None and by_weight.grad_student[1:].isfinite().all()
    late = run(distillation_loss, student, teacher, reduction="none", grad_output=first)
    assert late.loss.isfinite().all() and late.grad_student is not None
    assert not late.grad_student[0].isfinite().any() and late.grad_student[1:].isfinite().all()
    assert not run(distillation_loss, student, teacher, num_items=torch.tensor(bad, device=device)).loss.isinf()
    half = run(distillation_loss, student.half(), teacher.half(), grad_output=bad)  # made in backward too
    assert half.grad_student is not None and not half.grad_student.isfinite().any()


def test_root_of_a_loss(device: str) -> None:
    """A Jensen-Shannon distance is one; of equal rows its slope is infinite."""
    student, teacher = make_pair(2, COLUMNS, device=device)
    student[0] = teacher[0]
    leaf = student.clone().requires_grad_()
    distillation_loss(leaf, teacher, divergence="jsd", reduction="none").sqrt().sum().backward()
    assert leaf.grad is not None and leaf.grad[1].isfinite().all() and not leaf.grad[0].isfinite().any()


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_in_place_without_memory(mode: str) -> None:
    """Nothing is shared where there is nothing."""
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        student, teacher = torch.randn(2, 3, requires_grad=True) * 1, torch.randn(2, 3)
        distillation_loss(student, teacher, inplace_backward=True).backward()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_row_broken_on_one_side_is_broken_on_both(device: str, side: str) -> None:
    """Also where the divergence has no weight, or none of its own: it is not known that it would not have mattered."""
    student, teacher = make_pair(2, 5, device=device)
    (student if side == "student" else teacher)[0, 3] = torch.nan
    labels = torch.tensor([1, 2], device=device)
    for options in ({"soft_weight": 0.0, "hard_weight": 1.0}, {"divergence": "skew_reverse_kl", "skew": 1.0}):
        for function in (distillation_loss, reference.distillation_loss):
            result = run(function, student, teacher, labels, **options, reduction="none")
            for values in result:
                assert values is not None
                assert values[0].isnan().all() and not values[1].isnan().any()


def test_labels_out_of_range_under_the_compiler() -> None:
    """Where nobody can raise, NaN in that row alone."""
    student, teacher = make_pair(4, COLUMNS)
    labels = torch.tensor([1, 70, -1, 3])
    function = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True)
    result = run(function, student, teacher, labels, hard_weight=0.5, reduction="none")
    assert result.loss.isnan().tolist() == [False, True, True, False]
    assert result.grad_student is not None
    assert result.grad_student.isnan().all(-1).tolist() == [False, True, True, False]
    assert result.grad_student.isnan().any(-1).tolist() == [False, True, True, False]


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
@pytest.mark.parametrize("valid", [1, 37, 64, 2050])
def test_padding_is_not_there(device: str, divergence: Divergence, dtype: torch.dtype, valid: int) -> None:
    """To the bit what the sliced logits give; never read, and its gradient exactly 0; two paddings."""
    student, teacher = make_pair(5, 3000, dtype=dtype, device=device)
    teacher = teacher[:, :2500].contiguous()
    student[:, valid:], teacher[:, valid:] = torch.nan, torch.inf
    labels = torch.tensor([0, valid - 1, -100, valid // 2, 0], device=device)
    for reduction in ("mean", "none"):
        options = {**divergence.options, "hard_weight": 0.5, "reduction": reduction}
        ours = run(distillation_loss, student, teacher, labels, valid_vocab=valid, **options)
        sliced = run(distillation_loss, student[:, :valid], teacher[:, :valid], labels, **options)
        assert torch.equal(ours.loss, sliced.loss)
        for padded, expected, like in zip(ours[1:], sliced[1:], (student, teacher), strict=True):
            assert padded is not None and expected is not None and padded.shape == like.shape
            assert torch.equal(padded[:, :valid], expected)
            assert not padded[:, valid:].any()


# ---------------------------------------------------------------- softcap and scale


def test_common_scale_is_a_temperature(device: str) -> None:
    """To the bit: no logit is rounded for it."""
    for dtype, divergence in itertools.product(DTYPES, (FORWARD_KL, JSD)):
        student, teacher = make_pair(5, COLUMNS, dtype=dtype, distance=1e-2, device=device)
        scaled = run(distillation_loss, student, teacher, logit_scale=0.25, **divergence.options)
        expected = run(distillation_loss, student, teacher, temperature=4.0, **divergence.options)
        assert all(map(torch.equal, scaled, expected))


@pytest.mark.parametrize("size", [0.1, 3.0, 8.0, 20.0, 80.0])
def test_gradients_in_the_flat_of_the_softcap(device: str, size: float) -> None:
    """The derivative is right where the capped logit says nothing any more; cap 2, logits up to some `size`."""
    student, teacher = make_pair(4, COLUMNS, spread=size, distance=size, device=device)
    labels = torch.arange(4, device=device)
    for divergence in (FORWARD_KL, JSD):
        options = {**divergence.options, "logit_softcap": 2.0, "hard_weight": 0.5, "reduction": "sum"}
        ours = run(distillation_loss, student, teacher, labels, **options)
        leaves = [x.double().requires_grad_() for x in (student, teacher)]
        reference.distillation_loss(*leaves, labels, **options).backward()
        for gradient, leaf in zip(ours[1:], leaves, strict=True):
            assert gradient is not None and leaf.grad is not None
            # Element by element, down to what float32 can hold.
            torch.testing.assert_close(
                gradient.double(), leaf.grad, rtol=2e-5, atol=4e-7 * leaf.grad.abs().max().item()
            )
            tiny = leaf.grad.abs() < 1e-4 * leaf.grad.abs().max()
            if size == 20.0:
                assert tiny.any()
                ratio = gradient.double()[tiny] / leaf.grad[tiny]
                assert (ratio[leaf.grad[tiny].abs() > 1e-30] - 1).abs().median() < 1e-4


def test_softcap_of_infinities(device: str) -> None:
    """A capped -inf is -cap, +inf is cap: both finite, both flat. NaN stays."""
    student, teacher = make_pair(4, COLUMNS, device=device)
    student[0, 1], teacher[1, 1], student[2, 2], student[3, 3] = -torch.inf, -torch.inf, torch.inf, torch.nan
    result = check(student, teacher, logit_softcap=5.0, reduction="none")
    assert result.loss.isnan().tolist() == [False, False, False, True]
    assert result.grad_student is not None and result.grad_teacher is not None
    assert result.grad_student[0, 1] == 0 and result.grad_student[2, 2] == 0 and result.grad_teacher[1, 1] == 0


@pytest.mark.parametrize("options", [{"logit_softcap": 30.0}, {"logit_scale": (0.5, 1.0)}], ids=str)
def test_close_rows_with_rounded_logits(device: str, options: dict[str, Any]) -> None:
    """Close ones keep the promise for bfloat16, and the one for losses near 0."""
    student, teacher = make_pair(4, 8000, spread=6.0, distance=1e-2, dtype=torch.bfloat16, device=device)
    if "logit_scale" in options:
        student = student * 2
    for divergence in (FORWARD_KL, JSD):
        ours = run(distillation_loss, student, teacher, **options, **divergence.options)
        exact = run(reference.distillation_loss, student.double(), teacher.double(), **options, **divergence.options)
        assert abs(ours.loss / exact.loss - 1) <= 1e-4
        assert_gradients_close(ours.grad_student, exact.grad_student)
        assert_gradients_close(ours.grad_teacher, exact.grad_teacher)


def test_identical_rows_with_softcap(device: str) -> None:
    _, teacher = make_pair(4, 8000, spread=6.0, device=device)
    for divergence in (FORWARD_KL, JSD):
        same = run(distillation_loss, teacher, teacher.clone(), logit_softcap=5.0, **divergence.options)
        assert same.loss == 0 and not any(g is None or g.any() for g in same[1:])


# ---------------------------------------------------------------- gradients in place


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x * 1,
    "sliced rows": lambda x: torch.cat([x, x], 0)[: x.shape[0]],
    "shifted": lambda x: torch.cat([x[:1], x], 0)[1:],
    "sliced columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "transposed": lambda x: (x.transpose(0, -1) * 1).transpose(0, -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_equals_out_of_place(device: str, layout: str, dtype: torch.dtype) -> None:
    """To the bit what backward computes into memory of its own; and it does lie over the logits."""
    for (divergence, columns), teacher_too in itertools.product(
        itertools.product((FORWARD_KL, JSD), (COLUMNS, 2100)), (False, True)
    ):
        leaf, teacher = make_pair(6, columns, dtype=dtype, device=device)
        options = {
            **divergence.options,
            "labels": torch.tensor([0, -100, 3, 4, 66, 9], device=device),
            "hard_weight": 0.5,
            "valid_vocab": 67,
        }

        def gradients(
            layout: str, in_place: bool, leaf: Tensor = leaf, teacher: Tensor = teacher, options: Any = options,
            teacher_too: bool = teacher_too,
        ) -> tuple[list[Tensor | None], bool]:  # fmt: skip
            leaf, teacher = leaf.clone().requires_grad_(), teacher.clone().requires_grad_(teacher_too)
            student = LAYOUTS[layout](leaf)
            seen: list[Tensor] = []
            student.register_hook(seen.append)
            losses = distillation_loss(student, teacher, **options, reduction="none", inplace_backward=in_place)
            losses.backward(torch.linspace(-1, 2, 6, dtype=losses.dtype, device=device))
            return [leaf.grad, teacher.grad], seen[0].data_ptr() == student.data_ptr()

        ours, shared = gradients(layout, True)
        expected, not_shared = gradients("contiguous", False)
        assert shared and not not_shared
        assert (ours[1] is not None) == teacher_too
        for value, other in zip(ours, expected, strict=True):
            assert value is other is None or torch.equal(value, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("option", OPTIONS)
def test_in_place_with_every_option(device: str, option: str, reduction: str) -> None:
    student, teacher = make_pair(12, COLUMNS, device=device)

    def in_place(s: Tensor, *args: Any, **options: Any) -> Tensor:
        return distillation_loss(s * 1, *args, **options, inplace_backward=True)

    options = {**arguments(option, device, 12), "reduction": reduction}
    ours = run(in_place, student, teacher, grad_output=0.3, **options)
    expected = run(distillation_loss, student, teacher, grad_output=0.3, **options)
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-8)


def test_in_place_needs_nothing_where_nothing_is_written(device: str) -> None:
    """Leaves are allowed, and untouched, where no gradient of the student is made."""
    student, teacher = make_pair(3, COLUMNS, device=device)
    before = student.clone()
    distillation_loss(student, teacher.requires_grad_(), inplace_backward=True).backward()
    with torch.no_grad():
        distillation_loss(student.requires_grad_(), teacher, inplace_backward=True)
    assert torch.equal(student, before)


MODIFIED = "modified by an inplace operation"


def test_in_place_is_seen_by_whoever_needs_the_logits(device: str) -> None:
    """Another loss, a second backward, the operator before: all raise instead of reading garbage."""
    leaf, teacher = make_pair(3, COLUMNS, device=device)
    leaf.requires_grad_()

    student = leaf * 1
    loss = distillation_loss(student, teacher, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()

    student = leaf * 1
    first, second = (distillation_loss(student, teacher, inplace_backward=i == 0, reduction="none") for i in range(2))
    first.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        second.sum().backward()

    student = torch.tanh(leaf)  # its backward needs its output
    with pytest.raises(RuntimeError, match=MODIFIED):
        distillation_loss(student, teacher, inplace_backward=True).backward()


def test_in_place_cannot_be_differentiated_again(device: str) -> None:
    leaf, teacher = make_pair(3, COLUMNS, device=device)
    loss = distillation_loss(leaf.requires_grad_() * 1, teacher, inplace_backward=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward.*differentiated"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_in_place_below_a_model(device: str) -> None:
    """The usual case: a head whose backward needs its input and its weight, not the logits."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(6, 16, device=device), torch.randn(6, COLUMNS, device=device)
    head = torch.nn.Linear(16, COLUMNS, device=device)
    gradients = []
    for in_place in (True, False):
        head.zero_grad()
        distillation_loss(head(hidden), teacher, reduction="sum", inplace_backward=in_place).backward()
        gradients.append([p.grad.clone() for p in head.parameters()])
    for value, other in zip(*gradients, strict=True):
        torch.testing.assert_close(value, other)
