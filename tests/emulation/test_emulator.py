"""The emulator notices faults (selftest.cpp), and sanitizers find none in the kernels (sanitized.cpp)."""

import pytest
from builds import build, run

from emulation.harness import options

SANITIZED = ("emulation-sanitized", "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all")


@pytest.mark.parametrize(
    ("program", "folder", "flags"),
    [("selftest", "emulation", "-O1"), ("selftest", *SANITIZED), ("sanitized", *SANITIZED)],
)
def test_program(program: str, folder: str, flags: str) -> None:
    target = f"emulation_{program}"
    run(build(folder, target, *options(flags)) / target)
