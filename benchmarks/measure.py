"""How time, memory, accuracy and copy bandwidth are measured."""

import contextlib
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import Expected, Loss
from benchmarks.modes import SMALL

# What a GradScaler does: fp16 gradients of a mean over rows are too small to be stored unscaled.
GRAD_SCALE = {torch.float16: 2.0**15}
COPY_BYTES = {"cpu": 2**29, "cuda": 2**32}
L2_FLUSH_BYTES = 2**28
# Written so often before what is timed: longer than the launches take, which then wait behind it and do not show.
L2_FLUSHES = 8
SMALL_CALLS = 50  # in a row, on a GPU, as a user sees them
TIMERS = {
    "cpu": "wall clock of single calls",
    "events": "CUDA events around single calls that are launched in advance, cold L2 cache",
    "calls": f"wall clock of {SMALL_CALLS} calls in a row and one synchronization, over their number",
}
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Step:
    """One run of a contender: the loss alone, or `factor` times the loss and its backward."""

    def __init__(self, loss: Loss, student: Tensor, teacher: Tensor, backward: bool, factor: float = 1.0) -> None:
        self.loss, self.student, self.teacher, self.backward, self.factor = loss, student, teacher, backward, factor
        self.scale = GRAD_SCALE.get(student.dtype, 1.0)

    def reset(self) -> None:
        """Free the last gradients, so that every run allocates its own."""
        self.student.grad = self.teacher.grad = None

    def __call__(self) -> Tensor:
        if not self.backward:
            with torch.no_grad():
                return self.loss(self.student, self.teacher)
        loss = self.loss(self.student, self.teacher)
        scaled = loss if self.factor == 1 else loss * self.factor
        torch.autograd.backward(scaled, None if self.scale == 1 else torch.full_like(scaled, self.scale))
        return loss


class Errors(NamedTuple):
    """Relative error of the loss, relative L2 errors of the gradients that there are, eps of the loss's dtype."""

    loss: float
    gradient: float | None
    teacher_gradient: float | None
    loss_eps: float


def errors(step: Step, expected: Expected) -> Errors:
    """How far a step is from what is right."""
    step.reset()
    loss = step()
    eps = torch.finfo(loss.dtype).eps
    loss_error = abs(loss.item() - expected.loss) / abs(expected.loss)
    if not step.backward:
        return Errors(loss_error, None, None, eps)
    found, of_teacher = step.student.grad, step.teacher.grad
    step.reset()
    if found is None or (step.teacher.requires_grad and of_teacher is None):
        raise RuntimeError("a gradient is missing")
    scale = step.scale * step.factor
    gradient_error = _gradient_error(found, expected.gradient, scale)
    if of_teacher is None:
        return Errors(loss_error, gradient_error, None, eps)
    assert expected.teacher_gradient is not None
    return Errors(loss_error, gradient_error, _gradient_error(of_teacher, expected.teacher_gradient, scale), eps)


def _gradient_error(found: Tensor, expected: Tensor, scale: float) -> float:
    difference = torch.linalg.vector_norm((found.float() / scale).sub_(expected))
    return (difference / torch.linalg.vector_norm(expected)).item()


def timer_name(device: str, logits: int) -> str:
    """Which of TIMERS is for so many logits."""
    if device == "cpu":
        return "cpu"
    return "calls" if logits < SMALL else "events"


def time_steps(
    steps: dict[str, Step], device: str, repeats: int, seconds: float, how: str | None = None
) -> dict[str, list[float]]:
    """Milliseconds of every step, run in rounds so that noise meets all of them alike; `how` is one of TIMERS.

    Stops after `repeats` rounds, or after `seconds` if there were at least three. A new order in
    every round keeps one contender from always following the same other.
    """
    timer = _make_timer(how or ("events" if device == "cuda" else "cpu"))
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


def _make_timer(name: str) -> Callable[[Step], float]:
    if name == "events":
        return _CudaTimer()
    return _calls_timer if name == "calls" else _cpu_timer


def _cpu_timer(step: Step) -> float:
    step.reset()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def _calls_timer(step: Step) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(SMALL_CALLS):
        step.reset()
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / SMALL_CALLS


class _CudaTimer:
    """Event times with a cold L2; writing over it also hides the launches."""

    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, step: Step) -> float:
        step.reset()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(L2_FLUSHES):
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
    count = COPY_BYTES[device]
    source = torch.ones(count, dtype=torch.int8, device=device)
    target = torch.ones_like(source)

    def copy(_student: Tensor, _teacher: Tensor) -> Tensor:
        return target.copy_(source)

    step = Step(copy, torch.empty(0), torch.empty(0), backward=False)
    times = time_steps({"copy": step}, device, repeats=20, seconds=10)["copy"]
    return 2 * count / (statistics.median(times) / 1e3)


def peak_extra_bytes(step: Step, device: str) -> int | None:
    """Most memory beyond the inputs at any moment of a run; None where it cannot be measured.

    The gradient that the run returns is part of it.
    """
    step.reset()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
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


def keep_freed_memory() -> None:
    """From here on freed CPU memory stays the process's (glibc only), as allocators for training have it.

    New pages are cleared by the system: of large tensors that is a good part of the time, and on a virtual machine it
    depends on what the others do. Peaks of memory are to be measured before, or they would be those of its fragments.
    """
    trim_threshold, mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: 0)
    mallopt(trim_threshold, -1)  # never
    mallopt(mmap_max, 0)


def _status_bytes(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no {key} in {STATUS}")
