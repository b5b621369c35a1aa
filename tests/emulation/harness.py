"""The CUDA kernels, built for the CPU (fibers.h), with outputs whose margins are checked."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from builds import load_module
from torch import Tensor

# Which of (student, teacher) get a gradient.
NEITHER, STUDENT, TEACHER, BOTH = (False, False), (True, False), (False, True), (True, True)


def options(flags: str) -> tuple[str, ...]:
    """The options of CMakeLists.txt that build the emulation with these compiler flags."""
    return "-DKLDIV_EMULATION=ON", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}"


class Device(NamedTuple):
    """The properties of a device that launch shapes depend on."""

    compute_capability: int = 80
    multiprocessors: int = 4
    shared_bytes_per_block: int = 100 * 1024
    clusters: bool = False


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Guarded:
    """Outputs `offset` elements past a 16-byte boundary, with a margin on both sides; check() compares the margins."""

    MARGIN = 64

    def __init__(self, offset: int = 0) -> None:
        self.first = self.MARGIN + offset
        self.buffers: list[tuple[Tensor, int]] = []

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        buffer = torch.full([count + 2 * self.MARGIN], 77.0, dtype=dtype)
        self.buffers.append((buffer, count))
        return buffer[self.first : self.first + count].view(list(shape))

    def check(self) -> None:
        for buffer, count in self.buffers:
            margins = buffer[: self.first], buffer[self.first + count :]
            assert all((margin == 77).all() for margin in margins), "written out of bounds"


class Kernels:
    """The kernels and their device; attributes that are not here are those of bindings.cpp."""

    def __init__(self) -> None:
        self.module = load_module("emulation", "emulation_kernels", "emulation_kernels", *options("-O1"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def stream_rows(self, device: Device) -> None:
        """From now on this is the device, and rows are read from its memory in every pass."""
        os.environ["KLDIV_EXT_CUDA_TIER"] = "streamed"
        self.set_device(*device)

    def keep_rows(self, device: Device) -> None:
        """From now on this is the device, and rows stay in shared memory where they fit."""
        os.environ.pop("KLDIV_EXT_CUDA_TIER", None)
        self.set_device(*device)

    @contextlib.contextmanager
    def fault(self, primitive: str, call: int) -> Iterator[None]:
        """Every thread's call number `call` of a function of fibers.h does nothing."""
        self.skip(primitive, call)
        try:
            yield
        finally:
            self.skip("", 0)

    def distillation(
        self,
        student: Tensor,
        teacher: Tensor,
        divergence: str = "forward_kl",
        parameter: float = 0.0,
        *,
        gradients: tuple[bool, bool] = NEITHER,
        needs_grad: tuple[bool, bool] | None = None,
        row_constants: Tensor | None = None,
        grad_output: Tensor | None = None,
        reduce: bool = False,
        gradient_dtype: torch.dtype | None = None,
        in_place: bool = False,
        offset: int = 0,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Outputs by name: of the forward kernel, or with the `row_constants` of a forward those of a later backward.

        `gradients`: those made now; `needs_grad`: those made now or later. `in_place`: over the student's logits."""
        if needs_grad is None:
            needs_grad = gradients if any(gradients) else BOTH
        rows, dtype, guarded = student[..., 0].numel(), accumulation_dtype(student, teacher), Guarded(offset)
        out = {}
        if row_constants is None:
            out["row_loss"] = guarded.new([rows], dtype)
            row_constants = guarded.new([rows, self.ROW_CONSTANTS], dtype)
        out["row_constants"] = row_constants
        if reduce:
            out["loss"] = guarded.new([], dtype)
        if gradients[0]:
            out["grad_student"] = student if in_place else guarded.new(student.shape, gradient_dtype or student.dtype)
        if gradients[1]:
            out["grad_teacher"] = guarded.new(teacher.shape, gradient_dtype or teacher.dtype)
        self.module.distillation(student, teacher, out, needs_grad, grad_output, divergence, parameter, **options)
        guarded.check()
        return out

    def token_stats(
        self, student: Tensor, teacher: Tensor, labels: Tensor, row_scale: Tensor, **options: Any
    ) -> Tensor:
        guarded = Guarded()
        stats = guarded.new([len(labels), self.ROW_STATS], accumulation_dtype(student, teacher))
        self.module.token_stats(student, teacher, labels, row_scale, stats, **options)
        guarded.check()
        return stats

    def pointwise(
        self,
        input: Tensor | None,
        target: Tensor,
        log_target: bool,
        *outputs: str,
        scale: float = 1.0,
        grad_output: Tensor | None = None,
        offset: int = 0,
    ) -> dict[str, Tensor]:
        """The drop-in: those of loss, terms, grad_input and grad_target that are asked for, by name."""
        like = target if input is None else input
        dtype, guarded = accumulation_dtype(like, target), Guarded(offset)
        kinds = {
            "loss": ([], dtype),
            "partials": ([self.pointwise_partials(target.numel())], dtype),
            "terms": (target.shape, like.dtype if like.dtype == target.dtype else dtype),
            "grad_input": (target.shape, like.dtype),
            "grad_target": (target.shape, target.dtype),
        }
        out = {name: guarded.new(*kinds[name]) for name in (*outputs, "partials")}
        flat = all(t is None or t.dim() == 0 or t.is_contiguous() for t in (input, target, grad_output))
        columns = target.numel() if flat else target.shape[-1]
        self.module.pointwise(input, target, grad_output, log_target, scale, flat, columns, out)
        guarded.check()
        return {name: out[name] for name in outputs}
