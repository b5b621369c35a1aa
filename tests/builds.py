"""The targets of CMakeLists.txt that tests need, built in build/."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **environment: str) -> str:
    """The output of a program, which must succeed."""
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tool(name: str) -> str | None:
    """A program beside this Python, whose environment may not be activated, or on the PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def build(name: str, target: str, *options: str) -> Path:
    """The folder of a target, up to date. Test processes that need the same folder take turns."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("needs the source tree")
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    folder = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    options += ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}")
    with FileLock(f"{folder}.lock"):
        # LD_PRELOAD: compilers do without the sanitizer that this Python may run under.
        run(cmake, "-S", ".", "-B", folder, *options, LD_PRELOAD="")
        run(cmake, "--build", folder, "--target", target, "--parallel", str(os.cpu_count()), LD_PRELOAD="")
    return folder


def load_module(name: str, target: str, module: str, *options: str) -> ModuleType:
    """A Python module that this target builds."""
    pytest.importorskip("pybind11")
    path = build(name, target, "-DKLDIV_WHITEBOX=ON", *options) / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
