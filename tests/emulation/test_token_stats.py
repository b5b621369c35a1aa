"""csrc/cuda/token_stats.cu."""

from typing import Any

import torch

from emulation import cases
from emulation.harness import Kernels, accumulation_dtype
from kldiv_ext import reference


@cases.each_dtype(*cases.DTYPES)
def test_token_stats(kernels: Kernels, dtype: torch.dtype) -> None:
    other: dict[str, Any] = {"temperature": 1.5, "logit_scale": (0.5, 2.0), "logit_softcap": (0.0, 3.0)}
    for i, columns in enumerate(cases.COLUMNS):
        kernels.set_order(*cases.ORDERS[i % len(cases.ORDERS)])
        student, teacher = cases.logits(5, columns, dtype)
        teacher[1] = student[1]  # they agree
        labels = torch.tensor([0, columns - 1, columns // 2, 0, 0])
        counts = torch.tensor([1, 1, 1, 0, 1], dtype=accumulation_dtype(student))
        for options in ({}, other):
            stats = kernels.token_stats(student, teacher, labels, counts, **options)
            expected = reference.token_stats(student, teacher, labels, mask=counts != 0, **options)
            for value, exact in zip(stats.unbind(-1), expected, strict=True):
                assert exact is not None
                cases.assert_losses(value, exact, atol=20 * cases.LOSS_TOLERANCE[value.dtype])
            assert torch.equal(stats[:, -1] != 0, expected[-1])
