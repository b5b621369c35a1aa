"""The problems, their fp64 reference, and the table of contenders that solve them."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kldiv_ext
import kldiv_ext.reference
from benchmarks.measure import Expected, Loss
from benchmarks.results import Record, failure

TEMPERATURE = 2.0
BETA, SKEW, ALPHA = 0.5, 0.1, 0.5
# The variants of op "kl_div"; those of the other ops are kldiv_ext.DIVERGENCES.
LOG_TARGETS = ("log_target=False", "log_target=True")
REFERENCE_CHUNK = {"cpu": 2**23, "cuda": 2**25}  # logits at a time, which bounds the reference's memory


@dataclass(frozen=True)
class Problem:
    """A loss over rows of logits (op distillation_loss), probabilities (kl_div) or hidden states (linear)."""

    op: str
    divergence: str
    rows: int
    vocab: int
    dtype: torch.dtype
    device: str
    hidden: int = 0  # size of the hidden states
    distance: float = 1.0  # of the student's hidden states and head from the teacher's

    @property
    def labels(self) -> Record:
        """What a result says of its problem."""
        hidden = {"hidden": self.hidden} if self.hidden else {}
        names = {"op": self.op, "divergence": self.divergence, "dtype": str(self.dtype).removeprefix("torch.")}
        return {**names, "rows": self.rows, **hidden, "vocab": self.vocab}

    def __str__(self) -> str:
        return "{op} {divergence} {rows}x{vocab} {dtype}".format_map(self.labels)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of kldiv_ext's function."""
        if self.op == "kl_div":
            return {"log_target": self.divergence == "log_target=True"}
        names = {"divergence": self.divergence, "temperature": TEMPERATURE}
        return {**names, "beta": BETA, "skew": SKEW, "alpha": ALPHA}


def make_inputs(problem: Problem) -> tuple[Tensor, ...]:
    """(student, teacher), the student close to the teacher, or (student, its head, teacher, its head)."""
    generator = torch.Generator(problem.device).manual_seed(0)

    def noise(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn((rows, columns), generator=generator, device=problem.device).mul_(scale)

    if problem.op == "linear":
        hidden, distance = problem.hidden, problem.distance
        teacher, teacher_head = noise(problem.rows, hidden, 1.0), noise(problem.vocab, hidden, 4 * hidden**-0.5)
        student = noise(problem.rows, hidden, distance).add_(teacher)
        head = noise(problem.vocab, hidden, distance * hidden**-0.5).add_(teacher_head)
        inputs = [student, head, teacher, teacher_head]
    else:
        teacher = noise(problem.rows, problem.vocab, 4.0)
        inputs = [noise(problem.rows, problem.vocab, 0.5).add_(teacher), teacher]
    if problem.op == "kl_div":
        log_target = problem.options["log_target"]
        inputs = [inputs[0].log_softmax(-1), teacher.log_softmax(-1) if log_target else teacher.softmax(-1)]
    trained = len(inputs) // 2
    return tuple(x.to(problem.dtype).requires_grad_(i < trained) for i, x in enumerate(inputs))


def _leaf(x: Tensor, rows: slice = slice(None)) -> Tensor:
    return x[rows].detach().double().requires_grad_(x.requires_grad)


def reference(problem: Problem, inputs: tuple[Tensor, ...]) -> Expected:
    """fp64 loss and gradients, computed from chunks of rows."""
    function = kldiv_ext.reference.kl_div if problem.op == "kl_div" else kldiv_ext.reference.distillation_loss
    sides, heads = (inputs[::2], [_leaf(x) for x in inputs[1::2]]) if problem.op == "linear" else (inputs, [])
    storage = torch.promote_types(problem.dtype, torch.float32)
    gradients: list[list[Tensor]] = [[], []]
    loss = entropy = 0.0
    step = max(1, REFERENCE_CHUNK[problem.device] // problem.vocab)
    for start in range(0, problem.rows, step):
        leaves = [_leaf(x, slice(start, start + step)) for x in sides]
        student, teacher = (x @ head.t() for x, head in zip(leaves, heads, strict=True)) if heads else leaves
        part = function(student, teacher, reduction="sum", **problem.options) / problem.rows
        part.backward()
        for parts, x in zip(gradients, leaves, strict=True):
            parts += [] if x.grad is None else [x.grad.to(storage)]
        loss += part.item()
        if problem.op == "linear":
            log_p = log_softmax(teacher)
            entropy -= (log_p.exp() * log_p).sum().item() / problem.rows
    found = [torch.cat(parts) for parts in gradients if parts] + [x.grad for x in heads if x.grad is not None]
    return Expected(loss, tuple(found), entropy)


batchmean = functools.partial(F.kl_div, reduction="batchmean")


def log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits / TEMPERATURE, dim=-1)


def softmax(logits: Tensor) -> Tensor:
    return F.softmax(logits / TEMPERATURE, dim=-1)


def jeffreys(s: Tensor, t: Tensor) -> Tensor:
    lq, lp = log_softmax(s), log_softmax(t)
    return ((lp.exp() - lq.exp()) * (lp - lq)).sum(-1).mean()


def jsd(s: Tensor, t: Tensor) -> Tensor:
    lq, lp = log_softmax(s), log_softmax(t)
    p, q = lp.exp(), lq.exp()
    lm = (BETA * p + (1 - BETA) * q).log()
    return BETA * batchmean(lm, p) + (1 - BETA) * batchmean(lm, lq, log_target=True)


def skew_forward_kl(s: Tensor, t: Tensor) -> Tensor:
    p = softmax(t)
    return batchmean((SKEW * p + (1 - SKEW) * softmax(s)).log(), p)


def skew_reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    lq = log_softmax(s)
    return batchmean((SKEW * lq.exp() + (1 - SKEW) * softmax(t)).log(), lq, log_target=True)


def alpha(s: Tensor, t: Tensor) -> Tensor:
    affinity = (ALPHA * log_softmax(t) + (1 - ALPHA) * log_softmax(s)).exp().sum(-1)
    return ((1 - affinity) / (ALPHA * (1 - ALPHA))).mean()


# What is usually written in PyTorch.
PYTORCH: dict[str, Loss] = {
    "forward_kl": lambda s, t: batchmean(log_softmax(s), softmax(t)),
    "reverse_kl": lambda s, t: batchmean(log_softmax(t), log_softmax(s), log_target=True),
    "jeffreys": jeffreys,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": lambda s, t: 0.5 * (softmax(t) - softmax(s)).abs().sum(-1).mean(),
    "alpha": alpha,
}


def _kldiv_ext(problem: Problem) -> Loss:
    name = {"linear": "linear_distillation_loss"}.get(problem.op, problem.op)
    options = problem.options | ({"reduction": "batchmean"} if problem.op == "kl_div" else {})
    return lambda *inputs: getattr(kldiv_ext, name)(*inputs, **options)


def _eager(problem: Problem, cast: Callable[[Tensor], Tensor] = lambda x: x) -> Loss | None:
    """PyTorch in the dtype of the inputs."""
    if problem.op == "kl_div":
        return functools.partial(batchmean, **problem.options)
    loss = PYTORCH.get(problem.divergence)
    if loss and problem.op == "linear":
        return lambda s, w, t, u: loss(cast(F.linear(s, w)), cast(F.linear(t, u)))
    return loss and (lambda s, t: loss(cast(s), cast(t)))


def _eager_float(problem: Problem) -> Loss | None:
    """The same on `.float()` logits. For fp32 logits that is `eager`."""
    return None if problem.op == "kl_div" or problem.dtype == torch.float32 else _eager(problem, Tensor.float)


def _compiled(loss: Loss | None) -> Loss | None:
    return loss and torch.compile(loss, dynamic=False)


def _linear_cross_entropy(problem: Problem) -> Loss | None:
    """PyTorch's linear cross entropy with soft targets: the divergence plus the teacher's entropy."""
    if problem.op != "linear" or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            targets = F.softmax(F.linear(teacher, teacher_weight).div_(TEMPERATURE), -1)
        return F.linear_cross_entropy(student / TEMPERATURE, weight, targets, options=options)

    return loss


def _load_liger() -> ModuleType:
    return importlib.import_module("liger_kernel.transformers")


def missing(device: str) -> dict[str, str]:
    """The contenders that cannot run on the device, with the reason."""
    if device != "cuda":
        return {"liger": "its Triton kernels run only on a GPU"}
    try:
        _load_liger()
    except Exception as error:  # imports of broken installations raise anything
        return {"liger": f"its import {failure(error)}"}
    return {}


def _liger(problem: Problem) -> Loss | None:
    """Liger-Kernel takes (log-)probabilities, after PyTorch's softmaxes, or hidden states."""
    if "liger" in missing(problem.device):
        return None
    liger = _load_liger()
    if problem.op == "linear":
        fused: Loss = liger.LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
        return fused
    kl: Loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=problem.divergence == "log_target=True")
    if problem.op == "kl_div":
        return kl
    tvd, jsd, reverse = liger.LigerTVDLoss(), liger.LigerJSD(beta=BETA), liger.LigerJSD(beta=1.0)
    losses: dict[str, Loss] = {
        "forward_kl": lambda s, t: kl(log_softmax(s), softmax(t)),
        "reverse_kl": lambda s, t: reverse(log_softmax(s), log_softmax(t)),
        "jsd": lambda s, t: jsd(log_softmax(s), log_softmax(t)),
        "total_variation": lambda s, t: tvd(softmax(s), softmax(t)),
    }
    return losses.get(problem.divergence)


# To add a contender, write a function from a problem to a loss, or to None where it has none, and name it here.
CONTENDERS: dict[str, Callable[[Problem], Loss | None]] = {
    "kldiv_ext": _kldiv_ext,
    "eager": _eager,
    "eager_float": _eager_float,
    "compile": lambda problem: _compiled(_eager(problem)),
    "compile_float": lambda problem: _compiled(_eager_float(problem)),
    "linear_cross_entropy": _linear_cross_entropy,
    "liger": _liger,
}
FROM_LOGITS = tuple(name for name in CONTENDERS if name != "linear_cross_entropy")
SLOW_TO_BUILD = ("compile", "compile_float")  # seconds per problem
NO_TEACHER_GRADIENT = ("liger",)
