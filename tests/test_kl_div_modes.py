"""kl_div within PyTorch: autograd, vmap and forward mode, autocast, tensor subclasses, meta tensors."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from cases import DTYPES, REDUCTIONS
from oracle import assert_equal
from test_kl_div import LOG_TARGET, SHAPES, outcomes, pair, positive, pytestmark, run_both  # noqa: F401
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, vmap
from torch.testing import assert_close

from kldiv_ext import kl_div


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


# ---------------------------------------------------------------- autograd


@LOG_TARGET
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_more_than_a_vector(device: str, reduction: str, log_target: bool) -> None:
    function = lambda a, b: kl_div(a, b, reduction=reduction, log_target=log_target)  # noqa: E731
    input, target = pair(3, 37, log_target=log_target, device=device)
    for other in (input, input.t().contiguous().t()):
        leaves = other.detach().requires_grad_(), target.requires_grad_()
        assert gradcheck(function, leaves, fast_mode=True)


@LOG_TARGET
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(device: str, reduction: str, log_target: bool) -> None:
    """The gradients are the same, and no input is written."""
    leaves = [leaf(t) for t in pair(3, 40, log_target=log_target, device=device)]
    before = [t.clone() for t in leaves]
    loss = kl_div(*leaves, reduction=reduction, log_target=log_target).sum()
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


# ---------------------------------------------------------------- modes and subclasses


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
