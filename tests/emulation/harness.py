"""Builds the CUDA kernels for the CPU and calls them on CPU tensors, as csrc/operators.h does on CUDA tensors."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
MAX_DIMS = 8
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # in the order of kldiv::Dtype
ORDERS = {"ascending": 0, "descending": 1, "random": 2}
CONSTANTS = 14  # RowConstants::kCount
STATS = 9  # RowStats::kCount


# ---------------------------------------------------------------- building


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def build(folder: Path, sources: Sequence[Path], name: str, flags: Sequence[str], include: Sequence[Path] = ()) -> Path:
    """Compile and link `sources` (two at a time) into `folder`, once per content; the path of the result."""
    cxx = compiler()
    assert cxx is not None
    command = [cxx, "-std=c++20", "-Wall", "-Wextra", *flags]
    command += [f"-I{path}" for path in (*include, HERE, CSRC)]
    content = hashlib.sha256(repr(command).encode())
    for path in sorted({*sources, *CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.h"), *HERE.glob("*.h")}):
        content.update(path.read_bytes())
    target = folder / f"{content.hexdigest()[:16]}-{name}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:

        def compiled(source: Path) -> str:
            out = f"{scratch}/{source.name}.o"
            subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", out], check=True)
            return out

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, sources))
        subprocess.run([*command, *objects, "-o", f"{scratch}/{name}"], check=True)
        for stale in folder.glob(f"*-{name}"):
            stale.unlink()
        return Path(scratch, name).replace(target)


# ---------------------------------------------------------------- the arguments of csrc/args.h


class RowLayout(ctypes.Structure):
    _fields_ = (
        ("dims", ctypes.c_int),
        ("sizes", ctypes.c_int64 * MAX_DIMS),
        ("strides", ctypes.c_int64 * MAX_DIMS),
        ("column_stride", ctypes.c_int64),
    )


class Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("layout", RowLayout))


class Output(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32))


def _matrix(tensor: Tensor | None, flat: bool = False) -> Matrix:
    matrix = Matrix(dtype=DTYPES.index(torch.float32))
    matrix.layout.column_stride = 1
    if tensor is None:
        return matrix
    matrix.data = tensor.data_ptr()
    matrix.dtype = DTYPES.index(tensor.dtype)
    if flat:
        return matrix
    if tensor.dim() == 0:
        matrix.layout.column_stride = 0
        return matrix
    leading = [d for d in range(tensor.dim() - 1) if tensor.shape[d] != 1]
    matrix.layout.dims = len(leading)
    matrix.layout.sizes[: len(leading)] = [tensor.shape[d] for d in leading]
    matrix.layout.strides[: len(leading)] = [tensor.stride(d) for d in leading]
    matrix.layout.column_stride = tensor.stride(-1)
    return matrix


def _output(tensor: Tensor | None) -> Output:
    return Output() if tensor is None else Output(tensor.data_ptr(), DTYPES.index(tensor.dtype))


class LogitsGradient(ctypes.Structure):
    _fields_ = (("out", Output), ("layout", RowLayout), ("columns", ctypes.c_int64))


def _logits_gradient(tensor: Tensor | None) -> LogitsGradient:
    if tensor is None:
        return LogitsGradient()
    return LogitsGradient(_output(tensor), _matrix(tensor).layout, tensor.shape[-1])


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Guarded:
    """Outputs with a margin on both sides, `offset` elements past a 16-byte boundary; check() looks at the margins."""

    MARGIN = 64

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.buffers: list[tuple[Tensor, int]] = []

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        buffer = torch.full([count + 2 * self.MARGIN], 77.0, dtype=dtype)
        self.buffers.append((buffer, count))
        first = self.MARGIN + self.offset
        return buffer[first : first + count].view(list(shape))

    def check(self) -> None:
        for buffer, count in self.buffers:
            first = self.MARGIN + self.offset
            assert (buffer[:first] == 77).all() and (buffer[first + count :] == 77).all(), "written out of bounds"


class Kernels:
    """The library that build() made of KERNELS, fibers.cpp and bindings.cpp."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulated_pointwise_partials.restype = ctypes.c_int64

    def set_order(self, order: str, seed: int = 0) -> None:
        self.library.emulated_set_order(ORDERS[order], ctypes.c_uint32(seed))

    def set_device(
        self,
        compute_capability: int = 80,
        multiprocessors: int = 4,
        shared_bytes_per_block: int = 100 * 1024,
        clusters: bool = False,
    ) -> None:
        """What the device says of itself, from here on; as it was at first for what is not given."""
        self.library.emulated_set_device(
            *map(_c, (compute_capability, multiprocessors, shared_bytes_per_block, clusters))
        )

    def units(self, x: Tensor) -> Tensor:
        """Of csrc/cuda/units.h: see emulated_units in bindings.cpp, [n, 7]."""
        out = torch.empty(x.numel(), 7)
        self.library.emulated_units(*map(_c, (x.data_ptr(), x.numel(), out.data_ptr())))
        return out

    def resident_shape(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
        """Blocks, threads, blocks per cluster and bytes of shared memory; no blocks where rows are streamed."""
        shape = (ctypes.c_int64 * 4)()
        self.library.emulated_resident_shape(*map(_c, (rows, columns, dtype.itemsize)), shape)
        return tuple(shape)  # type: ignore[return-value]

    def row_shape(self, rows: int, columns: int, dtype: torch.dtype, sums: bool = True) -> tuple[int, int, int, int]:
        """Where rows are streamed: blocks, threads, how many threads of a block share a row, and how many blocks;
        `sums`: whether anything is summed over a row."""
        shape = (ctypes.c_int64 * 4)()
        self.library.emulated_row_shape(*map(_c, (rows, columns, dtype == torch.float64, sums)), shape)
        return tuple(shape)  # type: ignore[return-value]

    def _call(self, name: str, *arguments: Any) -> None:
        function: Callable[..., bytes | None] = self.library[name]
        function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
        error = function(*(_c(a) for a in arguments))
        if error is not None:
            raise RuntimeError(error.decode())

    def distillation(
        self,
        student: Tensor,
        teacher: Tensor,
        divergence: str = "forward_kl",
        parameter: float = 0.0,
        grad_student: bool = False,
        grad_teacher: bool = False,
        reduce: bool = False,
        offset: int = 0,
        gradient_dtype: torch.dtype | None = None,
        in_place: bool = False,
        grad_output: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        rows, dtype, guarded = student[..., 0].numel(), accumulation_dtype(student, teacher), Guarded(offset)
        out = {
            "row_loss": guarded.new([rows], dtype),
            "row_constants": guarded.new([rows, CONSTANTS], dtype),
        }
        if reduce:
            out["loss"] = guarded.new([], dtype)
        if grad_student:
            out["grad_student"] = student if in_place else guarded.new(student.shape, gradient_dtype or student.dtype)
        if grad_teacher:
            out["grad_teacher"] = guarded.new(teacher.shape, gradient_dtype or teacher.dtype)
        self._distillation(student, teacher, grad_output, out, divergence, parameter, **options)
        guarded.check()
        return out

    def distillation_backward(
        self,
        grad_output: Tensor,
        student: Tensor,
        teacher: Tensor,
        row_constants: Tensor,
        divergence: str = "forward_kl",
        parameter: float = 0.0,
        grad_student: bool = True,
        grad_teacher: bool = True,
        offset: int = 0,
        in_place: bool = False,
        **options: Any,
    ) -> dict[str, Tensor]:
        guarded = Guarded(offset)
        out = {"row_constants": row_constants}
        if grad_student:
            out["grad_student"] = student if in_place else guarded.new(student.shape, student.dtype)
        if grad_teacher:
            out["grad_teacher"] = guarded.new(teacher.shape, teacher.dtype)
        self._distillation(student, teacher, grad_output, out, divergence, parameter, **options)
        guarded.check()
        return out

    def _distillation(
        self,
        student: Tensor,
        teacher: Tensor,
        grad_output: Tensor | None,
        out: dict[str, Tensor],
        divergence: str,
        parameter: float,
        temperature: float = 1.0,
        scale: float = 1.0,
        row_scale: Tensor | None = None,
        labels: Tensor | None = None,
        hard_scale: float = 0.0,
        logit_scale: tuple[float, float] = (1.0, 1.0),
        logit_softcap: tuple[float, float] = (0.0, 0.0),
        valid_vocab: int | None = None,
        wanted: tuple[bool, bool] | None = None,
    ) -> None:
        made = "grad_student" in out, "grad_teacher" in out
        if wanted is None:
            wanted = made if any(made) else (True, True)
        self._call(
            "emulated_distillation",
            _matrix(student),
            _matrix(teacher),
            _logits_gradient(out.get("grad_student")),
            _logits_gradient(out.get("grad_teacher")),
            *(int(side) for side in wanted),
            student[..., 0].numel(),
            valid_vocab or student.shape[-1],
            divergence.encode(),
            parameter,
            temperature,
            scale,
            hard_scale,
            *logit_scale,
            *logit_softcap,
            _pointer(labels),
            _pointer(row_scale),
            _pointer(grad_output),
            int(grad_output is not None and grad_output.dim() > 0),
            _pointer(out["row_constants"]),
            _pointer(out.get("row_loss")),
            _pointer(out.get("loss")),
        )

    def token_stats(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        row_scale: Tensor | None = None,
        temperature: float = 1.0,
        logit_scale: tuple[float, float] = (1.0, 1.0),
        logit_softcap: tuple[float, float] = (0.0, 0.0),
        valid_vocab: int | None = None,
    ) -> Tensor:
        guarded = Guarded()
        stats = guarded.new([student[..., 0].numel(), STATS], accumulation_dtype(student, teacher))
        self._call(
            "emulated_token_stats",
            _matrix(student),
            _matrix(teacher),
            student[..., 0].numel(),
            valid_vocab or student.shape[-1],
            temperature,
            *logit_scale,
            *logit_softcap,
            _pointer(labels),
            _pointer(row_scale),
            _pointer(stats),
        )
        guarded.check()
        return stats

    def kl_div(
        self, input: Tensor, target: Tensor, log_target: bool, scale: float = 1.0, reduce: bool = True, offset: int = 0
    ) -> Tensor:
        dtype, guarded = accumulation_dtype(input, target), Guarded(offset)
        terms = loss = partials = None
        flat = input.is_contiguous() and target.is_contiguous()
        rows, columns = (1, input.numel()) if flat else (input[..., 0].numel(), input.shape[-1])
        if reduce:
            loss = guarded.new([], dtype)
            partials = guarded.new([self.library.emulated_pointwise_partials(*map(_c, (rows, columns)))], dtype)
        else:
            terms = guarded.new(input.shape, input.dtype if input.dtype == target.dtype else dtype)
        self._call(
            "emulated_pointwise",
            _matrix(input, flat),
            _matrix(target, flat),
            log_target,
            rows,
            columns,
            scale,
            _output(terms),
            _pointer(loss),
            _pointer(partials),
            _matrix(None),
            _output(None),
            _output(None),
        )
        guarded.check()
        result = loss if reduce else terms
        assert result is not None
        return result

    def kl_div_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        target: Tensor,
        log_target: bool,
        scale: float = 1.0,
        grad_target: bool = True,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        guarded = Guarded(offset)
        dense = [t for t in (input, target, grad_output) if t is not None and t.dim() > 0]
        flat = all(t.is_contiguous() for t in dense)
        rows, columns = (1, target.numel()) if flat else (target[..., 0].numel(), target.shape[-1])
        of_input = guarded.new(target.shape, target.dtype if input is None else input.dtype)
        of_target = guarded.new(target.shape, target.dtype) if grad_target else None
        self._call(
            "emulated_pointwise",
            _matrix(input, flat),
            _matrix(target, flat),
            log_target,
            rows,
            columns,
            scale,
            _output(None),
            None,
            None,
            _matrix(grad_output, flat and grad_output.dim() > 0),
            _output(of_input),
            _output(of_target),
        )
        guarded.check()
        return of_input, of_target

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        self._call("emulated_scale", _output(gradient), gradient.numel(), factor.data_ptr(), DTYPES.index(factor.dtype))


def _c(argument: Any) -> Any:
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    if argument is None or isinstance(argument, int):
        return ctypes.c_void_p(argument)  # 64 bits, as int64_t and pointers are
    return argument
