"""csrc/cuda/rows.h: losses, gradients and statistics of rows, whatever the options and whatever is in the rows."""

import pytest
import torch

from emulation import cases
from emulation.cases import FORWARD_KL, JSD, Options, logits, oracle
from emulation.harness import BOTH, STUDENT, Kernels, accumulation_dtype
from kldiv_ext import reference


@cases.each_dtype(*cases.DTYPES)
@cases.each_divergence(*cases.DIVERGENCES)
def test_loss_and_gradients(kernels: Kernels, divergence: Options, dtype: torch.dtype) -> None:
    for i, columns in enumerate(cases.COLUMNS):
        kernels.set_order(*cases.ORDERS[i % len(cases.ORDERS)])
        cases.check(kernels, *logits(2, columns, dtype), temperature=1.5, scale=0.7, **divergence)


OPTIONS: dict[str, Options] = {
    "hard labels": {"hard_scale": 0.7},
    "hard labels, temperature": {"hard_scale": 0.7, "temperature": 2.5, "scale": 0.3},
    "hard labels alone": {"hard_scale": 1.3, "scale": 0.0},
    "common scale": {"logit_scale": (0.4, 0.4), "temperature": 0.7, "hard_scale": 0.5},
    "two scales": {"logit_scale": (0.4, 1.7), "temperature": 0.7, "hard_scale": 0.5},
    "softcap": {"logit_softcap": (2.0, 2.0), "temperature": 1.5, "hard_scale": 0.5},
    "softcap of one side": {"logit_softcap": (0.0, 1.5), "logit_scale": (1.0, 0.5)},
    "padding": {"valid_vocab": 25, "hard_scale": 0.5},
}


@cases.each_dtype(*cases.DTYPES)
@cases.each_divergence(FORWARD_KL, JSD)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(kernels: Kernels, option: str, divergence: Options, dtype: torch.dtype) -> None:
    kernels.set_order("random", 3)
    for columns in (33, 300):
        student, teacher = logits(3, columns, dtype)
        student[:, OPTIONS[option].get("valid_vocab", columns) :] = torch.nan  # padding is not read
        options = {"labels": torch.tensor([0, 24, 11]), **divergence, **OPTIONS[option]}
        both = cases.check(kernels, student, teacher, **options)
        options |= {"row_constants": both["row_constants"], "grad_output": torch.ones_like(both["loss"])}
        for layout in (torch.clone, lambda x: x.T.contiguous().T):
            over = kernels.distillation(layout(student), teacher, gradients=BOTH, in_place=True, **options)
            assert torch.equal(over["grad_student"], both["grad_student"])
            assert torch.equal(over["grad_teacher"], both["grad_teacher"])


def test_labels_out_of_range(kernels: Kernels) -> None:
    """NaN, in that row alone."""
    student, teacher = logits(4, 20, torch.float32)
    for label in (-1, 20, 2**32, 2**40, -(2**40)):
        labels = torch.tensor([3, label, 0, 19])
        result = kernels.distillation(student, teacher, gradients=STUDENT, hard_scale=0.5, labels=labels)
        for name in ("row_loss", "grad_student"):
            rows = result[name].reshape(4, -1).isnan()
            assert rows[1].all() and not rows[[0, 2, 3]].any(), name


@cases.each_dtype(*cases.DTYPES)
def test_rows_that_do_not_count_are_not_read(kernels: Kernels, dtype: torch.dtype) -> None:
    student, teacher = logits(6, 77, dtype)
    row_scale = torch.tensor([1, 0, 2, 0, 0, 0.5], dtype=accumulation_dtype(student))
    skipped = row_scale == 0
    student[skipped], teacher[skipped] = torch.nan, torch.inf
    expected = oracle(student, teacher, row_scale=row_scale)
    plain = kernels.distillation(student, teacher, gradients=BOTH)
    out = kernels.distillation(student, teacher, row_scale=row_scale, gradients=BOTH, reduce=True)
    later = {"row_constants": out["row_constants"], "grad_output": torch.full_like(out["loss"], 2), "gradients": BOTH}
    backward = kernels.distillation(student, teacher, row_scale=row_scale, **later)
    for result, factor in ((out, 1), (backward, 2)):
        for name in ("grad_student", "grad_teacher"):
            assert (result[name][skipped] == 0).all()
            cases.assert_gradient(result[name], factor * expected[name])
    assert (out["row_loss"][skipped] == 0).all() and out["loss"].isfinite()
    assert torch.equal(out["row_loss"][~skipped], (plain["row_loss"] * row_scale)[~skipped])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_infinite_factors_without_labels(kernels: Kernels, bad: float) -> None:
    """0 times infinity is not a weight of the cross entropy: there are no labels to read."""
    student, teacher = logits(2, 77, torch.float32)
    factors = torch.tensor([bad, 1.0])
    options = {"gradients": STUDENT, **JSD}
    forward = kernels.distillation(student, teacher, row_scale=factors, **options)
    plain = kernels.distillation(student, teacher, **options)
    later = {"row_constants": plain["row_constants"], "grad_output": factors}
    backward = kernels.distillation(student, teacher, **later, **options)
    assert not forward["row_loss"][0].isfinite() and forward["row_loss"][1] == plain["row_loss"][1]
    for result in (forward, backward):
        assert not result["grad_student"][0].isfinite().any()
        assert torch.equal(result["grad_student"][1], plain["grad_student"][1])


@cases.each_dtype(*cases.DTYPES)
def test_every_temperature_ends(kernels: Kernels, dtype: torch.dtype) -> None:
    """Python refuses a negative temperature; a kernel that gets one must not loop for ever."""
    student, teacher = logits(2, 300, dtype)
    for temperature in (-1.0, torch.nan, torch.inf, 1e-38):
        kernels.distillation(100 * student, 100 * teacher, gradients=STUDENT, temperature=temperature, **JSD)


def test_infinities_and_nan(kernels: Kernels) -> None:
    inf = torch.inf
    student, teacher = logits(8, 40, torch.float32)
    student[1, 3] = torch.nan
    teacher[2, 5] = inf
    student[3] = -inf
    student[4, 7] = teacher[4, 7] = -inf  # p = q = 0
    student[5, 0] = -inf  # q = 0 < p
    teacher[6, 39] = -inf  # p = 0 < q
    clean = [0, 4, 7]
    for divergence in cases.DIVERGENCES:
        out = kernels.distillation(student, teacher, gradients=BOTH, **divergence)
        expected = oracle(student[clean], teacher[clean], **divergence)
        assert expected["row_loss"].isfinite().all()
        expected = {name: tensor.nan_to_num(0) for name, tensor in expected.items()}  # derivatives at p = q = 0
        cases.assert_close(cases.rows_of(out, clean), expected)
        assert (out["grad_student"][4, 7], out["grad_teacher"][4, 7]) == (0, 0)
        assert all(out[name][1:4].isnan().all() for name in ("row_loss", "grad_student", "grad_teacher"))
    q_zero, p_zero = (out := kernels.distillation(student, teacher, gradients=STUDENT))["row_loss"][5:7]
    assert q_zero == inf and p_zero < inf
    q_minus_p = student[5].double().softmax(-1) - teacher[5].double().softmax(-1)
    cases.assert_gradient(out["grad_student"][5:6], q_minus_p[None])
    q_zero, p_zero = (out := kernels.distillation(student, teacher, "reverse_kl", gradients=STUDENT))["row_loss"][5:7]
    assert q_zero < inf and p_zero == inf and out["grad_student"][6].isnan().all()


@cases.each_dtype(*cases.DTYPES)
def test_several_blocks_for_a_row(kernels: Kernels, dtype: torch.dtype) -> None:
    """In a later backward over few rows, where nothing is summed; to the bits of one block."""
    rows, columns, valid = 3, 5011, 5000
    assert kernels.row_shape(rows, valid, dtype, sums=False)[3] > 1
    student, teacher = logits(rows, columns, dtype)
    options: Options = {"hard_scale": 0.4, "labels": torch.tensor([0, 1, valid - 1]), "valid_vocab": valid, **JSD}
    options["row_scale"] = torch.tensor([1.0, 0.0, 2.0], dtype=accumulation_dtype(student))
    first = cases.check(kernels, student, teacher, **options)
    for order in cases.ORDERS[1:]:
        kernels.set_order(*order)
        cases.assert_same(cases.check(kernels, student, teacher, **options), first)


def test_more_rows_than_blocks(kernels: Kernels) -> None:
    """Almost none of them count, or it would take minutes."""
    rows = 65_536 + 10
    student, teacher = logits(rows, 2, torch.float32)
    row_scale = torch.zeros(rows)
    counting = torch.tensor([0, 9, 65_535, 65_536, rows - 1])
    row_scale[counting] = 1
    out = kernels.distillation(student, teacher, row_scale=row_scale, gradients=STUDENT, reduce=True)
    alone = kernels.distillation(student[counting], teacher[counting], gradients=STUDENT)
    cases.assert_same(cases.rows_of(out, counting), alone, "row_loss", "grad_student")
    assert torch.count_nonzero(out["grad_student"]) == torch.count_nonzero(alone["grad_student"])
    cases.assert_losses(out["loss"], alone["row_loss"].double().sum(), rtol=1e-7, atol=0)


def test_no_rows(kernels: Kernels) -> None:
    assert kernels.distillation(torch.empty(0, 4), torch.empty(0, 4), reduce=True)["loss"] == 0


@cases.each_dtype(*cases.DTYPES)
def test_token_stats(kernels: Kernels, dtype: torch.dtype) -> None:
    other: Options = {"temperature": 1.5, "logit_scale": (0.5, 2.0), "logit_softcap": (0.0, 3.0)}
    for i, columns in enumerate(cases.COLUMNS):
        kernels.set_order(*cases.ORDERS[i % len(cases.ORDERS)])
        student, teacher = logits(5, columns, dtype)
        teacher[1] = student[1]  # they agree
        labels = torch.tensor([0, columns - 1, columns // 2, 0, 0])
        counts = torch.tensor([1, 1, 1, 0, 1], dtype=accumulation_dtype(student))
        for options in ({}, other):
            stats = kernels.token_stats(student, teacher, labels, counts, **options)
            expected = reference.token_stats(student, teacher, labels, mask=counts != 0, **options)
            for value, exact in zip(stats.unbind(-1), expected, strict=True):
                cases.assert_losses(value, exact, atol=20 * cases.LOSS_TOLERANCE[value.dtype])
            assert torch.equal(stats[:, -1] != 0, expected[-1])
