"""The torch.autograd.Functions, and the operators' own autograd kernels beneath them.

A Function runs the fused operators, and plain ones take over under torch.func transforms and forward-mode AD. Beneath
it every operator has an autograd kernel of its own, because the compiler may inline a Function and call operators
while gradients are tracked: there a plain composite takes over as well, instead of a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._library import accumulation_dtype, library, ops
from .linear import Models, Workspace


class Options(NamedTuple):
    """What an operator is told besides its tensors, in the order of the schema."""

    soft_scale: float
    hard_scale: float
    reduction: str
    divergence: str
    parameter: float
    temperature: float
    logit_scale: tuple[float, float]  # student, teacher
    logit_softcap: tuple[float, float]  # 0 for none
    valid_vocab: int | None


def plain_needed(*tensors: Tensor | None) -> bool:
    """Whether a mode is active that only plain operators can serve: a torch.func transform or forward-mode AD."""
    return _transforming() or (not torch.compiler.is_compiling() and _any_tangent(tensors))


def _transforming() -> bool:
    # By type, since to the compiler what is looked up here is never None.
    return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)


def _any_tangent(tensors: Iterable[Any]) -> bool:
    """Whether a tensor carries a tangent of forward-mode AD, which has one level, 0, at a time."""
    if torch.autograd.forward_ad._current_level < 0 and not _transforming():
        return False  # the usual case, without a look at each tensor
    return any(isinstance(t, Tensor) and torch._VF._unpack_dual(t, level=0)[1] is not None for t in tensors)


def plain_distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None, row_scale: Tensor | None, options: Options
) -> Tensor:
    """What the operator `distillation_loss` returns as its loss, from plain operators in float64."""
    shape, dtype = student.shape, accumulation_dtype(student, teacher)
    if labels is not None:
        labels = labels.reshape(shape[:-1])
    if options.soft_scale == 0 and options.hard_scale == 0:
        row_scale = torch.zeros(shape[:-1], dtype=dtype, device=student.device).reshape(-1)
    if row_scale is not None:  # a row whose scale is 0 is not read
        dead = (row_scale == 0).reshape(shape[:-1])
        student, teacher = student.masked_fill(dead[..., None], 0), teacher.masked_fill(dead[..., None], 0)
        labels = None if labels is None else labels.masked_fill(dead, 0)
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
    if options.reduction == "mean":
        losses = losses / max(losses.numel(), 1)
    elif options.reduction == "batchmean" and len(shape) > 1:
        losses = losses / max(shape[0], 1)
    return (losses if options.reduction == "none" else losses.sum()).to(dtype)


def _run(operator: Any, *args: Any) -> Any:
    """An operator's kernel, from within a Function: nothing is left for the operator's autograd kernel to do, and on
    small tensors it would take as long as all else.
    """
    if torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward, also of tensors made in inference mode, as a teacher's often are: autograd refuses those, and
    has no need of them, for they have neither history nor version.
    """
    kept = [t is not None and not torch.compiler.is_compiling() and t.is_inference() for t in tensors]
    ctx.inference = [t if k else None for t, k in zip(tensors, kept, strict=True)]
    ctx.save_for_backward(*(None if k else t for t, k in zip(tensors, kept, strict=True)))


def _saved(ctx: Any) -> list[Any]:
    return [s if i is None else i for s, i in zip(ctx.saved_tensors, ctx.inference, strict=True)]


class DistillationLoss(torch.autograd.Function):
    """distillation_loss with its gradients: made in forward where that is free, else in backward from the row
    constants: with reduction "none", where it is to be written over the logits, and in float16, where a gradient
    stored before it meets the GradScaler's factor would underflow. The logits are saved in any case, for a backward
    that is to be differentiated; autograd lets go of them as soon as this backward, the first of all, has run.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        row_scale: Tensor | None,
        options: Options,
        in_place: bool,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        ctx.options = options
        ctx.in_place = in_place and wanted[0] and not torch.compiler.is_compiling()
        ctx.early = (
            options.reduction != "none"
            and not ctx.in_place
            and all(t.dtype != torch.float16 for t, w in zip((student, teacher), wanted, strict=True) if w)
        )
        loss, row_constants, *gradients = _run(
            ops.distillation_loss.default, student, teacher, labels, row_scale, *options, *wanted, ctx.early
        )
        _save(ctx, student, teacher, labels, row_scale, *(gradients if ctx.early else [row_constants]))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        student, teacher, labels, row_scale, *computed = _saved(ctx)
        if _differentiated(grad_output):
            if ctx.in_place:
                raise RuntimeError("inplace_backward=True: the gradient cannot be differentiated again or batched")

            def plain(student: Tensor, teacher: Tensor) -> Tensor:
                return plain_distillation_loss(student, teacher, labels, row_scale, ctx.options)

            computed = _gradients(plain, (student, teacher), wanted, grad_output)
        elif ctx.early:
            computed = [_scaled(g, grad_output) if w else g for g, w in zip(computed, wanted, strict=True)]
        else:
            args = (grad_output.contiguous(), student, teacher, *computed, labels, row_scale, *ctx.options)
            if ctx.in_place:
                of_teacher = _run(ops.distillation_loss_backward_.default, *args, wanted[1])
                torch.autograd.graph.increment_version(student)  # so that whoever still needs the logits raises
                computed = [student.detach(), of_teacher]
            else:
                computed = _run(ops.distillation_loss_backward.default, *args, *wanted)
        return *(g if w else None for g, w in zip(computed, wanted, strict=True)), None, None, None, None


def plain_linear_distillation_loss(
    models: Models, labels: Tensor | None, row_scale: Tensor | None, options: Options
) -> Tensor:
    """What the operator `linear_distillation_loss` returns as its loss, from plain operators in float64."""

    def logits(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None:
            return hidden
        if row_scale is not None:  # 0 * nan would get into the weight's gradient
            hidden = hidden.masked_fill((row_scale == 0).reshape(hidden.shape[:-1])[..., None], 0)
        product = hidden.double() @ weight[: options.valid_vocab].double().t()
        return product if bias is None else product + bias[: options.valid_vocab].double()

    student = logits(models.student, models.student_weight, models.student_bias)
    teacher = logits(models.teacher, models.teacher_weight, models.teacher_bias)
    dtype = accumulation_dtype(models.student, models.teacher)
    return plain_distillation_loss(student, teacher, labels, row_scale, options).to(dtype)


class LinearDistillationLoss(torch.autograd.Function):
    """linear_distillation_loss with its gradients, made in forward or in backward as those of `DistillationLoss` are;
    in backward the logits are computed again. All of `models` are saved, for a backward that is to be differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher: Tensor,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor | None,
        row_scale: Tensor | None,
        options: Options,
        workspace: Workspace,
    ) -> Tensor:
        models = Models(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias)
        wanted = ctx.needs_input_grad[:6]
        ctx.options, ctx.workspace = options, workspace
        dtypes = workspace.product_dtypes(models)
        ctx.early = options.reduction != "none" and all(
            dtype != torch.float16 or not any(w) for dtype, w in zip(dtypes, (wanted[:3], wanted[3:]), strict=True)
        )
        now = [w and ctx.early for w in wanted]
        loss, *gradients = _run(
            ops.linear_distillation_loss.default, *models, labels, row_scale, *options, None, *workspace, now
        )
        _save(ctx, *models, labels, row_scale, *(gradients if ctx.early else []))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:6]
        saved = _saved(ctx)
        models, (labels, row_scale, *computed) = Models(*saved[:6]), saved[6:]
        if _differentiated(grad_output):

            def plain(*views: Any) -> Tensor:
                return plain_linear_distillation_loss(Models(*views), labels, row_scale, ctx.options)

            computed = _gradients(plain, models, wanted, grad_output)
        elif ctx.early:
            computed = [_scaled(g, grad_output) if w else g for g, w in zip(computed, wanted, strict=True)]
        else:
            arguments = (*models, labels, row_scale, *ctx.options, grad_output.contiguous(), *ctx.workspace)
            computed = _run(ops.linear_distillation_loss.default, *arguments, list(wanted))[1:]
        return *(g if w else None for g, w in zip(computed, wanted, strict=True)), None, None, None, None


def _differentiated(grad_output: Tensor, *saved: Tensor | None) -> bool:
    """Whether a backward is itself differentiated or transformed. The compiler never does that to a Function."""
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor(grad_output)  # by torch.autograd.grad(is_grads_batched=True)
    return batched or torch.is_grad_enabled() or plain_needed(grad_output, *saved)


def _gradients(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    """Those of a loss that is made of plain operators, differentiable again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that one tensor given twice gets two gradients.
        views = [None if x is None else x.view_as(x) for x in inputs]
        sources = [x for x, w in zip(views, wanted, strict=True) if w and x is not None]
        gradients = iter(torch.autograd.grad(loss(*views), sources, grad_output, create_graph=again))
    return [next(gradients) if w else None for w in wanted]


def _scaled(gradient: Tensor, grad_output: Tensor) -> Tensor:
    """gradient * grad_output, without a read of the device; in place where nobody can see it."""
    if torch.compiler.is_compiling():
        return (gradient.to(grad_output.dtype) * grad_output).to(gradient.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    _run(ops.scale_.default, gradient, grad_output)
    return gradient


class KLDiv(torch.autograd.Function):
    """F.kl_div of two tensors of one shape; its backward is differentiable."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
        ctx.options = (reduction, log_target)
        # The input's gradient needs the target alone (and, for its dtype, an input that differs in it).
        keep_input = ctx.needs_input_grad[1] or input.dtype != target.dtype
        _save(ctx, input if keep_input else None, target)
        return _run(ops.kl_div.default, input, target, reduction, log_target)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target = _saved(ctx)
        wanted = ctx.needs_input_grad[:2]
        if _differentiated(grad_output, input, target):
            gradients = plain_kl_div_backward(grad_output, input, target, *ctx.options, *wanted)
        else:
            gradients = _run(ops.kl_div_backward.default, grad_output, input, target, *ctx.options, *wanted)
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None


def plain_kl_div(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    """The terms or the sum that the operator `kl_div` computes, from plain operators; also of broadcast arguments."""
    dtype = accumulation_dtype(input, target)
    return reference.plain_kl_div(input.to(dtype), target.to(dtype), reduction, log_target)


def plain_kl_div_backward(
    grad_output: Tensor,
    input: Tensor | None,
    target: Tensor,
    reduction: str,
    log_target: bool,
    grad_input: bool,
    grad_target: bool,
) -> tuple[Tensor, Tensor]:
    """What the operator `kl_div_backward` returns, from plain operators, differentiable again."""
    dtypes = (target.dtype if input is None else input.dtype), target.dtype
    wide = accumulation_dtype(target if input is None else input, target)
    target = target.to(wide)
    divisor = {"mean": target.numel(), "batchmean": target.shape[0]}.get(reduction, 1)
    p = target.exp() if log_target else target
    dead = p == 0
    grad_terms = grad_output.to(wide) / divisor
    of_input = of_target = target.new_empty([0])
    if grad_input:
        of_input = torch.where(dead, 0, -p * grad_terms)
    if grad_target:
        assert input is not None
        log_p = target.masked_fill(dead, 0) if log_target else target.masked_fill(dead, 1).log()
        slope = log_p - torch.where(dead, 0, input.to(wide)) + 1
        of_target = torch.where(dead, 0, (p * slope if log_target else slope) * grad_terms)
    return of_input.to(dtypes[0]), of_target.to(dtypes[1])


# ---------------------------------------------------------------- autograd kernels of the operators


def _plain_distillation_op(outputs: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
    student, teacher, labels, row_scale, *options = args[:-3]
    return (plain_distillation_loss(student, teacher, labels, row_scale, Options(*options)), *outputs[1:])


def _plain_linear_distillation_op(outputs: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
    models, (labels, row_scale, *options) = Models(*args[:6]), args[6:-5]
    return (plain_linear_distillation_loss(models, labels, row_scale, Options(*options)), *outputs[1:])


def _plain_kl_div_op(outputs: Tensor, input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    return plain_kl_div(input, target, reduction, log_target).to(outputs.dtype)


def _plain_kl_div_backward_op(outputs: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, Tensor]:
    return plain_kl_div_backward(*args)


def _not_differentiable(outputs: Any, *args: Any) -> Any:
    raise NotImplementedError(
        "kldiv_ext: this operator cannot be differentiated; kldiv_ext.reference has what can, any number of times"
    )


PLAIN: dict[str, Callable[..., Any]] = {
    "distillation_loss": _plain_distillation_op,
    "distillation_loss_backward": _not_differentiable,
    "distillation_loss_backward_": _not_differentiable,
    "distillation_loss_out": _not_differentiable,
    "linear_distillation_loss": _plain_linear_distillation_op,
    "token_stats": _not_differentiable,
    "new_output": _not_differentiable,
    "scale_": _not_differentiable,
    "kl_div": _plain_kl_div_op,
    "kl_div_backward": _plain_kl_div_backward_op,
}
"""Per operator: what to return where a gradient has to flow, given what the kernel returned."""


def _register(name: str, plain: Callable[..., Any]) -> None:
    operator = getattr(ops, name).default

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        tracked = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        return plain(outputs, *args) if tracked or _any_tangent(args) else outputs

    library.impl(name, kernel, "Autograd", with_keyset=True)


for _name, _plain in PLAIN.items():
    _register(_name, _plain)
