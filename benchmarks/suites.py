"""What `python -m benchmarks` measures: the problems, the modes of differentiation and the contenders of each."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

import kldiv_ext
from benchmarks.contenders import CONTENDERS, FROM_LOGITS, LOG_TARGETS, SLOW_TO_BUILD, Problem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPS = ("distillation_loss", "kl_div")
# Half: of half the loss, so that the incoming gradient is not 1. Teacher: the teacher's gradient as well.
# To add a mode, name it here with its minimum traffic; __main__.measure makes its step.
MODES = ("forward", "forward_backward", "forward_backward_half", "forward_backward_teacher")
FEW_MODES = MODES[:2]
# The fewest logits that move per pair. Inputs are read and gradients written; kl_div's backward, a call of its own,
# rereads the target, and for the target's gradient both inputs.
MINIMUM_TRAFFIC = dict(zip(product(OPS, MODES), (2, 3, 3, 4, 2, 4, 4, 6), strict=True))

Shape = tuple[int, int]
Names = tuple[str, ...]
QUICK_SHAPE: Shape = (8, 1000)
DEFAULT_SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((512, 32000), (128, 128256), (8, 32000), (256, 1024), (8, 16)),
    "cuda": ((4096, 32000), (4096, 128256), (64, 128256), (8, 32000), (256, 1024), (8, 16)),
}
LARGE: tuple[Shape, ...] = ((4096, 128256), (4096, 32000), (8192, 151936), (2048, 262144))
FEW_LOGITS: tuple[Shape, ...] = ((8, 32000), (256, 1024), (65536, 64))
TINY: tuple[Shape, ...] = ((8, 16),)  # the overhead of a call
RIVALS = ("eager", "eager_float", "liger")
MAIN = ("forward_kl", "jsd")  # the most used divergence, and one with a mixture
OTHERS = tuple(divergence for divergence in kldiv_ext.DIVERGENCES if divergence not in MAIN)


def shapes(text: str) -> list[Shape]:
    """An argparse type: "512x32000,128x128256", rows and vocabulary."""
    try:
        return [(int(rows), int(vocab)) for rows, vocab in (s.split("x") for s in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 512x32000,128x128256") from None


@dataclass(frozen=True)
class Task:
    """A problem, its modes and its contenders, kldiv_ext among them."""

    problem: Problem
    modes: Names
    contenders: Names

    def without_slow(self) -> "tuple[Task, Names]":
        """The task without the contenders that are slow to build, and their names."""
        slow = tuple(name for name in self.contenders if name in SLOW_TO_BUILD)
        return replace(self, contenders=tuple(name for name in self.contenders if name not in slow)), slow


# Variants, shapes, dtype, modes, contenders beside kldiv_ext.
Row = tuple[Names, tuple[Shape, ...], str, Names, Names]


def default_suite(args: argparse.Namespace) -> Iterator[Row]:
    """All divergences for the first shape and dtype, forward_kl for the others; all contenders."""
    shapes = args.shapes or ([QUICK_SHAPE] if args.quick else DEFAULT_SHAPES[args.device])
    modes = tuple(args.mode or FEW_MODES)
    for variants, (i, shape), (j, dtype) in product(
        (kldiv_ext.DIVERGENCES, LOG_TARGETS), enumerate(shapes), enumerate(args.dtype or ("bfloat16", "float32"))
    ):
        every = variants == LOG_TARGETS or args.divergence or i == j == 0
        yield variants if every else MAIN[:1], (shape,), dtype, modes, FROM_LOGITS


def gpu_suite(_: argparse.Namespace) -> Iterator[Row]:
    """All divergences, dtypes and shapes, the most telling first; slow builds in bf16 alone, once per problem."""
    slow, compiled = RIVALS + SLOW_TO_BUILD, (*RIVALS, "compile")
    both = MODES[3:]
    yield MAIN, LARGE[:1], "bfloat16", MODES[:3], slow
    yield MAIN, LARGE[:1], "bfloat16", both, RIVALS
    yield OTHERS, LARGE[:1], "bfloat16", MODES, RIVALS
    yield LOG_TARGETS, LARGE[:1], "bfloat16", FEW_MODES, compiled
    for shapes, rivals in ((LARGE[1:], slow), (FEW_LOGITS, compiled)):
        yield MAIN[:1], shapes, "bfloat16", MODES[:3], rivals
        yield MAIN[1:], shapes, "bfloat16", MODES[:3], RIVALS
        yield MAIN, shapes, "bfloat16", both, RIVALS
    yield LOG_TARGETS, LARGE[1:] + FEW_LOGITS + TINY, "bfloat16", FEW_MODES, RIVALS
    for dtype in ("float32", "float16"):
        yield MAIN, LARGE + FEW_LOGITS, dtype, FEW_MODES, RIVALS
        yield MAIN, LARGE + FEW_LOGITS, dtype, MODES[2:], ()
        yield LOG_TARGETS, LARGE + FEW_LOGITS + TINY, dtype, FEW_MODES, RIVALS
    yield OTHERS, LARGE[1:] + FEW_LOGITS, "bfloat16", FEW_MODES + both, ()
    for dtype in ("float16", "float32"):
        yield OTHERS, LARGE + FEW_LOGITS, dtype, FEW_MODES + both, ()


SUITES = {"default": default_suite, "gpu": gpu_suite}


def tasks(args: argparse.Namespace) -> list[Task]:
    """What the command line asks for, in order."""
    chosen: dict[tuple[Problem, Names], Task] = {}
    for variants, shapes, dtype, modes, contenders in SUITES[args.suite](args):
        for shape, variant in product(shapes, variants):
            op = "kl_div" if variant in LOG_TARGETS else "distillation_loss"
            divergence = variant if op == "distillation_loss" else None
            asked = ((args.op, op), (args.shapes, shape), (args.dtype, dtype), (args.divergence, divergence))
            kept = tuple(mode for mode in modes if args.mode is None or mode in args.mode)
            if not kept or any(value is not None and names and value not in names for names, value in asked):
                continue
            names = [name for name in contenders if args.contenders is None or name in args.contenders]
            problem = Problem(
                op, variant, *(QUICK_SHAPE if args.quick and args.suite == "gpu" else shape), DTYPES[dtype], args.device
            )
            task = Task(problem, kept, tuple(name for name in CONTENDERS if name in ("kldiv_ext", *names)))
            chosen.setdefault((problem, kept), task.without_slow()[0] if args.quick else task)
    return list(chosen.values())
