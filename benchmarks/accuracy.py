"""Errors of losses and gradients against fp64, from unrelated models to nearly equal ones."""

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

import kldiv_ext
from benchmarks.contenders import CONTENDERS, FROM_LOGITS, SLOW_TO_BUILD, TEMPERATURE, Problem, missing, reference
from benchmarks.measure import Expected, Step
from benchmarks.promises import describe, gradient_promise, loss_promise, missed
from benchmarks.report import TABLES, points
from benchmarks.results import Record, Report, dumps, failure, loads, make_parser, names_of, provenance, save

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,  # kldiv_ext alone: the reference is no more exact
}
LEVELS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # forward KL of the pairs
VOCABULARIES = (32000, 151936)  # Llama 2, Qwen 2.5
ROWS = 4
SPREAD = 4.0  # standard deviation of the teacher's logits, as in make_inputs
COMPILED = ("forward_kl", "reverse_kl", "jsd")  # torch.compile takes seconds for each
FIRST_SCALE = 2.0**16  # of a GradScaler

Pair = tuple[Tensor, Tensor]


def make_pair(level: float, vocab: int, dtype: torch.dtype, device: str) -> Pair:
    """(student, teacher): the teacher's logits plus the noise that makes the rounded logits' forward KL the level."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same pairs on every device
    shape = (ROWS, vocab)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(SPREAD).to(device, dtype)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    log_p = torch.log_softmax(teacher.double() / TEMPERATURE, -1)

    def student_at(log_distance: float) -> tuple[Tensor, float]:
        student = (teacher + math.exp(log_distance) * noise).to(dtype)
        log_q = torch.log_softmax(student.double() / TEMPERATURE, -1)
        return student, kldiv_ext.reference.forward_kl(log_p, log_q).mean().item()

    low, high = math.log(1e-4), math.log(100.0)
    for _ in range(12):  # bisection, to a percent of the KL
        middle = (low + high) / 2
        low, high = (middle, high) if student_at(middle)[1] < level else (low, middle)
    return student_at(high)[0].requires_grad_(), teacher


def run(step: Step, largest: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient; fp16 losses are scaled as by a GradScaler, which doubles its factor until something overflows.

    The search starts where the largest entry of the gradient is below 2^15.
    """
    fp16 = step.inputs[0].dtype == torch.float16
    step.scale = 2.0 ** (15 - math.frexp(largest)[1]) if fp16 else 1.0
    while True:
        step.reset()
        loss, gradient = step(), step.inputs[0].grad
        assert gradient is not None
        if not fp16 or gradient.isfinite().all() or not loss.isfinite() or step.scale <= 1:
            step.reset()
            return loss.detach(), gradient.double() / step.scale
        # An intermediate value overflows before the gradient does: 16-bit losses do above FIRST_SCALE.
        step.scale = min(step.scale, 2 * FIRST_SCALE) / 2


def compare(name: str, step: Step, expected: Expected, problem: Problem) -> Record:
    """Errors and a status: ok, missed (a promise of kldiv_ext), not finite, or why the contender failed."""
    exact, gradients = expected.loss, expected.gradients
    try:
        loss, gradient = run(step, gradients[0].abs().max().item())
    except Exception as error:  # a contender's failure is a result, not the end of the run
        step.reset()
        return {"loss": exact, "status": failure(error)}
    loss_error = abs(loss.item() - exact)
    row_errors = torch.linalg.vector_norm(gradient - gradients[0].double(), dim=-1)
    relative = row_errors / torch.linalg.vector_norm(gradients[0].double(), dim=-1)
    gradient_error = torch.where(row_errors == 0, 0, relative).max().item()
    status = "ok" if math.isfinite(loss_error) and math.isfinite(gradient_error) else "not finite"
    if name == "kldiv_ext":
        kept = {
            "loss": loss.item() >= 0 and loss_error <= loss_promise(problem.divergence, exact),
            "gradient": gradient_error <= gradient_promise(problem.divergence, problem.labels["dtype"]),
        }
        status = "ok" if all(kept.values()) else f"missed: {', '.join(k for k, v in kept.items() if not v)}"
    return {"loss": exact, "loss_error": loss_error / exact, "gradient_error": gradient_error, "status": status}


def measure(problem: Problem, pairs: dict[float, Pair], names: list[str]) -> Iterator[Record]:
    """A record per contender. Its lists hold a value per pair; a status that all pairs share stands alone."""
    if problem.divergence not in COMPILED:
        names = [name for name in names if name not in SLOW_TO_BUILD]
    if problem.dtype == torch.float64:
        names = ["kldiv_ext"]
    losses = {name: loss for name in names if (loss := CONTENDERS[name](problem))}
    if "compile" in losses:
        torch.compiler.reset()  # or later problems reach the recompile limit and run eagerly
    expected = [reference(problem, pair) for pair in pairs.values()]
    for name, loss in losses.items():
        found = [
            compare(name, Step(loss, *pair, backward=True), exact, problem)
            for pair, exact in zip(pairs.values(), expected, strict=True)
        ]
        yield {
            "contender": name,
            **problem.labels,
            "level": list(pairs),
            **{key: [x.get(key) for x in found] for key in ("loss", "loss_error", "gradient_error")},
            "status": found[0]["status"] if len({x["status"] for x in found}) == 1 else [x["status"] for x in found],
        }


def main(argv: list[str]) -> int:
    parser = make_parser("benchmarks.accuracy", __doc__, quick="a small vocabulary, three levels, no torch.compile")
    parser.add_argument("--contenders", type=names_of(FROM_LOGITS), help=f"of {','.join(FROM_LOGITS)}")
    args = parser.parse_args(argv)
    chosen = args.contenders or [name for name in FROM_LOGITS if not args.quick or name not in SLOW_TO_BUILD]
    names = list(dict.fromkeys(["kldiv_ext", *chosen]))
    vocabularies, levels = ((1000,), (1.0, 1e-3, 1e-6)) if args.quick else (VOCABULARIES, LEVELS)
    result: Report = {
        **provenance(" ".join(["python -m benchmarks.accuracy", *argv]), args.device),
        "temperature": TEMPERATURE,
        "rows": ROWS,
        "left_out": {name: "not asked for" for name in FROM_LOGITS if name not in names} | missing(args.device),
        "accuracy": [],
    }
    settings = [(dtype, vocab) for dtype in DTYPES.values() for vocab in vocabularies]
    with tqdm(total=len(settings) * len(kldiv_ext.DIVERGENCES), unit="problem", disable=None) as progress:
        for dtype, vocab in settings:
            pairs = {level: make_pair(level, vocab, dtype, args.device) for level in levels}
            for divergence in kldiv_ext.DIVERGENCES:
                problem = Problem("distillation_loss", divergence, ROWS, vocab, dtype, args.device)
                progress.set_description(str(problem))
                result["accuracy"] += measure(problem, pairs, names)
                progress.update()
                save(result, args.json)  # a run that is cut short keeps its results
    finished = loads(dumps(result))
    for name in ("gradient", "loss", "total_variation", "promises"):
        print(TABLES[f"accuracy-{name}"].make(finished), end="\n\n")
    broken = missed(points(finished["accuracy"]))
    if broken:
        print("kldiv_ext does not keep its promises:", *map(describe, broken), sep="\n", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
