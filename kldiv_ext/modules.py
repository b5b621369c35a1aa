"""The losses as `torch.nn.Module`s: options at construction, tensors at the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import checks, functional


class KLDivLoss(nn.KLDivLoss):
    r"""`torch.nn.KLDivLoss`, fused; see `kldiv_ext.kl_div`.

    Equivalent to::

        torch.nn.KLDivLoss(size_average, reduce, reduction, log_target)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class DistillationLoss(nn.Module):
    r"""`kldiv_ext.distillation_loss` with its options fixed.

    Args:
        options: the keyword arguments of `kldiv_ext.distillation_loss` that are not tensors: ``divergence``, ``beta``,
            ``skew``, ``alpha``, ``temperature``, ``scale_by_temperature_squared``, ``soft_weight``, ``hard_weight``,
            ``ignore_index``, ``reduction``, ``valid_vocab``, ``logit_softcap``, ``logit_scale``, ``inplace_backward``.

    Equivalent to::

        kldiv_ext.distillation_loss(student_logits, teacher_logits, labels, mask=mask, weight=weight,
                                    num_items=num_items, **options)
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        skew: float = 0.1,
        alpha: float = 0.5,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        valid_vocab: int | None = None,
        logit_softcap: float | tuple[float | None, float | None] | None = None,
        logit_scale: float | tuple[float | None, float | None] | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "skew": skew,
            "alpha": alpha,
            "temperature": temperature,
            "scale_by_temperature_squared": scale_by_temperature_squared,
            "soft_weight": soft_weight,
            "hard_weight": hard_weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "valid_vocab": valid_vocab,
            "logit_softcap": logit_softcap,
            "logit_scale": logit_scale,
            "inplace_backward": inplace_backward,
        }
        checks.check_options(**self.options)

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

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearDistillationLoss(nn.Module):
    r"""`kldiv_ext.linear_distillation_loss` with its options fixed.

    Args:
        options: the keyword arguments of `kldiv_ext.linear_distillation_loss` that are not tensors: ``max_workspace``,
            ``chunk_size``, and those of `DistillationLoss` but for ``inplace_backward``.

    Equivalent to::

        kldiv_ext.linear_distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels,
                                           student_bias=student_bias, teacher_bias=teacher_bias,
                                           teacher_logits=teacher_logits, mask=mask, weight=weight,
                                           num_items=num_items, **options)
    """

    def __init__(
        self,
        *,
        max_workspace: int | None = None,
        chunk_size: int | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        skew: float = 0.1,
        alpha: float = 0.5,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        valid_vocab: int | None = None,
        logit_softcap: float | tuple[float | None, float | None] | None = None,
        logit_scale: float | tuple[float | None, float | None] | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "skew": skew,
            "alpha": alpha,
            "temperature": temperature,
            "scale_by_temperature_squared": scale_by_temperature_squared,
            "soft_weight": soft_weight,
            "hard_weight": hard_weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "valid_vocab": valid_vocab,
            "logit_softcap": logit_softcap,
            "logit_scale": logit_scale,
        }
        checks.check_options(**options)
        checks.check_workspace(max_workspace, chunk_size)
        self.options = {"max_workspace": max_workspace, "chunk_size": chunk_size, **options}

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

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
