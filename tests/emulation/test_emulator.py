"""The emulator notices faults (selftest.cpp), and sanitizers find none in the kernels (sanitized.cpp)."""

from __future__ import annotations

import pytest
from builds import run

from emulation.harness import OPTIMIZED, SANITIZED, build_emulation


@pytest.mark.parametrize(
    ("program", "variant"),
    [("selftest", OPTIMIZED), ("selftest", SANITIZED), ("sanitized", SANITIZED)],
    ids=["selftest", "sanitized-selftest", "sanitized-kernels"],
)
def test_program(program: str, variant: tuple[str, str]) -> None:
    target = f"emulation_{program}"
    run(build_emulation(target, variant) / target)
