"""The drop-in: kl_div and KLDivLoss against torch.nn.functional.kl_div, with PyTorch's own cases and those it lacks."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import kldiv_ext
from kldiv_ext import kl_div

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "mean", "batchmean", "sum")
INF = float("inf")

OP_INFO = next(info for info in op_db if info.name == "nn.functional.kl_div")
MODULE_INFO = next(info for info in module_db if info.module_cls is torch.nn.KLDivLoss)

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides",
    "ignore:size_average and reduce args",
    "ignore:There is a performance drop",  # PyTorch's own loss, under vmap
    "ignore:.torch.jit.script. is deprecated",  # inside torch.testing
)


def log_probabilities(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1).to(device, dtype)


def pair(
    *shape: int, log_target: bool, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    target = log_probabilities(*shape, dtype=dtype, device=device, seed=1)
    return log_probabilities(*shape, dtype=dtype, device=device), target if log_target else target.exp()


def leaf(tensor: Tensor, requires_grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """A new leaf with the same values, and the same strides where the tensor is dense."""
    return torch.empty_like(tensor, dtype=dtype).copy_(tensor).requires_grad_(requires_grad)


def outcome(function: Callable[[], Any]) -> Any:
    """What a call returns or the exception that it raises."""
    try:
        return function()
    except Exception as error:
        return error


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, size: float) -> None:
    """An error of at most twice PyTorch's own, one rounding of the result, and one of parts of `size` that cancel."""
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
    assert_close(ours.isnan(), theirs.isnan())
    if exact.numel() == 0:
        return
    inside = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps * size
    rounding = torch.finfo(ours.dtype).eps * exact.nan_to_num().abs().max() + inside
    allowed = 2 * (theirs.double() - exact).abs().nan_to_num().max() + rounding
    error = (ours.double() - exact).abs().nan_to_num().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_as_pytorch(
    input: Tensor,
    target: Tensor,
    *,
    wanted: tuple[bool, bool] = (True, True),
    grad_output: Tensor | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> None:
    """Value and gradients in the given dtypes against F.kl_div in the same and in float64."""
    results = []
    for function, dtype in ((kl_div, None), (F.kl_div, None), (F.kl_div, torch.float64)):
        leaves = [leaf(t, w, dtype) for t, w in zip((input, target), wanted, strict=True)]
        result = function(*leaves, reduction=reduction, log_target=log_target)
        if any(wanted):
            result.backward(torch.ones_like(result) if grad_output is None else grad_output.to(result.dtype))
        results.append([result.detach(), *(t.grad for t in leaves)])
    if input.numel() == 0 or target.numel() == 0:
        size = 0.0
    else:  # of target · log target, target · input and their sum
        log_p, p = (target, target.exp()) if log_target else (target.log(), target)
        size = float((p.abs().max() + 1) * (log_p.abs().max() + input.abs().max() + 1))
        size *= max(input.numel(), target.numel()) if reduction in ("sum", "batchmean") else 1
    for ours, theirs, exact in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_no_worse(ours, theirs, exact, size)


# ---------------------------------------------------------------- PyTorch's own cases


def test_opinfo_dtypes() -> None:
    """PyTorch promises no dtype that the kernels do not take."""
    assert set(OP_INFO.dtypes) <= set(FLOATING)


def samples(device: str, dtype: torch.dtype) -> Iterator[Any]:
    for sample in OP_INFO.sample_inputs(device, dtype, requires_grad=False):
        yield sample.input, *sample.args, sample.kwargs


@pytest.mark.parametrize("dtype", OP_INFO.dtypes)
def test_opinfo_values_and_gradients(device: str, dtype: torch.dtype) -> None:
    for input, target, options in samples(device, dtype):
        shape = input.shape if options["reduction"] == "none" else ()
        assert_as_pytorch(input, target, grad_output=torch.randn(shape, device=device), **options)


def test_opinfo_derivatives(device: str) -> None:
    """First and second derivatives for both arguments, reverse, forward and mixed, alone and batched."""
    for input, target, options in samples(device, torch.float64):
        leaves = (leaf(input), leaf(target))
        assert torch.autograd.gradcheck(
            lambda a, b, options=options: kl_div(a, b, **options),
            leaves,
            check_forward_ad=True,
            check_backward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(
            lambda a, b, options=options: kl_div(a, b, **options),
            leaves,
            gen_non_contig_grad_outputs=True,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_batched_grad=True,
        )


@pytest.mark.parametrize("dtype", MODULE_INFO.dtypes)
def test_moduleinfo(device: str, dtype: torch.dtype) -> None:
    inputs = MODULE_INFO.module_inputs_func(MODULE_INFO, device, dtype, requires_grad=False, training=True)
    for case in inputs:
        constructor, call = case.constructor_input, case.forward_input
        ours = kldiv_ext.KLDivLoss(*constructor.args, **constructor.kwargs)
        theirs = torch.nn.KLDivLoss(*constructor.args, **constructor.kwargs)
        result = ours(*call.args, **call.kwargs)
        # Some of these targets are negative: NaN.
        assert_close(result, theirs(*call.args, **call.kwargs), equal_nan=True)
        assert_close(result, case.reference_fn(ours, *call.args, **call.kwargs), equal_nan=True)


# ---------------------------------------------------------------- shapes, strides, dtypes

SHAPES = [
    ((3, 4), (3, 4)),
    ((7,), (7,)),  # 1-D: batchmean divides by its length
    ((1,), (1,)),
    ((2, 3, 4, 5), (2, 3, 4, 5)),  # more than two dimensions: batchmean divides by the first
    ((), ()),
    ((), (4,)),  # 0-d with n-D: no promotion by the 0-d side
    ((4,), ()),
    ((1, 4), (3, 4)),  # broadcast, batchmean divides by the input's 1
    ((3, 4), (4,)),
    ((4,), (3, 4)),
    ((3, 1), (1, 4)),
    ((0, 4), (0, 4)),  # empty: NaN for the means, as in PyTorch
    ((3, 0), (3, 0)),
    ((0,), (0,)),
]


def values(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) * 2 + 0.2).to(device, dtype)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes_and_dtypes(device: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Values, gradients and the dtype of each, for every promotion, reduction and choice of gradients."""
    for *dtypes, reduction, log_target in itertools.product(FLOATING, FLOATING, REDUCTIONS, (False, True)):
        input, target = (values(s, d, device) for s, d in zip(shapes, dtypes, strict=True))
        for wanted in ((False, False), (True, False), (False, True), (True, True)):
            assert_as_pytorch(input, target, wanted=wanted, reduction=reduction, log_target=log_target)


@pytest.mark.parametrize("log_target", [False, True])
def test_what_pytorch_raises(device: str, log_target: bool) -> None:
    """Integers, complex numbers, shapes that do not broadcast: the same result, or the same exception and message."""
    others = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
    cases = [
        (values((3, 4), a, device), values(shape, b, device))
        for a, b in itertools.product((torch.float32, torch.bfloat16, *others), repeat=2)
        if a in others or b in others
        for shape in ((3, 4), (4,), (2, 4))
    ]
    cases += [(values((3, 4), a, device), values((2, 4), b, device)) for a, b in itertools.product(FLOATING, repeat=2)]
    for (input, target), reduction in itertools.product(cases, REDUCTIONS):
        options = {"reduction": reduction, "log_target": log_target}
        ours = outcome(lambda i=input, t=target, o=options: kl_div(i, t, **o))
        theirs = outcome(lambda i=input, t=target, o=options: F.kl_div(i, t, **o))
        if isinstance(theirs, Exception):
            assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        else:
            assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((1.0, torch.ones(2)), {}),
        ((torch.ones(2), None), {}),
        (([1.0], torch.ones(1)), {}),
        ((torch.ones(2), torch.ones(2)), {"reduction": "total"}),
        ((torch.ones(2), torch.ones(2)), {"reduction": None}),
        ((torch.ones(2), torch.ones(2)), {"log_target": 1}),
        ((torch.ones(2), torch.ones(2)), {"log_target": None}),
        ((torch.ones(2), torch.ones(2).to_sparse()), {}),
        ((torch.ones(2), torch.ones(2, device="meta")), {}),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    options = {"reduction": "sum", **options}
    ours, theirs = (outcome(lambda f=f: f(*arguments, **options)) for f in (kl_div, F.kl_div))
    assert isinstance(theirs, Exception)
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: t.repeat_interleave(2, -1)[:, ::2],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "columns cut": lambda t: F.pad(t, (0, 3))[:, :-3],  # rows that start at odd addresses
    "offset by one": lambda t: F.pad(t.flatten(), (1, 0))[1:].view_as(t),  # vectors that start at odd addresses
    "flipped twice": lambda t: t.flip(0, 1).flip(0, 1),
}


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(device: str, strides: str, dtype: torch.dtype) -> None:
    """Each argument and grad_output in every layout give the bits that contiguous ones give."""
    for log_target, reduction in itertools.product((False, True), ("none", "sum")):
        input, target = pair(5, 67, log_target=log_target, dtype=dtype, device=device)
        grad_output = torch.randn_like(input) if reduction == "none" else torch.tensor(0.7, dtype=dtype, device=device)
        layouts = itertools.product((lambda t: t, STRIDES[strides]), repeat=3)
        results = []
        for of_input, of_target, of_grad in layouts:
            a, b = of_input(input).detach().requires_grad_(), of_target(target).detach().requires_grad_()
            result = kl_div(a, b, reduction=reduction, log_target=log_target)
            gradients = torch.autograd.grad(
                result, (a, b), of_grad(grad_output) if reduction == "none" else grad_output
            )
            results.append((result, *gradients))
        for other in results[1:]:
            for value, expected in zip(other, results[0], strict=True):
                if value.dim() > 0:
                    assert torch.equal(value, expected)
                else:  # the sum of a strided tensor runs row by row
                    assert_close(value, expected)


def test_expanded(device: str) -> None:
    """Stride 0 in either argument: not a broadcast, the gradient is the base's."""
    for log_target in (False, True):
        row, other = pair(1, 9, log_target=log_target, device=device)
        full = other.repeat(4, 1)
        for ours, theirs in zip(
            torch.autograd.grad(
                kl_div(row.requires_grad_().expand(4, 9), full, reduction="sum", log_target=log_target), row
            ),
            torch.autograd.grad(F.kl_div(row.expand(4, 9), full, reduction="sum", log_target=log_target), row),
            strict=True,
        ):
            assert_close(ours, theirs)


def test_many_dimensions_that_do_not_collapse(device: str) -> None:
    """More than the kernels index: left to plain operators."""
    input, target = (
        t.reshape(*[4] * 9, 3)[(slice(0, 4, 3),) * 9].requires_grad_()
        for t in pair(4**9, 3, log_target=False, device=device)
    )
    assert not input.is_contiguous()
    results = [f(input, target, reduction="sum") for f in (kl_div, F.kl_div)]
    assert_close(*results)
    assert_close(*(torch.autograd.grad(r, (input, target)) for r in results))


def test_channels_last(device: str) -> None:
    input, target = (
        t.reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
        for t in pair(24, 5, log_target=False, device=device)
    )
    for reduction in REDUCTIONS:
        assert_as_pytorch(input, target, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad_outputs(device: str, reduction: str) -> None:
    """Expanded, non-contiguous and zero grad_output."""
    input, target = pair(6, 5, log_target=False, device=device)
    shape = input.shape if reduction == "none" else ()
    one = torch.tensor(1.5, device=device, dtype=input.dtype)
    for grad_output in (
        one.expand(shape),
        torch.zeros(shape, device=device),
        torch.randn(shape[::-1], device=device).t(),
    ):
        assert_as_pytorch(input, target, reduction=reduction, grad_output=grad_output)
        if not grad_output.any():
            leaves = leaf(input), leaf(target)
            kl_div(*leaves, reduction=reduction).backward(grad_output.double())
            assert not any(t.grad.any() for t in leaves)


# ---------------------------------------------------------------- what it means


def test_direction(device: str) -> None:
    """KL(target ‖ exp(input)): an asymmetric example worked out by hand fixes direction and order of arguments."""
    p = torch.tensor([0.5, 0.5], device=device)
    q = torch.tensor([0.25, 0.75], device=device)
    expected = torch.tensor(0.14384104)  # ½ ln 2 + ½ ln ⅔
    assert_close(kl_div(q.log(), p, reduction="sum").cpu(), expected)
    assert_close(kl_div(q.log(), p.log(), reduction="sum", log_target=True).cpu(), expected)
    assert_close(kl_div(p.log(), q, reduction="sum").cpu(), torch.tensor(0.13081204))  # ¼ ln ½ + ¾ ln 3⁄2


def test_reference(device: str) -> None:
    """The library's own definition is PyTorch's."""
    for shape, reduction, log_target in itertools.product(((5,), (3, 4), (2, 3, 4)), REDUCTIONS, (False, True)):
        input, target = pair(*shape, log_target=log_target, device=device)
        options = {"reduction": reduction, "log_target": log_target}
        assert_close(kldiv_ext.reference.kl_div(input, target, **options), F.kl_div(input, target, **options))


@pytest.mark.parametrize("dtype", [d for d in FLOATING if d != torch.float64])
@pytest.mark.parametrize("log_target", [False, True])
def test_accuracy(device: str, dtype: torch.dtype, log_target: bool) -> None:
    """A sum over many elements is within two roundings of its dtype's: one is the logarithms' on older machines."""
    input, target = pair(64, 5003, log_target=log_target, dtype=dtype, device=device)
    for reduction in ("sum", "mean", "batchmean"):
        options = {"reduction": reduction, "log_target": log_target}
        exact = F.kl_div(input.double(), target.double(), **options)
        ours = (kl_div(input, target, **options).double() - exact).abs()
        theirs = (F.kl_div(input, target, **options).double() - exact).abs()
        assert ours <= max(theirs, 2 * torch.finfo(dtype).eps * exact)


def test_identical_distributions(device: str) -> None:
    for dtype in FLOATING:
        same = log_probabilities(3, 1000, dtype=dtype, device=device)
        assert kl_div(same, same, reduction="none", log_target=True).eq(0).all()


# ---------------------------------------------------------------- probability 0


def zeros(log_target: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, target, and where the target's probability is 0: at a finite, an infinite and a NaN-free -inf input."""
    input = torch.tensor([[-INF, -1.0, -2.0, -0.5], [-1.0, -INF, -1.5, -3.0]], dtype=dtype, device=device)
    target = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.25, 0.0, 0.25, 0.5]], dtype=dtype, device=device)
    return input, target.log() if log_target else target, target == 0


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


ROUTES: dict[str, Callable[..., Tensor]] = {
    "fused": kl_div,
    "broadcast": lambda a, b, **options: kl_div(a.expand(1, *a.shape), b, **options),
    "vmap": lambda a, b, **options: vmap(lambda x, y: kl_div(x, y, **options))(a, b),
    "0-d": lambda a, b, **options: torch.stack(
        [kl_div(x, y, **options) for x, y in zip(a.flatten(), b.flatten(), strict=True)]
    ),
    "compiled": lambda a, b, **options: compiled(kl_div)(a, b, **options),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_zero_probabilities(device: str, route: str, log_target: bool, autocast: bool) -> None:
    """An element whose target is 0 contributes 0, with derivatives of 0 of first and second order, on every path."""
    for dtype, reduction in itertools.product(FLOATING, ("none", "sum")):
        input, target, dead = zeros(log_target, dtype, device)
        input.requires_grad_()
        target.requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            terms = ROUTES[route](input, target, reduction=reduction, log_target=log_target)
        expected = F.kl_div(
            input.detach().double().masked_fill(dead, 0),
            target.detach().double().masked_fill(dead, 0 if log_target else 1),
            reduction="none",
            log_target=log_target,
        ).masked_fill(dead, 0)
        if reduction == "none":
            assert terms.detach().reshape(dead.shape)[dead].eq(0).all()
        assert_close(terms.detach().sum().double(), expected.sum(), rtol=2e-2, atol=2e-2)  # float16 and bfloat16 sums
        twice = route != "compiled"  # AOTAutograd does not differentiate twice
        first = torch.autograd.grad(terms.sum(), (input, target), create_graph=twice)
        for gradient in first:
            assert gradient.isfinite().all()
            assert gradient[dead].eq(0).all()
            assert gradient[~dead].ne(0).all()
        if twice:
            direction = torch.arange(1.0, 9.0, device=device).reshape(dead.shape)
            for gradient in torch.autograd.grad(sum((g * direction).sum() for g in first), (input, target)):
                assert gradient.isfinite().all()
                assert gradient[dead].eq(0).all()
                assert gradient[~dead].ne(0).all()


@pytest.mark.parametrize("log_target", [False, True])
def test_zero_probabilities_forward_mode(device: str, log_target: bool) -> None:
    input, target, dead = zeros(log_target, torch.float64, device)
    function = lambda a, b: kl_div(a, b, reduction="none", log_target=log_target)  # noqa: E731
    value, tangent = jvp(function, (input, target), (torch.ones_like(input), torch.ones_like(target)))
    for result in (value, tangent):
        assert result[dead].eq(0).all() and result.isfinite().all()


def test_other_infinities(device: str) -> None:
    """Where PyTorch's answer is right it stays: q = 0 < p is +inf, NaN stays in its element."""
    nan = float("nan")
    input = torch.tensor([-INF, nan, -1.0, -1.0, -1.0], device=device)
    target = torch.tensor([0.5, 0.5, nan, INF, -0.5], device=device)
    for log_target in (False, True):
        assert_close(
            kl_div(input, target, reduction="none", log_target=log_target),
            F.kl_div(input, target, reduction="none", log_target=log_target),
            equal_nan=True,
        )


# ---------------------------------------------------------------- warnings, deprecated arguments, modules


def warned(function: Callable[[], Any]) -> list[tuple[str, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [(w.category.__name__, str(w.message)[:80]) for w in caught]


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "elementwise_mean"])
@pytest.mark.parametrize("shape", [(3, 4), (4,), (), (0, 4)], ids=str)
def test_deprecated_arguments(device: str, shape: tuple[int, ...], reduction: str) -> None:
    """Values and warnings for every combination, also size_average with batchmean, which PyTorch divides twice."""
    input, target = values(shape, torch.float64, device), values(shape, torch.float64, device) / 2
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        arguments = (input, target, size_average, reduce, reduction)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_close(kl_div(*arguments), F.kl_div(*arguments), equal_nan=True)
        assert warned(lambda a=arguments: kl_div(*a)) == warned(lambda a=arguments: F.kl_div(*a))


def test_warnings_name_the_caller() -> None:
    input, target = pair(3, 4, log_target=False)
    for other in (target, target[:1]):  # fused and not
        with pytest.warns(UserWarning, match="'mean' divides the total loss") as caught:
            kl_div(input, other)
        assert caught[0].filename == __file__


def test_module(device: str) -> None:
    input, target = pair(3, 4, log_target=True, device=device)
    module = kldiv_ext.KLDivLoss(reduction="batchmean", log_target=True)
    expected = F.kl_div(input, target, reduction="batchmean", log_target=True)
    assert isinstance(module, torch.nn.KLDivLoss)
    assert repr(module) == repr(torch.nn.KLDivLoss(reduction="batchmean", log_target=True))
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (copied.reduction, copied.log_target) == ("batchmean", True)
        assert_close(copied(input, target), expected)
    assert_close(functional_call(module, {}, (input, target)), expected)
    with pytest.warns(UserWarning, match="size_average and reduce args"):
        assert kldiv_ext.KLDivLoss(size_average=False).reduction == "sum"


# ---------------------------------------------------------------- autograd


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_large_derivatives(device: str, reduction: str, log_target: bool) -> None:
    """gradcheck over more than one vector of the kernels, both arguments, contiguous and not."""
    for transposed in (False, True):
        input, target = pair(3, 37, log_target=log_target, device=device)
        if transposed:
            input = input.t().contiguous().t()
        assert torch.autograd.gradcheck(
            lambda a, b: kl_div(a, b, reduction=reduction, log_target=log_target),
            (leaf(input), leaf(target)),
            fast_mode=True,
        )


def test_inputs_are_left_alone(device: str) -> None:
    for log_target, reduction in itertools.product((False, True), REDUCTIONS):
        input, target = (leaf(t) for t in pair(3, 40, log_target=log_target, device=device))
        before = input.detach().clone(), target.detach().clone()
        versions = input._version, target._version
        kl_div(input, target, reduction=reduction, log_target=log_target).sum().backward()
        assert (input._version, target._version) == versions
        assert torch.equal(input, before[0]) and torch.equal(target, before[1])


def test_what_is_saved(device: str) -> None:
    """As in PyTorch, the input's gradient keeps the target alone alive, and the input may be changed meanwhile."""
    input, target = pair(3, 4, log_target=False, device=device)
    saved: list[Tensor] = []
    student = leaf(input) + 0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = kl_div(student, target, reduction="sum")
    assert [t.data_ptr() for t in saved] == [target.data_ptr()]
    student.detach().zero_()
    loss.backward()


def test_backward_twice(device: str) -> None:
    input, target = (leaf(t) for t in pair(3, 4, log_target=False, device=device))
    loss = kl_div(input, target, reduction="sum")
    first = torch.autograd.grad(loss, (input, target), retain_graph=True)
    second = torch.autograd.grad(loss, (input, target))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode(device: str, dtype: torch.dtype) -> None:
    """Tangents on one argument or both, and on a leaf that also requires a gradient."""
    input, target = pair(3, 4, log_target=False, dtype=dtype, device=device)
    tangents = torch.randn_like(input), torch.randn_like(target)
    for which in ((True, False), (False, True), (True, True)):
        results = []
        for function in (kl_div, F.kl_div):
            with forward_ad.dual_level():
                arguments = [
                    forward_ad.make_dual(leaf(t), d) if dual else leaf(t)
                    for t, d, dual in zip((input, target), tangents, which, strict=True)
                ]
                dual = forward_ad.unpack_dual(function(*arguments, reduction="sum"))
                results.append((dual.primal.detach(), dual.tangent.detach()))
        assert_close(*results)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, a, b: grad(f, (0, 1))(a, b),
    "vmap": lambda f, a, b: vmap(f)(a, b),
    "vmap of one": lambda f, a, b: vmap(f, (0, None))(a, b[0]),
    "vmap over columns": lambda f, a, b: vmap(f, (1, 1))(a, b),
    "vmap of grad": lambda f, a, b: vmap(grad(f, (0, 1)))(a, b),
    "grad of vmap": lambda f, a, b: grad(lambda x, y: vmap(f)(x, y).sum(), (0, 1))(a, b),
    "grad of grad": lambda f, a, b: grad(lambda y: (grad(f, 1)(a, y) ** 2).sum())(b),
    "jvp": lambda f, a, b: jvp(f, (a, b), (b, a)),
    "jvp of grad": lambda f, a, b: jvp(grad(f, (0, 1)), (a, b), (b, a)),
    "jacrev": lambda f, a, b: jacrev(f, (0, 1))(a, b),
    "jacfwd": lambda f, a, b: jacfwd(f, (0, 1))(a, b),
    "hessian": lambda f, a, b: hessian(f, (0, 1))(a, b),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("log_target", [False, True])
def test_func_transforms(device: str, transform: str, log_target: bool) -> None:
    arguments = pair(4, 4, log_target=log_target, device=device)
    for reduction in ("mean", "sum"):
        results = [
            TRANSFORMS[transform](
                lambda a, b, f=f, r=reduction: f(a, b, reduction=r, log_target=log_target), *arguments
            )
            for f in (kl_div, F.kl_div)
        ]
        assert_close(*results)


# ---------------------------------------------------------------- modes and subclasses


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATING, repeat=2)), ids=str)
def test_autocast(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """float32 results, float64 where an argument is, and gradients in their argument's dtype: as PyTorch."""
    for shapes, reduction in itertools.product((((3, 4), (3, 4)), ((1, 4), (3, 4)), ((), ())), REDUCTIONS):
        results = []
        for function in (kl_div, F.kl_div):
            leaves = [leaf(values(s, d, device)) for s, d in zip(shapes, dtypes, strict=True)]
            with torch.autocast(device, torch.bfloat16):
                result = function(*leaves, reduction=reduction)
            result.sum().backward()
            results.append((result.detach(), *(t.grad for t in leaves)))
        for ours, theirs in zip(*results, strict=True):
            low = torch.finfo(ours.dtype).bits < 32
            assert_close(ours, theirs, rtol=1e-2 if low else 1e-5, atol=1e-2 if low else 1e-5)


class Recorded(torch.Tensor):
    """A subclass that has its say in every function."""

    calls: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_torch_function_subclass() -> None:
    """It is handed to PyTorch, so that the subclass sees the call of F.kl_div that it may know."""
    input, target = pair(3, 4, log_target=False)
    for arguments in ((input.as_subclass(Recorded), target), (input, target.as_subclass(Recorded))):
        Recorded.calls.clear()
        result = kl_div(*arguments, reduction="sum")
        assert F.kl_div in Recorded.calls
        assert type(result) is Recorded
        assert_close(result.as_subclass(Tensor), F.kl_div(input, target, reduction="sum"))


def test_parameters_are_fused(device: str) -> None:
    input, target = pair(3, 4, log_target=False, device=device)
    loss = kl_div(torch.nn.Parameter(input), target, reduction="sum")
    assert type(loss) is Tensor
    assert type(loss.grad_fn).__name__ == "KLDivBackward"


def test_default_device_keeps_the_kernel() -> None:
    """torch.set_default_device is a torch function mode; it must not cost the fused kernel."""
    input, target = pair(3, 4, log_target=False)
    with torch.device("cpu"):
        assert type(kl_div(leaf(input), target, reduction="sum").grad_fn).__name__ == "KLDivBackward"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_dtensor() -> None:
    """Tensors made of other tensors have no kernel of ours: PyTorch shards the loss and its gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        input, target = pair(4, 6, log_target=False)
        sharded = distribute_tensor(input, mesh, [Shard(0)]).requires_grad_()
        loss = kl_div(sharded, distribute_tensor(target, mesh, [Shard(0)]), reduction="sum")
        assert isinstance(loss, DTensor)
        assert_close(loss.full_tensor(), F.kl_div(input, target, reduction="sum"))
        loss.backward()
        assert_close(sharded.grad.full_tensor(), -target)
    finally:
        torch.distributed.destroy_process_group()


def test_meta_tensors() -> None:
    """On the meta device every shape and dtype is that of F.kl_div."""
    for shapes, reduction in itertools.product(SHAPES, REDUCTIONS):
        for dtypes in itertools.product((torch.float32, torch.bfloat16), repeat=2):
            input, target = (torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True))
            ours = kl_div(input, target, reduction=reduction)
            theirs = F.kl_div(input, target, reduction=reduction)
            assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
