"""csrc/cuda/token_stats.cu."""

from __future__ import annotations

from typing import Any

import torch

from emulation.cases import COLUMNS, EVERY_DTYPE, LOSS_TOLERANCE, ORDERS, assert_losses, logits
from emulation.harness import Kernels
from kldiv_ext import reference


@EVERY_DTYPE
def test_token_stats(kernels: Kernels, dtype: torch.dtype) -> None:
    other: dict[str, Any] = {"temperature": 1.5, "logit_scale": (0.5, 2.0), "logit_softcap": (0.0, 3.0)}
    for i, columns in enumerate(COLUMNS):
        kernels.set_order(*ORDERS[i % len(ORDERS)])
        student, teacher = logits(5, columns, dtype)
        teacher[1] = student[1]  # they agree
        labels = torch.tensor([0, columns - 1, columns // 2, 0, 0])
        mask = torch.tensor([True, True, True, False, True])
        for options in ({}, other):
            row_scale = mask.to(torch.float64 if dtype == torch.float64 else torch.float32)
            stats = kernels.token_stats(student, teacher, labels, row_scale, **options)
            expected = reference.token_stats(student, teacher, labels, mask=mask, **options)
            *values, agree = torch.stack([e.double() for e in expected if e is not None], -1).unbind(-1)
            assert_losses(stats[:, :-1], torch.stack(values, -1), atol=20 * LOSS_TOLERANCE[stats.dtype])
            assert torch.equal(stats[:, -1].double(), agree)
