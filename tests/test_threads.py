"""The CPU kernels without torch, called from several threads at once, under the thread sanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest
from builds import build, run
from oracle import need_isa

FLAGS = "-O1 -g1 -fsanitize=thread -Wno-uninitialized -Wno-maybe-uninitialized"  # gcc 12 warns of its own header
Command = list[str | Path]


@pytest.fixture(scope="module")
def command() -> Command:
    """At fixed addresses if possible: older sanitizers stop where addresses are as random as in newer Linux."""
    options = ("-DKLDIV_THREADS=ON", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={FLAGS}")
    program = build("threads", "threads", *options) / "threads"
    fixed = shutil.which("setarch") and subprocess.run(["setarch", "-R", "true"]).returncode == 0
    return ["setarch", "-R", program] if fixed else [program]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_no_races_and_the_bits_of_one_thread(command: Command, isa: str) -> None:
    need_isa(isa)
    assert run(*command, KLDIV_EXT_CPU_ISA=isa) == f"{isa}\n"


def test_a_race_is_noticed(command: Command) -> None:
    result = subprocess.run([*command, "faulty"], capture_output=True, text=True)
    assert result.returncode != 0 and "ThreadSanitizer: data race" in result.stderr
