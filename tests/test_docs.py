"""Documents: Python blocks of README.md and docs/ run, links of README.md resolve, versions and messages agree."""

from __future__ import annotations

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
README = ROOT / "README.md"
if not (ROOT / "docs").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# ---------------------------------------------------------------- code blocks


def training_loop() -> dict[str, Any]:
    """The names that blocks use without defining them: what a training loop has at hand."""
    labels = torch.randint(60, (3, 5))
    labels[0, :2] = -100
    return {
        "torch": torch,
        "F": F,
        "kldiv_ext": kldiv_ext,
        "student_logits": torch.randn(3, 5, 60, requires_grad=True),
        "teacher_logits": torch.randn(3, 5, 60),
        "labels": labels,
        "T": 2.0,
        "student_hidden": torch.randn(3, 5, 8, requires_grad=True),
        "student_head": torch.nn.Linear(8, 60, bias=False),
        "teacher_hidden": torch.randn(3, 5, 16),
        "teacher_head": torch.nn.Linear(16, 60, bias=False).requires_grad_(False),
    }


def run_blocks(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line and names of each Python block of a document, once it has run. Blocks share names, as in a session."""
    document = sybil.Sybil(parsers=[PythonCodeBlockParser()]).parse(path)
    document.namespace.update(training_loop())
    blocks = []
    for example in document.examples():
        example.evaluate()
        blocks.append((example.line, dict(document.namespace)))
        for name in ("today", "now"):
            document.namespace.pop(name, None)
    return blocks


PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
PAGES_WITH_BLOCKS = [page for page in PAGES if "```python\n" in page.read_text(encoding="utf-8")]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("path", PAGES_WITH_BLOCKS, ids=lambda path: path.stem)
def test_code_blocks_run(path: Path) -> None:
    """Where a block computes a number `today` and `now`, both are equal."""
    for line, names in run_blocks(path):
        assert ("today" in names) == ("now" in names), line
        if "today" in names:
            torch.testing.assert_close(names["now"], names["today"], msg=f"line {line}: not equal")


def test_every_block_about_migrating_compares() -> None:
    blocks = run_blocks(ROOT / "docs" / "migrating.md")
    assert len(blocks) == read("docs/migrating.md").count("```python\n") >= 10
    assert all("today" in names for _, names in blocks)


def test_readme_before_is_after() -> None:
    before, after = (names["loss"] for _, names in run_blocks(README))
    torch.testing.assert_close(after, before)


# ---------------------------------------------------------------- README.md


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 130


def test_readme_links_resolve() -> None:
    """Those of docs/ are checked by `mkdocs build --strict`."""
    targets = re.findall(r"\]\(([^)]+)\)", read("README.md"))
    assert len(targets) > 10
    missing = [target for target in targets if not (ROOT / target.partition("#")[0]).is_file()]
    assert not missing


def test_every_divergence_is_documented() -> None:
    for page in ("README.md", "docs/divergences.md"):
        text = read(page)
        missing = [name for name in kldiv_ext.DIVERGENCES if f"\n| `{name}`" not in text]
        assert not missing, page


def test_options_are_those_of_the_code() -> None:
    text = read("docs/options.md")
    for table in (
        markdown_table(DistillationOptions),
        markdown_table(LinearDistillationOptions, without=DistillationOptions),
    ):
        assert table in text, f"docs/options.md must hold this table:\n{table}"


def test_every_public_name_is_in_the_api_reference() -> None:
    documented = re.findall(r"^::: kldiv_ext\.(\w+)", read("docs/api.md"), re.MULTILINE)
    assert set(kldiv_ext.__all__) <= set(documented)


# ---------------------------------------------------------------- versions and messages


def test_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == kldiv_ext.__version__
    assert citation["license"] == "BSD-3-Clause"
    assert citation["title"] and citation["message"] and citation["authors"]


def test_changelog_has_the_version_of_the_package() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == (kldiv_ext.__version__, yaml.safe_load(read("CITATION.cff"))["date-released"].isoformat())
    assert len(versions) == read("CHANGELOG.md").count("\n## [")
    assert [date for _, date in versions] == sorted((date for _, date in versions), reverse=True)


def test_pyproject_has_the_version_of_the_package() -> None:
    assert f'\nversion = "{kldiv_ext.__version__}"\n' in read("pyproject.toml")


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
    code = read("setup.py") + "".join(
        path.read_text("utf-8") for path in sorted(Path(kldiv_ext.__file__).parent.glob("*.py"))
    )
    assert message in read("docs/faq.md")
    assert message in code
