"""The operators as torch.library sees them, their autograd kernels, and the composites beneath those."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import DTYPES, MIXES, REDUCTIONS, Mix, logits, make_pair, run
from oracle import assert_gradients_close, assert_norm_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vjp
from torch.testing import assert_close

from kldiv_ext import DIVERGENCES, distillation_loss, kl_div, reference
from kldiv_ext._library import accumulation_dtype
from kldiv_ext.autograd import COMPOSITES
from kldiv_ext.options import OperatorOptions

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides",
    "ignore:.torch.jit.script",  # inside AOTAutograd
)

ROWS, COLUMNS = 4, 37  # more than a vector, and not a multiple of one

# ---------------------------------------------------------------- sample arguments of the operators

Arguments = tuple[Any, ...]
OPTIONS = OperatorOptions(1.0, 0.0, ROWS, "forward_kl", 0.0, 1.0, (1.0, 1.0), (0.0, 0.0), None)


def distillation_arguments(device: str) -> Iterator[Arguments]:
    scales, labels = torch.tensor([0.5, 0.0, 1.0, 2.0], device=device), torch.tensor([0, 9, 3, 1], device=device)
    jsd = OPTIONS._replace(soft_scale=4.0, divisor=None, divergence="jsd", parameter=0.3, temperature=2.0)
    everything = jsd._replace(hard_scale=0.5, logit_scale=(0.5, 2.0), logit_softcap=(3.0, 0.0), valid_vocab=10)
    for dtype, teacher_dtype in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float16)):
        student, teacher = make_pair(ROWS, COLUMNS, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
        row_scale = scales.to(torch.float64 if dtype == torch.float64 else torch.float32)
        yield student, teacher, None, None, *OPTIONS, True, True, True
        yield student, teacher, None, row_scale, *jsd, False, False, True
        yield student, teacher, None, row_scale, *jsd, False, True, False
        yield student, teacher[:, :11], labels, row_scale, *everything, True, True, True
    alpha = OPTIONS._replace(divisor=2, divergence="alpha", parameter=0.5)
    yield *make_pair(2, 3, 5, device=device), None, None, *alpha, True, False, True
    reverse = OPTIONS._replace(divisor=1, divergence="reverse_kl")
    yield *make_pair(5, device=device), None, None, *reverse, False, True, True
    yield *make_pair(0, 5, device=device), None, None, *reverse, True, True, True
    yield logits(6, 4, device=device).t(), logits(4, 6, device=device), None, None, *OPTIONS, True, True, True


def distillation_backward_arguments(device: str) -> Iterator[Arguments]:
    for student, teacher, labels, row_scale, *others, _, _, _ in distillation_arguments(device):
        loss, row_constants, *_ = torch.ops.kldiv_ext.distillation_loss(
            student, teacher, labels, row_scale, *others, True, True, False
        )
        for needs_grad in ((True, True), (False, True)):
            yield torch.ones_like(loss), student, teacher, row_constants, labels, row_scale, *others, *needs_grad


def distillation_out_arguments(device: str) -> Iterator[Arguments]:
    for student, teacher, labels, row_scale, *others, grad_student, grad_teacher, _ in distillation_arguments(device):
        if student.is_contiguous():
            rows = student.numel() // student.shape[-1]
            losses = torch.zeros(rows, dtype=accumulation_dtype(student, teacher), device=device)
            needed = (student, grad_student), (teacher, grad_teacher)
            gradients = [torch.zeros_like(x) if need else None for x, need in needed]
            options = OperatorOptions(*others)._replace(divisor=None)
            for grad_output in (None, losses.sum() + 0.5, losses + 0.5):
                yield student, teacher, labels, row_scale, *options, grad_output, losses, *gradients


def linear_arguments(device: str) -> Iterator[Arguments]:
    """From hidden states of widths 3 and 5; the vocabulary is that of distillation_arguments."""
    for a, b, labels, row_scale, *options, grad_student, grad_teacher, _ in distillation_arguments(device):
        sides = []
        for like, width, seed in ((a, 3, 2), (b, 5, 3)):
            *batch, columns = like.shape
            for shape in ((*batch, width), (columns, width), (columns,)):
                sides.append(logits(*shape, dtype=like.dtype, device=device, seed=seed))
        rest = labels, row_scale, *options, None, None, 10**6, 3
        yield *sides, *rest, [grad_student] * 3 + [grad_teacher] * 3
        yield *sides[:2], None, b, None, None, *rest, [grad_student, False, False, grad_teacher, False, False]


def new_output_arguments(device: str) -> Iterator[Arguments]:
    for sizes in ([0], [5, 0], [0, 2, 3]):  # empty, because opcheck compares values and memory is uninitialized
        yield logits(ROWS, COLUMNS, device=device), sizes, torch.bfloat16


def token_stats_arguments(device: str) -> Iterator[Arguments]:
    for student, teacher, labels, row_scale, *others, _, _, _ in distillation_arguments(device):
        yield student, teacher, labels, row_scale, *OperatorOptions(*others)[5:]


def scale_arguments(device: str) -> Iterator[Arguments]:
    for dtype, factor in itertools.product(DTYPES, (1.0, 0.3)):
        yield logits(ROWS, COLUMNS, dtype=dtype, device=device), torch.tensor(factor, device=device)


def kl_div_arguments(device: str) -> Iterator[Arguments]:
    for shape, dtype, target_dtype, divisor, log_target in (
        ((ROWS, COLUMNS), torch.float32, torch.float32, None, True),
        ((7,), torch.bfloat16, torch.bfloat16, 7, False),
        ((2, 3, 5), torch.float16, torch.float64, 30, True),
        ((2, 3, 5), torch.bfloat16, torch.float64, None, False),
    ):
        input, target = make_pair(*shape, dtype=dtype, teacher_dtype=target_dtype, device=device)
        yield input, target if log_target else target.exp(), divisor, log_target
    yield logits(6, 4, device=device).t(), logits(4, 6, device=device), 1, True


def kl_div_backward_arguments(device: str) -> Iterator[Arguments]:
    for input, target, divisor, log_target in kl_div_arguments(device):
        terms = torch.ops.kldiv_ext.kl_div(input, target, divisor, log_target)
        yield torch.ones_like(terms), input, target, divisor, log_target, True, True
        yield torch.ones_like(terms), None, target, divisor, log_target, True, False


# {operator: (sample arguments, number of differentiable outputs)}
OPERATORS: dict[str, tuple[Callable[[str], Iterator[Arguments]], int]] = {
    "distillation_loss": (distillation_arguments, 1),
    "distillation_loss_backward": (distillation_backward_arguments, 0),
    "distillation_loss_backward_": (lambda d: ((*a[:-2], a[-1]) for a in distillation_backward_arguments(d)), 0),
    "distillation_loss_out": (distillation_out_arguments, 0),
    "linear_distillation_loss": (linear_arguments, 1),
    "token_stats": (token_stats_arguments, 0),
    "new_output": (new_output_arguments, 0),
    "scale_": (scale_arguments, 0),
    "kl_div": (kl_div_arguments, 1),
    "kl_div_backward": (kl_div_backward_arguments, 2),
}
DIFFERENTIABLE = [name for name, (_, outputs) in OPERATORS.items() if outputs]

# ---------------------------------------------------------------- the operators


def test_every_operator_is_tested(device: str) -> None:
    """The table above, the library's schemas and the autograd kernels name the same operators; all have kernels."""
    schemas = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kldiv_ext::")}
    assert set(OPERATORS) == schemas == set(COMPOSITES)
    for name, key in itertools.product(OPERATORS, (device.upper(), "Meta", "Autograd")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kldiv_ext::{name}", key)


def is_floating(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def tracked(arguments: Arguments) -> Arguments:
    """With floating tensors that require a gradient."""
    return tuple(a.clone().requires_grad_() if is_floating(a) else a for a in arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(device: str, name: str) -> None:
    """Schema, autograd registration and fake tensors on every sample; AOTAutograd with dynamic shapes on those of
    float32, since the dtypes of its outputs are those of the fake tensors. Operators without a derivative raise."""
    arguments, _ = OPERATORS[name]
    operator = getattr(torch.ops.kldiv_ext, name).default
    for sample in arguments(device):
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if all(a.dtype == torch.float32 for a in sample if is_floating(a)):
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, sample, test_utils=tests)
        if name in DIFFERENTIABLE:
            torch.library.opcheck(operator, tracked(sample), test_utils=tests)
            continue
        with pytest.raises(NotImplementedError, match="cannot be differentiated"):
            operator(*(a * 1 if isinstance(a, Tensor) else a for a in tracked(sample)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_operators_called_directly_carry_derivatives(device: str, name: str) -> None:
    """torch.ops.kldiv_ext is private, but a zero gradient or tangent from it would be silent."""
    arguments, outputs = OPERATORS[name]
    operator = getattr(torch.ops.kldiv_ext, name)
    sample = next(s for s in arguments(device) if s[1] is not None)  # float32, every gradient requested
    where = [i for i, a in enumerate(sample) if isinstance(a, Tensor)]
    tensors = [sample[i] for i in where]

    def function(*values: Tensor) -> Tensor:
        results = operator(*(values[where.index(i)] if i in where else a for i, a in enumerate(sample)))
        return sum(r.sum() for r in (results if isinstance(results, tuple) else (results,))[:outputs])

    gradients = run(function, *tensors).gradients
    assert any(g.any() for g in gradients)
    directions = [logits(*t.shape, device=device, seed=3) for t in tensors]
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(t, d) for t, d in zip(tensors, directions, strict=True)))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert_close(tangent, sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_meta_and_fake_tensors(reduction: str) -> None:
    """Shapes, dtypes and strides without data are those with data."""
    functions = kl_div, distillation_loss, functools.partial(distillation_loss, divergence="jsd")
    for function, shape, *dtypes in itertools.product(functions, ((2, 3, 5), (4, 5), (5,)), DTYPES, DTYPES):
        real = run(function, *(torch.ones(shape, dtype=dtype) for dtype in dtypes), reduction=reduction)
        meta = run(function, *(torch.empty(shape, dtype=dtype, device="meta") for dtype in dtypes), reduction=reduction)
        with FakeTensorMode():
            fake = run(function, *(torch.empty(shape, dtype=dtype) for dtype in dtypes), reduction=reduction)
        expected, *others = (
            [(t.shape, t.dtype, t.stride()) for t in (r.loss, *r.gradients)] for r in (real, meta, fake)
        )
        assert others == [expected, expected]


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_second_derivatives(device: str, divergence: str, reduction: str) -> None:
    """Backward over backward, forward over backward, and both batched."""
    mask = MIXES["mask"].arguments(3, columns=4, device=device)
    function = functools.partial(distillation_loss, divergence=divergence, reduction=reduction, **mask)
    leaves = [t.requires_grad_() for t in make_pair(3, 4, dtype=torch.float64, device=device)]
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_penalty(device: str, dtype: torch.dtype, reduction: str) -> None:
    """One backward pass through the gradient alone, and one through loss and gradient."""
    tensors = [t.requires_grad_() for t in make_pair(ROWS, COLUMNS, dtype=dtype, device=device)]

    def penalties(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        loss = function(*leaves, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        penalty = (gradient.double() * 100).square().sum()
        alone = torch.autograd.grad(penalty, leaves, retain_graph=True)
        return *alone, *torch.autograd.grad(loss + penalty, leaves)

    expected = penalties(reference.distillation_loss, *(t.double() for t in tensors))
    for value, other in zip(penalties(distillation_loss, *tensors), expected, strict=True):
        assert other.any()
        assert_norm_close(value, other, 1e-5 if dtype == torch.float32 else 1e-2)


def test_one_leaf_behind_both_sides(device: str) -> None:
    """It gets the sum of two gradients, also from composites."""
    same = logits(3, 5, dtype=torch.float64, device=device).requires_grad_()
    function = lambda s: distillation_loss(s, s * 2, divergence="jsd", reduction="sum")  # noqa: E731
    assert torch.autograd.gradcheck(function, same)
    assert torch.autograd.gradgradcheck(function, same)


def test_logits_are_freed_in_backward(device: str) -> None:
    """The logits are saved for a second derivative, and freed after this loss's step of the backward pass."""
    leaf, teacher = make_pair(ROWS, COLUMNS, device=device)
    student = leaf.requires_grad_() * 2
    saved, alive = weakref.ref(student), []
    student.grad_fn.register_prehook(lambda _: alive.append(saved() is not None))
    loss = distillation_loss(student, teacher)
    del student
    loss.backward(retain_graph=True)
    loss.backward()
    assert alive == [True, False]


def test_no_gradient_is_computed_without_grad_mode(device: str) -> None:
    student, teacher = make_pair(3, 5, device=device)
    computed = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.kldiv_ext.distillation_loss.default:
                computed.append(result[2].numel())
            return result

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), Watch():
            distillation_loss(student.requires_grad_(), teacher)
    assert computed == [15, 0]


# ---------------------------------------------------------------- composites


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_composites_compute_what_kernels_do(device: str, divergence: str) -> None:
    """With zeros, infinities, NaN and rows that do not count; with weights, for any number of leading dimensions."""
    inf, nan = torch.inf, torch.nan
    rows = [  # student, teacher
        ([1, 2, -inf, 0.5], [0, 1, -inf, 0.5]),
        ([1, -inf, 0.3, 0.2], [1, 0.2, 0.3, 0.2]),
        ([0.5, 0.2, 1, 0.3], [0.5, -inf, 1, 0.3]),
        ([nan, 0, 0, 1], [1, 0, 0, 1]),
        ([-inf] * 4, [0, 1, 2, 3]),
        ([inf, 0, 1, 2], [0, 1, 2, 3]),
        ([nan] * 4, [1, 2, 3, 4]),
    ]
    tensors = [torch.tensor(side, dtype=torch.float64, device=device) for side in zip(*rows, strict=True)]
    mask = torch.tensor([True] * 6 + [False], device=device)
    calls: list[tuple[Any, dict[str, Any]]] = [(tensors, {"mask": mask, "reduction": "none"})]
    mixes = Mix({"temperature": 2.0}), Mix({"temperature": 2.0, "scale_by_temperature_squared": True}, ("weight",))
    for shape, reduction, mix in itertools.product(((2, 3, 5), (5,)), REDUCTIONS, mixes):
        options = mix.arguments(*shape[:-1], columns=5, device=device) | {"reduction": reduction}
        calls.append((make_pair(*shape, dtype=torch.float64, device=device), options))
    for tensors, options in calls:
        function = functools.partial(distillation_loss, divergence=divergence, **options)
        fused = run(function, *tensors)
        composite, pull = vjp(function, *tensors)
        assert_close(composite, fused.loss, equal_nan=True)
        for value, expected in zip(pull(torch.ones_like(composite)), fused.gradients, strict=True):
            assert_gradients_close(value, expected, floor=1e-15)
