"""The problems that are measured and the table of contenders that solve them."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kldiv_ext
import kldiv_ext.reference

TEMPERATURE = 2.0
BETA, SKEW, ALPHA = 0.5, 0.1, 0.5
# The variants of op "kl_div"; op "distillation_loss" has kldiv_ext.DIVERGENCES.
LOG_TARGETS = ("log_target=False", "log_target=True")
# Elements that the fp64 reference takes at a time, so that its memory does not limit the shapes.
REFERENCE_CHUNK = {"cpu": 2**23, "cuda": 2**25}

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One loss on one shape and dtype: the mean over rows, with a gradient to the student."""

    op: str
    divergence: str
    rows: int
    vocab: int
    dtype: torch.dtype
    device: str

    @property
    def log_target(self) -> bool:
        return self.divergence == "log_target=True"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.divergence} {self.rows}x{self.vocab} {dtype}"


def make_inputs(problem: Problem) -> tuple[Tensor, Tensor]:
    """A student that resembles its teacher a little: logits, or (log-)probabilities for kl_div."""
    generator = torch.Generator(problem.device).manual_seed(0)

    def noise() -> Tensor:
        shape = (problem.rows, problem.vocab)
        return torch.randn(shape, generator=generator, device=problem.device)

    teacher = noise().mul_(4)
    student = noise().mul_(0.5).add_(teacher)
    if problem.op == "kl_div":
        student = student.log_softmax(-1)
        teacher = teacher.log_softmax(-1) if problem.log_target else teacher.softmax(-1)
    return student.to(problem.dtype).requires_grad_(), teacher.to(problem.dtype)


class Expected(NamedTuple):
    """Loss and gradients in fp64 from the rounded inputs; the gradients are stored as fp32, or as fp64 for fp64."""

    loss: float
    gradient: Tensor
    teacher_gradient: Tensor | None


def reference(problem: Problem, student: Tensor, teacher: Tensor, of_teacher: bool = False) -> Expected:
    """What is right; the teacher's gradient on request."""
    loss = 0.0
    storage = torch.promote_types(student.dtype, torch.float32)
    gradients = [torch.empty_like(logits, dtype=storage) for logits in (student, teacher)[: 1 + of_teacher]]
    step = max(1, REFERENCE_CHUNK[problem.device] // problem.vocab)
    for start in range(0, problem.rows, step):
        s = student[start : start + step].detach().double().requires_grad_()
        t = teacher[start : start + step].detach().double().requires_grad_(of_teacher)
        if problem.op == "kl_div":
            part = kldiv_ext.reference.kl_div(s, t, reduction="sum", log_target=problem.log_target)
        else:
            part = kldiv_ext.reference.distillation_loss(s, t, reduction="sum", **_options(problem))
        part = part / problem.rows
        found = torch.autograd.grad(part, (s, t)[: 1 + of_teacher])
        for gradient, rows in zip(gradients, found, strict=True):
            gradient[start : start + step] = rows
        loss += part.item()
    return Expected(loss, gradients[0], gradients[1] if of_teacher else None)


def _options(problem: Problem) -> dict[str, Any]:
    return {
        "divergence": problem.divergence,
        "temperature": TEMPERATURE,
        "beta": BETA,
        "skew": SKEW,
        "alpha": ALPHA,
    }


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits / TEMPERATURE, dim=-1)


def _softmax(logits: Tensor) -> Tensor:
    return F.softmax(logits / TEMPERATURE, dim=-1)


def _forward_kl(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(_log_softmax(s), _softmax(t), reduction="batchmean")


def _reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(_log_softmax(t), _log_softmax(s), reduction="batchmean", log_target=True)


def _jeffreys(s: Tensor, t: Tensor) -> Tensor:
    lq, lp = _log_softmax(s), _log_softmax(t)
    return ((lp.exp() - lq.exp()) * (lp - lq)).sum(-1).mean()


def _jsd(s: Tensor, t: Tensor) -> Tensor:
    lq, lp = _log_softmax(s), _log_softmax(t)
    p, q = lp.exp(), lq.exp()
    lm = (BETA * p + (1 - BETA) * q).log()
    to_p = F.kl_div(lm, p, reduction="batchmean")
    to_q = F.kl_div(lm, lq, reduction="batchmean", log_target=True)
    return BETA * to_p + (1 - BETA) * to_q


def _skew_forward_kl(s: Tensor, t: Tensor) -> Tensor:
    p = _softmax(t)
    mixture = SKEW * p + (1 - SKEW) * _softmax(s)
    return F.kl_div(mixture.log(), p, reduction="batchmean")


def _skew_reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    lq = _log_softmax(s)
    mixture = SKEW * lq.exp() + (1 - SKEW) * _softmax(t)
    return F.kl_div(mixture.log(), lq, reduction="batchmean", log_target=True)


def _total_variation(s: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (_softmax(t) - _softmax(s)).abs().sum(-1).mean()


def _alpha(s: Tensor, t: Tensor) -> Tensor:
    affinity = (ALPHA * _log_softmax(t) + (1 - ALPHA) * _log_softmax(s)).exp().sum(-1)
    return ((1 - affinity) / (ALPHA * (1 - ALPHA))).mean()


# What is usually written in plain PyTorch.
PLAIN: dict[str, Loss] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "alpha": _alpha,
}


def _kldiv_ext(problem: Problem) -> Loss:
    if problem.op == "kl_div":
        return lambda input, target: kldiv_ext.kl_div(
            input, target, reduction="batchmean", log_target=problem.log_target
        )
    options = _options(problem)
    return lambda s, t: kldiv_ext.distillation_loss(s, t, **options)


def _eager(problem: Problem) -> Loss | None:
    """Plain PyTorch in the dtype of the logits."""
    if problem.op == "kl_div":
        return lambda input, target: F.kl_div(input, target, reduction="batchmean", log_target=problem.log_target)
    return PLAIN.get(problem.divergence)


def _eager_float(problem: Problem) -> Loss | None:
    """The same after `.float()`, as careful people write it. For fp32 logits it is `eager`."""
    if problem.op == "kl_div" or problem.dtype == torch.float32:
        return None
    loss = _eager(problem)
    return loss and (lambda s, t: loss(s.float(), t.float()))


def _compiled(build: Callable[[Problem], Loss | None]) -> Callable[[Problem], Loss | None]:
    def build_compiled(problem: Problem) -> Loss | None:
        loss = build(problem)
        return None if loss is None else torch.compile(loss, dynamic=False)

    return build_compiled


ON_CUDA_ALONE = "its kernels are Triton's and run on a GPU alone"


def liger_missing(device: str) -> str | None:
    """Why Liger-Kernel cannot take part."""
    return ON_CUDA_ALONE if device != "cuda" else _import_error(_liger_losses)


def speculators_missing(device: str) -> str | None:
    """Why the losses of speculators cannot take part."""
    return ON_CUDA_ALONE if device != "cuda" else _import_error(_speculators_losses)


def missing(device: str) -> dict[str, str]:
    """Those of CONTENDERS that cannot take part, and why.

    QuACK's cross entropy would be a yardstick for a kernel over rows; what it is compiled by (nvidia-cutlass-dsl) is
    too large to bring along, and it has no divergence.
    """
    reasons = {"liger": liger_missing(device), "speculators": speculators_missing(device)}
    return {name: reason for name, reason in reasons.items() if reason}


def _import_error(load: Callable[[], Any]) -> str | None:
    try:
        load()
    except Exception as error:  # whatever its import does here
        return f"its import fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _liger_losses() -> Any:
    return importlib.import_module("liger_kernel.transformers")


@functools.cache
def _speculators_losses() -> Any:
    """Its module of fused losses without the packages around it, whose imports want all that a trainer needs."""
    spec = importlib.util.find_spec("speculators")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("speculators is not installed")
    folder = next(iter(spec.submodule_search_locations))
    for name in ("speculators", "speculators.utils"):
        hollow = ModuleType(name)
        hollow.__path__ = [folder + name.removeprefix("speculators").replace(".", "/")]
        sys.modules.setdefault(name, hollow)
    return importlib.import_module("speculators.losses.fused")


def _liger(problem: Problem) -> Loss | None:
    """Liger-Kernel takes (log-)probabilities, so from logits PyTorch's softmaxes come first."""
    if liger_missing(problem.device):
        return None
    liger = _liger_losses()
    kl: Loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=problem.log_target)
    if problem.op == "kl_div":
        return kl
    if problem.divergence == "forward_kl":
        return lambda s, t: kl(_log_softmax(s), _softmax(t))
    if problem.divergence == "total_variation":
        tvd = liger.LigerTVDLoss()
        return lambda s, t: tvd(_softmax(s), _softmax(t))
    if problem.divergence in ("jsd", "reverse_kl"):  # its JSD at beta 1 is reverse KL
        jsd = liger.LigerJSD(beta=BETA if problem.divergence == "jsd" else 1.0)
        return lambda s, t: jsd(_log_softmax(s), _log_softmax(t))
    return None


SPECULATORS = {
    "forward_kl": "fused_kl_div_loss",
    "reverse_kl": "fused_reverse_kl_div_loss",
    "jsd": "fused_js_div_loss",  # of equal halves, as BETA has it
    "total_variation": "fused_tv_loss",
}


def _speculators(problem: Problem) -> Loss | None:
    """The fused losses of vLLM's speculators, per row of [1, rows, V] logits at temperature 1: divided before."""
    if problem.op == "kl_div" or problem.divergence not in SPECULATORS or speculators_missing(problem.device):
        return None
    loss: Loss = getattr(_speculators_losses(), SPECULATORS[problem.divergence])
    return lambda s, t: loss((s / TEMPERATURE)[None], (t / TEMPERATURE)[None]).mean()


# A contender gives its loss for a problem, or None where it has nothing for it.
CONTENDERS: dict[str, Callable[[Problem], Loss | None]] = {
    "kldiv_ext": _kldiv_ext,
    "eager": _eager,
    "eager_float": _eager_float,
    "compile": _compiled(_eager),
    "compile_float": _compiled(_eager_float),
    "liger": _liger,
    "speculators": _speculators,
}
# They take seconds for every new problem: to compile, or to try their settings.
SLOW_TO_BUILD = ("compile", "compile_float", "speculators")
# They take the teacher for a constant.
NO_TEACHER_GRADIENT = ("liger", "speculators")
