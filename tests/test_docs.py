"""Documents: Python blocks of README.md and docs/ run, links of README.md resolve, versions and messages agree."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kldiv_ext
from kldiv_ext.options import DistillationOptions, LinearDistillationOptions, markdown_table

sybil = pytest.importorskip("sybil", reason="code blocks are run by sybil")
yaml = pytest.importorskip("yaml", reason="CITATION.cff is YAML")
from sybil.parsers.markdown import PythonCodeBlockParser  # noqa: E402

ROOT = Path(__file__).parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def training_loop() -> dict[str, Any]:
    """The names that blocks use without defining them: what a training loop has at hand."""
    return {
        "torch": torch,
        "F": F,
        "kldiv_ext": kldiv_ext,
        "student_logits": torch.randn(3, 5, 60, requires_grad=True),
        "teacher_logits": torch.randn(3, 5, 60),
        "labels": torch.tensor([[-100, -100, 4, 0, 59], [6, 5, 4, 3, 2], [8, 9, 7, 1, -100]]),
        "T": 2.0,
        "student_hidden": torch.randn(3, 5, 8, requires_grad=True),
        "student_head": torch.nn.Linear(8, 60, bias=False),
        "teacher_hidden": torch.randn(3, 5, 16),
        "teacher_head": torch.nn.Linear(16, 60, bias=False).requires_grad_(False),
    }


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("path", [p for p in PAGES if "```python\n" in read(p)], ids=lambda path: path.stem)
def test_code_blocks_run(path: Path) -> None:
    """Blocks share names, as in a session. `today` and `now`, and the losses of README, are equal."""
    document = sybil.Sybil(parsers=[PythonCodeBlockParser()]).parse(path)
    document.namespace.update(training_loop())
    losses, compared = [], 0
    for example in document.examples():
        example.evaluate()
        losses.append(document.namespace.get("loss"))
        numbers = [document.namespace.pop(name) for name in ("today", "now") if name in document.namespace]
        assert len(numbers) in (0, 2), f"line {example.line}: `today` and `now` belong together"
        if numbers:
            torch.testing.assert_close(*reversed(numbers), msg=f"line {example.line}: not equal")
            compared += 1
    assert len(losses) == read(path).count("```python\n")
    if path.stem == "migrating":
        assert compared == len(losses) >= 10
    if path.stem == "README":
        torch.testing.assert_close(*losses)


def test_readme_is_short_and_its_links_resolve() -> None:
    """Links of docs/ are checked by `mkdocs build --strict`."""
    assert len(read("README.md").splitlines()) <= 130
    targets = re.findall(r"\]\(([^)]+)\)", read("README.md"))
    assert len(targets) > 10
    assert not [target for target in targets if not (ROOT / target.partition("#")[0]).is_file()]


def test_every_divergence_option_and_public_name_is_documented() -> None:
    for page in ("README.md", "docs/divergences.md"):
        assert not [name for name in kldiv_ext.DIVERGENCES if f"\n| `{name}`" not in read(page)], page
    more = markdown_table(LinearDistillationOptions, without=DistillationOptions)
    for table in (markdown_table(DistillationOptions), more):
        assert table in read("docs/options.md"), f"docs/options.md must hold this table:\n{table}"
    assert set(kldiv_ext.__all__) <= set(re.findall(r"^::: kldiv_ext\.(\w+)", read("docs/api.md"), re.MULTILINE))


def test_versions_agree() -> None:
    assert f'\nversion = "{kldiv_ext.__version__}"\n' in read("pyproject.toml")
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["cff-version"], citation["license"]) == ("1.2.0", "BSD-3-Clause")
    assert citation["title"] and citation["message"] and citation["authors"]
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", read("CHANGELOG.md"), re.MULTILINE)
    newest = (citation["version"], citation["date-released"].isoformat())
    assert versions[0] == newest and newest[0] == kldiv_ext.__version__
    assert len(versions) == read("CHANGELOG.md").count("\n## [")
    assert versions == sorted(versions, key=lambda version: version[1], reverse=True)


@pytest.mark.parametrize(
    "message",
    [
        "kldiv_ext is built against torch, and this Python has none: pip install torch, or drop --no-build-isolation.",
        "kldiv_ext has no CUDA kernels here: ",
        "Rebuild with a CUDA toolkit ",
        " is built without CUDA",
        "this copy of kldiv_ext was built without CUDA kernels (",
        "they were built with CUDA ",
        " does not load: ",
        "no CUDA toolkit found (nvcc with cuda_runtime.h; set CUDA_HOME)",
        "torch is built for CUDA ",
        "kldiv_ext: FORCE_CUDA is set, but ",
        "FORCE_CPU is set",
        "the environment's ",
    ],
)
def test_messages_in_the_troubleshooting_are_those_of_the_code(message: str) -> None:
    sources = [ROOT / "setup.py", *Path(kldiv_ext.__file__).parent.glob("*.py")]
    assert message in read("docs/faq.md")
    assert any(message in read(path) for path in sources)
