"""linear.py: results, autograd, modes, chunks, products and memory of linear_distillation_loss."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable
from pathlib import Path
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
    MODEL_TENSORS,
    OPTION_MIXES,
    REDUCTIONS,
    Divergence,
    Mix,
    by_position,
    make_models,
    named,
    padded,
    run,
    run_models,
)
from oracle import LINEAR_GRADIENT, assert_equal, assert_losses_close, assert_norm_close, check_models
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import _status_bytes
from kldiv_ext import distillation_loss, linear, linear_distillation_loss, reference
from kldiv_ext.linear import BytesPerPosition

COLUMNS, HIDDEN, TEACHER_HIDDEN = 70, 9, 6
HEADS = [name for name in MODEL_TENSORS if not name.endswith("hidden")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", named({**OPTION_MIXES, **{str(d): Mix(d.options) for d in ALL_DIVERGENCES}}))
def test_options(device: str, mix: Mix, dtype: torch.dtype) -> None:
    models = make_models(3, 4, device=device, dtype=dtype)
    arguments = mix.arguments(3, 4, columns=COLUMNS, device=device)
    for reduction in REDUCTIONS:
        check_models(models, **{**arguments, "reduction": reduction})
    check_models(models, chunk_size=None, **{**JSD.options, **arguments})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_distillation_loss_of_the_logits(device: str, dtype: torch.dtype) -> None:
    """Both losses see the same logits, which are float32 on a GPU."""
    models = make_models(2, 6, device=device, dtype=dtype, bias=False)
    wide = {name: x.float() for name, x in models.items()} if device == "cuda" else models
    logits = [F.linear(wide[f"{side}_hidden"], wide[f"{side}_weight"]) for side in ("student", "teacher")]
    for divergence in BOTH_PATHS:
        expected = distillation_loss(*logits, **divergence.options)
        loss = linear_distillation_loss(**models, chunk_size=4, **divergence.options)
        assert_losses_close(loss, expected.to(loss.dtype))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 1, 3), (1,) * 9], ids=str)
def test_shapes(device: str, shape: tuple[int, ...]) -> None:
    for reduction in ("mean", "none", "batchmean"):
        check_models(make_models(*shape, device=device), reduction=reduction)


VARIANTS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "rows in another order": lambda name, x: LAYOUTS["second dimension first"](x) if x.dim() > 1 else x,
    "columns cut": lambda name, x: padded(x, -1),
    "bfloat16 student": lambda name, x: x.to(torch.bfloat16 if name.startswith("student") else torch.float32),
    "float32 student": lambda name, x: x.float() if name.startswith("student") else x,
}


@pytest.mark.parametrize("change", named(VARIANTS))
def test_strides_and_dtypes(device: str, change: Callable[[str, Tensor], Tensor]) -> None:
    check_models({name: change(name, x) for name, x in make_models(4, 6, device=device).items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_logits(device: str, dtype: torch.dtype) -> None:
    """The teacher's logits are contiguous, have strides that no view flattens, or are padded."""
    models = make_models(3, 4, device=device, dtype=dtype)
    models = {name: x for name, x in models.items() if name.startswith("student")}
    mask = torch.rand(3, 4, device=device) < 0.6
    logits = torch.randn(3, 5, COLUMNS, device=device).to(dtype)
    for teacher_logits in (logits[:, :-1].contiguous(), logits[:, :-1]):
        models["teacher_logits"] = teacher_logits
        for options in ({}, {**JSD.options, "reduction": "none"}):
            check_models(models, **options)
            check_models(models, **options, mask=mask)
    models["teacher_logits"] = torch.randn(3, 4, COLUMNS + 5, device=device).to(dtype)
    check_models(models, valid_vocab=COLUMNS - 3, mask=mask)


def test_padded_vocabularies(device: str) -> None:
    """Padding is not read, its gradients are 0, and the two sides' may differ."""
    models = make_models(3, 4, device=device)
    for name in ("teacher_weight", "teacher_bias"):
        models[name] = torch.cat([models[name], torch.full_like(models[name][:6], torch.nan)])
    valid = COLUMNS - 2
    _, gradients = run_models(linear_distillation_loss, models, valid_vocab=valid, chunk_size=5)
    cut = {name: x[:valid] if name in HEADS else x for name, x in models.items()}
    _, expected = run_models(linear_distillation_loss, cut, chunk_size=5)
    assert not any(gradients[name][valid:].any() for name in HEADS)
    assert_equal({name: g[:valid] if name in HEADS else g for name, g in gradients.items()}, expected)
    leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
    loss = linear_distillation_loss(**leaves, valid_vocab=valid)
    again = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    torch.testing.assert_close(list(again), list(gradients.values()))


# ---------------------------------------------------------------- positions that do not count


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_masked_positions_are_never_read(device: str, dtype: torch.dtype, reduction: str) -> None:
    """A NaN in such a position reaches neither the loss nor a weight's gradient; the position's gradient is 0."""
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    models = make_models(6, device=device, dtype=dtype)
    broken = {n: x.masked_fill(~mask[:, None], torch.nan) if n not in HEADS else x for n, x in models.items()}
    expected, result = (
        run_models(linear_distillation_loss, m, mask=mask, reduction=reduction, chunk_size=2) for m in (models, broken)
    )
    assert_equal(result, expected)
    assert not any(result[1][f"{side}_hidden"][~mask].any() for side in ("student", "teacher"))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_position_counts(device: str, reduction: str, shape: tuple[int, ...]) -> None:
    """Nothing is read and all gradients are 0, if the mask excludes all positions or both weights are 0."""
    models = make_models(*shape, device=device)
    models["student_hidden"].fill_(torch.nan)
    for options in ({"mask": torch.zeros(shape, dtype=torch.bool, device=device)}, {"soft_weight": 0.0}):
        loss, gradients = run_models(linear_distillation_loss, models, reduction=reduction, **options)
        assert not loss.any() and len(gradients) == len(models)
        assert not any(gradient.any() for gradient in gradients.values())


def test_gradient_accumulation(device: str) -> None:
    """With a shared num_items, micro-batches add up to the large batch."""
    models = make_models(10, device=device)
    _, expected = run_models(linear_distillation_loss, models)
    leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
    for rows in (slice(0, 3), slice(3, 10)):
        part = {name: x if name in HEADS else x[rows] for name, x in leaves.items()}
        linear_distillation_loss(**part, num_items=10).backward()
    torch.testing.assert_close({name: x.grad for name, x in leaves.items()}, expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- autograd and modes


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_output_and_retain_graph(device: str, reduction: str) -> None:
    models = make_models(6, device=device)
    leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
    loss = linear_distillation_loss(**leaves, reduction=reduction, chunk_size=4)
    factor = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=device).reshape(loss.shape)
    first = torch.autograd.grad(loss, list(leaves.values()), factor, retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()), factor)
    assert_equal(first, second)
    check_models(models, reduction=reduction, grad_output=factor)


@pytest.mark.parametrize("divergence", BOTH_PATHS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(device: str, divergence: Divergence, reduction: str) -> None:
    models = {n: x.requires_grad_() for n, x in make_models(3, device=device, vocab=7, hidden=(2, 6)).items()}
    options = {**divergence.options, "reduction": reduction, "chunk_size": 2}
    function = functools.partial(by_position(linear_distillation_loss, models), **options)
    inputs = tuple(models.values())
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_transforms_and_forward_mode(device: str) -> None:
    """The composite supports torch.func and tangents; a compiled func.grad is not 0."""
    models = make_models(4, device=device)
    hidden = models.pop("student_hidden")
    function = lambda hidden: linear_distillation_loss(hidden, **models)  # noqa: E731
    expected = run(function, hidden).gradients[0]
    gradient = torch.func.grad(function)
    torch.testing.assert_close(gradient(hidden), expected)
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(hidden), expected)
    torch.testing.assert_close(torch.func.vmap(gradient)(torch.stack([hidden, hidden]))[1], expected)
    _, tangent = torch.func.jvp(function, (hidden,), (torch.ones_like(hidden),))
    torch.testing.assert_close(tangent, expected.sum())


def test_one_head_for_both_models(device: str) -> None:
    """A tensor that is given twice gets both gradients; so does an embedding that is also the head."""
    embedding, teacher = torch.randn(COLUMNS, HIDDEN, device=device), torch.randn(4, HIDDEN, device=device).double()
    ids = torch.tensor([3, 9, 3, 0], device=device)
    ours, exact = (
        run(lambda head, f=f: f(F.embedding(ids, head).tanh(), head, teacher, head), embedding.double())
        for f in (linear_distillation_loss, reference.linear_distillation_loss)
    )
    torch.testing.assert_close(ours.gradients[0], exact.gradients[0], rtol=1e-12, atol=1e-14)


def test_float16_gradients_do_not_underflow(device: str) -> None:
    """Gradients are multiplied by grad_output, the factor of a GradScaler, before they are stored."""
    models = make_models(8, device=device, dtype=torch.float16)
    _, small = run_models(linear_distillation_loss, models, num_items=10**7, grad_output=2.0**24)
    doubled = {name: x.double() for name, x in models.items()}
    _, exact = run_models(reference.linear_distillation_loss, doubled, num_items=10**7, grad_output=2.0**24)
    for name, gradient in small.items():
        assert_norm_close(gradient, exact[name], LINEAR_GRADIENT[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    """The bits are the same in every run, and no input is written."""
    models = make_models(40, device=device, dtype=dtype)
    before = {name: x.clone() for name, x in models.items()}
    for options in ({}, {"mask": torch.arange(40, device=device) % 3 > 0}):
        first, second = (run_models(linear_distillation_loss, models, chunk_size=16, **options) for _ in range(2))
        assert_equal(first, second)
    assert_equal(models, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device: str, dtype: torch.dtype) -> None:
    """Products have autocast's dtype, as in F.linear; float32 parameters get float32 gradients, with unrounded sums."""
    models = make_models(40, device=device, dtype=torch.float32)
    double = {name: x.double() for name, x in models.items()}
    exact_loss, exact = run_models(reference.linear_distillation_loss, double)
    mixed = {name: x if name in HEADS else x.to(dtype) for name, x in models.items()}
    with torch.autocast(device, dtype):
        loss, gradients = run_models(linear_distillation_loss, models, grad_output=2.0**10, chunk_size=16)
        assert linear_distillation_loss(**mixed, chunk_size=16) == loss
        torch.testing.assert_close(linear_distillation_loss(**double), exact_loss)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=LINEAR_GRADIENT[dtype], atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert_norm_close(gradient / 2**10, exact[name], LINEAR_GRADIENT[dtype])


def test_autocast_around_backward_changes_nothing() -> None:
    """Float16 gradients are made in backward, in the dtype of the forward."""
    models = make_models(12, dtype=torch.float16)
    _, expected = run_models(linear_distillation_loss, models, chunk_size=4)
    leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
    loss = linear_distillation_loss(**leaves, chunk_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert_equal({name: x.grad for name, x in leaves.items()}, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(device: str, reentrant: bool) -> None:
    models = make_models(6, device=device)

    def checkpointed(**leaves: Tensor) -> Tensor:
        return checkpoint(by_position(linear_distillation_loss, leaves), *leaves.values(), use_reentrant=reentrant)

    assert_equal(run_models(checkpointed, models), run_models(linear_distillation_loss, models))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ["mean", "none", "masked", "autocast"])
def test_compile(device: str, case: str, dynamic: bool) -> None:
    """One graph, and the same bits."""
    models = make_models(6, device=device, dtype=torch.float32)
    options: dict[str, Any] = {"reduction": "none" if case == "none" else "mean", "chunk_size": 4}
    if case == "masked":
        positions = torch.arange(6, device=device)
        options |= {"mask": positions % 2 == 0, "labels": positions, "hard_weight": 0.5}

    def function(**arguments: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=case == "autocast"):
            return linear_distillation_loss(**arguments)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_equal(*(run_models(functools.partial(f, **options), models) for f in (compiled, function)))


# ---------------------------------------------------------------- chunks, products, memory


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 12, 100, None])
def test_chunks(device: str, chunk_size: int | None) -> None:
    models = make_models(3, 4, device=device)
    for reduction in ("mean", "none"):
        check_models(models, chunk_size=chunk_size, reduction=reduction, mask=torch.rand(3, 4, device=device) < 0.7)
    check_models(make_models(50, device=device), chunk_size=chunk_size, max_workspace=3 * 8 * 2 * COLUMNS)


@pytest.mark.parametrize("bytes_per_position", [(4, 4, 1), (2, 8, 4), (0, 8, 1), (1000, 4000, 4), (7, 3, 1)], ids=str)
def test_chunk_sizes(bytes_per_position: tuple[int, int, int]) -> None:
    """Chunks hold all positions, never exceed the workspace, and use most of it."""
    need = BytesPerPosition(*bytes_per_position)
    for positions, workspace in itertools.product((1, 5, 127, 128, 129, 4096, 65537), (5000, 10**5, 10**7)):
        size, part = need.chunk(positions, workspace, None)
        assert 1 <= part <= size <= positions and part * need.parts >= size
        assert need.total(size) <= workspace or size == 1
        assert size == positions or need.total(2 * size + 2 * linear.TILE * need.parts) > workspace
    assert need.chunk(10, 1, 7)[0] == 7
    assert need.chunk(10, 1, 70)[0] == 10


@pytest.fixture
def multiplications(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of multiplications of every product."""
    counts: list[int] = []

    def count(function: Callable[..., None], a: Tensor, b: Tensor, *rest: Any) -> None:
        counts.append(a.shape[0] * a.shape[1] * b.shape[1])
        function(a, b, *rest)

    for name in ("_product", "_add_product"):
        monkeypatch.setattr(linear, name, functools.partial(count, getattr(linear, name)))
    return counts


def test_only_requested_gradients(device: str, multiplications: list[int]) -> None:
    """Every choice of gradients returns these alone, and costs one product for each and for the logits."""
    models = make_models(6, device=device)
    _, everything = run_models(linear_distillation_loss, models, chunk_size=4)
    one = {"student": 6 * COLUMNS * HIDDEN, "teacher": 6 * COLUMNS * TEACHER_HIDDEN}
    for choice in itertools.product((False, True), repeat=6):
        needs_grad = list(itertools.compress(MODEL_TENSORS, choice))
        multiplications.clear()
        _, gradients = run_models(linear_distillation_loss, models, needs_grad=needs_grad, chunk_size=4)
        products = sum(one.values()) + sum(one[name[:7]] for name in needs_grad if not name.endswith("bias"))
        assert sum(multiplications) == products
        expected = {name: everything[name] for name in needs_grad}
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
        multiplications.clear()
        assert not linear_distillation_loss(**leaves).requires_grad
    assert sum(multiplications) == sum(one.values())


def test_positions_that_do_not_count_cost_no_product(multiplications: list[int]) -> None:
    """The CPU skips them, because finding them needs no synchronization."""
    models = make_models(12)
    run_models(linear_distillation_loss, models)
    whole = sum(multiplications)
    multiplications.clear()
    run_models(linear_distillation_loss, models, mask=torch.arange(12) % 4 == 1)
    assert sum(multiplications) * 4 == whole


def test_weight_gradients_are_summed_in_float32(device: str) -> None:
    """A bfloat16 sum of many chunks would lose small terms beside a large sum."""
    chunks = 400
    models = make_models(1, device=device, dtype=torch.bfloat16, bias=False)
    repeated = {name: x.expand(chunks, -1) if name.endswith("hidden") else x for name, x in models.items()}
    _, one = run_models(linear_distillation_loss, models, reduction="sum")
    _, summed = run_models(linear_distillation_loss, repeated, reduction="sum", chunk_size=1)
    assert_norm_close(summed["student_weight"], chunks * one["student_weight"].double(), 2.0**-8)


def peak_extra_bytes(function: Callable[[], None], device: str) -> int:
    """The largest amount of memory during a call, beyond that before it; the heap keeps what earlier calls freed."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [None, "logits", "shifted logits", "logits with a gradient"])
def test_peak_memory(device: str, dtype: torch.dtype, masked: bool, given: str | None) -> None:
    """It is that of the workspace, of the gradients and a few megabytes, however many positions there are."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not report peak memory")
    positions, vocab, hidden, workspace = 8192, 16000, 16, 32_000_000
    models = make_models(2, positions // 2, device=device, dtype=dtype, vocab=vocab, hidden=(hidden, hidden))
    del models["teacher_bias"]
    needs_grad = ["student_hidden", "student_weight", "student_bias"]
    if given:
        del models["teacher_hidden"], models["teacher_weight"]
        logits = torch.randn(2, positions // 2 + (given == "shifted logits"), vocab, device=device, dtype=dtype)
        models["teacher_logits"] = logits[:, : positions // 2]
        needs_grad += ["teacher_logits"] if given == "logits with a gradient" else []
    leaves = {name: x.requires_grad_(name in needs_grad) for name, x in models.items()}
    mask = (torch.arange(positions, device=device) % 8 != 0).view(2, -1) if masked else None

    def step() -> None:
        linear_distillation_loss(**leaves, mask=mask, max_workspace=workspace).backward()
        for leaf in leaves.values():
            leaf.grad = None

    step()
    weight = leaves["student_weight"]
    gradients = sum(leaves[name].nbytes for name in needs_grad)
    sums = 4 * weight.numel() if dtype == torch.bfloat16 else 0
    limit = workspace + gradients + sums + 16_000_000
    # Whatever the heap keeps between steps varies; whatever a step allocates does not.
    assert any(peak_extra_bytes(step, device) <= limit for _ in range(3))
    assert 2 * positions * vocab * weight.element_size() > 10 * workspace  # both sides' logits
