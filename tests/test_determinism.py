"""The same bits on every run, for any number of threads, batch, address and stride."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import DTYPES, FORWARD_KL, JSD, Divergence, make_pair, named, run
from oracle import assert_equal, assert_gradients_close

from kldiv_ext import distillation_loss

TWO_DIVERGENCES = pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Threads share out few long rows by chunks, many rows by the row.
SIZES = {"few-long": (2, 50257), "one-long": (1, 130000), "many": (64, 3000), "many-short": (5000, 40)}


@pytest.mark.parametrize("shape", named(SIZES))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@TWO_DIVERGENCES
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
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("columns", [40, 3000, 50257])
@TWO_DIVERGENCES
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
@TWO_DIVERGENCES
def test_addresses_and_strides(device: str, divergence: Divergence, dtype: torch.dtype, columns: int) -> None:
    student, teacher = make_pair(6, columns, dtype=dtype, device=device)
    expected = run(distillation_loss, student, teacher, **divergence.options)
    for offset in (0, 1, 3, 8):
        storage = torch.empty(6 * columns + offset, dtype=dtype, device=device)
        moved = storage[offset:].view(6, columns).copy_(student)
        assert_equal(run(distillation_loss, moved, teacher, **divergence.options), expected)
        assert_equal(run(distillation_loss, student, teacher + 0 * moved, **divergence.options), expected)
    doubled = torch.cat([teacher] * 2, 1)
    for strided in (teacher.t().contiguous().t(), teacher.repeat_interleave(2, 1)[:, ::2], doubled[:, :columns]):
        assert not strided.is_contiguous()
        assert_equal(run(distillation_loss, student, strided, **divergence.options), expected)


def test_reductions_agree(device: str) -> None:
    """The sum is that of the unreduced losses; gradients made in forward and in backward differ only by rounding."""
    student, teacher = make_pair(8, 3000, device=device)
    each = run(distillation_loss, student, teacher, **JSD.options, reduction="none")
    total = run(distillation_loss, student, teacher, **JSD.options, reduction="sum")
    assert total.loss == each.loss.double().sum().float()
    for value, expected in zip(total.gradients, each.gradients, strict=True):
        assert_gradients_close(value, expected)
