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
from benchmarks import accuracy, contenders, linear, measure, promises, report, suites
from benchmarks.measure import SMALL, Expected, Step, quantiles, time_steps, verify
from benchmarks.results import Record, Report, dumps, loads, save

RunQuick = Callable[..., tuple[int, Report]]
SHAPES = ((4096, 128256), (4096, 32000), (8192, 151936), (2048, 262144), (8, 32000), (256, 1024), (65536, 64))
GPU_SUITE = ("--suite", "gpu", "--dtype", "bfloat16", "--seconds", "0.01")


@pytest.fixture
def run_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunQuick:
    """Runs a command on tiny problems on the CPU; returns its exit status and results."""
    monkeypatch.setattr(command, "copy_bandwidth", lambda _: 1e10)
    path = tmp_path / "out.json"
    quick = ["--quick", "--device", "cpu", "--json", str(path)]
    return lambda main, *argv: (main([*argv, *quick]), loads(path.read_text()))


def test_quick_check_fails_on_wrong_results_alone(run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch) -> None:
    status, run = run_quick(command.main, "--check")
    assert status == 0 and {row["status"] for row in run["results"]} == {"ok"}
    assert {row["divergence"] for row in run["results"]} == {*kldiv_ext.DIVERGENCES, *contenders.LOG_TARGETS}
    monkeypatch.setattr(kldiv_ext, "kl_div", lambda input, *_args, **_options: input.sum())
    assert run_quick(command.main, "--check", "--op", "kl_div")[0] == 1


def test_quick_linear_runs(run_quick: RunQuick) -> None:
    status, run = run_quick(linear.main)
    ours = [row for row in run["linear"] if row["contender"] == "kldiv_ext"]
    assert status == 0 and [row["dtype"] for row in ours] == ["bfloat16", "float32"]
    assert all(row["loss_error"] < 0.1 and row["weight_error"] < 0.1 and row["ms_p50"] > 0 for row in ours)
    assert [row["rows"] for row in run["positions"] if row["contender"] == "kldiv_ext"] == list(linear.QUICK_POSITIONS)
    assert {row["contender"] for row in run["linear"]} >= {"products", "eager", "eager_float"}
    assert all(0 < row["kl"] < 1e-3 for row in run["close"])


def test_accuracy_fails_on_misses_alone(run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    status, run = run_quick(accuracy.main)
    ours = [record for record in run["accuracy"] if record["contender"] == "kldiv_ext"]
    assert status == 0 and {record["status"] for record in ours} == {"ok"}
    assert {record["divergence"] for record in ours} == set(kldiv_ext.DIVERGENCES)
    assert {record["dtype"] for record in ours} == set(accuracy.DTYPES)
    assert "liger" in run["left_out"]
    right = kldiv_ext.distillation_loss
    monkeypatch.setattr(kldiv_ext, "distillation_loss", lambda *args, **options: right(*args, **options) * 1.001)
    assert run_quick(accuracy.main)[0] == 1
    expected = "reverse_kl, float32, V = 1000, KL = 1.0e-03: loss 1.0e-03 off by 1.0e-06 (1.0e-03)"
    assert expected in capsys.readouterr().err


def test_absent_contenders_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_load_liger", lambda: {}["liger_kernel"])  # any exception
    assert contenders.missing("cuda") == {"liger": "its import failed: KeyError: 'liger_kernel'"}
    problem = contenders.Problem("distillation_loss", "jsd", 8, 16, torch.float32, "cuda")
    assert contenders.CONTENDERS["liger"](problem) is None


def measured(contender: str) -> list[tuple[str, tuple[int, int], str, str]]:
    """(variant, shape, dtype, mode) that the gpu suite measures the contender on."""
    tasks = suites.tasks(command.parse_args(["--suite", "gpu", "--device", "cuda"]))
    chosen = [(task.problem, mode) for task in tasks if contender in task.contenders for mode in task.modes]
    return [(p.divergence, (p.rows, p.vocab), p.labels["dtype"], mode) for p, mode in chosen]


def test_gpu_suite_has_everything_that_is_asked_of_a_gpu() -> None:
    ours = measured("kldiv_ext")
    assert len(ours) == len(set(ours))
    expected = [
        *product(kldiv_ext.DIVERGENCES, SHAPES, suites.DTYPES, (*suites.FEW_MODES, "forward_backward_teacher")),
        *product(["forward_kl", "jsd"], SHAPES, suites.DTYPES, ["forward_backward_half"]),
        *product(contenders.LOG_TARGETS, [*SHAPES, (8, 16)], suites.DTYPES, suites.FEW_MODES),
    ]
    assert set(expected) <= set(ours)


def test_gpu_suite_has_rivals() -> None:
    """Rivals run for forward_kl and jsd everywhere, and for every divergence on one shape; slow builds are few."""
    expected = {
        *product(["forward_kl", "jsd"], SHAPES, suites.DTYPES, suites.FEW_MODES),
        *product(kldiv_ext.DIVERGENCES, SHAPES[:1], ["bfloat16"], suites.MODES),
    }
    for contender in ("eager", "eager_float", "liger"):
        assert expected <= set(measured(contender)), contender
    for contender in contenders.SLOW_TO_BUILD:
        problems = {row[:3] for row in measured(contender)}
        assert 1 <= len(problems) <= 12 and {dtype for *_, dtype in problems} == {"bfloat16"}, contender
        assert "forward_backward_teacher" not in {row[3] for row in measured(contender)}, contender


def test_options_narrow_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--op kl_div --dtype float16 --shapes 8x16 --mode forward --contenders eager"
    assert command.main(["--suite", "gpu", "--device", "cuda", "--list", *options.split()]) == 0
    lines = [f"kl_div log_target={x} 8x16 float16: forward: kldiv_ext, eager" for x in (False, True)]
    assert capsys.readouterr().out.splitlines() == lines
    with pytest.raises(SystemExit, match="no problem of the suite fits"):
        command.main(["--suite", "gpu", "--device", "cpu", "--shapes", "3x3"])


def test_gpu_suite_runs(run_quick: RunQuick) -> None:
    status, run = run_quick(command.main, *GPU_SUITE, "--divergence", "jsd", "--op", "distillation_loss")
    assert status == 0 and run["failures"] == []
    assert run["left_out"] == {"liger": "its Triton kernels run only on a GPU"}
    assert {row["contender"] for row in run["results"]} == {"kldiv_ext", "eager", "eager_float"}
    ours = {row["mode"]: row for row in run["results"] if row["contender"] == "kldiv_ext"}
    assert set(ours) == set(suites.MODES)
    for mode, row in ours.items():
        gradients = {"forward": 0, "forward_backward_teacher": 2}.get(mode, 1)
        logits_bytes = 8 * 1000 * 2
        assert row["status"] == "ok" and row["timer"] == "cpu" and row["rounds"] == 3
        assert ("teacher_grad_error" in row) == (mode == "forward_backward_teacher")
        assert row["gradient_bytes"] == logits_bytes * gradients
        assert row["share"] * row["ms_p50"] / 1e3 == pytest.approx((2 + gradients) * logits_bytes / 1e10, rel=1e-3)
    assert suites.MINIMUM_TRAFFIC["kl_div", "forward_backward"] == 4  # the backward reads the target again


def test_a_limit_leaves_out_slow_builds_then_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = []
    monkeypatch.setattr(command, "measure", lambda task, *_: ran.append(task.contenders) or [])
    monkeypatch.setattr(command, "copy_bandwidth", lambda _: 1e10)
    monkeypatch.setattr(command.time, "perf_counter", iter(range(0, 1000, 10)).__next__)
    options = "--device cpu --op kl_div --dtype float32 --shapes 8x16,8x32 --contenders eager,compile --limit 65"
    assert command.main([*options.split(), "--json", str(tmp_path / "out.json")]) == 0
    left_out = loads((tmp_path / "out.json").read_text())["left_out"]
    assert ran == 2 * [("kldiv_ext", "eager", "compile")] + [("kldiv_ext", "eager")]
    assert left_out["time"] == ["kl_div log_target=False 8x32 float32: compile"]
    those = ["kl_div log_target=True 8x32 float32 forward,forward_backward"]
    assert left_out["problems"] == {"reason": "the limit of 65 s", "those": those}


def test_a_problem_that_fails_does_not_stop_the_others(run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch) -> None:
    only_false = {"log_target=False": None}
    monkeypatch.setitem(contenders.CONTENDERS, "eager", lambda problem: only_false[problem.divergence])
    status, run = run_quick(command.main, *GPU_SUITE, "--op", "kl_div")
    assert status == 1
    assert run["failures"] == ["kl_div log_target=True 8x1000 bfloat16: failed: KeyError: 'log_target=True'"]
    assert {row["divergence"] for row in run["results"]} == {"log_target=False"}


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of small problems contain the launches."""
    assert list(quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]).values()) == [2.0, 3.5, 5.0]
    assert list(quantiles([7.0]).values()) == [7.0, 7.0, 7.0]
    assert measure.timer_name("cpu", 1) == "cpu"
    assert (measure.timer_name("cuda", SMALL - 1), measure.timer_name("cuda", SMALL)) == ("calls", "events")
    waits: list[int] = []
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(calls)))
    step = Step(lambda: calls.append(None), backward=False)  # type: ignore[arg-type, func-returns-value]
    assert len(time_steps({"a": step}, "calls", repeats=3, seconds=0)["a"]) == 3
    assert waits == [measure.SMALL_CALLS * i for i in (0, 1, 1, 2, 2, 3, 3, 4)]


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


def test_scale_of_float16_gradients() -> None:
    """The scale is the largest that the gradient allows; it drops below 2^16 where something else overflows."""
    student = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    losses = {2.0**34: lambda s, _: s[0].float() * 1e-6, 2.0**15: lambda s, _: (s[0] * 1e-6).float()}
    for scale, loss in losses.items():
        step = Step(loss, student, student.detach(), backward=True)
        gradient = accuracy.run(step, largest=1e-6)[1]
        assert gradient[0].item() == pytest.approx(1e-6, rel=1e-3)
        assert step.scale == scale


def test_pairs_have_the_divergence_asked_for() -> None:
    for dtype, level in product(accuracy.DTYPES.values(), accuracy.LEVELS):
        student, teacher = accuracy.make_pair(level, 8000, dtype, "cpu")
        assert student.dtype == teacher.dtype == dtype and student.requires_grad
        kl = kldiv_ext.reference.distillation_loss(student, teacher, temperature=contenders.TEMPERATURE).item()
        assert level <= kl <= 1.05 * level, (dtype, level)


def test_promises() -> None:
    assert [promises.loss_promise("jsd", loss) for loss in (2.0, 1e-5, 1e-7)] == [2e-5, 1e-8, 1e-9]
    assert [promises.loss_promise("total_variation", loss) for loss in (0.5, 5e-3)] == [5e-6, 5e-6]
    gradients = [promises.gradient_promise(name, "float32") for name in ("jsd", "total_variation")]
    assert gradients == [4e-3, math.inf] and promises.gradient_promise("total_variation", "bfloat16") == 4e-3


def test_every_promise_is_checked() -> None:
    problem = contenders.Problem("distillation_loss", "jsd", 1, 4, torch.float32, "cpu")
    student = torch.ones(1, 4, requires_grad=True)

    def status(loss: Callable[..., torch.Tensor], exact: float = 4.0, contender: str = "kldiv_ext") -> str:
        step = Step(lambda s: loss(s.sum()), student, backward=True)
        return accuracy.compare(contender, step, Expected(exact, (torch.ones(1, 4),)), problem)["status"]

    assert status(lambda x: x) == "ok"
    assert status(lambda x: x + 1e-4) == "missed: loss"
    assert status(lambda x: x - 4 - 5e-10, exact=1e-10) == "missed: loss"  # negative, and otherwise close enough
    assert status(lambda x: x - 4 + 2e-9, exact=1e-10) == "missed: loss"
    assert status(lambda x: 1.01 * x - 0.04) == "missed: gradient"
    assert status(lambda x: x * torch.nan) == "missed: loss, gradient"
    assert status(lambda x: x * torch.nan, contender="eager") == "not finite"
    assert status(lambda _: {}["x"]) == "failed: KeyError: 'x'"


def test_result_files_are_compact() -> None:
    """A record is a line of five-digit numbers; values that are not finite or absent are null."""
    records = [{"a": 1 / 3, "b": [2e-9 / 3, math.nan]}, {"a": math.inf, "c": "x, y"}]
    text = dumps({"date": "today", "none": [], "results": records})
    assert '"rows": [\n  [0.33333,[6.6667e-10,null],null],\n  [null,null,"x, y"]\n ]}' in text
    expected = [{"a": 0.33333, "b": [6.6667e-10, None]}, {"c": "x, y"}]
    assert loads(text) == {"date": "today", "none": [], "results": expected}


def test_documents_agree_with_the_committed_results() -> None:
    assert all("<!-- benchmark:" in document.read_text(encoding="utf-8") for document in report.DOCUMENTS)
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"
    assert set(report.plots("cpu", report.RESULTS)) == {"cpu", "accuracy", "linear"}


def result(contender: str, ratio: float = 1.0, ms: float = 2.5, status: str = "ok", **changes: Any) -> Record:
    """A made-up result for 512 x 32000 bfloat16 logits unless changed."""
    problem = {"op": "distillation_loss", "divergence": "forward_kl", "dtype": "bfloat16", "rows": 512, "vocab": 32000}
    names = {"contender": contender, "mode": "forward_backward", "gradient_bytes": 512_000, "status": status}
    times = {"ms_p50": ms * ratio, "ratio": ratio, "share": 0.93 / ratio, "peak_extra_bytes": 1_500_000}
    return {**problem, **names, **(times if status == "ok" else {}), **changes}


# PyTorch gives the teacher no gradient here, and another contender is wrong or out of memory.
RESULTS = [
    *(result("kldiv_ext", mode=mode) for mode in suites.MODES),
    *(result("eager", 12.0, mode=mode) for mode in suites.MODES[:3]),
    result("compile", status="WRONG"),
    result("kldiv_ext", dtype="float32"),
    result("compile", status="failed: OutOfMemoryError: too large", dtype="float32"),
    result("kldiv_ext", divergence="jsd"),
    result("kldiv_ext", rows=8),
]


def write(path: Path, date: str = "2026-01-01", gpu: str | None = None, **lists: list[Record]) -> None:
    machine = {"device": "cuda" if gpu else "cpu", "cpu": "Some CPU", "threads": 2, "gpu": gpu}
    head = {"date": date, "command": "x", "commit": None, "versions": {"torch": "2.10.0"}}
    save({**head, "machine": {**machine, "copy_bytes_per_second": 4e12}, **lists}, path)


def test_documents_show_the_newest_run_of_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = "<!-- benchmark:cpu-summary begin -->\nold\n<!-- benchmark:cpu-summary end -->"
    document = tmp_path / "README.md"
    document.write_text(old)
    for name, value in {"DOCUMENTS": (document,), "RESULTS": tmp_path, "PLOTS": tmp_path / "plots"}.items():
        monkeypatch.setattr(report, name, value)
    write(tmp_path / "b.json", results=[result("kldiv_ext", ms=99.0)])
    write(tmp_path / "a.json", date="2026-02-01", results=RESULTS)
    write(tmp_path / "c.json", date="2026-03-01", accuracy=[{"divergence": "total_variation", "level": [1.0]}])
    assert report.main(["--check"]) == 1 and document.read_text() == old
    assert report.main([]) == report.main(["--check"]) == 0
    text = document.read_text()
    assert "| 512 × 32000 | bfloat16 | 2.5 ms, 1.5 MB | 30 ms (12x), 1.5 MB | wrong |\n" in text
    assert "| 512 × 32000 | float32 | 2.5 ms, 1.5 MB | - | failed |\n\n" in text  # the last: small shapes are elsewhere
    assert "old" not in text and "2026-02-01" in text
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["cpu.png"]


def test_bad_markers_raise(tmp_path: Path) -> None:
    for name in ("cpu-nothing", "fpga-summary"):
        with pytest.raises(ValueError, match="no benchmark table is called"):
            report.render(f"<!-- benchmark:{name} begin -->\n<!-- benchmark:{name} end -->", tmp_path)
    with pytest.raises(ValueError, match="a benchmark marker without its partner"):
        report.render("<!-- benchmark:cpu-summary begin -->\n", tmp_path)


def test_absent_measurements_are_said(tmp_path: Path) -> None:
    names = {"cpu-summary": "speed of the CPU", "gpu-all": "speed of the CUDA"}
    names |= {"gpu-accuracy-loss": "accuracy of the CUDA", "cuda-resources": "resource use of the CUDA"}
    for name, what in names.items():
        assert report.generate(name, tmp_path) == f"The {what} kernels has not been measured yet."


def test_tables_and_plots_of_a_gpu(tmp_path: Path) -> None:
    write(tmp_path / "some-gpu.json", gpu="Some GPU", results=RESULTS)
    shares = report.generate("gpu-shares", tmp_path)
    assert "| dtype | variant | mode | 512 × 32000 |\n" in shares  # bandwidth does not limit the small shape
    assert "| bfloat16 | `jsd` | forward + backward | 93% |" in shares
    assert "4e+12 bytes/s" in shares and "Some GPU; torch" in shares
    modes = report.generate("gpu-modes", tmp_path)
    assert "| `forward_kl` | 512 × 32000 | bfloat16 | forward + backward + half | 2.5 ms | 30 ms (12x) |" in modes
    assert "| forward + backward + teacher | 2.5 ms | - |" in modes and "float32" not in modes
    everything = report.generate("gpu-all", tmp_path)
    assert "![gpu](plots/gpu.png)" in everything and "accuracy" not in everything
    assert shares in everything and modes in everything
    assert list(report.plots("gpu", tmp_path)) == ["gpu"] and report.plots("cpu", tmp_path) == {}


def test_missed_promises_and_failures_are_shown() -> None:
    ours = {"contender": "kldiv_ext", "divergence": "jsd", "dtype": "bfloat16", "vocab": 32000, "level": [1.0, 1e-8]}
    ours |= {"loss": [1.0, 1e-8], "loss_error": [0.0021, 0.0123], "status": ["ok", "missed: gradient"]}
    kept, missed = report.points([{**ours, "gradient_error": [0.0021, 0.0123]}])
    (failed,) = report.points([{"divergence": "alpha", "level": [1.0], "loss_error": [None], "status": "failed: x"}])
    gradient, loss = report.worst("gradient"), report.worst("loss")
    assert (gradient([kept]), gradient([kept, missed]), loss([kept, missed])) == ("2.1e-3", "**0.012**", "0.012")
    assert (loss([failed]), loss([kept, failed])) == ("none finite", "2.1e-3 (1 failed)")
    text = report.promises([kept, missed])
    assert "Of 2 results of kldiv_ext, 1 keep every promise." in text
    assert text.count("\n- ") == 1 and "\n- jsd, bfloat16, V = 32000, KL = 1.0e-08:" in text
