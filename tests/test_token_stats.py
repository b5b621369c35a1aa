"""token_stats against the float64 reference: every statistic, option, dtype and layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import DTYPES, LAYOUTS, MIXES, Mix, make_pair, named
from oracle import LOSS, assert_equal
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

from kldiv_ext import TokenStats, distillation_loss, reference, token_stats
from kldiv_ext.options import LogitsOptions, table

INF, NAN = torch.inf, torch.nan


def check(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options: Any) -> TokenStats:
    ours = token_stats(student, teacher, labels, **options)
    expected = reference.token_stats(student, teacher, labels, **options)
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    for name, value, exact in zip(TokenStats._fields, ours, expected, strict=True):
        if exact is None:
            assert value is None, name
            continue
        assert value.shape == student.shape[:-1] and value.device == student.device and not value.requires_grad
        if name == "top1_agreement":
            assert torch.equal(value, exact)
            continue
        assert value.dtype == dtype
        # Log-sum-exps, entropies and log-probabilities are differences of numbers of the size of the logits.
        floor = 1e-9 if name.endswith("kl") else 4 * 30.0 * torch.finfo(dtype).eps
        tolerances = {"rtol": LOSS[dtype], "atol": floor, "equal_nan": True}
        assert_close(value.double(), exact, **tolerances, msg=lambda m, n=name: f"{n}: {m}")
    return ours


STATS_MIXES = {
    "defaults": Mix({}),
    **{
        name: mix
        for name, mix in MIXES.items()
        if set(mix.options) <= set(table(LogitsOptions)) and set(mix.tensors) <= {"labels", "mask"}
    },
    "all": Mix({"temperature": 0.7, "logit_softcap": 3.0, "logit_scale": (0.5, 1.5), "valid_vocab": 60}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", named(STATS_MIXES))
def test_statistics(device: str, mix: Mix, dtype: torch.dtype) -> None:
    for shape, teacher_dtype in itertools.product(((3, 4, 70), (70,), (5, 2087), (2, 9000)), (dtype, torch.float32)):
        student, teacher = make_pair(*shape, dtype=dtype, teacher_dtype=teacher_dtype, spread=3.0, device=device)
        check(student, teacher, **mix.arguments(*shape[:-1], columns=shape[-1], device=device))
        labels = torch.randint(0, mix.options.get("valid_vocab", 60), shape[:-1], device=device)
        check(student, teacher, labels, **mix.options)


def test_positions(device: str) -> None:
    """Positions that do not count are 0 or False, and are never read."""
    student, _ = make_pair(2, 3, 70, device=device)
    teacher = student.clone()  # agreement everywhere else
    labels = torch.tensor([[1, -100, 69], [5, 10**9, 3]], device=device)
    mask = torch.tensor([[True, True, True], [True, False, False]], device=device)
    student[0, 1], teacher[1, 1] = NAN, INF
    stats = check(student, teacher, labels, mask=mask)
    counts = mask & (labels != -100)
    assert torch.equal(stats.top1_agreement, counts)
    assert torch.equal(stats.student_entropy != 0, counts)


def test_agreement_in_any_column(device: str) -> None:
    """The argmax may be in any chunk and any lane; among equal logits it is the first."""
    columns = 5000
    for first, second in ((0, 0), (0, 1), (17, 17), (1023, 1024), (1024, 1024), (4999, 4999), (2048, 4999), (7, 9)):
        student, teacher = torch.zeros(2, 2, columns, device=device)
        student[0, first] = teacher[0, second] = 1.0
        student[1, [first, 4998]] = teacher[1, [second, 4998]] = 1.0
        assert check(student, teacher).top1_agreement.tolist() == [first == second] * 2


def test_infinities(device: str) -> None:
    student, teacher = make_pair(8, 70, device=device)
    student[0, 0], teacher[1, 1] = -INF, -INF
    student[2, 2] = teacher[2, 2] = -INF
    student[3], teacher[4] = -INF, -INF
    student[5, 0], teacher[6, 0] = INF, NAN
    stats = check(student, teacher, torch.arange(8, device=device))
    assert stats.forward_kl.isinf().tolist() == [True] + [False] * 7
    assert stats.reverse_kl.isinf().tolist() == [False, True] + [False] * 6
    for value in stats[:-1]:
        assert value.isnan().tolist() == [False, False, False, True, True, True, True, False]


def test_divergences_are_those_of_the_loss(device: str) -> None:
    """Close rows keep their accuracy; identical rows have divergence 0 and agree."""
    for distance in (1.0, 1e-2, 1e-4):
        student, teacher = make_pair(4, 8000, spread=3.0, distance=distance, device=device)
        stats = check(student, teacher)
        for name in ("forward_kl", "reverse_kl"):
            loss = distillation_loss(student, teacher, divergence=name, reduction="none")
            assert_close(getattr(stats, name), loss, rtol=1e-5, atol=1e-10)
    same = token_stats(teacher, teacher.clone())
    assert not same.forward_kl.any() and not same.reverse_kl.any() and same.top1_agreement.all()


def test_empty_and_single(device: str) -> None:
    for shape in ((0, 5), (3, 0, 5), (3, 1)):
        check(*torch.zeros(2, *shape, device=device))


def test_strides_and_threads_change_nothing(device: str) -> None:
    student, teacher = make_pair(3, 7000, device=device)
    expected = token_stats(student, teacher)
    for layout in LAYOUTS.values():
        assert_equal(token_stats(layout(student), teacher), expected)
        assert_equal(token_stats(student, layout(teacher)), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert_equal(token_stats(student, teacher), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_gradient_compiled_and_batched(device: str, dtype: torch.dtype) -> None:
    """The same values under the compiler and, by plain operators, under vmap; no result requires a gradient."""
    student, teacher = (x.requires_grad_() for x in make_pair(2, 3, 70, dtype=dtype, device=device))
    labels = torch.tensor([[1, 2, -100], [5, 6, 7]], device=device)
    eager = token_stats(student, teacher, labels)
    compiled = torch.compile(token_stats, backend="aot_eager", fullgraph=True)(student, teacher, labels)
    assert_equal(compiled, eager)
    assert not any(value.requires_grad for value in (*compiled, *eager))
    assert_close(vmap(token_stats)(student, teacher, labels), eager)
