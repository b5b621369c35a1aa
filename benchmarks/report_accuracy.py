"""What benchmarks.report makes of an accuracy run: tables, the account of the promises, and the plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.promises import BELOW, GRADIENT_PROMISE, describe, first_order, loss_promise, missed

Record = dict[str, Any]
Run = dict[str, Any]
# What is measured, by its name in statuses: key in a record and the caption.
MEASURES = {
    "gradient": ("gradient_error", "Relative L2 error of the student gradient, the worst of {rows} rows"),
    "loss": ("loss_error", "Relative error of the loss, a mean over {rows} rows"),
}
PLOTTED = ("bfloat16", "float16", "float32")
FLOOR, CEILING = 1e-9, 10.0  # of the plot; what is not finite is drawn at the ceiling


def number(value: float) -> str:
    """Two digits, with an exponent where it is shorter: 0.25, 1.8e-3."""
    if value == 0 or 0.01 <= value < 100:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def smooth(records: list[Record]) -> list[Record]:
    """The divergences that are compared with each other: total variation has a table of its own."""
    return [record for record in records if not first_order(record["divergence"])]


def jumping(records: list[Record]) -> list[Record]:
    return [record for record in records if first_order(record["divergence"])]


def lines_of(records: list[Record]) -> dict[tuple[str, str], dict[float, list[Record]]]:
    """By dtype and contender, then by level."""
    lines: dict[tuple[str, str], dict[float, list[Record]]] = {}
    for record in records:
        line = lines.setdefault((record["dtype"], record["contender"]), {})
        line.setdefault(record["level"], []).append(record)
    return lines


def worst(records: list[Record], measure: str) -> str:
    """The largest error, bold where it misses a promise, and for how many divergences there is none."""
    key = MEASURES[measure][0]
    finite = [record[key] for record in records if record.get(key) is not None]
    text = number(max(finite)) if finite else "none finite"
    if any(record["status"].startswith("missed") and measure in record["status"] for record in records):
        text = f"**{text}**"
    for what in ("not finite", "failed"):
        names = {record["divergence"] for record in records if record["status"].startswith(what)}
        if names and finite:
            text += f" ({len(names)} {what})"
    return text


def markdown(records: list[Record], cell: Callable[[list[Record]], str]) -> str:
    """One line per dtype and contender, one column per level."""
    levels = list(dict.fromkeys(record["level"] for record in records))
    text = [["dtype", "contender", *(number(level) for level in levels)], ["---"] * (2 + len(levels))]
    for (dtype, contender), line in lines_of(records).items():
        text.append([dtype, contender, *(cell(line[level]) if level in line else "-" for level in levels)])
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def divergences(records: list[Record]) -> str:
    """How many divergences the worst was taken of, and of which where they were fewer."""
    by_contender: dict[str, dict[str, None]] = {}
    for record in records:
        by_contender.setdefault(record["contender"], {})[record["divergence"]] = None
    all_of_them = by_contender["kldiv_ext"]
    text = f"the worst of {len(all_of_them)} divergences"
    fewer: dict[tuple[str, ...], list[str]] = {}
    for contender, names in by_contender.items():
        if len(names) < len(all_of_them):
            fewer.setdefault(tuple(names), []).append(contender)
    notes = [f"{', '.join(who)}: {', '.join(which)}" for which, who in fewer.items()]
    return f"{text} ({'; '.join(notes)})" if notes else text


def sizes(records: list[Record]) -> str:
    return " and ".join(f"{vocab}" for vocab in dict.fromkeys(record["vocab"] for record in records))


def provenance(run: Run) -> str:
    machine = run["machine"]
    name = machine["gpu"] or machine["cpu"]
    left_out = "".join(f" Without {contender}: {reason}." for contender, reason in run["left_out"].items())
    return (
        f"{name}; torch {run['versions']['torch']}; {run['date'][:10]}, commit {(run['commit'] or 'unknown')[:12]}; "
        f"`{run['command']}`.{left_out}"
    )


def table(run: Run, measure: str) -> str:
    records = smooth(run["accuracy"])
    caption = MEASURES[measure][1].format_map(run)
    over = f"{divergences(records)} and vocabularies of {sizes(records)}, by forward KL"
    if any(record["status"] == "not finite" for record in records):
        over += "; in brackets, how many divergences have a loss or gradient that is not finite"
    text = f"{caption}, {over}. {provenance(run)}"
    return markdown(records, lambda cell: worst(cell, measure)) + "\n\n" + text


def total_variation(run: Run) -> str:
    def cell(records: list[Record]) -> str:
        return " / ".join(worst(records, measure) for measure in MEASURES)

    records = jumping(run["accuracy"])
    return markdown(records, cell) + f"\n\nErrors of gradient / loss. {provenance(run)}"


def promises(run: Run) -> str:
    """How many of the results keep them, and every one that does not."""
    ours = [record for record in run["accuracy"] if record["contender"] == "kldiv_ext"]
    broken = missed(ours)
    text = f"Of {len(ours)} results of kldiv_ext, {len(ours) - len(broken)} keep every promise."
    near = [record["loss_error_absolute"] for record in smooth(ours) if record["loss"] < BELOW]
    if near and None not in near:
        text += f" Losses below {number(BELOW)} are off by at most {number(max(near))}."
    if broken:
        text += " Missed:\n\n" + "\n".join(f"- {describe(record)}" for record in broken)
    return text


TABLES: dict[str, Callable[[Run], str]] = {
    "accuracy-gradient": lambda run: table(run, "gradient"),
    "accuracy-loss": lambda run: table(run, "loss"),
    "accuracy-total_variation": total_variation,
    "accuracy-promises": promises,
}


def draw(run: Run, path: Path) -> None:
    """Errors against KL: a column per dtype, a row per measure, a line per contender, promises dashed."""
    import matplotlib.pyplot as plt

    records = smooth(run["accuracy"])
    lines = lines_of(records)
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(contender for _, contender in lines))}
    levels = sorted({record["level"] for record in records})
    promised = {
        "gradient": [GRADIENT_PROMISE] * len(levels),
        "loss": [loss_promise("forward_kl", level) / level for level in levels],
    }
    figure, grid = plt.subplots(2, len(PLOTTED), figsize=(11, 6.5), sharex=True, sharey=True, layout="constrained")
    for row, (measure, (key, _)) in zip(grid, MEASURES.items(), strict=True):
        for axes, dtype in zip(row, PLOTTED, strict=True):
            for (line_dtype, contender), line in lines.items():
                if line_dtype != dtype:
                    continue
                values = [max(height(record.get(key)) for record in cell) for cell in line.values()]
                axes.plot(list(line), values, color=colours[contender], marker=".", label=contender)
            axes.plot(levels, promised[measure], "k--", linewidth=1, label="promise of kldiv_ext")
            axes.set(xscale="log", yscale="log", title=f"{measure}, {dtype}")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"relative error of the {measure}")
    grid[0, 0].set_ylim(FLOOR, CEILING * 2)
    grid[0, 0].invert_xaxis()
    for axes in grid[1]:
        axes.set_xlabel("forward KL of student and teacher")
    handles = {
        text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    machine = run["machine"]["gpu"] or run["machine"]["cpu"]
    title = f"Errors against fp64, {divergences(records)}; cut off at {number(CEILING)}, where what is not finite is"
    figure.suptitle(f"{title}\n{machine}, {run['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def height(error: float | None) -> float:
    """Within the plot."""
    return CEILING if error is None else min(max(error, FLOOR), CEILING)
