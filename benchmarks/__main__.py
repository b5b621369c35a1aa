"""Time, peak memory and errors from logits, beside what people use today. Results are checked before they are timed."""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

import kldiv_ext
from benchmarks import contenders
from benchmarks.measure import Step, copy_bandwidth, peak_extra_bytes, quantiles, time_steps, timer_name, verify
from benchmarks.promises import missed
from benchmarks.report import TABLES
from benchmarks.results import Record, Report, dumps, failure, loads, make_parser, names_of, provenance, save
from benchmarks.suites import DTYPES, MINIMUM_TRAFFIC, MODES, OPS, SUITES, Task, shapes, tasks


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks", __doc__, quick="tiny shapes, three rounds, no torch.compile")
    add = parser.add_argument
    add("--suite", choices=SUITES, default="default", help="gpu: all that is asked of a GPU, in minutes")
    add("--op", type=names_of(OPS), help=f"of {','.join(OPS)}")
    add("--divergence", type=names_of(kldiv_ext.DIVERGENCES), help="default: all for the first shape and dtype")
    add("--shapes", type=shapes, help="ROWSxVOCAB,...")
    add("--dtype", type=names_of(tuple(DTYPES)), help="default: bfloat16,float32")
    add("--mode", type=names_of(MODES), help=f"of {','.join(MODES)}; default: the first two")
    add("--contenders", type=names_of(contenders.FROM_LOGITS), help=f"of {','.join(contenders.FROM_LOGITS)}")
    add("--list", action="store_true", help="print what would be measured, and stop")
    add("--check", action="store_true", help="check against fp64, time nothing")
    add("--repeats", type=int, default=50, help="rounds per problem, at most (default %(default)s)")
    add("--seconds", type=float, default=10.0, help="time per problem and mode, for at least three rounds")
    add("--limit", type=float, default=math.inf, help="seconds in all; the results name what is left out")
    return parser.parse_args(argv)


def measure(task: Task, args: argparse.Namespace, bandwidth: float | None) -> Iterator[Record]:
    """The results of one problem: every contender in every mode."""
    problem = task.problem
    if any(name.startswith("compile") for name in task.contenders):
        torch.compiler.reset()  # or later shapes reach the recompile limit and run eagerly
    student, teacher = contenders.make_inputs(problem)
    teacher.requires_grad_("forward_backward_teacher" in task.modes)
    expected = contenders.reference(problem, (student, teacher))
    losses = {name: loss for name in task.contenders if (loss := contenders.CONTENDERS[name](problem))}
    timer = timer_name(problem.device, problem.rows * problem.vocab)
    for mode in task.modes:
        backward, both = mode != "forward", mode == "forward_backward_teacher"
        factor = 0.5 if mode == "forward_backward_half" else 1.0
        teacher.requires_grad_(both)
        rows: dict[str, Record] = {}
        steps: dict[str, Step] = {}
        for name, loss in losses.items():
            if both and name in contenders.NO_TEACHER_GRADIENT:
                continue
            step = Step(loss, student, teacher, backward=backward, factor=factor)
            found = verify(step, expected, ("grad_error", "teacher_grad_error"), promised=name == "kldiv_ext")
            rows[name] = {"contender": name, "mode": mode, **problem.labels, **found}
            if rows[name]["status"] == "ok":
                steps[name] = step
        if not args.check and "kldiv_ext" in steps:
            times = time_steps(steps, timer, min(args.repeats, 3) if args.quick else args.repeats, args.seconds)
            traffic = MINIMUM_TRAFFIC[problem.op, mode] * student.nbytes
            for name, step in steps.items():
                median = statistics.median(times[name])
                rows[name] |= quantiles(times[name]) | {
                    "rounds": len(times[name]),
                    "timer": timer,
                    "ratio": median / statistics.median(times["kldiv_ext"]),
                    "share": traffic / (median / 1e3) / bandwidth if bandwidth else None,
                    "peak_extra_bytes": peak_extra_bytes(step, problem.device),
                }
        yield from rows.values()


def run(chosen: list[Task], args: argparse.Namespace, bandwidth: float | None, report: Report) -> None:
    """Adds to the report's results, failures and left_out, and writes it after every problem."""
    begin = time.perf_counter()
    progress = tqdm(chosen, unit="problem", dynamic_ncols=True, disable=None)
    for done, task in enumerate(progress):
        progress.set_description(str(task.problem))
        spent = time.perf_counter() - begin
        if spent > args.limit:
            rest = [f"{task.problem} {','.join(task.modes)}" for task in chosen[done:]]
            report["left_out"]["problems"] = {"reason": f"the limit of {args.limit:g} s", "those": rest}
            save(report, args.json)
            break
        if spent > args.limit / 2:  # or slow contenders would leave no time for other problems
            task, slow = task.without_slow()
            if slow:
                report["left_out"].setdefault("time", []).append(f"{task.problem}: {', '.join(slow)}")
        try:
            report["results"] += list(measure(task, args, bandwidth))
        except Exception as error:
            report["failures"].append(f"{task.problem}: {failure(error)}")
            print(report["failures"][-1], file=sys.stderr, flush=True)
        save(report, args.json)  # a run that is cut short keeps its results
        if args.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # raises if the device is lost
        if progress.disable:
            print(f"{time.perf_counter() - begin:6.1f} s  {done + 1}/{len(chosen)}  {task.problem}", flush=True)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    chosen = tasks(args)
    if args.list:
        for task in chosen:
            print(f"{task.problem}: {', '.join(task.modes)}: {', '.join(task.contenders)}")
        return 0
    if not chosen:
        raise SystemExit("no problem of the suite fits the options")
    bandwidth = None if args.check else copy_bandwidth(args.device)
    report: Report = {
        **provenance(" ".join(["python -m benchmarks", *argv]), args.device, bandwidth),
        "temperature": contenders.TEMPERATURE,
        "left_out": contenders.missing(args.device),
        "failures": [],
        "results": [],
    }
    run(chosen, args, bandwidth, report)
    if report["results"]:
        print(TABLES["everything"].make(loads(dumps(report))))
    print(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s" if bandwidth else "not timed")
    for what, reason in report["left_out"].items():
        print(f"left out: {what}: {reason}")
    broken = [f"kldiv_ext does not keep its promises: {record}" for record in missed(report["results"])]
    for message in broken + report["failures"]:
        print(message, file=sys.stderr)
    return int(bool(broken + report["failures"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
