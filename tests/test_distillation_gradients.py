"""distillation_loss under autograd: gradcheck, grad_output, saved logits, gradients in place and given memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from cases import (
    ALL_DIVERGENCES,
    BOTH_PATHS,
    DIVERGENCES,
    DTYPES,
    JSD,
    LAYOUTS,
    OPTION_MIXES,
    REDUCTIONS,
    Divergence,
    Mix,
    make_pair,
    named,
    position_tensors,
    run,
)
from oracle import assert_equal, assert_gradients_close, assert_losses_close, check
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from kldiv_ext import distillation_loss, reference
from kldiv_ext._library import ops

COLUMNS = 70


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES, ids=str)
def test_derivatives(device: str, divergence: Divergence, reduction: str) -> None:
    """First derivatives for every choice of gradients, and second derivatives."""
    both = make_pair(2, 7, dtype=torch.float64, device=device)
    weight = torch.tensor([0.5, 2.0], device=device)
    options = {**divergence.options, "temperature": 1.3, "weight": weight, "reduction": reduction}
    function = functools.partial(distillation_loss, **options)
    for needs_grad in ((True, False), (False, True), (True, True)):
        leaves = tuple(x.detach().requires_grad_(needed) for x, needed in zip(both, needs_grad, strict=True))
        assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("mix", named(OPTION_MIXES))
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_derivatives_of_options(device: str, divergence: Divergence, mix: Mix) -> None:
    both = make_pair(4, COLUMNS, dtype=torch.float64, device=device, distance=0.5)
    student, teacher = (x.requires_grad_() for x in both)
    options = {**mix.arguments(4, columns=COLUMNS, device=device), **divergence.options, "reduction": "none"}
    function = functools.partial(distillation_loss, **options)
    assert gradcheck(function, (student, teacher), fast_mode=True)
    assert gradgradcheck(function, (student, teacher), fast_mode=True)


GRAD_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "3.7": lambda loss: torch.full_like(loss, 3.7),
    "0": torch.zeros_like,
    "-0.25": lambda loss: torch.full_like(loss, -0.25),
    "random": torch.randn_like,
    "expanded": lambda loss: torch.full_like(loss.sum(), 2.0).expand(loss.shape),
    "strided": lambda loss: torch.stack([torch.randn_like(loss)] * 2, -1)[..., 0],
    "transposed": lambda loss: torch.randn_like(loss.t()).t(),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", named(GRAD_OUTPUTS))
def test_grad_output(device: str, make: Callable[[Tensor], Tensor], dtype: torch.dtype, reduction: str) -> None:
    # bfloat16 gradients of a mean are rounded again here: no entry is so large that a row's error is its own.
    student, teacher = make_pair(3, 4, 500, dtype=dtype, device=device, spread=0.3, distance=0.3)
    grad_output = make(torch.empty((3, 4) if reduction == "none" else (), device=device))
    check(student, teacher, **JSD.options, reduction=reduction, grad_output=grad_output)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_backward_again(device: str, divergence: Divergence, dtype: torch.dtype, reduction: str) -> None:
    """A backward changes neither what an earlier one returned nor the inputs, and all see the same logits."""
    student, teacher = (x.requires_grad_() for x in make_pair(3, 4, 50, dtype=dtype, device=device))
    options = position_tensors(("labels", "mask", "weight"), (3, 4), 50, device)
    inputs = [student, teacher, *options.values()]
    before = [x.clone() for x in inputs]
    loss = (
        distillation_loss(student, teacher, **options, **divergence.options, reduction=reduction) * 3.7 * 2**10
    ).sum()
    first = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    third = torch.autograd.grad(loss, (student, teacher))
    for gradients in (first, second, third):
        assert_equal(list(gradients), copies)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (student, teacher))
    assert_equal(inputs, before)
    assert student._version == teacher._version == 0


def test_two_losses_of_one_tensor(device: str) -> None:
    student, teacher = make_pair(3, 50, device=device)

    def both(function: Callable[..., Tensor], s: Tensor, t: Tensor) -> Tensor:
        logits = s * 1.0  # a tensor inside the graph
        other = function(logits, t, **JSD.options, reduction="sum")
        return function(logits, t) + 2 * other + logits.square().sum()

    ours, exact = (run(both, f, student, teacher) for f in (distillation_loss, reference.distillation_loss))
    for gradient, expected in zip(ours.gradients, exact.gradients, strict=True):
        assert_gradients_close(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [COLUMNS, 2100])
@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
def test_in_place(device: str, divergence: Divergence, columns: int, layout: str, dtype: torch.dtype) -> None:
    """The gradient overwrites the logits, and has the bits of one with memory of its own."""
    leaf, teacher = make_pair(6, columns, dtype=dtype, device=device)
    options = {**divergence.options, "hard_weight": 0.5, "valid_vocab": 67, "reduction": "none"}
    labels = torch.tensor([0, -100, 3, 4, 66, 9], device=device)
    grad_output = torch.linspace(-1, 2, 6, device=device)
    overwritten = []

    def in_place(leaf: Tensor, teacher: Tensor, *, inplace_backward: bool) -> Tensor:
        student = LAYOUTS[layout](leaf * 1) if inplace_backward else leaf * 1
        student.register_hook(lambda gradient: overwritten.append(gradient.data_ptr() == student.data_ptr()))
        return distillation_loss(student, teacher, labels, inplace_backward=inplace_backward, **options)

    for needs_grad in ((True, False), (True, True)):
        ours, expected = (
            run(in_place, leaf, teacher, grad_output=grad_output, needs_grad=needs_grad, inplace_backward=flag)
            for flag in (True, False)
        )
        assert_equal(ours, expected)
    assert overwritten == [True, False] * 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mix", named(OPTION_MIXES))
def test_in_place_with_options(device: str, mix: Mix, reduction: str) -> None:
    student, teacher = make_pair(12, COLUMNS, device=device)
    in_place = lambda s, t, **options: distillation_loss(s * 1, t, **options, inplace_backward=True)  # noqa: E731
    options = {**mix.arguments(12, columns=COLUMNS, device=device), "reduction": reduction}
    ours, expected = (
        run(function, student, teacher, grad_output=0.3, **options) for function in (in_place, distillation_loss)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


def test_in_place_without_memory() -> None:
    """Fake tensors and those of the meta device share no memory."""
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            student, teacher = torch.randn(2, 3, requires_grad=True) * 1, torch.randn(2, 3)
            distillation_loss(student, teacher, inplace_backward=True).backward()


def test_in_place_without_a_gradient_of_the_student(device: str) -> None:
    """Leaf logits are allowed, and are not written."""
    student, teacher = make_pair(3, COLUMNS, device=device)
    before = student.clone()
    distillation_loss(student, teacher.requires_grad_(), inplace_backward=True).backward()
    with torch.no_grad():
        distillation_loss(student.requires_grad_(), teacher, inplace_backward=True)
    assert torch.equal(student, before)


MODIFIED = "modified by an inplace operation"


def test_changed_logits_raise_where_they_are_needed(device: str) -> None:
    """This loss, another one, a second backward, a second derivative or the operator before may need the logits."""
    leaf, teacher = make_pair(3, COLUMNS, device=device)
    leaf.requires_grad_()

    student = leaf * 1
    loss = distillation_loss(student, teacher, reduction="none").sum()
    student += 1
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()

    loss = distillation_loss(leaf * 1, teacher, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()

    student = leaf * 1
    first, second = (distillation_loss(student, teacher, inplace_backward=i == 0, reduction="none") for i in range(2))
    first.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        second.sum().backward()

    with pytest.raises(RuntimeError, match=MODIFIED):  # the backward of tanh reads its output
        distillation_loss(torch.tanh(leaf), teacher, inplace_backward=True).backward()

    loss = distillation_loss(leaf * 1, teacher, inplace_backward=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward.*differentiated"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_in_place_after_a_head(device: str) -> None:
    """The backward of a linear layer reads its input and its weight, not the logits."""
    hidden, teacher = torch.randn(6, 16, device=device), torch.randn(6, COLUMNS, device=device)
    parameters = [torch.randn(COLUMNS, 16, device=device), torch.randn(COLUMNS, device=device)]

    def loss(*parameters: Tensor, inplace_backward: bool) -> Tensor:
        logits = torch.nn.functional.linear(hidden, *parameters)
        return distillation_loss(logits, teacher, reduction="sum", inplace_backward=inplace_backward)

    ours, expected = (run(loss, *parameters, inplace_backward=flag) for flag in (True, False))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("columns", [COLUMNS, 4500])
@pytest.mark.parametrize("hard_weight, softcap", [(0.0, 0.0), (0.5, 3.0)])
def test_given_memory(device: str, divergence: Divergence, columns: int, hard_weight: float, softcap: float) -> None:
    """The student's gradient overwrites float32 logits, or gradients have a narrower dtype."""
    student, teacher = make_pair(5, columns, spread=2.0, device=device)
    labels = torch.randint(columns, (5,), device=device)
    options = {**divergence.options, "hard_weight": hard_weight, "logit_softcap": softcap or None}
    expected = check(student, teacher, labels, reduction="none", **options)
    parameter = divergence.parameter or 0.0
    arguments = (1.0, hard_weight, None, divergence.name, parameter, 1.0, (1.0, 1.0), (softcap, softcap), None)
    factor = torch.full((), 2.0, device=device)
    for dtype, teacher_too in itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
        logits, loss = student.clone(), torch.empty(5, device=device)
        grad_student = logits if dtype == torch.float32 else torch.empty_like(student, dtype=dtype)
        grad_teacher = torch.empty_like(teacher, dtype=dtype) if teacher_too else None
        ops.distillation_loss_out(logits, teacher, labels, None, *arguments, factor, loss, grad_student, grad_teacher)
        assert_losses_close(loss, expected.loss)
        floor = 1e-6 * columns**0.5 if dtype == torch.float16 else 0.0
        assert_gradients_close(grad_student, 2 * expected.grad_student, floor)
        if teacher_too:
            assert_gradients_close(grad_teacher, 2 * expected.grad_teacher, floor)
        assert dtype == torch.float32 or torch.equal(logits, student)
