"""torch.func transforms, forward-mode AD, and the modes and wrappers of autograd."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from cases import MIXES, make_pair, named, run
from oracle import assert_equal
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kldiv_ext import distillation_loss, kl_div, reference
from kldiv_ext.options import OperatorOptions

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides",
    "ignore:There is a performance drop",  # a compiled vmap calls the operators row by row
    "ignore:Anomaly Detection",
    "ignore:.torch.jit.script",  # from here on inside torch.func.linearize
    "ignore:Attempted to insert a get_attr Node",
)

SHAPE = (4, 37)

# ---------------------------------------------------------------- torch.func


class Loss(NamedTuple):
    """A loss twice, by (student, teacher): vmap goes over the rows, and over both arguments."""

    ours: Callable[[Tensor, Tensor], Tensor]
    plain: Callable[[Tensor, Tensor], Tensor]


def twice(ours: Any, plain: Any, make: Callable[..., Callable[[Tensor, Tensor], Tensor]]) -> Loss:
    return Loss(make(ours), make(plain))


of_logits = functools.partial(twice, distillation_loss, reference.distillation_loss)
of_probabilities = functools.partial(twice, kl_div, F.kl_div)


EVERY_OPTION = {**MIXES["everything"].options, "divergence": "skew_reverse_kl", "valid_vocab": 5, "ignore_index": 5}
LOSSES = {
    "kl_div": of_probabilities(lambda f: lambda s, t: f(s.log_softmax(-1), t.softmax(-1), reduction="sum")),
    "kl_div, log_target": of_probabilities(
        lambda f: lambda s, t: f(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True)
    ),
    **{
        f"{divergence}, {reduction}": of_logits(
            lambda f, d=divergence, r=reduction: lambda s, t: f(s, t, divergence=d, reduction=r).sum()
        )
        for divergence, reduction in (("forward_kl", "mean"), ("jsd", "none"), ("alpha", "sum"))
    },
    "masked": of_logits(lambda f: lambda s, t: f(s, t, mask=t.detach()[..., 0] < 0.5)),
    "every option": of_logits(lambda f: lambda s, t: f(s, t, s.detach()[..., :6].argmin(-1), **EVERY_OPTION)),
}

JSD = OperatorOptions(1.0, 0.0, 1, "jsd", 0.5, 1.0, (1.0, 1.0), (0.0, 0.0), None)
OPERATOR_LOSSES = {
    "operator kl_div": Loss(
        lambda s, t: torch.ops.kldiv_ext.kl_div(s.log_softmax(-1), t.softmax(-1), 1, False), LOSSES["kl_div"].plain
    ),
    "operator distillation_loss": Loss(
        lambda s, t: torch.ops.kldiv_ext.distillation_loss(s, t, None, None, *JSD, False, False, False)[0],
        lambda s, t: reference.distillation_loss(s, t, divergence="jsd", reduction="sum"),
    ),
}

COMPILED_TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, s, t: grad(f, (0, 1))(s, t),
    "vmap": lambda f, s, t: vmap(f)(s, t),
    "vmap of grad": lambda f, s, t: vmap(grad(f, (0, 1)))(s, t),
    "grad of vmap": lambda f, s, t: grad(lambda a, b: vmap(f)(a, b).sum(), (0, 1))(s, t),
    "grad of grad": lambda f, s, t: grad(lambda a: (grad(f)(a, t) * t).sum())(s),
    "jvp": lambda f, s, t: jvp(f, (s, t), (t, s)),
    "vjp": lambda f, s, t: vjp(f, s, t)[1](s.new_tensor(2)),
}
EAGER_TRANSFORMS: dict[str, Callable[..., Any]] = {
    **COMPILED_TRANSFORMS,
    "jvp of grad": lambda f, s, t: jvp(grad(f, (0, 1)), (s, t), (t, s)),
    "jacrev": lambda f, s, t: jacrev(f, (0, 1))(s, t),
    "jacfwd": lambda f, s, t: jacfwd(f, (0, 1))(s, t),
    "hessian": lambda f, s, t: hessian(f, (0, 1))(s, t),
    "linearize": lambda f, s, t: linearize(f, s, t)[1](t, s),
}


def assert_transforms_agree(transform: Callable[..., Any], loss: Loss, device: str, compiled: bool = False) -> None:
    tensors = make_pair(3, 6, dtype=torch.float64, device=device)
    ours = lambda s, t: transform(loss.ours, s, t)  # noqa: E731
    if compiled:
        torch._dynamo.reset()
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)
    values, expected = tree_leaves(ours(*tensors)), tree_leaves(transform(loss.plain, *tensors))
    assert all(other.any() for other in expected), "the test would not see a silent zero"
    assert_close(values, expected)


@pytest.mark.parametrize("transform", named(EAGER_TRANSFORMS))
@pytest.mark.parametrize("loss", named(LOSSES))
def test_func(device: str, loss: Loss, transform: Callable[..., Any]) -> None:
    assert_transforms_agree(transform, loss, device)


@pytest.mark.parametrize("transform", named(COMPILED_TRANSFORMS))
@pytest.mark.parametrize("loss", named(LOSSES | OPERATOR_LOSSES))
def test_compiled_func(device: str, loss: Loss, transform: Callable[..., Any]) -> None:
    """The compiler may inline our Functions and call the operators while gradients are tracked. Operators without
    autograd kernels of their own would then return zeros and say nothing.
    """
    assert_transforms_agree(transform, loss, device, compiled=True)


@pytest.mark.parametrize("loss", named(LOSSES))
def test_forward_mode(device: str, loss: Loss) -> None:
    student, teacher = make_pair(*SHAPE, dtype=torch.float64, device=device)
    results = []
    for function in loss:
        with forward_ad.dual_level():
            dual = function(forward_ad.make_dual(student.clone().requires_grad_(), teacher), teacher)
            results.append([t.detach() for t in forward_ad.unpack_dual(dual)])
    assert_close(*results)


@pytest.mark.parametrize("loss", named(LOSSES))
def test_batched_gradients(device: str, loss: Loss) -> None:
    tensors = [t.requires_grad_() for t in make_pair(*SHAPE, dtype=torch.float64, device=device)]
    directions = torch.arange(1.0, 4.0, dtype=torch.float64, device=device)
    assert_close(
        *(torch.autograd.grad(function(*tensors), tensors, directions, is_grads_batched=True) for function in loss)
    )


# ---------------------------------------------------------------- modes and wrappers

KERNELS: dict[str, Callable[..., Tensor]] = {
    "kl_div": functools.partial(kl_div, reduction="sum", log_target=True),
    "distillation_loss": distillation_loss,
    "distillation_loss, none": functools.partial(distillation_loss, reduction="none", divergence="jsd"),
}
# {wrapper: the context of the call}
CONTEXTS: dict[str, Callable[[str], Any]] = {
    "save_on_cpu": lambda device: torch.autograd.graph.save_on_cpu(),
    "saved_tensors_hooks": lambda device: torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone),
    "anomaly detection": lambda device: torch.autograd.detect_anomaly(),
    "autocast": lambda device: torch.autocast(device, torch.bfloat16),  # losses stay float32
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrapper", [*CONTEXTS, "checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_modes_keep_the_bits(device: str, kernel: str, wrapper: str, dtype: torch.dtype) -> None:
    if (kernel, wrapper) == ("kl_div", "autocast"):
        pytest.skip("the result has another dtype under autocast, as PyTorch's: test_kl_div.py")
    function, tensors = KERNELS[kernel], make_pair(*SHAPE, dtype=dtype, device=device)

    def wrapped(*tensors: Tensor) -> Tensor:
        views = [t * 1 for t in tensors]  # no leaves
        if wrapper in CONTEXTS:
            with CONTEXTS[wrapper](device):
                return function(*views)
        return checkpoint(function, *views, use_reentrant=wrapper.startswith("reentrant"))

    assert_equal(run(wrapped, *tensors), run(function, *tensors))


@pytest.mark.parametrize("kernel", KERNELS)
def test_modes_without_gradients(device: str, kernel: str) -> None:
    tensors = [t.requires_grad_() for t in make_pair(*SHAPE, device=device)]
    expected = KERNELS[kernel](*tensors).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = KERNELS[kernel](*tensors)
        assert not result.requires_grad
        assert_equal(result, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_teacher_from_inference_mode(device: str, kernel: str) -> None:
    """Autograd refuses to save inference tensors, which a teacher's logits often are."""
    student, teacher = make_pair(*SHAPE, device=device)
    weight = MIXES["weight"].arguments(*SHAPE[:-1], columns=SHAPE[-1], device=device)
    with torch.inference_mode():
        frozen, frozen_weight = teacher * 1, {name: x * 1 for name, x in weight.items()}
    step = functools.partial(run, KERNELS[kernel], student, needs_grad=(True, False))
    assert frozen.detach().is_inference()
    assert_equal(step(frozen), step(teacher))
    if kernel != "kl_div":
        assert_equal(step(frozen, **frozen_weight), step(teacher, **weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_layer(device: str, dtype: torch.dtype) -> None:
    """The logits of a layer under autocast; the loss inside the region is the one outside."""
    student, teacher = make_pair(*SHAPE, device=device)
    tensors = torch.randn(SHAPE[-1], 64, device=device), student[0]
    hidden = torch.randn(SHAPE[0], 64, device=device)
    positions = MIXES["labels, mask, weight"].arguments(*SHAPE[:-1], columns=SHAPE[-1], device=device)

    def loss(weight: Tensor, bias: Tensor, function: Callable[..., Tensor], inside: bool) -> Tensor:
        with torch.autocast(device, dtype):
            logits = F.linear(hidden, weight, bias)
            assert logits.dtype == dtype
            with torch.autocast(device, dtype, enabled=inside):
                return function(logits, teacher)

    for function in (
        *(KERNELS[name] for name in ("distillation_loss", "distillation_loss, none")),
        functools.partial(distillation_loss, **positions),
        lambda s, t: kl_div(s.float().log_softmax(-1), t.softmax(-1), reduction="batchmean"),
    ):
        ours, expected = (run(loss, *tensors, function, inside, grad_output=2.0**10) for inside in (True, False))
        assert ours.loss.dtype == torch.float32
        assert_equal(ours, expected)


def test_python_threads(device: str) -> None:
    """Forward and backward from several Python threads at once."""
    jobs = [(kernel, rows) for kernel in KERNELS for rows in (1, 3, 8, 50)] * 4
    call = lambda job: run(KERNELS[job[0]], *make_pair(job[1], 501, device=device))  # noqa: E731
    expected = {job: call(job) for job in set(jobs)}
    with ThreadPoolExecutor(4) as pool:
        for job, result in zip(jobs, pool.map(call, jobs), strict=True):
            assert_equal(result, expected[job])


def test_results_are_plain_tensors(device: str) -> None:
    """They can be copied, pickled and differentiated like any other."""
    student, teacher = make_pair(*SHAPE, device=device)
    loss = distillation_loss(torch.nn.Parameter(student), teacher)
    assert type(loss) is Tensor and loss.grad_fn is not None
    assert_equal(pickle.loads(pickle.dumps(loss.detach())), loss.detach())
