"""Every list of what is measured: problems, how a loss is differentiated, and by whom."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

import kldiv_ext
from benchmarks.contenders import CONTENDERS, LOG_TARGETS, SLOW_TO_BUILD, Problem
from benchmarks.modes import FEW_MODES, MODES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPS = ("distillation_loss", "kl_div")
SMALL_SHAPES = ((8, 32000), (256, 1024), (8, 16))
SHAPES = {
    "cpu": ((512, 32000), (128, 128256), *SMALL_SHAPES),
    "cuda": ((4096, 32000), (4096, 128256), (64, 128256), *SMALL_SHAPES),
}
QUICK_SHAPE = (8, 1000)

Shape = tuple[int, int]


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated selection of the known names."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    return parse


def shapes(text: str) -> list[Shape]:
    """An argparse type: "512x32000,128x128256", rows and vocabulary."""
    try:
        return [(int(rows), int(vocab)) for rows, vocab in (s.split("x") for s in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 512x32000,128x128256") from None


@dataclass(frozen=True)
class Task:
    """A problem, and who runs it in which modes. `kldiv_ext` always does."""

    problem: Problem
    modes: tuple[str, ...]
    contenders: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What the command line asks for; None is whatever the suite has."""

    device: str
    op: Sequence[str] | None = None
    divergence: Sequence[str] | None = None
    shapes: Sequence[Shape] | None = None
    dtype: Sequence[str] | None = None
    mode: Sequence[str] | None = None
    contenders: Sequence[str] | None = None
    quick: bool = False

    def narrow(self, task: Task) -> Task | None:
        """What of the task is asked for."""
        problem = task.problem
        asked = (
            (self.op, problem.op),
            (self.shapes, (problem.rows, problem.vocab)),
            (self.dtype, str(problem.dtype).removeprefix("torch.")),
            (None if problem.op == "kl_div" else self.divergence, problem.divergence),
        )
        if any(wanted is not None and value not in wanted for wanted, value in asked):
            return None
        modes = tuple(mode for mode in task.modes if self.mode is None or mode in self.mode)
        names = (self.contenders or task.contenders, task.contenders)
        contenders = tuple(name for name in CONTENDERS if name == "kldiv_ext" or all(name in some for some in names))
        return Task(problem, modes, contenders) if modes else None


def default_suite(choice: Choice) -> Iterator[Task]:
    """All divergences for the first shape and dtype, forward_kl for the others; everybody in everything."""
    shapes = choice.shapes or ([QUICK_SHAPE] if choice.quick else SHAPES[choice.device])
    dtypes = choice.dtype or ("bfloat16", "float32")
    names = tuple(choice.contenders or (name for name in CONTENDERS if not choice.quick or name not in SLOW_TO_BUILD))
    for op in choice.op or OPS:
        for (i, (rows, vocab)), (j, dtype) in product(enumerate(shapes), enumerate(dtypes)):
            variants: Sequence[str]
            if op == "kl_div":
                variants = LOG_TARGETS
            else:
                variants = choice.divergence or (kldiv_ext.DIVERGENCES if i == j == 0 else ("forward_kl",))
            for variant in variants:
                problem = Problem(op, variant, rows, vocab, DTYPES[dtype], choice.device)
                yield Task(problem, tuple(choice.mode or FEW_MODES), names)


# ---------------------------------------------------------------- on a GPU, in minutes

LARGE: tuple[Shape, ...] = ((4096, 128256), (4096, 32000), (8192, 151936), (2048, 262144))
SMALL: tuple[Shape, ...] = ((8, 32000), (256, 1024), (65536, 64))
TINY: Shape = (8, 16)  # what a call costs by itself
RIVALS = ("eager", "eager_float", "liger")
MAIN = ("forward_kl", "jsd")  # the one in use everywhere, and one with a mixture


def gpu_suite(choice: Choice) -> Iterator[Task]:
    """All divergences, dtypes and shapes, with rivals where it tells most. The most telling first: time may run out.

    Rivals that first spend seconds on a problem (SLOW_TO_BUILD) run bf16 alone: forward_kl on all shapes, and jsd on
    the first.
    """

    def task(op: str, variant: str, shape: Shape, dtype: str, modes: tuple[str, ...], rivals: tuple[str, ...]) -> Task:
        return Task(Problem(op, variant, *shape, DTYPES[dtype], choice.device), modes, ("kldiv_ext", *rivals))

    def main(shapes: Sequence[Shape], dtype: str) -> Iterator[Task]:
        for shape, divergence in product(shapes, MAIN):
            if dtype != "bfloat16":
                yield task("distillation_loss", divergence, shape, dtype, FEW_MODES, RIVALS)
                yield task("distillation_loss", divergence, shape, dtype, MODES[2:], ())
                continue
            slow = shape == LARGE[0] or divergence == "forward_kl"
            slow_rivals = () if not slow else SLOW_TO_BUILD if shape in LARGE else ("compile",)
            yield task("distillation_loss", divergence, shape, dtype, MODES[:3], RIVALS + slow_rivals)
            yield task("distillation_loss", divergence, shape, dtype, MODES[3:], RIVALS)  # compile would begin anew

    def drop_in(shapes: Sequence[Shape], dtype: str) -> Iterator[Task]:
        for shape, log_target in product(shapes, LOG_TARGETS):
            slow_rivals = ("compile",) if dtype == "bfloat16" and shape == LARGE[0] else ()
            yield task("kl_div", log_target, shape, dtype, FEW_MODES, RIVALS + slow_rivals)

    others = tuple(divergence for divergence in kldiv_ext.DIVERGENCES if divergence not in MAIN)
    yield from main(LARGE[:1], "bfloat16")
    for divergence in others:
        yield task("distillation_loss", divergence, LARGE[0], "bfloat16", MODES, RIVALS)
    yield from drop_in(LARGE[:1], "bfloat16")
    yield from main(LARGE[1:], "bfloat16")
    yield from main(SMALL, "bfloat16")
    yield from main(LARGE + SMALL, "float32")
    yield from drop_in((*LARGE[1:], *SMALL, TINY), "bfloat16")
    yield from drop_in((*LARGE, *SMALL, TINY), "float32")
    yield from main(LARGE + SMALL, "float16")
    yield from drop_in((*LARGE, *SMALL, TINY), "float16")
    modes = tuple(mode for mode in MODES if mode != "forward_backward_half")
    for dtype, shape, divergence in product(DTYPES, LARGE + SMALL, others):
        if (dtype, shape) != ("bfloat16", LARGE[0]):
            yield task("distillation_loss", divergence, shape, dtype, modes, ())


def quick(tasks: Iterator[Task]) -> Iterator[Task]:
    """Every task once on a tiny shape, without those that are slow to build."""
    seen = set()
    for task in tasks:
        problem = replace(task.problem, rows=QUICK_SHAPE[0], vocab=QUICK_SHAPE[1])
        if (problem, task.modes) not in seen:
            seen.add((problem, task.modes))
            yield Task(problem, task.modes, tuple(name for name in task.contenders if name not in SLOW_TO_BUILD))


def tasks(suite: str, choice: Choice) -> list[Task]:
    """What is to be measured, in order."""
    if suite == "default":
        return [narrow for task in default_suite(choice) if (narrow := choice.narrow(task))]
    chosen = [narrow for task in gpu_suite(choice) if (narrow := choice.narrow(task))]
    return list(quick(iter(chosen))) if choice.quick else chosen


SUITES = ("default", "gpu")
