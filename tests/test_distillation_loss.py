"""distillation_loss and DistillationLoss against the float64 oracle: values, gradients, options, shapes, strides."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from oracle import (
    DIVERGENCES,
    DTYPES,
    ENDPOINTS,
    FORWARD_KL,
    JSD,
    Divergence,
    assert_gradients_close,
    assert_losses_close,
    cases,
    check,
    make_pair,
    run,
)
from torch import Tensor

import kldiv_ext
from kldiv_ext import DistillationLoss, distillation_loss, reference

# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDPOINTS], ids=str)
def test_divergence(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = make_pair(3, 5, 131, dtype=dtype, device=device)
    check(student, teacher, **divergence.options)


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 4.0])
@pytest.mark.parametrize("squared", [False, True], ids=["", "T2"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_temperature(device: str, divergence: Divergence, squared: bool, temperature: float) -> None:
    student, teacher = make_pair(4, 100, device=device)
    check(student, teacher, **divergence.options, temperature=temperature, scale_by_temperature_squared=squared)


def positions(device: str, *shape: int) -> dict[str, Any]:
    """Everything that decides which positions count and how much."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 50, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = -100
    weight = torch.rand(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.3] = 0
    return {
        "labels": labels.to(device),
        "mask": (torch.rand(shape, generator=generator) < 0.7).to(device),
        "weight": weight.to(device),
    }


POSITIONS = {
    "all": (),
    "labels": ("labels",),
    "mask": ("mask",),
    "weight": ("weight",),
    "all-three": ("labels", "mask", "weight"),
}


@pytest.mark.parametrize("names", cases(POSITIONS))
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)  # fp16: gradient in backward
@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
def test_positions_and_reductions(
    device: str, divergence: Divergence, dtype: torch.dtype, reduction: str, names: tuple[str, ...]
) -> None:
    student, teacher = make_pair(3, 8, 70, dtype=dtype, device=device)
    options = {name: value for name, value in positions(device, 3, 8).items() if name in names}
    grad_output = torch.randn(3, 8, device=device) if reduction == "none" else 1.0
    result = check(student, teacher, **options, **divergence.options, reduction=reduction, grad_output=grad_output)
    assert result.grad_student is not None and result.grad_student.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weight_of_another_dtype(device: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    student, teacher = make_pair(3, 8, 70, dtype=dtype, device=device)
    weight = torch.rand(3, 8, device=device).to(weight_dtype)
    for reduction in ("mean", "sum"):
        check(student, teacher, weight=weight, reduction=reduction)


NUM_ITEMS = {"int": 37, "0": 0, "tensor": torch.tensor(37), "0-tensor": torch.tensor(0), "float": torch.tensor(37.5)}


@pytest.mark.parametrize("num_items", cases(NUM_ITEMS))
@pytest.mark.parametrize("names", cases(POSITIONS))
def test_num_items(device: str, names: tuple[str, ...], num_items: int | Tensor) -> None:
    student, teacher = make_pair(3, 8, 70, device=device)
    options = {name: value for name, value in positions(device, 3, 8).items() if name in names}
    if isinstance(num_items, Tensor):
        num_items = num_items.to(device)
    check(student, teacher, **options, num_items=num_items)


def test_ignore_index(device: str) -> None:
    student, teacher = make_pair(4, 30, device=device)
    labels = torch.tensor([7, -100, 3, 7], device=device)
    result = check(student, teacher, labels, ignore_index=7, reduction="none")
    assert (result.loss == 0).tolist() == [True, False, False, True]


SHAPES = {
    "1-D": (40,),
    "2-D": (3, 40),
    "3-D": (2, 3, 40),
    "4-D": (2, 3, 2, 40),
    "11-D": (1, 2, 1, 2, 1, 1, 2, 1, 1, 2, 5),
    "no-rows": (0, 40),
    "no-rows-inside": (3, 0, 40),
    "V=1": (3, 1),  # always 0
    "V=2": (3, 2),
    "V=15": (3, 15),  # around one AVX-512 vector of floats
    "V=16": (3, 16),
    "V=17": (3, 17),
    "V=31": (3, 31),
    "V=33": (3, 33),
    "V=63": (3, 63),  # around four of them, the unrolled maximum
    "V=65": (3, 65),
    "V=2047": (3, 2047),  # around a CPU chunk
    "V=2048": (3, 2048),
    "V=2049": (3, 2049),
    "V=4101": (3, 4101),  # a third, tiny chunk
    "V=8200": (3, 8200),  # five chunks: a tree that is not full
    "V=50257": (2, 50257),  # GPT-2: odd, rows start at odd addresses
    "many-rows": (1000, 9),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES))
@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
def test_shape(device: str, divergence: Divergence, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher = make_pair(*shape, dtype=dtype, device=device)
    for reduction in ("none", "mean", "batchmean"):
        check(student, teacher, **divergence.options, reduction=reduction)


def scattered(values: Tensor) -> Tensor:
    """The same values with a step of 2 in the vocabulary."""
    storage = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1])
    storage[..., ::2] = values
    return storage[..., ::2]


def misaligned(values: Tensor) -> Tensor:
    """The same values, one element behind the start of the storage."""
    storage = values.new_zeros(values.numel() + 1)
    storage[1:] = values.flatten()
    return storage[1:].view(values.shape)


def padded(values: Tensor, dim: int) -> Tensor:
    """The same values, cut out of a tensor that is longer by 3 in one dimension."""
    shape = list(values.shape)
    shape[dim] += 3
    storage = values.new_full(shape, torch.nan)  # a value from outside would be seen
    view = storage.narrow(dim, 0, values.shape[dim])
    view.copy_(values)
    return view


LAYOUTS = {
    "contiguous": lambda x: x,
    "vocabulary-first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),  # a transposed matrix
    "batch-second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # rows in another order
    "no-last-position": lambda x: padded(x, 1),  # logits[:, :-1]: rows that do not lie evenly
    "vocabulary-slice": lambda x: padded(x, -1),  # padded vocabulary
    "vocabulary-step": scattered,
    "misaligned": misaligned,
    "expanded": lambda x: x[:1].expand(x.shape),  # stride 0
}


@pytest.mark.parametrize("teacher_layout", cases(LAYOUTS))
@pytest.mark.parametrize("student_layout", cases(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(device: str, dtype: torch.dtype, student_layout: Any, teacher_layout: Any) -> None:
    student, teacher = make_pair(3, 4, 70, dtype=dtype, device=device)
    for reduction in ("mean", "none"):
        check(student_layout(student), teacher_layout(teacher), **JSD.options, reduction=reduction)


def test_many_dimensions_that_do_not_collapse(device: str) -> None:
    """More than the kernels' eight leading dimensions, each padded."""
    shape = (2,) * 10 + (5,)
    values = []
    for logits in make_pair(*shape, device=device):
        storage = torch.full((3,) * 10 + (5,), torch.nan, device=device)
        view = storage[(slice(2),) * 10]
        view.copy_(logits)
        values.append(view)
    check(*values)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = make_pair(3, 4, 2100, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    for divergence in (FORWARD_KL, JSD):
        check(student, teacher, **divergence.options)


# ---------------------------------------------------------------- autograd


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["student", "teacher", "both"])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDPOINTS], ids=str)
def test_gradcheck(device: str, divergence: Divergence, wanted: tuple[bool, bool]) -> None:
    student, teacher = make_pair(2, 7, dtype=torch.float64, device=device)
    student.requires_grad_(wanted[0])
    teacher.requires_grad_(wanted[1])
    weight = torch.tensor([0.5, 2.0], device=device)
    for reduction in ("none", "mean"):
        options = {**divergence.options, "temperature": 1.3, "weight": weight, "reduction": reduction}
        assert torch.autograd.gradcheck(functools.partial(distillation_loss, **options), (student, teacher))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", cases({"student": (True, False), "teacher": (False, True), "no": (False, False)}))
@pytest.mark.parametrize("divergence", [FORWARD_KL, Divergence("reverse_kl"), JSD], ids=str)
def test_only_wanted_gradients(divergence: Divergence, wanted: tuple[bool, bool], reduction: str, device: str) -> None:
    student, teacher = make_pair(3, 50, device=device)
    result = check(student, teacher, **divergence.options, reduction=reduction, wanted=wanted)
    assert (result.grad_student is not None, result.grad_teacher is not None) == wanted


GRAD_OUTPUTS = {
    "one": lambda loss: torch.ones_like(loss),
    "3.7": lambda loss: torch.full_like(loss, 3.7),
    "zero": lambda loss: torch.zeros_like(loss),
    "negative": lambda loss: torch.full_like(loss, -0.25),
    "random": lambda loss: torch.randn(loss.shape).to(loss),
    "expanded": lambda loss: torch.tensor(2.0).to(loss).expand(loss.shape),
    "strided": lambda loss: torch.randn(*loss.shape, 2).to(loss)[..., 0],
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make_grad_output", cases(GRAD_OUTPUTS))
def test_grad_output(device: str, make_grad_output: Any, dtype: torch.dtype, reduction: str) -> None:
    # bfloat16 gradients of a mean are rounded again here: no entry is so large that a row's error is its own.
    student, teacher = make_pair(3, 4, 500, dtype=dtype, device=device, spread=0.3, distance=0.3)
    shape = (3, 4) if reduction == "none" else ()
    grad_output = make_grad_output(torch.empty(shape, device=device))
    check(student, teacher, **JSD.options, reduction=reduction, grad_output=grad_output)


def test_grad_output_transposed(device: str) -> None:
    """A grad_output that autograd hands over as it is: not contiguous."""
    student, teacher = make_pair(3, 4, 50, device=device)
    factor = torch.randn(4, 3, device=device)
    gradients = []
    for function in (distillation_loss, reference.distillation_loss):
        leaf = student.clone().requires_grad_()
        (function(leaf, teacher, reduction="none").t() * factor).sum().backward()
        gradients.append(leaf.grad)
    assert_gradients_close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_twice(device: str, dtype: torch.dtype, reduction: str) -> None:
    """What one backward returned is not changed by the next, and all see the same logits."""
    student, teacher = (x.requires_grad_() for x in make_pair(3, 50, dtype=dtype, device=device))
    loss = (distillation_loss(student, teacher, **JSD.options, reduction=reduction) * 3.7 * 2**10).sum()
    first = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    third = torch.autograd.grad(loss, (student, teacher))
    for gradients in (first, second, third):
        assert all(torch.equal(a, b) for a, b in zip(gradients, copies, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (student, teacher))


def test_two_losses_of_one_tensor(device: str) -> None:
    student, teacher = make_pair(3, 50, device=device)
    gradients = []
    for function in (distillation_loss, reference.distillation_loss):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        logits = s * 1.0  # a tensor inside the graph
        other = function(logits, t, **JSD.options, reduction="sum")
        (function(logits, t) + 2 * other + logits.square().sum()).backward()
        gradients.append((s.grad, t.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert_gradients_close(ours, theirs)


def test_one_tensor_on_both_sides(device: str) -> None:
    logits = torch.randn(3, 50, device=device).requires_grad_()
    loss = distillation_loss(logits, logits, **JSD.options)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_not_written(device: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher = (x.requires_grad_() for x in make_pair(3, 4, 50, dtype=dtype, device=device))
    options = positions(device, 3, 4)
    before = [x.clone() for x in (student, teacher, *options.values())]
    loss = distillation_loss(student, teacher, **options, reduction=reduction)
    (loss * 3.7).sum().backward()
    after = (student, teacher, *options.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert student._version == teacher._version == 0


def test_logits_changed_before_backward_raise(device: str) -> None:
    student, teacher = make_pair(3, 50, device=device)
    logits = student.requires_grad_() * 1.0
    loss = distillation_loss(logits, teacher, reduction="none").sum()
    logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradgradcheck(device: str, divergence: Divergence, reduction: str) -> None:
    student, teacher = (x.requires_grad_() for x in make_pair(2, 5, dtype=torch.float64, device=device))

    options = {**divergence.options, "temperature": 1.3, "reduction": reduction}
    assert torch.autograd.gradgradcheck(functools.partial(distillation_loss, **options), (student, teacher))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_penalty(device: str, reduction: str) -> None:
    """A second derivative that joins a first one is not lost."""
    student, teacher = make_pair(3, 50, dtype=torch.float64, device=device)
    gradients = []
    for function in (distillation_loss, reference.distillation_loss):
        leaf = student.clone().requires_grad_()
        loss = function(leaf, teacher, reduction=reduction).sum()
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + 10 * first.square().sum()).backward()
        gradients.append(leaf.grad)
    assert_gradients_close(*gradients)


def test_no_grad_makes_no_graph(device: str) -> None:
    student, teacher = (x.requires_grad_() for x in make_pair(3, 50, device=device))
    with torch.no_grad():
        loss = distillation_loss(student, teacher)
    assert not loss.requires_grad
    assert_losses_close(loss, reference.distillation_loss(student, teacher))


# ---------------------------------------------------------------- positions that do not count


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("by", ["labels", "mask", "weight"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_ignored_positions_are_not_read(device: str, divergence: Divergence, by: str, reduction: str) -> None:
    student, teacher = make_pair(4, 50, device=device)
    dead = torch.tensor([False, True, False, True], device=device)
    options = {"labels": torch.where(dead, -100, 1), "mask": ~dead, "weight": (~dead).float()}
    expected = run(distillation_loss, student, teacher, **{by: options[by]}, **divergence.options, reduction=reduction)
    student[dead], teacher[dead] = torch.nan, torch.inf
    result = run(distillation_loss, student, teacher, **{by: options[by]}, **divergence.options, reduction=reduction)
    for value, same in zip(result, expected, strict=True):
        assert torch.equal(value, same)
    assert not result.grad_student[dead].any() and not result.grad_teacher[dead].any()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("by", ["labels", "mask", "weight", "num_items"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_position_counts(device: str, dtype: torch.dtype, by: str, reduction: str) -> None:
    if by == "num_items" and reduction != "mean":
        return  # test_arguments.py: raises
    student, teacher = make_pair(4, 50, dtype=dtype, device=device)
    student[0], teacher[1] = torch.nan, torch.nan
    options = {
        "labels": torch.full((4,), -100, device=device),
        "mask": torch.zeros(4, dtype=torch.bool, device=device),
        "weight": torch.zeros(4, device=device),
        "num_items": 0,
    }
    leaf = student.requires_grad_()
    loss = distillation_loss(leaf, teacher, **{by: options[by]}, reduction=reduction)
    assert loss.requires_grad and not loss.detach().any()
    loss.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("shared", ["int", "tensor"])
@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
def test_gradient_accumulation(device: str, divergence: Divergence, shared: str) -> None:
    """Unequal micro-batches with the number of items of the big one add up to it."""
    student, teacher = make_pair(12, 60, device=device)
    labels = torch.where(torch.rand(12) < 0.4, -100, 1).to(device)
    count = (labels != -100).sum()
    big = run(distillation_loss, student, teacher, labels, **divergence.options)
    student.requires_grad_()
    total = torch.zeros((), device=device)
    for part in torch.arange(12).split([1, 7, 4]):
        loss = distillation_loss(
            student[part],
            teacher[part],
            labels[part],
            **divergence.options,
            num_items=int(count) if shared == "int" else count,
        )
        loss.backward()
        total += loss.detach()
    assert_losses_close(total, big.loss)
    assert_gradients_close(student.grad, big.grad_student)


# ---------------------------------------------------------------- infinities and NaN

INF = torch.inf
INFINITE_FOR_DEAD_STUDENT = ("forward_kl", "jeffreys")  # q = 0 < p
INFINITE_FOR_DEAD_TEACHER = ("reverse_kl", "jeffreys")  # p = 0 < q


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDPOINTS], ids=str)
def test_columns_dead_on_both_sides(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """They contribute 0 with zero gradients: as if they were not there."""
    student, teacher = make_pair(3, 70, dtype=dtype, device=device)
    dead = torch.arange(70, device=device) % 3 == 1
    student[:, dead] = teacher[:, dead] = -INF
    result = check(student, teacher, **divergence.options, reduction="none")
    assert not result.grad_student[:, dead].any() and not result.grad_teacher[:, dead].any()
    without = run(
        reference.distillation_loss,
        student[:, ~dead].double(),
        teacher[:, ~dead].double(),
        **divergence.options,
        reduction="none",
    )
    assert_losses_close(result.loss, without.loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDPOINTS], ids=str)
def test_columns_dead_on_one_side(device: str, divergence: Divergence, side: str, dtype: torch.dtype) -> None:
    """+inf where the definition is, in that row alone; finite and right elsewhere."""
    student, teacher = make_pair(3, 70, dtype=dtype, device=device)
    (student if side == "student" else teacher)[1, 5:9] = -INF
    # Unreduced, so that an infinite row stays apart from the others; its gradients have their own test below.
    options = {**divergence.options, "reduction": "none"}
    expected = run(reference.distillation_loss, student.double(), teacher.double(), **options)
    result = run(distillation_loss, student, teacher, **options)
    assert_losses_close(result.loss, expected.loss)
    name = same_as(divergence)
    infinite = name in (INFINITE_FOR_DEAD_STUDENT if side == "student" else INFINITE_FOR_DEAD_TEACHER)
    assert result.loss.isinf().tolist() == [False, infinite, False]
    if not infinite:  # a probability that is 0 has no gradient, whatever it stands against
        assert not (result.grad_student if side == "student" else result.grad_teacher)[1, 5:9].any()
    rows = [0, 2] if infinite else [0, 1, 2]
    assert_gradients_close(result.grad_student[rows], expected.grad_student[rows])
    assert_gradients_close(result.grad_teacher[rows], expected.grad_teacher[rows])


def same_as(divergence: Divergence) -> str:
    """The name of what a divergence is at its end, or its own."""
    ends = {
        "jsd": ("forward_kl", "reverse_kl"),
        "skew_forward_kl": ("forward_kl", "zero"),
        "skew_reverse_kl": ("reverse_kl", "zero"),
        "alpha": ("reverse_kl", "forward_kl"),
    }
    if divergence.parameter in (0.0, 1.0):
        return ends[divergence.name][int(divergence.parameter)]
    return divergence.name


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("teacher_too", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_an_infinite_forward_kl(device: str, dtype: torch.dtype, teacher_too: bool, reduction: str) -> None:
    """It is still q - p."""
    student, teacher = make_pair(3, 70, dtype=dtype, device=device)
    student[1, 5:9] = -INF
    scale = 2.0**10  # keeps float16 out of its subnormal numbers
    result = run(
        distillation_loss, student, teacher, reduction=reduction, wanted=(True, teacher_too), grad_output=scale
    )
    assert result.loss.isinf().any()
    expected = scale * (student.double().softmax(-1) - teacher.double().softmax(-1))
    assert_gradients_close(result.grad_student, expected)
    if teacher_too:
        assert result.grad_teacher.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["reverse_kl", "jeffreys"])
def test_gradient_of_another_infinite_divergence_is_nan(device: str, name: str) -> None:
    student, teacher = make_pair(3, 70, device=device)
    teacher[1, 5:9] = -INF
    result = run(distillation_loss, student, teacher, divergence=name, reduction="none")
    assert result.loss.isinf().tolist() == [False, True, False]
    assert result.grad_student[1].isnan().all()
    assert result.grad_student[[0, 2]].isfinite().all() and result.grad_teacher[[0, 2]].isfinite().all()


BROKEN_ROWS = {
    "nan": lambda row: row.index_fill_(0, torch.tensor([3], device=row.device), torch.nan),
    "nan-in-the-tail": lambda row: row.index_fill_(0, torch.tensor([69], device=row.device), torch.nan),
    "+inf": lambda row: row.index_fill_(0, torch.tensor([3], device=row.device), INF),
    "all -inf": lambda row: row.fill_(-INF),
    "nan among -inf": lambda row: row.fill_(-INF).index_fill_(0, torch.tensor([3], device=row.device), torch.nan),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("breaks", cases(BROKEN_ROWS))
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDPOINTS], ids=str)
def test_broken_rows_are_nan_alone(
    device: str, divergence: Divergence, breaks: Any, side: str, dtype: torch.dtype
) -> None:
    student, teacher = make_pair(3, 70, dtype=dtype, device=device)
    clean = run(distillation_loss, student, teacher, **divergence.options, reduction="none")
    if side != "teacher":
        breaks(student[1])
    if side != "student":
        breaks(teacher[1])
    result = run(distillation_loss, student, teacher, **divergence.options, reduction="none")
    for value, same in zip(result, clean, strict=True):
        assert value[1].isnan().all()
        assert torch.equal(value[[0, 2]], same[[0, 2]])


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_huge_and_distant_logits(device: str, divergence: Divergence) -> None:
    """Where probabilities underflow, logarithms do not: finite in log space, where a softmax would give inf or NaN."""
    teacher = torch.tensor([[0.0, -120.0, 5.0], [1e4, 1e4 - 1, 0.0], [-3e4, -3e4, 0.0]], device=device)
    student = torch.tensor([[-120.0, 0.0, 0.0], [1e4 - 2, 1e4, 0.0], [0.0, -3e4, -3e4]], device=device)
    # Where one column has all the mass, its gradient is the rounding of 1 - p.
    check(student, teacher, **divergence.options, reduction="none", floor=1e-6)


# ---------------------------------------------------------------- the module

MODULE_OPTIONS = {
    "defaults": {},
    "jsd": {"divergence": "jsd", "beta": 0.1, "temperature": 2.0, "scale_by_temperature_squared": True},
    "labels": {"ignore_index": 7, "reduction": "sum"},
    "skew": {"divergence": "skew_reverse_kl", "skew": 0.3, "reduction": "none"},
    "alpha": {"divergence": "alpha", "alpha": 0.7, "reduction": "batchmean"},
}


@pytest.mark.parametrize("options", cases(MODULE_OPTIONS))
def test_module_is_the_function(device: str, options: dict[str, Any]) -> None:
    student, teacher = make_pair(3, 4, 50, device=device)
    tensors = positions(device, 3, 4)
    module = DistillationLoss(**options)
    expected = distillation_loss(student, teacher, **tensors, **options)
    assert torch.equal(module(student, teacher, **tensors), expected)
    assert torch.equal(module(student, teacher, *tensors.values()), expected)  # in this order
    for same in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(same(student, teacher, **tensors), expected)
        assert repr(same) == repr(module)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)
    assert not list(module.parameters()) and not module.state_dict()


def test_module_takes_num_items() -> None:
    student, teacher = make_pair(3, 50)
    assert torch.equal(
        DistillationLoss()(student, teacher, num_items=10), distillation_loss(student, teacher, num_items=10)
    )


def test_documented_equivalent() -> None:
    """The snippet of the docstring, word by word."""
    student_logits, teacher_logits = make_pair(2, 3, 50)
    temperature = 2.0
    log_q = torch.log_softmax(student_logits.float() / temperature, -1)
    p = torch.softmax(teacher_logits.float() / temperature, -1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="sum") / log_q[..., 0].numel()
    ours = kldiv_ext.distillation_loss(student_logits, teacher_logits, temperature=temperature)
    torch.testing.assert_close(ours, expected)
