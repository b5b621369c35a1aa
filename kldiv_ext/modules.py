"""The losses as `torch.nn.Module`s: options at construction, tensors at the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from . import functional
from .options import DistillationOptions, LinearDistillationOptions, completed, takes


class KLDivLoss(nn.KLDivLoss):
    r"""`torch.nn.KLDivLoss`, fused; see `kldiv_ext.kl_div`.

    Equivalent to:

        torch.nn.KLDivLoss(size_average, reduce, reduction, log_target)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class _Loss(nn.Module):
    """A loss whose options are fixed at construction."""

    def __init__(self, kind: type, given: Any) -> None:
        super().__init__()
        self.options: Any = completed(type(self).__name__, kind, given)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DistillationLoss(_Loss):
    r"""`kldiv_ext.distillation_loss` with its options fixed.

    Equivalent to:

        kldiv_ext.distillation_loss(student_logits, teacher_logits, labels, mask=mask, weight=weight,
                                    num_items=num_items, **options)
    """

    @takes(DistillationOptions)
    def __init__(self, **options: Unpack[DistillationOptions]) -> None:
        """Fix the options.

        Args:
            **options: The keywords of `kldiv_ext.options.DistillationOptions`.
        """
        super().__init__(DistillationOptions, options)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return functional.distillation_loss(
            student_logits, teacher_logits, labels, mask=mask, weight=weight, num_items=num_items, **self.options
        )


class LinearDistillationLoss(_Loss):
    r"""`kldiv_ext.linear_distillation_loss` with its options fixed.

    Equivalent to:

        kldiv_ext.linear_distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels,
                                           student_bias=student_bias, teacher_bias=teacher_bias,
                                           teacher_logits=teacher_logits, mask=mask, weight=weight,
                                           num_items=num_items, **options)
    """

    @takes(LinearDistillationOptions)
    def __init__(self, **options: Unpack[LinearDistillationOptions]) -> None:
        """Fix the options.

        Args:
            **options: The keywords of `kldiv_ext.options.LinearDistillationOptions`.
        """
        super().__init__(LinearDistillationOptions, options)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return functional.linear_distillation_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            mask=mask,
            weight=weight,
            num_items=num_items,
            **self.options,
        )
