"""How time, memory, errors and copy bandwidth are measured."""

import contextlib
import ctypes
import gc
import math
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.promises import GRADIENT_PROMISE, LOSS_PROMISE
from benchmarks.results import Record, failure

Loss = Callable[..., Tensor]
# fp16 gradients of a mean over rows underflow unscaled; a GradScaler scales them, too.
GRAD_SCALE = {torch.float16: 2.0**15}
# A gradient with a larger relative error is another computation, and its time means nothing.
ABSURD_GRADIENT_ERROR = 0.5
# Below this number of logits the overhead of a call matters: on a GPU, the launches.
SMALL = 2**23
SMALL_CALLS = 50
COPY_BYTES = {"cpu": 2**29, "cuda": 2**32}
# Before each timed call the L2 cache is overwritten so often that this takes longer than the launches of the call.
L2_FLUSHES, L2_FLUSH_BYTES = 8, 2**28


class Step:
    """One run of a loss, or of `factor` times the loss and its backward."""

    def __init__(self, loss: Loss, *inputs: Tensor, backward: bool, factor: float = 1.0) -> None:
        self.loss, self.inputs, self.backward, self.factor = loss, inputs, backward, factor
        self.scale = GRAD_SCALE.get(inputs[0].dtype, 1.0) if inputs else 1.0

    @property
    def gradient_bytes(self) -> int:
        return sum(x.nbytes for x in self.inputs if x.requires_grad) if self.backward else 0

    def reset(self) -> None:
        """Free the gradients, so that every run allocates its own."""
        for x in self.inputs:
            x.grad = None

    def __call__(self) -> Tensor:
        if not self.backward:
            with torch.no_grad():
                return self.loss(*self.inputs)
        loss = self.loss(*self.inputs)
        scaled = loss if self.factor == 1 else loss * self.factor
        torch.autograd.backward(scaled, None if self.scale == 1 else torch.full_like(scaled, self.scale))
        return loss


class Expected(NamedTuple):
    """fp64 loss and gradients from the rounded inputs; gradients may be stored as fp32."""

    loss: float
    gradients: tuple[Tensor, ...]  # of the inputs that require a gradient, in their order
    entropy: float = 0.0  # the teacher's, where a contender's loss includes it


def verify(
    step: Step, expected: Expected, names: tuple[str, ...], promised: bool = False, offset: float = 0.0
) -> Record:
    """Relative errors, of the gradients under `names`, and a status: ok, WRONG, or the failure.

    A promised step must be as accurate as kldiv_ext promises, others must compute the same, plus `offset` in the loss.
    """
    step.reset()
    try:
        loss = step()
        found = [x.grad for x in step.inputs if x.requires_grad] if step.backward else []
        gradients = [gradient for gradient in found if gradient is not None]
        if len(gradients) < len(found):
            raise RuntimeError("a gradient is missing")
    except Exception as error:  # a contender's failure is a result, not the end of the run
        if step.inputs[0].is_cuda:
            torch.cuda.synchronize()  # raises if the device is lost: nothing can be measured after that
        return {"gradient_bytes": step.gradient_bytes, "status": failure(error)}
    finally:
        step.reset()
    scale = step.scale * step.factor
    errors = {"loss_error": abs(loss.item() - offset - expected.loss) / abs(expected.loss)}
    for name, gradient, exact in zip(names, gradients, expected.gradients, strict=False):
        difference = torch.linalg.vector_norm((gradient.float() / scale).sub_(exact))
        errors[name] = (difference / torch.linalg.vector_norm(exact)).item()
    # A loss may be off by the rounding of its dtype. All comparisons are False for NaN.
    largest = max(LOSS_PROMISE, torch.finfo(loss.dtype).eps) if promised else math.inf
    limits = [largest, *[GRADIENT_PROMISE if promised else ABSURD_GRADIENT_ERROR] * len(found)]
    right = all(error <= limit and error < math.inf for error, limit in zip(errors.values(), limits, strict=True))
    return {"gradient_bytes": step.gradient_bytes, **errors, "status": "ok" if right else "WRONG"}


def timer_name(device: str, logits: int) -> str:
    """How that many logits are timed: by the wall clock of single calls (cpu) or of many (calls), or by CUDA events."""
    return "cpu" if device == "cpu" else "calls" if logits < SMALL else "events"


def time_steps(steps: dict[str, Step], how: str, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every step, `how` being a timer_name.

    Steps run in rounds, so that noise meets all of them alike, in a new random order each round, so that none always
    follows the same other one. Stops after `repeats` rounds, or after `seconds` and at least three rounds.
    """
    timer = _CudaTimer() if how == "events" else _calls_timer if how == "calls" else _wall_clock
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


def _wall_clock(step: Step) -> float:
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
    """CUDA events. Overwriting the L2 cache first also hides the launches."""

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


def quantiles(times: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, as a result has them."""
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {"ms_p20": fifths[0], "ms_p50": statistics.median(times), "ms_p80": fifths[3]}


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a large `copy_`."""
    count = COPY_BYTES[device]
    source = torch.ones(count, dtype=torch.int8, device=device)
    target = torch.ones_like(source)
    step = Step(lambda: target.copy_(source), backward=False)
    times = time_steps({"copy": step}, timer_name(device, count), repeats=20, seconds=10)["copy"]
    return 2 * count / (statistics.median(times) / 1e3)


def peak_extra_bytes(step: Step, device: str) -> int | None:
    """The peak memory of a run beyond its inputs, its gradients included; None where it cannot be measured."""
    step.reset()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    # Return freed heap memory to the system (glibc only): reused memory would not show in the peak.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - before)


def keep_freed_memory() -> None:
    """From now on freed CPU memory stays with the process (glibc only), as with allocators made for training.

    The system clears every new page. For large tensors that is much of the time, and on a virtual machine it depends
    on the neighbours. Measure peak memory before this call: afterwards the heap's fragments count as well.
    """
    trim_threshold, mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: 0)
    mallopt(trim_threshold, -1)  # never
    mallopt(mmap_max, 0)


def _status_bytes(key: str) -> int:
    return 1024 * int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
