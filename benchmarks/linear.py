"""Divergences from hidden states: time, memory and errors beside others' and beside the bare matrix products.

Run as `python -m benchmarks.linear`.
"""

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

import kldiv_ext
from benchmarks import report_linear
from benchmarks.contenders import TEMPERATURE, liger_missing
from benchmarks.measure import Step, keep_freed_memory, peak_extra_bytes, quantiles, time_steps
from benchmarks.provenance import dumps, provenance
from benchmarks.suites import names_of
from kldiv_ext.linear import DEFAULT_WORKSPACE

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Positions, hidden size, vocabulary.
SHAPES = {"cpu": ((4096, 512, 32768),), "cuda": ((4096, 4096, 128256), (8192, 4096, 151936))}
# Over many positions: these of the first shape, and in this dtype.
POSITIONS = tuple(2**i for i in range(10, 17))
QUICK_SHAPE, QUICK_POSITIONS = (64, 16, 512), (32, 64)
REFERENCE_LOGITS = 2**24  # that the fp64 reference holds at a time
SHARE_OF_MEMORY = 0.6  # that a contender may be expected to take
ABSURD_ERROR = 0.5  # of a gradient: not the same computation

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """The forward KL of two heads, a mean over positions, with gradients to the student's hidden states and head."""

    positions: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    device: str
    distance: float = 1.0  # of the student from the teacher; 0 is the same

    def __str__(self) -> str:
        return f"{self.positions}x{self.hidden}x{self.vocab} {str(self.dtype).removeprefix('torch.')}"


class Models:
    """student hidden, student weight, teacher hidden, teacher weight."""

    def __init__(self, problem: Problem) -> None:
        generator = torch.Generator(problem.device).manual_seed(0)

        def noise(rows: int, scale: float = 1.0) -> Tensor:
            shape = (rows, problem.hidden)
            return torch.randn(shape, generator=generator, device=problem.device) * scale

        hidden, weight = noise(problem.positions), noise(problem.vocab, 4 * problem.hidden**-0.5)
        away = hidden + problem.distance * noise(problem.positions)
        self.student = away.to(problem.dtype).requires_grad_()
        self.student_weight = (weight + noise(problem.vocab, problem.distance * problem.hidden**-0.5)).to(problem.dtype)
        self.student_weight.requires_grad_()
        self.teacher, self.teacher_weight = hidden.to(problem.dtype), weight.to(problem.dtype)

    def __iter__(self) -> Any:
        return iter((self.student, self.student_weight, self.teacher, self.teacher_weight))


class LinearStep(Step):
    """One run of a contender: loss and gradients."""

    def __init__(self, loss: Loss, models: Models) -> None:
        super().__init__(lambda s, t: loss(*models), models.student, models.teacher, backward=True)
        self.models = models
        self.scale = 1.0

    def reset(self) -> None:
        self.models.student.grad = self.models.student_weight.grad = None


class Products(LinearStep):
    """The matrix products alone, of all positions at once, into memory that is there: the limit."""

    def __init__(self, models: Models) -> None:
        super().__init__(_kldiv_ext, models)
        self.logits = models.student.new_empty(models.student.shape[0], models.student_weight.shape[0])
        self.gradients = [torch.empty_like(models.student), torch.empty_like(models.student_weight)]

    def __call__(self) -> Tensor:
        student, weight, teacher, teacher_weight = self.models
        with torch.no_grad():
            torch.mm(teacher, teacher_weight.t(), out=self.logits)
            torch.mm(student, weight.t(), out=self.logits)
            torch.mm(self.logits, weight, out=self.gradients[0])
            torch.mm(self.logits.t(), student, out=self.gradients[1])
        return self.logits


def _kldiv_ext(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    return kldiv_ext.linear_distillation_loss(student, weight, teacher, teacher_weight, temperature=TEMPERATURE)


def _from_logits(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = F.log_softmax(student / TEMPERATURE, -1)
    return F.kl_div(log_q, F.softmax(teacher / TEMPERATURE, -1), reduction="batchmean")


def _eager(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """As it is usually written, in the dtype of the models."""
    return _from_logits(F.linear(student, weight), F.linear(teacher, teacher_weight))


def _eager_float(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """The same with `.float()` logits."""
    return _from_logits(F.linear(student, weight).float(), F.linear(teacher, teacher_weight).float())


def _linear_cross_entropy(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """PyTorch's chunked one with soft targets; less the teacher's entropy it is the divergence."""
    with torch.no_grad():
        targets = F.softmax(F.linear(teacher, teacher_weight).div_(TEMPERATURE), -1)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(student / TEMPERATURE, weight, targets, options=options)


def _linear_logits_of(module: Any) -> Loss:
    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return module(student, weight, teacher, teacher_weight)

    return loss


def contenders(problem: Problem, names: list[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Who takes part, and why others do not."""
    known: dict[str, Callable[[], Loss]] = {
        "kldiv_ext": lambda: _kldiv_ext,
        "eager": lambda: _eager,
        "eager_float": lambda: _eager_float,
        "compile": lambda: torch.compile(_eager, dynamic=False),
        "compile_float": lambda: torch.compile(_eager_float, dynamic=False),
        "linear_cross_entropy": lambda: _linear_cross_entropy,
        "liger": lambda: _linear_logits_of(
            importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD(
                jsd_beta=0.0, temperature=TEMPERATURE
            )
        ),
    }
    missing = {}
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        missing["linear_cross_entropy"] = f"torch {torch.__version__} has none"
    if reason := liger_missing(problem.device):
        missing["liger"] = reason
    if problem.dtype == torch.float32:  # the same as without
        known = {name: build for name, build in known.items() if not name.endswith("_float")}
    return {name: known[name]() for name in names if name in known and name not in missing}, missing


NAMES = ("kldiv_ext", "eager", "eager_float", "compile", "compile_float", "linear_cross_entropy", "liger")


@dataclass(frozen=True)
class Expected:
    """Loss, teacher's entropy and gradients in fp64 from the rounded inputs; gradients stored as fp32."""

    loss: float
    entropy: float
    gradients: tuple[Tensor, Tensor]


def reference(problem: Problem, models: Models) -> Expected:
    weight, teacher_weight = models.student_weight.detach().double(), models.teacher_weight.double()
    loss = entropy = 0.0
    of_hidden = torch.empty_like(models.student, dtype=torch.float32)
    of_weight = torch.zeros_like(weight)
    step = max(1, REFERENCE_LOGITS // problem.vocab)
    for begin in range(0, problem.positions, step):
        rows = slice(begin, begin + step)
        hidden = models.student[rows].detach().double()
        logits = (hidden @ weight.t()).requires_grad_()
        teacher = models.teacher[rows].double() @ teacher_weight.t()
        part = kldiv_ext.reference.distillation_loss(logits, teacher, reduction="sum", temperature=TEMPERATURE)
        (gradient,) = torch.autograd.grad(part / problem.positions, logits)
        of_hidden[rows] = gradient @ weight
        of_weight += gradient.t() @ hidden
        loss += part.item() / problem.positions
        log_p = torch.log_softmax(teacher / TEMPERATURE, -1)
        entropy -= (log_p.exp() * log_p).sum().item() / problem.positions
    return Expected(loss, entropy, (of_hidden, of_weight.float()))


def _distance(found: Tensor | None, expected: Tensor) -> float:
    if found is None:
        raise RuntimeError("a gradient is missing")
    return (torch.linalg.vector_norm(found.float() - expected) / torch.linalg.vector_norm(expected)).item()


def errors(name: str, step: LinearStep, expected: Expected) -> dict[str, Any]:
    """Relative errors of loss and gradients, and whether they are of the same computation."""
    step.reset()
    try:
        loss = step().item() - (expected.entropy if name == "linear_cross_entropy" else 0)
        hidden, weight = (
            _distance(x.grad, e)
            for x, e in zip((step.models.student, step.models.student_weight), expected.gradients, strict=True)
        )
    except Exception as error:  # a contender's failure is a result
        return {"status": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        step.reset()
    right = hidden <= ABSURD_ERROR and weight <= ABSURD_ERROR
    return {
        "loss_error": abs(loss - expected.loss) / expected.loss,
        "hidden_error": hidden,
        "weight_error": weight,
        "status": "ok" if right else "WRONG",
    }


def row(problem: Problem, name: str, models: Models) -> dict[str, Any]:
    return {
        "contender": name,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "positions": problem.positions,
        "hidden": problem.hidden,
        "vocab": problem.vocab,
        "gradient_bytes": models.student.nbytes + models.student_weight.nbytes,
        "workspace_bytes": DEFAULT_WORKSPACE[problem.device] if name == "kldiv_ext" else None,
    }


def prepare(problem: Problem, args: argparse.Namespace) -> tuple[Models, dict[str, Loss], dict[str, str]]:
    """Inputs, and `contenders` that have compiled nothing yet."""
    torch.compiler.reset()
    return Models(problem), *contenders(problem, args.contenders)


def measure(problem: Problem, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every contender's errors and memory; why others do not take part."""
    models, losses, missing = prepare(problem, args)
    expected = reference(problem, models)
    rows = []
    for name, loss in losses.items():
        step = LinearStep(loss, models)
        found = row(problem, name, models) | errors(name, step, expected)
        if not found["status"].startswith("failed"):
            found["peak_extra_bytes"] = peak_extra_bytes(step, problem.device)
        step.reset()
        rows.append(found)
    return [*rows, row(problem, "products", models) | {"status": "ok"}], missing


def clock(problem: Problem, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Adds the times of those that `measure` found to work, side by side."""
    models, losses, _ = prepare(problem, args)
    of = {found["contender"]: found for found in rows if not found["status"].startswith("failed")}
    steps: dict[str, LinearStep] = {"products": Products(models)}
    steps |= {name: LinearStep(loss, models) for name, loss in losses.items() if name in of}
    times = time_steps(dict(steps), problem.device, args.repeats, args.seconds)
    limit = statistics.median(times["products"])
    for name, found in times.items():
        p20, p50, p80 = quantiles(found)
        of[name].update(ms_p20=p20, ms_p50=p50, ms_p80=p80, rounds=len(found), share=limit / p50)


def close_pair(problem: Problem, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors where the student is close to the teacher."""
    models, losses, _ = prepare(problem, args)
    expected = reference(problem, models)
    results = []
    for name, loss in losses.items():
        found = errors(name, LinearStep(loss, models), expected)
        if not found["status"].startswith("failed"):
            found["status"] = "ok"  # that gradients are far off is the result
        results.append(row(problem, name, models) | {"kl": expected.loss} | found)
    return results


def over_positions(problem: Problem, args: argparse.Namespace, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every contender's memory and the time of one run; who would take too much, after fewer positions, is left out."""
    models, losses, _ = prepare(problem, args)
    memory = report["machine"]["gpu_memory_bytes"] or report["machine"]["memory_bytes"]
    rows = []
    for name, loss in losses.items():
        if name.endswith("_float"):
            continue
        found = row(problem, name, models)
        rows.append(found)
        before = [r for r in report["positions"] if r["contender"] == name and r.get("peak_extra_bytes")]
        expected = before[-1]["peak_extra_bytes"] * problem.positions / before[-1]["positions"] if before else 0
        if expected > SHARE_OF_MEMORY * memory:
            found["status"] = "left out: more memory than there is"
            continue
        step = LinearStep(loss, models)
        try:
            if name == "compile":
                step()  # compiles
            found["peak_extra_bytes"] = peak_extra_bytes(step, problem.device)
            ((found["ms"],),) = time_steps({"it": step}, problem.device, 1, 0).values()
            found["status"] = "ok"
        except Exception as error:
            found["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        step.reset()
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", type=names_of(tuple(DTYPES)), default=list(DTYPES), help=f"of {','.join(DTYPES)}")
    add("--contenders", type=names_of(NAMES), default=list(NAMES), help=f"of {','.join(NAMES)}; kldiv_ext always")
    add("--repeats", type=int, default=15, help="most rounds per problem")
    add("--seconds", type=float, default=60.0, help="time per problem (at least three rounds)")
    add("--json", type=Path, help="write the results to this file")
    add("--quick", action="store_true", help="tiny shapes, no torch.compile")
    args = parser.parse_args(argv)
    if args.quick:
        args.contenders = [name for name in args.contenders if not name.startswith("compile")]
        args.repeats, args.seconds = 3, 0
    args.contenders = ["kldiv_ext", *(name for name in args.contenders if name != "kldiv_ext")]
    shapes = (QUICK_SHAPE,) if args.quick else SHAPES[args.device]
    problems = [Problem(*shape, DTYPES[dtype], args.device) for shape in shapes for dtype in args.dtype]
    positions, hidden, vocab = shapes[0]
    counts = QUICK_POSITIONS if args.quick else POSITIONS
    many = [Problem(n, hidden, vocab, DTYPES[args.dtype[0]], args.device) for n in counts]
    close = [Problem(min(positions, 512), hidden, vocab, DTYPES[dtype], args.device, 0.01) for dtype in args.dtype]
    report: dict[str, Any] = {
        **provenance(" ".join(["python -m benchmarks.linear", *argv]), args.device),
        "temperature": TEMPERATURE,
        "left_out": {},
        "linear": [],
        "close": [],
        "positions": [],
    }

    def save() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(dumps(report, "linear"))

    # Memory first, then times: see keep_freed_memory.
    of: dict[Problem, list[dict[str, Any]]] = {}

    def first(problem: Problem) -> None:
        of[problem], missing = measure(problem, args)
        report["linear"] += of[problem]
        report["left_out"] |= missing

    def closely(problem: Problem) -> None:
        report["close"] += close_pair(problem, args)

    def over(problem: Problem) -> None:
        report["positions"] += over_positions(problem, args, report)

    def timed(problem: Problem) -> None:
        keep_freed_memory()
        clock(problem, args, of[problem])

    stages: list[tuple[str, list[Problem], Callable[[Problem], None]]] = [
        ("errors and memory", problems, first),
        ("close pairs", close, closely),
        ("over positions", many, over),
        ("time", problems, timed),
    ]
    with tqdm(total=sum(len(of_stage) for _, of_stage, _ in stages), disable=None) as progress:
        for name, of_stage, do in stages:
            for problem in of_stage:
                progress.set_description(f"{name}, {problem}")
                do(problem)
                save()
                progress.update()
    for kind in report_linear.TABLES:
        print(report_linear.TABLES[kind](report), end="\n\n")
    broken = [
        r for r in report["linear"] + report["positions"] if r["contender"] == "kldiv_ext" and r["status"] != "ok"
    ]
    for result in broken:
        print(f"kldiv_ext: {result}", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
