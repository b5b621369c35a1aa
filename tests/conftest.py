"""Fixtures and options that every test shares: devices, --slow, seeds, and how much hypothesis draws."""

import os
import subprocess
import sys
from pathlib import Path

# Set before torch starts its threads. A spinning thread would take the core from another test process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

import kldiv_ext
from kldiv_ext import _library

hypothesis.settings.register_profile("default", max_examples=120, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile(  # pytest --hypothesis-profile=fuzz: other examples in every run
    "fuzz", max_examples=10_000, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes or much memory")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def no_cuda_reason() -> str:
    """Why CUDA tensors cannot be tested; "" where they can."""
    return _library.cuda_missing_reason if torch.cuda.is_available() else "torch sees no CUDA device"


NO_CUDA = pytest.mark.skipif(no_cuda_reason() != "", reason=no_cuda_reason())


def run_python(*arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """What another Python process prints, with this copy of the package and the tests on its path."""
    folders = [Path(kldiv_ext.__file__).parent.parent, Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, filter(None, folders)))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device with kernels."""
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
