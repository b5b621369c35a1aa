"""Divergences from hidden states: PyTorch's matrix products around the fused kernel, some positions at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import accumulation_dtype, library, ops

DEFAULT_WORKSPACE = {"cpu": 256_000_000, "cuda": 1_000_000_000}
"""Bytes that logits and their gradients may take, by device."""

PARTS = {"cpu": 2, "cuda": 4}
"""Logits beside a chunk's gradients exist for so small a part of it at a time: what a product of gradients adds to a
weight's gradient moves all of it, so that it should sum over many positions. A CPU repacks a weight for each product,
so that other products should not be much smaller."""

TILE = 128
"""Positions that a matrix product takes at a time; where there is room for so many, a part of a chunk is a multiple."""

PIECE_BYTES = 4_000_000
"""Of a gradient, how much is computed at a time on a CPU where it has to be added to a wider one."""


def logits_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of that dtype are rounded to: on CUDA, where it costs little, 16-bit ones are not."""
    return torch.float32 if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) else dtype


class Need(NamedTuple):
    """Bytes per position: of gradients of logits, or logits in their place, and of logits that have their own."""

    gradients: int
    logits: int
    parts: int  # of a chunk, for one of which there are logits at a time

    def __call__(self, positions: int) -> int:
        """Bytes for so many."""
        return positions * self.gradients + -(-positions // self.parts) * self.logits

    def chunk(self, positions: int, max_workspace: int, chunk_size: int | None) -> tuple[int, int]:
        """How many positions to take at a time, and for how many of them there are logits at a time."""
        size = chunk_size or max(1, int(max_workspace / (self.gradients + self.logits / self.parts)))
        if chunk_size is None:
            while size > 1 and self(size) > max_workspace:  # a part was rounded up
                size -= 1
            tile = TILE * self.parts
            if size >= tile:
                size -= size % tile
                chunks = -(-positions // size)
                size = -(-positions // (max(chunks, 1) * tile)) * tile  # all of one size
        size = max(1, min(size, positions))
        return size, -(-size // self.parts)


class Models(NamedTuple):
    """Where both sides' logits come from: hidden @ weight.T + bias, or, of a teacher without a weight, themselves."""

    student: Tensor  # [..., hidden]
    student_weight: Tensor  # [vocab, hidden]
    student_bias: Tensor | None  # [vocab]
    teacher: Tensor  # [..., hidden], or [..., vocab]
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None


class Workspace(NamedTuple):
    """How products are computed: in which dtype, if not their own, and for how many positions at a time."""

    autocast_dtype: torch.dtype | None
    max_workspace: int
    chunk_size: int | None

    def product_dtypes(self, models: Models) -> tuple[torch.dtype, torch.dtype]:
        """Of student and teacher. As autocast has it, float64 stays what it is; so do logits that are given."""

        def of(x: Tensor, weight: Tensor | None) -> torch.dtype:
            kept = weight is None or x.dtype == torch.float64
            return x.dtype if kept or self.autocast_dtype is None else self.autocast_dtype

        return of(models.student, models.student_weight), of(models.teacher, models.teacher_weight)

    def need(self, models: Models, columns: int, wanted: tuple[bool, bool]) -> Need:
        """For so many classes; `wanted`: the gradients of whose logits are."""
        gradients, logits = 0, 0
        weights = models.student_weight, models.teacher_weight
        for dtype, gradient, weight in zip(self.product_dtypes(models), wanted, weights, strict=True):
            wide = logits_dtype(dtype, models.student.device)
            if weight is None:  # given: they and their gradient may have to be copied, and they converted
                copies = dtype.itemsize * (1 + gradient) + (wide.itemsize if wide != dtype else 0)
                logits += models.teacher.shape[-1] * copies
                continue
            if gradient:
                gradients += columns * dtype.itemsize
            if not gradient or wide != dtype:
                logits += columns * wide.itemsize
        return Need(gradients, logits, PARTS.get(models.student.device.type, 1) if gradients and logits else 1)


Rows = slice | Tensor
"""Positions next to each other, or their numbers [rows]."""


def _part(rows: Rows, begin: int, end: int) -> Rows:
    return slice(rows.start + begin, rows.start + end) if isinstance(rows, slice) else rows[begin:end]


def _flat(tensor: Tensor) -> Tensor:
    """A view of its positions in one dimension, or, where there is none, `tensor` itself."""
    try:
        return tensor.view(tensor.numel() // tensor.shape[-1], tensor.shape[-1])
    except RuntimeError:
        return tensor


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    """Of what `_flat` gave: a view of rows that lie next to each other, or a copy."""
    if tensor.dim() > 2:
        index = torch.arange(rows.start, rows.stop, device=tensor.device) if isinstance(rows, slice) else rows
        return tensor[torch.unravel_index(index, tensor.shape[:-1])]
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _room(tensor: Tensor, rows: Rows) -> Tensor:
    """Where to write rows: a view of those that lie next to each other, or new memory, for `_put`."""
    return tensor[rows] if isinstance(rows, slice) else tensor.new_empty(len(rows), *tensor.shape[1:])


def _put(tensor: Tensor, rows: Rows, values: Tensor) -> None:
    """Values in a view of `tensor` are there already."""
    if not isinstance(rows, slice):
        tensor.index_copy_(0, rows, values.to(tensor.dtype))


class _Given:
    """A teacher whose logits [..., any number of columns] are known."""

    def __init__(self, logits: Tensor, wanted: bool, positions: int, dropped: bool) -> None:
        self.all = _flat(logits)
        new = logits.new_zeros if dropped else logits.new_empty
        self.grad = new([positions, logits.shape[-1]] if wanted else [0])
        self.wanted = wanted

    def logits(self, rows: Rows, begin: int, like: torch.dtype | None = None) -> Tensor:
        logits = _take(self.all, rows)
        wide = logits_dtype(logits.dtype, logits.device)
        return logits.to(wide) if wide == like else logits  # kernels are faster where both sides have one dtype

    def gradient(self, rows: Rows, begin: int, size: int) -> Tensor | None:
        return _room(self.grad, rows) if self.wanted else None

    def finish_part(self, rows: Rows, gradient: Tensor | None) -> None:
        if gradient is not None:
            _put(self.grad, rows, gradient)

    def finish_chunk(self, rows: Rows, size: int) -> None:
        pass

    def results(self) -> list[Tensor | None]:
        return [self.grad if self.wanted else None, None, None]


class _Projected:
    """A side whose logits are x @ weight.T + bias."""

    def __init__(
        self,
        x: Tensor,  # [..., hidden]
        weight: Tensor,  # [at least columns, hidden]
        bias: Tensor | None,  # [at least columns]
        wanted: list[bool],  # the gradients of x, weight and bias
        dtype: torch.dtype,  # of the products
        columns: int,
        dead: Tensor | None,  # [positions], those that do not count but are there all the same
        positions: int,
        dropped: bool,
        sizes: tuple[int, int, int],  # positions per chunk, and per part of it; chunks
    ) -> None:
        chunk, part, chunks = sizes
        self.x, self.dtype, self.dead = _flat(x), dtype, dead
        self.weight = weight[:columns].to(dtype)
        self.bias = None if bias is None else bias[:columns].to(dtype)
        self.weight_dtype, self.bias_dtype = weight.dtype, weight.dtype if bias is None else bias.dtype
        self.wants_x, self.wants_weight, self.wants_bias = wanted
        wide = logits_dtype(dtype, x.device)
        self.in_place = any(wanted) and wide == dtype
        self.buffer = ops.new_output(x, [0 if self.in_place else part, columns], wide)
        self.gradients = ops.new_output(x, [chunk if any(wanted) else 0, columns], dtype)
        sums = accumulation_dtype(x)
        new = x.new_zeros if dropped else x.new_empty
        self.grad_x = new([positions, x.shape[-1]] if self.wants_x else [0])
        # A single product needs no sum, and of two on a CPU, where the first is rounded, the second adds itself to it.
        total = weight.dtype if chunks <= (2 if x.device.type == "cpu" else 1) else sums
        self.grad_weight = ops.new_output(weight, weight.shape if self.wants_weight else [0], total)
        self.grad_weight[columns if chunks else 0 :] = 0
        self.grad_bias = x.new_zeros(columns if bias is None else bias.shape, dtype=sums)
        self.begun = False

    def hidden(self, rows: Rows) -> Tensor:
        """[rows, hidden]"""
        return _take(self.x, rows).to(self.dtype)

    def logits(self, rows: Rows, begin: int, like: torch.dtype | None = None) -> Tensor:
        """Of a part of a chunk, that from `begin` on, [rows, columns]."""
        hidden = self.hidden(rows)
        size = hidden.shape[0]
        out = self.gradients[begin : begin + size] if self.in_place else self.buffer[:size]
        _product(hidden, self.weight.t(), self.bias, out)
        return out

    def gradient(self, rows: Rows, begin: int, size: int) -> Tensor | None:
        """Where that of these logits goes, [rows, columns]."""
        return self.gradients[begin : begin + size] if self.gradients.numel() else None

    def finish_part(self, rows: Rows, gradient: Tensor | None) -> None:
        pass

    def finish_chunk(self, rows: Rows, size: int) -> None:
        """From the gradients of logits to those of what they were made of."""
        gradients = self.gradients[:size]  # [rows, columns]
        if self.wants_x:
            grad_x = _room(self.grad_x, rows)
            _product(gradients, self.weight, None, grad_x)
            _put(self.grad_x, rows, grad_x)
        if self.wants_weight:
            hidden = self.hidden(rows)
            if self.dead is not None:  # their gradients are 0, but 0 * nan is not
                hidden = hidden.masked_fill(self.dead[rows, None], 0)
            _add_product(gradients.t(), hidden, self.grad_weight[: gradients.shape[1]], self.begun)
        if self.wants_bias:
            # A CPU converts all that it sums to a wider dtype.
            step = size if gradients.is_cuda else max(1, PIECE_BYTES // (4 * gradients.shape[1]))
            for piece in gradients.split(step):
                self.grad_bias[: gradients.shape[1]] += piece.sum(0, dtype=self.grad_bias.dtype)
        self.begun = True

    def results(self) -> list[Tensor | None]:
        """The gradients of x, weight and bias; None for one that is not wanted."""
        grad_weight = self.grad_weight
        if self.wants_weight and grad_weight.dtype != self.weight_dtype:
            grad_weight = ops.new_output(grad_weight, grad_weight.shape, self.weight_dtype).copy_(grad_weight)
        return [
            self.grad_x if self.wants_x else None,
            grad_weight if self.wants_weight else None,
            self.grad_bias.to(self.bias_dtype) if self.wants_bias else None,
        ]


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = a @ b + bias, rounded once where PyTorch can: to float32 from 16-bit factors on CUDA."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    elif out.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias
    else:
        out.copy_(torch.mm(a, b, out=a.new_empty(out.shape)))  # `out`, so that autocast has no say


def _add_product(a: Tensor, b: Tensor, total: Tensor, begun: bool) -> None:
    """total += a @ b, or without += where nothing is there yet, [columns, hidden].

    A sum that is wider than its factors is added to in place on CUDA. On a CPU no product of PyTorch's has a wider
    result: each is rounded to its factors' dtype, and added in float32, in pieces that stay in the cache.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b) if begun else torch.mm(a, b, out=total)
    elif total.is_cuda and total.dtype == torch.float32:
        if begun:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        step = max(TILE, PIECE_BYTES // (b.shape[1] * b.element_size()))
        room = b.new_empty(min(step, len(a)), b.shape[1])
        for piece, sums in zip(a.split(step), total.split(step), strict=True):
            product = torch.mm(piece, b, out=room[: len(piece)])
            sums.add_(product) if begun else sums.copy_(product)


def _linear_distillation_loss(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor | None,
    soft_scale: float,
    hard_scale: float,
    reduction: str,
    divergence: str,
    parameter: float,
    temperature: float,
    logit_scale: list[float],
    logit_softcap: list[float],
    valid_vocab: int | None,
    grad_output: Tensor | None,
    autocast_dtype: torch.dtype | None,
    max_workspace: int,
    chunk_size: int | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The operator; csrc/ops.cpp says what it is given and returns."""
    positions = student.numel() // student.shape[-1]
    divisor = 1
    if reduction == "mean":
        divisor = max(positions, 1)
    elif reduction == "batchmean" and student.dim() > 1:
        divisor = max(student.shape[0], 1)
    rows: Rows = slice(0, positions)
    count = positions
    dead = None if row_scale is None else row_scale == 0
    if dead is not None and not dead.is_cuda:  # they need not be there: one can look
        if dead.any():
            rows = (~dead).nonzero().flatten()
            count = rows.shape[0]
        dead = None
    if soft_scale == 0 and hard_scale == 0:
        count = 0
    dropped = count < positions
    columns = valid_vocab or student_weight.shape[0]
    wanted_of = any(wanted[:3]), any(wanted[3:])
    models = Models(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias)
    workspace = Workspace(autocast_dtype, max_workspace, chunk_size)
    dtypes = workspace.product_dtypes(models)
    chunk, part = workspace.need(models, columns, wanted_of).chunk(count, max_workspace, chunk_size)
    sizes = chunk, part, -(-count // chunk)

    shared = columns, dead, positions, dropped, sizes
    of_student = _Projected(student, student_weight, student_bias, wanted[:3], dtypes[0], *shared)
    of_teacher = (
        _Given(teacher, wanted[3], positions, dropped)
        if teacher_weight is None
        else _Projected(teacher, teacher_weight, teacher_bias, wanted[3:], dtypes[1], *shared)
    )
    dtype = accumulation_dtype(student, teacher)
    losses = student.new_zeros([positions], dtype=dtype)
    options = soft_scale / divisor, hard_scale / divisor, "none", divergence, parameter, temperature

    def part_of_chunk(some: Rows, at: int) -> None:
        """Losses and gradients of logits, of the rows that begin at `at` in their chunk."""
        s = of_student.logits(some, at)
        t = of_teacher.logits(some, at, s.dtype)
        grad_t = of_teacher.gradient(some, at, s.shape[0])
        row_losses = _room(losses, some)
        ops.distillation_loss_out(
            s,
            t,
            None if labels is None else labels[some],
            None if row_scale is None else row_scale[some],
            *options,
            logit_scale,
            logit_softcap,
            columns,
            grad_output[some] if grad_output is not None and grad_output.dim() > 0 else grad_output,
            row_losses,
            of_student.gradient(some, at, s.shape[0]),
            grad_t,
        )
        _put(losses, some, row_losses)
        of_teacher.finish_part(some, grad_t)

    for begin in range(0, count, chunk):
        size = min(chunk, count - begin)
        for at in range(0, size, part):
            part_of_chunk(_part(rows, begin + at, begin + min(at + part, size)), at)
        whole = _part(rows, begin, begin + size)
        of_student.finish_chunk(whole, size)
        of_teacher.finish_chunk(whole, size)
    loss = losses if reduction == "none" else losses.sum(dtype=torch.float64).to(dtype)
    given = student, student_weight, student_bias, teacher, teacher_weight, teacher_bias
    gradients = []
    for source, gradient in zip(given, (*of_student.results(), *of_teacher.results()), strict=True):
        like = student if source is None else source
        gradients.append(like.new_empty([0]) if gradient is None else gradient.reshape(like.shape))
    return loss, *gradients


library.impl("linear_distillation_loss", _linear_distillation_loss, "CPU")
library.impl("linear_distillation_loss", _linear_distillation_loss, "CUDA")
