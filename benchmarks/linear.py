"""Divergences from hidden states: time, peak memory and errors beside PyTorch's and the bare matrix products."""

import statistics
import sys

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

import kldiv_ext.linear
from benchmarks.contenders import CONTENDERS, TEMPERATURE, Problem, make_inputs, missing, reference
from benchmarks.measure import Step, keep_freed_memory, peak_extra_bytes, quantiles, time_steps, timer_name, verify
from benchmarks.promises import missed
from benchmarks.report import TABLES
from benchmarks.results import Record, Report, dumps, failure, loads, make_parser, names_of, provenance, save
from benchmarks.suites import DTYPES

# Positions, hidden size, vocabulary.
SHAPES = {"cpu": ((4096, 512, 32768),), "cuda": ((4096, 4096, 128256), (8192, 4096, 151936))}
# Numbers of positions for the curve of memory, with the first hidden size, vocabulary and dtype.
POSITIONS = tuple(2**i for i in range(10, 17))
QUICK_SHAPE, QUICK_POSITIONS = (64, 16, 512), (32, 64)
CLOSE, CLOSE_POSITIONS = 0.01, 512  # distance and positions of a pair of close models
SHARE_OF_MEMORY = 0.6  # a contender that is expected to need more is not run


def products(inputs: tuple[Tensor, ...]) -> Step:
    """The four matrix products over all positions at once, into existing memory: the limit of speed."""
    student, weight, teacher, teacher_weight = inputs
    logits = student.new_empty(student.shape[0], weight.shape[0])
    hidden_gradient, weight_gradient = torch.empty_like(student), torch.empty_like(weight)

    def multiply() -> Tensor:
        torch.mm(teacher, teacher_weight.t(), out=logits)
        torch.mm(student, weight.t(), out=logits)
        torch.mm(logits, weight, out=hidden_gradient)
        return torch.mm(logits.t(), student, out=weight_gradient)

    return Step(multiply, backward=False)


class Stages:
    """What is measured, a method per stage; each adds to the report."""

    def __init__(self, names: list[str], repeats: int, seconds: float, report: Report) -> None:
        self.names, self.repeats, self.seconds, self.report = names, repeats, seconds, report

    def steps(self, problem: Problem) -> dict[str, Step]:
        """A step per contender, nothing compiled yet."""
        torch.compiler.reset()
        inputs = make_inputs(problem)
        losses = {name: CONTENDERS[name](problem) for name in self.names}
        return {name: Step(loss, *inputs, backward=True) for name, loss in losses.items() if loss}

    def errors_and_memory(self, problem: Problem) -> None:
        """Gradients of close bf16 pairs are far off: a result, not a failure."""
        steps = self.steps(problem)
        expected = reference(problem, steps["kldiv_ext"].inputs)
        for name, step in steps.items():
            offset = expected.entropy if name == "linear_cross_entropy" else 0.0
            found = verify(step, expected, ("hidden_error", "weight_error"), offset=offset)
            if problem.distance == CLOSE:
                found |= {"kl": expected.loss, "status": found["status"].replace("WRONG", "ok")}
                self.report["close"].append({"contender": name, **problem.labels, **found})
                continue
            if not found["status"].startswith("failed"):
                found["peak_extra_bytes"] = peak_extra_bytes(step, problem.device)
            self.report["linear"].append({"contender": name, **problem.labels, **found})
        if problem.distance != CLOSE:
            self.report["linear"].append({"contender": "products", **problem.labels, "status": "ok"})

    def memory_over_positions(self, problem: Problem) -> None:
        """Peak memory and the time of one run, without contenders that would need too much memory."""
        machine = self.report["machine"]
        limit = SHARE_OF_MEMORY * (machine["gpu_memory_bytes"] or machine["memory_bytes"])
        for name, step in self.steps(problem).items():
            if name.endswith("_float"):
                continue
            found: Record = {"gradient_bytes": step.gradient_bytes, "status": "ok"}
            before = [r for r in self.report["positions"] if r["contender"] == name and r.get("peak_extra_bytes")]
            if before and before[-1]["peak_extra_bytes"] * problem.rows / before[-1]["rows"] > limit:
                found["status"] = "left out: more memory than there is"
            else:
                try:
                    if name == "compile":
                        step()  # compiles
                    found["peak_extra_bytes"] = peak_extra_bytes(step, problem.device)
                    times = time_steps({name: step}, timer_name(problem.device, problem.rows * problem.vocab), 1, 0)
                    found["ms_p50"] = times[name][0]
                except Exception as error:  # a result, such as too little memory
                    found["status"] = failure(error)
                step.reset()
            self.report["positions"].append({"contender": name, **problem.labels, **found})

    def times(self, problem: Problem) -> None:
        """In rounds, beside the products."""
        keep_freed_memory()
        records = [record for record in self.report["linear"] if problem.labels.items() <= record.items()]
        works = {r["contender"]: r for r in records if not r["status"].startswith("failed")}
        steps = {name: step for name, step in self.steps(problem).items() if name in works}
        steps["products"] = products(steps["kldiv_ext"].inputs)
        times = time_steps(steps, timer_name(problem.device, problem.rows * problem.vocab), self.repeats, self.seconds)
        limit = statistics.median(times["products"])
        for name, found in times.items():
            works[name] |= quantiles(found) | {"rounds": len(found), "share": limit / statistics.median(found)}


def main(argv: list[str]) -> int:
    parser = make_parser("benchmarks.linear", __doc__, quick="tiny shapes, no torch.compile")
    add = parser.add_argument
    add("--dtype", type=names_of(tuple(DTYPES)), default=["bfloat16", "float32"], help="default: bfloat16,float32")
    add("--contenders", type=names_of(tuple(CONTENDERS)), help=f"of {','.join(CONTENDERS)}")
    add("--repeats", type=int, default=15, help="rounds per problem, at most (default %(default)s)")
    add("--seconds", type=float, default=60.0, help="time per problem, for at least three rounds (default %(default)s)")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(["kldiv_ext", *(args.contenders or CONTENDERS)]))
    shapes, counts = SHAPES[args.device], POSITIONS
    if args.quick:
        shapes, counts, args.repeats, args.seconds = (QUICK_SHAPE,), QUICK_POSITIONS, 3, 0
        names = [name for name in names if not name.startswith("compile")]
    left_out = missing(args.device)
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        left_out["linear_cross_entropy"] = f"torch {torch.__version__} has none"
    report: Report = {
        **provenance(" ".join(["python -m benchmarks.linear", *argv]), args.device),
        "temperature": TEMPERATURE,
        "workspace_bytes": kldiv_ext.linear.DEFAULT_WORKSPACE[args.device],
        "left_out": left_out,
        "linear": [],
        "close": [],
        "positions": [],
    }

    def problem(rows: int, hidden: int, vocab: int, dtype: str, distance: float = 1.0) -> Problem:
        return Problem("linear", "forward_kl", rows, vocab, DTYPES[dtype], args.device, hidden, distance)

    rows, hidden, vocab = shapes[0]
    problems = [problem(*shape, dtype) for shape in shapes for dtype in args.dtype]
    close = [problem(min(rows, CLOSE_POSITIONS), hidden, vocab, dtype, CLOSE) for dtype in args.dtype]
    many = [problem(count, hidden, vocab, args.dtype[0]) for count in counts]
    stages = Stages(names, args.repeats, args.seconds, report)
    # Memory first, then times: see keep_freed_memory.
    work = [(stages.errors_and_memory, p) for p in problems + close]
    work += [(stages.memory_over_positions, p) for p in many] + [(stages.times, p) for p in problems]
    progress = tqdm(work, disable=None)
    for stage, task in progress:
        progress.set_description(f"{stage.__name__}, {task}")
        stage(task)
        save(report, args.json)  # a run that is cut short keeps its results
    for name in ("linear", "linear-close", "linear-positions"):
        print(TABLES[name].make(loads(dumps(report))), end="\n\n")
    broken = missed(report["linear"] + report["positions"])
    for record in broken:
        print(f"kldiv_ext: {record}", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
