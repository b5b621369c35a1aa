"""csrc/cuda/columns.h: accuracy where a formula could lose digits, near the teacher and where one column has all."""

from __future__ import annotations

import itertools

import pytest
import torch

from emulation.cases import (
    EVERY_DIVERGENCE,
    EVERY_DTYPE,
    FLOAT32_AND_BFLOAT16,
    assert_close,
    assert_losses,
    logits,
    oracle,
)
from emulation.harness import BOTH, NEITHER, STUDENT, Kernels
from kldiv_ext import reference

MIXTURES = pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3])
@EVERY_DIVERGENCE
def test_student_close_to_teacher(kernels: Kernels, divergence: str, parameter: float, gap: float) -> None:
    student, teacher = logits(4, 3000, torch.float32, gap)
    out = kernels.distillation(student, teacher, divergence, parameter, gradients=STUDENT)
    assert_close(out, oracle(student, teacher, divergence, parameter), rtol=1e-3)
    assert (out["row_loss"] >= 0).all()
    equal = kernels.distillation(student, student, divergence, parameter, gradients=STUDENT)
    assert (equal["row_loss"] == 0).all()


@FLOAT32_AND_BFLOAT16
@pytest.mark.parametrize("parameter", [1e-6, 0.05, 0.0901, 0.1, 0.3, 0.5, 0.7, 0.909, 0.95])
@MIXTURES
def test_weights_of_a_mixture(kernels: Kernels, divergence: str, parameter: float, dtype: torch.dtype) -> None:
    """On both sides of the weights where the formulas change, for near rows and far ones."""
    for gap in (1e-2, 0.3, 1.0, 2.0, 10.0):
        student, teacher = logits(4, 600, dtype, gap)
        expected = oracle(student, teacher, divergence, parameter)
        for needs_grad, gradients in ((BOTH, BOTH), (NEITHER, NEITHER)):
            out = kernels.distillation(
                student, teacher, divergence, parameter, gradients=gradients, needs_grad=needs_grad
            )
            assert_close(out, expected, rtol=1e-5 if gap > 0.1 else 1e-3)


@pytest.mark.parametrize("parameter", [0.0901, 0.1, 0.3, 0.5, 0.7, 0.74, 0.76, 0.9, 0.909])
@MIXTURES
def test_columns_that_all_differ_as_much(kernels: Kernels, divergence: str, parameter: float) -> None:
    """So the errors of columns do not cancel."""
    middle = 2 * torch.randn(16, 400, dtype=torch.float64)
    gap = torch.linspace(0.2, 2.0, 16, dtype=torch.float64)[:, None] * torch.where(torch.arange(400) % 2 == 0, 1, -1)
    student, teacher = (middle - gap / 2).float(), (middle + gap / 2).float()
    out = kernels.distillation(student, teacher, divergence, parameter, gradients=BOTH)
    expected = oracle(student, teacher, divergence, parameter)
    assert_close(out, expected)
    assert_losses(out["row_loss"], expected["row_loss"], atol=0)


@FLOAT32_AND_BFLOAT16
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_loss_without_gradient(both_tiers: Kernels, divergence: str, dtype: torch.dtype) -> None:
    """One pass gives it where that is accurate: not in near rows, nor where the first maxima are far off."""
    kernels = both_tiers
    for columns, gap in itertools.product((1203, 20_000), (1.0, 0.1, 0.03, 0.02, 0.015, 1e-2, 1e-3)):
        student = torch.randn(7, columns, dtype=torch.float64)
        teacher = (student + gap * torch.randn(7, columns, dtype=torch.float64)).to(dtype)
        student = student.to(dtype)
        student[3] = teacher[3]
        losses = oracle(student, teacher, divergence)["row_loss"]
        out = kernels.distillation(student, teacher, divergence, needs_grad=NEITHER)["row_loss"]
        allowed = torch.where(losses < 1e-4, 1e-3, 1e-5) * losses + 1e-9 * (losses < 1e-6)
        assert ((out - losses).abs() <= allowed).all(), f"{columns} columns, {gap}: {out} not {losses}"
        assert (out >= 0).all() and out[3] == 0
    student, teacher = torch.zeros(2, 5, 20_000, dtype=dtype)
    student[0, 7] = teacher[1, 7] = student[2, 11] = 4.0
    teacher[3, 0] = student[4, 1] = -torch.inf
    out = kernels.distillation(student, teacher, divergence, needs_grad=NEITHER)["row_loss"]
    assert_losses(out, oracle(student, teacher, divergence)["row_loss"], atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_long_row(kernels: Kernels, dtype: torch.dtype) -> None:
    """Beyond the last limit of the launch rules, in both accumulation types."""
    student, teacher = logits(1, 65_541, dtype)
    out = kernels.distillation(student, teacher, "jeffreys", gradients=STUDENT)
    expected = oracle(student, teacher, "jeffreys")
    assert_close(out, expected, rtol=1e-5)
    assert_losses(out["row_loss"], expected["row_loss"], rtol=1e-5, atol=0)


@EVERY_DIVERGENCE
def test_confident_rows(kernels: Kernels, divergence: str, parameter: float) -> None:
    """One or several columns have nearly all of p or q, anywhere in the row.

    Adding a constant to one side changes nothing."""
    for columns in (40, 3001):
        student, teacher = logits(4, columns, torch.float32)
        student[:2, 3] += 18.0
        teacher[1:3, columns - 2] += 18.0
        student[3, [1, columns - 1]] = 20.0
        teacher[3, columns // 2] = 17.0
        for constant in (0.0, 1e4):
            moved = student + constant
            expected = oracle(moved, teacher, divergence, parameter)
            out = kernels.distillation(moved, teacher, divergence, parameter, gradients=BOTH)
            assert_losses(out["row_loss"], expected["row_loss"])
            for name in ("grad_student", "grad_teacher"):
                errors, sizes = (out[name] - expected[name]).norm(dim=-1), expected[name].norm(dim=-1)
                assert (errors <= 1e-3 * sizes + 1e-15).all(), f"{columns} columns, {constant}: {errors} of {sizes}"


@FLOAT32_AND_BFLOAT16
@pytest.mark.parametrize(
    ("divergence", "parameter"), [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.5), ("skew_reverse_kl", 0.1)]
)
def test_confident_long_rows(both_tiers: Kernels, divergence: str, parameter: float, dtype: torch.dtype) -> None:
    """A thread reads the column that has nearly all after many others, whose share keeps its digits."""
    student, teacher = logits(4, 20_000, torch.float64, 0.3)
    for row, logit in enumerate((16.0, 19.0, 22.0, 28.0)):
        student[row, 17_003], teacher[row, 17_003] = logit + row % 2, logit
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = oracle(student, teacher, divergence, parameter)
    out = both_tiers.distillation(student, teacher, divergence, parameter, gradients=STUDENT)
    alone = both_tiers.distillation(student, teacher, divergence, parameter, needs_grad=NEITHER)
    for outputs in (out, alone):
        assert_losses(outputs["row_loss"], expected["row_loss"], atol=1e-10)
    errors = (out["grad_student"].double() - expected["grad_student"]).norm(dim=-1)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert (errors <= tolerance * expected["grad_student"].norm(dim=-1)).all()


@EVERY_DTYPE
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_masked_columns(kernels: Kernels, divergence: str, dtype: torch.dtype) -> None:
    """Any number far below the other logits excludes a column; a thread may read the others late."""
    masks = [mask for mask in (-1e4, -6e4, -1e9) if mask >= torch.finfo(dtype).min]
    for columns, mask in itertools.product((64, 1500), (*masks, torch.finfo(dtype).min, -torch.inf)):
        student, teacher = logits(3, columns, dtype)
        for excluded in (slice(0, columns // 2), slice(columns // 2, None), slice(0, columns - 1)):
            s, t = student.clone(), teacher.clone()
            s[:, excluded] = t[:2, excluded] = mask  # row 2: in the student alone
            rows = slice(0, 3 if mask > -1e30 else 2)  # beyond, the divergence of row 2 is no float
            expected = oracle(s[rows], t[rows], divergence, 0.5)
            expected = {name: value.nan_to_num(0) if name != "row_loss" else value for name, value in expected.items()}
            for options in ({"gradients": STUDENT}, {"needs_grad": NEITHER}):
                assert_close(kernels.distillation(s, t, divergence, 0.5, **options), expected, rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 10.0])
def test_cross_entropy_of_confident_rows(kernels: Kernels, temperature: float) -> None:
    """The probabilities beside the label's keep their digits, whatever the divergence is relative to."""
    columns = 3000
    student, teacher = (torch.full([64, columns], -60.0 * temperature, dtype=torch.float32) for _ in range(2))
    student[:, 0] = teacher[:, 0] = 0
    student[:, 2048] = torch.linspace(-3, 5.4, 64) * temperature
    labels = torch.full([64], 2048)
    options = {"hard_scale": 1.0, "labels": labels, "temperature": temperature}
    exact = torch.nn.functional.cross_entropy(student.double(), labels, reduction="none")
    soft = oracle(student, teacher, temperature=temperature)["row_loss"]
    assert_losses(kernels.distillation(student, teacher, **options)["row_loss"], exact + soft, atol=1.2e-7)
    alone = kernels.distillation(student, teacher, scale=0.0, **options)["row_loss"]
    assert_losses(alone, exact, rtol=1e-6, atol=1.2e-7)
    assert (alone >= 0).all()
    entropies = kernels.token_stats(student, teacher, labels, torch.ones(64))[:, 2]
    expected = reference.token_stats(student, teacher, labels)[2]
    assert expected is not None
    assert_losses(entropies, expected, atol=5e-7)
