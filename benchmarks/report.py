"""The documents' tables and plots, made from the committed results."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.contenders import LOG_TARGETS
from benchmarks.measure import SMALL
from benchmarks.promises import BELOW, GRADIENT_PROMISE, describe, first_order, loss_promise, missed
from benchmarks.results import Record, Report, loads
from benchmarks.suites import FEW_MODES, MAIN, MODES

ROOT = Path(__file__).parent.parent
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "plots"
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("performance", "guarantees", "gpu")))
MARKED = re.compile(r"(<!-- benchmark:(\S+) begin -->\n).*?(<!-- benchmark:\2 end -->)", re.DOTALL)
# The first part of a table's name: whose results. The resources of CUDA kernels are read on any machine.
DEVICES = {"cpu": ("cpu",), "gpu": ("cuda",), "cuda": ("cpu", "cuda")}
TITLES = {
    "eager": "PyTorch",
    "eager_float": "PyTorch, `.float()`",
    "compile": "`torch.compile`",
    "compile_float": "`torch.compile`, `.float()`",
    "liger": "Liger-Kernel",
    "products": "matrix products alone",
    "forward_backward_half": "forward + backward of half the loss",
    "forward_backward_teacher": "forward + backward to both",
}


def number(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.3f}"


def error(value: float) -> str:
    """Two digits, with an exponent where it is shorter: 0.25, 1.8e-3."""
    text = f"{value:.2g}" if value == 0 or 0.01 <= value < 100 else f"{value:.1e}"
    return re.sub(r"\.0(?=e)|(?<=e-)0|(?<=e)\+0?", "", text)


def title(name: str) -> str:
    return TITLES.get(name, name)


def milliseconds(value: float) -> str:
    return f"{number(value)} ms" if value < 1e4 else f"{value / 1e3:.3g} s"


def megabytes(value: float) -> str:
    return f"{number(value / 1e6)} MB"


# The value under a record's key: the column that shows it, and its text there.
TEXTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "contender": ("contender", title),
    "divergence": ("variant", "`{}`".format),
    "mode": ("mode", lambda name: TITLES.get(name, name.replace("_", " + "))),
    "ms_p50": ("time", milliseconds),
    "ms": ("time", milliseconds),
    "share": ("share", "{:.0%}".format),
    "peak_extra_bytes": ("memory", megabytes),
    "gradient_bytes": ("gradients", megabytes),
    "kl": ("forward KL", error),
    "level": ("forward KL", error),
    "loss_error": ("error of the loss", error),
    "hidden_error": ("of the hidden states' gradient", error),
    "weight_error": ("of the head's gradient", error),
    **{f"phase {phase}": (f"phase {phase}", "{:.0f}".format) for phase in ("1 alone", "1", "2", "3", "2+3")},
}
SIZES = {"rows": "rows", "positions": "positions", "hidden": "hidden size", "vocab": "vocabulary"}


def readable(record: Record) -> dict[str, str]:
    """The texts of a record by column. Where a result has no time, its status stands there."""
    status = "wrong" if record.get("status") == "WRONG" else record.get("status", "ok").split(":")[0]
    texts = {key: str(value) for key, value in record.items()}
    texts |= {"time": status, "memory": status} if status != "ok" else {}
    texts |= {column: text(record[key]) for key, (column, text) in TEXTS.items() if key in record}
    if "ratio" in record and record["contender"] != "kldiv_ext":
        texts["time"] += f" ({record['ratio']:.0f}x)" if record["ratio"] >= 10 else f" ({record['ratio']:.2g}x)"
    sizes = [key for key in SIZES if key in record]
    return texts | {" × ".join(SIZES[key] for key in sizes): " × ".join(str(record[key]) for key in sizes)}


def worst(measure: str) -> Callable[[list[Record]], str]:
    """The largest error, bold if it misses a promise, and the number of divergences that have no error."""

    def cell(records: list[Record]) -> str:
        finite = [record[f"{measure}_error"] for record in records if f"{measure}_error" in record]
        text = error(max(finite)) if finite else "none finite"
        if any(record["status"].startswith("missed") and measure in record["status"] for record in records):
            text = f"**{text}**"
        for what in ("not finite", "failed"):
            names = {record["divergence"] for record in records if record["status"].startswith(what)}
            text += f" ({len(names)} {what})" if names and finite else ""
        return text

    return cell


def promises(records: list[Record]) -> str:
    """How many results keep every promise, and each one that does not."""
    ours = [record for record in records if record["contender"] == "kldiv_ext"]
    broken = missed(ours)
    text = f"Of {len(ours)} results of kldiv_ext, {len(ours) - len(broken)} keep every promise."
    near = [r for r in ours if not first_order(r["divergence"]) and r["loss"] < BELOW and "loss_error" in r]
    if near:
        largest = error(max(record["loss_error"] * record["loss"] for record in near))
        text += f" The largest absolute error of a loss below {error(BELOW)} is {largest}."
    return text + (" Missed:\n\n" + "\n".join(f"- {describe(record)}" for record in broken) if broken else "")


TIMES = "Median time; in brackets, the multiple of kldiv_ext's."
Select = Callable[[list[Record]], list[Record]]


@dataclass(frozen=True)
class Table:
    """A line per combination of labels and, where `column` names one, a column per value of it.

    A cell joins texts of its record, or is computed from the records that share labels and column.
    """

    select: Select
    labels: tuple[str, ...]
    column: str = "contender"
    cell: tuple[str, ...] | Callable[[list[Record]], str] = ("time",)
    caption: str = TIMES  # formatted with the report and the coverage of its records
    source: str = "results"  # the list of records in a result file

    def make(self, report: Report) -> str:
        records = self.select(report[self.source])
        if not self.labels:
            return self.text(records)
        columns: dict[str, None] = {}
        lines: dict[tuple[str, ...], dict[str, list[Record]]] = {}
        for record in records:
            texts = readable(record)
            line = lines.setdefault(tuple(texts.get(label, "-") for label in self.labels), {})
            if self.column:
                columns[texts[self.column]] = None
                line.setdefault(texts[self.column], []).append(record)
        cells = [[*self.labels, *columns], ["---"] * (len(self.labels) + len(columns))]
        cells += [[*labels, *(self.text(line.get(c, [])) for c in columns)] for labels, line in lines.items()]
        caption = self.caption.format_map({**report, "coverage": coverage(records)})
        return "\n".join(f"| {' | '.join(line)} |" for line in cells) + f"\n\n{caption} {provenance(report)}"

    def text(self, records: list[Record]) -> str:
        if not records:
            return "-"
        if callable(self.cell):
            return self.cell(records)
        texts = readable(records[0])
        return ", ".join(dict.fromkeys(texts.get(name, "not measured") for name in self.cell))


def coverage(records: list[Record]) -> str:
    """The number of divergences, and the contenders with fewer."""
    names: dict[str, dict[str, None]] = {}
    for record in records:
        names.setdefault(title(record.get("contender", "")), {})[record.get("divergence", "")] = None
    most = max(map(len, names.values()))
    fewer = [f"; {name}: {', '.join(those)}" for name, those in names.items() if len(those) < most]
    return f"the worst of {most} divergences and all vocabularies{''.join(fewer)}"


def machine_name(report: Report) -> str:
    return report["machine"]["gpu"] or "{cpu}, {threads} threads".format_map(report["machine"])


def provenance(report: Report) -> str:
    version, commit = report["versions"]["torch"], (report["commit"] or "unknown")[:12]
    absent = [f" Without {name}: {why}." for name, why in report.get("left_out", {}).items() if isinstance(why, str)]
    origin = f"{machine_name(report)}; torch {version}; {report['date'][:10]}, commit {commit}; `{report['command']}`."
    return origin + "".join(absent)


def where(large: bool | None = None, **wanted: tuple[str, ...]) -> Select:
    """The records with one of these values under each key, and with many or few logits."""

    def fits(record: Record) -> bool:
        if large is not None and large != (record["rows"] * record["vocab"] >= SMALL):
            return False
        return all(record[key] in values for key, values in wanted.items())

    return lambda records: [record for record in records if fits(record)]


def all_divergences(records: list[Record]) -> list[Record]:
    """The first shape and dtype that other divergences than forward_kl were measured on."""
    records = where(None, op=("distillation_loss",), **USUAL)(records)
    settings = [(record["rows"], record["vocab"], record["dtype"]) for record in records]
    first = next((s for s, r in zip(settings, records, strict=True) if r["divergence"] != "forward_kl"), None)
    return [record for setting, record in zip(settings, records, strict=True) if setting == first]


def points(records: list[Record], orders: tuple[bool, ...] = (False, True)) -> list[Record]:
    """Accuracy records, which hold lists over the levels, as a record per level; of divergences of these orders."""
    found = []
    for record in records:
        for i in range(len(record["level"]) if first_order(record["divergence"]) in orders else 0):
            point = {key: value[i] if isinstance(value, list) else value for key, value in record.items()}
            found.append({key: value for key, value in point.items() if value is not None})
    return found


def smooth(records: list[Record]) -> list[Record]:
    return points(records, (False,))


USUAL = {"mode": FEW_MODES, "dtype": ("bfloat16", "float32")}
LARGE_FORWARD_KL = where(large=True, divergence=MAIN[:1], mode=("forward_backward",), dtype=USUAL["dtype"])
SHAPE = ("rows × vocabulary", "dtype")
VARIANT = ("variant", *SHAPE, "mode")
PAIR = ("dtype", "contender")
ERRORS = ("error of the loss", "of the hidden states' gradient", "of the head's gradient")
ALL_ERRORS = ("loss_error", "grad_error", "teacher_grad_error")

# To add a table, name it here and put its markers, such as `benchmark:cpu-NAME begin`, into a document.
TABLES = {
    "summary": Table(
        LARGE_FORWARD_KL,
        SHAPE,
        cell=("time", "memory"),
        caption=f"Forward and backward of `forward_kl`. {TIMES} Peak memory beyond the two inputs.",
    ),
    "shapes": Table(where(large=True, divergence=MAIN[:1], **USUAL), (*SHAPE, "mode")),
    "divergences": Table(all_divergences, VARIANT),
    "kl_div": Table(where(large=True, op=("kl_div",), **USUAL), VARIANT),
    "small": Table(
        where(large=False, dtype=("float32",), mode=FEW_MODES, divergence=("forward_kl", *LOG_TARGETS)), VARIANT
    ),
    "memory": Table(
        LARGE_FORWARD_KL,
        (*SHAPE, "gradients"),
        cell=("memory",),
        caption="Peak memory of forward and backward of `forward_kl` beyond the two inputs, the gradient included.",
    ),
    "modes": Table(where(large=True, mode=MODES[1:], dtype=("bfloat16",), divergence=MAIN), VARIANT),
    "shares": Table(
        where(large=True, contender=("kldiv_ext",)),
        ("dtype", "variant", "mode"),
        "rows × vocabulary",
        cell=("share",),
        caption="The share of copy bandwidth ({machine[copy_bytes_per_second]:.3g} bytes/s) that kldiv_ext reaches, "
        "counting the fewest bytes that must move.",
    ),
    "linear": Table(
        where(),
        ("positions × hidden size × vocabulary", *PAIR, "time", "share", "memory", "gradients", *ERRORS),
        column="",
        caption="Forward and backward of `forward_kl` to the student's hidden states and head: median time, and the "
        "speed as a share of that of the four matrix products alone, over all positions at once into existing memory. "
        "While times are measured on a CPU, the process keeps freed memory. Memory is the peak beyond the inputs, the "
        "gradients included. Errors are relative, against fp64 from the same hidden states and heads.",
        source="linear",
    ),
    "linear-close": Table(
        where(),
        ("dtype", "forward KL", "contender", *ERRORS),
        column="",
        caption="Relative errors where the student's hidden states and head differ from the teacher's by a hundredth. "
        "The rounding of logits to bfloat16 dominates, whatever is computed from them.",
        source="close",
    ),
    "linear-positions": Table(
        where(),
        ("positions",),
        cell=("memory", "time"),
        caption="Peak memory beyond the inputs, the gradients included, and the time of one run. Left out: contenders "
        "that would need more than 60 % of the machine's memory.",
        source="positions",
    ),
    **{
        f"accuracy-{measure}": Table(
            smooth,
            PAIR,
            "forward KL",
            worst(measure),
            f"{what}, by forward KL: {{coverage}}; in brackets, divergences whose loss or gradient is not finite.",
            "accuracy",
        )
        for measure, what in (
            ("gradient", "Relative L2 error of the student's gradient, the worst of {rows} rows"),
            ("loss", "Relative error of the loss, a mean over {rows} rows"),
        )
    },
    "accuracy-total_variation": Table(
        lambda records: points(records, (True,)),
        PAIR,
        "forward KL",
        lambda records: f"{worst('gradient')(records)} / {worst('loss')(records)}",
        "Relative errors of gradient / loss, by forward KL.",
        "accuracy",
    ),
    "accuracy-promises": Table(points, (), cell=promises, source="accuracy"),
    "resources": Table(
        where(architecture=("sm_90",)),
        (
            "kernel",
            "dtype",
            "variant",
            "registers",
            "spills",
            "phase 1",
            "phase 2",
            "phase 3",
            "phase 2+3",
            "phase 1 alone",
        ),
        column="",
        caption="sm_90. A phase's number is its instructions per pair of logits on the shortest way through its loop: "
        "without rare cases, labels, and sums and gradients that are not asked for.",
        source="kernels",
    ),
    "architectures": Table(
        where(),
        ("architecture", "kernels", "most registers, float", "most registers, double", "with spills or a stack"),
        column="",
        caption="All kernels of the object, built by CUDA {nvcc}.",
        source="architectures",
    ),
    # Printed by the command alone.
    "everything": Table(
        where(), ("op", *VARIANT, "contender", "time", "share", "memory", *ALL_ERRORS, "status"), column=""
    ),
}


def newest(results: Path, device: str, table: Table) -> Report | None:
    """The newest report on the device that has records for the table."""
    reports = [loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    for report in sorted(reports, key=lambda report: str(report["date"]), reverse=True):
        if report["machine"]["device"] in DEVICES[device] and table.select(report.get(table.source, [])):
            return report
    return None


def generate(name: str, results: Path) -> str:
    """The text between a document's markers, for example of "cpu-summary"."""
    device, _, kind = name.partition("-")
    if device not in DEVICES or kind not in {*TABLES, "all"}:
        raise ValueError(f"no benchmark table is called {name!r}")
    if kind == "all":
        parts = [f"![{plot}](plots/{plot}.png)" for plot in plots(device, results)]
        for kind, table in TABLES.items():
            if kind not in ("everything", "resources", "architectures") and (report := newest(results, device, table)):
                parts.append(f"{kind.replace('-', ', ')}:\n\n{table.make(report)}")
        return "\n\n".join(parts) or generate(f"{device}-summary", results)
    table = TABLES[kind]
    if report := newest(results, device, table):
        return table.make(report)
    what = {"accuracy": "accuracy", "kernels": "resource use"}.get(table.source, "speed")
    return f"The {what} of the {'CPU' if device == 'cpu' else 'CUDA'} kernels has not been measured yet."


def render(document: str, results: Path) -> str:
    """The document with the text between all benchmark markers made anew."""
    text, found = MARKED.subn(lambda m: f"{m[1]}{generate(m[2], results)}\n{m[3]}", document)
    if found != document.count("<!-- benchmark:") / 2:
        raise ValueError("a document has a benchmark marker without its partner")
    return text


COLOURS = {
    "kldiv_ext": "#1565c0",
    "eager": "#e6862e",
    "eager_float": "#b3471d",
    "compile": "#8bb174",
    "compile_float": "#3d7a4a",
    "linear_cross_entropy": "#8e6bb0",
    "liger": "#c2185b",
}
FLOOR, CEILING = 1e-9, 10.0  # of the plot of errors


def draw_speed(report: Report) -> Figure:
    """Time and memory of forward and backward, for two divergences."""
    records = [r for r in all_divergences(report["results"]) if r["mode"] == "forward_backward" and "ms_p50" in r]
    setting = "{rows} × {vocab} {dtype} logits".format_map(records[0])
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    figure.suptitle(f"Forward + backward of {setting}\n{machine_name(report)}")
    grid = figure.subplots(2, 2, sharex="col", sharey=True)
    for row, divergence in zip(grid, MAIN, strict=True):
        those = where(divergence=(divergence,))(records)
        names = [title(record["contender"]).replace("`", "") for record in those]
        colours = [COLOURS.get(record["contender"], "grey") for record in those]
        for axes, key, unit in zip(row, ("ms_p50", "peak_extra_bytes"), (1, 1e-6), strict=True):
            bars = axes.barh(names, [unit * record.get(key, 0) for record in those], color=colours)
            axes.bar_label(bars, fmt="{:,.0f}", padding=3)
            axes.set_title(divergence, loc="left", fontsize=10, fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
    grid[1, 0].set_xlabel("median time (ms)")
    grid[1, 1].set_xlabel("peak memory beyond the inputs (MB)")
    grid[0, 0].invert_yaxis()
    return figure


def draw_accuracy(report: Report) -> Figure:
    """Errors against KL: a column per dtype, a row for gradients and one for losses."""
    records = smooth(report["accuracy"])
    levels = sorted({record["level"] for record in records})
    promised = {
        "gradient": [GRADIENT_PROMISE] * len(levels),
        "loss": [loss_promise("forward_kl", level) / level for level in levels],
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(f"Errors against fp64, the worst of all divergences\n{machine_name(report)}")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for row, measure in zip(grid, promised, strict=True):
        row[0].set_ylabel(f"relative error of the {measure}")
        for axes, dtype in zip(row, ("bfloat16", "float16", "float32"), strict=True):
            lines: dict[str, dict[float, float]] = {}
            for record in where(dtype=(dtype,))(records):
                height = min(max(record.get(f"{measure}_error", CEILING), FLOOR), CEILING)
                line = lines.setdefault(record["contender"], {})
                line[record["level"]] = max(height, line.get(record["level"], 0))
            for name, line in lines.items():
                label = title(name).replace("`", "")
                axes.plot(list(line), list(line.values()), ".-", color=COLOURS.get(name), label=label)
            axes.plot(levels, promised[measure], "k--", linewidth=1, label="promise of kldiv_ext")
            axes.set(xscale="log", yscale="log", title=f"{measure}, {dtype}")
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylim(FLOOR, CEILING * 2)
    grid[0, 0].invert_xaxis()
    grid[1, 1].set_xlabel("forward KL of student and teacher")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_linear(report: Report) -> Figure:
    """Peak memory over positions, a line per contender."""
    records = [record for record in report["positions"] if "peak_extra_bytes" in record]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(record["contender"] for record in records):
        line = where(contender=(name,))(records)
        x, y = [r["positions"] for r in line], [r["peak_extra_bytes"] / 1e6 for r in line]
        axes.plot(x, y, "o-", color=COLOURS.get(name), label=title(name).replace("`", ""))
    gradients = {record["positions"]: record["gradient_bytes"] / 1e6 for record in records}
    axes.plot(list(gradients), list(gradients.values()), "k:", label="gradients alone")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="positions", ylabel="peak memory beyond the inputs (MB)", yscale="log")
    axes.set_title(f"forward_kl from hidden states, forward + backward\n{machine_name(report)}")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


DRAWINGS = {"": ("divergences", draw_speed), "accuracy": ("accuracy-loss", draw_accuracy)}
DRAWINGS["linear"] = ("linear-positions", draw_linear)


def plots(device: str, results: Path) -> dict[str, Figure]:
    """The plots by name, as far as the device is measured: cpu, accuracy, linear; gpu, gpu-accuracy, gpu-linear."""
    drawn = {}
    for name, (kind, draw) in DRAWINGS.items():
        if report := newest(results, device, TABLES[kind]):
            drawn[name if name and device == "cpu" else f"{device}-{name}".strip("-")] = draw(report)
    return drawn


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    check = parser.parse_args(argv).check
    stale = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        made = render(text, RESULTS)
        if made != text and check:
            print(f"{document.name} differs: run python -m benchmarks.report", file=sys.stderr)
            stale += 1
        elif made != text:
            document.write_text(made, encoding="utf-8")
    if check:
        return int(stale > 0)
    PLOTS.mkdir(parents=True, exist_ok=True)
    for device in ("cpu", "gpu"):
        for name, figure in plots(device, RESULTS).items():
            figure.savefig(PLOTS / f"{name}.png", dpi=200)
            print(os.path.relpath(PLOTS / f"{name}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
