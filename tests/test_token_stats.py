"""token_stats against the float64 reference: every figure, option, dtype and layout, and what does not count."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracle import DTYPES, LOSS, make_pair
from torch import Tensor
from torch.func import vmap

import kldiv_ext
from kldiv_ext import TokenStats, distillation_loss, reference, token_stats


def check(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options: Any) -> TokenStats:
    ours = token_stats(student, teacher, labels, **options)
    expected = reference.token_stats(student, teacher, labels, **options)
    wide = torch.float64 in (student.dtype, teacher.dtype)
    for name, value, other in zip(TokenStats._fields, ours, expected, strict=True):
        if other is None:
            assert value is None, name
            continue
        assert value.shape == student.shape[:-1] and value.device == student.device and not value.requires_grad
        if name == "top1_agreement":
            assert torch.equal(value, other), name
            continue
        dtype = torch.float64 if wide else torch.float32
        assert value.dtype == dtype
        # A log-sum-exp or a log-probability is a difference of numbers of the logits' size.
        floor = 1e-9 if name.endswith("kl") else 4 * torch.finfo(dtype).eps * max(1.0, 30.0)
        torch.testing.assert_close(
            value.double(), other, rtol=LOSS[dtype], atol=floor, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    return ours


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature": {"temperature": 2.5},
    "padding": {"valid_vocab": 60},
    "softcap and scales": {"logit_softcap": (3.0, None), "logit_scale": (0.5, 1.5)},
    "common scale": {"logit_scale": 0.3, "temperature": 0.7},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_figure(device: str, option: str, dtype: torch.dtype) -> None:
    for shape, teacher_dtype in itertools.product(((3, 4, 70), (70,), (5, 2087), (2, 9000)), (dtype, torch.float32)):
        student, teacher = make_pair(*shape, dtype=dtype, teacher_dtype=teacher_dtype, spread=3.0, device=device)
        labels = torch.randint(0, 60, shape[:-1], device=device)
        check(student, teacher, labels, **OPTIONS[option])
        check(student, teacher, **OPTIONS[option])


def test_positions(device: str) -> None:
    """What does not count is 0 or False and never read."""
    student, teacher = make_pair(2, 3, 70, device=device)
    teacher = student.clone()  # agreement everywhere else
    labels = torch.tensor([[1, -100, 69], [5, 10**9, 3]], device=device)
    mask = torch.tensor([[True, True, True], [True, False, False]], device=device)
    student[0, 1], teacher[1, 1] = torch.nan, torch.inf
    stats = check(student, teacher, labels, mask=mask)
    counts = mask & (labels != -100)
    assert torch.equal(stats.top1_agreement, counts)
    assert torch.equal(stats.student_entropy != 0, counts)


def test_agreement_in_any_column(device: str) -> None:
    """Chunks, lanes and ties: the first of equal largest logits counts."""
    columns = 5000
    for first, second in ((0, 0), (0, 1), (17, 17), (1023, 1024), (1024, 1024), (4999, 4999), (2048, 4999), (7, 9)):
        student, teacher = torch.zeros(2, columns, device=device), torch.zeros(2, columns, device=device)
        student[0, first] = teacher[0, second] = 1.0
        student[1, [first, 4998]] = teacher[1, [second, 4998]] = 1.0
        assert check(student, teacher).top1_agreement.tolist() == [first == second] * 2


def test_infinities(device: str) -> None:
    student, teacher = make_pair(8, 70, device=device)
    labels = torch.arange(8, device=device)
    student[0, 0], teacher[1, 1] = -torch.inf, -torch.inf
    student[2, 2] = teacher[2, 2] = -torch.inf
    student[3], teacher[4] = -torch.inf, -torch.inf
    student[5, 0], teacher[6, 0] = torch.inf, torch.nan
    stats = check(student, teacher, labels)
    assert stats.forward_kl.isinf().tolist() == [True] + [False] * 7
    assert stats.reverse_kl.isinf().tolist() == [False, True] + [False] * 6
    for value in stats[:-1]:
        assert value is not None and value.isnan().tolist() == [False, False, False, True, True, True, True, False]


def test_divergences_are_those_of_the_loss(device: str) -> None:
    """To the bit where one kernel walks the same way, else to rounding; accurate where the two are close."""
    for distance in (1.0, 1e-2, 1e-4):
        student, teacher = make_pair(4, 8000, spread=3.0, distance=distance, device=device)
        stats = check(student, teacher)
        for name in ("forward_kl", "reverse_kl"):
            loss = distillation_loss(student, teacher, divergence=name, reduction="none")
            torch.testing.assert_close(getattr(stats, name), loss, rtol=1e-5, atol=1e-10)
    same = token_stats(teacher, teacher.clone())
    assert not same.forward_kl.any() and not same.reverse_kl.any() and same.top1_agreement.all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (3, 1)], ids=str)
def test_empty_and_single(device: str, shape: tuple[int, ...]) -> None:
    check(torch.zeros(shape, device=device), torch.zeros(shape, device=device))


def test_strides_and_threads_change_nothing(device: str) -> None:
    student, teacher = make_pair(3, 7000, device=device)
    expected = token_stats(student, teacher)
    strided = token_stats(student.t().contiguous().t(), torch.stack([teacher, teacher], -1)[..., 0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = token_stats(student, teacher)
    finally:
        torch.set_num_threads(threads)
    for other in (strided, alone):
        for value, wanted in zip(other, expected, strict=True):
            assert value is wanted is None or torch.equal(value, wanted)


def test_no_gradient_and_compiled(device: str) -> None:
    student, teacher = (x.requires_grad_() for x in make_pair(3, 70, device=device))
    labels = torch.tensor([1, -100, 3], device=device)
    eager = token_stats(student, teacher, labels)
    compiled = torch.compile(token_stats, backend="aot_eager", fullgraph=True)(student, teacher, labels)
    for value, other in zip(compiled, eager, strict=True):
        assert value is not None and other is not None
        assert not value.requires_grad and torch.equal(value, other)


def test_vmap(device: str) -> None:
    student, teacher = make_pair(2, 3, 70, dtype=torch.float64, device=device)
    labels = torch.tensor([[1, 2, -100], [5, 6, 7]], device=device)
    batched = vmap(token_stats)(student, teacher, labels)
    for value, other in zip(batched, token_stats(student, teacher, labels), strict=True):
        torch.testing.assert_close(value, other)


WRONG = {
    "student_logits.*list": lambda s, t: token_stats([1.0], t),
    "same shape": lambda s, t: token_stats(s, t[:, :5]),
    "labels.*float32": lambda s, t: token_stats(s, t, torch.ones(2)),
    "mask.*int64": lambda s, t: token_stats(s, t, mask=torch.ones(2).long()),
    r"labels.*\[0, 11\).*11": lambda s, t: token_stats(s, t, torch.tensor([0, 11])),
    "temperature.*-1": lambda s, t: token_stats(s, t, temperature=-1.0),
    "logit_scale.*0": lambda s, t: token_stats(s, t, logit_scale=0),
    "valid_vocab.*12": lambda s, t: token_stats(s, t, valid_vocab=12),
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_arguments(says: str) -> None:
    with pytest.raises((TypeError, ValueError, IndexError), match=says):
        WRONG[says](torch.randn(2, 11), torch.randn(2, 11))


def test_documented_equivalent() -> None:
    """The snippet of the docstring, word by word."""
    student_logits, teacher_logits = make_pair(2, 3, 50)
    temperature = 2.0
    log_q, log_p = (torch.log_softmax(z.float() / temperature, -1) for z in (student_logits, teacher_logits))
    forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    top1_agreement = log_q.argmax(-1) == log_p.argmax(-1)
    stats = kldiv_ext.token_stats(student_logits, teacher_logits, temperature=temperature)
    torch.testing.assert_close(stats.forward_kl, forward_kl)
    assert torch.equal(stats.top1_agreement, top1_agreement)
