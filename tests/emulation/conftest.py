"""The emulated kernels as fixtures."""

import pytest

from emulation.cases import A100, H200, ORDERS
from emulation.harness import Device, Kernels


@pytest.fixture(scope="session")
def library() -> Kernels:
    return Kernels()


@pytest.fixture
def kernels(library: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """On a device that streams rows, until another is set."""
    monkeypatch.setenv("KLDIV_EXT_CUDA_TIER", "")  # is restored after the test
    library.stream_rows(Device())
    library.set_order(*ORDERS[0])
    return library


@pytest.fixture(params=["streamed", "resident"])
def both_tiers(kernels: Kernels, request: pytest.FixtureRequest) -> Kernels:
    if request.param == "resident":
        kernels.keep_rows(H200._replace(multiprocessors=1))
    return kernels


@pytest.fixture(params=[H200._replace(multiprocessors=1), A100._replace(multiprocessors=2)], ids=["sm_90", "sm_80"])
def small_device(request: pytest.FixtureRequest) -> Device:
    """With clusters or without, too small for five rows at a time."""
    return request.param
