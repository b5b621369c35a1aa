"""The benchmark commands, and the report that makes the documents' tables and plots."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="the commands show their progress with tqdm")
pytest.importorskip("matplotlib", reason="the report draws with matplotlib")

import kldiv_ext
from benchmarks import __main__ as command
from benchmarks import contenders, linear, measure, report, suites
from benchmarks.contenders import Problem
from benchmarks.measure import SMALL, Expected, Step, quantiles, time_steps, verify
from benchmarks.results import Record, Report, dumps, loads, save
from benchmarks.suites import FEW_LOGITS, FEW_MODES, LARGE, MINIMUM_TRAFFIC, MODES, Task

DTYPES = ("bfloat16", "float16", "float32")
README = """# Title
<!-- benchmark:cpu-summary begin -->
old
<!-- benchmark:cpu-summary end -->
text
<!-- benchmark:gpu-summary begin -->
<!-- benchmark:gpu-summary end -->
"""


def result(contender: str, ratio: float = 1.0, ms: float = 2.5, **changes: Any) -> Record:
    """Made up, of 512 x 32000 bfloat16 logits unless changed."""
    problem = {"op": "distillation_loss", "divergence": "forward_kl", "dtype": "bfloat16", "rows": 512, "vocab": 32000}
    found = {"ms_p50": ms * ratio, "ratio": ratio, "share": 0.93 / ratio, "peak_extra_bytes": 1_500_000, "status": "ok"}
    names = {"contender": contender, "mode": "forward_backward", "gradient_bytes": 512_000}
    return {**problem, **names, **found, **changes}


def write(path: Path, device: str = "cpu", date: str = "2026-01-01", **lists: list[Record]) -> None:
    machine = {"device": device, "cpu": "Some CPU", "gpu": "Some GPU" if device == "cuda" else None, "threads": 2}
    machine["copy_bytes_per_second"] = 4e12
    head = {"date": date, "command": "python -m benchmarks", "commit": "0123456789abcdef", "machine": machine}
    save({**head, "versions": {"torch": "2.10.0"}, "rows": 4, "left_out": {"liger": "not here"}, **lists}, path)


def test_result_files_are_compact() -> None:
    """A row per line, five digits; what is not finite or absent is not there."""
    records = [{"a": 1 / 3, "b": [2e-9 / 3, math.nan]}, {"a": math.inf, "c": "x, y"}]
    text = dumps({"date": "today", "none": [], "results": records})
    assert '"rows": [\n  [0.33333,[6.6667e-10,null],null],\n  [null,null,"x, y"]\n ]}' in text
    expected = [{"a": 0.33333, "b": [6.6667e-10, None]}, {"c": "x, y"}]
    assert loads(text) == {"date": "today", "none": [], "results": expected}


def cpu_results(ms: float = 2.5) -> list[Record]:
    wrong = {key: x for key, x in result("compile", status="WRONG").items() if key != "ms_p50"}
    main = [result("kldiv_ext", ms=ms), result("eager", 12.0, ms), wrong]
    return [*main, result("kldiv_ext", divergence="jsd"), result("eager", 9.0, divergence="jsd")]


def test_tables_come_from_the_newest_run(tmp_path: Path) -> None:
    write(tmp_path / "b.json", results=cpu_results(ms=99.0))
    write(tmp_path / "a.json", date="2026-02-01", results=cpu_results())
    text = report.render(README, tmp_path)
    assert "| rows × vocabulary | dtype | kldiv_ext | PyTorch | `torch.compile` |" in text
    assert "| 512 × 32000 | bfloat16 | 2.5 ms, 1.5 MB | 30 ms (12x), 1.5 MB | wrong |" in text
    assert "Some CPU, 2 threads; torch 2.10.0; 2026-02-01, commit 0123456789ab; `python -m benchmarks`." in text
    assert "Without liger: not here." in text and "old" not in text and "99" not in text
    assert "The speed of the CUDA kernels has not been measured yet." in text
    assert report.render(text, tmp_path) == text
    assert "| 512 × 32000 | bfloat16 | 0.512 MB | 1.5 MB | 1.5 MB |" in report.generate("cpu-memory", tmp_path)
    assert "| `jsd` | 512 × 32000 | bfloat16 | forward + backward | 2.5 ms | 22.5 ms (9x) |" in report.generate(
        "cpu-divergences", tmp_path
    )
    # Another kind of run does not hide it.
    write(tmp_path / "c.json", date="2026-03-01", accuracy=[{"divergence": "jsd", "level": [1.0]}])
    assert report.render(README, tmp_path) == text


def test_small_problems_have_a_table_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a.json", results=[result("kldiv_ext"), result("kldiv_ext", ms=0.05, rows=8, dtype="float32")])
    assert "8 ×" not in report.generate("cpu-summary", tmp_path)
    small = report.generate("cpu-small", tmp_path)
    assert "| 8 × 32000 | float32 | forward + backward | 0.05 ms |" in small and "512" not in small


def test_an_outdated_document_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.json", results=cpu_results())
    readme = tmp_path / "README.md"
    monkeypatch.setattr(report, "DOCUMENTS", (readme,))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    readme.write_text(README)
    assert report.main(["--check"]) == 1 and readme.read_text() == README
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["cpu.png"]
    readme.write_text(readme.read_text().replace("12x", "13x"))
    assert report.main(["--check"]) == 1


@pytest.mark.parametrize("name", ["cpu-nothing", "fpga-summary"])
def test_bad_markers_raise(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no benchmark table is called"):
        report.render(f"<!-- benchmark:{name} begin -->\n<!-- benchmark:{name} end -->", tmp_path)
    with pytest.raises(ValueError, match="a benchmark marker without its partner"):
        report.render("<!-- benchmark:cpu-summary begin -->\n", tmp_path)


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_agree_with_the_committed_results(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert "<!-- benchmark:" in text
    assert report.render(text, report.RESULTS) == text, "run python -m benchmarks.report"


def run_quick(main: Callable[[list[str]], int], path: Path, *argv: str) -> tuple[int, Report]:
    status = main([*argv, "--quick", "--device", "cpu", "--json", str(path / "out.json")])
    return status, loads((path / "out.json").read_text())


def test_quick_check_runs(tmp_path: Path) -> None:
    status, run = run_quick(command.main, tmp_path, "--check")
    assert status == 0 and {row["status"] for row in run["results"]} == {"ok"}
    assert {row["divergence"] for row in run["results"]} == {*kldiv_ext.DIVERGENCES, *contenders.LOG_TARGETS}


def test_wrong_results_fail_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kldiv_ext, "kl_div", lambda input, *_args, **_options: input.sum())
    assert run_quick(command.main, tmp_path, "--check", "--op", "kl_div")[0] == 1


def test_quick_linear_runs(tmp_path: Path) -> None:
    status, run = run_quick(linear.main, tmp_path)
    ours = [row for row in run["linear"] if row["contender"] == "kldiv_ext"]
    assert status == 0 and [row["dtype"] for row in ours] == ["bfloat16", "float32"]
    assert all(row["loss_error"] < 0.1 and row["weight_error"] < 0.1 and row["ms_p50"] > 0 for row in ours)
    assert [row["rows"] for row in run["positions"] if row["contender"] == "kldiv_ext"] == list(linear.QUICK_POSITIONS)
    assert {row["contender"] for row in run["linear"]} >= {"products", "eager", "eager_float"}
    assert all(0 < row["kl"] < 1e-3 for row in run["close"])


def test_quantiles() -> None:
    assert list(quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]).values()) == [2.0, 3.5, 5.0]
    assert list(quantiles([7.0]).values()) == [7.0, 7.0, 7.0]


# ---------------------------------------------------------------- the suite for a GPU


def measured(contender: str) -> list[tuple[str, str, tuple[int, int], str, str]]:
    """(op, variant, shape, dtype, mode) that the gpu suite measures the contender on."""
    return [
        (task.problem.op, task.problem.divergence, (task.problem.rows, task.problem.vocab), dtype, mode)
        for task in suites.tasks(command.parse_args(["--suite", "gpu", "--device", "cuda"]))
        for dtype, mode in product([str(task.problem.dtype).removeprefix("torch.")], task.modes)
        if contender in task.contenders
    ]


def test_gpu_suite_has_everything_that_is_asked_of_a_gpu() -> None:
    ours = measured("kldiv_ext")
    assert len(ours) == len(set(ours))
    shapes = {(4096, 32000), (4096, 128256), (8192, 151936), (2048, 262144), (8, 32000), (256, 1024), (65536, 64)}
    modes = ("forward", "forward_backward", "forward_backward_teacher")
    expected = set(product(["distillation_loss"], kldiv_ext.DIVERGENCES, shapes, DTYPES, modes))
    expected |= set(product(["distillation_loss"], ["forward_kl", "jsd"], shapes, DTYPES, ["forward_backward_half"]))
    expected |= set(product(["kl_div"], contenders.LOG_TARGETS, shapes | {(8, 16)}, DTYPES, modes[:2]))
    assert expected <= set(ours)


@pytest.mark.parametrize("contender", ["eager", "eager_float", "liger"])
def test_gpu_suite_has_rivals(contender: str) -> None:
    """For forward_kl and jsd everywhere, and for every divergence on one shape."""
    found = set(measured(contender))
    assert found >= set(
        product(["distillation_loss"], ["forward_kl", "jsd"], LARGE + FEW_LOGITS, DTYPES, FEW_MODES),
    )
    assert found >= set(product(["distillation_loss"], kldiv_ext.DIVERGENCES, LARGE[:1], ["bfloat16"], MODES))


@pytest.mark.parametrize("contender", contenders.SLOW_TO_BUILD)
def test_gpu_suite_builds_slow_contenders_seldom(contender: str) -> None:
    found = measured(contender)
    assert 1 <= len({row[:4] for row in found}) <= 12
    assert {row[3] for row in found} == {"bfloat16"}
    assert "forward_backward_teacher" not in {row[4] for row in found}


def test_options_narrow_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--op kl_div --dtype float16 --shapes 8x16 --mode forward --contenders eager"
    assert command.main(["--suite", "gpu", "--device", "cuda", "--list", *options.split()]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"kl_div log_target={log_target} 8x16 float16: forward: kldiv_ext, eager" for log_target in (False, True)
    ]
    with pytest.raises(SystemExit, match="no problem of the suite fits"):
        command.main(["--suite", "gpu", "--device", "cpu", "--shapes", "3x3"])


def test_every_mode_has_its_traffic() -> None:
    assert set(MINIMUM_TRAFFIC) == set(product(suites.OPS, MODES))
    assert MINIMUM_TRAFFIC["kl_div", "forward_backward"] == 4


QuickGpu = Callable[..., tuple[int, Report]]


@pytest.fixture
def quick_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> QuickGpu:
    """The gpu suite on tiny shapes on the CPU."""
    monkeypatch.setattr(command, "copy_bandwidth", lambda _: 1e10)
    fast = ["--suite", "gpu", "--dtype", "bfloat16", "--seconds", "0.01"]
    return lambda *argv: run_quick(command.main, tmp_path, *fast, *argv)


def test_gpu_suite_runs(quick_gpu: QuickGpu) -> None:
    status, run = quick_gpu("--divergence", "jsd", "--op", "distillation_loss")
    assert status == 0 and run["failures"] == []
    assert run["left_out"] == {"liger": "its Triton kernels run only on a GPU"}
    ours = {row["mode"]: row for row in run["results"] if row["contender"] == "kldiv_ext"}
    assert set(ours) == set(MODES)
    for mode, row in ours.items():
        assert row["status"] == "ok" and row["timer"] == "cpu" and row["rounds"] == 3 and row["share"] > 0
        assert ("teacher_grad_error" in row) == (mode == "forward_backward_teacher")
        assert row["gradient_bytes"] == 8 * 1000 * 2 * {"forward": 0, "forward_backward_teacher": 2}.get(mode, 1)
    assert {row["contender"] for row in run["results"]} == {"kldiv_ext", "eager", "eager_float"}


def test_what_a_limit_leaves_out_is_said(quick_gpu: QuickGpu) -> None:
    status, run = quick_gpu("--op", "kl_div", "--limit", "1e-9")
    assert status == 0 and run["results"] == []
    assert run["left_out"]["problems"]["those"] == [
        f"kl_div log_target={log_target} 8x1000 bfloat16 forward,forward_backward" for log_target in (False, True)
    ]


def test_slow_contenders_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """After half of the time."""
    ran = []
    monkeypatch.setattr(command, "measure", lambda task, *_: ran.append(task.contenders) or [])
    monkeypatch.setattr(command.time, "perf_counter", iter(range(0, 1000, 10)).__next__)
    task = Task(Problem("kl_div", "log_target=True", 8, 16, torch.float32, "cpu"), ("forward",), ("eager", "compile"))
    run: Report = {"results": [], "failures": [], "left_out": {}}
    command.run([task] * 3, command.parse_args(["--device", "cpu", "--limit", "45"]), 1.0, run)
    assert ran == [("eager", "compile"), ("eager",)]
    assert run["left_out"]["time"] == ["kl_div log_target=True 8x16 float32: compile"]
    assert len(run["left_out"]["problems"]["those"]) == 1


def test_a_problem_that_fails_does_not_stop_the_others(quick_gpu: QuickGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders.make_inputs

    def make_inputs(problem: Problem) -> Any:
        if problem.divergence == "log_target=True":
            raise MemoryError("too large")
        return right(problem)

    monkeypatch.setattr(contenders, "make_inputs", make_inputs)
    status, run = quick_gpu("--op", "kl_div")
    assert status == 1
    assert run["failures"] == ["kl_div log_target=True 8x1000 bfloat16: failed: MemoryError: too large"]
    assert {row["divergence"] for row in run["results"]} == {"log_target=False"}


def test_steps_of_half_the_loss_and_of_both_sides() -> None:
    student, teacher = torch.ones(4, requires_grad=True), torch.full((4,), 3.0)
    names = ("student", "teacher")
    step = Step(lambda s, t: (s * t).sum(), student, teacher, backward=True, factor=0.5)
    assert step() == 12
    assert student.grad is not None and student.grad.tolist() == [1.5] * 4
    expected = Expected(12.0, (torch.full((4,), 3.0), torch.full((4,), 2.0)))
    right = {"gradient_bytes": 16, "loss_error": 0, "student": 0, "status": "ok"}
    assert verify(step, expected, names) == right and student.grad is None
    assert verify(step, expected._replace(loss=10.0), names, offset=2.0) == right
    teacher.requires_grad_()
    assert verify(step, expected, names) == {**right, "gradient_bytes": 32, "teacher": 0.5}
    assert verify(step, expected, names, promised=True)["status"] == "WRONG"
    missing = Step(lambda s, t: (s * t.detach()).sum(), student, teacher, backward=True)
    assert verify(missing, expected, names)["status"] == "failed: RuntimeError: a gradient is missing"


def test_small_problems_are_timed_as_a_user_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.timer_name("cpu", 1) == "cpu"
    assert (measure.timer_name("cuda", SMALL - 1), measure.timer_name("cuda", SMALL)) == ("calls", "events")
    waits: list[int] = []
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(calls)))
    step = Step(lambda: calls.append(None), backward=False)  # type: ignore[arg-type, func-returns-value]
    assert len(time_steps({"a": step}, "calls", repeats=3, seconds=0)["a"]) == 3
    assert waits == [measure.SMALL_CALLS * i for i in (0, 1, 1, 2, 2, 3, 3, 4)]


def test_absent_contenders_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what their import says, whatever it raises."""

    def broken(name: str) -> None:
        raise OSError(f"{name} is broken")

    monkeypatch.setattr(contenders.importlib, "import_module", broken)
    reason = "its import failed: OSError: liger_kernel.transformers is broken"
    assert contenders.missing("cuda") == {"liger": reason}
    assert contenders.CONTENDERS["liger"](Problem("distillation_loss", "jsd", 8, 16, torch.float32, "cuda")) is None


def gpu_results() -> list[Record]:
    """Made up: a rival that gives the teacher no gradient and runs out of memory in fp32."""
    results = []
    for dtype, (rows, vocab), name, mode in product(
        ("bfloat16", "float32"), ((4096, 128256), (8, 32000)), ("forward_kl", "jsd"), MODES
    ):
        changes = {"dtype": dtype, "rows": rows, "vocab": vocab, "divergence": name, "mode": mode}
        results.append(result("kldiv_ext", ms=1.0 + MODES.index(mode), **changes))
        rival = result("liger", 7.0, 1.0 + MODES.index(mode), **changes)
        if dtype == "float32":
            rival = {key: x for key, x in rival.items() if key not in ("ms_p50", "ratio")}
            rival["status"] = "failed: OutOfMemoryError"
        results += [] if mode == "forward_backward_teacher" else [rival]
    return results


def test_tables_and_plots_of_a_gpu(tmp_path: Path) -> None:
    assert report.generate("gpu-all", tmp_path) == "The speed of the CUDA kernels has not been measured yet."
    write(tmp_path / "some-gpu.json", device="cuda", results=gpu_results())
    shares = report.generate("gpu-shares", tmp_path)
    assert "| dtype | variant | mode | 4096 × 128256 |\n" in shares  # bandwidth does not limit the small shape
    assert "| bfloat16 | `jsd` | forward + backward + teacher | 93% |" in shares
    assert "4e+12 bytes/s" in shares and "Some GPU; torch" in shares
    modes = report.generate("gpu-modes", tmp_path)
    assert "| 4096 × 128256 | bfloat16 | forward + backward + half | 3 ms | 21 ms (7x) |" in modes
    assert "| forward + backward + teacher | 4 ms | - |" in modes and "float32" not in modes
    summary = report.generate("gpu-summary", tmp_path)
    assert "| 4096 × 128256 | float32 | 2 ms, 1.5 MB | failed |" in summary and "8 ×" not in summary
    everything = report.generate("gpu-all", tmp_path)
    assert "![gpu](plots/gpu.png)" in everything and "accuracy" not in everything
    assert shares in everything and modes in everything
    assert list(report.plots("gpu", tmp_path)) == ["gpu"] and report.plots("cpu", tmp_path) == {}
