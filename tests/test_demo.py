"""The demo (examples/demo.py) runs end to end in its smoke-test size."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="the demo trains a BPE with the tokenizers package")
pytest.importorskip("matplotlib", reason="the demo draws a plot with matplotlib")
pytest.importorskip("tqdm", reason="the demo shows its progress with tqdm")


def test_quick_demo_writes_plot_and_curves_agree(tmp_path: Path) -> None:
    plot = tmp_path / "demo.png"
    command = [sys.executable, "-m", "examples.demo", "--quick", "--output", str(plot)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert re.findall(r"^([1-5])/5 ", done.stdout, re.MULTILINE) == list("12345")
    assert len(re.findall(r"^  done in \d+ s$", done.stdout, re.MULTILINE)) == 5, done.stdout
    (difference,) = re.findall(r"largest difference of the loss curves: (\S+) nats", done.stdout)
    assert 0 <= float(difference) < 0.1
    for form in ("F.kl_div", "kldiv_ext", "kldiv_ext, no logits"):
        assert re.search(rf"^{re.escape(form)} +\d", done.stdout, re.MULTILINE), done.stdout
