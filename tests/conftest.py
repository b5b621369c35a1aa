"""What every test shares: devices, the --slow option, fixed seeds."""

import os

# Before torch starts its threads: those that wait must not spin, or a busy machine makes every small test wait too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from kldiv_ext import _library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes or much memory")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def no_cuda_reason() -> str:
    """ "" where CUDA tensors can be tested."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _library.cuda_missing_reason


NO_CUDA = pytest.mark.skipif(no_cuda_reason() != "", reason=no_cuda_reason())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that the kernels exist for."""
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
