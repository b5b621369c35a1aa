"""The CPU kernels without torch, called from several threads at once, under the thread sanitizer."""

import subprocess
from pathlib import Path

import pytest
from builds import build, run
from oracle import need_isa

FLAGS = "-O1 -g1 -fsanitize=thread -Wno-uninitialized -Wno-maybe-uninitialized"  # gcc 12 warns of its own header


@pytest.fixture(scope="module")
def program() -> Path:
    options = ("-DKLDIV_THREADS=ON", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={FLAGS}")
    return build("threads", "threads", *options) / "threads"


@pytest.fixture
def fixed_addresses() -> list[str]:
    """The command before a program for fixed addresses: older sanitizers stop at the random ones of newer kernels."""
    try:
        return ["setarch", "-R"] if subprocess.run(["setarch", "-R", "true"]).returncode == 0 else []
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_no_races_and_the_bits_of_one_thread(program: Path, fixed_addresses: list[str], isa: str) -> None:
    need_isa(isa)
    assert run(*fixed_addresses, program, KLDIV_EXT_CPU_ISA=isa) == f"{isa}\n"


def test_a_race_is_noticed(program: Path, fixed_addresses: list[str]) -> None:
    result = subprocess.run([*fixed_addresses, program, "faulty"], capture_output=True, text=True)
    assert result.returncode != 0 and "ThreadSanitizer: data race" in result.stderr
