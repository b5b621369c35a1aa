"""The operator linear_distillation_loss: PyTorch's matrix products and the fused kernel over chunks of positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._library import accumulation_dtype, library, ops
from .options import OperatorOptions

DEFAULT_WORKSPACE = {"cpu": 256_000_000, "cuda": 1_000_000_000}
"""Bytes for a chunk's logits and their gradients, by device."""

PARTS = {"cpu": 2, "cuda": 4}
"""Parts per chunk: a whole chunk's gradients exist at a time, but the logits of only one part. A weight-gradient
product reads and writes the whole weight gradient, so it should sum over many positions; logits need no such size. A
CPU repacks the weight for every product, so its parts are larger."""

TILE = 128
"""Positions per tile of a matrix product; a part of at least that size is a multiple of it."""

PIECE_BYTES = 4_000_000
"""Bytes of a gradient that a CPU computes at a time before it adds them to a sum of a wider dtype."""


def logits_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of logits whose factors have `dtype`: CUDA products of 16-bit factors stay float32."""
    return torch.float32 if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) else dtype


class BytesPerPosition(NamedTuple):
    """The memory that a chunk takes."""

    gradients: int  # gradients of logits, or logits that they overwrite
    logits: int  # logits with memory of their own
    parts: int  # of a chunk; only one part has such logits at a time

    def total(self, positions: int) -> int:
        """The bytes of a chunk of so many positions."""
        return positions * self.gradients + -(-positions // self.parts) * self.logits

    def chunk(self, positions: int, max_workspace: int, chunk_size: int | None) -> tuple[int, int]:
        """(positions per chunk, positions per part of a chunk)"""
        size = chunk_size or max(1, int(max_workspace / (self.gradients + self.logits / self.parts)))
        if chunk_size is None:
            while size > 1 and self.total(size) > max_workspace:  # the part was rounded up
                size -= 1
            tile = TILE * self.parts
            if size >= tile:
                size -= size % tile
                chunks = -(-positions // size)
                size = -(-positions // (max(chunks, 1) * tile)) * tile  # chunks of equal size
        size = max(1, min(size, positions))
        return size, -(-size // self.parts)


class Models(NamedTuple):
    """What both sides' logits are computed from: hidden @ weight.T + bias. A teacher without a weight holds logits."""

    student: Tensor  # [..., hidden]
    student_weight: Tensor  # [vocab, hidden]
    student_bias: Tensor | None  # [vocab]
    teacher: Tensor  # [..., hidden], or [..., vocab]
    teacher_weight: Tensor | None  # [vocab, hidden]
    teacher_bias: Tensor | None  # [vocab]


class Workspace(NamedTuple):
    """How products are computed: their dtype, if it is not that of the factors, and the size of a chunk."""

    autocast_dtype: torch.dtype | None
    max_workspace: int
    chunk_size: int | None

    def product_dtypes(self, models: Models) -> tuple[torch.dtype, torch.dtype]:
        """(student, teacher). Autocast leaves float64 and given logits alone."""

        def of(x: Tensor, weight: Tensor | None) -> torch.dtype:
            kept = weight is None or x.dtype == torch.float64
            return x.dtype if kept or self.autocast_dtype is None else self.autocast_dtype

        return of(models.student, models.student_weight), of(models.teacher, models.teacher_weight)

    def bytes_per_position(self, models: Models, columns: int, needs_grad: tuple[bool, bool]) -> BytesPerPosition:
        """For `columns` classes; needs_grad: whether (student, teacher) need a gradient of their logits."""
        gradients, logits = 0, 0
        weights = models.student_weight, models.teacher_weight
        for dtype, needed, weight in zip(self.product_dtypes(models), needs_grad, weights, strict=True):
            wide = logits_dtype(dtype, models.student.device)
            if weight is None:  # given logits and their gradient may be copied, and the logits converted
                copies = dtype.itemsize * (1 + needed) + (wide.itemsize if wide != dtype else 0)
                logits += models.teacher.shape[-1] * copies
                continue
            if needed:
                gradients += columns * dtype.itemsize
            if not needed or wide != dtype:
                logits += columns * wide.itemsize
        parts = PARTS.get(models.student.device.type, 1) if gradients and logits else 1
        return BytesPerPosition(gradients, logits, parts)


Rows = slice | Tensor
"""Contiguous positions, or the indices [rows] of positions."""


def _part(rows: Rows, begin: int, end: int) -> Rows:
    return slice(rows.start + begin, rows.start + end) if isinstance(rows, slice) else rows[begin:end]


def _flat(tensor: Tensor) -> Tensor:
    """A [positions, columns] view, or `tensor` itself where its strides allow none."""
    try:
        return tensor.view(tensor.numel() // tensor.shape[-1], tensor.shape[-1])
    except RuntimeError:
        return tensor


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of a result of `_flat`: a view of contiguous positions, else a copy."""
    if tensor.dim() > 2:
        index = torch.arange(rows.start, rows.stop, device=tensor.device) if isinstance(rows, slice) else rows
        return tensor[torch.unravel_index(index, tensor.shape[:-1])]
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _output_rows(tensor: Tensor, rows: Rows) -> Tensor:
    """Memory for rows of `tensor`: a view of contiguous positions, else a new tensor for `_store`."""
    return tensor[rows] if isinstance(rows, slice) else tensor.new_empty(len(rows), *tensor.shape[1:])


def _store(tensor: Tensor, rows: Rows, values: Tensor) -> None:
    """Write `values`, from `_output_rows`, into `tensor`; a view is there already."""
    if not isinstance(rows, slice):
        tensor.index_copy_(0, rows, values.to(tensor.dtype))


class _Given:
    """A teacher given as logits."""

    def __init__(
        self,
        logits: Tensor,  # [..., at least columns]
        needs_grad: bool,
        positions: int,
        skips: bool,  # whether some positions are in no chunk
    ) -> None:
        self.all = _flat(logits)
        new = logits.new_zeros if skips else logits.new_empty
        self.grad = new([positions, logits.shape[-1]] if needs_grad else [0])
        self.needs_grad = needs_grad

    def logits(self, rows: Rows, begin: int, like: torch.dtype | None = None) -> Tensor:
        logits = _take(self.all, rows)
        wide = logits_dtype(logits.dtype, logits.device)
        return logits.to(wide) if wide == like else logits  # one dtype on both sides is faster

    def gradient(self, rows: Rows, begin: int, size: int) -> Tensor | None:
        return _output_rows(self.grad, rows) if self.needs_grad else None

    def finish_part(self, rows: Rows, gradient: Tensor | None) -> None:
        if gradient is not None:
            _store(self.grad, rows, gradient)

    def finish_chunk(self, rows: Rows, size: int) -> None:
        pass

    def results(self) -> list[Tensor | None]:
        return [self.grad if self.needs_grad else None, None, None]


class _Projected:
    """A side whose logits are x @ weight.T + bias."""

    def __init__(
        self,
        x: Tensor,  # [..., hidden]
        weight: Tensor,  # [at least columns, hidden]
        bias: Tensor | None,  # [at least columns]
        needs_grad: list[bool],  # x, weight, bias
        dtype: torch.dtype,  # of the products
        columns: int,
        ignored: Tensor | None,  # [positions], positions in chunks that do not count
        positions: int,
        skips: bool,  # whether some positions are in no chunk
        sizes: tuple[int, int, int],  # positions per chunk, positions per part of a chunk, number of chunks
    ) -> None:
        chunk, part, chunks = sizes
        self.x, self.dtype, self.ignored = _flat(x), dtype, ignored
        self.weight = weight[:columns].to(dtype)
        self.bias = None if bias is None else bias[:columns].to(dtype)
        self.weight_dtype, self.bias_dtype = weight.dtype, weight.dtype if bias is None else bias.dtype
        self.needs_grad_x, self.needs_grad_weight, self.needs_grad_bias = needs_grad
        wide = logits_dtype(dtype, x.device)
        self.in_place = any(needs_grad) and wide == dtype
        self.buffer = ops.new_output(x, [0 if self.in_place else part, columns], wide)
        self.gradients = ops.new_output(x, [chunk if any(needs_grad) else 0, columns], dtype)
        sums = accumulation_dtype(x)
        new = x.new_zeros if skips else x.new_empty
        self.grad_x = new([positions, x.shape[-1]] if self.needs_grad_x else [0])
        # One product needs no wider sum; on a CPU, which rounds the first product anyway, two need none either.
        total = weight.dtype if chunks <= (2 if x.device.type == "cpu" else 1) else sums
        self.grad_weight = ops.new_output(weight, weight.shape if self.needs_grad_weight else [0], total)
        self.grad_weight[columns if chunks else 0 :] = 0
        self.grad_bias = x.new_zeros(columns if bias is None else bias.shape, dtype=sums)
        self.has_sum = False

    def hidden(self, rows: Rows) -> Tensor:
        """[rows, hidden]"""
        return _take(self.x, rows).to(self.dtype)

    def logits(self, rows: Rows, begin: int, like: torch.dtype | None = None) -> Tensor:
        """The logits of the part that begins at `begin` in its chunk, [rows, columns]."""
        hidden = self.hidden(rows)
        size = hidden.shape[0]
        out = self.gradients[begin : begin + size] if self.in_place else self.buffer[:size]
        _product(hidden, self.weight.t(), self.bias, out)
        return out

    def gradient(self, rows: Rows, begin: int, size: int) -> Tensor | None:
        """Memory for the gradient of these logits, [rows, columns]."""
        return self.gradients[begin : begin + size] if self.gradients.numel() else None

    def finish_part(self, rows: Rows, gradient: Tensor | None) -> None:
        pass

    def finish_chunk(self, rows: Rows, size: int) -> None:
        """From the gradients of a chunk's logits to the gradients of x, weight and bias."""
        gradients = self.gradients[:size]  # [rows, columns]
        if self.needs_grad_x:
            grad_x = _output_rows(self.grad_x, rows)
            _product(gradients, self.weight, None, grad_x)
            _store(self.grad_x, rows, grad_x)
        if self.needs_grad_weight:
            hidden = self.hidden(rows)
            if self.ignored is not None:  # the gradients of their logits are 0, but 0 * nan is nan
                hidden = hidden.masked_fill(self.ignored[rows, None], 0)
            _add_product(gradients.t(), hidden, self.grad_weight[: gradients.shape[1]], self.has_sum)
        if self.needs_grad_bias:
            # A CPU copies its whole argument to the dtype of the sum.
            step = size if gradients.is_cuda else max(1, PIECE_BYTES // (4 * gradients.shape[1]))
            for piece in gradients.split(step):
                self.grad_bias[: gradients.shape[1]] += piece.sum(0, dtype=self.grad_bias.dtype)
        self.has_sum = True

    def results(self) -> list[Tensor | None]:
        """The gradients of x, weight and bias; None for one that is not needed."""
        grad_weight = self.grad_weight
        if self.needs_grad_weight and grad_weight.dtype != self.weight_dtype:
            grad_weight = ops.new_output(grad_weight, grad_weight.shape, self.weight_dtype).copy_(grad_weight)
        return [
            self.grad_x if self.needs_grad_x else None,
            grad_weight if self.needs_grad_weight else None,
            self.grad_bias.to(self.bias_dtype) if self.needs_grad_bias else None,
        ]


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = a @ b + bias, rounded once where PyTorch can: CUDA has float32 products of 16-bit factors."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    elif out.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias
    else:
        out.copy_(torch.mm(a, b, out=a.new_empty(out.shape)))  # with out=, autocast does not apply


def _add_product(a: Tensor, b: Tensor, total: Tensor, has_sum: bool) -> None:
    """total += a @ b, or total = a @ b if it has no sum yet, [columns, hidden].

    A total wider than the factors is accumulated in place on CUDA. PyTorch's CPU products have the dtype of their
    factors: each is rounded, and added in float32 in pieces that fit the cache.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b) if has_sum else torch.mm(a, b, out=total)
    elif total.is_cuda and total.dtype == torch.float32:
        if has_sum:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        step = max(TILE, PIECE_BYTES // (b.shape[1] * b.element_size()))
        buffer = b.new_empty(min(step, len(a)), b.shape[1])
        for piece, sums in zip(a.split(step), total.split(step), strict=True):
            product = torch.mm(piece, b, out=buffer[: len(piece)])
            sums.add_(product) if has_sum else sums.copy_(product)


def _linear_distillation_loss(
    student: Tensor,  # [..., hidden]
    student_weight: Tensor,  # [vocab, hidden]
    student_bias: Tensor | None,  # [vocab]
    teacher: Tensor,  # [..., hidden], or [..., vocab] without a weight
    teacher_weight: Tensor | None,  # [vocab, hidden]
    teacher_bias: Tensor | None,  # [vocab]
    labels: Tensor | None,  # [positions]
    row_scale: Tensor | None,  # [positions]
    *others: Any,
) -> tuple[Tensor, ...]:
    """The operator; csrc/ops.cpp describes its arguments and results."""
    *flat_options, grad_output, autocast_dtype, max_workspace, chunk_size, needs_grad = others
    options = OperatorOptions(*flat_options)
    workspace = Workspace(autocast_dtype, max_workspace, chunk_size)
    positions = student.numel() // student.shape[-1]
    rows: Rows = slice(0, positions)
    count = positions
    ignored = None if row_scale is None else row_scale == 0
    if ignored is not None and not ignored.is_cuda:  # the host can read which positions count, and skip the others
        if ignored.any():
            rows = (~ignored).nonzero().flatten()
            count = rows.shape[0]
        ignored = None
    if options.soft_scale == 0 and options.hard_scale == 0:
        count = 0
    columns = options.valid_vocab or student_weight.shape[0]
    models = Models(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias)
    needs_logits_grad = any(needs_grad[:3]), any(needs_grad[3:])
    per_position = workspace.bytes_per_position(models, columns, needs_logits_grad)
    chunk, part = per_position.chunk(count, max_workspace, chunk_size)

    skips = count < positions
    shared = columns, ignored, positions, skips, (chunk, part, -(-count // chunk))
    student_dtype, teacher_dtype = workspace.product_dtypes(models)
    student_side = _Projected(student, student_weight, student_bias, needs_grad[:3], student_dtype, *shared)
    teacher_side = (
        _Given(teacher, needs_grad[3], positions, skips)
        if teacher_weight is None
        else _Projected(teacher, teacher_weight, teacher_bias, needs_grad[3:], teacher_dtype, *shared)
    )
    dtype = accumulation_dtype(student, teacher)
    losses = student.new_zeros([positions], dtype=dtype)
    options = options._replace(valid_vocab=columns)

    def compute_part(some: Rows, begin: int) -> None:
        """Losses and gradients of logits, of the positions that begin at `begin` in their chunk."""
        student_logits = student_side.logits(some, begin)
        size = student_logits.shape[0]
        teacher_logits = teacher_side.logits(some, begin, student_logits.dtype)
        teacher_gradient = teacher_side.gradient(some, begin, size)
        part_losses = _output_rows(losses, some)
        ops.distillation_loss_out(
            student_logits,
            teacher_logits,
            None if labels is None else labels[some],
            None if row_scale is None else row_scale[some],
            *options,
            grad_output[some] if grad_output is not None and grad_output.dim() > 0 else grad_output,
            part_losses,
            student_side.gradient(some, begin, size),
            teacher_gradient,
        )
        _store(losses, some, part_losses)
        teacher_side.finish_part(some, teacher_gradient)

    for begin in range(0, count, chunk):
        size = min(chunk, count - begin)
        for at in range(0, size, part):
            compute_part(_part(rows, begin + at, begin + min(at + part, size)), at)
        whole = _part(rows, begin, begin + size)
        student_side.finish_chunk(whole, size)
        teacher_side.finish_chunk(whole, size)
    loss = losses if options.divisor is None else losses.sum(dtype=torch.float64).to(dtype)
    gradients = []
    for source, gradient in zip(models, (*student_side.results(), *teacher_side.results()), strict=True):
        like = student if source is None else source
        gradients.append(like.new_empty([0]) if gradient is None else gradient.reshape(like.shape))
    return loss, *gradients


library.impl("linear_distillation_loss", _linear_distillation_loss, "CPU")
library.impl("linear_distillation_loss", _linear_distillation_loss, "CUDA")
