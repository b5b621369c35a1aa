"""The one home of the options: each has its type, default, check and sentence here, and everything else reads them."""

import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar

from ._library import DIVERGENCES

REDUCTIONS = ("none", "sum", "mean", "batchmean")
LARGEST = 1e15
"""The largest temperature, weight or scale; its inverse is the smallest. A product of two still fits float32."""

PerSide = float | tuple[float | None, float | None] | None
"""A number for both sides, or a pair (student, teacher)."""


# ---------------------------------------------------------------- checks of values


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _share(name: str, value: Any) -> None:
    _number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
    if 0 < value < 1e-30:  # its reciprocal overflows in float32
        raise ValueError(f"{name} must be 0 or at least 1e-30, got {value}")


def _positive(name: str, value: Any) -> None:
    _number(name, value)
    if not 1 / LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be positive and finite, from {1 / LARGEST} to {LARGEST}, got {value}")


def _weight(name: str, value: Any) -> None:
    _number(name, value)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be finite and at most {LARGEST} in size, got {value}")


def _positive_per_side(name: str, value: Any) -> None:
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name} must be a number or a pair (student, teacher), got {value!r}")
    for side in sides:
        if side is not None:
            _positive(name, side)


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def _integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a 64-bit integer, got {value}")


def _optional_count(name: str, value: Any) -> None:
    if value is not None:
        _integer(name, value)
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    return check


# ---------------------------------------------------------------- the options


class Option(NamedTuple):
    """What is known of an option besides its type."""

    default: Any
    check: Callable[[str, Any], None]
    """check(name, value) raises `TypeError` or `ValueError`, naming the option and the value."""
    doc: str


class DivergenceOptions(TypedDict, total=False):
    """Which divergence."""

    divergence: Annotated[
        str, Option("forward_kl", _one_of(tuple(DIVERGENCES)), "The divergence, one of `kldiv_ext.DIVERGENCES`.")
    ]
    beta: Annotated[
        float,
        Option(0.5, _share, "``jsd`` only: the weight β of p in the mixture. 0 is forward KL, 1 is reverse KL."),
    ]
    skew: Annotated[
        float, Option(0.1, _share, "``skew_*`` only: the share κ of the first argument that the mixture keeps.")
    ]
    alpha: Annotated[float, Option(0.5, _share, "``alpha`` only: the order α. 1 is forward KL, 0 is reverse KL.")]


class LogitsOptions(TypedDict, total=False):
    """How logits become log-probabilities, and which positions count."""

    temperature: Annotated[float, Option(1.0, _positive, "T > 0 divides the logits.")]
    logit_scale: Annotated[
        PerSide,
        Option(
            None,
            _positive_per_side,
            "Multiplies the logits first, > 0 (Cohere; for Granite the inverse of its ``logits_scaling``). A pair is "
            "(student, teacher), None is 1.",
        ),
    ]
    logit_softcap: Annotated[
        PerSide,
        Option(
            None,
            _positive_per_side,
            "Replaces scaled logits z by c·tanh(z / c), before the temperature (Gemma). A pair is (student, teacher), "
            "None is no softcap. Capped logits are rounded to float32 before they are compared.",
        ),
    ]
    valid_vocab: Annotated[
        int | None,
        Option(
            None,
            _optional_count,
            "Columns from here on are padding: probability 0, never read, gradient exactly 0. With it the two "
            "vocabularies may be padded to different sizes.",
        ),
    ]
    ignore_index: Annotated[int, Option(-100, _integer, "The label of positions that do not count.")]


class LossOptions(DivergenceOptions, LogitsOptions, total=False):
    """What every distillation loss takes."""

    scale_by_temperature_squared: Annotated[
        bool,
        Option(False, _flag, "Multiplies the divergence by T², so that its gradients keep their size as T grows."),
    ]
    soft_weight: Annotated[float, Option(1.0, _weight, "The weight of the divergence.")]
    hard_weight: Annotated[
        float,
        Option(
            0.0,
            _weight,
            "The weight of the student's cross entropy against ``labels``, at temperature 1, as `F.cross_entropy` "
            "computes it. A part of weight 0 contributes 0 even where it is infinite.",
        ),
    ]
    reduction: Annotated[
        str,
        Option(
            "mean",
            _one_of(REDUCTIONS),
            "``none``: one loss per position, 0 where a position does not count. ``sum``. ``mean``: sum / number of "
            "positions that count (with ``weight``: / sum of their weights), never / V. ``batchmean``: sum / size of "
            "the first dimension; for a single position the sum.",
        ),
    ]


class DistillationOptions(LossOptions, total=False):
    """What `distillation_loss` takes."""

    inplace_backward: Annotated[
        bool,
        Option(
            False,
            _flag,
            "Backward overwrites ``student_logits`` with their gradient, which saves an allocation of that size; "
            "afterwards the logits are garbage. Autograd raises where the old values are still needed (by another "
            "loss, a second backward, the operator that made them). Ignored under `torch.compile` and `torch.func`.",
        ),
    ]


class LinearDistillationOptions(LossOptions, total=False):
    """What `linear_distillation_loss` takes."""

    max_workspace: Annotated[
        int | None,
        Option(
            None,
            _optional_count,
            "Bytes for a chunk's logits and their gradients; None is 1 GB on a GPU and 256 MB on the CPU. Larger "
            "chunks bring the matrix products nearer to their full speed.",
        ),
    ]
    chunk_size: Annotated[
        int | None,
        Option(None, _optional_count, "Positions per chunk, whatever memory they take, instead of ``max_workspace``."),
    ]


_TABLES: dict[type, dict[str, tuple[Any, Option]]] = {}


def table(kind: type) -> dict[str, tuple[Any, Option]]:
    """{name: (type, Option)} of one of the classes above, those of its bases first."""
    if kind not in _TABLES:  # a dict, because the compiler does not trace functools.cache
        hints = typing.get_type_hints(kind, include_extras=True)
        _TABLES[kind] = {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()}
    return _TABLES[kind]


def completed(function: str, kind: type, given: Mapping[str, Any], check: bool = True) -> Any:
    """`given` with the defaults of the other options of `kind`.

    Raises for an unknown name, and with `check` for a wrong value.
    """
    known = table(kind)
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if check:
            known[name][1].check(name, value)
    return {**{name: option.default for name, (_, option) in known.items()}, **given}


# ---------------------------------------------------------------- what operators take


class OperatorOptions(NamedTuple):
    """What an operator takes besides tensors, in the order of csrc/options.h."""

    soft_scale: float
    hard_scale: float
    divisor: int | None
    divergence: str
    parameter: float
    temperature: float
    logit_scale: tuple[float, float]
    """(student, teacher)"""
    logit_softcap: tuple[float, float]
    """(student, teacher); 0 is no softcap"""
    valid_vocab: int | None


def per_side(value: Any, default: float) -> tuple[float, float]:
    """An option of both sides as (student, teacher)."""
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    student, teacher = (default if x is None else float(x) for x in sides)
    return student, teacher


def operator_options(options: LossOptions, divisor: int | None) -> OperatorOptions:
    """The options of a loss as operators take them."""
    temperature, parameter = float(options["temperature"]), DIVERGENCES[options["divergence"]]
    return OperatorOptions(
        soft_scale=options["soft_weight"] * (temperature**2 if options["scale_by_temperature_squared"] else 1.0),
        hard_scale=float(options["hard_weight"]),
        divisor=divisor,
        divergence=options["divergence"],
        parameter=float(options[parameter]) if parameter else 0.0,  # type: ignore[literal-required]
        temperature=temperature,
        logit_scale=per_side(options["logit_scale"], 1.0),
        logit_softcap=per_side(options["logit_softcap"], 0.0),
        valid_vocab=options["valid_vocab"],
    )


def denominator(reduction: str, shape: Sequence[int], count: Callable[[], Any]) -> Any:
    """What the sum of losses of `shape` is divided by; None: the losses are not summed. count(): how many count."""
    if reduction == "mean":
        return count()
    return {"none": None, "sum": 1, "batchmean": shape[0] if len(shape) > 0 else 1}[reduction]


# ---------------------------------------------------------------- what people read

Function = TypeVar("Function", bound=Callable[..., Any])


def takes(kind: type) -> Callable[[Function], Function]:
    """Decorator: shows the options in the signature and the docstring of a function that takes them as ``**options``.

    In the docstring the entry ``**options:`` is replaced by one entry per option.
    """

    def decorate(function: Function) -> Function:
        hints = typing.get_type_hints(function)
        annotations = {name: None if hint is type(None) else hint for name, hint in hints.items()}
        shown = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                shown.append(parameter.replace(annotation=annotations.get(parameter.name, parameter.empty)))
        for name, (annotation, option) in table(kind).items():
            shown.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)
            )
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            shown, return_annotation=annotations.get("return", inspect.Signature.empty)
        )
        function.__doc__ = with_entries(function.__doc__ or "", kind)
        return function

    return decorate


def with_entries(doc: str, kind: type) -> str:
    """A docstring with one entry per option of `kind` in place of the line ``**options: ...``."""
    lines = []
    for line in doc.splitlines():
        if not line.lstrip().startswith("**options:"):
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        for name, (_, option) in table(kind).items():
            lines += textwrap.wrap(
                f"{name}: {option.doc}",
                width=120,
                initial_indent=indent,
                subsequent_indent=indent + "    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def markdown_table(kind: type, without: type | None = None) -> str:
    """The options of `kind`, except those of `without`, as a table for the documentation."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, (_, option) in table(kind).items():
        if without is None or name not in table(without):
            rows.append(f"| `{name}` | `{option.default!r}` | {option.doc.replace('``', '`')} |")
    return "\n".join(rows)
