"""kl_div, the drop-in, against torch.nn.functional.kl_div: PyTorch's own cases, and those that they leave out."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, REDUCTIONS, Result, logits, named, run
from oracle import assert_equal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

from kldiv_ext import kl_div

INF, NAN = float("inf"), float("nan")

OP_INFO = next(info for info in op_db if info.name == "nn.functional.kl_div")

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides",
    "ignore:size_average and reduce args",
    "ignore:There is a performance drop",  # PyTorch's own loss, under vmap
    "ignore:.torch.jit.script. is deprecated",  # inside torch.testing
)

LOG_TARGET = pytest.mark.parametrize("log_target", [False, True])


def pair(
    *shape: int, log_target: bool = False, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Tensor]:
    """[input, target]"""
    both = [logits(*shape, dtype=torch.float64, seed=seed).log_softmax(-1).to(device, dtype) for seed in (0, 1)]
    return [both[0], both[1] if log_target else both[1].exp()]


def positive(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Numbers from 0.2 to 2.2, which both arguments may hold."""
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.rand(shape, generator=generator) * 2 + 0.2).to(device, dtype)


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, size: float) -> None:
    """The error is at most twice PyTorch's, plus a rounding of the result and one of terms of `size` that cancel."""
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
    input: Tensor, target: Tensor, *, reduction: str = "mean", log_target: bool = False, **arguments: Any
) -> None:
    """Compare values and gradients with those of F.kl_div in the same dtypes and in float64."""
    arguments |= {"reduction": reduction, "log_target": log_target}
    ours, theirs = run_both(input, target, **arguments)
    exact = run(F.kl_div, input.double(), target.double(), **arguments)
    size = 0.0
    if input.numel() > 0 and target.numel() > 0:  # of target · log target, target · input and their sum
        log_p, p = (target, target.exp()) if log_target else (target.log(), target)
        size = float((p.abs().max() + 1) * (log_p.abs().max() + input.abs().max() + 1))
        size *= max(input.numel(), target.numel()) if reduction in ("sum", "batchmean") else 1
    assert_no_worse(ours.loss, theirs.loss, exact.loss, size)
    for value, other, best in zip(ours.gradients, theirs.gradients, exact.gradients, strict=True):
        assert (value is None) == (other is None)
        if value is not None:
            assert_no_worse(value, other, best, size)


def run_both(*tensors: Tensor, within: Callable[..., Any] = lambda f: f, **arguments: Any) -> list[Result]:
    """The results of kl_div and of F.kl_div; `within` turns either into the function to run."""
    return [run(within(function), *tensors, **arguments) for function in (kl_div, F.kl_div)]


def outcomes(*arguments: Any, **options: Any) -> list[Any]:
    """What kl_div and F.kl_div return, or the types and messages of their exceptions."""

    def outcome(function: Callable[..., Any]) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:
            return type(error), str(error)

    return [outcome(kl_div), outcome(F.kl_div)]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize("dtype", OP_INFO.dtypes)
def test_opinfo_values_and_gradients(device: str, dtype: torch.dtype) -> None:
    assert dtype in DTYPES
    for sample in OP_INFO.sample_inputs(device, dtype, requires_grad=False):
        shape = sample.input.shape if sample.kwargs["reduction"] == "none" else ()
        grad_output = torch.randn(shape, device=device)
        assert_as_pytorch(sample.input, *sample.args, grad_output=grad_output, **sample.kwargs)


def test_opinfo_derivatives(device: str) -> None:
    """First and second derivatives for both arguments, reverse, forward and mixed, alone and batched."""
    for sample in OP_INFO.sample_inputs(device, torch.float64, requires_grad=True):
        function = lambda a, b, options=sample.kwargs: kl_div(a, b, **options)  # noqa: E731
        leaves = (sample.input, sample.args[0].requires_grad_())
        assert gradcheck(
            function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
        )
        flags = ("gen_non_contig_grad_outputs", "check_fwd_over_rev", "check_rev_over_rev", "check_batched_grad")
        assert gradgradcheck(function, leaves, **dict.fromkeys(flags, True))


# ---------------------------------------------------------------- shapes, strides, dtypes

SHAPES = [
    ((3, 4), (3, 4)),
    ((7,), (7,)),  # batchmean divides by the length
    ((1,), (1,)),
    ((2, 3, 4, 5), (2, 3, 4, 5)),  # batchmean divides by the first dimension
    ((3, 37), (3, 37)),  # several vectors and a tail
    ((), ()),
    ((), (4,)),  # a 0-d tensor does not promote another
    ((4,), ()),
    ((1, 4), (3, 4)),  # broadcast: batchmean divides by the input's 1
    ((3, 4), (4,)),
    ((4,), (3, 4)),
    ((3, 1), (1, 4)),
    ((0, 4), (0, 4)),  # empty: the means are NaN, as in PyTorch
    ((3, 0), (3, 0)),
    ((0,), (0,)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes_and_dtypes(device: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Values, gradients and their dtypes for every promotion, reduction, choice of gradients; expanded grad_output."""
    for *dtypes, reduction, log_target in itertools.product(DTYPES, DTYPES, REDUCTIONS, (False, True)):
        input, target = (positive(shape, dtype, device) for shape, dtype in zip(shapes, dtypes, strict=True))
        for needs_grad in itertools.product((False, True), repeat=2):
            options = {"needs_grad": needs_grad, "reduction": reduction, "log_target": log_target}
            assert_as_pytorch(input, target, grad_output=-1.0, **options)


@LOG_TARGET
def test_what_pytorch_computes_or_raises(device: str, log_target: bool) -> None:
    """Integers, complex numbers, shapes that do not broadcast: the same result, or the same exception and message."""
    others = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
    all_dtypes = (*DTYPES, *others)
    for a, b, shape in itertools.product(all_dtypes, all_dtypes, ((3, 4), (4,), (2, 4))):
        if a in DTYPES and b in DTYPES and shape != (2, 4):
            continue  # test_shapes_and_dtypes
        tensors = positive((3, 4), a, device), positive(shape, b, device)
        for reduction in REDUCTIONS:
            ours, theirs = outcomes(*tensors, reduction=reduction, log_target=log_target)
            if isinstance(theirs, tuple):
                assert ours == theirs
            else:
                assert_close(ours, theirs, equal_nan=True)


def test_wrong_arguments() -> None:
    ones = torch.ones(2)
    tensors = ((1.0, ones), (ones, None), ([1.0], ones), (ones, ones.to_sparse()), (ones, ones.to("meta")))
    options = ({"reduction": "total"}, {"reduction": None}, {"log_target": 1}, {"log_target": None})
    for arguments, given in (*((pair, {}) for pair in tensors), *(((ones, ones), given) for given in options)):
        ours, theirs = outcomes(*arguments, **{"reduction": "sum", **given})
        assert isinstance(theirs, tuple) and ours == theirs


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", named({**LAYOUTS, "channels last": channels_last}))
def test_strides(device: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Each argument and grad_output give the bits of contiguous ones; the sum of a strided tensor is row by row."""
    shape = (2, 3, 4, 67) if layout is channels_last else (5, 67)
    for log_target, reduction in itertools.product((False, True), REDUCTIONS):
        tensors = pair(*shape, log_target=log_target, dtype=dtype, device=device)
        grad_output = torch.randn_like(tensors[0] if reduction == "none" else tensors[0].sum())
        expected = run(kl_div, *tensors, grad_output=grad_output, reduction=reduction, log_target=log_target)
        for a, b, c in itertools.product((lambda x: x, layout), repeat=3):
            strided = (a(tensors[0]), b(tensors[1]))
            factor = c(grad_output) if reduction == "none" else grad_output
            result = run(kl_div, *strided, grad_output=factor, reduction=reduction, log_target=log_target)
            assert_equal(result.gradients, expected.gradients)
            (assert_equal if reduction == "none" else assert_close)(result.loss, expected.loss)


@LOG_TARGET
def test_expanded(device: str, log_target: bool) -> None:
    """Stride 0 in either argument is no broadcast; the gradient is the base's."""
    full = pair(4, 9, log_target=log_target, device=device)
    for tensors in ((full[0][:1], full[1]), (full[0], full[1][:1])):
        expanded = lambda f: lambda a, b: f(a.expand(4, 9), b.expand(4, 9), reduction="sum", log_target=log_target)  # noqa: E731
        assert_close(*run_both(*tensors, within=expanded))


def test_many_dimensions_that_do_not_collapse(device: str) -> None:
    """The tensors have more dimensions than the kernels index; plain operators compute the loss."""
    tensors = [t.reshape(*[4] * 9, 3)[(slice(0, 4, 3),) * 9] for t in pair(4**9, 3, device=device)]
    assert not tensors[0].is_contiguous()
    assert_close(*run_both(*tensors, reduction="sum"))


def test_direction(device: str) -> None:
    """KL(target ‖ exp(input)) of an asymmetric example, by hand: the order of the arguments."""
    p = torch.tensor([0.5, 0.5], device=device)
    q = torch.tensor([0.25, 0.75], device=device)
    expected = torch.tensor(0.14384104)  # ½ ln 2 + ½ ln ⅔
    assert_close(kl_div(q.log(), p, reduction="sum").cpu(), expected)
    assert_close(kl_div(q.log(), p.log(), reduction="sum", log_target=True).cpu(), expected)
    assert_close(kl_div(p.log(), q, reduction="sum").cpu(), torch.tensor(0.13081204))  # ¼ ln ½ + ¾ ln 3⁄2


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64])
@LOG_TARGET
def test_accuracy(device: str, dtype: torch.dtype, log_target: bool) -> None:
    """The error is at most two roundings (older machines round logarithms), or PyTorch's if that is larger."""
    tensors = pair(64, 5003, log_target=log_target, dtype=dtype, device=device)
    for reduction in ("sum", "mean", "batchmean"):
        options = {"reduction": reduction, "log_target": log_target}
        exact = F.kl_div(*(t.double() for t in tensors), **options)
        ours, theirs = ((result.loss.double() - exact).abs() for result in run_both(*tensors, **options))
        assert ours <= max(theirs, 2 * torch.finfo(dtype).eps * exact)


def test_identical_distributions(device: str) -> None:
    for dtype in DTYPES:
        same, _ = pair(3, 1000, dtype=dtype, device=device)
        assert kl_div(same, same, reduction="none", log_target=True).eq(0).all()


# ---------------------------------------------------------------- probability 0


def zeros(log_target: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, target, and where the target's probability is 0: where the input is finite, and where it is -inf."""
    input = torch.tensor([[-INF, -1.0, -2.0, -0.5], [-1.0, -INF, -1.5, -3.0]], dtype=dtype, device=device)
    target = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.25, 0.0, 0.25, 0.5]], dtype=dtype, device=device)
    return input, target.log() if log_target else target, target == 0


def compiled(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(kl_div, backend="aot_eager", fullgraph=True)(input, target, **options)


ROUTES: dict[str, Callable[..., Tensor]] = {
    "fused": kl_div,
    "broadcast": lambda a, b, **options: kl_div(a.expand(1, *a.shape), b, **options),
    "vmap": lambda a, b, **options: vmap(lambda x, y: kl_div(x, y, **options))(a, b),
    "0-d": lambda a, b, **options: torch.stack(
        [kl_div(x, y, **options) for x, y in zip(a.flatten(), b.flatten(), strict=True)]
    ),
    "compiled": compiled,
}


@pytest.mark.parametrize("autocast", [False, True])
@LOG_TARGET
@pytest.mark.parametrize("route", ROUTES)
def test_zero_probabilities(device: str, route: str, log_target: bool, autocast: bool) -> None:
    """An element whose target is 0 contributes 0, with derivatives of 0 of first and second order, on every route."""

    def assert_zero_where_dead(gradients: tuple[Tensor, ...], dead: Tensor) -> None:
        for gradient in gradients:
            assert gradient.isfinite().all()
            assert torch.equal(gradient == 0, dead)

    for dtype, reduction in itertools.product(DTYPES, ("none", "sum")):
        *tensors, dead = zeros(log_target, dtype, device)
        expected = F.kl_div(*(x.double()[~dead] for x in tensors), reduction="sum", log_target=log_target)
        for tensor in tensors:
            tensor.requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            terms = ROUTES[route](*tensors, reduction=reduction, log_target=log_target)
        if reduction == "none":
            assert terms.detach().reshape(dead.shape)[dead].eq(0).all()
        assert_close(terms.detach().sum().double(), expected, rtol=2e-2, atol=2e-2)  # float16 and bfloat16 sums
        twice = route != "compiled"  # AOTAutograd does not differentiate twice
        first = torch.autograd.grad(terms.sum(), tensors, create_graph=twice)
        assert_zero_where_dead(first, dead)
        if twice:
            direction = torch.arange(1.0, 9.0, device=device).reshape(dead.shape)
            second = torch.autograd.grad(sum((g * direction).sum() for g in first), tensors)
            assert_zero_where_dead(second, dead)


@LOG_TARGET
def test_zero_probabilities_forward_mode(device: str, log_target: bool) -> None:
    *tensors, dead = zeros(log_target, torch.float64, device)
    function = lambda a, b: kl_div(a, b, reduction="none", log_target=log_target)  # noqa: E731
    for result in jvp(function, tuple(tensors), tuple(map(torch.ones_like, tensors))):
        assert result[dead].eq(0).all() and result.isfinite().all()


@LOG_TARGET
def test_other_infinities(device: str, log_target: bool) -> None:
    """As in PyTorch: q = 0 < p is +inf, NaN stays in its element."""
    input = torch.tensor([-INF, NAN, -1.0, -1.0, -1.0], device=device)
    target = torch.tensor([0.5, 0.5, NAN, INF, -0.5], device=device)
    ours, theirs = outcomes(input, target, reduction="none", log_target=log_target)
    assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "elementwise_mean"])
@pytest.mark.parametrize("shape", [(3, 4), (4,), (), (0, 4)], ids=str)
def test_deprecated_arguments(device: str, shape: tuple[int, ...], reduction: str) -> None:
    """Values and warnings agree for every combination; with size_average and batchmean, PyTorch divides twice."""
    input, target = positive(shape, torch.float64, device), positive(shape, torch.float64, device) / 2
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        warned = []
        for function in (kl_div, F.kl_div):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = function(input, target, size_average, reduce, reduction)
            warned.append((result, [(w.category, str(w.message)[:80]) for w in caught]))
        (ours, our_warnings), (theirs, their_warnings) = warned
        assert_close(ours, theirs, equal_nan=True)
        assert our_warnings == their_warnings


def test_warnings_name_the_caller() -> None:
    input, target = pair(3, 4)
    for other in (target, target[:1]):  # fused and not
        with pytest.warns(UserWarning, match="'mean' divides the total loss") as caught:
            kl_div(input, other)
        assert caught[0].filename == __file__


# ---------------------------------------------------------------- autograd, modes, subclasses


@LOG_TARGET
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(device: str, reduction: str, log_target: bool) -> None:
    """The gradients are the same, a grad_output of 0 gives 0, and no input is written."""
    leaves = [leaf(t) for t in pair(3, 40, log_target=log_target, device=device)]
    before = [t.clone() for t in leaves]
    loss = kl_div(*leaves, reduction=reduction, log_target=log_target).sum()
    zeros = torch.autograd.grad(loss, leaves, torch.zeros_like(loss), retain_graph=True)
    assert not any(gradient.any() for gradient in zeros)
    assert_equal(torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves))
    assert_equal(leaves, before)
    assert [t._version for t in leaves] == [0, 0]


def test_what_is_saved(device: str) -> None:
    """As in PyTorch, the input's gradient needs the target alone, and the input may be changed meanwhile."""
    input, target = pair(3, 4, device=device)
    saved: list[Tensor] = []
    student = leaf(input) + 0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = kl_div(student, target, reduction="sum")
    assert [t.data_ptr() for t in saved] == [target.data_ptr()]
    student.detach().zero_()
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=str)
def test_forward_mode(device: str, which: tuple[bool, bool], dtype: torch.dtype) -> None:
    """One leaf or both, which require a gradient, carry tangents."""
    tensors = pair(3, 4, dtype=dtype, device=device)
    results = []
    for function in (kl_div, F.kl_div):
        with forward_ad.dual_level():
            leaves = [leaf(t) for t in tensors]
            duals = [forward_ad.make_dual(x, x.sin()) if w else x for x, w in zip(leaves, which, strict=True)]
            results.append([t.detach() for t in forward_ad.unpack_dual(function(*duals, reduction="sum"))])
    assert_close(*results)


@LOG_TARGET
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (1, 1)], ids=str)
def test_vmap(device: str, in_dims: tuple[int, int | None], reduction: str, log_target: bool) -> None:
    """vmap over rows, over one argument and over columns, with gradients inside and outside."""
    input, target = pair(4, 4, log_target=log_target, device=device)
    target = target[0] if in_dims[1] is None else target
    batched = lambda f: vmap(lambda a, b: f(a, b, reduction=reduction, log_target=log_target), in_dims)  # noqa: E731
    assert_close(*run_both(input, target, within=batched))  # backward over vmap
    assert_close(*(grad(lambda a, b, f=f: batched(f)(a, b).sum(), (0, 1))(input, target) for f in (kl_div, F.kl_div)))


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
def test_autocast(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Results are float32, or float64 where an argument is, and gradients have their argument's dtype: as PyTorch."""
    for shapes, reduction in itertools.product((((3, 4), (3, 4)), ((1, 4), (3, 4)), ((), ())), REDUCTIONS):
        tensors = [positive(shape, dtype, device) for shape, dtype in zip(shapes, dtypes, strict=True)]
        with torch.autocast(device, torch.bfloat16):
            ours, theirs = run_both(*tensors, reduction=reduction)
        for value, other in zip((ours.loss, *ours.gradients), (theirs.loss, *theirs.gradients), strict=True):
            tolerance = 1e-2 if torch.finfo(value.dtype).bits < 32 else 1e-5
            assert_close(value, other, rtol=tolerance, atol=tolerance)


class Recorded(torch.Tensor):
    """A subclass that sees every function call."""

    calls: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("side", [0, 1])
def test_torch_function_subclass(side: int) -> None:
    """PyTorch computes the loss of a subclass, which sees the call of F.kl_div."""
    tensors = pair(3, 4)
    expected = F.kl_div(*tensors, reduction="sum")
    tensors[side] = tensors[side].as_subclass(Recorded)
    Recorded.calls.clear()
    result = kl_div(*tensors, reduction="sum")
    assert F.kl_div in Recorded.calls
    assert type(result) is Recorded
    assert_close(result.as_subclass(Tensor), expected)


def test_what_keeps_the_kernel(device: str) -> None:
    """Parameters and torch.set_default_device, a torch function mode, do not lose the fused kernel."""
    input, target = pair(3, 4, device=device)
    losses = [kl_div(torch.nn.Parameter(input), target, reduction="sum")]
    with torch.device("cpu"):
        losses.append(kl_div(leaf(input), target, reduction="sum"))
    for loss in losses:
        assert type(loss) is Tensor
        assert type(loss.grad_fn).__name__ == "KLDivBackward"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_dtensor() -> None:
    """The kernels take no tensors made of other tensors: PyTorch shards the loss and its gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        input, target = pair(4, 6)
        sharded = distribute_tensor(input, mesh, [Shard(0)]).requires_grad_()
        loss = kl_div(sharded, distribute_tensor(target, mesh, [Shard(0)]), reduction="sum")
        assert isinstance(loss, DTensor)
        assert_close(loss.full_tensor(), F.kl_div(input, target, reduction="sum"))
        loss.backward()
        assert_close(sharded.grad.full_tensor(), -target)
    finally:
        torch.distributed.destroy_process_group()


def test_meta_tensors() -> None:
    """On the meta device, shapes and dtypes are those of F.kl_div."""
    for shapes, reduction in itertools.product(SHAPES, REDUCTIONS):
        for dtypes in itertools.product((torch.float32, torch.bfloat16), repeat=2):
            tensors = [torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True)]
            ours, theirs = outcomes(*tensors, reduction=reduction)
            assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
