"""The CUDA kernels' own sources, compiled for the CPU with every thread a fiber: all but the speed, without a GPU."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import occupancy
import pytest
import torch
from emulation import harness
from torch import Tensor

from benchmarks import resources
from kldiv_ext import reference

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

# name, parameter; the last two are what an endpoint dispatches to
DIVERGENCES = [
    ("forward_kl", 0.0),
    ("reverse_kl", 0.0),
    ("jeffreys", 0.0),
    ("jsd", 0.3),
    ("skew_forward_kl", 0.1),
    ("skew_reverse_kl", 0.2),
    ("total_variation", 0.0),
    ("alpha", 0.4),
    ("skew_forward_kl", 1.0),
    ("jsd", 1.0),
]
DTYPES = harness.DTYPES
# Around a group of eight, a warp's worth of groups and the borders of the launch rules.
COLUMNS = (1, 2, 7, 8, 9, 31, 33, 257, 1000, 4097)
ORDERS = [("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)]

# Relative L2 error of a row's gradient: rounding to the dtype, plus float32 arithmetic.
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def build_folder(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("emulation")


@pytest.fixture(scope="module")
def library(build_folder: Path) -> harness.Kernels:
    sources = [*harness.KERNELS, harness.HERE / "fibers.cpp", harness.HERE / "bindings.cpp"]
    return harness.Kernels(harness.build(build_folder, sources, "kernels.so", ["-O1", "-fPIC", "-shared"]))


@pytest.fixture
def kernels(library: harness.Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[harness.Kernels]:
    """Rows are streamed, until `chip` says otherwise."""
    monkeypatch.setenv("KLDIV_EXT_CUDA_TIER", "streamed")
    yield library
    library.set_order("ascending")
    library.set_device()


@pytest.fixture
def chip(kernels: harness.Kernels, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """chip(H200, multiprocessors=1): rows stay on the chip of such a device."""

    def set_chip(device: dict[str, Any], **properties: int) -> None:
        monkeypatch.delenv("KLDIV_EXT_CUDA_TIER", raising=False)
        kernels.set_device(**{**device, **properties})

    return set_chip


def logits(rows: int, columns: int, dtype: torch.dtype, gap: float = 1.0) -> tuple[Tensor, Tensor]:
    """A student and a teacher whose logits differ by about `gap`."""
    student = 3 * torch.randn(rows, columns, dtype=torch.float64)
    teacher = student + gap * torch.randn(rows, columns, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def placed(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy `offset` elements after a 16-byte boundary, with NaN around it."""
    margin = harness.Guarded.MARGIN
    buffer = torch.full([tensor.numel() + 2 * margin], torch.nan, dtype=tensor.dtype)
    first = margin + offset
    return buffer[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


def oracle(
    student: Tensor, teacher: Tensor, divergence: str, parameter: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every row and both gradients, float64."""
    s, t = student.double().requires_grad_(), teacher.double().requires_grad_()
    losses = reference.row_losses(s, t, divergence, parameter, temperature)
    grad_student, grad_teacher = torch.autograd.grad(losses.sum(), [s, t], materialize_grads=True)
    return losses.detach(), grad_student, grad_teacher


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    """Each row within the tolerance of its dtype; the log-sum-exps' own rounding and a subnormal step are allowed."""
    error = (actual.double() - expected).norm(dim=-1)
    step = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    floor = torch.finfo(harness.accumulation_dtype(actual)).eps + step * actual.shape[-1] ** 0.5
    assert (error <= GRADIENT_TOLERANCE[actual.dtype] * expected.norm(dim=-1) + floor).all(), error.max()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


# ---------------------------------------------------------------- arithmetic


def test_arithmetic_by_the_special_function_unit(kernels: harness.Kernels) -> None:
    """Relative errors where its results are as bad as PTX lets them be."""
    x = torch.cat([torch.logspace(-9, 1.3, 40_001, dtype=torch.float64), torch.tensor([0.5, 1.0, 20.0])]).float()

    def worst(x: Tensor, column: int, exact: Tensor) -> float:
        return float(((kernels.units(x)[:, column].double() - exact) / exact).abs().max())

    gap, y = x.double(), torch.cat([x, -x[x < 0.9]]).double()
    excess = torch.where(gap < 1e-3, gap * gap * (0.5 - gap / 6 + gap * gap / 24), gap + torch.expm1(-gap))
    assert worst(x, 0, torch.exp(-gap)) < 4e-6  # of a rounded exponent, eps |x|
    assert worst(x, 1, torch.expm1(-gap)) < 5e-7
    assert worst(x, 2, excess) < 2e-6
    shortfall = torch.where(y.abs() < 1e-3, y * y * (0.5 - y / 3 + y * y / 4), y - torch.log1p(y))
    assert worst(y.float(), 3, torch.log1p(y)) < 1.2e-6
    assert worst(y.float(), 4, shortfall) < 1e-5
    delta = torch.cat([x, -x]).double()
    excess = torch.where(
        delta.abs() < 1e-3, delta * delta * (0.5 - delta / 6 + delta * delta / 24), delta + torch.expm1(-delta)
    )
    assert worst(delta.float(), 5, -torch.expm1(-delta)) < 4e-6
    assert worst(delta.float(), 6, excess) < 4e-6
    assert kernels.units(torch.zeros(1)).tolist() == [[1, 0, 0, 0, 0, 0, 0]]


# ---------------------------------------------------------------- divergences from logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("divergence", "parameter"), DIVERGENCES)
def test_loss_and_gradients(kernels: harness.Kernels, divergence: str, parameter: float, dtype: torch.dtype) -> None:
    for i, columns in enumerate(COLUMNS):
        kernels.set_order(*ORDERS[i % len(ORDERS)])
        student, teacher = logits(2, columns, dtype)
        options = {"divergence": divergence, "parameter": parameter, "temperature": 1.5, "scale": 0.7}
        losses, grad_student, grad_teacher = oracle(student, teacher, divergence, parameter, 1.5)

        forward = kernels.distillation(student, teacher, **options)
        loss_dtype = harness.accumulation_dtype(student)
        torch.testing.assert_close(
            forward["row_loss"].double(), 0.7 * losses, rtol=LOSS_TOLERANCE[loss_dtype], atol=1e-9
        )
        together = kernels.distillation(student, teacher, grad_student=True, reduce=True, offset=1, **options)
        assert torch.equal(together["row_loss"], forward["row_loss"])
        torch.testing.assert_close(together["loss"], forward["row_loss"].double().sum().to(loss_dtype))
        both = kernels.distillation(student, teacher, grad_student=True, grad_teacher=True, **options)
        assert_gradient(both["grad_student"], 0.7 * grad_student)
        assert_gradient(both["grad_teacher"], 0.7 * grad_teacher)
        assert torch.equal(together["grad_student"], both["grad_student"])

        one = torch.ones([], dtype=loss_dtype)
        backward = kernels.distillation_backward(one, student, teacher, forward["row_constants"], **options)
        assert torch.equal(backward["grad_student"], both["grad_student"])
        assert torch.equal(backward["grad_teacher"], both["grad_teacher"])
        per_row = torch.tensor([-2.0, 0.5], dtype=loss_dtype)
        alone = kernels.distillation_backward(
            per_row, student, teacher, forward["row_constants"], grad_student=False, **options
        )
        assert_gradient(alone["grad_teacher"], 0.7 * per_row.double()[:, None] * grad_teacher)

        nothing = kernels.distillation(student, teacher, wanted=(False, False), **options)
        torch.testing.assert_close(nothing["row_loss"], forward["row_loss"], rtol=LOSS_TOLERANCE[loss_dtype], atol=1e-9)
        for name in ("grad_student", "grad_teacher"):
            gradients = {side: side == name for side in ("grad_student", "grad_teacher")}
            early = kernels.distillation(student, teacher, **gradients, **options)
            assert torch.equal(early[name], both[name])
            wanted = gradients["grad_student"], gradients["grad_teacher"]
            constants = kernels.distillation(student, teacher, wanted=wanted, **options)["row_constants"]
            backward = kernels.distillation_backward(one, student, teacher, constants, **gradients, **options)
            assert torch.equal(backward[name], both[name])


OPTIONS: dict[str, dict[str, object]] = {
    "hard labels": {"hard_scale": 0.7},
    "hard labels, temperature": {"hard_scale": 0.7, "temperature": 2.5, "scale": 0.3},
    "hard labels alone": {"hard_scale": 1.3, "scale": 0.0},
    "common scale": {"logit_scale": (0.4, 0.4), "temperature": 0.7, "hard_scale": 0.5},
    "two scales": {"logit_scale": (0.4, 1.7), "temperature": 0.7, "hard_scale": 0.5},
    "softcap": {"logit_softcap": (2.0, 2.0), "temperature": 1.5, "hard_scale": 0.5},
    "softcap of one side": {"logit_softcap": (0.0, 1.5), "logit_scale": (1.0, 0.5)},
    "padding": {"valid_vocab": 25, "hard_scale": 0.5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(kernels: harness.Kernels, option: str, dtype: torch.dtype) -> None:
    """Against the reference; gradients in one walk, in a walk of their own, from backward and over the logits."""
    kernels.set_order("random", 3)
    options: dict[str, Any] = OPTIONS[option]
    for columns, (divergence, parameter) in itertools.product((33, 300), (("forward_kl", 0.0), ("jsd", 0.3))):
        student, teacher = logits(3, columns, dtype)
        student[:, options.get("valid_vocab", columns) :] = torch.nan  # padding is not read
        labels = torch.tensor([0, 24, 11])
        leaves = [z.double().requires_grad_() for z in (student, teacher)]
        losses = reference.weighted_losses(
            *(
                reference.effective_logits(z, scale, softcap, options.get("valid_vocab"))
                for z, scale, softcap in zip(
                    leaves,
                    options.get("logit_scale", (1.0, 1.0)),
                    options.get("logit_softcap", (0.0, 0.0)),
                    strict=True,
                )
            ),
            labels,
            options.get("scale", 1.0),
            options.get("hard_scale", 0.0),
            divergence,
            parameter,
            options.get("temperature", 1.0),
        )
        grad_student, grad_teacher = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)

        arguments = {"divergence": divergence, "parameter": parameter, "labels": labels, **options}
        if options.get("scale") == 0:
            arguments["divergence"] = ""  # as csrc/operators.h does
        both = kernels.distillation(student, teacher, grad_student=True, grad_teacher=True, **arguments)
        tolerance = LOSS_TOLERANCE[harness.accumulation_dtype(student)]
        torch.testing.assert_close(both["row_loss"].double(), losses.detach(), rtol=tolerance, atol=1e-9)
        assert_gradient(both["grad_student"], grad_student)
        assert_gradient(both["grad_teacher"], grad_teacher)
        together = kernels.distillation(student, teacher, grad_student=True, offset=1, **arguments)
        assert torch.equal(together["grad_student"], both["grad_student"])
        one = torch.ones([], dtype=harness.accumulation_dtype(student))
        backward = kernels.distillation_backward(one, student, teacher, both["row_constants"], **arguments)
        assert torch.equal(backward["grad_student"], both["grad_student"])
        assert torch.equal(backward["grad_teacher"], both["grad_teacher"])
        for laid in (torch.clone, lambda x: x.T.contiguous().T):
            over = laid(student)
            backward = kernels.distillation_backward(
                one, over, teacher, both["row_constants"], in_place=True, **arguments
            )
            assert torch.equal(over, both["grad_student"])
            assert torch.equal(backward["grad_teacher"], both["grad_teacher"])


def test_labels_out_of_range(kernels: harness.Kernels) -> None:
    """NaN, in that row alone."""
    student, teacher = logits(4, 20, torch.float32)
    for label in (-1, 20, 2**32, 2**40, -(2**40)):
        result = kernels.distillation(
            student, teacher, grad_student=True, hard_scale=0.5, labels=torch.tensor([3, label, 0, 19])
        )
        for name in ("row_loss", "grad_student"):
            rows = result[name].reshape(4, -1).isnan()
            assert rows[1].all() and not rows[[0, 2, 3]].any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [7, 33, 257, 1000, 4097])
def test_neither_order_nor_place_changes_a_bit(kernels: harness.Kernels, columns: int, dtype: torch.dtype) -> None:
    rows = 3
    student, teacher = logits(rows, columns, dtype)

    def run(student: Tensor, teacher: Tensor, offset: int = 0) -> dict[str, Tensor]:
        return kernels.distillation(
            student, teacher, "jsd", 0.3, grad_student=True, grad_teacher=True, reduce=True, offset=offset
        )

    expected = run(student, teacher)
    for order in ORDERS[1:]:
        kernels.set_order(*order)
        assert_same(run(student, teacher), expected)
    for offset in (1, 2, 3):
        assert_same(run(placed(student, offset), placed(teacher, 3 - offset), offset), expected)
    in_padded_rows = [
        torch.full([rows, columns + 5], torch.nan, dtype=dtype)[:, :columns].copy_(t) for t in (student, teacher)
    ]
    assert_same(run(*in_padded_rows), expected)
    in_columns = [t.t().contiguous().t() for t in (student, teacher)]
    as_columns = run(*in_columns)
    assert_same(run(in_columns[0], teacher), as_columns)
    if dtype in HALF:  # apart from each other they are read like float32
        torch.testing.assert_close(as_columns["row_loss"], expected["row_loss"], rtol=1e-5, atol=0)
        for name in ("grad_student", "grad_teacher"):
            assert_gradient(as_columns[name], expected[name].double())
    else:
        assert_same(as_columns, expected)
    flipped = run(student.flip(0), teacher.flip(0))
    assert torch.equal(flipped["row_loss"].flip(0), expected["row_loss"])  # whatever the other rows are
    assert torch.equal(flipped["grad_student"].flip(0), expected["grad_student"])


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str
)
def test_two_dtypes(kernels: harness.Kernels, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = logits(4, 300, torch.float32)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    out = kernels.distillation(student, teacher, "reverse_kl", grad_student=True, grad_teacher=True)
    losses, grad_student, grad_teacher = oracle(student, teacher, "reverse_kl", 0.0)
    torch.testing.assert_close(out["row_loss"].double(), losses, rtol=1e-5, atol=1e-9)
    assert_gradient(out["grad_student"], grad_student)
    assert_gradient(out["grad_teacher"], grad_teacher)
    wide = harness.accumulation_dtype(student, teacher)
    widened = kernels.distillation(student.to(wide), teacher.to(wide), "reverse_kl", grad_student=True)
    assert torch.equal(out["row_loss"], widened["row_loss"])
    assert torch.equal(out["grad_student"], widened["grad_student"].to(student_dtype))


def test_leading_dimensions(kernels: harness.Kernels) -> None:
    base = torch.randn(3, 4, 2, 40, dtype=torch.float32)
    student, teacher = base.permute(2, 0, 1, 3), torch.randn(2, 3, 4, 40)
    out = kernels.distillation(student, teacher, grad_student=True)
    flat = kernels.distillation(student.reshape(-1, 40), teacher.reshape(-1, 40), grad_student=True)
    assert torch.equal(out["row_loss"], flat["row_loss"])
    assert torch.equal(out["grad_student"].view(-1, 40), flat["grad_student"])


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize(("divergence", "parameter"), DIVERGENCES)
def test_student_close_to_teacher(kernels: harness.Kernels, divergence: str, parameter: float, gap: float) -> None:
    student, teacher = logits(4, 3000, torch.float32, gap)
    losses, grad_student, _ = oracle(student, teacher, divergence, parameter)
    out = kernels.distillation(student, teacher, divergence, parameter, grad_student=True)
    torch.testing.assert_close(out["row_loss"].double(), losses, rtol=1e-3, atol=1e-9)
    assert (out["row_loss"] >= 0).all()
    assert_gradient(out["grad_student"], grad_student)
    equal = kernels.distillation(student, student, divergence, parameter, grad_student=True)
    assert (equal["row_loss"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameter", [1e-6, 0.05, 0.0901, 0.1, 0.3, 0.5, 0.7, 0.909, 0.95])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_shares_of_a_mixture(kernels: harness.Kernels, divergence: str, parameter: float, dtype: torch.dtype) -> None:
    """Formulas for balanced shares and for any, on both sides of where they meet, near rows and far ones."""
    for gap in (1e-2, 0.3, 1.0, 2.0, 10.0):
        student, teacher = logits(4, 600, dtype, gap)
        losses, grad_student, grad_teacher = oracle(student, teacher, divergence, parameter)
        out = kernels.distillation(student, teacher, divergence, parameter, grad_student=True, grad_teacher=True)
        torch.testing.assert_close(out["row_loss"].double(), losses, rtol=1e-5 if gap > 0.1 else 1e-3, atol=1e-9)
        assert_gradient(out["grad_student"], grad_student)
        assert_gradient(out["grad_teacher"], grad_teacher)
        alone = kernels.distillation(student, teacher, divergence, parameter, wanted=(False, False))
        torch.testing.assert_close(alone["row_loss"].double(), losses, rtol=1e-5 if gap > 0.1 else 1e-3, atol=1e-9)


@pytest.mark.parametrize("parameter", [0.0901, 0.1, 0.3, 0.5, 0.7, 0.74, 0.76, 0.9, 0.909])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_columns_that_all_differ_as_much(kernels: harness.Kernels, divergence: str, parameter: float) -> None:
    """So that no column's error makes up for another's."""
    student = 2 * torch.randn(16, 400, dtype=torch.float64)
    apart = torch.linspace(0.2, 2.0, 16, dtype=torch.float64)[:, None] * torch.where(torch.arange(400) % 2 == 0, 1, -1)
    teacher = (student + apart / 2).float()
    student = (student - apart / 2).float()
    losses, grad_student, grad_teacher = oracle(student, teacher, divergence, parameter)
    out = kernels.distillation(student, teacher, divergence, parameter, grad_student=True, grad_teacher=True)
    torch.testing.assert_close(out["row_loss"].double(), losses, rtol=1e-5, atol=0)
    assert_gradient(out["grad_student"], grad_student)
    assert_gradient(out["grad_teacher"], grad_teacher)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_loss_alone(
    kernels: harness.Kernels, chip: Callable[..., None], divergence: str, dtype: torch.dtype, resident: bool
) -> None:
    """From one pass where that is exact enough: near rows, too, and not rows whose largest logits mislead."""
    if resident:
        chip(H200, multiprocessors=1)
    alone = {"divergence": divergence, "wanted": (False, False)}
    for columns, gap in itertools.product((1203, 20_000), (1.0, 0.1, 0.03, 0.02, 0.015, 1e-2, 1e-3)):
        student = torch.randn(7, columns, dtype=torch.float64)
        teacher = (student + gap * torch.randn(7, columns, dtype=torch.float64)).to(dtype)
        student = student.to(dtype)
        student[3] = teacher[3]
        losses, _, _ = oracle(student, teacher, divergence, 0.0)
        out = kernels.distillation(student, teacher, **alone)["row_loss"]
        allowed = torch.where(losses < 1e-4, 1e-3, 1e-5) * losses + 1e-9 * (losses < 1e-6)
        assert ((out - losses).abs() <= allowed).all(), f"{columns} columns, {gap}: {out} not {losses}"
        assert (out >= 0).all() and out[3] == 0
    student, teacher = torch.zeros(2, 5, 20_000, dtype=dtype)
    student[0, 7] = teacher[1, 7] = student[2, 11] = 4.0
    teacher[3, 0] = student[4, 1] = -torch.inf
    losses, _, _ = oracle(student, teacher, divergence, 0.0)
    out = kernels.distillation(student, teacher, **alone)["row_loss"]
    torch.testing.assert_close(out.double(), losses, rtol=1e-5, atol=0)


def test_a_long_row(kernels: harness.Kernels) -> None:
    """Beyond the last border of the launch rules, in both accumulation types."""
    for dtype in (torch.bfloat16, torch.float64):
        student, teacher = logits(1, 65_541, dtype)
        out = kernels.distillation(student, teacher, "jeffreys", grad_student=True)
        losses, grad_student, _ = oracle(student, teacher, "jeffreys", 0.0)
        torch.testing.assert_close(out["row_loss"].double(), losses, rtol=1e-5, atol=0)
        assert_gradient(out["grad_student"], grad_student)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_count_are_not_read(kernels: harness.Kernels, dtype: torch.dtype) -> None:
    student, teacher = logits(6, 77, dtype)
    row_scale = torch.tensor([1, 0, 2, 0, 0, 0.5], dtype=harness.accumulation_dtype(student))
    dead = row_scale == 0
    student[dead], teacher[dead] = torch.nan, torch.inf
    plain = kernels.distillation(student, teacher, grad_student=True, grad_teacher=True)
    out = kernels.distillation(student, teacher, row_scale=row_scale, grad_student=True, grad_teacher=True, reduce=True)
    backward = kernels.distillation_backward(
        row_scale.new_tensor(2.0), student, teacher, out["row_constants"], row_scale=row_scale
    )
    for result in (out, backward):
        assert (result["grad_student"][dead] == 0).all() and (result["grad_teacher"][dead] == 0).all()
    assert (out["row_loss"][dead] == 0).all()
    assert torch.equal(out["row_loss"][~dead], (plain["row_loss"] * row_scale)[~dead])
    assert torch.isfinite(out["loss"])
    _, grad_student, _ = oracle(student[~dead], teacher[~dead], "forward_kl", 0.0)
    assert_gradient(out["grad_student"][~dead], grad_student * row_scale[~dead, None])
    assert_gradient(backward["grad_student"][~dead], 2 * grad_student * row_scale[~dead, None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_infinite_factors_without_labels(kernels: harness.Kernels, bad: float) -> None:
    """0 times infinity is not a weight of the cross entropy: there are no labels to read."""
    student, teacher = logits(2, 77, torch.float32)
    factors = torch.tensor([bad, 1.0])
    forward = kernels.distillation(student, teacher, "jsd", 0.1, row_scale=factors, grad_student=True)
    plain = kernels.distillation(student, teacher, "jsd", 0.1, grad_student=True)
    backward = kernels.distillation_backward(factors, student, teacher, plain["row_constants"], "jsd", 0.1)
    assert not forward["row_loss"][0].isfinite() and forward["row_loss"][1] == plain["row_loss"][1]
    for result in (forward, backward):
        assert not result["grad_student"][0].isfinite().any()
        assert torch.equal(result["grad_student"][1], plain["grad_student"][1])


@pytest.mark.parametrize(("divergence", "parameter"), DIVERGENCES)
def test_sure_rows(kernels: harness.Kernels, divergence: str, parameter: float) -> None:
    """What their gradients are summed from is found wherever the largest logits are, also where there are several;
    and a constant on one side, far above the other, changes nothing."""
    for columns in (40, 3001):
        student, teacher = logits(4, columns, torch.float32)
        student[:2, 3] += 18.0
        teacher[1:3, columns - 2] += 18.0
        student[3, [1, columns - 1]] = 20.0
        teacher[3, columns // 2] = 17.0
        for above in (0.0, 1e4):
            losses, grad_student, grad_teacher = oracle(student + above, teacher, divergence, parameter)
            out = kernels.distillation(
                student + above, teacher, divergence, parameter, grad_student=True, grad_teacher=True
            )
            torch.testing.assert_close(out["row_loss"].double(), losses, rtol=1e-5, atol=1e-9)
            for value, exact in ((out["grad_student"], grad_student), (out["grad_teacher"], grad_teacher)):
                errors, sizes = (value - exact).norm(dim=-1), exact.norm(dim=-1)
                assert (errors <= 1e-3 * sizes + 1e-15).all(), f"{columns} columns, {above}: {errors} of {sizes}"


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("divergence", "parameter"), [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.5), ("skew_reverse_kl", 0.1)]
)
def test_sure_rows_that_are_long(
    kernels: harness.Kernels,
    chip: Callable[..., None],
    divergence: str,
    parameter: float,
    dtype: torch.dtype,
    resident: bool,
) -> None:
    """One column, which its thread comes upon late, has nearly all; the others' share keeps its digits."""
    if resident:
        chip(H200, multiprocessors=1)
    columns = 20_000
    student, teacher = logits(4, columns, torch.float64, 0.3)
    for row, above in enumerate((16.0, 19.0, 22.0, 28.0)):
        student[row, 17_003], teacher[row, 17_003] = above + row % 2, above
    student, teacher = student.to(dtype), teacher.to(dtype)
    losses, grad_student, _ = oracle(student, teacher, divergence, parameter)
    out = kernels.distillation(student, teacher, divergence, parameter, grad_student=True)
    alone = kernels.distillation(student, teacher, divergence, parameter, wanted=(False, False))
    for loss in (out["row_loss"], alone["row_loss"]):
        torch.testing.assert_close(loss.double(), losses, rtol=1e-5, atol=1e-10)
    error = (out["grad_student"].double() - grad_student).norm(dim=-1)
    assert (error <= {torch.float32: 1e-3, torch.bfloat16: 4e-3}[dtype] * grad_student.norm(dim=-1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_masked_columns(kernels: harness.Kernels, divergence: str, dtype: torch.dtype) -> None:
    """What excludes a column is any number far below the rest, and a thread may come upon that rest late."""
    for columns, mask in itertools.product((64, 1500), (-1e4, -6e4, -1e9, torch.finfo(dtype).min, -torch.inf)):
        if mask < torch.finfo(dtype).min and mask != -torch.inf:
            continue
        student, teacher = logits(3, columns, dtype)
        for excluded in (slice(0, columns // 2), slice(columns // 2, None), slice(0, columns - 1)):
            s, t = student.clone(), teacher.clone()
            s[:, excluded] = t[:, excluded] = mask
            s[2], t[2] = student[2], teacher[2]
            s[2, excluded] = mask  # in one side alone
            rows = slice(0, 3 if mask > -1e30 else 2)  # beyond, the divergence is no float
            losses, grad_student, _ = oracle(s[rows], t[rows], divergence, 0.5)
            out = kernels.distillation(s, t, divergence, 0.5, grad_student=True)
            alone = kernels.distillation(s, t, divergence, 0.5, wanted=(False, False))
            tolerance = LOSS_TOLERANCE[harness.accumulation_dtype(student)]
            for loss in (out["row_loss"], alone["row_loss"]):
                torch.testing.assert_close(loss[rows].double(), losses, rtol=tolerance, atol=1e-9)
            assert_gradient(out["grad_student"][rows], grad_student.nan_to_num(0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 10.0])
def test_cross_entropy_of_sure_rows(kernels: harness.Kernels, temperature: float) -> None:
    """To the digits of the probabilities beside the label's, whatever the soft part is relative to."""
    columns = 3000
    student, teacher = (torch.full([64, columns], -60.0 * temperature, dtype=torch.float32) for _ in range(2))
    above = torch.linspace(-3, 5.4, 64) * temperature
    student[:, 0] = teacher[:, 0] = 0
    student[:, 2048] = above
    labels = torch.full([64], 2048)
    arguments = {"hard_scale": 1.0, "scale": 1.0, "labels": labels, "temperature": temperature}
    exact = torch.nn.functional.cross_entropy(student.double(), labels, reduction="none")
    soft, _, _ = oracle(student, teacher, "forward_kl", 0.0, temperature)
    out = kernels.distillation(student, teacher, **arguments)
    torch.testing.assert_close(out["row_loss"].double(), exact + soft, rtol=1e-5, atol=1.2e-7)
    alone = kernels.distillation(student, teacher, "", **{**arguments, "scale": 0.0})
    torch.testing.assert_close(alone["row_loss"].double(), exact, rtol=1e-6, atol=1.2e-7)
    assert (alone["row_loss"] >= 0).all()
    stats = kernels.token_stats(student, teacher, labels, torch.ones(64))
    expected = reference.token_stats(student, teacher, labels)
    torch.testing.assert_close(stats[:, 2].double(), expected[2].double(), rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_number_makes_it_loop(kernels: harness.Kernels, dtype: torch.dtype) -> None:
    """Python refuses a negative temperature; a kernel that is given one comes to an end."""
    student, teacher = logits(2, 300, dtype)
    for temperature in (-1.0, torch.nan, torch.inf, 0.0):
        kernels.distillation(
            100 * student, 100 * teacher, "jsd", 0.5, grad_student=True, temperature=temperature or 1e-38
        )


def test_infinities_and_nan(kernels: harness.Kernels) -> None:
    inf = torch.inf
    student, teacher = logits(8, 40, torch.float32)
    student[1, 3] = torch.nan
    teacher[2, 5] = inf
    student[3] = -inf
    student[4, 7] = teacher[4, 7] = -inf  # p = q = 0
    student[5, 0] = -inf  # q = 0 < p
    teacher[6, 39] = -inf  # p = 0 < q
    clean = [0, 4, 7]
    for divergence, parameter in DIVERGENCES:
        out = kernels.distillation(student, teacher, divergence, parameter, grad_student=True, grad_teacher=True)
        losses, grad_student, grad_teacher = oracle(student[clean], teacher[clean], divergence, parameter)
        torch.testing.assert_close(out["row_loss"][clean].double(), losses, rtol=1e-5, atol=1e-9)
        assert_gradient(out["grad_student"][clean], grad_student.nan_to_num(0))
        assert_gradient(out["grad_teacher"][clean], grad_teacher.nan_to_num(0))
        assert (out["grad_student"][4, 7], out["grad_teacher"][4, 7]) == (0, 0)
        assert out["row_loss"][1:4].isnan().all()
        assert out["grad_student"][1:4].isnan().all() and out["grad_teacher"][1:4].isnan().all()
    q_zero, p_zero = (out := kernels.distillation(student, teacher, grad_student=True))["row_loss"][5:7]
    assert q_zero == inf and p_zero < inf
    q_minus_p = student[5].double().softmax(-1) - teacher[5].double().softmax(-1)
    assert_gradient(out["grad_student"][5:6], q_minus_p[None])
    q_zero, p_zero = (out := kernels.distillation(student, teacher, "reverse_kl", grad_student=True))["row_loss"][5:7]
    assert q_zero < inf and p_zero == inf and out["grad_student"][6].isnan().all()


# ---------------------------------------------------------------- rows that stay on the chip

# What matters of an H200, an RTX 5090, an A100 and an RTX 4090.
H200 = {"compute_capability": 90, "multiprocessors": 132, "shared_bytes_per_block": 227 * 1024, "clusters": True}
RTX_5090 = {"compute_capability": 120, "multiprocessors": 170, "shared_bytes_per_block": 99 * 1024, "clusters": True}
A100 = {"compute_capability": 80, "multiprocessors": 108, "shared_bytes_per_block": 163 * 1024, "clusters": False}
RTX_4090 = {"compute_capability": 89, "multiprocessors": 128, "shared_bytes_per_block": 99 * 1024, "clusters": False}
HALF = [torch.float16, torch.bfloat16]
# A vocabulary in one block, in clusters, with and without parts of a group.
RESIDENT_COLUMNS = (1032, 5003, 8192, 20_008)


def test_shapes_of_resident_rows(
    kernels: harness.Kernels, chip: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks per cluster for real vocabularies; as many clusters as fit, however many rows there are."""
    chip(H200)
    clusters = {
        torch.bfloat16: {1024: 0, 1025: 1, 26_000: 1, 32_000: 2, 50_257: 2, 128_256: 5, 151_936: 6, 262_144: 16},
        torch.float32: {4096: 1, 32_000: 3, 50_257: 5, 128_256: 16, 151_936: 16, 262_144: 16, 500_000: 0},
    }
    for dtype, expected in clusters.items():
        for columns, cluster in expected.items():
            blocks, threads, per_cluster, shared = kernels.resident_shape(10_000, columns, dtype)
            assert per_cluster * (blocks > 0) == cluster, (dtype, columns, per_cluster)
            if cluster == 0:
                continue
            assert threads in (128, 160, 256) and blocks % cluster == 0
            assert shared * cluster >= 2 * columns * dtype.itemsize
            assert 132 - cluster < blocks <= 132 * 2  # as many as the emulated device says that it holds
            assert kernels.resident_shape(1, columns, dtype) == (cluster, threads, cluster, shared)
    chip(RTX_5090)
    sizes = {1032: 1, 32_000: 4, 128_256: 8, 262_144: 0}
    assert {v: kernels.resident_shape(99, v, torch.bfloat16)[2] * (v < 2e5) for v in sizes} == sizes
    # Where there are no clusters, more blocks may share a row, and no more of them run than meet in their memory.
    for device, clusters in (
        (A100, {1032: 1, 32_000: 2, 50_257: 3, 128_256: 7, 262_144: 16}),
        (RTX_4090, {1032: 1, 32_000: 3, 50_257: 5, 128_256: 16, 262_144: 32, 900_000: 0}),
    ):
        chip(device)
        assert {v: kernels.resident_shape(1, v, torch.bfloat16)[0] for v in clusters} == clusters
        for columns in clusters:
            blocks, _, cluster, _ = kernels.resident_shape(10_000, columns, torch.bfloat16)
            assert cluster == 1 or blocks <= 3 * device["multiprocessors"]
    chip(H200)
    monkeypatch.setenv("KLDIV_EXT_CUDA_TIER", "streamed")
    assert kernels.resident_shape(99, 32_000, torch.bfloat16)[0] == 0


def test_shapes_of_streamed_rows(kernels: harness.Kernels) -> None:
    """Every row has its threads, and a block takes several rows only where they are short; few rows that nothing is
    summed over have several blocks, each of which has something to do."""
    for dtype in DTYPES:
        for columns in (1, 64, 65, 128, 256, 257, 1024, 65_536, 65_537, 10**7):
            for rows in (1, 3, 100, 10**6):
                blocks, threads, width, per_row = kernels.row_shape(rows, columns, dtype)
                assert threads % width == 0 and threads % 32 == 0 and width in (8, 16, 32, 64, 128, 256, 512)
                assert threads == width or width <= 32
                assert blocks == min(-(-rows * width // threads), 65_536) and per_row == 1
                *apart, per_row = kernels.row_shape(rows, columns, dtype, sums=False)
                assert apart == [blocks * per_row, threads, width]
                assert per_row == 1 or (blocks * per_row <= 1024 and (per_row - 1) * width * 8 < columns)
                assert per_row == 1 or width > 32
    assert [kernels.row_shape(8, v, torch.bfloat16, sums=False)[3] for v in (1024, 32_000, 10**7)] == [1, 16, 128]


@pytest.mark.parametrize("device", occupancy.DEVICES, ids=lambda device: device.name)
def test_launches_fit_their_devices(
    kernels: harness.Kernels, monkeypatch: pytest.MonkeyPatch, device: occupancy.Device
) -> None:
    """With the registers that launch bounds leave, and the shared memory that is reserved for what is not logits."""
    monkeypatch.delenv("KLDIV_EXT_CUDA_TIER")
    launches = list(occupancy.launches(kernels, device))
    assert {launch.kernel for launch in launches} == {resources.STREAMED, resources.RESIDENT}
    for launch in launches:
        shared = launch.dynamic_shared + (0 if launch.kernel == resources.RESIDENT else 4 * 1024)
        blocks = occupancy.blocks_per_multiprocessor(device, launch.threads, 128, shared)
        assert blocks >= 1, launch
        if (device.name, launch.dtype) == ("H200", "bfloat16"):
            assert blocks == {160: 3, 256: 2, 512: 1}[launch.threads], launch


# One that has clusters and one that has none, both too small to hold five rows at a time.
SMALL = pytest.mark.parametrize(
    "small", [{**H200, "multiprocessors": 1}, {**A100, "multiprocessors": 2}], ids=["90", "80"]
)


@SMALL
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("divergence", "parameter"), DIVERGENCES)
def test_resident_rows(
    kernels: harness.Kernels,
    chip: Callable[..., None],
    divergence: str,
    parameter: float,
    dtype: torch.dtype,
    small: dict[str, Any],
) -> None:
    """Against the reference, with more rows than clusters, and to the same bits however many of these there are."""
    arguments = {"divergence": divergence, "parameter": parameter, "temperature": 1.5, "scale": 0.7}
    for i, columns in enumerate(RESIDENT_COLUMNS):
        chip(small)
        kernels.set_order(*ORDERS[i])
        blocks, _, cluster, _ = kernels.resident_shape(5, columns, dtype)
        assert 0 < blocks // cluster < 5
        student, teacher = logits(5, columns, dtype)
        losses, grad_student, grad_teacher = oracle(student, teacher, divergence, parameter, 1.5)
        forward = kernels.distillation(student, teacher, **arguments)
        torch.testing.assert_close(forward["row_loss"].double(), 0.7 * losses, rtol=1e-5, atol=1e-9)
        both = kernels.distillation(student, teacher, grad_student=True, grad_teacher=True, reduce=True, **arguments)
        assert torch.equal(both["row_loss"], forward["row_loss"])
        assert_gradient(both["grad_student"], 0.7 * grad_student)
        assert_gradient(both["grad_teacher"], 0.7 * grad_teacher)
        alone = kernels.distillation(student, teacher, grad_student=True, **arguments)
        assert torch.equal(alone["grad_student"], both["grad_student"])
        one = torch.ones([])
        later = kernels.distillation_backward(one, student, teacher, forward["row_constants"], **arguments)
        assert torch.equal(later["grad_student"], both["grad_student"])
        chip(small, multiprocessors=100)
        again = kernels.distillation(student, teacher, grad_student=True, grad_teacher=True, reduce=True, **arguments)
        assert_same(again, both)


@SMALL
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("columns", [2051, 2056])
def test_resident_rows_by_their_options(
    kernels: harness.Kernels, chip: Callable[..., None], columns: int, dtype: torch.dtype, small: dict[str, Any]
) -> None:
    """Positions that do not count between others, labels, padding, a label that is none, broken rows, any address."""
    chip(small)
    rows, valid = 9, columns - 3 if columns % 8 else columns - 8
    student, teacher = logits(rows, columns, dtype)
    student[:, valid:] = torch.nan
    row_scale = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 0.5, 1.0, 1.0, 0.0])
    dead = row_scale == 0
    student[dead] = torch.nan
    labels = torch.tensor([7, 0, 7, 7, valid - 1, valid, 11, 3, 7])
    student[7, 5] = torch.nan
    arguments: dict[str, Any] = {
        "divergence": "jsd",
        "parameter": 0.3,
        "temperature": 2.0,
        "hard_scale": 0.4,
        "labels": labels,
        "row_scale": row_scale,
        "valid_vocab": valid,
    }
    fine = torch.tensor([1, 4, 6])
    leaves = [z[fine].double().requires_grad_() for z in (student, teacher)]
    sides = [reference.effective_logits(z, 1.0, 0.0, valid) for z in leaves]
    losses = reference.weighted_losses(*sides, labels[fine], 1.0, 0.4, "jsd", 0.3, 2.0) * row_scale[fine]
    gradients = torch.autograd.grad(losses.sum(), leaves)
    expected = None
    for offset in (0, 1):
        out = kernels.distillation(
            placed(student, offset),
            placed(teacher, offset),
            grad_student=True,
            grad_teacher=True,
            offset=offset,
            **arguments,
        )
        torch.testing.assert_close(out["row_loss"][fine].double(), losses.detach(), rtol=1e-5, atol=1e-9)
        for name, gradient in zip(("grad_student", "grad_teacher"), gradients, strict=True):
            assert_gradient(out[name][fine], gradient)
            assert (out[name][dead] == 0).all()
            assert out[name][7, :valid].isnan().all() and (out[name][:, valid:] == 0).all()
        assert out["grad_student"][5, :valid].isnan().all()
        assert (out["row_loss"][dead] == 0).all() and out["row_loss"][[5, 7]].isnan().all()
        expected = expected or out
        assert_same(out, expected)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("columns", [9, 2051, 2056])
@pytest.mark.parametrize(("divergence", "parameter"), [("forward_kl", 0.0), ("jsd", 0.3)])
def test_where_gradients_go(
    kernels: harness.Kernels, chip: Callable[..., None], divergence: str, parameter: float, columns: int, resident: bool
) -> None:
    """Into another dtype, rounded, and over the logits: the same bits in every order of threads, with labels too."""
    if resident:
        chip({**H200, "multiprocessors": 1})
    student, teacher = logits(5, columns, torch.float32)
    labels = torch.tensor([0, columns - 1, 3, 7, 8])
    options: dict[str, Any] = {
        "divergence": divergence,
        "parameter": parameter,
        "temperature": 1.5,
        "labels": labels,
        "hard_scale": 0.5,
        "grad_output": torch.tensor([1.0, -2.0, 0.5, 3.0, 1e-3]),
    }
    for wants_teacher in (False, True):
        both = {**options, "grad_student": True, "grad_teacher": wants_teacher}
        expected = kernels.distillation(student, teacher, **both)
        for order, dtype in itertools.product(ORDERS, HALF):
            kernels.set_order(*order)
            narrow = kernels.distillation(student, teacher, gradient_dtype=dtype, **both)
            for name, tensor in expected.items():
                rounded = tensor.to(dtype) if name.startswith("grad") else tensor
                assert torch.equal(narrow[name], rounded), name
            over = kernels.distillation(student.clone(), teacher, in_place=True, **both)
            assert_same(over, expected)


def test_resident_and_streamed_rows_agree(kernels: harness.Kernels, chip: Callable[..., None]) -> None:
    student, teacher = logits(3, 20_008, torch.float32, 1e-2)
    streamed = kernels.distillation(student, teacher, "reverse_kl", grad_student=True)
    chip(H200)
    resident = kernels.distillation(student, teacher, "reverse_kl", grad_student=True)
    torch.testing.assert_close(resident["row_loss"], streamed["row_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(resident["grad_student"], streamed["grad_student"], rtol=1e-4, atol=1e-9)
    clusters = kernels.resident_shape(3, 20_008, torch.float32)[:3]
    assert clusters[2] > 1
    chip({**H200, "clusters": False})
    assert kernels.resident_shape(3, 20_008, torch.float32)[:3] == clusters
    assert_same(kernels.distillation(student, teacher, "reverse_kl", grad_student=True), resident)  # wherever they meet


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_whose_gradient_comes_later(kernels: harness.Kernels, dtype: torch.dtype) -> None:
    """Several blocks share a row, to the bits that one of them would have."""
    rows, columns, valid = 3, 5011, 5000
    assert kernels.row_shape(rows, valid, dtype, sums=False)[3] > 1
    student, teacher = logits(rows, columns, dtype)
    row_scale = torch.tensor([1.0, 0.0, 2.0], dtype=harness.accumulation_dtype(student))
    arguments: dict[str, Any] = {
        "divergence": "jsd",
        "parameter": 0.3,
        "hard_scale": 0.4,
        "labels": torch.tensor([0, 1, valid - 1]),
        "row_scale": row_scale,
        "valid_vocab": valid,
    }
    early = kernels.distillation(student, teacher, grad_student=True, grad_teacher=True, **arguments)
    for order in ORDERS:
        kernels.set_order(*order)
        later = kernels.distillation_backward(
            torch.ones_like(row_scale[0]), student, teacher, early["row_constants"], **arguments
        )
        for name in ("grad_student", "grad_teacher"):
            assert torch.equal(later[name], early[name])
    *_, grad_teacher = oracle(student[:, :valid], teacher[:, :valid], "jsd", 0.3)
    assert_gradient(later["grad_teacher"][:, :valid], grad_teacher * row_scale[:, None])


def test_more_rows_than_blocks(kernels: harness.Kernels) -> None:
    """Almost none of them count, or it would take minutes."""
    rows = 65_536 + 10
    student, teacher = logits(rows, 2, torch.float32)
    row_scale = torch.zeros(rows)
    counting = torch.tensor([0, 9, 65_535, 65_536, rows - 1])
    row_scale[counting] = 1
    out = kernels.distillation(student, teacher, row_scale=row_scale, grad_student=True, reduce=True)
    alone = kernels.distillation(student[counting], teacher[counting], grad_student=True)
    assert torch.equal(out["row_loss"][counting], alone["row_loss"])
    assert torch.equal(out["grad_student"][counting], alone["grad_student"])
    assert torch.count_nonzero(out["grad_student"]) == torch.count_nonzero(alone["grad_student"])
    torch.testing.assert_close(out["loss"], alone["row_loss"].double().sum().float(), rtol=1e-7, atol=0)


def test_rows_more_than_2_to_the_31_elements_apart(kernels: harness.Kernels) -> None:
    stride = 2**31 + 3
    far = torch.empty(2 * stride, dtype=torch.float16).as_strided([2, 9], [stride, 1])  # never touched but for two rows
    student, teacher = logits(2, 9, torch.float16)
    expected = kernels.distillation(student, teacher, grad_student=True)
    assert_same(kernels.distillation(far.copy_(student), teacher, grad_student=True), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_stats(kernels: harness.Kernels, dtype: torch.dtype) -> None:
    for i, columns in enumerate(COLUMNS):
        kernels.set_order(*ORDERS[i % len(ORDERS)])
        student, teacher = logits(5, columns, dtype)
        teacher[1] = student[1]  # they agree
        labels = torch.tensor([0, columns - 1, columns // 2, 0, 0])
        row_scale = torch.tensor([1.0, 1, 1, 0, 1], dtype=harness.accumulation_dtype(student))
        for options in ({}, {"temperature": 1.5, "logit_scale": (0.5, 2.0), "logit_softcap": (0.0, 3.0)}):
            stats = kernels.token_stats(student, teacher, labels, row_scale, **options)
            expected = torch.stack(
                [v.double() for v in reference.token_stats(student, teacher, labels, mask=row_scale != 0, **options)],
                -1,
            )
            tolerance = LOSS_TOLERANCE[harness.accumulation_dtype(student)]
            torch.testing.assert_close(stats.double(), expected, rtol=tolerance, atol=20 * tolerance)
            assert torch.equal(stats[:, -1].double(), expected[:, -1])


# ---------------------------------------------------------------- the drop-in


def log_probabilities(shape: list[int], dtype: torch.dtype, log_target: bool) -> tuple[Tensor, Tensor]:
    input = torch.randn(shape, dtype=torch.float64).log_softmax(-1)
    target = torch.randn(shape, dtype=torch.float64).log_softmax(-1)
    target.view(-1)[::5] = -torch.inf
    return input.to(dtype), (target if log_target else target.exp()).to(dtype)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [[1, 1], [1, 7], [3, 8], [5, 333], [2, 4099]], ids=str)
def test_kl_div(kernels: harness.Kernels, shape: list[int], dtype: torch.dtype, log_target: bool) -> None:
    input, target = log_probabilities(shape, dtype, log_target)
    dead = (target == -torch.inf) if log_target else (target == 0)
    input[dead] = -torch.inf  # a probability of 0 silences it
    leaves = [input.double().requires_grad_(), target.double().requires_grad_()]
    terms = reference.kl_div(leaves[0], leaves[1], reduction="none", log_target=log_target)
    tolerance = {
        "rtol": max(2 * torch.finfo(dtype).eps, 1e-12),
        "atol": 2 * torch.finfo(harness.accumulation_dtype(input)).eps,
    }

    out = kernels.kl_div(input, target, log_target, scale=0.25, reduce=False)
    torch.testing.assert_close(out.double(), 0.25 * terms, **tolerance)
    loss = kernels.kl_div(input, target, log_target, scale=0.25)
    torch.testing.assert_close(loss.double(), 0.25 * terms.sum(), rtol=1e-5, atol=1e-6)

    weights = torch.randn(shape, dtype=dtype)
    for grad_output in (torch.tensor(0.5, dtype=loss.dtype), weights, weights[:1, :1].expand(shape)):
        expected = torch.autograd.grad((terms * grad_output).sum(), leaves, retain_graph=True)
        of_input, of_target = kernels.kl_div_backward(grad_output, input, target, log_target)
        torch.testing.assert_close(of_input.double(), expected[0], **tolerance)
        assert of_target is not None
        torch.testing.assert_close(of_target.double(), expected[1].masked_fill(dead, 0), **tolerance | {"atol": 1e-5})
        without_input, _ = kernels.kl_div_backward(grad_output, None, target, log_target, grad_target=False)
        assert torch.equal(without_input, of_input)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_div_does_not_depend_on_order_or_place(kernels: harness.Kernels, dtype: torch.dtype) -> None:
    shape = [3, 2999]
    input, target = log_probabilities(shape, dtype, False)
    grad_output = torch.randn(shape, dtype=dtype)

    def run(input: Tensor, target: Tensor, grad_output: Tensor, offset: int = 0) -> dict[str, Tensor]:
        loss = kernels.kl_div(input, target, False, offset=offset)
        terms = kernels.kl_div(input, target, False, reduce=False, offset=offset)
        of_input, of_target = kernels.kl_div_backward(grad_output, input, target, False, offset=offset)
        assert of_target is not None
        return {"loss": loss, "terms": terms, "of_input": of_input, "of_target": of_target}

    expected = run(input, target, grad_output)
    for order in ORDERS[1:]:
        kernels.set_order(*order)
        assert_same(run(input, target, grad_output), expected)
    for offset in (1, 3):
        assert_same(run(*(placed(t, offset) for t in (input, target, grad_output)), offset), expected)
    assert_same(run(*(t.t().contiguous().t() for t in (input, target, grad_output))), expected)
    narrow = [t.reshape(-1, 1).expand(-1, 2)[:, 0].view(shape) for t in (input, target, grad_output)]
    assert_same(run(*narrow), expected)
    if dtype != torch.float64:
        mixed = kernels.kl_div(input, target.float(), False)
        assert torch.equal(mixed, expected["loss"])


def test_kl_div_of_nothing(kernels: harness.Kernels) -> None:
    assert kernels.kl_div(torch.empty(0, 4), torch.empty(0, 4), False) == 0
    assert kernels.distillation(torch.empty(0, 4), torch.empty(0, 4), reduce=True)["loss"] == 0


# ---------------------------------------------------------------- grad_output that came late


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 8, 17, 5000])
def test_scale(kernels: harness.Kernels, count: int, dtype: torch.dtype) -> None:
    for offset in (0, 1, 5):
        for factor in (torch.tensor(0.3), torch.tensor(-7.0, dtype=torch.float64)):
            guarded = harness.Guarded(offset)
            gradient = guarded.new([count], dtype).copy_(torch.randn(count))
            expected = (gradient.to(harness.accumulation_dtype(gradient)) * factor).to(dtype)
            kernels.scale_(gradient, factor)
            guarded.check()
            assert torch.equal(gradient, expected)


def test_scale_by_one_writes_nothing(kernels: harness.Kernels) -> None:
    bits = torch.full([100], 0x7F81, dtype=torch.int16)  # a signalling NaN: written back, it would be quiet
    kernels.scale_(bits.view(torch.bfloat16), torch.tensor(1.0))
    assert (bits == 0x7F81).all()


# ---------------------------------------------------------------- the emulator itself


def run(program: Path) -> None:
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


SANITIZED = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_under_sanitizers(build_folder: Path) -> None:
    sources = [*harness.KERNELS, harness.HERE / "fibers.cpp", harness.HERE / "sanitized.cpp"]
    run(harness.build(build_folder, sources, "sanitized", SANITIZED))


@pytest.mark.parametrize(
    ("name", "flags"), [("selftest", ["-O0"]), ("selftest_sanitized", SANITIZED)], ids=["plain", "sanitized"]
)
def test_faults_are_noticed(build_folder: Path, name: str, flags: list[str]) -> None:
    run(harness.build(build_folder, [harness.HERE / "fibers.cpp", harness.HERE / "selftest.cpp"], name, flags))


def test_a_device_may_be_too_small(kernels: harness.Kernels) -> None:
    student, teacher = logits(2, 300, torch.float32)
    expected = kernels.distillation(student, teacher)
    kernels.set_device(shared_bytes_per_block=8)
    with pytest.raises(RuntimeError, match="more shared memory than a block can have"):
        kernels.distillation(student, teacher)
    kernels.set_device()
    assert_same(kernels.distillation(student, teacher), expected)


# What orders the sums of a block, of a cluster and of blocks that meet elsewhere: a text that occurs once, and what is
# put in its place.
ORDERING = [
    ("BLOCK", "      device::barrier();\n", ""),
    ("BLOCK", "    turn_ = 1 - turn_;\n", ""),
    ("CLUSTER", "      device::cluster_barrier();  // no block", "// no block"),
    ("CLUSTER", "      device::cluster_barrier();\n", ""),
    ("CLUSTER", "    turn_ = 1 - turn_;\n", ""),
    ("MEETING", "      device::barrier();\n", ""),
    ("MEETING", "    turn_ = 1 - turn_;\n", ""),
    ("MEETING", "      device::arrive(count);\n", ""),
    ("MEETING", "      device::await(count, arrivals_);\n", ""),
    ("MEETING", "    }\n    device::barrier();\n", "    }\n"),
]


@pytest.mark.parametrize(("team", "needed", "left"), ORDERING)
def test_what_orders_a_sum_is_needed(build_folder: Path, tmp_path: Path, team: str, needed: str, left: str) -> None:
    shutil.copytree(harness.CSRC, tmp_path / "csrc")
    header = tmp_path / "csrc" / "cuda" / "team.h"
    assert header.read_text().count(needed) == 1
    header.write_text(header.read_text().replace(needed, left))
    sources = [harness.HERE / "fibers.cpp", harness.HERE / "selftest.cpp"]
    run(harness.build(tmp_path, sources, "selftest", ["-O0", f"-DFAULTY_{team}"], [tmp_path / "csrc"]))
