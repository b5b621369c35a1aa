"""`python -m kldiv_ext.info`: versions, architectures, which shared objects loaded and why not. Never raises."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _C, _build_info, _library


def collect() -> dict[str, Any]:
    """Everything that a bug report needs, by name."""
    from . import __version__

    return {
        "kldiv_ext": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch it was built against": _build_info.torch_version,
        "isa": _C.cpu_isa,
        "threads": torch.get_num_threads(),
        "CUDA kernels": "loaded" if not _library.cuda_missing_reason else f"not loaded: {_library.cuda_missing_reason}",
        "CUDA of torch": torch.version.cuda,
        "CUDA they were built with": _build_info.cuda_version,
        "CUDA architectures": _build_info.cuda_architectures,
        "GPUs": _gpus(),
        "divergences": ", ".join(_library.DIVERGENCES),
    }


def _gpus() -> str:
    try:
        if not torch.cuda.is_available():
            return "none that torch can use"
        return ", ".join(
            "{0.name} (sm_{0.major}{0.minor})".format(torch.cuda.get_device_properties(i))
            for i in range(torch.cuda.device_count())
        )
    except RuntimeError as error:
        return f"cannot be asked: {error}"


def main() -> None:
    """Print what `collect` found, a line each."""
    for name, value in collect().items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
