"""math.h, divergences.h and row_state.h from the inside, against mpmath: accuracy, special values, signs, merging.

The functions come from a module per instruction set (tests/whitebox).
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
from builds import build, load_module, run
from cases import DIVERGENCES, ENDPOINTS, LOPSIDED, PARAMETERS, Divergence
from oracle import TERMS, need_isa

INF, NAN = math.inf, math.nan
Array = np.ndarray[Any, Any]
DType = type[np.floating[Any]]


@functools.cache
def load(isa: str) -> ModuleType:
    need_isa(isa)
    return load_module("whitebox", "whitebox", f"whitebox_{isa}")


class Lane(NamedTuple):
    """The functions for one type: a scalar, or a vector of an instruction set."""

    functions: Any
    dtype: DType

    @property
    def eps(self) -> float:
        return float(np.finfo(self.dtype).eps)

    def __call__(self, function: str, values: Any) -> Array:
        return getattr(self.functions, function)(np.asarray(values, self.dtype))

    def divergence(self, divergence: Divergence, lp: Array, lq: Array) -> tuple[Array, Array, Array]:
        """(term, g_q, g_p) of columns."""
        return self.functions.divergence(divergence.name, divergence.parameter or 0.0, lp, lq)


def lane_of(request: pytest.FixtureRequest) -> Lane:
    isa, kind = request.param
    return Lane(getattr(load(isa), kind), np.dtype(kind.removesuffix("_simd")).type)


SCALARS = [("portable", "float32"), ("portable", "float64")]
VECTORS = [(isa, f"{dtype}_simd") for isa in ("portable", "avx2", "avx512") for dtype in ("float32", "float64")]
lane = pytest.fixture(params=SCALARS + VECTORS, ids="-".join, name="lane")(lane_of)
scalar = pytest.fixture(params=SCALARS, ids="-".join, name="scalar")(lane_of)  # row states are merged as scalars


# ---------------------------------------------------------------- accuracy of functions


def relative_errors(values: Array, exact: list[Any]) -> Array:
    return np.array([float(abs(mpmath.mpf(float(v)) - x) / abs(x)) for v, x in zip(values, exact, strict=True)])


def spread(dtype: DType, low: float, high: float) -> Array:
    """Evenly in the logarithm."""
    return np.exp(np.linspace(math.log(low), math.log(high), 1500)).astype(dtype)


def small(dtype: DType) -> float:
    """The square of this number is still a normal one."""
    return math.sqrt(float(np.finfo(dtype).smallest_normal)) * 10


def exponents(dtype: DType) -> Array:
    """Arguments of 2^x with a normal result."""
    limit = 126 if dtype is np.float32 else 1022
    halves = np.arange(-limit, limit) + 0.5  # where the rounding to the nearest power of two switches
    grid = spread(dtype, 1e-6, limit)
    return np.clip(np.concatenate([-grid, grid, halves]), -limit, limit).astype(dtype)


def gaps(dtype: DType) -> Array:
    return np.concatenate([spread(dtype, small(dtype), 1e4), np.linspace(0.1, 3, 1000)]).astype(dtype)


def above_minus_one(dtype: DType) -> Array:
    near_minus_one = dtype(-1) + spread(dtype, float(np.finfo(dtype).eps), 0.5)  # 1 + y is exact
    reduced = np.linspace(-0.6, 1.2, 1000)  # across the steps of the reduction
    below_zero, above_zero = -spread(dtype, small(dtype), 0.9), spread(dtype, small(dtype), 1e30)
    return np.concatenate([below_zero, near_minus_one, above_zero, reduced]).astype(dtype)


def positive(dtype: DType) -> Array:
    info = np.finfo(dtype)
    near_one = 1 + np.linspace(-0.6, 1.2, 1000)
    return np.concatenate([spread(dtype, float(info.tiny), float(info.max) / 2), near_one]).astype(dtype)


def capped(dtype: DType) -> Array:
    """On both sides of 0, until the slope is hardly a normal number."""
    grid = spread(dtype, small(dtype), 40)
    return np.concatenate([-grid, grid]).astype(dtype)


class Claim(NamedTuple):
    """The relative error of a function, as the head of math.h promises it, where the exact result is not 0."""

    exact: Callable[[Any], Any]
    arguments: Callable[[DType], Array]
    float32: float = 4e-7
    float64: float = 1e-15
    by_argument: bool = False  # plus eps |x|
    where: Callable[[Array], Array] = lambda x: x != 0


def has_normal_exp(x: Array) -> Array:
    return x < (87 if x.dtype == np.float32 else 708)


CLAIMS = {
    "exp2": Claim(lambda x: mpmath.power(2, x), exponents),
    "exp2_floored": Claim(lambda x: mpmath.power(2, x), exponents),
    "exp": Claim(mpmath.exp, lambda dtype: exponents(dtype) * math.log(2) * 0.999, by_argument=True),
    "exp_any": Claim(mpmath.exp, lambda dtype: exponents(dtype) * math.log(2) * 0.999, by_argument=True),
    "log": Claim(mpmath.log, positive, where=lambda x: x != 1),
    "decay_ratio": Claim(lambda x: mpmath.exp(-x), gaps, by_argument=True, where=has_normal_exp),
    "decay_expm1": Claim(lambda x: mpmath.expm1(-x), gaps),
    "decay_excess": Claim(lambda x: x + mpmath.expm1(-x), gaps),
    "log1p": Claim(mpmath.log1p, above_minus_one),
    "log1p_shortfall": Claim(lambda x: x - mpmath.log1p(x), above_minus_one, where=lambda y: y < 0),
    "log1p_shortfall > 0": Claim(lambda x: x - mpmath.log1p(x), above_minus_one, 1e-6, 2e-15, where=lambda y: y > 0),
    "softcap": Claim(mpmath.tanh, capped),
    "softcap_slope": Claim(lambda x: mpmath.sech(x) ** 2, capped, by_argument=True),
}


@functools.cache
def exact_values(name: str, dtype: DType) -> tuple[Array, list[Any]]:
    """(arguments, results)"""
    x = CLAIMS[name].arguments(dtype).astype(dtype)
    x = x[CLAIMS[name].where(x)]
    with mpmath.workprec(1100):  # digits for both terms of `excess` where they cancel
        return x, [CLAIMS[name].exact(mpmath.mpf(float(v))) for v in x]


@pytest.mark.parametrize("name", CLAIMS)
def test_relative_error(lane: Lane, name: str) -> None:
    claim = CLAIMS[name]
    x, exact = exact_values(name, lane.dtype)
    errors = relative_errors(lane(name.split()[0], x), exact)
    allowed = getattr(claim, lane.dtype.__name__) + claim.by_argument * lane.eps * np.abs(x)
    worst = np.argmax(errors / allowed)
    assert errors[worst] <= allowed[worst], f"{errors[worst]:.2e} at {x[worst]!r}"


# argument: result
SPECIAL = {
    "exp2": {0: 1, -INF: 0, NAN: NAN, 1: 2, -1: 0.5},
    "exp2_floored": {0: 1, -INF: "tiny", NAN: NAN},
    "exp": {0: 1, -INF: 0, NAN: NAN, -1e30: "tiny"},  # a probability is 0 only where its logarithm is -inf
    "exp_any": {0: 1, -INF: 0, NAN: NAN, -1e30: 0, 1e30: INF, INF: INF},
    "log": {1: 0, 0: -INF, -1: NAN, -INF: NAN, INF: INF, NAN: NAN},
    "softcap": {0: 0, INF: 1, -INF: -1, NAN: NAN, 1e30: 1},
    "softcap_slope": {0: 1, INF: 0, -INF: 0, NAN: NAN},
    "decay_ratio": {0: 1, INF: 0, NAN: NAN, 1e30: 0},
    "decay_expm1": {0: 0, INF: -1, NAN: NAN, 1e30: -1},
    "decay_excess": {0: 0, INF: INF, NAN: NAN, 1e30: 1e30},
    "log1p": {0: 0},
    "log1p_shortfall": {0: 0, NAN: NAN},
}


@pytest.mark.parametrize("function", SPECIAL)
def test_special_values(lane: Lane, function: str) -> None:
    for argument, result in SPECIAL[function].items():
        expected = np.finfo(lane.dtype).smallest_normal if result == "tiny" else lane.dtype(result)
        np.testing.assert_array_equal(lane(function, [argument]), [expected], err_msg=f"{function}({argument})")


def test_subnormal_arguments(lane: Lane) -> None:
    x = np.array([1, 2, 3, 1000, 2**20 + 1]) * np.finfo(lane.dtype).smallest_subnormal
    np.testing.assert_allclose(lane("log", x), np.log(x.astype(np.longdouble)).astype(lane.dtype), rtol=4 * lane.eps)
    np.testing.assert_array_equal(lane("decay_expm1", x), -x)
    np.testing.assert_array_equal(lane("decay_excess", x), 0 * x)
    np.testing.assert_array_equal(lane("log1p", -x), -x)
    np.testing.assert_array_equal(lane("log1p_shortfall", -x), 0 * x)


def test_signs_and_monotony(lane: Lane) -> None:
    """Divergences are never negative because of these."""
    x = np.sort(gaps(lane.dtype))
    for function in ("decay_excess", "log1p_shortfall"):
        assert (lane(function, x) >= 0).all()
    assert (lane("log1p_shortfall", -x[x < 0.99]) >= 0).all()
    expm1 = lane("decay_expm1", x)
    assert (expm1 < 0).all() and (expm1 >= -1).all()
    assert (np.diff(expm1) <= lane.eps).all()


# ---------------------------------------------------------------- columns


def columns(dtype: DType) -> tuple[Array, Array]:
    """(log p, log q): gaps from 1e-5 to 25, both ways, at large and small probabilities."""
    generator = np.random.default_rng(0)
    gap = np.exp(np.linspace(math.log(1e-5), math.log(25), 160)) * np.where(np.arange(160) % 2, 1, -1)
    upper = -generator.uniform(0, 12, 160)
    lp = np.where(gap > 0, upper, upper + gap).astype(dtype)
    return lp, np.where(gap > 0, upper - gap, upper).astype(dtype)


def test_pair(lane: Lane) -> None:
    lp, lq = columns(lane.dtype)
    larger, gap, ratio, expm1, excess, teacher_is_larger = lane.functions.make_pair(lp, lq)
    np.testing.assert_array_equal(teacher_is_larger, lp >= lq)
    np.testing.assert_array_equal(gap, np.abs(lp - lq))
    upper = np.maximum(lp, lq)
    exact = np.exp(upper.astype(np.longdouble))
    assert (np.abs(larger / exact - 1) <= 4 * lane.eps + 0.5 * lane.eps * np.abs(upper)).all()
    for value, function in ((ratio, "decay_ratio"), (expm1, "decay_expm1"), (excess, "decay_excess")):
        np.testing.assert_allclose(value, lane(function, gap), rtol=lane.eps)


def test_pair_with_zeros(lane: Lane) -> None:
    lp, lq = np.array([[-INF, -INF], [-INF, -1], [-1, -INF], [-1, -1]], lane.dtype).T
    larger, gap, ratio, expm1, excess, _ = lane.functions.make_pair(lp, lq)
    assert larger[0] == 0 and gap[0] == expm1[0] == excess[0] == 0, "p = q = 0: a gap of 0, not NaN"
    assert (ratio == [1, 0, 0, 1]).all()
    assert (gap[1:3] == INF).all() and (expm1[1:3] == -1).all() and (excess[1:3] == INF).all()
    assert gap[3] == expm1[3] == excess[3] == 0


@functools.cache
def exact_columns(divergence: Divergence, dtype: DType) -> Any:
    """(term, g_q, g_p) of `columns`, differentiated numerically in mpmath."""
    lp, lq = columns(dtype)
    with mpmath.workdps(40):
        parameter = mpmath.mpf(divergence.parameter or 0)

        def formula(p: Any, q: Any) -> Any:
            return TERMS[divergence.name](p, q, parameter)

        points = [(mpmath.mpf(float(p)), mpmath.mpf(float(q))) for p, q in zip(lp, lq, strict=True)]
        step, orders = mpmath.mpf(10) ** -14, ((0, 0), (0, 1), (1, 0))
        rows = [[mpmath.diff(formula, at, order, h=step) for order in orders] for at in points]
        return np.array(rows, dtype=object).T


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *LOPSIDED], ids=str)
def test_divergence(lane: Lane, divergence: Divergence) -> None:
    lp, lq = columns(lane.dtype)
    computed, expected = lane.divergence(divergence, lp, lq), exact_columns(divergence, lane.dtype)
    for name, values, exact in zip(("term", "g_q", "g_p"), computed, expected, strict=True):
        errors = relative_errors(values, list(exact))
        allowed = lane.eps * (20 + np.abs(np.minimum(lp, lq)))  # exp's error grows with its argument
        worst = np.argmax(errors / allowed)
        where = f"{name}: {errors[worst] / lane.eps:.1f} eps at {lp[worst]}, {lq[worst]}"
        assert errors[worst] <= allowed[worst], where


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *LOPSIDED, *ENDPOINTS], ids=str)
def test_terms_are_not_negative_and_0_at_equality(lane: Lane, divergence: Divergence) -> None:
    lp = np.concatenate([np.tile(columns(lane.dtype)[0], 20), -np.linspace(0, 80, 3000)]).astype(lane.dtype)
    generator = np.random.default_rng(1)
    gap = generator.normal(size=lp.size) * np.exp(generator.uniform(-20, 4, lp.size))
    lq = np.minimum(lp - gap, 0).astype(lane.dtype)
    term, grad_q, grad_p = lane.divergence(divergence, lp, lq)
    assert (term >= 0).all()
    # A term is homogeneous in p and q, so p dl/dp + q dl/dq = l.
    size = np.exp(np.maximum(lp, lq)) * (1 + np.abs(lp - lq))
    assert (np.abs(grad_q + grad_p - term) <= 20 * lane.eps * size).all()
    for values in lane.divergence(divergence, lp, lp):
        assert not values.any()


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *LOPSIDED, *ENDPOINTS], ids=str)
def test_zeros(lane: Lane, divergence: Divergence) -> None:
    """p = q = 0: nothing at all. One of them 0: the limit of the formula, never NaN."""
    zero = np.full(3, -INF, lane.dtype)
    for values in lane.divergence(divergence, zero, zero):
        assert not values.any() and not np.isnan(values).any()
    positive = np.array([-0.5, -3, -20], lane.dtype)
    for lp, lq in ((positive, zero), (zero, positive)):
        limits = lane.divergence(divergence, lp, lq)
        nearby = lane.divergence(divergence, np.maximum(lp, -1e6), np.maximum(lq, -1e6))
        for limit, near in zip(limits, nearby, strict=True):
            assert not np.isnan(limit).any()
            finite = np.isfinite(limit)
            np.testing.assert_allclose(limit[finite], near[finite], rtol=0.01, atol=1e-12)
            # Infinite only where it grows with the gap.
            assert (np.abs(near[~finite]) > 900 * np.exp(positive[~finite])).all()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_next_to_their_ends(lane: Lane, name: str) -> None:
    """No sign is lost, and nothing becomes NaN."""
    lp, lq = columns(lane.dtype)
    lp, lq = np.append(lp, [-INF, -1, -INF]).astype(lane.dtype), np.append(lq, [-1, -INF, -INF]).astype(lane.dtype)
    for parameter in (1e-30, 1e-9, 1e-4, 1 - 1e-4, 1 - 1e-9, 1 - 2**-53):
        term, grad_q, grad_p = lane.divergence(Divergence(name, parameter), lp, lq)
        for values in (term, grad_q, grad_p):
            assert not np.isnan(values).any(), parameter
        assert (term >= 0).all(), parameter


# ---------------------------------------------------------------- the state of a row


def log_sum_exp(logits: Array, inverse_temperature: float) -> tuple[float, float]:
    """The state (maximum, sum) that a kernel makes of a few logits."""
    maximum = float(logits.max())
    offset = maximum if maximum > -INF else 0.0
    return maximum, float(np.exp((logits.astype(float) - offset) * inverse_temperature).sum())


@pytest.mark.parametrize("inverse_temperature", [1.0, 0.25, 2.0])
def test_merge(scalar: Lane, inverse_temperature: float) -> None:
    """The order and grouping of merges do not matter; a part with only -inf adds nothing."""
    generator = np.random.default_rng(0)

    def merge(*parts: tuple[float, float]) -> tuple[float, float]:
        return scalar.functions.merge(*parts, inverse_temperature)

    for scale in (1.0, 30.0, 1000.0):
        logits = (generator.normal(size=(3, 5)) * scale).astype(scalar.dtype)
        a, b, c = (log_sum_exp(row, inverse_temperature) for row in logits)
        nothing = log_sum_exp(np.full(5, -INF), inverse_temperature)
        merged = [
            merge(merge(a, b), c),
            merge(a, merge(b, c)),
            merge(merge(c, a), b),
            merge(merge(merge(nothing, a), c), merge(b, nothing)),
        ]
        expected = log_sum_exp(logits.flatten(), inverse_temperature)
        for maximum, total in merged:
            assert maximum == expected[0]
            # exp's error grows with its argument, but only where its result is small
            np.testing.assert_allclose(total, expected[1], rtol=40 * scalar.eps)
    rounded = merge(a, a)[0], float(scalar.dtype(a[1]))
    assert merge(a, nothing) == merge(nothing, a) == rounded, "to the bit"
    assert merge(a, b) == merge(b, a), "to the bit"


@pytest.mark.parametrize("broken", [(NAN, 1.0), (1.0, NAN), (INF, NAN)], ids=str)
def test_merge_keeps_nan(scalar: Lane, broken: tuple[float, float]) -> None:
    for pair in ((broken, (2.0, 3.0)), ((2.0, 3.0), broken)):
        assert math.isnan(scalar.functions.merge(*pair, 1.0)[1])


def test_row_constants(scalar: Lane) -> None:
    teacher, student = (5.0, 3.0), (2.0, 7.0)
    values = scalar.functions.row_constants(teacher, student)
    np.testing.assert_allclose(values, [5, math.log2(3), 2, math.log2(7), math.log(3 / 7)], rtol=4 * scalar.eps)
    # Nearly equal sums: the logarithm of their ratio, not the difference of two logarithms.
    near = 1000.0 * (1 + 4 * scalar.eps)
    log_ratio = scalar.functions.row_constants((1.0, near), (1.0, 1000.0))[4]
    np.testing.assert_allclose(log_ratio, math.log(float(scalar.dtype(near)) / 1000.0), rtol=0, atol=scalar.eps)
    assert scalar.functions.row_constants(teacher, teacher)[4] == 0


def test_row_without_mass_is_nan(scalar: Lane) -> None:
    nothing, something = (-INF, 0.0), (1.0, 2.0)
    assert math.isnan(scalar.functions.row_constants(nothing, something)[1])
    assert math.isnan(scalar.functions.row_constants(something, nothing)[3])


@pytest.mark.slow  # compiles the kernels once more
def test_kernels_build_without_torch() -> None:
    symbols = run("nm", "-C", build("whitebox", "kldiv_cpu") / "libkldiv_cpu.a")
    assert "kldiv::cpu::kernels()" in symbols
    assert "torch::" not in symbols and "c10::" not in symbols
