"""options.py: the table of options, and everything that is made from it."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from cases import MIXES, SAMPLES, named
from typing_extensions import Unpack

import kldiv_ext
from kldiv_ext import DistillationLoss, distillation_loss, options
from kldiv_ext.modules import _Loss
from kldiv_ext.options import DistillationOptions, LinearDistillationOptions, LogitsOptions, Option, table, takes

X, WEIGHT = torch.randn(2, 3, 5), torch.randn(7, 5)
ALL_OPTIONS = {**table(DistillationOptions), **table(LinearDistillationOptions)}

# {function or module in kldiv_ext: the options that it takes}
TAKERS: dict[str, type] = {
    "distillation_loss": DistillationOptions,
    "token_stats": LogitsOptions,
    "linear_distillation_loss": LinearDistillationOptions,
    "DistillationLoss": DistillationOptions,
    "LinearDistillationLoss": LinearDistillationOptions,
    "reference.distillation_loss": DistillationOptions,
    "reference.linear_distillation_loss": options.LossOptions,
    "reference.token_stats": LogitsOptions,
}


def call(taker: str, **given: Any) -> Any:
    """A call of the function, or of the module's constructor, with options."""
    function = operator.attrgetter(taker)(kldiv_ext)
    tensors = () if isinstance(function, type) else (X, WEIGHT) * 2 if "linear" in taker else (X, X)
    return function(*tensors, **given)


def assert_in_signature(function: Callable[..., Any], kind: type) -> None:
    """The keywords are the options of `kind`, with their types and defaults, beside the tensors."""
    parameters = inspect.signature(function).parameters
    shown = {name: p for name, p in parameters.items() if name in ALL_OPTIONS or name in table(kind)}
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    assert all(p.kind is p.KEYWORD_ONLY for p in shown.values())
    expected = {name: (annotation, option.default) for name, (annotation, option) in table(kind).items()}
    assert {name: (p.annotation, p.default) for name, p in shown.items()} == expected


def assert_in_docstring(function: Callable[..., Any], kind: type) -> None:
    """There is one entry per option of `kind`, and none of another option."""
    text = " ".join((function.__doc__ or "").split())
    assert "**options:" not in text
    for name, (_, option) in {**ALL_OPTIONS, **table(kind)}.items():
        assert text.count(f"{name}: {option.doc}") == (name in table(kind)), name


@pytest.mark.parametrize("name", ALL_OPTIONS)
def test_option_is_complete(name: str) -> None:
    """An option has a type, a default that its check accepts, and a sentence."""
    annotation, option = ALL_OPTIONS[name]
    assert annotation is not Any
    option.check(name, option.default)
    assert re.fullmatch(r"[^\s].*\.", option.doc)


def test_samples_cover_every_option() -> None:
    assert set(SAMPLES) == set(table(DistillationOptions))
    for name, values in SAMPLES.items():
        assert values
        for value in values:
            assert value != ALL_OPTIONS[name][1].default
            ALL_OPTIONS[name][1].check(name, value)
    mixed = {name for mix in MIXES.values() for name in mix.options if name in ALL_OPTIONS}
    assert mixed == set(table(options.LossOptions)) - set(table(options.DivergenceOptions))


@pytest.mark.parametrize("taker, kind", TAKERS.items())
def test_signature_and_docstring(taker: str, kind: type) -> None:
    function = operator.attrgetter(taker)(kldiv_ext)
    function = function.__init__ if isinstance(function, type) else function
    assert_in_signature(function, kind)
    if not taker.startswith("reference"):
        assert_in_docstring(function, kind)
    call(taker, **{name: option.default for name, (_, option) in table(kind).items()})


def test_options_are_keywords() -> None:
    for function in (functools.partial(distillation_loss, X, X, None), DistillationLoss):
        with pytest.raises(TypeError, match="positional"):
            function("jsd")


@pytest.mark.parametrize("name", [
    "distillation_loss", "distillation_loss_backward", "distillation_loss_backward_", "distillation_loss_out",
    "linear_distillation_loss", "token_stats",
])  # fmt: skip
def test_operators_take_the_fields_of_operator_options(name: str) -> None:
    """Schemas have the fields in their order; token_stats takes those of the logits."""
    arguments = [a.name for a in getattr(torch.ops.kldiv_ext, name).default._schema.arguments]
    fields = list(options.OperatorOptions._fields)
    if name == "token_stats":
        fields = fields[fields.index("temperature") :]
        assert set(table(LogitsOptions)) == {*fields, "ignore_index"}
    start = arguments.index("labels")
    assert arguments[start : start + 2 + len(fields)] == ["labels", "row_scale", *fields]


def test_what_operators_are_given() -> None:
    assert options.per_side(None, 1.0) == (1.0, 1.0)
    assert options.per_side(2, 1.0) == (2.0, 2.0)
    assert options.per_side((None, 3), 1.0) == options.per_side([None, 3], 1.0) == (1.0, 3.0)
    divisors = {"none": None, "sum": 1, "mean": 5, "batchmean": 2}
    assert {reduction: options.denominator(reduction, (2, 3), lambda: 5) for reduction in divisors} == divisors
    assert set(divisors) == set(options.REDUCTIONS)
    assert options.denominator("batchmean", (), lambda: 5) == 1


CHECKED: list[tuple[str, Any]] = []


class LongerOptions(DistillationOptions, total=False):
    """The options of distillation_loss, and one more."""

    sharpness: Annotated[float, Option(1.5, lambda name, value: CHECKED.append((name, value)), "How sharp p is.")]


@takes(LongerOptions)
def longer_loss(logits: torch.Tensor, *, mask: torch.Tensor | None = None, **given: Unpack[LongerOptions]) -> Any:
    """A loss.

    Args:
        logits: some logits.
        **options: as documented.

    Returns:
        The options.
    """
    return options.completed("longer_loss", LongerOptions, given)


class LongerLoss(_Loss):
    @takes(LongerOptions)
    def __init__(self, **options: Unpack[LongerOptions]) -> None:
        """**options: as documented."""
        super().__init__(LongerOptions, options)


def test_a_new_option_appears_everywhere() -> None:
    assert [*table(LongerOptions)] == [*table(DistillationOptions), "sharpness"]
    for function in (longer_loss, LongerLoss.__init__):
        assert_in_signature(function, LongerOptions)
        assert_in_docstring(function, LongerOptions)
    assert [*inspect.signature(longer_loss).parameters][:2] == ["logits", "mask"]
    assert "logits: some logits.\n" in longer_loss.__doc__ and "Returns:\n" in longer_loss.__doc__
    assert options.markdown_table(LongerOptions) == (
        options.markdown_table(DistillationOptions) + "\n| `sharpness` | `1.5` | How sharp p is. |"
    )
    CHECKED.clear()
    assert longer_loss(X)["sharpness"] == LongerLoss().options["sharpness"] == 1.5
    assert longer_loss(X, sharpness=2)["sharpness"] == 2
    assert LongerLoss(sharpness=3).options["sharpness"] == 3
    assert CHECKED == [("sharpness", 2), ("sharpness", 3)]
    assert "sharpness=3" in repr(LongerLoss(sharpness=3))
    for taker in TAKERS:
        with pytest.raises(TypeError, match="sharpness"):
            call(taker, sharpness=2)


@pytest.mark.parametrize("taker, kind", TAKERS.items())
def test_unknown_options(taker: str, kind: type) -> None:
    """A misspelt option and one of another function raise an error that names the function."""
    for name in {"temprature", *ALL_OPTIONS} - set(table(kind)):
        with pytest.raises(TypeError, match=rf"{taker.split('.')[-1]}\(\) got an unexpected .*'{name}'"):
            call(taker, **{name: 1})


NOT_NUMBERS = ("0.5", True, torch.tensor(0.5))
# {check: (values of a wrong type, wrong values)}
WRONG: dict[Callable[..., None], tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    options._share: ((*NOT_NUMBERS, None), (-0.1, 1.5, math.nan, 1e-31)),
    options._positive: ((*NOT_NUMBERS, None), (0, -1.0, 1e-40, 10**400, math.inf, math.nan)),
    options._weight: ((*NOT_NUMBERS, None), (10**400, math.inf, -math.inf, math.nan)),
    options._positive_per_side: (
        (*NOT_NUMBERS, (True, None)),
        (0, -1.0, math.inf, 1e39, (None, 1e-39), (None, -3.0), (1, 2, 3)),
    ),
    options._flag: ((1, None), ()),
    options._integer: ((1.0, True, None), (2**70,)),
    options._optional_count: ((8.0, True), (0, -1, 2**70)),
    ALL_OPTIONS["divergence"][1].check: ((), ("kl", "JSD", None, ["jsd"])),
    ALL_OPTIONS["reduction"][1].check: ((), ("avg", None, ["mean"], np.array(["mean", "sum"]))),
}
WRONG_OPTIONS = {
    f"{name}={value!r:.20}": (name, value, error)
    for name, (_, option) in ALL_OPTIONS.items()
    for error, values in zip((TypeError, ValueError), WRONG[option.check], strict=True)
    for value in values
}


@pytest.mark.parametrize("wrong", named(WRONG_OPTIONS))
def test_wrong_values(wrong: tuple[str, Any, type[Exception]]) -> None:
    """Every function that takes the option names it and its value, whatever the divergence; then it works again."""
    name, value, error = wrong
    side = next(x for x in value if x is not None) if isinstance(value, tuple) and len(value) == 2 else value
    for taker in (taker for taker, kind in TAKERS.items() if name in table(kind) and "reference" not in taker):
        with pytest.raises(error, match=f"(?s){name}.*{re.escape(repr(side))}"):
            call(taker, **{name: value})
        call(taker)


def test_reference_is_differentiable_in_its_options() -> None:
    temperature = torch.tensor(2.0, requires_grad=True)
    kldiv_ext.reference.distillation_loss(X, X.flip(-1), temperature=temperature).backward()
    assert temperature.grad != 0


def test_allowed_values_are_listed() -> None:
    assert isinstance(kldiv_ext.DIVERGENCES, tuple) and len(kldiv_ext.DIVERGENCES) == 8
    for name, allowed in (("divergence", kldiv_ext.DIVERGENCES), ("reduction", options.REDUCTIONS)):
        with pytest.raises(ValueError, match=f"{name}.*{', '.join(allowed)}.*'kl'"):
            distillation_loss(X, X, **{name: "kl"})  # type: ignore[misc]
