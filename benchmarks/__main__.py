"""The benchmark command: `python -m benchmarks --help`."""

import argparse
import gc
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

import kldiv_ext
from benchmarks.contenders import (
    CONTENDERS,
    NO_TEACHER_GRADIENT,
    SLOW_TO_BUILD,
    TEMPERATURE,
    Expected,
    make_inputs,
    missing,
    reference,
)
from benchmarks.measure import (
    TIMERS,
    Step,
    copy_bandwidth,
    errors,
    peak_extra_bytes,
    quantiles,
    time_steps,
    timer_name,
)
from benchmarks.modes import MINIMUM_TRAFFIC, MODES, SMALL
from benchmarks.promises import GRADIENT_PROMISE, LOSS_PROMISE
from benchmarks.provenance import dumps, provenance
from benchmarks.suites import DTYPES, OPS, SUITES, Choice, Task, names_of, shapes, tasks

# A gradient this far off is not the same computation, and its time would mean nothing.
ABSURD_GRAD_ERROR = 0.5
# Table heading: key of the result row and how its value is printed.
COLUMNS = {
    "op": ("op", "{}"),
    "divergence": ("divergence", "{}"),
    "rows": ("rows", "{}"),
    "vocab": ("vocab", "{}"),
    "dtype": ("dtype", "{}"),
    "mode": ("mode", "{}"),
    "contender": ("contender", "{}"),
    "ms": ("ms_p50", "{:.3f}"),
    "p20": ("ms_p20", "{:.3f}"),
    "p80": ("ms_p80", "{:.3f}"),
    "ratio": ("ratio", "{:.2f}"),
    "share": ("share", "{:.1%}"),
    "peak extra": ("peak_extra_bytes", "{:,}"),
    "gradient": ("gradient_bytes", "{:,}"),
    "loss error": ("loss_error", "{:.1e}"),
    "grad error": ("grad_error", "{:.1e}"),
    "status": ("status", "{}"),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--suite", choices=SUITES, default="default", help="gpu: everything that is asked of a GPU, in minutes")
    add("--op", type=names_of(OPS), help=f"of {','.join(OPS)}; default all")
    add(
        "--divergence",
        type=names_of(kldiv_ext.DIVERGENCES),
        help="default: forward_kl everywhere, the others for the first shape and dtype",
    )
    add("--shapes", type=shapes, help="ROWSxVOCAB,... (default: by device)")
    add("--dtype", type=names_of(tuple(DTYPES)), help="default bfloat16,float32")
    add("--mode", type=names_of(MODES), help=f"of {','.join(MODES)}; default the first two")
    add("--contenders", type=names_of(tuple(CONTENDERS)), help=f"of {','.join(CONTENDERS)}")
    add("--list", action="store_true", help="print what would be measured, and stop")
    add("--check", action="store_true", help="verify against fp64 only, time nothing")
    add("--json", type=Path, help="write the results to this file")
    add("--repeats", type=int, default=50, help="most rounds per problem")
    add("--seconds", type=float, default=10.0, help="time per problem and mode (at least three rounds)")
    add("--limit", type=float, default=math.inf, help="seconds in all: what is left is left out, and said to be")
    add("--quick", action="store_true", help="tiny shapes, few rounds, no torch.compile")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = min(args.repeats, 3)
    return args


def measure(task: Task, args: argparse.Namespace, bandwidth: float | None) -> list[dict[str, Any]]:
    """The result rows of one problem: every contender in every mode."""
    problem = task.problem
    if any(name.startswith("compile") for name in task.contenders):
        torch.compiler.reset()  # or the recompile limit would turn later shapes into eager ones
    student, teacher = make_inputs(problem)
    expected = reference(problem, student, teacher, of_teacher="forward_backward_teacher" in task.modes)
    losses = {name: loss for name in task.contenders if (loss := CONTENDERS[name](problem)) is not None}
    how = timer_name(problem.device, problem.rows * problem.vocab)
    results: list[dict[str, Any]] = []
    for mode in task.modes:
        backward, of_teacher = mode != "forward", mode == "forward_backward_teacher"
        teacher.requires_grad_(of_teacher)
        rows: dict[str, dict[str, Any]] = {}
        steps: dict[str, Step] = {}
        for name, loss in losses.items():
            if of_teacher and name in NO_TEACHER_GRADIENT:
                continue
            rows[name] = {
                "op": problem.op,
                "divergence": problem.divergence,
                "contender": name,
                "mode": mode,
                "dtype": str(problem.dtype).removeprefix("torch."),
                "rows": problem.rows,
                "vocab": problem.vocab,
                "gradient_bytes": student.nbytes * (backward + of_teacher),
            }
            factor = 0.5 if mode == "forward_backward_half" else 1.0
            step = Step(loss, student, teacher, backward, factor)
            verdict = verify(name, step, expected, problem.device)
            rows[name].update(verdict)
            if verdict["status"] == "ok":
                steps[name] = step
        if not args.check and "kldiv_ext" in steps:
            times = time_steps(steps, problem.device, args.repeats, args.seconds, how)
            ours = statistics.median(times["kldiv_ext"])
            traffic = MINIMUM_TRAFFIC[problem.op, mode] * student.nbytes
            for name, step in steps.items():
                p20, p50, p80 = quantiles(times[name])
                speed = traffic / (p50 / 1e3)
                rows[name].update(
                    ms_p20=p20,
                    ms_p50=p50,
                    ms_p80=p80,
                    rounds=len(times[name]),
                    timer=how,
                    ratio=p50 / ours,
                    bytes_per_second=speed,
                    share=speed / bandwidth if bandwidth else None,
                    peak_extra_bytes=peak_extra_bytes(step, problem.device),
                )
        results += rows.values()
    return results


def verify(name: str, step: Step, expected: Expected, device: str) -> dict[str, Any]:
    """Errors against fp64 and a status: ok, WRONG, or why the contender could not run."""
    try:
        found = errors(step, expected)
    except Exception as error:  # a contender's failure is a result, not the end of the run
        step.reset()
        message = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if device == "cuda":
            torch.cuda.synchronize()  # raises where the device is lost, and nothing after this can be measured
        return {"status": message}
    gradients = [error for error in (found.gradient, found.teacher_gradient) if error is not None]
    # Comparisons are written so that NaN is wrong.
    right = found.loss < math.inf and all(error <= ABSURD_GRAD_ERROR for error in gradients)
    if name == "kldiv_ext":  # the loss within its own dtype's rounding if that is coarser
        right = found.loss <= max(LOSS_PROMISE, found.loss_eps)
        right = right and all(error <= GRADIENT_PROMISE for error in gradients)
    of_teacher = {} if found.teacher_gradient is None else {"teacher_grad_error": finite(found.teacher_gradient)}
    return {
        "loss_error": finite(found.loss),
        "grad_error": finite(found.gradient),
        **of_teacher,
        "status": "ok" if right else "WRONG",
    }


def finite(value: float | None) -> float | None:
    """None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def table(results: list[dict[str, Any]]) -> str:
    lines = [list(COLUMNS)]
    for row in results:
        cells = [(row.get(key), form) for key, form in COLUMNS.values()]
        lines.append(["-" if value is None else form.format(value) for value, form in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def run(chosen: list[Task], args: argparse.Namespace, bandwidth: float | None, report: dict[str, Any]) -> None:
    """Fills the report's results, failures and left_out, writing it after every problem."""
    begin = time.perf_counter()
    progress = tqdm(chosen, unit="problem", dynamic_ncols=True, disable=None)
    for done, task in enumerate(progress):
        progress.set_description(str(task.problem))
        spent = time.perf_counter() - begin
        if spent > args.limit:
            rest = [f"{task.problem} {','.join(task.modes)}" for task in chosen[done:]]
            report["left_out"] |= {"problems": {"reason": f"the limit of {args.limit:g} s", "those": rest}}
            save(report, args.json)
            break
        if spent > args.limit / 2:  # or those that take long would leave the others no time
            task, slow = without_slow(task)
            if slow:
                report["left_out"].setdefault("time", []).append(f"{task.problem}: {', '.join(slow)}")
        try:
            report["results"] += measure(task, args, bandwidth)
        except Exception as error:
            report["failures"].append(f"{task.problem}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(report["failures"][-1], file=sys.stderr, flush=True)
        save(report, args.json)  # after every problem: a run that is cut short keeps what it has
        if args.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # raises where the device is lost
        if progress.disable:
            print(f"{time.perf_counter() - begin:6.1f} s  {done + 1}/{len(chosen)}  {task.problem}", flush=True)


def save(report: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(dumps(report, "results"))


def without_slow(task: Task) -> tuple[Task, list[str]]:
    """The task without the contenders that are slow to build, and who those are."""
    slow = [name for name in task.contenders if name in SLOW_TO_BUILD]
    kept = tuple(name for name in task.contenders if name not in slow)
    return Task(task.problem, task.modes, kept), slow


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    choice = Choice(
        args.device, args.op, args.divergence, args.shapes, args.dtype, args.mode, args.contenders, args.quick
    )
    chosen = tasks(args.suite, choice)
    if args.list:
        for task in chosen:
            print(f"{task.problem}: {', '.join(task.modes)}: {', '.join(task.contenders)}")
        return 0
    if not chosen:
        raise SystemExit("nothing is asked for: no problem of the suite fits")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    bandwidth = None if args.check else copy_bandwidth(args.device)
    head = provenance(" ".join(["python -m benchmarks", *argv]), args.device, bandwidth)
    report: dict[str, Any] = {
        **head,
        "temperature": TEMPERATURE,
        "timers": {name: text for name, text in TIMERS.items() if (name == "cpu") == (args.device == "cpu")},
        "small": SMALL,
        "left_out": dict(missing(args.device)),
        "failures": [],
        "results": [],
    }
    run(chosen, args, bandwidth, report)
    print(table(report["results"]))
    if bandwidth:
        print(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s, threads: {torch.get_num_threads()}")
    for what, reason in report["left_out"].items():
        print(f"left out: {what}: {reason}")
    broken = [row for row in report["results"] if row["contender"] == "kldiv_ext" and row["status"] != "ok"]
    if broken:
        print("kldiv_ext does not keep its promises:\n" + table(broken), file=sys.stderr)
    for failure in report["failures"]:
        print("failed: " + failure, file=sys.stderr)
    return 1 if broken or report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
