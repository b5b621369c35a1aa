"""Builds the two shared objects: _C (schemas and CPU kernels) and, where there is a CUDA toolkit, _C_cuda."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError as error:
    raise SystemExit(
        "kldiv_ext is built against torch, and this Python has none: pip install torch, or drop --no-build-isolation."
    ) from error

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
MINIMUM_TORCH = "0x020a000000000000"  # 2.10: the stable ABI that every later torch keeps


def environment_flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "on", "true", "yes")


def cuda_home() -> Path | None:
    """The toolkit with nvcc and headers. An nvcc on the PATH may be a wrapper outside its toolkit."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
        if top:
            candidates.append(top[1].strip())
    candidates.append("/usr/local/cuda")
    for candidate in filter(None, candidates):
        home = Path(candidate).resolve()
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def nvcc_version(home: Path) -> str:
    output = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    assert match, output
    return match[1]


def why_no_cuda() -> tuple[Path | None, str]:
    """The toolkit to use, or None and the reason."""
    if environment_flag("FORCE_CPU"):
        return None, "FORCE_CPU is set"
    home = cuda_home()
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif home is None:
        reason = "no CUDA toolkit found (nvcc with cuda_runtime.h; set CUDA_HOME)"
    elif nvcc_version(home).split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = f"torch is built for CUDA {torch.version.cuda}, but {home} is CUDA {nvcc_version(home)}"
    else:
        return home, ""
    if environment_flag("FORCE_CUDA"):
        raise SystemExit(f"kldiv_ext: FORCE_CUDA is set, but {reason}.")
    return None, reason


def known_architectures(home: Path) -> str:
    listed = subprocess.run([home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '')}" in listed.split()]
    return ";".join(known) + "+PTX"


CUDA_HOME, NO_CUDA_REASON = why_no_cuda()
if CUDA_HOME:
    # Read by torch.utils.cpp_extension when it is imported.
    os.environ["CUDA_HOME"] = str(CUDA_HOME)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", known_architectures(CUDA_HOME))

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

DEFINES = [("TORCH_TARGET_VERSION", MINIMUM_TORCH)]
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"]
CXX_FLAGS += os.environ.get("KLDIV_EXT_CXXFLAGS", "").split()  # last, so that they win
NVCC_FLAGS = ["-O3", "-std=c++20", "--threads=2", "-Xptxas=-v", "-Xfatbin=-compress-all"]


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))


HEADERS = sources("*.h", "*/*.h")
extensions = [
    CppExtension(
        "kldiv_ext._C",
        sources("*.cpp", "cpu/*.cpp"),
        depends=HEADERS,
        define_macros=DEFINES,
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,
    )
]
if CUDA_HOME:
    extensions.append(
        CUDAExtension(
            "kldiv_ext._C_cuda",
            sources("cuda/*.cpp", "cuda/*.cu"),
            depends=HEADERS,
            define_macros=[*DEFINES, ("USE_CUDA", "1")],
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    )
    cuda_line = f"on, for {os.environ['TORCH_CUDA_ARCH_LIST']} with {CUDA_HOME}"
else:
    cuda_line = f"off, because {NO_CUDA_REASON}"

# pip shows this line with -v; without it, ask `python -m kldiv_ext.info`.
print(f"kldiv_ext: CUDA kernels: {cuda_line}", file=sys.stderr)
(ROOT / "kldiv_ext" / "_build_info.py").write_text(
    '"""Written by setup.py: how this copy was built."""\n\n'
    f"torch_version = {torch.__version__!r}\n"
    f"cuda_version = {nvcc_version(CUDA_HOME) if CUDA_HOME else None!r}\n"
    f"cuda_architectures = {os.environ['TORCH_CUDA_ARCH_LIST'] if CUDA_HOME else ''!r}\n"
    f"no_cuda_reason = {NO_CUDA_REASON!r}\n"
)

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
