"""The float64 reference against PyTorch, mpmath and values by hand, without kernels."""

from __future__ import annotations

import inspect
import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import ALL_DIVERGENCES, DIVERGENCES, REDUCTIONS, Divergence, make_pair, run
from oracle import TERMS
from torch.distributions import Categorical
from torch.distributions.kl import kl_divergence
from torch.testing import assert_close

import kldiv_ext
from kldiv_ext import reference
from kldiv_ext._library import DIVERGENCES as PARAMETER_NAMES

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:size_average and reduce args")

# A reference value is right to rounding, whose size is that of its largest terms.
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def row_losses(divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return reference.distillation_loss(student, teacher, **divergence.options, reduction="none")


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_tables_agree() -> None:
    """C++, Python, the oracle and the tests know the same divergences with the same parameters."""
    assert kldiv_ext.DIVERGENCES == tuple(reference.DIVERGENCES) == tuple(TERMS) == tuple(PARAMETER_NAMES)
    options = inspect.signature(kldiv_ext.distillation_loss).parameters
    for name, formula in reference.DIVERGENCES.items():
        parameter = PARAMETER_NAMES[name]
        assert list(inspect.signature(formula).parameters)[2:] == ([parameter] if parameter else [])
        assert not parameter or parameter in options
        assert f"- ``{name}``: " in kldiv_ext.distillation_loss.__doc__, "not in the docstring's list"


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_against_mpmath(divergence: Divergence) -> None:
    """The sum over columns in 50 digits, from logits through log-softmax."""
    for distance in (2.0, 1e-2):
        student, teacher = make_pair(6, dtype=torch.float64, distance=distance)
        temperature = 1.7
        with mpmath.workdps(50):
            rows = []
            for row in (teacher, student):
                scaled = [mpmath.mpf(z) / temperature for z in row.tolist()]
                log_sum = mpmath.log(mpmath.fsum(mpmath.exp(z) for z in scaled))
                rows.append([z - log_sum for z in scaled])
            term, parameter = TERMS[divergence.name], divergence.parameter
            expected = mpmath.fsum(term(lp, lq, parameter) for lp, lq in zip(*rows, strict=True))
        result = reference.distillation_loss(student, teacher, **divergence.options, temperature=temperature)
        assert_close(result.item(), float(expected), **EXACT)


# {divergence: (value for p = (1/2, 1/2) and q = (9/10, 1/10), largest value)}. The mean of p and q is (7/10, 3/10).
BY_HAND = {
    Divergence("forward_kl"): (math.log(25 / 9) / 2, math.inf),
    Divergence("reverse_kl"): (0.9 * math.log(9 / 5) + 0.1 * math.log(1 / 5), math.inf),
    Divergence("jeffreys"): (0.4 * math.log(9 / 5) + 0.4 * math.log(5), math.inf),
    Divergence("jsd", 0.5): (math.log(25 / 21) / 4 + 0.45 * math.log(9 / 7) + 0.05 * math.log(1 / 3), math.log(2)),
    Divergence("skew_forward_kl", 0.1): (math.log(25 / 43) / 2 + math.log(25 / 7) / 2, math.log(10)),
    Divergence("skew_reverse_kl", 0.1): (0.9 * math.log(5 / 3) + 0.1 * math.log(5 / 23), math.log(10)),
    Divergence("total_variation"): (0.4, 1.0),
    Divergence("alpha", 0.5): (4 * (1 - math.sqrt(0.45) - math.sqrt(0.05)), 4.0),  # 4 · squared Hellinger distance
}


@pytest.mark.parametrize("divergence", BY_HAND, ids=str)
def test_by_hand(divergence: Divergence) -> None:
    """An asymmetric pair distinguishes the arguments. Disjoint supports give the largest value."""
    pairs = (logits(0.9, 0.1), logits(0.5, 0.5)), (logits(1.0, 0.0), logits(0.0, 1.0))
    for pair, expected in zip(pairs, BY_HAND[divergence], strict=True):
        assert_close(row_losses(divergence, *pair).item(), expected, **EXACT)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_against_torch(temperature: float) -> None:
    student, teacher = make_pair(4, 30, dtype=torch.float64)
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    p, q = Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)
    options = {"temperature": temperature, "reduction": "batchmean"}
    forward = reference.distillation_loss(student, teacher, **options)
    assert_close(forward, F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"), **EXACT)
    assert_close(forward, kl_divergence(p, q).mean(), **EXACT)
    reverse = reference.distillation_loss(student, teacher, divergence="reverse_kl", **options)
    assert_close(reverse, kl_divergence(q, p).mean(), **EXACT)
    squared = reference.distillation_loss(student, teacher, **options, scale_by_temperature_squared=True)
    assert_close(squared, forward * temperature**2)


@pytest.mark.parametrize("divergence", ALL_DIVERGENCES, ids=str)
def test_zero_at_equality_positive_elsewhere_invariant_to_shifts(divergence: Divergence) -> None:
    student, teacher = make_pair(50, 30, dtype=torch.float64)
    assert_close(row_losses(divergence, teacher, teacher), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-14)
    result = run(reference.distillation_loss, student, teacher, **divergence.options, reduction="none")
    if str(divergence) in ("skew_forward_kl-1", "skew_reverse_kl-1"):  # the mixture is the first argument
        assert not any(values.any() for values in (result.loss, *result.gradients))
    else:
        assert (result.loss > 1e-3).all()
    shifted = row_losses(divergence, student + 5, teacher - 3)
    assert_close(shifted, result.loss, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("one, other", [
    (Divergence("forward_kl"), Divergence("reverse_kl")),
    (Divergence("jeffreys"), Divergence("jeffreys")),
    (Divergence("jsd", 0.3), Divergence("jsd", 0.7)),
    (Divergence("skew_forward_kl", 0.3), Divergence("skew_reverse_kl", 0.3)),
    (Divergence("total_variation"), Divergence("total_variation")),
    (Divergence("alpha", 0.3), Divergence("alpha", 0.7)),
], ids=str)  # fmt: skip
def test_exchanged_arguments(one: Divergence, other: Divergence) -> None:
    student, teacher = make_pair(50, 30, dtype=torch.float64)
    assert_close(row_losses(one, student, teacher), row_losses(other, teacher, student), **EXACT)


LIMITS = {
    ("jsd", 0.0): "forward_kl",
    ("jsd", 1.0): "reverse_kl",
    ("skew_forward_kl", 0.0): "forward_kl",
    ("skew_reverse_kl", 0.0): "reverse_kl",
    ("alpha", 0.0): "reverse_kl",
    ("alpha", 1.0): "forward_kl",
}


@pytest.mark.parametrize("name, end", LIMITS, ids=str)
def test_ends_of_the_parameter(name: str, end: float) -> None:
    """The divergence that it is there. skew and alpha are continuous there; the formula of jsd tends to 0."""
    student, teacher = make_pair(50, 30, dtype=torch.float64)
    at_end = row_losses(Divergence(name, end), student, teacher)
    assert_close(at_end, row_losses(Divergence(LIMITS[name, end]), student, teacher), **EXACT)
    near = row_losses(Divergence(name, abs(end - 1e-7)), student, teacher)
    if name == "jsd":  # beta or 1 - beta times the named divergence; TRL and Liger define the ends alike
        near = near / 1e-7
    assert_close(near, at_end, rtol=1e-4, atol=0)


def test_reductions_and_positions() -> None:
    """Every denominator, written out."""
    student, teacher = make_pair(2, 3, 30, dtype=torch.float64)
    each = reference.distillation_loss(student, teacher, reduction="none")
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    weight = torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.25, 1.0]])

    def loss(**options: object) -> torch.Tensor:
        return reference.distillation_loss(student, teacher, **options)

    assert_close(loss(), each.sum() / 6)
    assert_close(loss(reduction="sum"), each.sum())
    assert_close(loss(reduction="batchmean"), each.sum() / 2)
    assert_close(loss(labels=labels), (each[0, 0] + each[0, 2] + each[1, 0] + each[1, 1]) / 4)
    assert_close(loss(labels=labels, ignore_index=3), (each.sum() - each[1, 0]) / 5)
    assert_close(loss(mask=mask), (each.sum() - each[1, 0]) / 5)
    assert_close(loss(labels=labels, mask=mask), (each[0, 0] + each[0, 2] + each[1, 1]) / 3)
    assert_close(loss(weight=weight), (each * weight).sum() / weight.sum().double())
    assert_close(
        loss(labels=labels, mask=mask, weight=weight),
        (0.5 * each[0, 0] + 2 * each[0, 2] + 0.25 * each[1, 1]) / 2.75,
    )
    assert_close(loss(mask=mask, reduction="batchmean"), (each.sum() - each[1, 0]) / 2)
    assert_close(loss(mask=mask, reduction="none"), each * mask)
    assert_close(loss(num_items=7), each.sum() / 7)
    assert_close(loss(labels=labels, num_items=torch.tensor(7)), loss(labels=labels) * 4 / 7)
    assert loss(num_items=0) == 0 and loss(mask=torch.zeros_like(mask)) == 0
    assert_close(reference.distillation_loss(student[0, 0], teacher[0, 0], reduction="batchmean"), each[0, 0])
    for empty in (student[:0], student[:, :0]):
        for reduction in ("mean", "batchmean", "sum"):
            assert reference.distillation_loss(empty, empty, reduction=reduction) == 0


def test_no_items_with_an_infinite_row() -> None:
    """0, not 0 · inf."""
    student, teacher = logits(0.0, 1.0), logits(0.5, 0.5)
    assert reference.distillation_loss(student, teacher) == math.inf
    result = run(reference.distillation_loss, student, teacher, num_items=0)
    assert result.loss == 0 and not any(g.any() for g in result.gradients)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kl_div(reduction: str, log_target: bool) -> None:
    student, teacher = make_pair(3, 4, 20, dtype=torch.float64)
    target = teacher.log_softmax(-1) if log_target else teacher.softmax(-1)
    tensors, options = (student.log_softmax(-1), target), {"reduction": reduction, "log_target": log_target}
    assert_close(run(reference.kl_div, *tensors, **options), run(F.kl_div, *tensors, **options), **EXACT)


@pytest.mark.parametrize("reduce", [None, False, True])
def test_kl_div_deprecated_arguments(reduce: bool | None) -> None:
    student, teacher = make_pair(3, 20, dtype=torch.float64)
    for size_average in (None, False, True):
        arguments = student.log_softmax(-1), teacher.softmax(-1), size_average, reduce
        assert_close(reference.kl_div(*arguments), F.kl_div(*arguments))


def test_kl_div_at_zero() -> None:
    """0 where the target is 0, +inf where only exp(input) is 0."""
    log_q = torch.tensor([-math.inf, -1.0, -math.inf], dtype=torch.float64)
    p = torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64)
    for target, log_target in ((p, False), (p.log(), True)):
        assert reference.kl_div(log_q, target, reduction="none", log_target=log_target).tolist() == [0, 0, math.inf]
