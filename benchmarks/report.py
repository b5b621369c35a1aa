"""Plots and the documents' tables from the committed results: `python -m benchmarks.report [--check]`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report_accuracy, report_linear, report_resources
from benchmarks.modes import FEW_MODES, SMALL

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "GPU_STATUS.md")
MARKED = re.compile(r"(<!-- benchmark:(\S+) begin -->\n).*?(<!-- benchmark:\2 end -->)", re.DOTALL)

DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # as tables are named, as results name it
KERNELS = {"cpu": "CPU", "gpu": "CUDA"}

Row = dict[str, Any]
Run = dict[str, Any]
Select = Callable[[list[Row]], list[Row]]


def _time_cell(row: Row) -> str:
    times = f"{_number(row['ms_p50'])} ms"
    if row["contender"] == "kldiv_ext":
        return times
    ratio = row["ratio"]
    return f"{times} ({ratio:.0f}x)" if ratio >= 10 else f"{times} ({ratio:.2g}x)"


def _memory_cell(row: Row) -> str:
    size = row["peak_extra_bytes"]
    return "not measured" if size is None else f"{_number(size / 1e6)} MB"


def _is_forward_kl(row: Row) -> bool:
    return (row["op"], row["divergence"]) == ("distillation_loss", "forward_kl")


def _is_small(row: Row) -> bool:
    """So few logits that what a call costs by itself counts."""
    return int(row["rows"] * row["vocab"]) < SMALL


def _contender(row: Row) -> str:
    return str(row["contender"])


@dataclass(frozen=True)
class Table:
    """Which rows of a run a table shows, what labels its lines and columns, and what its cells say."""

    select: Select
    labels: tuple[str, ...]
    cell: Callable[[Row], str]
    last_column: tuple[str, Callable[[Row], str]] | None
    caption: str
    column: Callable[[Row], str] = _contender


def _few(rows: list[Row]) -> list[Row]:
    """What fits a page: the modes and dtypes that are used most."""
    return [row for row in rows if row["mode"] in FEW_MODES and row["dtype"] != "float16"]


def _summary(rows: list[Row]) -> list[Row]:
    return [row for row in _few(rows) if _is_forward_kl(row) and not _is_small(row)]


def _backward(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["mode"] == "forward_backward"]


def _summary_backward(rows: list[Row]) -> list[Row]:
    return _backward(_summary(rows))


def _divergences(rows: list[Row]) -> list[Row]:
    """All divergences of the first shape and dtype that more than forward_kl was measured for."""
    rows = [row for row in _few(rows) if row["op"] == "distillation_loss"]
    for first in rows:
        if not _is_forward_kl(first):
            return [row for row in rows if _setting(row) == _setting(first)]
    return []


def _divergences_backward(rows: list[Row]) -> list[Row]:
    return _backward(_divergences(rows))


def _kl_div(rows: list[Row]) -> list[Row]:
    return [row for row in _few(rows) if row["op"] == "kl_div" and not _is_small(row)]


def _small(rows: list[Row]) -> list[Row]:
    return [
        row
        for row in _few(rows)
        if _is_small(row) and row["dtype"] == "float32" and (row["op"] == "kl_div" or _is_forward_kl(row))
    ]


def _small_bfloat16(rows: list[Row]) -> list[Row]:
    return _small([{**row, "dtype": "float32"} for row in rows if row["dtype"] == "bfloat16"])


def _modes(rows: list[Row]) -> list[Row]:
    """All ways to differentiate, of the divergences and the dtype that have rivals in all of them."""
    chosen = [row for row in rows if row["mode"] != "forward" and row["dtype"] == "bfloat16" and not _is_small(row)]
    return [row for row in chosen if row["op"] == "distillation_loss" and row["divergence"] in ("forward_kl", "jsd")]


def _shares(dtype: str) -> Select:
    """Every large problem of kldiv_ext in that dtype."""

    def select(rows: list[Row]) -> list[Row]:
        rows = [row for row in rows if row["contender"] == "kldiv_ext" and row["dtype"] == dtype]
        return [row for row in rows if not _is_small(row)]

    return select


def _setting(row: Row) -> tuple[int, int, str]:
    return row["rows"], row["vocab"], row["dtype"]


_SHARE = ("share of copy bandwidth", lambda row: f"{row['share']:.0%}")
_TIMES = "Median time; in brackets, how many times that of kldiv_ext."
TABLES = {
    "summary": Table(_summary, ("shape", "dtype", "mode"), _time_cell, _SHARE, _TIMES),
    "divergences": Table(_divergences, ("divergence", "shape", "dtype", "mode"), _time_cell, _SHARE, _TIMES),
    "kl_div": Table(_kl_div, ("divergence", "shape", "dtype", "mode"), _time_cell, _SHARE, _TIMES),
    "small": Table(_small, ("divergence", "shape", "dtype", "mode"), _time_cell, None, _TIMES),
    "memory": Table(
        _summary_backward,
        ("shape", "dtype"),
        _memory_cell,
        ("of which the gradient", lambda row: f"{_number(row['gradient_bytes'] / 1e6)} MB"),
        "Peak memory of forward and backward beyond the two inputs.",
    ),
    "small-bfloat16": Table(_small_bfloat16, ("divergence", "shape", "mode"), _time_cell, None, _TIMES),
    "modes": Table(_modes, ("divergence", "shape", "dtype", "mode"), _time_cell, _SHARE, _TIMES),
    **{
        f"shares-{dtype}": Table(
            _shares(dtype),
            ("divergence", "mode"),
            lambda row: f"{row['share']:.0%}",
            None,
            f"Share of copy bandwidth that kldiv_ext reaches in {dtype}, counted at the fewest bytes.",
            column=lambda row: f"{row['rows']} x {row['vocab']}",
        )
        for dtype in ("bfloat16", "float16", "float32")
    },
}
# What a device's table "all" is made of.
ALL = {
    "divergences": "All divergences",
    "modes": "With a gradient from above that is not 1, and with the teacher's gradient as well",
    "shares-bfloat16": "bf16",
    "shares-float16": "fp16",
    "shares-float32": "fp32",
    "kl_div": "The drop-in `kl_div`",
    "small": "Small problems, fp32",
    "small-bfloat16": "Small problems, bf16",
    "memory": "Memory",
    "linear": "From hidden states",
    "linear-close": "From hidden states, student close to teacher",
    "linear-positions": "From hidden states, over positions",
    "accuracy-promises": "Accuracy",
    "accuracy-gradient": "Accuracy of gradients",
    "accuracy-loss": "Accuracy of losses",
    "accuracy-total_variation": "Accuracy of total variation",
}
MODE_NAMES = {
    "forward_backward_half": "forward + backward of half the loss",
    "forward_backward_teacher": "forward + backward to both",
}
LABELS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "shape": ("rows x vocabulary", lambda row: f"{row['rows']} x {row['vocab']}"),
    "dtype": ("dtype", lambda row: row["dtype"]),
    "mode": ("mode", lambda row: MODE_NAMES.get(row["mode"], row["mode"].replace("_", " + "))),
    "divergence": ("variant", lambda row: f"`{row['divergence']}`"),
}


def _number(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.3f}"


def _newest(results: Path, device: str, fits: Callable[[Run], bool]) -> Run | None:
    """The newest run on that device that fits."""
    runs: list[Run] = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    for run in sorted(runs, key=lambda run: run["date"], reverse=True):
        if run["machine"]["device"] == device and fits(run):
            return run
    return None


def _newest_timed(results: Path, device: str, select: Select) -> Run | None:
    """With a time among the selected rows."""
    return _newest(results, device, lambda run: any("ms_p50" in row for row in select(run.get("results", []))))


# Tables that have a module of their own, the key in the results that they are made of, and what it tells.
OTHERS: dict[str, tuple[Callable[[Run], str], str, str]] = {
    **{kind: (table, "accuracy", "accuracy") for kind, table in report_accuracy.TABLES.items()},
    **{kind: (table, "linear", "speed") for kind, table in report_linear.TABLES.items()},
}


def _newest_with(results: Path, device: str, key: str) -> Run | None:
    return _newest(results, device, lambda run: bool(run.get(key)))


def _markdown(table: Table, run: Run) -> str:
    """One line per problem and mode, one column per contender."""
    rows = table.select(run["results"])
    columns = list(dict.fromkeys(table.column(row) for row in rows))
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(LABELS[label][1](row) for label in table.labels)
        lines.setdefault(key, {})[table.column(row)] = row
    header = [LABELS[label][0] for label in table.labels] + columns
    if table.last_column:
        header.insert(len(table.labels) + 1, table.last_column[0])
    text = [header, ["---"] * len(header)]
    for key, by_column in lines.items():
        cells = [_cell(table.cell, by_column.get(name)) for name in columns]
        if table.last_column:
            cells.insert(1, _cell(table.last_column[1], by_column.get("kldiv_ext")))
        text.append([*key, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def _cell(cell: Callable[[Row], str], row: Row | None) -> str:
    if row is None:
        return "-"
    if "ms_p50" in row:
        return cell(row)
    return "wrong" if row["status"] == "WRONG" else "failed"


def _caption(table: Table, run: Run) -> str:
    machine = run["machine"]
    name = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    bandwidth = machine["copy_bytes_per_second"] / 1e9
    return (
        f"{table.caption} {name}; copy bandwidth {_number(bandwidth)} GB/s; "
        f"torch {run['versions']['torch']}; {run['date'][:10]}, "
        f"commit {(run['commit'] or 'unknown')[:12]}; `{run['command']}`."
    )


def generate(name: str, results: Path) -> str:
    """The text of one table, for example "cpu-summary"."""
    if name == "cuda-resources":
        return _resources(results)
    device, _, kind = name.partition("-")
    if device in DEVICES and kind == "all":
        return _all(device, results)
    if device not in DEVICES or kind not in {*TABLES, *OTHERS}:
        raise ValueError(f"no benchmark table is called {name!r}")
    if kind in OTHERS:
        table, key, what = OTHERS[kind]
        run = _newest_with(results, DEVICES[device], key)
        return unmeasured(device, what) if run is None else table(run)
    run = _newest_timed(results, DEVICES[device], TABLES[kind].select)
    if run is None:
        return unmeasured(device, "speed")
    return _markdown(TABLES[kind], run) + "\n\n" + _caption(TABLES[kind], run)


def _resources(results: Path) -> str:
    """What the compiled CUDA kernels take."""
    path = results / report_resources.FILE
    if not path.exists():
        return "What the compiled kernels take has not been recorded yet."
    return report_resources.markdown(json.loads(path.read_text()))


def _all(device: str, results: Path) -> str:
    """Every table of a device that has been measured, with the plots."""
    parts = []
    for kind, title in ALL.items():
        found = (
            _newest_with(results, DEVICES[device], OTHERS[kind][1])
            if kind in OTHERS
            else _newest_timed(results, DEVICES[device], TABLES[kind].select)
        )
        if found is not None:
            parts.append(f"{title}:\n\n{generate(f'{device}-{kind}', results)}")
    if not parts:
        return unmeasured(device, "speed")
    drawn = [f"![{name}](benchmarks/results/plots/{name}.png)" for name in _plots(device, results)]
    return "\n\n".join(drawn + parts)


def unmeasured(device: str, what: str) -> str:
    return f"The {what} of the {KERNELS[device]} kernels has not been measured yet."


def render(document: str, results: Path) -> str:
    """The document with the text between all benchmark markers made anew."""
    text, found = MARKED.subn(lambda m: f"{m[1]}{generate(m[2], results)}\n{m[3]}", document)
    if found != document.count("<!-- benchmark:") / 2:
        raise ValueError("a document has a benchmark marker without its partner")
    return text


PLOTS: dict[str, Select] = {"ratio": _divergences_backward, "share": _summary_backward}


def _plots(device: str, results: Path) -> dict[str, Run]:
    """The plots that there is something to draw for, and from which run: "cpu-ratio"."""
    found = {field: _newest_timed(results, DEVICES[device], select) for field, select in PLOTS.items()}
    for key in ("accuracy", "linear"):
        found[key] = _newest_with(results, DEVICES[device], key)
    return {f"{device}-{field}": run for field, run in found.items() if run is not None}


def plot(results: Path) -> list[Path]:
    """Per measured device: time per divergence, share of the copy bandwidth, and accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    (results / "plots").mkdir(parents=True, exist_ok=True)
    written = []
    for device in DEVICES:
        for name, run in _plots(device, results).items():
            written.append(results / "plots" / f"{name}.png")
            field = name.partition("-")[2]
            if field == "accuracy":
                report_accuracy.draw(run, written[-1])
            elif field == "linear":
                report_linear.draw(run, written[-1])
            else:
                _bars(PLOTS[field](run["results"]), run, field, written[-1])
    return written


def _bars(rows: list[Row], run: Run, field: str, path: Path) -> None:
    """Horizontal bars, one group per divergence or shape, one colour per contender."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "ms_p50" in row]
    setting = "{} x {} {}".format(*_setting(rows[0]))
    if field == "ratio":
        title, label = f"Divergences, {setting}", "time relative to kldiv_ext (less is better)"
    else:
        title = "forward_kl"
        label = "share of copy bandwidth, counted at the fewest bytes (%, more is better)"
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if field == "ratio":
            group, value = row["divergence"], row["ratio"]
        else:
            group, value = "{} x {}\n{}".format(*_setting(row)), 100 * row["share"]
        groups.setdefault(group, {})[row["contender"]] = value
    height = 1.2 + 0.2 * len(groups) * (len(contenders) + 1)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    thickness = 0.8 / len(contenders)
    for i, contender in enumerate(contenders):
        bars = {g: v[contender] for g, v in enumerate(groups.values()) if contender in v}
        centres = [g + (i + 0.5) * thickness - 0.4 for g in bars]
        drawn = axes.barh(centres, list(bars.values()), height=thickness, label=contender)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(label)
    machine = run["machine"]["gpu"] or run["machine"]["cpu"]
    axes.set_title(f"{title}, forward + backward\n{machine}, {run['date'][:10]}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(contenders), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a document is out of date")
    args = parser.parse_args(argv)
    stale = {}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        made = render(text, RESULTS)
        if made != text:
            stale[document] = made
    if args.check:
        for document in stale:
            print(f"{document.name} differs: run python -m benchmarks.report", file=sys.stderr)
        return int(bool(stale))
    for document, made in stale.items():
        document.write_text(made, encoding="utf-8")
    for path in plot(RESULTS):
        print(os.path.relpath(path))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
