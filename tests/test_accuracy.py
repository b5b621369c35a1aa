"""The benchmark of errors, its promises, and the tables and the plot made of it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmarks import run_quick, write

import kldiv_ext
from benchmarks import accuracy, contenders, report
from benchmarks.contenders import Problem
from benchmarks.measure import Step
from benchmarks.promises import gradient_promise, loss_promise
from benchmarks.results import Record

Loss = Callable[..., torch.Tensor]


def test_quick_accuracy_runs(tmp_path: Path) -> None:
    status, run = run_quick(accuracy.main, tmp_path)
    ours = [record for record in run["accuracy"] if record["contender"] == "kldiv_ext"]
    assert status == 0 and {record["status"] for record in ours} == {"ok"}
    assert {record["divergence"] for record in ours} == set(kldiv_ext.DIVERGENCES)
    assert {record["dtype"] for record in ours} == set(accuracy.DTYPES)
    assert "liger" in run["left_out"]
    for kind in ("gradient", "loss", "total_variation", "promises"):
        assert "kldiv_ext" in report.generate(f"cpu-accuracy-{kind}", tmp_path)


def test_inaccurate_results_fail_the_run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    right = kldiv_ext.distillation_loss
    monkeypatch.setattr(kldiv_ext, "distillation_loss", lambda *args, **options: right(*args, **options) * 1.001)
    monkeypatch.setattr(accuracy, "DTYPES", {"float32": torch.float32})
    assert run_quick(accuracy.main, tmp_path)[0] == 1
    expected = "reverse_kl, float32, V = 1000, KL = 1.0e-03: loss 1.0e-03 off by 1.0e-06 (1.0e-03)"
    assert expected in capsys.readouterr().err


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
        pytest.param(1e-2, lambda loss: loss + 0.01 * (loss - loss.detach()), "missed: gradient", id="gradient"),
        pytest.param(1e-2, lambda loss: loss * torch.nan, "missed: loss, gradient", id="nan"),
        pytest.param(1e-2, no_kernel, "failed: RuntimeError: no kernel", id="raises"),
    ],
)
def test_every_promise_is_checked(monkeypatch: pytest.MonkeyPatch, level: float, change: Loss, status: str) -> None:
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
def test_pairs_have_the_divergence_asked_for(dtype: torch.dtype) -> None:
    for level in accuracy.LEVELS:
        student, teacher = accuracy.make_pair(level, 8000, dtype, "cpu")
        assert student.dtype == teacher.dtype == dtype and student.requires_grad
        kl = kldiv_ext.reference.distillation_loss(student, teacher, temperature=contenders.TEMPERATURE).item()
        assert level <= kl <= 1.05 * level


def test_scale_of_float16_gradients() -> None:
    """As large as the gradient allows; where something else overflows, half of a GradScaler's first and less."""
    student = torch.zeros(4, dtype=torch.float16, requires_grad=True)

    def scale(loss: Loss) -> float:
        step = Step(loss, student, student.detach(), backward=True)
        gradient = accuracy.run(step, largest=1e-6)[1]
        assert gradient[0].item() == pytest.approx(1e-6, rel=1e-3)
        return step.scale

    assert scale(lambda s, _: s[0].float() * 1e-6) == 2.0**34
    assert scale(lambda s, _: (s[0] * 1e-6).float()) == 2.0**15


def accuracy_records() -> list[Record]:
    """At two levels, of two divergences beside total variation, of which compile has one."""

    def record(divergence: str, contender: str, errors: list[float | None], status: Any = "ok") -> Record:
        levels = [1.0, 1e-8][: len(errors)]
        problem = {"divergence": divergence, "dtype": "bfloat16", "vocab": 32000, "contender": contender}
        found = {"level": levels, "loss": levels, "loss_error": errors, "gradient_error": errors, "status": status}
        return {**problem, **found}

    failed = "failed: RuntimeError: no compiler"
    return [
        record("forward_kl", "kldiv_ext", [0.0021, 0.0123], ["ok", "missed: gradient"]),
        record("forward_kl", "eager", [0.31, None], ["ok", "not finite"]),
        record("forward_kl", "compile", [0.25, None], ["ok", failed]),
        record("jsd", "kldiv_ext", [0.0018, 0.002]),
        record("jsd", "eager", [1234.0, 3.0]),
        record("total_variation", "kldiv_ext", [0.9]),
    ]


def test_accuracy_tables_and_plot(tmp_path: Path) -> None:
    write(tmp_path / "a.json", accuracy=accuracy_records())
    gradient = report.generate("cpu-accuracy-gradient", tmp_path)
    assert "| dtype | contender | 1 | 1e-8 |" in gradient
    assert "| bfloat16 | kldiv_ext | 2.1e-3 | **0.012** |" in gradient
    assert "| bfloat16 | PyTorch | 1.2e3 | 3 (1 not finite) |" in gradient
    assert "| bfloat16 | `torch.compile` | 0.25 | none finite |" in gradient
    assert "the worst of 4 rows" in gradient and "the worst of 2 divergences" in gradient
    assert "; `torch.compile`: forward_kl." in gradient
    assert "| bfloat16 | kldiv_ext | 2.1e-3 | 0.012 |" in report.generate("cpu-accuracy-loss", tmp_path)
    assert "| bfloat16 | kldiv_ext | 0.9 / 0.9 |" in report.generate("cpu-accuracy-total_variation", tmp_path)
    promises = report.generate("cpu-accuracy-promises", tmp_path)
    assert "Of 5 results of kldiv_ext, 4 keep every promise." in promises
    assert "- forward_kl, bfloat16, V = 32000, KL = 1.0e-08:" in promises
    assert "The accuracy of the CUDA kernels has not been" in report.generate("gpu-accuracy-loss", tmp_path)
    assert list(report.plots("cpu", tmp_path)) == ["accuracy"]
