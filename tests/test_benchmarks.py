"""The benchmark command and the report that makes the README's tables."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kldiv_ext
from benchmarks import report
from benchmarks.contenders import Problem
from benchmarks.measure import Step, quantiles
from benchmarks.promises import gradient_promise, loss_promise

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
    monkeypatch.setattr(report, "README", readme)
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


def test_readme_agrees_with_the_committed_results() -> None:
    readme = report.README.read_text(encoding="utf-8")
    assert report.render(readme, report.RESULTS) == readme, "run python -m benchmarks.report"


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
