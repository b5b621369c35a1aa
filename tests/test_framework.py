"""The rest of PyTorch for every operator: torch.library, torch.compile, torch.export, torch.func, autograd's modes."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import kldiv_ext
from kldiv_ext import DIVERGENCES, distillation_loss, kl_div, reference
from kldiv_ext._library import accumulation_dtype
from kldiv_ext.autograd import COMPOSITES
from kldiv_ext.options import OperatorOptions

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides",
    "ignore:There is a performance drop",  # a compiled vmap calls the operators row by row
    "ignore:Anomaly Detection",
    "ignore:.torch.jit.script",  # from here on inside torch.func.linearize and AOTAutograd
    "ignore:Attempted to insert a get_attr Node",
    "ignore:Your compiler for AOTAutograd",
)

ROWS, COLUMNS = 4, 37  # more than a vector, and not a multiple of one


def logits(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (ROWS, COLUMNS), generator=generator, dtype=torch.float64).to(device, dtype)


def pair(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return logits(*shape, dtype=dtype, device=device), logits(*shape, dtype=dtype, device=device, seed=1)


def run(function: Callable[..., Tensor], *tensors: Tensor, grad_output: float = 1.0) -> list[Tensor]:
    """The result and the gradients of all tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    result.backward(torch.full_like(result, grad_output))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def assert_equal(ours: Any, expected: Any) -> None:
    """To the bit."""
    for value, other in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        assert value.dtype == other.dtype
        assert torch.equal(value, other)


# ---------------------------------------------------------------- the operators


def is_floating(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def options(**changed: Any) -> OperatorOptions:
    defaults = OperatorOptions(1.0, 0.0, ROWS, "forward_kl", 0.0, 1.0, (1.0, 1.0), (0.0, 0.0), None)
    return defaults._replace(**changed)


def distillation_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    scales, labels = torch.tensor([0.5, 0.0, 1.0, 2.0], device=device), torch.tensor([0, 9, 3, 1], device=device)
    jsd = options(soft_scale=4.0, divisor=None, divergence="jsd", parameter=0.3, temperature=2.0)
    everything = jsd._replace(hard_scale=0.5, logit_scale=(0.5, 2.0), logit_softcap=(3.0, 0.0), valid_vocab=10)
    for dtype, teacher_dtype in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float16)):
        student, teacher = logits(dtype=dtype, device=device), logits(dtype=teacher_dtype, device=device, seed=1)
        row_scale = scales.to(torch.float64 if dtype == torch.float64 else torch.float32)
        yield student, teacher, None, None, *options(), True, True, True
        yield student, teacher, None, row_scale, *jsd, False, False, True
        yield student, teacher, None, row_scale, *jsd, False, True, False
        yield student, teacher[:, :11], labels, row_scale, *everything, True, True, True
    yield (
        logits(2, 3, 5, device=device),
        logits(2, 3, 5, device=device, seed=1),
        None,
        None,
        *options(divisor=2, divergence="alpha", parameter=0.5),
        True,
        False,
        True,
    )
    row = logits(5, device=device), logits(5, device=device, seed=1)
    yield *row, None, None, *options(divisor=1, divergence="reverse_kl"), False, True, True
    yield student.new_empty(0, 5), teacher.new_empty(0, 5), None, None, *options(divisor=1), True, True, True
    yield logits(6, 4, device=device).t(), logits(4, 6, device=device), None, None, *options(), True, True, True


def distillation_backward_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for student, teacher, labels, row_scale, *others, _, _, _ in distillation_arguments(device):
        loss, row_constants, *_ = torch.ops.kldiv_ext.distillation_loss(
            student, teacher, labels, row_scale, *others, True, True, False
        )
        for wanted in ((True, True), (False, True)):
            yield torch.ones_like(loss), student, teacher, row_constants, labels, row_scale, *others, *wanted


def distillation_in_place_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for *arguments, _, grad_teacher in distillation_backward_arguments(device):
        yield *arguments, grad_teacher


def distillation_out_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for student, teacher, labels, row_scale, *others, grad_student, grad_teacher, _ in distillation_arguments(device):
        if student.is_contiguous():
            rows = student.numel() // student.shape[-1]
            losses = torch.zeros(rows, dtype=accumulation_dtype(student, teacher), device=device)
            gradients = [
                torch.zeros_like(x) if w else None for x, w in ((student, grad_student), (teacher, grad_teacher))
            ]
            how = OperatorOptions(*others)._replace(divisor=None)
            for grad_output in (None, losses.sum() + 0.5, losses + 0.5):
                yield student, teacher, labels, row_scale, *how, grad_output, losses, *gradients


def linear_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    """From hidden states of 3 and 5; the vocabulary is that of distillation_arguments."""
    for a, b, labels, row_scale, *others, grad_student, grad_teacher, _ in distillation_arguments(device):
        leading = a.shape[:-1]
        student, student_weight, student_bias = (
            logits(*shape, dtype=a.dtype, device=device, seed=2)
            for shape in ((*leading, 3), (a.shape[-1], 3), a.shape[-1:])
        )
        teacher, teacher_weight, teacher_bias = (
            logits(*shape, dtype=b.dtype, device=device, seed=3)
            for shape in ((*leading, 5), (b.shape[-1], 5), b.shape[-1:])
        )
        how = OperatorOptions(*others)
        of_student = student, student_weight
        wanted = [grad_student] * 3, [grad_teacher] * 3
        workspace = None, None, 10**6, 3
        yield (
            *of_student,
            student_bias,
            teacher,
            teacher_weight,
            teacher_bias,
            labels,
            row_scale,
            *how,
            *workspace,
            [*wanted[0], *wanted[1]],
        )
        yield (
            *of_student,
            None,
            b,
            None,
            None,
            labels,
            row_scale,
            *how,
            *workspace,
            [grad_student, False, False, grad_teacher, False, False],
        )


def new_output_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for sizes in ([0], [5, 0], [0, 2, 3]):  # more would be compared, and nobody has written it
        yield logits(device=device), sizes, torch.bfloat16


def token_stats_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for student, teacher, labels, row_scale, *others, _, _, _ in distillation_arguments(device):
        yield student, teacher, labels, row_scale, *OperatorOptions(*others)[5:]


def scale_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for dtype, factor in itertools.product((torch.float64, torch.float32, torch.float16, torch.bfloat16), (1.0, 0.3)):
        yield logits(dtype=dtype, device=device), torch.tensor(factor, device=device)


def kl_div_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for shape, dtype, target_dtype, divisor, log_target in (
        ((ROWS, COLUMNS), torch.float32, torch.float32, None, True),
        ((7,), torch.bfloat16, torch.bfloat16, 7, False),
        ((2, 3, 5), torch.float16, torch.float64, 30, True),
        ((2, 3, 5), torch.bfloat16, torch.float64, None, False),
    ):
        target = logits(*shape, dtype=target_dtype, device=device, seed=1)
        yield logits(*shape, dtype=dtype, device=device), target if log_target else target.exp(), divisor, log_target
    yield logits(6, 4, device=device).t(), logits(4, 6, device=device), 1, True


def kl_div_backward_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for input, target, divisor, log_target in kl_div_arguments(device):
        terms = torch.ops.kldiv_ext.kl_div(input, target, divisor, log_target)
        yield torch.ones_like(terms), input, target, divisor, log_target, True, True
        yield torch.ones_like(terms), None, target, divisor, log_target, True, False


OPERATORS: dict[str, tuple[Callable[[str], Iterator[tuple[Any, ...]]], int]] = {
    "distillation_loss": (distillation_arguments, 1),
    "distillation_loss_backward": (distillation_backward_arguments, 0),
    "distillation_loss_backward_": (distillation_in_place_arguments, 0),
    "distillation_loss_out": (distillation_out_arguments, 0),
    "linear_distillation_loss": (linear_arguments, 1),
    "token_stats": (token_stats_arguments, 0),
    "new_output": (new_output_arguments, 0),
    "scale_": (scale_arguments, 0),
    "kl_div": (kl_div_arguments, 1),
    "kl_div_backward": (kl_div_backward_arguments, 2),
}
"""Every operator: its sample arguments, and how many of its outputs are differentiable."""
DIFFERENTIABLE = [name for name, (_, outputs) in OPERATORS.items() if outputs]


def test_every_operator_is_tested() -> None:
    """The table, the library's schemas and the autograd kernels name the same operators."""
    schemas = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kldiv_ext::")}
    assert set(OPERATORS) == schemas == set(COMPOSITES)


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_are_registered(device: str, name: str) -> None:
    for key in (device.upper(), "Meta", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kldiv_ext::{name}", key)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(device: str, name: str) -> None:
    """Schema, autograd registration, fake tensors, and AOTAutograd with dynamic shapes, on every sample."""
    arguments, _ = OPERATORS[name]
    operator = getattr(torch.ops.kldiv_ext, name).default
    for sample in arguments(device):
        torch.library.opcheck(operator, sample)
        if name in DIFFERENTIABLE:
            tracked = [a.clone().requires_grad_() if is_floating(a) else a for a in sample]
            torch.library.opcheck(operator, tuple(tracked))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in DIFFERENTIABLE])
def test_undifferentiable_operators_raise(device: str, name: str) -> None:
    arguments, _ = OPERATORS[name]
    for sample in arguments(device):
        tracked = [a.clone().requires_grad_() * 1 if is_floating(a) else a for a in sample]
        with pytest.raises(NotImplementedError, match="cannot be differentiated"):
            getattr(torch.ops.kldiv_ext, name)(*tracked)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_operators_called_directly_carry_derivatives(device: str, name: str) -> None:
    """Nobody is asked to call torch.ops.kldiv_ext, but a zero gradient or tangent from it would be silent."""
    arguments, outputs = OPERATORS[name]
    operator = getattr(torch.ops.kldiv_ext, name)
    sample = next(s for s in arguments(device) if s[1] is not None)  # float32, every gradient wanted
    where = [i for i, a in enumerate(sample) if isinstance(a, Tensor)]
    tensors = [sample[i] for i in where]

    def function(*values: Tensor) -> Tensor:
        results = operator(*(values[where.index(i)] if i in where else a for i, a in enumerate(sample)))
        return sum(r.sum() for r in (results if isinstance(results, tuple) else (results,))[:outputs])

    gradients = run(function, *tensors)[1:]
    assert any(g.any() for g in gradients)
    directions = [logits(*t.shape, device=device, seed=3) for t in tensors]
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(t, d) for t, d in zip(tensors, directions, strict=True)))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert_close(tangent, sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_meta_and_fake_tensors(reduction: str) -> None:
    """Shapes, dtypes and strides without data are those with data."""
    functions = [
        functools.partial(kl_div, reduction=reduction),
        functools.partial(distillation_loss, reduction=reduction),
        functools.partial(distillation_loss, reduction=reduction, divergence="jsd"),
    ]
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for function, shape, a, b in itertools.product(functions, ((2, 3, 5), (4, 5), (5,)), dtypes, dtypes):
        real = run(function, logits(*shape, dtype=a), logits(*shape, dtype=b))
        meta = run(function, torch.empty(shape, dtype=a, device="meta"), torch.empty(shape, dtype=b, device="meta"))
        with FakeTensorMode():
            fake = run(function, torch.empty(shape, dtype=a), torch.empty(shape, dtype=b))
        for value, *others in zip(real, meta, fake, strict=True):
            for other in others:
                assert (other.shape, other.dtype, other.stride()) == (value.shape, value.dtype, value.stride())


# ---------------------------------------------------------------- torch.compile

MASK = torch.tensor([True, False, True, True])
LABELS = torch.tensor([5, -100, 0, 36])
WEIGHT = torch.tensor([0.5, 1.0, 0.0, 2.0])


def compiled(
    function: Callable[..., Any], backend: Any = "aot_eager", dynamic: bool | None = None
) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def assert_compiles(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], dynamic: bool | None, backend: str = "aot_eager"
) -> None:
    """Loss and gradients to the bit: compiled code runs the same kernels."""
    other = compiled(function, backend, dynamic)
    for grad_output in (1.0, 0.37):
        expected = run(function, *tensors, grad_output=grad_output)
        assert_equal(run(other, *tensors, grad_output=grad_output), expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiled_divergences(device: str, divergence: str, dynamic: bool) -> None:
    for mask, reduction in ((None, "mean"), (MASK.to(device), "none")):
        function = functools.partial(distillation_loss, divergence=divergence, mask=mask, reduction=reduction)
        assert_compiles(function, pair(device=device), dynamic)


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "batchmean": {"reduction": "batchmean"},
    "mask": {"mask": MASK},
    "labels": {"labels": LABELS},
    "labels, mask and weight": {"labels": LABELS, "mask": MASK, "weight": WEIGHT},
    "weight, none": {"weight": WEIGHT, "reduction": "none"},
    "number of items": {"num_items": 7},
    "number of items as a tensor": {"num_items": torch.tensor(7), "mask": MASK},
    "temperature": {"temperature": 2.0, "scale_by_temperature_squared": True},
    "hard labels": {"labels": LABELS, "hard_weight": 0.3, "temperature": 2.0},
    "hard labels, none": {"labels": LABELS, "hard_weight": 0.3, "soft_weight": 0.0, "reduction": "none"},
    "padding": {"valid_vocab": 30},
    "softcap and scales": {"logit_softcap": 2.0, "logit_scale": (0.5, None), "divergence": "jsd"},
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_options(device: str, options: str, dynamic: bool) -> None:
    values = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in OPTIONS[options].items()}
    assert_compiles(functools.partial(distillation_loss, **values), pair(device=device), dynamic)


def test_in_place_has_no_effect_where_nothing_is_written(device: str) -> None:
    """Under the compiler and in torch.func transforms."""
    tensors = pair(device=device)
    expected = run(distillation_loss, *tensors)
    in_place = functools.partial(distillation_loss, inplace_backward=True)
    assert_equal(run(compiled(in_place), *tensors), expected)
    assert_equal(run(compiled(lambda s, t: in_place(s * 1, t)), *tensors), expected)
    loss, pull = vjp(in_place, *tensors)
    assert_close([loss, *pull(torch.ones_like(loss))], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_compiled_dtypes(device: str, dtype: torch.dtype) -> None:
    """float16 makes its gradient in backward, the others in forward."""
    assert_compiles(distillation_loss, pair(dtype=dtype, device=device), None)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum", "elementwise_mean", "size_average"])
def test_compiled_kl_div(device: str, reduction: str, dynamic: bool) -> None:
    options = {"size_average": False} if reduction == "size_average" else {"reduction": reduction}
    input, target = pair(device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_compiles(functools.partial(kl_div, **options), (input.log_softmax(-1), target.softmax(-1)), dynamic)
        assert_compiles(
            functools.partial(kl_div, log_target=True, **options),
            (input.log_softmax(-1), target.log_softmax(-1)),
            dynamic,
        )


def test_compiled_kl_div_without_a_kernel(device: str) -> None:
    """What is left to plain operators compiles in one graph as well."""
    input, target = (t.log_softmax(-1) for t in pair(device=device))
    for other in (target[:1], target[0, 0], target.double()[:1]):
        function = functools.partial(kl_div, reduction="sum", log_target=True)
        for ours, expected in zip(run(compiled(function), input, other), run(function, input, other), strict=True):
            assert_close(ours, expected)
    with torch.autocast(device, torch.bfloat16):
        assert_equal(
            compiled(kl_div)(input.bfloat16(), target.exp(), reduction="none"),
            kl_div(input.bfloat16(), target.exp(), reduction="none"),
        )


def test_compiled_graphs_hold_the_kernels(device: str) -> None:
    """Both directions run the fused operators, and a scalar loss has its gradient made by the forward one."""
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if "kldiv_ext" in str(node.target)])
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record, bw_compiler=record)
    expected = {
        functools.partial(kl_div, reduction="sum"): [
            ["kldiv_ext.kl_div.default"],
            ["kldiv_ext.kl_div_backward.default"],
        ],
        distillation_loss: [["kldiv_ext.distillation_loss.default"], []],
        functools.partial(distillation_loss, reduction="none"): [
            ["kldiv_ext.distillation_loss.default"],
            ["kldiv_ext.distillation_loss_backward.default"],
        ],
    }
    for function, operators in expected.items():
        graphs.clear()
        run(compiled(function, backend), *pair(device=device))
        assert graphs == operators


INDUCTOR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_div": lambda s, t: kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
    "distillation_loss": lambda s, t: distillation_loss(s * 2, t, divergence="jsd", mask=t[:, 0] < 5),
    "distillation_loss, none": lambda s, t: distillation_loss(s, t, divergence="skew_reverse_kl", reduction="none") * 3,
}


@pytest.mark.parametrize("case", INDUCTOR)
def test_inductor(device: str, case: str) -> None:
    """In the middle of generated code; its softmax rounds differently from eager's."""
    if device == "cpu" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    tensors = pair(device=device)
    results = run(compiled(INDUCTOR[case], "inductor", True), *tensors), run(INDUCTOR[case], *tensors)
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)


RESIZED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_div": lambda s, t: kl_div(s, t, reduction="batchmean", log_target=True),
    "kl_div, none": lambda s, t: kl_div(s, t, reduction="none", log_target=True),
    "distillation_loss": distillation_loss,
    "distillation_loss, none": functools.partial(distillation_loss, reduction="none"),
    "distillation_loss, mask": lambda s, t: distillation_loss(s, t, mask=t[:, 0] < 0.5),
    "distillation_loss, labels": lambda s, t: distillation_loss(s, t, t[:, 0].long() - 100, divergence="jsd"),
    "distillation_loss, hard labels": lambda s, t: distillation_loss(
        s, t, t[:, 0].long().clamp(0, 5), hard_weight=0.5, temperature=2.0, logit_softcap=3.0
    ),
    "token_stats": lambda s, t: kldiv_ext.token_stats(s.detach(), t).student_entropy + 0 * (s + t).sum(),
}


@pytest.mark.parametrize("case", RESIZED)
def test_new_sizes_do_not_recompile(device: str, case: str) -> None:
    function = RESIZED[case]
    dynamic = compiled(function, dynamic=True)
    run(dynamic, *pair(device=device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((5, 37), (9, 8), (3, 130), (64, 12)):
            tensors = pair(*shape, device=device)
            assert_equal(run(dynamic, *tensors), run(function, *tensors))


def test_changing_batches_compile_twice(device: str) -> None:
    """Without dynamic=True the second batch size turns the dimension dynamic, and no other compiles again."""
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(distillation_loss, counter)
    for rows in (4, 5, 9, 3, 17):
        run(function, *pair(rows, COLUMNS, device=device))
    assert counter.frame_count == 2


@pytest.mark.parametrize("case", RESIZED)
def test_export(device: str, case: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return RESIZED[case](student, teacher)

    rows = torch.export.Dim("rows", min=2, max=100)
    shapes = ({0: rows}, {0: rows})
    program = torch.export.export(Module(), pair(device=device), dynamic_shapes=shapes)
    assert any("kldiv_ext" in str(node.target) for node in program.graph.nodes)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    for size in ((ROWS, COLUMNS), (11, COLUMNS)):
        assert_equal(loaded(*pair(*size, device=device)), RESIZED[case](*pair(*size, device=device)))


def test_compiled_module(device: str) -> None:
    module = kldiv_ext.DistillationLoss(divergence="jsd", temperature=2.0)
    assert_compiles(module, pair(device=device), None)


# ---------------------------------------------------------------- torch.func

# By position, so that vmap over the rows and over both arguments is possible.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "kl_div": (
        lambda s, t: kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum"),
        lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum"),
    ),
    "kl_div, log_target": (
        lambda s, t: kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True),
        lambda s, t: F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True),
    ),
    **{
        f"{divergence}, {reduction}": (
            lambda s, t, d=divergence, r=reduction: distillation_loss(s, t, divergence=d, reduction=r).sum(),
            lambda s, t, d=divergence, r=reduction: reference.distillation_loss(s, t, divergence=d, reduction=r).sum(),
        )
        for divergence, reduction in (("forward_kl", "mean"), ("jsd", "none"), ("alpha", "sum"))
    },
    "masked": (
        lambda s, t: distillation_loss(s, t, mask=t.detach()[..., 0] < 0.5),
        lambda s, t: reference.distillation_loss(s, t, mask=t.detach()[..., 0] < 0.5),
    ),
    "every option": (
        lambda s, t: distillation_loss(s, t, s.detach()[..., :6].argmin(-1), **EVERY_OPTION),
        lambda s, t: reference.distillation_loss(s, t, s.detach()[..., :6].argmin(-1), **EVERY_OPTION),
    ),
}
EVERY_OPTION: dict[str, Any] = {
    "divergence": "skew_reverse_kl",
    "hard_weight": 0.3,
    "soft_weight": 0.5,
    "temperature": 1.5,
    "scale_by_temperature_squared": True,
    "valid_vocab": 5,
    "ignore_index": 5,
    "logit_softcap": (2.0, None),
    "logit_scale": (0.5, 1.5),
}

OPERATOR_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "kl_div": (
        lambda s, t: torch.ops.kldiv_ext.kl_div(s.log_softmax(-1), t.softmax(-1), 1, False),
        lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum"),
    ),
    "distillation_loss": (
        lambda s, t: torch.ops.kldiv_ext.distillation_loss(
            s, t, None, None, *options(divisor=1, divergence="jsd", parameter=0.5), False, False, False
        )[0],
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


def assert_transforms_agree(
    transform: Callable[..., Any],
    losses: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    device: str,
    wrap: Callable[..., Any] = lambda function: function,
) -> None:
    tensors = pair(3, 6, dtype=torch.float64, device=device)
    ours, expected = losses
    results = wrap(lambda s, t: transform(ours, s, t))(*tensors), transform(expected, *tensors)
    for value, other in zip(tree_leaves(results[0]), tree_leaves(results[1]), strict=True):
        assert other.any(), "the test would not see a silent zero"
        assert_close(value, other)


@pytest.mark.parametrize("transform", EAGER_TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_func(device: str, loss: str, transform: str) -> None:
    assert_transforms_agree(EAGER_TRANSFORMS[transform], LOSSES[loss], device)


@pytest.mark.parametrize("transform", COMPILED_TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_func(device: str, loss: str, transform: str) -> None:
    assert_transforms_agree(COMPILED_TRANSFORMS[transform], LOSSES[loss], device, compiled)


@pytest.mark.parametrize("transform", COMPILED_TRANSFORMS)
@pytest.mark.parametrize("loss", OPERATOR_LOSSES)
def test_compiled_func_of_operators(device: str, loss: str, transform: str) -> None:
    """A compiler that inlines our Functions calls the operators while gradients are tracked. Operators without autograd
    kernels of their own would then return zeros and say nothing.
    """
    assert_transforms_agree(COMPILED_TRANSFORMS[transform], OPERATOR_LOSSES[loss], device, compiled)


# ---------------------------------------------------------------- autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_second_derivatives(device: str, divergence: str, reduction: str) -> None:
    """Backward over backward, forward over backward, and both batched."""
    tensors = pair(3, 4, dtype=torch.float64, device=device)
    assert torch.autograd.gradgradcheck(
        lambda s, t: distillation_loss(s, t, divergence=divergence, reduction=reduction, mask=MASK[:3].to(device)),
        [t.requires_grad_() for t in tensors],
        check_fwd_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_penalty(device: str, dtype: torch.dtype) -> None:
    """A gradient that is differentiated further where nothing else asks for it: an omission would not be seen."""
    student, teacher = (t.requires_grad_() for t in pair(dtype=dtype, device=device))
    for function in (distillation_loss, functools.partial(distillation_loss, reduction="none")):
        (gradient,) = torch.autograd.grad(function(student, teacher).sum(), student, create_graph=True)
        penalty = torch.autograd.grad((gradient.double() * 100).square().sum(), (student, teacher))
        exact = [t.detach().double().requires_grad_() for t in (student, teacher)]
        reduction = "mean" if function is distillation_loss else "none"
        (gradient,) = torch.autograd.grad(
            reference.distillation_loss(*exact, reduction=reduction).sum(), exact[0], create_graph=True
        )
        expected = torch.autograd.grad((gradient * 100).square().sum(), exact)
        for value, other in zip(penalty, expected, strict=True):
            assert other.any()
            assert ((value.double() - other).norm() / other.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_one_leaf_behind_both_sides(device: str) -> None:
    """It gets the sum of two gradients, also from plain operators."""
    (same,) = pair(3, 5, dtype=torch.float64, device=device)[:1]
    function = lambda s: distillation_loss(s, s * 2, divergence="jsd", reduction="sum")  # noqa: E731
    assert torch.autograd.gradcheck(function, same.requires_grad_())
    assert torch.autograd.gradgradcheck(function, same)


@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode(device: str, loss: str) -> None:
    student, teacher = pair(dtype=torch.float64, device=device)
    results = []
    for function in LOSSES[loss]:
        with forward_ad.dual_level():
            dual = function(forward_ad.make_dual(student.clone().requires_grad_(), teacher), teacher)
            results.append([t.detach() for t in forward_ad.unpack_dual(dual)])
    assert_close(*results)


@pytest.mark.parametrize("loss", LOSSES)
def test_batched_gradients(device: str, loss: str) -> None:
    tensors = [t.requires_grad_() for t in pair(dtype=torch.float64, device=device)]
    directions = torch.arange(1.0, 4.0, dtype=torch.float64, device=device)
    results = [
        torch.autograd.grad(function(*tensors), tensors, directions, is_grads_batched=True) for function in LOSSES[loss]
    ]
    assert_close(*results)


def in_checkpoint(function: Callable[..., Tensor], reentrant: bool) -> Callable[..., Tensor]:
    return lambda *tensors: checkpoint(function, *(t * 1 for t in tensors), use_reentrant=reentrant)


def on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*tensors: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return function(*(t * 1 for t in tensors))

    return wrapped


def copied_when_saved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*tensors: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
            return function(*tensors)

    return wrapped


def under_anomaly_detection(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*tensors: Tensor) -> Tensor:
        with torch.autograd.detect_anomaly():
            return function(*tensors)

    return wrapped


def under_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*tensors: Tensor) -> Tensor:
        with torch.autocast(tensors[0].device.type, torch.bfloat16):
            return function(*tensors)

    return wrapped


WRAPPERS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "checkpoint": functools.partial(in_checkpoint, reentrant=False),
    "reentrant checkpoint": functools.partial(in_checkpoint, reentrant=True),
    "save_on_cpu": on_cpu,
    "saved_tensors_hooks": copied_when_saved,
    "anomaly detection": under_anomaly_detection,
    "autocast": under_autocast,  # float32 losses are float32 under it, whatever the logits are
}
KERNELS: dict[str, Callable[..., Tensor]] = {
    "kl_div": lambda s, t: kl_div(s, t, reduction="sum", log_target=True),
    "distillation_loss": distillation_loss,
    "distillation_loss, none": functools.partial(distillation_loss, reduction="none", divergence="jsd"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_modes_keep_the_bits(device: str, kernel: str, wrapper: str, dtype: torch.dtype) -> None:
    if (kernel, wrapper) == ("kl_div", "autocast"):
        pytest.skip("as PyTorch's, its result is another dtype under autocast: test_kl_div.py")
    tensors = pair(dtype=dtype, device=device)
    assert_equal(run(WRAPPERS[wrapper](KERNELS[kernel]), *tensors), run(KERNELS[kernel], *tensors))


@pytest.mark.parametrize("kernel", KERNELS)
def test_modes_without_gradients(device: str, kernel: str) -> None:
    tensors = [t.requires_grad_() for t in pair(device=device)]
    expected = KERNELS[kernel](*tensors).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = KERNELS[kernel](*tensors)
        assert not result.requires_grad
        assert_equal(result, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_teacher_from_inference_mode(device: str, kernel: str) -> None:
    """A teacher is often run in inference mode, and autograd refuses to save what comes from there."""
    student, teacher = pair(device=device)
    with torch.inference_mode():
        frozen = teacher * 1
        weight = WEIGHT.to(device) * 1
    function = KERNELS[kernel]
    assert_equal(run(lambda s: function(s, frozen), student), run(lambda s: function(s, teacher), student))
    if kernel != "kl_div":
        weighted = lambda s: function(s, frozen, weight=weight)  # noqa: E731
        assert_equal(run(weighted, student), run(lambda s: function(s, teacher, weight=WEIGHT.to(device)), student))


def test_logits_are_let_go_in_backward(device: str) -> None:
    """Saved for a second derivative, the logits do not outlive this loss's own, first step of the backward pass."""
    alive = []

    class Upstream(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Tensor:
            alive.append(saved() is not None)
            return grad_output * 2

    leaf, teacher = pair(device=device)
    student = Upstream.apply(leaf.requires_grad_())
    saved = weakref.ref(student)
    loss = distillation_loss(student, teacher)
    del student
    loss.backward()
    assert alive == [False]


def test_threads(device: str) -> None:
    """Forward and backward from several Python threads at once, on shared and on own tensors."""
    jobs = [(kernel, rows) for kernel in KERNELS for rows in (1, 3, 8, 50)] * 4
    expected = {job: run(KERNELS[job[0]], *pair(job[1], 501, device=device)) for job in set(jobs)}
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: run(KERNELS[job[0]], *pair(job[1], 501, device=device)), jobs))
    for job, result in zip(jobs, results, strict=True):
        assert_equal(result, expected[job])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_plain_operators_keep_the_rules(device: str, divergence: str) -> None:
    """Zeros, infinities, NaN and rows that do not count, where plain operators take over from the kernels."""
    inf, nan = torch.inf, torch.nan
    student = [
        [1, 2, -inf, 0.5],
        [1, -inf, 0.3, 0.2],
        [0.5, 0.2, 1, 0.3],
        [nan, 0, 0, 1],
        [-inf] * 4,
        [inf, 0, 1, 2],
        [nan] * 4,
    ]
    teacher = [
        [0, 1, -inf, 0.5],
        [1, 0.2, 0.3, 0.2],
        [0.5, -inf, 1, 0.3],
        [1, 0, 0, 1],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 2, 3, 4],
    ]
    tensors = [torch.tensor(rows, dtype=torch.float64, device=device) for rows in (student, teacher)]
    mask = torch.tensor([True] * 6 + [False], device=device)

    def function(s: Tensor, t: Tensor) -> Tensor:
        return distillation_loss(s, t, divergence=divergence, mask=mask, reduction="none")

    value, *fused = run(function, *tensors)
    plain, pull = vjp(function, *tensors)
    assert_close(plain, value, equal_nan=True)
    for ours, expected in zip(pull(torch.ones_like(plain)), fused, strict=True):
        broken = expected.isnan().any(-1)
        assert torch.equal(ours.isnan().any(-1), broken)
        assert_close(ours[~broken], expected[~broken])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_plain_operators_compute_what_kernels_do(device: str, reduction: str) -> None:
    """Every option that ends in an operator's arguments, for more than one leading dimension and for none."""
    options = itertools.product(DIVERGENCES, ((2, 3, 5), (5,)), (False, True))
    for divergence, shape, masked in options:
        arguments: dict[str, Any] = {"divergence": divergence, "reduction": reduction, "temperature": 2.0}
        arguments["scale_by_temperature_squared"] = masked
        if masked:
            arguments["weight"] = logits(*shape, dtype=torch.float64, device=device, seed=2)[..., 0].clamp(min=0)
        function = functools.partial(distillation_loss, **arguments)
        tensors = pair(*shape, dtype=torch.float64, device=device)
        plain, pull = vjp(function, *tensors)
        assert_close([plain, *pull(torch.ones_like(plain))], run(function, *tensors))


# ---------------------------------------------------------------- modules


def test_modules_are_copied_and_pickled() -> None:
    module = kldiv_ext.DistillationLoss(
        divergence="alpha", alpha=0.3, temperature=2.0, ignore_index=-1, reduction="sum"
    )
    tensors = (*pair(), torch.tensor([1, -1, 2, 3]))
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)):
        assert repr(other) == repr(module)
        assert_equal(other(*tensors), module(*tensors))
    assert module.state_dict() == {} and list(module.parameters()) == []
    assert "alpha=0.3" in repr(module) and "temperature=2.0" in repr(module)


def test_results_are_plain_tensors(device: str) -> None:
    """They can be copied, pickled and differentiated like any other."""
    student, teacher = pair(device=device)
    loss = distillation_loss(torch.nn.Parameter(student), teacher)
    assert type(loss) is Tensor and loss.grad_fn is not None
    assert_equal(pickle.loads(pickle.dumps(loss.detach())), loss.detach())


def test_no_gradient_is_made_without_grad_mode(device: str) -> None:
    student = torch.randn(3, 5, device=device, requires_grad=True)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.kldiv_ext.distillation_loss.default:
                made.append(result[2].numel())
            return result

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), Watch():
            kldiv_ext.distillation_loss(student, torch.randn(3, 5, device=device))
    assert made == [15, 0]
