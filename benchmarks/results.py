"""What the commands share: their options, and result files with the place and circumstances of the measurement."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import kldiv_ext
import kldiv_ext.info

Record = dict[str, Any]
Report = dict[str, Any]
DIGITS = 5  # of floats in a result file; tables show at most three
PACKAGES = {"torch", "triton", "liger_kernel"}


def make_parser(module: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of every command that measures."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated selection of the known names."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return text.split(",")

    return parse


def provenance(command: str, device: str, bandwidth: float | None = None) -> Report:
    """The head of a result file."""
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    found = importlib.metadata.distributions()
    packages = {name: d.version for d in found if (name := str(d.metadata["Name"]).replace("-", "_")) in PACKAGES}
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "kldiv_ext": kldiv_ext.__version__}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": git_commit(),
        "machine": {
            "device": device,
            "cpu": cpu_model(),
            "gpu": gpu and gpu.name,
            "gpu_memory_bytes": gpu and gpu.total_memory,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "copy_bytes_per_second": bandwidth,
            "isa": kldiv_ext.info.collect()["isa"],
        },
        "versions": versions | packages,
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" if files differ from it; $COMMIT in a copy without history."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


def dumps(report: Report) -> str:
    """Compact JSON: a list of records becomes its columns and one row per line; floats are rounded, or null."""
    tables = {key: x for key, x in report.items() if isinstance(x, list) and x and isinstance(x[0], dict)}
    head = {key: rounded(value) for key, value in report.items() if key not in tables}
    parts = [json.dumps(head, indent=1, allow_nan=False)[1:-2]]
    for key, records in tables.items():
        columns = list(dict.fromkeys(name for record in records for name in record))
        rows = [rounded([record.get(name) for name in columns]) for record in records]
        lines = ",\n  ".join(json.dumps(row, allow_nan=False, separators=(",", ":")) for row in rows)
        parts.append(f'\n "{key}": {{"columns": {json.dumps(columns)}, "rows": [\n  {lines}\n ]}}')
    return "{" + ",".join(parts) + "\n}\n"


def loads(text: str) -> Report:
    """The report of `dumps`. Its records hold no null values."""
    report: Report = json.loads(text)
    for key, value in report.items():
        if isinstance(value, dict) and set(value) == {"columns", "rows"}:
            records = (zip(value["columns"], row, strict=True) for row in value["rows"])
            report[key] = [{name: x for name, x in record if x is not None} for record in records]
    return report


def save(report: Report, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(report), encoding="utf-8")


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return [rounded(x) for x in value] if isinstance(value, list) else value


def failure(error: Exception) -> str:
    """An exception as a result's status, on one line."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
