"""How time, memory, accuracy and copy bandwidth are measured."""

import contextlib
import ctypes
import gc
import random
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contenders import Loss

# What a GradScaler does: fp16 gradients of a mean over rows are too small to be stored unscaled.
GRAD_SCALE = {torch.float16: 2.0**15}
COPY_BYTES = 2**29
L2_FLUSH_BYTES = 2**28
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Step:
    """One run of a contender: the loss alone, or the loss and its backward."""

    def __init__(self, loss: Loss, student: Tensor, teacher: Tensor, backward: bool) -> None:
        self.loss, self.student, self.teacher, self.backward = loss, student, teacher, backward
        self.scale = GRAD_SCALE.get(student.dtype, 1.0)

    def reset(self) -> None:
        """Free the last gradient, so that every run allocates its own."""
        self.student.grad = None

    def __call__(self) -> Tensor:
        if not self.backward:
            with torch.no_grad():
                return self.loss(self.student, self.teacher)
        loss = self.loss(self.student, self.teacher)
        torch.autograd.backward(loss, None if self.scale == 1 else torch.full_like(loss, self.scale))
        return loss


def errors(step: Step, expected: tuple[float, Tensor]) -> tuple[float, float | None, float]:
    """Relative error of the loss, relative L2 error of the gradient, eps of the loss's dtype.

    Without backward the gradient's error is None.
    """
    step.reset()
    loss = step()
    eps = torch.finfo(loss.dtype).eps
    loss_error = abs(loss.item() - expected[0]) / abs(expected[0])
    if not step.backward:
        return loss_error, None, eps
    assert step.student.grad is not None
    gradient = step.student.grad.float() / step.scale
    step.reset()
    difference = torch.linalg.vector_norm(gradient.sub_(expected[1]))
    return loss_error, (difference / torch.linalg.vector_norm(expected[1])).item(), eps


def time_steps(steps: dict[str, Step], device: str, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every step, run in rounds so that noise meets all of them alike.

    Stops after `repeats` rounds, or after `seconds` if there were at least three. A new order in
    every round keeps one contender from always following the same other.
    """
    timer = _CudaTimer() if device == "cuda" else _cpu_timer
    for step in steps.values():  # warm up
        timer(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for done in range(repeats):
        if done >= 3 and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            times[name].append(timer(steps[name]))
    return times


def _cpu_timer(step: Step) -> float:
    step.reset()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


class _CudaTimer:
    """Event times with a cold L2; writing over it also hides the launch of the first kernel."""

    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, step: Step) -> float:
        step.reset()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.flush.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a large `copy_`: the limit that shares refer to."""
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.ones_like(source)

    def copy(_student: Tensor, _teacher: Tensor) -> Tensor:
        return target.copy_(source)

    step = Step(copy, torch.empty(0), torch.empty(0), backward=False)
    times = time_steps({"copy": step}, device, repeats=20, seconds=10)["copy"]
    return 2 * COPY_BYTES / (statistics.median(times) / 1e3)


def peak_extra_bytes(step: Step, device: str) -> int | None:
    """Most memory beyond the inputs at any moment of a run; None where it cannot be measured.

    The gradient that the run returns is part of it.
    """
    step.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Give freed heap memory back to the system, or reusing it would not show (glibc only).
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")  # sets the peak to what is resident now
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no {key} in {STATUS}")
