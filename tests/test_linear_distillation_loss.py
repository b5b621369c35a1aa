"""linear_distillation_loss: what distillation_loss says of the logits, their gradients' products, chunks and memory."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DIVERGENCES,
    ENDPOINTS,
    FORWARD_KL,
    JSD,
    Divergence,
    assert_gradients_close,
    assert_losses_close,
    check,
    loss_scale,
    make_pair,
)
from test_distillation_options import COLUMNS, OPTIONS, arguments
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kldiv_ext import LinearDistillationLoss, distillation_loss, linear, linear_distillation_loss, reference
from kldiv_ext.linear import BytesPerPosition as Need
from kldiv_ext.options import OperatorOptions

NAMES = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
HIDDEN, TEACHER_HIDDEN = 9, 6

# Relative error of a whole gradient against float64 from the same inputs. In 16 bits logits (on the CPU), their
# gradients, and on the CPU products of chunks are rounded.
ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def make_models(
    *shape: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    vocab: int = COLUMNS,
    hidden: int = HIDDEN,
    bias: bool = True,
) -> dict[str, Tensor]:
    """Every tensor of both models, by name; logits of both are about N(0, 1)."""
    generator = torch.Generator().manual_seed(1)

    def noise(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator, dtype=torch.float64)).to(device, dtype)

    models = {}
    for side, size in (("student", hidden), ("teacher", TEACHER_HIDDEN)):
        models[f"{side}_hidden"] = noise(*shape, size)
        models[f"{side}_weight"] = noise(vocab, size, scale=size**-0.5)
        if bias:
            models[f"{side}_bias"] = noise(vocab, scale=0.3)
    return models


def run(
    function: Callable[..., Tensor],
    models: dict[str, Tensor],
    *,
    wanted: set[str] | None = None,
    grad_output: Tensor | float = 1.0,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of what is wanted, by default of everything."""
    wanted = set(models) if wanted is None else wanted
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in models.items()}
    loss = function(**leaves, **options)
    if wanted:
        loss.backward(torch.as_tensor(grad_output, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    return loss.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


def check_models(models: dict[str, Tensor], *, chunk_size: int | None = 5, **options: Any) -> None:
    """Against the float64 oracle on the same inputs."""
    grad_output = options.pop("grad_output", 1.0) * max(loss_scale(x.dtype) for x in models.values())
    workspace = {"chunk_size": chunk_size, "max_workspace": options.pop("max_workspace", None)}
    loss, gradients = run(linear_distillation_loss, models, grad_output=grad_output, **workspace, **options)
    doubled = {name: x.double() for name, x in models.items()}
    expected, expected_gradients = run(reference.linear_distillation_loss, doubled, grad_output=grad_output, **options)
    worst = max(ERROR[x.dtype] for x in models.values())
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss.double(), expected, rtol=worst, atol=worst)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        assert gradient.dtype == models[name].dtype and gradient.shape == models[name].shape
        error = (gradient.double() - expected_gradients[name]).norm()
        assert error <= worst * expected_gradients[name].norm(), f"{name}: {error / expected_gradients[name].norm()}"


# ---------------------------------------------------------------- the same answers as distillation_loss


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(device: str, option: str, dtype: torch.dtype) -> None:
    models = make_models(3, 4, device=device, dtype=dtype)
    for reduction in ("mean", "none", "sum", "batchmean"):
        check_models(models, reduction=reduction, **arguments(option, device, 3, 4))
    check_models(models, chunk_size=None, divergence="jsd", beta=0.1, **arguments(option, device, 3, 4))


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDPOINTS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_divergence(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    models = make_models(11, device=device, dtype=dtype, bias=False)
    check_models(models, temperature=1.5, **divergence.options)
    check_models(models, temperature=1.5, reduction="none", **divergence.options)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_it_is_distillation_loss_of_the_logits(device: str, dtype: torch.dtype) -> None:
    """To the last digits where both see the same logits; on a GPU they are not rounded here."""
    models = make_models(2, 6, device=device, dtype=dtype, bias=False)
    logits = [F.linear(models[f"{side}_hidden"], models[f"{side}_weight"]) for side in ("student", "teacher")]
    if device == "cuda":
        logits = [
            F.linear(models[f"{s}_hidden"].float(), models[f"{s}_weight"].float()) for s in ("student", "teacher")
        ]
    for divergence in (FORWARD_KL, JSD):
        expected = distillation_loss(*logits, **divergence.options)
        loss = linear_distillation_loss(**models, chunk_size=4, **divergence.options)
        assert_losses_close(loss, expected.to(loss.dtype))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 12, 100, None])
def test_chunks(device: str, chunk_size: int | None) -> None:
    models = make_models(3, 4, device=device)
    for reduction in ("mean", "none"):
        check_models(models, chunk_size=chunk_size, reduction=reduction, mask=torch.rand(3, 4, device=device) < 0.7)


def test_a_small_workspace_is_many_chunks(device: str) -> None:
    check_models(make_models(50, device=device), chunk_size=None, max_workspace=3 * 8 * 2 * COLUMNS)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 1, 3), (1,) * 9])
def test_shapes(device: str, shape: tuple[int, ...]) -> None:
    models = make_models(*shape, device=device)
    for reduction in ("mean", "none", "batchmean"):
        check_models(models, reduction=reduction)


def test_strides(device: str) -> None:
    models = make_models(4, 6, device=device)
    models["student_hidden"] = models["student_hidden"].transpose(0, 1)
    models["teacher_hidden"] = models["teacher_hidden"].transpose(0, 1)
    models["student_weight"] = models["student_weight"].t().contiguous().t()
    models["teacher_weight"] = torch.cat([models["teacher_weight"]] * 2, 1)[:, :TEACHER_HIDDEN]
    check_models(models)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_dtypes_of_student_and_teacher(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    models = make_models(3, 4, device=device)
    check_models({name: x.to(dtypes[name.startswith("teacher")]) for name, x in models.items()})


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_a_teacher_given_as_logits(device: str, dtype: torch.dtype) -> None:
    """With its gradient; padded to another size too."""
    models = make_models(3, 4, device=device, dtype=dtype)
    models = {name: x for name, x in models.items() if name.startswith("student")}
    models["teacher_logits"] = torch.randn(3, 4, COLUMNS, device=device).to(dtype)
    mask = torch.rand(3, 4, device=device) < 0.6
    for options in ({}, {"mask": mask}, {"divergence": "jsd", "reduction": "none", "mask": mask}):
        check_models(models, **options)
    models["teacher_logits"] = torch.randn(3, 5, COLUMNS, device=device).to(dtype)[:, :-1]  # shifted: no view of rows
    for options in ({}, {"mask": mask}, {"reduction": "none", "divergence": "jsd"}):
        check_models(models, **options)
    models["teacher_logits"] = torch.randn(3, 4, COLUMNS + 5, device=device).to(dtype)
    check_models(models, valid_vocab=COLUMNS - 3, mask=mask)


def test_padded_vocabularies(device: str) -> None:
    models = make_models(3, 4, device=device)
    models["teacher_weight"] = torch.cat(
        [models["teacher_weight"], torch.full((6, TEACHER_HIDDEN), torch.nan, device=device)]
    )
    models["teacher_bias"] = torch.cat([models["teacher_bias"], torch.full((6,), torch.nan, device=device)])
    _, gradients = run(linear_distillation_loss, models, valid_vocab=COLUMNS - 2, chunk_size=5)
    cut = {n: x[: COLUMNS - 2] if n.endswith(("weight", "bias")) else x for n, x in models.items()}
    _, expected = run(linear_distillation_loss, cut, chunk_size=5)
    for name, gradient in gradients.items():
        if not name.endswith("hidden"):
            assert not gradient[COLUMNS - 2 :].any()
            gradient = gradient[: COLUMNS - 2]
        assert torch.equal(gradient, expected[name])
    leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
    loss = linear_distillation_loss(**leaves, valid_vocab=COLUMNS - 2)
    again = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    for gradient, other in zip(again, gradients.values(), strict=True):
        torch.testing.assert_close(gradient, other)


# ---------------------------------------------------------------- positions that do not count


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_masked_positions_are_never_read(device: str, dtype: torch.dtype, reduction: str) -> None:
    """What stands there, NaN too, reaches neither the loss nor the gradient of a weight; their own is 0."""
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    clean, broken = make_models(6, device=device, dtype=dtype), make_models(6, device=device, dtype=dtype)
    for side in ("student", "teacher"):
        broken[f"{side}_hidden"][~mask] = torch.nan
    results = [
        run(linear_distillation_loss, models, mask=mask, reduction=reduction, chunk_size=2)
        for models in (clean, broken)
    ]
    assert torch.equal(results[0][0], results[1][0])
    for name in NAMES:
        assert torch.equal(results[0][1][name], results[1][1][name]), name
    for side in ("student", "teacher"):
        assert not results[1][1][f"{side}_hidden"][~mask].any()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3)])
def test_nothing_counts(device: str, shape: tuple[int, ...]) -> None:
    models = make_models(*shape, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for reduction in ("mean", "sum", "none", "batchmean"):
        loss, gradients = run(linear_distillation_loss, models, mask=mask, reduction=reduction)
        assert not loss.any() and len(gradients) == len(models)
        assert not any(gradient.any() for gradient in gradients.values())


def test_without_weight_nothing_is_read(device: str) -> None:
    models = make_models(6, device=device)
    models["student_hidden"][2] = torch.nan
    loss, gradients = run(linear_distillation_loss, models, soft_weight=0.0)
    assert not loss.any() and not any(gradient.any() for gradient in gradients.values())


def test_micro_batches_are_the_big_batch(device: str) -> None:
    models = make_models(10, device=device)
    _, expected = run(linear_distillation_loss, models)
    whole = {name: x.detach().requires_grad_() for name, x in models.items()}
    for rows in (slice(0, 3), slice(3, 10)):
        part = {name: x[rows] if name.endswith("hidden") else x for name, x in whole.items()}
        linear_distillation_loss(**part, num_items=10).backward()
    for name, x in whole.items():
        torch.testing.assert_close(x.grad, expected[name], rtol=1e-12, atol=1e-14)


class Products:
    """Counts the multiplications of every product, as positions x vocabulary x hidden."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        for name in ("_product", "_add_product"):
            monkeypatch.setattr(linear, name, self.counted(getattr(linear, name)))

    def counted(self, function: Callable[..., None]) -> Callable[..., None]:
        def count(a: Tensor, b: Tensor, *rest: Any) -> None:
            self.counts.append(a.shape[0] * a.shape[1] * b.shape[1])
            function(a, b, *rest)

        return count

    def take(self) -> int:
        total, self.counts = sum(self.counts), []
        return total


def test_only_what_is_needed_is_computed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice of gradients: those, their values, and a product for each and for the logits."""
    models = make_models(6, device=device)
    _, everything = run(linear_distillation_loss, models, chunk_size=4)
    products = Products(monkeypatch)
    one = {"student": 6 * COLUMNS * HIDDEN, "teacher": 6 * COLUMNS * TEACHER_HIDDEN}
    for chosen in itertools.product((False, True), repeat=6):
        wanted = {name for name, w in zip(NAMES, chosen, strict=True) if w}
        _, gradients = run(linear_distillation_loss, models, wanted=wanted, chunk_size=4)
        assert set(gradients) == wanted
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, everything[name], rtol=1e-12, atol=1e-15)
        expected = sum(one.values()) + sum(one[name[:7]] for name in wanted if not name.endswith("bias"))
        assert products.take() == expected
    with torch.no_grad():
        leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
        assert not linear_distillation_loss(**leaves).requires_grad
    assert products.take() == sum(one.values())


def test_positions_that_do_not_count_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where it can be known without waiting."""
    models = make_models(12)
    products = Products(monkeypatch)
    run(linear_distillation_loss, models)
    whole = products.take()
    run(linear_distillation_loss, models, mask=torch.arange(12) % 4 == 1)
    assert products.take() * 4 == whole


# ---------------------------------------------------------------- autograd


def test_grad_output_and_retain_graph(device: str) -> None:
    models = make_models(6, device=device)
    for reduction in ("mean", "none"):
        leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
        loss = linear_distillation_loss(**leaves, reduction=reduction, chunk_size=4)
        factor = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=device).reshape(loss.shape)
        first = torch.autograd.grad(loss, list(leaves.values()), factor, retain_graph=True)
        second = torch.autograd.grad(loss, list(leaves.values()), factor)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        check_models(models, reduction=reduction, grad_output=factor)


@pytest.mark.parametrize("divergence", [FORWARD_KL, JSD], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(device: str, divergence: Divergence, reduction: str) -> None:
    models = {n: x.requires_grad_() for n, x in make_models(3, device=device, vocab=7, hidden=2).items()}

    def function(*tensors: Tensor) -> Tensor:
        return linear_distillation_loss(
            **dict(zip(models, tensors, strict=True)), reduction=reduction, chunk_size=2, **divergence.options
        )

    inputs = tuple(models.values())
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_transforms_and_forward_mode(device: str) -> None:
    """torch.func and tangents, by plain operators."""
    models = make_models(4, device=device)

    def function(hidden: Tensor) -> Tensor:
        return linear_distillation_loss(**{**models, "student_hidden": hidden})

    hidden = models["student_hidden"]
    _, expected = run(linear_distillation_loss, models)
    torch.testing.assert_close(torch.func.grad(function)(hidden), expected["student_hidden"])
    each = torch.func.vmap(torch.func.grad(function))(torch.stack([hidden, hidden]))
    torch.testing.assert_close(each[1], expected["student_hidden"])
    _, tangent = torch.func.jvp(function, (hidden,), (torch.ones_like(hidden),))
    torch.testing.assert_close(tangent, expected["student_hidden"].sum())


def test_one_head_for_both_models(device: str) -> None:
    """The same tensor twice gets both gradients; so does an embedding that is also the head."""
    embedding = torch.randn(COLUMNS, HIDDEN, dtype=torch.float64, device=device)
    ids = torch.tensor([3, 9, 3, 0], device=device)
    teacher = torch.randn(4, HIDDEN, dtype=torch.float64, device=device)
    gradients = []
    for function in (linear_distillation_loss, reference.linear_distillation_loss):
        leaf = embedding.clone().requires_grad_()
        function(F.embedding(ids, leaf).tanh(), leaf, teacher, leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device: str, dtype: torch.dtype) -> None:
    """Products in its dtype, as F.linear's; parameters and their gradients are float32, and sums are not rounded."""
    models = make_models(40, device=device, dtype=torch.float32)
    with torch.autocast(device, dtype):
        loss, gradients = run(linear_distillation_loss, models, grad_output=2.0**10, chunk_size=16)
    expected, exact = run(reference.linear_distillation_loss, {n: x.double() for n, x in models.items()})
    torch.testing.assert_close(loss.double(), expected, rtol=ERROR[dtype], atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient.double() / 2**10 - exact[name]).norm() <= ERROR[dtype] * exact[name].norm(), name
    mixed = {n: x.to(dtype) if n.endswith("hidden") else x for n, x in models.items()}
    with torch.autocast(device, dtype):
        assert linear_distillation_loss(**mixed, chunk_size=16) == loss
    double = {n: x.double() for n, x in models.items()}
    with torch.autocast(device, dtype):
        torch.testing.assert_close(linear_distillation_loss(**double), expected)


def test_autocast_around_backward_has_no_say() -> None:
    """Of float16, whose gradients are made in backward."""
    models = make_models(12, dtype=torch.float16)
    _, expected = run(linear_distillation_loss, models, chunk_size=4)
    leaves = {name: x.detach().requires_grad_() for name, x in models.items()}
    loss = linear_distillation_loss(**leaves, chunk_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert all(torch.equal(leaves[name].grad, expected[name]) for name in NAMES)


def test_float16_gradients_do_not_underflow(device: str) -> None:
    """Scaled before they are stored, as a GradScaler's factor asks for."""
    models = make_models(8, device=device, dtype=torch.float16)
    _, small = run(linear_distillation_loss, models, num_items=10**7, grad_output=2.0**24)
    _, expected = run(reference.linear_distillation_loss, {n: x.double() for n, x in models.items()}, num_items=10**7)
    for name in NAMES:
        exact = expected[name] * 2.0**24
        assert (small[name].double() - exact).norm() <= ERROR[torch.float16] * exact.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(device: str, reentrant: bool) -> None:
    models = make_models(6, device=device)
    _, expected = run(linear_distillation_loss, models)

    def checkpointed(**leaves: Tensor) -> Tensor:
        names = list(leaves)
        return checkpoint(
            lambda *x: linear_distillation_loss(**dict(zip(names, x, strict=True))),
            *leaves.values(),
            use_reentrant=reentrant,
        )

    _, gradients = run(checkpointed, models)
    for name in NAMES:
        assert torch.equal(gradients[name], expected[name])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ["mean", "none", "masked", "autocast"])
def test_compile(device: str, case: str, dynamic: bool) -> None:
    """One graph, and the same bits."""
    models = make_models(6, device=device, dtype=torch.float32)
    options: dict[str, Any] = {"reduction": "none" if case == "none" else "mean", "chunk_size": 4}
    if case == "masked":
        options |= {"mask": torch.arange(6, device=device) % 2 == 0, "labels": torch.arange(6, device=device)}
        options |= {"hard_weight": 0.5}
    torch._dynamo.reset()

    def function(**arguments: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=case == "autocast"):
            return linear_distillation_loss(**arguments)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    (loss, gradients), (expected, exact) = (run(f, models, **options) for f in (compiled, function))
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[name], exact[name]) for name in NAMES)


def test_compiled_func_grad_is_not_zero() -> None:
    models = make_models(4)

    def function(hidden: Tensor) -> Tensor:
        return linear_distillation_loss(**{**models, "student_hidden": hidden})

    compiled = torch.compile(torch.func.grad(function), backend="aot_eager")(models["student_hidden"])
    torch.testing.assert_close(compiled, run(linear_distillation_loss, models)[1]["student_hidden"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    models = make_models(40, device=device, dtype=dtype)
    (loss, gradients), (again, others) = (
        run(linear_distillation_loss, models, chunk_size=16, reduction="mean") for _ in range(2)
    )
    assert torch.equal(loss, again) and all(torch.equal(gradients[name], others[name]) for name in NAMES)


def test_inputs_are_left_alone(device: str) -> None:
    models = make_models(6, device=device, dtype=torch.float32)
    before = {name: x.clone() for name, x in models.items()}
    run(linear_distillation_loss, models, mask=torch.arange(6, device=device) > 1)
    assert all(torch.equal(models[name], before[name]) for name in NAMES)


# ---------------------------------------------------------------- the weight's gradient


def test_the_weights_gradient_is_added_up_in_float32(device: str) -> None:
    """Of 16-bit weights and many chunks: a sum in bfloat16 would lose what is small beside it."""
    chunks = 400
    models = make_models(chunks, device=device, dtype=torch.bfloat16, bias=False)
    rows = {name: x[:1].expand_as(x) if name.endswith("hidden") else x for name, x in models.items()}
    single = {name: x[:1] for name, x in models.items() if name.endswith("hidden")}
    _, one = run(linear_distillation_loss, {**models, **single}, reduction="sum")
    _, all_of_them = run(linear_distillation_loss, rows, reduction="sum", chunk_size=1)
    expected = chunks * one["student_weight"].double()
    error = (all_of_them["student_weight"].double() - expected).norm() / expected.norm()
    assert error <= 2.0**-8


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "need", [Need(4, 4, 1), Need(2, 8, 4), Need(0, 8, 1), Need(1000, 4000, 4), Need(7, 3, 1)], ids=str
)
def test_chunk_sizes(need: Need) -> None:
    """They hold all positions, never take more than there is, and use most of it."""
    for positions, workspace in itertools.product((1, 5, 127, 128, 129, 4096, 65537), (5000, 10**5, 10**7)):
        size, part = need.chunk(positions, workspace, None)
        assert 1 <= part <= size <= positions and part * need.parts >= size
        assert need(size) <= workspace or size == 1
        if size < positions:
            assert need(2 * size + 2 * 128 * need.parts) > workspace
    assert need.chunk(10, 1, 7)[0] == 7
    assert need.chunk(10, 1, 70)[0] == 10


def peak_extra_bytes(function: Callable[[], Any], device: str) -> int:
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
    """The workspace, the gradients, and a little."""
    if device == "cpu" and not (sys.platform == "linux" and Path("/proc/self/clear_refs").exists()):
        pytest.skip("this system does not tell the peak")
    positions, vocab, hidden, workspace = 8192, 16000, 16, 32_000_000
    x, y = (torch.randn(positions, hidden, device=device).to(dtype) for _ in range(2))
    weight, other = (torch.randn(vocab, hidden, device=device).to(dtype) for _ in range(2))
    bias = torch.randn(vocab, device=device).to(dtype)
    leaves = [z.requires_grad_() for z in (x, weight, bias)]
    teacher: dict[str, Tensor] = {"teacher_hidden": y, "teacher_weight": other}
    if given:
        logits = torch.randn(2, positions // 2 + 1, vocab, device=device, dtype=dtype)
        logits = logits[:, :-1] if given == "shifted logits" else logits.flatten(0, 1)[:positions].unflatten(0, (2, -1))
        teacher = {"teacher_logits": logits.requires_grad_(given == "logits with a gradient")}
        leaves += [logits] if logits.requires_grad else []
    mask = (torch.arange(positions, device=device) % 8 != 0).view(2, -1) if masked else None

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        shaped = {name: z.view(2, -1, hidden) if name.endswith("hidden") else z for name, z in teacher.items()}
        loss = linear_distillation_loss(
            x.view(2, -1, hidden), weight, **shaped, student_bias=bias, mask=mask, max_workspace=workspace
        )
        loss.backward()

    step()
    for leaf in leaves:
        leaf.grad = None
    gradients = sum(leaf.nbytes for leaf in leaves) + (4 * weight.numel() if dtype == torch.bfloat16 else 0)
    assert peak_extra_bytes(step, device) <= workspace + gradients + 16_000_000
    assert 2 * positions * vocab * x.element_size() > 10 * workspace  # what the logits would take


# ---------------------------------------------------------------- the operator beneath


@pytest.mark.parametrize("divergence", [*DIVERGENCES], ids=str)
@pytest.mark.parametrize("columns", [COLUMNS, 4500])
@pytest.mark.parametrize("options", [{}, {"hard_weight": 0.5, "logit_softcap": 3.0}], ids=["", "labels, softcap"])
def test_gradients_over_the_logits_and_in_another_dtype(
    device: str, divergence: Divergence, columns: int, options: dict[str, Any]
) -> None:
    """distillation_loss_out, of float32 logits: with the student's gradient in their place, and with narrower ones."""
    student, teacher = make_pair(5, columns, spread=2.0, device=device)
    labels = torch.randint(columns, (5,), device=device)
    expected = check(student, teacher, labels, reduction="none", **divergence.options, **options)
    softcap = options.get("logit_softcap", 0.0)
    parameter = divergence.parameter or 0.0
    hard = options.get("hard_weight", 0.0)
    arguments = OperatorOptions(1.0, hard, None, divergence.name, parameter, 1.0, (1.0, 1.0), (softcap, softcap), None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = student.clone()
        loss = torch.empty(5, device=device)
        of_student = logits if dtype == torch.float32 else torch.empty_like(student, dtype=dtype)
        of_teacher = torch.empty_like(teacher, dtype=dtype)
        for wanted in ((of_student, None), (of_student, of_teacher)):
            if dtype == torch.float32:
                logits.copy_(student)
            torch.ops.kldiv_ext.distillation_loss_out(
                logits, teacher, labels, None, *arguments, torch.full((), 2.0, device=device), loss, *wanted
            )
            assert_losses_close(loss, expected.loss)
            for made, exact in zip(wanted, (expected.grad_student, expected.grad_teacher), strict=True):
                if made is not None:
                    assert exact is not None
                    floor = 1e-6 if dtype == torch.float16 else 0.0
                    assert_gradients_close(made, 2 * exact, floor * columns**0.5)


# ---------------------------------------------------------------- module and arguments


def test_module(device: str) -> None:
    models = make_models(6, device=device)
    module = LinearDistillationLoss(divergence="jsd", temperature=2.0, chunk_size=4)
    assert "chunk_size=4" in repr(module) and "divergence='jsd'" in repr(module)
    expected = linear_distillation_loss(**models, divergence="jsd", temperature=2.0, chunk_size=4)
    assert torch.equal(module(**models), expected)
    with pytest.raises(ValueError, match=r"chunk_size.*0"):
        LinearDistillationLoss(chunk_size=0)
    with pytest.raises(ValueError, match=r"temperature.*-1"):
        LinearDistillationLoss(temperature=-1.0)


GOOD = make_models(2, 3, dtype=torch.float32)
WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    **{f"{name} list": (TypeError, f"{name}.*list", {name: [1.0]}) for name in NAMES},
    **{f"{name} int": (TypeError, f"{name}.*int64", {name: GOOD[name].long()}) for name in NAMES},
    **{f"{name} meta": (ValueError, f"{name}.*meta", {name: GOOD[name].to("meta")}) for name in NAMES[1:]},
    **{f"{n} dtype": (TypeError, f"{n}.*float64", {n: GOOD[n].double()}) for n in NAMES if "hidden" not in n},
    "weight 1-d": (ValueError, r"student_weight.*\(9,\)", {"student_weight": GOOD["student_weight"][0]}),
    "weight of the other": (ValueError, r"student_weight.*\[V, 9\]", {"student_weight": GOOD["teacher_weight"]}),
    "hidden 0-d": (ValueError, r"student_hidden.*\(\)", {"student_hidden": torch.tensor(1.0)}),
    "bias 2-d": (ValueError, r"student_bias.*\[70\].*\(1, 70\)", {"student_bias": GOOD["student_bias"][None]}),
    "bias length": (ValueError, r"teacher_bias.*\(69,\)", {"teacher_bias": GOOD["teacher_bias"][1:]}),
    "positions": (ValueError, r"teacher_hidden.*\(2, 3, '...'\)", {"teacher_hidden": GOOD["teacher_hidden"][:1]}),
    "no teacher": (TypeError, "teacher_hidden.*None", {"teacher_hidden": None}),
    "no head": (TypeError, "teacher_weight.*None", {"teacher_weight": None}),
    "two teachers": (ValueError, "teacher_hidden.*teacher_logits", {"teacher_logits": torch.ones(2, 3, 70)}),
    "vocabularies": (
        ValueError,
        r"\(68, 9\).*70",
        {"student_weight": GOOD["student_weight"][2:], "student_bias": GOOD["student_bias"][2:]},
    ),
    "valid_vocab": (ValueError, "valid_vocab.*71", {"valid_vocab": 71}),
    "max_workspace small": (ValueError, "max_workspace.*bytes.*10", {"max_workspace": 10}),
    "max_workspace float": (TypeError, "max_workspace.*1e9|max_workspace.*1000000000.0", {"max_workspace": 1e9}),
    "max_workspace 0": (ValueError, "max_workspace.*0", {"max_workspace": 0}),
    "chunk_size bool": (TypeError, "chunk_size.*True", {"chunk_size": True}),
    "chunk_size -1": (ValueError, "chunk_size.*-1", {"chunk_size": -1}),
    "labels": (ValueError, r"labels.*student_hidden.*\(2, 3\).*\(6,\)", {"labels": torch.zeros(6).long()}),
    "no labels": (ValueError, "labels.*hard_weight", {"hard_weight": 0.5}),
    "label": (IndexError, r"labels.*\[0, 70\).*70", {"labels": torch.full((2, 3), 70), "hard_weight": 0.5}),
    "divergence": (ValueError, "divergence.*'kl'", {"divergence": "kl"}),
    "temperature": (ValueError, "temperature.*0", {"temperature": 0}),
    "in place": (TypeError, "inplace_backward", {"inplace_backward": True}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    error, says, arguments = WRONG[case]
    with pytest.raises(error, match=says):
        linear_distillation_loss(**{**GOOD, **arguments})
    assert linear_distillation_loss(**GOOD) > 0
