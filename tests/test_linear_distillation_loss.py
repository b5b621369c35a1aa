"""linear_distillation_loss against the float64 reference: options, shapes, positions, autograd and modes."""

from __future__ import annotations

import functools
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
    MODEL_TENSORS,
    OPTION_MIXES,
    REDUCTIONS,
    Divergence,
    Mix,
    make_models,
    named,
    padded,
    run,
    run_models,
)
from oracle import LINEAR_GRADIENT, assert_equal, assert_losses_close, assert_norm_close, check_models
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kldiv_ext import distillation_loss, linear_distillation_loss, reference

COLUMNS, HIDDEN = 70, 9
HEADS = [name for name in MODEL_TENSORS if not name.endswith("hidden")]

# ---------------------------------------------------------------- the results of distillation_loss


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
        for options in ({}, {"mask": mask}, {**JSD.options, "reduction": "none"}):
            check_models(models, **options)
        check_models(models, **JSD.options, reduction="none", mask=mask)
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


# ---------------------------------------------------------------- autograd


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

    def function(*tensors: Tensor) -> Tensor:
        named_tensors = dict(zip(models, tensors, strict=True))
        return linear_distillation_loss(**named_tensors, reduction=reduction, chunk_size=2, **divergence.options)

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
    for name in models:
        assert_norm_close(small[name], exact[name], LINEAR_GRADIENT[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    """The bits are the same in every run, and no input is written."""
    models = make_models(40, device=device, dtype=dtype)
    before = {name: x.clone() for name, x in models.items()}
    for options in ({}, {"mask": torch.arange(40, device=device) % 3 > 0}):
        first, second = (run_models(linear_distillation_loss, models, chunk_size=16, **options) for _ in range(2))
        assert_equal(first, second)
    assert_equal(models, before)


# ---------------------------------------------------------------- modes


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
        positional = lambda *x: linear_distillation_loss(**dict(zip(leaves, x, strict=True)))  # noqa: E731
        return checkpoint(positional, *leaves.values(), use_reentrant=reentrant)

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
