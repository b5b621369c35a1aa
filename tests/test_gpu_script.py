"""benchmarks/gpu.sh, over programs that do nothing."""

import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
if not SCRIPT.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
STUBS = {
    "nvidia-smi": '[[ $* != *name* ]] || echo "NVIDIA H200"',
    "compute-sanitizer": 'echo "========= at kldiv"; [[ $* != *pytest* ]] || echo "1 passed"',
    "python": """
echo "$*" >>"$CALLS"
case $* in
  "-c import xdist") exit 1 ;;
  "-c import torch; print"*) echo 9.0 ;;
  setup.py*) echo "for $TORCH_CUDA_ARCH_LIST, $FORCE_CUDA" ;;
  "-m pytest"*) echo "${TESTS-3 passed}" ;;
  "-m benchmarks.accuracy"*) echo "not accurate"; exit 1 ;;
  "-m benchmarks "*) echo "{}" >"${@: -1}"; sleep "${SLEEP-0}" ;;
esac""",
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(tmp_path: Path) -> Run:
    """Runs the script; returns its exit status, its output and the calls of Python."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        calls = tmp_path / "calls"
        calls.write_text("")
        known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "CALLS": str(calls)}
        known |= {"OUT": "", "DEVICE": "", "QUICK": ""}
        command = ["bash", str(SCRIPT), *arguments]
        done = subprocess.run(command, env=os.environ | known | environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, calls.read_text()

    return run


def test_every_stage_runs(script: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, output, calls = script(str(out))
    assert status == 1, output
    verdicts = dict(re.findall(r"^(\w+) +\d+s  (ok|failed.*)$", output, re.MULTILINE))
    assert list(verdicts) == ["build", "tests", "sanitize", "benchmark", "linear", "accuracy"]
    assert {stage for stage in verdicts if verdicts[stage] != "ok"} == {"sanitize", "accuracy"}
    assert "accuracy: failed (status 1); the end of its log:\nnot accurate" in output
    (result,) = {path.name for path in out.iterdir()} - {"summary.txt", "logs.tar.gz"}
    assert result.startswith("nvidia-h200-20") and result.endswith(".json")
    assert "-m benchmarks --suite gpu --device cuda" in calls
    with tarfile.open(out / "logs.tar.gz") as logs:
        build = logs.extractfile("logs/build.log")
        assert build is not None and build.read() == b"for 9.0, 1\n"
        assert {"logs/sanitize-memcheck.log", "logs/tests.log", "logs/nvidia-smi.log"} <= set(logs.getnames())


def test_named_stages_run_and_keep_earlier_logs(script: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script("build", OUT=str(out))[0] == 0
    status, _, calls = script(str(out), "tests", TESTS="3 skipped")  # skipped tests do not pass
    assert status == 1 and "setup.py" not in calls and "-m pytest" in calls
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {"logs/build.log", "logs/tests.log"} <= set(logs.getnames())
    assert [line.split()[0] for line in (out / "summary.txt").read_text().splitlines()][1::2] == ["build", "tests"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["/dev/null/out", "fly"], ["build"]], ids=str)
def test_a_folder_and_known_stages_are_required(script: Run, arguments: list[str]) -> None:
    status, output, calls = script(*arguments)
    assert status == 2 and "benchmarks/gpu.sh [OUT]" in output and calls == ""


def test_a_stage_is_stopped_in_time(script: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, output, _ = script(str(out), "benchmark", "build", BENCHMARK_SECONDS="1", SLEEP="60")
    assert status == 1 and "benchmark: stopped after 1 s" in output
    assert (out / "summary.txt").read_text().splitlines()[2].endswith("  ok")  # and goes on
    assert len(list(out.glob("nvidia-h200-*.json"))) == 1  # what it had written is kept
