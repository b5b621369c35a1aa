"""Inputs of the tests: dtypes, divergences, tensors, layouts, mixes of options, and the one way to run a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kldiv_ext import _library
from kldiv_ext.options import DivergenceOptions, LossOptions, table

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "mean", "batchmean")


def named(cases: dict[str, Any]) -> list[Any]:
    """{id: case} as arguments of pytest.mark.parametrize."""
    return [pytest.param(case, id=name) for name, case in cases.items()]


PARAMETERS = {divergence: parameter for divergence, parameter in _library.DIVERGENCES.items() if parameter}


class Divergence(NamedTuple):
    """A divergence with a value of its parameter."""

    name: str
    parameter: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        if self.parameter is None:
            return {"divergence": self.name}
        return {"divergence": self.name, PARAMETERS[self.name]: self.parameter}

    def __str__(self) -> str:
        return self.name if self.parameter is None else f"{self.name}-{self.parameter:g}"


# Values in use (GKD: 0.1, 0.5, 0.9; DistiLLM: 0.1), on both sides of 1/2.
DIVERGENCES = [
    Divergence(name, parameter)
    for name in _library.DIVERGENCES
    for parameter in ((0.1, 0.5, 0.9) if name in PARAMETERS else (None,))
]
# Near the ends, where a mixture is nearly one of its two sides.
LOPSIDED = [Divergence(name, parameter) for name in PARAMETERS for parameter in (0.001, 0.999)]
# At the ends, where the divergence is another one.
ENDPOINTS = [Divergence(name, end) for name in PARAMETERS for end in (0.0, 1.0)]
ALL_DIVERGENCES = [*DIVERGENCES, *ENDPOINTS]
# One per path through the kernels: the gradient is computed in the pass of the sums, or in a pass of its own.
FORWARD_KL, JSD = BOTH_PATHS = Divergence("forward_kl"), Divergence("jsd", 0.1)

# ---------------------------------------------------------------- tensors


def logits(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", spread: float = 1.0, seed: int = 0
) -> Tensor:
    """spread · N(0, 1), drawn in float64 on the CPU, so that every dtype and device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def make_pair(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: str = "cpu",
    spread: float = 1.0,
    distance: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(student, teacher): the teacher is spread · N(0, 1), the student differs from it by distance · N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    teacher = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    student = teacher + distance * torch.randn(shape, generator=generator, dtype=torch.float64)
    return student.to(device, dtype), teacher.to(device, teacher_dtype or dtype)


MODEL_TENSORS = tuple(f"{side}_{tensor}" for side in ("student", "teacher") for tensor in ("hidden", "weight", "bias"))


def make_models(
    *shape: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    vocab: int = 70,
    hidden: tuple[int, int] = (9, 6),  # of student and teacher
    bias: bool = True,
) -> dict[str, Tensor]:
    """The tensors of linear_distillation_loss by name; the logits of both sides are about N(0, 1)."""
    generator = torch.Generator().manual_seed(1)

    def noise(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(sizes, generator=generator, dtype=torch.float64)).to(device, dtype)

    models = {}
    for side, size in zip(("student", "teacher"), hidden, strict=True):
        models[f"{side}_hidden"] = noise(*shape, size)
        models[f"{side}_weight"] = noise(vocab, size, scale=size**-0.5)
        if bias:
            models[f"{side}_bias"] = noise(vocab, scale=0.3)
    return models


def position_tensors(
    names: Iterable[str],
    shape: tuple[int, ...],
    classes: int,
    device: str = "cpu",
    seed: int = 1,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Labels, mask and weight [...] and num_items [], those of them that are named.

    The first position counts in all of them. Where there is room, the labels hold the first and the last class, and
    each tensor excludes a position that the others include.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = ignore_index
    mask = torch.rand(shape, generator=generator) < 0.8
    weight = torch.rand(shape, generator=generator) + 0.1
    weight[torch.rand(shape, generator=generator) < 0.2] = 0
    for tensor, first in (
        (labels, [0, classes - 1, ignore_index, 0]),
        (mask, [True, False, True, True]),
        (weight, [0.5, 2.0, 1.0, 0.0]),
    ):
        flat = tensor.view(-1)[: len(first)]
        flat.copy_(torch.tensor(first)[: len(flat)])
    made = {"labels": labels, "mask": mask, "weight": weight, "num_items": torch.tensor(7)}
    return {name: made[name].to(device) for name in names}


def padded(x: Tensor, dim: int) -> Tensor:
    """The same values, as a slice of a tensor that is longer in one dimension and NaN there."""
    shape = list(x.shape)
    shape[dim] += 3
    view = x.new_full(shape, torch.nan).narrow(dim, 0, x.shape[dim])
    view.copy_(x)
    return view


# The same values with other strides, for tensors of at least two dimensions.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "vocabulary first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "second dimension first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows cut": lambda x: padded(x, -2),  # logits[:, :-1]: no view of rows
    "columns cut": lambda x: padded(x, -1),  # a padded vocabulary: rows start at odd addresses
    "every second column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "misaligned": lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape),
}

# ---------------------------------------------------------------- options

# Of every option of distillation_loss some values other than the default.
SAMPLES: dict[str, tuple[Any, ...]] = {
    "divergence": tuple(name for name in _library.DIVERGENCES if name != "forward_kl"),
    "beta": (0.1, 0.9),
    "skew": (0.5, 0.9),
    "alpha": (0.1, 0.9),
    "temperature": (0.5, 4),
    "logit_scale": (0.3, (1.2, 0.7)),
    "logit_softcap": (3.0, (2.0, None)),
    "valid_vocab": (30,),
    "ignore_index": (3,),
    "scale_by_temperature_squared": (True,),
    "soft_weight": (0.0, 2.5),
    "hard_weight": (0.7,),
    "reduction": ("none", "sum", "batchmean"),
    "inplace_backward": (True,),
}


class Mix(NamedTuple):
    """Options of a loss, and the names of the position tensors that it takes with them."""

    options: dict[str, Any]
    tensors: tuple[str, ...] = ()

    def arguments(self, *shape: int, columns: int, device: str = "cpu", seed: int = 1) -> dict[str, Any]:
        """The keywords of a call for logits [*shape, columns]."""
        classes, ignore_index = self.options.get("valid_vocab", columns), self.options.get("ignore_index", -100)
        return {**position_tensors(self.tensors, shape, classes, device, seed, ignore_index), **self.options}


# What decides which positions count, and how much.
POSITIONS = {
    names: Mix({}, tuple(names.split(", ")))
    for names in ("labels", "mask", "weight", "labels, mask, weight", "num_items", "labels, num_items")
} | {"num_items=37": Mix({"num_items": 37})}
# Every option that all losses take, by itself; DIVERGENCES are to be combined with them.
SINGLE_OPTIONS = {
    f"{option}={value}": Mix({option: value}, ("labels",) if option in ("hard_weight", "ignore_index") else ())
    for option, values in SAMPLES.items()
    if option in table(LossOptions) and option not in table(DivergenceOptions)
    for value in values
}
COMBINED_OPTIONS = {
    "temperature squared": Mix({"temperature": 1.7, "scale_by_temperature_squared": True}),
    "softcap of the student, temperature": Mix({"logit_softcap": (2.0, None), "temperature": 0.7}),
    "scale of the teacher, softcap": Mix({"logit_scale": (None, 2), "logit_softcap": 4}),
    "hard labels, softcaps": Mix({"hard_weight": 0.5, "logit_softcap": [5.0, 2.0], "temperature": 2}, ("labels",)),
    "hard labels, scale": Mix({"hard_weight": 0.5, "logit_scale": 0.3, "temperature": 1.7}, ("labels",)),
    "hard labels, scales": Mix({"hard_weight": 0.5, "logit_scale": (1.2, 0.7)}, ("labels",)),
    "hard labels alone": Mix({"hard_weight": 1.0, "soft_weight": 0.0, "temperature": 3.0}, ("labels",)),
    "negative weight": Mix({"hard_weight": -0.5, "soft_weight": 2.0}, ("labels",)),
    "everything": Mix(
        {name: mix.options[name] for mix in SINGLE_OPTIONS.values() for name in mix.options if name != "reduction"},
        ("labels", "mask", "weight"),
    ),
}
OPTION_MIXES = SINGLE_OPTIONS | COMBINED_OPTIONS
MIXES = OPTION_MIXES | POSITIONS

# ---------------------------------------------------------------- running


class Result(NamedTuple):
    """A loss and its gradients: one per floating positional tensor, None where none was requested."""

    loss: Tensor
    gradients: tuple[Tensor | None, ...]

    @property
    def grad_student(self) -> Tensor | None:
        return self.gradients[0]

    @property
    def grad_teacher(self) -> Tensor | None:
        return self.gradients[1]


def run(
    function: Callable[..., Tensor],
    *tensors: Any,
    grad_output: Tensor | float = 1.0,
    needs_grad: Iterable[bool] | None = None,
    **arguments: Any,
) -> Result:
    """Call a function and its backward.

    The floating tensors among `tensors` are replaced by leaves of the same storage and strides; `needs_grad` has one
    entry per leaf, by default all True.
    """
    inputs = [t.detach() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]
    leaves = [x for x, t in zip(inputs, tensors, strict=True) if x is not t]
    for leaf, needed in zip(leaves, [True] * len(leaves) if needs_grad is None else needs_grad, strict=True):
        leaf.requires_grad_(needed)
    loss = function(*inputs, **arguments)
    if any(leaf.requires_grad for leaf in leaves):
        loss.backward(torch.as_tensor(grad_output, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    return Result(loss.detach(), tuple(leaf.grad for leaf in leaves))


def by_position(function: Callable[..., Tensor], names: Iterable[str]) -> Callable[..., Tensor]:
    """The function with positional arguments for the keywords `names`."""
    return lambda *tensors, **arguments: function(**dict(zip(names, tensors, strict=True)), **arguments)


def run_models(
    function: Callable[..., Tensor], models: dict[str, Tensor], needs_grad: Iterable[str] | None = None, **others: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """`run` for tensors by name: the loss, and the gradients by name; `needs_grad` is by default all names."""
    chosen = set(models if needs_grad is None else needs_grad)
    flags = [name in chosen for name in models]
    result = run(by_position(function, models), *models.values(), needs_grad=flags, **others)
    gradients = zip(models, result.gradients, strict=True)
    return result.loss, {name: gradient for name, gradient in gradients if gradient is not None}
