"""csrc/cuda/columns.h and units.h: accuracy, near the teacher and where one column has nearly all."""

import itertools

import pytest
import torch

from emulation import cases
from emulation.cases import FORWARD_KL, REVERSE_KL, Options, assert_close, assert_losses, logits, oracle
from emulation.harness import BOTH, NEITHER, STUDENT, Kernels
from kldiv_ext import reference

EVEN_JSD = {"divergence": "jsd", "parameter": 0.5}


def each_mixture(*weights: float) -> pytest.MarkDecorator:
    names = ("jsd", "skew_forward_kl", "skew_reverse_kl")
    return cases.each_divergence(*({"divergence": name, "parameter": w} for name in names for w in weights))


def test_special_function_unit(kernels: Kernels) -> None:
    """Errors of units.h, where the emulated unit errs as far as PTX allows."""
    x = torch.cat([torch.logspace(-9, 1.3, 40_001, dtype=torch.float64), torch.tensor([0.5, 1.0, 20.0])]).float()
    gap, y, delta = x.double(), torch.cat([x, -x[x < 0.9]]).double(), torch.cat([x, -x]).double()

    minus_log1p = torch.where(y.abs() < 1e-3, y * y * (0.5 - y / 3 + y * y / 4), y - torch.log1p(y))
    series = delta * delta * (0.5 - delta / 6 + delta * delta / 24)
    minus_expm1 = torch.where(delta.abs() < 1e-3, series, delta + torch.expm1(-delta))  # delta - (1 - exp(-delta))
    expected = [
        (gap, torch.exp(-gap), 4e-6),  # a rounded exponent: eps |x|
        (gap, torch.expm1(-gap), 5e-7),
        (gap, minus_expm1[: len(gap)], 2e-6),
        (y, torch.log1p(y), 1.2e-6),
        (y, minus_log1p, 1e-5),
        (delta, -torch.expm1(-delta), 4e-6),
        (delta, minus_expm1, 4e-6),
    ]
    for i, (arguments, exact, allowed) in enumerate(expected):
        computed = torch.tensor([kernels.units(x)[i] for x in arguments.tolist()], dtype=torch.float64)
        assert ((computed - exact) / exact).abs().max() < allowed, i
    assert kernels.units(0) == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3])
@cases.each_divergence(*cases.DIVERGENCES)
def test_student_close_to_teacher(kernels: Kernels, divergence: Options, gap: float) -> None:
    student, teacher = logits(4, 3000, torch.float32, gap)
    out = kernels.distillation(student, teacher, gradients=STUDENT, **divergence)
    assert_close(out, oracle(student, teacher, **divergence), rtol=1e-3)
    assert (out["row_loss"] >= 0).all()
    assert (kernels.distillation(student, student, gradients=STUDENT, **divergence)["row_loss"] == 0).all()


@cases.each_dtype(torch.float32, torch.bfloat16)
@each_mixture(1e-6, 0.05, 0.0901, 0.1, 0.3, 0.5, 0.7, 0.909, 0.95)
def test_weights_of_a_mixture(kernels: Kernels, divergence: Options, dtype: torch.dtype) -> None:
    """On both sides of the weights where the formulas change, for near rows and far ones."""
    for gap in (1e-2, 0.3, 1.0, 2.0, 10.0):
        student, teacher = logits(4, 600, dtype, gap)
        expected = oracle(student, teacher, **divergence)
        for gradients in (BOTH, NEITHER):
            out = kernels.distillation(student, teacher, gradients=gradients, needs_grad=gradients, **divergence)
            assert_close(out, expected, rtol=1e-5 if gap > 0.1 else 1e-3)


@each_mixture(0.0901, 0.1, 0.3, 0.5, 0.7, 0.74, 0.76, 0.9, 0.909)
def test_columns_that_all_differ_as_much(kernels: Kernels, divergence: Options) -> None:
    """So the errors of columns do not cancel."""
    middle = 2 * torch.randn(16, 400, dtype=torch.float64)
    gap = torch.linspace(0.2, 2.0, 16, dtype=torch.float64)[:, None] * torch.where(torch.arange(400) % 2 == 0, 1, -1)
    student, teacher = (middle - gap / 2).float(), (middle + gap / 2).float()
    out = kernels.distillation(student, teacher, gradients=BOTH, **divergence)
    assert_close(out, oracle(student, teacher, **divergence), atol=0)


@cases.each_dtype(torch.float32, torch.bfloat16)
@cases.each_divergence(FORWARD_KL, REVERSE_KL)
def test_loss_without_gradient(both_tiers: Kernels, divergence: Options, dtype: torch.dtype) -> None:
    """One pass gives it where that is accurate: not in near rows, nor where the first maxima are far off."""
    for columns, gap in itertools.product((1203, 20_000), (1.0, 0.1, 0.03, 0.02, 0.015, 1e-2, 1e-3)):
        student = torch.randn(7, columns, dtype=torch.float64)
        teacher = (student + gap * torch.randn(7, columns, dtype=torch.float64)).to(dtype)
        student = student.to(dtype)
        student[3] = teacher[3]
        losses = oracle(student, teacher, **divergence)["row_loss"]
        out = both_tiers.distillation(student, teacher, needs_grad=NEITHER, **divergence)["row_loss"]
        allowed = torch.where(losses < 1e-4, 1e-3, 1e-5) * losses + 1e-9 * (losses < 1e-6)
        assert ((out - losses).abs() <= allowed).all(), f"{columns} columns, {gap}: {out} not {losses}"
        assert (out >= 0).all() and out[3] == 0
    student, teacher = torch.zeros(2, 5, 20_000, dtype=dtype)
    student[0, 7] = teacher[1, 7] = student[2, 11] = 4.0
    teacher[3, 0] = student[4, 1] = -torch.inf
    out = both_tiers.distillation(student, teacher, needs_grad=NEITHER, **divergence)
    assert_close(out, oracle(student, teacher, **divergence), atol=0)


@cases.each_dtype(torch.bfloat16, torch.float64)
def test_long_row(kernels: Kernels, dtype: torch.dtype) -> None:
    """Beyond the last limit of the launch rules, in both accumulation types."""
    student, teacher = logits(1, 65_541, dtype)
    out = kernels.distillation(student, teacher, "jeffreys", gradients=STUDENT)
    assert_close(out, oracle(student, teacher, "jeffreys"), rtol=1e-5, atol=0)


@cases.each_divergence(*cases.DIVERGENCES)
def test_confident_rows(kernels: Kernels, divergence: Options) -> None:
    """One or several columns have nearly all of p or q. A constant above all of one side's logits changes nothing."""
    for columns in (40, 3001):
        student, teacher = logits(4, columns, torch.float32)
        student[:2, 3] += 18.0
        teacher[1:3, columns - 2] += 18.0
        student[3, [1, columns - 1]] = 20.0
        teacher[3, columns // 2] = 17.0
        for moved in (student, student + 1e4):
            expected = oracle(moved, teacher, **divergence)
            out = kernels.distillation(moved, teacher, gradients=BOTH, **divergence)
            assert_losses(out["row_loss"], expected["row_loss"])
            for name in ("grad_student", "grad_teacher"):
                cases.assert_gradient(out[name], expected[name], rtol=1e-3, atol=1e-15)


@cases.each_dtype(torch.float32, torch.bfloat16)
@cases.each_divergence(FORWARD_KL, REVERSE_KL, EVEN_JSD, {"divergence": "skew_reverse_kl", "parameter": 0.1})
def test_confident_long_rows(both_tiers: Kernels, divergence: Options, dtype: torch.dtype) -> None:
    """A thread reads the column that has nearly all after many others, whose share keeps its digits."""
    student, teacher = logits(4, 20_000, torch.float64, 0.3)
    for row, logit in enumerate((16.0, 19.0, 22.0, 28.0)):
        student[row, 17_003], teacher[row, 17_003] = logit + row % 2, logit
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = oracle(student, teacher, **divergence)
    out = both_tiers.distillation(student, teacher, gradients=STUDENT, **divergence)
    alone = both_tiers.distillation(student, teacher, needs_grad=NEITHER, **divergence)
    for outputs in (out, alone):
        assert_losses(outputs["row_loss"], expected["row_loss"], atol=1e-10)
    rtol = 1e-3 if dtype == torch.float32 else 4e-3
    cases.assert_gradient(out["grad_student"], expected["grad_student"], rtol, atol=0)


@cases.each_dtype(*cases.DTYPES)
@cases.each_divergence(FORWARD_KL, EVEN_JSD)
def test_masked_columns(kernels: Kernels, divergence: Options, dtype: torch.dtype) -> None:
    """Any number far below the other logits excludes a column; a thread may read the others late."""
    masks = [mask for mask in (-1e4, -6e4, -1e9) if mask >= torch.finfo(dtype).min]
    for columns, mask in itertools.product((64, 1500), (*masks, torch.finfo(dtype).min, -torch.inf)):
        student, teacher = logits(3, columns, dtype)
        for excluded in (slice(0, columns // 2), slice(columns // 2, None), slice(0, columns - 1)):
            s, t = student.clone(), teacher.clone()
            s[:, excluded] = t[:2, excluded] = mask  # in row 2 the teacher has these columns
            rows = slice(0, 3 if mask > -1e30 else 2)  # beyond, the divergence of row 2 is no float
            expected = oracle(s[rows], t[rows], **divergence)
            assert expected["row_loss"].isfinite().all()
            expected = {name: tensor.nan_to_num(0) for name, tensor in expected.items()}  # derivatives at p = q = 0
            for options in ({"gradients": STUDENT}, {"needs_grad": NEITHER}):
                out = kernels.distillation(s, t, **options, **divergence)
                assert_close(cases.rows_of(out, rows), expected)


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
    assert_losses(entropies, reference.token_stats(student, teacher, labels)[2], atol=5e-7)
