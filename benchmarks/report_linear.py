"""What benchmarks.report makes of a run from hidden states: times, memory, errors, and the curve over positions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report_accuracy import number, provenance

Record = dict[str, Any]
Run = dict[str, Any]


def _size(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 1e6:,.0f} MB"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def speed(run: Run) -> str:
    """Per problem: everybody's time, how near it is to the products', memory and errors."""
    lines = []
    for record in run["linear"]:
        shape = f"{record['positions']} x {record['hidden']} x {record['vocab']}"
        head = [shape, record["dtype"], record["contender"]]
        if "ms_p50" not in record:
            lines.append([*head, record["status"].split(":")[0] if record["status"] != "ok" else "no time", *["-"] * 5])
            continue
        errors = (
            number(record[f"{of}_error"]) if f"{of}_error" in record else "-" for of in ("loss", "hidden", "weight")
        )
        memory = _size(record.get("peak_extra_bytes")) if record["contender"] != "products" else "-"
        time = f"{record['ms_p50']:,.0f} ms"
        lines.append([*head, time, f"{record['share']:.2f}", memory, *errors])
    header = ["positions x hidden x vocabulary", "dtype", "contender", "time", "speed, of the products'", "memory"]
    errors_of = ["error of the loss", "of the hidden states' gradient", "of the head's gradient"]
    gradients = {_size(record["gradient_bytes"]) for record in run["linear"]}
    workspace = next(_size(r["workspace_bytes"]) for r in run["linear"] if r["contender"] == "kldiv_ext")
    caption = (
        "Forward and backward of forward_kl, to the student's hidden states and head: median time, all side by side. "
        "products: the four matrix products alone, of all positions at once, into memory that is there; on a CPU the "
        "process keeps freed memory, so that nobody waits for new pages. Memory: the peak beyond the inputs; "
        f"the gradients in it are {' or '.join(sorted(gradients))}, kldiv_ext's workspace "
        f"{workspace}. Relative errors against fp64 from the same hidden states and heads; linear_cross_entropy has "
        f"them of soft targets in the models' dtype. {provenance(run)}"
    )
    return f"{_markdown([*header, *errors_of], lines)}\n\n{caption}"


def close(run: Run) -> str:
    """Errors of close pairs."""
    lines = []
    for record in run["close"]:
        if record["status"] == "ok":
            cells = [number(record[f"{of}_error"]) for of in ("loss", "hidden", "weight")]
        else:
            cells = ["failed"] * 3
        lines.append([record["dtype"], number(record["kl"]), record["contender"], *cells])
    header = [
        "dtype",
        "forward KL",
        "contender",
        "error of the loss",
        "of the hidden states' gradient",
        "of the head's",
    ]
    caption = (
        "Relative errors where the student is close to the teacher, whose hidden states and head differ from its own "
        "by a hundredth. Where products are rounded to bfloat16 logits, that rounding is most of what differs, "
        f"whatever is computed from it. {provenance(run)}"
    )
    return f"{_markdown(header, lines)}\n\n{caption}"


def positions(run: Run) -> str:
    """Memory and time over positions."""
    records = run["positions"]
    names = list(dict.fromkeys(record["contender"] for record in records))
    lines: dict[int, dict[str, str]] = {}
    for record in records:
        text = record["status"].split(":")[0]
        if text == "ok":
            text = f"{_size(record['peak_extra_bytes'])}, {record['ms'] / 1e3:.2g} s"
        lines.setdefault(record["positions"], {})[record["contender"]] = text
    table = _markdown(
        ["positions", *names], [[f"{n}", *(line.get(m, "-") for m in names)] for n, line in lines.items()]
    )
    first = records[0]
    caption = (
        "Peak memory beyond the inputs, gradients included, and the time of one run, from few to many positions; "
        f"{first['dtype']}, hidden size {first['hidden']}, {first['vocab']} classes. Left out: who would take "
        f"more than 60 % of the machine's memory. {provenance(run)}"
    )
    return f"{table}\n\n{caption}"


TABLES: dict[str, Callable[[Run], str]] = {"linear": speed, "linear-close": close, "linear-positions": positions}


def draw(run: Run, path: Path) -> None:
    """Memory over positions, a line per contender."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in dict.fromkeys(record["contender"] for record in run["positions"]):
        line = [r for r in run["positions"] if r["contender"] == name and r.get("peak_extra_bytes")]
        axes.plot([r["positions"] for r in line], [r["peak_extra_bytes"] / 1e6 for r in line], marker="o", label=name)
    gradients = run["positions"]
    counts = sorted({r["positions"] for r in gradients})
    sizes = [next(r["gradient_bytes"] for r in gradients if r["positions"] == n) / 1e6 for n in counts]
    axes.plot(counts, sizes, "k:", label="the gradients alone")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("positions")
    axes.set_ylabel("peak memory beyond the inputs (MB)")
    machine = run["machine"]["gpu"] or run["machine"]["cpu"]
    axes.set_title(f"forward_kl from hidden states, forward + backward\n{machine}, {run['date'][:10]}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
