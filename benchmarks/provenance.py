"""What is noted with every result: when, from which commit, on which machine, with which versions."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import kldiv_ext
import kldiv_ext.info


def provenance(command: str, device: str, bandwidth: float | None = None) -> dict[str, Any]:
    """The head of a file of results."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": git_commit(),
        "machine": machine(device, bandwidth),
        "versions": versions(),
    }


def machine(device: str, bandwidth: float | None) -> dict[str, Any]:
    return {
        "device": device,
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "gpu_memory_bytes": (torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "copy_bytes_per_second": bandwidth,
        "isa": kldiv_ext.info.collect().get("isa"),
    }


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "kldiv_ext": kldiv_ext.__version__,
    }
    for package in ("torch", "triton", "liger_kernel", "speculators"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" where files differ from it; of a copy without history, $COMMIT."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")
    return done.stdout.strip()


def dumps(report: dict[str, Any], key: str) -> str:
    """As JSON, one line for each of the many records under the key."""
    records = ",\n".join("  " + json.dumps(record, allow_nan=False) for record in report[key])
    head = json.dumps({**report, key: []}, indent=1)
    return head.replace(f'"{key}": []', f'"{key}": [\n{records}\n ]') + "\n"
