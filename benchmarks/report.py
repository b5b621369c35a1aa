"""The documents' tables and plots, made from the committed results."""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, LOG_TARGETS
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
}
Cell = Callable[[list[Record]], str]
Select = Callable[[list[Record]], list[Record]]


def number(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.3f}"


def error(value: float) -> str:
    """Two digits, with an exponent where it is shorter: 0.25, 1.8e-3."""
    text = f"{value:.2g}" if value == 0 or 0.01 <= value < 100 else f"{value:.1e}"
    return re.sub(r"\.0(?=e)|(?<=e-)0|(?<=e)\+0?", "", text)


def title(name: str) -> str:
    return TITLES.get(name, name)


PHASES = ("phase 1", "phase 2", "phase 3", "phase 2+3", "phase 1 alone")
# The value under a record's key: the column that shows it, and its text there.
TEXTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "contender": ("contender", title),
    "divergence": ("variant", "`{}`".format),
    "mode": ("mode", lambda name: name.replace("_", " + ")),
    "ms_p50": ("time", lambda ms: f"{number(ms)} ms" if ms < 1e4 else f"{number(ms / 1e3)} s"),
    "share": ("share", "{:.0%}".format),
    "peak_extra_bytes": ("memory", lambda size: f"{number(size / 1e6)} MB"),
    "gradient_bytes": ("gradients", lambda size: f"{number(size / 1e6)} MB"),
    "kl": ("forward KL", error),
    "level": ("forward KL", error),
    "loss_error": ("error of the loss", error),
    "hidden_error": ("of the hidden states' gradient", error),
    "weight_error": ("of the head's gradient", error),
    **{phase: (phase, "{:.0f}".format) for phase in PHASES},
}
SIZES = {"rows": "rows", "hidden": "hidden size", "vocab": "vocabulary"}


def readable(record: Record) -> dict[str, str]:
    """The texts of a record by column. A failure's status stands in the place of time and memory."""
    texts = {key: str(value) for key, value in record.items()}
    texts |= {column: text(record[key]) for key, (column, text) in TEXTS.items() if key in record}
    if record.get("status", "ok") != "ok":
        texts["time"] = texts["memory"] = re.sub("failed: .*", "failed", record["status"].lower())
    elif "ratio" in record and record["contender"] != "kldiv_ext":
        texts["time"] += f" ({record['ratio']:.0f}x)" if record["ratio"] >= 10 else f" ({record['ratio']:.2g}x)"
    sizes = [key for key in SIZES if key in record]
    return texts | {" × ".join(SIZES[key] for key in sizes): " × ".join(str(record[key]) for key in sizes)}


def worst(measure: str) -> Cell:
    """The largest error, bold if it misses a promise, and in brackets how many divergences have none."""

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
    near = [r["loss_error"] * r["loss"] for r in ours if r["loss"] < BELOW and "loss_error" in r]
    if near:
        text += f" The largest absolute error of a loss below {error(BELOW)} is {error(max(near))}."
    return text + (" Missed:\n\n" + "\n".join(f"- {describe(record)}" for record in broken) if broken else "")


EXPLAINED = {
    "time": "Time: median; in brackets, the multiple of kldiv_ext's.",
    "memory": "Memory: peak beyond the inputs, gradients included.",
}


@dataclass(frozen=True)
class Table:
    """A line per combination of labels and, where `column` names one, a column per value of it.

    A cell joins texts of its record, or is computed from the records that share labels and column.
    """

    select: Select
    labels: tuple[str, ...]
    column: str = "contender"
    cell: tuple[str, ...] | Cell = ("time",)
    caption: str = ""  # formatted with the report and the coverage of its records
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
        text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        told = {*self.labels, *(self.cell if self.column and isinstance(self.cell, tuple) else ())}
        caption = [self.caption.format_map({**report, "coverage": coverage(records)})] if self.caption else []
        caption += [explained for name, explained in EXPLAINED.items() if name in told]
        return f"{text}\n\n{' '.join([*caption, provenance(report)])}"

    def text(self, records: list[Record]) -> str:
        if not records:
            return "-"
        if callable(self.cell):
            return self.cell(records)
        texts = readable(records[0])
        return ", ".join(dict.fromkeys(texts.get(name, "not measured") for name in self.cell))


def coverage(records: list[Record]) -> str:
    """The number of divergences, and the contenders with fewer."""
    pairs = dict.fromkeys((title(record.get("contender", "")), record.get("divergence", "")) for record in records)
    names = {name: [divergence for other, divergence in pairs if other == name] for name, _ in pairs}
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


def accuracy(caption: str, cell: Cell, first_order: bool = False) -> Table:
    """Errors by dtype, contender and forward KL."""
    return Table(
        lambda records: points(records, (first_order,)), ("dtype", "contender"), "forward KL", cell, caption, "accuracy"
    )


USUAL = {"mode": FEW_MODES, "dtype": ("bfloat16", "float32")}
LARGE_FORWARD_KL = where(large=True, divergence=MAIN[:1], mode=("forward_backward",), dtype=USUAL["dtype"])
SHAPE = ("rows × vocabulary", "dtype")
VARIANT = ("variant", *SHAPE, "mode")
HIDDEN_SHAPE = ("rows × hidden size × vocabulary", "dtype")
ERRORS = ("error of the loss", "of the hidden states' gradient", "of the head's gradient")
RESULT = ("contender", "time", "share", "memory", "gradients")
FORWARD_KL = "Forward and backward of `forward_kl`."

# To add a table, name it here and put its markers, such as `benchmark:cpu-NAME begin`, into a document.
TABLES = {
    "summary": Table(LARGE_FORWARD_KL, SHAPE, cell=("time", "memory"), caption=FORWARD_KL),
    "shapes": Table(where(large=True, divergence=MAIN[:1], **USUAL), (*SHAPE, "mode"), caption="`forward_kl`."),
    "divergences": Table(all_divergences, VARIANT),
    "kl_div": Table(where(large=True, op=("kl_div",), **USUAL), VARIANT),
    "small": Table(
        where(large=False, dtype=("float32",), mode=FEW_MODES, divergence=("forward_kl", *LOG_TARGETS)), VARIANT
    ),
    "memory": Table(LARGE_FORWARD_KL, (*SHAPE, "gradients"), cell=("memory",), caption=FORWARD_KL),
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
        (*HIDDEN_SHAPE, *RESULT, *ERRORS),
        column="",
        caption=FORWARD_KL + " Share: of the speed of the four matrix products alone, over all rows at once into "
        "existing memory. While times are measured on a CPU, the process keeps freed memory. Errors: relative, against "
        "fp64 from the same hidden states and heads.",
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
        where(), HIDDEN_SHAPE, cell=("memory", "time"), caption=FORWARD_KL + " One run each.", source="positions"
    ),
    "accuracy-gradient": accuracy(
        "Relative L2 error of the student's gradient, the worst of {rows} rows, by forward KL; {coverage}.",
        worst("gradient"),
    ),
    "accuracy-loss": accuracy(
        "Relative error of the loss, a mean over {rows} rows, by forward KL; {coverage}.", worst("loss")
    ),
    "accuracy-total_variation": accuracy(
        "Relative errors of gradient / loss, by forward KL.",
        lambda records: f"{worst('gradient')(records)} / {worst('loss')(records)}",
        first_order=True,
    ),
    "accuracy-promises": Table(points, (), cell=promises, source="accuracy"),
    "resources": Table(
        where(architecture=("sm_90",)),
        ("kernel", "dtype", "variant", "registers", "stack", "spills", *PHASES),
        column="",
        caption="sm_90, CUDA {nvcc}. A phase's number is its instructions per pair of logits on the shortest way "
        "through its loop: without rare cases, labels, and sums and gradients that are not asked for.",
        source="kernels",
    ),
    "everything": Table(where(), ("op", *VARIANT, *RESULT, "loss_error", "grad_error", "status"), column=""),
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
            if kind not in ("everything", "resources") and (report := newest(results, device, table)):
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


COLOURS = {name: f"C{i}" for i, name in enumerate(CONTENDERS)}
FLOOR, CEILING = 1e-9, 10.0  # of the plot of errors


def draw_speed(report: Report, figure: Any) -> None:
    """Time and memory of forward and backward, for two divergences."""
    records = [r for r in all_divergences(report["results"]) if r["mode"] == "forward_backward" and "ms_p50" in r]
    setting = "{rows} × {vocab} {dtype} logits".format_map(records[0])
    figure.set_size_inches(8, 4.6)
    figure.suptitle(f"Forward + backward of {setting} (less is better)\n{machine_name(report)}")
    grid = figure.subplots(2, 2, sharex="col", sharey=True)
    for row, divergence in zip(grid, MAIN, strict=True):
        those = where(divergence=(divergence,))(records)
        names = [title(record["contender"]).replace("`", "") for record in those]
        colours = [COLOURS[record["contender"]] for record in those]
        for axes, key, unit in zip(row, ("ms_p50", "peak_extra_bytes"), (1, 1e-6), strict=True):
            bars = axes.barh(names, [unit * record.get(key, 0) for record in those], color=colours)
            axes.bar_label(bars, fmt="{:,.0f}", padding=3)
            axes.set_title(divergence, loc="left", fontsize=10, fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
    grid[1, 0].set_xlabel("median time (ms)")
    grid[1, 1].set_xlabel("peak memory beyond the inputs (MB)")
    grid[0, 0].invert_yaxis()


def draw_accuracy(report: Report, figure: Any) -> None:
    """Errors against KL: a column per dtype, a row for gradients and one for losses."""
    records = points(report["accuracy"], (False,))
    levels = sorted({record["level"] for record in records})
    promised = {
        "gradient": [GRADIENT_PROMISE] * len(levels),
        "loss": [loss_promise("forward_kl", level) / level for level in levels],
    }
    figure.set_size_inches(9, 6)
    figure.suptitle(
        f"Errors against fp64, the worst of all divergences (10: 10 or more, or not finite)\n{machine_name(report)}"
    )
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
                axes.plot(list(line), list(line.values()), ".-", color=COLOURS[name], label=label)
            axes.plot(levels, promised[measure], "k--", linewidth=1, label="promise of kldiv_ext")
            axes.set(xscale="log", yscale="log", title=f"{measure}, {dtype}")
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylim(FLOOR, CEILING * 2)
    grid[0, 0].invert_xaxis()
    grid[1, 1].set_xlabel("forward KL of student and teacher")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def draw_linear(report: Report, figure: Any) -> None:
    """Peak memory over positions, a line per contender."""
    records = [record for record in report["positions"] if "peak_extra_bytes" in record]
    figure.set_size_inches(8, 4.5)
    axes = figure.subplots()
    for name in dict.fromkeys(record["contender"] for record in records):
        line = where(contender=(name,))(records)
        x, y = [r["rows"] for r in line], [r["peak_extra_bytes"] / 1e6 for r in line]
        axes.plot(x, y, "o-", color=COLOURS[name], label=title(name).replace("`", ""))
    gradients = {record["rows"]: record["gradient_bytes"] / 1e6 for record in records}
    axes.plot(list(gradients), list(gradients.values()), "k:", label="gradients alone")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="positions", ylabel="peak memory beyond the inputs (MB)", yscale="log")
    setting = "hidden size {hidden}, vocabulary {vocab}, {dtype}".format_map(records[0])
    axes.set_title(f"forward_kl from hidden states, forward + backward\n{setting}; {machine_name(report)}")
    axes.legend()
    axes.grid(alpha=0.3)


def plots(device: str, results: Path) -> dict[str, Any]:
    """Figures by name, as far as the device is measured: cpu, accuracy, linear; gpu, gpu-accuracy, gpu-linear."""
    drawn = {}
    kinds = {device: "divergences", "accuracy": "accuracy-loss", "linear": "linear-positions"}
    for (name, kind), draw in zip(kinds.items(), (draw_speed, draw_accuracy, draw_linear), strict=True):
        if report := newest(results, device, TABLES[kind]):
            from matplotlib.figure import Figure  # needed to draw, not to measure

            figure = Figure(layout="constrained")
            draw(report, figure)
            drawn[name if device in ("cpu", name) else f"{device}-{name}"] = figure
    return drawn


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    check = parser.parse_args(argv).check
    texts = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    made = {document: render(text, RESULTS) for document, text in texts.items()}
    stale = [document for document in DOCUMENTS if made[document] != texts[document]]
    if check:
        print(*(f"{document.name} differs: run python -m benchmarks.report" for document in stale), file=sys.stderr)
        return int(bool(stale))
    for document in stale:
        document.write_text(made[document], encoding="utf-8")
    PLOTS.mkdir(parents=True, exist_ok=True)
    for device in ("cpu", "gpu"):
        for name, figure in plots(device, RESULTS).items():
            figure.savefig(PLOTS / f"{name}.png", dpi=200)
            print(f"docs/plots/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
