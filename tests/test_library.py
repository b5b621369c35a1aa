"""The installed package: what the shared objects need, what import does, what is public and documented."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import run_python
from torch._subclasses.fake_tensor import FakeTensorMode

import kldiv_ext
from benchmarks import resources
from kldiv_ext import _library, info, reference

PACKAGE = Path(kldiv_ext.__file__).parent
OBJECTS = sorted(PACKAGE.glob("*.so"))
CUDA_OBJECT = PACKAGE / resources.OBJECT
NEEDS_CUDA_OBJECT = pytest.mark.skipif(
    not CUDA_OBJECT.exists() or resources.cuobjdump() is None, reason="needs CUDA kernels and cuobjdump"
)


def test_objects_use_the_limited_python_abi() -> None:
    names = [path.name for path in OBJECTS]
    assert "_C.abi3.so" in names
    assert set(names) <= {"_C.abi3.so", "_C_cuda.abi3.so"}


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, of binutils")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_objects_need_only_the_stable_abi_of_libtorch(path: Path) -> None:
    """A C++ symbol of c10, at or torch would tie the object to one version of torch."""
    listed = subprocess.check_output(["nm", "-D", "--undefined-only", "--demangle", path], text=True)
    needed = [line.split(maxsplit=1)[1] for line in listed.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in needed), "nm shows no symbols"
    assert [symbol for symbol in needed if re.search(r"\b(c10|at|torch|caffe2)::", symbol)] == []
    assert [symbol for symbol in needed if symbol.startswith("cuda")] == [] or path.name == "_C_cuda.abi3.so"


@NEEDS_CUDA_OBJECT
def test_cuda_kernels_use_no_stack() -> None:
    """A stack holds spilled registers, or an array that is indexed at run time."""
    kernels = resources.read_usage(CUDA_OBJECT)
    assert {kernel["kernel"] for kernel in kernels} >= {*resources.ROW_KERNELS, "pointwise_elements", "scale_elements"}
    assert [kernel for kernel in kernels if (kernel["stack"], kernel["local"]) != (0, 0)] == []


# The 16-byte accesses that a row kernel for contiguous logits must have.
WIDE_ACCESSES = {
    resources.STREAMED: ("loads_16", "stores_16"),
    resources.RESIDENT: ("loads_16", "stores_16", "copies_16", "shared_loads_16"),
    "stats_of_rows": ("loads_16",),
}


@NEEDS_CUDA_OBJECT
def test_cuda_row_kernels_move_16_bytes_at_a_time() -> None:
    seen = set()
    for kernel in resources.read(CUDA_OBJECT):
        architecture, name = kernel["architecture"], kernel["kernel"]
        if resources.dense_dtype(kernel) not in ("bfloat16", "float16", "float32"):
            continue
        seen.add((architecture, name))
        what = architecture, name, kernel["arguments"]
        for access in WIDE_ACCESSES[name]:
            assert kernel[access] > 0, (*what, access)
        assert kernel["spills"] == 0, what
        assert name != resources.RESIDENT or kernel["shared"] <= 14 * 1024, what  # shapes.h's kReservedBytes
        phases = {loop["phase"] for loop in kernel["loops"]}
        assert phases >= ({"1", "2", "3"} if "stores_16" in WIDE_ACCESSES[name] else {"1", "2"}), what
    architectures = {architecture for architecture, _ in seen}
    assert architectures and seen == {(a, name) for a in architectures for name in WIDE_ACCESSES}


def test_import_from_elsewhere(tmp_path: Path) -> None:
    """It works in any directory, without a warning, and initializes no GPU: a DataLoader may fork afterwards."""
    script = (
        "import torch, kldiv_ext\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(kldiv_ext.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3)).item())"
    )
    assert run_python("-W", "error::UserWarning", "-c", script, cwd=tmp_path).strip() == "0.0"


def test_info(tmp_path: Path) -> None:
    printed = run_python("-m", "kldiv_ext.info", cwd=tmp_path).splitlines()
    assert printed == [f"{name}: {value}" for name, value in info.collect().items()]
    assert info.collect()["torch"] == torch.__version__


IMPORT = "try:\n    import kldiv_ext\n    print('imported')\nexcept ValueError as error:\n    print(error)"
VARIABLES = {"KLDIV_EXT_CPU_ISA": "avx512, avx2 or portable", "KLDIV_EXT_CUDA_TIER": "resident or streamed"}


@pytest.mark.parametrize("variable", VARIABLES)
def test_environment_variables(tmp_path: Path, variable: str) -> None:
    """An empty value and an allowed one are accepted, a wrong one is named."""
    allowed = VARIABLES[variable]
    wrong = f"the environment's {variable} must be {allowed}, but is 'sse'"
    for value, printed in {"": "imported", allowed.split()[-1]: "imported", "sse": wrong}.items():
        assert run_python("-c", IMPORT, cwd=tmp_path, **{variable: value}) == f"{printed}\n"


MISSING = {
    "cuda": (RuntimeError, r"this is a test.*FORCE_CUDA=1.*python -m kldiv_ext\.info"),
    "xpu": (ValueError, r"CPU or a CUDA device, got xpu.*kldiv_ext\.reference"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_missing_kernels_are_explained(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """`distillation_loss` says what is missing and what to do; `kl_div` falls back to PyTorch."""
    monkeypatch.setattr(_library, "cuda_missing_reason", "this is a test")
    error, says = MISSING[kind]
    with FakeTensorMode():
        logits = torch.empty(3, 4, device=kind)
        with pytest.raises(error, match=says):
            kldiv_ext.distillation_loss(logits, logits)
        assert kldiv_ext.kl_div(logits, logits, reduction="none").shape == (3, 4)
        assert kldiv_ext.kl_div(logits, logits, reduction="sum").shape == ()


def test_reasons_for_missing_cuda_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never an exception: a CUDA object that is absent or broken leaves the CPU working."""
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _library._load_cuda() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built without CUDA kernels" in _library._load_cuda()
    (tmp_path / "_C_cuda.abi3.so").write_text("not an object")
    monkeypatch.setattr(_library._build_info, "cuda_version", "12.8")
    assert "built with CUDA 12.8" in _library._load_cuda()
    monkeypatch.setattr(_library._build_info, "cuda_version", "13.1")
    assert _library._load_cuda().startswith("_C_cuda.abi3.so does not load: ")


@pytest.mark.skipif(not CUDA_OBJECT.exists(), reason="built without CUDA kernels")
@pytest.mark.skipif(
    (torch.version.cuda or "").split(".")[0] != (_library._build_info.cuda_version or "").split(".")[0],
    reason="torch is built without CUDA, or with another major version of it",
)
def test_cuda_kernels_load() -> None:
    """Also where there is no GPU."""
    assert _library.cuda_missing_reason == ""


def test_public_names_and_version() -> None:
    """The package has the version that pip installed; test_docs.py compares the documents."""
    assert set(kldiv_ext.__all__) <= set(dir(kldiv_ext))
    assert (PACKAGE / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", kldiv_ext.__version__)
    try:
        distribution = importlib.metadata.distribution("kldiv_ext")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree
    assert distribution.version == kldiv_ext.__version__


def test_arguments_are_documented() -> None:
    for function in (kldiv_ext.kl_div, kldiv_ext.distillation_loss, kldiv_ext.linear_distillation_loss):
        arguments = (inspect.getdoc(function) or "").split("Args:")[1].split("Returns:")[0]
        for name in inspect.signature(function).parameters:
            assert re.search(rf"^\s+(\w+, )*{name}(, \w+)*: ", arguments, re.MULTILINE), f"{function}: {name}"


def test_modules_and_functions_have_docstrings() -> None:
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path.name
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values() if p.name != "self"]


def test_signatures() -> None:
    """The drop-in's are PyTorch's; the reference and the modules take what the functions take."""
    assert parameters(kldiv_ext.kl_div) == parameters(F.kl_div) == parameters(reference.kl_div)
    assert parameters(kldiv_ext.KLDivLoss) == parameters(torch.nn.KLDivLoss)
    assert inspect.signature(reference.kl_div) == inspect.signature(kldiv_ext.kl_div)
    assert inspect.signature(reference.distillation_loss) == inspect.signature(kldiv_ext.distillation_loss)
    for function, module in (
        (kldiv_ext.distillation_loss, kldiv_ext.DistillationLoss),
        (kldiv_ext.linear_distillation_loss, kldiv_ext.LinearDistillationLoss),
    ):
        taken, called = parameters(function), [name for name, _, _ in parameters(module.forward)]
        assert called == [name for name, _, _ in taken if name in called]
        assert parameters(module) == [p for p in taken if p[0] not in called]
