"""The benchmark command: `python -m benchmarks --help`."""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

import kldiv_ext
from benchmarks.contenders import (
    CONTENDERS,
    LOG_TARGETS,
    TEMPERATURE,
    Problem,
    make_inputs,
    reference,
)
from benchmarks.measure import (
    Step,
    copy_bandwidth,
    errors,
    peak_extra_bytes,
    quantiles,
    time_steps,
)
from benchmarks.promises import GRADIENT_PROMISE, LOSS_PROMISE
from benchmarks.provenance import provenance

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPS = ("distillation_loss", "kl_div")
MODES = ("forward", "forward_backward")
SMALL_SHAPES = "8x32000,256x1024,8x16"
SHAPES = {
    "cpu": f"512x32000,128x128256,{SMALL_SHAPES}",
    "cuda": f"4096x32000,4096x128256,64x128256,{SMALL_SHAPES}",
}
# Fewest bytes per logit pair, in logits: both are read; the gradient is written, and kl_div's
# backward, a call of its own, reads the target again.
MINIMUM_TRAFFIC = {
    ("distillation_loss", "forward"): 2,
    ("distillation_loss", "forward_backward"): 3,
    ("kl_div", "forward"): 2,
    ("kl_div", "forward_backward"): 4,
}
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


def names(known: tuple[str, ...]) -> Any:
    """An argparse type: a comma-separated selection of the known names."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    return parse


def shapes(text: str) -> list[tuple[int, int]]:
    """An argparse type: "512x32000,128x128256", rows and vocabulary."""
    try:
        return [(int(rows), int(vocab)) for rows, vocab in (s.split("x") for s in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 512x32000,128x128256") from None


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--op", type=names(OPS), default=list(OPS), help=f"of {','.join(OPS)}; default all")
    add(
        "--divergence",
        type=names(kldiv_ext.DIVERGENCES),
        help="default: forward_kl everywhere, the others for the first shape and dtype",
    )
    add("--shapes", type=shapes, help="ROWSxVOCAB,... (default: by device)")
    add("--dtype", type=names(tuple(DTYPES)), default=["bfloat16", "float32"])
    add("--mode", type=names(MODES), default=list(MODES))
    add("--contenders", type=names(tuple(CONTENDERS)), help=f"of {','.join(CONTENDERS)}")
    add("--check", action="store_true", help="verify against fp64 only, time nothing")
    add("--json", type=Path, help="write the results to this file")
    add("--repeats", type=int, default=50, help="most rounds per problem")
    add("--seconds", type=float, default=10.0, help="time per problem (at least three rounds)")
    add("--quick", action="store_true", help="tiny shapes, few rounds, no torch.compile")
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes = args.shapes or [(8, 1000)]
        args.contenders = args.contenders or ["kldiv_ext", "eager", "eager_float", "liger"]
        args.repeats = min(args.repeats, 3)
    args.shapes = args.shapes or shapes(SHAPES[args.device])
    args.contenders = args.contenders or list(CONTENDERS)
    return args


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    for op in args.op:
        for i, (rows, vocab) in enumerate(args.shapes):
            for j, dtype in enumerate(args.dtype):
                variants: Sequence[str]
                if op == "kl_div":
                    variants = LOG_TARGETS
                elif args.divergence:
                    variants = args.divergence
                else:
                    variants = kldiv_ext.DIVERGENCES if i == j == 0 else ("forward_kl",)
                for variant in variants:
                    yield Problem(op, variant, rows, vocab, DTYPES[dtype], args.device)


def measure(problem: Problem, args: argparse.Namespace, bandwidth: float | None) -> list[dict[str, Any]]:
    """The result rows of one problem: every contender in every mode."""
    torch.compiler.reset()  # or the recompile limit would turn later shapes into eager ones
    student, teacher = make_inputs(problem)
    expected = reference(problem, student, teacher)
    losses = {
        name: loss
        for name, build in CONTENDERS.items()
        if (name in args.contenders or name == "kldiv_ext") and (loss := build(problem)) is not None
    }
    results: list[dict[str, Any]] = []
    for mode in args.mode:
        backward = mode == "forward_backward"
        rows: dict[str, dict[str, Any]] = {}
        steps: dict[str, Step] = {}
        for name, loss in losses.items():
            rows[name] = {
                "op": problem.op,
                "divergence": problem.divergence,
                "contender": name,
                "mode": mode,
                "dtype": str(problem.dtype).removeprefix("torch."),
                "rows": problem.rows,
                "vocab": problem.vocab,
                "gradient_bytes": student.nbytes if backward else 0,
            }
            step = Step(loss, student, teacher, backward)
            verdict = verify(name, step, expected)
            rows[name].update(verdict)
            if verdict["status"] == "ok":
                steps[name] = step
        if not args.check and "kldiv_ext" in steps:
            times = time_steps(steps, problem.device, args.repeats, args.seconds)
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
                    ratio=p50 / ours,
                    bytes_per_second=speed,
                    share=speed / bandwidth if bandwidth else None,
                    peak_extra_bytes=peak_extra_bytes(step, problem.device),
                )
        results += rows.values()
    return results


def verify(name: str, step: Step, expected: tuple[float, torch.Tensor]) -> dict[str, Any]:
    """Errors against fp64 and a status: ok, WRONG, or why the contender could not run."""
    try:
        loss_error, grad_error, loss_eps = errors(step, expected)
    except Exception as error:  # a contender's failure is a result, not the end of the run
        step.reset()
        return {"status": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    # Comparisons are written so that NaN is wrong.
    right = loss_error < float("inf") and (grad_error is None or grad_error <= ABSURD_GRAD_ERROR)
    if name == "kldiv_ext":  # the loss within its own dtype's rounding if that is coarser
        right = loss_error <= max(LOSS_PROMISE, loss_eps) and (grad_error is None or grad_error <= GRADIENT_PROMISE)
    return {
        "loss_error": loss_error,
        "grad_error": grad_error,
        "status": "ok" if right else "WRONG",
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [list(COLUMNS)]
    for row in results:
        cells = [(row.get(key), form) for key, form in COLUMNS.values()]
        lines.append(["-" if value is None else form.format(value) for value, form in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    bandwidth = None if args.check else copy_bandwidth(args.device)
    head = provenance(" ".join(["python -m benchmarks", *argv]), args.device, bandwidth)
    report: dict[str, Any] = {**head, "temperature": TEMPERATURE, "results": []}
    progress = tqdm(list(problems(args)), unit="problem", dynamic_ncols=True)
    for problem in progress:
        progress.set_description(str(problem))
        report["results"] += measure(problem, args, bandwidth)
        if args.json:  # after every problem: a run that is cut short keeps what it has
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["results"]))
    if bandwidth:
        print(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s, threads: {torch.get_num_threads()}")
    broken = [row for row in report["results"] if row["contender"] == "kldiv_ext" and row["status"] != "ok"]
    if broken:
        print("kldiv_ext does not keep its promises:\n" + table(broken), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
