"""Tries the properties of test_properties.py with fresh seeds for FUZZ_SECONDS and writes what it found to FUZZ.md."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import subprocess
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HYPOTHESIS_PROFILE"] = "fuzz"

import hypothesis
import test_properties
import torch

from kldiv_ext import info

RECORD = Path(__file__).with_name("FUZZ.md")
LASTING = "## Found by earlier runs, and mended"  # what follows is written by hand, and kept


def properties() -> dict[str, Any]:
    return {name: f for name, f in vars(test_properties).items() if name.startswith("test_")}


def counted(name: str, function: Callable[..., None], tried: Counter[str]) -> Callable[..., None]:
    """The property, counting what was not refused as no case of it."""

    def property(*args: Any, **kwargs: Any) -> None:
        torch.manual_seed(0)
        try:
            function(*args, **kwargs)
        except hypothesis.errors.UnsatisfiedAssumption:
            tried[name] -= 1
            raise
        finally:
            tried[name] += 1

    return property


def fuzz(seconds: float, first_seed: int, only: str) -> tuple[Counter[str], list[tuple[str, int, str]]]:
    """Cases tried by property, and (property, seed, minimal example) of every failure; who fails is not asked again."""
    tried: Counter[str] = Counter()
    failures = []
    waiting = {name: f for name, f in properties().items() if only in name}
    for name, function in waiting.items():
        function.hypothesis.inner_test = counted(name, function.hypothesis.inner_test, tried)
    end, seed = time.monotonic() + seconds, first_seed
    while waiting and time.monotonic() < end:
        for name, function in list(waiting.items()):
            seed += 1
            try:
                hypothesis.seed(seed)(function)()
            except Exception as error:
                text = "".join(traceback.format_exception_only(error)).split("Explanation:")[0]  # paths of this machine
                failures.append((name, seed, text))
                del waiting[name]
                print(f"FAILED {name}, seed {seed}\n{text}", flush=True)
            if time.monotonic() >= end:
                break
    return tried, failures


def commit() -> str:
    command = ["git", "-C", str(RECORD.parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def machine() -> str:
    cpu = Path("/proc/cpuinfo")
    names = (
        [x.split(": ")[1] for x in cpu.read_text().splitlines() if x.startswith("model name")] if cpu.exists() else []
    )
    isa = info.collect()["isa"]
    return f"{(names or [platform.machine()])[0]}, {isa} kernels, {torch.get_num_threads()} thread(s)"


def report(seconds: float, first_seed: int, tried: Counter[str], failures: list[tuple[str, int, str]]) -> str:
    lines = [
        "# Property tests, long run",
        "",
        "Written by `make fuzz`; the properties are those of `test_properties.py`.",
        "",
        f"- Date: {datetime.date.today()}",
        f"- Commit: {commit()}",
        f"- Machine: {machine()}",
        f"- torch {torch.__version__}, hypothesis {hypothesis.__version__}, Python {platform.python_version()}",
        f"- Time: {seconds:.0f} s, first seed {first_seed}",
        f"- Cases: {sum(tried.values())}, failures: {len(failures)}",
        "",
        "| property | cases | failures |",
        "|---|---:|---:|",
    ]
    failed = Counter(name for name, _, _ in failures)
    lines += [f"| {name.removeprefix('test_').replace('_', ' ')} | {tried[name]} | {failed[name]} |" for name in tried]
    for name, seed, text in failures:
        lines += ["", f"## {name}, seed {seed}", "", "```", text.strip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", 1200)))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--only", default="", help="part of a property's name")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="reduction")  # PyTorch's, about the mean
    start = time.monotonic()
    tried, failures = fuzz(options.seconds, options.seed, options.only)
    text = report(time.monotonic() - start, options.seed, tried, failures)
    before = options.record.read_text() if options.record.exists() else ""
    options.record.write_text(text + "".join(f"\n{LASTING}{kept}" for kept in before.split(LASTING)[1:]))
    print(text)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
