"""The emulator notices faults (selftest.cpp), and sanitizers find none in the kernels (sanitized.cpp)."""

import pytest
from builds import build, run

from emulation.harness import options

FLAGS = {
    "emulation": "-O1",
    "emulation-sanitized": "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all",
}


@pytest.mark.parametrize(
    ("folder", "program"),
    [("emulation", "selftest"), ("emulation-sanitized", "selftest"), ("emulation-sanitized", "sanitized")],
)
def test_program(folder: str, program: str) -> None:
    target = f"emulation_{program}"
    run(build(folder, target, *options(FLAGS[folder])) / target)
