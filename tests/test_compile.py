"""torch.compile and torch.export: the bits of eager, one graph, and no needless recompilation."""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, MIXES, REDUCTIONS, Mix, make_pair, named, run
from conftest import run_python
from oracle import assert_equal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vjp
from torch.testing import assert_close

import kldiv_ext
from kldiv_ext import DIVERGENCES, distillation_loss, kl_div

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides",
    "ignore:.torch.jit.script",  # from here on inside AOTAutograd
    "ignore:Attempted to insert a get_attr Node",
    "ignore:Your compiler for AOTAutograd",
)

SHAPE = (4, 37)
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", dynamic: bool | None = None) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def assert_compiles(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], dynamic: bool | None = None) -> None:
    """Loss and gradients to the bit: compiled code runs the same kernels."""
    other = compiled(function, dynamic=dynamic)
    for grad_output in (1.0, 0.37):
        expected = run(function, *tensors, grad_output=grad_output)
        assert_equal(run(other, *tensors, grad_output=grad_output), expected)


# ---------------------------------------------------------------- the bits of eager


COMPILED_MIXES = MIXES | {
    "weight, none": Mix({"reduction": "none"}, ("weight",)),
    "hard labels, none": Mix({**MIXES["hard labels alone"].options, "reduction": "none"}, ("labels",)),
    "jsd, softcap, scale": Mix({"logit_softcap": 2.0, "logit_scale": (0.5, None), "divergence": "jsd"}),
}
COMPILED_MIXES |= {divergence: Mix({"divergence": divergence}) for divergence in DIVERGENCES}
COMPILED_MIXES |= {f"{d}, none": Mix({"divergence": d, "reduction": "none"}, ("mask",)) for d in DIVERGENCES}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mix", named(COMPILED_MIXES))
def test_options(device: str, mix: Mix, dynamic: bool) -> None:
    arguments = mix.arguments(*SHAPE[:-1], columns=SHAPE[-1], device=device)
    assert_compiles(functools.partial(distillation_loss, **arguments), make_pair(*SHAPE, device=device), dynamic)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device: str, dtype: torch.dtype) -> None:
    """float16 computes its gradient in backward, the others in forward; also in a module."""
    tensors = make_pair(*SHAPE, dtype=dtype, device=device)
    for function in (distillation_loss, kldiv_ext.DistillationLoss(divergence="jsd", temperature=2.0)):
        assert_compiles(function, tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum", "elementwise_mean", "size_average"])
def test_kl_div(device: str, reduction: str, dynamic: bool) -> None:
    options = {"size_average": False} if reduction == "size_average" else {"reduction": reduction}
    input, target = (t.log_softmax(-1) for t in make_pair(*SHAPE, device=device))
    assert_compiles(functools.partial(kl_div, **options), (input, target.exp()), dynamic)
    assert_compiles(functools.partial(kl_div, log_target=True, **options), (input, target), dynamic)


def test_kl_div_without_a_kernel(device: str) -> None:
    """Arguments that only composites take compile in one graph as well."""
    input, target = (t.log_softmax(-1) for t in make_pair(*SHAPE, device=device))
    function = functools.partial(kl_div, reduction="sum", log_target=True)
    for other in (target[:1], target[0, 0], target.double()[:1]):
        assert_close(run(compiled(function), input, other), run(function, input, other))
    with torch.autocast(device, torch.bfloat16):
        arguments = input.bfloat16(), target.exp()
        assert_equal(compiled(kl_div)(*arguments, reduction="none"), kl_div(*arguments, reduction="none"))


def test_in_place_is_ignored_under_transforms(device: str) -> None:
    """Under the compiler and in torch.func."""
    tensors = make_pair(*SHAPE, device=device)
    expected = run(distillation_loss, *tensors)
    in_place = functools.partial(distillation_loss, inplace_backward=True)
    assert_equal(run(compiled(in_place), *tensors), expected)
    assert_equal(run(compiled(lambda s, t: in_place(s * 1, t)), *tensors), expected)
    loss, pull = vjp(in_place, *tensors)
    assert_close([loss, *pull(torch.ones_like(loss))], [expected.loss, *expected.gradients])


# ---------------------------------------------------------------- graphs


def test_graphs_hold_the_kernels(device: str) -> None:
    """Both directions call the fused operators; a scalar loss has its gradient computed by the forward one."""
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if "kldiv_ext" in str(node.target)])
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record, bw_compiler=record)
    forward, backward = "kldiv_ext.{}.default", "kldiv_ext.{}_backward.default"
    for function, name, in_forward in (
        (functools.partial(kl_div, reduction="sum"), "kl_div", False),
        (distillation_loss, "distillation_loss", True),
        (functools.partial(distillation_loss, reduction="none"), "distillation_loss", False),
    ):
        graphs.clear()
        run(compiled(function, backend), *make_pair(*SHAPE, device=device))
        assert graphs == [[forward.format(name)], [] if in_forward else [backward.format(name)]]


# How a loss is called by (student, teacher) of any size.
SIZED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_div": functools.partial(kl_div, reduction="batchmean", log_target=True),
    "kl_div, none": functools.partial(kl_div, reduction="none", log_target=True),
    "distillation_loss": distillation_loss,
    "distillation_loss, none": functools.partial(distillation_loss, reduction="none"),
    "distillation_loss, mask": lambda s, t: distillation_loss(s, t, mask=t[:, 0] < 0.5),
    "distillation_loss, labels": lambda s, t: distillation_loss(s, t, t[:, 0].long() - 100, divergence="jsd"),
    "distillation_loss, hard labels": lambda s, t: distillation_loss(
        s, t, t[:, 0].long().clamp(0, 5), hard_weight=0.5, temperature=2.0, logit_softcap=3.0
    ),
    "token_stats": lambda s, t: kldiv_ext.token_stats(s.detach(), t).student_entropy + 0 * (s + t).sum(),
}


@pytest.mark.parametrize("case", SIZED)
def test_new_sizes_do_not_recompile(device: str, case: str) -> None:
    function = SIZED[case]
    dynamic = compiled(function, dynamic=True)
    run(dynamic, *make_pair(*SHAPE, device=device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((5, 37), (9, 8), (3, 130), (64, 12)):
            tensors = make_pair(*shape, device=device)
            assert_equal(run(dynamic, *tensors), run(function, *tensors))


def test_changing_batches_compile_twice(device: str) -> None:
    """Without dynamic=True the second batch size makes the dimension dynamic, and no other compiles again."""
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(distillation_loss, counter)
    for rows in (4, 5, 9, 3, 17):
        run(function, *make_pair(rows, 37, device=device))
    assert counter.frame_count == 2


@pytest.mark.parametrize("case", SIZED)
def test_export(device: str, case: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return SIZED[case](student, teacher)

    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(Module(), make_pair(*SHAPE, device=device), dynamic_shapes=({0: rows}, {0: rows}))
    assert any("kldiv_ext" in str(node.target) for node in program.graph.nodes)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    for rows in (4, 11):
        tensors = make_pair(rows, 37, device=device)
        assert_equal(loaded(*tensors), SIZED[case](*tensors))


# ---------------------------------------------------------------- inductor

INDUCTOR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_div": lambda s, t: kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
    "distillation_loss": lambda s, t: distillation_loss(s * 2, t, divergence="jsd", mask=t[:, 0] < 5),
    "distillation_loss, none": lambda s, t: distillation_loss(s, t, divergence="skew_reverse_kl", reduction="none") * 3,
}


@NEEDS_COMPILER
@pytest.mark.parametrize("case", INDUCTOR)
def test_inductor(device: str, case: str) -> None:
    """Between generated code; its softmax rounds differently from eager's."""
    tensors = make_pair(*SHAPE, device=device)
    # Generated loops without vectors: trying which instruction sets the compiler has takes seconds.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        assert_close(run(compiled(INDUCTOR[case], "inductor", True), *tensors), run(INDUCTOR[case], *tensors))


COMPILED_TWICE = """
import json
import sys
import torch
from cases import make_pair, run
from torch._dynamo.utils import counters
from kldiv_ext import distillation_loss, kl_div

CASES = json.loads(sys.argv[1])
tensors = make_pair(4, 37)

def bits(function):
    result = run(function, *tensors, needs_grad=(True, False))
    return torch.cat([result.loss.reshape(-1), result.grad_student.reshape(-1)]).view(torch.int32).tolist()

report = {}
for name, options in CASES.items():
    loss = kl_div if name.startswith("kl_div") else distillation_loss
    function = lambda s, t: loss(s, t, **options)
    for allowed in (False, True):
        torch._dynamo.reset()
        counters.clear()
        with torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=allowed):
            result = bits(torch.compile(function, fullgraph=True))
        assert result == bits(function), name
        kinds = {**counters["aot_autograd"], **counters["inductor"]}
        report[f"{name}, {allowed}"] = {
            "counters": {kind: count for kind, count in kinds.items() if "cache" in kind},
            "bits": result,
        }
print(json.dumps(report))
"""

# Options are baked into cached code: each of these must be served its own.
CACHED = {
    "mean": {},
    "jsd": {"divergence": "jsd", "reduction": "none"},
    "temperature": {"divergence": "jsd", "reduction": "none", "temperature": 2.0},
    "kl_div": {"reduction": "sum", "log_target": True},
}


@NEEDS_COMPILER
def test_caches(tmp_path: Path) -> None:
    """A second process takes everything from the caches of the first, and gets the same bits.

    By default AOTAutograd's own cache leaves out every autograd.Function, and inductor's beneath it serves. If allowed
    to keep them, it serves alone.
    """
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_VEC_ISA_OK": "0",  # as above
    }
    command = "-c", COMPILED_TWICE, json.dumps(CACHED)
    cold, warm = (json.loads(run_python(*command, cwd=tmp_path, **environment).splitlines()[-1]) for _ in range(2))
    assert len(warm) == 2 * len(CACHED)
    for name in warm:
        assert warm[name]["bits"] == cold[name]["bits"]
        counters = warm[name]["counters"]
        assert not any("miss" in kind or kind == "fxgraph_cache_bypass" for kind in counters), f"{name}: {counters}"
        if name.endswith("True"):
            assert counters["autograd_cache_hit"] == 1 and "autograd_cache_bypass" not in counters
            assert cold[name]["counters"]["autograd_cache_miss"] == 1
        else:
            assert counters["fxgraph_cache_hit"] == 2  # forward and backward
            assert cold[name]["counters"]["fxgraph_cache_miss"] >= 1  # some share one of their graphs


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore:Converting a tensor", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [distillation_loss, functools.partial(kl_div, log_target=True)])
def test_jit_trace_of_another_batch(function: Callable[..., Tensor], reduction: str) -> None:
    reduced = functools.partial(function, reduction=reduction)
    traced = torch.jit.trace(lambda s, t: reduced(s, t), make_pair(2, 3, 37), check_trace=False)
    other = make_pair(7, 5, 37)
    assert_close(traced(*other), reduced(*other))
