"""Errors against fp64, from unrelated pairs to nearly equal ones: `python -m benchmarks.accuracy`."""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

import kldiv_ext
from benchmarks import report_accuracy
from benchmarks.contenders import CONTENDERS, SLOW_TO_BUILD, TEMPERATURE, Expected, Loss, Problem, missing, reference
from benchmarks.measure import Step
from benchmarks.promises import describe, gradient_promise, loss_promise, missed
from benchmarks.provenance import dumps, provenance
from benchmarks.suites import names_of

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,  # kldiv_ext alone: the reference has no better arithmetic
}
LEVELS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # forward KL of the pairs
VOCABULARIES = (32000, 151936)  # Llama 2, Qwen 2.5
ROWS = 4
SPREAD = 4.0  # standard deviation of the teacher's logits, as make_inputs has it
COMPILED = ("forward_kl", "reverse_kl", "jsd")  # each takes torch.compile seconds
FIRST_SCALE = 2.0**16  # of a GradScaler


def make_pair(level: float, vocab: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, float]:
    """(student, teacher, their forward KL): noise on the teacher, as large as brings the KL to the level.

    The KL is that of the rounded logits. Where 16-bit formats do not resolve the noise, most logits of a close pair
    are equal, and what is left of the KL is in the others.
    """
    generator = torch.Generator().manual_seed(0)  # of the CPU: the same pairs on every device
    shape = (ROWS, vocab)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(SPREAD).to(device, dtype)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    log_p = torch.log_softmax(teacher.double() / TEMPERATURE, -1)

    def student_at(log_distance: float) -> tuple[Tensor, float]:
        student = (teacher + math.exp(log_distance) * noise).to(dtype)
        log_q = torch.log_softmax(student.double() / TEMPERATURE, -1)
        return student, kldiv_ext.reference.forward_kl(log_p, log_q).mean().item()

    low, high = math.log(1e-4), math.log(100.0)
    for _ in range(12):  # to within a percent of the KL
        middle = (low + high) / 2
        low, high = (middle, high) if student_at(middle)[1] < level else (low, middle)
    student, kl = student_at(high)
    return student.requires_grad_(), teacher, kl


def contenders(problem: Problem, names: list[str]) -> dict[str, Loss]:
    """Those of the names that have something for this problem."""
    chosen = {}
    for name in names:
        if name in SLOW_TO_BUILD and problem.divergence not in COMPILED:
            continue
        if problem.dtype == torch.float64 and name != "kldiv_ext":
            continue
        loss = CONTENDERS[name](problem)
        if loss is not None:
            chosen[name] = loss
    return chosen


def run(step: Step, largest: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient; of fp16 logits with the factor that a GradScaler arrives at, which doubles it until
    something overflows: tried from where the largest entry of the gradient is below 2^15."""
    fp16 = step.student.dtype == torch.float16
    step.scale = 2.0 ** (15 - math.frexp(largest)[1]) if fp16 else 1.0
    while True:
        step.reset()
        loss, gradient = step(), step.student.grad
        assert gradient is not None
        if not fp16 or gradient.isfinite().all() or not loss.isfinite() or step.scale <= 1:
            step.reset()
            return loss.detach(), gradient.double() / step.scale
        # What it went through is larger than the gradient: 16-bit losses overflow above FIRST_SCALE.
        step.scale = min(step.scale, 2 * FIRST_SCALE) / 2


def row_errors(gradient: Tensor, exact: Tensor) -> Tensor:
    """Relative L2 error of every row; a row of zeros must be exactly that."""
    error = torch.linalg.vector_norm(gradient - exact, dim=-1)
    return torch.where(error == 0, 0, error / torch.linalg.vector_norm(exact, dim=-1))


def compare(name: str, step: Step, expected: Expected, problem: Problem) -> dict[str, Any]:
    """Errors, and a status: ok, missed (a promise of kldiv_ext), not finite, or why the contender could not run."""
    try:
        loss, gradient = run(step, expected[1].abs().max().item())
    except Exception as error:  # a contender's failure is a result, not the end of the run
        step.reset()
        return {"status": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    exact = expected[0]
    loss_error = abs(loss.item() - exact)
    gradient_error = row_errors(gradient, expected[1].double()).max().item()
    finite = math.isfinite(loss_error) and math.isfinite(gradient_error)
    status = "ok" if finite else "not finite"
    if name == "kldiv_ext":
        kept = {
            "loss": loss.item() >= 0 and loss_error <= loss_promise(problem.divergence, exact),
            "gradient": gradient_error <= gradient_promise(problem.divergence, dtype_name(problem.dtype)),
        }
        status = "ok" if all(kept.values()) else f"missed: {', '.join(k for k, v in kept.items() if not v)}"
    return {
        "loss_error": rounded(loss_error / exact),
        "loss_error_absolute": rounded(loss_error),
        "gradient_error": rounded(gradient_error),
        **({} if step.scale == 1 else {"gradient_scale": step.scale}),
        "status": status,
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded(value: float) -> float | None:
    """Four digits; None for what is not finite, which JSON cannot hold."""
    return float(f"{value:.3e}") if math.isfinite(value) else None


def measure(
    problem: Problem, pairs: dict[float, tuple[Tensor, Tensor, float]], names: list[str]
) -> Iterator[dict[str, Any]]:
    """One record for each pair and contender."""
    losses = contenders(problem, names)
    if "compile" in losses:
        torch.compiler.reset()  # or the recompile limit would turn later problems into eager ones
    for level, (student, teacher, kl) in pairs.items():
        expected = reference(problem, student, teacher)
        for name, loss in losses.items():
            yield {
                "divergence": problem.divergence,
                "dtype": dtype_name(problem.dtype),
                "vocab": problem.vocab,
                "level": level,
                "kl": rounded(kl),
                "loss": rounded(expected[0]),
                "contender": name,
                **compare(name, Step(loss, student, teacher, backward=True), expected, problem),
            }


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="a small vocabulary, three levels, no torch.compile")
    parser.add_argument(
        "--contenders", type=names_of(tuple(CONTENDERS)), help=f"of {','.join(CONTENDERS)}; default all"
    )
    args = parser.parse_args(argv)
    chosen = args.contenders or [name for name in CONTENDERS if not args.quick or name not in SLOW_TO_BUILD]
    args.contenders = list(dict.fromkeys(["kldiv_ext", *chosen]))
    return args


def left_out(args: argparse.Namespace) -> dict[str, str]:
    """Who is not in the results, and why."""
    unasked = {name: "not asked for" for name in CONTENDERS if name not in args.contenders}
    return unasked | missing(args.device)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    vocabularies, levels = ((1000,), (1.0, 1e-3, 1e-6)) if args.quick else (VOCABULARIES, LEVELS)
    report: dict[str, Any] = {
        **provenance(" ".join(["python -m benchmarks.accuracy", *argv]), args.device),
        "temperature": TEMPERATURE,
        "rows": ROWS,
        "left_out": left_out(args),
        "accuracy": [],
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    records = report["accuracy"]
    total = len(DTYPES) * len(vocabularies) * len(kldiv_ext.DIVERGENCES)
    progress = tqdm(total=total, unit="problem", disable=None)
    for dtype in DTYPES.values():
        for vocab in vocabularies:
            pairs = {level: make_pair(level, vocab, dtype, args.device) for level in levels}
            for divergence in kldiv_ext.DIVERGENCES:
                problem = Problem("distillation_loss", divergence, ROWS, vocab, dtype, args.device)
                progress.set_description(str(problem))
                records += measure(problem, pairs, args.contenders)
                progress.update()
                if args.json:  # after every problem: a run that is cut short keeps what it has
                    args.json.write_text(dumps(report, "accuracy"))
    progress.close()
    print(*(make(report) for make in report_accuracy.TABLES.values()), sep="\n\n")
    broken = missed(records)
    if broken:
        print("kldiv_ext does not keep its promises:", *map(describe, broken), sep="\n", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
