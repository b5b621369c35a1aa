"""The losses as `torch.nn.Module`s: options at construction, tensors at the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import functional


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
            ``skew``, ``alpha``, ``temperature``, ``scale_by_temperature_squared``, ``ignore_index``, ``reduction``.

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
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "skew": skew,
            "alpha": alpha,
            "temperature": temperature,
            "scale_by_temperature_squared": scale_by_temperature_squared,
            "ignore_index": ignore_index,
            "reduction": reduction,
        }
        functional.check_options(**self.options)

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
