"""What only a GPU shows: no synchronization, CUDA graphs, streams, a second device, memory, equal runs."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from cases import DIVERGENCES, FORWARD_KL, JSD, MIXES, POSITIONS, REDUCTIONS, Mix, logits, make_pair, named, run
from conftest import NO_CUDA, run_python
from torch import Tensor, nn

from kldiv_ext import DistillationLoss, distillation_loss, kl_div, linear_distillation_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides",
    "ignore:Synchronization debug mode",  # is a prototype
    "ignore:The AccumulateGrad node's stream",  # where backward begins on another stream than forward
)

SHAPE = (24, 1003)  # rows that begin at odd addresses
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float16 computes gradients in backward, the others in forward

NO_CACHE = pytest.mark.skipif(
    "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="needs PyTorch's caching allocator, which is switched off"
)
# Without it cuBLAS promises no equal results beside other streams, and PyTorch calls its products not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

TWO_DEVICES = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(params=[pytest.param("cuda", marks=NO_CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class Case(NamedTuple):
    """A call of a loss, with its options and the position tensors that it takes."""

    function: Callable[..., Tensor]
    mix: Mix


def from_hidden(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """linear_distillation_loss in several chunks, of heads that the device computes itself."""

    def weight(hidden: Tensor, frequency: float) -> Tensor:
        numbers = torch.arange(501.0 * hidden.shape[-1], device=hidden.device).view(501, -1)
        return (numbers * frequency).sin().mul(0.05).to(hidden.dtype)

    return linear_distillation_loss(student, weight(student, 1), teacher, weight(teacher, 2), chunk_size=9, **options)


def with_options(function: Callable[..., Tensor], mix: Mix, **options: Any) -> Case:
    return Case(function, Mix({**mix.options, **options}, mix.tensors))


OPTIONS = POSITIONS | {
    name: MIXES[name] for name in ("ignore_index=3", "temperature squared", "hard labels, scale", "everything")
}
CASES = {
    **{
        f"{divergence}, {reduction}": with_options(distillation_loss, Mix(divergence.options), reduction=reduction)
        for divergence in DIVERGENCES
        for reduction in ("none", "mean")
    },
    **{
        f"{name}, {reduction}": with_options(distillation_loss, mix, reduction=reduction)
        for name, mix in (OPTIONS | {"in place": Mix({"inplace_backward": True})}).items()
        for reduction in REDUCTIONS
        if reduction == "mean" or "num_items" not in {*mix.tensors, *mix.options}
    },
    **{
        f"from hidden states, {name}": with_options(from_hidden, OPTIONS[name])
        for name in ("temperature squared", "labels, mask, weight", "hard labels, scale", "num_items")
    },
    "from hidden states, none": with_options(from_hidden, MIXES["mask"], divergence="jsd", reduction="none"),
    **{
        f"kl_div, {reduction}, log_target={log_target}": Case(
            kl_div, Mix({"reduction": reduction, "log_target": log_target})
        )
        for reduction in REDUCTIONS
        for log_target in (False, True)
    },
}
# One of each way through autograd.
FEW_CASES = {
    name: CASES[name]
    for name in (
        "forward_kl, mean",
        "jsd-0.1, none",
        "labels, mask, weight, mean",
        "from hidden states, labels, mask, weight",
        "from hidden states, none",
        "kl_div, batchmean, log_target=False",
    )
}

Inputs = dict[str, Tensor]


def make_inputs(case: Case, seed: int, dtype: torch.dtype, device: str, shape: tuple[int, int] = SHAPE) -> Inputs:
    """Student, teacher, position tensors, and the factor that the gradient of the loss begins with."""
    student, teacher = make_pair(*shape, dtype=torch.float64, seed=seed)
    if case.function is kl_div:
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        teacher = teacher if case.mix.options["log_target"] else teacher.exp()
    positions = case.mix.arguments(*shape[:-1], columns=30, seed=seed)
    if "num_items" in case.mix.tensors:
        positions["num_items"] += seed
    made = {name: positions[name] for name in case.mix.tensors} | {"factor": logits(seed=seed).abs() + 0.5}
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)} | {
        name: tensor.to(device) for name, tensor in made.items()
    }


def forward(case: Case, inputs: Inputs) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss, its leaves, and what its gradient begins with."""
    leaves = [inputs[side].detach().requires_grad_() for side in ("student", "teacher")]
    positions = {name: inputs[name] for name in case.mix.tensors}
    loss = case.function(*(leaf.clone() for leaf in leaves), **positions, **case.mix.options)
    return loss, leaves, inputs["factor"].to(loss.dtype).expand_as(loss)


def compute(case: Case, inputs: Inputs) -> list[Tensor]:
    """The loss and both gradients."""
    loss, leaves, grad_output = forward(case, inputs)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad_output)]


def assert_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits, all finite: a NaN would mean that something was read too early."""
    for value, other in zip(results, expected, strict=True):
        assert value.dtype == other.dtype
        assert other.isfinite().all() and other.any()
        assert torch.equal(value, other)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """An operator that synchronizes raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_synchronization_is_noticed(device: str) -> None:
    """The next test relies on it."""
    value = torch.ones((), device=device)
    for synchronize in (value.item, lambda: torch.as_tensor(3, device=device)):
        with no_synchronization(), pytest.raises(RuntimeError, match="synchronizing"):
            synchronize()


@pytest.mark.parametrize("case", named(CASES))
def test_no_synchronization(device: str, case: Case) -> None:
    for dtype in DTYPES:
        inputs = make_inputs(case, 1, dtype, device)
        with no_synchronization():
            compute(case, inputs)
            with torch.no_grad():
                forward(case, inputs)


def capture(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `function`, and the tensors that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


@NO_CACHE
@pytest.mark.parametrize("case", named(CASES))
def test_graph(device: str, case: Case) -> None:
    """A captured step gives eager's bits for whatever its inputs hold when it is replayed."""
    for dtype in DTYPES:
        static = make_inputs(case, 0, dtype, device)
        graph, outputs = capture(lambda static=static: compute(case, static))
        for seed in (1, 2):
            inputs = make_inputs(case, seed, dtype, device)
            for key, tensor in static.items():
                tensor.copy_(inputs[key])
            for output in outputs:
                output.fill_(torch.nan)
            graph.replay()
            assert_equal(outputs, compute(case, inputs))


class Head(nn.Module):
    """A parameter before a loss, by operators whose bits do not depend on the stream."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, SHAPE[1]))
        self.loss = DistillationLoss(**options)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.loss(student + self.bias, teacher, labels)


@NO_CACHE
@pytest.mark.parametrize("options", [FORWARD_KL.options, JSD.options], ids=["forward_kl", "jsd"])
def test_graphed_callable(device: str, options: dict[str, Any]) -> None:
    """A module whose passes are CUDA graphs trains as the module itself."""
    case = Case(distillation_loss, MIXES["labels"])

    def arguments(seed: int) -> tuple[Tensor, ...]:
        inputs = make_inputs(case, seed, torch.float32, device)
        return inputs["student"].requires_grad_(), inputs["teacher"], inputs["labels"]

    eager = Head(options).to(device)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(eager), arguments(0))
    results: list[list[Tensor]] = []
    for module in (eager, graphed):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        results.append([])
        for seed in (1, 2, 3):
            optimizer.zero_grad()
            student, *others = arguments(seed)
            loss = module(student, *others)
            loss.backward()
            optimizer.step()
            results[-1] += [loss.detach().clone(), student.grad.clone(), module.bias.detach().clone()]
    assert_equal(*results)


def behind_a_slow_kernel(work: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The result of `work`, queued on the current stream behind a kernel that runs until all is queued. What `work`
    queues on another stream, without making that wait, is done long before.
    """
    for cycles in (10**8, 10**9, 10**10):  # a twentieth of a second and more
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        slept = torch.cuda.Event()
        slept.record()
        results = work()
        if not slept.query():
            torch.cuda.synchronize()
            return results
    pytest.fail("queueing a step takes ten billion cycles of the device: something makes the host wait for it")


def late_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Inputs, Inputs, Callable[[], Inputs]]:
    """Inputs that hold NaN, or 0; the right ones; and a copy of these into those, on the current stream."""
    right = make_inputs(case, 1, dtype, device)
    held = {key: torch.full_like(t, torch.nan if t.is_floating_point() else 0) for key, t in right.items()}
    return held, right, lambda: {key: tensor.copy_(right[key]) for key, tensor in held.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on_side_stream", ["forward", "backward", "forward, backward"])
@pytest.mark.parametrize("case", named(FEW_CASES))
def test_streams(device: str, case: Case, on_side_stream: str, dtype: torch.dtype) -> None:
    """Everything runs on the current stream, and gradients are ready on the stream that asked for them."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    first, second = (side if direction in on_side_stream else current for direction in ("forward", "backward"))

    def step(fill: Callable[[], Inputs]) -> list[Tensor]:
        loss, leaves, grad_output = forward(case, fill())
        with torch.cuda.stream(second):
            gradients = torch.autograd.grad(loss, leaves, grad_output)
            return [loss.detach(), *(gradient.clone() for gradient in gradients)]

    held, right, fill = late_inputs(case, dtype, device)
    with torch.cuda.stream(first):
        step(lambda: held)  # loads kernels, and leaves memory at hand that holds nothing right
        results = behind_a_slow_kernel(lambda: step(fill))
    assert_equal(results, compute(case, right))  # computed now, so that no memory held it before


@TWO_DEVICES
@pytest.mark.parametrize("case", named(CASES))
def test_second_device(device: str, case: Case) -> None:
    """The tensors' device is used, not the current one, which does not change."""
    for dtype, current in itertools.product(DTYPES, (0, 1)):
        expected = compute(case, make_inputs(case, 1, dtype, "cuda:0"))
        with torch.cuda.device(current):
            results = compute(case, make_inputs(case, 1, dtype, "cuda:1"))
            assert torch.cuda.current_device() == current
        for value, other in zip(results, expected, strict=True):
            assert value.device == torch.device("cuda", 1)
            torch.testing.assert_close(value.cpu(), other.cpu())


@TWO_DEVICES
@pytest.mark.parametrize("case", named(FEW_CASES))
def test_stream_of_the_second_device(device: str, case: Case) -> None:
    """Its current stream is used while the other device is the current one."""
    held, right, fill = late_inputs(case, torch.float32, "cuda:1")

    def step(fill: Callable[[], Inputs]) -> list[Tensor]:
        with torch.cuda.device(0):
            return compute(case, fill())

    with torch.cuda.stream(torch.cuda.Stream(1)):  # makes its device the current one as well
        step(lambda: held)
        results = behind_a_slow_kernel(lambda: step(fill))
    assert_equal(results, compute(case, right))


@TWO_DEVICES
def test_two_devices_in_one_call(device: str) -> None:
    student, teacher = make_pair(*SHAPE)
    with pytest.raises(ValueError, match="teacher_logits must be on the device of student_logits"):
        distillation_loss(student.to("cuda:0"), teacher.to("cuda:1"))


# Without the caching allocator every tensor has pages of its own, freed with it.
UNCACHED = """
import sys
from test_cuda_contract import CASES, DTYPES, FEW_CASES, assert_equal, compute, make_inputs

for cases, times in ((CASES, 3), (FEW_CASES, 100)):
    for name, case in cases.items():
        for dtype in DTYPES:
            inputs = make_inputs(case, 1, dtype, sys.argv[1])
            first = compute(case, inputs)
            for _ in range(times):
                assert_equal(compute(case, inputs), first)
            for value, other in zip(first, compute(case, make_inputs(case, 1, dtype, "cpu")), strict=True):
                value, other = value.cpu().double(), other.double()
                worst = 3e-2 if name.startswith("from hidden states") else 1e-2  # a CPU rounds their logits to 16 bits
                assert (value - other).norm() < worst * other.norm(), (name, dtype)
print("done")
"""


def test_without_the_caching_allocator(device: str) -> None:
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONWARNINGS": "ignore"}
    assert run_python("-c", UNCACHED, device, **environment) == "done\n"


LARGE = (256, 2**17)
REST = 2**20  # what grows with the rows alone, and what the allocator rounds up: 1/60 of the smallest gradient


def extra_bytes(function: Callable[[], Any]) -> int:
    """The peak of allocated bytes during a call of `function`, beyond those before it."""
    gc.collect()  # garbage that is freed later would be subtracted
    torch.cuda.empty_cache()  # blocks left by others are of other sizes, and may be handed out whole
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    extra = torch.cuda.max_memory_allocated() - before
    del result
    return extra


MEMORY_CASES = {
    f"{divergence}, {reduction}": with_options(
        distillation_loss, MIXES["weight"], **divergence.options, reduction=reduction
    )
    for divergence in DIVERGENCES
    for reduction in ("mean", "none")
} | {name: case for name, case in CASES.items() if name.startswith("kl_div, batchmean")}


@NO_CACHE
@pytest.mark.parametrize("case", named(MEMORY_CASES))
def test_memory(device: str, case: Case) -> None:
    """A forward pass allocates some bytes per row, a backward pass the requested gradients beside them."""
    function, mix = case
    options = mix.arguments(*LARGE[:-1], columns=LARGE[-1], device=device)
    for dtype in DTYPES:
        inputs = [torch.rand(LARGE, device=device, dtype=dtype) for _ in range(2)]
        assert extra_bytes(functools.partial(function, *inputs, **options)) <= REST
        for needs_grad in ((True, False), (True, True)):
            needed = sum(needs_grad) * inputs[0].nbytes
            step = functools.partial(run, function, *inputs, needs_grad=needs_grad, **options)
            assert needed <= extra_bytes(step) <= needed + REST


@pytest.mark.parametrize("case", named(CASES))
def test_runs_are_equal(device: str, case: Case) -> None:
    """Alone, beside other work on the device, and on uninitialized memory."""
    busy, factor = torch.cuda.Stream(), torch.randn(2048, 2048, device=device)
    for dtype in DTYPES:
        inputs = make_inputs(case, 1, dtype, device, (300, 5003))
        first = compute(case, inputs)
        assert_equal(compute(case, inputs), first)
        with torch.cuda.stream(busy):
            for _ in range(20):
                factor @ factor
        assert_equal(compute(case, inputs), first)
        torch.use_deterministic_algorithms(True)  # others raise, and memory that torch allocates begins as NaN
        try:
            assert_equal(compute(case, inputs), first)
        finally:
            torch.use_deterministic_algorithms(False)
        torch.cuda.synchronize()
