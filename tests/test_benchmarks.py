"""The benchmark command and the report that makes the documents' tables."""

import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import kldiv_ext
from benchmarks import contenders, measure, report, suites
from benchmarks.contenders import Expected, Problem
from benchmarks.measure import Step, errors, quantiles, time_steps
from benchmarks.modes import MINIMUM_TRAFFIC, MODES, SMALL
from benchmarks.promises import gradient_promise, loss_promise
from benchmarks.suites import Choice, Task

README = """# Title
<!-- benchmark:cpu-summary begin -->
old
<!-- benchmark:cpu-summary end -->
text
<!-- benchmark:gpu-summary begin -->
<!-- benchmark:gpu-summary end -->
"""


def run_benchmarks(*argv: str) -> int:
    pytest.importorskip("tqdm")
    from benchmarks.__main__ import main

    return main([*argv, "--quick", "--check", "--device", "cpu"])


def write_run(path: Path, date: str, ms: float, rows: int = 512, dtype: str = "bfloat16") -> None:
    def row(divergence: str, contender: str, ratio: float) -> dict[str, Any]:
        return {
            "op": "distillation_loss",
            "divergence": divergence,
            "contender": contender,
            "mode": "forward_backward",
            "dtype": dtype,
            "rows": rows,
            "vocab": 32000,
            "ms_p50": ms * ratio,
            "ratio": ratio,
            "share": 0.5 / ratio,
            "peak_extra_bytes": 1_500_000,
            "gradient_bytes": 512_000,
            "grad_error": 0.0015,
            "status": "ok",
        }

    wrong = {**row("forward_kl", "compile", 1.0), "status": "WRONG"}
    del wrong["ms_p50"]
    run = {
        "date": date,
        "command": "python -m benchmarks",
        "commit": "0123456789abcdef",
        "machine": {
            "device": "cpu",
            "cpu": "Some CPU",
            "gpu": None,
            "threads": 2,
            "copy_bytes_per_second": 3.5e10,
        },
        "versions": {"torch": "2.10.0"},
        "results": [
            row("forward_kl", "kldiv_ext", 1.0),
            row("forward_kl", "eager", 12.0),
            wrong,
            row("jsd", "kldiv_ext", 1.0),
            row("jsd", "eager", 20.0),
        ],
    }
    path.write_text(json.dumps(run))


def test_readme_tables_come_from_the_newest_run(tmp_path: Path) -> None:
    write_run(tmp_path / "b.json", "2026-01-01T00:00:00+00:00", ms=99.0)
    write_run(tmp_path / "a.json", "2026-02-01T00:00:00+00:00", ms=2.5)
    text = report.render(README, tmp_path)
    cells = "| 512 x 32000 | bfloat16 | forward + backward | 2.5 ms | 50% | 30 ms (12x) | wrong |"
    assert cells in text
    assert "old" not in text and "99" not in text
    assert "The speed of the CUDA kernels has not been measured yet." in text
    assert report.render(text, tmp_path) == text
    assert "| 1.5 MB | 0.512 MB |" in report.generate("cpu-memory", tmp_path)
    assert "`jsd`" in report.generate("cpu-divergences", tmp_path)


def test_small_problems_have_a_table_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a.json", "2026-01-01T00:00:00+00:00", ms=2.5)
    write_run(tmp_path / "b.json", "2026-02-01T00:00:00+00:00", ms=0.05, rows=8, dtype="float32")
    assert "| 512 x 32000 | bfloat16 | forward + backward | 2.5 ms |" in report.generate("cpu-summary", tmp_path)
    small = report.generate("cpu-small", tmp_path)
    assert "| 8 x 32000 | float32 | forward + backward | 0.05 ms |" in small
    assert "512" not in small


def test_wrong_readme_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "a.json", "2026-02-01T00:00:00+00:00", ms=2.5)
    readme = tmp_path / "README.md"
    monkeypatch.setattr(report, "DOCUMENTS", (readme,))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    readme.write_text(README)
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "cpu-ratio.png",
        "cpu-share.png",
    }
    readme.write_text(readme.read_text().replace("12x", "13x"))
    assert report.main(["--check"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "<!-- benchmark:cpu-nothing begin -->\n<!-- benchmark:cpu-nothing end -->",
        "<!-- benchmark:cpu-summary begin -->\n",
    ],
)
def test_bad_markers_raise(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="benchmark"):
        report.render(text, tmp_path)


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_agree_with_the_committed_results(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert "<!-- benchmark:" in text
    assert report.render(text, report.RESULTS) == text, "run python -m benchmarks.report"


def test_quick_check_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run_benchmarks("--json", str(out)) == 0
    run = json.loads(out.read_text())
    assert {row["divergence"] for row in run["results"]} >= set(kldiv_ext.DIVERGENCES)
    assert {row["status"] for row in run["results"]} == {"ok"}


def test_wrong_results_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(input: torch.Tensor, *_args: Any, **_options: Any) -> torch.Tensor:
        return input.sum()

    monkeypatch.setattr(kldiv_ext, "kl_div", wrong)
    assert run_benchmarks("--op", "kl_div") == 1


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)


# ---------------------------------------------------------------- the suite for a GPU

Measured = tuple[str, str, tuple[int, int], str, str]


def measured(tasks: list[Task], contender: str) -> list[Measured]:
    """(op, variant, shape, dtype, mode) that the contender is measured on."""
    return [
        (
            task.problem.op,
            task.problem.divergence,
            (task.problem.rows, task.problem.vocab),
            str(task.problem.dtype),
            mode,
        )
        for task in tasks
        if contender in task.contenders
        for mode in task.modes
    ]


def test_gpu_suite_has_everything_that_is_asked_of_a_gpu() -> None:
    ours = measured(suites.tasks("gpu", Choice("cuda")), "kldiv_ext")
    assert len(ours) == len(set(ours))
    shapes = {(4096, 32000), (4096, 128256), (8192, 151936), (2048, 262144), (8, 32000), (256, 1024), (65536, 64)}
    dtypes = ("torch.bfloat16", "torch.float16", "torch.float32")
    modes = ("forward", "forward_backward", "forward_backward_teacher")
    expected = set(product(["distillation_loss"], kldiv_ext.DIVERGENCES, shapes, dtypes, modes))
    expected |= set(product(["distillation_loss"], ["forward_kl", "jsd"], shapes, dtypes, ["forward_backward_half"]))
    expected |= set(product(["kl_div"], contenders.LOG_TARGETS, shapes | {(8, 16)}, dtypes, modes[:2]))
    assert expected <= set(ours)


@pytest.mark.parametrize("contender", ["eager", "eager_float", "liger"])
def test_gpu_suite_has_rivals(contender: str) -> None:
    """Of forward_kl and jsd everywhere, and of every divergence on one shape."""
    found = set(measured(suites.tasks("gpu", Choice("cuda")), contender))
    dtypes = ("torch.bfloat16", "torch.float16", "torch.float32")
    shapes = (*suites.LARGE, *suites.SMALL)
    assert found >= set(product(["distillation_loss"], ["forward_kl", "jsd"], shapes, dtypes, suites.FEW_MODES))
    assert found >= set(
        product(["distillation_loss"], kldiv_ext.DIVERGENCES, suites.LARGE[:1], ["torch.bfloat16"], MODES)
    )


def test_gpu_suite_builds_slow_contenders_seldom() -> None:
    for contender in contenders.SLOW_TO_BUILD:
        found = measured(suites.tasks("gpu", Choice("cuda")), contender)
        problems = {row[:4] for row in found}
        assert 1 <= len(problems) <= 12
        assert {row[3] for row in found} == {"torch.bfloat16"}
        assert "forward_backward_teacher" not in {row[4] for row in found}


def test_a_choice_narrows_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    options = "--op kl_div --dtype float16 --shapes 8x16 --mode forward --contenders eager"
    assert main(["--suite", "gpu", "--device", "cuda", "--list", *options.split()]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"kl_div log_target={log_target} 8x16 float16: forward: kldiv_ext, eager" for log_target in (False, True)
    ]
    with pytest.raises(SystemExit, match="nothing is asked for"):
        main(["--suite", "gpu", "--device", "cpu", "--shapes", "3x3"])


def test_every_mode_has_its_traffic() -> None:
    assert set(MINIMUM_TRAFFIC) == set(product(suites.OPS, MODES))


@pytest.fixture
def quick_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """The gpu suite on tiny shapes of the CPU: exit status and report."""
    pytest.importorskip("tqdm")
    from benchmarks import __main__ as command

    monkeypatch.setattr(command, "copy_bandwidth", lambda _: 1e10)

    def run(*argv: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "out.json"
        chosen = ["--suite", "gpu", "--device", "cpu", "--quick", "--dtype", "bfloat16", "--seconds", "0.01"]
        status = command.main([*chosen, "--json", str(out), *argv])
        return status, json.loads(out.read_text())

    return run


def test_gpu_suite_runs(quick_gpu: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    status, run = quick_gpu("--divergence", "jsd", "--op", "distillation_loss")
    assert status == 0 and run["failures"] == []
    assert set(run["left_out"]) == {"liger", "speculators"}
    ours = {row["mode"]: row for row in run["results"] if row["contender"] == "kldiv_ext"}
    assert set(ours) == set(MODES)
    for mode, row in ours.items():
        assert row["status"] == "ok" and row["timer"] == "cpu" and row["rounds"] == 3 and row["share"] > 0
        assert ("teacher_grad_error" in row) == (mode == "forward_backward_teacher")
        assert row["gradient_bytes"] == 8 * 1000 * 2 * {"forward": 0, "forward_backward_teacher": 2}.get(mode, 1)
    assert {row["contender"] for row in run["results"]} == {"kldiv_ext", "eager", "eager_float"}


def test_what_a_limit_leaves_out_is_said(quick_gpu: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    status, run = quick_gpu("--op", "kl_div", "--limit", "1e-9")
    assert status == 0 and run["results"] == []
    assert run["left_out"]["problems"]["those"] == [
        f"kl_div log_target={log_target} 8x1000 bfloat16 forward,forward_backward" for log_target in (False, True)
    ]


def test_slow_contenders_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """From half of the time on."""
    pytest.importorskip("tqdm")
    from benchmarks import __main__ as command

    ran = []
    monkeypatch.setattr(command, "measure", lambda task, *_: ran.append(task.contenders) or [])
    monkeypatch.setattr(command.time, "perf_counter", iter(range(0, 1000, 10)).__next__)
    task = Task(Problem("kl_div", "log_target=True", 8, 16, torch.float32, "cpu"), ("forward",), ("eager", "compile"))
    report: dict[str, Any] = {"results": [], "failures": [], "left_out": {}}
    args = command.parse_args(["--device", "cpu", "--limit", "45"])
    command.run([task] * 3, args, 1.0, report)
    assert ran == [("eager", "compile"), ("eager",)]
    assert report["left_out"]["time"] == ["kl_div log_target=True 8x16 float32: compile"]
    assert len(report["left_out"]["problems"]["those"]) == 1


def test_a_problem_that_fails_does_not_stop_the_others(
    quick_gpu: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import __main__ as command

    right = command.make_inputs

    def make_inputs(problem: Problem) -> Any:
        if problem.log_target:
            raise MemoryError("too large")
        return right(problem)

    monkeypatch.setattr(command, "make_inputs", make_inputs)
    status, run = quick_gpu("--op", "kl_div")
    assert status == 1
    assert run["failures"] == ["kl_div log_target=True 8x1000 bfloat16: MemoryError: too large"]
    assert {row["divergence"] for row in run["results"]} == {"log_target=False"}


def test_steps_of_half_the_loss_and_of_both_sides() -> None:
    student, teacher = torch.ones(4, requires_grad=True), torch.full((4,), 3.0)
    step = Step(lambda s, t: (s * t).sum(), student, teacher, backward=True, factor=0.5)
    assert step() == 12
    assert student.grad is not None and student.grad.tolist() == [1.5] * 4
    expected = Expected(12.0, torch.full((4,), 3.0), torch.full((4,), 1.0))
    assert errors(step, expected)[:3] == (0, 0, None)
    teacher.requires_grad_()
    assert errors(step, expected)[:3] == (0, 0, 0)
    assert errors(step, expected._replace(teacher_gradient=torch.full((4,), 2.0)))[2] == 0.5
    with pytest.raises(RuntimeError, match="a gradient is missing"):
        errors(Step(lambda s, t: (s * t.detach()).sum(), student, teacher, backward=True), expected)


def test_small_problems_are_timed_as_a_user_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.timer_name("cpu", 1) == "cpu"
    assert (measure.timer_name("cuda", SMALL - 1), measure.timer_name("cuda", SMALL)) == ("calls", "events")
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(calls)))
    calls: list[None] = []
    student = torch.zeros(())

    def loss(s: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return s

    step = Step(loss, student, torch.zeros(()), backward=False)
    assert len(time_steps({"a": step}, "cuda", repeats=3, seconds=0, how="calls")["a"]) == 3
    calls_in_a_row = measure.SMALL_CALLS
    assert waits == [calls_in_a_row * i for i in (0, 1, 1, 2, 2, 3, 3, 4)]


def test_absent_contenders_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what their import says, whatever it raises."""

    def broken(name: str, *_: Any) -> None:
        raise OSError(f"{name} is broken")

    monkeypatch.setattr(contenders.importlib, "import_module", broken)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    assert contenders.missing("cuda") == {
        "liger": "its import fails: OSError: liger_kernel.transformers is broken",
        "speculators": "its import fails: ModuleNotFoundError: speculators is not installed",
    }
    problem = Problem("distillation_loss", "jsd", 8, 16, torch.float32, "cuda")
    assert contenders.CONTENDERS["liger"](problem) is contenders.CONTENDERS["speculators"](problem) is None


@pytest.fixture
def fake_speculators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package whose own imports fail, around losses that work."""
    losses = tmp_path / "speculators" / "losses"
    losses.mkdir(parents=True)
    (tmp_path / "speculators" / "utils").mkdir()
    for package in ("", "utils"):
        (tmp_path / "speculators" / package / "__init__.py").write_text("import not_there_either")
    (tmp_path / "speculators" / "utils" / "util.py").write_text("")
    (losses / "__init__.py").write_text("")
    (losses / "fused.py").write_text(
        "import speculators.utils.util\ndef fused_js_div_loss(s, t):\n    return (s - t).abs().sum(-1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    contenders._speculators_losses.cache_clear()
    yield
    contenders._speculators_losses.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "speculators"]:
        del sys.modules[name]


def test_losses_of_speculators_are_loaded_alone(fake_speculators: None) -> None:
    assert contenders.speculators_missing("cuda") is None
    problem = Problem("distillation_loss", "jsd", 2, 3, torch.float32, "cuda")
    loss = contenders.CONTENDERS["speculators"](problem)
    assert loss is not None
    assert loss(torch.ones(2, 3), torch.full((2, 3), 5.0)) == 6  # of logits over a temperature of 2, a mean over rows


def gpu_run() -> dict[str, Any]:
    """Made up: kldiv_ext and a rival that gives the teacher no gradient and runs out of memory in fp32."""
    results = []
    for dtype, (rows, vocab), divergence, mode in product(
        ("bfloat16", "float32"), ((4096, 128256), (8, 32000)), ("forward_kl", "jsd"), MODES
    ):
        for contender, ratio in (("kldiv_ext", 1.0), ("liger", 7.0)):
            if contender == "liger" and mode == "forward_backward_teacher":
                continue
            row = {
                "op": "distillation_loss",
                "divergence": divergence,
                "contender": contender,
                "mode": mode,
                "dtype": dtype,
                "rows": rows,
                "vocab": vocab,
                "gradient_bytes": 1_000_000,
                "status": "ok",
                "ms_p50": ratio * (1 + MODES.index(mode)),
                "ratio": ratio,
                "share": {"forward_kl": 0.93, "jsd": 0.81}[divergence] / ratio,
                "peak_extra_bytes": 2_000_000,
            }
            if contender == "liger" and dtype == "float32":
                row = {**row, "status": "failed: OutOfMemoryError"}
                del row["ms_p50"]
            results.append(row)
    return {
        "date": "2026-11-21T00:00:00+00:00",
        "command": "python -m benchmarks --suite gpu",
        "commit": None,
        "machine": {
            "device": "cuda",
            "cpu": "Some CPU",
            "gpu": "Some GPU",
            "threads": 2,
            "copy_bytes_per_second": 4e12,
        },
        "versions": {"torch": "2.11.0"},
        "results": results,
    }


def test_tables_of_a_gpu(tmp_path: Path) -> None:
    assert report.generate("gpu-all", tmp_path) == "The speed of the CUDA kernels has not been measured yet."
    (tmp_path / "some-gpu.json").write_text(json.dumps(gpu_run()))
    shares = report.generate("gpu-shares-bfloat16", tmp_path)
    assert "| variant | mode | 4096 x 128256 |\n" in shares  # the small shape is no matter of bandwidth
    assert "| `jsd` | forward + backward to both | 81% |" in shares
    assert "Some GPU; copy bandwidth 4,000 GB/s" in shares
    modes = report.generate("gpu-modes", tmp_path)
    line = "| `forward_kl` | 4096 x 128256 | bfloat16 | forward + backward of half the loss | 3 ms | 93% | 21 ms (7x) |"
    assert line in modes
    assert "| forward + backward to both | 4 ms | 93% | - |" in modes and "float32" not in modes
    summary = report.generate("gpu-summary", tmp_path)
    assert "half" not in summary and "both" not in summary
    assert "| 4096 x 128256 | float32 | forward | 1 ms | 93% | failed |" in summary
    assert "| `forward_kl` | 8 x 32000 | forward | 1 ms | 7 ms (7x) |" in report.generate(
        "gpu-small-bfloat16", tmp_path
    )
    everything = report.generate("gpu-all", tmp_path)
    assert "![gpu-share](benchmarks/results/plots/gpu-share.png)" in everything and "gpu-accuracy" not in everything
    assert shares in everything and modes in everything


def test_plots_of_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "some-gpu.json").write_text(json.dumps(gpu_run()))
    assert [path.name for path in report.plot(tmp_path)] == ["gpu-ratio.png", "gpu-share.png"]


# ---------------------------------------------------------------- the script for a GPU

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
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
  "-m benchmarks.linear"*) echo linear ;;
  "-m benchmarks.accuracy"*) echo "not accurate"; exit 1 ;;
  "-m benchmarks "*) echo "{}" >"${@: -1}"; sleep "${SLEEP-0}" ;;
esac""",
}


@pytest.fixture
def gpu_script(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """The script over programs that do nothing: exit status, output, and the calls of Python."""
    if not SCRIPT.exists():
        pytest.skip("needs the source tree")
    for name, text in STUBS.items():
        (tmp_path / name).write_text("#!/usr/bin/env bash\n" + text + "\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "CALLS": str(tmp_path / "calls")}
        (tmp_path / "calls").write_text("")
        inherited = {name: value for name, value in os.environ.items() if name not in {"OUT", "DEVICE", "QUICK"}}
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=inherited | known | environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr, (tmp_path / "calls").read_text()

    return run


def test_script_runs_every_stage(gpu_script: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, output, calls = gpu_script(str(out))
    assert status == 1, output
    stages = [line.split()[0] for line in output.splitlines() if line.endswith(("  ok", "  failed (status 1)"))]
    assert stages[:6] == ["build", "tests", "sanitize", "benchmark", "linear", "accuracy"]
    assert "accuracy: failed (status 1); the end of its log:\nnot accurate" in output
    names = {path.name for path in out.iterdir()}
    (result,) = names - {"summary.txt", "logs.tar.gz"}
    assert result.startswith("nvidia-h200-20") and result.endswith(".json")
    assert "-m benchmarks --suite gpu --device cuda" in calls
    with tarfile.open(out / "logs.tar.gz") as logs:
        build = logs.extractfile("logs/build.log")
        assert build is not None and build.read() == b"for 9.0, 1\n"
        assert {"logs/sanitize-memcheck.log", "logs/tests.log", "logs/nvidia-smi.log"} <= set(logs.getnames())


def test_script_runs_the_stages_that_are_named(gpu_script: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """And keeps what an earlier call left in the folder."""
    out = tmp_path / "out"
    assert gpu_script("build", OUT=str(out))[0] == 0
    status, _, calls = gpu_script(str(out), "tests")
    assert status == 0 and "setup.py" not in calls and "-m pytest" in calls
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {"logs/build.log", "logs/tests.log"} <= set(logs.getnames())
    assert [line.split()[0] for line in (out / "summary.txt").read_text().splitlines()][1::2] == ["build", "tests"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["OUT", "fly"], ["build"]], ids=str)
def test_script_wants_a_folder_and_known_stages(
    gpu_script: Callable[..., tuple[int, str, str]], arguments: list[str], tmp_path: Path
) -> None:
    folder = [str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments]
    status, output, calls = gpu_script(*folder)
    assert status == 2 and "benchmarks/gpu.sh [OUT]" in output and calls == ""


def test_script_does_not_take_skipped_tests_for_passed(
    gpu_script: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    assert gpu_script(str(tmp_path / "out"), "tests", TESTS="3 skipped")[0] == 1


def test_script_stops_a_stage_in_time(gpu_script: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, output, _ = gpu_script(str(out), "benchmark", "build", BENCHMARK_SECONDS="1", SLEEP="60")
    assert status == 1 and "benchmark: stopped after 1 s" in output
    assert (out / "summary.txt").read_text().splitlines()[2].endswith("  ok")  # and goes on
    assert len(list(out.glob("nvidia-h200-*.json"))) == 1  # what it had written is kept


# ---------------------------------------------------------------- accuracy

Loss = Callable[..., torch.Tensor]


@pytest.fixture
def accuracy() -> Any:
    pytest.importorskip("tqdm")
    from benchmarks import accuracy

    return accuracy


def test_quick_accuracy_runs(accuracy: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert accuracy.main(["--quick", "--device", "cpu", "--json", str(out)]) == 0
    run = json.loads(out.read_text())
    ours = [record for record in run["accuracy"] if record["contender"] == "kldiv_ext"]
    assert {record["status"] for record in ours} == {"ok"}
    assert {record["divergence"] for record in ours} == set(kldiv_ext.DIVERGENCES)
    assert {record["dtype"] for record in ours} == set(accuracy.DTYPES)
    assert "liger" in run["left_out"]
    for kind in ("gradient", "loss", "total_variation", "promises"):
        assert "kldiv_ext" in report.generate(f"cpu-accuracy-{kind}", tmp_path)


def test_inaccurate_results_fail_the_run(
    accuracy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = kldiv_ext.distillation_loss
    monkeypatch.setattr(kldiv_ext, "distillation_loss", lambda *args, **options: right(*args, **options) * 1.001)
    monkeypatch.setattr(accuracy, "DTYPES", {"float32": torch.float32})
    assert accuracy.main(["--quick", "--device", "cpu"]) == 1
    assert (
        "reverse_kl, float32, V = 1000, KL = 1.0e-03: loss 1.0e-03 off by 1.0e-06 (1.0e-03)" in capsys.readouterr().err
    )


def steeper(loss: torch.Tensor) -> torch.Tensor:
    """The same loss with a gradient 1% too large."""
    return loss + 0.01 * (loss - loss.detach())


def no_kernel(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel")


@pytest.mark.parametrize(
    ("level", "change", "status"),
    [
        pytest.param(1.0, lambda loss: loss, "ok", id="right"),
        pytest.param(1.0, lambda loss: loss + 2e-5, "missed: loss", id="loss"),
        pytest.param(1e-5, lambda loss: loss + 1e-8, "missed: loss", id="loss-near-0"),
        pytest.param(1e-8, lambda loss: loss + 2e-9, "missed: loss", id="loss-at-0"),
        pytest.param(1e-9, lambda loss: loss - 5e-10, "missed: loss", id="negative"),
        pytest.param(1e-2, steeper, "missed: gradient", id="gradient"),
        pytest.param(1e-2, lambda loss: loss * torch.nan, "missed: loss, gradient", id="nan"),
        pytest.param(1e-2, no_kernel, "failed: RuntimeError: no kernel", id="raises"),
    ],
)
def test_every_promise_is_checked(
    accuracy: Any, monkeypatch: pytest.MonkeyPatch, level: float, change: Loss, status: str
) -> None:
    right = kldiv_ext.distillation_loss
    monkeypatch.setattr(kldiv_ext, "distillation_loss", lambda *args, **options: change(right(*args, **options)))
    problem = Problem("distillation_loss", "jsd", accuracy.ROWS, 1000, torch.float32, "cpu")
    pairs = {level: accuracy.make_pair(level, 1000, torch.float32, "cpu")}
    records = list(accuracy.measure(problem, pairs, ["kldiv_ext", "eager"]))
    assert [record["contender"] for record in records] == ["kldiv_ext", "eager"]
    assert records[0]["status"] == status


def test_promises() -> None:
    assert loss_promise("jsd", 2.0) == 2e-5
    assert loss_promise("jsd", 1e-5) == 1e-8
    assert loss_promise("jsd", 1e-7) == 1e-9
    assert loss_promise("total_variation", 0.5) == 5e-6 and loss_promise("total_variation", 5e-3) == 5e-6
    assert gradient_promise("jsd", "float32") == gradient_promise("total_variation", "bfloat16") == 4e-3
    assert gradient_promise("total_variation", "float32") == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_pairs_have_the_divergence_asked_for(accuracy: Any, dtype: torch.dtype) -> None:
    for level in accuracy.LEVELS:
        student, teacher, kl = accuracy.make_pair(level, 8000, dtype, "cpu")
        assert student.dtype == teacher.dtype == dtype and level <= kl <= 1.05 * level
        exact = kldiv_ext.reference.distillation_loss(student, teacher, temperature=accuracy.TEMPERATURE)
        assert exact.item() == pytest.approx(kl)


def test_scale_of_float16_gradients(accuracy: Any) -> None:
    """As large as the gradient allows; where something else overflows, half of a GradScaler's first and less."""
    student = torch.zeros(4, dtype=torch.float16, requires_grad=True)

    def scale(loss: Loss) -> float:
        step = Step(loss, student, student.detach(), backward=True)
        gradient = accuracy.run(step, largest=1e-6)[1]
        assert gradient[0].item() == pytest.approx(1e-6, rel=1e-3)
        return step.scale

    assert scale(lambda s, _: s[0].float() * 1e-6) == 2.0**34
    assert scale(lambda s, _: (s[0] * 1e-6).float()) == 2.0**15


def accuracy_run(date: str) -> dict[str, Any]:
    """Of two divergences beside total variation, of which compile has one."""

    def record(
        divergence: str, contender: str, level: float, error: float | None, status: str = "ok"
    ) -> dict[str, Any]:
        return {
            "divergence": divergence,
            "dtype": "bfloat16",
            "vocab": 32000,
            "level": level,
            "kl": level,
            "loss": level,
            "contender": contender,
            "loss_error": error,
            "loss_error_absolute": error and error * level,
            "gradient_error": error,
            "status": status,
        }

    return {
        "date": date,
        "command": "python -m benchmarks.accuracy",
        "commit": "0123456789abcdef",
        "machine": {"device": "cpu", "cpu": "Some CPU", "gpu": None},
        "versions": {"torch": "2.10.0"},
        "rows": 4,
        "left_out": {"liger": "not here"},
        "accuracy": [
            record("forward_kl", "kldiv_ext", 1.0, 0.0021),
            record("forward_kl", "eager", 1.0, 0.31),
            record("forward_kl", "compile", 1.0, 0.25),
            record("jsd", "kldiv_ext", 1.0, 0.0018),
            record("jsd", "eager", 1.0, 1234.0),
            record("forward_kl", "kldiv_ext", 1e-8, 0.0123, "missed: gradient"),
            record("forward_kl", "eager", 1e-8, None, "not finite"),
            record("forward_kl", "compile", 1e-8, None, "failed: RuntimeError: no compiler"),
            record("jsd", "kldiv_ext", 1e-8, 0.002),
            record("jsd", "eager", 1e-8, 3.0),
            record("total_variation", "kldiv_ext", 1.0, 0.9),
        ],
    }


def test_accuracy_tables(tmp_path: Path) -> None:
    write_run(tmp_path / "times.json", "2026-03-01T00:00:00+00:00", ms=2.5)
    (tmp_path / "a.json").write_text(json.dumps(accuracy_run("2026-02-01T00:00:00+00:00")))
    gradient = report.generate("cpu-accuracy-gradient", tmp_path)
    assert "| dtype | contender | 1 | 1e-8 |" in gradient
    assert "| bfloat16 | kldiv_ext | 2.1e-3 | **0.012** |" in gradient
    assert "| bfloat16 | eager | 1.2e3 | 3 (1 not finite) |" in gradient
    assert "| bfloat16 | compile | 0.25 | none finite |" in gradient
    assert "the worst of 2 divergences (compile: forward_kl)" in gradient
    assert "Without liger: not here." in gradient
    assert "| bfloat16 | kldiv_ext | 2.1e-3 | 0.012 |" in report.generate("cpu-accuracy-loss", tmp_path)
    assert "| bfloat16 | kldiv_ext | 0.9 / 0.9 |" in report.generate("cpu-accuracy-total_variation", tmp_path)
    promises = report.generate("cpu-accuracy-promises", tmp_path)
    assert "Of 5 results of kldiv_ext, 4 keep every promise." in promises
    assert "- forward_kl, bfloat16, V = 32000, KL = 1.0e-08:" in promises
    assert "The accuracy of the CUDA kernels has not been" in report.generate("gpu-accuracy-loss", tmp_path)
    assert "| 2.5 ms |" in report.generate("cpu-summary", tmp_path)


def test_accuracy_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.json").write_text(json.dumps(accuracy_run("2026-02-01T00:00:00+00:00")))
    assert [path.name for path in report.plot(tmp_path)] == ["cpu-accuracy.png"]
