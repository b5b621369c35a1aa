"""The benchmark command and the report that makes the README's tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kldiv_ext
from benchmarks import report
from benchmarks.measure import quantiles

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
    assert report.UNMEASURED["gpu"] in text
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
