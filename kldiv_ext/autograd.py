"""The torch.autograd.Functions, and the operators' own autograd kernels beneath them.

A Function runs the fused operators; composites of plain operators replace it under torch.func transforms and
forward-mode AD. Every operator also has an autograd kernel of its own: the compiler may inline a Function and call its
operators while gradients are tracked, and without that kernel the gradients would silently be zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._library import accumulation_dtype, library, ops
from .linear import Models, Workspace
from .options import OperatorOptions


def composite_needed(*tensors: Tensor | None) -> bool:
    """Whether a mode is active that only composites support: a torch.func transform or forward-mode AD."""
    return _transforming() or (not torch.compiler.is_compiling() and _any_tangent(tensors))


def _transforming() -> bool:
    # Compared by type: under the compiler the interpreter stack is never None.
    return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)


def _any_tangent(tensors: Iterable[Any]) -> bool:
    """Whether a tensor carries a tangent of forward-mode AD, whose only level is 0."""
    if torch.autograd.forward_ad._current_level < 0 and not _transforming():
        return False  # the usual case; the tensors need not be inspected
    return any(isinstance(t, Tensor) and torch._VF._unpack_dual(t, level=0)[1] is not None for t in tensors)


def composite_distillation_loss(
    student: Tensor,  # [..., V]
    teacher: Tensor,  # [..., V]
    labels: Tensor | None,  # [rows]
    row_scale: Tensor | None,  # [rows]
    options: OperatorOptions,
) -> Tensor:
    """The loss of the operator `distillation_loss`, from plain operators in float64."""
    batch, dtype = student.shape[:-1], accumulation_dtype(student, teacher)
    if labels is not None:
        labels = labels.reshape(batch)
    if options.soft_scale == 0 and options.hard_scale == 0:
        row_scale = torch.zeros(batch, dtype=dtype, device=student.device).reshape(-1)
    if row_scale is not None:  # a row whose scale is 0 is not read
        ignored = (row_scale == 0).reshape(batch)
        student, teacher = student.masked_fill(ignored[..., None], 0), teacher.masked_fill(ignored[..., None], 0)
        labels = None if labels is None else labels.masked_fill(ignored, 0)
    student, teacher = (
        reference.effective_logits(z, scale, softcap, options.valid_vocab)
        for z, scale, softcap in zip((student, teacher), options.logit_scale, options.logit_softcap, strict=True)
    )
    losses = reference.weighted_losses(
        student,
        teacher,
        labels,
        options.soft_scale,
        options.hard_scale,
        options.divergence,
        options.parameter,
        options.temperature,
    ).reshape(-1)
    if row_scale is not None:
        losses = losses * row_scale
    return reference.reduced(losses, options.divisor).to(dtype)


def _run(operator: Any, *args: Any) -> Any:
    """Call an operator from within a Function, below its autograd kernel, whose overhead dominates on small tensors."""
    if torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward that also takes inference tensors, which a teacher's logits often are and autograd refuses.

    Those are kept on ctx: they have neither history nor version, so autograd has nothing to check about them.
    """
    kept = [t is not None and not torch.compiler.is_compiling() and t.is_inference() for t in tensors]
    ctx.inference = [t if k else None for t, k in zip(tensors, kept, strict=True)]
    ctx.save_for_backward(*(None if k else t for t, k in zip(tensors, kept, strict=True)))


def _saved(ctx: Any) -> list[Any]:
    return [s if i is None else i for s, i in zip(ctx.saved_tensors, ctx.inference, strict=True)]


class DistillationLoss(torch.autograd.Function):
    """distillation_loss with its gradients.

    The forward makes the gradients where that is free. The backward makes them, from the row constants, in three cases:
    without a reduction; in place; and in float16, where a gradient that is stored before the GradScaler's factor is
    applied underflows.
    The logits are saved in every case, for a backward that is itself differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [..., V]
        teacher: Tensor,  # [..., V]
        labels: Tensor | None,  # [rows]
        row_scale: Tensor | None,  # [rows]
        options: OperatorOptions,
        in_place: bool,
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[:2]
        ctx.options = options
        ctx.in_place = in_place and needs_grad[0] and not torch.compiler.is_compiling()
        ctx.grads_in_forward = (
            options.divisor is not None
            and not ctx.in_place
            and all(t.dtype != torch.float16 for t, n in zip((student, teacher), needs_grad, strict=True) if n)
        )
        loss, row_constants, *gradients = _run(
            ops.distillation_loss.default,
            *(student, teacher, labels, row_scale, *options, *needs_grad, ctx.grads_in_forward),
        )
        _save(ctx, student, teacher, labels, row_scale, *(gradients if ctx.grads_in_forward else [row_constants]))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[:2]
        student, teacher, labels, row_scale, *computed = _saved(ctx)
        if _differentiated(grad_output):
            if ctx.in_place:
                raise RuntimeError("inplace_backward=True: the gradient cannot be differentiated again or batched")

            def composite(student: Tensor, teacher: Tensor) -> Tensor:
                return composite_distillation_loss(student, teacher, labels, row_scale, ctx.options)

            computed = _gradients(composite, (student, teacher), needs_grad, grad_output)
        elif ctx.grads_in_forward:
            computed = [_scaled(g, grad_output) if n else g for g, n in zip(computed, needs_grad, strict=True)]
        else:
            args = (grad_output.contiguous(), student, teacher, *computed, labels, row_scale, *ctx.options)
            if ctx.in_place:
                grad_teacher = _run(ops.distillation_loss_backward_.default, *args, needs_grad[1])
                torch.autograd.graph.increment_version(student)  # autograd raises where the old logits are needed
                computed = [student.detach(), grad_teacher]
            else:
                computed = _run(ops.distillation_loss_backward.default, *args, *needs_grad)
        return *_only(computed, needs_grad), None, None, None, None


def composite_linear_distillation_loss(
    models: Models,
    labels: Tensor | None,  # [rows]
    row_scale: Tensor | None,  # [rows]
    options: OperatorOptions,
) -> Tensor:
    """The loss of the operator `linear_distillation_loss`, from plain operators in float64."""

    def logits(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None:
            return hidden
        if row_scale is not None:  # 0 * nan would reach the weight's gradient
            hidden = hidden.masked_fill((row_scale == 0).reshape(hidden.shape[:-1])[..., None], 0)
        product = hidden.double() @ weight[: options.valid_vocab].double().t()
        return product if bias is None else product + bias[: options.valid_vocab].double()

    student = logits(models.student, models.student_weight, models.student_bias)
    teacher = logits(models.teacher, models.teacher_weight, models.teacher_bias)
    dtype = accumulation_dtype(models.student, models.teacher)
    return composite_distillation_loss(student, teacher, labels, row_scale, options).to(dtype)


class LinearDistillationLoss(torch.autograd.Function):
    """linear_distillation_loss with its gradients, made in forward or in backward as those of `DistillationLoss`.

    A backward that makes them computes the logits again. All of `models` are saved, for a backward that is itself
    differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [..., H]
        student_weight: Tensor,  # [V, H]
        student_bias: Tensor | None,  # [V]
        teacher: Tensor,  # [..., H'], or [..., V] without a weight
        teacher_weight: Tensor | None,  # [V, H']
        teacher_bias: Tensor | None,  # [V]
        labels: Tensor | None,  # [rows]
        row_scale: Tensor | None,  # [rows]
        options: OperatorOptions,
        workspace: Workspace,
    ) -> Tensor:
        models = Models(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias)
        needs_grad = ctx.needs_input_grad[:6]
        ctx.options, ctx.workspace = options, workspace
        dtypes = workspace.product_dtypes(models)
        ctx.grads_in_forward = options.divisor is not None and all(
            dtype != torch.float16 or not any(n)
            for dtype, n in zip(dtypes, (needs_grad[:3], needs_grad[3:]), strict=True)
        )
        now = [n and ctx.grads_in_forward for n in needs_grad]
        loss, *gradients = _run(
            ops.linear_distillation_loss.default, *models, labels, row_scale, *options, None, *workspace, now
        )
        _save(ctx, *models, labels, row_scale, *(gradients if ctx.grads_in_forward else []))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[:6]
        saved = _saved(ctx)
        models, (labels, row_scale, *computed) = Models(*saved[:6]), saved[6:]
        if _differentiated(grad_output):

            def composite(*views: Any) -> Tensor:
                return composite_linear_distillation_loss(Models(*views), labels, row_scale, ctx.options)

            computed = _gradients(composite, models, needs_grad, grad_output)
        elif ctx.grads_in_forward:
            computed = [_scaled(g, grad_output) if n else g for g, n in zip(computed, needs_grad, strict=True)]
        else:
            arguments = (*models, labels, row_scale, *ctx.options, grad_output.contiguous(), *ctx.workspace)
            computed = _run(ops.linear_distillation_loss.default, *arguments, list(needs_grad))[1:]
        return *_only(computed, needs_grad), None, None, None, None


def _only(gradients: Iterable[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are needed; None for the others."""
    return [g if n else None for g, n in zip(gradients, needs_grad, strict=True)]


def _differentiated(grad_output: Tensor, *saved: Tensor | None) -> bool:
    """Whether a backward is itself differentiated or transformed; under the compiler it never is."""
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor(grad_output)  # by torch.autograd.grad(is_grads_batched=True)
    return batched or torch.is_grad_enabled() or composite_needed(grad_output, *saved)


def _gradients(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs_grad: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    """The needed gradients of a composite loss, differentiable again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: a tensor that is given twice gets two gradients.
        views = [None if x is None else x.view_as(x) for x in inputs]
        sources = [x for x, n in zip(views, needs_grad, strict=True) if n and x is not None]
        gradients = iter(torch.autograd.grad(loss(*views), sources, grad_output, create_graph=again))
    return [next(gradients) if n else None for n in needs_grad]


def _scaled(gradient: Tensor, grad_output: Tensor) -> Tensor:
    """gradient * grad_output without a synchronization; in place where no later backward can observe it."""
    if torch.compiler.is_compiling():
        return (gradient.to(grad_output.dtype) * grad_output).to(gradient.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    _run(ops.scale_.default, gradient, grad_output)
    return gradient


class KLDiv(torch.autograd.Function):
    """F.kl_div of two tensors of one shape; its backward is differentiable."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, divisor: int | None, log_target: bool) -> Tensor:
        ctx.options = (divisor, log_target)
        # The input's gradient depends on the target alone; a differing dtype of the input must be kept all the same.
        keep_input = ctx.needs_input_grad[1] or input.dtype != target.dtype
        _save(ctx, input if keep_input else None, target)
        return _run(ops.kl_div.default, input, target, divisor, log_target)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target = _saved(ctx)
        needs_grad = ctx.needs_input_grad[:2]
        if _differentiated(grad_output, input, target):
            gradients = composite_kl_div_backward(grad_output, input, target, *ctx.options, *needs_grad)
        else:
            gradients = _run(ops.kl_div_backward.default, grad_output, input, target, *ctx.options, *needs_grad)
        return *_only(gradients, needs_grad), None, None


def composite_kl_div(input: Tensor, target: Tensor, divisor: int | None, log_target: bool) -> Tensor:
    """The result of the operator `kl_div`, from plain operators; the arguments may broadcast."""
    dtype = accumulation_dtype(input, target)
    return reference.reduced(reference.kl_div_terms(input.to(dtype), target.to(dtype), log_target), divisor)


def composite_kl_div_backward(
    grad_output: Tensor,
    input: Tensor | None,
    target: Tensor,
    divisor: int | None,
    log_target: bool,
    grad_input: bool,
    grad_target: bool,
) -> tuple[Tensor, Tensor]:
    """The results of the operator `kl_div_backward`, from plain operators, differentiable again."""
    dtypes = (target.dtype if input is None else input.dtype), target.dtype
    wide = accumulation_dtype(target if input is None else input, target)
    target = target.to(wide)
    p = target.exp() if log_target else target
    dead = p == 0
    grad_terms = grad_output.to(wide) / (divisor or 1)
    input_gradient = target_gradient = target.new_empty([0])
    if grad_input:
        input_gradient = torch.where(dead, 0, -p * grad_terms)
    if grad_target:
        assert input is not None
        log_p = target.masked_fill(dead, 0) if log_target else target.masked_fill(dead, 1).log()
        slope = log_p - torch.where(dead, 0, input.to(wide)) + 1
        target_gradient = torch.where(dead, 0, (p * slope if log_target else slope) * grad_terms)
    return input_gradient.to(dtypes[0]), target_gradient.to(dtypes[1])


# ---------------------------------------------------------------- autograd kernels of the operators


def _distillation_loss(outputs: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
    student, teacher, labels, row_scale, *options = args[:-3]
    loss = composite_distillation_loss(student, teacher, labels, row_scale, OperatorOptions(*options))
    return (loss, *outputs[1:])


def _linear_distillation_loss(outputs: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
    models, (labels, row_scale, *options) = Models(*args[:6]), args[6:-5]
    loss = composite_linear_distillation_loss(models, labels, row_scale, OperatorOptions(*options))
    return (loss, *outputs[1:])


def _kl_div(outputs: Tensor, input: Tensor, target: Tensor, divisor: int | None, log_target: bool) -> Tensor:
    return composite_kl_div(input, target, divisor, log_target).to(outputs.dtype)


def _kl_div_backward(outputs: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, Tensor]:
    return composite_kl_div_backward(*args)


def _not_differentiable(outputs: Any, *args: Any) -> Any:
    raise NotImplementedError(
        "kldiv_ext: this operator cannot be differentiated; kldiv_ext.reference has what can, any number of times"
    )


COMPOSITES: dict[str, Callable[..., Any]] = {
    "distillation_loss": _distillation_loss,
    "distillation_loss_backward": _not_differentiable,
    "distillation_loss_backward_": _not_differentiable,
    "distillation_loss_out": _not_differentiable,
    "linear_distillation_loss": _linear_distillation_loss,
    "token_stats": _not_differentiable,
    "new_output": _not_differentiable,
    "scale_": _not_differentiable,
    "kl_div": _kl_div,
    "kl_div_backward": _kl_div_backward,
}
"""{operator: composite(outputs of the kernel, *arguments)}: what the operator returns where gradients are tracked."""


def _register(name: str, composite: Callable[..., Any]) -> None:
    operator = getattr(ops, name).default

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        tracked = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        return composite(outputs, *args) if tracked or _any_tangent(args) else outputs

    library.impl(name, kernel, "Autograd", with_keyset=True)


for _name, _composite in COMPOSITES.items():
    _register(_name, _composite)
