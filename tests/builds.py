"""What CMakeLists.txt builds for the tests, in build/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **environment: str) -> str:
    """What a program prints; it must succeed."""
    result = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tool(name: str) -> str | None:
    """A program beside this Python, whose environment may not be activated, or on the PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def build(name: str, target: str, *options: str) -> Path:
    """The folder where that target is, up to date; CMake knows what has changed."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("needs the source tree")
    if cmake is None:
        pytest.skip("needs cmake")
    folder = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}{'-ninja' if ninja else ''}"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    # A sanitizer that this Python was started with is not for compilers.
    run(cmake, "-S", ".", "-B", folder, *generator, *options, LD_PRELOAD="")
    run(cmake, "--build", folder, "--target", target, "--parallel", str(os.cpu_count()), LD_PRELOAD="")
    return folder
