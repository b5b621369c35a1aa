"""linear.py: chunks, their products and memory, and the operator distillation_loss_out."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, MODEL_TENSORS, Divergence, make_models, make_pair, run_models
from oracle import assert_gradients_close, assert_losses_close, assert_norm_close, check, check_models
from torch import Tensor

from kldiv_ext import linear, linear_distillation_loss
from kldiv_ext._library import ops
from kldiv_ext.linear import BytesPerPosition
from kldiv_ext.options import OperatorOptions

COLUMNS, HIDDEN, TEACHER_HIDDEN = 70, 9, 6

# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 12, 100, None])
def test_chunks(device: str, chunk_size: int | None) -> None:
    models = make_models(3, 4, device=device)
    for reduction in ("mean", "none"):
        check_models(models, chunk_size=chunk_size, reduction=reduction, mask=torch.rand(3, 4, device=device) < 0.7)


def test_a_small_workspace_is_many_chunks(device: str) -> None:
    check_models(make_models(50, device=device), chunk_size=None, max_workspace=3 * 8 * 2 * COLUMNS)


@pytest.mark.parametrize("bytes_per_position", [(4, 4, 1), (2, 8, 4), (0, 8, 1), (1000, 4000, 4), (7, 3, 1)], ids=str)
def test_chunk_sizes(bytes_per_position: tuple[int, int, int]) -> None:
    """Chunks hold all positions, never exceed the workspace, and use most of it."""
    need = BytesPerPosition(*bytes_per_position)
    for positions, workspace in itertools.product((1, 5, 127, 128, 129, 4096, 65537), (5000, 10**5, 10**7)):
        size, part = need.chunk(positions, workspace, None)
        assert 1 <= part <= size <= positions and part * need.parts >= size
        assert need(size) <= workspace or size == 1
        assert size == positions or need(2 * size + 2 * linear.TILE * need.parts) > workspace
    assert need.chunk(10, 1, 7)[0] == 7
    assert need.chunk(10, 1, 70)[0] == 10


# ---------------------------------------------------------------- products


@pytest.fixture
def multiplications(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The multiplications of all products since the last call."""
    counts: list[int] = []

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def count(a: Tensor, b: Tensor, *rest: Any) -> None:
            counts.append(a.shape[0] * a.shape[1] * b.shape[1])
            function(a, b, *rest)

        return count

    def take() -> int:
        total = sum(counts)
        counts.clear()
        return total

    for name in ("_product", "_add_product"):
        monkeypatch.setattr(linear, name, counted(getattr(linear, name)))
    return take


def test_only_requested_gradients(device: str, multiplications: Callable[[], int]) -> None:
    """Every choice of gradients returns these alone, and costs one product for each and for the logits."""
    models = make_models(6, device=device)
    _, everything = run_models(linear_distillation_loss, models, chunk_size=4)
    multiplications()
    one = {"student": 6 * COLUMNS * HIDDEN, "teacher": 6 * COLUMNS * TEACHER_HIDDEN}
    for choice in itertools.product((False, True), repeat=6):
        needs_grad = list(itertools.compress(MODEL_TENSORS, choice))
        _, gradients = run_models(linear_distillation_loss, models, needs_grad=needs_grad, chunk_size=4)
        products = sum(one.values()) + sum(one[name[:7]] for name in needs_grad if not name.endswith("bias"))
        assert multiplications() == products
        expected = {name: everything[name] for name in needs_grad}
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
        assert not linear_distillation_loss(**leaves).requires_grad
    assert multiplications() == sum(one.values())


def test_positions_that_do_not_count_cost_no_product(multiplications: Callable[[], int]) -> None:
    """The CPU skips them, because finding them needs no synchronization."""
    models = make_models(12)
    run_models(linear_distillation_loss, models)
    whole = multiplications()
    run_models(linear_distillation_loss, models, mask=torch.arange(12) % 4 == 1)
    assert multiplications() * 4 == whole


def test_weight_gradients_are_summed_in_float32(device: str) -> None:
    """A bfloat16 sum of many chunks would lose small terms beside a large sum."""
    chunks = 400
    models = make_models(1, device=device, dtype=torch.bfloat16, bias=False)
    repeated = {name: x.expand(chunks, -1) if name.endswith("hidden") else x for name, x in models.items()}
    _, one = run_models(linear_distillation_loss, models, reduction="sum")
    _, summed = run_models(linear_distillation_loss, repeated, reduction="sum", chunk_size=1)
    assert_norm_close(summed["student_weight"], chunks * one["student_weight"].double(), 2.0**-8)


# ---------------------------------------------------------------- memory


def peak_extra_bytes(function: Callable[[], Any], device: str) -> int:
    """The largest amount of memory during a call, beyond that before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")

    def read(key: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))

    before = read("VmRSS")
    function()
    return read("VmHWM") - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [None, "logits", "shifted logits", "logits with a gradient"])
def test_memory_does_not_depend_on_the_positions(
    device: str, dtype: torch.dtype, masked: bool, given: str | None
) -> None:
    """Peak memory is that of the workspace and the gradients, and a few megabytes."""
    if device == "cpu" and not (sys.platform == "linux" and Path("/proc/self/clear_refs").exists()):
        pytest.skip("this system does not report peak memory")
    positions, vocab, hidden, workspace = 8192, 16000, 16, 32_000_000
    models = make_models(2, positions // 2, device=device, dtype=dtype, vocab=vocab, hidden=(hidden, hidden))
    del models["teacher_bias"]
    needs_grad = ["student_hidden", "student_weight", "student_bias"]
    if given:
        del models["teacher_hidden"], models["teacher_weight"]
        logits = torch.randn(2, positions // 2 + 1, vocab, device=device, dtype=dtype)
        shifted = logits[:, :-1]
        models["teacher_logits"] = (
            shifted if given == "shifted logits" else logits.view(-1, vocab)[:positions].unflatten(0, (2, -1))
        )
        needs_grad += ["teacher_logits"] if given == "logits with a gradient" else []
    leaves = {name: x.requires_grad_(name in needs_grad) for name, x in models.items()}
    mask = (torch.arange(positions, device=device) % 8 != 0).view(2, -1) if masked else None

    def step() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        linear_distillation_loss(**leaves, mask=mask, max_workspace=workspace).backward()

    step()
    for leaf in leaves.values():
        leaf.grad = None
    weight = leaves["student_weight"]
    gradients = sum(leaves[name].nbytes for name in needs_grad)
    sums = 4 * weight.numel() if dtype == torch.bfloat16 else 0
    limit = workspace + gradients + sums + 16_000_000
    # Whatever the heap keeps between steps varies; whatever a step allocates does not.
    assert any(peak_extra_bytes(step, device) <= limit for _ in range(3))
    assert 2 * positions * vocab * weight.element_size() > 10 * workspace  # both sides' logits


# ---------------------------------------------------------------- the operator beneath


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("columns", [COLUMNS, 4500])
@pytest.mark.parametrize("options", [{}, {"hard_weight": 0.5, "logit_softcap": 3.0}], ids=["", "labels, softcap"])
def test_distillation_loss_out(device: str, divergence: Divergence, columns: int, options: dict[str, Any]) -> None:
    """The student's gradient overwrites float32 logits, or gradients have a narrower dtype."""
    student, teacher = make_pair(5, columns, spread=2.0, device=device)
    labels = torch.randint(columns, (5,), device=device)
    expected = check(student, teacher, labels, reduction="none", **divergence.options, **options)
    softcap, hard, parameter = options.get("logit_softcap", 0.0), options.get("hard_weight", 0.0), divergence.parameter
    arguments = OperatorOptions(
        1.0, hard, None, divergence.name, parameter or 0.0, 1.0, (1.0, 1.0), (softcap, softcap), None
    )
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
